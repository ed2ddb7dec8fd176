"""Metrics of depths against NumPy, on whole batches and sample by sample."""

import math

import numpy as np
import pytest
import torch
from vqcore_vision.metrics import AbsRel, Delta

from vqcore.protocols import DataSpec
from vqcore.registry import registry

DEPTH = DataSpec(channels=1, size=(6, 5))
RNG = np.random.default_rng(0)


def summary_of(metric, x_hat, x, mask=None):
    """The summary of a batch; sums over single samples must give the same summary."""
    parts = [(slice(None),), *((slice(i, i + 1),) for i in range(len(x)))]
    sums = [metric.measure(x_hat[p], x[p], None if mask is None else mask[p]) for p in parts]
    assert all(value.dtype == torch.float64 for part in sums for value in part.values())
    whole = metric.summary(sums[0])
    added = metric.summary({name: sum(part[name] for part in sums[1:]) for name in sums[0]})
    assert added == pytest.approx(whole, rel=1e-9, nan_ok=True)
    return whole


def test_relative_errors_and_ratios_of_depths():
    true = RNG.uniform(0.5, 10, (4, 1, 6, 5))
    y, x = torch.from_numpy(true * np.exp(RNG.normal(size=true.shape) * 0.3)), torch.from_numpy(true)
    mask = torch.from_numpy(RNG.random((4, 6, 5)) < 0.7)
    a, b = y.numpy()[:, 0][mask.numpy()], x.numpy()[:, 0][mask.numpy()]
    result = summary_of(AbsRel(AbsRel.Config(), spec=DEPTH), y, x, mask)
    expected = [(np.abs(a - b) / b).mean(), np.sqrt(((a - b) ** 2).mean())]
    assert result == {"": pytest.approx(expected[0]), "rmse": pytest.approx(expected[1])}
    shares = [(np.maximum(a / b, b / a) < 1.25**k).mean() for k in (1, 2, 3)]
    result = summary_of(Delta(Delta.Config(), spec=DEPTH), y, x, mask)
    assert list(result.items()) == [("", pytest.approx(shares[0])), ("2", shares[1]), ("3", shares[2])]
    assert 0 < shares[0] < shares[1] < shares[2] <= 1


def test_holes_of_the_truth_do_not_count_and_holes_of_the_reconstruction_do():
    x = torch.tensor([2.0, math.nan, -3.0, 0.0, 4.0]).reshape(1, 1, 1, 5)
    y = torch.tensor([2.0, 9.0, 9.0, 9.0, math.nan]).reshape(1, 1, 1, 5)
    assert summary_of(AbsRel(AbsRel.Config(), spec=DEPTH), y, x)[""] == pytest.approx((0 + 1) / 2)
    assert summary_of(Delta(Delta.Config(), spec=DEPTH), y, x)[""] == pytest.approx(1 / 2)


@pytest.mark.parametrize("metric", [AbsRel, Delta])
def test_without_a_valid_position_the_metric_is_nan(metric):
    nothing = torch.zeros(1, 6, 5, dtype=torch.bool)
    ones = torch.ones(1, 1, 6, 5)
    assert math.isnan(summary_of(metric(metric.Config(), spec=DEPTH), ones, ones, nothing)[""])


@pytest.mark.parametrize(
    "metric, kind, says",
    [
        (AbsRel, "unit-vector", "abs-rel is for measured quantities, not for unit-vector"),
        (Delta, "binary", "delta is for measured quantities, not for binary"),
    ],
)
def test_other_kinds_of_data_are_refused(metric, kind, says):
    with pytest.raises(ValueError, match=says):
        metric(metric.Config(), spec=DataSpec(channels=3, size=(6, 5), kind=kind))


def test_metrics_are_known_by_name_and_say_which_direction_is_better():
    assert registry().load("metric", "vision/abs-rel") is AbsRel and AbsRel.better == "lower"
    assert registry().load("metric", "vision/delta") is Delta and Delta.better == "higher"
