"""Colours for pictures: a perceptual colour scale for measured values, distinct colours for classes."""

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

VIRIDIS = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 73, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (110, 206, 88),
    (181, 222, 43),
    (253, 231, 37),
)
"""Ten evenly spaced colours of matplotlib's viridis (CC0), whose brightness grows evenly."""
GREY = (128, 128, 128)
"""The colour of positions without a value."""


def gradient(share: Float[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"] | None = None) -> Image.Image:
    """A picture of values from 0 (dark blue) to 1 (yellow); values outside are clipped. Grey where `valid` is False."""
    stops = np.linspace(0, 1, len(VIRIDIS))
    table = np.array(VIRIDIS)
    colours = np.stack([np.interp(share, stops, table[:, channel]) for channel in range(3)], axis=-1)
    if valid is not None:
        colours = np.where(valid[..., None], colours, GREY)
    return Image.fromarray(colours.round().astype(np.uint8))


def class_colours(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Distinct colours for classes, as in PASCAL VOC; class 0 is black.

    Bits 0, 3, 6, ... of the id become the bits of red, the highest first; bits 1, 4, ... green; bits 2, 5, ... blue.
    """
    ids = np.arange(count)
    colours = np.zeros((count, 3), dtype=np.uint8)
    for channel in range(3):
        for place in range(8):
            bit = ids >> (3 * place + channel) & 1
            colours[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colours


def coloured(classes: Int[np.ndarray, "h w"], colours: UInt8[np.ndarray, "k 3"]) -> Image.Image:
    """A picture of class ids; ids beyond the table of colours start again at its first colour."""
    return Image.fromarray(colours[classes % len(colours)])
