"""Photographs and other pictures as RGB in [-1, 1].

Whatever Pillow reads becomes 8-bit RGB: grey is repeated, transparency is composed on a background, 16-bit
grey is divided by 257 (of 16-bit colour Pillow keeps the upper byte), EXIF orientation is applied. No colour
profile is: CMYK is converted by the plain formula, and an RGB file keeps its numbers. Of several frames the
first is taken.
"""

import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from vqcore import config
from vqcore.errors import DataError
from vqcore.modalities.views import centred_box, expand, pixels, resized_crop_box, view_of
from vqcore.protocols import DataSpec, View

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
"""Tried by content, not suffix; no others, because Pillow runs Ghostscript for PostScript."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for damaged files."""


class RGB:
    """Pictures, `(3, h, w)` in [-1, 1]: a random resized crop and flip in training, else the centred box."""

    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
    metrics = ("psnr", "mae")

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of pictures."""

        training_only: ClassVar[tuple[str, ...]] = ("hflip", "min_crop_scale", "ratio")

        hflip: float = 0.5
        """Share of the training samples that are mirrored left to right."""
        min_crop_scale: float = 0.8
        """Smallest share of a picture's area that a training crop keeps; 1 is the largest."""
        ratio: tuple[float, float] = (0.75, 1.3333333)
        """Smallest and largest factor on the aspect of a training crop."""
        resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"
        """Pillow's filter for resizing."""
        background: tuple[int, int, int] = (255, 255, 255)
        """Colour that shows through transparent pixels, 0 to 255."""

        def __post_init__(self) -> None:
            if not 0 <= self.hflip <= 1:
                raise ValueError(f"hflip={self.hflip} is no probability; it lies in 0..1")
            if not 0 < self.min_crop_scale <= 1:
                raise ValueError(f"min_crop_scale={self.min_crop_scale} must lie above 0 and at most at 1")
            if not 0 < self.ratio[0] <= self.ratio[1]:
                raise ValueError(f"ratio={list(self.ratio)} must be two positive numbers in rising order")
            if not all(0 <= value <= 255 for value in self.background):
                raise ValueError(f"background={list(self.background)} must lie in 0..255")

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError(
                "pictures have no size of their own: set data.input_size, e.g. data.input_size=224"
            )
        self.cfg = cfg
        self.spec = DataSpec(channels=3, size=expand(size, 2))

    def read(self, source: Any) -> Image.Image:
        """Any picture as upright 8-bit RGB: a path, a PIL image or an array.

        Arrays are `(h, w)`, `(h, w, 3)` or `(h, w, 4)` uint8, or `(h, w)` uint16. Raises `DataError` when the
        picture is damaged, too large for Pillow, or made of floats.
        """
        name = str(source) if isinstance(source, (str, Path)) else "picture in memory"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", category=UserWarning
                )  # broken metadata; the pixels are fine
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                if isinstance(source, np.ndarray):
                    return self._to_rgb(_from_array(source))
                if isinstance(source, Image.Image):
                    return self._to_rgb(source)
                with Image.open(source, formats=FORMATS) as image:
                    return self._to_rgb(image)
        except UnidentifiedImageError as error:
            raise DataError(f"{name}: is empty, damaged or no picture in {', '.join(FORMATS)}") from error
        except DataError as error:
            raise error.at(name) from error
        except _DAMAGE as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(f"{name}: {reason}") from error

    def extent(self, raw: Image.Image) -> tuple[int, ...]:
        """Height and width in pixels."""
        return raw.height, raw.width

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop and a flip, or with `rng=None` the largest centred box."""
        if rng is None:
            return view_of(centred_box(extent, size), extent, size)
        box = resized_crop_box(extent, size, rng, self.cfg.min_crop_scale, self.cfg.ratio)
        return view_of(box, extent, size, flip=bool(rng.random() < self.cfg.hflip))

    def tensor(self, raw: Image.Image, view: View) -> Float[Tensor, "3 h w"]:
        """The part of a picture that a view names, at the view's size, in [-1, 1]."""
        (top, left), (bottom, right) = pixels(view, self.extent(raw))
        resample = Image.Resampling[self.cfg.resample.upper()]
        height, width = view.size
        image = raw.resize((width, height), resample, box=(left, top, right, bottom))
        # Division by 255, then mean and deviation 0.5, in this order: published encoders saw these floats.
        x = torch.from_numpy(np.array(image)).float().div_(255).sub_(0.5).div_(0.5)
        x = rearrange(x, "h w c -> c h w").contiguous()
        return x.flip(-1) if view.flip else x

    def show(self, x: Float[Tensor, "*b 3 h w"]) -> Image.Image:
        """One sample as a picture; values outside [-1, 1] are clamped."""
        x = x.detach().cpu().float()
        x = rearrange(x, "1 c h w -> c h w") if x.ndim == 4 else x
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Image.fromarray(rearrange(levels, "c h w -> h w c").contiguous().numpy())

    def _to_rgb(self, image: Image.Image) -> Image.Image:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        # Before Pillow 11.3 a 16-bit PNG has mode I.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            levels = (np.asarray(image).astype(np.uint32) + 128) // 257
            rgb = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
        elif image.mode in ("I", "F"):
            kind = "floats" if image.mode == "F" else "32-bit integers"
            raise DataError(
                f"holds {kind} (mode {image.mode}), whose range is unknown; save it with 8 or 16 bits"
            )
        elif image.has_transparency_data:
            above = image.convert("RGBA")
            below = Image.new("RGBA", above.size, (*self.cfg.background, 255))
            rgb = Image.alpha_composite(below, above).convert("RGB")
        else:
            rgb = image.convert("RGB")
        return rgb if turn is None else rgb.transpose(turn)


def _from_array(array: np.ndarray) -> Image.Image:
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    colour = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (grey or colour) or not array.size:
        raise DataError(
            f"an array of shape {array.shape} and type {array.dtype} is no picture; "
            "it must be (h, w), (h, w, 3) or (h, w, 4) of type uint8, or (h, w) of type uint16"
        )
    return Image.fromarray(np.ascontiguousarray(array))
