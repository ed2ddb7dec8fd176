"""Figures for one kind of data: classes, directions, depths, edges. Exact over any number of batches and processes.

All are ratios of sums over the whole set, not means of ratios. Depth: Eigen et al., arXiv 1406.2283, section 4.2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqcore.config import Config as BaseConfig
from vqcore.protocols import DataSpec

ANGLES = (11.25, 22.5, 30.0)
"""Degrees within which a direction counts as right; those of the surface-normal literature."""
BINS_PER_DEGREE = 100
"""Resolution of the median of angles: the exact one lies within half a hundredth of a degree."""


class IoU:
    """Intersection over union of predicted and true positions of each class; the mean over classes that occur.

    A class occurs when it is the true one of a valid position anywhere in the set. Binary data have one class, "yes".
    """

    better = "higher"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """Settings of `iou`."""

        per_class: bool = False
        """Report every class that occurs, as iou/<id>, besides the mean."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        if spec.labels is None and spec.kind != "binary":
            raise ValueError(f"iou is for class maps and binary data, not for {spec.kind} data")
        self.cfg, self.labels, self.middle = cfg, spec.labels, _middle(spec)

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Per class: positions where prediction and truth agree, of the prediction, of the truth."""
        count = self.labels or 2
        if self.labels is None:
            found, true = (x_hat > self.middle).long(), (x > self.middle).long()
        else:
            found, true = x_hat.argmax(1), x.long()
        valid = _valid(mask, true)
        found, true = found[valid], true[valid]
        return {
            "both": _counts(true[found == true], count),
            "found": _counts(found, count),
            "true": _counts(true, count),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over classes that occur; NaN when none does."""
        either = sums["found"] + sums["true"] - sums["both"]
        ratio = sums["both"] / either.clamp(min=1)
        occurs = sums["true"] > 0
        if self.labels is None:
            return {"": float(ratio[1]) if occurs[1] else math.nan}
        figures = {"": float(ratio[occurs].mean())}
        if self.cfg.per_class:
            figures |= {str(int(k)): float(ratio[k]) for k in occurs.nonzero().flatten()}
        return figures


class F1:
    """Harmonic mean of precision and recall of the positions above a threshold, over the whole set."""

    better = "higher"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """Settings of `f1`."""

        threshold: float = 0.5
        """Share of the declared range above which a value is a yes, in the data and in the reconstruction."""

        def __post_init__(self) -> None:
            if not 0 < self.threshold < 1:
                raise ValueError(f"threshold={self.threshold} must lie between 0 and 1")

    def __init__(self, cfg: Config, *, spec: DataSpec):
        if spec.range is None:
            raise ValueError("f1 needs data with a declared range")
        low, high = spec.range
        self.threshold = low + cfg.threshold * (high - low)

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Positions that are rightly, falsely and not found."""
        found, true = x_hat > self.threshold, x > self.threshold
        valid = _valid(mask, true)
        return {
            "right": (found & true & valid).double().sum(),
            "false": (found & ~true & valid).double().sum(),
            "missed": (~found & true & valid).double().sum(),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """F1, precision and recall; 0 where there is nothing to divide by."""
        right, false, missed = (float(sums[name]) for name in ("right", "false", "missed"))
        return {
            "": 2 * right / max(2 * right + false + missed, 1),
            "precision": right / max(right + false, 1),
            "recall": right / max(right + missed, 1),
        }


class Angle:
    """Degrees between true and rebuilt directions: mean, median, and shares within 11.25, 22.5 and 30 degrees.

    Directions are vectors over channels, of any length but 0, or the angles of angle data, in radians.
    """

    in_units = True
    better = "lower"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        self.is_angle = spec.kind == "angle"
        if not self.is_angle and spec.channels < 2:
            raise ValueError(
                f"angle is for angles and vectors, not for {spec.kind} data of {spec.channels} channel"
            )

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """How often each hundredth of a degree occurred, their sum and number."""
        y, x = x_hat.double(), x.double()
        if self.is_angle:
            off = torch.atan2(torch.sin(y - x), torch.cos(y - x)).abs()
            valid = _valid(mask, off) & x.isfinite()
        else:
            off, valid = _between(y, x), _valid(mask, x[:, 0]) & x.isfinite().all(1)
        degrees = torch.rad2deg(off[valid]).nan_to_num(180.0)
        places = (degrees * BINS_PER_DEGREE).long().clamp(max=180 * BINS_PER_DEGREE - 1)
        within = torch.stack([(degrees <= limit).double().sum() for limit in ANGLES])
        return {
            "sum": degrees.sum(),
            "count": torch.tensor(float(len(degrees)), dtype=torch.float64, device=x.device),
            "within": within,
            "histogram": _counts(places, 180 * BINS_PER_DEGREE),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean and median in degrees, shares in 0 to 1; NaN when there was no direction."""
        count = float(sums["count"])
        if not count:
            return {"": math.nan}
        place = int((sums["histogram"].cumsum(0) < (count + 1) / 2).sum())
        shares = {f"within-{limit:g}": float(n) / count for limit, n in zip(ANGLES, sums["within"])}
        return {"": float(sums["sum"]) / count, "median": (place + 0.5) / BINS_PER_DEGREE, **shares}


