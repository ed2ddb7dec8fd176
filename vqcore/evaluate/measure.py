"""Measures a tokenizer on a data set: losses, metrics of the reconstruction, use of the codebook, bits."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vqcore import dist
from vqcore.config import Config
from vqcore.console import ProgressLine
from vqcore.data.batches import BadSamples, EvalBatches
from vqcore.errors import DataError
from vqcore.evaluate.usage import CodeCounts
from vqcore.protocols import Batch, Data, Metric, Modality, in_units, of_constant, values
from vqcore.registry import registry
from vqcore.rng import sample_generators
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

CODE_METRICS = (
    "codes/usage",
    "codes/perplexity",
    "samples",
    "tokens_per_sample",
    "bits_per_token",
    "bits_per_pixel",
)
"""The metrics of the codes, not of the reconstruction."""


def build_metrics(configs: Mapping[str, Config], tokenizer: Tokenizer) -> dict[str, Metric]:
    """The metrics of a config by label; the modality's own metrics if the config has none."""
    return {
        label: registry().build("metric", cfg, f"eval.metrics.{label}", spec=tokenizer.spec)
        for label, cfg in metric_configs(configs, tokenizer).items()
    }


def metric_configs(configs: Mapping[str, Config], tokenizer: Tokenizer) -> Mapping[str, Config]:
    """The settings of the metrics by label: those of a config, or the defaults of the modality's own metrics.

    The label of a modality's metric is its name without the plugin's id.
    """
    if configs:
        return configs
    names = tokenizer.modality.metrics
    short = [name.rpartition("/")[2] for name in names]
    return {s if short.count(s) == 1 else name: _defaults(name) for name, s in zip(names, short)}


def _defaults(name: str) -> Config:
    cls: Any = registry().load("metric", name)
    return cls.Config(name=name)


def loss_names(names: Iterable[str], metrics: Iterable[str]) -> list[str]:
    """The names of losses among the names that `evaluate` returned; `metrics` are the labels of the metrics."""
    labels = set(metrics)
    return [name for name in names if name not in CODE_METRICS and name.partition("/")[0] not in labels]


@dataclass(frozen=True)
class Measured:
    """The metrics of a tokenizer on a data set at one size, and those of the constant prediction if there is one."""

    metrics: dict[str, float]
    constant: dict[str, float]


@torch.no_grad()
def evaluate(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    metrics: Mapping[str, Metric],
    *,
    size: tuple[int, ...],
    weights: Mapping[str, float] | None,
    seed: int,
    step: int,
    extra: Mapping[str, Modality] | None = None,
    constant: Tensor | None = None,
    watch: Callable[[int], None] = lambda samples: None,
) -> Measured:
    """Metrics over all samples of all processes, by name; sums are exact, so the number of processes does not matter.

    `loss` is the sum of the model's losses, weighted by `weights`. With `weights=None` no losses are measured, and the
    objective needs no setup. `extra` are the extra modalities by label. `codes/usage` and `codes/perplexity` are over
    the whole set. `constant` is one number for each channel of a decoder's output (`vqcore.evaluate.baseline`). The
    tokenizer must be in eval mode. Raises `DataError` when there is no sample.
    """
    totals = _Totals(tokenizer)
    for batch in batches:
        batch = tokenizer.prepare(batch, extra)
        codes = None if weights is None else _add_losses(totals, tokenizer, batch, seed, step)
        if codes is None:
            codes = tokenizer.encode(batch.x, batch.mask)
        rng = sample_generators(batch.keys, seed, "eval-decode")
        x_hat = tokenizer.decode(codes, size=size, rng=rng, extras=batch.conditions)
        for label, metric in metrics.items():
            totals.measure(f"metric:{label}", metric, x_hat, batch)
            if constant is not None and of_constant(metric):
                totals.measure(f"constant:{label}", metric, _everywhere(constant, x_hat), batch)
        totals.codes.add(codes)
        totals.samples += len(batch.x)
        watch(totals.samples)
    totals.add("samples", torch.tensor(float(totals.samples)))
    sums = dist.sum_dicts(totals.sums)
    if not sums["samples"]:
        raise DataError("no sample could be read for evaluation; the files are named above.")
    return Measured(
        _metrics(sums, totals.codes.summed(), metrics, weights, tokenizer, size),
        _summaries(sums, "constant", metrics),
    )


def _add_losses(totals: "_Totals", tokenizer: Tokenizer, batch: Batch, seed: int, step: int) -> Tensor | None:
    """Add a batch's losses; returns the batch's codes if the objective returns them."""
    rng = sample_generators(batch.keys, seed, "eval")
    out = tokenizer.objective.losses(tokenizer, batch, player="model", step=step, rng=rng)
    for name, value in out.terms.items():
        totals.add(f"loss:{name}", value.double() * len(batch.x))
    return out.codes


