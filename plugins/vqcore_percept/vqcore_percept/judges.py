"""What metrics that look at pictures share: pictures of 8 bits, borrowed networks, sets of features.

The features of a whole set are gathered and compared: Frechet distances (arXiv 1706.08500), kernel distances (arXiv
1801.01401), precision and recall (arXiv 1904.06991). The reference is what the encoder saw, never another set.
"""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.borrowed import keep_frozen
from vqcore.metrics.sums import refuse_outside, refuse_weight, steps
from vqcore.protocols import DataSpec

FEW = 2048
"""Fewer samples than this are too few for a distance of two sets: the number of samples decides much of the value."""
PARTS = 10
"""An interval comes from the values of the set without each of so many parts."""
STUDENT = 2.262
"""97.5 % of Student's t with `PARTS` - 1 degrees of freedom lies below."""
ROWS = 1024
"""Rows of a matrix of distances that are in memory at once."""

log = logging.getLogger(__name__)

Features = Float[Tensor, "_ d"]


class Pictures:
    """A metric that sees both samples as files of 8 bits hold them. Base class.

    At invalid positions the reconstruction has the values of the data.
    """

    rows: Literal[True] = True
    name: str
    """The component's name, for messages."""

    def __init__(self, cfg: Any, *, spec: DataSpec):
        if spec.range is None:
            raise ValueError(f"{self.name} needs data with a declared range")
        self.cfg, self.range = cfg, spec.range

    def seen(
        self, x_hat: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction and data in the data's range, clamped to it and rounded to 255 steps."""
        refuse_weight(self.name, weight)
        refuse_outside(self.name, x, mask, self.range)
        low, high = self.range
        x_hat, x = ((steps(one, self.range, 255) / 255 * (high - low) + low).float() for one in (x_hat, x))
        if mask is not None:
            valid = rearrange(mask, "b ... -> b 1 ...")
            x = torch.where(valid, x, low)
            x_hat = torch.where(valid, x_hat, x)
        return x_hat, x


class Judge(Pictures):
    """A metric that looks at pictures with a borrowed network, the only one of the module `judge`. Base class."""

    better: Literal["lower"] = "lower"
    judge: nn.Module
    convention: str
    """How the metric measures, for the protocol."""

    def setup(self, device: torch.device) -> None:
        """Fill the network. Raises `CheckpointError` with the file that is missing."""
        (self.hash,) = self.judge.borrow({}).values()  # type: ignore[operator]
        keep_frozen(self.judge)
        self.judge.to(device)

    def facts(self) -> dict[str, str]:
        """The hash of the network's weights, and how this metric measures."""
        return {"net": self.hash, "convention": self.convention}


class Sets(Judge):
    """A metric of the features of two whole sets, with 95 % intervals where samples can be left out. Base class.

    The interval is the jackknife's: from the values without each tenth of the samples, in the order of their keys, so
    that windows of one file are left out together.
    """

    gather: Literal[True] = True
    warned = 0
    """The number of samples of the last warning."""

    @torch.no_grad()
    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Features of each reconstruction, `hat`, and of each sample, `true`, both `(b, d)`."""
        x_hat, x = self.seen(x_hat, x, mask, weight)
        return {"hat": self.judge(x_hat).float(), "true": self.judge(x).float()}

    def summary(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """The distances of the two sets, by name; see `compared`."""
        count = len(rows["hat"])
        if count < FEW and count != self.warned:
            self.warned = count
            log.warning(
                "%s: %s samples. Below %s its value depends on their number: compare it with no other number, and no "
                "other set.",
                self.name,
                f"{count:,}",
                f"{FEW:,}",
            )
        place = next(self.judge.parameters()).device
        place = place if place.type == "cuda" else torch.device("cpu")
        return self.compared(*(rows[name].to(place, torch.float64) for name in ("hat", "true")))

    def compared(self, hat: Features, true: Features) -> dict[str, float]:
        """The values of the metric."""
        raise NotImplementedError


class FrechetSets(Sets):
    """The Frechet distance of two sets, their kernel distance, precision and recall. Base class."""

    kernel_name: str

    def compared(self, hat: Features, true: Features) -> dict[str, float]:
        """The Frechet distance; the kernel distance (unbiased, cubic, of all pairs); precision and recall."""
        parts = split(len(hat))
        frechets = [frechet(hat, true), *(frechet(*without(part, hat, true)) for part in parts)]
        kernels = mmd(cubic, hat, true, parts, unbiased=True)
        found = interval("", frechets) | interval(self.kernel_name, kernels)
        return found | {"precision": covered(hat, true), "recall": covered(true, hat)}


def frechet(a: Features, b: Features) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) with the covariances A, B; NaN for fewer than two samples.

    The root's trace is the sum of the singular values of R S^T, where A = R^T R and B = S^T S.
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    apart = (a.mean(0) - b.mean(0)).square().sum()
    a, b = _root(a), _root(b)
    return float(apart + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def _root(x: Features) -> Float[Tensor, "_ d"]:
    """A matrix R of at most d rows with R^T R the covariance."""
    x = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    if len(x) <= x.shape[1]:
        return x
    values, vectors = torch.linalg.eigh(x.T @ x)
    return values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T


def cubic(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """The kernel of KID: (a . b / d + 1)^3."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def mmd(
    kernel: Callable[[Features, Features], Tensor],
    a: Features,
    b: Features,
    parts: Sequence[slice],
    *,
    unbiased: bool,
) -> list[float]:
    """Squared maximum mean discrepancies of two sets of equal length: of the whole sets, then without each part.

    Unbiased: no sample is compared with itself (arXiv 1801.01401, eq. 4); this is what means over ever more drawn
    subsets tend to. Else all pairs of a set count. Either way a reconstruction is compared with its own sample as with
    all others, which lowers the value by about 1 / n.
    """
    blocks = parts or [slice(None)]
    lengths = torch.tensor([len(a[block]) for block in blocks], dtype=torch.float64)
    sums = torch.zeros(3, len(blocks), len(blocks), dtype=torch.float64)
    for which, (x, y) in enumerate(((a, a), (b, b), (a, b))):
        for i, first in enumerate(blocks):
            for j, second in enumerate(blocks):
                found = kernel(x[first], y[second])
                own = found.trace() if unbiased and which < 2 and i == j else 0.0
                sums[which, i, j] = found.sum() - own
    values = []
    for left_out in (None, *range(len(parts))):
        kept = torch.tensor([i != left_out for i in range(len(blocks))])
        n = float(lengths[kept].sum())
        within, between = sums[:2, kept][:, :, kept].sum(), sums[2, kept][:, kept].sum()
        pairs = n * (n - 1) if unbiased else n * n
        values.append(float(within / pairs - 2 * between / n**2) if pairs else math.nan)
    return values