class Cosine:
    """Cosine of the angle between true and rebuilt vectors over channels, mean over positions."""

    better = "higher"

    in_units = True

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """No settings."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        if spec.labels is not None or spec.channels < 2:
            raise ValueError(f"cosine is for vectors, not for {spec.kind} data of {spec.channels} channel")

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Sum over valid positions and their number; a rebuilt vector that is no number counts as 0."""
        valid = _valid(mask, x[:, 0]) & x.isfinite().all(1)
        cosine = torch.nn.functional.cosine_similarity(x_hat.double(), x.double(), dim=1)
        return {"sum": cosine[valid].nan_to_num(0.0).sum(), "count": valid.double().sum()}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean."""
        return {"": _ratio(sums["sum"], sums["count"])}


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
            "": _ratio(sums["relative"], sums["count"]),
            "rmse": math.sqrt(_ratio(sums["squared"], sums["count"])),
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
        first, second, third = (_ratio(n, sums["count"]) for n in sums["below"])
        return {"": first, "2": second, "3": third}


def _middle(spec: DataSpec) -> float:
    low, high = spec.range or (0.0, 1.0)
    return (low + high) / 2


def _valid(mask: Tensor | None, like: Tensor) -> Bool[Tensor, "..."]:
    """The mask with the shape of `like`, which may have an axis of channels that the mask lacks."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    return (mask if mask.ndim == like.ndim else rearrange(mask, "b ... -> b 1 ...")).expand_as(like)


def _counts(ids: Int[Tensor, "..."], count: int) -> Float[Tensor, " k"]:
    return torch.bincount(ids.flatten(), minlength=count).double()


def _ratio(total: Tensor, count: Tensor) -> float:
    return float(total / count) if float(count) else math.nan


def _between(y: Float[Tensor, "b c *size"], x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *size"]:
    """Radians between vectors, by the arc tangent: an arc cosine loses small angles. A zero vector is at 90 degrees."""
    y, x = (torch.nn.functional.normalize(v, dim=1) for v in (y, x))
    apart, together = (reduce(v.square(), "b c ... -> b ...", "sum").sqrt() for v in (y - x, y + x))
    return 2 * torch.atan2(apart, together)


def _check_quantity(name: str, spec: DataSpec) -> None:
    if spec.kind != "continuous":
        raise ValueError(f"{name} is for measured quantities, not for {spec.kind} data")


def _positive_pairs(
    x_hat: Tensor, x: Tensor, mask: Tensor | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Rebuilt and true values, in double precision, where the true ones are above 0."""
    valid = _valid(mask, x) & x.isfinite() & (x > 0)
    return x_hat[valid].double().nan_to_num(0.0).clamp(min=0), x[valid].double()
