"""Metrics of classes, edges and directions against scikit-learn and NumPy, on whole batches and sample by sample."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from vqcore.metrics.labels import F1, IoU
from vqcore.metrics.vectors import Angle, Cosine
from vqcore.protocols import DataSpec
from vqcore.registry import registry

CLASSES = DataSpec(channels=1, size=(6, 5), kind="categorical", labels=5, range=None)
BINARY = DataSpec(channels=1, size=(6, 5), kind="binary")
NORMALS = DataSpec(channels=3, size=(6, 5), kind="unit-vector")
ANGLES = DataSpec(channels=4, size=(6, 5), kind="angle")
DEPTH = DataSpec(channels=1, size=(6, 5))
RNG = np.random.default_rng(0)


def summary_of(metric, x_hat, x, mask=None):
    """The summary of a batch; sums over single samples must give the same summary."""
    parts = [(slice(None),), *((slice(i, i + 1),) for i in range(len(x)))]
    sums = [metric.measure(x_hat[p], x[p], None if mask is None else mask[p]) for p in parts]
    assert all(value.dtype == torch.float64 for part in sums for value in part.values())
    whole = metric.summary(sums[0])
    added = metric.summary({name: sum(part[name] for part in sums[1:]) for name in sums[0]})
    for name, value in whole.items():
        assert math.isclose(added[name], value, rel_tol=1e-9) or (
            math.isnan(value) and math.isnan(added[name])
        )
    return whole


def random_mask(shape):
    return torch.from_numpy(RNG.random(shape) < 0.7)


def test_iou_of_classes():
    x = torch.from_numpy(RNG.choice([0, 1, 3], (4, 6, 5)))  # 2 and 4 never occur, but are predicted
    logits = torch.from_numpy(RNG.normal(size=(4, 5, 6, 5)))
    mask = random_mask((4, 6, 5))
    metric = IoU(IoU.Config(per_class=True), spec=CLASSES)
    for valid in (None, mask):
        keep = (torch.ones_like(mask) if valid is None else valid).numpy()
        true, found = x.numpy()[keep], logits.argmax(1).numpy()[keep]
        each = jaccard_score(true, found, labels=[0, 1, 3], average=None)
        result = summary_of(metric, logits, x, valid)
        assert result.keys() == {"", "0", "1", "3"}
        assert list(result.values()) == pytest.approx([each.mean(), *each])


def test_iou_and_f1_of_binary_data():
    x = torch.where(torch.from_numpy(RNG.random((4, 1, 6, 5)) < 0.3), 1.0, -1.0)
    x_hat = x * 0.2 + torch.from_numpy(RNG.normal(size=x.shape)).float() * 0.3
    mask = random_mask((4, 6, 5))
    true, found = (t.numpy()[:, 0][mask.numpy()] > 0 for t in (x, x_hat))
    result = summary_of(IoU(IoU.Config(), spec=BINARY), x_hat, x, mask)
    assert result == {"": pytest.approx(jaccard_score(true, found))}
    result = summary_of(F1(F1.Config(), spec=BINARY), x_hat, x, mask)
    expected = [score(true, found) for score in (f1_score, precision_score, recall_score)]
    assert list(result.values()) == pytest.approx(expected)


def test_the_threshold_of_f1_is_a_share_of_the_range():
    spec = DataSpec(channels=1, size=(1, 4), range=(0.0, 10.0))
    x, x_hat = torch.tensor([[[[1.0, 3.0, 6.0, 9.0]]]]), torch.tensor([[[[1.0, 1.0, 6.0, 9.0]]]])
    assert summary_of(F1(F1.Config(), spec=spec), x_hat, x)["recall"] == 1
    assert summary_of(F1(F1.Config(threshold=0.2), spec=spec), x_hat, x)["recall"] == pytest.approx(2 / 3)
    nothing = summary_of(F1(F1.Config(threshold=0.95), spec=spec), x_hat, x)
    assert nothing == {"": 0.0, "precision": 0.0, "recall": 0.0}
    with pytest.raises(ValueError, match=r"threshold=1\.0"):
        F1.Config(threshold=1.0)


def test_angles_between_vectors():
    x = RNG.normal(size=(4, 3, 6, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = (x + RNG.normal(size=x.shape) * 0.4) * RNG.uniform(0.1, 3, (4, 1, 6, 5))
    mask = random_mask((4, 6, 5))
    cosine = (x * y).sum(1) / np.linalg.norm(y, axis=1)
    degrees = np.degrees(np.arccos(np.clip(cosine, -1, 1)))[mask.numpy()]
    result = summary_of(Angle(Angle.Config(), spec=NORMALS), torch.from_numpy(y), torch.from_numpy(x), mask)
    assert result[""] == pytest.approx(degrees.mean(), abs=1e-5)
    middle = np.sort(degrees)[(len(degrees) - 1) // 2 : len(degrees) // 2 + 1]
    assert middle.min() - 0.0051 <= result["median"] <= middle.max() + 0.0051
    for limit in (11.25, 22.5, 30):
        assert result[f"within-{limit:g}"] == pytest.approx((degrees <= limit).mean())
    result = summary_of(Cosine(Cosine.Config(), spec=NORMALS), torch.from_numpy(y), torch.from_numpy(x), mask)
    assert result[""] == pytest.approx(cosine[mask.numpy()].mean())


def test_equal_and_opposite_vectors():
    x = torch.tensor([0.6, 0.0, 0.8]).reshape(1, 3, 1, 1).expand(2, 3, 6, 5)
    metric = Angle(Angle.Config(), spec=NORMALS)
    assert summary_of(metric, x * 5, x)[""] < 1e-5
    assert summary_of(metric, -x, x)[""] == pytest.approx(180)
    assert summary_of(metric, x * 0, x)[""] == pytest.approx(90)
    tiny = torch.tensor([1e-4, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 6, 5)
    straight = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 6, 5)
    assert summary_of(metric, tiny, straight)[""] == pytest.approx(math.degrees(1e-4), rel=1e-4)


def test_angles_of_angle_data_go_round():
    x, off = RNG.uniform(-3, 3, (2, 2, 6, 5)), RNG.uniform(-3, 3, (2, 2, 6, 5))
    x_hat = np.arctan2(np.sin(x + off), np.cos(x + off))
    result = summary_of(Angle(Angle.Config(), spec=ANGLES), torch.from_numpy(x_hat), torch.from_numpy(x))
    assert result[""] == pytest.approx(np.degrees(np.abs(off)).mean(), rel=1e-6)


@pytest.mark.parametrize(
    "metric, spec, data",
    [
        (IoU, CLASSES, (torch.zeros(1, 5, 6, 5), torch.zeros(1, 6, 5, dtype=torch.int64))),
        (Angle, NORMALS, (torch.ones(1, 3, 6, 5), torch.ones(1, 3, 6, 5))),
        (Cosine, NORMALS, (torch.ones(1, 3, 6, 5), torch.ones(1, 3, 6, 5))),
    ],
)
def test_without_a_valid_position_the_metric_is_nan(metric, spec, data):
    nothing = torch.zeros(1, 6, 5, dtype=torch.bool)
    assert math.isnan(summary_of(metric(metric.Config(), spec=spec), *data, nothing)[""])


@pytest.mark.parametrize(
    "metric, spec, says",
    [
        (IoU, NORMALS, "iou is for class maps and binary data, not for unit-vector"),
        (F1, CLASSES, "declared range"),
        (Angle, DEPTH, "not for continuous data of 1 channel"),
        (Cosine, CLASSES, "not for categorical data"),
    ],
)
def test_other_kinds_of_data_are_refused(metric, spec, says):
    with pytest.raises(ValueError, match=says):
        metric(metric.Config(), spec=spec)


def test_metrics_are_known_by_name_and_say_which_direction_is_better():
    for name, cls in {
        "iou": IoU,
        "f1": F1,
        "angle": Angle,
        "cosine": Cosine,
    }.items():
        assert registry().load("metric", name) is cls
        assert cls.better == ("lower" if name == "angle" else "higher")
