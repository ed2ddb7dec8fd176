"""Measures a tokenizer on a data set: losses, metrics of the reconstruction, use of the codebook, bits."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqcore import dist
from vqcore.config import Config
from vqcore.console import ProgressLine
from vqcore.data.batches import BadSamples, EvalBatches
from vqcore.data.windows import at_size, files_of
from vqcore.errors import ConfigError, DataError, VqcoreError
from vqcore.evaluate.collisions import Collisions
from vqcore.evaluate.perturb import NAME, perturbed
from vqcore.evaluate.rows import Rows, for_summary, intervals
from vqcore.evaluate.usage import CodeCounts, reachable
from vqcore.metrics.sums import per_sample
from vqcore.network import closed_unless_asked
from vqcore.protocols import (
    Batch,
    Data,
    Metric,
    Modality,
    gathers,
    gives_rows,
    in_units,
    is_denoiser,
    of_constant,
    set_up,
    values,
)
from vqcore.registry import registry
from vqcore.rng import sample_generators, seeded
from vqcore.sampling import resolved
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer, cells

Predict = Callable[[Batch], Tensor]
"""A baseline: from a prepared batch to what a decoder would return for it."""

DENOISED = 256
"""Number of samples that are decoded by default if the decoder is a denoiser: decoding takes many passes."""


class Metrics(dict[str, Metric]):
    """The metrics of an evaluation by label. They are built once and kept over sizes, weights and evaluations."""

    device: torch.device | None = None

    def ready(self, device: torch.device) -> "Metrics":
        """These metrics, set up on a device. They are set up before their first use only."""
        if self.device != device:
            for label, metric in self.items():
                with seeded(0, "metric", label), closed_unless_asked():
                    try:
                        set_up(metric, device)
                    except VqcoreError as error:
                        raise error.at(f"eval.metrics.{label}") from error
            self.device = device
        return self


def build_metrics(configs: Mapping[str, Config], tokenizer: Tokenizer) -> Metrics:
    """The metrics of a config by label; the modality's own metrics if the config has none."""
    return Metrics(
        (label, registry().build("metric", cfg, f"eval.metrics.{label}", spec=tokenizer.spec))
        for label, cfg in metric_configs(configs, tokenizer).items()
    )


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


