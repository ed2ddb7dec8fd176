"""Alignment of latents to the features of a frozen network (VA-VAE, arXiv 2501.01423)."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vqcore.balance import AdaptiveWeight
from vqcore.borrowed import keep_frozen


class Alignment(nn.Module):
    """Latents that a trained linear map takes close to a teacher's features.

    Terms: `align/cosine`, the mean over positions of max(0, 1 - m1 - cosine of a mapped latent and its feature);
    `align/distances`, the mean over pairs of positions of max(0, |difference of the two cosines of a pair| - m2), of
    its mapped latents and of its features. `margins` are m1 and m2. Mapped latents stand in both terms. A teacher's
    map of another grid is resized to the grid of the latents.
    """

    def __init__(self, teacher: Any, *, dim: int, margins: tuple[float, float], adaptive: bool):
        super().__init__()
        self.teacher, self.margins = teacher, margins
        keep_frozen(self.teacher)
        self.head = nn.Linear(dim, teacher.dim, bias=False)
        self.adaptive = AdaptiveWeight() if adaptive else None

    def forward(self, z: Float[Tensor, "b *grid d"], x: Float[Tensor, "b c *size"]) -> dict[str, Tensor]:
        """The two terms, for the latents `z` of the samples `x`. Gradients reach `z` and the map."""
        with torch.autocast(z.device.type, enabled=False):
            with torch.no_grad():
                features = self.features(x, tuple(z.shape[1:-1]))
            return aligned(self.head(z.float()), features, self.margins)

    def features(self, x: Tensor, grid: tuple[int, ...]) -> Float[Tensor, "b rows columns d"]:
        """What the teacher sees in samples, on the grid of their latents. Raises `ValueError` where there is no map."""
        found = self.teacher(x)
        if found.ndim != 4 or len(grid) != 2:
            what = (
                f"gives {found.ndim - 2} axes"
                if found.ndim != 4
                else f"has 2 axes, the latents have {len(grid)}"
            )
            raise ValueError(
                f"align compares maps of features and of latents, with 2 axes each: the teacher {what}"
            )
        if found.shape[2:] != grid:
            found = F.interpolate(found, grid, mode="bilinear", antialias=True)
        return rearrange(found, "b d h w -> b h w d")


def aligned(
    z: Float[Tensor, "b rows columns d"],
    features: Float[Tensor, "b rows columns d"],
    margins: tuple[float, float],
) -> dict[str, Tensor]:
    """The terms of latents that have the features' width already."""
    z, features = (F.normalize(rearrange(one, "b h w d -> b (h w) d"), dim=-1) for one in (z, features))
    apart = (z @ z.mT - features @ features.mT).abs()
    return {
        "align/cosine": F.relu(1 - margins[0] - (z * features).sum(-1)).mean(),
        "align/distances": F.relu(apart - margins[1]).mean(),
    }
