"""What was found out about files once, kept in the user's cache folder as long as the files stay as they are."""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from vqcore.errors import VqcoreError
from vqcore.files import aside, local

_TROUBLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, VqcoreError)
"""A cache that cannot be read or written only costs time."""


def stamp_of(path: Path) -> str:
    """Size, time of the status and inode of a file, one of which changes with each writing. Raises `OSError`."""
    found = path.stat()
    return f"{found.st_size} {found.st_ctime_ns} {found.st_ino}"


def place_of(kind: str, *facts: str) -> Path:
    """Where something is kept that follows from `facts`, among others of its `kind`."""
    key = hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder) / "vqcore" / kind / f"{key}.npz"


def recall(place: Path) -> dict[str, np.ndarray] | None:
    """The arrays that are kept at a place, or None."""
    with suppress(*_TROUBLE), local(place).open("rb") as file, np.load(file, allow_pickle=False) as held:
        return {name: held[name] for name in held.files}
    return None


def remember(place: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep arrays at a place."""
    with suppress(*_TROUBLE), aside(local(place)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def packed(texts: "tuple[str, ...] | list[str]") -> np.ndarray:
    """Texts without line breaks as an array."""
    return np.frombuffer("\n".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def unpacked(held: np.ndarray) -> list[str]:
    """The texts that `packed` made an array of."""
    text = held.tobytes().decode("utf-8", "surrogateescape")
    return text.split("\n") if text else []
