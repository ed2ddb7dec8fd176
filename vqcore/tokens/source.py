"""The data source `tokens`: samples that were tokenized before, each with its codes and as the tokenizer saw it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vqcore.artefacts.codes import check_codes
from vqcore.artefacts.stored import Opened, open_named
from vqcore.data.listing import Listing
from vqcore.data.npy import map_array
from vqcore.data.shards import Shards
from vqcore.data.sizes import sizes
from vqcore.data.sources import Folder
from vqcore.data.split import Split
from vqcore.errors import DataError, VqcoreError, listed
from vqcore.protocols import Coded, Modality, is_mask
from vqcore.reading import REAL, misfit

_ROW = {
    "record?": str,
    "row?": int,
    "start?": [int],
    "extent?": [int],
    "view?": {"start": [REAL], "stop": [REAL], "flip": bool, "extent": [int]},
}
"""What the extras of a row look like."""
_NO_VIEW = "this is a crop without a view, so that nobody knows which part of its file the codes show"


class Tokens(Folder):
    """The rows of a store of codes, each with the file that it was made of: trains a decoder without the encoder.

    Files belong to rows by key. Held-out samples are plain files, or with `eval_share` rows of the store. A row without
    a file counts as unreadable. If this is a larger share than `max_bad_share`, an error is raised at once.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Folder.Config):
        """Settings of a store of codes and the files that it was made of."""

        locations = ("path", "extra_path", "codes")

        codes: str
        """The store that `vqcore tokenize` made of the files in data.path."""
        path: str
        """Folder of the samples that were tokenized, or their tar shards."""

    cfg: Config

    def __init__(self, cfg: Config, *, split: Split, modality: Modality, extra: Mapping[str, Modality]):
        self.cfg = cfg
        self.store: Opened | None = None
        super().__init__(cfg, split=split, modality=modality, extra=extra)
        if split == "train":
            self.store = _opened(cfg)
            if "masks" in self.store.manifest and not any(map(is_mask, extra.values())):
                raise DataError(
                    f"data.codes: {self.store.folder} was tokenized with --masks, and training samples have no mask. "
                    "Add the masks as data.extra"
                )
            _check_size(cfg, modality, self.store)
            self._check_names()

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked opens the store itself: mapped files are not copied to it.
        return {**vars(self), "store": self.store is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, store=_opened(state["cfg"]) if state["store"] else None)

    @property
    def made(self) -> Mapping[str, Any] | None:
        """The manifest of the store; None for held-out files, which have no codes."""
        return self.store.manifest if self.store else None

    def coded(self, index: int) -> Coded | None:
        """The row of a sample, its codes as int64. Raises `DataError` for codes or extras that cannot be used."""
        if self.store is None:
            return None
        row, where = self.store.row(index), f"{self.store.folder}: {self.key(index)}"
        if wrong := misfit(row.extras, _ROW):
            raise DataError(f"{where}: {wrong}")
        if "crop" in row.extras and "view" not in row.extras:
            raise DataError(f"{where}: {_NO_VIEW}")
        return replace(
            row, codes=check_codes(row.codes, where, self.store.shape, (self.store.shape.axes + 1,))
        )

    def __len__(self) -> int:
        return len(self.store.rows) if self.store else super().__len__()

    def key(self, index: int) -> str:
        """The key of a row; of a held-out file its name without suffix."""
        return self.store.rows.key(index) if self.store else super().key(index)

    def get(self, index: int, label: str = "") -> Any:
        """The file that a row was made of, or its array in a file of several samples. Raises `DataError`."""
        if self.store is None:
            return super().get(index, label)
        files, row = (self._extra[label] if label else self._files), self.store.row(index)
        place = files.find(_record(row))
        if place is None:
            raise DataError(
                f"{files.setting}: {files.wanted(_record(row))} does not exist, and there are codes of it"
            )
        path = files.path(place)
        if "row" not in row.extras:
            return path
        samples = map_array(path, str(path))
        if not 0 <= row.extras["row"] < len(samples):
            raise DataError(f"{path}: there is no sample {row.extras['row']}, and there are codes of it")
        return np.asarray(samples[row.extras["row"]])

    def bytes_of(self, index: int, label: str = "") -> int | None:
        """The bytes of the file that a row was made of; None for one that is missing or holds several samples."""
        if self.store is None:
            return super().bytes_of(index, label)
        files, row = (self._extra[label] if label else self._files), self.store.row(index)
        place = None if "row" in row.extras else files.find(_record(row))
        return None if place is None else files.bytes_of(place)

    def _names(self, path: str, suffixes: Sequence[str], setting: str) -> Listing | Shards:
        return Shards(path, suffixes, setting) if path.endswith(".tar") else Listing(path, suffixes, setting)

    def _check_names(self) -> None:
        """Count files without codes. Raises `DataError` if too many rows have no file."""
        assert self.store is not None
        keys = self.store.rows.keys()
        names = pa.array([self._files._key(place) for place in range(len(self._files))], pa.binary())
        files = pc.index_in(keys, value_set=names)
        # A row that is one of several has the key of its file, and one or two places behind it.
        for _ in range(2):
            keys = pc.replace_substring_regex(keys, pattern="#[^#/]*$", replacement="")
            files = pc.coalesce(files, pc.index_in(keys, value_set=names))
        lonely = np.flatnonzero(np.asarray(files.is_null()))
        if len(lonely) > self.cfg.max_bad_share * len(self):
            some = listed(map(self.key, lonely[:3].tolist()), 3)
            raise DataError(
                f"{self._files.setting}: {len(lonely)} of {len(self)} rows of {self.store.folder} have no file here: "
                f"{some}. Give the folder that was tokenized"
            )
        without = len(names) - pc.count_distinct(files, mode="only_valid").as_py()
        if without:
            self._files._left_out["without codes"] += without


def _record(row: Coded) -> str:
    """The key of the file that a row was made of."""
    return str(row.extras.get("record", row.key))


def _opened(cfg: Tokens.Config) -> Opened:
    """The store. Raises `DataError` for what is missing, half done or damaged."""
    try:
        store = open_named(cfg.codes)
    except VqcoreError as error:
        raise error.at("data.codes") from error
    if wrong := misfit(store.manifest, {"stride?": [(int, type(None))]}):
        raise DataError(f"data.codes: {store.folder}: {wrong}")
    if "crop" in store.manifest["extras"] and "view" not in store.manifest["extras"]:
        raise DataError(
            f"data.codes: {store.folder} has crops without views, so that nobody knows which parts of files the codes "
            "show. Where pictures lie that were cropped, vqcore tokens convert can add the views"
        )
    return store


def _check_size(cfg: Tokens.Config, modality: Modality, store: Opened) -> None:
    """Raise `DataError` unless training samples have the size of those that were tokenized."""
    wanted, found = tuple(store.manifest["size"]), sizes(cfg, modality.spec)
    if found != [wanted]:
        asked = listed("x".join(map(str, size)) for size in found)
        same = wanted[0] if len(set(wanted)) == 1 else f"[{','.join(map(str, wanted))}]"
        raise DataError(
            f"data.codes: {store.folder} has codes of samples of {'x'.join(map(str, wanted))}, and training samples "
            f"would be {asked}. Set data.input_size={same}"
        )
