"""Files become parts that an encoder takes: samples, their windows or crops; and codes of parts become those of a file.

Several tokenizers may take the same files in one pass. A file is fetched once, and read once for all modalities that
read alike (`vqcore.protocols.reading`); what follows, from crop to codes, is each tokenizer's own.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vqcore.artefacts.codes import Codes, as_rows, packed
from vqcore.data.lent import Content
from vqcore.data.npy import map_array
from vqcore.data.reader import Opened, Prepared, opened
from vqcore.data.windows import Cover
from vqcore.errors import DataError
from vqcore.protocols import Coded, KnowsExtent, RecordCodes, View, reading
from vqcore.tokenizer import Tokenizer, cells
from vqcore.tokens.crops import Crops, saved_view
from vqcore.tokens.flow import Done, File, Item
from vqcore.tokens.inputs import Source
from vqcore.tokens.store import code_dtype


@dataclass(frozen=True, eq=False)
class Take:
    """How one tokenizer takes samples: at which size, cut into which windows. `done` says what became of its files."""

    tokenizer: Tokenizer
    size: tuple[int, ...]
    covering: Cover | None = None
    done: Done = field(default_factory=Done)


@dataclass(frozen=True)
class Crop:
    """The crops of a pass, and the tokenizer for whose samples they are drawn; None where they are there already."""

    crops: Crops
    tokenizer: Tokenizer | None = None


AHEAD = 64 << 20
"""Most bytes of files that are read ahead for the next batch."""
Beside = Callable[[str], Opened]
"""Gives the mask of a sample by its key."""


def inputs(
    source: Source,
    places: Iterable[int],
    takes: Sequence[Take],
    workers: int,
    batch: int = 1,
    crop: Crop | None = None,
    beside: Beside | None = None,
) -> Iterator[tuple[Take, Item]]:
    """The parts of samples of a source, for each tokenizer. `workers` threads read files ahead, in order.

    Where `batch` parts are encoded together, as many files are read meanwhile, if they are not too large (`AHEAD`).
    A sample of a file of many, and a part after the first, is made when its turn comes.
    """

    def read(place: int) -> _Read:
        return _Read(source, place, takes, crop, beside)

    places = list(places)
    source.expect(places)
    for opening in _ahead(source, places, read, workers, batch):
        file = opening()
        for take in takes:
            yield from ((take, item) for item in _items(take, file))


def encoded(tokenizer: Tokenizer, items: Sequence[Item]) -> Sequence[np.ndarray]:
    """The codes of a batch, in the smallest type that fits."""
    codes = tokenizer.encode_parts([item.given for item in items]).cpu().numpy()
    return list(codes.astype(code_dtype(tokenizer.codebook_size)))


class Made:
    """The codes of one file, part by part, and what else is known of each part."""

    def __init__(self, key: str):
        self.key = key
        self.rows: list[np.ndarray] = []
        self.extras: list[dict[str, Any]] = []
        self.sample: Prepared
        self.several = False

    def codes(self) -> Codes:
        """Plain codes where a sample is one part, else codes with the places of the windows."""
        codes = np.stack(self.rows)
        covering, extent = self.sample.cover, self.sample.found.extent
        exact = self.several and len(self.sample) == 1 and extent == self.sample.size
        if covering is None or exact:
            return codes if self.several else codes[0]
        where = covering.starts(extent), covering.whole(extent), self.sample.size
        if not self.several:
            return RecordCodes(codes, *where)
        return [RecordCodes(each, *where) for each in codes.reshape(-1, len(self.sample), *codes.shape[1:])]

    def coded(self, axes: int) -> list[Coded]:
        """The rows of a store; `axes` is the number of axes of a grid."""
        if self.sample.views:
            own = ((extras.pop("key"), extras) for extras in self.extras)
            return [Coded(key, row, extras) for row, (key, extras) in zip(self.rows, own)]
        rows = as_rows(self.key, self.codes(), axes)
        return [Coded(row.key, row.codes, {**row.extras, **more}) for row, more in zip(rows, self.extras)]


class _Read:
    """A file that is fetched, and begun by each tokenizer. It is read once for all modalities that read alike."""

    def __init__(
        self, source: Source, place: int, takes: Sequence[Take], crop: Crop | None, beside: Beside | None
    ):
        self.masks: dict[str, Opened] = {}
        self.where, self.key, self.crop = source.place(place), source.key(place), crop
        self.given: Any = None
        self.begun: dict[Take, _Begun | DataError | OSError] = {}
        self._whole: dict[Any, Opened] = {}
        try:
            self.given = source.get(place)
            if beside is not None:
                self.masks = {"beside": beside(self.key)}
        except (DataError, OSError) as error:
            self.begun = dict.fromkeys(takes, error)
        for take in takes:
            if take not in self.begun:
                self.begun[take] = self._begin(take)

    def _begin(self, take: Take) -> "_Begun | DataError | OSError":
        try:
            samples = _samples(self, take)
            first = samples.at(0)
            return _Begun(samples, first, first.part(0))
        except (DataError, OSError) as error:
            return error

    def sample(self, take: Take, row: Any = None, place: int | None = None) -> Prepared:
        """The sample that the file is, or the one in a row of it."""
        tokenizer = take.tokenizer
        found = self._opened(tokenizer, row)
        views: tuple[View, ...] = ()
        if self.crop is not None:
            other = self.crop.tokenizer
            drawn = found if other in (None, tokenizer) else self._opened(other, row)
            views = self.crop.crops.of(self.key if place is None else f"{self.key}#{place}", drawn)
        if self.masks and place is not None:
            raise DataError("a mask is for a file with one sample, and this one has several")
        return replace(tokenizer.prepared(found, take.size, take.covering, views), masks=self.masks)

    def blamed(self, error: Exception) -> DataError:
        """An error that names the file as people know it: one that is lent has another path each time."""
        name = self.given.name if isinstance(self.given, Content) else self.given
        return DataError(
            str(error).replace(str(name), self.where) if isinstance(name, (str, Path)) else str(error)
        )

    def _opened(self, tokenizer: Tokenizer, row: Any) -> Opened:
        modality = tokenizer.modality
        if row is not None:
            return opened(modality, row)
        way = reading(modality)
        if way not in self._whole:
            self._whole[way] = opened(modality, self.given)
        return replace(self._whole[way], modality=modality)


@dataclass(frozen=True)
class _Samples:
    """The samples in a file: the file itself, or the rows of an array."""

    file: _Read
    take: Take
    whole: Prepared | None
    rows: Any = ()

    @property
    def several(self) -> bool:
        """Whether the file is an array of samples."""
        return self.whole is None

    def __len__(self) -> int:
        return len(self.rows) if self.several else 1

    def at(self, place: int) -> Prepared:
        """A sample, read."""
        if self.whole is not None:
            return self.whole
        try:
            return self.file.sample(self.take, self.rows[place], place)
        except DataError as error:
            raise DataError(f"{self.file.given}: sample {place}: {error}") from error


_Part = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class _Begun:
    """The samples of a file, the first of them, and its first part."""

    samples: _Samples
    first: Prepared
    part: _Part


def _samples(file: _Read, take: Take) -> _Samples:
    """What is in a file: a sample, or, where only that fits, n samples in an `.npy` file."""
    given, modality = file.given, take.tokenizer.modality
    is_array = isinstance(given, Path) and given.suffix.lower() == ".npy"
    try:
        if is_array and isinstance(modality, KnowsExtent):
            modality.extent_of(given)  # many samples are not read only to be refused
        return _Samples(file, take, file.sample(take))
    except DataError:
        if not is_array:
            raise
        rows = map_array(given, str(given))
        with contextlib.suppress(DataError):
            if rows.ndim > 1:
                file.sample(take, rows[0], 0)
                return _Samples(file, take, None, rows)
        raise


def _items(take: Take, read: _Read) -> Iterator[Item]:
    """The parts of a file for one tokenizer, one after the other."""
    done, file, made = take.done, File(read.where, read.key), Made(read.key)
    try:
        begun = read.begun[take]
        if not isinstance(begun, _Begun):
            raise begun
        samples, part = begun.samples, begun.part
        made.several = samples.several
        for place in range(len(samples)):
            sample = made.sample = samples.at(place) if place else begun.first
            done.lost += sample.left_out
            done.seen += 1
            if sample.views:
                done.crops += len(sample)
            else:
                done.windows += len(sample)
            for number in range(len(sample)):
                is_last = place == len(samples) - 1 and number == len(sample) - 1
                if place or number:
                    part = sample.part(number)
                if not file.failed:
                    made.extras.append(_extras(take, made, part, place, number))
                    yield Item(file, take.size, part, made.rows.append, (lambda: made) if is_last else None)
    except (DataError, OSError) as error:
        done.fail(file, read.blamed(error))


def _extras(take: Take, made: Made, part: _Part, place: int, number: int) -> dict[str, Any]:
    """What a row of a store says of a part, other than where its window lies."""
    extras: dict[str, Any] = {}
    if made.sample.views:
        row = {"row": place} if made.several else {}
        base = f"{made.key}#{place}" if made.several else made.key
        view = saved_view(made.sample.views[number])
        extras = {"key": f"{base}#crop{number}", "record": made.key, **row, "crop": number, "view": view}
    valid = part[1]
    if valid is not None and not valid.all():
        held = cells(valid[None], take.tokenizer.grid(take.size))[0].numpy()
        extras |= {} if held.all() else {"valid": packed(held)}
    return extras


def _ahead(
    source: Source, places: Iterable[int], read: Callable[[int], _Read], workers: int, batch: int
) -> Iterator[Callable[[], _Read]]:
    """What reads each file, or waits until a thread has read it.

    Besides the file that is given, `batch` files are read ahead; fewer if they have more than `AHEAD` bytes, but always
    two for each thread.
    """
    if workers < 1:
        for each in places:
            yield partial(read, each)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[tuple[Future[_Read], int]] = deque()
    held = 0
    try:
        for each in places:
            size = source.bytes_of(each) or 0
            waiting.append((pool.submit(read, each), size))
            held += size
            while len(waiting) > (2 * workers if held > AHEAD else max(2 * workers, batch)):
                future, size = waiting.popleft()
                held -= size
                yield future.result
        while waiting:
            yield waiting.popleft()[0].result
    finally:
        pool.shutdown(cancel_futures=True)
