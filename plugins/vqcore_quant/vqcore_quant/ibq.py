"""Index backpropagation quantization: a hard choice by dot product, with the softmax's gradient to every code.

Paper: "Scalable Image Tokenization with Index Backpropagation Quantization", arXiv 2412.02692, section 3 (the
choice of codes, double quantization loss, entropy penalty).
Differs from the paper: the softmax over the whole codebook is computed for a few latents at a time, in the forward and
in the backward pass.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.config import refuse_idle
from vqcore.protocols import Quantized
from vqcore_quant.choice import hard_choice, in_chunks, soft_choice
from vqcore_quant.codes import in_range
from vqcore_quant.entropy import entropies
from vqcore_quant.ranges import check_ranges
from vqcore_quant.usage import distance, entropies_in_bits, only, step_metrics, validity


class IBQ(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) whose codebook `embed` is trained by gradient.

    Losses: `ibq/quant`, the sum of the paper's three distances between latents and codes, and `ibq/entropy` (may be
    negative).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/ibq`."""

        codebook_size: int
        """Number of codes."""
        latent_dim: int = 32
        """Width of a latent and of a code (256 in the paper)."""
        quant_weight: float = 0.1
        """Weight of `ibq/quant`; the default is for use with an MSE loss (1 in the paper)."""
        beta: float = 0.25
        """Weight, inside `ibq/quant`, of the term that pulls codes to latents."""
        entropy_weight: float = 0.005
        """Weight of `ibq/entropy` (certain choice, even use of codes); the default is for use with an MSE loss."""
        entropy_temperature: float = 0.01
        """Softmax temperature in `ibq/entropy`. The choice of codes does not use this temperature."""
        chunk_mib: float = 8.0
        """Extra memory for each of a few latents x codes matrices, in MiB. This value does not change any code."""

        training_only: ClassVar[tuple[str, ...]] = (
            "quant_weight",
            "beta",
            "entropy_weight",
            "entropy_temperature",
            "chunk_mib",
        )

        def __post_init__(self) -> None:
            check_ranges(
                self,
                counts=("codebook_size", "latent_dim"),
                factors=("quant_weight", "beta", "entropy_weight"),
                positive=("entropy_temperature", "chunk_mib"),
            )
            if not self.entropy_weight:
                refuse_idle(self, "entropy_weight=0", "entropy_temperature")
            if not self.quant_weight:
                refuse_idle(self, "quant_weight=0", "beta")

    num_codebooks: ClassVar[int] = 1
    without_decay: ClassVar[tuple[str, ...]] = ("embed",)

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.dim, self.codebook_size = cfg.latent_dim, cfg.codebook_size
        self.embed = nn.Parameter(torch.randn(cfg.codebook_size, cfg.latent_dim))

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Give every latent the code with the largest dot product. `mask` (True: valid) affects losses and metrics."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            # NaN or infinity at invalid positions would reach the gradient of the codebook through the softmax.
            latents = torch.where(z.float().isfinite() | valid.unsqueeze(-1), z.float(), 0.0)
            z_q, codes = self._choose(latents)
            hard = F.embedding(rearrange(codes, "... 1 -> ..."), self.embed)
            quant = (
                distance(z_q, latents, valid)
                + distance(hard.detach(), latents, valid)
                + self.cfg.beta * distance(hard, latents.detach(), valid)
            )
            token, codebook = self._entropies(latents, valid)
            metrics = step_metrics(z, latents, hard, codes, valid, self.codebook_size, training=self.training)
            metrics |= entropies_in_bits(token, codebook)
        losses = {
            "ibq/quant": self.cfg.quant_weight * quant,
            "ibq/entropy": self.cfg.entropy_weight * (token - codebook),
        }
        return Quantized(z_q.to(z.dtype), codes, losses, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Look up the codes. Raises ValueError for a code that is out of range."""
        codes = in_range(codes, self.codebook_size)
        return F.embedding(rearrange(codes, "... 1 -> ..."), self.embed)

    def _choose(
        self, latents: Float[Tensor, "b *grid d"]
    ) -> tuple[Float[Tensor, "b *grid d"], Int[Tensor, "b *grid 1"]]:
        choose = soft_choice if self.training else hard_choice

        def ask(part: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
            return choose(part @ embed.T, embed)

        rows = rearrange(latents, "b ... d -> (b ...) d")
        values, codes = in_chunks(
            ask, rows, self.embed, width=self.codebook_size, chunk_mib=self.cfg.chunk_mib
        )
        return values.reshape(latents.shape), codes.reshape(*latents.shape[:-1], 1)

    def _entropies(
        self, latents: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean entropy of a token's assignment, and entropy of the mean assignment, in nats."""
        return entropies(
            rearrange(only(latents, valid), "b ... d -> (b ...) d") / self.cfg.entropy_temperature,
            self.embed,
            torch.zeros_like(self.embed[:, 0]),
            valid.flatten(),
            chunk_mib=self.cfg.chunk_mib,
            everywhere=self.training,
        )
