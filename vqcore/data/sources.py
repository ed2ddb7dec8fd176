"""The data sources of the core: a folder of files, tar shards, and an array file with one sample after the other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vqcore.config import at_least
from vqcore.data.lent import Content
from vqcore.data.listing import Listing, nearest_sibling
from vqcore.data.npy import map_array, read_member
from vqcore.data.shards import Shards
from vqcore.data.split import Split
from vqcore.errors import DataError, SettingError, did_you_mean, listed
from vqcore.files import local
from vqcore.protocols import Modality, streams
from vqcore.schema import DataConfig


class _Files:
    """Samples that are files with names. Files of extra modalities belong to them by name without suffix."""

    _files: Listing | Shards
    _extra: Mapping[str, Listing | Shards]

    def _check_partners(self, most: float) -> None:
        for label, files in self._extra.items():
            lonely = self._files.without_partner(files)
            if len(lonely) > most * len(self):
                count = f"{len(lonely)} of {len(self)} samples have no file for '{label}'"
                raise DataError(f"{files.setting}: {count}. The first: {self._missing(lonely[0], label)}")

    def __len__(self) -> int:
        return len(self._files)

    @property
    def left_out(self) -> dict[str, int]:
        """How many files are no samples, by kind."""
        return self._files.left_out

    def key(self, index: int) -> str:
        """The name of a sample without suffix: the path below the folder, or behind the name of its shard."""
        return self._files.key(index)

    def get(self, index: int, label: str = "") -> Path | Content:
        """The file of a sample, or of its extra modality `label`. Raises `DataError` if the extra file is missing."""
        if not label:
            return self._files.source(index)
        partner = self._extra[label].find(self._files.key(index))
        if partner is None:
            raise DataError(self._missing(index, label))
        return self._extra[label].source(partner)

    def bytes_of(self, index: int, label: str = "") -> int | None:
        """The bytes of a file; None if an extra modality has no file for this sample. Raises `OSError`."""
        if not label:
            return self._files.bytes_of(index)
        partner = self._extra[label].find(self._files.key(index))
        return None if partner is None else self._extra[label].bytes_of(partner)

    def _missing(self, index: int, label: str) -> str:
        key = self._files.key(index)
        return f"{self._files.where(index)}: has no file for '{label}': {self._extra[label].wanted(key)} does not exist"


class Folder(_Files):
    """A folder of files at any depth, one file per sample. Files of extra modalities have the same names elsewhere.

    A sample without a file of an extra modality counts as unreadable. If this is a larger share than `max_bad_share`,
    an error is raised at once.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of a folder of files."""

        locations: ClassVar[tuple[str, ...]] = ("path", "extra_path")

        path: str
        """Folder of the training samples."""
        eval_path: str | None = None
        """Folder of the held-out samples."""
        extra_path: dict[str, str] = field(default_factory=dict)
        """Folder of each extra modality, by label of data.extra. Files belong together by path without suffix."""
        eval_extra_path: dict[str, str] = field(default_factory=dict)
        """Folder of each extra modality for the held-out samples, by label of data.extra."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_labels("extra_path", self.extra_path, self.extra)
            if self.eval_path is not None or self.eval_extra_path:
                check_labels("eval_extra_path", self.eval_extra_path, self.extra)

    def __init__(self, cfg: Config, *, split: Split, modality: Modality, extra: Mapping[str, Modality]):
        path, setting = path_of(cfg.path, cfg.eval_path, split)
        extra_path = cfg.extra_path if split == "train" else cfg.eval_extra_path
        prefix = "data.extra_path" if split == "train" else "data.eval_extra_path"
        self._files = self._names(path, modality.suffixes, setting)
        self._extra = {
            label: self._names(_expanded(extra_path[label]), each.suffixes, f"{prefix}.{label}")
            for label, each in extra.items()
        }
        self._check_partners(cfg.max_bad_share)

    def _names(self, path: str, suffixes: Sequence[str], setting: str) -> Listing | Shards:
        return Listing(path, suffixes, setting)


