"""The batches of a run's next steps, whatever happens to the processes that read them.

What a step sees is a function of its number on the stream, so the feed can be taken up anywhere: after a worker died,
or further on when a run rolls back and leaves samples out.
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
"""Times that a reading process may die, without a step in between, before the run gives up."""


class Feed:
    """Batches by step, up to step `steps` of the run; `offset` is how far the stream runs ahead of the steps.

    A context manager.
    """

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
        """End the reading processes. An abandoned iterator would keep the reason of a failure waiting for them."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def next(self, step: int, offset: int = 0) -> list[Batch]:
        """The batches of a step, one per accumulated part. Raises `DataError` when nothing can be read."""
        for _ in range(DEATHS):
            try:
                return self._take(step + offset, self.steps + offset)
            except RuntimeError as error:
                # The only sign that torch gives: the process was killed, mostly for memory.
                if "DataLoader worker" not in str(error):
                    raise
                self.close()
                log.warning("a reading process died (%s); starting it again.", first_line(error))
                last = error
        raise DataError(
            f"step {step + 1}: reading processes died {DEATHS} times in a row ({first_line(last)}). "
            "Is there too little memory? Try fewer data.workers, or 0."
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
