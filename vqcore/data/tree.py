"""The names in a folder and in all folders below it, remembered for large folders.

The system sets the time of a folder's status (ctime) when a name in it comes, goes or changes. No program sets it
back, so only folders of another time are read again. What is remembered are names, never what files hold: a file that
was written in place is found by its size and time wherever bytes matter.
"""

import itertools
import os
import stat
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqcore.data.remembered import place_of, recall, remember

LARGE = 10_000
"""A folder with so many files is remembered without being asked."""
_FRESH = 2_000_000_000
"""Nanoseconds. A folder may change again within one tick of its clock, so a time as young as this says nothing."""
_UNKNOWN = -1
_FIELDS = ("times", "inodes", "hidden", "special")


class Contents(NamedTuple):
    """The entries of one folder: names of files and of folders, joined by NUL, and how many others there are."""

    time: int
    inode: int
    hidden: int
    special: int
    files: bytes
    folders: bytes

    @property
    def names(self) -> list[bytes]:
        """The names of the files, also of dead links."""
        return self.files.split(b"\0") if self.files else []

    @property
    def below(self) -> list[bytes]:
        """The names of the folders, also of links to folders."""
        return self.folders.split(b"\0") if self.folders else []


class Tree:
    """The contents of the folders below `root`, read when they are asked for. `fresh` reads all of them again."""

    def __init__(self, root: Path, *, fresh: bool = False):
        self.root, self.place = root, place_of("folders", str(root.resolve()))
        self.known = {} if fresh else _unpacked(recall(self.place))
        self.found: dict[bytes, Contents] = {}
        self.read = 0
        """How many folders were read, and not remembered."""

    def contents(self, inner: bytes, status: os.stat_result) -> Contents:
        """What is in a folder, by its path below the root and its status. Raises `OSError`."""
        held = self.known.get(inner)
        if held is None or (held.time, held.inode) != (status.st_ctime_ns, status.st_ino):
            held = _read(os.fsencode(self.root) + b"/" + inner, status)
            self.read += 1
        self.found[inner] = held
        return held

    def keep(self, *, small: bool = False) -> None:
        """Remember what was asked for since the beginning, if it is new, and large or `small` is set."""
        if not self.read and len(self.found) == len(self.known):
            return
        count = sum(held.files.count(b"\0") + 1 for held in self.found.values() if held.files)
        if small or self.known or count >= LARGE:
            remember(self.place, _packed(self.found))


def _read(folder: bytes, status: os.stat_result) -> Contents:
    counts: Counter[str] = Counter()
    files, folders = [], []
    known = time.time_ns() - status.st_ctime_ns > _FRESH
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                counts["hidden"] += 1
            elif _is_folder(entry):
                folders.append(entry.name)
                known &= not entry.is_symlink()  # the other end may change, and this folder keeps its time
            elif _is_special(entry):
                counts["special"] += 1
            else:
                files.append(entry.name)
                known &= not _is_dead(entry)
    stamp = (status.st_ctime_ns, status.st_ino) if known else (_UNKNOWN, _UNKNOWN)
    return Contents(*stamp, counts["hidden"], counts["special"], b"\0".join(files), b"\0".join(folders))


def _is_folder(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_dead(entry: "os.DirEntry[bytes]") -> bool:
    """Whether an entry is a link that leads nowhere now."""
    try:
        return entry.is_symlink() and not entry.is_file()
    except OSError:
        return True


def _is_special(entry: "os.DirEntry[bytes]") -> bool:
    """Whether an entry is a pipe, a socket or a device. A dead link is not."""
    try:
        return not entry.is_file() and not stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False


def _packed(found: dict[bytes, Contents]) -> dict[str, np.ndarray]:
    texts = {
        "inner": list(found),
        "files": [held.files for held in found.values()],
        "folders": [held.folders for held in found.values()],
    }
    made = {name: np.frombuffer(b"".join(parts), np.uint8) for name, parts in texts.items()}
    made |= {
        f"{name}_ends": np.cumsum([0, *map(len, parts)], dtype=np.int64) for name, parts in texts.items()
    }
    numbers = np.array([held[:4] for held in found.values()], np.int64).reshape(-1, 4)
    return made | {name: numbers[:, place] for place, name in enumerate(_FIELDS)}


def _unpacked(held: dict[str, np.ndarray] | None) -> dict[bytes, Contents]:
    """What `_packed` made arrays of; nothing if they are not such arrays."""
    try:
        if held is None:
            return {}
        texts = []
        for name in ("inner", "files", "folders"):
            text, ends = held[name].tobytes(), held[f"{name}_ends"].tolist()
            texts.append([text[low:high] for low, high in itertools.pairwise(ends)])
        numbers = zip(*(held[name].tolist() for name in _FIELDS), strict=True)
        inner, *rest = texts
        return {key: Contents(*four, *two) for key, four, two in zip(inner, numbers, zip(*rest), strict=True)}
    except (KeyError, ValueError, TypeError):
        return {}
