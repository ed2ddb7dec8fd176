"""Schedulers against closed forms: tables, times, exact steps, noise, solvers; and what is wrong elsewhere."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from vqcore_unet.flow import Flow
from vqcore_unet.schedulers import DDIM, DDPM, PNDM, Diffusers
from vqcore_unet.table import TableConfig, alphas_cumprod, spaced

from vqcore.diffusion import coefficients, x_0
from vqcore.rng import generator
from vqcore.testing.basics import noise

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of diffusers
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "shifted_cosine", "sigmoid")
X, EPS = noise(3, 2, 4, seed=1), noise(3, 2, 4, seed=2)


def made(cls, **settings):
    return cls(cls.Config(**settings))


def table(**settings):
    return alphas_cumprod(TableConfig(**{"prediction": "sample", **settings})).numpy()


def rngs(n):
    return [generator(i, "test") for i in range(n)]


# Tables


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_tables_fall_and_end_exactly_at_zero(schedule, num_steps):
    bar = table(schedule=schedule, num_steps=num_steps)
    assert len(bar) == num_steps and bar[-1] == 0 and bar[0] < 1
    assert all(a > b for a, b in pairwise(bar))
    if schedule != "shifted_cosine":
        plain = table(schedule=schedule, num_steps=num_steps, zero_terminal_snr=False)
        assert plain[-1] > 0 and all(a > b for a, b in pairwise(plain))
        assert plain[0] == pytest.approx(bar[0], rel=1e-12)


def test_tables_have_the_closed_forms():
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    bar = table(schedule="linear", zero_terminal_snr=False)
    assert bar[700] == pytest.approx(math.prod(1 - beta for beta in betas[:701]), rel=1e-12)
    root = np.sqrt(bar)
    zero = root[0] * (root[300] - root[-1]) / (root[0] - root[-1])
    assert table(schedule="linear")[300] == pytest.approx(zero**2, rel=1e-12)
    cosine = table(schedule="squaredcos_cap_v2", zero_terminal_snr=False)
    f = [math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 0.5)]
    assert cosine[499] == pytest.approx(f[1] / f[0], rel=1e-9)
    for shift in (0.5, 1.0, 4.0):
        bar, t = table(schedule="shifted_cosine", shift=shift), 300 / 999
        snr = 1 / (shift * math.tan(math.pi * t / 2)) ** 2
        assert bar[300] == pytest.approx(snr / (1 + snr), rel=1e-9)


# Times


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 30, 999])
def test_times_are_as_many_as_asked_for(spacing, steps):
    times = spaced(steps, 1000, spacing)
    assert len(times) == steps and len(set(times)) == steps and times == sorted(times, reverse=True)
    assert times[0] == {"trailing": 999, "linspace": 999, "leading": 1000 // steps * (steps - 1)}[spacing]
    assert times[-1] == 0 or spacing == "trailing" or (spacing, steps) == ("linspace", 1)
    assert made(DDIM, spacing=spacing).sampler(steps).timesteps == times
    assert made(DDPM, spacing=spacing).sampler(steps).timesteps == times


def test_4ms_times_are_kept_for_imports():
    assert len(made(DDIM, as_4m=True).sampler(7).timesteps) == 8
    assert made(DDPM, as_4m=True).sampler(25).timesteps[0] == 960
    assert made(DDPM).sampler(25).timesteps[0] == 999


# Steps


@pytest.mark.parametrize("cls", [DDPM, DDIM, PNDM, Diffusers])
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
def test_one_exact_step_from_true_noise_is_the_sample(cls, prediction):
    scheduler = made(cls, prediction=prediction, zero_terminal_snr=False, schedule="scaled_linear")
    if cls is PNDM:  # its first step takes two calls
        return
    sampler = scheduler.sampler(1)
    t = torch.full((3,), int(sampler.timesteps[0]))
    x_t, target = scheduler.add_noise(X, EPS, t), scheduler.target(X, EPS, t)
    found = sampler.step(target, sampler.timesteps[0], x_t, rngs(3))
    torch.testing.assert_close(found, X, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [7, 30])
def test_a_step_of_ddim_goes_to_the_next_time(spacing, steps):
    """With the true noise, x at the next time is the sample with the same noise. diffusers 0.42 goes elsewhere."""
    scheduler = made(DDIM, spacing=spacing)
    sampler = scheduler.sampler(steps)
    for t, after in pairwise(sampler.timesteps):
        at, then = (torch.full((3,), one, dtype=torch.float64).long() for one in (t, after))
        found = sampler.step(scheduler.target(X, EPS, at), t, scheduler.add_noise(X, EPS, at), rngs(3))
        torch.testing.assert_close(found, scheduler.add_noise(X, EPS, then), atol=1e-5, rtol=1e-5)
        wrong = made(DDIM, spacing=spacing, as_4m=True).sampler(steps)
        if spacing == "linspace":
            theirs = wrong.step(scheduler.target(X, EPS, at), t, scheduler.add_noise(X, EPS, at), rngs(3))
            assert not torch.allclose(theirs, found, atol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_a_step_of_ddpm_is_the_posterior(variance):
    """Mean and spread of q(x_s | x_t, x), arXiv 2006.11239 equations 6 and 7, with times that are not neighbours."""
    scheduler = made(DDPM, variance=variance, prediction="sample")
    sampler, bar = scheduler.sampler(4), scheduler.alphas_cumprod
    t, s = (int(one) for one in sampler.timesteps[1:3])
    x, eps, rng = torch.ones(2, 20000), noise(2, 20000), rngs(2)
    sampler.step(x, sampler.timesteps[0], eps, rng)
    found = sampler.step(x, sampler.timesteps[1], 0 * x + 0.5, rng)
    alpha = bar[t] / bar[s]
    mean = (bar[s].sqrt() * (1 - alpha) + 0.5 * alpha.sqrt() * (1 - bar[s])) / (1 - bar[t])
    spread = 1 - alpha if variance == "fixed_large" else (1 - bar[s]) / (1 - bar[t]) * (1 - alpha)
    assert float(found.mean()) == pytest.approx(float(mean), abs=0.02)
    assert float(found.std()) == pytest.approx(float(spread.sqrt()), rel=0.02)


@pytest.mark.parametrize("settings", [{}, {"variance": "fixed_large"}, {"variance": "fixed_small_log"}])
def test_the_last_step_of_ddpm_adds_no_noise(settings):
    sampler = made(DDPM, prediction="sample", **settings).sampler(3)
    x = EPS
    for t in sampler.timesteps:
        x = sampler.step(X, t, x, rngs(3))
    torch.testing.assert_close(x, X, atol=1e-6, rtol=1e-6)


def test_noise_of_a_sample_is_its_own():
    for cls, settings in ((DDPM, {}), (DDIM, {"eta": 1.0}), (DDIM, {"eta": 1.0, "prediction": "sample"})):
        whole = made(cls, **settings).sampler(4).step(X, 999.0, EPS, rngs(3))
        alone = made(cls, **settings).sampler(4).step(X[1:2], 999.0, EPS[1:2], rngs(3)[1:2])
        torch.testing.assert_close(whole[1:2], alone)


def test_clipping_and_thresholding():
    big = torch.linspace(-4, 4, 8).view(1, 1, 8)

    def last(**settings):
        sampler = made(DDIM, prediction="sample", **settings).sampler(1)
        return sampler.step(big, sampler.timesteps[0], big, rngs(1))

    assert torch.equal(last(), big)
    torch.testing.assert_close(last(clip=1.5), big.clamp(-1.5, 1.5))
    torch.testing.assert_close(last(threshold=1.0), big / 4)
    torch.testing.assert_close(last(threshold=1.0, threshold_max=2.0), big.clamp(-2, 2) / 2)
    torch.testing.assert_close(last(threshold=1.0, threshold_max=1.0), last(clip=1.0))
    quantile = float(torch.quantile(big.abs(), 0.5))
    torch.testing.assert_close(last(threshold=0.5), big.clamp(-quantile, quantile) / quantile)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "v"},
        {"prediction": "sample"},
        {"runge_kutta": True},
        {"runge_kutta": True, "spacing": "linspace", "prediction": "sample"},
    ],
)
def test_pndm_with_true_predictions_stays_on_the_line(settings):
    """diffusers averages v of several times; epsilon is what may be averaged."""
    scheduler = made(PNDM, **settings)
    sampler = scheduler.sampler(6)
    x = scheduler.add_noise(X, EPS, torch.full((3,), int(sampler.timesteps[0])))
    for t in sampler.timesteps:
        x = sampler.step(scheduler.target(X, EPS, torch.full((3,), int(t))), t, x, rngs(3))
    torch.testing.assert_close(x, X, atol=2e-3, rtol=2e-3)


KARRAS = {"use_karras_sigmas": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", KARRAS),
        pytest.param("LMSDiscreteScheduler", {}, marks=pytest.mark.slow),
        pytest.param("KDPM2DiscreteScheduler", {}, marks=pytest.mark.slow),
        pytest.param("HeunDiscreteScheduler", KARRAS, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("zero", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_solvers_of_diffusers_find_the_mean_of_gaussian_data(name, options, zero):
    """For data N(m, s^2) the best prediction of x is known, and sampling must give this mean and spread."""
    mean, spread = 0.7, 0.3
    scheduler = made(Diffusers, sampler=name, options=options, zero_terminal_snr=zero)
    sampler = scheduler.sampler(50)
    assert bool(scheduler.alphas_cumprod[-1] == 0) == zero  # sampling leaves the table of training alone
    x = torch.linspace(-2, 2, 41).view(-1, 1)
    start = x.clone()
    for t in sampler.timesteps:
        times = torch.full((len(x),), int(t))
        a, b, c, d = (each.float().view(-1, 1) for each in coefficients(scheduler, times, 2))
        clean = mean + a * spread**2 / (a**2 * spread**2 + b**2) * (x - a * mean)
        x = sampler.step(c * clean + d * (x - a * clean) / b, t, x, rngs(len(x)))
    torch.testing.assert_close(x, mean + spread * start, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
@pytest.mark.parametrize("settings", [{}, {"schedule": "linear", "prediction": "sample"}])
def test_one_exact_step_of_a_solver_from_pure_noise_is_the_sample(name, settings):
    """Sigma is infinite there: fp32 has no digits left for the sample beside it."""
    scheduler = made(Diffusers, sampler=name, **settings)
    sampler, t = scheduler.sampler(1), torch.full((3,), 999)
    found = sampler.step(scheduler.target(X, EPS, t), 999.0, EPS, rngs(3))
    torch.testing.assert_close(found, X, atol=1e-5, rtol=1e-5)


# Flow


def test_times_of_flow():
    assert made(Flow).sampler(4).timesteps == [1000, 750, 500, 250]
    assert made(Flow, power=2.0).sampler(2).timesteps == [1000, 250]
    shifted = made(Flow, shift=3.0)
    assert shifted.time(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 750, 1000]
    assert shifted.sampler(2).timesteps == [1000, 750]  # shifted once
    assert made(Flow, solver="heun").sampler(3).timesteps == pytest.approx(
        [1000, 2000 / 3, 2000 / 3, 1000 / 3, 1000 / 3]
    )


PREDICTIONS = (
    {},
    {"prediction": "sample"},
    {"prediction": "preconditioned"},
    {"prediction": "preconditioned", "data_std": 2.0},
)


@pytest.mark.parametrize("settings", PREDICTIONS)
def test_flow_is_a_straight_line_whatever_is_predicted(settings):
    flow, t = made(Flow, **settings), torch.tensor([0.0, 250.0, 1000.0])
    x_t = flow.add_noise(X, EPS, t)
    assert torch.equal(x_t[0], X[0]) and torch.equal(x_t[2], EPS[2])
    torch.testing.assert_close(x_t[1], 0.75 * X[1] + 0.25 * EPS[1])
    target = flow.target(X, EPS, t)
    torch.testing.assert_close(x_0(flow, target, x_t, t), X)
    for i in (1, 2):
        velocity = flow.velocity(target[i].double(), float(t[i]), x_t[i].double())
        torch.testing.assert_close(velocity.float(), EPS[i] - X[i])


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_a_preconditioned_target_is_the_error_of_the_best_linear_guess(std):
    """EDM, arXiv 2206.00364, appendix B.6: unit variance at all noise levels, and no part that x_t foretells."""
    flow, s = made(Flow, prediction="preconditioned", data_std=std), np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    _, _, c, d = (one.numpy() for one in coefficients(flow, torch.from_numpy(1000 * s), 1))
    total = (1 - s) ** 2 * std**2 + s**2
    assert (c * std) ** 2 + d**2 == pytest.approx(1)
    assert c * std**2 * (1 - s) + d * s == pytest.approx(0, abs=1e-12)
    skip = (1 - s) * std**2 / total
    scale = np.sqrt(std**2 * (1 - skip * (1 - s)) ** 2 + (skip * s) ** 2)
    assert scale * c == pytest.approx(1 - skip * (1 - s)) and scale * d == pytest.approx(-skip * s)


@pytest.mark.parametrize("settings", PREDICTIONS)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_walk_is_the_same_whatever_is_predicted(settings, solver):
    """The exact denoiser of normal data, said in every way: the walks are the same, and end with the data's spread."""
    std, flow = 0.5, made(Flow, solver=solver, **settings)
    sampler, exact = flow.sampler(40), made(Flow, solver=solver, prediction="velocity").sampler(40)
    x = y = torch.ones(1, 1)
    for t in sampler.timesteps:
        s = t / 1000
        total = (1 - s) ** 2 * std**2 + s**2
        clean = [(1 - s) * std**2 / total * one for one in (x, y)]
        noises = [s / total * one for one in (x, y)]
        x = sampler.step(flow.target(clean[0], noises[0], torch.tensor([t])), t, x, [])
        y = exact.step(noises[1] - clean[1], t, y, [])
    torch.testing.assert_close(x, y)
    assert float(x) == pytest.approx(std, abs=0.03 if solver == "euler" else 1e-3)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_of_a_solver_falls_with_its_order(solver, order):
    """dx/ds = x: from s = 1 to 0 the sample shrinks by e."""
    errors = []
    for steps in (20, 40):
        sampler = made(Flow, solver=solver, prediction="velocity").sampler(steps)
        x = torch.ones(1, 1)
        for t in sampler.timesteps:
            x = sampler.step(x, t, x, [])
        errors.append(abs(float(x) - math.exp(-1)))
    # Heun's last step is one of Euler, whose share of the error falls with the second power as well
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
