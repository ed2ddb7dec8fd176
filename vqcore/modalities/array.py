"""Any array of one to three axes. The config declares channels, range and kind, and values are checked against these.

A file has the shape `(channels, *size)`, or `(*size, channels)` with `channels_last`. One channel or a class map needs
no channel axis, and a vector (nominal size 1) needs no other axis; `show` leaves these axes out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vqcore import config
from vqcore.data.npy import map_array, read_array
from vqcore.errors import DataError, SettingError
from vqcore.modalities.views import pixels, sized_box, view_of
from vqcore.protocols import DataSpec, Kind, Sizing, View, expand

SLACK = 0.01
"""Values may lie outside the declared range by this share of the range; such values are clipped."""

_METRICS: dict[str, tuple[str, ...]] = {
    "categorical": ("accuracy", "iou"),
    "binary": ("f1", "iou"),
    "unit-vector": ("angle", "cosine"),
    "angle": ("angle",),
}


class Array:
    """Arrays as tensors `(c, *size)`, class maps as `(*size)`.

    Kinds: continuous (mapped from `range` to [-1, 1]; unchanged without a range), angle (radians; becomes sines, then
    cosines), unit-vector (length 1 within a tolerance, then scaled to exactly 1), binary (the two ends of `range`, by
    default 0 and 1, become -1 and 1), categorical (class ids). Class maps and binary arrays are resized by nearest
    neighbour, other kinds linearly.
    """

    suffixes = (".npy",)

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of arrays."""

        training_only: ClassVar[tuple[str, ...]] = ("hflip", "min_crop_scale")

        kind: Kind = "continuous"
        """The meaning of a value; it decides encoding, resizing, the default loss and the metrics."""
        channels: int | None = None
        """Number of values per position; required unless the kind is categorical."""
        labels: int | None = None
        """Number of classes of a categorical array, whose values lie in 0 .. labels - 1."""
        size: int | tuple[int, ...] | None = None
        """Nominal size if data.input_size is not set: one number, or one number per axis. 1 for vectors."""
        rank: int | None = None
        """Number of axes besides channels. Null: the length of the size, or 2 if the size is one number above 1."""
        range: tuple[float, float] | None = None
        """Values that become -1 and 1. Null: values stay unchanged."""
        tolerance: float = 0.01
        """Unit vectors only: files with a vector whose length is further from 1 are refused."""
        channels_last: bool = False
        """The channel axis is the last axis in the files."""
        sizing: Sizing | tuple[Sizing, ...] | None = None
        """How a sample gets the size, one word or one per axis: window (parts of this length; evaluation and tokenize
        go over all of the sample), pad (all of the sample, filled up and masked), crop (the middle, in the proportions
        of the size, resized), resize (all, resized). Null: window for one axis, crop for more."""
        hflip: float = 0.0
        """Share of the training samples whose last axis is mirrored; the components of vectors stay unchanged."""
        min_crop_scale: float = 1.0
        """Smallest share of the sample that a training crop keeps; 1: no random crops. Windows are never scaled."""

        def __post_init__(self) -> None:
            _check_channels(self)
            if self.rank is not None and not 1 <= self.rank <= 3:
                raise SettingError("rank", f"{self.rank} must be 1, 2 or 3")
            if self.range is not None and self.kind in ("categorical", "angle"):
                raise SettingError("range", f"{list(self.range)} has no meaning for kind '{self.kind}'")
            if self.range is not None and not self.range[0] < self.range[1]:
                raise SettingError("range", f"{list(self.range)} must be two numbers in ascending order")
            if self.kind != "unit-vector":
                config.refuse_idle(self, f"kind={self.kind}", "tolerance")
            if not 0 < self.tolerance < 1:
                raise SettingError("tolerance", f"{self.tolerance} must lie between 0 and 1")
            if not 0 <= self.hflip <= 1:
                raise SettingError("hflip", f"{self.hflip} must lie in 0..1")
            if not 0 < self.min_crop_scale <= 1:
                raise SettingError("min_crop_scale", f"{self.min_crop_scale} must lie in (0, 1]")

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None and cfg.size is None:
            raise ValueError("arrays need a size: set data.input_size or data.modality.size")
        rank = cfg.rank or _rank_of(cfg.size) or _rank_of(size) or 2
        # An extra modality may have fewer axes than the main modality, whose size is given here.
        fits = size is not None and _rank_of(size) in (None, rank)
        nominal = size if fits or cfg.size is None else cfg.size
        assert nominal is not None
        self.sizing = _sizing_of(cfg, expand(nominal, rank))
        bounded = cfg.range is not None or cfg.kind not in ("continuous", "categorical")
        self.cfg = cfg
        self.spec = DataSpec(
            channels=(cfg.channels or 1) * (2 if cfg.kind == "angle" else 1),
            size=expand(nominal, rank),
            kind=cfg.kind,
            range=(-1.0, 1.0) if bounded else None,
            labels=cfg.labels,
            loss="cross_entropy" if cfg.kind == "categorical" else "mse",
        )
        self.metrics: tuple[str, ...] = _METRICS.get(cfg.kind, ("psnr", "mae") if bounded else ("mae",))

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A `.npy` file, or anything that NumPy can turn into an array, as `(channels, *extent)`, values unchanged.

        Raises `DataError` when shape, type or values differ from the declared ones.
        """
        is_file = isinstance(source, (str, Path))
        name = str(source) if is_file else "array in memory"
        array = read_array(Path(source), name) if is_file else np.asarray(source)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name}: has values of type {array.dtype}; only real numbers can be read")
        array = self._with_channels_first(array, name)
        self._check_values(array, name)
        return array

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Lengths of the axes besides channels."""
        return raw.shape[1:]

    def extent_of(self, source: Any) -> tuple[int, ...]:
        """The extent of a file, from its header, or of an array."""
        is_file = isinstance(source, (str, Path))
        name = str(source) if is_file else "array in memory"
        array = map_array(Path(source), name) if is_file else np.asarray(source)
        return self._with_channels_first(array, name).shape[1:]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """The part that `sizing` says: the middle, or in training a part from anywhere, sometimes mirrored."""
        box = sized_box(extent, size, self.sizing, rng, self.cfg.min_crop_scale)
        return view_of(box, extent, size, flip=rng is not None and bool(rng.random() < self.cfg.hflip))

    def ride(self, view: View, main: DataSpec) -> View:
        """Beside samples with another number of axes: the whole array, at its own nominal size."""
        rank = self.spec.rank
        return view if main.rank == rank else View((0.0,) * rank, (1.0,) * rank, self.spec.size)

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "c *size"] | Int[Tensor, "*size"]:
        """The part that the view names, at the view's size; values are copied exactly if no resize is needed."""
        part = _cut(raw, view)
        if self.cfg.kind in ("categorical", "binary"):
            x = torch.from_numpy(self._encode(_nearest(part, view.size)))
        else:
            x = torch.from_numpy(self._encode(part))
            if x.shape[1:] != view.size:
                x = _linear(x, view.size)
            x = self._to_unit(x)
        x = x.flip(-1) if view.flip else x
        return rearrange(x, "1 ... -> ...") if self.cfg.kind == "categorical" else x

    def show(self, x: Tensor) -> np.ndarray:
        """One sample in the layout and units of the files, clipped to the declared range; class scores become ids."""
        x = self._single(x)
        if self.cfg.range is not None:
            x = x.clamp(-1, 1)
        array = self._decode(x)
        if self.spec.rank == 1 and self.spec.size == (1,):
            return rearrange(array, "c 1 -> c")
        if len(array) == 1:
            return rearrange(array, "1 ... -> ...")
        return rearrange(array, "c ... -> ... c") if self.cfg.channels_last else array

    def values(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b channels *size"]:
        """A batch in the units of the files; binary arrays and class scores stay unchanged."""
        if self.cfg.kind in ("categorical", "binary"):
            return x
        return torch.stack([torch.from_numpy(self._decode(one.detach().cpu())).to(x.device) for one in x])

    def _single(self, x: Tensor) -> Tensor:
        """One sample with its channel axis, with or without a batch axis in `x`."""
        x = x.detach().cpu()
        has_channels = x.is_floating_point()
        if x.ndim > self.spec.rank + has_channels:
            x = rearrange(x, "1 ... -> ...")
        return x if has_channels else rearrange(x, "... -> 1 ...")

    def _with_channels_first(self, array: np.ndarray, name: str) -> np.ndarray:
        rank, channels, shape = self.spec.rank, self.cfg.channels or 1, array.shape
        if rank == 1 and self.spec.size == (1,) and array.ndim < 2:
            array = array.reshape(array.size, 1)
        elif array.ndim == rank and channels == 1:
            array = rearrange(array, "... -> 1 ...")
        elif array.ndim == rank + 1 and self.cfg.channels_last:
            array = rearrange(array, "... c -> c ...")
        if array.ndim != rank + 1 or not array.size:
            raise DataError(
                f"{name}: has shape {shape}, but {channels} channels and {rank} axes are declared "
                "(data.modality.channels and .rank; the size [n] has one axis, the size n has two)"
            )
        if len(array) != channels:
            last, other, turned = ("last", 0, "false") if self.cfg.channels_last else ("first", -1, "true")
            hint = f": set data.modality.channels_last={turned}" if shape[other] == channels else ""
            raise DataError(
                f"{name}: has {len(array)} channels (shape {shape}, channels {last}), but {channels} are declared{hint}"
            )
        return array

    def _check_values(self, array: np.ndarray, name: str) -> None:
        kind = self.cfg.kind
        if kind == "categorical":
            if array.dtype.kind == "f":
                raise DataError(f"{name}: has values of type {array.dtype}; class ids are integers")
            wrong = (array < 0) | (array >= self.cfg.labels)
            problem = (
                f"is no label; data.modality.labels={self.cfg.labels} (0 to {(self.cfg.labels or 0) - 1})"
            )
        elif kind == "binary":
            low, high = self.cfg.range or (0, 1)
            wrong = (array != low) & (array != high)
            problem = f"is neither {low:g} nor {high:g}, the two values of a binary array"
        else:
            with np.errstate(over="ignore"):
                wrong = ~np.isfinite(array.astype(np.float32))
            problem = "is not finite in single precision"
        if not wrong.any() and kind not in ("categorical", "binary") and self.cfg.range:
            low, high = self.cfg.range
            slack, wide = SLACK * (high - low), array.astype(np.float64)
            wrong = (wide < low - slack) | (wide > high + slack)
            problem = f"lies outside the declared range {low:g} to {high:g}"
        if not wrong.any() and kind == "unit-vector":
            length = np.linalg.norm(self._encode(array), axis=0, keepdims=True)
            wrong = np.abs(length - 1) > self.cfg.tolerance
            found = f"{length.flat[int(wrong.argmax())]:.3g}"
            problem = (
                f"belongs to a vector of length {found}, not 1 (data.modality.tolerance={self.cfg.tolerance:g}); "
                "data.modality.range maps values on another scale to -1..1"
            )
        if wrong.any():
            place = tuple(int(axis) for axis in np.argwhere(wrong)[0])
            raise DataError(f"{name}: the value {array[place]} at {list(place)} (channel first) {problem}")

    def _encode(self, array: np.ndarray) -> np.ndarray:
        """The values of the tensor; always a copy."""
        if self.cfg.kind == "categorical":
            return array.astype(np.int64)
        if self.cfg.kind == "binary":
            high = self.cfg.range[1] if self.cfg.range else 1
            return np.where(array == high, np.float32(1), np.float32(-1))
        if self.cfg.kind == "angle":
            wide = array.astype(np.float64)
            return np.concatenate([np.sin(wide), np.cos(wide)]).astype(np.float32)
        if self.cfg.range is None:
            return array.astype(np.float32)
        low, high = self.cfg.range
        unit = (array.astype(np.float64) - low) * (2 / (high - low)) - 1
        return np.clip(unit, -1, 1).astype(np.float32)

    def _decode(self, x: Tensor) -> np.ndarray:
        """The inverse of `_encode`, with the channel axis."""
        if self.cfg.kind == "categorical":
            return (x.argmax(0, keepdim=True) if x.is_floating_point() else x).long().numpy()
        x = x.double()
        if self.cfg.kind == "binary":
            low, high = self.cfg.range or (0, 1)
            values = np.where(x.numpy() > 0, high, low)
            return values.astype(np.float32 if self.cfg.range else np.uint8)
        if self.cfg.kind == "angle":
            sines, cosines = rearrange(x, "(part c) ... -> part c ...", part=2)
            return torch.atan2(sines, cosines).float().numpy()
        x = self._to_unit(x)
        if self.cfg.range is not None:
            low, high = self.cfg.range
            x = (x + 1) * ((high - low) / 2) + low
        return x.float().numpy()

    def _to_unit(self, x: Tensor) -> Tensor:
        """Unit vectors, and pairs of sine and cosine, scaled to length 1; other kinds unchanged."""
        if self.cfg.kind == "unit-vector":
            return F.normalize(x, dim=0)
        if self.cfg.kind == "angle":
            pairs = F.normalize(rearrange(x, "(part c) ... -> part c ...", part=2), dim=0)
            return rearrange(pairs, "part c ... -> (part c) ...")
        return x


def _rank_of(size: int | tuple[int, ...] | None) -> int | None:
    """The number of axes of a size. The number 1 means a vector; any other single number leaves the rank open."""
    if isinstance(size, tuple):
        return len(size)
    return 1 if size == 1 else None


def _sizing_of(cfg: Array.Config, size: tuple[int, ...]) -> tuple[Sizing, ...]:
    """What happens along each axis. Raises `SettingError` for a wrong number of words, and for idle ones."""
    # A vector has nothing to draw windows from.
    usual: Sizing = "window" if len(size) == 1 and size != (1,) else "crop"
    asked = cfg.sizing or usual
    given: tuple[Sizing, ...] = asked if isinstance(asked, tuple) else (asked,) * len(size)
    if len(given) != len(size):
        raise SettingError(
            "sizing", f"{list(given)} has {len(given)} words, but samples have {len(size)} axes"
        )
    if cfg.sizing and given.count("crop") == 1:
        raise SettingError(
            "sizing",
            "crop keeps the proportions of two axes or more; for one axis take window, resize or pad",
        )
    if not {"crop", "resize"} & set(given):
        config.refuse_idle(cfg, f"sizing={given[0]}", "min_crop_scale")
    return given


def _check_channels(cfg: Array.Config) -> None:
    if (cfg.kind == "categorical") != (cfg.labels is not None):
        raise SettingError(
            "labels", f"{cfg.labels} with kind '{cfg.kind}': labels belong to categorical arrays"
        )
    if cfg.labels is not None and cfg.labels < 1:
        raise SettingError("labels", f"{cfg.labels} must be at least 1")
    if cfg.kind == "categorical" and cfg.channels not in (None, 1):
        raise SettingError("channels", f"{cfg.channels}: a class map has one channel")
    if cfg.kind != "categorical" and cfg.channels is None:
        raise ValueError("channels is required: set it to the number of values per position")
    least = 2 if cfg.kind == "unit-vector" else 1
    if cfg.channels is not None and cfg.channels < least:
        raise SettingError("channels", f"{cfg.channels} must be at least {least} for kind '{cfg.kind}'")


def _cut(array: np.ndarray, view: View) -> np.ndarray:
    """The part that the view names, rounded to whole elements, at least one element along each axis."""
    extent = array.shape[1:]
    slices = [slice(None)]
    for start, stop, n in zip(*pixels(view, extent), extent):
        first = min(round(start), n - 1)
        slices.append(slice(first, max(round(stop), first + 1)))
    return array[tuple(slices)]


def _nearest(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The element under the centre of each new element, computed in whole numbers."""
    for axis, (n, m) in enumerate(zip(array.shape[1:], size), start=1):
        if n != m:
            array = np.take(array, (2 * np.arange(m) + 1) * n // (2 * m), axis)
    return array


def _linear(x: Float[Tensor, "c *extent"], size: tuple[int, ...]) -> Float[Tensor, "c *size"]:
    """Linear interpolation; where an axis gets shorter, each new value is a mean, so that nothing is aliased."""
    if len(size) == 2:
        return _filtered(rearrange(x, "c h w -> 1 c h w"), size)[0]
    # `interpolate` filters two axes only, so each axis takes a turn as the last of two.
    for axis, side in enumerate(size, start=1):
        if x.shape[axis] != side:
            rows = x.movedim(axis, -1)
            made = _filtered(rows.reshape(1, 1, -1, rows.shape[-1]), (rows[..., 0].numel(), side))
            x = made.view(*rows.shape[:-1], side).movedim(-1, axis)
    return x


def _filtered(x: Float[Tensor, "1 c h w"], size: tuple[int, ...]) -> Float[Tensor, "1 c *size"]:
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