def _everywhere(values: Float[Tensor, " c"], like: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
    """One value a channel at every position."""
    return values.to(like).view(1, -1, *[1] * (like.ndim - 2)).expand_as(like)


def measured(metric: Metric, tokenizer: Tokenizer, x_hat: Tensor, batch: Batch) -> Mapping[str, Tensor]:
    """A metric's sums over a batch, in the units of the files if the metric asks for them."""
    pair = x_hat, batch.x
    if in_units(metric):
        pair = values(tokenizer.modality, x_hat), values(tokenizer.modality, batch.x)
    return metric.measure(*pair, batch.mask)


class _Totals:
    """Sums of this process, in double precision on the CPU, and counts of each code of each codebook."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.sums: dict[str, Tensor] = {}
        self.codes = CodeCounts(tokenizer.codebook_size, tokenizer.num_codebooks)
        self.samples = 0

    def add(self, name: str, value: Tensor) -> None:
        value = value.double().cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def measure(self, prefix: str, metric: Metric, x_hat: Tensor, batch: Batch) -> None:
        for name, value in measured(metric, self.tokenizer, x_hat, batch).items():
            self.add(f"{prefix}:{name}", value)


def _metrics(
    sums: Mapping[str, Tensor],
    codes: CodeCounts,
    metrics: Mapping[str, Metric],
    weights: Mapping[str, float] | None,
    tokenizer: Tokenizer,
    size: tuple[int, ...],
) -> dict[str, float]:
    samples = float(sums["samples"])
    terms = {k.removeprefix("loss:"): float(v) / samples for k, v in sums.items() if k.startswith("loss:")}
    losses = {}
    if weights is not None:
        losses = {"loss": math.fsum(weights.get(k, 1.0) * value for k, value in terms.items()), **terms}
    facts = tokenizer.facts(size)
    return (
        losses
        | _summaries(sums, "metric", metrics)
        | codes.metrics()
        | {
            "samples": samples,
            "tokens_per_sample": float(facts.tokens),
            "bits_per_token": facts.bits_per_token,
            "bits_per_pixel": facts.bits_per_position,
        }
    )


def _summaries(sums: Mapping[str, Tensor], kind: str, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The metrics by label, from the sums `KIND:LABEL:NAME` over a whole set."""
    found = {}
    for label, metric in metrics.items():
        prefix = f"{kind}:{label}:"
        own = {k.removeprefix(prefix): v for k, v in sums.items() if k.startswith(prefix)}
        if own:
            for name, value in metric.summary(own).items():
                found[f"{label}/{name}" if name else label] = value
    return found


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
    """Batches of evaluation samples, by default at the nominal size; `limit` takes so many, spread over the set.

    Without `shared` every process has all these samples and reads them itself, which suits a look at a few. With
    `shared` every process has its share, read by `data.workers` processes.
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
    data: Data,
    extra: Mapping[str, Modality],
    size: tuple[int, ...],
    *,
    step: int,
    losses: bool = True,
    constant: Tensor | None = None,
) -> Measured:
    """Measure a tokenizer on one data set at one size. Unreadable samples are skipped, named and counted."""
    batches = eval_batches(tokenizer, config, data, extra, size=size, limit=config.eval.samples, shared=True)
    total = min(len(data), config.eval.samples or len(data))
    with ProgressLine("evaluate", -(-total // dist.world_size()), unit="sample") as line:
        return evaluate(
            tokenizer,
            _readable(batches, BadSamples(data, config.data)),
            build_metrics(config.eval.metrics, tokenizer),
            size=size,
            weights=config.objective.weights if losses else None,
            seed=config.run.seed,
            step=step,
            extra=extra,
            constant=constant,
            watch=line.update,
        )


def _readable(batches: EvalBatches, bad: BadSamples) -> Iterator[Batch]:
    for loaded in batches:
        bad.add(loaded.bad)
        if loaded.batch is not None:
            yield loaded.batch


def sample_pictures(
    tokenizer: Tokenizer, config: RunConfig, data: Data, extra: Mapping[str, Modality]
) -> Batch:
    """`eval.pictures` samples, spread over the set and prepared, without those that are not readable."""
    count = config.eval.pictures
    for loaded in eval_batches(tokenizer, config, data, extra, batch_size=count, limit=count):
        if loaded.batch is not None:
            return tokenizer.prepare(loaded.batch, extra)
    raise DataError(f"no sample to show can be read. The first: {': '.join(loaded.bad[0])}")
