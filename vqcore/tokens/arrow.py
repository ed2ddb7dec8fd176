"""The store `arrow`: a shard is an Arrow IPC file with one record batch, which is mapped into memory, never read whole.

Columns: `key` (text; bytes if a name is not UTF-8), `codes` (lists of one length, the grid row by row and the codebooks
of a position one after the other, in the smallest unsigned integer type), and one column for each extra. The schema's
metadata has the shape of a row.
"""

import contextlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vqcore.config import NoSettings
from vqcore.errors import DataError, did_you_mean, first_line
from vqcore.files import aside
from vqcore.protocols import Coded
from vqcore.reading import size_of

SUFFIX = ".arrow"
_SHAPE, _JSON = b"shape", {b"json": b"1"}
_OWN = ("key", "codes")


class Arrow:
    """Arrow files, mapped into memory: random access by place and by key."""

    Config = NoSettings

    def __init__(self, cfg: NoSettings):
        pass

    def write(
        self, folder: Path, shard: str, rows: Sequence[Coded], manifest: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """One file. Raises `ValueError` for an extra with the name of a column of ours."""
        with aside(folder / f"{shard}{SUFFIX}") as temporary:
            write_batch(temporary, table_of(rows, manifest))
        return (f"{shard}{SUFFIX}",)

    def open(self, folder: Path, manifest: Mapping[str, Any]) -> "ArrowRows":
        """The rows of all shards, mapped."""
        return open_rows(folder, manifest, mapped)


def table_of(rows: Sequence[Coded], manifest: Mapping[str, Any]) -> pa.RecordBatch:
    """Rows as a record batch."""
    shape = (*manifest["grid"], manifest["num_codebooks"])
    codes = np.zeros((len(rows), *shape), manifest["dtype"])
    for place, row in enumerate(rows):
        if row.codes.shape != shape:
            raise ValueError(f"the codes of '{row.key}' have shape {row.codes.shape}, not {shape}")
        codes[place] = row.codes
    lists = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), int(np.prod(shape)))
    return batch_of(rows, lists, shape)


def batch_of(rows: Sequence[Coded], codes: pa.Array, shape: tuple[int, ...]) -> pa.RecordBatch:
    """A record batch of keys, a column `codes`, and the extras; `shape` is that of a row's codes.

    Raises `ValueError` for an extra with the name of a column of ours.
    """
    fields = [_texts("key", [row.key for row in rows]), (pa.field("codes", codes.type), codes)]
    for name in dict.fromkeys(name for row in rows for name in row.extras):
        if name in _OWN:
            raise ValueError(f"an extra cannot have the name '{name}', that of a column of the store")
        fields.append(_column(name, [row.extras.get(name) for row in rows]))
    schema = pa.schema([field for field, _ in fields], {_SHAPE: json.dumps(shape).encode()})
    return pa.record_batch([column for _, column in fields], schema=schema)


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Write an Arrow IPC file with one record batch."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _texts(name: str, values: Sequence[str | None]) -> tuple[pa.Field, pa.Array]:
    """A column of texts; of bytes if one of them has bytes that are not UTF-8, as a name of a file may."""
    raw = [None if value is None else value.encode("utf-8", "surrogateescape") for value in values]
    column = pa.array(raw, pa.binary())
    with contextlib.suppress(pa.ArrowInvalid):
        column = column.cast(pa.string())
    return pa.field(name, column.type), column


def _column(name: str, values: Sequence[Any]) -> tuple[pa.Field, pa.Array]:
    """A column of one extra: numbers, texts or lists of whole numbers as such, all else as JSON."""
    known = [value for value in values if value is not None]
    if all(type(value) is int for value in known):
        column = pa.array(values, pa.int64())
    elif all(isinstance(value, str) for value in known):
        return _texts(name, values)
    elif all(isinstance(value, (list, tuple)) and all(type(n) is int for n in value) for value in known):
        column = pa.array(values, pa.list_(pa.int64()))
    else:
        texts = [None if value is None else json.dumps(value, sort_keys=True) for value in values]
        return pa.field(name, pa.string(), metadata=_JSON), pa.array(texts, pa.string())
    return pa.field(name, column.type), column


def open_rows(
    folder: Path, manifest: Mapping[str, Any], read: Callable[[Path], pa.RecordBatch]
) -> "ArrowRows":
    """The rows of all shards of a manifest, each one file that `read` reads."""
    shape = (*manifest["grid"], manifest["num_codebooks"])
    files = [(folder / name, shard["rows"]) for shard in manifest["shards"] for name in shard["files"]]
    return ArrowRows([Shard(path, read, count, shape) for path, count in files], shape)


