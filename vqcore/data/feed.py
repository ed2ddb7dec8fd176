"""The batches of a run, step by step, also after a loader worker has died.

The batches of a step depend only on the position of the step in the stream of samples. So the feed can start at any
position: at the same step after a worker has died, or further on when a run rolls back and skips samples.
"""

import logging
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from vqcore import dist
from vqcore.data.batches import BadSamples, TrainBatches
from vqcore.errors import DataError, first_line
from vqcore.protocols import Batch, Data, Modality
from vqcore.schema import RunConfig

log = logging.getLogger(__name__)
DEATHS = 3
"""The run stops when loader workers die this many times in a row within one step."""


class Feed:
    """A context manager that returns the batches of each step, up to step `steps` of the run."""

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        modality: Modality,
        extra: Mapping[str, Modality],
        steps: int = sys.maxsize,
    ):
        self.config, self.steps = config, steps
        self.source = (data, modality, extra)
        self.bad = BadSamples(data, config.data)
        self.stream: Any = None
        self.position = self.stop = -1

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the loader workers. Otherwise the message of an error waits until the workers end by themselves."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def next(self, step: int, offset: int = 0) -> list[Batch]:
        """The `optim.accumulate` batches of a step. The stream is `offset` steps ahead of the run.

        Raises `DataError` if the samples cannot be read.
        """
        for _ in range(DEATHS):
            try:
                return self._take(step + offset, self.steps + offset)
            except RuntimeError as error:
                # torch has no error class for a worker that was killed, mostly because of too little memory.
                if "DataLoader worker" not in str(error):
                    raise
                self.close()
                log.warning("a loader worker died (%s); starting the workers again.", first_line(error))
                last = error
        raise DataError(
            f"step {step + 1}: loader workers died {DEATHS} times in a row ({first_line(last)}). "
            "There may be too little memory: set data.workers to a smaller number, or to 0."
        ) from last

    def _take(self, position: int, stop: int) -> list[Batch]:
        if self.stream is None or (position, stop) != (self.position, self.stop):
            self.close()
            self.stream, self.position, self.stop = iter(self._batches(position, stop)), position, stop
        batches = []
        for _ in range(self.config.optim.accumulate):
            loaded = next(self.stream)
            self.bad.add(loaded.bad)
            batches.append(loaded.batch)
        self.position += 1
        return batches

    def _batches(self, position: int, stop: int) -> TrainBatches:
        return TrainBatches(
            *self.source,
            self.config.data,
            seed=self.config.run.seed,
            start_step=position,
            steps=stop,
            accumulate=self.config.optim.accumulate,
            rank=dist.rank(),
            world=dist.world_size(),
        )
