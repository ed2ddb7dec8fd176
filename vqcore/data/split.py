"""Holds out a share of a data source's samples for evaluation. Which ones follows from their keys alone."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from vqcore.data.windows import files_of
from vqcore.errors import DataError, listed
from vqcore.protocols import Blocks, Coded, Data, blocks, expect, knows_codes, left_out
from vqcore.schema import DataConfig

Split = Literal["train", "eval"]


class Side:
    """One side of a divided data source: its samples for training, or those held out."""

    def __init__(self, data: Data, places: np.ndarray):
        self.data, self.places = data, places
        self.blocks = _part(blocks(data), places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def left_out(self) -> Mapping[str, int]:
        """What the whole source leaves out."""
        return left_out(self.data)

    @property
    def bytes_of(self) -> Callable[..., int | None]:
        """What the whole source says; not there if it would have to fetch a sample."""
        knows = self.data.bytes_of  # type: ignore[attr-defined]
        return lambda index, label="": knows(int(self.places[index]), label)

    def key(self, index: int) -> str:
        """The key of a sample in the whole source."""
        return self.data.key(int(self.places[index]))

    @property
    def made(self) -> Mapping[str, Any] | None:
        """The manifest of the codes that the whole source has."""
        coded = knows_codes(self.data)
        return coded.made if coded else None

    def coded(self, index: int) -> Coded | None:
        """The codes that the whole source has of a sample."""
        coded = knows_codes(self.data)
        return coded.coded(int(self.places[index])) if coded else None

    def expect(self, indices: Iterable[int], *, alone: bool = False) -> None:
        """Pass on to the whole source which samples will be asked for."""
        expect(self.data, (int(self.places[index]) for index in indices), alone=alone)

    def get(self, index: int, label: str = "") -> Any:
        """What the whole source gives."""
        return self.data.get(int(self.places[index]), label)


def _part(whole: Blocks | None, places: np.ndarray) -> Blocks | None:
    """The blocks of some samples of a source. Those without any of them are left out."""
    if whole is None:
        return None
    ends = np.cumsum(whole.sizes)
    sizes = np.diff(np.searchsorted(places, ends), prepend=0)
    # What is held at a time are whole blocks, also of samples on the other side.
    together = max(1, whole.together * len(places) // int(ends[-1]))
    return Blocks(sizes[sizes > 0], together)


def side(data: Data, cfg: DataConfig, split: Split) -> Data:
    """The samples of a split, divided as `eval_share` and `group` say; the whole source without `eval_share`.

    Raises `DataError` if a side is empty or a key has no group.
    """
    if cfg.eval_share is None:
        return data
    keys = [data.key(index) for index in range(len(data))]
    if not cfg.group:
        files = files_of(data)
        keys = [files.get(key, key) for key in keys]
    held = np.array(held_out(keys, cfg.eval_share, cfg.group))
    places = np.flatnonzero(held if split == "eval" else ~held)
    if not len(places):
        kinds = "groups" if cfg.group else "samples"
        names = list(dict.fromkeys(_group(key, re.compile(cfg.group)) if cfg.group else key for key in keys))
        raise DataError(
            f"data.eval_share={cfg.eval_share:g}: none of {len(names)} {kinds} ({listed(names, 4)}) is on the "
            f"{'held-out' if split == 'eval' else 'training'} side. Take another share, or give data.eval_path"
        )
    return Side(data, places)


def held_out(keys: Iterable[str], share: float, group: str | None) -> list[bool]:
    """Whether each key is on the held-out side. Raises `DataError` for a key without group."""
    pattern = re.compile(group) if group is not None else None
    return [_draw(_group(key, pattern)) < share for key in keys]


def _group(key: str, pattern: re.Pattern[str] | None) -> str:
    """What stays on one side with all that has the same group."""
    found = pattern.search(key) if pattern else None
    if pattern is not None and (found is None or found[1] is None):
        raise DataError(
            f"data.group={pattern.pattern}: the key '{key}' does not match. Write one that matches all keys"
        )
    name = found[1] if found else key
    # Numbers get more zeros in front when a file of arrays grows.
    return name.lstrip("0") or "0" if name.isdigit() else name


def _draw(group: str) -> float:
    """A number in [0, 1) that follows from a text alone."""
    digest = hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
