"""One instance of a picture, as pixels or as polygons: its box, its part inside a crop, and its mask at any size.

As in 4M, polygons are filled after the crop, at the final size. Differs from 4M, which cuts the polygons themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]
"""Top, left, bottom, right in whole pixels; bottom and right are exclusive."""
FINE = 4
"""Polygons are filled at so many times the size and then averaged: Pillow fills whole pixels and the border too."""


@dataclass(frozen=True)
class Piece:
    """One instance in pixels: its mask within its tight box, and the first row and column of the box."""

    top: int
    left: int
    mask: Bool[np.ndarray, "h w"]

    @property
    def box(self) -> Box:
        """The tight box."""
        return self.top, self.left, self.top + self.mask.shape[0], self.left + self.mask.shape[1]

    def cut(self, box: Box) -> "Piece | None":
        """The part inside a box, or None if nothing is inside."""
        inner = _common(self.box, box)
        if inner is None:
            return None
        rows = slice(inner[0] - self.top, inner[2] - self.top)
        return tight(Piece(inner[0], inner[1], self.mask[rows, inner[1] - self.left : inner[3] - self.left]))

    def stretched(self, size: tuple[int, ...]) -> Bool[np.ndarray, "height width"]:
        """The mask with its box stretched to a size; values above half of the highest filtered value are inside."""
        return stretched(self.mask, size)


@dataclass(frozen=True)
class Outline:
    """One instance as the union of closed polygons (x and y in pixels), and a box in whole pixels around it."""

    rings: tuple[Float[np.ndarray, "_ 2"], ...]
    box: Box

    def cut(self, box: Box) -> "Outline | None":
        """The part inside a box, or None. The polygons stay the same; only their part inside the new box is drawn."""
        inner = _common(self.box, box)
        if inner is None or inner == self.box:
            return None if inner is None else self
        drawn = tight(
            Piece(inner[0], inner[1], self._drawn(inner, (inner[2] - inner[0], inner[3] - inner[1])))
        )
        return None if drawn is None else Outline(self.rings, drawn.box)

    def stretched(self, size: tuple[int, ...]) -> Bool[np.ndarray, "height width"]:
        """The mask with its box stretched to a size."""
        return self._drawn(self.box, size)

    def _drawn(self, box: Box, size: tuple[int, ...]) -> Bool[np.ndarray, "height width"]:
        """The part inside a box, drawn at a size."""
        top, left, bottom, right = box
        canvas = Image.new("L", (size[1] * FINE, size[0] * FINE))
        draw = ImageDraw.Draw(canvas)
        scale = np.array([canvas.width / (right - left), canvas.height / (bottom - top)])
        for ring in self.rings:
            # Pillow's pixel i has its centre at i, not at i + 1/2.
            draw.polygon(((ring - (left, top)) * scale - 0.5).flatten().tolist(), fill=255)
        return _upper_half(canvas.resize((size[1], size[0]), Image.Resampling.BOX))


def outline(rings: Sequence[Float[np.ndarray, "_ 2"]], extent: tuple[int, int]) -> Outline | None:
    """The instance of these polygons in a picture of this extent, or None when all of it lies outside."""
    points = np.concatenate(rings)
    (left, top), (right, bottom) = np.floor(points.min(0)), np.ceil(points.max(0))
    if left == right or top == bottom:
        return None
    whole = Outline(tuple(rings), (int(top), int(left), int(bottom), int(right)))
    return whole.cut((0, 0, *extent))


def tight(piece: Piece) -> Piece | None:
    """The same instance in its smallest box, or None when it is empty."""
    rows, columns = np.flatnonzero(piece.mask.any(1)), np.flatnonzero(piece.mask.any(0))
    if not rows.size:
        return None
    mask = piece.mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Piece(piece.top + int(rows[0]), piece.left + int(columns[0]), mask)


def stretched(mask: Bool[np.ndarray, "h w"], size: tuple[int, ...]) -> Bool[np.ndarray, "height width"]:
    """A mask at another size; values above half of the highest filtered value are inside."""
    if mask.shape == size:
        return mask
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return _upper_half(grey.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _upper_half(grey: Image.Image) -> Bool[np.ndarray, "h w"]:
    levels = np.asarray(grey)
    return levels > levels.max() / 2  # the maximum is below 255 where an instance is thinner than a pixel


def _common(one: Box, other: Box) -> Box | None:
    """The overlap of two boxes."""
    top, left = max(one[0], other[0]), max(one[1], other[1])
    bottom, right = min(one[2], other[2]), min(one[3], other[3])
    return (top, left, bottom, right) if top < bottom and left < right else None
