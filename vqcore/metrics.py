"""Figures of reconstructions and of codebooks; exact over any number of batches and processes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from vqcore import dist
from vqcore.config import Config as BaseConfig
from vqcore.protocols import DataSpec


class PSNR:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / MSE) in dB, of each sample clamped to its range; their mean.

    The peak is the width of the declared range. A perfect sample counts as 100 dB.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        if spec.range is None:
            raise ValueError("psnr needs data with a declared range")
        self.low, self.high = spec.range

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Sum of the samples' PSNR, and their number."""
        mse = _per_sample((x_hat.double().clamp(self.low, self.high) - x).square(), mask)
        peak = self.high - self.low
        psnr = 10 * torch.log10(peak**2 / mse.clamp(min=peak**2 * 1e-10))
        return {"sum": psnr.sum(), "count": _count(x)}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples, in dB."""
        return {"": float(sums["sum"] / sums["count"])}


class MAE:
    """Mean absolute error per sample, in units of the data as the tokenizer sees it; their mean."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        pass

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Sum of the samples' errors, and their number."""
        return {"sum": _per_sample((x_hat.double() - x).abs(), mask).sum(), "count": _count(x)}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return {"": float(sums["sum"] / sums["count"])}


class Accuracy:
    """Share of valid positions of class maps whose most likely class is the right one."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        if spec.labels is None:
            raise ValueError("accuracy is for class maps")

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Right positions and all positions."""
        right = (x_hat.argmax(1) == x).double()
        valid = torch.ones_like(right) if mask is None else mask.double()
        return {"right": (right * valid).sum(), "all": valid.sum()}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Their ratio."""
        return {"": float(sums["right"] / sums["all"])}


class CodeWindow:
    """The last tokens of training: how much of the codebook they use. Constant memory.

    `window` is the number of tokens over all processes; each keeps its share.
    """

    def __init__(self, codebook_size: int, num_codebooks: int, window: int = 65_536):
        self.codebook_size, self.window = codebook_size, window
        share = max(1, window // dist.world_size())
        self.codes = torch.full((share, num_codebooks), -1, dtype=torch.int32)
        self.position = 0

    def add(self, codes: Int[Tensor, "b *grid q"]) -> None:
        """Take in a batch's codes; the oldest ones leave."""
        new = rearrange(codes.detach(), "... q -> (...) q").to("cpu", torch.int32)[-len(self.codes) :]
        places = (self.position + torch.arange(len(new))) % len(self.codes)
        self.codes[places] = new
        self.position = (self.position + len(new)) % len(self.codes)

    def figures(self) -> dict[str, float]:
        """`codes/usage` (share of the codebook seen) and `codes/perplexity`, over the window and all processes."""
        seen = [column[column >= 0].long() for column in self.codes.T]
        counts = [torch.bincount(column, minlength=self.codebook_size) for column in seen]
        return code_figures(dist.sum_(torch.stack(counts)))


def code_figures(counts: Int[Tensor, "q k"]) -> dict[str, float]:
    """Usage and perplexity from how often each code of each codebook occurred; the mean over codebooks."""
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(1)
    return {
        "codes/usage": float((counts > 0).double().mean()),
        "codes/perplexity": float(entropy.exp().mean()),
    }


def bits_per_position(bits_per_token: float, grid: tuple[int, ...], size: tuple[int, ...]) -> float:
    """Bits of all tokens over the number of input positions (pixels, frames, voxels)."""
    return bits_per_token * math.prod(grid) / math.prod(size)


def _per_sample(each: Float[Tensor, "b *rest"], mask: Tensor | None) -> Float[Tensor, " b"]:
    if mask is None:
        return reduce(each, "b ... -> b", "mean")
    weight = mask.double().unsqueeze(1).expand_as(each)
    return reduce(each * weight, "b ... -> b", "sum") / reduce(weight, "b ... -> b", "sum").clamp(min=1)


def _count(x: Tensor) -> Tensor:
    return torch.tensor(len(x), dtype=torch.float64, device=x.device)
