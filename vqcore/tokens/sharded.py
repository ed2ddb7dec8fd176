"""A pass over a data set into a store of shards: crash-safe, by any number of processes, always with equal bytes."""

import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vqcore import __version__, dist
from vqcore.artefacts.codes import as_rows
from vqcore.artefacts.stored import store_named
from vqcore.config import portable, to_tree
from vqcore.console import ProgressLine
from vqcore.data.windows import Cover, cover
from vqcore.errors import ConfigError, DataError, RunError, cause, did_you_mean, listed
from vqcore.protocols import Coded
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.passes import (
    Done,
    encoded,
    files_of,
    inputs,
    manifest_of,
    refuse_file,
    refuse_overlap,
    through,
)
from vqcore.tokens.shards import FAILED, Shards

log = logging.getLogger(__name__)

SHARD_SIZE = 4096
"""Files in a shard."""


def tokenize_shards(
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    *,
    size: tuple[int, ...],
    store: str = "arrow",
    batch_size: int = 16,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    only: Path | None = None,
    stride: tuple[int, ...] | None = None,
    tiles: bool = False,
    workers: int = 1,
    named: str = "",
) -> Done:
    """Write the codes of every file below `source` (or of one file) as a store of shards; `named` is the tokenizer.

    Batches never span shards. Under torchrun or in a Slurm array each process does its share of the shards. Shards that
    are done are left alone, so that the same command goes on where another one was killed; `only`, a list of keys such
    as `failed.txt`, does their shards again. Raises `RunError` if `target` holds other codes or takes no more data,
    `DataError` if no file can be read, `ConfigError` for a size that the encoder cannot take.
    """
    rank, ranks = dist.share()
    if (only or overwrite) and ranks > 1:
        raise ConfigError(
            f"--{'only' if only else 'overwrite'} is for one process, and this is one of {ranks}."
        )
    refuse_file(target)
    refuse_overlap(source, target)
    covering = cover(tokenizer.modality, size, stride, tiles=tiles)
    files, left_out = files_of(source, tokenizer.modality.suffixes, "tokenize")
    lists = [files[first : first + shard_size] for first in range(0, len(files), shard_size)]
    manifest = _manifest(tokenizer, files, size, covering, store, batch_size, shard_size, named)
    with_path = store_named(store, "--store")
    done = Done(left_out=left_out)
    written = 0
    try:
        shards = Shards(target, with_path, manifest, len(lists))
        if overwrite:
            shards.forget(shards.names)
        elif only:
            shards.forget(_holding(only, lists, shards.names))
        _warn_of_versions(shards, manifest)
        there = shards.done
        mine = [number for number in range(len(lists)) if number % ranks == rank]
        todo = [number for number in mine if shards.names[number] not in there]
        changed: list[str] = []
        for number in sorted(set(mine) - set(todo)):
            facts = there[shards.names[number]]
            if facts.get("sizes", "") not in ("", _sizes(lists[number])):
                changed.append(shards.names[number])
            done.skipped += facts["of"] - len(facts["failed"])
            done.keys += [key for key, _ in facts["failed"]]
            done.failed += [reason for _, reason in facts["failed"]]
        if changed:
            log.warning(
                f"warning: files of {listed(changed, 4)} have other sizes than when they were tokenized; "
                "their codes are kept. --only FILE, a list of their keys, or --overwrite makes new ones."
            )
        with ProgressLine("tokenize", sum(len(lists[number]) for number in mine), unit="file") as line:
            for number in todo:
                _do(tokenizer, lists[number], shards, number, size, covering, batch_size, workers, done, line)
                written += 1
        complete = shards.finish()
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be written: {cause(error)}. {written} shards were finished before it; the same "
            "command goes on from there."
        ) from error
    if complete is None:
        missing = sum(name not in shards.done for name in shards.names)
        log.warning(
            f"{target}: {missing} of {len(lists)} shards are not done: other processes are at them, or have died. The "
            "same command does what is missing."
        )
    elif not complete["rows"]:
        shards.discard()
        reason = done.failed[0] if done.failed else f"see {FAILED}"
        raise DataError(f"{source}: none of the {len(files)} files can be read. The first: {reason}")
    return done


def _do(
    tokenizer: Tokenizer,
    files: Sequence[tuple[Path, str]],
    shards: Shards,
    number: int,
    size: tuple[int, ...],
    covering: Cover | None,
    batch_size: int,
    workers: int,
    done: Done,
    line: ProgressLine,
) -> None:
    """Encode the files of a shard, in the order of the list, and write it."""
    rows: list[Coded] = []
    sizes = _sizes(files)
    count, axes = len(done.failed), len(tokenizer.grid(size))
    parts = inputs(tokenizer, files, size, covering, done, workers)
    for file, finish in through(parts, partial(encoded, tokenizer), batch_size, done):
        rows += as_rows(file.key, finish(), axes)
        done.written += 1
        line.update(done.written + done.skipped + len(done.failed))
    failed = [list(each) for each in zip(done.keys[count:], done.failed[count:])]
    shards.write(shards.names[number], rows, {"of": len(files), "failed": failed, "sizes": sizes})
    line.update(done.written + done.skipped + len(done.failed))


def _sizes(files: Sequence[tuple[Path, str]]) -> str:
    """A hash of the numbers of bytes of files."""
    digest = hashlib.sha256()
    for path, _ in files:
        try:
            digest.update(b"%d\0" % path.stat().st_size)
        except OSError:
            digest.update(b"-\0")
    return digest.hexdigest()


def _manifest(
    tokenizer: Tokenizer,
    files: Sequence[tuple[Path, str]],
    size: tuple[int, ...],
    covering: Cover | None,
    store: str,
    batch_size: int,
    shard_size: int,
    named: str,
) -> dict[str, Any]:
    """What decides the bytes of a store, and where its tokenizer comes from."""
    digest = hashlib.sha256()
    for _, key in files:
        digest.update(os.fsencode(key) + b"\0")
    device = tokenizer.device
    gpu = device.type == "cuda"
    return {
        **manifest_of(tokenizer, size, covering),
        "store": store,
        "layout": "the grid row by row, the codebooks of a position one after the other",
        "tokenizer": named,
        "modality": to_tree(portable(tokenizer.cfg.modality)),
        "source": {"files": len(files), "sha256": digest.hexdigest()},
        "shard_size": shard_size,
        "batch_size": batch_size,
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


def _holding(only: Path, lists: Sequence[Sequence[tuple[Path, str]]], names: Sequence[str]) -> list[str]:
    """The shards that hold the keys in a file. Raises `DataError` for a key that is not there."""
    try:
        lines = only.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"--only {only}: {cause(error)}.") from error
    wanted = [line.split("\t")[0] for line in lines if line.strip()]
    home = {key: name for files, name in zip(lists, names) for _, key in files}
    if unknown := [key for key in wanted if key not in home]:
        hint = did_you_mean(unknown[0], home)
        raise DataError(
            f"--only {only}: no file has the key '{unknown[0]}' ({len(unknown)} of {len(wanted)}).{hint}"
        )
    if not wanted:
        raise DataError(f"--only {only}: the file names no key. Write one key a line.")
    return sorted({home[key] for key in wanted})
