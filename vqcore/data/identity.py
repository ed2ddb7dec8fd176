"""Which samples a run trains on, so that the run can go on where the same samples lie elsewhere now."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.data.lent import Content
from vqcore.errors import DataError
from vqcore.protocols import Data, Window, bytes_of, expect, knows_codes

CHOSEN = 64
"""So many samples are compared byte by byte: those whose keys have the lowest hashes."""


def identity(data: Data, labels: Iterable[str]) -> dict[str, Any]:
    """Plain facts that are equal for equal samples: their number, a hash of names and sizes, a hash of some contents.

    Codes that are known of a sample belong to its content.

    `labels` are the extra modalities, whose files count, too. A file that is missing or cannot be read is a fact as
    well: such samples are skipped in training. Every file is asked for its size; `CHOSEN` samples are read.
    """
    names, labels = hashlib.sha256(), ("", *labels)

    def hashes() -> Iterator[tuple[str, int]]:
        for index in range(len(data)):
            key = data.key(index)
            names.update(_line(key, *(_size(data, index, label) for label in labels)))
            yield _hash(key), index

    contents = hashlib.sha256()
    chosen = [index for _, index in heapq.nsmallest(CHOSEN, hashes())]
    expect(data, chosen, alone=True)
    for index in chosen:
        found = [_content(data, index, label) for label in labels]
        contents.update(_line(data.key(index), *found, *_codes(data, index)))
    return {"samples": len(data), "names": names.hexdigest(), "contents": contents.hexdigest()}


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """What differs between two sets of samples, in words; None if the sets are equal."""
    if there == here:
        return None
    if there.get("samples") != here["samples"]:
        return f"{there.get('samples')} samples there, {here['samples']} here"
    if there.get("names") != here["names"]:
        return "samples have other names or sizes"
    return f"the files have other contents ({min(CHOSEN, here['samples'])} samples were compared)"


def content_of(array: np.ndarray) -> bytes:
    """Bytes that are equal for arrays of equal type, shape, numbers and mask. Masked numbers do not count."""
    mask = np.ma.getmaskarray(array).tobytes() if np.ma.is_masked(array) else b""
    plain = np.ascontiguousarray(np.ma.filled(array, 0))
    return f"{plain.dtype.str}{array.shape}".encode() + plain.tobytes() + mask


def _size(data: Data, index: int, label: str) -> Any:
    try:
        return bytes_of(data, index, label)
    except (DataError, OSError):
        return None


def _content(data: Data, index: int, label: str) -> Any:
    try:
        source = _source(data, index, label)
        if isinstance(source, Path):
            with source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    except (DataError, OSError):
        return None
    if not isinstance(source, np.ndarray):
        return ""
    return _hash(content_of(source))


def _codes(data: Data, index: int) -> tuple[str, ...]:
    """What was made of a sample, and of which part of it, if the data source knows."""
    coded = knows_codes(data)
    try:
        row = coded.coded(index) if coded else None
    except DataError:
        return ("",)
    return () if row is None else (_hash(row.codes.tobytes()), _hash(repr(sorted(row.extras.items()))))


def _source(data: Data, index: int, label: str) -> Any:
    given = data.get(index, label)
    source = given.source if isinstance(given, Window) else given
    if isinstance(source, Content):
        return source.as_file()
    return Path(source) if isinstance(source, str) else source


def _line(*facts: Any) -> bytes:
    return repr(facts).encode("utf-8", "surrogateescape")


def _hash(text: str | bytes) -> str:
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return hashlib.sha256(raw).hexdigest()
