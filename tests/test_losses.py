"""Reconstruction losses against NumPy, with and without masks, and what does not go together."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax
from toys import run_tree, toy  # noqa: F401

from vqcore.compose.build import from_tree
from vqcore.errors import ConfigError
from vqcore.losses import check_loss, output_of, pixel_loss, target_of
from vqcore.protocols import Batch, DataSpec
from vqcore.rng import generator
from vqcore.schema import TokenizerConfig
from vqcore.tokenizer import Tokenizer

PARITY = Path(__file__).parent / "fixtures" / "losses.npz"


def numpy_loss(name, y, x, width=1.0):
    """Each position's loss `(b, *size)`, from the definitions."""
    if name == "cross_entropy":
        return -np.take_along_axis(log_softmax(y, axis=1), x[:, None], axis=1)[:, 0]
    if name == "cosine":
        return 1 - (y * x).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(x, axis=1)
    if name == "bce":
        p = expit(y)
        return -(x * np.log(p) + (1 - x) * np.log(1 - p)).mean(1)
    e = np.abs(y - x)
    small, large = 0.5 * e**2, width * (e - 0.5 * width)
    huber = np.where(e < width, small, large)
    each = {"mse": e**2, "l1": e, "huber": huber, "smooth_l1": huber / width}
    return each[name].mean(1)


def sample(name, size=(5, 6), seed=0):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(4, 3, *size)) * 2
    x = {"cross_entropy": rng.integers(0, 3, (4, *size)), "bce": rng.uniform(size=y.shape)}
    return y, x.get(name, rng.normal(size=y.shape) * 2)


NAMES = ["mse", "l1", "smooth_l1", "huber", "cosine", "cross_entropy", "bce"]


