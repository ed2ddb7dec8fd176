"""Batches from any source and any modality: functions of (seed, epoch, step), never of workers or history.

All processes together walk an endless stream of positions. Position p belongs to epoch p // n and is sample
permute(p % n), a keyed permutation that needs no list; batches run across the borders of epochs. Each step has its size,
each sample of an epoch its crop. A sample that cannot be read is replaced by another one, chosen in the same way.
"""

import logging
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vqcore.data.reader import Bad, Reader, Sample
from vqcore.data.sizes import sizes
from vqcore.errors import DataError, VqcoreError, listed
from vqcore.protocols import Batch, Data, Modality
from vqcore.rng import derive, numpy_generator, permute
from vqcore.schema import DataConfig

log = logging.getLogger(__name__)


REPLACEMENTS = 16
"""Other samples tried in the place of an unreadable one before the run gives up."""


@dataclass(frozen=True)
class Loaded:
    """A batch, and the samples that were to be in it and could not be read."""

    batch: Batch | None
    bad: tuple[Bad, ...] = ()


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one size as a batch. Extras that are tensors are stacked, others become lists."""
    first = samples[0]
    extras = {label: [sample.extras[label] for sample in samples] for label in first.extras}
    return Batch(
        x=torch.stack([sample.x for sample in samples]),
        keys=tuple(sample.key for sample in samples),
        mask=None if first.mask is None else torch.stack([s.mask for s in samples if s.mask is not None]),
        size=torch.tensor([sample.extent for sample in samples], dtype=torch.int64),
        extras={k: torch.stack(v) if isinstance(v[0], Tensor) else v for k, v in extras.items()},
    )


class TrainBatches:
    """The training batches of steps `start_step` to `steps - 1` for one process, `accumulate` of them a step.

    One process with batches of 2B and two with batches of B see the same samples in the same order, cropped
    alike. Iterating again starts again. Raises `DataError` when no readable sample can be found.
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
        dataset = _TrainSet(reader, self.sizes, seed, cfg.batch_size, accumulate, rank, world)
        self._requests = _Steps(start_step, steps, accumulate)
        workers = cfg.workers if workers is None else workers
        self._answers: Iterable[Loaded | VqcoreError]
        if workers:
            self._answers = _loader(dataset, self._requests, workers)
        else:
            self._answers = _Here(dataset, self._requests)

    def __iter__(self) -> Iterator[Loaded]:
        yield from _raising(self._answers)


class EvalBatches:
    """Every sample once over all processes, each with its evaluation view; the last batch may be smaller.

    `limit` takes that many samples, spread evenly over the set. Unreadable samples are left out and reported
    with a batch nearby; a process that can read none of its samples yields one report without a batch.
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
        workers: int | None = None,
    ):
        total = len(data) if limit is None else min(limit, len(data))
        self._requests = _Shares(len(data), total, batch_size, rank, world)
        dataset = _EvalSet(Reader(data, modality, extra), size)
        self._loader = _loader(dataset, self._requests, cfg.workers if workers is None else workers)

    def __len__(self) -> int:
        """Batches when every sample can be read."""
        return len(self._requests)

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
    """Counts the samples that cannot be read and ends the run when they are too large a share of the set."""

    def __init__(self, data: Data, cfg: DataConfig):
        self.total, self.max_share = len(data), cfg.max_bad_share
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, bad: Iterable[Bad]) -> None:
        """Note samples; each is named in the log the first time. Raises `DataError` above `max_share`."""
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
        """How many there were so far, as a metric; nothing when there were none."""
        return {"data/bad": float(len(self))} if self.reasons else {}


@dataclass(frozen=True)
class _TrainSet:
    """From (step, micro-batch) to a batch; what it returns depends on nothing else."""

    reader: Reader
    sizes: list[tuple[int, ...]]
    seed: int
    batch_size: int
    accumulate: int
    rank: int
    world: int

    def __getitem__(self, request: tuple[int, int]) -> Loaded | VqcoreError:
        step, micro = request
        size = self.sizes[derive(self.seed, "size", step) % len(self.sizes)]
        first = ((step * self.accumulate + micro) * self.world + self.rank) * self.batch_size
        samples: list[Sample] = []
        bad: list[Bad] = []
        try:
            for position in range(first, first + self.batch_size):
                samples.append(self._sample(position, size, bad))
        except VqcoreError as error:
            return error
        return Loaded(collate(samples), tuple(bad))

    def _sample(self, position: int, size: tuple[int, ...], bad: list[Bad]) -> Sample:
        count = len(self.reader.data)
        epoch = position // count
        index = permute(position % count, count, derive(self.seed, "shuffle", epoch))
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
        raise DataError(f"{REPLACEMENTS + 1} samples in a row cannot be read; the last: {tried}")


@dataclass(frozen=True)
class _EvalSet:
    """From numbers of samples to a batch of those that can be read, or None, and the others."""

    reader: Reader
    size: tuple[int, ...]

    def __getitem__(self, indices: Sequence[int]) -> tuple[Batch | None, tuple[Bad, ...]] | VqcoreError:
        answers = [self.reader.try_read(index, self.size, None) for index in indices]
        samples = [answer for answer in answers if isinstance(answer, Sample)]
        bad = tuple(answer for answer in answers if not isinstance(answer, Sample))
        return (collate(samples) if samples else None), bad


@dataclass(frozen=True)
class _Steps:
    """(step, micro-batch), one after the other."""

    start: int
    stop: int
    accumulate: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.start, self.stop):
            for micro in range(self.accumulate):
                yield step, micro


@dataclass(frozen=True)
class _Shares:
    """The numbers of one process's samples by batch: every `world`-th of `total` out of `count`."""

    count: int
    total: int
    batch_size: int
    rank: int
    world: int

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.total, self.world)) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        mine = range(self.rank, self.total, self.world)
        for start in range(0, len(mine), self.batch_size):
            yield [place * self.count // self.total for place in mine[start : start + self.batch_size]]


@dataclass(frozen=True)
class _Here:
    """What a training set answers to requests, read in this process."""

    dataset: _TrainSet
    requests: Iterable[tuple[int, int]]

    def __iter__(self) -> Iterator[Loaded | VqcoreError]:
        for request in self.requests:
            with _one_thread():
                answer = self.dataset[request]
            yield answer


@contextmanager
def _one_thread() -> Iterator[None]:
    """What `DataLoader` does in its workers: samples are so small that threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _loader(dataset: Any, requests: Any, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        sampler=requests,
        batch_size=None,  # a request is already a whole batch
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # else every pass takes a number from the global generator
    )


def _unchanged(answer: Any) -> Any:
    return answer


def _raising(source: Iterable[Any]) -> Iterator[Any]:
    """What was read, by workers or here. Our errors travel as values: torch would wrap them in a traceback."""
    answers = _begun(source)
    try:
        for answer in answers:
            if isinstance(answer, VqcoreError):
                raise answer
            yield answer
    finally:
        # Workers end with the last reference; left to the garbage collector they take five seconds each.
        del answers


def _begun(source: Iterable[Any]) -> Iterator[Any]:
    """The iterator of a loader, without the signal handler that torch installs with its first worker processes.

    It raises wherever the program is when a worker dies, be it half-way through an optimizer's step. Without it a dead
    worker is noticed, some seconds later, where its batch is awaited.
    """
    before = signal.getsignal(signal.SIGCHLD)
    answers = iter(source)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return answers
