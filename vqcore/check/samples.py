"""Reads samples from all over each data set and compares them with what the config declares."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from vqcore.check.findings import Finding
from vqcore.check.overlap import overlap
from vqcore.check.suspicions import value_findings
from vqcore.check.values import Declared, better
from vqcore.data.listing import counted
from vqcore.errors import listed
from vqcore.evaluate.measure import eval_batches
from vqcore.protocols import Batch, Data, left_out
from vqcore.run.state import Run

SAMPLES = 32
"""Samples of each set that are read."""
FEW = 4
"""Samples that go through the model where the whole batch is not needed."""


def declared(run: Run) -> Declared:
    """What a run's config says of its samples."""
    return Declared(run.config.data.modality, run.tokenizer.spec, run.data)


def samples(run: Run) -> Iterator[Finding]:
    """Read samples of each set; name the unreadable ones, compare the values with what is declared."""
    sets = [("data.path", run.data)]
    if run.eval_data is not None:
        sets.append((held_out(run), run.eval_data))
    for where, data in sets:
        where = where if hasattr(run.config.data, where.partition(".")[2]) else "data"
        good, bad = _read(run, data)
        asked = min(SAMPLES, len(data))
        if bad:
            yield _unreadable(run, data, where, bad, asked)
        else:
            yield Finding("note", where, f"{len(data)} samples; {asked} from all over the set can be read")
        if rest := left_out(data):
            yield Finding("note", where, f"left out: {counted(rest)}")
        if good and data is run.data:
            yield from value_findings(declared(run), good, f"{sum(len(b.keys) for b in good)} samples")
            yield from _enlarged(run, good)
    yield from both_sides(run)
    if run.total_batch > len(run.data):
        what = (
            f"a step takes {run.total_batch} samples and there are {len(run.data)}: "
            "a step sees some samples more than once"
        )
        yield Finding("warning", "data.batch_size", what, f"Set it to {len(run.data)} or less.")


def held_out(run: Run) -> str:
    """The setting of the held-out samples."""
    return "data.eval_path" if run.config.data.eval_share is None else "data.eval_share"


def both_sides(run: Run) -> Iterator[Finding]:
    """A warning if a run is evaluated on samples that it is trained on."""
    if run.eval_data is not None:
        yield from overlap(run.data, run.eval_data, held_out(run))


def _unreadable(run: Run, data: Data, where: str, bad: list[tuple[str, str]], asked: int) -> Finding:
    share = run.config.data.max_bad_share
    name = run.config.data.modality.name
    what = (
        f"{len(bad)} of {asked} samples that were tried cannot be read: {listed((k for k, _ in bad), 5)}. "
        f"{bad[0][0]}: {bad[0][1]}."
    )
    remedy = better(replace(declared(run), data=data), refused=True)
    if not remedy and len(bad) == asked:
        remedy = f"Check that data.modality describes the files: vqcore show {name} lists its settings."
    remedy = remedy or (
        "Mend or remove them; training skips and names unreadable samples up to a share of "
        f"data.max_bad_share={share:g}."
    )
    return Finding("error" if len(bad) > share * asked else "warning", where, what, remedy)


def _read(run: Run, data: Data) -> tuple[list[Batch], list[tuple[str, str]]]:
    loaded = list(eval_batches(run.tokenizer, run.config, data, run.extra, batch_size=FEW, limit=SAMPLES))
    good = [run.tokenizer.prepare(one.batch, run.extra) for one in loaded if one.batch is not None]
    return good, [bad for one in loaded for bad in one.bad]


def _enlarged(run: Run, batches: list[Batch]) -> Iterator[Finding]:
    size = torch.tensor(run.tokenizer.cfg.size)
    extents = [extent for batch in batches if batch.size is not None for extent in batch.size]
    small = sum(len(extent) == len(size) and bool((extent < size).any()) for extent in extents)
    if small > len(extents) // 10:
        what = f"{small} of {len(extents)} samples are smaller than {' x '.join(map(str, size.tolist()))}: enlarged"
        remedy = "A smaller input_size wastes no tokens on blur."
        yield Finding("warning", "data.input_size", what, remedy)
