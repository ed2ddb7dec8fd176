"""The readers of the core: files of one kind as arrays of numbers. Each format's library is imported when it is used.

Nothing here runs code of a file or follows a way out of it: no pickles, no objects, no links to other files, no
addresses. What a file declares is compared with bounds before memory is taken.
"""

import csv
import gzip
import importlib
import importlib.util
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqcore import config
from vqcore.config import NoSettings, at_least
from vqcore.data.hints import readers_of
from vqcore.data.listing import suffix_length
from vqcore.data.npy import read_array, read_member
from vqcore.errors import (
    DataError,
    SettingError,
    VqcoreError,
    cannot_import,
    cause,
    did_you_mean,
    in_bytes,
    listed,
)
from vqcore.reading import check_memory, size_of

MOST_SAMPLE = 4 << 30
"""Most bytes of the numbers of one sample in a format that compresses: a small file may declare any size."""
MOST_CHUNK = 256 << 20
"""Most bytes of a piece that is unpacked at once."""
_NUMBERS = "biufc"
_BUILT_IN = {
    1: "deflate",
    2: "shuffle",
    3: "fletcher32",
    4: "szip",
    5: "nbit",
    6: "scaleoffset",
    32000: "lzf",
}
"""The filters of HDF5 that h5py brings. Any other filter is a library that HDF5 would load from a folder."""
_HOPS = 16
_NODATA = 42113
"""The TIFF tag of GDAL for the value that stands for no data."""


class Npy:
    """`.npy`: one array of NumPy."""

    suffixes = (".npy",)
    Config = NoSettings

    def __init__(self, cfg: NoSettings):
        self.cfg = cfg

    def read(self, path: Path) -> np.ndarray:
        """The array. Raises `DataError`."""
        return read_array(path, str(path))


class Npz:
    """`.npz`: arrays of NumPy by name."""

    suffixes, part, many = (".npz",), "key", False

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of .npz files."""

        key: str | None = None
        """Name of the array. Null: the only array of the file."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def read(self, path: Path) -> np.ndarray:
        """The array. Raises `DataError`."""
        return read_member(path, self.cfg.key, str(path), "data.modality.reader.key", most=MOST_SAMPLE)

    def parts(self, path: Path) -> tuple[str, ...]:
        """The names of the arrays. Raises `DataError`."""
        size_of(path, DataError)
        with _explained(path), zipfile.ZipFile(path) as archive:
            return tuple(dict.fromkeys(name.removesuffix(".npy") for name in archive.namelist()))


