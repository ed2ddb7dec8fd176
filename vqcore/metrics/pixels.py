"""Metrics of values at positions: PSNR and mean absolute error."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqcore.config import Config as BaseConfig
from vqcore.metrics.sums import per_sample, sample_count
from vqcore.protocols import DataSpec


class PSNR:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / MSE) in dB, of each sample clamped to its range; their mean.

    The peak is the width of the declared range. A perfect sample counts as 100 dB.
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

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Sum of the samples' PSNR, and their number."""
        mse = per_sample((x_hat.double().clamp(self.low, self.high) - x).square(), mask)
        peak = self.high - self.low
        psnr = 10 * torch.log10(peak**2 / mse.clamp(min=peak**2 * 1e-10))
        return {"sum": psnr.sum(), "count": sample_count(x)}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples, in dB."""
        return {"": float(sums["sum"] / sums["count"])}


class MAE:
    """Mean absolute error per sample, in units of the data as the tokenizer sees it; their mean."""

    better = "lower"
    of_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        pass

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Sum of the samples' errors, and their number."""
        return {"sum": per_sample((x_hat.double() - x).abs(), mask).sum(), "count": sample_count(x)}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return {"": float(sums["sum"] / sums["count"])}
