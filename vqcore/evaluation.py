"""Measures a tokenizer on a data set: losses, the metrics that mean something for its data, the codebook, bits."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vqcore import dist
from vqcore.config import Config
from vqcore.console import ProgressLine
from vqcore.data.loader import BadSamples, EvalBatches
from vqcore.errors import DataError
from vqcore.metrics import CodeCounts, bits_per_position
from vqcore.protocols import Batch, Data, Metric, Modality
from vqcore.registry import registry
from vqcore.rng import sample_generators
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

CODE_FIGURES = (
    "codes/usage",
    "codes/perplexity",
    "samples",
    "tokens_per_sample",
    "bits_per_token",
    "bits_per_pixel",
)
"""The figures that say nothing of the reconstruction."""


def build_metrics(configs: Mapping[str, Config], tokenizer: Any) -> dict[str, Metric]:
    """The metrics of a config by label, or those that the modality names."""
    return {
        label: registry().build("metric", cfg, f"eval.metrics.{label}", spec=tokenizer.spec)
        for label, cfg in metric_configs(configs, tokenizer).items()
    }


def metric_configs(configs: Mapping[str, Config], tokenizer: Any) -> Mapping[str, Config]:
    """The settings of the metrics by label: those of a config, or the defaults of those that the modality names."""
    return configs or {name: _defaults(name) for name in tokenizer.modality.metrics}


def _defaults(name: str) -> Config:
    cls: Any = registry().load("metric", name)
    return cls.Config(name=name)


def loss_names(figures: Iterable[str], metrics: Iterable[str]) -> list[str]:
    """Which of the names that `evaluate` gave are losses: neither of a metric's label nor of the codes."""
    labels = set(metrics)
    return [name for name in figures if name not in CODE_FIGURES and name.partition("/")[0] not in labels]


@torch.no_grad()
def evaluate(
    tokenizer: Any,
    batches: Iterable[Batch],
    metrics: Mapping[str, Metric],
    *,
    size: tuple[int, ...],
    weights: Mapping[str, float] | None,
    seed: int,
    step: int,
    refine: int = 0,
    watch: Callable[[int], None] = lambda samples: None,
) -> dict[str, float]:
    """Figures over all samples of all processes, by name; sums are exact, so one process or many give the same.

    `loss` is the sum of the model's losses by `weights`; with None there are no losses, and the objective needs no
    setup. The metrics measure what the codes decode to, after `refine` sweeps of search for better ones. `codes/usage`
    and `codes/perplexity` are over the whole set. Call it with the tokenizer in eval mode. Raises `DataError` when
    there was no sample at all.
    """
    totals = _Totals(tokenizer)
    for batch in batches:
        batch = batch.to(tokenizer.device)
        codes = None if weights is None else _add_losses(totals, tokenizer, batch, seed, step)
        if codes is None or refine:
            codes = tokenizer.encode(batch.x, batch.mask, refine=refine)
        rng = sample_generators(batch.keys, seed, "eval-decode")
        x_hat = tokenizer.decode(codes, size=size, rng=rng, extras=batch.extras)
        for label, metric in metrics.items():
            for name, value in measured(metric, tokenizer, x_hat, batch).items():
                totals.add(f"metric:{label}:{name}", value)
        totals.codes.add(codes)
        totals.samples += len(batch.x)
        watch(totals.samples)
    totals.add("samples", torch.tensor(float(totals.samples)))
    sums = dist.sum_dicts(totals.sums)
    if not sums["samples"]:
        raise DataError("no sample could be read for evaluation; the files are named above.")
    return _figures(sums, totals.codes.summed(), metrics, weights, tokenizer, size)


def _add_losses(totals: "_Totals", tokenizer: Any, batch: Batch, seed: int, step: int) -> Tensor | None:
    """Add a batch's losses; returns its codes if the objective had them."""
    rng = sample_generators(batch.keys, seed, "eval")
    out = tokenizer.objective.losses(tokenizer, batch, player="model", step=step, rng=rng)
    for name, value in out.terms.items():
        totals.add(f"loss:{name}", value.double() * len(batch.x))
    return out.codes


def measured(metric: Metric, tokenizer: Any, x_hat: Tensor, batch: Batch) -> Mapping[str, Tensor]:
    """A metric's sums over a batch, in the units of the files if it wants them."""
    pair = x_hat, batch.x
    if getattr(metric, "in_units", False):
        pair = tokenizer.modality.values(x_hat), tokenizer.modality.values(batch.x)
    return metric.measure(*pair, batch.mask)


