"""Tables of noise levels for diffusion: alpha_bar for each integer time, and what a network predicts.

x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps. Papers: DDPM (arXiv 2006.11239); cosine (arXiv 2102.09672, equation
17); shifted cosine (arXiv 2301.11093, section 3.1); zero terminal SNR (arXiv 2305.08891, algorithm 1); v
(arXiv 2202.00512, appendix D).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vqcore.config import Config, refuse_idle
from vqcore.errors import ConfigError, SettingError

MAX_LOG_SNR = 15.0
"""Bounds of the shifted cosine's logarithm of SNR, but for the last entry."""
LEAST_SHIFT = 1e-3
"""Beyond this shift, and its reciprocal, all noise levels of the shifted cosine are alike."""
MAX_BETA = 0.999
"""Largest beta of `squaredcos_cap_v2`."""
MOST_ENTRIES = 100_000
"""Most entries of a table."""


@dataclass(frozen=True, kw_only=True)
class TableConfig(Config):
    """Settings that the schedulers with a table share."""

    num_steps: int = 1000
    """Entries of the table."""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "shifted_cosine", "sigmoid"] = (
        "squaredcos_cap_v2"
    )
    """How noise grows with time."""
    beta_start: float = 1e-4
    """First beta of linear, scaled_linear and sigmoid."""
    beta_end: float = 0.02
    """Last beta of linear, scaled_linear and sigmoid."""
    shift: float = 1.0
    """Scale of the noise of shifted_cosine: above 1 for larger images (size / 64 in the paper); 1 is the cosine."""
    prediction: Literal["sample", "epsilon", "v"] = "v"
    """What the network predicts: the clean sample, the noise, or v, a mixture of both."""
    zero_terminal_snr: bool = True
    """Is the last entry nothing but noise? Sampling begins with nothing but noise. shifted_cosine always ends there."""
    as_4m: bool = False
    """Do as 4M and diffusers 0.20 did, errors included (docs/diffusion.md lists them). For imported checkpoints."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_steps <= MOST_ENTRIES:
            raise SettingError("num_steps", f"{self.num_steps} must be in [2, {MOST_ENTRIES}]")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise SettingError(
                ("beta_start", "beta_end"),
                f"beta_start={self.beta_start}, beta_end={self.beta_end}: they must lie in (0, 1) and rise",
            )
        if not LEAST_SHIFT <= self.shift <= 1 / LEAST_SHIFT:
            raise SettingError("shift", f"{self.shift} must be in [{LEAST_SHIFT:g}, {1 / LEAST_SHIFT:g}]")
        if self.schedule != "shifted_cosine":
            refuse_idle(self, f"schedule={self.schedule}", "shift")
        if self.schedule in ("squaredcos_cap_v2", "shifted_cosine"):
            refuse_idle(self, f"schedule={self.schedule}", "beta_start", "beta_end")
        if self.as_4m:
            return
        if self.schedule == "shifted_cosine" and not self.zero_terminal_snr:
            raise SettingError(
                ("schedule", "zero_terminal_snr"),
                "zero_terminal_snr=false does nothing with schedule=shifted_cosine, which ends with nothing but noise",
            )
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise SettingError(
                ("prediction", "zero_terminal_snr"),
                "prediction=epsilon with zero_terminal_snr=true: where there is nothing but noise, noise says nothing "
                "about the sample. Take prediction=v or sample, or zero_terminal_snr=false with another schedule than "
                "shifted_cosine",
            )

    @property
    def ends_in_noise(self) -> bool:
        """Is the last entry nothing but noise?"""
        return self.zero_terminal_snr or self.schedule == "shifted_cosine"


def alphas_cumprod(cfg: TableConfig) -> Float[Tensor, " t"]:
    """alpha_bar, falling; the last one is 0 with zero terminal SNR. float64, or as 4M computed it: fp32."""
    dtype = torch.float32 if cfg.as_4m else torch.float64
    if cfg.schedule == "shifted_cosine":
        t = torch.linspace(0, 1, cfg.num_steps, dtype=torch.float64)
        log_snr = -2 * ((t * math.pi / 2).tan().log() + math.log(cfg.shift))
        table = log_snr.clamp(-MAX_LOG_SNR, MAX_LOG_SNR).to(dtype).sigmoid()
    else:
        table = torch.cumprod(1 - _betas(cfg, dtype), 0)
        if cfg.zero_terminal_snr:
            root = table.sqrt()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            table = root.square()
            if cfg.as_4m:  # by way of betas, which moves the last digits; samples of some networks show it
                betas = 1 - torch.cat([table[:1], table[1:] / table[:-1]])
                table = torch.cumprod(1 - betas, 0)
    if cfg.ends_in_noise:
        table[-1] = 0
    return table


def _betas(cfg: TableConfig, dtype: torch.dtype) -> Float[Tensor, " t"]:
    n, first, last = cfg.num_steps, cfg.beta_start, cfg.beta_end
    if cfg.schedule == "linear":
        return torch.linspace(first, last, n, dtype=dtype)
    if cfg.schedule == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, n, dtype=dtype) ** 2
    if cfg.schedule == "sigmoid":
        return first + (last - first) * torch.linspace(-6, 6, n, dtype=dtype).sigmoid()
    bar = ((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - bar[1:] / bar[:-1]).clamp(max=MAX_BETA).to(dtype)


class Table:
    """A scheduler with a table of noise levels; its subclasses sample. Times with a fraction are rounded down."""

    def __init__(self, cfg: TableConfig):
        self.cfg, self.num_steps = cfg, cfg.num_steps
        self.alphas_cumprod = alphas_cumprod(cfg)

    def add_noise(
        self, x: Float[Tensor, "b *s"], eps: Float[Tensor, "b *s"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *s"]:
        """The noised sample x_t."""
        signal, noise = self._shares(t, x)
        return signal * x + noise * eps

    def target(
        self, x: Float[Tensor, "b *s"], eps: Float[Tensor, "b *s"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *s"]:
        """What the network predicts."""
        if self.cfg.prediction != "v":
            return eps if self.cfg.prediction == "epsilon" else x
        signal, noise = self._shares(t, x)
        return signal * eps - noise * x

    def _shares(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape, t = (-1, *[1] * (like.ndim - 1)), t.long().clamp(0, self.num_steps - 1)
        roots = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        signal, noise = (root.to(like.dtype).to(t.device)[t].view(shape) for root in roots)
        return signal, noise


def check_steps(steps: int, most: int | None = None) -> None:
    """Refuse a number of sampling steps. Raises `ConfigError`."""
    if steps < 1 or (most is not None and steps > most):
        least = "at least 1" if most is None else f"1 to {most}"
        raise ConfigError(f"steps={steps}: a sampler takes {least} steps.")


def spaced(steps: int, num_steps: int, spacing: str, offset: int = 0) -> list[int]:
    """`steps` times that fall, of a table with `num_steps` entries (arXiv 2305.08891, table 2).

    Raises `ConfigError` for a number of steps that the table cannot take.
    """
    check_steps(steps, num_steps)
    k = np.arange(steps)
    times: np.ndarray
    if spacing == "trailing":
        times = np.round(num_steps - k * num_steps / steps) - 1
    elif spacing == "leading":
        times = (num_steps // steps * k)[::-1] + offset
    else:
        times = num_steps - 1 - np.round(np.linspace(0, num_steps - 1, steps))
    found = [int(t) for t in times]
    if found[0] >= num_steps:
        raise ConfigError(
            f"steps={steps}: with spacing={spacing} and steps_offset={offset} sampling would begin at {found[0]}, "
            f"beyond the last entry, {num_steps - 1}. Take fewer steps, or steps_offset=0."
        )
    return found


def names_of(prediction: str) -> Any:
    """The name that diffusers has for a prediction."""
    return {"v": "v_prediction"}.get(prediction, prediction)
