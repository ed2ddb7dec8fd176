"""Texts in files: lines, JSON, JSON lines, Parquet and tar, plain or gzipped, read one after another."""

import glob
import gzip
import io
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from vqcore.data.tars import Member
from vqcore.errors import DataError, cannot_import, cause, did_you_mean, first_line, in_bytes, listed
from vqcore.files import local
from vqcore.schema import TextsConfig

LONGEST = 2**26
"""Bytes of the longest line, and of the longest file of JSON. More is no text of a sample."""
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".tar")
_IN_TAR = (".txt", ".jsonl", ".json")


@dataclass(frozen=True)
class Text:
    """One text, with its key, and the share of the files that was read before it, in bytes."""

    key: str
    text: str
    done: int


class Texts:
    """The texts of a file, of a folder at any depth, or of the files that a pattern matches, sorted by name.

    A key is the file's path without suffix below the folder that all files share; where a file holds more than one
    text, and a number: `a/b/00000012`, counted from 0. Lines of `.txt` are texts; blank lines are left out. In JSON, a
    text is a text, a member of a mapping (`cfg.field`), or a list of these. A tar's members are files of these kinds.
    `total` is the size of all files in bytes. Raises `DataError`.
    """

    def __init__(self, cfg: TextsConfig):
        self.cfg = cfg
        self.files = _files(cfg.path)
        self._base = self.files[0].parent
        while not all(file.is_relative_to(self._base) for file in self.files):
            self._base = self._base.parent
        self.total = sum(file.stat().st_size for file in self.files)

    def __iter__(self) -> Iterator[Text]:
        before = 0
        for file in self.files:
            key = _cut(file.relative_to(self._base).as_posix())
            try:
                with file.open("rb") as raw:
                    for name, text in self._of(raw, file.name, str(file), key):
                        yield Text(name, text, before + raw.tell())
                before += file.stat().st_size
            except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
                raise DataError(f"{file}: cannot be read: {cause(error)}.") from error

    def _of(self, raw: IO[bytes], name: str, where: str, key: str) -> Iterator[tuple[str, str]]:
        """The texts of an open file; `where` names it in errors."""
        stream: Any = raw
        if name.lower().endswith(".gz"):
            stream, name = io.BufferedReader(gzip.GzipFile(fileobj=raw)), name[:-3]
        suffix = Path(name).suffix.lower()
        if suffix == ".tar":
            yield from self._tar(stream, where, key)
        elif suffix == ".parquet":
            yield from self._parquet(raw, where, key)
        elif suffix == ".json":
            blob = stream.read(LONGEST + 1)
            _check_length(blob, where)
            yield from _numbered(key, self._values(_json(blob, where), where))
        elif suffix == ".jsonl":
            for number, line in _lines(stream, where):
                value = _json(line, f"{where}: line {number + 1}")
                named = self._key_of(value) or f"{key}/{number:08}"
                yield from _numbered(named, self._values(value, f"{where}: line {number + 1}"))
        else:
            lines = (
                (number, _decoded(line, f"{where}: line {number + 1}"))
                for number, line in _lines(stream, where)
            )
            first, second = next(lines, None), next(lines, None)
            if first is not None and second is None:
                yield key, first[1]
                return
            for number, text in itertools.chain(filter(None, (first, second)), lines):
                yield f"{key}/{number:08}", text

    def _tar(self, stream: BinaryIO, where: str, key: str) -> Iterator[tuple[str, str]]:
        # As a stream: no list of members is kept, and only what is asked for is read.
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=Member) as archive:
            for member in archive:
                if member.isfile() and _kind(member.name) in _IN_TAR:
                    content = archive.extractfile(member)
                    assert content is not None
                    yield from self._of(content, member.name, f"{where}: {member.name}", _cut(member.name))
                archive.members = []  # type: ignore[attr-defined]

    def _parquet(self, raw: IO[bytes], where: str, key: str) -> Iterator[tuple[str, str]]:
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError(f"{where}: {cannot_import(error, 'pyarrow')}.") from error
        try:
            file = parquet.ParquetFile(raw)
            names = file.schema_arrow.names
            plain = [
                field.name
                for field in file.schema_arrow
                if arrow.types.is_string(field.type) or arrow.types.is_large_string(field.type)
            ]
            column = self.cfg.field or (plain[0] if len(plain) == 1 else None)
            if column not in names:
                raise DataError(_which(where, "column", self.cfg.field, names))
            columns = [column, *([self.cfg.key] if self.cfg.key in names else [])]
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    named = self._key_of(row) or f"{key}/{number:08}"
                    yield from _numbered(named, self._values(row[column], f"{where}: row {number + 1}"))
                    number += 1
        except arrow.ArrowException as error:
            raise DataError(f"{where}: cannot be read: {first_line(error)}.") from error

    def _key_of(self, row: Any) -> str:
        named = row.get(self.cfg.key) if self.cfg.key and isinstance(row, dict) else None
        return "" if named is None else str(named)

    def _values(self, value: Any, where: str) -> list[str]:
        """The texts in a value of JSON."""
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise DataError(f"{where}: the text has half a surrogate pair, which no letter is.")
            return [value]
        if isinstance(value, list):
            return [text for each in value for text in self._values(each, where)]
        if isinstance(value, dict):
            plain = [name for name, each in value.items() if isinstance(each, str) and name != self.cfg.key]
            field = self.cfg.field or (plain[0] if len(plain) == 1 else None)
            if field not in value:
                raise DataError(_which(where, "member", self.cfg.field, list(value)))
            return self._values(value[field], where)
        raise DataError(f"{where}: {json.dumps(value)} is no text.")


