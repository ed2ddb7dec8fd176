"""The store `folder`: one file of codes for each file, as `vqcore.artefacts.codes` describes them, for whoever has few.

A manifest stands in every folder that holds codes, so that a part of a store can be moved.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vqcore.artefacts.codes import SUFFIXES, CodeShape, as_rows, by_record, joined, read_codes
from vqcore.artefacts.stored import adopted
from vqcore.config import NoSettings
from vqcore.data.listing import Listing
from vqcore.errors import DataError, did_you_mean
from vqcore.protocols import Coded
from vqcore.tokens.store import Claims, save_codes

log = logging.getLogger(__name__)

OF_A_FOLDER = (
    "format", "fingerprint", "codebook_size", "num_codebooks", "grid", "size", "dtype", "precision", "stride",
)  # fmt: skip
"""What the manifest of a folder says."""


def adopted_by(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a folder in the layout of another system, the store that `manifest` names."""
    return adopted(manifest["store"], {key: manifest[key] for key in OF_A_FOLDER if key in manifest})


class Folder:
    """One `.npy` or `.npz` a file. Of the extras of a row it keeps the places in the file, and nothing else."""

    Config = NoSettings

    def __init__(self, cfg: NoSettings):
        pass

    def write(
        self, folder: Path, shard: str, rows: Sequence[Coded], manifest: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """One file for each file that the rows come from; the name of the shard does not matter.

        Raises `DataError` for crops, whose views have no place in such a file.
        """
        if crops := [row.key for row in rows if "crop" in row.extras]:
            raise DataError(
                f"--store folder has no room for the view of a crop ({crops[0]}). Take arrow, tar or parquet."
            )
        if texts := [row.key for row in rows if "length" in row.extras]:
            raise DataError(
                f"--store folder has no room for the length of a text ({texts[0]}). Take arrow, tar or parquet."
            )
        if holes := [row.key for row in rows if "valid" in row.extras]:
            log.warning(f"warning: --store folder does not keep which positions of '{holes[0]}' are valid.")
        own = {key: manifest[key] for key in OF_A_FOLDER if key in manifest}
        written = []
        with Claims(own) as claims:
            claims.write(folder)
            for key, parts in by_record(rows):
                codes = [Coded(row.key, row.codes.astype(manifest["dtype"]), row.extras) for row in parts]
                claims.write((folder / key).parent)
                path = save_codes(folder, key, joined(codes, tuple(manifest["size"])))
                written.append(str(path.relative_to(folder)))
        return tuple(written)

    def open(self, folder: Path, manifest: Mapping[str, Any]) -> "FileRows":
        """The rows of all files below a folder, in the order of their keys."""
        shape = CodeShape(len(manifest["grid"]), manifest["num_codebooks"], manifest["codebook_size"])

        def read(path: Path, key: str) -> list[Coded]:
            return as_rows(key, read_codes(path, shape), shape.axes)

        return FileRows(folder, SUFFIXES, read, manifest["dtype"])


class FileRows:
    """The rows of the files below a folder, in the order of their keys: `read` gives those of a path and a key.

    Every file is read once to count its rows, and then when a row of it is asked for. Codes get the type `dtype`.
    """

    def __init__(
        self, folder: Path, suffixes: Sequence[str], read: Callable[[Path, str], list[Coded]], dtype: str
    ):
        self._files, self._read, self._dtype = Listing(str(folder), suffixes, "tokens"), read, np.dtype(dtype)
        ends = np.cumsum([len(self._rows(index)) for index in range(len(self._files))])
        self._ends: list[int] = ends.tolist()
        self._places: dict[str, int] | None = None
        self._last: tuple[int, list[Coded]] = (-1, [])

    def __len__(self) -> int:
        return self._ends[-1]

    def codes(self, place: int) -> np.ndarray:
        """The codes of a row."""
        return self._row(place).codes

    def key(self, place: int) -> str:
        """The key of a row."""
        return self._row(place).key

    def extras(self, place: int) -> Mapping[str, Any]:
        """What else is known of a row."""
        return self._row(place).extras

    def find(self, key: str) -> int:
        """The place of a key."""
        if self._places is None:
            self._places = {each: place for place, each in enumerate(self._keys())}
        if key not in self._places:
            raise KeyError(f"there are no codes of '{key}'.{did_you_mean(key, self._places)}")
        return self._places[key]

    def many(self, places: np.ndarray) -> np.ndarray:
        """The codes of rows, stacked."""
        return np.stack([self.codes(int(place)) for place in places])

    def keys(self) -> pa.Array:
        """The keys of all rows, as bytes."""
        return pa.array([key.encode("utf-8", "surrogateescape") for key in self._keys()], pa.binary())

    def _keys(self) -> Iterator[str]:
        for file in range(len(self._files)):
            yield from (row.key for row in self._rows(file))

    def _rows(self, file: int) -> list[Coded]:
        return self._read(self._files.path(file), self._files.key(file))

    def _row(self, place: int) -> Coded:
        if not 0 <= place < len(self):
            raise IndexError(f"{place}: there are {len(self)} rows")
        file = bisect_right(self._ends, place)
        if self._last[0] != file:
            self._last = file, self._rows(file)
        row = self._last[1][place - (self._ends[file - 1] if file else 0)]
        return Coded(row.key, row.codes.astype(self._dtype), row.extras)
