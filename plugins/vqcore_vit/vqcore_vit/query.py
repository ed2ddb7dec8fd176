"""A fixed number of latent tokens for inputs of any size: query tokens collect them, mask tokens are filled from them.

Paper: TiTok (arXiv 2406.07550), section 3.2: learnt latent tokens go through the encoder beside the patches and alone
reach the quantizer; the decoder sees them beside one mask token for every patch. The grid has one axis.
Differs from the paper: trained on the data at once, not first on another tokenizer's codes; patches have sines and
cosines for positions, so that other sizes than the nominal one work; no class token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.protocols import DataSpec
from vqcore_vit import trunk
from vqcore_vit.blocks import EPS
from vqcore_vit.convs import conv


class QueryEncoder(nn.Module):
    """Data of any size to `num_tokens` latents of width `dim`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(trunk.TransformerConfig):
        """Settings of `vit/query-encoder`."""

        num_tokens: int = 32
        """Latent tokens of a sample, whatever its size."""
        input_size_enc: int | tuple[int, ...] | None = None
        """Size of the data that positions are made for (default: the nominal one); any other is resized to."""

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_tokens(self.num_tokens)

    grid_convs: nn.ModuleList

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.dim, _, _ = cfg.shape
        self.channels = spec.channels
        self.patch = trunk.patch_of(cfg, spec.rank)
        self.proj = conv(spec.rank, spec.channels, self.dim, self.patch, stride=self.patch)
        trunk.add_blocks(self, cfg, trunk.grid_of(trunk.size_of(cfg.input_size_enc, spec), self.patch))
        self.queries = nn.Parameter(torch.randn(cfg.num_tokens, self.dim) * self.dim**-0.5)
        self.norm_out = nn.LayerNorm(self.dim, eps=EPS)

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """`(num_tokens,)`, whatever the size. Raises `ValueError` when that is no multiple of the patch."""
        trunk.grid_of(size, self.patch)
        return (len(self.queries),)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b n d"]:
        """Cut, embed, let the queries look."""
        trunk.check_channels(x, self.channels)
        self.grid(tuple(x.shape[2:]))
        x = self.proj(x.to(self.proj.weight.dtype))
        x = trunk.add_positions(self, rearrange(x, "b d ... -> b ... d"))
        for layer in self.grid_convs:
            x = layer(x)
        queries = repeat(self.queries, "n d -> b n d", b=len(x))
        tokens = torch.cat([queries, x.flatten(1, -2)], 1)
        z = trunk.run_blocks(self, tokens)[:, : len(self.queries)]
        return trunk.exact_post_mlp(self, self.norm_out(z))


class QueryDecoder(nn.Module):
    """`num_tokens` quantized latents of width `dim` to data of the size that is asked for."""

    @dataclass(frozen=True, kw_only=True)
    class Config(trunk.DecoderConfig):
        """Settings of `vit/query-decoder`."""

        num_tokens: int = 32
        """Latent tokens of a sample: the encoder's number."""
        grid_convs: int = 0
        """Convolutions over neighbouring patches, here after the blocks: before them all patches are alike."""

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_tokens(self.num_tokens)

    needs_size: Literal[True] = True
    grid_convs: nn.ModuleList

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        super().__init__()
        width, _, _ = cfg.shape
        self.size = spec.size
        self.patch = trunk.patch_of(cfg, spec.rank)
        self.in_proj = nn.Linear(dim, width)
        trunk.add_blocks(self, cfg, trunk.grid_of(trunk.size_of(cfg.input_size_dec, spec), self.patch))
        self.latent_pos = nn.Parameter(torch.randn(cfg.num_tokens, width) * width**-0.5)
        self.mask_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.norm_out = nn.LayerNorm(width, eps=EPS)
        trunk.add_output(self, cfg, spec)

    @property
    def last_layer(self) -> Tensor:
        """The last weight that the whole output passes through."""
        return trunk.last_layer(self)

    def forward(
        self, z_q: Float[Tensor, "b n d"], *, size: tuple[int, ...] | None = None
    ) -> Float[Tensor, "b c *size"]:
        """Fill mask tokens for `size` (default: the nominal one) from the latents, lay out their patches."""
        if z_q.shape[1] != len(self.latent_pos):
            raise ValueError(
                f"{z_q.shape[1]} latent tokens; this decoder was built for num_tokens={len(self.latent_pos)}"
            )
        grid = trunk.grid_of(tuple(size or self.size), self.patch)
        latents = self.in_proj(z_q.to(self.in_proj.weight.dtype)) + self.latent_pos
        masks = trunk.add_positions(self, self.mask_token.expand(1, *grid, -1))
        masks = masks.flatten(1, -2).expand(len(z_q), -1, -1)
        x = trunk.run_blocks(self, torch.cat([masks, latents], 1))[:, : masks.shape[1]]
        x = self.norm_out(x).unflatten(1, grid)
        for layer in self.grid_convs:
            x = layer(x)
        return trunk.write_output(self, x)


def _check_tokens(num_tokens: int) -> None:
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} is below 1")
