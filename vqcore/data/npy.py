"""Opens `.npy` and `.npz` files. Never reads pickled objects. Any problem with a file becomes a `DataError`."""

import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vqcore.errors import DataError, cause, did_you_mean, listed

_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Errors that NumPy raises for damaged files: NumPy parses headers as Python source and opens archives with zipfile."""


def read_array(path: Path, where: str) -> np.ndarray:
    """The array in a `.npy` file, read into memory. Error messages begin with `where`."""
    with _explained(where), path.open("rb") as file:
        return _single(np.load(file, allow_pickle=False), where)


def map_array(path: Path, where: str) -> np.ndarray:
    """The array in a `.npy` file, mapped into memory: only the parts in use are read from disk."""
    with _explained(where):
        return _single(np.load(path, mmap_mode="r", allow_pickle=False), where)


def read_member(path: Path, name: str | None, where: str, setting: str = "data.key") -> np.ndarray:
    """The array `name` of a `.npz` file, or the only array, read into memory. `setting` is the config key of `name`."""
    with _explained(where), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(
                f"{where}: this is a single array, not an archive of arrays. Rename the file to .npy"
            )
        names = list(archive)
        if name is None and len(names) != 1:
            some = names[0] if names else "NAME"
            raise DataError(
                f"{where}: contains the arrays {listed(names)}. Choose one, e.g. {setting}={some}"
            )
        if name is not None and name not in names:
            hint = did_you_mean(name, names)
            raise DataError(f"{where}: contains no array '{name}'.{hint} Arrays: {listed(names)}")
        return archive[name or names[0]]


def _single(opened: object, where: str) -> np.ndarray:
    if not isinstance(opened, np.ndarray):
        opened.close()  # type: ignore[attr-defined]
        raise DataError(f"{where}: this is an archive of arrays, not a .npy file. Rename the file to .npz")
    return opened


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            reason = "contains Python objects or is not an array file; only arrays of numbers can be read"
        else:
            reason = cause(error)
        raise DataError(f"{where}: {reason}") from error
