"""Reads samples from all over each data set and compares them with what the config declares."""

import math
from collections.abc import Iterator
from dataclasses import replace

from vqcore.check.findings import Finding
from vqcore.check.overlap import copies, overlap
from vqcore.check.raw import array_findings
from vqcore.check.suspicions import value_findings
from vqcore.check.values import Declared, better
from vqcore.data.listing import counted
from vqcore.data.windows import within
from vqcore.errors import listed
from vqcore.evaluate.measure import eval_batches
from vqcore.protocols import Batch, Data, Modality, Sizing, has_own_box, left_out, sizing
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
            yield from array_findings(declared(run), SAMPLES)
            yield from _sized(run, good)
            if run.tokenizer.spec.kind not in ("categorical", "binary"):  # these may well be equal
                yield from copies(data, where)
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


def _sized(run: Run, batches: list[Batch]) -> Iterator[Finding]:
    """What happens along each axis, and how much of the samples an evaluation leaves out, enlarges or fills up."""
    modality, size = run.tokenizer.modality, tuple(run.tokenizer.cfg.size)
    extents = [tuple(each.tolist()) for batch in batches if batch.size is not None for each in batch.size]
    extents = [extent for extent in extents if len(extent) == len(size)]
    if not extents:
        return
    words, shown = sizing(modality), " x ".join(map(str, size))
    if not has_own_box(modality):
        yield Finding("note", "data.modality", _in_words(modality, words, extents, size))
    filled = [axis for axis, word in enumerate(words) if word in ("window", "pad")]
    short = sum(any(extent[axis] < size[axis] for axis in filled) for extent in extents)
    if short:
        what = f"{short} of {len(extents)} samples are shorter than {shown}: filled up at the end, which is masked"
        many = short > len(extents) // 2
        remedy = "A smaller input_size spends no tokens on what is not there." if many else ""
        yield Finding("warning" if many else "note", "data.input_size", what, remedy)
    elastic = [axis for axis in range(len(size)) if axis not in filled]
    small = sum(any(extent[axis] < size[axis] for axis in elastic) for extent in extents)
    if small > len(extents) // 10:
        what = f"{small} of {len(extents)} samples are smaller than {shown}: enlarged"
        remedy = "A smaller input_size wastes no tokens on blur."
        yield Finding("warning", "data.input_size", what, remedy)


def _in_words(
    modality: Modality,
    words: tuple[Sizing, ...],
    extents: list[tuple[int, ...]],
    size: tuple[int, ...],
) -> str:
    sides = [sorted(axis) for axis in zip(*extents)]
    spans = " x ".join(f"{a[0]}" if a[0] == a[-1] else f"{a[0]} to {a[-1]}" for a in sides)
    how = words[0] if len(set(words)) == 1 else " x ".join(words)
    text = f"sizing {how}: samples of {spans} become {' x '.join(map(str, size))}"
    if "window" in words:
        return f"{text}; training draws one window of a sample, evaluation and tokenize go over all of it"
    lost = 0.0
    for extent in extents:
        view = modality.view(extent, within(words, extent, size), None)
        lost += 1 - math.prod(high - low for low, high in zip(view.start, view.stop))
    share = lost / len(extents)
    what = "area" if len(size) == 2 else "samples"
    return text if share < 0.005 else f"{text}; {share:.0%} of the {what} is left out"
