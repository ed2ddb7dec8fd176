"""Measures a tokenizer on a data set: losses, the metrics that mean something for its data, the codebook, bits."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vqcore import dist
from vqcore.config import Config
from vqcore.errors import DataError
from vqcore.metrics import bits_per_position, code_figures
from vqcore.protocols import Batch, Metric
from vqcore.registry import registry
from vqcore.rng import sample_generators


def build_metrics(configs: Mapping[str, Config], tokenizer: Any) -> dict[str, Metric]:
    """The metrics of a config by label, or those that the modality names."""
    if not configs:
        configs = {name: _defaults(name) for name in tokenizer.modality.metrics}
    return {
        label: registry().build("metric", cfg, f"eval.metrics.{label}", spec=tokenizer.spec)
        for label, cfg in configs.items()
    }


def _defaults(name: str) -> Config:
    cls: Any = registry().load("metric", name)
    return cls.Config(name=name)


@torch.no_grad()
def evaluate(
    tokenizer: Any,
    batches: Iterable[Batch],
    metrics: Mapping[str, Metric],
    *,
    size: tuple[int, ...],
    weights: Mapping[str, float],
    seed: int,
    step: int,
    watch: Callable[[int], None] = lambda samples: None,
) -> dict[str, float]:
    """Figures over all samples of all processes, by name; sums are exact, so one process or many give the same.

    `loss` is the weighted sum of the model's losses; `codes/usage` and `codes/perplexity` are over the whole set.
    Call it with the tokenizer in eval mode. Raises `DataError` when there was no sample at all.
    """
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(tokenizer.num_codebooks, tokenizer.codebook_size, dtype=torch.int64)
    seen = 0

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value.double().cpu() if name in sums else value.double().cpu()

    for batch in batches:
        batch = batch.to(tokenizer.device)
        rng = sample_generators(batch.keys, seed, "eval")
        out = tokenizer.objective.losses(tokenizer, batch, player="model", step=step, rng=rng)
        for name, value in out.terms.items():
            add(f"loss:{name}", value.double() * len(batch.x))
        codes = tokenizer.encode(batch.x, batch.mask) if out.codes is None else out.codes
        rng = sample_generators(batch.keys, seed, "eval-decode")
        x_hat = tokenizer.decode(codes, size=size, rng=rng, extras=batch.extras)
        for label, metric in metrics.items():
            for name, value in metric.measure(x_hat, batch.x, batch.mask).items():
                add(f"metric:{label}:{name}", value)
        for book in range(tokenizer.num_codebooks):
            flat = codes[..., book].flatten().cpu()
            counts[book] += torch.bincount(flat, minlength=tokenizer.codebook_size)
        seen += len(batch.x)
        watch(seen)
    add("samples", torch.tensor(float(seen)))
    sums = dist.sum_dicts(sums)
    if not sums["samples"]:
        raise DataError("no sample could be read for evaluation; the files are named above.")
    return _figures(sums, dist.sum_(counts), metrics, weights, tokenizer, size)


def _figures(
    sums: Mapping[str, Tensor],
    counts: Tensor,
    metrics: Mapping[str, Metric],
    weights: Mapping[str, float],
    tokenizer: Any,
    size: tuple[int, ...],
) -> dict[str, float]:
    samples = float(sums["samples"])
    terms = {k.removeprefix("loss:"): float(v) / samples for k, v in sums.items() if k.startswith("loss:")}
    figures = {"loss": math.fsum(weights.get(name, 1.0) * value for name, value in terms.items()), **terms}
    for label, metric in metrics.items():
        prefix = f"metric:{label}:"
        own = {k.removeprefix(prefix): v for k, v in sums.items() if k.startswith(prefix)}
        for name, value in metric.summary(own).items():
            figures[f"{label}/{name}" if name else label] = value
    grid = tokenizer.grid(size)
    return (
        figures
        | code_figures(counts)
        | {
            "samples": samples,
            "tokens_per_sample": float(math.prod(grid)),
            "bits_per_token": tokenizer.bits_per_token,
            "bits_per_pixel": bits_per_position(tokenizer.bits_per_token, grid, size),
        }
    )