class Tar(_Files):
    """Tar shards, one or more files per sample, with the names of WebDataset: `000123.jpg`, `000123.depth.png`.

    Extra modalities are further fields of the same shards, or shards of the same names elsewhere. The key of a sample
    is `shard/name`. Shards are paths, or addresses that fsspec knows. The headers of a shard are read once and kept in
    the user's cache folder.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of tar shards."""

        locations: ClassVar[tuple[str, ...]] = ("path", "extra_path")

        path: str
        """Shards of the training samples, e.g. shards/rgb-{00000..00099}.tar, also s3:// and https://."""
        eval_path: str | None = None
        """Shards of the held-out samples."""
        suffix: str | None = None
        """What follows the first dot in the names of the files, e.g. jpg. Null: whatever data.modality reads."""
        extra_path: dict[str, str] = field(default_factory=dict)
        """Shards of extra modalities, by label of data.extra. By default the shards of data.path."""
        eval_extra_path: dict[str, str] = field(default_factory=dict)
        """Shards of extra modalities for the held-out samples. By default the shards of data.eval_path."""
        extra_suffix: dict[str, str] = field(default_factory=dict)
        """What follows the first dot in the names of an extra modality, e.g. depth.png, by label of data.extra."""
        memory_mib: int = 256
        """Memory in MiB of each reading process for pieces of shards at addresses. The more, the better samples are
        shuffled; up to 32 more are on their way. Shards on disk need none."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for setting in ("extra_path", "eval_extra_path", "extra_suffix"):
                _check_known(setting, getattr(self, setting), self.extra)
            at_least(self, memory_mib=1)
            for label in self.extra:
                if label not in self.extra_suffix and label not in self.extra_path:
                    raise SettingError(
                        ("extra",),
                        f"extra.{label} lies in the same shards: set data.extra_suffix.{label}, e.g. {label}.png, or "
                        f"data.extra_path.{label}",
                    )

    _files: Shards
    _extra: Mapping[str, Shards]

    def __init__(self, cfg: Config, *, split: Split, modality: Modality, extra: Mapping[str, Modality]):
        train = split == "train"
        path, setting = (cfg.path, "data.path") if train else (_held_out(cfg.eval_path), "data.eval_path")
        paths = cfg.extra_path if train else cfg.eval_extra_path
        prefix = "data.extra_path" if train else "data.eval_extra_path"
        room = (cfg.memory_mib << 20) // (1 + len(extra))
        fields = (cfg.suffix,) if cfg.suffix else ()
        self._files = Shards(path, modality.suffixes, setting, fields, room, streams(modality))
        self.blocks = self._files.blocks
        self._extra = {
            label: Shards(
                paths.get(label, path),
                each.suffixes,
                f"{prefix}.{label}" if label in paths else setting,
                (cfg.extra_suffix[label],) if label in cfg.extra_suffix else (),
                room,
                streams(each),
            )
            for label, each in extra.items()
        }
        self._check_partners(cfg.max_bad_share)

    @property
    def shards(self) -> list[tuple[str, int]]:
        """The name of each shard, and how many samples it has."""
        return self._files.shards

    def expect(self, indices: Iterable[int], *, alone: bool = False) -> None:
        """Samples that will be asked for, in this order."""
        if self.blocks is None:
            return
        wanted = list(indices)
        self._files.expect(wanted, alone=alone)
        for files in self._extra.values():
            partners = (files.find(self._files.key(index)) for index in wanted)
            files.expect((place for place in partners if place is not None), alone=alone)


class ArrayFile:
    """Samples along the first axis of an array: a `.npy` file (mapped) or a `.npz` file (read at the start)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of an array file."""

        locations: ClassVar[tuple[str, ...]] = ("path",)

        path: str
        """File of the training samples: .npy or .npz."""
        eval_path: str | None = None
        """File of the held-out samples."""
        key: str | None = None
        """Name of the array in a .npz file. By default the only array."""
        extra_key: dict[str, str] = field(default_factory=dict)
        """Name of the array of each extra modality in the .npz file, by label of data.extra."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_labels("extra_key", self.extra_key, self.extra)

    def __init__(self, cfg: Config, *, split: Split, modality: Modality, extra: Mapping[str, Modality]):
        path, self._setting = path_of(cfg.path, cfg.eval_path, split)
        self._path = Path(path)
        self._names: dict[str, str | None] = {"": cfg.key} | {label: cfg.extra_key[label] for label in extra}
        self._arrays: dict[str, np.ndarray] = {}
        self._length = len(self._array(""))
        for label, name in self._names.items():
            if len(self._array(label)) != self._length:
                raise DataError(
                    f"{self._setting}: {path}: '{name}' has {len(self._array(label))} samples, but "
                    f"the main array has {self._length}"
                )

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would copy the whole file to a worker that is not forked.
        return {**vars(self), "_arrays": {}}

    def key(self, index: int) -> str:
        """The index of the sample, padded with zeros."""
        return f"{index:0{len(str(self._length - 1))}d}"

    def get(self, index: int, label: str = "") -> np.ndarray:
        """The array of a sample, or of its extra modality `label`."""
        return np.asarray(self._array(label)[index])

    def _array(self, label: str) -> np.ndarray:
        if label not in self._arrays:
            where = f"{self._setting}: {self._path}"
            array = _open(self._path, self._names[label], where)
            if not array.ndim or not len(array):
                raise DataError(
                    f"{where}: contains no samples (shape {array.shape}); the first axis must count the samples"
                )
            self._arrays[label] = array
        return self._arrays[label]


