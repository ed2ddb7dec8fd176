"""What objectives and samplers of diffusion and flow share: times for a batch, x_0 and epsilon from a prediction,
weights of losses, hidden tokens and guidance.

All of it works with every scheduler (`vqcore.protocols.Scheduler`), whatever its network predicts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from vqcore.protocols import time
from vqcore.rng import rand, randn

Times = Literal["uniform", "logit-normal", "mixed"]
Target = Literal["prediction", "x_0", "epsilon", "velocity"]
Coefficients = Float[Tensor, " b"]


def times(
    scheduler: Any,
    rng: Sequence[torch.Generator],
    distribution: Times = "uniform",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    uniform: float = 0.1,
    device: torch.device | str = "cpu",
) -> Shaped[Tensor, " b"]:
    """A noise level for each sample, drawn from the sample's own generator.

    `logit-normal`: the logit of u in [0, 1] is normal with `mean` and `std` (arXiv 2403.03206, section 3.1); a higher
    mean draws more noise. `mixed`: logit-normal, but for the share `uniform` of the samples uniform, so that both ends
    are seen (arXiv 2503.11056). The scheduler's `time` turns u into a noise level.
    """
    u = rand(rng) if distribution == "uniform" else torch.sigmoid(mean + std * randn(rng))
    if distribution == "mixed":
        u = torch.where(rand(rng) < uniform, rand(rng), u)
    return time(scheduler, u.to(device))


def x_0(
    scheduler: Any, prediction: Float[Tensor, "b *s"], x_t: Float[Tensor, "b *s"], t: Shaped[Tensor, " b"]
) -> Float[Tensor, "b *s"]:
    """The clean samples that a network's prediction at `x_t` stands for, in fp32 or more.

    Raises `ValueError` where neither `x_t` nor the prediction says anything about them (epsilon in pure noise).
    """
    a, b, c, d = coefficients(scheduler, t, x_t.ndim)
    return _solved((a, b), (c, d), x_t, prediction, t, "x_0")


def epsilon(
    scheduler: Any, prediction: Float[Tensor, "b *s"], x_t: Float[Tensor, "b *s"], t: Shaped[Tensor, " b"]
) -> Float[Tensor, "b *s"]:
    """The noise that a network's prediction at `x_t` stands for, in fp32 or more.

    Raises `ValueError` where neither `x_t` nor the prediction says anything about it (x_0 without noise).
    """
    a, b, c, d = coefficients(scheduler, t, x_t.ndim)
    return _solved((b, a), (d, c), x_t, prediction, t, "epsilon")


def of_velocity(scheduler: Any, t: Shaped[Tensor, " b"], least: float = 0.05) -> Float[Tensor, " b"]:
    """What an error of x_0 is multiplied by to be an error of the velocity, epsilon - x_0.

    This is 1 + a / b for x_t = a x_0 + b epsilon: 1 / s in a flow, where s is the share of noise. Without noise it is
    infinite, so b counts as at least `least` (arXiv 2511.13720).
    """
    a, b, _, _ = coefficients(scheduler, t, 1)
    return (1 + a / b.clamp(min=least)).float()


def coefficients(
    scheduler: Any, t: Shaped[Tensor, " b"], rank: int
) -> tuple[Coefficients, Coefficients, Coefficients, Coefficients]:
    """a, b, c, d at `t`, float64: `add_noise` is a x + b eps, `target` is c x + d eps.

    The scheduler itself is asked, with ones and zeros of `rank` axes. Raises `ValueError` if it does not answer with
    one number per sample.
    """
    one = torch.ones(len(t), *[1] * (rank - 1), dtype=torch.float64, device=t.device)
    zero = torch.zeros_like(one)
    asked = [
        ask(x, eps, t)
        for ask in (scheduler.add_noise, scheduler.target)
        for x, eps in ((one, zero), (zero, one))
    ]
    if any(answer.shape != one.shape for answer in asked):
        raise ValueError(
            f"{type(scheduler).__name__} has more than one factor for a sample, so no x_0 can be found"
        )
    a, b, c, d = (answer.double().flatten() for answer in asked)
    return a, b, c, d


def min_snr(
    scheduler: Any, t: Shaped[Tensor, " b"], gamma: float, of: Target = "prediction"
) -> Float[Tensor, " b"]:
    """The weight of each sample's squared error: min(SNR, gamma) for the error of x_0 (arXiv 2303.09556).

    For an error of what the network predicts, or of epsilon, it is the weight that makes the loss the same: for
    epsilon min(SNR, gamma) / SNR, for v min(SNR, gamma) / (SNR + 1), for a velocity min(SNR, gamma) b^2. So the weight
    is finite at SNR 0 and without noise.
    """
    a, b, c, d = coefficients(scheduler, t, 1)
    a, b = a.clamp(min=1e-6), b.clamp(min=1e-6)  # the limits at both ends
    c, d = {
        "prediction": (c, d),
        "x_0": (torch.ones_like(a), torch.zeros_like(a)),
        "epsilon": (torch.zeros_like(a), torch.ones_like(a)),
        "velocity": (-torch.ones_like(a), torch.ones_like(a)),
    }[of]
    return (torch.minimum(a.square(), gamma * b.square()) / (a * d - b * c).square()).float()


def same_levels(scheduler: Any, other: Any) -> bool:
    """Do two schedulers have the same noise levels, and do their networks predict the same?"""
    if scheduler.num_steps != other.num_steps:
        return False
    t = time(scheduler, torch.linspace(0, 1, 33))
    ours, theirs = (torch.stack(coefficients(one, t, 1)) for one in (scheduler, other))
    return torch.allclose(ours, theirs, rtol=0, atol=1e-4)


def hidden_tokens(counts: Shaped[Tensor, " b"], order: Float[Tensor, "b *grid"]) -> Bool[Tensor, "b *grid"]:
    """Which tokens are hidden: `counts` of each sample's tokens, chosen by the random numbers `order`."""
    places = order.flatten(1).argsort(1).view(order.shape)
    return places < counts.view(-1, *[1] * (order.ndim - 1))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: u,
    "cosine": lambda u: ((1 - math.cos(math.pi * u)) / 2) ** 2,
}
"""The share of the guidance at a noise level u in [0, 1]: at 0 there is the least noise."""


