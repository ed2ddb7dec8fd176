"""What the files hold, channel by channel, and the scale that suits it.

Values are read without the scale of the config, so samples that this scale refuses count too.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vqcore.config import Config
from vqcore.data.reader import Reader, opened
from vqcore.errors import VqcoreError
from vqcore.modalities.array import Array, scale_of
from vqcore.modalities.scale import SLACK, Scale, broken, declared
from vqcore.protocols import Data, DataSpec, HasValues, Modality, values
from vqcore.registry import registry
from vqcore.rng import numpy_generator

LARGE = 20.0
"""Larger values are suspicious where no range is declared: networks expect numbers of size 1."""
NARROW = 0.1
"""A channel with a smaller deviation is suspicious, for the same reason."""
UNEQUAL = 10.0
"""Channels whose deviations differ by more are suspicious: the loss sees little but the largest."""
MARGIN = 0.1
"""A proposed range is larger than the values that were read by this share of their width."""
HELD = 32768
"""Values of one array, over all channels, that are kept for quantiles."""
VALUES = 256
"""Samples that `vqcore check --values` reads."""
SAMPLES = 32
"""Samples that are read to find a better scale."""
WRITTEN = 8
"""Numbers for more channels are not written into a finding."""
_FILLS = (-9999.0, -99999.0, -999.0, -32768.0, -3.4028234663852886e38, 9.969209968386869e36, 1e20)
"""Numbers that files use for what was not measured."""
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

    @property
    def has_scale(self) -> bool:
        """Has the modality a `scale`, and a kind of values that can have one?"""
        return isinstance(self.modality, Array.Config) and self.spec.kind == "continuous"


def channel_name(spec: DataSpec, place: int) -> str:
    """The name of a channel, else its number."""
    return spec.names[place] if place < len(spec.names) else str(place)


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
    some: np.ndarray = dataclasses.field(repr=False, compare=False)
    """Some of the values, with the smallest and the largest."""


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
            one.add(row, hidden | declared(row, nodata), places)
        count += 1
    if not count:
        raise ValueError("there is no array to summarise")
    return Summary(tuple(one.summary() for one in found), tuple(nodata), count)


def propose_scale(summary: Summary) -> dict[str, Any]:
    """The settings of `array` that suit these values, to paste below `data.modality`.

    The first of `standard`, `log` and `arcsinh` that lets every channel vary by about 1 and no value be large. `nodata`
    is there if values are missing. Nothing is proposed where a channel has no value at all.
    """
    seen = summary.channels
    if not all(math.isfinite(one.mean) for one in seen):
        return {}
    missing = summary.nodata or any(one.unknown or one.nodata for one in seen)
    found: dict[str, Any] = {"nodata": [float(value) for value in summary.nodata]} if missing else {}
    nodes = [node for way in (_standard, _log, _arcsinh) if (node := way(seen)) is not None]
    return {**found, "scale": next((node for node in nodes if suits(_scale(node), summary)), nodes[0])}


def suits(scale: Scale, summary: Summary) -> bool:
    """Does every channel that varies vary by about 1 under a scale, and is no value refused or large?

    The answer keeps a margin from what `check` complains of.
    """
    if _refuses(scale, summary):
        return False
    x = scale.encode(_rows(summary))[[one.maximum > one.minimum for one in summary.channels]]
    if not len(x):
        return True
    spread, centre, most = np.nanstd(x, axis=1), np.abs(np.nanmean(x, axis=1)), float(np.nanmax(np.abs(x)))
    wide = spread.min() >= 2 * NARROW and spread.max() <= UNEQUAL / 2 * spread.min()
    return bool(wide and (centre <= 2 * np.maximum(spread, 0.4)).all() and most <= LARGE / 2)


def _refuses(scale: Scale, summary: Summary) -> bool:
    rows = _rows(summary)
    return bool(scale.outside(rows, ~np.isnan(rows))[0].any())


def _rows(summary: Summary) -> np.ndarray:
    """Some values of each channel `(channels, n)`, filled up with NaN."""
    longest = max(len(one.some) for one in summary.channels)
    rows = np.full((len(summary.channels), longest), np.nan)
    for row, one in zip(rows, summary.channels):
        row[: len(one.some)] = one.some
    return rows


def _scale(node: dict[str, Any]) -> Scale:
    rows: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in node.items()
    }
    return Scale(**rows)


def _standard(seen: Sequence[ChannelSummary]) -> dict[str, Any]:
    deviations = [one.deviation or 1.0 for one in seen]
    means = [_rounded(one.mean, deviation) for one, deviation in zip(seen, deviations)]
    return {"kind": "standard", "mean": means, "std": [_rounded(d, d) for d in deviations]}


def _log(seen: Sequence[ChannelSummary]) -> dict[str, Any] | None:
    if not all(one.minimum > 0 for one in seen):
        return None
    lows, highs = [_rounded(c.low, c.low) for c in seen], [_rounded(c.high, c.high) for c in seen]
    rising = all(0 < low < high for low, high in zip(lows, highs))
    return {"kind": "log", "low": lows, "high": highs} if rising else None


def _arcsinh(seen: Sequence[ChannelSummary]) -> dict[str, Any]:
    widths = [(one.high - one.low) / 4 or one.deviation or 1.0 for one in seen]
    centres = [_rounded(one.median, width) for one, width in zip(seen, widths)]
    return {"kind": "arcsinh", "centre": centres, "width": [_rounded(width, width) for width in widths]}


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
            return ChannelSummary(*(math.nan,) * 7, *shares, np.empty(0))
        some = np.concatenate([[self.low, self.high], *self.held])
        low, median, high = (float(value) for value in np.quantile(some, (0.01, 0.5, 0.99)))
        deviation = math.sqrt(self.squares / self.count)
        return ChannelSummary(self.low, low, median, high, self.high, self.mean, deviation, *shares, some)


def summary_of(declared: Declared, count: int) -> Summary | None:
    """The values of `count` samples from all over the set, without the config's scale; None if none can be read.

    Of `array` in the units of the files, of other modalities as the tokenizer sees them, or in units if they have
    some. Samples that cannot be read are left out.
    """
    cfg, arrays = declared.modality, (array for _, array in raw_arrays(declared, count))
    nodata = cfg.nodata or () if isinstance(cfg, Array.Config) else ()
    first = next(arrays, None)
    if first is None:
        return None
    return summarise(itertools.chain([first], arrays), channels=len(first), nodata=nodata)


def raw_arrays(declared: Declared, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Key and values `(c, *size)` of `count` samples from all over the set, as `summary_of` sees them."""
    cfg, data = declared.modality, declared.data
    free: Any = registry().build("modality", _unscaled(cfg), size=declared.spec.size)
    read = _raw if isinstance(cfg, Array.Config) else _seen
    for index in dict.fromkeys(i * len(data) // count for i in range(count)):
        array = read(free, data, index)
        if array is not None:
            yield data.key(index), array


def fills(arrays: Sequence[np.ndarray]) -> list[float]:
    """Values of arrays `(c, *size)` that are usual for what is missing, and lie far from all others of a channel.

    Each of them occurs more than once there. Channels are looked at alone: what is far in one is usual in another.
    """
    rows = [array.reshape(len(array), -1) for array in arrays]
    channels = max(map(len, rows), default=0)
    found = (_fills([one[channel] for one in rows if channel < len(one)]) for channel in range(channels))
    here = {fill for each in found for fill in each}
    return [fill for fill in _FILLS if fill in here]


def _fills(rows: Sequence[np.ndarray]) -> Iterator[float]:
    """What `fills` finds in one channel."""
    plain = np.concatenate([np.ma.compressed(row) for row in rows]).astype(np.float64)
    plain = plain[np.isfinite(plain)]
    for fill in _FILLS:
        hits = np.isclose(plain, fill, rtol=1e-6, atol=0)
        if hits.sum() < 2 or hits.all():
            continue
        low, high = float(plain[~hits].min()), float(plain[~hits].max())
        beyond = low - fill if fill < low else fill - high if fill > high else 0.0
        if beyond > 0.2 * (high - low):
            yield fill


def better(declared: Declared, *, refused: bool = False) -> str:
    """What to set instead of the scale or the range of the config; an empty text if nothing better is known.

    With `refused`, only if the config refuses some of the values.
    """
    if not declared.has_scale and getattr(declared.modality, "range", None) is None:
        return ""
    try:
        summary = summary_of(declared, SAMPLES)
    except (VqcoreError, TypeError, ValueError):  # such a modality needs its range
        return ""
    if summary is None or not all(math.isfinite(one.mean) for one in summary.channels):
        return ""
    low, high = min(c.minimum for c in summary.channels), max(c.maximum for c in summary.channels)
    if declared.has_scale:
        found = _better_scale(declared.modality, summary, (low, high), refused)
    else:
        found = _better_range(declared.modality, low, high, refused)
    return found and f"The files hold {low:.4g} to {high:.4g}: {found}"


def _better_scale(cfg: Any, summary: Summary, ends: tuple[float, float], refused: bool) -> str:
    now, bounds, proposal = scale_of(cfg), _usual(*ends), propose_scale(summary)["scale"]
    if refused and (now is None or not _refuses(now, summary)):
        return ""
    if now is not None and suits(now, summary):
        return ""
    if bounds and not cfg.scale and suits(Scale(kind="range", low=bounds[0], high=bounds[1]), summary):
        return f"set data.modality.range=[{bounds[0]:g},{bounds[1]:g}]."
    if not suits(_scale(proposal), summary):
        return "vqcore check CONFIG --values shows each channel."
    if len(summary.channels) > WRITTEN or (cfg.scale is not None and cfg.scale.kind != proposal["kind"]):
        return "vqcore check CONFIG --values prints a scale to paste."
    first = "" if cfg.range is None else "data.modality.range=null "
    return f"set {first}data.modality.scale='{flow(proposal)}'."


def _better_range(cfg: Any, low: float, high: float, refused: bool) -> str:
    """A range with a margin around all that could be read of the samples, whether the config's range fits or not."""
    bottom, top = cfg.range
    slack = SLACK * (top - bottom)
    if refused and bottom - slack <= low <= high <= top + slack:
        return ""
    margin = MARGIN * (high - low)
    better = _usual(low, high) or (low - margin, high + margin)
    return "" if better == (bottom, top) else f"set data.modality.range=[{better[0]:.4g},{better[1]:.4g}]."


def _usual(low: float, high: float) -> tuple[float, float] | None:
    """The narrowest customary range that holds these values, if they fill half of it."""
    for bottom, top in _USUAL:
        if bottom <= low and high <= top:
            return (bottom, top) if high - low >= (top - bottom) / 2 else None
    return None


def flow(node: dict[str, Any]) -> str:
    """A proposed scale as YAML on one line."""

    def text(value: Any) -> str:
        return (
            f"[{', '.join(f'{number:.10g}' for number in value)}]" if isinstance(value, list) else str(value)
        )

    return "{" + ", ".join(f"{key}: {text(value)}" for key, value in node.items()) + "}"


def _unscaled(cfg: Any) -> Any:
    if isinstance(cfg, Array.Config) and cfg.kind == "continuous":
        return dataclasses.replace(cfg, range=None, scale=None, nodata=())
    return dataclasses.replace(cfg, range=None) if getattr(cfg, "range", None) is not None else cfg


def _raw(modality: Any, data: Data, index: int) -> np.ndarray | None:
    """The channels to learn of one sample, in the units of the files."""
    try:
        return modality.learnt(opened(modality, data.get(index)).raw)
    except (VqcoreError, OSError):
        return None


def _seen(modality: Modality, data: Data, index: int) -> np.ndarray | None:
    """One sample as the tokenizer sees it, in the units of the files if the modality has them."""
    sample = Reader(data, modality, {}).try_read(index, modality.spec.size, None)
    if isinstance(sample, tuple):
        return None
    x = sample.x.unsqueeze(0)
    x = x.unsqueeze(0) if modality.spec.labels is not None else x
    known = isinstance(modality, HasValues) and modality.spec.labels is None
    array = (values(modality, x) if known else x)[0].numpy()
    if sample.mask is None:
        return array
    return np.ma.masked_array(array, np.broadcast_to(~sample.mask.numpy(), array.shape))