class _Totals:
    """Sums of this process, in double precision on the CPU; how often each code of each codebook occurred."""

    def __init__(self, tokenizer: Any):
        self.sums: dict[str, Tensor] = {}
        self.codes = CodeCounts(tokenizer.codebook_size, tokenizer.num_codebooks)
        self.samples = 0

    def add(self, name: str, value: Tensor) -> None:
        value = value.double().cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def _figures(
    sums: Mapping[str, Tensor],
    codes: CodeCounts,
    metrics: Mapping[str, Metric],
    weights: Mapping[str, float] | None,
    tokenizer: Any,
    size: tuple[int, ...],
) -> dict[str, float]:
    samples = float(sums["samples"])
    terms = {k.removeprefix("loss:"): float(v) / samples for k, v in sums.items() if k.startswith("loss:")}
    figures = {}
    if weights is not None:
        figures = {"loss": math.fsum(weights.get(k, 1.0) * value for k, value in terms.items()), **terms}
    grid = tokenizer.grid(size)
    return (
        figures
        | summaries(sums, metrics)
        | codes.figures()
        | {
            "samples": samples,
            "tokens_per_sample": float(math.prod(grid)),
            "bits_per_token": tokenizer.bits_per_token,
            "bits_per_pixel": bits_per_position(tokenizer.bits_per_token, grid, size),
        }
    )


def summaries(sums: Mapping[str, Tensor], metrics: Mapping[str, Metric]) -> dict[str, float]:
    """What metrics make of the sums `metric:LABEL:NAME` over a whole set, by label."""
    figures = {}
    for label, metric in metrics.items():
        prefix = f"metric:{label}:"
        own = {k.removeprefix(prefix): v for k, v in sums.items() if k.startswith(prefix)}
        for name, value in metric.summary(own).items():
            figures[f"{label}/{name}" if name else label] = value
    return figures


def eval_batches(
    tokenizer: Tokenizer,
    config: RunConfig,
    data: Data,
    extra: Mapping[str, Modality],
    *,
    size: tuple[int, ...] | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    shared: bool = False,
) -> EvalBatches:
    """Samples as an evaluation sees them, at the nominal size unless told otherwise, `limit` of them from all over.

    This process has all of them and reads them itself, as suits a look at a few; `shared` gives every process its
    share, read by `data.workers`.
    """
    return EvalBatches(
        data,
        tokenizer.modality,
        extra,
        config.data,
        size=size or tuple(tokenizer.cfg.size),
        batch_size=batch_size or config.eval.batch_size or config.data.batch_size,
        rank=dist.rank() if shared else 0,
        world=dist.world_size() if shared else 1,
        limit=limit,
        workers=None if shared else 0,
    )


def evaluate_data(
    tokenizer: Tokenizer,
    config: RunConfig,
    data: Data | None,
    extra: dict[str, Modality],
    size: tuple[int, ...],
    *,
    step: int,
    losses: bool = True,
    seen: Callable[[Batch], None] = lambda batch: None,
) -> dict[str, float]:
    """Figures of a tokenizer on one data set at one size. Unreadable files are skipped, named and counted.

    `seen` is called with every batch of this process.
    """
    assert data is not None
    batches = eval_batches(tokenizer, config, data, extra, size=size, limit=config.eval.samples, shared=True)
    total = min(len(data), config.eval.samples or len(data))
    with ProgressLine("evaluate", -(-total // dist.world_size()), unit="sample") as line:
        return evaluate(
            tokenizer,
            _readable(batches, BadSamples(data, config.data), seen),
            build_metrics(config.eval.metrics, tokenizer),
            size=size,
            weights=config.objective.weights if losses else None,
            seed=config.run.seed,
            step=step,
            refine=config.eval.refine,
            watch=line.update,
        )


def _readable(batches: EvalBatches, bad: BadSamples, seen: Callable[[Batch], None]) -> Iterator[Batch]:
    for loaded in batches:
        bad.add(loaded.bad)
        if loaded.batch is not None:
            seen(loaded.batch)
            yield loaded.batch


def sample_pictures(tokenizer: Tokenizer, config: RunConfig, data: Data, extra: dict[str, Modality]) -> Batch:
    """`eval.pictures` readable samples, from all over the set."""
    count = config.eval.pictures
    for loaded in eval_batches(tokenizer, config, data, extra, batch_size=count, limit=count):
        if loaded.batch is not None:
            return loaded.batch
    raise DataError(f"none of the samples to show can be read. The first: {': '.join(loaded.bad[0])}")
