"""Finite scalar quantization: each channel is bounded and rounded to a few levels.

Paper: "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv 2309.15505, section 3.1 and appendix A.1.
The codebook is the grid of all combinations of levels. As in the paper, a code is a number in mixed radix whose first
digit, the first channel, changes fastest.
Differs from the paper: the margin that keeps rounded values inside the range is smaller than 1e-3 for channels with
more than 501 levels, because there a margin of 1e-3 would make the outermost levels unreachable.

`form: sigmoid01` is the FSQ of TerraMind (arXiv 2504.11171): a sigmoid in place of the tanh, levels from 0 to 1, no
margin and no offset, so the outermost levels catch half as much of the sigmoid as the others. Its codes count alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.errors import SettingError
from vqcore.protocols import Quantized
from vqcore_quant.codes import in_range
from vqcore_quant.gradients import straight_through
from vqcore_quant.usage import step_metrics, validity


class FSQ(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) without parameters, losses and state; it cannot collapse.

    A channel with L levels takes the values i / (L // 2) for the L integers i from -(L // 2) on: from -1 to 1 if L is
    odd, from -1 to just below 1 if L is even, as in the paper. With `form: sigmoid01` the values are i / (L - 1), from
    0 to 1. FSQ is not idempotent: if `z_q` is quantized again, the bound is applied to `z_q` a second time.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/fsq`."""

        levels: tuple[int, ...] | str
        """Number of levels of each latent channel: [8, 8, 8, 5, 5] or 8-8-8-5-5. The product is the codebook size."""
        form: Literal["tanh", "sigmoid01"] = "tanh"
        """How a channel is bounded. tanh: as in the paper. sigmoid01: as in TerraMind, by a sigmoid, with values from 0
        to 1; a loaded tokenizer then encodes in fp32 in every precision, as the published codes were computed."""

        def __post_init__(self) -> None:
            levels = parse_levels(self.levels)
            for count in levels:
                if not 2 <= count <= 2**16:
                    raise SettingError("levels", f"{self.levels}: {count} is not in [2, {2**16}]")
            if math.prod(levels) > 2**31:
                raise SettingError(
                    "levels", f"{self.levels} gives {math.prod(levels)} codes, more than {2**31}"
                )

    num_codebooks: ClassVar[int] = 1
    codes_in_fp32: bool
    _levels: Tensor
    _basis: Tensor
    _zero: Tensor
    _unit: Tensor

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        levels = parse_levels(cfg.levels)
        self.dim = len(levels)
        self.codebook_size = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        middle = torch.tensor(levels) // 2
        above_zero = self.codes_in_fp32 = cfg.form == "sigmoid01"
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)
        self.register_buffer("_zero", torch.zeros_like(middle) if above_zero else middle, persistent=False)
        self.register_buffer("_unit", torch.tensor(levels) - 1 if above_zero else middle, persistent=False)

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Bound and round the latents; NaN gets the value 0. `mask` (True: valid) affects the metrics only."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bound(z.float())
            digits = bounded.detach().nan_to_num().round().long() + self._zero
            codes = rearrange((digits * self._basis).sum(-1), "... -> ... 1")
            z_q, scaled = self._values(digits), bounded / self._unit
            metrics = step_metrics(z, scaled, z_q, codes, valid, self.codebook_size, training=self.training)
            if self.training:
                z_q = straight_through(scaled, z_q)
        return Quantized(z_q.to(z.dtype), codes, {}, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Turn codes into values. Raises ValueError for a code that is out of range."""
        codes = in_range(codes, self.codebook_size)
        return self._values(rearrange(codes, "... 1 -> ... 1") // self._basis % self._levels)

    def token_state(self) -> dict[str, Tensor]:
        """Empty: the settings alone decide the codes."""
        return {}

    def _bound(self, z: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
        """The latents in units of levels, not yet rounded; the digit `_zero` lies at 0."""
        if self.cfg.form == "sigmoid01":
            return torch.sigmoid(z) * self._unit
        margin = torch.clamp(0.5 / (self._levels - 1), max=1e-3)
        half = (self._levels - 1) * (1 - margin) / 2
        offset = (1 - self._levels % 2) / 2
        return torch.tanh(z + torch.tan(offset / half)) * half - offset

    def _values(self, digits: Int[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
        return (digits - self._zero) / self._unit


def parse_levels(levels: Sequence[int] | str) -> tuple[int, ...]:
    """Parse `8-8-8-5-5` or a sequence of integers. Raises ValueError for other text and for an empty sequence."""
    try:
        parsed = tuple(int(n) for n in (levels.split("-") if isinstance(levels, str) else levels))
    except ValueError as error:
        raise ValueError(f"levels={levels!r} cannot be read; write it like 8-8-8-5-5") from error
    if not parsed:
        raise ValueError("levels=[] is empty; give one number for each channel")
    return parsed
