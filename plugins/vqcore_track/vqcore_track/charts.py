"""Charts as inline SVG: a few hundred bytes of shapes, coloured by the page's style, with values as tooltips.

Every chart is drawn for one column of the page at its natural size, so that its letters are as large as the text's.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 360, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 36
MOST_POINTS = 120
"""Points of a curve; a longer one is shown by the means over as many equal parts."""
MOST_SERIES = 8


@dataclass(frozen=True)
class Series:
    """One curve. `marked` draws its points: measured now and then, not all the time."""

    label: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


@dataclass(frozen=True)
class Mark:
    """A step at which something happened."""

    x: float
    text: str


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
        return self.start + (at - low) / ((high - low) or 1.0) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values inside, about four."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def line_chart(
    title: str, series: Sequence[Series], *, unit: str = "", marks: Iterable[Mark] = (), log: bool = True
) -> str:
    """Curves over steps. Values that are not finite are left out; `log` allows a logarithmic axis over wide ranges."""
    finite = [Series(s.label, thinned(s.points), s.marked) for s in series[:MOST_SERIES]]
    values = [y for s in finite for _, y in s.points]
    steps = [x for s in finite for x, _ in s.points]
    if not values:
        return ""
    across = Scale(min(0.0, *steps), max(1.0, *steps), _LEFT, WIDTH - _RIGHT)
    log = log and min(values) > 0 and max(values) > 8 * min(values)
    low, high = _padded(min(values), max(values), log)
    up = Scale(low, high, HEIGHT - _BOTTOM, _TOP, log)
    parts = [_axes(across, up, "step")]
    for mark in marks:
        if across.low <= mark.x <= across.high:
            x = f"{across(mark.x):.1f}"
            parts.append(
                f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}">'
                f"<title>step {mark.x:g}: {escape(mark.text)}</title></line>"
            )
    parts += [_curve(s, index, across, up, unit) for index, s in enumerate(finite)]
    last = [f"{s.label} {short(s.points[-1][1])}{_unit(unit)}" for s in finite if s.points]
    scale = ", logarithmic" if log else ""
    return _figure(title, f"{title} over steps{scale}; last {'; '.join(last)}", parts, _legend(finite, unit))


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, across: str, what: str) -> str:
    """Bars with their values above them. `across` names the horizontal axis, `what` a value."""
    top = max([value for _, value in bars] + [1.0])
    up = Scale(0.0, top * 1.12, HEIGHT - _BOTTOM, _TOP)
    room = (WIDTH - _LEFT - _RIGHT) / len(bars)
    parts = [_rules(up)]
    for index, (label, value) in enumerate(bars):
        x, y = _LEFT + index * room, up(value)
        middle = f'class="t" x="{x + room / 2:.1f}" text-anchor="middle"'
        parts.append(
            f'<rect class="bar" x="{x + room * 0.12:.1f}" y="{y:.1f}" width="{room * 0.76:.1f}" '
            f'height="{HEIGHT - _BOTTOM - y:.1f}" rx="2">'
            f"<title>{escape(label)}: {short(value)} {escape(what)}</title></rect>"
            f'<text {middle} y="{HEIGHT - _BOTTOM + 15}">{escape(label)}</text>'
        )
        if value:
            parts.append(f'<text {middle} y="{y - 4:.1f}">{short(value)}</text>')
    parts.append(_name(across))
    said = ", ".join(f"{label}: {short(value)}" for label, value in bars)
    return _figure(title, f"{title}. {what} by {across}: {said}", parts, "")


def rank_chart(title: str, books: Sequence[Sequence[int]], *, labels: Sequence[str]) -> str:
    """How often each code occurs, most frequent first, one curve a codebook; codes that never occur are not drawn."""
    ordered = [sorted((count for count in book if count), reverse=True) for book in books[:MOST_SERIES]]
    size = max(len(book) for book in books)
    top = max([book[0] for book in ordered if book] + [1])
    across = Scale(1.0, float(max(size, 2)), _LEFT, WIDTH - _RIGHT)
    up = Scale(0.8, top * 1.3, HEIGHT - _BOTTOM, _TOP, log=True)
    parts = [_axes(across, up, "codes, most frequent first")]
    series = []
    for index, book in enumerate(ordered):
        points = [(float(rank), float(count)) for rank, count in enumerate(book, 1)]
        every = max(1, math.ceil(len(points) / MOST_POINTS))
        series.append(Series(labels[index], points[::every] + points[-1:]))
        parts.append(_curve(series[-1], index, across, up, "times", "code number", area=len(books) == 1))
    used = ", ".join(f"{labels[i]}: {len(book)} of {size}" for i, book in enumerate(ordered))
    return _figure(
        title, f"{title}; codes in use: {used}", parts, _legend(series, "") if len(series) > 1 else ""
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The finite points, at most `MOST_POINTS`: means over equal parts where there are more; the last one stays."""
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
    if log:
        return low / 1.15, high * 1.15
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < 0.3 * high else low - room), high + room


def _axes(across: Scale, up: Scale, name: str) -> str:
    parts = [_rules(up)]
    for tick in across.ticks():
        x = across(tick)
        anchor = "end" if x > WIDTH - _RIGHT - 8 else "middle"
        parts.append(
            f'<text class="t" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="{anchor}">{short(tick)}</text>'
        )
    return "".join(parts) + _name(name)


def _rules(up: Scale) -> str:
    parts = []
    for tick in up.ticks():
        y = f"{up(tick):.1f}"
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="t" x="{_LEFT - 6}" y="{y}" dy=".35em" text-anchor="end">{short(tick)}</text>'
        )
    base = HEIGHT - _BOTTOM
    return "".join(parts) + f'<line class="base" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'


def _name(text: str) -> str:
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return f'<text class="t" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(text)}</text>'


def _curve(
    series: Series, index: int, across: Scale, up: Scale, unit: str, at: str = "step", area: bool = False
) -> str:
    places = [(across(x), up(y), x, y) for x, y in series.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    parts = []
    if area and places:
        base = HEIGHT - _BOTTOM
        parts.append(
            f'<polygon class="area" points="{places[0][0]:.1f},{base} {line} {places[-1][0]:.1f},{base}"/>'
        )
    parts.append(f'<polyline points="{line}"/>')
    mark = "dot" if series.marked or len(places) == 1 else "hit"
    for x, y, step, value in places:
        tip = f"{series.label}, {at} {step:g}: {value:.5g}{_unit(unit)}"
        parts.append(
            f'<circle class="{mark}" cx="{x:.1f}" cy="{y:.1f}"><title>{escape(tip)}</title></circle>'
        )
    return f'<g class="s{index}">{"".join(parts)}</g>'


def _legend(series: Sequence[Series], unit: str) -> str:
    items = [
        f'<li class="s{index}"><span class="key{" round" if s.marked else ""}"></span>{escape(s.label)}'
        f" <b>{short(s.points[-1][1])}{escape(_unit(unit))}</b></li>"
        for index, s in enumerate(series)
        if s.points
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _unit(unit: str) -> str:
    return unit if unit in ("", "%") else f" {unit}"


def _figure(title: str, said: str, parts: Sequence[str], legend: str) -> str:
    return (
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg></figure>'
    )
