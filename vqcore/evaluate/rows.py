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

    def joined(self) -> tuple[list[str], dict[str, Tensor]]:
        """The keys of all processes in order, and their rows: on rank 0, else no rows.

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
        return sorted(keys), {name: value[order] for name, value in (rows or {}).items()}


def for_summary(metric: Metric, measured: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What `summary` takes, from what `measure` returned: sums, or the sums of rows and `count`, or the rows."""
    if not gives_rows(metric) or gathers(metric):
        return measured
    # NumPy adds in the same order with any number of threads.
    sums = {name: torch.as_tensor(value.cpu().double().numpy().sum(0)) for name, value in measured.items()}
    return {**sums, "count": torch.tensor(float(_length(measured)), dtype=torch.float64)}


def intervals(
    metric: Metric, rows: Mapping[str, Tensor], files: Sequence[str] = ()
) -> dict[str, tuple[float, float]]:
    """The interval of each value that `summary` gives: what it would be if other samples had been drawn (bootstrap).

    `RESAMPLES` times, as many samples as there are are drawn from the set, with replacement and the same seed. `files`
    names the file of each row: samples of one file are alike, so files are drawn, each with all its samples. One file
    alone has no interval.
    """
    flat = {name: value.double().reshape(len(value), -1) for name, value in rows.items()}
    flat["count"] = torch.ones(_length(rows), 1, dtype=torch.float64)
    if files:
        numbers = {file: number for number, file in enumerate(dict.fromkeys(files))}
        places = torch.tensor([numbers[file] for file in files])
        flat = {
            name: value.new_zeros(len(numbers), value.shape[1]).index_add_(0, places, value)
            for name, value in flat.items()
        }
        if len(numbers) == 1:
            return {}
    count = _length(flat)
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
            one = {name: sums[name][index].reshape(value.shape[1:]) for name, value in rows.items()}
            one["count"] = sums["count"][index, 0]
            for name, value in metric.summary(one).items():
                found.setdefault(name, []).append(value)
    edges = torch.tensor([(1 - SHARE) / 2, (1 + SHARE) / 2], dtype=torch.float64)
    return {
        name: tuple(torch.tensor(values, dtype=torch.float64).nanquantile(edges).tolist())
        for name, values in found.items()
    }


def _length(rows: Mapping[str, Tensor]) -> int:
    return len(next(iter(rows.values())))