class Tiff:
    """`.tif`, `.tiff`: TIFF, BigTIFF and GeoTIFF, all pages of the first page's shape. Channels come first.

    Pages, and samples of a page, are channels: `(pages, h, w)`, `(samples, h, w)` or `(pages, samples, h, w)`; one page
    with one sample is `(h, w)`. Reduced copies (overviews) are left out. The no-data value of GDAL becomes a mask.
    """

    suffixes = (".tif", ".tiff")

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of TIFF files."""

        page: int | None = None
        """Number of the page, from 0. Null: all pages."""

        def __post_init__(self) -> None:
            at_least(self, page=0)

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def read(self, path: Path) -> np.ndarray:
        """The picture or pictures. Raises `DataError`."""
        size_of(path, DataError)
        tifffile = _library("tifffile", path)
        # A handle of the open file, not a path: descriptions of OME and Micro-Manager name other files.
        with _explained(path), path.open("rb") as file, tifffile.TiffFile(file, _multifile=False) as opened:
            pages = self._pages(opened, path)
            self._check(pages, path)
            planes = [_samples_first(page, path) for page in pages]
            array = planes[0] if len(planes) == 1 else np.stack(planes)
            return _without(array, pages[0].tags.get(_NODATA), path)

    def _pages(self, opened: Any, path: Path) -> list[Any]:
        """The pages to read."""
        pages = [page for page in opened.pages if not page.is_reduced and not page.is_mask]
        declared = (opened.imagej_metadata or {}).get("images", 1) if opened.is_imagej else 1
        if not pages or declared > len(pages):
            raise DataError(f"{path}: {len(pages)} pages can be read and the file declares {declared}")
        number = self.cfg.page
        if number is not None and number >= len(pages):
            raise DataError(
                f"{path}: has {len(pages)} pages, and data.modality.reader.page={number} counts from 0"
            )
        pages = pages if number is None else [pages[number]]
        for place, page in enumerate(pages):
            if (page.shape, page.dtype) != (pages[0].shape, pages[0].dtype):
                raise DataError(
                    f"{path}: page {place} has shape {page.shape} and type {page.dtype}, page 0 {pages[0].shape} and "
                    f"{pages[0].dtype}. Choose one with data.modality.reader.page"
                )
        return pages

    def _check(self, pages: Sequence[Any], path: Path) -> None:
        first = pages[0]
        if first.dtype is None or first.dtype.kind not in _NUMBERS:
            raise DataError(f"{path}: holds values of type {first.dtype}; only numbers can be read")
        _bounded(len(pages) * math.prod(first.shape) * first.dtype.itemsize, path)
        if int(first.compression) != 1:
            _bounded_chunk(math.prod(first.chunks) * first.dtype.itemsize, path)


class Csv:
    """`.csv`, also `.csv.gz`: a row for each position of one axis, a column for each channel; `(columns, rows)`.

    The first line has the names of the columns. If all of its cells are numbers there are no names, and columns are
    called 0, 1, 2 and so on. An empty cell becomes a mask.
    """

    suffixes, part, many = (".csv", ".csv.gz"), "columns", True

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of tables of text."""

        columns: tuple[str, ...] | None = None
        """Names of the columns, in the order of the channels. Null: all columns, in the order of the file."""
        delimiter: str = ","
        """The sign between two cells."""

        def __post_init__(self) -> None:
            if len(self.delimiter) != 1:
                raise SettingError("delimiter", f"{self.delimiter!r} must be one letter")

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def read(self, path: Path) -> np.ndarray:
        """The columns. Raises `DataError`."""
        return _from_table(self._table(path), self.cfg.columns, path)

    def parts(self, path: Path) -> tuple[str, ...]:
        """The columns of numbers. Raises `DataError`."""
        return _numbers_of(self._table(path).schema)

    def _table(self, path: Path) -> Any:
        _bounded(size_of(path, DataError), path)
        arrow, tables = _library("pyarrow", path), _library("pyarrow.csv", path)
        with _explained(path):
            text = _unpacked(path) if path.suffix.lower() == ".gz" else path.read_bytes()
            first, _, _ = text.partition(b"\n")
            cells = next(csv.reader([first.decode("utf-8-sig")], delimiter=self.cfg.delimiter), [])
            numbers = [_is_number(cell) for cell in cells]
            bare = any(numbers) and all(number or not cell for number, cell in zip(numbers, cells))
            names = [str(number) for number in range(len(cells))] if bare else None
            return tables.read_csv(
                arrow.BufferReader(text),
                read_options=tables.ReadOptions(column_names=names, use_threads=False),
                parse_options=tables.ParseOptions(delimiter=self.cfg.delimiter),
            )


class Parquet:
    """`.parquet`: a row for each position of one axis, a column for each channel; `(columns, rows)`. Nulls: a mask."""

    suffixes, part, many = (".parquet",), "columns", True

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of Parquet files."""

        columns: tuple[str, ...] | None = None
        """Names of the columns, in the order of the channels. Null: all columns, in the order of the file."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def read(self, path: Path) -> np.ndarray:
        """The columns. Raises `DataError`."""
        size_of(path, DataError)
        parquet = _library("pyarrow.parquet", path)
        with _explained(path), path.open("rb") as file:
            opened = parquet.ParquetFile(file)
            wanted = _chosen(opened.schema_arrow.names, self.cfg.columns, path)
            _bounded(opened.metadata.num_rows * len(wanted) * 8, path)
            for group in range(opened.metadata.num_row_groups):
                pieces = opened.metadata.row_group(group)
                for place in range(pieces.num_columns):
                    _bounded_chunk(pieces.column(place).total_uncompressed_size, path)
            table = opened.read(columns=list(wanted), use_threads=False)
            return _from_table(table, self.cfg.columns, path)

    def parts(self, path: Path) -> tuple[str, ...]:
        """The columns of numbers. Raises `DataError`."""
        size_of(path, DataError)
        parquet = _library("pyarrow.parquet", path)
        with _explained(path), path.open("rb") as file:
            return _numbers_of(parquet.read_schema(file))


