"""Any array of one to three axes. The config declares channels, scale and kind, and values are checked against these.

A file has the shape `(channels, *size)`, or `(*size, channels)` with `channels_last`. One channel or a class map needs
no channel axis, and a vector (nominal size 1) needs no other axis; `show` leaves these axes out. What is missing
(`nodata`) is NaN after reading, and becomes the mask.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vqcore import config
from vqcore.config import at_least
from vqcore.data.npy import map_array
from vqcore.data.readers import BySuffix, Npy
from vqcore.errors import DataError, SettingError, did_you_mean, listed
from vqcore.modalities.scale import Scale, missing
from vqcore.modalities.views import pixels, sized_box, view_of
from vqcore.protocols import DataSpec, Kind, SampleReader, Sizing, View, expand
from vqcore.registry import registry

CHANNELS = 16
"""With more channels, metrics of each channel are measured only if the config names them."""
MAPPED = 16 << 20
"""Bytes of an `.npy` file above which a sample reads its part only. Such files are not kept in `data.cache_mib`."""
_METRICS: dict[str, tuple[str, ...]] = {
    "categorical": ("accuracy", "iou"),
    "binary": ("f1", "iou"),
    "unit-vector": ("angle", "cosine"),
    "angle": ("angle",),
}


class Array:
    """Arrays as tensors `(c, *size)`, class maps as `(*size)`.

    Kinds: continuous (mapped by `range` or `scale`; unchanged without), angle (radians; becomes sines, then
    cosines), unit-vector (length 1 within a tolerance, then scaled to exactly 1), binary (the two ends of `range`, by
    default 0 and 1, become -1 and 1), categorical (class ids). Class maps and binary arrays are resized by nearest
    neighbour, other kinds linearly. With `nodata` there is a mask: a position is valid if none of its channels is
    missing and, where a resize mixes positions, if it comes from valid ones alone. Elsewhere the tensor is 0.
    """

    suffixes = BySuffix.suffixes

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of arrays."""

        training_only: ClassVar[tuple[str, ...]] = ("hflip", "min_crop_scale", "picture")

        kind: Kind = "continuous"
        """The meaning of a value; it decides encoding, resizing, the default loss and the metrics."""
        channels: int | tuple[str, ...] | None = None
        """Number of values per position, or their names; required unless the kind is categorical."""
        labels: int | None = None
        """Number of classes of a categorical array, whose values lie in 0 .. labels - 1."""
        size: int | tuple[int, ...] | None = None
        """Nominal size if data.input_size is not set: one number, or one number per axis. 1 for vectors."""
        rank: int | None = None
        """Number of axes besides channels. Null: the length of the size, or 2 if the size is one number above 1."""
        range: tuple[float, float] | None = None
        """Values that become -1 and 1; values outside are refused. Short for scale.kind=range."""
        scale: Scale | None = None
        """How values become numbers of size 1. Null, and no range: values stay unchanged."""
        nodata: tuple[float, ...] | None = None
        """Values that are missing; NaN and infinity are missing too then. Null: nothing may be missing."""
        weight: str | int | None = None
        """The channel that says how much each position counts (inverse variance); it is no value to learn."""
        tolerance: float = 0.01
        """Unit vectors only: files with a vector whose length is further from 1 are refused."""
        reader: config.Config | None = config.slot("reader", default=None)
        """What reads the files. Null: a reader of the core by suffix: .npy, .npz, .tif, .csv, .parquet or .h5."""
        channels_last: bool = False
        """The channel axis is the last axis in the files."""
        picture: tuple[str | int, ...] | None = None
        """The channels of pictures for people: three become red, green and blue. Null: the first ones."""
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
            _check_scale(self)
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
        self.reader: SampleReader = (
            BySuffix()
            if cfg.reader is None
            else registry().build("reader", cfg.reader, "data.modality.reader")
        )
        self.suffixes = self.reader.suffixes
        rank = cfg.rank or _rank_of(cfg.size) or _rank_of(size) or 2
        # An extra modality may have fewer axes than the main modality, whose size is given here.
        fits = size is not None and _rank_of(size) in (None, rank)
        nominal = size if fits or cfg.size is None else cfg.size
        assert nominal is not None
        names, self._in_files = _channels(cfg)
        self.cfg, self.scale = cfg, scale_of(cfg)
        self.sizing = _sizing_of(cfg, expand(nominal, rank))
        # One of the channels in the files may hold weights; the tokenizer sees the others.
        self._weight_place = None if cfg.weight is None else _place(cfg.weight, names)
        learnt = [place for place in range(self._in_files) if place != self._weight_place]
        bounded = self.scale.bounded if self.scale else cfg.kind not in ("continuous", "categorical")
        self.spec = DataSpec(
            channels=len(learnt) * (2 if cfg.kind == "angle" else 1),
            size=expand(nominal, rank),
            kind=cfg.kind,
            range=(-1.0, 1.0) if bounded else None,
            labels=cfg.labels,
            mask=cfg.nodata is not None,
            names=tuple(names[place] for place in learnt if names),
            loss="cross_entropy" if cfg.kind == "categorical" else "mse",
        )
        each = ("channels",) if len(learnt) <= CHANNELS else ()
        self.metrics: tuple[str, ...] = _METRICS.get(
            cfg.kind, (*(("psnr",) if bounded else ()), "mae", *each)
        )
        self.shown_channels = tuple(learnt.index(_place(one, names)) for one in cfg.picture or ())

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, or what NumPy can turn into an array, as `(channels, *extent)`, values unchanged.

        What is missing becomes NaN, and integers beside it become floats; the masked values of a masked array are
        missing. Raises `DataError` when shape, type or values differ from the declared ones. A `.npy` file above
        `MAPPED` bytes is mapped: `tensor`, `mask` and `weight` read their part, look at its values, and raise.
        """
        is_file = isinstance(source, (str, Path))
        name = str(source) if is_file else "array in memory"
        array = self._opened(Path(source)) if is_file else np.asanyarray(source)
        if not is_file and isinstance(array, np.memmap):  # a row of a file of samples
            array = np.asarray(array)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name}: has values of type {array.dtype}; only real numbers can be read")
        if self.cfg.kind == "categorical" and array.dtype.kind == "f":
            raise DataError(f"{name}: has values of type {array.dtype}; class ids are integers")
        array = self._with_channels_first(array, name)
        if isinstance(array, np.memmap):
            return array
        absent = self._missing(array, name)
        if self.learnt(absent).any(0).all():
            these = listed([*(f"{value:g}" for value in self.cfg.nodata or ()), "NaN and infinity"])
            raise DataError(
                f"{name}: has no position where every channel has a value; {these} count as missing"
            )
        return self._known(array, absent, name)

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Lengths of the axes besides channels."""
        return raw.shape[1:]

    def extent_of(self, source: Any) -> tuple[int, ...]:
        """The extent of a file, from its header, or of an array."""
        is_file = isinstance(source, (str, Path))
        name = str(source) if is_file else "array in memory"
        if not is_file:
            array = np.asarray(source)
        elif Path(source).suffix.lower() == ".npy":
            array = map_array(Path(source), name)
        else:
            array = self.reader.read(Path(source))
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
        part = self.learnt(self._part(raw, view))
        if self.cfg.kind in ("categorical", "binary"):
            x = torch.from_numpy(self._encode(_nearest(part, view.size)))
        else:
            x = torch.from_numpy(self._encode(part))
            x = torch.where(x.isnan().any(0), 0, x) if self.spec.mask else x
            x = self._to_unit(self._resized(x, view.size))
        if self.spec.mask:
            x = torch.where(self._valid(part, view.size), x, 0)
        x = x.flip(-1) if view.flip else x
        return rearrange(x, "1 ... -> ...") if self.cfg.kind == "categorical" else x

    def mask(self, raw: np.ndarray, view: View) -> Bool[Tensor, "*size"]:
        """True where the tensor of this view has values and no missing value is mixed in."""
        valid = self._valid(self.learnt(self._part(raw, view)), view.size)
        return valid.flip(-1) if view.flip else valid

    def weight(self, raw: np.ndarray, view: View) -> Float[Tensor, "*size"] | None:
        """The weight of each position; 0 where it is missing. None without a channel of weights."""
        if self._weight_place is None:
            return None
        part = self._part(raw, view)[self._weight_place : self._weight_place + 1].astype(np.float32)
        counts = self._resized(torch.from_numpy(np.nan_to_num(part)), view.size)
        return rearrange(counts.flip(-1) if view.flip else counts, "1 ... -> ...")

    def show(self, x: Tensor) -> np.ndarray:
        """One sample in the layout and units of the files, clipped to the declared range; class scores become ids.

        A channel of weights is 1.
        """
        x = self._single(x)
        if self.scale is not None and self.scale.bounded:
            x = x.clamp(-1, 1)
        array = self._decode(x)
        if self._weight_place is not None:
            array = np.insert(array, self._weight_place, 1, axis=0)
        if set(self.spec.size) == set(array.shape[1:]) == {1}:
            return array.reshape(len(array))
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
        rank, channels, shape = self.spec.rank, self._in_files, array.shape
        if set(self.spec.size) == {1} and array.ndim < 2:
            array = array.reshape(array.size, *self.spec.size)
        elif array.ndim == rank and channels == 1:
            array = rearrange(array, "... -> 1 ...")
        elif array.ndim == rank + 1 and self.cfg.channels_last:
            array = rearrange(array, "... c -> c ...")
        if array.ndim != rank + 1 or not array.size:
            raise DataError(
                f"{name}: has shape {shape}, but {channels} channels and {rank} axes are declared "
                "(data.modality.channels and .rank; the size [n] has one axis, the size n has two)"
            )
        if self.spec.size == (1,) and len(shape) == 2 and array.size != channels and not self.cfg.sizing:
            raise DataError(
                f"{name}: has shape {shape}, but a sample is a vector of {channels} numbers (size [1]). If the rows of "
                "a file are samples, set data.name=array; if a sample has more positions than one, set data.input_size"
            )
        if len(array) != channels:
            last, other, turned = ("last", 0, "false") if self.cfg.channels_last else ("first", -1, "true")
            hint = f": set data.modality.channels_last={turned}" if shape[other] == channels else ""
            raise DataError(
                f"{name}: has {len(array)} channels (shape {shape}, channels {last}), but {channels} are declared{hint}"
            )
        return array

    def learnt(self, array: np.ndarray) -> np.ndarray:
        """The channels to learn, without the channel of weights."""
        return array if self._weight_place is None else np.delete(array, self._weight_place, axis=0)

    def _valid(self, part: np.ndarray, size: tuple[int, ...]) -> Bool[Tensor, "*size"]:
        """Which positions of a part of a file are valid when it is resized."""
        valid = torch.from_numpy(~np.isnan(part).any(0, keepdims=True))
        if valid.all():
            return torch.ones(size, dtype=torch.bool)
        if tuple(valid.shape[1:]) != size:
            valid = self._resized(valid.float(), size) > 1 - 1e-3
        return rearrange(valid, "1 ... -> ...")

    def _resized(self, x: Float[Tensor, "c *extent"], size: tuple[int, ...]) -> Float[Tensor, "c *size"]:
        if tuple(x.shape[1:]) == size:
            return x
        if self.cfg.kind in ("categorical", "binary"):
            return torch.from_numpy(_nearest(x.numpy(), size))
        return _linear(x, size)

    def _opened(self, path: Path) -> np.ndarray:
        """The array in a file; a large one that is not packed is mapped."""
        plain = path.suffix.lower() == ".npy" and isinstance(self.reader, (BySuffix, Npy))
        if plain and path.is_file() and path.stat().st_size > MAPPED:
            return map_array(path, str(path))
        return self.reader.read(path)

    def _part(self, raw: np.ndarray, view: View) -> np.ndarray:
        """The part that a view names; of a mapped file its values are looked at here."""
        places = _places(raw.shape[1:], view)
        if not isinstance(raw, np.memmap):
            return raw[(slice(None), *places)]
        part = np.array(raw[(slice(None), *places)])
        name = f"{raw.filename}, from {[place.start for place in places]} on"
        return self._known(part, self._missing(part, name), name)

    def _known(self, array: np.ndarray, absent: np.ndarray, name: str) -> np.ndarray:
        """The values with NaN for what is missing. Raises `DataError` for values that the settings do not allow."""
        plain = np.ma.getdata(array)
        self._check_values(plain, absent, name)
        if not absent.any():
            return plain
        # Integers become floats that hold them exactly.
        wide = plain.dtype if plain.dtype.kind == "f" else np.float32 if plain.itemsize < 4 else np.float64
        return np.where(absent, np.nan, plain.astype(wide))

    def _missing(self, array: np.ndarray, name: str) -> np.ndarray:
        """Which values are missing. Raises `DataError` if some are and none may be."""
        if self.cfg.nodata is None:
            if np.ma.is_masked(array):
                count = int(np.ma.getmaskarray(array).sum())
                raise DataError(
                    f"{name}: the reader marks {count} of {array.size} values as missing; data.modality.nodata=[] "
                    "takes them as a mask"
                )
            return np.zeros(array.shape, bool)
        return missing(array, self.cfg.nodata)

    def _check_values(self, array: np.ndarray, absent: np.ndarray, name: str) -> None:
        """Raise `DataError` for the first value that is not missing and that the settings do not allow."""
        kind = self.cfg.kind
        with np.errstate(over="ignore"):
            single = array.astype(np.float32)
        problem = "is not finite in single precision"
        if self.cfg.nodata is None:
            problem += "; data.modality.nodata=[] takes NaN and infinity as a mask"
        _refuse(name, array, ~np.isfinite(single) & ~absent, problem)
        if self._weight_place is not None:
            channel = np.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1)) == self._weight_place
            _refuse(name, array, (single < 0) & channel & ~absent, "is a weight below 0")
            absent = absent | channel
        if kind == "categorical":
            labels = self.cfg.labels or 0
            problem = f"is no label; data.modality.labels={labels} (0 to {labels - 1})"
            _refuse(name, array, ((array < 0) | (array >= labels)) & ~absent, problem)
        elif kind == "binary":
            low, high = self.cfg.range or (0, 1)
            problem = f"is neither {low:g} nor {high:g}, the two values of a binary array"
            _refuse(name, array, (array != low) & (array != high) & ~absent, problem)
        elif self.scale is not None:
            values, known = self.learnt(array), ~self.learnt(absent)
            wrong, problem = self.scale.outside(values, known)
            _refuse(name, values, wrong, problem)
        if kind == "unit-vector":
            self._check_lengths(self.learnt(array), self.learnt(absent), name)

    def _check_lengths(self, vectors: np.ndarray, absent: np.ndarray, name: str) -> None:
        length = np.linalg.norm(self._encode(vectors), axis=0, keepdims=True)
        wrong = (np.abs(length - 1) > self.cfg.tolerance) & ~absent.any(0)
        found = f"{length.flat[int(wrong.argmax())]:.3g}"
        _refuse(
            name,
            vectors,
            wrong,
            f"belongs to a vector of length {found}, not 1 (data.modality.tolerance={self.cfg.tolerance:g}); "
            "data.modality.range maps values on another scale to -1..1",
        )

    def _encode(self, array: np.ndarray) -> np.ndarray:
        """The values of the tensor; always a copy. What is missing stays NaN, or has any value of its kind."""
        if self.cfg.kind == "categorical":
            return np.nan_to_num(array).astype(np.int64)
        if self.cfg.kind == "binary":
            high = self.cfg.range[1] if self.cfg.range else 1
            return np.where(array == high, np.float32(1), np.float32(-1))
        if self.cfg.kind == "angle":
            wide = array.astype(np.float64)
            return np.concatenate([np.sin(wide), np.cos(wide)]).astype(np.float32)
        return array.astype(np.float32) if self.scale is None else self.scale.encode(array)

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
        return x.float().numpy() if self.scale is None else self.scale.decode(x.numpy())

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
    at_least(cfg, labels=1)
    names, count = _channels(cfg)
    shown = list(names) or cfg.channels
    if cfg.kind == "categorical" and count != 1:
        raise SettingError("channels", f"{shown}: a class map has one channel")
    if cfg.kind != "categorical" and cfg.channels is None:
        raise ValueError(
            "channels is required: set it to the number of values per position, or to a list of their names"
        )
    wrong = next((name for name in names if not re.fullmatch(r"[\w.+-]+", name)), None)
    if wrong is not None:
        raise SettingError("channels", f"{shown}: '{wrong}' is no name; use letters, digits and _ . + -")
    if len({*names}) < len(names):
        raise SettingError("channels", f"{shown} names a channel twice")
    for setting, given in (("weight", cfg.weight), *(("picture", one) for one in cfg.picture or ())):
        if given is not None:
            _check_place(setting, given, names, count)
    if cfg.picture is not None and len(cfg.picture) not in (1, 3):
        raise SettingError("picture", f"{list(cfg.picture)} must be one channel or three")
    least = (2 if cfg.kind == "unit-vector" else 1) + (cfg.weight is not None)
    if cfg.weight is not None and cfg.weight in (cfg.picture or ()):
        raise SettingError(
            "picture", f"{list(cfg.picture or ())} has the channel of weights, which is no picture"
        )
    if count < least:
        more = " and a channel of weights" if cfg.weight is not None else ""
        raise SettingError("channels", f"{shown} must be at least {least} for kind '{cfg.kind}'{more}")


