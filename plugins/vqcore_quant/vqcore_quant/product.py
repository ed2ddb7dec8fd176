"""Product quantization: the channels are split into groups; each group is quantized separately and has its own codes.

Paper: Jegou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search" (2011), section II.B.
Differs from the paper: a group may use any quantizer; all groups may share one quantizer.
"""

from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.config import at_least, refuse_idle, slot
from vqcore.protocols import Quantized, Quantizer
from vqcore_quant.nested import average, broken, build_inner, each, token_states
from vqcore_quant.usage import latent_metrics, validity


class Product(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`); its width is `groups` times the width of the inner quantizer.

    Losses: the losses of the inner quantizers under the same names, averaged over groups.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/product`."""

        quantizer: vqcore.config.Config = slot("quantizer")
        """The quantizer of one group. Its width is the number of channels of a group."""
        groups: int
        """Number of groups."""
        shared: bool = False
        """True: all groups share one quantizer. False: each group has its own quantizer."""

        def __post_init__(self) -> None:
            at_least(self, groups=1)
            if self.groups == 1:
                refuse_idle(self, "groups=1", "shared")

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.groups = build_inner(cfg.quantizer, 1 if cfg.shared else cfg.groups)
        first = cast(Quantizer, self.groups[0])
        self.dim = cfg.groups * first.dim
        self.codebook_size = first.codebook_size
        self.num_codebooks = cfg.groups * first.num_codebooks

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Quantize every group. `mask` is True at valid positions."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            # NaN is added and not filled in, so that the gradient is not finite either.
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
        """Look up the codes of every group. Raises ValueError for a code that is out of range."""
        parts = codes.split(self.num_codebooks // self.cfg.groups, dim=-1)
        groups = [cast(Quantizer, self.groups[0 if self.cfg.shared else g]) for g in range(self.cfg.groups)]
        return torch.cat([group.decode(part) for group, part in zip(groups, parts, strict=True)], dim=-1)

    def token_state(self) -> dict[str, Tensor]:
        """The tensors that decide the codes of all groups."""
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
        # The sample is the outer axis, so that concatenated batches of several processes are the batch of one process.
        rows, mask = rearrange(latents, "g b ... -> (b g) ..."), repeat(valid, "b ... -> (b g) ...", g=groups)
        out = self.groups[0](rows, mask)
        values, codes = (rearrange(x, "(b g) ... -> g b ...", g=groups) for x in (out.z_q, out.codes))
        return [out], values, codes
