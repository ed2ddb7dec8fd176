"""Finite scalar quantization: channels are bounded and rounded to a few levels; their grid is the codebook.

Paper: "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv 2309.15505, section 3.1 and appendix A.1.
Codes count in mixed radix, the first channel fastest, as there.
Differs from the paper: the margin that keeps rounding inside the range is smaller than 1e-3 for channels of
more than 501 levels, where 1e-3 would cut the outermost levels off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.protocols import Quantized
from vqcore_quant.codes import check_range
from vqcore_quant.gradients import straight_through
from vqcore_quant.usage import step_metrics, validity


class FSQ(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) without parameters, losses or state; it cannot collapse.

    A channel of L levels takes the values i / (L // 2) for L integers i from -(L // 2) on: -1 to 1 if L is
    odd, -1 to just below 1 if L is even, as in the paper. Not idempotent: `z_q` fed in is bounded again.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/fsq`."""

        levels: tuple[int, ...] | str
        """Levels of each latent channel: [8, 8, 8, 5, 5] or 8-8-8-5-5. Their product is the codebook size."""

        def __post_init__(self) -> None:
            levels = parse_levels(self.levels)
            for count in levels:
                if not 2 <= count <= 2**16:
                    raise ValueError(f"levels={self.levels}: {count} is not in [2, {2**16}]")
            if math.prod(levels) > 2**31:
                raise ValueError(f"levels={self.levels} make {math.prod(levels)} codes, more than {2**31}")

    num_codebooks: ClassVar[int] = 1
    _levels: Tensor
    _basis: Tensor

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        levels = parse_levels(cfg.levels)
        self.dim = len(levels)
        self.codebook_size = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Round the latents. `mask` (True: valid) matters to the metrics alone; NaN counts as 0."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bound(z.float())
            digits = bounded.detach().nan_to_num().round().long() + self._levels // 2
            codes = rearrange((digits * self._basis).sum(-1), "... -> ... 1")
            z_q, scaled = self._values(digits), bounded / (self._levels // 2)
            metrics = step_metrics(z, scaled, z_q, codes, valid, self.codebook_size, training=self.training)
            if self.training:
                z_q = straight_through(scaled, z_q)
        return Quantized(z_q.to(z.dtype), codes, {}, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Look the codes up. Raises ValueError for one out of range."""
        check_range(codes, self.codebook_size)
        return self._values(rearrange(codes, "... 1 -> ... 1") // self._basis % self._levels)

    def token_state(self) -> dict[str, Tensor]:
        """Nothing: the settings say it all."""
        return {}

    def _bound(self, z: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
        margin = torch.clamp(0.5 / (self._levels - 1), max=1e-3)
        half = (self._levels - 1) * (1 - margin) / 2
        offset = (1 - self._levels % 2) / 2
        return torch.tanh(z + torch.tan(offset / half)) * half - offset

    def _values(self, digits: Int[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
        half = self._levels // 2
        return (digits - half) / half


def parse_levels(levels: Sequence[int] | str) -> tuple[int, ...]:
    """Read `8-8-8-5-5` or a sequence of integers. Raises ValueError for other text and for no levels."""
    try:
        parsed = tuple(int(n) for n in (levels.split("-") if isinstance(levels, str) else levels))
    except ValueError as error:
        raise ValueError(f"levels={levels!r} is not like 8-8-8-5-5") from error
    if not parsed:
        raise ValueError("levels=[] is empty: it wants one number per channel")
    return parsed
