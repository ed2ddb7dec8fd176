"""Edge maps: one 8-bit channel, from 0 (no edge) to 255, written beforehand by Canny or another detector.

No detector runs here. Differs from 4M: its edge tokenizers declare one channel and read three, which cannot run; here
three equal channels are read as one channel.
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
"""Levels by which the channels of a grey picture may differ, as they do after JPEG compression."""


class Edge:
    """Edge maps as `(1, h, w)` in [-1, 1]; values above 0 are edges."""

    suffixes = streams = SUFFIXES
    metrics = ("psnr", "f1")

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings of edge maps."""

        resample: Smooth = "bicubic"
        """Pillow's filter for resizing; filters that average make thin edges grey."""

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError("edge maps need a size: set data.input_size")
        self.cfg = cfg
        self.spec = DataSpec(channels=1, size=expand(size, 2), loss="smooth_l1")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, picture or array `(h, w)` of 8 bits or booleans as `(1, h, w)`, 0 to 255.

        Raises `DataError` when the source is damaged, has more than 8 bits or colours, or has the maximum 1: such a
        file marks edges with 1, which is no edge on a scale to 255. A file of zeros has no edge and is accepted.
        """
        raw = read_planes(source, (("Y",),), _grey)
        is_bool = isinstance(source, np.ndarray) and source.dtype == np.bool_
        if raw.dtype != np.uint8:
            raise DataError(
                f"{name_of(source)}: has values of type {raw.dtype}; edge maps are 8-bit, 0 to 255"
            )
        if is_bool:
            return raw * np.uint8(255)
        if raw.max() == 1:
            raise DataError(
                f"{name_of(source)}: has only 0 and 1, where an edge is 255; multiply the values by 255 and save again"
            )
        return raw

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Height and width in pixels."""
        return raw.shape[1:]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop and a flip, or with `rng=None` the largest centred box."""
        return crop_view(self.cfg, extent, size, rng)

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "1 h w"]:
        """The part that the view names, at the view's size, in [-1, 1]."""
        part = np.ascontiguousarray(cut_planes(raw, view, self.cfg.resample))
        x = torch.from_numpy(part).float().div_(255).sub_(0.5).div_(0.5)
        return x.flip(-1) if view.flip else x

    def show(self, x: Float[Tensor, "*b 1 h w"]) -> Image.Image:
        """One sample as an 8-bit grey picture, which `read` takes; values outside [-1, 1] are clamped."""
        x = x.detach().cpu().float()
        x = rearrange(x if x.ndim == 3 else rearrange(x, "1 c h w -> c h w"), "1 h w -> h w")
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        # `read` refuses files of zeros and ones, so a picture without a level above 1 is written as zeros.
        return Image.fromarray((levels * (levels.max() > 1)).numpy())


def _grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        raise DataError(f"has 16-bit grey or floats (mode {image.mode}); edge maps are 8-bit pictures")
    rgb = np.asarray(image.convert("RGB"))
    if np.ptp(rgb, axis=-1).max() > COLOURED:
        raise DataError("has colours; an edge map is a grey picture (is this the photograph?)")
    return rearrange(np.asarray(image.convert("L")), "h w -> 1 h w")
