"""Masks. As an extra modality, a mask says which positions of the main sample are valid.

4M's `mask_valid` (arXiv 2312.06647), where only pure white is valid, is `threshold: 254`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vqcore.config import at_least
from vqcore.errors import DataError
from vqcore.modalities.planes import SUFFIXES, cut_planes, name_of, read_planes, upright
from vqcore.modalities.views import CropConfig, crop_view
from vqcore.protocols import DataSpec, View, expand


class Mask:
    """Masks as `(1, h, w)`: 1 at valid positions, else 0. As an extra modality, masks become `Batch.mask`."""

    suffixes = (*SUFFIXES, ".npy")
    streams = SUFFIXES
    metrics = ("iou", "f1")
    is_mask = True

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings of masks."""

        training_only: ClassVar[tuple[str, ...]] = CropConfig.training_only

        threshold: float = 0.0
        """Values above this in a file are valid. 254, as in 4M: only pure white of an 8-bit picture is valid."""
        invert: bool = False
        """The files mark the invalid positions."""
        pool: int = 1
        """A block of pool x pool positions is valid only if all its positions are, e.g. a patch of the encoder."""
        mask_value: float | None = None
        """As an extra modality: the value of invalid positions in the main sample's tensor. Null: values stay."""

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least(self, pool=1)

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError("masks need a size: set data.input_size")
        self.cfg, self.mask_value = cfg, cfg.mask_value
        self.spec = DataSpec(channels=1, size=expand(size, 2), kind="binary", range=(0.0, 1.0), loss="bce")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A grey or palette picture, a `.npy` file or an array `(h, w)` as `(1, h, w)`: 1 at valid positions, else 0.

        Pictures are turned upright by their EXIF orientation. NaN and infinity are never valid. Raises `DataError`
        when the source is damaged or has colours, or when no position is valid.
        """
        raw = read_planes(source, (("Y",),), _levels)
        finite = np.isfinite(raw)
        if not finite.any():
            raise DataError(f"{name_of(source)}: is an empty mask; no value is finite")
        valid = ((raw > self.cfg.threshold) != self.cfg.invert) & finite
        if not valid.any():
            low, high = float(raw[finite].min()), float(raw[finite].max())
            is_what = "above" if not self.cfg.invert else "at or below (invert)"
            raise DataError(
                f"{name_of(source)}: is an empty mask; its values are {low:g} to {high:g}, and only values "
                f"{is_what} threshold={self.cfg.threshold:g} are valid"
            )
        return valid.astype(np.uint8)

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Height and width in pixels."""
        return raw.shape[1:]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop and a flip, or with `rng=None` the largest centred box."""
        return crop_view(self.cfg, extent, size, rng)

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "1 h w"]:
        """The part that the view names, at the view's size, by nearest pixels; then by blocks of `pool`."""
        x = torch.from_numpy(cut_planes(raw, view, "nearest")).float()
        x = x.flip(-1) if view.flip else x
        pool, (height, width) = self.cfg.pool, view.size
        if pool == 1:
            return x
        blocks = 1 - F.max_pool2d(1 - x, pool, ceil_mode=True)
        return repeat(blocks, "c h w -> c (h p) (w q)", p=pool, q=pool)[:, :height, :width].contiguous()

    def show(self, x: Float[Tensor, "*b 1 h w"]) -> Image.Image:
        """One mask as a grey picture like the files: white where `x` is above 0.5, or black with `invert`."""
        inside = rearrange(x.detach().cpu(), "... h w -> (...) h w")[0] > 0.5
        return Image.fromarray((inside.numpy() != self.cfg.invert).astype(np.uint8) * 255)


def _levels(image: Image.Image) -> np.ndarray:
    """The upright plane of a grey picture, of a palette picture (indices), or of RGB with three equal channels."""
    turn = upright(image)
    image = image if turn is None else image.transpose(turn)
    if image.mode == "RGB":
        planes = rearrange(np.asarray(image), "h w c -> c h w")
        if (planes == planes[:1]).all():
            return planes[:1]
    if image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;16"):
        raise DataError(
            f"has colours or transparency (mode {image.mode}); a mask is a grey or palette picture"
        )
    kind = np.uint8 if image.mode in ("1", "L", "P") else np.float32
    return rearrange(np.asarray(image).astype(kind), "h w -> 1 h w")
