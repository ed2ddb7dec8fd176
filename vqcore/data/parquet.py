"""Columns of Parquet files as a data source: a row is a sample.

Only rows of a group as a whole can be unpacked. So the groups are the blocks of the source (`vqcore.data.order`), and a
process holds the groups that it used last.
"""

import logging
import re
import secrets
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vqcore.config import at_least
from vqcore.data.held import Held
from vqcore.data.lent import Content
from vqcore.data.listing import Listing, counted, nearest_sibling, suffix_length
from vqcore.data.remembered import place_of, recall, remember, stamp_of
from vqcore.data.shards import expand
from vqcore.data.sources import check_labels, path_of
from vqcore.data.split import Split
from vqcore.errors import DataError, cause, did_you_mean, in_bytes, listed
from vqcore.protocols import Blocks, Modality, streams
from vqcore.schema import DataConfig

log = logging.getLogger(__name__)

MOST_GROUP = 1 << 30
"""Most bytes of the columns of a row group, unpacked."""
SUFFIX = (".parquet",)
OPEN = 16
"""So many files are open in each process."""
_DAMAGE = (pa.ArrowException, OSError, ValueError, EOFError, IndexError, KeyError, NotImplementedError)
"""What pyarrow raises for damaged files."""


class Parquet:
    """Rows of Parquet files, each one a sample: files as bytes, also as `{bytes, path}`, or lists of numbers.

    Extra modalities are further columns. Lists may be nested; lists of one list have equal lengths. A number that is
    null is missing, and becomes a mask; rows with a null in place of a sample are left out, and counted. The key of a
    sample is the name of its file and its number in the file, or the text in a column. The samples of a row group are
    cheap together, so training shuffles groups, and samples within windows of groups.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of columns of Parquet files."""

        locations: ClassVar[tuple[str, ...]] = ("path",)

        path: str
        """Training samples: a file, a folder of files at any depth, or a pattern such as data/train-*.parquet."""
        eval_path: str | None = None
        """Held-out samples."""
        column: str | None = None
        """The column of the samples. Null: the only column that can be one."""
        key: str | None = None
        """A column of unique texts or whole numbers that name the samples. Null: file and number of the row."""
        extra_column: dict[str, str] = field(default_factory=dict)
        """The column of each extra modality, by label of data.extra."""
        memory_mib: int = 256
        """Memory in MiB of each reading process for row groups. The more, the better samples are shuffled."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_labels("extra_column", self.extra_column, self.extra)
            at_least(self, memory_mib=1)

    def __init__(self, cfg: Config, *, split: Split, modality: Modality, extra: Mapping[str, Modality]):
        path, self._setting = path_of(cfg.path, cfg.eval_path, split)
        self._paths, self._names = _files(path, self._setting)
        modalities = {"": modality, **extra}
        self._suffixes = {label: each.suffixes for label, each in modalities.items()}
        self._streams = {label: streams(each) for label, each in modalities.items()}
        found = self._scanned(cfg, {"": cfg.column, **cfg.extra_column}, modality.suffixes)
        rows = [each.rows for each in found]
        self._file_of = np.repeat(np.arange(len(found)), [len(each) for each in rows])
        self._number = np.concatenate([np.arange(len(each)) for each in rows])
        sizes = np.concatenate(rows)
        self._ends = np.cumsum(sizes)
        self._first = np.cumsum([0, *(int(each.sum()) for each in rows)])
        nulls = np.concatenate([start + each.nulls for start, each in zip(self._first, found)])
        # Row number minus the nulls before it: where the rows that count lie among all rows.
        self._gaps = nulls - np.arange(len(nulls))
        self._length = int(sizes.sum()) - len(nulls)
        self._counts = np.diff(self._first) - [len(each.nulls) for each in found]
        if not len(self):
            raise DataError(
                f"{self._setting}: {path}: has no rows. Left out: {counted(self.left_out) or 'nothing'}"
            )
        self._keys = _keys(found, cfg.key, self._setting) if cfg.key is not None else None
        bytes_ = sum(int(each.bytes.sum()) for each in found)
        largest = max(int(each.bytes.max(initial=0)) for each in found)
        self._groups = _Groups(self._paths, cfg.memory_mib << 20)
        if largest > self._groups.held.room:
            log.warning(
                "%s: row groups have up to %s, more than data.memory_mib=%d holds. Each sample unpacks one: write the "
                "files again with smaller groups (row_group_size=100), or give more memory.",
                self._setting, in_bytes(largest), cfg.memory_mib,
            )  # fmt: skip
        counts = sizes - np.diff(np.searchsorted(nulls, self._ends), prepend=0)
        together = max(1, self._groups.held.room * self._length // max(1, bytes_))
        self.blocks: Blocks | None = Blocks(counts[counts > 0], together)

    def __len__(self) -> int:
        return self._length

    @property
    def left_out(self) -> dict[str, int]:
        """How many rows are no samples, and how many files are damaged."""
        return dict(self._left_out.most_common())

    @property
    def shards(self) -> list[tuple[str, int]]:
        """Each file and how many samples it has; in its name, a slash is `%2F`, as in addresses."""
        names = (name.replace("%", "%25").replace("/", "%2F") for name in self._names)
        return list(zip(names, self._counts.tolist()))

    def key(self, index: int) -> str:
        """The text of the key column, or the name of the file and the number of the row."""
        if self._keys is not None:
            return str(self._keys[index])
        row = self._row(index)
        file = int(self._first.searchsorted(row, "right")) - 1
        return self._numbered(file, row)

    def get(self, index: int, label: str = "") -> Path | Content | np.ndarray:
        """What the column of a label holds: a file with its bytes, or an array. Raises `DataError`."""
        row = self._row(index)
        group = int(self._ends.searchsorted(row, "right"))
        first = int(self._ends[group - 1]) if group else 0
        file, column = int(self._file_of[group]), self._columns[label]
        where = f"{self._paths[file]}: row {row - int(self._first[file])}, column '{column}'"
        rows, within = int(self._ends[group]) - first, row - first
        held = self._groups.column(group, file, int(self._number[group]), rows, column)
        if not held.content:
            return _array(held.values.slice(within, 1), where)
        name = held.names[within].as_py() if held.names else None
        known = self._suffixes[label]
        length = suffix_length(name or "", known)
        # A file without a name gets that of any file of the modality, which looks inside.
        suffix = name[-length:] if name and length else next(iter(known), "")
        lent = f"{self._groups.mark}/{label or '_'}/{self._numbered(file, row)}{suffix}"
        return Content(held.values[within].as_py(), where, lent).for_reader(self._streams[label])

    def bytes_of(self, index: int, label: str = "") -> int | None:
        """Not known before a row is unpacked."""
        return None

    def _numbered(self, file: int, row: int) -> str:
        return f"{self._names[file]}/{row - int(self._first[file]):09d}"

    def _row(self, index: int) -> int:
        return index + int(self._gaps.searchsorted(index, "right"))

    def _scanned(
        self, cfg: Config, wanted: Mapping[str, str | None], suffixes: Sequence[str]
    ) -> list["_Scan"]:
        """What is in each file, and which column belongs to each label. Damaged files are left out and named."""
        self._left_out: Counter[str] = Counter()
        self._columns: dict[str, str] = {}
        found, damage = [], {}
        for place, path in enumerate(self._paths):
            try:
                if not self._columns:
                    self._columns = _chosen(path, wanted, self._setting)
                found.append(_scan(path, list(dict.fromkeys(self._columns.values())), cfg.key, suffixes))
            except _Damage as error:
                damage[place] = str(error)
        for reason in damage.values():
            log.warning("%s: the file is left out.", reason)
        if not found:
            raise DataError(f"{self._setting}: {next(iter(damage.values()))}")
        if damage:
            self._left_out["damaged file"] = len(damage)
        for attribute in ("_paths", "_names"):
            kept = [each for place, each in enumerate(getattr(self, attribute)) if place not in damage]
            setattr(self, attribute, kept)
        for each in found:
            self._left_out.update(each.left_out)
        return found


class _Damage(Exception):
    """A file that is no Parquet file, or a damaged one."""


@dataclass(frozen=True)
class _Scan:
    """What is known of a file: rows and unpacked bytes of each row group, rows that are left out, texts of the key."""

    rows: np.ndarray
    bytes: np.ndarray
    nulls: np.ndarray
    left_out: dict[str, int]
    keys: Any = None


@dataclass(frozen=True)
class _Column:
    """A column of a row group: arrays, or (`content`) the bytes of files, with their names where they are known."""

    values: Any
    content: bool = False
    names: Any = None

    @classmethod
    def of(cls, column: Any) -> "_Column":
        """The column as it was unpacked."""
        if not pa.types.is_struct(column.type):
            return cls(column, _is_bytes(column.type))
        named = column.type.get_field_index("path") >= 0
        return cls(column.field("bytes"), True, column.field("path") if named else None)


class _Groups:
    """Columns of row groups, unpacked, as far as memory holds them."""

    def __init__(self, paths: Sequence[Path], room: int):
        self.paths, self.held = paths, Held(room)
        self.mark = secrets.token_hex(8)
        """The name of this source among the files of a process."""
        self._files: OrderedDict[int, Any] = OrderedDict()

    def column(self, group: int, file: int, number: int, rows: int, name: str) -> "_Column":
        """A column of row group `number` of a file, which is group `group` of all. Raises `DataError`."""

        def unpack() -> tuple[_Column, int]:
            with _explained(self.paths[file]):
                read = self._file(file).read_row_group(number, columns=[name], use_threads=False)
                made = _combined(read.column(name))
            return _Column.of(made), made.nbytes

        found: _Column = self.held.get((group, name), rows, unpack)
        return found

    def _file(self, number: int) -> Any:
        if number not in self._files:
            self._files[number] = _opened(self.paths[number])
            if len(self._files) > OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": OrderedDict()}


def _files(path: str, setting: str) -> tuple[list[Path], list[str]]:
    """The files of a path, and what their keys begin with. Raises `DataError`."""
    if Path(path).is_dir():
        found = Listing(path, SUFFIX, setting)
        return [found.path(i) for i in range(len(found))], [found.key(i) for i in range(len(found))]
    paths = [Path(each) for each in expand(path, setting)]
    for each in paths:
        if not each.is_file():
            raise DataError(f"{setting}: {each}: there is no such file.{nearest_sibling(each)}")
    names = [each.name[: -suffix_length(each.name, SUFFIX) or None] for each in paths]
    if again := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"{setting}: {path}: two files are called {again[0]}; keys begin with this name")
    return paths, names


def _opened(path: Path) -> Any:
    # Without threads: a thread of the parent does not exist in a forked process that waits for it.
    return pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)


class _explained:
    """Whatever pyarrow says of a damaged file becomes one line."""

    def __init__(self, path: Path, kind: type[Exception] = DataError):
        self.path, self.kind = path, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, _DAMAGE):
            raise self.kind(f"{self.path}: damaged, or no Parquet file: {cause(error)}") from error


def _combined(column: Any) -> Any:
    if not column.num_chunks:  # a file without rows
        return pa.array([], column.type)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _is_bytes(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_list(kind: Any) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_sample(kind: Any) -> bool:
    """Whether values of a type can be samples: files as bytes, also with their path, or lists of numbers."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_bytes(kind.field(place).type)
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if not _is_list(kind):
        return _is_bytes(kind)
    while _is_list(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def sample_columns(path: Path) -> list[str]:
    """The columns of a file whose values can be whole samples. Raises `DataError`."""
    with _explained(path), _opened(path) as file:
        return _able(file.schema_arrow)


def _able(schema: Any) -> list[str]:
    return [one.name for one in schema if _is_sample(one.type) and schema.names.count(one.name) == 1]


def _chosen(path: Path, wanted: Mapping[str, str | None], setting: str) -> dict[str, str]:
    """The column of each label. Raises `DataError` for one that is not there or holds no samples."""
    with _explained(path, _Damage), _opened(path) as file:
        schema = file.schema_arrow
    able = _able(schema)
    chosen = {}
    for label, name in wanted.items():
        known = f"data.extra_column.{label}" if label else "data.column"
        if name is None:
            if len(able) != 1:
                what = (
                    f"several columns can be samples: {listed(able)}" if able else "no column can be samples"
                )
                raise DataError(
                    f"{setting}: {path}: {what}. Name one, e.g. {known}={(able or ['image'])[0]}. {_types(schema)}"
                )
            name = able[0]
        chosen[label] = name
        _check_column(schema, name, f"{known}={name}: {path}", able)
    return chosen


def _check_column(schema: Any, name: str, where: str, able: Sequence[str]) -> None:
    if (count := schema.names.count(name)) != 1:
        what = (
            f"{count} columns are called so"
            if count
            else f"there is no such column.{did_you_mean(name, schema.names)}"
        )
        raise DataError(f"{where}: {what} Columns: {listed(schema.names)}")
    if not _is_sample(schema.field(name).type):
        raise DataError(
            f"{where}: holds {schema.field(name).type}; a sample is a file as bytes, alone or as {{bytes, path}}, or a "
            f"list of numbers. Columns that can be samples: {listed(able) or 'none'}"
        )


def _types(schema: Any) -> str:
    return f"Columns: {listed(f'{one.name} ({one.type})' for one in schema)}"


def _scan(path: Path, columns: Sequence[str], key: str | None, suffixes: Sequence[str]) -> _Scan:
    """What is in a file, from the cache if the file is as it was. Raises `DataError`, and `_Damage`."""
    try:
        stamp = stamp_of(path)
    except OSError as error:
        raise _Damage(f"{path}: {cause(error)}") from error
    place = place_of("parquet", str(path.resolve()), stamp, repr((list(columns), key, list(suffixes))))
    held = recall(place)
    if held is None:
        with _explained(path, _Damage), _opened(path) as file:
            held = _read_scan(file, path, columns, key, suffixes)
        remember(place, held)
    nulls = {name: int(count) for name, count in zip(columns, held["counts"]) if count}
    keys = None
    if key is not None:
        buffers = [None, pa.py_buffer(held["key_ends"]), pa.py_buffer(held["key_text"])]
        keys = pa.LargeStringArray.from_buffers(len(held["key_ends"]) - 1, *buffers[1:])
    left = {f"null in '{name}'": count for name, count in nulls.items()}
    return _Scan(held["rows"], held["bytes"], held["nulls"], left, keys)


def _read_scan(
    file: Any, path: Path, columns: Sequence[str], key: str | None, suffixes: Sequence[str]
) -> dict[str, np.ndarray]:
    schema, metadata = file.schema_arrow, file.metadata
    for name in columns:
        _check_column(schema, name, f"{path}: column '{name}'", [])
    rows, sizes, nulls = list[int](), list[int](), list[np.ndarray]()
    counts = dict.fromkeys(columns, 0)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        need, doubtful = _about(group, columns)
        if need > MOST_GROUP:
            raise DataError(
                f"{path}: a row group has {in_bytes(need)}; at most {in_bytes(MOST_GROUP)} are unpacked at once. Write "
                "the file again with smaller groups, e.g. row_group_size=100"
            )
        gone = np.zeros(group.num_rows, bool)
        for name in doubtful:
            missing = _missing(file.read_row_group(number, columns=[name], use_threads=False).column(name))
            counts[name] += int((missing & ~gone).sum())
            gone |= missing
        nulls.append(np.flatnonzero(gone) + sum(rows))
        rows.append(group.num_rows)
        sizes.append(need)
    made = {
        "rows": np.array(rows, np.int64),
        "bytes": np.array(sizes, np.int64),
        "nulls": np.concatenate([np.empty(0, np.int64), *nulls]),
        "counts": np.array(list(counts.values()), np.int64),
    }
    if key is not None:
        texts = _key_texts(file, path, key, suffixes).take(
            pa.array(np.setdiff1d(np.arange(metadata.num_rows), made["nulls"]))
        )
        ends = np.cumsum([0, *pc.binary_length(texts).to_numpy()], dtype=np.int64)
        text = "".join(texts.to_pylist()).encode()
        made |= {"key_ends": ends, "key_text": np.frombuffer(text, np.uint8)}
    return made


def _about(group: Any, columns: Sequence[str]) -> tuple[int, list[str]]:
    """The unpacked bytes of columns of a row group, and the columns that may have nulls."""
    need, doubtful = 0, []
    for place in range(group.num_columns):
        leaf = group.column(place)
        name = next((one for one in columns if f"{leaf.path_in_schema}.".startswith(f"{one}.")), None)
        if name is None:
            continue
        width = {"INT64": 8, "DOUBLE": 8}.get(leaf.physical_type, 4)
        need += max(leaf.total_uncompressed_size, leaf.num_values * width)
        known = leaf.statistics
        if name not in doubtful and (known is None or not known.has_null_count or known.null_count):
            doubtful.append(name)
    return need, doubtful


def _missing(column: Any) -> np.ndarray:
    """Which values of a column are no samples."""
    missing = column.is_null().to_numpy()
    if pa.types.is_struct(column.type):
        missing = missing | pc.struct_field(column, "bytes").is_null().to_numpy()
    return np.asarray(missing, bool)


def _key_texts(file: Any, path: Path, key: str, suffixes: Sequence[str]) -> Any:
    """The texts of the key column, without suffixes of files. Raises `DataError` for what cannot name a sample."""
    where = f"data.key={key}: {path}"
    names = file.schema_arrow.names
    if names.count(key) != 1:
        raise DataError(
            f"{where}: there is no such column.{did_you_mean(key, names)} Columns: {listed(names)}"
        )
    kind = file.schema_arrow.field(key).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{where}: holds {kind}; samples are named by texts or whole numbers")
    texts = _combined(file.read(columns=[key], use_threads=False).column(key).cast(pa.large_string()))
    endings = "|".join(re.escape(each) for each in sorted(suffixes, key=len, reverse=True))
    texts = pc.replace_substring_regex(texts, f"(?i)(.)({endings})$", r"\1") if endings else texts
    bad = pc.fill_null(
        pc.match_substring_regex(texts, r"^$|^/|(^|/)\.\.?(/|$)|//|/$|[\\\x00-\x1f]|[^/]{200}"), True
    )
    if pc.any(bad).as_py():
        row = bad.index(True).as_py()
        raise DataError(
            f"{where}: row {row} has {texts[row].as_py()!r}, which is no relative path that can name a sample"
        )
    return texts


def _keys(found: Sequence[_Scan], key: str, setting: str) -> Any:
    """The keys of all samples. Raises `DataError` if two are equal."""
    keys = pa.concat_arrays([each.keys for each in found])
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = keys.value_counts()
        again = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()]
        raise DataError(f"{setting}: data.key={key}: two samples are called {again}. Keys must be unique")
    return keys


