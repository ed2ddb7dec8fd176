"""What can be known before the first step: settings, samples, shapes, losses, codes, memory, and whether it learns.

Nothing here writes a file. `cheap` is the part that `vqcore train` runs by itself: one batch, looked at and sent
through the model once. `full` adds what `vqcore check` has time for; it trains the tokenizer it is given for a few
steps, so throw that away.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vqcore import dist, values
from vqcore.data.loader import TrainBatches, sizes
from vqcore.errors import ConfigError, VqcoreError, listed
from vqcore.evaluation import eval_batches
from vqcore.findings import Finding
from vqcore.metrics import bits_per_position, learns_codes
from vqcore.optim import peak_rate, rate_in_words
from vqcore.protocols import Batch
from vqcore.refine import check_refine
from vqcore.rng import generator
from vqcore.schema import DataConfig
from vqcore.trial import learns, model_findings, needs, total_batch

if TYPE_CHECKING:
    from vqcore.trainer import Run

SAMPLES = 32
"""Samples of each set that are read, from all over it."""
FEW = 4
"""Samples that go through the model where the whole batch is not needed."""
STEPS_TO_MEET_ALL = 10
"""A codebook is too large for its batches when that many steps have fewer tokens than it has codes."""


def cheap(run: "Run") -> list[Finding]:
    """Look at one training batch and at what the model makes of it. Nothing is trained or drawn; no state changes."""
    try:
        batch = first_batch(run)
    except VqcoreError as error:
        return [Finding("error", "data", str(error), "vqcore check looks at the samples one by one.")]
    return [
        *value_findings(run, [batch], "the first batch"),
        *model_findings(run, batch),
        *codebook(run),
        *rates(run),
        *refinement(run),
    ]


def full(run: "Run") -> Iterator[Finding]:
    """Everything, in the order of a batch's way through the code. Trains the run's tokenizer for a few steps."""
    read = list(samples(run))
    yield from read
    try:
        batch = first_batch(run, _largest(run))
    except VqcoreError as error:
        known = any(finding.grade == "error" for finding in read)
        instead = "no batch can be made; what follows was found with noise"
        yield (
            Finding("note", "data", instead)
            if known
            else Finding("error", "data", str(error), f"({instead})")
        )
        batch = noise(run)
    shaped = model_findings(run, batch)
    yield from parameters(run)
    yield from tokens(run)
    yield from rates(run)
    yield from refinement(run)
    yield from shaped
    yield from codebook(run)
    if any(finding.grade == "error" for finding in shaped):
        return  # what follows needs a model that works
    yield from learns(run, batch)
    yield from needs(run, batch)


def first_batch(run: "Run", cfg: DataConfig | None = None) -> Batch:
    """The first training batch of this process, read in this process."""
    loader = TrainBatches(
        run.data,
        run.tokenizer.modality,
        run.extra,
        replace(cfg or run.config.data, workers=0),
        seed=run.seed,
        start_step=0,
        steps=1,
        accumulate=1,
        rank=dist.rank(),
        world=dist.world_size(),
    )
    batch = next(iter(loader)).batch
    assert batch is not None
    return batch


def _largest(run: "Run") -> DataConfig:
    """The data's settings for a few samples of the largest training size."""
    cfg = run.config.data
    if cfg.input_size_max is not None:
        largest = sizes(cfg, run.tokenizer.spec)[-1]
        cfg = replace(cfg, input_size=largest, input_size_min=None, input_size_max=None)
    return replace(cfg, batch_size=max(2, min(cfg.batch_size, FEW)))


def noise(run: "Run", count: int = 2) -> Batch:
    """A batch of noise at the largest training size, for looking at the model without the data."""
    spec, size = run.tokenizer.spec, sizes(run.config.data, run.tokenizer.spec)[-1]
    draw = generator(0, "noise")
    if spec.labels is not None:
        x = torch.randint(spec.labels, (count, *size), generator=draw)
    else:
        low, high = spec.range or (-1.0, 1.0)
        x = low + (high - low) * torch.rand(count, spec.channels, *size, generator=draw)
    return Batch(x, tuple(f"noise{i}" for i in range(count)))


def samples(run: "Run") -> Iterator[Finding]:
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
    per_step = total_batch(run)
    if per_step > len(run.data):
        what = f"a step takes {per_step} samples and there are {len(run.data)}: each is seen more than once in it"
        yield Finding("warning", "data.batch_size", what, f"Set it to {len(run.data)} or less.")


def _mismatch(run: "Run") -> str:
    """What to do where no sample at all can be read: then it is not the samples."""
    name = run.config.data.modality.name
    return (
        f"Not one of them can: does data.modality say what they are? vqcore show {name} lists its settings."
    )


def _read(run: "Run", data: Any) -> tuple[list[Batch], list[tuple[str, str]]]:
    batches = eval_batches(run.tokenizer, run.config, data, run.extra, batch_size=FEW, limit=SAMPLES)
    loaded = list(batches)
    return [one.batch for one in loaded if one.batch is not None], [bad for one in loaded for bad in one.bad]


