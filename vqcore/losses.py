"""Reconstruction losses by name, with a mask: positions where it is False count nothing.

mse, l1, smooth_l1 and huber (arXiv 1504.08083, equation 3), cosine (over channels), bce, cross_entropy.
Differs from 4M: its `cosine` compares over space, its `cosine_1d` over channels, as here; its binary cross-entropy is
that of a softmax over probabilities and never 0, `bce` is the one of logits.
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
    """Raise `ValueError` when a loss does not fit the data's kind."""
    if (name == "cross_entropy") != (spec.labels is not None):
        raise ValueError(f"loss={name} with {spec.kind} data: cross_entropy and class maps go together")
    if name == "cosine" and spec.channels < 2:
        raise ValueError(f"loss=cosine with {spec.channels} channel: a cosine compares vectors of 2 or more")
    if name == "bce" and (spec.range is None or spec.kind not in ("binary", "continuous")):
        bounds = "no declared range" if spec.range is None else f"range {list(spec.range)}"
        raise ValueError(
            f"loss=bce with {spec.kind} data of {bounds}: it needs values between a no and a yes"
        )


def loss_map(name: str, y: Tensor, x: Tensor, *, width: float = 1.0) -> Float[Tensor, "b *size"]:
    """The loss at every position, mean over channels.

    `y` is what the decoder says: logits `(b, labels, *size)` for cross_entropy, whose `x` are class ids; logits for
    bce, whose `x` lies in 0 to 1; else values like `x`. `width` is the beta of smooth_l1, the delta of huber.
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
    name: str, y: Tensor, x: Tensor, mask: Bool[Tensor, "b *size"] | None = None, *, width: float = 1.0
) -> Float[Tensor, ""]:
    """Mean over samples of their mean `loss_map` at valid positions; a sample without any counts as 0."""
    if mask is None:
        return loss_map(name, y, x, width=width).mean()
    # What stands at an invalid position may be no number: then the gradient of its loss is none either, even times 0.
    x = torch.where(mask if x.ndim == mask.ndim else mask.unsqueeze(1), x, 0)
    each = torch.where(mask, loss_map(name, y, x, width=width), 0.0).flatten(1)
    return (each.sum(1) / mask.flatten(1).sum(1).clamp(min=1)).mean()


def target_of(name: str, x: Tensor, spec: DataSpec) -> Tensor:
    """What a decoder's output is compared with: the data; for bce as shares of its range."""
    if name != "bce" or spec.range is None:
        return x
    low, high = spec.range
    return (x - low) / (high - low)


def output_of(name: str, y: Tensor, spec: DataSpec) -> Tensor:
    """From a decoder's output to values like the data's; the logits of bce become shares of its range."""
    if name != "bce" or spec.range is None:
        return y
    low, high = spec.range
    return low + (high - low) * torch.sigmoid(y)


def _over_channels(each: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *size"]:
    return reduce(each, "b c ... -> b ...", "mean")
