"""Metrics that give rows, one for each sample: their totals, and intervals from resampled sets."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vqcore import dist
from vqcore.protocols import Metric, gathers, gives_rows
from vqcore.rng import generator

RESAMPLES = 1000
"""Number of sets that are drawn for an interval, each as large as the measured set."""
SHARE = 0.95
"""Share of the resampled values that lies inside an interval."""
_MOST = 1 << 22
"""Most numbers in one tensor while intervals are computed; this bounds the memory."""


class Rows:
    """The rows of the samples that this process has measured, by name, on the CPU."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, keys: Sequence[str], rows: Mapping[str, Tensor]) -> None:
        """Add one row of each name for each key. Raises `ValueError` for another number of rows."""
        self.keys += keys
        for name, value in rows.items():
            if len(value) != len(keys):
                raise ValueError(f"'{name}' has {len(value)} rows for {len(keys)} samples")
            self.parts.setdefault(name, []).append(value.detach().cpu())

    def joined(self) -> dict[str, Tensor]:
        """The rows of all processes in the order of their keys: on rank 0, else nothing.

        All processes call this method together.
        """
        keys = [key for part in dist.gathered(self.keys) for key in part]
        rows = dist.joined({name: torch.cat(parts) for name, parts in self.parts.items()})
        for name, value in (rows or {}).items():
            if len(value) != len(keys):
                raise ValueError(
                    f"'{name}' has {len(value)} rows for {len(keys)} samples: some batches lack them"
                )
        order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64)
        return {name: value[order] for name, value in (rows or {}).items()}


def for_summary(metric: Metric, measured: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What `summary` takes, from what `measure` returned: sums, or the sums of rows and `count`, or the rows."""
    if not gives_rows(metric) or gathers(metric):
        return measured
    # NumPy adds in the same order with any number of threads.
    sums = {name: torch.as_tensor(value.cpu().double().numpy().sum(0)) for name, value in measured.items()}
    return {**sums, "count": torch.tensor(float(_length(measured)), dtype=torch.float64)}


def intervals(metric: Metric, rows: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """The interval of each value that `summary` gives: what it would be if other samples had been drawn (bootstrap).

    `RESAMPLES` times, as many samples as there are are drawn from the set, with replacement and the same seed.
    """
    count = _length(rows)
    flat = {name: value.double().reshape(count, -1) for name, value in rows.items()}
    widest = max(value.shape[1] for value in flat.values())
    size = max(1, min(RESAMPLES, _MOST // max(count, widest)))
    rng = generator(0, "bootstrap")
    found: dict[str, list[float]] = {}
    for start in range(0, RESAMPLES, size):
        drawn = torch.randint(count, (min(size, RESAMPLES - start), count), generator=rng)
        times = torch.zeros(drawn.shape, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand_as(times))
        sums = {name: times @ value for name, value in flat.items()}
        for index in range(len(drawn)):
            one = {name: value[index].reshape(rows[name].shape[1:]) for name, value in sums.items()}
            one["count"] = torch.tensor(float(count), dtype=torch.float64)
            for name, value in metric.summary(one).items():
                found.setdefault(name, []).append(value)
    edges = torch.tensor([(1 - SHARE) / 2, (1 + SHARE) / 2], dtype=torch.float64)
    return {
        name: tuple(torch.tensor(values, dtype=torch.float64).nanquantile(edges).tolist())
        for name, values in found.items()
    }


def _length(rows: Mapping[str, Tensor]) -> int:
    return len(next(iter(rows.values())))
