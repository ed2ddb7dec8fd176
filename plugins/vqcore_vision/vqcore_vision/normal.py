"""Surface normals: unit vectors as 8-bit pictures (`n = value / 127.5 - 1`), or floats in `.npy` and `.exr` files.

The first component points along the rows, so a mirrored sample has it negated.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from vqcore.errors import DataError
from vqcore.modalities.planes import SUFFIXES, Smooth, cut_planes, name_of, read_planes
from vqcore.modalities.views import CropConfig, crop_view
from vqcore.protocols import DataSpec, View, expand

SHORTEST = 0.1
"""A vector shorter than this has no direction: a hole. Grey 127 or 128, an 8-bit zero, is 0.007 long."""


class Normal:
    """Normals as `(3, h, w)`, of length 1 after every resize. Zero vectors and NaN are holes: they count in no loss.

    With `mask_value` there is no mask: holes have this value, a fourth channel says 1 where there is a normal and -1
    where there is none, and the tokenizer learns all of it.
    """

    suffixes = (*SUFFIXES, ".npy", ".exr")
    metrics = ("angle", "cosine")

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings of normals."""

        resample: Smooth = "bicubic"
        """Pillow's filter for resizing."""
        unit: bool = True
        """Give every normal length 1 again. Off: as 4M, whose resized normals are as short as they come out."""
        tolerance: float | None = 0.1
        """How far from 1 a length in a file may be, else it is refused (8 bits are off by 0.007). Null: any length."""
        mask_value: float | None = None
        """Value of holes in the tensor; then a validity channel is added. Null: they stay, and a mask goes beside."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.tolerance is not None and not 0 < self.tolerance < 1:
                raise ValueError(f"tolerance={self.tolerance} must lie between 0 and 1")
            if self.mask_value is not None and not -1 <= self.mask_value <= 1:
                raise ValueError(f"mask_value={self.mask_value} must lie in -1..1, where normals lie")

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError("normals have no size of their own: set data.input_size")
        self.cfg, self.hole_value = cfg, cfg.mask_value
        masked = cfg.mask_value is None
        self.spec = DataSpec(
            channels=3 if masked else 4, size=expand(size, 2), kind="unit-vector", mask=masked, loss="mse"
        )

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, picture or array `(h, w, 3)` or `(3, h, w)` as `(3, h, w)`, 8-bit or float as it is.

        Raises `DataError` when it is damaged, has other channels or bits, or holds vectors that are not unit.
        """
        raw = read_planes(source, (("R", "G", "B"), ("X", "Y", "Z"), ("N.X", "N.Y", "N.Z")), _three_channels)
        if raw.dtype not in (np.uint8, np.float32):
            bits = 8 * raw.dtype.itemsize
            raise DataError(
                f"{name_of(source)}: holds {bits}-bit integers; normals are 8-bit pictures or floats"
            )
        length = np.linalg.norm(_vectors(raw), axis=0)
        valid = np.isfinite(length) & (length >= SHORTEST)
        if not valid.any():
            raise DataError(f"{name_of(source)}: holds no valid value; zero vectors and NaN are holes")
        self._check_lengths(np.where(valid, length, 1), name_of(source))
        return raw

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Height and width in pixels."""
        return raw.shape[1:]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop and a flip, or with `rng=None` the largest centred box."""
        return crop_view(self.cfg, extent, size, rng)

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "c h w"]:
        """The part that a view names, at the view's size, in [-1, 1]; a flip also mirrors the vectors."""
        x, valid = self._cut(raw, view)
        if self.cfg.unit:
            x = torch.where(valid, x / x.norm(dim=0, keepdim=True).clamp(min=1e-12), x)
        x = x.clamp(-1, 1)
        if self.cfg.mask_value is not None:
            x = torch.cat([torch.where(valid, x, self.cfg.mask_value), valid.float() * 2 - 1])
        return x

    def mask(self, raw: np.ndarray, view: View) -> Bool[Tensor, "h w"]:
        """Where the tensor of this view holds a normal."""
        return rearrange(self._cut(raw, view)[1], "1 h w -> h w")

    def values(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """A batch of vectors as they are; NaN in what its validity channel calls a hole."""
        return x if self.cfg.mask_value is None else torch.where(x[:, 3:] > 0, x[:, :3], torch.nan)

    def show(self, x: Float[Tensor, "*b c h w"]) -> Image.Image:
        """One sample as an 8-bit picture, which `read` takes; holes are grey, which is zero.

        Where files must hold unit vectors, shown ones have length 1, and what has no direction is a hole.
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
        """Vectors, mirrored if the view is, and where they have a direction."""
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
                f"{self.cfg.tolerance:g}; null takes any length)"
            )


def _three_channels(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode == "I":
        raise DataError(
            f"holds 16-bit grey (mode {image.mode}); normals are pictures of three 8-bit channels"
        )
    if image.mode not in ("RGB", "RGBA"):
        raise DataError(f"has mode {image.mode}; normals are pictures of three 8-bit channels (RGB)")
    return rearrange(np.asarray(image.convert("RGB")), "h w c -> c h w")


def _vectors(planes: np.ndarray) -> Float[np.ndarray, "3 h w"]:
    """8-bit levels or floats as components; divided, then shifted, then scaled: published encoders saw these floats."""
    if planes.dtype != np.uint8:
        return planes
    half = np.float32(0.5)
    return (planes.astype(np.float32) / np.float32(255) - half) / half
