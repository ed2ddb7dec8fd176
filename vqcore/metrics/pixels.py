"""Metrics of values at positions: PSNR and mean absolute error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqcore.config import Config as BaseConfig
from vqcore.metrics.sums import mean, per_sample, summed
from vqcore.protocols import DataSpec


class PSNR:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / MSE) in dB, mean over samples.

    Reconstructions are clamped to the declared range, whose width is the peak. A perfect sample counts as 100 dB.
    """

    better = "higher"
    of_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        if spec.range is None:
            raise ValueError("psnr needs data with a declared range")
        self.low, self.high = spec.range

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sum of PSNR over samples, and the number of samples."""
        mse = per_sample((x_hat.double().clamp(self.low, self.high) - x).square(), mask, weight)
        peak = self.high - self.low
        psnr = 10 * torch.log10(peak**2 / mse.clamp(min=peak**2 * 1e-10))
        return summed(psnr)

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples, in dB."""
        return mean(sums)


class MAE:
    """Mean absolute error in the values that the tokenizer sees, mean over samples."""

    better = "lower"
    of_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        pass

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sum of the errors of samples, and the number of samples."""
        return summed(per_sample((x_hat.double() - x).abs(), mask, weight))

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return mean(sums)
