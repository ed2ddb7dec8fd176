"""What the files of arrays hold as they are, in their own units: errors that values under the scale do not show."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vqcore.check.findings import Finding
from vqcore.check.values import Declared, channel_name, fills, raw_arrays
from vqcore.errors import listed
from vqcore.modalities.array import Array
from vqcore.modalities.scale import declared as stands_for
from vqcore.modalities.scale import missing
from vqcore.rng import numpy_generator

READ = 1 << 28
"""Bytes after which no more files are read."""
HELD, PIECES = 4096, 16
"""Values of a channel of a file that are looked at, and the number of pieces in which they lie."""
IDS = 64
"""So few different whole numbers may be class ids, if each of them is there `REPEATED` times."""
REPEATED = 50
SMOOTH = 100
"""So many different values are no levels: a large share of them at both ends was cut off."""
CUT = 0.05
"""A large share at an end."""
FAR, GAP, FILES = 30.0, 10.0, 6
"""A file is in other units if it is `FAR` times off the usual file and `GAP` times as far as any of the others; nothing
is said of fewer than `FILES` files."""
_ONE_SIGMA = (0.16, 0.5, 0.84)
"""Quantiles: the median, and those that lie one deviation beside it in a normal distribution."""


@dataclass(frozen=True)
class _File:
    key: str
    array: np.ndarray
    """All values `(c, *extent)`, of a mapped file some; what is missing is NaN, but for the declared numbers."""
    some: np.ndarray
    """Some values of each channel `(c, n)`; what is missing is NaN."""


def array_findings(declared: Declared, count: int) -> Iterator[Finding]:
    """What is suspicious in the files of `count` samples of `array`; nothing for other modalities."""
    cfg = declared.modality
    if not isinstance(cfg, Array.Config) or cfg.kind in ("categorical", "binary"):
        return
    files = list(_files(declared, count, cfg.nodata or ()))
    if not files:
        return
    values = [row[~np.isnan(row)] for row in np.concatenate([file.some for file in files], axis=1)]
    if cfg.kind == "angle":
        yield from _angles(declared, values)
    if cfg.kind != "continuous":
        return
    yield from _ids(declared, values)
    yield from _cut_off(declared, values)
    yield from _nodata(declared, files, cfg.nodata or ())
    if cfg.scale is None or cfg.scale.kind not in ("log", "arcsinh"):  # files of such data differ widely
        yield from _units(files)


def _files(declared: Declared, count: int, nodata: Sequence[float]) -> Iterator[_File]:
    read = 0
    for key, array in raw_arrays(declared, count):
        rows = array.reshape(len(array), -1)
        if rows.shape[1] > HELD:
            # Pieces: single values all over a mapped file would each be read from another place of a disk.
            piece = HELD // PIECES
            starts = numpy_generator(0, "raw", key).integers(0, rows.shape[1] - piece + 1, (PIECES, 1))
            rows = rows[:, (starts + np.arange(piece)).ravel()]
        array = rows if isinstance(array, np.memmap) else array
        some = np.where(missing(rows, nodata), np.nan, rows.astype(np.float64))
        yield _File(key, array, some)
        read += array.nbytes
        if read > READ:
            return


def _angles(declared: Declared, values: Sequence[np.ndarray]) -> Iterator[Finding]:
    low, high = (end([end(row) for row in values if len(row)], default=0.0) for end in (min, max))
    most = max(-low, high)
    if most <= 2.001 * math.pi:
        return
    what = f"values run from {low:.4g} to {high:.4g}, beyond 2 pi, and kind=angle takes radians"
    if most <= 361:
        yield Finding(
            "warning", declared.where, what, "Multiply degrees by pi / 180 when the files are made."
        )
    else:
        yield Finding("note", declared.where, f"{what}: the rest of a division by 2 pi counts")


def _ids(declared: Declared, values: Sequence[np.ndarray]) -> Iterator[Finding]:
    found = [_whole(row) for row in values]
    if not any(found):
        return
    names = listed((channel_name(declared.spec, c) for c, ids in enumerate(found) if ids), 6)
    ids = sorted({one for each in found for one in each})
    what = f"channel {names}: only whole numbers, {len(ids)} different ones from {ids[0]} to {ids[-1]}"
    if not all(found):
        yield Finding("note", declared.where, f"{what}. Class ids would be mixed like quantities")
        return
    what = f"{what}. They look like class ids, and the mean of two classes is no class"
    if len(ids) == 2:
        ends = "" if ids == [0, 1] else f" data.modality.range=[{ids[0]},{ids[1]}]"
        remedy = f"If so, use kind binary: data.modality.kind=binary{ends}"
    else:
        remedy = (
            "If so, use kind categorical: one channel, saved as integers, data.modality.kind=categorical "
            f"data.modality.labels={ids[-1] + 1}"
        )
    yield Finding("warning", declared.where, what, f"{remedy}. Counts and levels may stay.")


def _whole(row: np.ndarray) -> list[int]:
    """The different values of a channel if they may be class ids."""
    if not len(row) or row.min() < 0 or not np.array_equal(row, row.round()):
        return []
    ids = np.unique(row)
    few = 2 <= len(ids) <= IDS and len(row) >= REPEATED * len(ids)
    return [int(one) for one in ids] if few else []


def _cut_off(declared: Declared, values: Sequence[np.ndarray]) -> Iterator[Finding]:
    for channel, row in enumerate(values):
        if len(np.unique(row)) < SMOOTH:
            continue
        low, high = float(row.min()), float(row.max())
        shares = [float(np.mean(row == end)) for end in (low, high)]
        if min(shares) >= CUT:
            what = (
                f"channel {channel_name(declared.spec, channel)}: {shares[0]:.0%} of the values are exactly "
                f"{low:.4g} and {shares[1]:.0%} exactly {high:.4g}: they look cut off"
            )
            remedy = "What was cut off cannot be learnt. Make the files anew with wider limits if you can."
            yield Finding("warning", declared.where, what, remedy)
            return


def _nodata(declared: Declared, files: Sequence[_File], nodata: Sequence[float]) -> Iterator[Finding]:
    """A warning if a number that is usual for no data occurs, and no declared one does."""
    if nodata and any(stands_for(file.array, nodata).any() for file in files):
        return
    others = fills([file.array for file in files])
    shown, also = (listed(f"{one:g}" for one in each) for each in (nodata, others))
    what = f"the no-data value {shown} does not occur in {len(files)} samples"
    if others:
        where = "far from all other values of a channel"
        what = (
            f"{what}, but {also} does, {where}" if nodata else f"{also} occurs, {where}: learned as a value"
        )
        numbers = ",".join(f"{one:.9g}" for one in others)
        remedy = (
            f"If it stands for no data, set data.modality.nodata=[{numbers}]; --values gives the scale then."
        )
        yield Finding("warning", declared.where, what, remedy)
    elif nodata:
        yield Finding("note", declared.where, what)


def _units(files: Sequence[_File]) -> Iterator[Finding]:
    """A warning for files whose values vary, or lie, far from those of all others in every channel."""
    files = [file for file in files if not np.isnan(file.some).all(1).any()]
    if len(files) < FILES:
        return
    # Quantiles: a few far values are no other unit.
    low, centre, high = np.stack([np.nanquantile(file.some, _ONE_SIGMA, axis=1) for file in files], axis=1)
    spread = (high - low) / 2
    usual = np.median(spread, axis=0)
    varies = usual > 0
    if not varies.any():
        return
    with np.errstate(divide="ignore"):
        times = np.log(spread[:, varies] / usual[varies])
    # In all channels the same way: the least of them. A constant file says nothing about units.
    lowest, highest = times.min(1), times.max(1)
    factor = np.where(np.isinf(lowest), 0, np.maximum(lowest, 0) + np.minimum(highest, 0))
    away = (np.abs(centre - np.median(centre, axis=0))[:, varies] / usual[varies]).min(1)
    for apart, words in (
        (np.exp(np.abs(factor)), "its deviation is {} times that of a usual sample"),
        (away, "its median lies {} deviations away from that of a usual sample"),
    ):
        far = apart > FAR
        if not 0 < far.sum() <= len(files) // 4 or apart[far].min() < GAP * max(1, apart[~far].max()):
            continue
        first = int(np.flatnonzero(far)[0])
        number = math.exp(factor[first]) if "times" in words else away[first]
        shown = f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
        names = listed((file.key for file, one in zip(files, far) if one), 3)
        what = f"{names} of {len(files)} samples may be in other units: {words.format(shown)}"
        yield Finding("warning", "data.path", what, "Bring all files into the same units, or remove these.")
        return
