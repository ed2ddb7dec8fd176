"""Photographs and other pictures as RGB in [-1, 1].

Every picture becomes 8-bit RGB: grey is repeated, transparency is composed on a background, 16-bit grey is divided by
257 (Pillow keeps the upper byte of 16-bit colour), EXIF orientation is applied. Colour profiles are ignored: CMYK is
converted by the plain formula, and an RGB file keeps its numbers. Of several frames, the first is used.

In evaluation and in a finished tokenizer, pictures are read at full size and resized by Pillow. In training, pictures
are read at a whole fraction of their size if no crop needs more detail (JPEG decodes such a fraction in less time), and
crops are resized by torch's 8-bit filters, which have the same definition as Pillow's and differ by at most one level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from vqcore.config import above_zero
from vqcore.errors import DataError, SettingError
from vqcore.modalities.planes import SIDEWAYS, SUFFIXES, Smooth, cut, read_picture, upright
from vqcore.modalities.views import CropConfig, crop_view, pixels, smallest_crop
from vqcore.protocols import DataSpec, View, expand

FAST = ("bilinear", "bicubic")
"""Filters that torch has for 8-bit pictures."""
WINDOW = 11
"""Structural similarity needs this number of pixels along each axis; smaller pictures are measured without ssim."""


class Reduced(NamedTuple):
    """A picture in less detail: 8-bit RGB, and the height and width of the full picture.

    A pixel stands for `factor x factor` pixels of the full picture; the last row and column may reach beyond it.
    """

    levels: UInt8[np.ndarray, "rows columns 3"]
    extent: tuple[int, int]
    factor: int


Raw = UInt8[np.ndarray, "height width 3"] | Reduced


class RGB:
    """Pictures, `(3, h, w)` in [-1, 1]: a random resized crop and flip in training, else the largest centred box."""

    suffixes = streams = SUFFIXES
    metrics: tuple[str, ...]

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings of pictures."""

        resample: Smooth = "bicubic"
        """Pillow's filter for resizing."""
        color_jitter: float = 0.0
        """Training: contrast changes by up to this share, brightness and each channel by a third of it."""
        background: tuple[int, int, int] = (255, 255, 255)
        """Colour that shows through transparent pixels, 0 to 255."""
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
        """Values that become 0, by channel, on a scale from 0 (black) to 1. With std 0.5, the tensor is in [-1, 1]."""
        std: tuple[float, float, float] = (0.5, 0.5, 0.5)
        """Distance from the mean that becomes 1. ImageNet: mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]."""

        training_only: ClassVar[tuple[str, ...]] = (*CropConfig.training_only, "color_jitter")

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.color_jitter < 1:
                raise SettingError("color_jitter", f"{self.color_jitter} must lie in [0, 1)")
            if not all(0 <= value <= 255 for value in self.background):
                raise SettingError("background", f"{list(self.background)} must lie in 0..255")
            above_zero(self, "std")

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError("pictures need a size: set data.input_size, e.g. data.input_size=224")
        self.cfg = cfg
        self._mean, self._std = _column(cfg.mean), _column(cfg.std)
        low = min(-mean / std for mean, std in zip(cfg.mean, cfg.std))
        high = max((1 - mean) / std for mean, std in zip(cfg.mean, cfg.std))
        alike = len(set(cfg.mean)) == len(set(cfg.std)) == 1
        self.spec = DataSpec(
            channels=3, size=expand(size, 2), range=(low, high), levels=255 if alike else None
        )
        self.reading = (type(self).read, cfg.background)
        self.metrics = ("psnr", "ssim", "mae") if min(self.spec.size) >= WINDOW else ("psnr", "mae")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> Raw:
        """Any picture as upright 8-bit RGB: a path, an open file, a PIL image or an array.

        Arrays are `(h, w)`, `(h, w, 3)` or `(h, w, 4)` uint8, or `(h, w)` uint16. With `at_least`, the picture is
        reduced by a whole factor, as far as training crops of this size need no more detail. Raises `DataError` when
        the picture is damaged, too large for Pillow, or has floats.
        """

        def convert(image: Image.Image) -> Raw:
            if at_least is None:
                return np.array(self._to_rgb(image))
            # The EXIF orientation is known for sure only after loading, so the factor fits both orientations.
            factor = min(self._spare(extent, at_least) for extent in (image.size, image.size[::-1]))
            if factor < 2:
                return np.array(self._to_rgb(image))
            width, height = image.size
            if not isinstance(source, Image.Image):  # `draft` would change an image of the caller
                image.draft(None, (width // factor, height // factor))  # JPEG only
            drafted = round(width / image.width)
            turn = upright(image)
            if drafted == 1:
                width, height = image.size  # a TIFF is turned upright while loading
            rest = factor // drafted
            levels = np.array(self._to_rgb(image).reduce(rest))
            extent = (width, height) if turn in SIDEWAYS else (height, width)
            return Reduced(levels, extent, drafted * rest)

        return read_picture(source, convert)

    def _spare(self, extent: tuple[int, ...], size: tuple[int, ...]) -> int:
        """The whole factor by which the smallest training crop is longer than `size`."""
        if self.cfg.resample not in FAST:
            return 1
        return min(side // wanted for side, wanted in zip(smallest_crop(self.cfg, extent, size), size))

    def extent(self, raw: Raw) -> tuple[int, ...]:
        """Height and width of the full picture in pixels."""
        return raw.extent if isinstance(raw, Reduced) else raw.shape[:2]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop and a flip, or with `rng=None` the largest centred box."""
        return crop_view(self.cfg, extent, size, rng)

    def tensor(self, raw: Raw, view: View) -> Float[Tensor, "3 h w"]:
        """The part of a picture that the view names, at the view's size, in [-1, 1]."""
        levels = _levels(raw, view, self.cfg.resample)
        x = (levels.flip(-1) if view.flip else levels).float()
        if self.cfg.color_jitter and view.draw:
            return self._jitter(x, view.draw)
        # Published encoders saw the floats that this order of operations gives.
        return x.div_(255).sub_(self._mean).div_(self._std)

    def _jitter(self, x: Float[Tensor, "3 h w"], draw: int) -> Float[Tensor, "3 h w"]:
        """Levels 0 to 255 as normalised values, with random changes of contrast, brightness and each channel."""
        strength = self.cfg.color_jitter
        # Each factor uses twelve bits of the draw: a generator would take as long as all the arithmetic.
        contrast, shift, *gains = ((draw >> 12 * n & 4095) / 2047.5 - 1 for n in range(5))
        contrast, shift = 1 + strength * contrast, strength / 3 * shift
        moved = float(x.mean()) / 255 * (1 - contrast) + shift
        gains = [1 + strength / 3 * gain for gain in gains]
        scale, offset = [gain * contrast / 255 for gain in gains], [gain * moved for gain in gains]
        # One tensor for both, because small tensors cost nearly as much time as samples.
        both = torch.tensor((scale, offset)).view(2, 3, 1, 1)
        x = x.mul_(both[0]).add_(both[1]).clamp_(0, 1)
        return x.sub_(self._mean).div_(self._std)

    def show(self, x: Float[Tensor, "*b 3 h w"]) -> Image.Image:
        """One sample as a picture; values outside the range of pictures are clamped."""
        x = x.detach().cpu().float()
        x = rearrange(x, "1 c h w -> c h w") if x.ndim == 4 else x
        share = x * self._std + self._mean
        levels = (share.clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(rearrange(levels, "c h w -> h w c").contiguous().numpy())

    def _to_rgb(self, image: Image.Image) -> Image.Image:
        turn = upright(image)
        # Before Pillow 11.3 a 16-bit PNG has mode I.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            levels = (np.asarray(image).astype(np.uint32) + 128) // 257
            rgb = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
        elif image.mode in ("I", "F"):
            kind = "floats" if image.mode == "F" else "32-bit integers"
            raise DataError(
                f"has {kind} (mode {image.mode}), whose range is unknown; save the picture with 8 or 16 bits"
            )
        elif image.has_transparency_data:
            above = image.convert("RGBA")
            below = Image.new("RGBA", above.size, (*self.cfg.background, 255))
            rgb = Image.alpha_composite(below, above).convert("RGB")
        else:
            rgb = image.convert("RGB")
        return rgb if turn is None else rgb.transpose(turn)


def _levels(raw: Raw, view: View, resample: str) -> UInt8[Tensor, "3 h w"]:
    """The part of a picture that the view names, at the view's size: by torch in training, otherwise by Pillow.

    A training crop of a reduced picture begins and ends at the nearest whole pixels.
    """
    if isinstance(raw, Reduced) and view.draw:
        levels = raw.levels
        box = pixels(view, tuple(side / raw.factor for side in raw.extent))
    else:
        levels = raw.levels if isinstance(raw, Reduced) else raw
        box = pixels(view, levels.shape[:2])
        whole = all(edge.is_integer() for edges in box for edge in edges)
        if not view.draw or resample not in FAST or not whole:
            resized = np.array(cut(Image.fromarray(levels), view, resample))
            return torch.from_numpy(resized).permute(2, 0, 1).contiguous()
    (top, left), (bottom, right) = (map(round, edges) for edges in box)
    part = torch.from_numpy(levels[top:bottom, left:right]).permute(2, 0, 1)[None]
    return interpolate(part, size=view.size, mode=resample, antialias=True)[0].contiguous()


def _column(values: Sequence[float]) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