def sampling_options(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The sampling options with which evaluations and pictures decode."""
    return resolved(type(tokenizer.objective), config.eval.sampling, "eval.sampling")


def decode_count(config: RunConfig, tokenizer: Tokenizer, total: int) -> int:
    """How many of `total` samples are decoded for the metrics."""
    wanted = config.eval.decode_samples or (DENOISED if is_denoiser(tokenizer.decoder) else total)
    return min(wanted, total)


@dataclass(frozen=True)
class Measured:
    """The metrics of a tokenizer on a data set at one size, and those of each baseline by its name."""

    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]]


@torch.no_grad()
def evaluate(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    metrics: Mapping[str, Metric],
    *,
    size: tuple[int, ...],
    weights: Callable[[str, int], float] | None,
    seed: int,
    step: int,
    decoded: Iterable[Batch] | None = None,
    sampling: Mapping[str, Any] | None = None,
    extra: Mapping[str, Modality] | None = None,
    baselines: Mapping[str, Predict] | None = None,
    files: Mapping[str, str] | None = None,
    perturb: float | None = None,
    watch: Callable[[int], None] = lambda samples: None,
) -> Measured:
    """Metrics over all samples of all processes, by name; the number of processes does not matter.

    `loss` is the sum of the model's losses, each times `weights(name, step)`; `loss/NAME` is one of them alone. With
    `weights=None` no losses are measured, and the objective needs no setup. `metric/LABEL` is a metric, and
    `metric/LABEL/PART` a part of it. `error` is the mean squared error of the values that the tokenizer sees (class
    maps: the share of wrong positions), mean over samples. `codes/...` are over the whole set. Error and metrics are
    measured on `decoded`, by default on `batches` as well; they must be set up. `sampling` are the objective's options.
    `baselines` are scored by their error, and by the metrics that suit them (`vqcore.evaluate.baseline`). `files` names
    what samples that are parts of one file have in common, by key; intervals draw files, not samples. With `perturb`,
    `perturbed/error` and `perturbed/metric/LABEL` are those of a decoding in which so large a share of the codes is
    replaced (`vqcore.evaluate.perturb`). The tokenizer must be in eval mode; its parts run in its precision. Raises
    `DataError` when there is no sample.
    """
    totals = _Totals(tokenizer, metrics, baselines or {}, files or {}, perturbs=perturb is not None)

    def decode(batch: Batch, codes: Tensor) -> None:
        variants = {"": codes}
        if perturb is not None:
            rng = sample_generators(batch.keys, seed, "eval-perturb")
            variants[NAME] = perturbed(codes, perturb, rng, _valid_cells(batch, codes))
        made = {}
        for name, each in variants.items():
            rng = sample_generators(batch.keys, seed, "eval-decode")
            made[name] = tokenizer.decode(
                each, size=size, rng=rng, extras=batch.conditions, **(sampling or {})
            )
        totals.decode(batch, made)

    for batch in batches:
        batch = tokenizer.prepare(batch, extra)
        codes = None if weights is None else _add_losses(totals, tokenizer, batch, seed, step)
        if codes is None:
            codes = tokenizer.encode(batch.x, batch.mask)
        totals.count(batch, codes)
        if decoded is None:
            decode(batch, codes)
        watch(totals.samples)
    for batch in decoded or ():
        batch = tokenizer.prepare(batch, extra)
        decode(batch, tokenizer.encode(batch.x, batch.mask))
        watch(totals.samples + totals.decoded)
    return totals.measured(None if weights is None else lambda name: weights(name, step), size)


def _add_losses(totals: "_Totals", tokenizer: Tokenizer, batch: Batch, seed: int, step: int) -> Tensor | None:
    """Add a batch's losses; returns the batch's codes if the objective returns them."""
    rng = sample_generators(batch.keys, seed, "eval")
    with tokenizer.autocast():
        out = tokenizer.objective.losses(tokenizer, batch, player="model", step=step, rng=rng, shared={})
    for name, value in out.terms.items():
        totals.add(f"loss/{name}", value.double() * len(batch.x))
    return out.codes


def errors(tokenizer: Tokenizer, x_hat: Tensor, batch: Batch) -> Tensor:
    """The error of each sample: the mean square over valid positions, for class maps the share of wrong positions.

    Values outside the declared range count as its ends.
    """
    spec = tokenizer.spec
    if spec.labels is not None:
        each = (x_hat.argmax(1, keepdim=True) != batch.x.unsqueeze(1)).double()
    else:
        x_hat = x_hat.double() if spec.range is None else x_hat.double().clamp(*spec.range)
        each = (x_hat - batch.x).square()
    return per_sample(each, batch.mask, batch.weight)


def measured(metric: Metric, tokenizer: Tokenizer, x_hat: Tensor, batch: Batch) -> Mapping[str, Tensor]:
    """A metric's sums or rows over a batch, in the units of the files if the metric asks for them."""
    pair = x_hat, batch.x
    if in_units(metric):
        pair = values(tokenizer.modality, x_hat), values(tokenizer.modality, batch.x)
    return metric.measure(*pair, batch.mask, keys=batch.keys, weight=batch.weight)


def _valid_cells(batch: Batch, codes: Tensor) -> Tensor | None:
    """Which codes of a batch belong to cells with a valid position; None if all do."""
    return None if batch.valid is None else cells(batch.valid, codes.shape[1:-1])


def _chosen(batch: Batch, which: Tensor) -> Batch:
    """Samples of a prepared batch, with all that metrics see."""
    mask, weight = (None if each is None else each[which] for each in (batch.mask, batch.weight))
    keys = tuple(key for key, one in zip(batch.keys, which.tolist()) if one)
    return Batch(batch.x[which], keys, mask, weight=weight, finished=True)


class _Totals:
    """What this process has measured: sums in double precision, rows, and counts of each code of each codebook.

    A metric stands at the place `metric/LABEL`, and at `NAME|metric/LABEL` with the baseline NAME, or with replaced
    codes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        metrics: Mapping[str, Metric],
        baselines: Mapping[str, Predict],
        files: Mapping[str, str],
        *,
        perturbs: bool = False,
    ):
        self.tokenizer, self.baselines, self.files = tokenizer, baselines, files
        self.metrics = {f"metric/{label}": metric for label, metric in metrics.items()}
        suited = {place: metric for place, metric in self.metrics.items() if of_constant(metric)}
        if perturbs:
            self.metrics |= {f"{NAME}|{place}": metric for place, metric in self.metrics.items()}
        for name in baselines:
            self.metrics |= {f"{name}|{place}": metric for place, metric in suited.items()}
        self.sums: dict[str, Tensor] = {}
        self.rows = {place: Rows() for place, metric in self.metrics.items() if gives_rows(metric)}
        self.codes = CodeCounts(tokenizer.codebook_size, tokenizer.num_codebooks)
        self.collisions = Collisions(tokenizer.codebook_size, tokenizer.num_codebooks)
        self.samples = self.decoded = 0

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum."""
        value = value.detach().double().cpu()
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone()

    def count(self, batch: Batch, codes: Tensor) -> None:
        """Add the codes of a batch; those of cells without a valid position say nothing and do not count."""
        valid = _valid_cells(batch, codes)
        self.codes.add(codes, valid)
        self.collisions.add(codes, valid)
        self.samples += len(batch.x)

    def decode(self, batch: Batch, made: Mapping[str, Tensor]) -> None:
        """Measure the reconstructions of a batch, by name, and the baselines.

        Samples without a valid position, such as a window in a gap of its record, have no error and do not count.
        """
        if batch.valid is not None:
            known = batch.valid.flatten(1).any(1)
            batch, made = _chosen(batch, known), {name: x_hat[known] for name, x_hat in made.items()}
        if not len(batch.x):
            return
        self.decoded += len(batch.x)
        guessed = {**made, **{name: predict(batch) for name, predict in self.baselines.items()}}
        for name, y in guessed.items():
            self.add(f"{name}|error".lstrip("|"), errors(self.tokenizer, y, batch).sum())
        for place, metric in self.metrics.items():
            name = place.rpartition("|")[0]
            found = measured(metric, self.tokenizer, guessed[name], batch)
            if place in self.rows:
                self.rows[place].add(batch.keys, found)
                continue
            for part, value in found.items():
                self.add(f"{place}:{part}", value)

    def measured(self, weights: Callable[[str], float] | None, size: tuple[int, ...]) -> Measured:
        """The metrics of all processes, which call this method together. Rank 0 makes them and tells the others."""
        self.add("samples", torch.tensor(float(self.samples)))
        self.add("decoded", torch.tensor(float(self.decoded)))
        sums = dist.sum_dicts(self.sums)
        if not sums["samples"]:
            raise DataError("no sample could be read for evaluation; the files are named above.")
        if not sums["decoded"]:
            raise DataError("no held-out sample has a valid position: the masks hide everything.")
        counts, places = self.codes.summed(), self.collisions.metrics()
        joined = {place: own.joined() for place, own in self.rows.items()}
        found: dict[str, float] = {}
        with dist.together():
            if dist.rank() == 0:
                values = _losses(sums, weights) | self._values(sums, joined)
                own = [name for name in sums if name == "error" or name.endswith("|error")]
                values |= {name: float(sums[name] / sums["decoded"]) for name in own}
                found = values | counts.metrics() | places | self._facts(sums, size, counts.tokens)
        found = dist.from_main(found)
        baselines = {
            name: {k.removeprefix(f"{name}|"): found.pop(k) for k in list(found) if k.startswith(f"{name}|")}
            for name in self.baselines
        }
        start = f"{NAME}|"
        return Measured({name.replace(start, f"{NAME}/"): value for name, value in found.items()}, baselines)

    def _values(
        self, sums: Mapping[str, Tensor], joined: Mapping[str, tuple[list[str], Mapping[str, Tensor]]]
    ) -> dict[str, float]:
        """The values of all metrics, and intervals of those that give rows."""
        found = dict[str, float]()
        for place, metric in self.metrics.items():
            start = f"{place}:"
            added = {k.removeprefix(start): v for k, v in sums.items() if k.startswith(start)}
            keys, own = joined.get(place, ([], added))
            values = {
                f"{place}/{name}".rstrip("/"): v
                for name, v in metric.summary(for_summary(metric, own)).items()
            }
            found |= values
            if place in joined and place.startswith("metric/") and not gathers(metric):
                for name, edges in intervals(metric, own, [self.files.get(key, key) for key in keys]).items():
                    where = f"{place}/{name}".rstrip("/")
                    if where in values:
                        found |= {f"{where}/low": edges[0], f"{where}/high": edges[1]}
        return found

    def _facts(self, sums: Mapping[str, Tensor], size: tuple[int, ...], tokens: int) -> dict[str, float]:
        """The cost of a sample, how many were measured, and what so many tokens can reach."""
        facts = self.tokenizer.facts(size)
        usage, perplexity = reachable(tokens, facts.codebook_size)
        return {
            "codes/usage_possible": usage,
            "codes/perplexity_possible": perplexity,
            "codes/tokens_per_sample": float(facts.tokens),
            "codes/bits_per_token": facts.bits_per_token,
            "codes/bits_per_pixel": facts.bits_per_position,
            "samples": float(sums["samples"]),
            "decoded": float(sums["decoded"]),
        }


def _losses(sums: Mapping[str, Tensor], weights: Callable[[str], float] | None) -> dict[str, float]:
    """The means of the losses over samples, after their weighted sum; nothing without weights."""
    if weights is None:
        return {}
    terms = {name: float(v) / float(sums["samples"]) for name, v in sums.items() if name.startswith("loss/")}
    weighted = ((weights(name.removeprefix("loss/")), value) for name, value in terms.items())
    return {"loss": math.fsum(weight * value for weight, value in weighted if weight), **terms}


def eval_batches(
    tokenizer: Tokenizer,
    config: RunConfig,
    data: Data,
    extra: Mapping[str, Modality],
    *,
    size: tuple[int, ...] | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    among: int | None = None,
    shared: bool = False,
) -> EvalBatches:
    """Batches of evaluation samples, by default at the nominal size; `limit` takes so many, spread over the set.

    `among` takes them from the samples that `limit=among` would take.

    Without `shared` every process has all these samples and reads them itself, which suits a look at a few. With
    `shared` every process has its share, read by `data.workers` processes.
    """
    size = size or tuple(tokenizer.cfg.size)
    return EvalBatches(
        at_size(data, size),
        tokenizer.modality,
        extra,
        config.data,
        size=size,
        batch_size=batch_size or config.eval.batch_size or config.data.batch_size,
        rank=dist.rank() if shared else 0,
        world=dist.world_size() if shared else 1,
        limit=limit,
        among=among,
        workers=None if shared else 0,
    )


def evaluate_data(
    tokenizer: Tokenizer,
    config: RunConfig,
    data: Data,
    extra: Mapping[str, Modality],
    size: tuple[int, ...],
    *,
    metrics: Metrics,
    step: int,
    losses: bool = True,
    baselines: Mapping[str, Predict] | None = None,
) -> Measured:
    """Measure a tokenizer on one data set at one size. Unreadable samples are skipped, named and counted.

    Raises `ConfigError` for `eval.perturb` where a sample has one token.

    If fewer samples are decoded than measured, a second pass reads and decodes them.
    """
    if config.eval.perturb is not None and tokenizer.facts(size).tokens < 2:
        raise ConfigError(
            f"eval.perturb: a sample of size {list(size)} has one token, and no other whose codes could replace it."
        )
    data = at_size(data, size)
    bad = BadSamples(data, config.data)
    total = min(len(data), config.eval.samples or len(data))
    few = decode_count(config, tokenizer, total)

    def batches(**limits: int) -> Iterator[Batch]:
        yield from _readable(
            eval_batches(tokenizer, config, data, extra, size=size, shared=True, **limits), bad
        )

    steps = total if few == total else total + few
    with ProgressLine("evaluate", -(-steps // dist.world_size()), unit="sample") as line:
        return evaluate(
            tokenizer,
            batches(limit=total),
            metrics.ready(tokenizer.device),
            size=size,
            weights=config.objective.weight if losses else None,
            seed=config.run.seed,
            step=step,
            decoded=None if few == total else batches(limit=few, among=total),
            sampling=sampling_options(config, tokenizer),
            extra=extra,
            baselines=baselines,
            files=files_of(data),
            perturb=config.eval.perturb,
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
