"""Charts: values become places in a drawing of a few hundred bytes; `templates/charts.html.j2` writes the SVG.

Every chart is drawn for one column of the page at its natural size, so that its letters are as large as the text's.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MOST_POINTS = 120
"""Points of a curve. A longer curve is divided into this many equal parts, and the mean of each part is shown."""
MOST_SERIES = 8


@dataclass(frozen=True)
class Box:
    """The size of a drawing and the edges of the area inside its axes, in pixels from the upper left corner."""

    width: int = 360
    height: int = 216
    left: int = 48
    right: int = 348
    top: int = 12
    bottom: int = 180


BOX = Box()


@dataclass(frozen=True)
class Series:
    """The values of one curve. `marked` draws each point: for values that are measured now and then."""

    label: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


@dataclass(frozen=True)
class Event:
    """Something that happened at a step."""

    step: float
    text: str


@dataclass(frozen=True)
class Place:
    """A point in the drawing and its tooltip."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Curve:
    """One curve in the drawing. `last` is its last value with the unit; `area` fills the space below the curve."""

    label: str
    last: str
    places: list[Place]
    marked: bool
    area: bool = False

    @property
    def points(self) -> str:
        """All places as SVG writes them."""
        return " ".join(f"{place.x},{place.y}" for place in self.places)


@dataclass(frozen=True)
class Bar:
    """One bar in the drawing, from `y` down to the axis, with its value above (empty for none) and its label below."""

    x: float
    y: float
    width: float
    middle: float
    label: str
    value: str
    tip: str


@dataclass(frozen=True)
class Chart:
    """A drawing. `rules` are horizontal lines with labels, `ticks` labels below; `spoken` is for screen readers."""

    title: str
    spoken: str
    across: str
    rules: list[tuple[float, str]]
    ticks: list[tuple[float, str]] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    legend: bool = False
    box: Box = BOX


@dataclass(frozen=True)
class Scale:
    """From values to places along one axis: linear, or logarithmic for positive values."""

    low: float
    high: float
    start: int
    stop: int
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (at - low) / ((high - low) or 1.0) * (self.stop - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """The places of about four round values inside, and their labels."""
        found = _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)
        return [(self(value), short(value)) for value in found]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    events: Iterable[Event] = (),
    log: bool = True,
    across: str = "step",
) -> Chart | None:
    """Curves; None without a finite value. `log` allows a logarithmic axis for values over a wide range.

    `across` names what a curve goes over.
    """
    finite = [Series(s.label, thinned(s.points), s.marked) for s in series[:MOST_SERIES]]
    finite = [s for s in finite if s.points]
    if not finite:
        return None
    values = [y for s in finite for _, y in s.points]
    steps = [x for s in finite for x, _ in s.points]
    along = Scale(min(0.0, *steps), max(1.0, *steps), BOX.left, BOX.right)
    log = log and min(values) > 0 and max(values) > 8 * min(values)
    low, high = _padded(min(values), max(values), log)
    up = Scale(low, high, BOX.bottom, BOX.top, log)
    last = "; ".join(f"{s.label} {with_unit(short(s.points[-1][1]), unit)}" for s in finite)
    return Chart(
        title=title,
        spoken=f"{title} over {across}s{', logarithmic' if log else ''}; last {last}",
        across=across,
        rules=up.ticks(),
        ticks=along.ticks(),
        events=[
            (along(event.step), f"{across} {event.step:g}: {event.text}")
            for event in events
            if along.low <= event.step <= along.high
        ],
        curves=[_curve(s, along, up, unit, across) for s in finite],
        legend=True,
    )


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, across: str, what: str) -> Chart:
    """Bars with their values above them. `across` names the horizontal axis, `what` names what a bar counts."""
    top = max([value for _, value in bars] + [1.0])
    up = Scale(0.0, top * 1.12, BOX.bottom, BOX.top)
    room = (BOX.right - BOX.left) / len(bars)
    return Chart(
        title=title,
        spoken=f"{title}. {what} by {across}: "
        + ", ".join(f"{label}: {short(value)}" for label, value in bars),
        across=across,
        rules=up.ticks(),
        bars=[
            Bar(
                x=round(BOX.left + room * (index + 0.12), 1),
                y=up(value),
                width=round(room * 0.76, 1),
                middle=round(BOX.left + room * (index + 0.5), 1),
                label=label,
                value=short(value) if value else "",
                tip=f"{label}: {short(value)} {what}",
            )
            for index, (label, value) in enumerate(bars)
        ],
    )


def rank_chart(title: str, books: Sequence[Sequence[int]], *, labels: Sequence[str]) -> Chart:
    """How often each code occurs, most frequent first, one curve a codebook. Codes that never occur are not drawn."""
    ordered = [sorted((count for count in book if count), reverse=True) for book in books[:MOST_SERIES]]
    size = max(len(book) for book in books)
    top = max([book[0] for book in ordered if book] + [1])
    across = Scale(1.0, float(max(size, 2)), BOX.left, BOX.right)
    up = Scale(0.8, top * 1.3, BOX.bottom, BOX.top, log=True)
    curves = []
    for label, book in zip(labels, ordered):
        points = [(float(rank), float(count)) for rank, count in enumerate(book, 1)]
        every = max(1, math.ceil(len(points) / MOST_POINTS))
        if points:
            series = Series(label, points[::every] + points[-1:])
            curves.append(_curve(series, across, up, "times", "code number", area=len(books) == 1))
    used = ", ".join(f"{label}: {len(book)} of {size}" for label, book in zip(labels, ordered))
    return Chart(
        title=title,
        spoken=f"{title}; codes in use: {used}",
        across="codes, most frequent first",
        rules=up.ticks(),
        ticks=across.ticks(),
        curves=curves,
        legend=len(curves) > 1,
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The finite points. Where there are more than `MOST_POINTS`: the means of equal parts, and the last point."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) <= MOST_POINTS:
        return points
    edges = [round(part * (len(points) - 1) / (MOST_POINTS - 1)) for part in range(MOST_POINTS)]
    means = []
    for start, stop in pairwise(edges):
        part = points[start:stop]
        means.append((part[-1][0], math.fsum(y for _, y in part) / len(part)))
    return [*means, points[-1]]


def short(value: float | int) -> str:
    """A number in few letters: 0.0123, 12.3k, 4e-5."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def with_unit(number: str, unit: str) -> str:
    """A number with its unit, if it has one."""
    return f"{number}{unit}" if unit in ("", "%") else f"{number} {unit}"


def _curve(
    series: Series, across: Scale, up: Scale, unit: str, at: str = "step", area: bool = False
) -> Curve:
    return Curve(
        label=series.label,
        last=with_unit(short(series.points[-1][1]), unit),
        places=[
            Place(across(x), up(y), f"{series.label}, {at} {x:g}: {with_unit(f'{y:.5g}', unit)}")
            for x, y in series.points
        ],
        marked=series.marked or len(series.points) == 1,
        area=area,
    )


def _ticks(low: float, high: float) -> list[float]:
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**e for e in decades for f in factors if low <= f * 10.0**e <= high]
        if len(found) >= 3:
            break
    every = math.ceil(len(found) / 6)
    return found[::every]


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """The range of the vertical axis: a little more than that of the values, from 0 where 0 is near."""
    if log:
        return low / 1.15, high * 1.15
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low <= 0.3 * high else low - room), high + room
