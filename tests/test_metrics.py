"""Metrics, code figures, the schedule, parameter groups and the running average against their formulas."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from vqcore.errors import DataError
from vqcore.evaluate.usage import CodeCounts, CodeWindow
from vqcore.metrics.labels import Accuracy
from vqcore.metrics.pixels import MAE, PSNR
from vqcore.metrics.ssim import SSIM
from vqcore.objectives import pixel_loss
from vqcore.protocols import DataSpec, Facts
from vqcore.run.optim import Ema, learning_rate, parameter_groups
from vqcore.schema import OptimSection

SPEC = DataSpec(channels=3, size=(4, 4))


def measured(metric, *batches):
    parts = [metric.measure(*batch) for batch in batches]
    return metric.summary({name: sum(part[name] for part in parts) for name in parts[0]})[""]


def test_psnr_is_the_mean_over_samples_however_they_are_batched():
    x = torch.rand(5, 3, 4, 4) * 2 - 1
    x_hat = x + 0.1 * torch.randn(5, 3, 4, 4)
    each = 10 * np.log10(4 / ((x_hat.clamp(-1, 1) - x).double().numpy() ** 2).mean((1, 2, 3)))
    metric = PSNR(PSNR.Config(), spec=SPEC)
    assert measured(metric, (x_hat, x)) == pytest.approx(each.mean(), abs=1e-9)
    assert measured(metric, (x_hat[:2], x[:2]), (x_hat[2:], x[2:])) == pytest.approx(each.mean(), abs=1e-9)
    assert measured(metric, (x, x)) == pytest.approx(100)


def test_psnr_of_pictures_is_on_8_bit_levels():
    """As scikit-image on the rounded pictures; the PSNR of the mean error is another number."""
    skimage = pytest.importorskip("skimage.metrics")
    spec = DataSpec(channels=3, size=(4, 4), range=(0.0, 1.0), levels=255)
    x = (torch.rand(5, 3, 4, 4) * 255).round() / 255
    x_hat = x + torch.tensor([0.003, 0.01, 0.1, 0.2, 0.3]).reshape(5, 1, 1, 1) * torch.randn(5, 3, 4, 4)
    levels = [(one.double().clamp(0, 1) * 255).round().numpy() for one in (x, x_hat)]
    each = [skimage.peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(*levels)]
    found = measured(PSNR(PSNR.Config(), spec=spec), (x_hat, x))
    assert found == pytest.approx(np.mean(each), abs=1e-9)
    assert abs(found - measured(PSNR(PSNR.Config(), spec=replace(spec, levels=None)), (x_hat, x))) > 1e-3
    assert found - 10 * np.log10(255**2 / np.square(levels[0] - levels[1]).mean()) > 5
    seen = PSNR(PSNR.Config(), spec=spec)
    assert measured(seen, (x + 0.0019, x)) == 100  # less than half a level: nobody could store it


@pytest.mark.parametrize("metric", [PSNR, SSIM])
def test_a_range_that_does_not_fit_the_data_is_refused(metric):
    x = torch.rand(2, 1, 12, 12) * 3
    made = metric(metric.Config(), spec=DataSpec(channels=1, size=(12, 12), range=(0.0, 1.0)))
    with pytest.raises(
        DataError, match="for values from 0 to 1, which the modality declares, but a sample has"
    ):
        made.measure(x, x)
    valid = (x <= 1)[:, 0]
    made.measure(x.clamp(0, 1), x, valid)  # hidden values may be anything
    assert "range 0 to 1" in made.facts()["convention"]


def test_masked_positions_do_not_count():
    x = torch.zeros(1, 3, 4, 4)
    x_hat = x.clone()
    x_hat[..., 0] = 0.5
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[..., 0] = False
    assert measured(MAE(MAE.Config(), spec=SPEC), (x_hat, x)) == pytest.approx(0.125)
    assert measured(MAE(MAE.Config(), spec=SPEC), (x_hat, x, mask)) == 0
    assert float(pixel_loss("l1", x_hat, x, mask)) == 0
    assert float(pixel_loss("mse", x_hat, x)) == pytest.approx(0.0625)


def test_accuracy_counts_positions():
    spec = DataSpec(channels=1, size=(2, 2), kind="categorical", labels=3, range=None)
    x = torch.tensor([[[0, 1], [2, 2]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [2, 0]]]), 3).permute(0, 3, 1, 2).float()
    assert measured(Accuracy(Accuracy.Config(), spec=spec), (logits, x)) == 0.75


def test_psnr_refuses_data_without_a_range():
    with pytest.raises(ValueError, match="declared range"):
        PSNR(PSNR.Config(), spec=DataSpec(channels=1, size=(4,), range=None))


def test_code_figures_of_known_counts():
    counts = CodeCounts(4, 2)
    counts.add_column(0, torch.tensor([0, 1] * 5))
    counts.add_column(1, torch.arange(4))
    figures = counts.metrics()
    assert figures == {
        "codes/usage": pytest.approx(0.75),  # 2 and 4 of 4 codes
        "codes/perplexity": pytest.approx(3.0),
        "codes/entropy": pytest.approx(1.5),  # 1 bit and 2 bits
    }


def test_the_window_forgets_what_is_older():
    window = CodeWindow(codebook_size=4, num_codebooks=1, window=6)
    window.add(torch.tensor([[[0], [1]], [[2], [3]]]))
    assert window.metrics()["codes/usage"] == 1
    window.add(torch.zeros(1, 4, 1, dtype=torch.int64))  # 6 hold 2, 3 and four zeros
    assert window.metrics()["codes/usage"] == 0.75
    window.add(torch.zeros(1, 20, 1, dtype=torch.int64))
    assert window.metrics() == {
        "codes/usage": 0.25,
        "codes/perplexity": pytest.approx(1.0),
        "codes/entropy": 0,
    }


def test_codes_that_are_not_valid_do_not_count():
    codes, valid = torch.tensor([[[0], [1]], [[2], [3]]]), torch.tensor([[True, False], [True, False]])
    counts, window = CodeCounts(4, 1), CodeWindow(codebook_size=4, num_codebooks=1, window=6)
    for _ in range(2):
        counts.add(codes, valid)
        window.add(codes, valid=valid)
    assert counts.tokens == window.held == window.taken == 4
    expected = {"codes/usage": 0.5, "codes/entropy": 1.0, "codes/perplexity": pytest.approx(2.0)}
    assert counts.metrics() == expected and window.metrics() == expected
    window.add(codes, valid=torch.zeros(2, 2, dtype=torch.bool))
    assert window.metrics() == expected


def test_bits_per_position():
    spec = DataSpec(channels=3, size=(128, 128))
    assert Facts(spec, (128, 128), (16, 16), 4096, 1, {}).bits_per_position == pytest.approx(12 / 64)


def test_learning_rate_warms_up_then_falls_like_a_cosine():
    cfg = OptimSection(base_lr=1e-3, warmup=10, min_lr=1e-5)
    rate = [learning_rate(cfg, step, horizon=110, total_batch=512) for step in range(130)]
    assert rate[0] == pytest.approx(2e-4) and rate[9] == pytest.approx(2e-3)
    assert rate[10] == pytest.approx(2e-3) and rate[60] == pytest.approx(1e-5 + (2e-3 - 1e-5) / 2)
    assert rate[109] > 1e-5 and rate[110] == pytest.approx(1e-5) and rate[129] == pytest.approx(1e-5)
    assert all(a < b for a, b in pairwise(rate[:10])) and all(a > b for a, b in pairwise(rate[10:111]))


def test_only_matrices_decay():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Linear(4, 4))
    decayed, free = parameter_groups(net, 0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in free["params"]} == {1} and free["weight_decay"] == 0.0


def test_tables_do_not_decay_whether_embeddings_or_named():
    class Table(nn.Module):
        without_decay = ("rows", "inner.weight")

        def __init__(self):
            super().__init__()
            self.rows, self.inner, self.other = (
                nn.Parameter(torch.ones(3, 2)),
                nn.Linear(2, 2),
                nn.Linear(2, 2),
            )

    net = nn.Sequential(nn.Embedding(4, 2), Table())
    decayed, free = parameter_groups(net, 0.1)
    names = {p: name for name, p in net.named_parameters()}
    assert [names[p] for p in decayed["params"]] == ["1.other.weight"]
    assert {names[p] for p in free["params"]} == {
        "0.weight",
        "1.rows",
        "1.inner.weight",
        "1.inner.bias",
        "1.other.bias",
    }


def test_a_table_that_is_not_there_is_a_mistake():
    net = nn.Linear(2, 2)
    net.without_decay = ("wieght",)
    with pytest.raises(AttributeError, match="wieght"):
        parameter_groups(net, 0.1)


def test_ema_follows_its_formula_and_leaves_buffers_and_frozen_parts():
    net = nn.BatchNorm1d(2)
    net.bias.requires_grad_(False)
    ema = Ema(net, decay=0.5)
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([3.0, 5.0]))
    ema.update()
    keep = min(0.5, 2 / 11)
    expected = keep * start + (1 - keep) * net.weight.detach()
    assert set(ema.averages) == {"weight"}
    torch.testing.assert_close(ema.averages["weight"], expected)
    with ema.applied():
        torch.testing.assert_close(net.weight.detach(), expected)
    assert torch.equal(net.weight.detach(), torch.tensor([3.0, 5.0]))


def test_ema_reaches_its_decay():
    net = nn.Linear(1, 1, bias=False)
    ema = Ema(net, decay=0.9)
    for _ in range(200):
        ema.update()
    assert min(0.9, (1 + ema.updates) / (10 + ema.updates)) == 0.9
    assert math.isclose(float(ema.averages["weight"]), float(net.weight.detach()), rel_tol=1e-5)
