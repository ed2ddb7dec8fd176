"""Finds suspicious values in samples, given what their modality declares.

The field's classic silent error is data in 0..255 where -1..1 is declared: everything trains, nothing learns.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vqcore.check.findings import Finding
from vqcore.config import Config
from vqcore.data.reader import opened
from vqcore.errors import VqcoreError, listed
from vqcore.modalities.scale import broken
from vqcore.protocols import Batch, Data, DataSpec
from vqcore.registry import registry
from vqcore.rng import numpy_generator

SLACK = 0.01
"""Share of a declared range by which a value may lie outside it."""
SLIVER = 0.1
"""Values that use a smaller share of the declared range are suspicious."""
LARGE = 20.0
"""Larger values are suspicious where no range is declared: networks expect numbers of size 1."""
FAR = 10.0
"""A scale by mean and deviation suits values within so many deviations."""
HELD = 32768
"""Values of one array, over all channels, that are kept for quantiles."""
_USUAL = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.0, 65535.0))


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a config says of its samples: the modality's settings and spec, and the training data they describe."""

    modality: Config
    spec: DataSpec
    data: Data

    @property
    def where(self) -> str:
        """The config's key and the modality, for findings."""
        return f"data.modality ({self.modality.name})"


def value_findings(declared: Declared, batches: Sequence[Batch], source: str) -> Iterator[Finding]:
    """What is suspicious about the values of some prepared batches, and one note that describes them.

    `source` says what the batches are, e.g. `the first batch`.
    """
    spec, where = declared.spec, declared.where
    channels = _by_channel(spec, batches)
    if not channels.numel():
        what = f"{source}: no position is valid"
        yield Finding(
            "error", where, what, "The mask hides everything: check the mask or the modality's settings."
        )
        return
    infinite = (~channels.isfinite()).any(1)
    if bool(infinite.any()):
        what = f"{source}: {_channels(infinite)} holds NaN or infinity"
        yield Finding("error", where, what, "Mend the files, or mask such positions.")
        return
    if spec.labels is not None:
        yield from _classes(declared, channels, source, batches)
        return
    low, high = channels.amin(1), channels.amax(1)
    yield from _range(declared, float(low.min()), float(high.max()), source)
    still = low == high
    if bool(still.all()):
        what = f"{source}: every value of a channel is the same"
        yield Finding("error", where, what, "Check that the right file or key is read.")
    elif bool(still.any()):
        what = f"{source}: {_channels(still)} never changes"
        yield Finding(
            "warning", where, what, "A constant channel teaches nothing. Check that it is read correctly."
        )
    seen = f"{float(low.min()):.4g} to {float(high.max()):.4g}, mean {float(channels.mean()):.3g}"
    spread = f"standard deviation {float(channels.std(correction=0)):.3g}{_share(batches)}"
    yield Finding("note", where, f"{source}: values {seen}, {spread}")


