"""What a pass reads: a folder, a file, tar shards or any data source; in which shards, and under which keys."""

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqcore.compose.build import component
from vqcore.compose.text import bracketed
from vqcore.config import to_tree
from vqcore.data.listing import Listing, suffix_length
from vqcore.errors import DataError, UnknownName
from vqcore.files import local
from vqcore.protocols import Data, bytes_of, expect, known_bytes, left_out, shards
from vqcore.registry import registry
from vqcore.tokenizer import Tokenizer

SHARD_SIZE = 4096
"""Files in a shard."""
LARGEST = 16 * SHARD_SIZE
"""Most samples in a shard that has the name of a shard of the source."""
_KINDS = {".tar": "tar", ".parquet": "parquet"}
"""Data sources whose files are known by their suffix, unless it is one that the modality reads."""
_NAMED = re.compile(r"([a-z][a-z0-9-]*(?:/[a-z][a-z0-9-]*)?)((?:\[.*?\])?):(.*)", re.DOTALL)


class Files:
    """The files below a folder, or one file, as a data source."""

    def __init__(self, source: Path, suffixes: Sequence[str], verb: str):
        self.source, self.listing = source, None if source.is_file() else Listing(str(source), suffixes, verb)
        self._cut = suffix_length(source.name, suffixes) or len(source.suffix)

    def __len__(self) -> int:
        return 1 if self.listing is None else len(self.listing)

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files are no samples, by kind."""
        return {} if self.listing is None else self.listing.left_out

    def key(self, index: int) -> str:
        """The path below the folder, or the name of the file, without suffix."""
        name = self.source.name
        return name[: len(name) - self._cut] if self.listing is None else self.listing.key(index)

    def get(self, index: int, label: str = "") -> Path:
        """The path of a file."""
        return self.source if self.listing is None else self.listing.path(index)

    def bytes_of(self, index: int, label: str = "") -> int:
        """The bytes of a file. Raises `OSError`."""
        return self.source.stat().st_size if self.listing is None else self.listing.bytes_of(index)


@dataclass(frozen=True)
class Source:
    """The samples that a pass reads. `where` is what the user gave, `data` gives what `Modality.read` takes.

    `folder` is the folder or file of a source of plain files, where outputs must not lie; None for other sources.
    """

    where: str
    data: Data
    folder: Path | None = None
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.data)

    def key(self, index: int) -> str:
        """The key of a sample."""
        return self.data.key(index)

    def place(self, index: int) -> str:
        """Where a sample lies, for people."""
        if self.folder is not None:
            return str(self.data.get(index))
        return f"{self.where}: {self.key(index)}"

    def get(self, index: int) -> Any:
        """What `Modality.read` takes. Of sources that are no plain files, one thread at a time gets something."""
        if self.folder is not None:
            return self.data.get(index)
        with self._lock:
            return self.data.get(index)

    def expect(self, indices: Iterable[int]) -> None:
        """Samples that will be asked for, in this order."""
        with self._lock:
            expect(self.data, indices)

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many entries are no samples, by kind."""
        return left_out(self.data)

    @property
    def has_shards(self) -> bool:
        """Whether the source has shards of its own."""
        return shards(self.data) is not None

    def shards(self, size: int | None) -> list[tuple[str, range]]:
        """The shards of the pass: name and samples. They are those of the source, or runs of `SHARD_SIZE` samples.

        If one of the source has more than `size` samples (`LARGEST`), all are cut into runs of as many, with numbers.
        """
        own = shards(self.data)
        most = size or (SHARD_SIZE if own is None else LARGEST)
        found, end = [], 0
        for name, count in [("shard", len(self))] if own is None else own:
            found.append((name, range(end, end + count)))
            end += count
        found.sort(key=lambda piece: os.fsencode(piece[0]))
        if own is not None and all(len(places) <= most for _, places in found):
            return found
        return [
            (f"{name}-{number:05d}", places[first : first + most])
            for name, places in found
            for number, first in enumerate(range(0, max(1, len(places)), most))
        ]

    def keys_digest(self) -> str:
        """A hash of all keys."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(os.fsencode(self.key(index)) + b"\0")
        return digest.hexdigest()

    def sizes_digest(self, places: range) -> str:
        """A hash of the numbers of bytes of some samples."""
        digest = hashlib.sha256()
        for index in places:
            try:
                with self._lock:  # a source that does not know fetches the sample
                    count = bytes_of(self.data, index)
            except (OSError, DataError):
                count = None
            digest.update(b"-\0" if count is None else b"%d\0" % count)
        return digest.hexdigest()

    def bytes_of(self, index: int) -> int | None:
        """The bytes of a sample; None if they are not known without fetching it, or the sample is not there."""
        return known_bytes(self.data, index)


def source_of(given: str | Path, tokenizer: Tokenizer, verb: str = "tokenize") -> Source:
    """The samples of a folder, of a file, of `shards/{000..099}.tar`, or of `NAME[key=value]:PATH`, a data source.

    Shards and tables (`_KINDS`) need no name. A path that exists is not taken apart. Raises `DataError` if there is
    nothing.
    """
    text = str(given)
    path = local(given)
    suffixes = tokenizer.modality.suffixes
    if isinstance(given, str) and (found := prefixed(given, "data")):
        return _named(text, *found, tokenizer, verb)
    for suffix, name in _KINDS.items():
        is_kind = text.lower().endswith(suffix) and not path.is_dir() and suffix not in suffixes
        if is_kind and _is_known("data", name):
            return _named(text, {"name": name}, text, tokenizer, verb)
    return Source(text, Files(path, suffixes, verb), path)


def prefixed(given: str, kind: str) -> tuple[dict[str, Any], str] | None:
    """`NAME[key=value]:PATH` as a mapping with the name of a component, and the path; None for all other texts."""
    found = _NAMED.fullmatch(given)
    if found is None or local(given).exists() or not _is_known(kind, found[1]):
        return None
    return bracketed(found[1] + found[2], given), found[3]


def _is_known(kind: str, name: str) -> bool:
    try:
        registry().find(kind, name)
    except UnknownName:
        return False
    return True


def _named(text: str, node: Mapping[str, Any], path: str, tokenizer: Tokenizer, verb: str) -> Source:
    """A data source by its settings; `path` is its setting of this name, if there is any."""
    node = {**node, **({"path": path} if path else {}), "modality": to_tree(tokenizer.cfg.modality)}
    cfg = component("data", node, file=text, where=verb)
    try:
        data = registry().build("data", cfg, "data", split="train", modality=tokenizer.modality, extra={})
    except DataError as error:
        raise DataError(f"{verb}: {str(error).removeprefix('data.path: ')}") from error
    return Source(path or text, data)