def guided(
    held: Float[Tensor, "b *s"], free: Float[Tensor, "b *s"], weight: float, rescale: float = 0.0
) -> Float[Tensor, "b *s"]:
    """Classifier-free guidance: from a prediction without tokens, `free`, to `weight` times the way to `held`.

    arXiv 2207.12598. With `rescale` in (0, 1], the standard deviation of each sample is pulled towards that of `held`
    (arXiv 2305.08891, section 3.4): high weights otherwise give contrasts that are too strong.
    """
    found = free + weight * (held - free)
    if not rescale:
        return found
    shape = (-1, *[1] * (held.ndim - 1))
    wanted, has = (one.flatten(1).std(1).view(shape) for one in (held, found))
    tiny = torch.finfo(found.dtype).tiny
    return found * (rescale * wanted / has.clamp(min=tiny) + 1 - rescale)


def _solved(
    noised: tuple[Coefficients, Coefficients],
    predicted: tuple[Coefficients, Coefficients],
    x_t: Tensor,
    prediction: Tensor,
    t: Tensor,
    name: str,
) -> Tensor:
    """The wanted half of two equations, x_t = a wanted + b other and prediction = c wanted + d other.

    If one equation does not contain the other half, it alone gives the wanted one, also where both together have no
    solution.
    """
    (a, b), (c, d) = noised, predicted
    determinant = a * d - b * c
    tiny = 1e-6 * (a.square() + b.square()).sqrt() * (c.square() + d.square()).sqrt()
    from_prediction = (d == 0) & (c != 0)
    from_x_t = (b == 0) & (a != 0) & ~from_prediction
    unknown = (determinant.abs() <= tiny) & ~from_prediction & ~from_x_t
    if bool(unknown.any()):
        raise ValueError(
            f"{name} cannot be found at t={float(t[unknown][0]):g}: there neither x_t nor the prediction holds it. "
            "Leave this noise level out, or let the network predict v"
        )
    of_x_t = torch.where(from_prediction, 0.0, torch.where(from_x_t, 1 / a, d / determinant))
    of_prediction = torch.where(from_prediction, 1 / c, torch.where(from_x_t, 0.0, -b / determinant))
    shape = (-1, *[1] * (x_t.ndim - 1))
    found = torch.float64 if torch.float64 in (x_t.dtype, prediction.dtype) else torch.float32
    u, v = of_x_t.to(found).view(shape), of_prediction.to(found).view(shape)
    return u * x_t.to(found) + v * prediction.to(found)
