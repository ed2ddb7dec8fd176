"""Lookup-free quantization: a code is the signs of the latent's channels, one bit per channel. No codebook is stored.

Paper: "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (MAGVIT-v2), arXiv 2310.05737,
section 3.1.
Differs from the paper:
* The temperature of the soft assignment is a setting. The paper does not state it; other implementations use 0.01.
* The default weights of the losses are smaller: they are for use with a mean squared error as the only other loss.
* Codes of more than `group_bits` bits: see `vqcore_quant.penalty`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqcore.protocols import Quantized
from vqcore_quant.bits import bits_of, pack, signs
from vqcore_quant.codes import in_range
from vqcore_quant.gradients import straight_through
from vqcore_quant.penalty import BinaryConfig, entropy_penalty
from vqcore_quant.usage import distance, step_metrics, validity


class LFQ(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) without parameters and without state.

    `z_q` is -1 or 1 in every channel. Losses: `lfq/entropy` (may be negative) and `lfq/commit`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BinaryConfig):
        """Settings of `quant/lfq`."""

    num_codebooks: ClassVar[int] = 1

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.codebook_size = cfg.codebook_size
        self.dim = bits_of(cfg.codebook_size)

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Take the signs (0 and NaN are negative). `mask` (True: valid) affects losses and metrics only."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            latents = z.float()
            codes = pack(latents.detach() > 0)
            z_q = signs(codes, self.dim)
            logits = 4 / self.cfg.entropy_temperature * latents
            entropy, entropies = entropy_penalty(self.cfg, logits, valid, training=self.training)
            commit = self.cfg.commitment_weight * distance(latents, z_q, valid)
            metrics = step_metrics(z, latents, z_q, codes, valid, self.codebook_size, training=self.training)
            metrics |= entropies
            if self.training:
                z_q = straight_through(latents, z_q)
        return Quantized(z_q.to(z.dtype), codes, {"lfq/entropy": entropy, "lfq/commit": commit}, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Turn codes into signs. Raises ValueError for a code that is out of range."""
        codes = in_range(codes, self.codebook_size)
        return signs(codes, self.dim)

    def token_state(self) -> dict[str, Tensor]:
        """Empty: the settings alone decide the codes."""
        return {}