def _held_out(eval_path: str | None) -> str:
    if eval_path is None:
        raise DataError(
            "data.eval_path: no held-out data is given. Set data.eval_share=0.1, or data.eval_path=data/heldout"
        )
    return eval_path


def path_of(path: str, eval_path: str | None, split: Split) -> tuple[str, str]:
    """The path of a split with `~` expanded (a shell does not expand `~` after `=`), and the setting with this path."""
    for setting, given in (("data.path", path), ("data.eval_path", eval_path or "")):
        if "://" in given:
            raise DataError(
                f"{setting}: {given} is an address. Download the files, and give their folder; tar shards are read "
                "where they are (data.name=tar)"
            )
    if split == "train":
        return _expanded(path), "data.path"
    return _expanded(_held_out(eval_path)), "data.eval_path"


def _expanded(path: str) -> str:
    return str(local(path))


def check_labels(setting: str, given: Mapping[str, str], extra: Mapping[str, Any]) -> None:
    """Raise `SettingError` unless `given` and `data.extra` have the same labels."""
    _check_known(setting, given, extra)
    for label in extra:
        if label not in given:
            raise SettingError(("extra",), f"extra.{label} has no source. Set data.{setting}.{label}")


def _check_known(setting: str, given: Mapping[str, str], extra: Mapping[str, Any]) -> None:
    """Raise `SettingError` for a label of `given` that is none of `data.extra`."""
    for label in given:
        if label not in extra:
            hint = did_you_mean(label, extra) or f" Labels: {listed(extra) or 'none'}."
            raise SettingError((setting,), f"{setting}.{label}: data.extra.{label} does not exist.{hint}")


def _open(path: Path, name: str | None, where: str) -> np.ndarray:
    if path.is_dir():
        raise DataError(
            f"{where}: this is a folder, not a file. To read a folder of files, set data.name=folder"
        )
    if not path.is_file():
        raise DataError(f"{where}: there is no such file.{nearest_sibling(path)}")
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".npz"):
        raise DataError(f"{where}: the suffix is '{suffix}', but an array file is .npy or .npz")
    if suffix == ".npz":
        return read_member(path, name, where)
    if name is not None:
        raise DataError(
            f"{where}: a .npy file has one array without a name; the name '{name}' needs a .npz file"
        )
    return map_array(path, where)
