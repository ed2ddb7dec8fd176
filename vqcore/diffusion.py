"""What objectives and samplers of diffusion and flow share: times for a batch, and x_0 and epsilon from a prediction.

All of it works with every scheduler (`vqcore.protocols.Scheduler`), whatever its network predicts.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vqcore.protocols import time
from vqcore.rng import rand, randn

Times = Literal["uniform", "logit-normal"]
Coefficients = Float[Tensor, " b"]


def times(
    scheduler: Any,
    rng: Sequence[torch.Generator],
    distribution: Times = "uniform",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    device: torch.device | str = "cpu",
) -> Shaped[Tensor, " b"]:
    """A noise level for each sample, drawn from the sample's own generator.

    `logit-normal`: the logit of u in [0, 1] is normal with `mean` and `std` (arXiv 2403.03206, section 3.1); a higher
    mean draws more noise. The scheduler's `time` turns u into a noise level.
    """
    u = rand(rng) if distribution == "uniform" else torch.sigmoid(mean + std * randn(rng))
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
