"""Batches from any data source and any modality. A batch depends on seed, epoch and step, not on workers or history.

All processes together read an endless stream of positions. With n samples, position p belongs to epoch p // n and is
the sample at place p % n of its order (`order.py`). A batch may contain samples of two epochs. A size is
drawn for each step, and a crop for each sample of an epoch. A sample that cannot be read is replaced by another sample,
which is drawn in the same way.
"""

import logging
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from vqcore.data.order import Order
from vqcore.data.reader import Bad, Reader, Sample
from vqcore.data.sizes import sizes
from vqcore.errors import DataError, VqcoreError, listed
from vqcore.protocols import Batch, Data, Modality, expect
from vqcore.rng import derive, numpy_generator
from vqcore.schema import DataConfig

log = logging.getLogger(__name__)

REPLACEMENTS = 16
"""Number of other samples to try instead of an unreadable sample before the run stops with an error."""


@dataclass(frozen=True)
class Loaded:
    """A batch, and the samples that could not be read for this batch."""

    batch: Batch | None
    bad: tuple[Bad, ...] = ()


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of samples of one size. Extras that are tensors are stacked; other extras become lists."""
    first = samples[0]
    extras = {label: [sample.extras[label] for sample in samples] for label in first.extras}
    weights = [sample.weight for sample in samples if sample.weight is not None]
    return Batch(
        x=torch.stack([sample.x for sample in samples]),
        keys=tuple(sample.key for sample in samples),
        mask=None if first.mask is None else torch.stack([s.mask for s in samples if s.mask is not None]),
        masks={label: torch.stack([sample.masks[label] for sample in samples]) for label in first.masks},
        weight=_weights(samples, weights[0]) if weights else None,
        size=torch.tensor([sample.extent for sample in samples], dtype=torch.int64),
        extras={k: torch.stack(v) if isinstance(v[0], Tensor) else v for k, v in extras.items()},
        codes=None if first.codes is None else torch.stack([s.codes for s in samples if s.codes is not None]),
    )


def _weights(samples: Sequence[Sample], like: Tensor) -> Tensor:
    """The weights of a batch; samples without weights count 1 everywhere."""
    return torch.stack([torch.ones_like(like) if s.weight is None else s.weight for s in samples])


class TrainBatches:
    """The training batches of one process for steps `start_step` to `steps - 1`, `accumulate` batches per step.

    One process with batches of 2B samples and two processes with batches of B samples get the same samples in the same
    order with the same crops. A new iterator starts at `start_step`. Raises `DataError` if no readable sample is found.
    """

    def __init__(
        self,
        data: Data,
        modality: Modality,
        extra: Mapping[str, Modality],
        cfg: DataConfig,
        *,
        seed: int,
        start_step: int,
        steps: int,
        accumulate: int,
        rank: int,
        world: int,
        workers: int | None = None,
    ):
        self.sizes = sizes(cfg, modality.spec)
        reader = Reader(data, modality, extra, cfg.cache_mib, self.sizes[-1])
        order = Order(data, seed)
        self._dataset = _TrainSet(reader, order, self.sizes, seed, cfg.batch_size, accumulate, rank, world)
        self._numbers = range(start_step * accumulate, steps * accumulate)
        workers = cfg.workers if workers is None else workers
        self._loader = _loader(self._dataset, self._numbers, workers) if workers else None

    def __iter__(self) -> Iterator[Loaded]:
        yield from _raising(self._read_here() if self._loader is None else self._loader)

    def _read_here(self) -> Iterator[Loaded | VqcoreError]:
        """The batches, read in this process with one thread as in a worker: more threads would mostly wait."""
        for number in self._numbers:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                answer = self._dataset[number]
            finally:
                torch.set_num_threads(threads)
            yield answer


class EvalBatches:
    """The evaluation batches of one process. All processes together get every sample once, with its evaluation view.

    The last batch may be smaller. With `limit`, only this number of samples is used, spread evenly over the data set;
    with `among`, spread evenly over the samples that `limit=among` takes.
    Unreadable samples are left out, and are reported with the batch before or after them. If a process can read none of
    its samples, the process yields one report without a batch.
    """

    def __init__(
        self,
        data: Data,
        modality: Modality,
        extra: Mapping[str, Modality],
        cfg: DataConfig,
        *,
        size: tuple[int, ...],
        batch_size: int,
        rank: int,
        world: int,
        limit: int | None = None,
        among: int | None = None,
        workers: int | None = None,
    ):
        among = len(data) if among is None else min(among, len(data))
        total = among if limit is None else min(limit, among)
        self._shares = _Shares(len(data), among, total, batch_size, rank, world)
        dataset = _EvalSet(Reader(data, modality, extra), size)
        self._loader = _loader(dataset, self._shares, cfg.workers if workers is None else workers)

    def __len__(self) -> int:
        """The number of batches if every sample can be read."""
        return len(self._shares)

    def __iter__(self) -> Iterator[Loaded]:
        held: Loaded | None = None
        waiting: tuple[Bad, ...] = ()
        for batch, bad in _raising(self._loader):
            waiting += bad
            if batch is None:
                continue
            if held is not None:
                yield held
            held, waiting = Loaded(batch, waiting), ()
        if held is not None:
            yield replace(held, bad=held.bad + waiting)
        elif waiting:
            yield Loaded(None, waiting)


class BadSamples:
    """Counts the samples that cannot be read, and stops the run if their share of the data set is too large."""

    def __init__(self, data: Data, cfg: DataConfig):
        self.total, self.max_share = len(data), cfg.max_bad_share
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, bad: Iterable[Bad]) -> None:
        """Count samples, and log each sample once. Raises `DataError` if the share is above `max_share`."""
        for key, reason in bad:
            if key not in self.reasons:
                self.reasons[key] = reason
                log.warning("sample %s is skipped: %s", key, reason)
        if len(self) > self.max_share * self.total:
            key, reason = next(iter(self.reasons.items()))
            raise DataError(
                f"{len(self)} of {self.total} samples cannot be read, more than "
                f"data.max_bad_share={self.max_share} allows: {listed(self.reasons, 5)}. {key}: {reason}"
            )

    def metrics(self) -> dict[str, float]:
        """The number of unreadable samples so far as a metric; empty if there are none."""
        return {"data/bad": float(len(self))} if self.reasons else {}


@dataclass(frozen=True)
class _TrainSet:
    """Maps the number of a batch to the batch. Batch i belongs to step i // `accumulate`."""

    reader: Reader
    order: Order
    sizes: list[tuple[int, ...]]
    seed: int
    batch_size: int
    accumulate: int
    rank: int
    world: int

    def __getitem__(self, number: int) -> Loaded | VqcoreError:
        size = self.sizes[derive(self.seed, "size", number // self.accumulate) % len(self.sizes)]
        worker = get_worker_info()
        after = number + (worker.num_workers if worker else 1)  # the next batch of this process
        places = [place for each in (number, after) for place in self._places(each)]
        expect(self.reader.data, (self._index(place) for place in places))
        samples: list[Sample] = []
        bad: list[Bad] = []
        try:
            for position in self._places(number):
                samples.append(self._sample(position, size, bad))
        except VqcoreError as error:
            return error
        return Loaded(collate(samples), tuple(bad))

    def _places(self, number: int) -> range:
        """Where the samples of a batch stand in the stream."""
        first = (number * self.world + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def _index(self, position: int) -> int:
        return self.order(*divmod(position, len(self.reader.data)))

    def _sample(self, position: int, size: tuple[int, ...], bad: list[Bad]) -> Sample:
        """The sample at a position of the stream, or a replacement. Unreadable samples are added to `bad`."""
        count = len(self.reader.data)
        epoch, index = position // count, self._index(position)
        answer = self.reader.try_read(index, size, numpy_generator(self.seed, "view", epoch, index))
        for attempt in range(REPLACEMENTS):
            if isinstance(answer, Sample):
                return answer
            bad.append(answer)
            purpose = (self.seed, "replacement", epoch, index, attempt)
            rng = numpy_generator(*purpose, "view")
            answer = self.reader.try_read(derive(*purpose) % count, size, rng)
        if isinstance(answer, Sample):
            return answer
        tried = f"{bad[-1][0]}: {bad[-1][1]}"
        raise DataError(f"{REPLACEMENTS + 1} samples in a row cannot be read. The last one is {tried}")


@dataclass(frozen=True)
class _EvalSet:
    """Maps sample indices to a batch of the readable samples (None if there are none) and the unreadable samples."""

    reader: Reader
    size: tuple[int, ...]

    def __getitem__(self, indices: Sequence[int]) -> tuple[Batch | None, tuple[Bad, ...]] | VqcoreError:
        expect(self.reader.data, indices)
        try:
            answers = [self.reader.try_read(index, self.size, None) for index in indices]
        except VqcoreError as error:
            return error
        samples = [answer for answer in answers if isinstance(answer, Sample)]
        bad = tuple(answer for answer in answers if not isinstance(answer, Sample))
        return (collate(samples) if samples else None), bad


@dataclass(frozen=True)
class _Shares:
    """The sample indices of each batch of one process: every `world`-th of `total` out of `among` out of `count`."""

    count: int
    among: int
    total: int
    batch_size: int
    rank: int
    world: int

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.total, self.world)) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        mine = range(self.rank, self.total, self.world)
        for start in range(0, len(mine), self.batch_size):
            places = [place * self.among // self.total for place in mine[start : start + self.batch_size]]
            yield [place * self.count // self.among for place in places]


def _loader(dataset: Any, items: Any, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        sampler=items,
        batch_size=None,  # each item of the data set is a whole batch already
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # otherwise each pass draws a number from the global generator
    )


def _unchanged(answer: Any) -> Any:
    return answer


def _raising(source: Iterable[Any]) -> Iterator[Any]:
    """The answers of a loader. An answer that is a `VqcoreError` is raised here, without torch's text around it."""
    # With its first workers torch installs a SIGCHLD handler, which raises an error anywhere in the program when a
    # worker dies, for example in the middle of an optimizer step. Without the handler, a dead worker is noticed some
    # seconds later, when its batch is needed.
    handler = signal.getsignal(signal.SIGCHLD)
    answers = iter(source)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    try:
        for answer in answers:
            if isinstance(answer, VqcoreError):
                raise answer
            yield answer
    finally:
        # Workers end with the last reference. Left to the garbage collector, each worker would take five seconds.
        del answers