def covered(found: Features, known: Features, neighbours: int = 3) -> float:
    """The share of `found` inside the ball of a `known` sample, which reaches to its third neighbour in `known`.

    arXiv 1904.06991, eq. 1 and 2; NaN for too few samples.
    """
    if len(known) <= neighbours:
        return math.nan
    radii = torch.cat(
        [torch.cdist(rows, known).kthvalue(neighbours + 1).values for rows in known.split(ROWS)]
    )
    inside = torch.cat([(torch.cdist(rows, known) <= radii).any(1) for rows in found.split(ROWS)])
    return float(inside.double().mean())


def split(count: int) -> list[slice]:
    """`PARTS` neighbouring parts of so many samples; none if there are too few samples."""
    if count < 2 * PARTS:
        return []
    edges = [count * part // PARTS for part in range(PARTS + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def without(part: slice, *sets: Features) -> tuple[Features, ...]:
    """The sets without a part."""
    return tuple(torch.cat([one[: part.start], one[part.stop :]]) for one in sets)


def interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The first value under its name, and the edges of its interval from the others, which leave out a part each."""
    whole, *others = values
    start = f"{name}/" if name else ""
    found = {name: whole}
    if others:
        left = torch.tensor(others, dtype=torch.float64)
        variance = float((left - left.mean()).square().sum()) * (len(left) - 1) / len(left)
        reach = STUDENT * math.sqrt(variance)
        found |= {f"{start}low": whole - reach, f"{start}high": whole + reach}
    return found