def _check_place(setting: str, given: str | int, names: tuple[str, ...], count: int) -> None:
    """Refuse a channel that there is not: a name, or a number from 0."""
    if isinstance(given, int):
        if not 0 <= given < count:
            raise SettingError(setting, f"{given}: channels are 0 to {count - 1}")
    elif given not in names:
        known = f"channels are {listed(names)}" if names else "data.modality.channels names no channels"
        raise SettingError(setting, f"{given} is no channel; {known}.{did_you_mean(given, names)}")


def _check_scale(cfg: Array.Config) -> None:
    if cfg.range is not None and cfg.kind in ("categorical", "angle"):
        raise SettingError("range", f"{list(cfg.range)} has no meaning for kind '{cfg.kind}'")
    if cfg.range is not None and not cfg.range[0] < cfg.range[1]:
        raise SettingError("range", f"{list(cfg.range)} must be two numbers in ascending order")
    if cfg.scale is None:
        return
    if cfg.kind != "continuous":
        fitting = "; range takes two numbers" if cfg.kind in ("binary", "unit-vector") else ""
        raise SettingError(("scale",), f"scale has no meaning for kind '{cfg.kind}'{fitting}")
    if cfg.range is not None:
        raise SettingError(
            ("range", "scale"), "range and scale are both set; range is short for scale.kind=range: keep one"
        )
    count = _channels(cfg)[1] - (cfg.weight is not None)
    if cfg.scale.channels not in (None, count):
        raise SettingError(
            ("scale",),
            f"scale has {cfg.scale.channels} numbers for {count} channels: give one, or one for each channel",
        )


