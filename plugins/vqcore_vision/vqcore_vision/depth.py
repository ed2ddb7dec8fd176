"""Depth maps (or maps of any other measured quantity) with holes: 16-bit pictures, `.npy`, `.exr`.

An integer in a file stands for `factor * value + offset` units; floats in a file are in units already. The
standardisation of each image is 4M's (arXiv 2312.06647, appendix).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from vqcore.config import above_zero
from vqcore.errors import DataError, SettingError
from vqcore.modalities.colours import gradient
from vqcore.modalities.planes import Filter, cut_planes, name_of, read_planes
from vqcore.modalities.views import CropConfig, crop_view
from vqcore.protocols import DataSpec, View, expand

TRUNCATE = 0.1
"""Share of the smallest and of the largest values that are left out of an image's mean and deviation."""
EPS = 1e-6
"""Added to the variance of an image, in squared units."""


class Depth:
    """Depth maps as `(1, h, w)`. Zero, NaN and infinity are holes; holes count in no loss and no metric.

    With `mask_value` there is no mask: holes have this value, a second channel is 1 at measurements and -1 at holes,
    and the tokenizer learns both channels.
    """

    suffixes = (".png", ".npy", ".exr", ".tif", ".tiff", ".pgm")
    streams = (".png", ".tif", ".tiff", ".pgm")

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings of depth maps."""

        training_only: ClassVar[tuple[str, ...]] = CropConfig.training_only

        scaling: Literal["standardise", "linear", "log"] = "standardise"
        """standardise: by mean and deviation of the middle 80% of each image (4M); linear, log: `range` to [-1, 1]."""
        range: tuple[float, float] | None = None
        """Nearest and farthest value in units, for linear and log; values outside are clipped."""
        factor: float = 1.0
        """Units of one step in files of integers: metres = factor * value + offset."""
        offset: float = 0.0
        """Units that the value 0 stands for in files of integers, unless 0 is a hole."""
        invalid: tuple[float, ...] = (0.0,)
        """Values in the files that are holes. NaN and infinity are always holes."""
        resample: Filter = "nearest"
        """Filter for resizing; averages leave holes out. pillow-nearest is 4M's and may round ties differently."""
        mask_value: float | None = None
        """Value of holes in the tensor, which gets a validity channel. Null: holes are 0, and the batch has a mask."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if (self.range is None) != (self.scaling == "standardise"):
                given = None if self.range is None else list(self.range)
                raise SettingError(
                    "range",
                    f"{given} with scaling '{self.scaling}': linear and log need a range, standardise takes none",
                )
            if self.range is not None and not self.range[0] < self.range[1]:
                raise SettingError("range", f"{list(self.range)} must be two numbers in ascending order")
            if self.range is not None and self.scaling == "log" and not self.range[0] > 0:
                raise SettingError("range", f"{list(self.range)} must be above 0 for scaling 'log'")
            above_zero(self, "factor")
            if self.mask_value is not None and self.range is not None and not -1 <= self.mask_value <= 1:
                raise SettingError(
                    "mask_value", f"{self.mask_value} must lie in -1..1, as all other values do"
                )

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError("depth maps need a size: set data.input_size")
        self.cfg, self.hole_value = cfg, cfg.mask_value
        self.reading = (type(self).read, cfg.invalid, cfg.scaling == "standardise")
        self.spec = DataSpec(
            channels=1 if cfg.mask_value is None else 2,
            size=expand(size, 2),
            range=None if cfg.range is None else (-1.0, 1.0),
            mask=cfg.mask_value is None,
            loss="smooth_l1",
        )
        # An image with a scale of its own has lost its units, so a relative error means nothing.
        in_units = ("vision/abs-rel", "vision/delta")
        self.metrics: tuple[str, ...] = ("mae",) if cfg.range is None else (*in_units, "mae")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, picture or array `(h, w)` as `(1, h, w)`, with the numbers of the file.

        Raises `DataError` when the source is damaged, has several channels or no valid value, or, under scaling
        `standardise`, only one value.
        """
        raw = read_planes(source, (("Z",), ("Y",), ("depth.Z",)), _one_channel)
        measured = raw[self._is_valid(raw)]
        if not measured.size:
            raise DataError(f"{name_of(source)}: has no valid value; {self._holes()} are holes")
        if self.cfg.scaling == "standardise" and measured.min() == measured.max():
            raise DataError(
                f"{name_of(source)}: has the same value everywhere, {measured[0]:g}; scaling 'standardise' needs "
                "different values (data.modality.scaling: linear or log takes such files)"
            )
        return raw

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Height and width in pixels."""
        return raw.shape[1:]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop and a flip, or with `rng=None` the largest centred box."""
        return crop_view(self.cfg, extent, size, rng)

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "c h w"]:
        """The part that the view names, at the view's size, scaled; holes are filled."""
        units, valid = self._cut(raw, view)
        fill = 0.0 if self.cfg.mask_value is None else self.cfg.mask_value
        x = torch.where(valid, self._scaled(units, valid), fill)
        if self.cfg.mask_value is not None:
            x = torch.cat([x, valid.float() * 2 - 1])
        return x.flip(-1) if view.flip else x

    def mask(self, raw: np.ndarray, view: View) -> Bool[Tensor, "h w"]:
        """True where the tensor of this view has a measurement."""
        valid = rearrange(self._cut(raw, view)[1], "1 h w -> h w")
        return valid.flip(-1) if view.flip else valid

    def values(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        """A batch in units; NaN where its validity channel says hole. Standardised values stay as they are."""
        depth, valid = x[:, :1], x[:, 1:]
        if self.cfg.range is not None:
            near, far = self.cfg.range
            share = (depth.double().clamp(-1, 1) + 1) / 2
            is_log = self.cfg.scaling == "log"
            depth = (near * (far / near) ** share if is_log else near + (far - near) * share).float()
        return depth if self.cfg.mask_value is None else torch.where(valid > 0, depth, torch.nan)

    def show(self, x: Float[Tensor, "*b c h w"]) -> np.ndarray:
        """One sample as floats `(h, w)` in units, which `read` takes; NaN where the validity channel says hole."""
        x = x.detach().cpu().float()
        values = self.values(x if x.ndim == 4 else rearrange(x, "c h w -> 1 c h w"))
        return rearrange(values, "1 1 h w -> h w").numpy()

    def picture(self, x: Float[Tensor, "*b c h w"]) -> Image.Image:
        """One sample in colours from dark blue (near) to yellow (far); grey where the validity channel says hole.

        The colour scale spans the whole range; an arc tangent maps standardised values to it.
        """
        x = x.detach().cpu().float()
        x = rearrange(x, "1 c h w -> c h w") if x.ndim == 4 else x
        share = (x[0] + 1) / 2 if self.cfg.range is not None else 0.5 + torch.atan(x[0]) / math.pi
        valid = None if self.cfg.mask_value is None else (x[1] > 0).numpy()
        return gradient(share.numpy(), valid)

    def _cut(self, raw: np.ndarray, view: View) -> tuple[Float[np.ndarray, "1 h w"], Bool[Tensor, "1 h w"]]:
        """The part in units, 0 in holes; and the mask, True at measurements."""
        valid = self._is_valid(raw)
        if "nearest" in self.cfg.resample or valid.all():
            part = cut_planes(raw, view, self.cfg.resample)
            valid = self._is_valid(part)
            return np.where(valid, self._units(part, raw.dtype.kind), 0), torch.from_numpy(valid)
        units = np.where(valid, self._units(raw, raw.dtype.kind), 0).astype(np.float32)
        weight = cut_planes(valid.astype(np.float32), view, self.cfg.resample)
        held = weight > 0.5
        sums = cut_planes(units, view, self.cfg.resample).astype(np.float64)
        return np.where(held, sums / np.where(held, weight, 1), 0), torch.from_numpy(held)

    def _is_valid(self, values: np.ndarray) -> np.ndarray:
        return np.isfinite(values) & ~np.isin(values, self.cfg.invalid)

    def _units(self, values: np.ndarray, kind: str) -> np.ndarray:
        """Values in units; `kind` is the NumPy kind of the file's type, and floats are in units already."""
        wide = values.astype(np.float64)
        return wide if kind == "f" else self.cfg.factor * wide + self.cfg.offset

    def _scaled(self, units: np.ndarray, valid: Bool[Tensor, "1 h w"]) -> Float[Tensor, "1 h w"]:
        if self.cfg.range is None:
            return _standardised(torch.from_numpy(units.astype(np.float32)), valid)
        near, far = self.cfg.range
        clipped = np.clip(units, near, far)
        if self.cfg.scaling == "log":
            share = np.log(clipped / near) / math.log(far / near)
        else:
            share = (clipped - near) / (far - near)
        return torch.from_numpy((2 * share - 1).astype(np.float32))

    def _holes(self) -> str:
        return ", ".join([*(f"{value:g}" for value in self.cfg.invalid), "NaN and infinity"])


def _one_channel(image: Image.Image) -> np.ndarray:
    """The plane of a grey picture of 8 or 16 bits, or of floats."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, before Pillow 10.3
        return rearrange(np.asarray(image).astype(np.uint16), "h w -> 1 h w")
    if image.mode not in ("L", "F") and not image.mode.startswith("I;16"):
        raise DataError(f"has mode {image.mode}; a depth map is a grey picture of 8 or 16 bits, or of floats")
    types = {"L": np.uint8, "F": np.float32}
    return rearrange(np.asarray(image).astype(types.get(image.mode, np.uint16)), "h w -> 1 h w")


def _standardised(units: Float[Tensor, "1 h w"], valid: Bool[Tensor, "1 h w"]) -> Float[Tensor, "1 h w"]:
    """Minus the mean and divided by the deviation of the middle values; 0 everywhere if there are fewer than two."""
    ranked = units[valid].sort().values
    middle = ranked[int(TRUNCATE * len(ranked)) : int((1 - TRUNCATE) * len(ranked))]
    if len(middle) < 2:
        return torch.zeros_like(units)
    return (units - middle.mean()) / torch.sqrt(middle.var() + EPS)
