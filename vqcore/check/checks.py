"""All checks, in the order of a batch's way through the code: the cheap ones that `vqcore train` runs, and all of them.

Nothing here writes a file. `full` trains the tokenizer that it is given for a few steps: throw that tokenizer away.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from vqcore import dist
from vqcore.assembly import assemble, pick_device
from vqcore.borrowed import Access
from vqcore.check.findings import Finding
from vqcore.check.model import learns, model_findings, whole_step
from vqcore.check.plan import codebook, parameters, rates, tokens
from vqcore.check.samples import FEW, both_sides, declared, samples
from vqcore.check.suspicions import value_findings
from vqcore.data.batches import TrainBatches
from vqcore.data.sizes import sizes
from vqcore.errors import VqcoreError
from vqcore.protocols import Batch, fitter
from vqcore.rng import generator
from vqcore.run.state import Run, build_from, build_hooks
from vqcore.schema import DataConfig, RunConfig

UNFITTED = "is fitted by vqcore fit, and not trained; what depends on its codes is not checked"
"""The note on a quantizer that is not fitted yet."""


def cheap(run: Run, *, trained: bool = True) -> list[Finding]:
    """Check one training batch and what the model makes of it. Nothing is trained, and no state changes.

    With `trained=False`, what only training needs is not checked: values of size 1, learning rates, and codes beside
    the tokens of a step.
    """
    try:
        batch = run.tokenizer.prepare(first_batch(run), run.extra)
    except VqcoreError as error:
        return [Finding("error", "data", str(error), "vqcore check reads the samples one by one.")]
    values = value_findings(declared(run), [batch], "the first batch")
    return [
        *(found for found in values if trained or found.grade == "error"),
        *model_findings(run, batch),
        *((*codebook(run), *rates(run)) if trained else ()),
        *(both_sides(run) if dist.is_main() else ()),
    ]


def everything(config: RunConfig, access: Access | None = None) -> Iterator[Finding]:
    """Build a config's parts and run all checks. If some parts cannot be built, all of them are named."""
    problems: dict[str, str] = {}

    @contextlib.contextmanager
    def attempt(where: str) -> Iterator[None]:
        try:
            yield
        except VqcoreError as error:
            problems.setdefault(str(error), where)

    device = run = None
    with attempt("run.device"):
        device = pick_device(config.run.device)
    parts = assemble(config, attempt)
    for label, cfg in config.hooks.items():
        with attempt(f"hooks.{label}"):
            build_hooks(replace(config, hooks={label: cfg}))
    if parts and device and not problems:
        with attempt("config"):
            run = build_from(config, parts, device, access)
            for name in run.player_names:
                run.player(name)
    if run is None or problems:
        for text, where in problems.items():
            yield Finding("error", where, text)
        return
    yield from full(run)


def full(run: Run) -> Iterator[Finding]:
    """All checks, in the order of a batch's way through the code. Trains the run's tokenizer for a few steps."""
    read = list(samples(run))
    yield from read
    quantizer = fitter(run.tokenizer.quantizer)
    if quantizer is not None and not quantizer.fitted:
        yield Finding("note", f"model.quantizer ({run.config.model.quantizer.name})", UNFITTED)
        yield from tokens(run)
        return
    try:
        batch = first_batch(run, _largest(run))
    except VqcoreError as error:
        known = any(finding.grade == "error" for finding in read)
        instead = "no batch can be made; the next findings were made with noise"
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
    yield from shaped
    yield from codebook(run)
    if any(finding.grade == "error" for finding in shaped):
        return  # what follows needs a model that works
    yield from learns(run, batch)
    yield from whole_step(run, batch)


def first_batch(run: Run, cfg: DataConfig | None = None) -> Batch:
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


def _largest(run: Run) -> DataConfig:
    """The data's settings for a few samples of the largest training size."""
    cfg = run.config.data
    if cfg.input_size_max is not None:
        largest = sizes(cfg, run.tokenizer.spec)[-1]
        cfg = replace(cfg, input_size_min=largest, input_size_max=largest)
    return replace(cfg, batch_size=max(2, min(cfg.batch_size, FEW)))


def noise(run: Run, count: int = 2) -> Batch:
    """A batch of noise at the largest training size, to check the model without the data."""
    spec, size = run.tokenizer.spec, sizes(run.config.data, run.tokenizer.spec)[-1]
    draw = generator(0, "noise")
    if spec.labels is not None:
        x = torch.randint(spec.labels, (count, *size), generator=draw)
    else:
        low, high = spec.range or (-1.0, 1.0)
        x = low + (high - low) * torch.rand(count, spec.channels, *size, generator=draw)
    return Batch(x, tuple(f"noise{i}" for i in range(count)), finished=True)
