"""Planar samples: reads pictures, `.npy` and `.exr` files, and cuts a view out of them with Pillow's filters.

Planes are arrays `(c, h, w)`. Planes are resized in their own type: 8-bit planes round as Pillow rounds pictures.
"""

import math
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from einops import rearrange
from PIL import ExifTags, Image, UnidentifiedImageError

from vqcore.data.npy import read_array
from vqcore.errors import DataError, cannot_import, cause
from vqcore.modalities.views import pixels
from vqcore.protocols import View

T = TypeVar("T")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
"""Recognised by content, not by suffix. Other formats are refused, because Pillow runs Ghostscript for PostScript."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
"""Suffixes of files in these formats, which can be read from streams as well."""
Smooth = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
"""Pillow's filters, for values that may be averaged."""
Filter = Literal["nearest", "pillow-nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
"""`nearest` takes the pixel under each new centre, exactly. Pillow's rounding errors add up and differ by type."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that undoes each EXIF orientation."""
SIDEWAYS = tuple(UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
"""The transpositions that exchange width and height."""
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
"""Exceptions that Pillow raises for damaged files."""


def name_of(source: Any) -> str:
    """The name of a source in error messages: its path, the name of a stream, or `picture in memory`."""
    name = source if isinstance(source, (str, Path)) else getattr(source, "name", None)
    return str(name) if isinstance(name, (str, Path)) else "picture in memory"


def read_picture(source: Any, convert: Callable[[Image.Image], T]) -> T:
    """The result of `convert` for a picture: a path, a stream, a PIL image, or an array that PIL can represent.

    Raises `DataError`, with the name of the file, when the picture is damaged or too large for Pillow, or when
    `convert` refuses it.
    """
    name = name_of(source)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # broken metadata; the pixels are fine
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, np.ndarray):
                return convert(_from_array(source))
            if isinstance(source, Image.Image):
                return convert(source)
            if not isinstance(source, (str, Path)) and not hasattr(source, "read"):
                raise DataError(
                    f"a {type(source).__name__} is no picture; read takes a path, a PIL image or a NumPy array. Give a "
                    "tensor to Tokenizer.encode without reading"
                )
            with Image.open(source, formats=FORMATS) as image:
                return convert(image)
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: is empty, damaged or no picture in {', '.join(FORMATS)}") from error
    except DataError as error:
        raise error.at(name) from error
    except _DAMAGE as error:
        raise DataError(f"{name}: {cause(error)}") from error


def upright(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns a picture upright, from its EXIF orientation; None if it is upright."""
    image.load()  # for a TIFF, this also applies and removes the orientation
    return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))


def read_planes(source: Any, channels: tuple[tuple[str, ...], ...], convert: Callable) -> np.ndarray:
    """Planes `(c, h, w)` of a picture, a `.npy` or `.exr` file, or an array `(h, w)`, `(c, h, w)`, `(h, w, c)`.

    `channels` are the possible names of the planes in an EXR file, in the order of preference; `convert` turns a PIL
    image into planes. Raises `DataError` for anything else.
    """
    suffix = Path(source).suffix.lower() if isinstance(source, (str, Path)) else ""
    if suffix == ".exr":
        return _read_exr(Path(source), channels)
    if suffix == ".npy" or isinstance(source, np.ndarray):
        name = str(source) if suffix else "array in memory"
        return _to_planes(read_array(Path(source), name) if suffix else source, len(channels[0]), name)
    return read_picture(source, convert)


def cut(image: Image.Image, view: View, resample: str) -> Image.Image:
    """The part of a picture that the view names, at the view's size.

    The picture is first cropped to whole pixels, so that no filter uses pixels outside the crop.
    """
    (top, left), (bottom, right) = pixels(view, (image.height, image.width))
    first = math.floor(left), math.floor(top)
    part = image.crop((*first, math.ceil(right), math.ceil(bottom)))
    box = (left - first[0], top - first[1], right - first[0], bottom - first[1])
    height, width = view.size
    resampling = Image.Resampling[resample.removeprefix("pillow-").upper()]
    return part.resize((width, height), resampling, box=box)


def cut_planes(planes: np.ndarray, view: View, resample: str) -> np.ndarray:
    """The part of planes `(c, h, w)` that the view names, at the view's size, in the type of the planes.

    Only integers of more than 8 bits become floats, if the filter averages.
    """
    if resample == "nearest":
        rows, columns = (
            _nearest(start, stop, n, m)
            for start, stop, n, m in zip(*pixels(view, planes.shape[1:]), planes.shape[1:], view.size)
        )
        return planes[:, rows[:, None], columns]
    if planes.dtype in (np.uint16, np.int32) and resample != "pillow-nearest":
        planes = planes.astype(np.float32)
    return np.stack([np.asarray(cut(Image.fromarray(plane), view, resample)) for plane in planes])


def _nearest(start: float, stop: float, n: int, m: int) -> np.ndarray:
    """For each of `m` new pixels between `start` and `stop`, the old pixel under its centre."""
    centres = start + (2 * np.arange(m) + 1) * (stop - start) / (2 * m)
    # Rounding makes exact whole numbers whole again; all other centres are further from a whole number.
    return np.clip(np.floor(np.round(centres, 6)).astype(np.int64), 0, n - 1)


def _from_array(array: np.ndarray) -> Image.Image:
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    colour = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (grey or colour) or not array.size:
        raise DataError(
            f"an array of shape {array.shape} and type {array.dtype} is no picture; "
            "it must be (h, w), (h, w, 3) or (h, w, 4) of type uint8, or (h, w) of type uint16"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _to_planes(array: np.ndarray, channels: int, name: str) -> np.ndarray:
    """An array as planes: unsigned integers of 8 or 16 bits, signed integers of 32 bits, or single-precision floats."""
    shape = array.shape
    if array.ndim == 2:
        array = rearrange(array, "h w -> 1 h w")
    elif array.ndim == 3 and shape[0] != channels and shape[2] == channels:
        array = rearrange(array, "h w c -> c h w")
    if array.ndim != 3 or len(array) != channels or not array.size:
        raise DataError(f"{name}: has shape {shape}; expected {_count(channels)} and two axes")
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind not in "biu":
        raise DataError(f"{name}: has values of type {array.dtype}; only real numbers can be read")
    if array.dtype in (np.bool_, np.uint8):
        return array.astype(np.uint8)
    low, high = int(array.min()), int(array.max())
    if not -(2**31) <= low <= high < 2**31:
        raise DataError(
            f"{name}: has integers from {low} to {high}; integers must fit into 32 bits with a sign"
        )
    return array.astype(np.uint16 if low >= 0 and high < 2**16 else np.int32)


def _read_exr(path: Path, channels: tuple[tuple[str, ...], ...]) -> np.ndarray:
    """The planes of an OpenEXR file, as floats, under the first set of names that all exist in the file."""
    if not path.is_file():
        raise DataError(f"{path}: No such file or directory")
    try:
        import OpenEXR
    except ImportError as error:
        raise DataError(f"{path}: cannot be read: {cannot_import(error, 'OpenEXR')}") from error
    try:
        found = OpenEXR.File(str(path), separate_channels=True).channels()
        planes = {key: np.asarray(channel.pixels, dtype=np.float32) for key, channel in found.items()}
    except Exception as error:  # OpenEXR raises RuntimeError, ValueError and exceptions of its own
        raise DataError(f"{path}: {error or type(error).__name__}") from error
    for names in channels:
        if set(names) <= set(planes):
            return np.stack([planes[name] for name in names])
    if len(planes) == len(channels[0]) == 1:
        return np.stack(list(planes.values()))
    wanted = " or ".join("+".join(names) for names in channels)
    raise DataError(f"{path}: has the channels {', '.join(planes)}; expected are {wanted}")


def _count(channels: int) -> str:
    return "one channel" if channels == 1 else f"{channels} channels"
