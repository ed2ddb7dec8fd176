"""Encoding in half precision, where the codes hardly differ from those of fp32: this is measured, said, or refused."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from vqcore.errors import ConfigError
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.flow import Item, Output
from vqcore.tokens.parts import encoded

log = logging.getLogger(__name__)

LEAST = 0.995
"""The smallest share of positions that must have the codes of fp32."""
ENOUGH = 8192
"""Positions that are compared, if there are so many before something must be written."""


class Encoder:
    """Encodes batches of parts: codes in the smallest type that fits. Other precisions than fp32 are compared with it.

    Nothing is written before `settle`, which a shard calls at its end; `settled_first` does so for files.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.settled = tokenizer.code_precision == "fp32"
        self.same = self.count = 0

    def __call__(self, items: Sequence[Item]) -> Sequence[np.ndarray]:
        """The codes of a batch."""
        codes = encoded(self.tokenizer, items)
        if not self.settled:
            with _in_fp32(self.tokenizer):
                alike = (np.stack(codes) == np.stack(encoded(self.tokenizer, items))).all(-1)
            self.same += int(alike.sum())
            self.count += alike.size
            if self.count >= ENOUGH:
                self.settle()
        return codes

    def settled_first(self, ready: Iterable[Output]) -> Iterator[Output]:
        """Files that are ready; none before `ENOUGH` positions, or all that there are, have been compared."""
        waiting = []
        for each in ready:
            waiting.append(each)
            if self.settled:
                yield from waiting
                waiting.clear()
        self.settle()
        yield from waiting

    def settle(self) -> None:
        """Say how many codes are those of fp32. Raises `ConfigError` if they are too few."""
        if self.settled or not self.count:
            return
        self.settled = True
        precision, share = self.tokenizer.code_precision, self.same / self.count
        found = f"{share:.2%} of {self.count:,} positions have the codes of fp32"
        if share < LEAST:
            raise ConfigError(f"--precision {precision}: {found}, and at least {LEAST:.1%} must. Take fp32.")
        log.info("--precision %s: %s.", precision, found)


@contextmanager
def _in_fp32(tokenizer: Tokenizer) -> Iterator[None]:
    precision = tokenizer.precision
    tokenizer.precision = "fp32"
    try:
        yield
    finally:
        tokenizer.precision = precision
