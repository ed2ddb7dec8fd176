"""Every file below a folder with its size, and if wanted its hash: counted, compared, and remembered."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqcore.data.remembered import place_of, recall, remember
from vqcore.data.tree import Tree

_HASH, _STAMP = 32, 4
_PIECE = 1000
"""Files between two reports."""


@dataclass(frozen=True)
class Inventory:
    """Files below `root` in the order of their names: size, time and inode, and SHA-256 if it was asked for.

    `failed` are the names of files that could not be read, with the reason; they are in none of the arrays.
    Of `folders` folders `read` were not remembered; `hashed` files were read for their hash.
    """

    root: Path
    names: list[bytes]
    stamps: np.ndarray
    hashes: np.ndarray | None
    failed: dict[str, OSError]
    folders: int
    read: int
    hashed: int

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        return int(self.stamps[:, 0].sum())

    @property
    def kinds(self) -> Counter[str]:
        """How many files have a suffix."""
        found: Counter[str] = Counter()
        for name in self.names:
            _, dot, last = name.rpartition(b"/")[2].rpartition(b".")
            found[os.fsdecode(dot + last.lower()) if dot else "no suffix"] += 1
        return found

    def copies(self) -> Iterator[list[str]]:
        """The names of files that have equal contents, each group once. Empty files do not count."""
        if self.hashes is None:
            return
        marks = self.hashes.view(np.dtype((np.void, _HASH))).ravel()
        order = np.argsort(marks, kind="stable")
        starts = np.flatnonzero(np.append(True, marks[order][1:] != marks[order][:-1]))
        for low, high in zip(starts, [*starts[1:], len(order)]):
            if high - low > 1 and self.stamps[order[low], 0]:
                yield [os.fsdecode(self.names[place]) for place in order[low:high]]


def inventory(root: Path, *, hashes: bool, tick: Callable[[int, int], None]) -> Inventory:
    """Look at every file below a folder, hidden ones left out. Raises `OSError` if a folder cannot be read.

    Names come from memory, and from the folders that changed; sizes and times are asked for each time, and only a file
    of another size, time or inode is hashed again. `tick` gets how many files of how many are done.
    """
    tree = Tree(root)
    names = sorted(_names(tree, root))
    tree.keep(small=True)
    failed: dict[str, OSError] = {}
    stamps = np.zeros((len(names), _STAMP), np.int64)
    good = np.zeros(len(names), bool)
    for place, name in enumerate(names):
        if place % _PIECE == 0:
            tick(place, len(names))
        try:
            found = os.stat(_below(root, name))  # noqa: PTH116  (a Path would take twice as long)
        except OSError as error:
            failed[os.fsdecode(name)] = error
            continue
        stamps[place] = found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns
        good[place] = True
    kept, stamps = [name for name, fine in zip(names, good) if fine], stamps[good]
    made, read = None, 0
    if hashes:
        made, good, read = _hashes(root, kept, stamps, failed, tick)
        kept, stamps, made = [name for name, fine in zip(kept, good) if fine], stamps[good], made[good]
    tick(len(names), len(names))
    return Inventory(root, kept, stamps, made, failed, len(tree.found), tree.read, read)


def _hashes(
    root: Path,
    names: list[bytes],
    stamps: np.ndarray,
    failed: dict[str, OSError],
    tick: Callable[[int, int], None],
) -> tuple[np.ndarray, np.ndarray, int]:
    """The hash of each file, which of them could be read, and how many were read now. Adds to `failed`."""
    cache = place_of("hashes", str(root.resolve()))
    made, good = np.zeros((len(names), _HASH), np.uint8), np.ones(len(names), bool)
    known = _known(recall(cache))
    todo = []
    for place, name in enumerate(names):
        held = known.get(name)
        if held is not None and held[0] == tuple(stamps[place].tolist()):
            made[place] = held[1]
        else:
            todo.append(place)

    def hashed(place: int) -> bytes | OSError:
        try:
            with open(_below(root, names[place]), "rb") as file:  # noqa: PTH123  (the name may be no text)
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(todo), _PIECE):
            tick(len(names) - len(todo) + first, len(names))
            piece = todo[first : first + _PIECE]
            for place, found in zip(piece, pool.map(hashed, piece)):
                if isinstance(found, OSError):
                    good[place], failed[os.fsdecode(names[place])] = False, found
                else:
                    made[place] = np.frombuffer(found, np.uint8)
    if todo or len(known) != len(names):
        text = b"\0".join(name for name, fine in zip(names, good) if fine)
        kept = {"names": np.frombuffer(text, np.uint8), "stamps": stamps[good], "hashes": made[good]}
        remember(cache, kept)
    return made, good, len(todo)


def _known(held: dict[str, np.ndarray] | None) -> dict[bytes, tuple[tuple[int, ...], np.ndarray]]:
    """What is remembered of files by name: size, time and inode, and hash."""
    try:
        if held is None:
            return {}
        names = held["names"].tobytes().split(b"\0")
        stamps = map(tuple, held["stamps"].tolist())
        return dict(zip(names, zip(stamps, held["hashes"], strict=True), strict=True))
    except (KeyError, ValueError):
        return {}


def _names(tree: Tree, root: Path) -> Iterator[bytes]:
    """The files below a folder. A folder that several links lead to counts once."""
    seen: set[tuple[int, int]] = set()
    waiting = [b""]
    while waiting:
        inner = waiting.pop()
        status = os.stat(_below(root, inner))  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        found = tree.contents(inner, status)
        yield from (inner + name for name in found.names)
        waiting += [inner + name + b"/" for name in reversed(found.below)]


def _below(root: Path, name: bytes) -> bytes:
    return os.fsencode(root) + b"/" + name
