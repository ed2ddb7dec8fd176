"""Metrics of what is no picture: poses and sounds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from vqcore.config import Config as BaseConfig
from vqcore.protocols import DataSpec

_FLOOR = 1e-10
"""Power ratios are kept within 1e-10 and 1e10, 100 dB either way."""


class JointError:
    """Mean per-joint position error (MPJPE): the distance of a joint from where it should be, in units of the files."""

    in_units = True
    better = "lower"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        pass

    def measure(
        self, x_hat: Float[Tensor, "b w j"], x: Float[Tensor, "b w j"], mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Sum of the samples' errors, and their number; coordinates are channels, joints the axis."""
        return _summed(reduce((x_hat.double() - x.double()).norm(dim=1), "b j -> b", "mean"))

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return _mean(sums)


class RotationError:
    """Angle of the turn that leads from one rotation to the other, in degrees, mean over joints and samples.

    Takes matrices (9 numbers a joint; the nearest rotations to them are compared), axis-angle vectors (3) or
    angles (1), all in radians.
    """

    in_units = True
    better = "lower"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        pass

    def measure(
        self, x_hat: Float[Tensor, "b w j"], x: Float[Tensor, "b w j"], mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Sum of the samples' errors, and their number; a joint's numbers are channels, joints the axis."""
        if x.shape[1] == 1:
            turn = x_hat.double() - x.double()
            angle = torch.atan2(turn.sin(), turn.cos()).abs().squeeze(1)
        else:
            between = rotation_matrices(x_hat).mT @ rotation_matrices(x)
            # |R - 1| = 2 sqrt(2) sin(angle / 2): exact for small angles, where the trace is not.
            chord = (
                (between - torch.eye(3, dtype=between.dtype, device=between.device)).flatten(-2).norm(dim=-1)
            )
            angle = 2 * torch.asin((chord / math.sqrt(8)).clamp(max=1))
        return _summed(reduce(torch.rad2deg(angle), "b j -> b", "mean"))

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples, in degrees."""
        return _mean(sums)


def rotation_matrices(values: Float[Tensor, "b w j"]) -> Float[Tensor, "b j 3 3"]:
    """Rotations from nine numbers a joint (the nearest rotation, by SVD) or three (axis times angle, in radians)."""
    if values.shape[1] == 3:
        x, y, z = rearrange(values.double(), "b w j -> w b j")
        skew = torch.stack(
            [torch.zeros_like(x), -z, y, z, torch.zeros_like(x), -x, -y, x, torch.zeros_like(x)], -1
        )
        return torch.linalg.matrix_exp(rearrange(skew, "b j (row col) -> b j row col", row=3))
    u, _, vh = torch.linalg.svd(rearrange(values.double(), "b (row col) j -> b j row col", row=3))
    handed = torch.linalg.det(u @ vh)
    return (
        u @ torch.diag_embed(torch.stack([torch.ones_like(handed), torch.ones_like(handed), handed], -1)) @ vh
    )


class SISNR:
    """Scale-invariant signal-to-noise ratio of waveforms in dB (arXiv 1809.07454, eqs. 13 to 15); mean over channels.

    Means are removed first. Kept within -100 and 100 dB; a constant estimate has -100. Silent samples are left out.
    """

    better = "higher"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        if spec.rank != 1:
            raise ValueError(f"si-snr is for waveforms (one axis), not for data of {spec.rank} axes")

    def measure(
        self,
        x_hat: Float[Tensor, "b c n"],
        x: Float[Tensor, "b c n"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> dict[str, Tensor]:
        """Sum of the ratios of all channels that are not silent, and their number."""
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
        """The mean over channels and samples, in dB; nan when all were silent."""
        return _mean(sums)


def _centred(x: Tensor, valid: Tensor) -> Tensor:
    mean = (x * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return (x - mean) * valid


def _summed(each: Float[Tensor, " b"]) -> dict[str, Tensor]:
    return {
        "sum": each.sum(),
        "count": torch.tensor(float(len(each)), dtype=torch.double, device=each.device),
    }


def _mean(sums: Mapping[str, Any]) -> dict[str, float]:
    return {"": float(sums["sum"] / sums["count"])}
