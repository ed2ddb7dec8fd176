"""Transformer encoder and decoder for inputs of one to three axes: images, sequences, volumes, feature maps.

Papers: ViT (arXiv 2010.11929) for patches and blocks; ViT-VQGAN (arXiv 2110.04627), section 3.1, for the point-wise
tanh MLP at the end of either side; 4M (arXiv 2312.06647) for the whole, whose weights fit name by name.
Differs from 4M: positions of grids that are not square have one half of the channels for the row and one for the
column; the decoder owns the projection of its latents (`in_proj`); `grid_convs` and `out_conv: conv` are new.
"""

from dataclasses import dataclass
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.protocols import DataSpec
from vqcore_vit import trunk
from vqcore_vit.convs import conv


class ViTEncoder(nn.Module):
    """Patches (or, without `patch_proj`, the data's own positions) to latents of width `dim`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(trunk.TransformerConfig):
        """Settings of `vit/encoder`."""

        input_size_enc: int | tuple[int, ...] | None = None
        """Size of the data that positions are made for (default: the nominal one); any other is resized to."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.dim, _, _ = cfg.shape
        self.channels = spec.channels
        self.patch = trunk.patch_of(cfg, spec.rank)
        self.proj = conv(spec.rank, spec.channels, self.dim, self.patch, stride=self.patch)
        trunk.add_blocks(self, cfg, self.grid(trunk.size_of(cfg.input_size_enc, spec)))

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each axis for data of this size. Raises `ValueError` when it is no multiple of the patch."""
        return trunk.grid_of(size, self.patch)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *grid d"]:
        """Cut, embed, transform."""
        trunk.check_channels(x, self.channels)
        grid = self.grid(tuple(x.shape[2:]))
        x = self.proj(x.to(self.proj.weight.dtype))
        x = trunk.add_positions(self, rearrange(x, "b d ... -> b ... d"))
        return trunk.exact_post_mlp(self, _transform(self, x, grid))


class ViTDecoder(nn.Module):
    """Quantized latents of width `dim` to data: `in_proj`, blocks, a patch for every token, optional convolutions."""

    @dataclass(frozen=True, kw_only=True)
    class Config(trunk.DecoderConfig):
        """Settings of `vit/decoder`."""

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        super().__init__()
        width, _, _ = cfg.shape
        self.patch = trunk.patch_of(cfg, spec.rank)
        self.in_proj = nn.Linear(dim, width)
        trunk.add_blocks(self, cfg, trunk.grid_of(trunk.size_of(cfg.input_size_dec, spec), self.patch))
        trunk.add_output(self, cfg, spec)

    @property
    def last_layer(self) -> Tensor:
        """The last weight that the whole output passes through."""
        return trunk.last_layer(self)

    def forward(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]:
        """Project, transform, lay out the patches."""
        x = trunk.add_positions(self, self.in_proj(z_q.to(self.in_proj.weight.dtype)))
        return trunk.write_output(self, _transform(self, x, tuple(z_q.shape[1:-1])))


def _transform(
    module: Any, x: Float[Tensor, "b *grid d"], grid: tuple[int, ...]
) -> Float[Tensor, "b *grid d"]:
    """Run the convolutions on the grid, then the blocks on the row of all tokens."""
    for layer in module.grid_convs:
        x = layer(x)
    return trunk.run_blocks(module, x.flatten(1, -2)).unflatten(1, grid)
