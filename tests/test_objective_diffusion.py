"""The objective `diffusion`: losses against closed forms, hidden tokens, guidance against recorded cases, bad input."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from einops import rearrange
from scipy.special import huber
from toys import run_config, run_tree, tokenizer_of, toy  # noqa: F401

from vqcore import objectives
from vqcore.cli import main
from vqcore.diffusion import (
    SCHEDULES,
    coefficients,
    epsilon,
    guided,
    hidden_tokens,
    min_snr,
    of_velocity,
    times,
    x_0,
)
from vqcore.errors import ConfigError, SettingError, UnknownName
from vqcore.protocols import Batch, DataSpec, Quantized
from vqcore.rng import sample_generators
from vqcore.testing.basics import noise
from vqcore.testing.conformance import build

pytestmark = pytest.mark.usefixtures("toy")
RECORDED = dict(np.load(Path(__file__).parent / "fixtures" / "guidance.npz"))
SPEC = DataSpec(channels=2, size=(4, 4))
KEYS = ("a", "b", "c", "d", "e")
X = noise(5, 2, 4, 4, seed=1)
SCHEDULERS = {
    "epsilon": {"name": "toy/ddpm", "prediction": "epsilon"},
    "x0": {"name": "toy/ddpm", "prediction": "x0"},
    "v": {"name": "toy/ddpm", "prediction": "v", "zero_snr": True},
    "flow": {"name": "toy/flow"},
}


@dataclass
class Spy:
    """A tokenizer and its denoiser: latents are means of 2 x 2, and what the denoiser is asked is kept."""

    answer: object = staticmethod(lambda x_t, t, cond: torch.zeros_like(x_t))
    training: bool = True
    conditions: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    device, spec, is_denoiser = torch.device("cpu"), SPEC, True
    embed = encoder = proj = quantizer = last_layer = None
    to_target = staticmethod(lambda x, rng: x)
    from_target = staticmethod(lambda y, size: y)
    target_shape = staticmethod(lambda size: (2, *size))

    @property
    def decoder(self):
        return self

    def latents(self, x):
        return rearrange(torch.nn.functional.avg_pool2d(x.nan_to_num(), 2), "b c h w -> b h w c")

    def quantize(self, z, mask=None):
        return Quantized(z, torch.zeros(*z.shape[:-1], 1, dtype=torch.long))

    def grid(self, size=None):
        raise NotImplementedError

    def lookup(self, codes):
        return codes.float()

    def condition(self, z_q, *, size, mask=None, extras=None):
        self.conditions.append(SimpleNamespace(z_q=z_q, size=size, mask=mask, extras=extras))
        return z_q if mask is None else z_q.masked_fill(mask.unsqueeze(-1), 0.0)

    def __call__(self, x_t, t, cond):
        self.calls.append((x_t, t, cond))
        return self.answer(x_t, t, cond)


def objective(scheduler="v", **settings):
    return build("objective", "diffusion", {"scheduler": SCHEDULERS[scheduler], **settings}, spec=SPEC)


def passed(made, spy, x=X, keys=KEYS, **batch):
    """The losses of a pass, and what was noised: eps and t."""
    out = made.losses(
        spy,
        Batch(x, keys, **batch),
        player="model",
        step=0,
        rng=sample_generators(keys, 0),
        shared={},
    )
    x_t, t, _ = spy.calls[-1]
    a, b, _, _ = (one.view(-1, 1, 1, 1) for one in coefficients(made.scheduler, t, 4))
    return out, (x_t - a * x.nan_to_num()) / b, t


def test_a_target_is_learnt_at_the_size_that_the_decoder_makes():
    made = objective()
    spies = Spy(), Spy()
    passed(made, spies[0], -X, extras={"target": X})
    passed(made, spies[1], X)
    assert torch.equal(spies[0].calls[-1][0], spies[1].calls[-1][0])
    with pytest.raises(
        ConfigError, match=r"data\.extra\.target: .* \[2, 8, 8\], but this decoder makes \[2, 4, 4\]"
    ):
        passed(made, Spy(), extras={"target": noise(5, 2, 8, 8)})


# Losses


@pytest.mark.parametrize(("loss", "width"), [("mse", 1.0), ("l1", 1.0), ("huber", 0.5), ("smooth_l1", 0.5)])
@pytest.mark.parametrize("prediction", SCHEDULERS)
def test_the_loss_compares_with_what_the_scheduler_says(prediction, loss, width):
    """A denoiser that always says 0 has the mean of the target as its loss."""
    settings = {"width": width} if width != 1 else {}
    made = objective(prediction, loss=loss, **settings)
    out, eps, t = passed(made, Spy())
    a, b, _, _ = (one.view(-1, 1, 1, 1) for one in coefficients(made.scheduler, t, 4))
    target = {"epsilon": eps, "x0": X.double(), "v": a * eps - b * X, "flow": eps - X}[prediction].numpy()
    wanted = {
        "mse": target**2,
        "l1": np.abs(target),
        "huber": huber(width, target),
        "smooth_l1": huber(width, target) / width,
    }[loss]
    assert list(out.terms) == [f"diffusion/{loss}"]
    assert float(out.terms[f"diffusion/{loss}"]) == pytest.approx(wanted.mean(), rel=1e-3)
    assert float(eps.std()) == pytest.approx(1, abs=0.2) and t.dtype == torch.float32


@pytest.mark.parametrize("prediction", SCHEDULERS)
@pytest.mark.parametrize("loss_on", ["prediction", "x_0", "epsilon", "velocity"])
def test_a_perfect_denoiser_has_no_loss_and_is_shown_as_the_sample(prediction, loss_on):
    made = objective(prediction, loss_on=loss_on, min_snr=5, adversary={"name": "toy/gan"})
    made.setup(Spy())

    def perfect(x_t, t, cond):
        a, b, c, d = (one.view(-1, 1, 1, 1) for one in coefficients(made.scheduler, t, 4))
        return (c * X + d * (x_t - a * X) / b).float()

    shared = {}
    rng = sample_generators(KEYS, 0)
    out = made.losses(
        Spy(perfect, training=False), Batch(X, KEYS), player="model", step=0, rng=rng, shared=shared
    )
    assert float(out.terms["diffusion/mse"]) < 1e-6
    torch.testing.assert_close(shared["x_hat"], X, atol=1e-3, rtol=1e-3)
    assert {"diffusion/mse", "gan/generator"} == set(out.terms)


def test_a_loss_of_the_velocity_of_a_sample_is_bounded_without_noise():
    """arXiv 2511.13720: the squared error of x_0 over s^2, with s of at least 0.05."""
    flow, s = objective("flow").scheduler, torch.tensor([0.0, 0.025, 0.05, 0.5, 1.0])
    wanted = torch.where(s < 0.05, 1 + (1 - s) / 0.05, 1 / s)
    torch.testing.assert_close(of_velocity(flow, flow.num_steps * s), wanted)


def test_without_judges_nothing_is_mapped_back_to_a_sample():
    spy = Spy(training=False)
    spy.from_target = lambda y, size: pytest.fail("mapped back")
    assert passed(objective(), spy)[0].x_hat is None


@pytest.mark.parametrize("wanted", ["loss", "noise", "hidden"])
def test_a_samples_noise_does_not_depend_on_its_batch(wanted):
    made, spy = objective("flow", cls_free_guidance_dropout=0.5, times="mixed"), Spy()
    out, eps, t = passed(made, spy)
    alone = [passed(made, spy, X[i : i + 1], KEYS[i : i + 1]) for i in range(5)]
    if wanted == "loss":
        each = [float(one[0].terms["diffusion/mse"]) for one in alone]
        assert np.mean(each) == pytest.approx(float(out.terms["diffusion/mse"]), rel=1e-5)
    elif wanted == "noise":
        torch.testing.assert_close(torch.cat([one[1] for one in alone]), eps, atol=1e-4, rtol=1e-4)
        assert torch.equal(torch.cat([one[2] for one in alone]), t) and t.unique().numel() == 5
    else:
        masks = [one.mask for one in spy.conditions]
        assert torch.equal(torch.cat(masks[1:]), masks[0])


def test_invalid_positions_do_not_count_and_weights_do():
    made, mask = objective("x0"), torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    holes = torch.where(mask.unsqueeze(1), X, torch.nan)
    out, *_ = passed(made, Spy(), holes, mask=mask)
    wanted = [(X[i].square().mean(0)[mask[i]]).mean() for i in range(5)]
    assert float(out.terms["diffusion/mse"]) == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-4)
    weight = torch.ones(5, 4, 4)
    weight[:, :2] = 3
    out, *_ = passed(made, Spy(), weight=weight)
    rows = X.square().mean(1)
    wanted = 0.75 * rows[:, :2].mean() + 0.25 * rows[:, 2:].mean()
    assert float(out.terms["diffusion/mse"]) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(("side", "share"), [(2, 0.25), (1, 0.25), (4, 0.25)])
def test_a_target_of_another_size_gets_a_mask_of_its_size(side, share):
    """One quarter is valid: what is noised is valid where anything below it is, and its weight is a mean."""
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = True
    found = objectives.resized(mask, (side, side))
    assert float(found.float().mean()) == (share if side > 1 else 1.0)
    assert float(objectives.resized(mask.float(), (side, side)).mean()) == pytest.approx(share)
    assert objectives.resized(mask, (4,)) is None and objectives.resized(None, (4,)) is None


# Weights of noise levels


SNR = torch.tensor([1e-3, 0.3, 1.0, 4.0, 30.0, 1e4], dtype=torch.float64)


class Known:
    """Noise levels with a known SNR; `kind` is what the network predicts."""

    num_steps = 5

    def __init__(self, kind, snr=SNR):
        self.kind = kind
        self.b = 1 / (1 + snr.sqrt()) if kind == "flow" else 1 / (1 + snr).sqrt()
        self.a = 1 - self.b if kind == "flow" else (1 - self.b**2).sqrt()

    def shares(self, t, like):
        return (one[t.long()].view(-1, *[1] * (like.ndim - 1)) for one in (self.a, self.b))

    def add_noise(self, x, eps, t):
        a, b = self.shares(t, x)
        return a * x + b * eps

    def target(self, x, eps, t):
        a, b = self.shares(t, x)
        return {"epsilon": eps, "x0": x, "v": a * eps - b * x, "flow": eps - x}[self.kind]


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v", "flow"])
def test_min_snr_has_the_form_of_its_prediction(kind):
    t, capped = torch.arange(6), SNR.clamp(max=5)
    known = Known(kind)
    closed = {
        "epsilon": capped / SNR,
        "x0": capped,
        "v": capped / (SNR + 1),
        "flow": capped * known.b**2,
    }[kind]
    torch.testing.assert_close(min_snr(known, t, 5.0).double(), closed, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(min_snr(known, t, 5.0, "x_0").double(), capped, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(min_snr(known, t, 5.0, "epsilon").double(), capped / SNR, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v", "flow"])
def test_with_min_snr_the_squared_error_is_the_same_whatever_is_compared(kind):
    known, t = Known(kind, SNR[1:5]), torch.arange(4)
    x, eps, prediction = (noise(4, 3, seed=seed).double() for seed in (1, 2, 3))
    x_t = known.add_noise(x, eps, t)
    errors = {
        "prediction": prediction - known.target(x, eps, t),
        "x_0": x_0(known, prediction, x_t, t) - x,
        "epsilon": epsilon(known, prediction, x_t, t) - eps,
        "velocity": of_velocity(known, t, 0.0).unsqueeze(1) * (x_0(known, prediction, x_t, t) - x),
    }
    moved = epsilon(known, prediction, x_t, t) - x_0(known, prediction, x_t, t) - (eps - x)
    torch.testing.assert_close(errors["velocity"].abs(), moved.abs(), rtol=1e-5, atol=1e-6)
    first, *others = [min_snr(known, t, 5.0, of) * error.square().mean(1) for of, error in errors.items()]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-9)


def test_min_snr_is_finite_at_both_ends():
    ends = torch.tensor([0.0, 1.0])
    wanted = {"epsilon": [0, 1], "x0": [5, 0], "v": [0, 0], "flow": [0, 0]}

    class Ends(Known):
        def __init__(self, kind):
            self.kind, self.b, self.a = kind, ends.double(), 1 - ends.double()

    for kind, limits in wanted.items():
        assert min_snr(Ends(kind), torch.arange(2), 5.0).tolist() == pytest.approx(limits, abs=1e-5), kind


def test_min_snr_weighs_samples_in_the_objective():
    plain, weighed, spy = objective("v"), objective("v", min_snr=2.0), Spy()
    each = [
        float(passed(plain, spy, X[i : i + 1], KEYS[i : i + 1])[0].terms["diffusion/mse"]) for i in range(5)
    ]
    out, _, t = passed(weighed, spy)
    weights = min_snr(plain.scheduler, t, 2.0)
    assert float(out.terms["diffusion/mse"]) == pytest.approx(np.mean(weights.numpy() * each), rel=1e-5)


def test_mixed_times_are_logit_normal_with_a_uniform_share():
    made = build("scheduler", "toy/flow", {})
    rng = lambda: sample_generators(range(1500), 0)  # noqa: E731
    found = {share: times(made, rng(), "mixed", std=0.5, uniform=share) for share in (0.0, 0.1, 1.0)}
    assert torch.equal(found[0.0], times(made, rng(), "logit-normal", std=0.5))
    torch.testing.assert_close(found[1.0].sort().values, torch.linspace(0, 1, 1500), atol=0.05, rtol=0)
    ends = (found[0.1] < 0.1) | (found[0.1] > 0.9)  # logit-normal alone: 1e-5
    assert float(ends.float().mean()) == pytest.approx(0.02, abs=0.012)


# Hidden tokens


def masks(training=True, **settings):
    """The masks of 400 samples with a grid of 2 x 2, `(400, 4)`."""
    spy, keys = Spy(training=training), tuple(map(str, range(400)))
    passed(objective(**settings), spy, noise(400, 2, 4, 4), keys)
    (asked,) = spy.conditions
    return None if asked.mask is None else asked.mask.flatten(1)


def test_tokens_are_hidden_in_training_alone_and_all_of_a_sample():
    hidden = masks(cls_free_guidance_dropout=0.25)
    assert set(hidden.sum(1).tolist()) == {0, 4}
    assert float(hidden.float().mean()) == pytest.approx(0.25, abs=0.07)
    assert masks() is None and masks(training=False, cls_free_guidance_dropout=0.25) is None


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"masked_cfg_low": 1, "masked_cfg_high": 2}, {1, 2}),
        ({"masked_cfg_low": 3}, {3, 4}),
        ({"masked_cfg_low": 9, "masked_cfg_high": 9}, {4}),  # more than there are: all
    ],
)
def test_masked_cfg_hides_a_random_number_of_tokens(settings, counts):
    hidden = masks(cls_free_guidance_dropout=1.0, masked_cfg=True, **settings)
    found = torch.bincount(hidden.sum(1), minlength=5)
    assert set(found.nonzero().flatten().tolist()) == counts
    assert max(abs(int(n) - 400 / len(counts)) for n in found[list(counts)]) < 60
    assert hidden.float().mean(0).std() < 0.06  # every token alike


def test_hidden_tokens_are_those_recorded():
    """4M's `low` and `high` bound the tokens that stay; ours, like its documentation, those that are hidden."""
    keep, order = (torch.from_numpy(RECORDED[key]) for key in ("keep", "noise"))
    assert torch.equal(~hidden_tokens(keep, order.view(6, 4, 4)), torch.from_numpy(RECORDED["mask"]))


