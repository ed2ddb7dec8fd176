"""Codes on disk, as they are read: one file a sample or a record, and a manifest in every folder that holds codes.

`<key>.npy` has the codes of a sample `(*grid, q)`, or of n samples `(n, *grid, q)`. `<key>.npz` has those of a record
that was cut into windows: the arrays `codes` `(w, *grid, q)`, `start` `(w, r)`, `extent` and `size` `(r,)`; `codes`
of n records of one extent is `(n, w, *grid, q)`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from vqcore.data.listing import Listing
from vqcore.data.npy import read_array, read_member
from vqcore.data.windows import named
from vqcore.errors import DataError, did_you_mean
from vqcore.protocols import Coded, RecordCodes
from vqcore.reading import Each, misfit, read_json

MANIFEST = "tokens.json"
SUFFIXES = (".npy", ".npz")
FORMAT = 1
"""The version of manifests. It rises when an older vqcore would misread a store."""
SHARD = {
    "name": str,
    "rows": int,
    "of": int,
    "failed": [[str]],
    "sizes?": str,
    "extras": [str],
    "files": Each(str),
}
"""What is known of a shard that is done."""
_CODES = {
    "fingerprint": str,
    "dtype": str,
    "codebook_size": int,
    "num_codebooks": int,
    "grid": [int],
    "size": [int],
}
_STORE = {
    **_CODES,
    "store": str,
    "complete": bool,
    "shards?": [SHARD],
    "rows?": int,
    "files?": int,
    "failed?": int,
    "extras?": [str],
    "versions?": Each(str),
}
"""The manifest of a store of shards."""
Codes = np.ndarray | RecordCodes | list[RecordCodes]
"""What a file holds: codes of a sample or of n samples, of a record, or of n records."""


@dataclass(frozen=True)
class CodeShape:
    """What the codes of a tokenizer look like: the axes of their grid, codebooks, and codes of a codebook."""

    axes: int
    books: int
    codes: int


class TokenFiles(Mapping[str, Codes]):
    """The codes in a folder by key, the path below the folder without suffix. A file is read when asked for.

    Raises `DataError` if there are none.
    """

    def __init__(self, root: Path, shape: CodeShape):
        self.files, self.shape = Listing(str(root), SUFFIXES, "load_tokens"), shape

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[str]:
        return map(self.files.key, range(len(self.files)))

    def __getitem__(self, key: str) -> Codes:
        index = self.files.find(key)
        if index is None:
            raise KeyError(f"{self.files.root} has no codes of '{key}'.{did_you_mean(key, self)}")
        return read_codes(self.files.path(index), self.shape)

    def check_maker(self, fingerprint: str) -> None:
        """Raise `DataError` if another tokenizer made codes in the folder."""
        for folder in sorted({self.files.path(index).parent for index in range(len(self))}):
            if maker := other_maker(read_manifest(folder), fingerprint):
                raise DataError(f"{folder}: {maker}. Load the tokenizer that made them.")


def read_codes(path: Path, shape: CodeShape) -> Codes:
    """The codes in a file as int64. Raises `DataError` for what cannot be codes of this shape."""
    if path.suffix.lower() == ".npz":
        return _record(path, shape)
    codes = read_array(path, str(path))
    return check_codes(codes, path, shape, (shape.axes + 1, shape.axes + 2))


def _record(path: Path, shape: CodeShape) -> RecordCodes | list[RecordCodes]:
    found = {name: read_member(path, name, str(path)) for name in ("codes", "start", "extent", "size")}
    codes = check_codes(found["codes"], path, shape, (shape.axes + 2, shape.axes + 3))
    start, extent, size = found["start"], found["extent"], found["size"]
    places = start.dtype.kind in "iu" and start.ndim == 2 and extent.shape == size.shape == start.shape[1:]
    windows = codes.shape[-shape.axes - 2]
    if not places or len(start) != windows or not _covered(start, extent, size):
        raise DataError(f"{path}: damaged: start, extent and size do not say where {windows} windows lie.")
    whole, part = tuple(map(int, extent)), tuple(map(int, size))
    many = codes if codes.ndim == shape.axes + 3 else codes[None]
    made = [RecordCodes(each, start.astype(np.int64), whole, part) for each in many]
    return made if codes.ndim == shape.axes + 3 else made[0]


def _covered(start: np.ndarray, extent: np.ndarray, size: np.ndarray) -> bool:
    """Whether windows begin inside a record, and one of them at its beginning and one reaches its end."""
    if extent.dtype.kind not in "iu" or size.dtype.kind not in "iu" or (size < 1).any():
        return False
    inside = bool((start >= 0).all() and (start < extent).all())
    return inside and bool((start == 0).all(1).any() and (start + size >= extent).all(1).any())


def check_codes(codes: np.ndarray, where: object, shape: CodeShape, ndims: tuple[int, ...]) -> np.ndarray:
    """Codes as int64. Raises `DataError` that begins with `where` for what cannot be codes of this shape."""
    if codes.dtype.kind not in "iu" or codes.ndim not in ndims or codes.shape[-1] != shape.books:
        raise DataError(
            f"{where}: codes of this tokenizer are integers with {shape.axes} grid axes and a last axis of "
            f"{shape.books}, not {codes.dtype} of shape {list(codes.shape)}."
        )
    outside = codes[(codes < 0) | (codes >= shape.codes)]
    if outside.size:
        raise DataError(f"{where}: code {outside[0]} is out of range: codes lie in [0, {shape.codes}).")
    return codes.astype(np.int64)


def as_rows(key: str, codes: Codes, axes: int) -> list[Coded]:
    """What a file holds as rows of a store; `axes` is the number of axes of a grid."""
    if isinstance(codes, RecordCodes):
        return _windows(key, codes, {"record": key})
    if isinstance(codes, list):
        each = enumerate(codes)
        return [
            row
            for place, one in each
            for row in _windows(f"{key}#{place}", one, {"record": key, "row": place})
        ]
    if codes.ndim == axes + 1:
        return [Coded(key, codes)]
    return [Coded(f"{key}#{place}", row, {"record": key, "row": place}) for place, row in enumerate(codes)]


def _windows(key: str, codes: RecordCodes, extras: Mapping[str, Any]) -> list[Coded]:
    return [
        Coded(
            f"{key}#{named(at.tolist())}",
            row,
            {**extras, "start": list(map(int, at)), "extent": list(codes.extent)},
        )
        for row, at in zip(codes.codes, codes.start)
    ]


def joined(rows: Sequence[Coded], size: tuple[int, ...]) -> Codes:
    """What a file held, from its rows: the reverse of `as_rows`. `size` is that of a window."""
    if "start" in rows[0].extras:
        samples: dict[int | None, list[Coded]] = {}
        for row in rows:
            samples.setdefault(row.extras.get("row"), []).append(row)
        made = [
            RecordCodes(
                np.stack([row.codes for row in part]),
                np.array([row.extras["start"] for row in part], dtype=np.int64),
                tuple(part[0].extras["extent"]),
                size,
            )
            for part in samples.values()
        ]
        return made if "row" in rows[0].extras else made[0]
    return np.stack([row.codes for row in rows]) if "row" in rows[0].extras else rows[0].codes


def packed(valid: Bool[np.ndarray, "*grid"]) -> str:
    """Which positions of a grid are valid, as the extra `valid` of a row: bits row by row, in hexadecimal digits."""
    return np.packbits(valid.reshape(-1)).tobytes().hex()


def unpacked(text: str | None, grid: Sequence[int]) -> Bool[np.ndarray, "*grid"]:
    """The reverse of `packed`; None stands for a grid whose positions are all valid. Raises `DataError`."""
    if text is None:
        return np.ones(grid, dtype=bool)
    count = int(np.prod(grid))
    try:
        bits = np.frombuffer(bytes.fromhex(text), np.uint8)
    except ValueError:
        bits = np.zeros(0, np.uint8)
    if len(bits) != -(-count // 8):
        raise DataError(f"'{text[:40]}' does not say which of {count} positions are valid")
    return np.unpackbits(bits, count=count).reshape(grid).astype(bool)


def by_record(rows: Iterable[Coded]) -> Iterator[tuple[str, list[Coded]]]:
    """The rows of each file, with the key of the file."""
    for key, group in groupby(rows, record_of):
        yield key, list(group)


def record_of(row: Coded) -> str:
    """The key of the file that a row comes from."""
    return str(row.extras.get("record", row.key))


def other_maker(manifest: Mapping[str, Any] | None, fingerprint: str) -> str:
    """A sentence if a manifest names another tokenizer; nothing without a manifest."""
    maker = (manifest or {}).get("fingerprint", fingerprint)
    if maker == fingerprint:
        return ""
    return (
        f"these codes were made by another tokenizer: their fingerprint is {str(maker)[:16]}, that of this tokenizer "
        f"is {fingerprint[:16]}"
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the codes in a folder; None if the folder has none. Manifests of other folders do not count.

    Raises `DataError` if the file is damaged, or is not a manifest of codes.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = read_json(path, DataError, Each(None))
    except DataError as error:
        raise DataError(f"{error} Remove the file, or tokenize again.") from error
    if isinstance(version := found.get("format"), int) and version > FORMAT:
        raise DataError(
            f"{path}: these codes are stored in format {version}, and this vqcore reads up to {FORMAT}. Upgrade vqcore."
        )
    if "store" in found and (wrong := misfit(found, _STORE) or unusable(found)):
        raise DataError(f"{path}: {wrong}. Take the file from a backup, or tokenize into another folder.")
    if not isinstance(found.get("fingerprint"), str) or not _has_sizes(found):
        raise DataError(
            f"{path} is not a manifest that vqcore tokenize wrote: it lacks fingerprint, grid or size. Move the file "
            "away, or choose another folder."
        )
    return found


def unusable(manifest: Mapping[str, Any]) -> str:
    """What makes a manifest of no use for whoever reads rows; nothing if it is whole."""
    if wrong := misfit(manifest, _CODES):
        return wrong
    if not _has_sizes(manifest) or min(manifest["codebook_size"], manifest["num_codebooks"]) < 1:
        return "grid, size, codebook_size and num_codebooks must be whole numbers above 0"
    if (wanted := str(np.min_scalar_type(manifest["codebook_size"] - 1))) != manifest["dtype"]:
        return f"dtype is {manifest['dtype']}, but {manifest['codebook_size']} codes need {wanted}"
    names = [Path(name) for shard in manifest.get("shards", ()) for name in (shard["name"], *shard["files"])]
    outside = [name for name in names if name.is_absolute() or ".." in name.parts]
    return f"{outside[0]} is no name of a file below the folder" if outside else ""


def _has_sizes(manifest: Mapping[str, Any]) -> bool:
    return all(
        isinstance(sides := manifest.get(key), list)
        and sides
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
        for key in ("grid", "size")
    )
