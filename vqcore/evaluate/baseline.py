"""What a tokenizer must beat: a constant prediction, and k-means on patches with as many bits.

The constant is the same for every sample and at every position: each channel's mean over the first training samples,
or for class maps the most frequent class. A run adds it up from the samples that it trains on. `kmeans` says what the
other baseline is; it is fitted to crops of the run's own training stream. Both are scored in the same pass as the
tokenizer. What k-means scored is kept in the folder of the run.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from vqcore import dist
from vqcore.config import to_tree
from vqcore.data.batches import collate
from vqcore.data.identity import identity
from vqcore.data.order import Order
from vqcore.data.reader import Reader, Sample
from vqcore.errors import CheckpointError
from vqcore.evaluate import kmeans
from vqcore.evaluate.compare import protocol
from vqcore.evaluate.kmeans import KMeans
from vqcore.evaluate.measure import Predict
from vqcore.files import write_text
from vqcore.protocols import Batch, Data, DataSpec, Modality, is_mask
from vqcore.reading import REAL, Each, read_json
from vqcore.rng import generator, numpy_generator
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

FILE = "baseline.json"
SAMPLES = 512
"""Number of samples from which the constant is computed: the first ones in training. Smaller sets are used whole."""
SECONDS = 60.0
"""Most time that k-means may take."""
SHARE = 0.05
"""Most of the time of a run that k-means may take at its end."""
WANTED = 20
"""Patches for each centre that k-means is fitted to, where the memory and the training set have so many."""
AT_LEAST = 2**15
"""Patches that k-means is fitted to even if it has few centres."""
MOST_VALUES = 2**26
"""Most values of all these patches (256 MiB)."""
_BATCH = 8
_SHAPE = Each({"scores": Each(Each(Each(REAL))), "facts": Each(None), "note": str})


class Constant:
    """Adds up the constant prediction from prepared batches, up to `SAMPLES` samples.

    With `shared`, each process adds its share of the samples, in batches of one size, and `everywhere` joins them.
    """

    def __init__(self, spec: DataSpec, *, shared: bool = False):
        self.spec, self.shared, self.samples = spec, shared, 0
        self.sums = torch.zeros(spec.out_channels, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        """Add a batch, unless there are enough samples."""
        if self.samples >= SAMPLES:
            return
        self.samples += len(batch.x) * (dist.world_size() if self.shared else 1)
        x = batch.x.detach().cpu()
        valid = torch.ones(len(x), *x.shape[-self.spec.rank :], dtype=torch.bool)
        valid = valid if batch.valid is None else batch.valid.cpu()
        if self.spec.labels is not None:
            sums = torch.bincount(x[valid].flatten(), minlength=self.spec.labels)
        else:
            kept = x.double().where(rearrange(valid, "b ... -> b 1 ..."), 0.0)
            sums = reduce(kept, "b c ... -> c", "sum")
        if sums.isfinite().all():  # a run may leave out steps with broken samples
            self.sums += sums
            self.count += valid.sum()

    def everywhere(self) -> "Constant":
        """The sums of all processes, which call this method together."""
        total = dist.sum_dicts({"sums": self.sums, "count": self.count})
        found = Constant(self.spec)
        found.samples, found.sums, found.count = self.samples, total["sums"], total["count"]
        return found

    def value(self) -> Float[Tensor, " c"] | None:
        """One number for each channel of a decoder's output; None if there was no valid position.

        For class maps the numbers are logits: 1 for the most frequent class, 0 for the others.
        """
        if not self.count:
            return None
        if self.spec.labels is not None:
            return torch.nn.functional.one_hot(self.sums.argmax(), self.spec.labels).float()
        return (self.sums / self.count).float()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"sums": self.sums, "count": self.count, "samples": torch.tensor(self.samples)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the `state` of all processes: rank 0 takes the sums. Raises `ValueError` for other channels."""
        if state["sums"].shape != self.sums.shape:
            raise ValueError(f"{len(state['sums'])} sums for {len(self.sums)} channels")
        self.samples = int(state["samples"])
        share = 1.0 if dist.is_main() or not self.shared else 0.0
        self.sums, self.count = state["sums"] * share, state["count"] * share


