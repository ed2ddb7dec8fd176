"""4M's instances of SAM, once from pickled objects to JSON: `python -m vqcore_fourm.instances SAM RGB OUT`.

A file of 4M is a pickled array of NumPy, of one dictionary for each instance, whose `points` are the corners of a
polygon: x and y in pixels of the picture, `(n, 1, 2)`. It does not hold the size of the picture, so the picture is
opened too. `vision/instance` reads what is written.

Of a pickle only numbers, texts, lists, dictionaries and arrays of numbers are read. Nothing that it names is imported
or called: `Plain` keeps what an array is made of as data, and `_Build` checks it.
"""

import argparse
import io
import json
import math
import pickle
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vqcore.console import say
from vqcore.errors import DataError, VqcoreError, first_line
from vqcore.files import local, write_text
from vqcore.reading import size_of
from vqcore.streams import put

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".jpx", ".jp2")
MOST = 256 << 20
"""Most bytes of a file of instances."""
DEEPEST = 16
"""Most levels of lists and dictionaries."""
_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
MADE = {f"{module}.{name}" for module in _ARRAYS for name in ("_reconstruct", "scalar")}
"""What an array and a number of NumPy are made by in a pickle, in old and new versions of NumPy."""
KNOWN = MADE | {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}
"""Everything that a pickle may name."""


class _Name:
    """Something that a pickle names. Calling it notes the call."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any) -> "_Call":
        return _Call(self.name, args)


@dataclass
class _Call:
    """A noted call, and the state that the pickle gives to its result."""

    name: str
    args: tuple[Any, ...]
    state: list[Any] = field(default_factory=list)

    def __setstate__(self, state: Any) -> None:
        self.state.append(state)


class Plain(pickle._Unpickler):
    """Reads a pickle as data. This is Python's reader in Python: that in C takes the memory that a file asks for."""

    def find_class(self, module: str, name: str) -> Any:
        """A placeholder for what arrays are made of. Raises `DataError` that names anything else."""
        if (full := f"{module}.{name}") not in KNOWN:
            raise DataError(f"holds more than numbers, texts and lists: {full[:120]}")
        return _Name(full)

    def persistent_load(self, pid: Any) -> Any:
        """Raise `DataError`."""
        raise DataError("refers to something outside of the file")


def polygons(path: Path, *, allow_pickle: bool) -> list[list[float]]:
    """The corners of each instance in a file of 4M, x and y in turn. Instances of fewer than 3 corners are left out.

    Raises `DataError` for anything else, and without `allow_pickle`.
    """
    if not allow_pickle:
        raise DataError(
            f"{path} is a pickle: Python could run code from it. If you trust its origin, give --allow-pickle; even "
            "then only numbers, texts and lists are read."
        )
    size = size_of(path, DataError)
    if size > MOST:
        raise DataError(f"{path}: has {size:,} bytes; such a file has at most {MOST:,}.")
    try:
        instances = _Build(size).of(_content(path.read_bytes()))
        return _corners(instances)
    except DataError as error:
        raise DataError(f"{path}: {error}. So it was not read, and nothing in it ran.") from error
    except Exception as error:  # a damaged pickle makes its reader raise anything
        raise DataError(f"{path}: damaged, or no file of instances ({first_line(error)[:120]}).") from error


def _content(data: bytes) -> Any:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = header[version](file)
    if not dtype.hasobject:
        if math.prod(shape):
            raise DataError(f"holds numbers of shape {list(shape)}, no instances")
        return []
    return Plain(file).load()


