"""The data source `fourm/folder`: 4M's tree of files, `root/<task>/<class>/<name>.<suffix>`, aligned by name."""

import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from vqcore.errors import DataError, SettingError, did_you_mean, listed
from vqcore.files import local
from vqcore.protocols import Modality, left_out
from vqcore.registry import registry
from vqcore.schema import DataConfig

SHOWN = 3
"""So many files without a partner are named; of the others the number."""


class Folder:
    """Folders of files beside each other below one root, one for each task. Files belong together by class and name.

    Differs from 4M, which takes the files of all tasks in sorted order and goes by position: there one missing file
    shifts all pairs behind it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of 4M's tree of files."""

        locations: ClassVar[tuple[str, ...]] = ("path",)

        path: str
        """Root of the training samples: below it a folder for each task, e.g. data/train with data/train/rgb."""
        eval_path: str | None = None
        """Root of the held-out samples."""
        task: str
        """Folder of data.modality below the root, e.g. rgb, depth, semseg_coco."""
        extra_task: dict[str, str] = field(default_factory=dict)
        """Folder of each extra modality below the root, by label of data.extra. By default the label."""
        unpaired: Literal["refuse", "leave-out"] = "refuse"
        """What becomes of samples that are not in the folders of all tasks."""

        def __post_init__(self) -> None:
            super().__post_init__()
            named = {f"extra_task.{label}": name for label, name in self.extra_task.items()}
            for label in self.extra_task:
                if label not in self.extra:
                    hint = did_you_mean(label, self.extra) or f" Labels: {listed(self.extra) or 'none'}."
                    raise SettingError(
                        ("extra_task",), f"extra_task.{label}: data.extra.{label} does not exist.{hint}"
                    )
            for setting, name in {"task": self.task, **named}.items():
                if not name or Path(name).is_absolute() or ".." in Path(name).parts:
                    raise SettingError(
                        (setting.partition(".")[0],),
                        f"{setting}: '{name}' is no folder below data.path; give a name such as rgb",
                    )

    def __init__(self, cfg: Config, *, split: str, modality: Modality, extra: Mapping[str, Modality]):
        self._setting = "data.path" if split == "train" else "data.eval_path"
        folders = {"": cfg.task} | {label: cfg.extra_task.get(label, label) for label in extra}
        self._modalities = {"": cfg.modality, **cfg.extra}
        self._parts = {
            label: self._opened(cfg, split, folder, label, modality if not label else extra[label])
            for label, folder in folders.items()
        }
        self._folders = folders
        self._rows: dict[str, array] | None = None
        self._unpaired = 0
        if len(self._parts) > 1:
            self._align(cfg)

    def __len__(self) -> int:
        return len(self._parts[""]) if self._rows is None else len(self._rows[""])

    @property
    def left_out(self) -> dict[str, int]:
        """How many files are no samples, by kind, and how many samples are not in all folders."""
        found = dict(left_out(self._parts[""]))
        return found | ({"not in the folders of all tasks": self._unpaired} if self._unpaired else {})

    def key(self, index: int) -> str:
        """Class and name of a sample: the path below the folder of its task, without suffix."""
        return self._parts[""].key(self._row("", index))

    def get(self, index: int, label: str = "") -> Path:
        """The file of a sample, or of its extra modality `label`."""
        return self._parts[label].get(self._row(label, index))

    def _row(self, label: str, index: int) -> int:
        return index if self._rows is None else self._rows[label][index]

    def _opened(self, cfg: Config, split: str, folder: str, label: str, modality: Modality) -> Any:
        """The files of one task, as the core's source of a folder finds them."""
        root = cfg.path if split == "train" else cfg.eval_path
        if root is not None and "://" not in root and (at := local(root)).is_dir():
            self._check_task(at, folder, label)
        kind: Any = registry().load("data", "folder")
        below = {
            name: None if place is None else f"{place.rstrip('/')}/{folder}"
            for name, place in (("path", cfg.path), ("eval_path", cfg.eval_path))
        }
        held = kind.Config(name="folder", modality=self._modalities[label], **below)
        made = kind(held, split=split, modality=modality, extra={})
        _refuse_objects(made.get(0))
        return made

    def _check_task(self, root: Path, folder: str, label: str) -> None:
        if (root / folder).is_dir():
            return
        found = sorted(
            each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith(".")
        )
        setting = f"data.extra_task.{label}" if label else "data.task"
        if root.name == folder:
            hint = f" Give the root above it: {self._setting}={root.parent}"
        else:
            hint = did_you_mean(folder, found) or f" It has: {listed(found) or 'no folder'}."
        raise DataError(f"{self._setting}: {root} has no folder '{folder}' ({setting}).{hint}")

    def _align(self, cfg: Config) -> None:
        """Compare the names in all folders. Raises `DataError` that says which have no partner, and how many."""
        rows, lonely = _merged(self._parts)
        if not lonely.count:
            return
        shared = len(rows[""])
        if cfg.unpaired == "leave-out" and shared:
            self._rows, self._unpaired = rows, lonely.count
            return
        said = [
            f"{self._folders[label]} lacks {count:,} ({listed(lonely.first[label], SHOWN)}{', ...' * (count > SHOWN)})"
            for label, count in lonely.missing.items()
            if count
        ]
        hint = "With data.unpaired=leave-out the others are used" if shared else "No name is in all folders"
        raise DataError(
            f"{self._setting}: the files do not belong together by class and name: {'; '.join(said)}. {hint}"
        )


def _refuse_objects(path: Path) -> None:
    """Raise `DataError` for a file of pickled objects, and say how such files are read; other damage is said later."""
    if path.suffix.lower() != ".npy":
        return
    try:
        with path.open("rb") as file:
            read = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}[read_magic(file)]
            has_objects = read(file)[2].hasobject
    except Exception:  # NumPy raises anything for a damaged header
        return
    if has_objects:
        raise DataError(
            f"{path}: holds pickled objects, which a run does not read. Instances of SAM are converted once: "
            "python -m vqcore_fourm.instances SAM RGB NEW_FOLDER --allow-pickle"
        )


@dataclass
class _Lonely:
    """How many names are not in all folders; of each folder how many it lacks, and the first of these."""

    missing: dict[str, int]
    first: dict[str, list[str]]
    count: int = 0

    def add(self, key: str, having: set[str]) -> None:
        """Note a name, and the labels of the folders that have it."""
        self.count += 1
        for label in self.missing.keys() - having:
            self.missing[label] += 1
            if len(self.first[label]) < SHOWN:
                self.first[label].append(key)


def _merged(parts: Mapping[str, Any]) -> tuple[dict[str, array], _Lonely]:
    """The rows of the names that all folders have, and what is known of the other names."""
    rows = {label: array("q") for label in parts}
    lonely = _Lonely(dict.fromkeys(parts, 0), {label: [] for label in parts})
    walks = {label: _names(part) for label, part in parts.items()}
    heads = {label: next(walk, None) for label, walk in walks.items()}
    while left := [head[0] for head in heads.values() if head is not None]:
        key = min(left)
        having = {label: head[1] for label, head in heads.items() if head is not None and head[0] == key}
        if len(having) == len(parts):
            for label, row in having.items():
                rows[label].append(row)
        else:
            lonely.add(os.fsdecode(key), set(having))
        heads |= {label: next(walks[label], None) for label in having}
    return rows, lonely


def _names(part: Any) -> Iterator[tuple[bytes, int]]:
    """The keys of a folder in sorted order, with their places."""
    return ((os.fsencode(part.key(place)), place) for place in range(len(part)))
