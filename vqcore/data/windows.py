"""Samples longer than a window: windows that cover them, what is missing at their ends, and the whole from its parts.

A part that is shorter than the wanted size is filled up at its end, and the filling is masked.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vqcore.errors import ConfigError, DataError
from vqcore.protocols import (
    Data,
    Modality,
    Sizing,
    Window,
    expect,
    extent_of,
    fill,
    finishes,
    has_own_box,
    knows_codes,
    left_out,
    sizing,
)

Extent = tuple[int, ...]


@dataclass(frozen=True)
class Cover:
    """How windows of `size` cover a sample: `stride` positions from one to the next, None where an axis stays whole."""

    size: Extent
    stride: tuple[int | None, ...]

    def counts(self, extent: Sequence[int]) -> Extent:
        """How many windows lie along each axis. The last one may reach beyond the end."""
        axes = zip(extent, self.size, self.stride)
        return tuple(1 + -(-max(0, n - side) // step) if step else 1 for n, side, step in axes)

    def part(self, place: int, extent: Sequence[int]) -> tuple[Extent, Extent]:
        """Start and stop of a window inside a sample, from its place in the order of the axes."""
        where = np.unravel_index(place, self.counts(extent))
        start = tuple(int(at) * (step or 0) for at, step in zip(where, self.stride))
        return start, self.stop(start, extent)

    def stop(self, start: Sequence[int], extent: Sequence[int]) -> Extent:
        """Where a window that begins at `start` ends."""
        axes = zip(start, self.size, extent, self.stride)
        return tuple(min(low + side, n) if step else n for low, side, n, step in axes)

    def sizing(self, modality: Modality) -> tuple[Sizing, ...]:
        """How a window gets its size, for each axis: along those that are cut it is as it is, filled up."""
        return tuple("window" if step else each for step, each in zip(self.stride, sizing(modality)))

    def starts(self, extent: Sequence[int]) -> Int[np.ndarray, "w r"]:
        """Where each window begins."""
        many = self.counts(extent)
        places = np.stack(np.unravel_index(np.arange(np.prod(many)), many), axis=1)
        return places * np.array([step or 0 for step in self.stride])

    def whole(self, extent: Sequence[int]) -> Extent:
        """The extent of the sample that its windows give: along an axis that stays whole, that of a window."""
        return tuple(n if step else side for n, side, step in zip(extent, self.size, self.stride))


def cover(
    modality: Modality, size: Extent, stride: Sequence[int] | None = None, *, tiles: bool = False
) -> Cover | None:
    """The windows of a modality's samples, without overlap or with a `stride`; None if it does not cut samples.

    `tiles` cuts also what a modality would crop. Raises `ConfigError` for a stride that means nothing, and for
    a modality whose samples cannot be cut.
    """
    how = sizing(modality)
    if tiles and "window" in how:
        raise ConfigError(
            "--tiles is for samples that are cropped; those of this tokenizer are cut into windows without it."
        )
    if tiles and (has_own_box(modality) or finishes(modality)):
        raise ConfigError("--tiles: samples of this tokenizer are not simply a part of a file.")
    if not tiles and "window" not in how:
        if stride is None:
            return None
        raise ConfigError(
            "--stride belongs to windows, and this tokenizer takes one part of each sample. Add --tiles."
        )
    free = [tiles or each == "window" for each in how]
    steps = [side if loose else None for side, loose in zip(size, free)]
    if stride is None:
        return Cover(size, tuple(steps))
    places = [axis for axis, loose in enumerate(free) if loose]
    given = list(stride) * len(places) if len(stride) == 1 else list(stride)
    if len(given) != len(places):
        raise ConfigError(f"--stride has {len(given)} numbers, but samples are cut along {len(places)} axes.")
    for axis, step in zip(places, given):
        if not 1 <= step <= size[axis]:
            raise ConfigError(
                f"--stride {step} must lie between 1 and {size[axis]}, the length of a window: beyond it, something "
                "would be left out."
            )
        steps[axis] = step
    return Cover(size, tuple(steps))


def within(how: Sequence[Sizing], extent: Extent, size: Extent) -> Extent:
    """The size to ask a modality for: along axes that are filled up, no more than there is."""
    if len(how) != len(extent):
        return size
    return tuple(
        min(n, side) if each in ("window", "pad") else side for n, side, each in zip(extent, size, how)
    )


def filled(modality: Modality, x: Any, have: Extent, size: Extent) -> Any:
    """A tensor of a sample of size `have`, filled up to `size` at the end of each axis; what is no tensor, as it is."""
    if have == size or not isinstance(x, Tensor):
        return x
    value = fill(modality)
    for axis, (there, wanted) in enumerate(zip(reversed(have), reversed(size)), start=1):
        # In proportion: before `finish`, a tensor may be larger than its sample.
        missing = round(x.shape[-axis] * wanted / there) - x.shape[-axis]
        if missing:
            last = x.narrow(-axis, x.shape[-axis] - 1, 1)
            last = last if value is None else torch.full_like(last, value)
            x = torch.cat([x, last.repeat_interleave(missing, -axis)], -axis)
    return x


def marked(valid: Tensor | None, have: Extent, size: Extent) -> Bool[Tensor, "*size"]:
    """The mask of a sample that is filled up; None stands for a sample whose positions are all valid."""
    whole = torch.zeros(size, dtype=torch.bool)
    whole[tuple(slice(side) for side in have)] = True if valid is None else valid
    return whole


class Whole:
    """One tensor `(c, *extent)` from its windows `(c, *size)`: where windows overlap, their mean."""

    def __init__(self, extent: Extent):
        self.extent = extent
        self.total: Tensor | None = None
        self.count: Tensor | None = None

    def add(self, part: Tensor, start: Sequence[int]) -> None:
        """Add a window; what reaches beyond the end is left out."""
        rank = len(self.extent)
        if self.total is None or self.count is None:
            self.total = part.new_zeros(*part.shape[:-rank], *self.extent)
            self.count = part.new_zeros(self.extent)
        places = [(int(low), side, n) for low, side, n in zip(start, part.shape[-rank:], self.extent)]
        here: Any = tuple(slice(low, min(low + side, n)) for low, side, n in places)
        there: Any = tuple(slice(min(side, n - low)) for low, side, n in places)
        self.total[(..., *here)] += part[(..., *there)]
        self.count[here] += 1

    @property
    def mean(self) -> Tensor:
        """The whole. All of it must be covered."""
        assert self.total is not None and self.count is not None
        return self.total / self.count


class Windowed:
    """The windows of the samples of another source, one after the other. The key of a window is `record#start`.

    Extra modalities are not cut: they get the same fraction of their own record. A sample whose extent cannot be found
    is one window, which cannot be read.
    """

    def __init__(self, records: Data, extents: Int[np.ndarray, "n r"], cover: Cover):
        self.records, self.extents, self.cover = records, extents, cover
        many = np.ones(len(extents), dtype=np.int64)
        for axis, (side, step) in enumerate(zip(cover.size, cover.stride)):
            if step:
                many *= 1 + np.maximum(0, -(-(extents[:, axis] - side) // step))
        self.ends = np.cumsum(many)

    def at(self, size: Extent) -> "Windowed":
        """The windows of another size."""
        if size == self.cover.size:
            return self
        steps = tuple(side if step else None for side, step in zip(size, self.cover.stride))
        return Windowed(self.records, self.extents, Cover(size, steps))

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def left_out(self) -> Mapping[str, int]:
        """What the source leaves out."""
        return left_out(self.records)

    @property
    def bytes_of(self) -> Callable[..., int | None]:
        """The bytes of the record; not there if the source would have to fetch it."""
        knows = self.records.bytes_of  # type: ignore[attr-defined]
        return lambda index, label="": knows(self._place(index)[0], label)

    def key(self, index: int) -> str:
        """The key of the record, and where the window begins."""
        record, place = self._place(index)
        start, _ = self.cover.part(place, self.extents[record].tolist())
        return f"{self.records.key(record)}#{named(start)}"

    def expect(self, indices: Iterable[int], *, alone: bool = False) -> None:
        """Pass on to the source whose records will be asked for."""
        expect(self.records, (self._place(index)[0] for index in indices), alone=alone)

    def get(self, index: int, label: str = "") -> Any:
        """The window, or the whole source of an extra modality; of a window of its own the same fraction."""
        record, place = self._place(index)
        given = self.records.get(record, label)
        extent = self.extents[record].tolist()
        if not all(extent):
            return given
        start, stop = self.cover.part(place, extent)
        if not label:
            return cut(given, start, stop)
        if not isinstance(given, Window) or len(given.start) != len(extent):
            return given
        own = [high - low for low, high in zip(given.start, given.stop)]
        edges = (tuple(round(at * n / all_) for at, n, all_ in zip(e, own, extent)) for e in (start, stop))
        return cut(given, *edges)

    def _place(self, index: int) -> tuple[int, int]:
        record = int(np.searchsorted(self.ends, index, side="right"))
        return record, index - (int(self.ends[record - 1]) if record else 0)


def cut(given: Any, start: Extent, stop: Extent) -> Window:
    """The window of what a data source gives, which may be a window itself."""
    if not isinstance(given, Window):
        return Window(given, start, stop)
    first = given.start
    low, high = (tuple(a + b for a, b in zip(each, first)) for each in (start, stop))
    return replace(given, start=low, stop=high)


def windowed(data: Data, modality: Modality, size: Extent) -> Data:
    """The windows of a data source for this size; the source itself if it has windows, or the modality has none."""
    covering = cover(modality, size)
    if covering is None or knows_codes(data):
        return data
    extents = np.zeros((len(data), len(size)), dtype=np.int64)
    expect(data, range(len(data)))
    for index in range(len(data)):
        with contextlib.suppress(DataError, OSError):  # whoever reads it says what is wrong
            given = data.get(index)
            is_part = isinstance(given, Window)
            extents[index] = np.subtract(given.stop, given.start) if is_part else extent_of(modality, given)
    return Windowed(data, extents, covering)


def at_size(data: Data, size: Extent) -> Data:
    """The samples of an evaluation at another size: the same, or other windows of the same records."""
    return data.at(size) if isinstance(data, Windowed) else data


def files_of(data: Data) -> dict[str, str]:
    """What the windows, or the crops, of one file have in common: by key, the key of the first of them.

    Empty for other sources.
    """
    found: dict[str, str] = {}
    first: dict[str, str] = {}
    coded = knows_codes(data)
    for index in range(len(data)):
        with contextlib.suppress(DataError, OSError):  # whoever reads it says what is wrong
            if coded and (row := coded.coded(index)):
                found[row.key] = first.setdefault(row.extras.get("record", row.key), row.key)
                continue
            given = data.get(index)
            if not isinstance(given, Window):  # a source gives windows, or none
                break
            key, source = data.key(index), given.source
            file = str(source) if isinstance(source, (str, Path)) else key.rpartition("#")[0] or key
            found[key] = first.setdefault(file, key)
    return found


def named(start: Sequence[int]) -> str:
    """The place of a window in a key: `1024`, or `0x256` for two axes."""
    return "x".join(str(int(each)) for each in start)
