"""Rectified flow: a straight line from sample to noise, and the network predicts its velocity.

Papers: rectified flow (arXiv 2209.03003); shift by resolution (arXiv 2403.03206, section 5.3.2); steps that are finer
near the data (FlowMo, arXiv 2503.11056). Heun's method as in EDM (arXiv 2206.00364, algorithm 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vqcore.config import Config as Base
from vqcore.errors import SettingError
from vqcore_unet.table import check_steps


class Flow:
    """x_t = (1 - s) x + s eps with s = t / num_steps; the network predicts eps - x."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Base):
        """Settings of `unet/flow`."""

        num_steps: int = 1000
        """The time of nothing but noise. Time is continuous: this is only the unit in which the network sees it."""
        solver: Literal["euler", "heun"] = "euler"
        """Euler calls the network once a step, Heun twice, except for the last step."""
        shift: float = 1.0
        """Share of noisy times in training and sampling: 1 is even; for images k times larger take k times as much."""
        power: float = 1.0
        """Times of sampling are (1 - k / steps) ** power: above 1, steps are finer near the data (FlowMo: 4)."""

        def __post_init__(self) -> None:
            if self.num_steps < 1:
                raise SettingError("num_steps", f"{self.num_steps} must be at least 1")
            for name in ("shift", "power"):
                if not getattr(self, name) > 0:
                    raise SettingError(name, f"{getattr(self, name)} must be above 0")

    def __init__(self, cfg: Config):
        self.cfg, self.num_steps = cfg, cfg.num_steps

    def time(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The time of a number in [0, 1], shifted."""
        return self.num_steps * self.cfg.shift * u / (1 + (self.cfg.shift - 1) * u)

    def add_noise(
        self, x: Float[Tensor, "b *s"], eps: Float[Tensor, "b *s"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *s"]:
        """The noised sample x_t."""
        s = (t.double() / self.num_steps).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return (1 - s) * x + s * eps

    def target(
        self, x: Float[Tensor, "b *s"], eps: Float[Tensor, "b *s"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *s"]:
        """The velocity of the line."""
        return eps - x

    def sampler(self, steps: int) -> "Walk":
        """One walk of `steps` steps."""
        check_steps(steps)
        u = (1 - torch.arange(steps + 1, dtype=torch.float64) / steps) ** self.cfg.power
        times = [float(t) for t in self.time(u)]
        return Walk(times, self.num_steps, twice=self.cfg.solver == "heun")


class Walk:
    """Down the times to 0. With `twice`, a step is repeated with the mean of the velocities at both of its ends."""

    def __init__(self, times: Sequence[float], num_steps: int, *, twice: bool):
        self._num_steps, self._done = num_steps, 0
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
        x_t, velocity = x_t.float(), prediction.float()
        if part and self._start is not None:
            x_t, first = self._start
            velocity = (first + velocity) / 2
        else:
            self._start = x_t, velocity
        return x_t + (end - start) / self._num_steps * velocity
