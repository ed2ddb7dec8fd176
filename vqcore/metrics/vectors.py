"""Metrics of directions: the angle and the cosine between vectors."""

import math
from collections.abc import Mapping, Sequence

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from vqcore.config import NoSettings
from vqcore.metrics.sums import count_of, id_counts, mean, refuse_weight, summed, valid_positions
from vqcore.protocols import DataSpec

ANGLES = (11.25, 22.5, 30.0)
"""A direction within so many degrees counts as correct; the limits of the surface-normal literature."""
BINS_PER_DEGREE = 100
"""Resolution of the median angle: the exact median lies within half a hundredth of a degree."""


class Angle:
    """Degrees between true and reconstructed directions: mean, median, and shares within 11.25, 22.5 and 30 degrees.

    Directions are vectors over channels, of any length above 0, or the angles of angle data, in radians.
    """

    in_units = True
    better = "lower"
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        self.is_angle = spec.kind == "angle"
        if not self.is_angle and spec.channels < 2:
            raise ValueError(
                f"angle is for angles and vectors, not for {spec.kind} data of {spec.channels} channel"
            )

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sum and number of the angles, the number within each limit, and a histogram of hundredths of a degree."""
        refuse_weight("angle", weight)
        y, x = x_hat.double(), x.double()
        if self.is_angle:
            off = torch.atan2(torch.sin(y - x), torch.cos(y - x)).abs()
            valid = valid_positions(mask, off) & x.isfinite()
        else:
            off, valid = _between(y, x), valid_positions(mask, x[:, 0]) & x.isfinite().all(1)
        degrees = torch.rad2deg(off[valid]).nan_to_num(180.0)
        places = (degrees * BINS_PER_DEGREE).long().clamp(max=180 * BINS_PER_DEGREE - 1)
        within = torch.stack([(degrees <= limit).double().sum() for limit in ANGLES])
        return {
            "sum": degrees.sum(),
            "count": count_of(degrees),
            "within": within,
            "histogram": id_counts(places, 180 * BINS_PER_DEGREE),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean and median in degrees, shares from 0 to 1; NaN when there was no direction."""
        count = float(sums["count"])
        if not count:
            return {"": math.nan}
        place = int((sums["histogram"].cumsum(0) < (count + 1) / 2).sum())
        shares = {f"within-{limit:g}": float(n) / count for limit, n in zip(ANGLES, sums["within"])}
        return {"": float(sums["sum"]) / count, "median": (place + 0.5) / BINS_PER_DEGREE, **shares}

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        return {"convention": "degrees, over all positions of the set; shares include their limit"}


class Cosine:
    """Cosine of the angle between true and reconstructed vectors over channels, mean over positions."""

    better = "higher"
    in_units = True
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        if spec.labels is not None or spec.channels < 2:
            raise ValueError(f"cosine is for vectors, not for {spec.kind} data of {spec.channels} channel")

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sum over the valid positions, and their number; a reconstruction that is NaN counts as 0."""
        refuse_weight("cosine", weight)
        valid = valid_positions(mask, x[:, 0]) & x.isfinite().all(1)
        cosine = torch.nn.functional.cosine_similarity(x_hat.double(), x.double(), dim=1)
        return summed(cosine[valid].nan_to_num(0.0))

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over positions."""
        return mean(sums)

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        return {"convention": "over all positions of the set"}


def _between(y: Float[Tensor, "b c *size"], x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *size"]:
    """Radians between vectors, by the arc tangent: an arc cosine loses small angles. A zero vector is at 90 degrees."""
    y, x = (torch.nn.functional.normalize(v, dim=1) for v in (y, x))
    apart, together = (reduce(v.square(), "b c ... -> b ...", "sum").sqrt() for v in (y - x, y + x))
    return 2 * torch.atan2(apart, together)