def constant_of(batches: Iterable[Batch], spec: DataSpec) -> Float[Tensor, " c"] | None:
    """The constant of prepared batches; None when they have no valid position."""
    found = Constant(spec)
    for batch in batches:
        found.add(batch)
    return found.value()


@dataclass(frozen=True)
class Baselines:
    """What is scored beside a tokenizer.

    `constant` has one number for each channel of a decoder's output. `guesses` has k-means by input size. `scores` has
    what was scored before, by input size and baseline. `facts` say how k-means was fitted, `note` why it was not.
    """

    constant: Float[Tensor, " c"] | None = None
    guesses: Mapping[tuple[int, ...], KMeans] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def at(self, size: tuple[int, ...]) -> dict[str, Predict]:
        """The baselines that are still to score at a size."""
        found: dict[str, Predict] = {}
        if self.constant is not None:
            constant = self.constant
            found["constant"] = lambda batch: _everywhere(constant, batch, len(size))
        if size in self.guesses:
            found["k-means"] = self.guesses[size]
        return found

    def joined(
        self, size: tuple[int, ...], scores: Mapping[str, Mapping[str, float]]
    ) -> dict[str, dict[str, float]]:
        """All scores at a size: new ones, and those from before."""
        found = {**self.scores.get(_name(size), {}), **scores}
        return {name: dict(found[name]) for name in sorted(found)}

    def scored(self, scores: Mapping[tuple[int, ...], Mapping[str, Mapping[str, float]]]) -> "Baselines":
        """The same baselines, with nothing left to score."""
        return Baselines(
            scores={_name(size): each for size, each in scores.items()}, facts=self.facts, note=self.note
        )


def _everywhere(values: Float[Tensor, " c"], batch: Batch, rank: int) -> Tensor:
    """One value a channel at every position."""
    size = batch.x.shape[-rank:]
    return values.to(batch.x.device).view(1, -1, *[1] * rank).expand(len(batch.x), -1, *size)


