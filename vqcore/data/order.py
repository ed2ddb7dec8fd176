"""The order in which training takes the samples of a source: a function of seed and epoch, without a list of samples.

By default an epoch is one keyed permutation of all samples. Where neighbours are cheap together (`Blocks`), an epoch
permutes the blocks, cuts the row of blocks into lanes, and permutes the samples of a lane window by window. Batches
take turns among the lanes, so a loader worker meets the blocks of few lanes, and holds few blocks at a time.
"""

import numpy as np

from vqcore.protocols import Blocks, Data, blocks
from vqcore.rng import derive, permute

LANES = 16
"""Most lanes of an epoch."""
TURN = 16
"""So many samples in a row come from one lane."""
MIXED = 4
"""So many blocks are held for each lane, or there is one lane."""


class Order:
    """Which sample stands at a place of an epoch. Every epoch has every sample once."""

    def __init__(self, data: Data, seed: int):
        self.seed, self.count = seed, len(data)
        found = blocks(data)
        self.laid = None if found is None or found.together >= self.count else _Lanes(found, seed)

    def __call__(self, epoch: int, place: int) -> int:
        if self.laid is not None:
            return self.laid(epoch, place)
        return permute(place, self.count, derive(self.seed, "shuffle", epoch))


class _Lanes:
    """The order of a source with blocks."""

    def __init__(self, found: Blocks, seed: int):
        self.seed, self.sizes = seed, np.asarray(found.sizes, np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        count = int(self.sizes.sum())
        mean = -(-count // len(self.sizes))
        # A power of two: then most numbers of workers and processes have lanes of their own.
        self.lanes = 1 << min(LANES, max(1, found.together // (MIXED * mean))).bit_length() - 1
        # A window ends with the block that its last sample is in, so it may be a block longer.
        room = found.together // self.lanes
        self.window = max(1, room // 2, room - int(self.sizes.max()))
        self.borders = np.arange(self.lanes + 1) * count // self.lanes
        lengths = np.diff(self.borders)
        # In turns as long as every lane has a whole turn left; then what is left of one lane after the other.
        self.even = int(lengths.min()) // TURN * TURN
        self.rests = np.cumsum(lengths - self.even)
        self.epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __call__(self, epoch: int, place: int) -> int:
        order, ends, windows = self._epoch(epoch)
        at = self._lane(place)
        number = int(np.searchsorted(windows, at, "right"))
        low, high = int(windows[number - 1]), int(windows[number])
        moved = low + permute(at - low, high - low, derive(self.seed, "shuffle", epoch, number))
        nth = int(np.searchsorted(ends, moved, "right"))
        block = int(order[nth])
        return int(self.starts[block] + moved - (ends[nth] - self.sizes[block]))

    def _lane(self, place: int) -> int:
        """From a place of the epoch to a place in the row of blocks, which is the row of lanes."""
        rest = place - self.even * self.lanes
        if rest < 0:
            turn, within = divmod(place, TURN)
            return int(self.borders[turn % self.lanes]) + turn // self.lanes * TURN + within
        lane = int(np.searchsorted(self.rests, rest, "right"))
        before = int(self.rests[lane - 1]) if lane else 0
        return int(self.borders[lane]) + self.even + rest - before

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the blocks in an epoch, where each of them ends, and where each window begins."""
        if epoch not in self.epochs:
            if len(self.epochs) > 1:  # a batch may have samples of two epochs
                self.epochs.clear()
            key, number = derive(self.seed, "shuffle", epoch), len(self.sizes)
            order = np.array([permute(place, number, key) for place in range(number)], np.int64)
            ends = np.cumsum(self.sizes[order])
            pieces = np.unique(np.concatenate([[0], ends[:-1], self.borders[:-1]]))
            lane = np.searchsorted(self.borders, pieces, "right") - 1
            window = (pieces - self.borders[lane]) // self.window
            first = np.flatnonzero(np.diff(lane, prepend=-1) | np.diff(window, prepend=-1))
            self.epochs[epoch] = order, ends, np.append(pieces[first], ends[-1])
        return self.epochs[epoch]
