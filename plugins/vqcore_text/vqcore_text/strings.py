"""Boxes, keypoints, palettes and metadata as texts of coordinate tokens, both ways, as 4M writes them.

A coordinate from 0 to 1 is one of `bins` numbers: `round(x * (bins - 1))`, so 0 and 1 are exact and the error is at
most half of `1 / (bins - 1)`. What is out of range raises `DataError`; nothing is cut silently.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from vqcore.errors import DataError, did_you_mean, listed

BINS = 1000
NONE = "none"
"""The text of no boxes, and of no instances with keypoints."""
POINT = "point"
MOST_COLOURS = BINS - 1
_TOKEN = re.compile(r"v(\d)=(\d+)")
Point = tuple[float, float] | None
"""A point (x, y) with coordinates from 0 to 1; None if it is hidden."""


@dataclass(frozen=True)
class Box:
    """A box with its label: left, top, right and bottom, from 0 to 1."""

    left: float
    top: float
    right: float
    bottom: float
    label: str


@dataclass(frozen=True)
class Instance:
    """A thing with its keypoints, in a fixed order."""

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Bins:
    """How a number of metadata becomes a bin.

    With `edges`, the bin is the number of edges that are not above the value. Without, `count` bins from `low` to
    `high`: `floor((x - low) / (high - low) * (count - 1))`, so that the last bin holds `high` alone. Bins of `step`
    begin at 0.
    """

    low: float = 0.0
    high: float = math.inf
    count: int = BINS
    step: float = 0.0
    edges: tuple[float, ...] = ()


def _counts(step: float = 1.0) -> Bins:
    return Bins(0, BINS * step, BINS, step)


FOURM_METADATA: Mapping[str, Bins] = {
    "original_width": _counts(32),
    "original_height": _counts(32),
    "caption_n_chars": _counts(),
    "caption_n_words": _counts(),
    "caption_n_sentences": _counts(),
    "n_humans": _counts(),
    "n_sam_instances": _counts(),
    "n_coco_instances": _counts(),
    "coco_instance_diversity": _counts(),
    "colorfulness": Bins(0, 150, 50),
    "brightness": Bins(0, 255, 50),
    "contrast": Bins(0, 127, 50),
    "saturation": Bins(0, 255, 50),
    "entropy": Bins(0, 10, 50),
    "walkability": Bins(0, 1, 50),
    "objectness": Bins(0, 1, 50),
    "semantic_diversity": _counts(),
    "geometric_complexity": Bins(0, 0.75, 50),
    "occlusion_score": Bins(0, 0.25, 50),
    "watermark_score": Bins(-math.inf, math.inf, 2, edges=(0.5,)),
    "aesthetic_score": Bins(-math.inf, math.inf, 3, edges=(4.5, 5.5)),
}
"""The metadata of 4M-21 (arXiv 2406.09406): the place of a name is its number, `v1=0` and so on."""


def quantized(x: float, bins: int = BINS, what: str = "a coordinate") -> int:
    """The number of a coordinate from 0 to 1: the nearest of `bins` numbers, of two the even one."""
    if not 0 <= x <= 1:
        raise DataError(f"{what} is {x}; coordinates lie from 0 to 1.")
    return round(x * (bins - 1))


def coordinate(number: int, bins: int = BINS, what: str = "a coordinate") -> float:
    """The coordinate of a number below `bins`."""
    if not 0 <= number < bins:
        raise DataError(f"{what} has the number {number}; there are {bins} bins, from 0.")
    return number / (bins - 1)


def boxes_to_text(boxes: Sequence[Box], bins: int = BINS) -> str:
    """Boxes as `v0=LEFT v1=TOP v2=RIGHT v3=BOTTOM LABEL ...`, in their order; `none` if there are none."""
    return " ".join(_box(box, bins) for box in boxes) or NONE


def _box(box: Box, bins: int) -> str:
    label = _label(box.label)
    if box.left > box.right or box.top > box.bottom:
        raise DataError(f"the box '{label}' ends before it begins: {box}.")
    sides = {"left": box.left, "top": box.top, "right": box.right, "bottom": box.bottom}
    numbers = [quantized(x, bins, f"{side} of the box '{label}'") for side, x in sides.items()]
    return " ".join([*(f"v{axis}={number}" for axis, number in enumerate(numbers)), label])


def text_to_boxes(text: str, bins: int = BINS) -> list[Box]:
    """The boxes in a text that `boxes_to_text` wrote, with the coordinates of their bins."""
    found = []
    words = _Words(text, "boxes")
    while words.more:
        sides = [coordinate(words.number(axis), bins) for axis in range(4)]
        box = Box(sides[0], sides[1], sides[2], sides[3], words.label())
        if box.left > box.right or box.top > box.bottom:
            raise DataError(f"boxes: the box '{box.label}' ends before it begins: {text!r}.")
        found.append(box)
    return found


def keypoints_to_text(instances: Sequence[Instance], bins: int = BINS) -> str:
    """Instances as `LABEL point v0=X v1=Y point none ...`, in their order; `none` if there are none."""
    found = []
    for one in instances:
        label = _label(one.label)
        if not one.points:
            raise DataError(f"'{label}' has no points; a hidden point is None.")
        found.append(label)
        for place, point in enumerate(one.points):
            numbers = [quantized(x, bins, f"point {place} of '{label}'") for x in point or ()]
            found += (
                [POINT, *(f"v{axis}={number}" for axis, number in enumerate(numbers))]
                if point
                else [POINT, NONE]
            )
    return " ".join(found) or NONE


def text_to_keypoints(text: str, bins: int = BINS) -> list[Instance]:
    """The instances in a text that `keypoints_to_text` wrote, with the coordinates of their bins."""
    found = []
    words = _Words(text, "keypoints")
    while words.more:
        label, points = words.label(), list[Point]()
        while words.take(POINT):
            hidden = words.take(NONE)
            points.append(
                None if hidden else (coordinate(words.number(0), bins), coordinate(words.number(1), bins))
            )
        if not points:
            raise words.wrong(f"'{label}' has no points")
        found.append(Instance(label, tuple(points)))
    return found


def palette_to_text(colours: Sequence[tuple[int, int, int]]) -> str:
    """Colours (red, green, blue), each from 0 to 255, as `v1=NUMBER v0=RED v0=GREEN v0=BLUE ...`."""
    if not 1 <= len(colours) <= MOST_COLOURS:
        raise DataError(f"a palette has 1 to {MOST_COLOURS} colours, not {len(colours)}.")
    for colour in colours:
        if len(colour) != 3 or not all(isinstance(level, Integral) and 0 <= level <= 255 for level in colour):
            raise DataError(
                f"{tuple(colour)} is no colour: red, green and blue are whole numbers from 0 to 255."
            )
    return " ".join([f"v1={len(colours)}", *(f"v0={level}" for colour in colours for level in colour)])


def text_to_palette(text: str) -> list[tuple[int, int, int]]:
    """The colours in a text that `palette_to_text` wrote."""
    words = _Words(text, "palette")
    count = words.number(1)
    found = [(words.number(0), words.number(0), words.number(0)) for _ in range(count)]
    if words.more:
        raise words.wrong(f"it goes on after {count} colours")
    palette_to_text(found)
    return found


def metadata_to_text(
    values: Mapping[str, float], names: Mapping[str, Bins] = FOURM_METADATA, *, clip: bool = False
) -> str:
    """Numbers by name as `v1=NAME v0=BIN ...`, in their order. With `clip`, as in 4M, the ends take what is beyond."""
    found = []
    order = list(names)
    for name, value in values.items():
        if name not in names:
            raise DataError(f"metadata has no '{name}'.{did_you_mean(name, order)} It has: {listed(order)}.")
        found += [f"v1={order.index(name)}", f"v0={_bin(name, names[name], value, clip)}"]
    return " ".join(found)


def text_to_metadata(text: str, names: Mapping[str, Bins] = FOURM_METADATA) -> dict[str, float]:
    """The numbers in a text that `metadata_to_text` wrote: the middle of each bin, which is in the same bin again."""
    found: dict[str, float] = {}
    order = list(names)
    words = _Words(text, "metadata")
    while words.more:
        number = words.number(1)
        if number >= len(order):
            raise words.wrong(f"v1={number} is no name; there are {len(order)}, from 0")
        name = order[number]
        if name in found:
            raise words.wrong(f"'{name}' is there twice")
        found[name] = _middle(name, names[name], words.number(0))
    return found


def _bin(name: str, bins: Bins, value: float, clip: bool) -> int:
    if math.isnan(value):
        raise DataError(f"metadata: {name} is no number.")
    if bins.edges:
        return sum(value >= edge for edge in bins.edges)
    low, high = bins.low, bins.high
    if clip:
        value = min(max(value, low), high)
    if bins.step:
        number = min(int(value // bins.step), bins.count - 1) if clip else math.floor(value / bins.step)
        if not 0 <= number < bins.count:
            raise DataError(f"metadata: {name} is {value}; it lies from {low:g} to below {high:g}.")
        return number
    if not low <= value <= high:
        raise DataError(f"metadata: {name} is {value}; it lies from {low:g} to {high:g}.")
    return int((value - low) / (high - low) * (bins.count - 1))


def _middle(name: str, bins: Bins, number: int) -> float:
    if not 0 <= number < bins.count:
        raise DataError(f"metadata: {name} has bin {number}; there are {bins.count}, from 0.")
    if bins.edges:
        inside = (bins.edges[0] - 1, *bins.edges, bins.edges[-1] + 1)
        return (inside[number] + inside[number + 1]) / 2
    if bins.step:
        return number * bins.step + (bins.step / 2 if bins.step > 1 else 0)
    return bins.low + (bins.high - bins.low) * min(number + 0.5, bins.count - 1) / (bins.count - 1)


def _label(label: str) -> str:
    """A label as it stands in a text; one that would be read as something else is refused."""
    words = label.split()
    if not words or any(_TOKEN.fullmatch(word) for word in words) or {POINT, NONE} & set(words):
        raise DataError(
            f"'{label}' is no label: it needs letters, and no coordinate, '{POINT}' or '{NONE}' in it."
        )
    return " ".join(words)


class _Words:
    """The words of a text, one after the other."""

    def __init__(self, text: str, what: str):
        self.text, self.what, self._at = text, what, 0
        self._words = text.split()
        if self._words == [NONE] and what in ("boxes", "keypoints"):
            self._words = []
        elif not self._words:
            raise self.wrong("there are no words")

    @property
    def more(self) -> bool:
        return self._at < len(self._words)

    def number(self, axis: int) -> int:
        """The number of the next word, which must be the coordinate `axis`."""
        word = self._words[self._at] if self.more else "the end"
        found = _TOKEN.fullmatch(word)
        if found is None or int(found[1]) != axis:
            raise self.wrong(f"word {self._at + 1} is {word}, not v{axis}=...")
        self._at += 1
        return int(found[2])

    def take(self, wanted: str) -> bool:
        """Whether the next word is this one, which is then taken."""
        taken = self.more and self._words[self._at] == wanted
        self._at += taken
        return taken

    def label(self) -> str:
        """The words up to the next coordinate or point."""
        words = list(self._until())
        if not words:
            raise self.wrong(f"there is no label at word {self._at + 1}")
        return " ".join(words)

    def wrong(self, why: str) -> DataError:
        shown = self.text if len(self.text) <= 80 else f"{self.text[:77]}..."
        return DataError(f"{self.what}: {why}: {shown!r}.")

    def _until(self) -> Iterator[str]:
        while self.more and not _TOKEN.fullmatch(word := self._words[self._at]) and word not in (POINT, NONE):
            self._at += 1
            yield word
