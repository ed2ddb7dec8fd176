"""Edge maps: one 8-bit channel, 0 (no edge) to 255, as Canny or another detector wrote them.

The files are the contract; no detector runs here. Differs from 4M: its edge tokenizers were declared with one channel
and read three, which cannot run; here three equal channels are read as one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vqcore.errors import DataError
from vqcore.modalities.planes import SUFFIXES, Smooth, cut_planes, name_of, read_planes
from vqcore.modalities.views import CropConfig, crop_view
from vqcore.protocols import DataSpec, View, expand

COLOURED = 16
"""Levels by which the channels of a grey picture may differ: JPEG does that."""


class Edge:
    """Edge maps as `(1, h, w)` in [-1, 1]; an edge is above 0."""

    suffixes = SUFFIXES
    metrics = ("psnr", "f1")

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings of edge maps."""

        resample: Smooth = "bicubic"
        """Pillow's filter for resizing; those that average make thin edges grey."""

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError("edge maps have no size of their own: set data.input_size")
        self.cfg = cfg
        self.spec = DataSpec(channels=1, size=expand(size, 2), loss="smooth_l1")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, picture or array `(h, w)` of 8 bits or booleans as `(1, h, w)`, 0 to 255.

        Raises `DataError` when it is damaged, has more bits or colours, or is brightest at 1: such a file has ones for
        edges, and on a scale to 255 they would be none. One of zeros alone has no edge, which is fine.
        """
        raw = read_planes(source, (("Y",),), _grey)
        is_bool = isinstance(source, np.ndarray) and source.dtype == np.bool_
        if raw.dtype != np.uint8:
            raise DataError(
                f"{name_of(source)}: holds values of type {raw.dtype}; edge maps are 8-bit, 0 to 255"
            )
        if is_bool:
            return raw * np.uint8(255)
        if raw.max() == 1:
            raise DataError(
                f"{name_of(source)}: holds 0 and 1 alone, where an edge is 255; save it again times 255"
            )
        return raw

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Height and width in pixels."""
        return raw.shape[1:]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop and a flip, or with `rng=None` the largest centred box."""
        return crop_view(self.cfg, extent, size, rng)

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "1 h w"]:
        """The part that a view names, at the view's size, in [-1, 1]."""
        part = np.ascontiguousarray(cut_planes(raw, view, self.cfg.resample))
        x = torch.from_numpy(part).float().div_(255).sub_(0.5).div_(0.5)
        return x.flip(-1) if view.flip else x

    def show(self, x: Float[Tensor, "*b 1 h w"]) -> Image.Image:
        """One sample as an 8-bit grey picture, which `read` takes; values outside [-1, 1] are clamped."""
        x = x.detach().cpu().float()
        x = rearrange(x if x.ndim == 3 else rearrange(x, "1 c h w -> c h w"), "1 h w -> h w")
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        # Nothing brighter than 1 of 255 is no edge; written so, it would be taken for a file of zeros and ones.
        return Image.fromarray((levels * (levels.max() > 1)).numpy())


def _grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        raise DataError(f"holds 16-bit grey or floats (mode {image.mode}); edge maps are 8-bit pictures")
    rgb = np.asarray(image.convert("RGB"))
    if np.ptp(rgb, axis=-1).max() > COLOURED:
        raise DataError("holds colours; an edge map is a grey picture (perhaps this is the photograph?)")
    return rearrange(np.asarray(image.convert("L")), "h w -> 1 h w")