# Sampling


def decoded(made, spy, size=(4, 4), seed=0, **options):
    defaults = {"guidance": 1.0}
    with torch.no_grad():
        return made.decode(
            spy,
            torch.arange(8).view(2, 2, 2, 1),
            size=size,
            rng=sample_generators(("a", "b"), seed),
            **{**defaults, **options},
        )


def tokens(x_t, t, cond):
    """A prediction that depends on noise, tokens and level."""
    up = torch.nn.functional.interpolate(rearrange(cond, "b h w d -> b d h w"), x_t.shape[2:])
    return 0.3 * x_t + 0.2 * up + 1e-4 * t.view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("options", "conditions", "calls"),
    [
        ({}, [2], [2, 2, 2, 2]),
        ({"guidance": 2.0}, [4], [4, 4, 4, 4]),
        ({"guidance": 0.0}, [4], [4, 4, 4, 4]),
        # at 1, 3/4, 1/2 and 1/4 of the noise
        ({"guidance": 2.0, "guidance_from": 0.4, "guidance_to": 0.8}, [2, 4], [2, 4, 4, 2]),
        ({"guidance": 2.0, "guidance_to": 0.1}, [2], [2, 2, 2, 2]),
    ],
)
def test_conditions_are_made_once_and_guidance_is_one_batch(options, conditions, calls):
    made, spy = objective("flow", cls_free_guidance_dropout=0.1), Spy(tokens, training=False)
    decoded(made, spy, steps=4, extras={"echo": torch.ones(2, 3), "names": ["x", "y"]}, **options)
    assert [len(one.z_q) for one in spy.conditions] == conditions
    assert [len(x_t) for x_t, _, _ in spy.calls] == calls
    for one in spy.conditions:
        assert len(one.extras["echo"]) == len(one.extras["names"]) == len(one.z_q)
        if len(one.z_q) == 4:
            assert not one.mask[:2].any() and one.mask[2:].all() and torch.equal(one.z_q[:2], one.z_q[2:])


