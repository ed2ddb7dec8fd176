"""Transformer encoder and decoder for inputs of one to three axes: images, sequences, volumes, feature maps.

Papers: ViT (arXiv 2010.11929) for patches and blocks; ViT-VQGAN (arXiv 2110.04627), section 3.1, for the point-wise
tanh MLP at the end of encoder and decoder; 4M (arXiv 2312.06647) for the whole model; the names of weights are 4M's.
Differs from 4M: also on grids that are not square, position embeddings use one half of the channels for the row and one
half for the column; the projection of the latents (`in_proj`) is a part of the decoder; `grid_convs` and
`out_conv: conv` are new.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.protocols import DataSpec
from vqcore_vit import trunk
from vqcore_vit.convs import conv


class ViTEncoder(nn.Module):
    """Encode patches (with `patch_proj: false`: positions of the data) into latents of width `dim`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(trunk.TransformerConfig):
        """Settings of `vit/encoder`."""

        # The positions are a tensor of the encoder, so the fingerprint has their grid.
        training_only: ClassVar[tuple[str, ...]] = (*trunk.TransformerConfig.training_only, "input_size_enc")

        input_size_enc: int | tuple[int, ...] | None = None
        """Data size for which position embeddings are built (default: nominal size); interpolated to other sizes."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.dim, _, _ = cfg.shape
        self.channels = spec.channels
        self.patch = trunk.patch_of(cfg, spec.rank)
        self.proj = conv(spec.rank, spec.channels, self.dim, self.patch, stride=self.patch)
        trunk.add_blocks(self, cfg, self.grid(trunk.size_of(cfg.input_size_enc, spec)))

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Number of tokens along each axis. Raises `ValueError` if `size` is not a multiple of the patch."""
        return trunk.grid_of(size, self.patch)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *grid d"]:
        """Embed the patches, add positions, and apply the transformer."""
        trunk.check_channels(x, self.channels)
        grid = self.grid(tuple(x.shape[2:]))
        x = self.proj(x.to(self.proj.weight.dtype))
        x = trunk.add_positions(self, rearrange(x, "b d ... -> b ... d"))
        return trunk.exact_post_mlp(self, _transform(self, x, grid))


class ViTDecoder(nn.Module):
    """Decode quantized latents of width `dim`: `in_proj`, blocks, a patch for every token, optional convolutions."""

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
        """The last weight that affects every value of the output."""
        return trunk.last_layer(self)

    def forward(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]:
        """Project the latents, apply the transformer, and turn tokens into patches."""
        x = trunk.add_positions(self, self.in_proj(z_q.to(self.in_proj.weight.dtype)))
        return trunk.write_output(self, _transform(self, x, tuple(z_q.shape[1:-1])))


def _transform(
    module: Any, x: Float[Tensor, "b *grid d"], grid: tuple[int, ...]
) -> Float[Tensor, "b *grid d"]:
    """Apply the convolutions on the grid, and then the blocks on the sequence of all tokens."""
    for layer in module.grid_convs:
        x = layer(x)
    return trunk.run_blocks(module, x.flatten(1, -2)).unflatten(1, grid)
