"""Position embeddings of token grids: fixed sines and cosines, interpolated to the grid of the input.

Paper: MoCo v3 (arXiv 2104.02057); for two axes the embedding is the paper's.
Differs from the paper: one to three axes; embeddings are interpolated to grids for which they were not built.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TEMPERATURE = 1e4
"""Ratio of the highest to the lowest frequency."""

_INTERPOLATION = {1: "linear", 2: "bicubic", 3: "trilinear"}


def sincos_positions(grid: tuple[int, ...], width: int) -> Float[Tensor, "1 d *grid"]:
    """Build the embeddings of the positions of a grid.

    Each axis in turn gets `width // (2 * rank)` channels with sines and the same number with cosines of its index. The
    remaining channels are 0. Raises `ValueError` if this number of channels is 0.
    """
    num_freqs = width // (2 * len(grid))
    if num_freqs < 1:
        raise ValueError(
            f"width={width} is below {2 * len(grid)}, the minimum for position embeddings on {len(grid)} axes"
        )
    # A number to the power of a tensor would load torch's compiler on the meta device.
    omega = torch.pow(torch.tensor(TEMPERATURE), -torch.arange(num_freqs) / num_freqs)
    pos_emb = torch.zeros(1, width, *grid)
    for axis, length in enumerate(grid):
        angle = omega[:, None] * torch.arange(length)
        shape = [-1] + [length if other == axis else 1 for other in range(len(grid))]
        start = 2 * num_freqs * axis
        pos_emb[0, start : start + 2 * num_freqs] = torch.cat([angle.sin(), angle.cos()]).reshape(shape)
    return pos_emb


def resize_positions(
    pos_emb: Float[Tensor, "1 d *built"], grid: tuple[int, ...]
) -> Float[Tensor, "1 d *grid"]:
    """Interpolate embeddings to a grid (linear, bicubic, trilinear; `align_corners=False`), if it is another grid."""
    if pos_emb.shape[2:] == grid:
        return pos_emb
    resized = F.interpolate(pos_emb.float(), size=grid, mode=_INTERPOLATION[len(grid)], align_corners=False)
    return resized.to(pos_emb.dtype)