def test_guidance_1_is_the_prediction_with_tokens_and_0_ignores_them():
    made, plain = objective("flow", cls_free_guidance_dropout=0.1), Spy(tokens)
    first = decoded(made, plain, steps=4)
    # In an interval, and rescaled to itself, 1 is still 1.
    torch.testing.assert_close(
        decoded(made, plain, steps=4, guidance_from=0.3, guidance_rescale=0.5), first, rtol=0, atol=0
    )
    blind = Spy(lambda x_t, t, cond: tokens(x_t, t, 0 * cond))
    torch.testing.assert_close(decoded(made, plain, steps=4, guidance=0.0), decoded(made, blind, steps=4))
    assert not torch.allclose(first, decoded(made, blind, steps=4), atol=0.1)


def test_predictions_of_half_precision_are_sampled_in_fp32():
    made = objective("flow")
    found = decoded(made, Spy(lambda *given: tokens(*given).bfloat16()), steps=3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, decoded(made, Spy(tokens), steps=3), atol=0.05, rtol=0.05)


class Recorded:
    """The sampler of the recorded cases: DDIM, 4 of 1000 steps, v, linear betas rescaled to zero SNR, values clipped.

    Written from arXiv 2010.02502 (equation 12) and arXiv 2305.08891 (algorithm 1).
    """

    num_steps = 1000

    def __init__(self):
        root = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).sqrt()
        self.a = (root - root[-1]) * root[0] / (root[0] - root[-1])
        self.b = (1 - self.a**2).sqrt()

    def sampler(self, steps):
        return SimpleNamespace(timesteps=[1000 - 1000 // steps * k - 1 for k in range(steps)], step=self.step)

    def step(self, v, t, x_t, rng):
        a, b = float(self.a[t]), float(self.b[t])
        x = (a * x_t - b * v).clamp(-1, 1)
        eps = a * v + b * x_t
        return x * (float(self.a[t - 250]) if t >= 250 else 1.0) + eps * (
            float(self.b[t - 250]) if t >= 250 else 0.0
        )


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("plain", {}),
        ("three", {"guidance": 3.0}),
        ("rescaled", {"guidance": 3.0, "guidance_rescale": 0.7}),
        ("of_time", {"guidance": 5.0, "guidance_schedule": "linear"}),
        ("wide", {"guidance": 3.0, "size": (8, 16)}),
    ],
)
def test_guidance_is_that_of_the_recorded_cases(monkeypatch, key, options):
    made = objective(cls_free_guidance_dropout=0.1)
    made.scheduler = Recorded()

    def stub(x_t, t, cond):
        up = torch.nn.functional.interpolate(rearrange(cond, "b h w d -> b d h w"), x_t.shape[2:])
        return 0.3 * x_t + 0.5 * up + 0.0001 * t.view(-1, 1, 1, 1)

    spy = Spy(stub)
    spy.target_shape = lambda size: (3, *size)
    spy.lookup = lambda codes: rearrange(torch.from_numpy(RECORDED["z"]), "b d h w -> b h w d")
    # The noise of all samples comes from one generator there.
    drawn = lambda rng, *shape, device: torch.randn(2, *shape, generator=torch.Generator().manual_seed(9))  # noqa: E731
    monkeypatch.setattr(objectives, "randn", drawn)
    found = decoded(made, spy, **{"size": (8, 8), "steps": 4, **options})
    torch.testing.assert_close(found, torch.from_numpy(RECORDED[key]), atol=1e-5, rtol=1e-5)


