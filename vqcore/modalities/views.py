"""Which part of a sample becomes the tensor: boxes with a wanted aspect ratio, centred or random, from its extent.

A box is `(start, sides)` in whole pixels. A `View` has fractions of the extent, so that it fits extra modalities too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vqcore.config import Config
from vqcore.errors import DataError, SettingError
from vqcore.protocols import Sizing, View

Box = tuple[tuple[int, ...], tuple[int, ...]]
TRIES = 10
"""Number of random boxes before the centred box is taken, as in torchvision's RandomResizedCrop."""


@dataclass(frozen=True, kw_only=True)
class CropConfig(Config):
    """How training samples of planar data are cropped and mirrored. A finished tokenizer ignores these settings."""

    training_only: ClassVar[tuple[str, ...]] = ("hflip", "min_crop_scale", "ratio")

    hflip: float = 0.5
    """Share of the training samples that are mirrored left to right."""
    min_crop_scale: float = 0.8
    """Smallest share of a sample's area that a training crop keeps; the largest share is 1."""
    ratio: tuple[float, float] = (0.75, 1.3333333)
    """Smallest and largest factor on the aspect ratio of a training crop."""

    def __post_init__(self) -> None:
        if not 0 <= self.hflip <= 1:
            raise SettingError("hflip", f"{self.hflip} must lie in 0..1")
        if not 0 < self.min_crop_scale <= 1:
            raise SettingError("min_crop_scale", f"{self.min_crop_scale} must lie in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise SettingError("ratio", f"{list(self.ratio)} must be two positive numbers in ascending order")


def crop_view(
    cfg: CropConfig, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None
) -> View:
    """A random resized crop and a flip, or with `rng=None` the largest centred box."""
    if rng is None:
        return view_of(centred_box(extent, size), extent, size)
    box = resized_crop_box(extent, size, rng, cfg.min_crop_scale, cfg.ratio)
    flip = bool(rng.random() < cfg.hflip)
    return view_of(box, extent, size, flip=flip, draw=int(rng.integers(1, 2**63)))


def view_of(
    box: Box, extent: tuple[int, ...], size: tuple[int, ...], flip: bool = False, draw: int = 0
) -> View:
    """A view of this box, as fractions of the extent."""
    start, sides = box
    return View(
        start=tuple(a / n for a, n in zip(start, extent)),
        stop=tuple((a + side) / n for a, side, n in zip(start, sides, extent)),
        size=size,
        flip=flip,
        draw=draw,
        extent=tuple(extent),
    )


def pixels(view: View, extent: Sequence[int | float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Start and stop of a view in pixels: whole numbers if the view was drawn for this extent."""
    # A millionth of a pixel is more than the rounding error of the division in `view_of`, and too little to matter.
    start = tuple(round(a * n, 6) for a, n in zip(view.start, extent))
    return start, tuple(round(a * n, 6) for a, n in zip(view.stop, extent))


def centred_box(extent: tuple[int, ...], size: tuple[int, ...]) -> Box:
    """The largest centred box with the aspect ratio of `size`."""
    sides = _largest(extent, size, 1.0)
    return tuple((n - side) // 2 for n, side in zip(extent, sides)), sides


def scaled_box(
    extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator, min_scale: float
) -> Box:
    """A box with the aspect ratio of `size` at a random place; its volume is `min_scale` to 1 of the largest box."""
    scale = rng.uniform(min_scale, 1.0) ** (1 / len(extent))
    return _anywhere(extent, _largest(extent, size, scale), rng)


def sized_box(
    extent: tuple[int, ...],
    size: tuple[int, ...],
    how: tuple[Sizing, ...],
    rng: np.random.Generator | None,
    min_scale: float = 1.0,
) -> Box:
    """The part of a sample that `how` names for each axis; `rng` draws windows, and crops of `min_scale` to 1.

    Without `rng`, all parts are centred. Raises `DataError` for a sample that is too long for `pad`.
    """
    elastic = [axis for axis, each in enumerate(how) if each in ("resize", "crop")]
    scales = rng is not None and min_scale < 1 and bool(elastic)
    scale = rng.uniform(min_scale, 1.0) ** (1 / len(elastic)) if rng is not None and scales else 1.0
    cropped = [axis for axis, each in enumerate(how) if each == "crop"]
    sides = [min(pair) for pair in zip(extent, size)]
    for axis in elastic:
        sides[axis] = max(1, round(extent[axis] * scale))
    if cropped:
        box = _largest(tuple(extent[a] for a in cropped), tuple(size[a] for a in cropped), scale)
        sides = [box[cropped.index(axis)] if axis in cropped else side for axis, side in enumerate(sides)]
    for n, side, each in zip(extent, size, how):
        if each == "pad" and n > side:
            raise DataError(
                f"{n} positions are more than the {side} of data.input_size, and sizing=pad takes all of a sample. "
                "Take a larger input_size, or data.modality.sizing=window"
            )
    centre = tuple((n - side) // 2 for n, side in zip(extent, sides))
    if rng is None or not (scales or "window" in how):
        return centre, tuple(sides)
    places, _ = _anywhere(extent, tuple(sides), rng)
    free = tuple(each == "window" or (scales and axis in elastic) for axis, each in enumerate(how))
    return tuple(a if loose else b for a, b, loose in zip(places, centre, free)), tuple(sides)


def resized_crop_box(
    extent: tuple[int, ...],
    size: tuple[int, ...],
    rng: np.random.Generator,
    min_scale: float,
    ratio: tuple[float, float],
) -> Box:
    """A random resized crop (Inception's, arXiv 1409.4842, section 6) of a picture `(h, w)`.

    Its area is `min_scale` to 1 of the picture's area. Its aspect ratio w/h is that of `size` times a factor drawn
    log-uniformly from `ratio`. If no random box fits, it is the largest centred box within `ratio`.
    """
    height, width = extent
    aspect = size[1] / size[0]
    for _ in range(TRIES):
        scale, factor = rng.random(2).tolist()
        area = height * width * (min_scale + (1 - min_scale) * scale)
        drawn = aspect * ratio[0] * (ratio[1] / ratio[0]) ** factor
        sides = (round(math.sqrt(area / drawn)), round(math.sqrt(area * drawn)))
        if 0 < sides[0] <= height and 0 < sides[1] <= width:
            return _anywhere(extent, sides, rng)
    sides = _sides_within(extent, aspect * ratio[0], aspect * ratio[1])
    return tuple((n - side) // 2 for n, side in zip(extent, sides)), sides


def smallest_crop(cfg: CropConfig, extent: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """Smallest sides of a training crop of a picture, up to rounding to whole pixels."""
    height, width = extent
    low, high = (size[1] / size[0] * factor for factor in cfg.ratio)
    area = height * width * cfg.min_crop_scale
    drawn = (math.floor(math.sqrt(area / high)), math.floor(math.sqrt(area * low)))
    return tuple(map(min, drawn, _sides_within(extent, low, high)))


def _sides_within(extent: tuple[int, ...], low: float, high: float) -> tuple[int, int]:
    """The largest sides of a box whose aspect ratio w/h lies between `low` and `high`."""
    height, width = extent
    nearest = min(max(width / height, low), high)
    return min(height, max(1, round(width / nearest))), min(width, max(1, round(height * nearest)))


def _largest(extent: tuple[int, ...], size: tuple[int, ...], scale: float) -> tuple[int, ...]:
    # The limiting axis keeps its length exactly, so that a matching aspect ratio gives the whole sample.
    n, side = min(zip(extent, size), key=lambda pair: pair[0] / pair[1])
    whole = (min(room, max(1, round(wanted * n / side))) for room, wanted in zip(extent, size))
    return tuple(max(1, round(length * scale)) for length in whole)


def _anywhere(extent: tuple[int, ...], sides: tuple[int, ...], rng: np.random.Generator) -> Box:
    shares = rng.random(len(extent)).tolist()
    places = (n - side for n, side in zip(extent, sides))
    return tuple(min(last, int((last + 1) * share)) for last, share in zip(places, shares)), sides
