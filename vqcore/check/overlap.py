"""Finds samples that are trained on and evaluated on: such an evaluation says nothing about other samples."""

import filecmp
import hashlib
import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.check.findings import Finding
from vqcore.errors import DataError
from vqcore.protocols import Data, Window

HELD, TRAINED = 256, 4096
"""So many held-out samples are compared with so many training samples: those whose keys have the lowest hashes."""
_PIECE = 1 << 14
"""Bytes of the beginning and of the end of a file that are compared first."""


def overlap(trained: Data, held: Data, setting: str) -> Iterator[Finding]:
    """A warning if held-out samples are training samples too: the same files, or files of equal content.

    Files are compared byte by byte, arrays in memory by their numbers. Other sources are not compared. `setting` is
    the setting of the held-out samples.
    """
    found = [(held.key(index), source) for index, source in _sources(held, HELD)]
    if not found:
        return
    sizes = {_size(source) for _, source in found}
    kept: dict[Any, tuple[str, Any]] = {}
    compared = 0
    for index, source in _sources(trained, TRAINED):
        compared += 1
        for mark in _marks(source, sizes):
            kept.setdefault(mark, (trained.key(index), source))
    twice = []
    for key, source in found:
        other = next((kept[mark] for mark in _marks(source, sizes) if mark in kept), None)
        if other is not None and _equal(source, other[1]):
            twice.append((key, other[0]))
    if not twice:
        return
    counts = (
        f"{len(twice)} of {len(found)} held-out samples that were compared with {compared} training samples"
    )
    key, other_key = twice[0]
    example = f"{key} is one of both" if key == other_key else f"{key} has the content of {other_key}"
    what = f"the held-out samples are training samples too ({counts}): {example}"
    remedy = "Metrics say nothing about new samples then. " + (
        "Remove the copies, or keep them on one side with data.group."
        if setting == "data.eval_share"
        else "Hold out a part instead: data.eval_path=null data.eval_share=0.1."
    )
    yield Finding("warning", setting, what, remedy)


def _sources(data: Data, most: int) -> Iterator[tuple[int, Any]]:
    """Index and file, or array, of the samples with the lowest hashes."""
    for _, index in heapq.nsmallest(
        most, ((_digest(data.key(i).encode(errors="surrogateescape")), i) for i in range(len(data)))
    ):
        try:
            given = data.get(index)
        except (DataError, OSError):
            continue
        source = given.source if isinstance(given, Window) else given
        if isinstance(source, (str, Path, np.ndarray)):
            yield index, Path(source) if isinstance(source, str) else source


def _marks(source: Any, sizes: set[Any]) -> Iterator[Any]:
    """What is equal for equal sources: the place, and, if a source of this size is held out, a hash of a part."""
    if isinstance(source, Path):
        yield str(source.resolve())
    if (size := _size(source)) not in sizes:
        return
    if isinstance(source, np.ndarray):
        yield size, _digest(np.ascontiguousarray(source).tobytes())
    elif size is not None:
        try:
            with source.open("rb") as file:
                first = file.read(_PIECE)
                file.seek(max(0, size - _PIECE))
                yield size, _digest(first + file.read(_PIECE))
        except OSError:
            return


def _size(source: Any) -> Any:
    if isinstance(source, np.ndarray):
        return str(source.dtype), source.shape
    try:
        return source.stat().st_size
    except OSError:
        return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return True  # the hash was of all numbers
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
