"""Surface normals: unit vectors as 8-bit pictures (`n = value / 127.5 - 1`), or floats in `.npy` and `.exr` files.

The first component points along the rows, so a mirror negates it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from vqcore.errors import DataError, SettingError
from vqcore.modalities.planes import SUFFIXES, Smooth, cut_planes, name_of, read_planes
from vqcore.modalities.views import CropConfig, crop_view
from vqcore.protocols import DataSpec, View, expand

SHORTEST = 0.1
"""A shorter vector has no direction and is a hole. Grey of 127 or 128, the zero vector in 8 bits, has length 0.007."""


class Normal:
    """Normals as `(3, h, w)`, of length 1 after every resize. Zero vectors and NaN are holes and count in no loss.

    With `mask_value` there is no mask: holes have this value, a fourth channel is 1 at normals and -1 at holes, and the
    tokenizer learns all four channels.
    """

    suffixes = (*SUFFIXES, ".npy", ".exr")
    streams = SUFFIXES
    metrics = ("angle", "cosine")

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings of normals."""

        resample: Smooth = "bicubic"
        """Pillow's filter for resizing."""
        unit: bool = True
        """Scale every normal to length 1 after a resize. False, as in 4M: resized normals may be shorter."""
        tolerance: float | None = 0.1
        """Files with a vector whose length is further from 1 are refused (8 bits: off by 0.007). Null: any length."""
        mask_value: float | None = None
        """Value of holes in the tensor, which gets a validity channel. Null: holes stay, and the batch has a mask."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.tolerance is not None and not 0 < self.tolerance < 1:
                raise SettingError("tolerance", f"{self.tolerance} must lie between 0 and 1")
            if self.mask_value is not None and not -1 <= self.mask_value <= 1:
                raise SettingError("mask_value", f"{self.mask_value} must lie in -1..1, as all components do")

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError("normals need a size: set data.input_size")
        self.cfg, self.hole_value = cfg, cfg.mask_value
        masked = cfg.mask_value is None
        self.spec = DataSpec(
            channels=3 if masked else 4, size=expand(size, 2), kind="unit-vector", mask=masked, loss="mse"
        )

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, picture or array `(h, w, 3)` or `(3, h, w)` as `(3, h, w)`, in the type of the file.

        Raises `DataError` when the source is damaged, has another number of channels, is neither 8-bit nor float, or
        has vectors that are no unit vectors.
        """
        raw = read_planes(source, (("R", "G", "B"), ("X", "Y", "Z"), ("N.X", "N.Y", "N.Z")), _three_channels)
        if raw.dtype not in (np.uint8, np.float32):
            bits = 8 * raw.dtype.itemsize
            raise DataError(
                f"{name_of(source)}: has {bits}-bit integers; normals are 8-bit pictures or floats"
            )
        length = np.linalg.norm(_vectors(raw), axis=0)
        valid = np.isfinite(length) & (length >= SHORTEST)
        if not valid.any():
            raise DataError(f"{name_of(source)}: has no valid value; zero vectors and NaN are holes")
        self._check_lengths(np.where(valid, length, 1), name_of(source))
        return raw

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Height and width in pixels."""
        return raw.shape[1:]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop and a flip, or with `rng=None` the largest centred box."""
        return crop_view(self.cfg, extent, size, rng)

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "c h w"]:
        """The part that the view names, at the view's size, in [-1, 1]; a flip also mirrors the vectors."""
        x, valid = self._cut(raw, view)
        if self.cfg.unit:
            x = torch.where(valid, x / x.norm(dim=0, keepdim=True).clamp(min=1e-12), x)
        x = x.clamp(-1, 1)
        if self.cfg.mask_value is not None:
            x = torch.cat([torch.where(valid, x, self.cfg.mask_value), valid.float() * 2 - 1])
        return x

    def mask(self, raw: np.ndarray, view: View) -> Bool[Tensor, "h w"]:
        """True where the tensor of this view has a normal."""
        return rearrange(self._cut(raw, view)[1], "1 h w -> h w")

    def values(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """A batch of vectors as they are; NaN where its validity channel says hole."""
        return x if self.cfg.mask_value is None else torch.where(x[:, 3:] > 0, x[:, :3], torch.nan)

    def show(self, x: Float[Tensor, "*b c h w"]) -> Image.Image:
        """One sample as an 8-bit picture, which `read` takes; holes are grey, the zero vector.

        If files must hold unit vectors, the picture does too, and vectors without a direction become holes.
        """
        x = x.detach().cpu().float()
        values = self.values(x if x.ndim == 4 else rearrange(x, "c h w -> 1 c h w"))
        n = rearrange(values, "1 c h w -> h w c").nan_to_num(0)
        if self.cfg.unit or self.cfg.tolerance is not None:
            length = n.norm(dim=-1, keepdim=True)
            n = torch.where(length < SHORTEST, 0.0, n / length.clamp(min=SHORTEST))
        levels = ((n.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Image.fromarray(levels.numpy())

    def _cut(self, raw: np.ndarray, view: View) -> tuple[Float[Tensor, "3 h w"], Bool[Tensor, "1 h w"]]:
        """Vectors, mirrored if the view is mirrored; and the mask, True where a vector has a direction."""
        holes = ~np.isfinite(raw).all(0, keepdims=True)
        part = cut_planes(np.where(holes, 0, raw).astype(raw.dtype), view, self.cfg.resample)
        if view.flip:
            part = np.ascontiguousarray(part[..., ::-1])
            part[0] = 255 - part[0] if part.dtype == np.uint8 else -part[0]
        x = torch.from_numpy(_vectors(part))
        return x, x.norm(dim=0, keepdim=True) >= SHORTEST

    def _check_lengths(self, length: np.ndarray, name: str) -> None:
        if self.cfg.tolerance is None:
            return
        worst = np.unravel_index(np.abs(length - 1).argmax(), length.shape)
        if abs(length[worst] - 1) > self.cfg.tolerance:
            place = [int(axis) for axis in worst]
            raise DataError(
                f"{name}: the vector at {place} has length {length[worst]:.3g}, not 1 (data.modality.tolerance="
                f"{self.cfg.tolerance:g}; null accepts any length)"
            )


def _three_channels(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode == "I":
        raise DataError(f"has 16-bit grey (mode {image.mode}); normals are pictures of three 8-bit channels")
    if image.mode not in ("RGB", "RGBA"):
        raise DataError(f"has mode {image.mode}; normals are pictures of three 8-bit channels (RGB)")
    return rearrange(np.asarray(image.convert("RGB")), "h w c -> c h w")


def _vectors(planes: np.ndarray) -> Float[np.ndarray, "3 h w"]:
    """8-bit levels or floats as components. Published encoders saw the floats that this order of operations gives."""
    if planes.dtype != np.uint8:
        return planes
    half = np.float32(0.5)
    return (planes.astype(np.float32) / np.float32(255) - half) / half