def scale_of(cfg: Array.Config) -> Scale | None:
    """How continuous values and unit vectors become numbers of size 1."""
    if cfg.range is None or cfg.kind == "binary":
        return cfg.scale
    return Scale(kind="range", low=cfg.range[0], high=cfg.range[1])


def _channels(cfg: Array.Config) -> tuple[tuple[str, ...], int]:
    """The names of the channels in the files, if they have any, and their number."""
    if isinstance(cfg.channels, tuple):
        return cfg.channels, len(cfg.channels)
    return (), 1 if cfg.channels is None else cfg.channels


def _place(channel: str | int, names: tuple[str, ...]) -> int:
    """The number of a channel in the files."""
    return channel if isinstance(channel, int) else names.index(channel)


def _refuse(name: str, array: np.ndarray, wrong: np.ndarray, problem: str) -> None:
    """Raise `DataError` for the first value that is wrong."""
    if wrong.any():
        place = tuple(int(axis) for axis in np.argwhere(wrong)[0])
        raise DataError(f"{name}: the value {array[place]} at {list(place)} (channel first) {problem}")


def _places(extent: tuple[int, ...], view: View) -> list[slice]:
    """The part that the view names, rounded to whole elements, at least one element along each axis."""
    places = []
    for start, stop, n in zip(*pixels(view, extent), extent):
        first = min(round(start), n - 1)
        places.append(slice(first, max(round(stop), first + 1)))
    return places


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
