"""Convolutions before and after a transformer, on one to three axes: they make neighbouring patches consistent.

A decoder that writes each patch separately leaves visible seams between patches. Convolutions on the token grid or on
the output use neighbouring patches and remove the seams.
Paper: ConvNeXt (arXiv 2201.03545), figure 4, for `ConvNeXtBlock`. `GridConv` and `OutputConvs` follow no paper.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.convolution import CONVOLUTIONS
from vqcore_vit.blocks import EPS, linear

_UNPATCH = {
    1: "b h (c p) -> b c (h p)",
    2: "b h w (c p q) -> b c (h p) (w q)",
    3: "b t h w (c p q r) -> b c (t p) (h q) (w r)",
}


def conv(rank: int, channels_in: int, channels_out: int, kernel: Any, **options: Any) -> Any:
    """Make a convolution over `rank` axes. `kernel` is one number or one per axis; `options` are torch's arguments."""
    return CONVOLUTIONS[rank](channels_in, channels_out, kernel, **options)


class GridConv(nn.Module):
    """Mix each token with its neighbours on the grid; a residual branch of LayerNorm, 3-wide convolution and GELU."""

    def __init__(self, rank: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.conv = conv(rank, dim, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
        y = self.conv(rearrange(self.norm(x), "b ... d -> b d ..."))
        return x + rearrange(nn.functional.gelu(y), "b d ... -> b ... d")


class ConvNeXtBlock(nn.Module):
    """A residual branch of a depthwise 7-wide convolution, LayerNorm over channels, an MLP and layer scale."""

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
    """Residual 3-wide convolutions, and a last linear 3-wide convolution to the output's channels, which hides seams.

    All convolutions work at a resolution `scale` times coarser than the output. The last convolution reaches the output
    by sub-pixels (arXiv 1609.05158). The sub-pixels of one position have equal weights at initialisation.
    """

    def __init__(self, rank: int, channels: int, channels_out: int, *, depth: int, scale: int):
        super().__init__()
        self.scale = scale
        self.residual = nn.ModuleList(conv(rank, channels, channels, 3, padding=1) for _ in range(depth))
        self.out = conv(rank, channels, channels_out * scale**rank, 3, padding=1)
        start_flat(self.out, scale**rank)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c_out *size_out"]:
        if x.ndim == 4:  # channels_last is twice as fast on a CPU
            x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.residual:
            x = x + layer(nn.functional.gelu(x))
        return unpatch(self.out(x).movedim(1, -1), (self.scale,) * (x.ndim - 2))


def start_flat(layer: Any, copies: int) -> None:
    """Give equal weights to the `copies` outputs that become one channel of a patch: at first every patch is constant.

    Otherwise the output starts with a pattern inside each patch, and after training a trace of this pattern remains in
    flat areas of the data. ICNR (arXiv 1707.02937), section 2.2, for a layer with outputs in the order (c, *patch).
    """
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_(parameter[::copies].repeat_interleave(copies, 0))


def unpatch(x: Float[Tensor, "b *grid d"], patch: tuple[int, ...]) -> Float[Tensor, "b c *size"]:
    """Turn the channels of each position, in the order (c, *patch), into a patch of the output."""
    return rearrange(x, _UNPATCH[len(patch)], **dict(zip("pqr", patch)))
