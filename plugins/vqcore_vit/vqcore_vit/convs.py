"""Convolutions around a transformer, on one to three axes: they make neighbouring patches agree.

A decoder that writes each patch on its own leaves seams between them. Convolutions on the token grid, or on the output,
see across the seams.
Paper: ConvNeXt (arXiv 2201.03545), figure 4, for `ConvNeXtBlock`. The other two are from no paper.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore_vit.blocks import EPS, linear

_UNPATCH = {
    1: "b h (c p) -> b c (h p)",
    2: "b h w (c p q) -> b c (h p) (w q)",
    3: "b t h w (c p q r) -> b c (t p) (h q) (w r)",
}
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def conv(rank: int, channels_in: int, channels_out: int, kernel: Any, **options: Any) -> Any:
    """Make a convolution over `rank` axes; `kernel`, a number or one per axis, and options are torch's."""
    return _CONVS[rank](channels_in, channels_out, kernel, **options)


class GridConv(nn.Module):
    """Mix each token with its neighbours on the grid: LayerNorm, a 3-wide convolution, GELU, as a residual branch."""

    def __init__(self, rank: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.conv = conv(rank, dim, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
        y = self.conv(rearrange(self.norm(x), "b ... d -> b d ..."))
        return x + rearrange(nn.functional.gelu(y), "b d ... -> b ... d")


class ConvNeXtBlock(nn.Module):
    """Depthwise 7-wide convolution, LayerNorm over channels, MLP, layer scale, as a residual branch."""

    def __init__(self, rank: int, channels: int):
        super().__init__()
        self.dwconv = conv(rank, channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.pwconv1 = linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = linear(4 * channels, channels)
        self.gamma = nn.Parameter(1e-6 * torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        y = self.norm(rearrange(self.dwconv(x), "b c ... -> b ... c"))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + rearrange(y, "b ... c -> b c ...")


class OutputConvs(nn.Module):
    """Residual 3-wide convolutions, then one to the output's channels: linear and overlapping, it hides seams.

    They work `scale` times coarser than the output, to which the last one goes by sub-pixels (arXiv 1609.05158), which
    start equal.
    """

    def __init__(self, rank: int, channels: int, channels_out: int, *, depth: int, scale: int):
        super().__init__()
        self.scale = scale
        self.residual = nn.ModuleList(conv(rank, channels, channels, 3, padding=1) for _ in range(depth))
        self.out = conv(rank, channels, channels_out * scale**rank, 3, padding=1)
        start_flat(self.out, scale**rank)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c_out *size_out"]:
        if x.ndim == 4:  # twice as fast on a CPU
            x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.residual:
            x = x + layer(nn.functional.gelu(x))
        return unpatch(self.out(x).movedim(1, -1), (self.scale,) * (x.ndim - 2))


def start_flat(layer: Any, copies: int) -> None:
    """Give the `copies` outputs that one channel spreads over a patch equal weights: what is laid out starts flat.

    Otherwise a model starts with a pattern as fine as the patch, and training leaves a trace of it where the data are
    flat. ICNR (arXiv 1707.02937), section 2.2, for a layer whose outputs are in the order (c, *patch).
    """
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_(parameter[::copies].repeat_interleave(copies, 0))


def unpatch(x: Float[Tensor, "b *grid d"], patch: tuple[int, ...]) -> Float[Tensor, "b c *size"]:
    """Lay out what each position holds, in the order (c, *patch), as a patch of the output."""
    return rearrange(x, _UNPATCH[len(patch)], **dict(zip("pqr", patch)))