@pytest.mark.parametrize("size", [(7,), (5, 6), (2, 3, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_their_definitions(name, size):
    y, x = sample(name, size)
    found = pixel_loss(name, torch.from_numpy(y), torch.from_numpy(x))
    assert float(found) == pytest.approx(numpy_loss(name, y, x).mean(), rel=1e-12)


@pytest.mark.parametrize("name", ["smooth_l1", "huber"])
@pytest.mark.parametrize("width", [0.1, 0.7, 3.0])
def test_the_width_is_where_a_parabola_becomes_a_line(name, width):
    y, x = sample(name)
    found = pixel_loss(name, torch.from_numpy(y), torch.from_numpy(x), width=width)
    assert float(found) == pytest.approx(numpy_loss(name, y, x, width).mean(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_invalid_positions_count_nothing_whatever_they_hold(name):
    y, x = sample(name)
    rng = np.random.default_rng(1)
    mask = rng.random((4, 5, 6)) < np.array([0.9, 0.5, 0.1, 0.0])[:, None, None]
    each = numpy_loss(name, y, x)
    means = [each[i][mask[i]].mean() if mask[i].any() else 0.0 for i in range(4)]
    y_, x_, mask_ = torch.from_numpy(y), torch.from_numpy(x), torch.from_numpy(mask)
    assert float(pixel_loss(name, y_, x_, mask_)) == pytest.approx(np.mean(means), rel=1e-12)
    holes = ~mask_ if name == "cross_entropy" else (~mask_).unsqueeze(1).expand_as(x_)
    x_[holes] = 255 if name == "cross_entropy" else math.nan
    y_[(~mask_).unsqueeze(1).expand_as(y_)] = 1e6
    y_.requires_grad_()
    found = pixel_loss(name, y_, x_, mask_)
    assert found.item() == pytest.approx(np.mean(means), rel=1e-12)
    found.backward()
    assert y_.grad.isfinite().all() and not y_.grad[(~mask_).unsqueeze(1).expand_as(y_)].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_that_hides_nothing_changes_nothing(name):
    y, x = (torch.from_numpy(part) for part in sample(name))
    everything = torch.ones(4, 5, 6, dtype=torch.bool)
    torch.testing.assert_close(pixel_loss(name, y, x, everything), pixel_loss(name, y, x))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_a_perfect_answer_and_zero_where_masked(name):
    y, x = (torch.from_numpy(part) for part in sample(name))
    y = (x if name in ("mse", "l1", "smooth_l1", "huber", "cosine") else y).clone().requires_grad_()
    mask = torch.ones(4, 5, 6, dtype=torch.bool)
    mask[:, 2] = False
    pixel_loss(name, y, x, mask).backward()
    assert y.grad.isfinite().all() and not y.grad[:, :, 2].any()


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_a_weighted_mean_of_each_sample(name):
    y, x = sample(name)
    rng = np.random.default_rng(3)
    weight = rng.uniform(0, 1e-3, (4, 5, 6))  # an inverse variance may be small everywhere
    valid = rng.uniform(size=weight.shape) > 0.3
    tensors = torch.from_numpy(y), torch.from_numpy(x), torch.from_numpy(valid)
    each = numpy_loss(name, y, x)
    for mask, counts in ((None, weight), (tensors[2], weight * valid)):
        wanted = ((each * counts).sum((1, 2)) / counts.sum((1, 2))).mean()
        found = pixel_loss(name, *tensors[:2], mask, weight=torch.from_numpy(weight))
        assert float(found) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_weight_0_is_a_mask_and_weight_1_is_none(name):
    y, x = (torch.from_numpy(each) for each in sample(name))
    y, x = y.float().requires_grad_(), x.float() if x.is_floating_point() else x
    mask = torch.rand(4, 5, 6, generator=generator(1)) > 0.4
    mask[1] = False  # nothing counts
    holed = (
        torch.where(mask if x.ndim == 3 else mask.unsqueeze(1), x, torch.nan) if x.is_floating_point() else x
    )
    masked, weighted = pixel_loss(name, y, x, mask), pixel_loss(name, y, holed, weight=mask.float())
    assert torch.equal(masked, weighted)
    gradients = [torch.autograd.grad(loss, y)[0] for loss in (masked, weighted)]
    assert torch.allclose(*gradients) and bool(gradients[1].isfinite().all())
    plain = pixel_loss(name, y, x)
    assert torch.allclose(pixel_loss(name, y, x, weight=torch.ones(4, 5, 6)), plain)
    assert torch.equal(
        pixel_loss(name, y, x, weight=torch.full((4, 5, 6), 7.0)), pixel_loss(name, y, x, mask | ~mask)
    )


def test_recorded_losses_of_4m():
    case = dict(np.load(PARITY))
    y, x = torch.from_numpy(case["y"]), torch.from_numpy(case["x"])
    for name, theirs in {"mse": "mse", "l1": "l1", "smooth_l1": "smooth_l1", "cosine": "cosine_1d"}.items():
        assert float(pixel_loss(name, y, x)) == pytest.approx(float(case[f"loss/{theirs}"]), abs=1e-6)
    found = pixel_loss("cross_entropy", y, torch.from_numpy(case["labels"]))
    assert float(found) == pytest.approx(float(case["loss/cross_entropy"]), abs=1e-6)


def spec(channels=3, **settings):
    return DataSpec(channels=channels, size=(8, 8), **settings)


LABELS = {"kind": "categorical", "labels": 3, "range": None}


@pytest.mark.parametrize(
    "name, data, says",
    [
        (
            "mse",
            spec(1, **LABELS),
            "loss=mse with categorical data: class maps need cross_entropy, and only class maps do",
        ),
        ("cross_entropy", spec(), "loss=cross_entropy with continuous data"),
        ("cosine", spec(1), "loss=cosine with 1 channel: a cosine compares vectors of 2 or more"),
        ("bce", spec(range=None), "loss=bce with continuous data of no declared range"),
        ("bce", spec(kind="unit-vector"), r"loss=bce with unit-vector data of range \[-1\.0, 1\.0\]"),
        ("bce", spec(kind="angle"), "loss=bce with angle data"),
    ],
)
def test_a_loss_that_does_not_fit_the_data_is_named(name, data, says):
    with pytest.raises(ValueError, match=says):
        check_loss(name, data)


def test_losses_that_fit():
    check_loss("cross_entropy", spec(1, **LABELS))
    for name in ("mse", "l1", "smooth_l1", "huber", "cosine", "bce"):
        check_loss(name, spec())
    check_loss("bce", spec(1, kind="binary"))
    check_loss("cosine", spec(kind="unit-vector"))


def test_logits_of_bce_become_shares_of_the_range():
    data = spec(1, kind="binary", range=(0.0, 255.0))
    logits = torch.tensor([-1e3, 0.0, 1e3])
    assert output_of("bce", logits, data).tolist() == [0.0, 127.5, 255.0]
    assert target_of("bce", torch.tensor([0.0, 51.0, 255.0]), data).tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert output_of("mse", logits, data) is logits and target_of("mse", logits, data) is logits


def make(loss, modality):
    tree = run_tree("unused")
    tree = {
        "modality": {"name": "array", "size": [8, 8], **modality},
        "size": [8, 8],
        "model": tree["model"],
        "objective": {"name": "reconstruction", "loss": loss},
    }
    return Tokenizer(from_tree(tree, schema=TokenizerConfig))


@pytest.mark.usefixtures("toy")
def test_the_objective_answers_in_the_range_of_the_data():
    tokenizer = make("bce", {"kind": "binary", "channels": 1}).eval()
    x = torch.where(torch.rand(2, 1, 8, 8, generator=generator(0)) > 0.5, 1.0, -1.0)
    losses = tokenizer.objective.losses(
        tokenizer, Batch(x, ("a", "b")), player="model", step=0, rng=[generator(0)] * 2, shared={}
    )
    logits = tokenizer.decoder(tokenizer.quantize(tokenizer.latents(x)).z_q)
    expected = numpy_loss("bce", logits.detach().double().numpy(), (x.double().numpy() + 1) / 2).mean()
    assert losses.terms["pixel/bce"].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(losses.x_hat, torch.sigmoid(logits) * 2 - 1)
    torch.testing.assert_close(tokenizer.reconstruct(x), losses.x_hat.detach())
    assert set(np.unique(tokenizer.show(losses.x_hat[:1]))) <= {0, 1}


@pytest.mark.usefixtures("toy")
def test_a_config_with_the_wrong_loss_says_so():
    with pytest.raises(ConfigError, match=r"objective.*loss=cross_entropy with continuous data"):
        make("cross_entropy", {"channels": 2})
    with pytest.raises(ConfigError, match=r"objective\.loss.*'hubr'"):
        make("hubr", {"channels": 2})