def _name(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


@dataclass(frozen=True)
class Source:
    """The samples that baselines are fitted to, with their extra modalities, and the name of their set."""

    data: Data
    extra: Mapping[str, Modality]
    name: str = "training"


def first_crops(
    tokenizer: Tokenizer, config: RunConfig, source: Source, count: int, *, until: float
) -> Iterator[Batch]:
    """The first `count` crops of the training stream at the nominal size, prepared; each one is different.

    They are fewer if an epoch brings nothing new, or if the moment `until` of `time.monotonic` is over. Unreadable
    samples are left out. This process alone reads.
    """
    masks = {label: each for label, each in source.extra.items() if is_mask(each)}
    size, samples, seed = tuple(tokenizer.cfg.size), len(source.data), config.run.seed
    reader = Reader(source.data, tokenizer.modality, masks, config.data.cache_mib, size)
    order = Order(source.data, seed)
    seen, held, position, last = set[bytes](), list[Sample](), 0, 0
    while len(seen) < count and position - last <= samples and time.monotonic() < until:
        epoch = position // samples
        index = order(epoch, position % samples)
        sample = reader.try_read(index, size, numpy_generator(seed, "view", epoch, index))
        position += 1
        if not isinstance(sample, Sample):
            continue
        mark = hashlib.blake2b(sample.x.numpy().tobytes(), digest_size=16).digest()
        if mark in seen:
            continue
        seen.add(mark)
        held.append(sample)
        last = position
        if len(held) == _BATCH:
            yield tokenizer.prepare(collate(held))
            held = []
    if held:
        yield tokenizer.prepare(collate(held))


def patch_of(tokenizer: Tokenizer, size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The sides of the patch that a token stands for at a size; None where tokens are no patches of numbers."""
    grid = tokenizer.grid(size)
    fits = len(grid) == len(size) and all(n % g == 0 for n, g in zip(size, grid))
    if not fits or tokenizer.spec.kind not in ("continuous", "binary"):
        return None
    return tuple(n // g for n, g in zip(size, grid))


@dataclass(frozen=True)
class _Plan:
    """The patches of the sizes that k-means is for, and how many crops they come from; `note` if there are none."""

    patches: Mapping[tuple[int, ...], tuple[int, ...]]
    values: int = 0
    crops: int = 0
    how: kmeans.Split = kmeans.Split(1, 2)
    note: str = ""


def _plan(tokenizer: Tokenizer, sizes: Sequence[tuple[int, ...]]) -> _Plan:
    facts, nominal = tokenizer.facts(), tokenizer.cfg.size
    if tokenizer.spec.kind not in ("continuous", "binary"):
        return _Plan({}, note=f"no k-means: it is not for data of kind {tokenizer.spec.kind}")
    found = {size: patch for size in sizes if (patch := patch_of(tokenizer, size))}
    fitting = {size: patch for size, patch in found.items() if not any(n % p for n, p in zip(nominal, patch))}
    if not fitting:
        what = (
            f"the grid {_name(facts.grid)} does not divide samples of {_name(facts.size)} into equal patches"
        )
        return _Plan({}, note=f"no k-means: {what}")
    values = tokenizer.spec.channels * max(map(math.prod, fitting.values()))
    how = kmeans.split(facts.bits_per_token, values, MOST_VALUES // values)
    if how is None:
        return _Plan({}, note=f"no k-means: a patch has {values:,} values, which is too many")
    count = min(max(WANTED * how.centres, AT_LEAST), MOST_VALUES // values)
    return _Plan(fitting, values, -(-count // facts.tokens), how)


def fitted(
    tokenizer: Tokenizer,
    config: RunConfig,
    source: Source,
    sizes: Sequence[tuple[int, ...]],
    constant: Float[Tensor, " c"] | None,
    *,
    budget: float | None = None,
) -> Baselines:
    """The baselines of a tokenizer, with k-means for these sizes. This process alone works.

    A constant that is not known yet comes from the same crops. After `SECONDS` k-means has to do with fewer patches or
    fewer steps. With a `budget` in seconds, it is left out if a first look says that it would take longer.
    """
    began = time.monotonic()
    plan = _plan(tokenizer, sizes)
    crops = max(plan.crops, SAMPLES if constant is None else 0)
    batches = list[Batch]()
    for batch in first_crops(tokenizer, config, source, crops, until=began + SECONDS / 2):
        batches.append(batch.to(torch.device("cpu")))  # prepared, and kept where there is room
        if budget is not None and len(batches) == 1:
            reading = (time.monotonic() - began) / len(batch.x) * crops
            needed = reading + _fitting_seconds(tokenizer, plan)
            if needed > budget:
                long = f"about {needed:.2g} s are more than {SHARE:.0%} of the run"
                return Baselines(
                    constant, note=f"k-means at equal bits is left out: {long}; vqcore eval measures it"
                )
    constant = constant_of(batches, tokenizer.spec) if constant is None else constant
    if constant is None:
        return Baselines(note=f"no baseline: no value of the {source.name} samples could be read")
    guesses, facts = dict[tuple[int, ...], KMeans](), dict[str, Any]()
    for shape in dict.fromkeys(plan.patches.values()):
        rows = torch.cat([_rows(batch, constant, shape) for batch in batches]).to(tokenizer.device)
        how = kmeans.split(tokenizer.facts().bits_per_token, rows.shape[1], len(rows))
        if how is None:
            continue
        rng = generator(config.run.seed, "baseline", "k-means")
        centres, steps = kmeans.fit(rows, how, rng, until=began + SECONDS)
        guess = KMeans(shape, tuple(each.cpu() for each in centres), constant, steps)
        guesses |= {size: guess for size, patch in plan.patches.items() if patch == shape}
        facts = facts or {"bits": how.bits, "patches": len(rows), "steps": steps, "short": how.short}
    if not guesses:
        few = f"no k-means: the {source.name} set has fewer than {2 * kmeans.PER_CENTRE} patches"
        return Baselines(constant, note=plan.note or few)
    facts |= {"of_bits": tokenizer.facts().bits_per_token, "crops": sum(len(batch.x) for batch in batches)}
    facts |= {"source": source.name, "seconds": round(time.monotonic() - began, 1)}
    return Baselines(constant, guesses, facts=facts)


def _rows(batch: Batch, fill: Float[Tensor, " c"], patch: tuple[int, ...]) -> Float[Tensor, "n d"]:
    """The patches of a batch that have a valid position."""
    rows = kmeans.cut(kmeans.filled(batch, fill), patch)
    return rows if batch.valid is None else rows[kmeans.shown(batch.valid, patch)]


def _fitting_seconds(tokenizer: Tokenizer, plan: _Plan) -> float:
    """About how long `kmeans.fit` takes: a small part of one step is made, and its time is multiplied."""
    width, centres = max(1, plan.values // plan.how.groups), min(plan.how.centres, 256)
    rows = torch.zeros(4096, width, device=tokenizer.device)
    took = []
    for _ in range(3):  # the first one prepares more than a step needs, and a busy machine delays some
        began = time.monotonic()
        float(kmeans.nearest(rows, rows[:centres])[1].sum())  # reading a number waits for a GPU
        took.append(time.monotonic() - began)
    part = plan.crops * tokenizer.facts().tokens / len(rows) * plan.how.centres / centres * plan.how.groups
    return min(took) * part * (kmeans.STEPS + 1)


def cache_key(
    tokenizer: Tokenizer,
    config: RunConfig,
    data: Data,
    sizes: Sequence[tuple[int, ...]],
    loans: Mapping[str, Mapping[str, Any]],
) -> str:
    """SHA-256 of all that decides what k-means scores: the samples, their crops, patches, bits, and how it is scored.

    The samples of the evaluation count by names, sizes and some contents, training samples by the settings of the data.
    """
    total = min(len(data), config.eval.samples or len(data))
    same = identity(data, config.data.extra)
    # Without the metrics' own facts: those that score a baseline have none before they are set up.
    how = protocol(
        config, tokenizer, {}, loans=loans, set_hash=json.dumps(same), total=total, count=total, sizes=sizes
    )
    grids = [[list(size), list(tokenizer.grid(size))] for size in sizes]
    facts = tokenizer.facts()
    rest = [
        to_tree(config.data),
        list(facts.size),
        facts.bits_per_token,
        grids,
        config.run.seed,
        kmeans.STEPS,
    ]
    return hashlib.sha256(json.dumps([how, rest], sort_keys=True, default=str).encode()).hexdigest()


def kept(folder: Path, key: str, constant: Float[Tensor, " c"] | None) -> Baselines | None:
    """The baselines with what k-means scored before, from a run's folder; None if this is not known."""
    found = _file(folder).get(key)
    return None if found is None else Baselines(constant, {}, found["scores"], found["facts"], found["note"])


def keep(folder: Path, key: str, found: Baselines) -> None:
    """Add what k-means scored to the file in a run's folder; this process writes."""
    scores = {
        size: {name: dict(values) for name, values in each.items() if name == "k-means"}
        for size, each in found.scores.items()
    }
    entry = {"scores": scores, "facts": dict(found.facts), "note": found.note}
    write_text(folder / FILE, json.dumps({**_file(folder), key: entry}, indent=2) + "\n")


def _file(folder: Path) -> dict[str, Any]:
    """The file as it stands; empty if it is missing or damaged: then k-means is simply fitted again."""
    try:
        return dict(read_json(folder / FILE, CheckpointError, _SHAPE)) if (folder / FILE).exists() else {}
    except CheckpointError:
        return {}
