"""What was found out about files once, kept in the user's cache folder as long as the files stay as they are.

An entry that was not used for `KEPT` days is removed when a process keeps its first new one. Who is reading it reads
on. Nothing else is removed, so what is in use never has to be found out again, however much it is.
"""

import hashlib
import os
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from vqcore.errors import VqcoreError
from vqcore.files import aside, local

KEPT = 60
"""Days."""
_DAY = 86_400
_pruned: set[Path] = set()
_TROUBLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, VqcoreError)
"""A cache that cannot be read or written only costs time."""


def stamp_of(path: Path) -> str:
    """Size, time of the status and inode of a file, one of which changes with each writing. Raises `OSError`."""
    found = path.stat()
    return f"{found.st_size} {found.st_ctime_ns} {found.st_ino}"


def place_of(kind: str, *facts: str) -> Path:
    """Where something is kept that follows from `facts`, among others of its `kind`."""
    key = hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()
    return _root() / kind / f"{key}.npz"


def _root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vqcore"


def recall(place: Path) -> dict[str, np.ndarray] | None:
    """The arrays that are kept at a place, or None."""
    with suppress(*_TROUBLE), local(place).open("rb") as file, np.load(file, allow_pickle=False) as held:
        if time.time() - os.fstat(file.fileno()).st_mtime > _DAY:
            with suppress(OSError):
                os.utime(file.fileno())  # its time says when it was used last, to a day
        return {name: held[name] for name in held.files}
    return None


def remember(place: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep arrays at a place. The first time, this process removes what was not used for long."""
    with suppress(*_TROUBLE):
        _prune(local(_root()))
    with suppress(*_TROUBLE), aside(local(place)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _prune(root: Path) -> None:
    if root in _pruned:
        return
    _pruned.add(root)
    oldest = time.time() - KEPT * _DAY
    for entry in root.glob("*/*.npz"):
        with suppress(OSError):  # another process may have removed it
            if entry.stat().st_mtime < oldest:
                entry.unlink()


def packed(texts: "tuple[str, ...] | list[str]") -> np.ndarray:
    """Texts without line breaks as an array."""
    return np.frombuffer("\n".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def unpacked(held: np.ndarray) -> list[str]:
    """The texts that `packed` made an array of."""
    text = held.tobytes().decode("utf-8", "surrogateescape")
    return text.split("\n") if text else []
