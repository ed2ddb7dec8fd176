"""Lookup-free quantization: each channel becomes its sign, `bits` channels form a code (arXiv 2310.05737, section 3.1).

Differs from the paper: no entropy term.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.errors import SettingError
from vqcore.protocols import Quantized


class Signs(nn.Module):
    """`groups` codes at every position, each of `bits` bits. No parameters."""

    powers: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `pose/signs`."""

        bits: int = 6
        """Bits of one code."""
        groups: int = 2
        """Codes per position."""

        def __post_init__(self) -> None:
            if not 1 <= self.bits <= 31 or self.groups < 1:
                text = f"bits={self.bits} must be 1 to 31 and groups={self.groups} at least 1"
                raise SettingError(("bits", "groups"), text)

    def __init__(self, cfg: Config):
        super().__init__()
        self.dim, self.codebook_size, self.num_codebooks = cfg.bits * cfg.groups, 2**cfg.bits, cfg.groups
        self.register_buffer("powers", 2 ** torch.arange(cfg.bits), persistent=False)

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Signs with a straight-through gradient; the commitment loss keeps latents near +1 and -1."""
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        bits = rearrange(signs > 0, "b ... (q k) -> b ... q k", q=self.num_codebooks)
        commit = (z - signs).float().square() if mask is None else (z - signs)[mask].float().square()
        z_q = signs + (z - z.detach()) if self.training else signs
        return Quantized(z_q, (bits * self.powers).sum(-1), {"signs/commit": 0.25 * commit.mean()})

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """The signs that the codes stand for. Raises `ValueError` for a code out of range."""
        if bool((codes >= self.codebook_size).any()) or bool((codes < 0).any()):
            raise ValueError(
                f"code {int(codes.max())} is out of range: codes lie in [0, {self.codebook_size})"
            )
        bits = (codes.unsqueeze(-1) // self.powers) % 2
        return rearrange(bits * 2.0 - 1.0, "b ... q k -> b ... (q k)")
