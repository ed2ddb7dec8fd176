"""Structural similarity of reconstructions rounded to 8 bits, in windows weighted by a Gaussian.

Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE TIP
13(4), 2004, eq. 13: mean over windows and channels of
(2 mu_x mu_y + C1)(2 cov_xy + C2) / ((mu_x^2 + mu_y^2 + C1)(var_x + var_y + C2)), C1 = (0.01 L)^2, C2 = (0.03 L)^2.

Differs from the paper: each channel is compared by itself instead of the luminance alone, samples may have one to three
axes, and only windows that lie completely inside the sample count.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from vqcore.config import NoSettings
from vqcore.metrics.sums import mean, refuse_outside, refuse_weight, steps
from vqcore.protocols import DataSpec

LEVELS = 255
"""Dynamic range L: both samples are rounded to this number of steps over the declared range."""
SIGMA, RADIUS = 1.5, 5
"""Standard deviation and radius of the Gaussian window, in positions. The window is 11 positions wide."""
C1, C2 = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2
_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


class SSIM:
    """Structural similarity, mean over samples; 1 for equal samples. Needs 11 positions along every axis.

    With a mask, only windows without an invalid position count. A sample without such a window is left out.
    """

    better = "higher"
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        if spec.range is None or spec.labels is not None:
            raise ValueError(
                f"ssim needs data with a declared range, not {spec.kind} data, range {spec.range}"
            )
        _check_size(spec.size)
        self.range = spec.range

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sum of SSIM over samples, and the number of samples."""
        refuse_weight("ssim", weight)
        _check_size(tuple(x.shape[2:]))
        refuse_outside("ssim", x, mask, self.range)
        similar = ssim_map(*(steps(one, self.range, LEVELS) for one in (x_hat, x))).mean(1)
        valid = torch.ones_like(similar, dtype=torch.bool) if mask is None else _whole_windows(mask)
        windows = reduce(valid.double(), "b ... -> b", "sum")
        each = reduce(similar.where(valid, 0.0), "b ... -> b", "sum") / windows.clamp(min=1)
        return {"sum": each.sum(), "count": (windows > 0).double().sum()}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return mean(sums)

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        low, high = self.range
        return {
            "convention": f"Gaussian window 11, sigma 1.5, population covariance, range {low:g} to {high:g} in "
            f"{LEVELS} steps, each channel alone, whole windows, mean of each sample, then the mean"
        }


def ssim_map(x: Float[Tensor, "b c *size"], y: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *inner"]:
    """SSIM of every window that lies completely inside; `inner` is 10 less than `size`. Values run from 0 to 255."""
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    cov = _smooth(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + C1) * (2 * cov + C2)
    return above / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))


def _smooth(x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *inner"]:
    """Weighted means over windows, axis by axis."""
    weights = [math.exp(-0.5 * (place / SIGMA) ** 2) for place in range(RADIUS + 1)]
    whole = weights[0] + 2 * sum(weights[1:])
    for axis in range(2, x.ndim):
        # Sums of shifted views: on a CPU, eight times as fast as a convolution in double precision.
        inner = x.shape[axis] - 2 * RADIUS
        out = x.narrow(axis, RADIUS, inner) * (weights[0] / whole)
        for place in range(1, RADIUS + 1):
            both = x.narrow(axis, RADIUS - place, inner) + x.narrow(axis, RADIUS + place, inner)
            out.add_(both, alpha=weights[place] / whole)
        x = out
    return x


def _whole_windows(mask: Bool[Tensor, "b *size"]) -> Bool[Tensor, "b *inner"]:
    pool = _POOLS[mask.ndim - 2]
    return pool((~mask).float().unsqueeze(1), 2 * RADIUS + 1, stride=1).squeeze(1) == 0


def _check_size(size: tuple[int, ...]) -> None:
    if min(size) <= 2 * RADIUS:
        raise ValueError(
            f"ssim needs {2 * RADIUS + 1} positions along every axis; the size is {' x '.join(map(str, size))}"
        )