class Hdf5:
    """`.h5`, `.hdf5`: one data set of an HDF5 file, by its path in the file."""

    suffixes, part, many = (".h5", ".hdf5"), "dataset", False

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of HDF5 files."""

        dataset: str | None = None
        """Path of the data set in the file, e.g. signals/ecg. Null: the only data set of the file."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def read(self, path: Path) -> np.ndarray:
        """The data set. Raises `DataError`."""
        size_of(path, DataError)
        h5py = _library("h5py", path)
        with _explained(path), path.open("rb") as raw, h5py.File(raw, "r") as file:
            found = self._found(h5py, file, path)
            self._check(found, path)
            return found[()]

    def parts(self, path: Path) -> tuple[str, ...]:
        """The paths of the data sets of numbers. Raises `DataError`."""
        size_of(path, DataError)
        h5py = _library("h5py", path)
        with _explained(path), path.open("rb") as raw, h5py.File(raw, "r") as file:
            return tuple(n for n in _data_sets(h5py, file, path) if file[n].dtype.kind in _NUMBERS)

    def _found(self, h5py: Any, file: Any, path: Path) -> Any:
        name = self.cfg.dataset
        if name is None:
            names = list(_data_sets(h5py, file, path))
            if len(names) != 1:
                some = names[0] if names else "NAME"
                raise DataError(
                    f"{path}: contains {f'the data sets {listed(names)}' if names else 'no data set'}. "
                    f"Choose one, e.g. data.modality.reader.dataset={some}"
                )
            name = names[0]
        found = _followed(h5py, file, name, path)
        if isinstance(found, h5py.Dataset):
            return found
        names = list(_data_sets(h5py, file, path))
        raise DataError(
            f"{path}: contains no data set '{name}'.{did_you_mean(name, names)} Data sets: {listed(names) or 'none'}"
        )

    def _check(self, found: Any, path: Path) -> None:
        here = f"{path}: {found.name}"
        if found.dtype.kind not in _NUMBERS or found.dtype.metadata:
            raise DataError(f"{here}: holds values of type {found.dtype}; only numbers can be read")
        if found.is_virtual:
            raise DataError(f"{here}: is a virtual data set, which takes its values from other files")
        if found.external:
            raise DataError(f"{here}: its values lie in another file, {found.external[0][0]}")
        if not found.shape or 0 in found.shape:
            raise DataError(f"{here}: has the shape {found.shape}, which is no array or empty")
        _bounded(math.prod(found.shape) * found.dtype.itemsize, here)
        layout = found.id.get_create_plist()
        for place in range(layout.get_nfilters()):
            number = layout.get_filter(place)[0]
            if number not in _BUILT_IN:
                raise DataError(
                    f"{here}: is packed with the HDF5 filter {number}, which is no part of HDF5. Write it with gzip"
                )
        if found.chunks:
            _bounded_chunk(math.prod(found.chunks) * found.dtype.itemsize, here)
        if not found.id.get_storage_size():
            raise DataError(f"{here}: nothing was ever written into this data set")


CORE: dict[str, type[Any]] = {
    suffix: reader for reader in (Npy, Npz, Tiff, Csv, Parquet, Hdf5) for suffix in reader.suffixes
}
"""The readers that are chosen by suffix."""


