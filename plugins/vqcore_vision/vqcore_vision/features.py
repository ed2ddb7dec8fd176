"""Dense feature maps of another network (CLIP, DINOv2, ImageBind ...), `(c, h, w)`, from .npy, .npz or .safetensors.

A map is cut to the wanted size and not resized, because an interpolated feature is not the network's feature at that
place. `crop: resize` does resize. The tensor has the values of the files unless mean, std or norm are set, as in the
feature tokenizers of 4M (arXiv 2312.06647 and 2406.09406), which use a smooth L1 loss.

With `teacher`, the files are pictures, and a frozen network turns them into maps on the device.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from vqcore import config
from vqcore.config import above_zero, at_least, slot
from vqcore.data.npy import read_array, read_member
from vqcore.errors import DataError, SettingError, cause, did_you_mean, listed
from vqcore.modalities.rgb import RGB
from vqcore.modalities.views import centred_box, pixels, scaled_box, view_of
from vqcore.protocols import DataSpec, View, expand
from vqcore.reading import check_memory, size_of
from vqcore_vision.taught import Taught

SUFFIXES = (".npy", ".npz", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(config.Config):
    """Settings that feature maps and feature vectors have in common."""

    teacher: config.Config | None = slot("teacher", default=None)
    """The frozen network that makes features of pictures, e.g. {name: percept/timm, model: ..., resize: false}. Its
    weights decide the tokens. Null: the files hold features."""
    channels: int
    """Length of a feature vector, e.g. 512 for CLIP-B/16, 768 for DINOv2-B/14, 1280 for ImageBind-H/14."""
    key: str | None = None
    """Name of the array in a .npz or .safetensors file; not needed if the file has one array."""
    mean: float | tuple[float, ...] | None = None
    """Subtracted from the values: one number, or one number per channel."""
    std: float | tuple[float, ...] | None = None
    """The values minus `mean` are divided by this: one number, or one number per channel."""
    norm: float | None = None
    """Every vector is first scaled to this length; `show` cannot restore the original length."""
    stride: int | None = None
    """Pixels of a picture for one position, along each axis, e.g. 16 for CLIP-B/16; for a vector, the picture's side.
    Needed with `teacher`, and for a map as an extra modality (pixels of the cropped picture); not used elsewhere."""

    def __post_init__(self) -> None:
        if self.teacher is not None:
            config.refuse_idle(self, "a teacher, which reads pictures,", "key")
            if self.stride is None:
                raise SettingError(
                    "stride", "null: say how many pixels of a picture are one position, e.g. 16 for CLIP-B/16"
                )
        at_least(self, stride=1, channels=1)
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.channels:
                raise SettingError(
                    (name, "channels"),
                    f"{name} has {len(value)} numbers for channels={self.channels}: give one, or one per channel",
                )
        above_zero(self, "std", "norm")


class Scaling:
    """From the values of files to the values of tensors and back."""

    def __init__(self, cfg: FeatureConfig):
        self.norm = cfg.norm
        self.mean = torch.tensor(0.0 if cfg.mean is None else cfg.mean, dtype=torch.float32)
        self.std = torch.tensor(1.0 if cfg.std is None else cfg.std, dtype=torch.float32)

    def apply(self, x: Float[Tensor, "..."], dim: int = 0) -> Float[Tensor, "..."]:
        """Scale to `norm`, subtract the mean, divide by the deviation; channels are the axis `dim`."""
        if self.norm is not None:
            x = F.normalize(x, dim=dim) * self.norm
        mean, std = (_column(one.to(x.device), x.ndim - dim) for one in (self.mean, self.std))
        return (x - mean) / std

    def undo(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Multiply by the deviation and add the mean; channels are the last axis."""
        return x * self.std.to(x.device) + self.mean.to(x.device)


