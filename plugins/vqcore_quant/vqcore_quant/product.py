"""Product quantization: groups of channels, each quantized by itself; their codes stand side by side.

Paper: Jegou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search" (2011), section II.B.
Differs from the paper: any quantizer serves; the groups may share one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.config import slot
from vqcore.protocols import Quantized
from vqcore_quant.nested import average, broken, build_inner, each, token_states
from vqcore_quant.usage import latent_metrics, validity


class Product(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) of `groups` times the inner one's width.

    Its losses are the groups', averaged under their names.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/product`."""

        quantizer: vqcore.config.Config = slot("quantizer")
        """The quantizer of a group; its width is the group's."""
        groups: int
        """Number of groups."""
        shared: bool = False
        """One quantizer serves all groups."""

        def __post_init__(self) -> None:
            if self.groups < 1:
                raise ValueError(f"groups={self.groups} is below 1")

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.groups = build_inner(cfg.quantizer, 1 if cfg.shared else cfg.groups)
        first: Any = self.groups[0]
        self.dim: int = cfg.groups * first.dim
        self.codebook_size: int = first.codebook_size
        self.num_codebooks: int = cfg.groups * first.num_codebooks

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Quantize every group. `mask`: True is valid."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            # Added, not filled in, so that the gradient is not finite either.
            spoilt = z.float() + torch.where(broken(z, valid), torch.nan, 0.0).unsqueeze(-1)
            latents = rearrange(spoilt, "b ... (g d) -> g b ... d", g=self.cfg.groups)
            found, values, codes = (self._at_once if self.cfg.shared else self._in_turn)(latents, valid)
            parts = ((codes[g], latents[g] - values[g], valid) for g in range(self.cfg.groups))
            z_q = rearrange(values, "g b ... d -> b ... (g d)")
            metrics = average([out.metrics for out in found]) | latent_metrics(z, z.float(), z_q, valid)
            metrics |= each("group", parts, self.codebook_size, training=self.training)
        losses = average([out.losses for out in found])
        codes = rearrange(codes, "g b ... q -> b ... (g q)").contiguous()
        return Quantized(z_q.to(z.dtype), codes, losses, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Look every group's codes up. Raises ValueError for one out of range."""
        parts = codes.split(self.num_codebooks // self.cfg.groups, dim=-1)
        groups: list[Any] = [self.groups[0 if self.cfg.shared else g] for g in range(self.cfg.groups)]
        return torch.cat([group.decode(part) for group, part in zip(groups, parts, strict=True)], dim=-1)

    def token_state(self) -> dict[str, Tensor]:
        """What decides the groups' codes."""
        return token_states(self.groups, "groups")

    def _in_turn(
        self, latents: Float[Tensor, "g b *grid d"], valid: Bool[Tensor, "b *grid"]
    ) -> tuple[list[Quantized], Float[Tensor, "g b *grid d"], Int[Tensor, "g b *grid q"]]:
        found = [group(part, valid) for group, part in zip(self.groups, latents, strict=True)]
        return found, torch.stack([out.z_q for out in found]), torch.stack([out.codes for out in found])

    def _at_once(
        self, latents: Float[Tensor, "g b *grid d"], valid: Bool[Tensor, "b *grid"]
    ) -> tuple[list[Quantized], Float[Tensor, "g b *grid d"], Int[Tensor, "g b *grid q"]]:
        groups = len(latents)
        # Sample by sample, so that several processes' batches in a row are the rows of one process.
        rows, mask = rearrange(latents, "g b ... -> (b g) ..."), repeat(valid, "b ... -> (b g) ...", g=groups)
        out = self.groups[0](rows, mask)
        values, codes = (rearrange(x, "(b g) ... -> g b ...", g=groups) for x in (out.z_q, out.codes))
        return [out], values, codes
