"""Reads samples from all over a data set and compares them with what the config declares."""

from collections.abc import Iterator
from typing import Any

import torch

from vqcore.check import values
from vqcore.check.findings import Finding
from vqcore.errors import listed
from vqcore.evaluate.measure import eval_batches
from vqcore.protocols import Batch
from vqcore.run.state import Run

SAMPLES = 32
"""Samples of each set that are read, from all over it."""
FEW = 4
"""Samples that go through the model where the whole batch is not needed."""


def samples(run: Run) -> Iterator[Finding]:
    """Read samples from all over each set; name the unreadable, compare the values with what is declared."""
    sets = [("data.path", run.data)]
    if run.eval_data is not None:
        sets.append(("data.eval_path", run.eval_data))
    for where, data in sets:
        where = where if hasattr(run.config.data, where.partition(".")[2]) else "data"
        good, bad = _read(run, data)
        asked = min(SAMPLES, len(data))
        if bad:
            grave = len(bad) > run.config.data.max_bad_share * asked
            wrong = _mismatch(run) if len(bad) == asked else ""
            yield Finding(
                "error" if grave else "warning",
                where,
                f"{len(bad)} of {asked} samples that were tried cannot be read: {listed((k for k, _ in bad), 5)}. "
                f"{bad[0][0]}: {bad[0][1]}.",
                values.better_range(run, data)
                or wrong
                or "Mend or remove them; training skips and names them"
                f" up to a share of data.max_bad_share={run.config.data.max_bad_share:g}.",
            )
        else:
            yield Finding("note", where, f"{len(data)} samples; {asked} from all over the set can be read")
        if good and data is run.data:
            yield from value_findings(run, good, f"{sum(len(b.keys) for b in good)} samples")
            yield from _enlarged(run, good)
    per_step = run.total_batch
    if per_step > len(run.data):
        what = f"a step takes {per_step} samples and there are {len(run.data)}: each is seen more than once in it"
        yield Finding("warning", "data.batch_size", what, f"Set it to {len(run.data)} or less.")


def _mismatch(run: Run) -> str:
    """What to do where no sample at all can be read: then it is not the samples."""
    name = run.config.data.modality.name
    return (
        f"Not one of them can: does data.modality say what they are? vqcore show {name} lists its settings."
    )


def _read(run: Run, data: Any) -> tuple[list[Batch], list[tuple[str, str]]]:
    batches = eval_batches(run.tokenizer, run.config, data, run.extra, batch_size=FEW, limit=SAMPLES)
    loaded = list(batches)
    return [one.batch for one in loaded if one.batch is not None], [bad for one in loaded for bad in one.bad]


def _enlarged(run: Run, batches: list[Batch]) -> Iterator[Finding]:
    size = torch.tensor(run.tokenizer.cfg.size)
    extents = [extent for batch in batches if batch.size is not None for extent in batch.size]
    small = sum(len(extent) == len(size) and bool((extent < size).any()) for extent in extents)
    if small > len(extents) // 10:
        what = f"{small} of {len(extents)} samples are smaller than {' x '.join(map(str, size.tolist()))}: enlarged"
        yield Finding(
            "warning", "data.input_size", what, "A smaller input_size would waste no tokens on blur."
        )


def value_findings(run: Run, batches: list[Batch], source: str) -> Iterator[Finding]:
    """What is suspicious about the numbers of some batches, given what the modality declares."""
    for grade, what, remedy in values.suspicions(run, batches, source):
        yield Finding(grade, f"data.modality ({run.config.data.modality.name})", what, remedy)
