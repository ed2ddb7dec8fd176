"""The metric of waveforms: scale-invariant signal-to-noise ratio."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vqcore.config import NoSettings
from vqcore.metrics.sums import mean, refuse_weight
from vqcore.protocols import DataSpec

_FLOOR = 1e-10
"""Power ratios are clamped to 1e-10 and 1e10, which is -100 and 100 dB."""


class SISNR:
    """Scale-invariant signal-to-noise ratio of waveforms in dB (arXiv 1809.07454, eqs. 13 to 15); mean over channels.

    The means of both signals are removed first. Ratios are clamped to -100 and 100 dB, and a constant reconstruction
    has -100 dB. Silent channels are left out.
    """

    better = "higher"
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        if spec.rank != 1:
            raise ValueError(f"si-snr is for waveforms (one axis), not for data of {spec.rank} axes")

    def measure(
        self,
        x_hat: Float[Tensor, "b c n"],
        x: Float[Tensor, "b c n"],
        mask: Bool[Tensor, "b n"] | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Float[Tensor, "b n"] | None = None,
    ) -> dict[str, Tensor]:
        """Sum of the ratios of all channels that are not silent, and the number of these channels."""
        refuse_weight("si-snr", weight)
        valid = (
            torch.ones_like(x, dtype=torch.double)
            if mask is None
            else mask.unsqueeze(1).expand_as(x).double()
        )
        estimate, signal = _centred(x_hat.double(), valid), _centred(x.double(), valid)
        energy = signal.square().sum(-1)
        heard = energy > 0
        share = (estimate * signal).sum(-1, keepdim=True) / energy.clamp(min=1e-300).unsqueeze(-1)
        kept = (share * signal).square().sum(-1)
        noise = (estimate - share * signal).square().sum(-1)
        ratio = torch.where(kept > 0, kept / noise.clamp(min=1e-300), 0.0).clamp(_FLOOR, 1 / _FLOOR)
        return {"sum": (10 * ratio.log10() * heard).sum(), "count": heard.double().sum()}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over channels and samples in dB; NaN when all channels were silent."""
        return mean(sums)


def _centred(x: Tensor, valid: Tensor) -> Tensor:
    middle = (x * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return (x - middle) * valid
