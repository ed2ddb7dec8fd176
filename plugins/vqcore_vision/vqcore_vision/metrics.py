"""Metrics of depths, joints and rotations, in the units of the files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from vqcore.config import Config as BaseConfig
from vqcore.metrics.sums import mean, ratio, summed, valid_positions
from vqcore.protocols import DataSpec


class AbsRel:
    """Mean over positions of |rebuilt - true| / true, and the root mean square error; positive quantities in units.

    Positions whose true value is 0 or less do not count; a rebuilt value that is no number counts as 0.
    """

    in_units = True
    better = "lower"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        _check_quantity("abs-rel", spec)

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Sums of relative and of squared errors, and the number of positions."""
        y, x = _positive_pairs(x_hat, x, mask)
        return {
            "relative": ((y - x).abs() / x).sum(),
            "squared": (y - x).square().sum(),
            "count": torch.tensor(float(len(x)), dtype=torch.float64, device=x.device),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean relative error, and `rmse` in units."""
        return {
            "": ratio(sums["relative"], sums["count"]),
            "rmse": math.sqrt(ratio(sums["squared"], sums["count"])),
        }


class Delta:
    """Shares of positions where rebuilt / true, or its inverse, is below 1.25, 1.25 squared and 1.25 cubed."""

    in_units = True
    better = "higher"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        _check_quantity("delta", spec)

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Numbers of positions below each limit, and of all whose true value is above 0."""
        y, x = _positive_pairs(x_hat, x, mask)
        ratio = torch.maximum(y / x, x / y.clamp(min=1e-30))
        below = torch.stack([(ratio < 1.25**k).double().sum() for k in (1, 2, 3)])
        return {
            "below": below,
            "count": torch.tensor(float(len(x)), dtype=torch.float64, device=x.device),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The share below 1.25; `2` and `3`: below its square and its cube."""
        first, second, third = (ratio(n, sums["count"]) for n in sums["below"])
        return {"": first, "2": second, "3": third}


def _check_quantity(name: str, spec: DataSpec) -> None:
    if spec.kind != "continuous":
        raise ValueError(f"{name} is for measured quantities, not for {spec.kind} data")


def _positive_pairs(
    x_hat: Tensor, x: Tensor, mask: Tensor | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Rebuilt and true values, in double precision, where the true ones are above 0."""
    valid = valid_positions(mask, x) & x.isfinite() & (x > 0)
    return x_hat[valid].double().nan_to_num(0.0).clamp(min=0), x[valid].double()


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
        return summed(reduce((x_hat.double() - x.double()).norm(dim=1), "b j -> b", "mean"))

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return mean(sums)


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
        return summed(reduce(torch.rad2deg(angle), "b j -> b", "mean"))

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples, in degrees."""
        return mean(sums)


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