class BySuffix:
    """Every reader of the core with its default settings, chosen by suffix."""

    suffixes = tuple(CORE)

    def read(self, path: Path) -> np.ndarray:
        """The array in a file. Raises `DataError`."""
        length = suffix_length(path.name, self.suffixes)
        if not length:
            raise DataError(f"{path}: no reader for '{path.suffix}'. {readers_of([path.suffix])}".rstrip())
        made: Any = CORE[path.name[-length:].lower()]
        return made(made.Config()).read(path)


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that does not fit NumPy raises ValueError or AttributeError
        package = name.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = cannot_import(error, package, "'vqcore[files]'" if missing else None)
        raise DataError(f"{path}: cannot be read: {why}") from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever a library says of a damaged file becomes one line. A bug of vqcore is a VqcoreError neither."""
    try:
        yield
    except VqcoreError:
        raise
    except Exception as error:
        # The libraries raise errors of many kinds, some of their own, for files that are damaged.
        if "imagecodecs" in str(error) and importlib.util.find_spec("imagecodecs") is None:
            raise DataError(
                f"{path}: is damaged, or packed in a way that needs another package: pip install imagecodecs"
            ) from error
        raise DataError(f"{path}: damaged or of another kind: {cause(error)}") from error


def _bounded(need: int, where: Path | str) -> None:
    if need > MOST_SAMPLE:
        raise DataError(f"{where}: declares {in_bytes(need)}; a sample has at most {in_bytes(MOST_SAMPLE)}")
    check_memory(need, DataError, str(where))


def _bounded_chunk(need: int, where: Path | str) -> None:
    if need > MOST_CHUNK:
        raise DataError(
            f"{where}: is packed in pieces of {in_bytes(need)}; a piece has at most {in_bytes(MOST_CHUNK)}. "
            "Write the file again with smaller pieces (chunks, tiles, row groups)"
        )


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        text = file.read(MOST_CHUNK + 1)
    _bounded_chunk(len(text), path)
    return text


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _chosen(names: Sequence[str], wanted: Sequence[str] | None, path: Path) -> Sequence[str]:
    """The columns to read. Raises `DataError` for one that is missing or that two columns are called."""
    for name in wanted or names:
        if names.count(name) != 1:
            count, hint = names.count(name), did_you_mean(name, names)
            what = f"{count} columns are called '{name}'" if count else f"there is no column '{name}'.{hint}"
            raise DataError(f"{path}: {what} Columns: {listed(names)} (data.modality.reader.columns)")
    return wanted or names


def _from_table(table: Any, wanted: Sequence[str] | None, path: Path) -> np.ndarray:
    """The columns of a table of Arrow as `(columns, rows)`; masked if a cell is empty."""
    rows, hidden = [], []
    for name in _chosen(table.column_names, wanted, path):
        column = table.column(name)
        kind = str(column.type)
        if not _is_numbers(kind):
            what = "is empty" if kind == "null" else f"holds values of type {kind}"
            raise DataError(
                f"{path}: the column '{name}' {what}; only numbers can be read. Name the columns to read, e.g. "
                f"data.modality.reader.columns=[{','.join(_numbers_of(table.schema)) or 'a,b'}]"
            )
        missing = np.asarray(column.is_null().to_numpy(), dtype=bool)
        rows.append(np.where(missing, 0, column.to_numpy()) if missing.any() else column.to_numpy())
        hidden.append(missing)
    if not rows or not len(rows[0]):
        raise DataError(f"{path}: has no rows")
    array = np.stack(rows)
    return np.ma.MaskedArray(array, np.stack(hidden)) if np.any(hidden) else array


def _is_numbers(kind: Any) -> bool:
    return str(kind).startswith(("int", "uint", "float", "double", "halffloat", "bool"))


def _numbers_of(schema: Any) -> tuple[str, ...]:
    """The names of the columns of numbers; those that two columns have are left out."""
    names = list(schema.names)
    return tuple(one.name for one in schema if _is_numbers(one.type) and names.count(one.name) == 1)


def _samples_first(page: Any, path: Path) -> np.ndarray:
    """The numbers of a TIFF page, samples before height and width."""
    try:
        array = page.asarray()
    except (zlib.error, RuntimeError) as error:
        raise ValueError(str(error)) from error
    place = page.axes.find("S")
    return np.moveaxis(array, place, 0) if place > 0 else array


def _without(array: np.ndarray, tag: Any, path: Path) -> np.ndarray:
    """The array with a mask where it has the value that a GeoTIFF declares as no data."""
    if tag is None:
        return array
    text = str(tag.value).strip().strip("\0")
    if not _is_number(text):
        raise DataError(f"{path}: declares {text!r} as no data, which is no number")
    absent = (
        np.isnan(array) if math.isnan(float(text)) else array == np.asarray(float(text)).astype(np.float64)
    )
    if array.dtype == np.float32 and not math.isnan(float(text)):
        absent |= array == np.float32(text)  # GDAL writes more digits than the values have
    return np.ma.MaskedArray(array, absent) if absent.any() else array


def _data_sets(h5py: Any, group: Any, path: Path, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The paths of the data sets that lie in the file itself, reached without links."""
    if depth > _HOPS:
        return
    for name in group:
        if isinstance(group.get(name, getlink=True), h5py.HardLink):
            kind = group.get(name, getclass=True)
            if kind is h5py.Dataset:
                yield f"{prefix}{name}"
            elif kind is h5py.Group:
                yield from _data_sets(h5py, group[name], path, f"{prefix}{name}/", depth + 1)


def _followed(h5py: Any, file: Any, name: str, path: Path) -> Any:
    """What lies at a path of an HDF5 file, or None. Raises `DataError` for a link on the way."""
    at: Any = file
    for part in name.strip("/").split("/"):
        if not isinstance(at, h5py.Group) or part not in list(at):
            return None
        link = at.get(part, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise DataError(
                f"{path}: '{name}' is a link to another file, {link.filename}, which is not followed"
            )
        if isinstance(link, h5py.SoftLink):
            raise DataError(f"{path}: '{name}' is a link to {link.path}: name that place instead")
        at = at[part]
    return at
