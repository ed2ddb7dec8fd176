"""Changes of what a discriminator sees that have gradients (DiffAug, arXiv 2006.10738, section 3.3), for any rank."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vqcore.rng import forked, rand

Augmentation = Literal["colour", "translation", "cutout"]

SHIFT, CUT = 1 / 8, 1 / 2
"""`translation` moves by up to this share of each axis; `cutout` hides a box of this share of each axis."""


def augmented(
    x: Float[Tensor, "b c *size"],
    which: Sequence[Augmentation],
    rng: Sequence[torch.Generator],
    *,
    span: tuple[float, float],
) -> Float[Tensor, "b c *size"]:
    """`x`, changed by numbers of each sample's own generator. The middle of `span`, the data's range, fills holes."""
    middle, width = (span[0] + span[1]) / 2, span[1] - span[0]
    x = x - middle
    for name in which:
        own = forked(rng, name)
        if name == "colour":
            x = _coloured(x, own, width)
        elif name == "translation":
            x = _moved(x, own)
        else:
            x = _cut(x, own)
    return x + middle


def _coloured(x: Tensor, rng: Sequence[torch.Generator], width: float) -> Tensor:
    """Brightness by up to a quarter of the range, saturation 0 to 2, contrast 0.5 to 1.5."""
    bright, saturation, contrast = (
        rand(rng, 3, device=x.device).to(x.dtype).reshape(len(x), 3, *[1] * (x.ndim - 1)).unbind(1)
    )
    x = x + (bright - 0.5) * width / 2
    grey = reduce(x, "b c ... -> b 1 ...", "mean")
    x = (x - grey) * (2 * saturation) + grey
    mean = x.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
    return (x - mean) * (contrast + 0.5) + mean


def _moved(x: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
    size = x.shape[2:]
    most = [round(side * SHIFT) for side in size]
    drawn = rand(rng, len(size)).tolist()
    wide = F.pad(x, [edge for one in reversed(most) for edge in (one, one)])
    moved = []
    for sample, chances in zip(wide, drawn):
        for axis, (chance, side, one) in enumerate(zip(chances, size, most), 1):
            sample = sample.narrow(axis, int(chance * (2 * one + 1)), side)
        moved.append(sample)
    return torch.stack(moved)


def _cut(x: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
    """A box whose middle lies anywhere, so that the box may reach over the edge."""
    size = x.shape[2:]
    drawn = rand(rng, len(size), device=x.device)
    inside = torch.ones((len(x), 1, *[1] * len(size)), dtype=torch.bool, device=x.device)
    for axis, side in enumerate(size):
        place = torch.arange(side, device=x.device)
        distance = (place[None] + 0.5 - drawn[:, axis, None] * side).abs() < side * CUT / 2
        inside = inside & distance.reshape(len(x), 1, *[side if i == axis else 1 for i in range(len(size))])
    return x * ~inside