class Features:
    """Maps of feature vectors, one vector per position of a grid. Sizes are numbers of positions."""

    suffixes: tuple[str, ...] = SUFFIXES
    metrics = ("cosine", "mae")

    @dataclass(frozen=True, kw_only=True)
    class Config(FeatureConfig):
        """Settings of feature maps."""

        training_only: ClassVar[tuple[str, ...]] = ("hflip", "min_crop_scale")

        layout: Literal["chw", "hwc", "tokens"] = "chw"
        """Order of the axes in the files; tokens: (positions, c), row by row, of a square map, or (h, w, c)."""
        prefix_tokens: int = 0
        """With layout tokens: number of tokens before the map (class token, registers), which are left out."""
        crop: Literal["cut", "resize"] = "cut"
        """cut: a window of the wanted size; resize: the largest box with the wanted aspect ratio, interpolated."""
        min_crop_scale: float = 1.0
        """Smallest share of a picture or map that a training crop keeps; with `teacher` or crop resize."""
        hflip: float = 0.0
        """Share of training samples that are mirrored; a mirrored map is not quite the map of the mirrored picture."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.teacher is not None:
                config.refuse_idle(
                    self, "a teacher, which reads pictures,", "layout", "prefix_tokens", "crop"
                )
            if self.prefix_tokens < 0:
                raise SettingError("prefix_tokens", f"{self.prefix_tokens} is negative")
            if self.prefix_tokens and self.layout != "tokens":
                raise SettingError(
                    "prefix_tokens",
                    f"{self.prefix_tokens} with layout={self.layout}: only layout=tokens has prefix tokens",
                )
            if self.crop == "cut" and self.teacher is None:
                config.refuse_idle(self, "crop=cut", "min_crop_scale")
            if not 0 < self.min_crop_scale <= 1:
                raise SettingError("min_crop_scale", f"{self.min_crop_scale} must lie in (0, 1]")
            if not 0 <= self.hflip <= 1:
                raise SettingError("hflip", f"{self.hflip} must lie in 0..1")

    def __new__(cls, cfg: Any = None, *, size: Any = None) -> "Features":
        """Maps from files, or with a teacher maps of pictures. Copies and pickles come without settings."""
        taught = cls is Features and cfg is not None and cfg.teacher is not None
        return super().__new__(TaughtFeatures if taught else cls)

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError(
                "feature maps need a size: set data.input_size in positions, e.g. 14 for 224 px in patches of 16"
            )
        self.cfg, self.scaling = cfg, Scaling(cfg)
        self.spec = DataSpec(channels=cfg.channels, size=expand(size, 2), range=None, loss="smooth_l1")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, an array or a tensor as `(c, h, w)` float32, with the values of the file.

        Raises `DataError` for another number of channels, another number of axes, and values that are not finite.
        """
        array, name = read_numbers(source, self.cfg.key)
        array = self._with_channels_first(array, name)
        if len(array) != self.cfg.channels:
            raise DataError(
                f"{name}: has {len(array)} channels (shape {array.shape}, channels first), but "
                f"data.modality.channels is {self.cfg.channels}; data.modality.layout says which axis is channels"
            )
        return array

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Height and width in positions."""
        return raw.shape[1:]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A window (centred, or in training anywhere), or with `crop: resize` the largest box or a part of it."""
        flip = rng is not None and bool(rng.random() < self.cfg.hflip)
        if self.cfg.crop == "resize":
            box = centred_box(extent, size)
            if rng is not None and self.cfg.min_crop_scale < 1:
                box = scaled_box(extent, size, rng, self.cfg.min_crop_scale)
            return view_of(box, extent, size, flip)
        if any(n < side for n, side in zip(extent, size)):
            raise DataError(
                f"a feature map of {' x '.join(map(str, extent))} positions has no window of "
                f"{' x '.join(map(str, size))}; make larger maps, or set data.modality.crop=resize"
            )
        room = [n - side for n, side in zip(extent, size)]
        start = tuple(n // 2 if rng is None else int(rng.integers(n + 1)) for n in room)
        return view_of((start, size), extent, size, flip)

    def ride(self, view: View, main: DataSpec) -> View:
        """The same part of the map, with one position for `stride` pixels of the crop along each axis.

        Raises `ValueError` without `stride`, for a size that is no multiple of it, and beside samples without two axes.
        """
        stride = self.cfg.stride
        if main.rank != 2:
            raise ValueError(
                f"a feature map follows the crop of samples with 2 axes, but these have {main.rank}"
            )
        if stride is None:
            raise ValueError(
                "a feature map needs its stride beside other data: set stride to the pixels of one position, e.g. "
                "stride=16 for CLIP-B/16, or stride=1 beside a map of the same grid"
            )
        if any(side % stride for side in view.size):
            raise ValueError(f"the size {' x '.join(map(str, view.size))} is no multiple of stride={stride}")
        return replace(view, size=tuple(side // stride for side in view.size))

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "c h w"]:
        """The part of a map that the view names, interpolated only if it has another size than the view."""
        (top, left), (bottom, right) = pixels(view, self.extent(raw))
        top, left = min(round(top), raw.shape[1] - 1), min(round(left), raw.shape[2] - 1)
        part = raw[:, top : max(round(bottom), top + 1), left : max(round(right), left + 1)]
        x = torch.from_numpy(np.array(part))
        if x.shape[1:] != view.size:
            batch = rearrange(x, "c h w -> 1 c h w")
            batch = F.interpolate(batch, view.size, mode="bilinear", align_corners=False, antialias=True)
            x = rearrange(batch, "1 c h w -> c h w")
        x = self.scaling.apply(x)
        return x.flip(-1) if view.flip else x

    def values(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """A batch in the units of the files."""
        return rearrange(self.scaling.undo(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")

    def show(self, x: Float[Tensor, "*b c h w"]) -> np.ndarray:
        """One map in the units of the files, which `read` takes: `(c, h, w)` for layout chw, else `(h, w, c)`."""
        pattern = "c h w" if self.cfg.layout == "chw" else "h w c"
        return rearrange(self._single(x), f"c h w -> {pattern}").numpy()

    def picture(self, x: Float[Tensor, "*b c h w"]) -> Image.Image:
        """The first three principal components of the map's vectors as red, green and blue.

        The components are computed from this map alone; the sign makes the largest loading positive.
        """
        return components(self._single(x))

    def _single(self, x: Tensor) -> Float[Tensor, "c h w"]:
        x = x.detach().cpu().float()
        return self.values(x if x.ndim == 4 else rearrange(x, "c h w -> 1 c h w"))[0]

    def _with_channels_first(self, array: np.ndarray, name: str) -> np.ndarray:
        layout, prefix = self.cfg.layout, self.cfg.prefix_tokens
        if array.ndim not in ((2, 3) if layout == "tokens" else (3,)) or not array.size:
            axes = {
                "chw": "(channels, h, w)",
                "hwc": "(h, w, channels)",
                "tokens": "(positions, channels) or (h, w, channels)",
            }[layout]
            raise DataError(
                f"{name}: has shape {array.shape}, but data.modality.layout={layout} means {axes}"
            )
        if layout == "chw":
            return array
        if array.ndim == 3:
            # A batch of one and a map of height 1 have the same shape; the wanted size tells which one it is.
            one, count = array.shape[0] == 1 < self.spec.size[0], array.shape[1] - prefix
            if layout == "tokens" and one and count > 1 and math.isqrt(count) ** 2 == count:
                raise DataError(
                    f"{name}: has shape {array.shape}, whose first axis is a batch axis; save one map in each file, "
                    "as (positions, channels)"
                )
            return rearrange(array, "h w c -> c h w")
        side = round(max(0, len(array) - prefix) ** 0.5)
        if side * side + prefix != len(array):
            raise DataError(
                f"{name}: {len(array)} tokens minus data.modality.prefix_tokens={prefix} are not a square map"
            )
        return rearrange(array[prefix:], "(h w) c -> c h w", h=side)


class TaughtFeatures(Taught, Features):
    """Maps that a teacher makes of pictures."""

    def __init__(self, cfg: Features.Config, *, size: int | tuple[int, ...] | None):
        Features.__init__(self, cfg, size=size)
        self.take_teacher(RGB.Config(hflip=cfg.hflip, min_crop_scale=cfg.min_crop_scale))


def read_numbers(source: Any, key: str | None) -> tuple[np.ndarray, str]:
    """Finite float32 numbers from a `.npy`, `.npz` or `.safetensors` file, an array or a tensor; and a name for errors.

    `key` names the array in a file of several arrays. Raises `DataError`, with the place of a value that is not finite.
    """
    name = str(source) if isinstance(source, (str, Path)) else "array in memory"
    if isinstance(source, (str, Path)):
        array = _read_file(Path(source), key, name)
    elif isinstance(source, Tensor):
        array = source.detach().cpu().float().numpy()
    else:
        array = np.asarray(source)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name}: has values of type {array.dtype}; features are real numbers")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        place = np.argwhere(~np.isfinite(array))[0].tolist()
        raise DataError(f"{name}: the value at {place} is {array[tuple(place)]}; features are finite numbers")
    return array, name


def components(x: Float[Tensor, "c h w"]) -> Image.Image:
    """The principal components of a map's vectors as colours; black is -2 and full colour is 2 deviations."""
    flat = rearrange(x.double(), "c h w -> (h w) c")
    flat = flat - flat.mean(0)
    left, sizes, axes = torch.linalg.svd(flat, full_matrices=False)
    largest = axes.abs().argmax(1, keepdim=True)
    parts = (left * sizes * axes.gather(1, largest).sign().T)[:, :3]
    parts = F.pad(parts, (0, 3 - parts.shape[1]))
    spread = parts.square().mean(0).sqrt().clamp(min=1e-12)
    colours = ((parts / spread / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(rearrange(colours, "(h w) c -> h w c", h=x.shape[1]))


def _column(values: Tensor, rank: int) -> Tensor:
    return values.reshape(-1, *[1] * (rank - 1)) if values.ndim else values


def _read_file(path: Path, key: str | None, name: str) -> np.ndarray:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return read_member(path, key, name, "data.modality.key")
    if suffix == ".safetensors":
        return _read_safetensors(path, key, name)
    return read_array(path, name)


def _read_safetensors(path: Path, key: str | None, name: str) -> np.ndarray:
    check_memory(size_of(path, DataError, name), DataError, name)
    try:
        with safe_open(path, "pt") as file:  # NumPy has no bfloat16
            names = list(file.keys())
            if key is None and len(names) == 1:
                key = names[0]
            if key is None:
                raise DataError(
                    f"{name}: has the arrays {listed(names) or 'nothing'}; choose one with data.modality.key"
                )
            if key not in names:
                raise DataError(
                    f"{name}: has no array '{key}'.{did_you_mean(key, names)} Arrays: {listed(names)}"
                )
            return file.get_tensor(key).float().numpy()
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{name}: {cause(error)}") from error
