"""Opens `.npy` and `.npz` files. Never reads pickled objects. Any problem with a file becomes a `DataError`.

The header of an array is compared with the file before memory is taken: its bytes must be there, no more and no fewer.
"""

import lzma
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.errors import DataError, cause, did_you_mean, listed
from vqcore.reading import check_memory, size_of

BinaryFile = Any  # what `open` and `zipfile` return have no type in common
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,
    RuntimeError,
    RecursionError,
    MemoryError,
    KeyError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""Errors that NumPy raises for damaged files: NumPy parses headers as Python source and opens archives with zipfile."""
_NUMBERS = "biufc"
"""The kinds of types that arrays may have."""
_MAGIC, _ZIP = b"\x93NUMPY", b"PK"


def read_array(path: Path, where: str) -> np.ndarray:
    """The array in a `.npy` file, read into memory. Error messages begin with `where`."""
    size = size_of(path, DataError, where)
    with _explained(where), path.open("rb") as file:
        return _read(_single(file, where), size, where)


def map_array(path: Path, where: str) -> np.ndarray:
    """The array in a `.npy` file, mapped into memory: only the parts in use are read from disk."""
    size = size_of(path, DataError, where)
    with _explained(where):
        with path.open("rb") as file:
            _check(_single(file, where), size, where)
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_member(
    path: Path, name: str | None, where: str, setting: str = "data.key", most: int | None = None
) -> np.ndarray:
    """The array `name` of a `.npz` file, or the only array, read into memory. `setting` is the config key of `name`.

    `most` is the largest number of bytes that the array may have.
    """
    size_of(path, DataError, where)
    with _explained(where), path.open("rb") as file:
        if _begins(file, _MAGIC):
            raise DataError(
                f"{where}: this is a single array, not an archive of arrays. Rename the file to .npy"
            )
        with zipfile.ZipFile(file) as archive:
            members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            names = list(members)
            if name is None and len(names) != 1:
                some = names[0] if names else "NAME"
                raise DataError(
                    f"{where}: contains the arrays {listed(names)}. Choose one, e.g. {setting}={some}"
                )
            if name is not None and name not in names:
                hint = did_you_mean(name, names)
                raise DataError(f"{where}: contains no array '{name}'.{hint} Arrays: {listed(names)}")
            member = members[name or names[0]]
            here = f"{where}: {member.filename}"
            if most is not None and member.file_size > most:
                raise DataError(f"{here}: declares {member.file_size:,} bytes; a sample has at most {most:,}")
            with archive.open(member) as inside:
                if inside.read(len(_MAGIC)) != _MAGIC:
                    raise DataError(f"{here}: this member of the archive is no array")
            with archive.open(member) as inside:
                return _read(inside, member.file_size, here)


def _begins(file: BinaryFile, magic: bytes) -> bool:
    found = file.read(len(magic)) == magic
    file.seek(0)
    return found


def _single(file: BinaryFile, where: str) -> BinaryFile:
    if _begins(file, _ZIP):
        raise DataError(f"{where}: this is an archive of arrays, not a .npy file. Rename the file to .npz")
    return file


def _read(file: BinaryFile, size: int, where: str) -> np.ndarray:
    """The array in an open file of `size` bytes."""
    shape, in_columns, dtype, need = _check(file, size, where)
    check_memory(need, DataError, where)
    content = bytearray(need)
    rest = memoryview(content)
    while taken := file.readinto(rest):
        rest = rest[taken:]
    if rest:
        raise DataError(f"{where}: damaged: {len(rest):,} bytes are missing")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if in_columns else "C")


def _check(file: BinaryFile, size: int, where: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, type and bytes of the array in a file of `size` bytes, which is then at the first number."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise DataError(
            f"{where}: is a .npy file of version {version[0]}.{version[1]}, which holds no numbers"
        )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # NumPy evaluates the header as Python; a damaged one may be strange source
        shape, in_columns, dtype = readers[version](file)
    if dtype.kind not in _NUMBERS:
        raise DataError(f"{where}: holds values of type {dtype}; only arrays of numbers can be read")
    if any(side <= 0 for side in shape):
        raise DataError(f"{where}: has the shape {shape}, which is empty")
    need, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if need != held:
        raise DataError(
            f"{where}: damaged: an array of shape {list(shape)} and type {dtype} has {need:,} bytes, but "
            f"{held:,} bytes follow the header"
        )
    return shape, in_columns, dtype, need


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            reason = "contains Python objects or is not an array file; only arrays of numbers can be read"
        elif "magic string" in str(error):
            reason = "this is no .npy file"
        else:
            reason = cause(error)
        raise DataError(f"{where}: {reason}") from error