def _enlarged(run: "Run", batches: list[Batch]) -> Iterator[Finding]:
    size = torch.tensor(run.tokenizer.cfg.size)
    extents = [extent for batch in batches if batch.size is not None for extent in batch.size]
    small = sum(len(extent) == len(size) and bool((extent < size).any()) for extent in extents)
    if small > len(extents) // 10:
        what = f"{small} of {len(extents)} samples are smaller than {' x '.join(map(str, size.tolist()))}: enlarged"
        yield Finding(
            "warning", "data.input_size", what, "A smaller input_size would waste no tokens on blur."
        )


def value_findings(run: "Run", batches: list[Batch], source: str) -> Iterator[Finding]:
    """What is suspicious about the numbers of some batches, given what the modality declares."""
    for grade, what, remedy in values.suspicions(run, batches, source):
        yield Finding(grade, f"data.modality ({run.config.data.modality.name})", what, remedy)


def codebook(run: "Run") -> Iterator[Finding]:
    """More codes than a step has tokens, or than the whole training set has."""
    tokenizer, cfg = run.tokenizer, run.config
    if not learns_codes(tokenizer.quantizer):
        return
    size = sizes(cfg.data, tokenizer.spec)[-1]
    per_sample, codes = math.prod(tokenizer.grid(size)), tokenizer.codebook_size
    in_step = per_sample * total_batch(run)
    where = f"model.quantizer ({cfg.model.quantizer.name})"
    if codes > per_sample * len(run.data):
        what = f"{codes:,} codes, but the training set has {per_sample * len(run.data):,} tokens in all"
        yield Finding("warning", where, what, "Take a smaller codebook or more data.")
    elif codes > in_step:
        grave = codes > STEPS_TO_MEET_ALL * in_step
        steps = math.ceil(codes / in_step)
        what = f"{codes:,} codes and {in_step:,} tokens in a step: it takes {steps} steps to meet them all"
        remedy = f"Raise data.batch_size or optim.accumulate until a step has about {codes:,} tokens."
        yield Finding("warning" if grave else "note", where, what, remedy if grave else "")


def parameters(run: "Run") -> Iterator[Finding]:
    """Numbers of parameters by part, and what is frozen."""
    parts, trained = [], 0
    for name, module in run.tokenizer.named_children():
        count = sum(p.numel() for p in module.parameters())
        learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
        trained += learning
        stored = sum(b.numel() for b in module.buffers())
        more = [f"and {_count(stored)} in buffers"] if stored > count else []
        more += ["frozen"] if count and not learning else []
        parts.append(f"{name} {_count(count)}{f' ({listed(more)})' if more else ''}")
    total = sum(p.numel() for p in run.tokenizer.parameters())
    if not trained:
        yield Finding("error", "model", "no parameter is trained", "Is everything frozen?")
    yield Finding("note", "model", f"{_count(total)} parameters: {', '.join(parts)}")


def tokens(run: "Run") -> Iterator[Finding]:
    """Tokens a sample, bits a token and a position, passes over the data."""
    tokenizer, size = run.tokenizer, tuple(run.tokenizer.cfg.size)
    grid = tokenizer.grid(size)
    bits = tokenizer.bits_per_token
    books = f" in {tokenizer.num_codebooks} codebooks" if tokenizer.num_codebooks > 1 else ""
    text = (
        f"{' x '.join(map(str, size))} becomes {' x '.join(map(str, grid))} = {math.prod(grid)} tokens of "
        f"{bits:.4g} bits ({tokenizer.codebook_size:,} codes{books}), {bits_per_position(bits, grid, size):.4g} bits a "
        f"{'pixel' if tokenizer.spec.rank == 2 else 'position'}"
    )
    yield Finding("note", "model.quantizer", text)
    passes = run.steps * total_batch(run) / len(run.data)
    yield Finding("note", "run.steps", f"{run.steps:,} steps are {passes:.3g} passes over the training set")


def refinement(run: "Run") -> Iterator[Finding]:
    """Whether `eval.refine` can do what it is asked for."""
    if not run.config.eval.refine:
        return
    try:
        check_refine(run.tokenizer)
    except ConfigError as error:
        yield Finding("error", "eval.refine", str(error), "Set eval.refine=0.")


def rates(run: "Run") -> Iterator[Finding]:
    """Every player's peak learning rate in numbers; a warm-up that leaves little or nothing of the run."""
    batch = total_batch(run)
    for name in run.objective.players(run.steps):
        cfg = run.player(name).cfg
        where = f"optim.players.{name}" if name in run.config.optim.players else "optim"
        whose = "" if name == "model" else f" for {name}"
        yield Finding("note", where, f"{rate_in_words(cfg, batch)}{whose}")
        if 2 * cfg.warmup > run.steps:
            short = f"{where}.warmup={cfg.warmup} of run.steps={run.steps}"
            if cfg.warmup < run.steps:
                what = f"{short}: more than half of the run is warm-up"
            else:
                reached = peak_rate(cfg, batch) * run.steps / cfg.warmup
                what = f"{short}: the rate rises to the end, to {reached:.3g}, and never falls"
            yield Finding("warning", where, what, f"E.g. {where}.warmup={run.steps // 20}.")


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