def _array(row: Any, where: str) -> np.ndarray:
    """The numbers in one row of lists, masked where one is null. Raises `DataError` if they are no array."""
    if isinstance(row.type, pa.FixedShapeTensorType):
        array, flat = np.array(row.to_numpy_ndarray()[0]), row.storage.flatten()
        if not flat.null_count:
            return array
        # The mask is laid out as the numbers are.
        gone = pa.array(flat.is_null().to_numpy(zero_copy_only=False).astype(np.uint8))
        kind = pa.fixed_shape_tensor(pa.uint8(), row.type.shape, permutation=row.type.permutation)
        mask = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(gone, len(gone)))
        return np.ma.MaskedArray(array, mask.to_numpy_ndarray()[0].astype(bool))
    values = row.storage if isinstance(row, pa.ExtensionArray) else row
    shape: list[int] = []
    while _is_list(values.type):
        lengths = [values.type.list_size] if pa.types.is_fixed_size_list(values.type) else _lengths(values)
        if values.null_count or len(lengths) != 1:
            raise DataError(f"{where}: lists of different lengths are no array")
        shape += lengths
        if not shape[-1]:
            raise DataError(f"{where}: an empty list is no array")
        values = values.flatten()
    absent = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    numbers = (
        pc.fill_null(values, False if pa.types.is_boolean(values.type) else 0)
        if values.null_count
        else values
    )
    array = np.array(numbers.to_numpy(zero_copy_only=False)).reshape(shape)
    return array if absent is None else np.ma.MaskedArray(array, absent.reshape(shape))


def _lengths(lists: Any) -> list[int]:
    """The different lengths of lists."""
    return [length for length in pc.unique(pc.list_value_length(lists)).to_pylist() if length is not None]