def mapped(path: Path) -> pa.RecordBatch:
    """The record batch of a file, mapped; the file itself is closed, so that a store may have more shards than that."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(0)


class Shard:
    """One shard, as `read` gives it. Raises `DataError` for a file that is missing, cut off or of something else."""

    def __init__(self, path: Path, read: Callable[[Path], pa.RecordBatch], rows: int, shape: tuple[int, ...]):
        size_of(path, DataError)  # a pipe would be waited for
        try:
            self.batch = read(path)
            self.batch.validate()
            found = tuple(json.loads((self.batch.schema.metadata or {})[_SHAPE]))
            keys, codes = (self.batch.column(name) for name in _OWN)
            self.codes = self._codes(codes, found)
            self.keys = keys.cast(pa.binary())
        except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{path}: this shard cannot be read: {first_line(error)}") from error
        if found != shape or len(self.batch) != rows:
            raise DataError(
                f"{path}: this shard holds {len(self.batch)} rows of codes {list(found)}; the manifest says {rows} "
                f"of {list(shape)}."
            )
        _, offsets, data = self.keys.buffers()
        self._offsets, self._data = memoryview(offsets).cast("i"), memoryview(data or b"")

    def _codes(self, column: pa.Array, shape: tuple[int, ...]) -> Any:
        """The codes of all rows, of which single ones and arrays of places are asked for."""
        raw = column.values.to_numpy(zero_copy_only=True)
        return raw[: len(self.batch) * int(np.prod(shape))].reshape(-1, *shape)

    def key(self, place: int) -> str:
        """The key of a row."""
        return str(self._data[self._offsets[place] : self._offsets[place + 1]], "utf-8", "surrogateescape")

    def extras(self, place: int) -> dict[str, Any]:
        """What else is known of a row."""
        found = {}
        for field, column in zip(self.batch.schema, self.batch.columns):
            if field.name in _OWN or not column[place].is_valid:
                continue
            value = column[place].as_py()
            if isinstance(value, bytes):
                value = value.decode("utf-8", "surrogateescape")
            found[field.name] = json.loads(value) if field.metadata else value
        return found


class ArrowRows:
    """The rows of shards. Of mapped shards they are views of the files; only what is used is read from disk."""

    def __init__(self, shards: Sequence[Shard], shape: tuple[int, ...]):
        self._shards, self._shape = shards, shape
        self.blocks = [shard.codes for shard in shards]
        """The codes of every shard, `(n, *grid, q)`."""
        ends = np.cumsum([len(block) for block in self.blocks], dtype=np.int64)
        self._ends: list[int] = ends.tolist()
        self._first: list[int] = [0, *self._ends[:-1]]
        self._order: np.ndarray | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def codes(self, place: int) -> np.ndarray:
        """The codes of a row, a view of the file."""
        if place < 0:
            raise IndexError(place)
        shard = bisect_right(self._ends, place)
        if shard == len(self._ends):
            raise IndexError(f"{place}: there are {len(self)} rows")
        return self.blocks[shard][place - self._first[shard]]

    def key(self, place: int) -> str:
        """The key of a row."""
        shard, inside = self._place(place)
        return self._shards[shard].key(inside)

    def keys(self) -> pa.ChunkedArray:
        """The keys of all rows, as bytes."""
        return pa.chunked_array([shard.keys for shard in self._shards], pa.binary())

    def many(self, places: np.ndarray) -> np.ndarray:
        """The codes of rows, stacked."""
        places = np.asarray(places, dtype=np.int64)
        if len(places) and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"places lie in [0, {len(self)})")
        if len(self.blocks) == 1:
            return self.blocks[0][places]
        shards = np.searchsorted(self._ends, places, side="right")
        made = np.empty((len(places), *self._shape), self.blocks[0].dtype if self.blocks else np.uint8)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            made[here] = self.blocks[shard][places[here] - self._first[shard]]
        return made

    def extras(self, place: int) -> dict[str, Any]:
        """What else is known of a row."""
        shard, inside = self._place(place)
        return self._shards[shard].extras(inside)

    def find(self, key: str) -> int:
        """The place of a key, by bisection in the order of keys, which is made once: 8 bytes a row."""
        if self._order is None:
            self._order = pc.sort_indices(self.keys()).to_numpy()
        wanted = key.encode("utf-8", "surrogateescape")
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.key(int(self._order[middle])).encode("utf-8", "surrogateescape") < wanted:
                low = middle + 1
            else:
                high = middle
        if low < len(self) and self.key(int(self._order[low])) == key:
            return int(self._order[low])
        some = map(self.key, range(min(len(self), 1000)))
        raise KeyError(f"there are no codes of '{key}'.{did_you_mean(key, some)}")

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index}: there are {len(self)} rows")
        shard = bisect_right(self._ends, index)
        return shard, index - self._first[shard]