def better_range(declared: Declared, data: Data, count: int = 8) -> str:
    """What to declare instead of `data.modality.range`, if the files hold other values; else an empty text.

    The modality is built once more without its range to see what the files hold.
    """
    cfg: Any = declared.modality
    if getattr(cfg, "range", None) is None:
        return ""
    try:
        free = registry().build("modality", dataclasses.replace(cfg, range=None), size=declared.spec.size)
        given = [data.get(i * len(data) // count) for i in range(count)]
        raw = [torch.as_tensor(opened(free, one).raw).double() for one in given]
    except (VqcoreError, OSError, TypeError, ValueError):
        return ""
    low, high = min(float(x.min()) for x in raw), max(float(x.max()) for x in raw)
    better = _usual(low, high)
    if better == tuple(cfg.range):
        return ""
    return f"The files hold {low:.4g} to {high:.4g}: set data.modality.range=[{better[0]:g}, {better[1]:g}]."


def _by_channel(spec: DataSpec, batches: Sequence[Batch]) -> Tensor:
    """All valid values as (channels, n)."""
    columns = []
    for batch in batches:
        x = batch.x.unsqueeze(1) if spec.labels is not None else batch.x
        flat = rearrange(x.cpu(), "b c ... -> c (b ...)")
        columns.append(flat if batch.mask is None else flat[:, rearrange(batch.mask, "... -> (...)").cpu()])
    return torch.cat(columns, 1).double()


def _share(batches: Sequence[Batch]) -> str:
    """How much of batches with masks is valid."""
    masks = [batch.mask for batch in batches if batch.mask is not None]
    valid, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return f"; {valid / total:.1%} of the positions are valid" if total else ""


def _range(declared: Declared, low: float, high: float, source: str) -> Iterator[Finding]:
    spec, where, better = declared.spec, declared.where, _usual(low, high)
    seen = f"{source}: values run from {low:.4g} to {high:.4g}"
    if spec.range is None:
        if spec.kind == "continuous" and max(abs(low), abs(high)) > LARGE:
            what = f"{seen} and no range is declared; networks learn from values of size 1"
            remedy = f"Declare the range: data.modality.range=[{better[0]:g}, {better[1]:g}]."
            yield Finding("warning", where, what, remedy if hasattr(declared.modality, "range") else "")
        return
    bottom, top = spec.range
    width, asked = top - bottom, f"{bottom:g} to {top:g}"
    if low < bottom - SLACK * width or high > top + SLACK * width:
        remedy = f"The values look like {better[0]:g}..{better[1]:g}: map them to {asked} when they are read."
        yield Finding("error", where, f"{seen}, but {asked} is declared", remedy)
    elif high - low < SLIVER * width and high > low:
        what = f"{seen}, {(high - low) / width:.1%} of the declared {asked}"
        yield Finding("warning", where, what, better_range(declared, declared.data))
    elif bottom < 0 < top and low >= 0 and high > low:
        what = f"{seen}, never below 0, but {asked} is declared"
        yield Finding("warning", where, what, "Check whether the values are 0..1 and not yet centred.")


def _classes(
    declared: Declared, channels: Tensor, source: str, batches: Sequence[Batch]
) -> Iterator[Finding]:
    labels, where = declared.spec.labels or 0, declared.where
    seen = channels.unique().long().tolist()
    wrong = [label for label in seen if not 0 <= label < labels]
    if wrong:
        shown = listed(map(str, wrong), 4)
        what = f"{source}: class {shown} occurs, but {labels} classes are declared (0 to {labels - 1})"
        remedy = f"Set data.modality.labels={max(seen) + 1}, or map such classes when they are read."
        yield Finding("error", where, what, remedy)
    elif len(seen) == 1:
        what = f"{source}: only class {seen[0]} occurs"
        yield Finding("warning", where, what, "Check that the right file or key is read.")
    else:
        yield Finding("note", where, f"{source}: {len(seen)} of {labels} classes occur{_share(batches)}")


def _usual(low: float, high: float) -> tuple[float, float]:
    """The narrowest customary range that holds these values, else the values' own."""
    for bottom, top in _USUAL:
        if bottom <= low and high <= top:
            return bottom, top
    return low, high


def _channels(which: Tensor) -> str:
    numbers = [str(i) for i in torch.nonzero(which).flatten().tolist()]
    return f"channel{'s' if len(numbers) > 1 else ''} {listed(numbers, 6)}"


@dataclasses.dataclass(frozen=True)
class ChannelSummary:
    """The values of one channel in the units of the files, without what is missing. All NaN if nothing is left.

    `low`, `median` and `high` are the quantiles 1 %, 50 % and 99 %. `unknown` is the share of NaN and infinity,
    `nodata` the share of the values that stand for no data.
    """

    minimum: float
    low: float
    median: float
    high: float
    maximum: float
    mean: float
    deviation: float
    unknown: float
    nodata: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The values of each channel of some arrays, and the values that were taken as no data."""

    channels: tuple[ChannelSummary, ...]
    nodata: tuple[float, ...]
    arrays: int


def summarise(arrays: Iterable[np.ndarray], *, channels: int, nodata: Sequence[float] = ()) -> Summary:
    """Summarise arrays `(channels, *size)`, read one after the other; masked values count as no data.

    Extremes, mean and deviation are exact. Quantiles are those of at most `HELD` values an array, drawn with a seed.
    Raises `ValueError` for an array with another number of channels, and when there is no array.
    """
    count = 0
    found = [_Channel() for _ in range(channels)]
    most = max(16, HELD // channels)
    for array in arrays:
        if len(array) != channels:
            raise ValueError(f"an array of shape {array.shape} has {len(array)} channels, not {channels}")
        masked = np.ma.getmaskarray(array).reshape(channels, -1)
        rows = np.ma.getdata(array).reshape(channels, -1)
        places = np.arange(rows.shape[1])
        if len(places) > most:
            places = numpy_generator(0, "summary", count).integers(0, len(places), most)
        for one, row, hidden in zip(found, rows, masked):
            one.add(row, hidden | np.isin(row, nodata), places)
        count += 1
    if not count:
        raise ValueError("there is no array to summarise")
    return Summary(tuple(one.summary() for one in found), tuple(nodata), count)


def propose_scale(summary: Summary) -> dict[str, Any]:
    """The settings of `array` that suit these values, to paste below `data.modality`.

    `standard` where no value lies beyond `FAR` deviations. Beyond, `log` where every value is above 0, else `arcsinh`.
    `nodata` is there if values are missing.
    """
    seen = [one for one in summary.channels if math.isfinite(one.mean)]
    if not seen:
        return {}
    missing = summary.nodata or any(one.unknown or one.nodata for one in seen)
    found: dict[str, Any] = {"nodata": [float(value) for value in summary.nodata]} if missing else {}
    return {**found, "scale": _scale_for([one if one in seen else seen[0] for one in summary.channels])}


def _scale_for(seen: list[ChannelSummary]) -> dict[str, Any]:
    far = any(max(c.maximum - c.mean, c.mean - c.minimum) > FAR * c.deviation for c in seen if c.deviation)
    if not far:
        deviations = [c.deviation or 1.0 for c in seen]
        means = [_rounded(c.mean, d) for c, d in zip(seen, deviations)]
        return {"kind": "standard", "mean": means, "std": [_rounded(d, d) for d in deviations]}
    if all(c.minimum > 0 and c.high > c.low for c in seen):
        lows, highs = [_rounded(c.low, c.low) for c in seen], [_rounded(c.high, c.high) for c in seen]
        if all(low < high for low, high in zip(lows, highs)):
            return {"kind": "log", "low": lows, "high": highs}
    widths = [(c.high - c.low) / 4 or c.deviation or 1.0 for c in seen]
    centres = [_rounded(c.median, w) for c, w in zip(seen, widths)]
    return {"kind": "arcsinh", "centre": centres, "width": [_rounded(w, w) for w in widths]}


def _rounded(value: float, unit: float) -> float:
    """The value with as many digits as matter beside a positive unit: a thousandth of the unit."""
    return float(round(value, 3 - math.floor(math.log10(unit))))


class _Channel:
    """Adds up the values of one channel."""

    def __init__(self) -> None:
        self.total = self.count = self.unknown = self.nodata = 0
        self.mean = self.squares = 0.0
        self.low, self.high = math.inf, -math.inf
        self.held: list[np.ndarray] = []

    def add(self, row: np.ndarray, missing: np.ndarray, places: np.ndarray) -> None:
        """One array's values; `missing` marks those that stand for no data, `places` are kept for the quantiles."""
        row = row.astype(np.float64)
        unknown = broken(row) & ~missing
        good = ~(missing | unknown)
        self.total += len(row)
        self.nodata += int(missing.sum())
        self.unknown += int(unknown.sum())
        self.held.append(row[places][good[places]])
        values = row[good]
        if not len(values):
            return
        # Two means and two sums of squares are joined as in Chan, Golub and LeVeque (1983).
        count, mean = self.count + len(values), float(values.mean())
        shift = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + shift**2 * self.count * len(values) / count
        self.mean += shift * len(values) / count
        self.count = count
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def summary(self) -> ChannelSummary:
        """What was added up."""
        shares = self.unknown / max(1, self.total), self.nodata / max(1, self.total)
        if not self.count:
            return ChannelSummary(*(math.nan,) * 7, *shares)
        held = np.concatenate(self.held)
        quantiles = np.quantile(held, (0.01, 0.5, 0.99)) if len(held) else [self.low, self.mean, self.high]
        low, median, high = (float(value) for value in quantiles)
        deviation = math.sqrt(self.squares / self.count)
        return ChannelSummary(self.low, low, median, high, self.high, self.mean, deviation, *shares)
