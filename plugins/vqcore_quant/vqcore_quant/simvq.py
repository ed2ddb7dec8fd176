"""SimVQ: the codebook is a frozen random matrix times one trained matrix, so every code moves at every step.

Paper: "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer", arXiv 2411.02038.
Differs from the paper: in nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.protocols import Quantized
from vqcore_quant.assignment import nearest
from vqcore_quant.codes import in_range
from vqcore_quant.gradients import straight_through
from vqcore_quant.ranges import check_ranges
from vqcore_quant.usage import distance, step_metrics, validity


class SimVQ(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) that searches by Euclidean distance.

    State: `codes` (frozen) and `map.weight` (trained). Losses: `simvq/commit`, `simvq/codebook`.
    """

    codes: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/simvq`."""

        codebook_size: int
        """Number of codes."""
        latent_dim: int = 32
        """Width of a latent and of a code."""
        commitment_weight: float = 0.25
        """Weight of `simvq/commit`, which pulls latents to their codes."""
        codebook_weight: float = 1.0
        """Weight of `simvq/codebook`, the same distance, which pulls the codes to the latents."""
        chunk_mib: float = 8.0
        """Extra memory for distances, in MiB. This value does not change any code."""

        training_only: ClassVar[tuple[str, ...]] = ("commitment_weight", "codebook_weight", "chunk_mib")

        def __post_init__(self) -> None:
            check_ranges(
                self,
                counts=("codebook_size", "latent_dim"),
                factors=("commitment_weight", "codebook_weight"),
                positive=("chunk_mib",),
            )

    num_codebooks: ClassVar[int] = 1
    without_decay: ClassVar[tuple[str, ...]] = ("map.weight",)

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.dim, self.codebook_size = cfg.latent_dim, cfg.codebook_size
        self.register_buffer("codes", torch.randn(cfg.codebook_size, cfg.latent_dim) * cfg.latent_dim**-0.5)
        self.map = nn.Linear(cfg.latent_dim, cfg.latent_dim, bias=False)

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Give every latent its nearest code. `mask` (True: valid) affects losses and metrics only."""
        cfg, valid = self.cfg, validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            latents = z.float()
            rows = rearrange(latents.detach(), "b ... d -> (b ...) d")
            found = nearest(rows, self.map(self.codes).detach(), cosine=False, chunk_mib=cfg.chunk_mib)
            codes = found.reshape(*z.shape[:-1], 1)
            z_q = self._look_up(codes)
            losses = {
                "simvq/commit": cfg.commitment_weight * distance(latents, z_q.detach(), valid),
                "simvq/codebook": cfg.codebook_weight * distance(latents.detach(), z_q, valid),
            }
            metrics = step_metrics(z, latents, z_q, codes, valid, self.codebook_size, training=self.training)
            if self.training:
                z_q = straight_through(latents, z_q)
        return Quantized(z_q.to(z.dtype), codes, losses, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Look up the codes. Raises ValueError for a code that is out of range."""
        codes = in_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            return self._look_up(codes)

    def _look_up(self, codes: Int[Tensor, "b *grid 1"]) -> Float[Tensor, "b *grid d"]:
        return self.map(F.embedding(rearrange(codes, "... 1 -> ..."), self.codes))