def test_the_schedules_of_guidance():
    for name, values in {"constant": [1, 1, 1], "linear": [0, 0.5, 1], "cosine": [0, 0.25, 1]}.items():
        assert [SCHEDULES[name](u) for u in (0.0, 0.5, 1.0)] == pytest.approx(values), name


def test_rescaled_guidance_keeps_the_contrast_of_each_sample():
    held, free = noise(3, 2, 8, 8, seed=1), noise(3, 2, 8, 8, seed=2)
    spread = lambda x: x.flatten(1).std(1)  # noqa: E731
    torch.testing.assert_close(spread(guided(held, free, 4.0, 1.0)), spread(held))
    assert bool((spread(guided(held, free, 4.0)) > 2 * spread(held)).all())
    same = torch.ones(1, 1, 2, 2)
    assert torch.isfinite(guided(same, same, 4.0, 1.0)).all()  # no contrast at all


# Another scheduler for sampling


def test_another_scheduler_samples_with_the_noise_levels_of_training():
    made, spy = objective("v"), Spy(tokens)
    first = decoded(made, spy, steps=5)
    assert torch.equal(decoded(made, spy, steps=5, scheduler="toy/ddpm"), first)
    assert torch.equal(decoded(made, spy, steps=5, scheduler="toy/ddpm[prediction=v]"), first)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"guidance": -1.0}, "guidance=-1 must be a number from 0 on"),
        ({"guidance": math.inf}, "guidance=inf must be a number from 0 on"),
        ({"guidance": math.nan}, "guidance=nan must be a number from 0 on"),
        ({"guidance_from": 1.5}, "guidance_from=1.5 is a share, from 0 to 1"),
        ({"guidance_from": 0.5, "guidance_to": 0.2}, "guidance_from=0.5 must be below guidance_to=0.2"),
        ({"guidance_rescale": 2.0}, "guidance_rescale=2 is a share"),
        ({"scheduler": "toy/ddpm[zero_snr=false]"}, "scheduler=toy/ddpm[zero_snr=false] has other noise levels"),
        ({"scheduler": "toy/ddpm[prediction=x0]"}, "or is for another prediction, than the decoder was trained"),
        ({"scheduler": "toy/flow"}, "scheduler=toy/flow has other noise levels"),
        ({"scheduler": "toy/ddpm[prediction=x]"}, "prediction='x' is not one of"),
        ({"scheduler": "toy/ddmp"}, "sampling option scheduler: vqcore-toy 0.0 has no scheduler 'toy/ddmp'. Did"),
        ({"scheduler": "toy/encoder"}, "sampling option scheduler: 'toy/encoder' is "),
        ({"scheduler": "toy/ddpm[snr=1]"}, "sampling option scheduler: snr is not a setting of toy/ddpm"),
        ({"scheduler": "toy/ddpm[zero_snr"}, "sampling option scheduler: 'toy/ddpm[zero_snr' names no component"),
        ({"scheduler": "toy/ddpm[zero_snr]"}, "sampling option scheduler: 'zero_snr' is not a setting; write key"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_one_line(options, text):
    with pytest.raises((SettingError, ConfigError, UnknownName)) as raised:
        decoded(objective("v"), Spy(tokens), **options)
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_steps_that_a_scheduler_cannot_take_are_its_words():
    made = objective()
    made.scheduler = SimpleNamespace(sampler=lambda steps: (_ for _ in ()).throw(ValueError("at most 10")))
    with pytest.raises(SettingError, match=r"^steps=11: at most 10$"):
        decoded(made, Spy(), steps=11)


@pytest.mark.parametrize(
    ("settings", "options", "warns"),
    [
        ({}, {"guidance": 2.0}, True),
        ({}, {"guidance": 1.0}, False),
        ({"cls_free_guidance_dropout": 0.1}, {"guidance": 2.0}, False),
        ({"cls_free_guidance_dropout": 0.1, "masked_cfg": True}, {"guidance": 2.0}, False),
        ({"cls_free_guidance_dropout": 0.1, "masked_cfg": True, "masked_cfg_high": 3}, {"guidance": 2.0}, True),
    ],
)  # fmt: skip
def test_guidance_that_was_never_trained_is_warned_of_once(caplog, settings, options, warns):
    made = objective(**settings)
    with caplog.at_level(logging.WARNING):
        decoded(made, Spy(tokens), steps=1, **options)
        decoded(made, Spy(tokens), steps=1, **options)
    assert caplog.text.count("never saw a sample with all tokens hidden") == warns


# Bad input


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"min_snr": 0}, "objective.min_snr=0.0 must be a number above 0"),
        ({"times_std": 0.0, "times": "mixed"}, "objective.times_std=0.0 must be a number above 0"),
        ({"times_mean": 1.0}, "objective.times_mean=1.0 does nothing with times=uniform"),
        ({"times_uniform": 0.2, "times": "logit-normal"}, "times_uniform=0.2 does nothing with times=logit-normal"),
        ({"times_uniform": 1.2, "times": "mixed"}, "objective.times_uniform=1.2 is a share"),
        ({"times": "lognormal"}, "objective.times='lognormal' is not one of uniform, logit-normal, mixed"),
        ({"cls_free_guidance_dropout": 20}, "objective.cls_free_guidance_dropout=20.0 is a share"),
        ({"masked_cfg": True}, "objective.masked_cfg=True does nothing with cls_free_guidance_dropout=0"),
        ({"masked_cfg_low": 1}, "objective.masked_cfg_low=1 does nothing with masked_cfg=false"),
        ({"cls_free_guidance_dropout": 0.1, "masked_cfg": True, "masked_cfg_low": -1}, "masked_cfg_low=-1 must be"),
        (
            {"cls_free_guidance_dropout": 0.1, "masked_cfg": True, "masked_cfg_low": 5, "masked_cfg_high": 2},
            "masked_cfg_high=2 is below 1, or below masked_cfg_low=5",
        ),
        ({"width": 0.5}, "objective.width=0.5 does nothing with loss=mse"),
        ({"loss": "cosine"}, "objective.loss='cosine' is not one of mse, l1, smooth_l1, huber"),
        ({"scheduler": None}, "objective.scheduler cannot be null. Expected: a scheduler"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(tmp_path, settings, text):
    objective = {"name": "diffusion", "scheduler": SCHEDULERS["v"], **settings}
    with pytest.raises(ConfigError) as raised:
        run_config(tmp_path, objective=objective, model__decoder={"name": "toy/denoiser"})
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_a_scheduler_must_be_named(tmp_path, capsys):
    file = tmp_path / "cfg.yaml"
    file.write_text(yaml.dump(run_tree(tmp_path / "run", objective={"name": "diffusion"})))
    assert main(["train", str(file)]) == 2
    error = capsys.readouterr().err
    assert "objective.scheduler is required: a scheduler" in error and "toy/flow" in error


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model__decoder": {"name": "toy/decoder"}}, "objective 'diffusion' needs a denoiser; 'toy/decoder' maps"),
        ({"objective": {"name": "reconstruction"}}, "needs a plain decoder; 'toy/denoiser' is a denoiser"),
        (
            {"data__modality": {"name": "array", "kind": "categorical", "labels": 5, "size": [8, 8]}},
            "class maps have no values to which noise could be added; use reconstruction",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(tmp_path, changes, text):
    base = {
        "objective": {"name": "diffusion", "scheduler": SCHEDULERS["v"]},
        "model__decoder": {"name": "toy/denoiser"},
    }
    with pytest.raises(ConfigError) as raised:
        tokenizer_of(run_config(tmp_path, **{**base, **changes}))
    assert text in str(raised.value) and "\n" not in str(raised.value)
