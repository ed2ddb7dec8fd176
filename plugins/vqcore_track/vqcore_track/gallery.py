"""The samples on the page: the best, the median and the worst, and how often each code occurs in all of them.

Needs the checkpoint and the data. Random numbers follow from the key of a sample, so two reports of a run are equal.
Nothing here communicates with other processes: one process makes the report after the others have ended.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from vqcore import pictures
from vqcore.assembly import build_extra, lend_riders, open_data, pick_device
from vqcore.borrowed import Access
from vqcore.compose.build import from_tree
from vqcore.data.split import Split
from vqcore.errors import DataError
from vqcore.evaluate.measure import build_metrics, decode_count, eval_batches, measured, sampling_options
from vqcore.evaluate.rows import for_summary
from vqcore.evaluate.usage import CodeCounts
from vqcore.metrics.labels import Accuracy
from vqcore.metrics.pixels import MAE
from vqcore.protocols import Batch, Data, Metric, Modality, better, gathers, set_up
from vqcore.rng import sample_generators
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer, cells
from vqcore_track.record import Record

DENOISED = 32
"""Most samples to look through with a denoiser: decoding one sample takes as long as hundreds with a plain decoder."""


@dataclass(frozen=True)
class Shown:
    """One sample on the page: its group (best, median or worst), its value of the metric, its pictures."""

    key: str
    group: str
    value: float
    original: Image.Image
    reconstruction: Image.Image
    error: Image.Image
    tokens: Image.Image


@dataclass
class Gallery:
    """The samples, and the metric that orders them, by its name in an evaluation.

    `counts` says how often each code of each codebook occurs. `top` is the error that has the lightest colour, as a
    fraction of `unit` (empty for class maps). `curves` is True for samples of one axis, whose error maps are curves.
    `parts` says how many numbers each part of the model holds.
    """

    metric: str = ""
    samples: int = 0
    source: str = ""
    shown: list[Shown] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    grid: tuple[int, ...] = ()
    top: float = 0.0
    unit: str = ""
    curves: bool = False
    parts: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def collect(record: Record, limit: int, access: Access | None = None) -> Gallery:
    """Look through at most `limit` evaluation samples, or training samples if the run has no evaluation data.

    Raises a `VqcoreError` if the config, the checkpoint or the data cannot be used.
    """
    assert record.checkpoint is not None
    config = from_tree(record.config, schema=RunConfig, file=str(record.folder / "config.yaml"))
    wanted = config.run.device
    device = pick_device(None if wanted is None or wanted.startswith("cuda") else wanted)
    access = access or Access()
    tokenizer = Tokenizer.load(record.checkpoint, device, precision=config.eval.precision, **vars(access))
    facts = tokenizer.facts()
    parts = {name: part.parameters + part.buffers for name, part in facts.parts.items()}
    found = Gallery(parts=parts, grid=facts.grid)
    extra = build_extra(config, tokenizer.cfg.size)
    lend_riders(extra, access.lender(record.saved.get("borrowed", {})))
    split: Split = "eval" if config.data.evaluates else "train"
    found.source = "evaluation" if split == "eval" else "training"
    data = open_data(config, tokenizer.modality, extra, split)
    limit = min(limit, decode_count(config, tokenizer, len(data)))
    passes = _Pass(tokenizer, config, data, extra, limit)
    found.metric, metric, values, counts = _measure(passes)
    found.samples, found.counts = len(values), [book.tolist() for book in counts.by_code()]
    _show(found, passes, metric, _choice(values, _better(metric, tokenizer)))
    return found


@dataclass
class _Pass:
    """Goes through the samples batch by batch, each time it is iterated over."""

    tokenizer: Tokenizer
    config: RunConfig
    data: Data
    extra: dict[str, Modality]
    limit: int

    def __iter__(self) -> Iterator[Batch]:
        batches = eval_batches(self.tokenizer, self.config, self.data, self.extra, limit=self.limit)
        for loaded in batches:
            if loaded.batch is not None:
                yield self.tokenizer.prepare(loaded.batch, self.extra)

    def encode(self, batch: Batch) -> Tensor:
        return self.tokenizer.encode(batch.x, batch.mask)

    def decode(self, batch: Batch, codes: Tensor) -> Tensor:
        rng = sample_generators(batch.keys, self.config.run.seed, "eval-decode")
        size, sampling = tuple(self.tokenizer.cfg.size), sampling_options(self.config, self.tokenizer)
        return self.tokenizer.decode(codes, size=size, rng=rng, extras=batch.conditions, **sampling)


def _measure(passes: _Pass) -> tuple[str, Metric, dict[str, float], CodeCounts]:
    """The metric and its label, the metric of each single sample, and how often each code occurs."""
    tokenizer, found = passes.tokenizer, None
    values: dict[str, float] = {}
    counts = CodeCounts(tokenizer.codebook_size, tokenizer.num_codebooks)
    for batch in passes:
        codes = passes.encode(batch)
        x_hat = passes.decode(batch, codes)
        counts.add(codes, None if batch.valid is None else cells(batch.valid, codes.shape[1:-1]))
        for index, key in enumerate(batch.keys):
            one = _single(batch, index)
            found = found or _fitting(passes, one, x_hat[index : index + 1])
            values[key] = _value(found[1], tokenizer, one, x_hat[index : index + 1])
    if found is None:
        raise DataError("all samples are unreadable.")
    return *found, values, counts


def _fitting(passes: _Pass, batch: Batch, x_hat: Tensor) -> tuple[str, Metric]:
    """The first metric that can order single samples, and its name in an evaluation.

    Such a metric says what is better, needs no other sample, and is finite for one sample.
    """
    tokenizer = passes.tokenizer
    metrics = build_metrics(passes.config.eval.metrics, tokenizer)
    for label, metric in metrics.items():
        if better(metric) and not gathers(metric):
            set_up(metric, tokenizer.device)
            if math.isfinite(_value(metric, tokenizer, batch, x_hat)):
                return f"metric/{label}", metric
    if tokenizer.spec.labels is not None:
        return "metric/accuracy", Accuracy(Accuracy.Config(), spec=tokenizer.spec)
    return "metric/mae", MAE(MAE.Config(), spec=tokenizer.spec)


def _better(metric: Metric, tokenizer: Tokenizer) -> str:
    return better(metric) or ("lower" if tokenizer.spec.labels is None else "higher")


def _value(metric: Metric, tokenizer: Tokenizer, batch: Batch, x_hat: Tensor) -> float:
    found = for_summary(metric, measured(metric, tokenizer, x_hat, batch))
    return metric.summary(found).get("", math.nan)


def _single(batch: Batch, index: int) -> Batch:
    return batch.part(slice(index, index + 1))


def _choice(values: Mapping[str, float], better: str) -> dict[str, str]:
    """The group of each chosen sample by key: at most 3 best, 3 median and 3 worst samples, fewer of a small set."""
    keys = sorted(values, key=lambda key: (values[key] if better == "lower" else -values[key], key))
    each = min(3, max(1, len(keys) // 3))
    middle = (len(keys) - each) // 2
    groups = {"worst": keys[-each:], "median": keys[middle : middle + each], "best": keys[:each]}
    chosen = {key: group for group, members in groups.items() for key in members}
    return {key: chosen[key] for key in keys if key in chosen}


def _show(found: Gallery, passes: _Pass, metric: Metric, chosen: Mapping[str, str]) -> None:
    """Make the pictures of the chosen samples, in the order of `chosen`."""
    tokenizer = passes.tokenizer
    kept: dict[str, tuple[Batch, Tensor, Tensor]] = {}
    for batch in passes:
        for index, key in enumerate(batch.keys):
            if key in chosen and key not in kept:
                one = _single(batch, index)
                codes = passes.encode(one)
                kept[key] = one, codes, passes.decode(one, codes)
    ordered = [kept[key] for key in chosen]
    maps = pictures.token_maps(torch.cat([tokenizer.lookup(codes) for _, codes, _ in ordered]))
    wrong = [
        pictures.errors(y[0], b.x[0], None if b.mask is None else b.mask[0]).cpu() for b, _, y in ordered
    ]
    found.top, found.curves = _top(wrong, tokenizer), tokenizer.spec.rank == 1
    width = _width(tokenizer, [b.x for b, _, _ in ordered])
    if tokenizer.spec.labels is None:
        found.unit = "of the range" if tokenizer.spec.range else "of the range of the samples shown"
    for (batch, _, x_hat), tokens, each in zip(ordered, maps, wrong):
        (key,), modality = batch.keys, tokenizer.modality
        shown = x_hat[0].cpu() if tokenizer.spec.labels is None else x_hat[0].argmax(0).cpu()
        original, (mask,) = batch.x[0].cpu(), pictures.masks(batch)
        found.shown.append(
            Shown(
                key=key,
                group=chosen[key],
                value=_value(metric, tokenizer, batch, x_hat),
                original=pictures.picture(modality, original, mask=mask),
                reconstruction=pictures.picture(modality, shown, original, mask),
                error=pictures.error_picture(each, found.top),
                tokens=tokens,
            )
        )
    found.top /= width


def _top(wrong: list[Tensor], tokenizer: Tokenizer) -> float:
    """The error that gets the lightest colour: 0.5 % of the positions have a larger error."""
    if tokenizer.spec.labels is not None:
        return 1.0
    every = torch.cat([each.flatten() for each in wrong])
    return float(torch.sort(every).values[int(0.995 * (len(every) - 1))]) or 1e-12


def _width(tokenizer: Tokenizer, shown: list[Tensor]) -> float:
    if tokenizer.spec.labels is not None:
        return 1.0
    low, high = tokenizer.spec.range or (
        min(float(x.min()) for x in shown),
        max(float(x.max()) for x in shown),
    )
    return (high - low) or 1.0
