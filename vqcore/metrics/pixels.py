"""Metrics of values at positions: PSNR, mean absolute error, and errors of each channel in the units of the files."""

import math
from collections.abc import Mapping, Sequence

import torch
from einops import reduce
from torch import Tensor

from vqcore.config import NoSettings
from vqcore.metrics.sums import (
    mean,
    per_sample,
    position_weights,
    ratio,
    refuse_outside,
    steps,
    summed,
)
from vqcore.protocols import DataSpec


class PSNR:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / MSE) in dB, mean over samples.

    The peak is the width of the declared range, to which reconstructions are clamped. Data whose files have levels, as
    pictures of 8 bits, are compared in whole levels. A perfect sample counts as 100 dB. The PSNR of the mean error,
    10 log10(peak^2 / mean MSE), is another number: it is lower wherever samples differ.
    """

    better = "higher"
    of_constant = True
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        if spec.range is None:
            raise ValueError("psnr needs data with a declared range")
        self.range, self.levels = spec.range, spec.levels

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
        refuse_outside("psnr", x, mask, self.range)
        if self.levels is None:
            peak, off = self.range[1] - self.range[0], x_hat.double().clamp(*self.range) - x
        else:
            peak, off = self.levels, steps(x_hat, self.range, self.levels) - steps(x, self.range, self.levels)
        mse = per_sample(off.square(), mask, weight)
        psnr = 10 * torch.log10(peak**2 / mse.clamp(min=peak**2 * 1e-10))
        return summed(psnr)

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples, in dB."""
        return mean(sums)

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        low, high = self.range
        rounded = "not rounded" if self.levels is None else f"rounded to {self.levels} steps"
        return {
            "convention": f"peak {high - low:g} (range {low:g} to {high:g}), {rounded}, dB of each sample, then mean"
        }


class MAE:
    """Mean absolute error in the values that the tokenizer sees, mean over samples."""

    better = "lower"
    of_constant = True
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
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

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        return {"convention": "values as the tokenizer sees them, mean of each sample, then the mean"}


class Channels:
    """RMSE, mean absolute error and bias (reconstruction minus original) of each channel, in the units of the files.

    The means are over all valid positions of the set, weighted if there are weights.
    """

    in_units = True
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        if spec.kind != "continuous":
            raise ValueError(f"channels is for measured quantities, not for {spec.kind} data")
        self.names = spec.names

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sums of squared, absolute and signed errors `(c,)`, and of the weights of positions."""
        counts = position_weights(mask, weight)
        counts = torch.ones_like(x[:, 0], dtype=torch.float64) if counts is None else counts
        counts = counts.unsqueeze(1)
        # What is missing may be NaN in units, and 0 times NaN is NaN.
        off = torch.where(counts > 0, x_hat.double() - x, 0.0)
        parts = {"rmse": off.square(), "mae": off.abs(), "bias": off}
        sums = {name: reduce(each * counts, "b c ... -> c", "sum") for name, each in parts.items()}
        return {**sums, "count": counts.sum()}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Errors by `rmse/CHANNEL`, `mae/CHANNEL`, `bias/CHANNEL`; a channel without a name has its number from 0."""
        found = {}
        for part in ("rmse", "mae", "bias"):
            for place, total in enumerate(sums[part]):
                name = self.names[place] if self.names else str(place)
                value = ratio(total, sums["count"])
                found[f"{part}/{name}"] = math.sqrt(value) if part == "rmse" else value
        return found

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        return {
            "convention": "units of the files, over all positions of the set; bias is reconstruction - data"
        }
