"""A fixed number of latent tokens for inputs of any size: learned queries in the encoder, mask tokens in the decoder.

Paper: TiTok (arXiv 2406.07550), section 3.2. The encoder processes patches together with learned query tokens, and only
the query tokens reach the quantizer. The decoder processes the quantized tokens together with one mask token per patch.
The grid has one axis.
Differs from the paper: the model is trained directly on the data, and not first on the codes of another tokenizer;
patches have sines and cosines as position embeddings, so that sizes other than the nominal size work; there is no class
token.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.protocols import DataSpec
from vqcore_vit import trunk
from vqcore_vit.blocks import EPS
from vqcore_vit.convs import conv


class QueryEncoder(nn.Module):
    """Encode data of any size into `num_tokens` latents of width `dim`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(trunk.TransformerConfig):
        """Settings of `vit/query-encoder`."""

        # The positions are a tensor of the encoder, so the fingerprint has their grid.
        training_only: ClassVar[tuple[str, ...]] = (*trunk.TransformerConfig.training_only, "input_size_enc")

        num_tokens: int = 32
        """Number of latent tokens of a sample, for every size."""
        input_size_enc: int | tuple[int, ...] | None = None
        """Data size for which position embeddings are built (default: nominal size); interpolated to other sizes."""

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
        """`(num_tokens,)` for every size. Raises `ValueError` if `size` is not a multiple of the patch."""
        trunk.grid_of(size, self.patch)
        return (len(self.queries),)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b n d"]:
        """Embed the patches, add the queries, apply the blocks, and return the tokens of the queries."""
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
    """Decode `num_tokens` quantized latents of width `dim` into data of the given size."""

    @dataclass(frozen=True, kw_only=True)
    class Config(trunk.DecoderConfig):
        """Settings of `vit/query-decoder`."""

        num_tokens: int = 32
        """Number of latent tokens of a sample; must equal the encoder's."""
        grid_convs: int = 0
        """Number of convolutions over neighbouring patches, here after the blocks (all mask tokens start equal)."""

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
        """The last weight that affects every value of the output."""
        return trunk.last_layer(self)

    def forward(
        self, z_q: Float[Tensor, "b n d"], *, size: tuple[int, ...] | None = None
    ) -> Float[Tensor, "b c *size"]:
        """Decode latents into data of `size` (default: nominal size): fill the mask tokens, turn them into patches."""
        if z_q.shape[1] != len(self.latent_pos):
            raise ValueError(
                f"the input has {z_q.shape[1]} latent tokens, but this decoder has num_tokens={len(self.latent_pos)}"
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
