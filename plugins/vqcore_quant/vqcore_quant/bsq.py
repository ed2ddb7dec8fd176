"""Binary spherical quantization: the normalized latent is rounded to a corner of the cube inside the unit sphere.

Paper: "Image and Video Tokenization with Binary Spherical Quantization", arXiv 2406.07548, section 4.
The paper's soft assignment exp(t c.u) is exp(-|u - c|^2 / T) with T = 2 / t.
Differs from the paper: the entropy of the codebook is computed over groups of bits. The paper's approximation uses each
bit alone (`group_bits: 1`). The approximation also reaches its optimum when all bits are always equal, that is when
only two codes are used.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqcore.protocols import Quantized
from vqcore_quant.bits import bits_of, pack, signs
from vqcore_quant.codes import in_range
from vqcore_quant.gradients import straight_through
from vqcore_quant.penalty import BinaryConfig, entropy_penalty
from vqcore_quant.usage import distance, only, step_metrics, validity


class BSQ(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) without parameters and without state.

    `z_q` has length 1: each of its d channels is -1 / sqrt(d) or 1 / sqrt(d). Losses: `bsq/entropy` (may be
    negative) and `bsq/commit`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BinaryConfig):
        """Settings of `quant/bsq`."""

        entropy_weight: float = 0.02
        """Weight of the entropy loss (certain choice, even use of codes); the default is for use with an MSE loss."""
        entropy_temperature: float = 0.3
        """T of the soft assignment exp(-|u - c|^2 / T) in the entropy loss; for small T the gradient vanishes."""
        commitment_weight: float = 0.02
        """Weight of the squared distance of the normalized latent to its code, which is at most 2."""

    num_codebooks: ClassVar[int] = 1

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.codebook_size = cfg.codebook_size
        self.dim = bits_of(cfg.codebook_size)
        self.radius = 1 / math.sqrt(self.dim)

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Normalize, then take the signs (0, NaN: negative). `mask` (True: valid) affects losses and metrics only."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            latents = F.normalize(z.float(), dim=-1)
            near = F.normalize(only(z.float(), valid), dim=-1)
            codes = pack(z.detach() > 0)
            z_q = signs(codes, self.dim) * self.radius
            logits = 4 * self.radius / self.cfg.entropy_temperature * near
            entropy, entropies = entropy_penalty(self.cfg, logits, valid, training=self.training)
            commit = self.cfg.commitment_weight * self.dim * distance(near, z_q, valid)
            metrics = step_metrics(z, latents, z_q, codes, valid, self.codebook_size, training=self.training)
            metrics |= entropies
            if self.training:
                z_q = straight_through(latents, z_q)
        return Quantized(z_q.to(z.dtype), codes, {"bsq/entropy": entropy, "bsq/commit": commit}, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Turn codes into signs. Raises ValueError for a code that is out of range."""
        codes = in_range(codes, self.codebook_size)
        return signs(codes, self.dim) * self.radius

    def token_state(self) -> dict[str, Tensor]:
        """Empty: the settings alone decide the codes."""
        return {}
