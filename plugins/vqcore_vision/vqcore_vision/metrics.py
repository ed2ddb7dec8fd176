"""Metrics of depths, joints and rotations, in the units of the files."""

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from vqcore.config import NoSettings
from vqcore.metrics.sums import count_of, mean, ratio, refuse_weight, summed, valid_positions
from vqcore.protocols import DataSpec


class AbsRel:
    """Mean over positions of |reconstruction - truth| / truth, and the root mean square error in units of the files.

    Positions whose true value is 0 or less do not count. A reconstruction that is NaN counts as 0.
    """

    in_units = True
    better = "lower"
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        _check_quantity("abs-rel", spec)

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sum of the relative errors, sum of the squared errors, and the number of positions."""
        refuse_weight("abs-rel", weight)
        y, x = _positive_pairs(x_hat, x, mask)
        return {
            "relative": ((y - x).abs() / x).sum(),
            "squared": (y - x).square().sum(),
            "count": count_of(x),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean relative error, and `rmse` in units of the files."""
        return {
            "": ratio(sums["relative"], sums["count"]),
            "rmse": math.sqrt(ratio(sums["squared"], sums["count"])),
        }


class Delta:
    """Shares of positions where reconstruction / truth and its inverse are below 1.25, 1.25 squared and 1.25 cubed."""

    in_units = True
    better = "higher"
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        _check_quantity("delta", spec)

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Number of positions below each limit, and of all positions whose true value is above 0."""
        refuse_weight("delta", weight)
        y, x = _positive_pairs(x_hat, x, mask)
        factor = torch.maximum(y / x, x / y.clamp(min=1e-30))
        below = torch.stack([(factor < 1.25**k).double().sum() for k in (1, 2, 3)])
        return {"below": below, "count": count_of(x)}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The share below 1.25; as `2` and `3`, the shares below its square and its cube."""
        first, second, third = (ratio(n, sums["count"]) for n in sums["below"])
        return {"": first, "2": second, "3": third}


class JointError:
    """Mean per-joint position error (MPJPE): the distance of a joint from its true position, in units of the files."""

    in_units = True
    better = "lower"
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        pass

    def measure(
        self,
        x_hat: Float[Tensor, "b w j"],
        x: Float[Tensor, "b w j"],
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sum of the errors of samples, and the number of samples; channels are coordinates, the axis is joints."""
        refuse_weight("joint-error", weight)
        return summed(reduce((x_hat.double() - x.double()).norm(dim=1), "b j -> b", "mean"))

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return mean(sums)


class RotationError:
    """Angle between a rotation and its reconstruction in degrees, mean over joints and samples.

    Takes matrices (9 numbers a joint; the nearest rotations are compared), axis-angle vectors (3) or angles (1), in
    radians.
    """

    in_units = True
    better = "lower"
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        pass

    def measure(
        self,
        x_hat: Float[Tensor, "b w j"],
        x: Float[Tensor, "b w j"],
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sum of the errors of samples, and the number of samples; channels are the numbers of a joint."""
        refuse_weight("rotation-error", weight)
        if x.shape[1] == 1:
            turn = x_hat.double() - x.double()
            angle = torch.atan2(turn.sin(), turn.cos()).abs().squeeze(1)
        else:
            between = rotation_matrices(x_hat).mT @ rotation_matrices(x)
            # |R - 1| = 2 sqrt(2) sin(angle / 2) is exact for small angles; the usual formula with the trace is not.
            one = torch.eye(3, dtype=between.dtype, device=between.device)
            chord = (between - one).flatten(-2).norm(dim=-1)
            angle = 2 * torch.asin((chord / math.sqrt(8)).clamp(max=1))
        return summed(reduce(torch.rad2deg(angle), "b j -> b", "mean"))

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples, in degrees."""
        return mean(sums)


def rotation_matrices(values: Float[Tensor, "b w j"]) -> Float[Tensor, "b j 3 3"]:
    """Rotations from nine numbers a joint (the nearest rotation, by SVD) or three (axis times angle, in radians)."""
    if values.shape[1] == 3:
        x, y, z = rearrange(values.double(), "b w j -> w b j")
        zero = torch.zeros_like(x)
        skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1)
        return torch.linalg.matrix_exp(rearrange(skew, "b j (row col) -> b j row col", row=3))
    u, _, vh = torch.linalg.svd(rearrange(values.double(), "b (row col) j -> b j row col", row=3))
    handed = torch.linalg.det(u @ vh)
    one = torch.ones_like(handed)
    return u @ torch.diag_embed(torch.stack([one, one, handed], -1)) @ vh


def _check_quantity(name: str, spec: DataSpec) -> None:
    if spec.kind != "continuous":
        raise ValueError(f"{name} is for measured quantities, not for {spec.kind} data")


def _positive_pairs(
    x_hat: Tensor, x: Tensor, mask: Tensor | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Reconstructions and true values, in double precision, where the true values are above 0."""
    valid = valid_positions(mask, x) & x.isfinite() & (x > 0)
    return x_hat[valid].double().nan_to_num(0.0).clamp(min=0), x[valid].double()
