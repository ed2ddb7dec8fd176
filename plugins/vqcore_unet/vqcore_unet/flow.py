"""Rectified flow: a straight line from sample to noise.

Papers: rectified flow (arXiv 2209.03003); shift by resolution (arXiv 2403.03206, section 5.3.2); steps that are finer
near the data (FlowMo, arXiv 2503.11056). Heun's method (algorithm 1) and what a preconditioned network predicts (table
1) as in EDM (arXiv 2206.00364).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vqcore.config import Config as Base
from vqcore.config import at_least, refuse_idle
from vqcore.errors import SettingError
from vqcore_unet.table import check_steps


class Flow:
    """x_t = (1 - s) x + s eps with s = t / num_steps; the samples move with the velocity eps - x.

    A `preconditioned` network predicts what is best scaled at every noise level, (x - skip x_t) / scale: `skip x_t` is
    the best linear guess of x for data with the standard deviation `data_std`, and `scale` the error of this guess. So
    it predicts x where there is nothing but noise, and the noise where there is next to none, and an error of its own
    is an error of x that becomes small with the noise. In closed form it is (s x / data_std - (1 - s) data_std eps) / r
    with r^2 = s^2 + ((1 - s) data_std)^2, which is v (arXiv 2202.00512) of data of unit variance, negated.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Base):
        """Settings of `unet/flow`."""

        num_steps: int = 1000
        """The time of nothing but noise. Time is continuous: this is only the unit in which the network sees it."""
        prediction: Literal["velocity", "preconditioned", "sample"] = "velocity"
        """What the network predicts. A velocity holds the noise of every patch at every noise level, so it takes a wide
        network; `preconditioned` takes less. `sample`: train it with the objective's `loss_on: velocity`."""
        data_std: float = 0.5
        """preconditioned only: standard deviation of the data that are noised."""
        solver: Literal["euler", "heun"] = "euler"
        """Euler calls the network once a step, Heun twice, except for the last step."""
        shift: float = 1.0
        """Share of noisy times in training and sampling: 1 is even; for images k times larger take k times as much."""
        power: float = 1.0
        """Times of sampling are (1 - k / steps) ** power: above 1, steps are finer near the data (FlowMo: 4)."""

        def __post_init__(self) -> None:
            at_least(self, num_steps=1)
            for name, least, most in (("shift", 1e-3, 1e3), ("power", 0.1, 10.0), ("data_std", 1e-3, 1e3)):
                if not least <= getattr(self, name) <= most:
                    raise SettingError(name, f"{getattr(self, name)} must be in [{least:g}, {most:g}]")
            if self.prediction != "preconditioned":
                refuse_idle(self, f"prediction={self.prediction}", "data_std")

    def __init__(self, cfg: Config):
        self.cfg, self.num_steps = cfg, cfg.num_steps

    def time(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The time of a number in [0, 1], shifted."""
        return self.num_steps * self.cfg.shift * u / (1 + (self.cfg.shift - 1) * u)

    def add_noise(
        self, x: Float[Tensor, "b *s"], eps: Float[Tensor, "b *s"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *s"]:
        """The noised sample x_t."""
        s = self._share(t, x)
        return (1 - s) * x + s * eps

    def target(
        self, x: Float[Tensor, "b *s"], eps: Float[Tensor, "b *s"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *s"]:
        """What the network predicts."""
        if self.cfg.prediction == "sample":
            return x
        if self.cfg.prediction == "velocity":
            return eps - x
        s, std = self._share(t, x), self.cfg.data_std
        return (s / std * x - (1 - s) * std * eps) / torch.hypot(s, (1 - s) * std)

    def velocity(self, prediction: Float[Tensor, "b *s"], t: float, x_t: Float[Tensor, "b *s"]) -> Tensor:
        """The velocity that a prediction at `x_t` stands for, where there is any noise."""
        if self.cfg.prediction == "velocity":
            return prediction
        s, std, x = t / self.num_steps, self.cfg.data_std, prediction
        if self.cfg.prediction == "preconditioned":
            r = math.hypot(s, (1 - s) * std)
            x = (1 - s) * (std / r) ** 2 * x_t + s * std / r * prediction
        return (x_t - x) / s

    def _share(self, t: Shaped[Tensor, " b"], like: Tensor) -> Tensor:
        """The share of noise at `t`, to be multiplied with samples."""
        return (t.double() / self.num_steps).to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def sampler(self, steps: int) -> "Walk":
        """One walk of `steps` steps."""
        check_steps(steps)
        u = (1 - torch.arange(steps + 1, dtype=torch.float64) / steps) ** self.cfg.power
        times = [float(t) for t in self.time(u)]
        return Walk(times, self.num_steps, self.velocity, twice=self.cfg.solver == "heun")


class Walk:
    """Down the times to 0. With `twice`, a step is repeated with the mean of the velocities at both of its ends."""

    def __init__(
        self,
        times: Sequence[float],
        num_steps: int,
        velocity: Callable[[Tensor, float, Tensor], Tensor],
        *,
        twice: bool,
    ):
        self._num_steps, self._velocity, self._done = num_steps, velocity, 0
        calls = [(a, b, 2 if twice and b else 1) for a, b in pairwise(times)]
        self._calls = [(a, b, part) for a, b, parts in calls for part in range(parts)]
        self.timesteps: Sequence[float] = [b if part else a for a, b, part in self._calls]
        self._start: tuple[Tensor, Tensor] | None = None

    def step(
        self,
        prediction: Float[Tensor, "b *s"],
        t: float,
        x_t: Float[Tensor, "b *s"],
        rng: Sequence[torch.Generator],
    ) -> Float[Tensor, "b *s"]:
        """The sample at the next time, fp32."""
        start, end, part = self._calls[self._done]
        self._done += 1
        x_t = x_t.float()
        velocity = self._velocity(prediction.float(), t, x_t)
        if part and self._start is not None:
            x_t, first = self._start
            velocity = (first + velocity) / 2
        else:
            self._start = x_t, velocity
        return x_t + (end - start) / self._num_steps * velocity
