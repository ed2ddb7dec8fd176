"""Opens `.npy` and `.npz` files without ever unpickling; whatever is wrong with one becomes a `DataError`."""

import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vqcore.errors import DataError, did_you_mean, listed

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
"""What NumPy raises for damaged files: it reads a header as Python source, and an archive by zipfile."""


def read_array(path: Path, where: str) -> np.ndarray:
    """The array in a `.npy` file, in memory. `where` stands in front of errors."""
    with _explained(where), path.open("rb") as file:
        return _single(np.load(file, allow_pickle=False), where)


def map_array(path: Path, where: str) -> np.ndarray:
    """The array in a `.npy` file, left on disk and read where it is touched."""
    with _explained(where):
        return _single(np.load(path, mmap_mode="r", allow_pickle=False), where)


def read_member(path: Path, name: str | None, where: str, setting: str = "data.key") -> np.ndarray:
    """An array of a `.npz` file, in memory: the named one, or the only one. `setting` is what names it."""
    with _explained(where), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{where}: is a single array; call it .npy")
        names = list(archive)
        if name is None and len(names) != 1:
            some = names[0] if names else "NAME"
            raise DataError(f"{where}: holds the arrays {listed(names)}; choose one, e.g. {setting}={some}")
        if name is not None and name not in names:
            hint = did_you_mean(name, names)
            raise DataError(f"{where}: holds no array '{name}'.{hint} Arrays: {listed(names)}")
        return archive[name or names[0]]


def _single(opened: object, where: str) -> np.ndarray:
    if not isinstance(opened, np.ndarray):
        opened.close()  # type: ignore[attr-defined]
        raise DataError(f"{where}: is an archive of arrays, not a .npy file; call it .npz")
    return opened


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            reason = "holds Python objects or is no array file; only arrays of numbers are read"
        else:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{where}: {reason}") from error
