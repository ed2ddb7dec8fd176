"""The store `fourm/tokens`: token folders as 4M's `save_vq_tokens.py` writes them and its training reads them.

    SPLIT/TASK/CLASS/ID.jpg                 the pictures
    SPLIT/TASK_SUFFIX/CLASS/ID.npy          int16 (crops, tokens): the grid row by row
    SPLIT/crop_settings/CLASS/ID.npy        int64 (crops, 5): top, left, height, width, flip, in pixels of the pictures

The store is the folder `TASK_SUFFIX`. The first crop is the centre. The settings of a file are written by whichever
modality comes first, and all others have the same crops. They do not say how large the pictures are, so views are known
only where pictures are: in the folder of the task beside, or in that of the setting `pictures`.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vqcore.config import Config as Base
from vqcore.data.npy import read_array
from vqcore.errors import DataError, cause
from vqcore.files import aside, local
from vqcore.protocols import Coded, View
from vqcore.tokens.folder import FileRows

log = logging.getLogger(__name__)

SETTINGS = "crop_settings"
SUFFIX = ".npy"
MOST = np.iinfo(np.int16).max + 1
"""The largest codebook whose codes are 16-bit integers with a sign."""
_PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
_MAGIC, _LENGTH = np.lib.format.magic(1, 0), 10
"""How an array of `np.save` begins, and how long that is with the length of its header."""
_EXACT = 1e-3
"""A crop may lie so far from whole pixels, by rounding."""


class Tokens:
    """4M's token folders, with their crop settings beside."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Base):
        """How views are told from crop settings, when a folder is read."""

        pictures: str | None = None
        """Folder with the pictures, `CLASS/ID.jpg` (default: `TASK` beside `TASK_SUFFIX`)."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def write(
        self, folder: Path, shard: str, rows: Sequence[Coded], manifest: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """A file for each file that the rows come from, and its crop settings if it has none.

        Raises `DataError` for what 4M has no place for, and for crops other than those of the settings.
        """
        _check_codebook(manifest)
        if holes := [row.key for row in rows if "valid" in row.extras]:
            log.warning(f"warning: 4M's layout does not keep which positions of '{holes[0]}' are valid.")
        written = []
        for key, group in groupby(rows, lambda row: row.extras.get("record", row.key)):
            crops = list(group)
            _check_key(key)
            wanted = np.array([_pixels(row) for row in crops], np.int64)
            if [row.extras.get("crop") for row in crops] != list(range(len(crops))):
                raise DataError(f"'{key}': 4M keeps all crops of a file in their order, the centre first.")
            path = _settings_file(folder, key)
            there = _settings(path)
            if there is None:
                _save(path, wanted)
            elif not np.array_equal(there, wanted):
                raise DataError(
                    f"{path} has other crops, {there.tolist()} and not {wanted.tolist()}. All modalities of 4M have "
                    "the same crops; tokenizing straight into this layout takes those that are there."
                )
            tokens = np.stack([row.codes for row in crops]).reshape(len(crops), -1)
            _save(folder / f"{key}{SUFFIX}", tokens.astype(np.int16))
            written.append(f"{key}{SUFFIX}")
        return tuple(written)

    def open(self, folder: Path, manifest: Mapping[str, Any]) -> "TokenRows":
        """The crops of all files, in the order of their keys."""
        _check_codebook(manifest)
        return TokenRows(folder, manifest, _Pictures(folder, self.cfg.pictures))

    def held(self, folder: Path, key: str, manifest: Mapping[str, Any]) -> list[Coded] | None:
        """The crops of a file. Raises `DataError` for tokens of another tokenizer or size, as far as that shows."""
        path = folder / f"{key}{SUFFIX}"
        return _crops(path, key, manifest) if path.is_file() and not _half(path) else None

    def views(self, folder: Path, key: str, extent: tuple[int, ...]) -> list[View] | None:
        """The crops in the settings of a file, for a picture of this extent."""
        _check_key(key)
        settings = _settings(_settings_file(folder, key))
        return None if settings is None else [_view(each, extent) for each in settings.tolist()]


class TokenRows(FileRows):
    """A row is a crop: `CLASS/ID#crop0` and so on."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], pictures: "_Pictures"):
        self._folder, self._pictures = folder, pictures
        super().__init__(folder, (SUFFIX,), lambda path, key: _crops(path, key, manifest), manifest["dtype"])

    def extras(self, place: int) -> dict[str, Any]:
        """The file, the number of the crop, and its view; its settings instead where no picture is."""
        found = dict(super().extras(place))
        key, crop = found["record"], found["crop"]
        settings = _settings(_settings_file(self._folder, key))
        if settings is None:
            return found
        if crop >= len(settings):
            raise DataError(
                f"{_settings_file(self._folder, key)} has {len(settings)} crops, and the tokens of '{key}' have more."
            )
        extent = self._pictures.extent(key)
        if extent is None:
            return {**found, SETTINGS: settings[crop].tolist()}
        view = _view(settings[crop].tolist(), extent)
        said = {"start": list(view.start), "stop": list(view.stop), "flip": view.flip, "extent": list(extent)}
        return {**found, "view": said}


