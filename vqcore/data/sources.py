"""Where samples come from: a folder of files, or an array file that holds one sample after the other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vqcore.data.listing import Listing, nearest_sibling
from vqcore.data.npy import map_array, read_member
from vqcore.errors import DataError, did_you_mean, listed
from vqcore.protocols import Modality
from vqcore.schema import DataConfig

Split = Literal["train", "eval"]


class Folder:
    """A folder of files at any depth, one sample each; what rides along lies elsewhere under the same names.

    A sample whose partner is missing counts as unreadable; when more than `max_bad_share` of them lack one,
    building fails at once.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of a folder."""

        path: str
        """Folder of the training samples."""
        eval_path: str | None = None
        """Folder of the samples for evaluation."""
        extra_path: dict[str, str] = field(default_factory=dict)
        """Folder by label of data.extra; files belong together by their path without suffix."""
        eval_extra_path: dict[str, str] = field(default_factory=dict)
        """The same beside eval_path."""

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_labels("extra_path", self.extra_path, self.extra)
            if self.eval_path is not None or self.eval_extra_path:
                _check_labels("eval_extra_path", self.eval_extra_path, self.extra)

    def __init__(self, cfg: Config, *, split: Split, modality: Modality, extra: Mapping[str, Modality]):
        path, setting = _path_of(cfg.path, cfg.eval_path, split)
        extra_path = cfg.extra_path if split == "train" else cfg.eval_extra_path
        prefix = "data.extra_path" if split == "train" else "data.eval_extra_path"
        self._files = Listing(path, modality.suffixes, setting)
        self._extra = {
            label: Listing(_expanded(extra_path[label]), rides.suffixes, f"{prefix}.{label}")
            for label, rides in extra.items()
        }
        for label, files in self._extra.items():
            lonely = self._files.without_partner(files)
            if len(lonely) > cfg.max_bad_share * len(self):
                count = f"{len(lonely)} of {len(self)} samples have no partner for '{label}'"
                raise DataError(f"{files.setting}: {count}. The first: {self._missing(lonely[0], label)}")

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        """Path below the folder, without suffix."""
        return self._files.key(index)

    def get(self, index: int, label: str = "") -> Path:
        """The file of a sample. Raises `DataError`, with both names, when a partner is missing."""
        if not label:
            return self._files.path(index)
        partner = self._extra[label].find(self._files.key(index))
        if partner is None:
            raise DataError(self._missing(index, label))
        return self._extra[label].path(partner)

    def _missing(self, index: int, label: str) -> str:
        files = self._extra[label]
        wanted = f"{files.root / self._files.key(index)}{'|'.join(files.suffixes)}"
        return f"{self._files.path(index)}: has no partner for '{label}'; there is no {wanted}"


class ArrayFile:
    """Samples along the first axis of an array: a `.npy` file (mapped) or a `.npz` file (read at once)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of an array file."""

        path: str
        """File of the training samples, .npy or .npz."""
        eval_path: str | None = None
        """File of the samples for evaluation."""
        key: str | None = None
        """Name of the array in a .npz file; by default the only one."""
        extra_key: dict[str, str] = field(default_factory=dict)
        """Name of the array in a .npz file by label of data.extra."""

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_labels("extra_key", self.extra_key, self.extra)

    def __init__(self, cfg: Config, *, split: Split, modality: Modality, extra: Mapping[str, Modality]):
        path, self._setting = _path_of(cfg.path, cfg.eval_path, split)
        self._path = Path(path)
        self._names: dict[str, str | None] = {"": cfg.key} | {label: cfg.extra_key[label] for label in extra}
        self._arrays: dict[str, np.ndarray] = {}
        self._length = len(self._array(""))
        for label, name in self._names.items():
            if len(self._array(label)) != self._length:
                raise DataError(
                    f"{self._setting}: {path}: '{name}' holds {len(self._array(label))} samples where "
                    f"the main array holds {self._length}"
                )

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole file to a worker that is not forked.
        return {**vars(self), "_arrays": {}}

    def key(self, index: int) -> str:
        """The sample's number, padded with zeros."""
        return f"{index:0{len(str(self._length - 1))}d}"

    def get(self, index: int, label: str = "") -> np.ndarray:
        """The array of a sample."""
        return np.asarray(self._array(label)[index])

    def _array(self, label: str) -> np.ndarray:
        if label not in self._arrays:
            where = f"{self._setting}: {self._path}"
            array = _open(self._path, self._names[label], where)
            if not array.ndim or not len(array):
                raise DataError(
                    f"{where}: holds no samples (shape {array.shape}); they lie along the first axis"
                )
            self._arrays[label] = array
        return self._arrays[label]


def _path_of(path: str, eval_path: str | None, split: Split) -> tuple[str, str]:
    """The split's path, `~` expanded (a shell leaves it alone behind `=`), and the setting it comes from."""
    if split == "train":
        return _expanded(path), "data.path"
    if eval_path is None:
        raise DataError(
            "data.eval_path: there is nothing to evaluate on; set it, e.g. data.eval_path=data/heldout"
        )
    return _expanded(eval_path), "data.eval_path"


def _expanded(path: str) -> str:
    return str(Path(path).expanduser())


def _check_labels(setting: str, given: Mapping[str, str], extra: Mapping[str, Any]) -> None:
    for label in given:
        if label not in extra:
            hint = did_you_mean(label, extra) or f" Labels: {listed(extra) or 'none'}."
            raise ValueError(f"{setting}.{label}: there is no data.extra.{label}.{hint}")
    for label in extra:
        if label not in given:
            raise ValueError(f"data.extra.{label} comes from nowhere: set data.{setting}.{label}")


def _open(path: Path, name: str | None, where: str) -> np.ndarray:
    if path.is_dir():
        raise DataError(f"{where}: is a folder, not a file; data.name=folder reads folders")
    if not path.is_file():
        raise DataError(f"{where}: there is no such file.{nearest_sibling(path)}")
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".npz"):
        raise DataError(f"{where}: ends in '{suffix}'; an array file is .npy or .npz")
    if suffix == ".npz":
        return read_member(path, name, where)
    if name is not None:
        raise DataError(f"{where}: a .npy file holds one array without a name; '{name}' needs a .npz file")
    return map_array(path, where)
