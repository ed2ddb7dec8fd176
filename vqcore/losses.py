"""Reconstruction losses by name, with a mask and weights: positions where the mask is False do not count.

mse, l1, smooth_l1 and huber (arXiv 1504.08083, equation 3), cosine (over channels), bce, cross_entropy.
Differs from 4M: the `cosine` of 4M compares over space; its `cosine_1d` compares over channels, like `cosine` here. The
binary cross-entropy of 4M takes a softmax over probabilities and is never 0; `bce` here takes logits.
"""

from collections.abc import Callable
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from vqcore.protocols import DataSpec

LossName = Literal["mse", "l1", "smooth_l1", "huber", "cosine", "cross_entropy", "bce"]
_PLAIN: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
}
_WIDTH = {"smooth_l1": "beta", "huber": "delta"}


def check_loss(name: str, spec: DataSpec) -> None:
    """Raise `ValueError` when a loss does not fit the kind of the data."""
    if (name == "cross_entropy") != (spec.labels is not None):
        raise ValueError(
            f"loss={name} with {spec.kind} data: class maps need cross_entropy, and only class maps do"
        )
    if name == "cosine" and spec.channels < 2:
        raise ValueError(f"loss=cosine with {spec.channels} channel: a cosine compares vectors of 2 or more")
    if name == "bce" and (spec.range is None or spec.kind not in ("binary", "continuous")):
        bounds = "no declared range" if spec.range is None else f"range {list(spec.range)}"
        raise ValueError(
            f"loss=bce with {spec.kind} data of {bounds}: bce needs binary or continuous data with a range"
        )


def loss_map(name: str, y: Tensor, x: Tensor, *, width: float = 1.0) -> Float[Tensor, "b *size"]:
    """The loss at every position, mean over channels.

    `y` is the decoder's output. For cross_entropy `y` are logits `(b, labels, *size)` and `x` are class ids; for bce
    `y` are logits and `x` lies in 0 to 1; else both are values. `width` is the beta of smooth_l1, the delta of huber.
    """
    if name == "cross_entropy":
        return F.cross_entropy(y, x.long(), reduction="none")
    if name == "cosine":
        return 1 - F.cosine_similarity(y, x, dim=1)
    if name == "bce":
        return _over_channels(F.binary_cross_entropy_with_logits(y, x, reduction="none"))
    options = {_WIDTH[name]: width} if name in _WIDTH else {}
    return _over_channels(_PLAIN[name](y, x, reduction="none", **options))


def pixel_loss(
    name: str,
    y: Tensor,
    x: Tensor,
    mask: Bool[Tensor, "b *size"] | None = None,
    *,
    weight: Float[Tensor, "b *size"] | None = None,
    width: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean over samples of `sample_losses`."""
    if mask is None and weight is None:
        return loss_map(name, y, x, width=width).mean()
    return sample_losses(name, y, x, mask, weight=weight, width=width).mean()


def sample_losses(
    name: str,
    y: Tensor,
    x: Tensor,
    mask: Bool[Tensor, "b *size"] | None = None,
    *,
    weight: Float[Tensor, "b *size"] | None = None,
    width: float = 1.0,
) -> Float[Tensor, " b"]:
    """The mean `loss_map` of each sample at valid positions; of a sample without valid positions 0.

    With `weight`, at least 0, the mean is weighted; weight 0 is the same as invalid. Only the ratios of weights within
    a sample matter.
    """
    if weight is not None:
        mask = weight > 0 if mask is None else mask & (weight > 0)
    if mask is None:
        return loss_map(name, y, x, width=width).flatten(1).mean(1)
    # A value at an invalid position may be NaN; then the gradient of its loss is NaN too, even when multiplied by 0.
    x = torch.where(mask if x.ndim == mask.ndim else mask.unsqueeze(1), x, 0)
    each = torch.where(mask, loss_map(name, y, x, width=width), 0.0).flatten(1)
    if weight is None:
        return each.sum(1) / mask.flatten(1).sum(1).clamp(min=1)
    counts = torch.where(mask, weight, 0.0).flatten(1)
    counts = counts / counts.amax(1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
    return (each * counts).sum(1) / counts.sum(1).clamp(min=1)


def target_of(name: str, x: Tensor, spec: DataSpec) -> Tensor:
    """The target of a decoder's output: the data; for bce, the data as shares of its range."""
    if name != "bce" or spec.range is None:
        return x
    low, high = spec.range
    return (x - low) / (high - low)


def output_of(name: str, y: Tensor, spec: DataSpec) -> Tensor:
    """A decoder's output as values like the data; for bce, logits become values in the range of the data."""
    if name != "bce" or spec.range is None:
        return y
    low, high = spec.range
    return low + (high - low) * torch.sigmoid(y)


def _over_channels(each: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *size"]:
    return reduce(each, "b c ... -> b ...", "mean")
