"""Memcodes: one codebook per head, searched like in an attention layer.

The query is the latent. Keys and values are linear maps of the codes. The code whose key has the largest dot product
with the query is chosen, and the value of this code is the output.

Paper: "NWT: Towards natural audio-to-video generation with representation learning", arXiv 2106.04283.
In training a code is sampled by Gumbel-softmax (arXiv 1611.01144: hard, straight-through, temperature 1); in evaluation
the best code is chosen.
Differs from the paper: in nothing that decides a code. The names of tensors are the names in 4M's checkpoints.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.errors import SettingError
from vqcore.protocols import Quantized
from vqcore_quant.choice import gumbel_noise, hard_choice, in_chunks, soft_choice
from vqcore_quant.codes import in_range
from vqcore_quant.ranges import check_ranges
from vqcore_quant.usage import step_metrics, validity


class Memcodes(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) whose codes, keys and values are trained by gradient.

    Memcodes has no losses. Parameters: `codes` (h, k, d / h), `to_k.weight` and `to_v.weight` (h, d / h, d / h).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/memcodes`."""

        codebook_size: int
        """Number of codes per head."""
        latent_dim: int = 32
        """Width of a latent."""
        num_codebooks: int = 1
        """Number of heads, and of codes per position. Each head gets its own part of the latent's channels."""
        chunk_mib: float = 8.0
        """Extra memory for each of a few latents x codes matrices, in MiB. This value does not change any code."""

        training_only: ClassVar[tuple[str, ...]] = ("chunk_mib",)

        def __post_init__(self) -> None:
            check_ranges(
                self, counts=("codebook_size", "latent_dim", "num_codebooks"), positive=("chunk_mib",)
            )
            if self.latent_dim % self.num_codebooks:
                raise SettingError(
                    "latent_dim", f"{self.latent_dim} is not divisible by num_codebooks={self.num_codebooks}"
                )

    without_decay: ClassVar[tuple[str, ...]] = ("codes", "to_k.weight", "to_v.weight")

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.dim, self.codebook_size, self.num_codebooks = (
            cfg.latent_dim,
            cfg.codebook_size,
            cfg.num_codebooks,
        )
        width = cfg.latent_dim // cfg.num_codebooks
        self.codes = nn.Parameter(torch.randn(cfg.num_codebooks, cfg.codebook_size, width))
        self.to_k = _HeadLinear(cfg.num_codebooks, width)
        self.to_v = _HeadLinear(cfg.num_codebooks, width)

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Choose a code in every head. `mask` (True: valid) affects the metrics only."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            queries = rearrange(z.float(), "b ... (h e) -> h (b ...) e", h=self.num_codebooks)
            keys, values = self.to_k(self.codes), self.to_v(self.codes)
            heads = [self._ask(*one) for one in zip(queries, keys, values, strict=True)]
            z_q = torch.cat([value for value, _ in heads], dim=-1).reshape(z.shape)
            codes = torch.stack([code for _, code in heads], dim=-1).reshape(
                *z.shape[:-1], self.num_codebooks
            )
            metrics = step_metrics(
                z, z.float(), z_q, codes, valid, self.codebook_size, training=self.training
            )
        return Quantized(z_q.to(z.dtype), codes, {}, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Look up the values. Raises ValueError for a code that is out of range."""
        codes = in_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            values = self.to_v(self.codes)
        return torch.cat([values[head][codes[..., head]] for head in range(self.num_codebooks)], dim=-1)

    def _ask(
        self, queries: Float[Tensor, "n e"], keys: Float[Tensor, "k e"], values: Float[Tensor, "k e"]
    ) -> tuple[Float[Tensor, "n e"], Int[Tensor, " n"]]:
        def choose(part: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            logits = part * part.shape[-1] ** -0.5 @ keys.T
            if self.training:
                return soft_choice(logits + gumbel_noise(logits), values)
            return hard_choice(logits, values)

        return in_chunks(
            choose, queries, keys, values, width=self.codebook_size, chunk_mib=self.cfg.chunk_mib
        )


class _HeadLinear(nn.Module):
    """One matrix per head, applied to the codes of this head."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        bound = (3 / width) ** 0.5
        self.weight = nn.Parameter(torch.empty(heads, width, width).uniform_(-bound, bound))

    def forward(self, codes: Float[Tensor, "h k e"]) -> Float[Tensor, "h k e"]:
        return einsum(codes, self.weight, "h k e, h e f -> h k f")
