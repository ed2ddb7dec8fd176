"""K-means on the patches of samples: what a codebook of as many bits can do without a network.

A patch is what one token stands for, as a vector of its values, channel by channel. With more than `MOST_BITS` bits a
token, the vector is split into equal groups, and each group has its own centres (product quantization).
Paper: Lloyd, "Least squares quantization in PCM" (1982). Differs: ten steps; the seeds are drawn in rounds, with the
chances of k-means++ (Arthur and Vassilvitskii, 2007); a centre without patches moves to the patch that is worst off.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqcore.protocols import Batch

MOST_BITS = 12
"""Bits of one group of a patch's values at most."""
PER_CENTRE = 10
"""Patches for each centre at least: with fewer patches there are fewer centres."""
STEPS = 10
"""Lloyd's steps."""
_CHUNK = 1 << 22
"""Distances that are in memory at one time."""


@dataclass(frozen=True)
class Split:
    """How the bits of a token are spent: so many groups of values, with so many centres each.

    `short` says what there was too little of to spend all of them.
    """

    groups: int
    centres: int
    short: str = field(default="", compare=False)

    @property
    def bits(self) -> float:
        """Bits of a token."""
        return self.groups * math.log2(self.centres)


def split(bits: float, values: int, patches: int) -> Split | None:
    """The split of a token of `bits` for patches of `values` numbers, of which there are `patches` to learn from.

    Never more bits than asked for. None if so few patches make fewer than two centres.
    """
    groups = min(math.ceil(bits / MOST_BITS - 1e-9), values)
    # The small number is for powers of two, whose logarithms are not always exact.
    wanted = math.floor(2 ** min(bits / groups, MOST_BITS) + 1e-6)
    centres = min(wanted, patches // PER_CENTRE)
    short = (
        "too few patches"
        if centres < wanted
        else "too few values in a patch"
        if bits / groups > MOST_BITS
        else ""
    )
    return Split(groups, centres, short) if centres >= 2 else None


def cut(x: Float[Tensor, "b c *size"], patch: Sequence[int]) -> Float[Tensor, "n d"]:
    """The patches of a batch as rows: samples, then positions in the order of the grid."""
    whole, grid, inside, sides = _pattern(patch)
    return rearrange(x, f"b c {whole} -> (b {grid}) (c {inside})", **sides)


def joined(
    rows: Float[Tensor, "n d"], patch: Sequence[int], like: Float[Tensor, "b c *size"]
) -> Float[Tensor, "b c *size"]:
    """The batch whose patches are `rows`: the inverse of `cut`."""
    whole, grid, inside, sides = _pattern(patch)
    places = {f"g{axis}": size // p for axis, (size, p) in enumerate(zip(like.shape[2:], patch))}
    return rearrange(rows, f"(b {grid}) (c {inside}) -> b c {whole}", b=len(like), **places, **sides)


def _pattern(patch: Sequence[int]) -> tuple[str, str, str, dict[str, int]]:
    axes = range(len(patch))
    whole, grid, inside = (
        " ".join(form.format(a=a) for a in axes) for form in ("(g{a} p{a})", "g{a}", "p{a}")
    )
    return whole, grid, inside, {f"p{axis}": side for axis, side in enumerate(patch)}


def filled(batch: Batch, values: Float[Tensor, " c"]) -> Float[Tensor, "b c *size"]:
    """The samples of a batch with one value for each channel where they are not valid."""
    if batch.valid is None:
        return batch.x
    plain = values.to(batch.x).view(1, -1, *[1] * (batch.x.ndim - 2))
    return batch.x.where(rearrange(batch.valid, "b ... -> b 1 ..."), plain)


def shown(valid: Bool[Tensor, "b *size"], patch: Sequence[int]) -> Bool[Tensor, " n"]:
    """Which patches have a valid position, in the order of `cut`."""
    return reduce(cut(rearrange(valid, "b ... -> b 1 ...").float(), patch), "n d -> n", "max") > 0


@dataclass(frozen=True)
class KMeans:
    """Centres of patches. Called with a batch, it returns the batch made of the nearest centres.

    `fill` has one value for each channel: it stands where a sample is not valid. `steps` of Lloyd's were made.
    """

    patch: tuple[int, ...]
    centres: tuple[Float[Tensor, "k part"], ...]
    fill: Float[Tensor, " c"]
    steps: int = STEPS

    def __call__(self, batch: Batch) -> Float[Tensor, "b c *size"]:
        rows = cut(filled(batch, self.fill), self.patch)
        parts = rows.tensor_split(len(self.centres), dim=1)
        nearby = []
        for part, own in zip(parts, (each.to(rows) for each in self.centres), strict=True):
            middle = own.mean(0)  # far from 0, distances lose their digits
            nearby.append(own[nearest(part - middle, own - middle)[0]])
        return joined(torch.cat(nearby, dim=1), self.patch, batch.x)


@torch.no_grad()
def fit(
    rows: Float[Tensor, "n d"], how: Split, rng: torch.Generator, *, until: float = math.inf
) -> tuple[tuple[Float[Tensor, "k part"], ...], int]:
    """The centres of each group, and the fewest of Lloyd's steps that a group had.

    `rng` is on the CPU. After the moment `until` of `time.monotonic` no further step begins. There are fewer centres
    than asked for if there are fewer different rows.
    """
    made, found = STEPS, []
    for part in rows.tensor_split(how.groups, dim=1):
        mean = part.mean(0)  # without it, distances of values far from 0 lose digits
        centres, steps = _lloyd(part - mean, how.centres, rng, until)
        found.append(centres + mean)
        made = min(made, steps)
    return tuple(found), made


def _lloyd(
    rows: Float[Tensor, "n d"], count: int, rng: torch.Generator, until: float
) -> tuple[Float[Tensor, "k d"], int]:
    centres = seeds(rows, count, rng)
    for step in range(STEPS):
        if time.monotonic() > until:
            return centres, step
        codes, distances = nearest(rows, centres)
        sizes = torch.bincount(codes, minlength=len(centres))
        centres = torch.zeros_like(centres).index_add_(0, codes, rows) / sizes.clamp(min=1).unsqueeze(1)
        if empty := int((sizes == 0).sum()):
            centres[sizes == 0] = rows[distances.topk(empty).indices]
    return centres, STEPS


def seeds(rows: Float[Tensor, "n d"], count: int, rng: torch.Generator) -> Float[Tensor, "k d"]:
    """The first centres, at most `count` of the rows: a row far from those chosen before is drawn more often."""
    chosen = torch.randint(len(rows), (1,), generator=rng).to(rows.device)
    distances = torch.full_like(rows[:, 0], math.inf)
    new = chosen
    while True:
        distances = torch.minimum(distances, nearest(rows, rows[new])[1])
        distances[new] = 0
        weights = distances.double().cpu()
        draws = min(len(chosen), max(1, count // 16), count - len(chosen), int((weights > 0).sum()))
        if draws < 1:
            return rows[chosen]
        new = torch.multinomial(weights, draws, generator=rng).to(rows.device)
        chosen = torch.cat([chosen, new])


def nearest(
    rows: Float[Tensor, "n d"], centres: Float[Tensor, "k d"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The nearest centre of each row, and its squared distance."""
    norms = centres.square().sum(1)
    codes, distances = [], []
    for part in rows.split(max(1, _CHUNK // len(centres))):
        least = torch.addmm(norms, part, centres.T, alpha=-2).min(1)
        codes.append(least.indices)
        distances.append((least.values + part.square().sum(1)).clamp(min=0))
    return torch.cat(codes), torch.cat(distances)
