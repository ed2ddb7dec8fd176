"""Samples longer than a window: windows that cover them, what is missing at their ends, and the whole from its parts.

A part that is shorter than the wanted size is filled up at its end, and the filling is masked.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from vqcore.errors import DataError
from vqcore.protocols import Data, Modality, Sizing, Window, extent_of, fill, left_out, sizing

Stride = Sequence[int | None]
"""Positions from one window to the next along each axis; None where all of the axis is taken."""


def within(modality: Modality, extent: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """The size to ask a modality for: along axes that are filled up, no more than there is."""
    how = sizing(modality)
    if len(how) != len(extent):
        return size
    return tuple(min(n, side) if each in ("window", "pad") else side for n, side, each in zip(extent, size, how))


def filled(modality: Modality, x: Any, have: tuple[int, ...], size: tuple[int, ...]) -> Any:
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


def marked(valid: Tensor | None, have: tuple[int, ...], size: tuple[int, ...]) -> Bool[Tensor, "*size"]:
    """The mask of a sample that is filled up; None stands for a sample whose positions are all valid."""
    whole = torch.zeros(size, dtype=torch.bool)
    whole[tuple(slice(side) for side in have)] = True if valid is None else valid
    return whole


def counts(extent: Sequence[int], size: Sequence[int], stride: Stride) -> tuple[int, ...]:
    """How many windows cover a sample along each axis."""
    axes = zip(extent, size, stride)
    return tuple(1 + -(-max(0, n - side) // step) if step else 1 for n, side, step in axes)


def start_of(place: int, many: tuple[int, ...], stride: Stride) -> tuple[int, ...]:
    """Where a window begins, from its place in the order of axes."""
    return tuple(int(at) * (step or 0) for at, step in zip(np.unravel_index(place, many), stride))


def windows_along(modality: Modality, size: tuple[int, ...]) -> tuple[int | None, ...]:
    """The stride of windows without overlap along each axis; None where a modality has no windows."""
    how = sizing(modality)
    return tuple(side if each == "window" else None for side, each in zip(size, how))


def window_at(
    start: tuple[int, ...], extent: tuple[int, ...], size: tuple[int, ...], stride: Stride
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and stop of a window inside a sample; along axes without windows, all of it."""
    ends = (min(low + side, n) if step else n for low, side, n, step in zip(start, size, extent, stride))
    return start, tuple(ends)


def whole(
    parts: Sequence[Tensor], start: Sequence[Sequence[int]], extent: tuple[int, ...]
) -> Tensor:
    """One tensor `(c, *extent)` from its windows `(c, *size)`: where windows overlap, their mean."""
    rank = len(extent)
    size = parts[0].shape[-rank:]
    reach = [max(n, *(int(low[axis]) + size[axis] for low in start)) for axis, n in enumerate(extent)]
    total = parts[0].new_zeros(*parts[0].shape[:-rank], *reach)
    count = parts[0].new_zeros(reach)
    for part, low in zip(parts, start, strict=True):
        here = tuple(slice(int(a), int(a) + side) for a, side in zip(low, size))
        total[(..., *here)] += part
        count[here] += 1
    inside = (..., *(slice(n) for n in extent))
    return total[inside] / count[inside]


class Windowed:
    """The windows of the samples of another source, one after the other. The key of a window is `record#start`.

    Extra modalities are not cut: they get the same fraction of their own record. A sample whose extent cannot be found
    is one window, which cannot be read.
    """

    def __init__(self, records: Data, how: tuple[Sizing, ...], extents: np.ndarray, size: tuple[int, ...]):
        self.records, self.how, self.extents, self.size = records, how, extents, size
        self.stride = tuple(side if each == "window" else None for side, each in zip(size, how))
        many = np.ones(len(extents), dtype=np.int64)
        for axis, step in enumerate(self.stride):
            if step:
                many *= np.maximum(1, -(-extents[:, axis] // step))
        self.ends = np.cumsum(many)

    def at(self, size: tuple[int, ...]) -> "Windowed":
        """The windows of another size."""
        return self if size == self.size else Windowed(self.records, self.how, self.extents, size)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def left_out(self) -> Mapping[str, int]:
        """What the source leaves out."""
        return left_out(self.records)

    def key(self, index: int) -> str:
        """The key of the record, and where the window begins."""
        record, start = self._place(index)
        return f"{self.records.key(record)}#{named(start)}"

    def get(self, index: int, label: str = "") -> Any:
        """The window, or the whole source of an extra modality."""
        record, start = self._place(index)
        given = self.records.get(record, label)
        extent = tuple(self.extents[record].tolist())
        if label or not all(extent):
            return given
        low, high = window_at(start, extent, self.size, self.stride)
        if isinstance(given, Window):
            low, high = (tuple(a + b for a, b in zip(each, given.start)) for each in (low, high))
            given = given.source
        return Window(given, low, high)

    def _place(self, index: int) -> tuple[int, tuple[int, ...]]:
        record = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[record - 1]) if record else 0
        many = counts(self.extents[record].tolist(), self.size, self.stride)
        return record, start_of(index - first, many, self.stride)


def windowed(data: Data, modality: Modality, size: tuple[int, ...]) -> Data:
    """The windows of a data source for this size; the source itself if the modality has no windows."""
    if not any(windows_along(modality, size)):
        return data
    extents = np.zeros((len(data), len(size)), dtype=np.int64)
    for index in range(len(data)):
        with contextlib.suppress(DataError, OSError):  # whoever reads it says what is wrong
            given = data.get(index)
            is_part = isinstance(given, Window)
            extents[index] = np.subtract(given.stop, given.start) if is_part else extent_of(modality, given)
    return Windowed(data, sizing(modality), extents, size)


def at_size(data: Data, size: tuple[int, ...]) -> Data:
    """The samples of an evaluation at another size: the same, or other windows of the same records."""
    return data.at(size) if isinstance(data, Windowed) else data


def named(start: Sequence[int]) -> str:
    """The place of a window in a key: `1024`, or `0x256` for two axes."""
    return "x".join(str(int(each)) for each in start)