def _crops(path: Path, key: str, manifest: Mapping[str, Any]) -> list[Coded]:
    tokens, grid, top = read_array(path, str(path)), manifest["grid"], manifest["codebook_size"]
    count = int(np.prod(grid))
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or tokens.shape[1] != count:
        raise DataError(
            f"{path}: tokens of 4M are integers (crops, {count}) for a grid of {' x '.join(map(str, grid))}, not "
            f"{tokens.dtype} {list(tokens.shape)}. Pictures of another size: --size."
        )
    outside = tokens[(tokens < 0) | (tokens >= top)]
    if outside.size:
        wrapped = " (4M's script wraps codes above 32,767)" if outside[0] < 0 else ""
        raise DataError(f"{path}: code {outside[0]} is out of range: codes lie in [0, {top}){wrapped}.")
    return [
        Coded(f"{key}#crop{crop}", row.reshape(*grid, 1), {"record": key, "crop": crop})
        for crop, row in enumerate(tokens)
    ]


def _half(path: Path) -> bool:
    """Whether a killed program left a file half written: it begins as an array, and ends before the array does."""
    with path.open("rb") as file:
        begin = file.read(_LENGTH)
        length = int.from_bytes(begin[len(_MAGIC) :], "little")
        if len(begin) < _LENGTH or len(file.read(length)) < length:
            return _MAGIC.startswith(begin[: len(_MAGIC)])
        file.seek(len(_MAGIC))
        try:
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError:
            return False
        return path.stat().st_size < file.tell() + dtype.itemsize * math.prod(shape)


class _Pictures:
    """The sizes of pictures by key."""

    def __init__(self, folder: Path, named: str | None):
        self.folder = _beside(folder) if named is None else local(named)
        if self.folder is not None and not self.folder.is_dir():
            raise DataError(f"pictures: {named}: there is no such folder.")

    def extent(self, key: str) -> tuple[int, int] | None:
        """Height and width; None where there is no picture."""
        if self.folder is None:
            return None
        for suffix in _PICTURES:
            path = self.folder / f"{key}{suffix}"
            if path.is_file():
                try:
                    with Image.open(path) as picture:
                        return picture.height, picture.width
                except (OSError, UnidentifiedImageError) as error:
                    raise DataError(f"{path}: cannot be read: {cause(error)}.") from error
        return None


def _beside(folder: Path) -> Path | None:
    """The folder of the task: the longest name of a folder beside with which the name of the token folder begins."""
    name, around = folder.absolute().name, folder.absolute().parent
    tasks = [each for each in around.iterdir() if name.startswith(f"{each.name}_") and each.is_dir()]
    return max(tasks, key=lambda each: len(each.name), default=None)


def _check_codebook(manifest: Mapping[str, Any]) -> None:
    size, books = manifest["codebook_size"], manifest["num_codebooks"]
    if books != 1:
        raise DataError(
            f"4M's token folders hold one codebook, and these codes have {books}. Take --store arrow or tar."
        )
    if size > MOST:
        raise DataError(
            f"4M's token folders hold 16-bit integers, up to {MOST - 1:,}, and this codebook has {size:,} codes. Take "
            f"--store arrow or tar, or a tokenizer with at most {MOST:,} codes."
        )


def _check_key(key: str) -> None:
    """Raise `DataError` for a key that 4M would cut or lose."""
    class_, _, id_ = key.partition("/")
    if not class_ or not id_ or "/" in id_:
        raise DataError(f"'{key}': 4M's files lie at CLASS/ID, one folder deep: TASK/CLASS/ID.jpg.")
    if "." in id_:
        raise DataError(f"'{key}': 4M cuts the name of a file at its first dot. Rename the file.")


def _pixels(row: Coded) -> list[int]:
    """The settings of a crop: top, left, height, width, flip."""
    if SETTINGS in row.extras:
        return list(row.extras[SETTINGS])
    view = row.extras.get("view")
    if view is None:
        raise DataError(
            f"'{row.key}' has no view, and 4M keeps the crop of all tokens. Tokenize with --crops 1 or more."
        )
    extent = view["extent"]
    if len(extent) != 2:
        raise DataError(
            f"'{row.key}': 4M's crops are those of pictures, and this one has {len(extent)} axes."
        )
    start, stop = ([side * n for side, n in zip(view[name], extent)] for name in ("start", "stop"))
    exact = [*start, *(high - low for low, high in zip(start, stop))]
    whole = [round(number) for number in exact]
    if max(abs(one - other) for one, other in zip(exact, whole)) > _EXACT:
        raise DataError(f"'{row.key}': its crop does not begin and end at whole pixels, as 4M's crops do.")
    return [*whole, int(view["flip"])]


def _view(settings: Sequence[int], extent: tuple[int, ...]) -> View:
    top, left, height, width, flip = settings
    (rows, columns) = extent
    return View(
        start=(top / rows, left / columns),
        stop=((top + height) / rows, (left + width) / columns),
        size=(),
        flip=bool(flip),
        extent=tuple(extent),
    )


def _settings_file(folder: Path, key: str) -> Path:
    return folder.absolute().parent / SETTINGS / f"{key}{SUFFIX}"


def _settings(path: Path) -> np.ndarray | None:
    """The crop settings of a file, `(crops, 5)`; None if there are none."""
    if not path.exists():
        return None
    found = read_array(path, str(path))
    if found.dtype.kind not in "iu" or found.ndim != 2 or found.shape[1] != 5 or not len(found):
        raise DataError(
            f"{path}: crop settings are integers (crops, 5), not {found.dtype} {list(found.shape)}."
        )
    return found


def _save(path: Path, array: np.ndarray) -> None:
    with aside(path) as temporary:
        np.save(temporary, array)