class _Build:
    """Makes what a pickle means of its data, and no more numbers than the file has bytes."""

    def __init__(self, most: int):
        self.left = most

    def of(self, found: Any, depth: int = 0) -> Any:
        """Plain data, and arrays of numbers. Raises `DataError` for what no array can be."""
        self.left -= 1
        if depth > DEEPEST or self.left < 0:
            raise DataError("is nested, or repeats itself, more than instances are")
        if isinstance(found, _Call):
            return self.call(found, depth)
        if isinstance(found, (list, tuple)):
            return [self.of(each, depth + 1) for each in found]
        if isinstance(found, dict):
            return {str(key): self.of(value, depth + 1) for key, value in found.items()}
        if found is None or isinstance(found, (bool, int, float, str, bytes)):
            return found
        raise DataError(f"holds a {type(found).__name__}, which is no part of instances")

    def call(self, found: _Call, depth: int) -> Any:
        if found.name == "_codecs.encode":  # bytes, as Python 2 could read them
            text, code = found.args
            if code != "latin1":
                raise DataError(f"holds bytes that are written as {str(code)[:20]}")
            return str(text).encode("latin1")
        if found.name not in MADE:
            raise DataError(f"holds {found.name} alone, which is no part of instances")
        if found.name.endswith("scalar"):
            kind, raw = found.args
            return self.numbers((), kind, False, raw, depth)
        (state,) = found.state
        _, shape, kind, in_columns, raw = state
        return self.numbers(shape, kind, in_columns, raw, depth)

    def numbers(self, shape: Any, kind: Any, in_columns: Any, raw: Any, depth: int) -> Any:
        """An array of numbers, or the list of objects of an array of objects."""
        if not isinstance(kind, _Call) or kind.name != "numpy.dtype":
            raise DataError("holds an array without a type of NumPy")
        word, order = str(kind.args[0]), kind.state[0][1] if kind.state else "="
        if word in ("O", "O8", "O4"):
            if not isinstance(raw, list):
                raise DataError("holds an array of objects without a list of them")
            return [self.of(each, depth + 1) for each in raw]
        raw = self.of(raw, depth)
        dtype = np.dtype(f"{order if order in ('<', '>') else '='}{word}")
        if dtype.kind not in "biuf" or not isinstance(raw, bytes):
            raise DataError(f"holds an array of {dtype}")
        self.left -= len(raw)
        if self.left < 0:
            raise DataError("repeats itself more than instances do")
        return np.frombuffer(raw, dtype).reshape(shape, order="F" if in_columns else "C")


def _corners(instances: Any) -> list[list[float]]:
    if not isinstance(instances, list) or not all(isinstance(each, dict) for each in instances):
        raise DataError("holds no list of instances with points")
    found = []
    for number, each in enumerate(instances):
        if "points" not in each:
            raise DataError(
                f"instance {number} has no points, but {', '.join(sorted(each)[:5]) or 'nothing'}"
            )
        points = np.asarray(each["points"], np.float64).reshape(-1)
        if len(points) % 2 or not np.isfinite(points).all():
            raise DataError(f"instance {number} has points that are no pairs of finite numbers")
        if len(points) >= 6:
            found.append(points.tolist())
    return found


def convert(sam: Path, rgb: Path, out: Path, *, allow_pickle: bool) -> Counter[str]:
    """Write `OUT/<class>/<name>.json` for each `SAM/<class>/<name>.npy`, and count what was done.

    A file that exists already is left as it is, so that an interrupted conversion goes on. A file without an instance
    makes none. Raises `DataError` for the first file that cannot be read, and for one without a picture in RGB.
    """
    if not sam.is_dir():
        raise DataError(f"{sam}: there is no such folder.")
    files = sorted(path for path in sam.rglob("*.npy") if not path.name.startswith("."))
    if not files:
        raise DataError(f"{sam}: holds no .npy file.")
    done: Counter[str] = Counter()
    for path in files:
        key = path.relative_to(sam).with_suffix("")
        target = out / key.with_name(f"{key.name}.json")
        if target.exists():
            done["there already"] += 1
            continue
        found = polygons(path, allow_pickle=allow_pickle)
        if not found:
            done["without an instance"] += 1
            continue
        width, height = _size(rgb, key)
        notes = [{"segmentation": [corners]} for corners in found]
        content = {"image": {"height": height, "width": width}, "annotations": notes}
        write_text(target, json.dumps(content))
        done["written"] += 1
    return done


def _size(rgb: Path, key: Path) -> tuple[int, int]:
    """Width and height of the picture of this class and name, as its file holds it."""
    pictures = (rgb / key.with_name(key.name + suffix) for suffix in PICTURES)
    path = next((path for path in pictures if path.is_file()), None)
    if path is None:
        raise DataError(f"{rgb / key}: there is no picture of this name, whose size the points need.")
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: no picture that can be read ({first_line(error)[:120]}).") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the conversion. Returns the exit status: 0, or 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m vqcore_fourm.instances",
        description="Write 4M's pickled instances of SAM as JSON, which vision/instance reads.",
    )
    parser.add_argument("sam", help="folder of 4M's files, e.g. data/train/sam_mask")
    parser.add_argument(
        "rgb", help="folder of the pictures of the same classes and names, e.g. data/train/rgb"
    )
    parser.add_argument("out", help="new folder, e.g. data/train/sam_json")
    parser.add_argument("--allow-pickle", action="store_true", help="read pickles, as plain data alone")
    args = parser.parse_args(argv)
    try:
        done = convert(local(args.sam), local(args.rgb), local(args.out), allow_pickle=args.allow_pickle)
    except (VqcoreError, OSError) as error:
        put(f"error: {error}", error=True)
        return 2
    say(f"{args.out}: {', '.join(f'{count:,} {what}' for what, count in done.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
