"""Finds samples that are there twice: in training and in evaluation, where it spoils the evaluation, or in training."""

import filecmp
import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.check.findings import Finding
from vqcore.data.identity import content_of
from vqcore.data.lent import Content
from vqcore.errors import DataError
from vqcore.protocols import Data, Window, expect, known_bytes

HELD, TRAINED = 256, 4096
"""So many held-out samples are compared with so many training samples: those whose keys have the lowest hashes."""
_PIECE = 1 << 14
"""Bytes of the beginning, of the middle and of the end of a file that are compared first."""


_Place = tuple[int, str, int | None]
"""The number of a sample, its key, and its bytes as far as they are known before it is fetched."""


@dataclass(frozen=True)
class _Sample:
    """A sample: its key, how to get its file or array, and the part of it that the sample is; None for all of it.

    It is asked for each time: a source may have to fetch or unpack it, and keeps few.
    """

    key: str
    fetch: Callable[[], Path | np.ndarray]
    part: Window | None

    @property
    def source(self) -> Path | np.ndarray:
        """The file or array."""
        return self.fetch()

    def meets(self, other: "_Sample") -> bool:
        """Whether two samples of one file have a position in common."""
        if self.part is None or other.part is None:
            return True
        axes = zip(self.part.start, self.part.stop, other.part.start, other.part.stop)
        return all(max(a, c) < min(b, d) for a, b, c, d in axes)


def overlap(trained: Data, held: Data, setting: str) -> Iterator[Finding]:
    """A warning if held-out samples are training samples too: the same files, or files of equal content.

    Files are compared byte by byte, arrays in memory by their numbers and masks. Windows of one file are different
    samples if they have no position in common. Other sources are not compared. `setting` is the setting of the held-out
    samples.
    """
    ours, theirs = _chosen(held, HELD), _chosen(trained, TRAINED)
    found, sizes = [], set()
    for one, source in _samples(held, _of_sizes(ours, Counter(size for *_, size in theirs))):
        found.append(one)
        sizes.add(_size(source))
    kept: dict[Any, list[_Sample]] = {}
    candidates = _of_sizes(theirs, Counter(size for *_, size in ours)) if found else []
    for one, source in _samples(trained, candidates):
        for mark in _marks(source, sizes):
            kept.setdefault(mark, []).append(one)
    twice = []
    for one in found:
        alike = (other for mark in _marks(one.source, sizes) for other in kept.get(mark, ()))
        other = next((o for o in alike if one.meets(o) and _equal(one.source, o.source)), None)
        if other is not None:
            twice.append((one.key, other.key))
    if not twice:
        return
    counts = (
        f"{len(twice)} of {len(ours)} held-out samples that were compared with {len(theirs)} training samples"
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


def copies(data: Data, setting: str) -> Iterator[Finding]:
    """A warning if some training samples have the content of others; a note if they are few. Windows do not count."""
    chosen = _chosen(data, TRAINED)
    counts = Counter(size for *_, size in chosen)
    candidates = _of_sizes(chosen, Counter({size: count - 1 for size, count in counts.items()}))
    compared = len(chosen) - len(candidates)
    files, marked = list[tuple[_Sample, Any]](), dict[Any, list[_Sample]]()
    for one, source in _samples(data, candidates):
        if isinstance(source, np.ndarray) and compared == HELD:
            break  # a source may have to make them
        compared += 1
        if one.part is None and isinstance(source, Path):
            files.append((one, _size(source)))
        elif one.part is None:
            marked.setdefault(_content(source), []).append(_Sample(one.key, _nothing, None))
    sizes = Counter(size for _, size in files)
    for one, size in files:
        if sizes[size] > 1:
            marked.setdefault(_content(one.source), []).append(one)
    twice = []
    for mark, alike in marked.items():
        different: list[_Sample] = []
        for one in alike if mark else ():
            same = next((each for each in different if _equal(each.source, one.source)), None)
            if same is None:
                different.append(one)
            elif not _one_file(same.source, one.source):
                twice.append((same.key, one.key))
    if not twice:
        return
    what = (
        f"{len(twice)} of {compared} samples that were compared are copies of others: {twice[0][1]} has the content "
        f"of {twice[0][0]}"
    )
    if len(twice) <= compared // 100:
        yield Finding("note", setting, what)
        return
    remedy = "Remove the copies: training sees them more often than other samples."
    yield Finding("warning", setting, what, remedy)


def _chosen(data: Data, most: int) -> list[_Place]:
    """The samples whose keys have the lowest hashes, in the order of the source."""
    keys = ((data.key(index), index) for index in range(len(data)))
    lowest = heapq.nsmallest(
        most, ((_digest(key.encode(errors="surrogateescape")), index, key) for key, index in keys)
    )
    return [
        (index, key, known_bytes(data, index)) for _, index, key in sorted(lowest, key=lambda each: each[1])
    ]


def _of_sizes(chosen: list[_Place], sizes: Counter[int | None]) -> list[_Place]:
    """The samples that may equal some of these sizes: the others need not be fetched."""
    if sizes[None] > 0:
        return chosen
    return [one for one in chosen if one[2] is None or sizes[one[2]] > 0]


def _samples(data: Data, chosen: list[_Place]) -> Iterator[tuple[_Sample, Path | np.ndarray]]:
    """These samples, if they are files or arrays."""
    expect(data, [index for index, *_ in chosen], alone=True)
    for index, key, _ in chosen:
        try:
            given = data.get(index)
        except (DataError, OSError):
            continue
        source, part = (given.source, given) if isinstance(given, Window) else (given, None)
        if isinstance(source, (str, Path, Content, np.ndarray)):
            yield _Sample(key, partial(_source, data, index), part), _plain(source)


def _source(data: Data, index: int) -> Path | np.ndarray:
    given = data.get(index)
    return _plain(given.source if isinstance(given, Window) else given)


def _one_file(one: Path | np.ndarray, other: Path | np.ndarray) -> bool:
    """Whether two samples lie in one file, such as its crops, and so are no copies."""
    return isinstance(one, Path) and isinstance(other, Path) and one == other


def _plain(source: Any) -> Path | np.ndarray:
    if isinstance(source, Content):
        return source.as_file()
    return source if isinstance(source, np.ndarray) else Path(source)


def _nothing() -> np.ndarray:
    return np.empty(0)


def _marks(source: Path | np.ndarray, sizes: set[Any]) -> Iterator[Any]:
    """What is equal for equal sources: the place, and, if a source of this size is held out, a hash of a part."""
    if isinstance(source, Path):
        yield str(source.resolve())
    if _size(source) in sizes and (content := _content(source)):
        yield content


def _content(source: Path | np.ndarray) -> Any:
    """What is equal for equal contents: size, and a hash of parts of a file, or of an array; None if unreadable."""
    size = _size(source)
    if isinstance(source, np.ndarray):
        return size, _digest(content_of(source))
    try:
        with source.open("rb") as file:
            pieces = []
            for place in (0, size // 2, max(0, size - _PIECE)):
                file.seek(place)
                pieces.append(file.read(_PIECE))
            return size, _digest(b"".join(pieces))
    except (OSError, TypeError):
        return None


def _size(source: Any) -> Any:
    if isinstance(source, np.ndarray):
        return str(source.dtype), source.shape
    try:
        return source.stat().st_size
    except OSError:
        return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return True  # the hash was of all that is in it
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
