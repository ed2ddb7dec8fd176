"""Metrics, code figures, the schedule, parameter groups and the running average against their formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from vqcore.evaluate.usage import CodeCounts, CodeWindow
from vqcore.metrics.labels import Accuracy
from vqcore.metrics.pixels import MAE, PSNR
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
    assert figures == {"codes/usage": pytest.approx(0.75), "codes/perplexity": pytest.approx(3.0)}


def test_the_window_forgets_what_is_older():
    window = CodeWindow(codebook_size=4, num_codebooks=1, window=6)
    window.add(torch.tensor([[[0], [1]], [[2], [3]]]))
    assert window.metrics()["codes/usage"] == 1
    window.add(torch.zeros(1, 4, 1, dtype=torch.int64))  # 6 hold 2, 3 and four zeros
    assert window.metrics()["codes/usage"] == 0.75
    window.add(torch.zeros(1, 20, 1, dtype=torch.int64))
    assert window.metrics() == {"codes/usage": 0.25, "codes/perplexity": pytest.approx(1.0)}


def test_codes_that_are_not_valid_do_not_count():
    codes, valid = torch.tensor([[[0], [1]], [[2], [3]]]), torch.tensor([[True, False], [True, False]])
    counts, window = CodeCounts(4, 1), CodeWindow(codebook_size=4, num_codebooks=1, window=6)
    for _ in range(2):
        counts.add(codes, valid)
        window.add(codes, valid=valid)
    assert counts.tokens == window.held == window.taken == 4
    expected = {"codes/usage": 0.5, "codes/perplexity": pytest.approx(2.0)}
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
