"""A pass over a data set into a store of shards: crash-safe, by any number of processes, always with equal bytes."""

import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vqcore import __version__, dist
from vqcore.artefacts.stored import layout_named
from vqcore.compose.describe import value_text
from vqcore.config import portable, to_tree
from vqcore.console import ProgressLine
from vqcore.data.windows import Cover, cover
from vqcore.errors import ConfigError, DataError, RunError, cause, did_you_mean, listed
from vqcore.protocols import Coded
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.crops import Drawn, check_crops, crops_of
from vqcore.tokens.flow import Batches, Done, Output
from vqcore.tokens.inputs import SHARD_SIZE, Source, source_of
from vqcore.tokens.masks import Masks
from vqcore.tokens.parts import Crop, Take, inputs
from vqcore.tokens.passes import manifest_of, refuse_file, refuse_overlap
from vqcore.tokens.precision import Encoder
from vqcore.tokens.shards import FAILED, Shards

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One tokenizer of a pass, and the store of its codes. `named` is the tokenizer as the user named it."""

    tokenizer: Tokenizer
    target: Path
    size: tuple[int, ...]
    store: str = "arrow"
    batch_size: int = 16
    stride: tuple[int, ...] | None = None
    tiles: bool = False
    named: str = ""


def tokenize_shards(
    tokenizer: Tokenizer, source: str | Path, target: Path, *, size: tuple[int, ...], **how: Any
) -> Done:
    """Write the codes of every sample of a source as a store of shards: `tokenize_all` for one tokenizer.

    The other arguments are those of `Job` and of `tokenize_all`.
    """
    own = {name: how.pop(name) for name in tuple(how) if name in Job.__dataclass_fields__}
    return tokenize_all(source, [Job(tokenizer=tokenizer, target=target, size=size, **own)], **how)[0]


def tokenize_all(
    source: str | Path,
    jobs: Sequence[Job],
    *,
    shard_size: int | None = None,
    overwrite: bool = False,
    only: Path | None = None,
    workers: int = 1,
    crops: int | None = None,
    views: str | Path | None = None,
    seed: int = 0,
    masks: str | None = None,
) -> list[Done]:
    """Write the codes of every sample of a source (`source_of`) as stores of shards, one for each tokenizer.

    Batches never span shards. Under torchrun or in a Slurm array each process does its share of the shards. A shard is
    done when all stores have it; those that are done are left alone, so that the same command goes on where another
    one was killed; `only`, a list of keys such as `failed.txt`, does their shards again. With `crops` there are so many
    rows of a sample, drawn from `seed` for the first tokenizer, the same for all; with `views` there are those of a
    store. `masks` lie beside the samples (`Masks`). Returns what became of the files, for each tokenizer. Raises
    `RunError` if a target holds other codes or takes no more data, `DataError` if no file can be read, `ConfigError`
    for what a tokenizer cannot do.
    """
    rank, ranks = dist.share()
    if (only or overwrite) and ranks > 1:
        raise ConfigError(
            f"--{'only' if only else 'overwrite'} is for one process, and this is one of {ranks}."
        )
    for job in jobs:
        refuse_file(job.target)
    found = source_of(source, jobs[0].tokenizer)
    how: dict[str, Any] = {"crops": crops, "views": views, "seed": seed, "masks": masks}
    one = Pass(found, jobs, shard_size=shard_size, workers=workers, **how)
    try:
        one.begin(overwrite=overwrite, only=only)
        mine = range(rank, len(one.pieces), ranks)
        one.skip(mine)
        with ProgressLine("tokenize", one.count(mine), unit="file") as line:
            for number in mine:
                one.do(number, line)
        one.finish()
    except ConfigError:  # a precision that will not do
        one.abandon()
        raise
    except OSError as error:
        raise not_written(error, one.written) from error
    return [lane.done for lane in one.lanes]


def not_written(error: OSError, shards: int) -> RunError:
    """What a pass says that can write no more, after so many shards."""
    return RunError(
        f"{error.filename} cannot be written: {cause(error)}. {shards} shards were finished before it; the same "
        "command goes on from there."
    )


class Pass:
    """A pass over a source into a store for each job, shard by shard.

    What a shard holds is a function of source, job and crops alone: not of who does it, when, or beside which others.
    """

    def __init__(
        self,
        source: Source,
        jobs: Sequence[Job],
        *,
        shard_size: int | None = None,
        workers: int = 1,
        crops: int | None = None,
        views: str | Path | None = None,
        seed: int = 0,
        masks: str | None = None,
    ):
        _check_jobs(source, jobs)
        self.masks = None if masks is None else Masks(masks, jobs[0].tokenizer.modality)
        if self.masks is not None:
            for job in jobs:
                self.masks.check(job.tokenizer.modality, map(source.key, range(len(source))))
        self.source, self.workers = source, workers
        self.pieces = source.shards(shard_size)
        self.names = [name for name, _ in self.pieces]
        self.crop = _crop(source, jobs, crops, views, seed)
        how = {
            "source": {"files": len(source), "sha256": source.keys_digest()},
            "shard_size": shard_size or (None if source.has_shards else SHARD_SIZE),
            **({"crops": self.crop.crops.said} if self.crop else {}),
            **({"masks": self.masks.said} if self.masks else {}),
        }
        self.lanes = [_Lane(job, source, how) for job in jobs]
        self.written = 0

    def begin(self, *, overwrite: bool = False, only: Path | None = None) -> None:
        """Open the stores. Raises `RunError` for those that hold other codes."""
        again = self.names if overwrite else _holding(only, self.source, self.pieces) if only else []
        begun: list[Shards] = []
        try:
            for lane in self.lanes:
                lane.shards = Shards(lane.job.target, lane.store, lane.manifest, self.names)
                begun.append(lane.shards)
        except RunError:  # nothing stays of stores that are new
            for shards in begun:
                if shards.made and not shards.done:
                    shards.discard()
            raise
        for lane in self.lanes:
            if again:
                lane.shards.forget(again)
            _warn_of_versions(lane.shards, lane.manifest)
            lane.there = lane.shards.done

    def count(self, numbers: Iterable[int]) -> int:
        """The files in some shards, for all tokenizers."""
        return sum(len(self.pieces[number][1]) for number in numbers) * len(self.lanes)

    def skip(self, numbers: Iterable[int]) -> None:
        """Count what is done already in some shards, and warn of files that have changed."""
        changed: list[str] = []
        for name, places in (self.pieces[number] for number in numbers):
            found = [lane for lane in self.lanes if name in lane.there]
            now = self.source.sizes_digest(places) if found else ""
            for lane in found:
                facts = lane.there[name]
                changed += [name] if facts.get("sizes", "") not in ("", now) else []
                lane.done.skipped += facts["of"] - len(facts["failed"])
                lane.done.keys += [key for key, _ in facts["failed"]]
                lane.done.failed += [reason for _, reason in facts["failed"]]
        if changed:
            log.warning(
                f"warning: files of {listed(dict.fromkeys(changed), 4)} have other sizes than when they were "
                "tokenized; their codes are kept. --only FILE, a list of their keys, or --overwrite makes new ones."
            )

    def lacks(self, number: int) -> bool:
        """Whether a store lacks a shard."""
        return any(self.names[number] not in lane.there for lane in self.lanes)

    def do(self, number: int, line: ProgressLine) -> None:
        """Do a shard for the tokenizers whose stores lack it: files in the order of the source, then write it."""
        name, places = self.pieces[number]
        lanes = {lane.take: lane for lane in self.lanes if name not in lane.there}
        if not lanes:
            return
        sizes = self.source.sizes_digest(places)
        before = {take: len(take.done.failed) for take in lanes}
        beside = self.masks.of if self.masks else None
        batch = max(lane.job.batch_size for lane in lanes.values())
        for take, item in inputs(self.source, places, list(lanes), self.workers, batch, self.crop, beside):
            lanes[take].add(lanes[take].batches.put(item))
            line.update(sum(lane.done.count for lane in self.lanes))
        for take, lane in lanes.items():
            lane.add(lane.batches.end())
            lane.encoder.settle()
            done, first = lane.done, before[take]
            failed = [list(each) for each in zip(done.keys[first:], done.failed[first:])]
            rows, lane.rows = lane.rows, []
            lane.shards.write(name, rows, {"of": len(places), "failed": failed, "sizes": sizes})
        self.written += 1
        line.update(sum(lane.done.count for lane in self.lanes))

    def abandon(self) -> None:
        """Remove stores that are begun and have no shard."""
        for lane in self.lanes:
            if not lane.shards.done:
                lane.shards.discard()

    def finish(self) -> None:
        """Complete the stores that have all shards; warn of those that have not. Raises `DataError` for empty ones."""
        empty: list[str] = []
        for lane in self.lanes:
            complete = lane.shards.finish()
            if complete is None:
                done = lane.shards.done
                missing = sum(name not in done for name in self.names)
                log.warning(
                    f"{lane.job.target}: {missing} of {len(self.names)} shards are not done: other processes are at "
                    "them, or have died. The same command does what is missing."
                )
            elif not complete["rows"]:
                lane.shards.discard()
                reason = lane.done.failed[0] if lane.done.failed else f"see {FAILED}"
                empty.append(
                    f"{self.source.where}: none of the {len(self.source)} files can be read. The first: {reason}"
                )
        if empty:
            raise DataError(empty[0])


class _Lane:
    """A tokenizer in work: its job, its store, and what became of its files."""

    shards: Shards
    there: dict[str, dict[str, Any]]

    def __init__(self, job: Job, source: Source, how: Mapping[str, Any]):
        covering = cover(job.tokenizer.modality, job.size, job.stride, tiles=job.tiles)
        self.job, self.done = job, Done(left_out=source.left_out)
        self.take = Take(job.tokenizer, job.size, covering, self.done)
        layout = layout_named(job.store, "--store")
        if not layout.has_shards:
            raise ConfigError(f"--store {layout.name} has no shards. Take another store.")
        self.store = layout.store
        self.manifest = _manifest(job, covering, {**how, "store": layout.said})
        self.encoder = Encoder(job.tokenizer)
        self.batches = Batches(self.encoder, job.batch_size, self.done)
        self.rows: list[Coded] = []

    def add(self, ready: Iterable[Output]) -> None:
        """Keep the rows of files whose parts are all done."""
        for _, finish in ready:
            self.rows += finish().coded(len(self.manifest["grid"]))
            self.done.written += 1


def _check_jobs(source: Source, jobs: Sequence[Job]) -> None:
    """Raise what is wrong with the outputs, or with tokenizers that would not take the same files."""
    first = set(jobs[0].tokenizer.modality.suffixes)
    for number, job in enumerate(jobs):
        if source.folder is not None:
            refuse_overlap(source.folder, job.target)
        if job.target.resolve() in {other.target.resolve() for other in jobs[:number]}:
            raise ConfigError(f"--also: two tokenizers write to {job.target}. Give each a folder of its own.")
        if other := first ^ set(job.tokenizer.modality.suffixes):
            raise ConfigError(
                f"--also {job.named}: it does not read the same kinds of files as the first tokenizer: one of the two "
                f"alone reads {listed(sorted(other))}. Give it a command of its own."
            )


def _crop(
    source: Source, jobs: Sequence[Job], crops: int | None, views: str | Path | None, seed: int
) -> Crop | None:
    """The crops that a command asks for. Raises `ConfigError` for tokenizers that take none."""
    if crops is None and views is None:
        return None
    flag = "--crops" if views is None else "--views"
    if crops is not None and views is not None:
        raise ConfigError(f"--crops {crops}: --views takes all crops of {views}. Leave one of the two out.")
    for job in jobs:
        covering = cover(job.tokenizer.modality, job.size, job.stride, tiles=job.tiles)
        check_crops(job.tokenizer.modality, covering, flag)
    if views is not None:
        return Crop(crops_of(views, map(source.key, range(len(source))), len(jobs[0].size)))
    first = jobs[0]
    return Crop(Drawn(first.tokenizer, first.size, crops or 1, seed), first.tokenizer)


def _manifest(job: Job, covering: Cover | None, how: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the bytes of a store, and where its tokenizer comes from."""
    tokenizer = job.tokenizer
    device = tokenizer.device
    gpu = device.type == "cuda"
    return {
        **manifest_of(tokenizer, job.size, covering),
        "layout": "the grid row by row, the codebooks of a position one after the other",
        "tokenizer": job.named,
        "modality": to_tree(portable(tokenizer.cfg.modality)),
        **how,
        "batch_size": job.batch_size,
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "vqcore": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "pillow", "pyarrow")},
        },
    }


def _warn_of_versions(shards: Shards, manifest: dict[str, Any]) -> None:
    there, here = shards.versions, manifest["versions"]
    if differ := [name for name in here if there.get(name, here[name]) != here[name]]:
        changed = listed(f"{name} {there[name]} then, {here[name]} now" for name in differ)
        log.warning(f"warning: {shards.folder} was begun with other versions ({changed}): codes may differ.")


def _holding(only: Path, source: Source, pieces: Sequence[tuple[str, range]]) -> list[str]:
    """The shards that hold the keys in a file. Raises `DataError` for a key that is not there."""
    try:
        lines = only.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"--only {only}: {cause(error)}.") from error
    wanted = [line.split("\t")[0] for line in lines if line.strip()]
    home = {source.key(index): name for name, places in pieces for index in places}
    if unknown := [key for key in wanted if key not in home]:
        hint = did_you_mean(unknown[0], home)
        raise DataError(
            f"--only {only}: no file has the key {value_text(unknown[0])} ({len(unknown)} of {len(wanted)}).{hint}"
        )
    if not wanted:
        raise DataError(f"--only {only}: the file names no key. Write one key a line.")
    return sorted({home[key] for key in wanted})
