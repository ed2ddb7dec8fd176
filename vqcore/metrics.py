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

WINDOW = 65_536
"""Tokens over which the use of a codebook is watched in training."""
COLLAPSE = 0.1
"""A codebook of which less than this share is used (of what the window could show) has collapsed."""


class PSNR:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / MSE) in dB, of each sample clamped to its range; their mean.

    The peak is the width of the declared range. A perfect sample counts as 100 dB.
    """

    better = "higher"

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

    better = "lower"

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

    better = "higher"

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
    """The last tokens of training: how much of the codebook they use, and since when the rest is dead.

    `window` is the number of tokens over all processes; each keeps its share. Memory is constant: the window, and one
    number per code. A code is dead when the window holds none of it; its age is the number of steps since it last
    occurred (or since the start).
    """

    def __init__(self, codebook_size: int, num_codebooks: int, window: int = WINDOW):
        self.codebook_size, self.window = codebook_size, window
        share = max(1, window // dist.world_size())
        self.codes = torch.full((share, num_codebooks), -1, dtype=torch.int32)
        self.last_seen = torch.zeros(num_codebooks, codebook_size, dtype=torch.int32)
        self.position, self.collapsed = 0, False

    def add(self, codes: Int[Tensor, "b *grid q"], step: int = 0) -> None:
        """Take in the codes of step number `step` (from 0); the oldest ones leave."""
        new = rearrange(codes.detach(), "... q -> (...) q").to("cpu", torch.int32)
        for book, column in enumerate(new.T):
            self.last_seen[book, column.long()] = step + 1
        new = new[-len(self.codes) :]
        places = (self.position + torch.arange(len(new))) % len(self.codes)
        self.codes[places] = new
        self.position = (self.position + len(new)) % len(self.codes)

    def figures(self, step: int | None = None) -> dict[str, float]:
        """Figures over the window and all processes, means over codebooks, after `step` steps.

        `codes/usage` (share of the codebook seen), `codes/perplexity`, and with a step `codes/dead` (number of codes
        not seen) and `codes/dead_age` (median age of the dead in steps; 0 if none is).
        """
        counts = dist.sum_(self.counts())
        figures = code_figures(counts)
        if step is not None:
            dead = counts == 0
            ages = (step - dist.max_(self.last_seen.clone()))[dead]
            figures["codes/dead"] = float(dead.sum(1).double().mean())
            figures["codes/dead_age"] = float(ages.median()) if len(ages) else 0.0
        return figures

    def warning(self, figures: Mapping[str, float]) -> str:
        """One line with a remedy when a full window uses too little of the codebook; once, until it recovers."""
        usage = figures["codes/usage"]
        was, enough = self.collapsed, min(1.0, self.window / self.codebook_size)
        self.collapsed = bool((self.codes[-1] >= 0).all()) and usage < (2 * COLLAPSE if was else COLLAPSE) * enough
        if was or not self.collapsed:
            return ""
        return (
            f"the codebook has collapsed: {usage:.1%} of {self.codebook_size} codes occur in the last {self.window:,} "
            f"tokens (perplexity {figures['codes/perplexity']:.0f}). Try dead-code replacement, a smaller codebook, "
            "a lower optim.lr, a smaller latent_dim, or quant/fsq; docs/quantizers.md says how to choose."
        )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"codes": self.codes, "last_seen": self.last_seen, "position": torch.tensor(self.position)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave; a window of another size begins empty."""
        if state and state["codes"].shape == self.codes.shape:
            self.codes, self.last_seen = state["codes"].clone(), state["last_seen"].clone()
            self.position = int(state["position"])

    def counts(self) -> Int[Tensor, "q k"]:
        """How often each code of each codebook occurs in this process's window."""
        seen = [column[column >= 0].long() for column in self.codes.T]
        return torch.stack([torch.bincount(column, minlength=self.codebook_size) for column in seen])


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
