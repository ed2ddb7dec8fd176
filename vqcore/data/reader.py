"""Reads one sample: the main modality and all extra modalities with the same view; masks become part of the sample."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from vqcore.data.cache import Cache
from vqcore.data.lent import Content
from vqcore.data.windows import Cover, cut, filled, marked, within
from vqcore.errors import ConfigError, DataError
from vqcore.protocols import (
    Coded,
    Data,
    DataSpec,
    HasSizing,
    Mask,
    Modality,
    Rides,
    View,
    Window,
    fills_up,
    finishes,
    has_own_box,
    hole_value,
    is_mask,
    knows_codes,
    mask,
    reading,
    ride,
    sizing,
    streams,
    weight,
)

Bad = tuple[str, str]
"""The key of a sample that could not be read, and the reason."""


@dataclass(frozen=True)
class Sample:
    """One sample as tensors, before `finish`. `extent` is the size of the sample before the crop."""

    x: Tensor
    key: str
    extent: tuple[int, ...]
    mask: Tensor | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    codes: Tensor | None = None


@dataclass(frozen=True)
class Opened:
    """What `Modality.read` returned, and the part of it that the sample is: None for all of it."""

    raw: Any
    modality: Modality
    window: Window | None = None

    @property
    def whole(self) -> tuple[int, ...]:
        """The extent of what was read."""
        return self.modality.extent(self.raw)

    @property
    def extent(self) -> tuple[int, ...]:
        """The extent of the sample. Raises `DataError` for a window that does not lie inside."""
        if self.window is None:
            return self.whole
        whole, start, stop = self.whole, self.window.start, self.window.stop
        fits = len(start) == len(stop) == len(whole)
        if not fits or not all(0 <= low < high <= n for low, high, n in zip(start, stop, whole)):
            raise DataError(
                f"the window {list(start)} to {list(stop)} does not lie inside the file, whose extent is {list(whole)}"
            )
        return tuple(high - low for low, high in zip(start, stop))

    def within(self, view: View) -> View:
        """A view of the sample as a view of all that was read."""
        if self.window is None:
            return view
        whole, sides, first = self.whole, self.extent, self.window.start

        def mapped(shares: tuple[float, ...]) -> tuple[float, ...]:
            return tuple((low + share * side) / n for low, share, side, n in zip(first, shares, sides, whole))

        extent = None if view.extent is None else whole
        return replace(view, start=mapped(view.start), stop=mapped(view.stop), extent=extent)


def sized(
    modality: Modality, found: Opened, size: tuple[int, ...], rng: np.random.Generator | None = None
) -> View:
    """The view of a sample. Where the modality fills up, it has no more than there is, and may be below `size`."""
    extent = found.extent
    return modality.view(extent, within(sizing(modality), extent, size), rng)


def opened(modality: Modality, given: Any) -> Opened:
    """What a modality reads of the answer of `Data.get`: a source, or a window of one. What is open stays as it is."""
    if isinstance(given, Opened):
        return given
    window = given if isinstance(given, Window) else None
    source = given if window is None else window.source
    if isinstance(source, Content):  # the source may have been opened for a modality that reads streams
        source = source.for_reader(streams(modality))
    return Opened(modality.read(source), modality, window)


@dataclass(frozen=True)
class Prepared:
    """A sample as an encoder takes it: its evaluation view, the windows that cover it, or the crops of `views`.

    Each part is made when asked for. `masks` lie beside the sample, by label.
    """

    found: Opened
    size: tuple[int, ...]
    cover: Cover | None = None
    views: tuple[View, ...] = ()
    masks: Mapping[str, Opened] = field(default_factory=dict)

    def __len__(self) -> int:
        if self.views:
            return len(self.views)
        return 1 if self.cover is None else math.prod(self.cover.counts(self.found.extent))

    def part(self, place: int) -> tuple[Tensor, Bool[Tensor, "*size"] | None]:
        """A window, filled up to the size, or a crop; and where it is valid: None if everywhere."""
        found, how = self.found, sizing(self.modality)
        if self.views:
            return self._seen(found.within(replace(self.views[place], size=self.size)))
        if self.cover is not None:
            window = cut(found.window or found.raw, *self.cover.part(place, found.extent))
            found, how = replace(found, window=window), self.cover.sizing(self.modality)
        asked = within(how, found.extent, self.size)
        view = found.within(self.modality.view(found.extent, asked, None))
        x, valid = self._seen(view)
        if asked != self.size:
            x, valid = filled(self.modality, x, asked, self.size), marked(valid, asked, self.size)
        return x, valid

    def _seen(self, view: View) -> tuple[Tensor, Bool[Tensor, "*size"] | None]:
        """What a view of all that was read shows, and where it is valid."""
        raw = self.found.raw
        x, valid = self.modality.tensor(raw, view), mask(self.modality, raw, view)
        for label, each in self.masks.items():
            shown = _valid(label, each, self.found, view)
            x = _hidden(self.modality, x, shown, each.modality.mask_value if is_mask(each.modality) else None)
            if hole_value(self.modality) is None:
                valid = shown if valid is None else valid & shown
        return x, valid

    @property
    def modality(self) -> Modality:
        """What reads the sample."""
        return self.found.modality

    @property
    def left_out(self) -> float:
        """The share of the sample that lies in no part."""
        if self.cover is not None or self.views or has_own_box(self.modality):
            return 0.0
        view = sized(self.modality, self.found, self.size)
        return 1 - math.prod(high - low for low, high in zip(view.start, view.stop))


def tokenized(
    found: Opened, row: Coded, made: Mapping[str, Any] | None, size: tuple[int, ...]
) -> tuple[Opened, View]:
    """What a tokenizer saw of a sample when it made the codes in `row`: the part of the sample, and its view.

    `made` is the manifest of the codes. Raises `DataError` for a sample of another extent than it had then,
    `ConfigError` for windows of another size.
    """
    here, modality, extras = found.extent, found.modality, row.extras
    if made and "start" in extras:
        cover = Cover(tuple(made["size"]), tuple(made["stride"]))
        if size != cover.size:
            shown = list(cover.size), list(size)
            raise ConfigError(f"eval.sizes: the windows with codes have the size {shown[0]}, not {shown[1]}.")
        if cover.whole(here) != tuple(extras["extent"]):
            raise _changed(here, extras["extent"])
        start = tuple(extras["start"])
        found = replace(found, window=cut(found.window or found.raw, start, cover.stop(start, here)))
        asked = within(cover.sizing(modality), found.extent, size)
        return found, modality.view(found.extent, asked, None)
    if "view" not in extras:
        return found, sized(modality, found, size)
    start, stop, extent = (tuple(extras["view"][name]) for name in ("start", "stop", "extent"))
    # A view may have been drawn for another modality of the same scene.
    if len(here) != len(extent) or not proportional(here, extent):
        raise _changed(here, extent)
    return found, View(start, stop, size, extras["view"]["flip"], extent=extent)


def _changed(here: Sequence[int], there: Sequence[int]) -> DataError:
    return DataError(f"the file has the extent {list(here)}, and its codes were made of {list(there)}")


class Files:
    """Reads the sources of samples. Labels, and windows in a row, that read one file alike read it once.

    `cache_mib` is the memory for what was read. What is read must not be changed.
    """

    def __init__(self, data: Data, cache_mib: float = 0.0):
        self.data, self.cache = data, Cache(cache_mib)
        # With the source, because the id of an object is its own only as long as the object lives.
        self.last: dict[Hashable, tuple[Any, Any]] = {}

    def open(
        self, index: int, labels: Mapping[str, Modality], at_least: tuple[int, ...] | None
    ) -> dict[str, Opened]:
        """Everything of one sample by label."""
        now: dict[Hashable, tuple[Any, Any]] = {}
        found = {label: self._one(index, label, each, at_least, now) for label, each in labels.items()}
        self.last = now if any(each.window for each in found.values()) else {}
        return found

    def _one(
        self,
        index: int,
        label: str,
        modality: Modality,
        at_least: tuple[int, ...] | None,
        now: dict[Hashable, tuple[Any, Any]],
    ) -> Opened:
        place = (index, label)
        if place in self.cache.kept:
            return Opened(self.cache.kept[place], modality)
        given = self.data.get(index, label)
        window = given if isinstance(given, Window) else None
        source = given if window is None else window.source
        file = source.name if isinstance(source, Content) else source
        is_file = isinstance(file, (str, Path))
        # A crop of a window needs more detail than a crop of the whole file.
        least = at_least if window is None else None
        way = (file if is_file else id(source), reading(modality), least)

        def read() -> Any:
            return modality.read(source, at_least=least)

        if way in now:
            raw = now[way][1]
        elif way in self.last:
            raw = self.last[way][1]
        elif window is not None and not is_file:
            raw = read()  # it is in memory already
        else:
            raw = self.cache.get(way if is_file else place, read)
        now[way] = source, raw
        return Opened(raw, modality, window)


class Reader:
    """Reads one sample of the main modality and of all extra modalities, all with the same view.

    `most` is the largest size in training: the modality may read fewer details than the file has. A sample whose codes
    are known is what the tokenizer saw, and where it is read for training, it has its codes. Raises `ConfigError` for a
    mask that does not fit the main modality.
    """

    def __init__(
        self,
        data: Data,
        modality: Modality,
        extra: Mapping[str, Modality],
        cache_mib: float = 0.0,
        most: tuple[int, ...] | None = None,
    ):
        self.data, self.modality = data, modality
        self.coded = knows_codes(data)
        # With extra modalities the whole sample is read: all crops must begin at the same pixel. Tokenizers read all.
        self.most = None if extra or self.coded else most
        self.masks = {label: each for label, each in extra.items() if is_mask(each)}
        self.extra = {label: each for label, each in extra.items() if label not in self.masks}
        self.files = Files(data, cache_mib)
        check_masks(modality, self.masks)

    def read(self, index: int, size: tuple[int, ...], rng: np.random.Generator | None) -> Sample:
        """The sample at `size`; a random view if `rng` is given, else the evaluation view."""
        found = self.files.open(index, {"": self.modality, **self.extra, **self.masks}, self.most)
        main, row = found[""], None
        if self.coded and (row := self.coded.coded(index)):
            main, inside = tokenized(main, row, self.coded.made, size)
        else:
            inside = sized(self.modality, main, size, rng)
        view = main.within(inside)
        extras, masks = {}, {}
        for label, each in self.extra.items():
            rider = found[label]
            own, full = self._ridden(label, each, rider, (view, inside), size)
            extras[label] = filled(each, each.tensor(rider.raw, own), own.size, full)
            if (known := mask(each, rider.raw, own)) is not None:
                masks[label] = marked(known, own.size, full)
        valid = mask(self.modality, main.raw, view)
        x = self.modality.tensor(main.raw, view)
        for label, each in self.masks.items():
            rider = found[label]
            part = view if rider.window is None else rider.within(inside)
            shown = _valid(label, rider, main, part)
            x = _hidden(self.modality, x, shown, each.mask_value)
            if hole_value(self.modality) is None:
                valid = shown if valid is None else valid & shown
        counts = weight(self.modality, main.raw, view)
        if fills_up(self.modality) or (row is not None and "start" in row.extras):
            x, valid = filled(self.modality, x, view.size, size), marked(valid, view.size, size)
            counts = None if counts is None else filled(self.modality, counts, view.size, size)
        codes = None if row is None or rng is None else torch.from_numpy(row.codes)
        return Sample(x, self.data.key(index), main.extent, valid, masks, counts, extras, codes)

    def _ridden(
        self, label: str, modality: Modality, rider: Opened, views: tuple[View, View], size: tuple[int, ...]
    ) -> tuple[View, tuple[int, ...]]:
        """The view of an extra modality, and the size up to which it is filled up.

        `views` are those of the main sample, of all that was read and inside its window; `size` is that of the batch.
        """
        if (
            modality.spec.rank != len(size)
            and isinstance(modality, HasSizing)
            and not isinstance(modality, Rides)
        ):
            return rider.within(sized(modality, rider, modality.spec.size)), modality.spec.size
        # Beside a window, a file is a whole beside the whole file, unless it has a window of its own.
        drawn = views[0] if rider.window is None else views[1]
        own = ridden(label, modality, replace(drawn, size=size), self.modality.spec)
        full = own.size
        if drawn.size != size and len(full) == len(size):
            parts = zip(full, drawn.size, size)
            own = replace(own, size=tuple(max(1, round(side * have / of)) for side, have, of in parts))
        return rider.within(own), full

    def try_read(self, index: int, size: tuple[int, ...], rng: np.random.Generator | None) -> Sample | Bad:
        """The sample, or its key and the reason why it cannot be read. Other exceptions are bugs and are raised."""
        try:
            return self.read(index, size, rng)
        except (DataError, OSError) as error:
            return self.data.key(index), str(error)


def ridden(label: str, modality: Modality, view: View, main: DataSpec) -> View:
    """The own view of an extra modality. Raises `ConfigError` if it cannot take part beside the main modality."""
    try:
        return ride(modality, view, main)
    except ValueError as error:
        raise ConfigError(f"data.extra.{label}: {error}") from error


def check_rides(extra: Mapping[str, Modality], size: tuple[int, ...], main: DataSpec) -> None:
    """Raise `ConfigError` if an extra modality cannot take part beside main samples of this size."""
    whole = View(start=(0.0,) * len(size), stop=(1.0,) * len(size), size=size)
    for label, each in extra.items():
        if not is_mask(each):
            ridden(label, each, whole, main)


def check_masks(modality: Modality, masks: Mapping[str, Mask], under: str = "data.extra.") -> None:
    """Raise `ConfigError` if a mask does not fit the main modality, or if a `mask_value` is not one of its values.

    `under` is the place of the labels, for messages.
    """
    spec = modality.spec
    for label, each in masks.items():
        where, value = f"{under}{label}", each.mask_value
        if has_own_box(modality):
            raise ConfigError(
                f"{where}: a mask cannot be used here, because data.modality crops its samples in its own way"
            )
        if each.spec.rank != spec.rank:
            raise ConfigError(
                f"{where}: the mask has {each.spec.rank} axes, but the samples have {spec.rank}"
            )
        if finishes(modality) and (value is not None or hole_value(modality) is not None):
            raise ConfigError(
                f"{where}: a mask cannot replace values here, because data.modality computes its values from a batch; "
                "remove mask_value"
            )
        if value is None:
            continue
        if hole_value(modality) is not None:
            raise ConfigError(
                f"{where}.mask_value={value:g}: data.modality.mask_value is set already; remove one of the two"
            )
        low, high = (0, spec.labels - 1) if spec.labels is not None else spec.range or (value, value)
        if not low <= value <= high or (spec.labels is not None and value != int(value)):
            kind = "class" if spec.labels is not None else "value"
            raise ConfigError(
                f"{where}.mask_value={value:g} is not a {kind} of data.modality: {low:g} to {high:g}"
            )


def _valid(label: str, found: Opened, main: Opened, view: View) -> Bool[Tensor, "*size"]:
    """The valid positions of a view, from the mask of a sample.

    Raises `DataError` if the aspect ratios of mask and sample differ by more than a pixel.
    """
    own, extent = (found.whole, main.whole) if found.window is None else (found.extent, main.extent)
    if not proportional(own, extent):
        sides = " x ".join(map(str, own)), " x ".join(map(str, extent))
        raise DataError(
            f"the mask '{label}' of {sides[0]} does not fit the sample of {sides[1]}: the aspect ratios differ"
        )
    return rearrange(found.modality.tensor(found.raw, view), "1 ... -> ...") > 0.5


def proportional(own: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two extents have the same proportions, up to a position of the coarser of the two."""
    # The largest ratio of an axis gives the scale.
    scale = max(a / b for a, b in zip(own, other))
    return all(abs(a - scale * b) <= max(1.0, 1.01 * scale) for a, b in zip(own, other))


def _hidden(modality: Modality, x: Tensor, valid: Bool[Tensor, "*size"], value: float | None) -> Tensor:
    """The sample with `value` at invalid positions (None: unchanged). Marks holes if there is a validity channel."""
    own = hole_value(modality)
    if own is not None:
        return torch.cat([torch.where(valid, x[:-1], own), torch.where(valid, x[-1:], -1.0)])
    if value is None:
        return x
    return torch.where(valid, x, value if x.is_floating_point() else int(value))