def _files(path: str) -> list[Path]:
    """The files that a path or a pattern names."""
    given = local(path)
    if given.is_dir():
        below = [Path(folder) / name for folder, _, names in os.walk(given) for name in names]
        files = [file for file in below if _kind(file.name) in SUFFIXES]
        nothing = "holds no files of texts"
    elif given.exists():
        files, nothing = [given], ""
        if _kind(given.name) not in SUFFIXES:
            raise DataError(
                f"{path}: texts are read from {listed(SUFFIXES)} and these with .gz, not from this file."
            )
    else:
        # A folder that the pattern finds is not searched: the pattern says what is wanted.
        found = map(Path, glob.glob(str(given), recursive=True))  # noqa: PTH207  Path.glob takes no whole path
        files = [file for file in found if _kind(file.name) in SUFFIXES and file.is_file()]
        beside = given.parent.iterdir() if given.parent.is_dir() else ()
        near = did_you_mean(given.name, [path.name for path in beside])
        nothing = f"there is no such file, and as a pattern it matches no files of texts.{near}".rstrip(".")
    if not files:
        raise DataError(f"{path}: {nothing} ({listed(SUFFIXES)}, also with .gz).")
    return sorted(files)


def _kind(name: str) -> str:
    """The suffix of a file's name without `.gz`, in lower case."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _cut(name: str) -> str:
    """A name without its suffixes."""
    short = name[:-3] if name.lower().endswith(".gz") else name
    return short[: len(short) - len(_kind(name))]


def _lines(stream: Any, where: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 0."""
    number = 0
    while line := stream.readline(LONGEST + 1):
        _check_length(line, f"{where}: line {number + 1}")
        if line.strip():
            yield number, line
        number += 1


def _check_length(found: bytes, where: str) -> None:
    if len(found) > LONGEST:
        raise DataError(f"{where}: is longer than {in_bytes(LONGEST)}, which is no text of a sample.")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8: {first_line(error)}.") from error


def _json(blob: bytes, where: str) -> Any:
    try:
        return json.loads(blob)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON: {first_line(error)}.") from error


def _numbered(key: str, texts: list[str]) -> Iterator[tuple[str, str]]:
    """The texts of one record: its key alone, or the key and a number if there are several."""
    for number, text in enumerate(texts):
        yield (key if len(texts) == 1 else f"{key}/{number}"), text


def _which(where: str, what: str, asked: str | None, there: list[str]) -> str:
    if asked is None:
        return f"{where}: which {what} is the text? Set data.field to one of {listed(there) or 'none'}."
    return f"{where}: has no {what} '{asked}'.{did_you_mean(asked, there)} It has: {listed(there) or 'none'}."
