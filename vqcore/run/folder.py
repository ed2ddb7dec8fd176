"""The folder of a run: who may write there, its config, metrics.jsonl and events.jsonl.

Config and provenance are written beside their place and renamed: a process that is killed at any moment leaves a folder
from which the run can be resumed.
"""

import contextlib
import fcntl
import glob
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vqcore import dist
from vqcore.artefacts.folder import CONFIG, PROVENANCE
from vqcore.artefacts.provenance import provenance_of
from vqcore.compose.build import check_readable, from_tree, saved_tree
from vqcore.compose.describe import dump, inline
from vqcore.config import leaves, place_keys, to_tree
from vqcore.console import say
from vqcore.data.identity import difference, identity
from vqcore.errors import ConfigError, RunError, VqcoreError, cause, listed
from vqcore.files import is_beside, parents, write_text
from vqcore.protocols import Data
from vqcore.reading import Each, misfit, parsed, read_json
from vqcore.schema import FREE_ON_RESUME, RunConfig

log = logging.getLogger(__name__)

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"

_LOCK = ".lock"

SHOWN = 5
"""How many settings are shown, with their values, if a folder holds another run."""


def check_folder(config: RunConfig) -> list[str]:
    """Raise `RunError` unless `run.dir` is empty or holds this very run. Writes nothing.

    Returns the settings by which the samples lie elsewhere than when the run began. Raises `ConfigError` for a config
    that could not be read back from the folder.
    """
    check_readable(config, dump(config))
    return _moved(config)


def _moved(config: RunConfig) -> list[str]:
    """Raise `RunError` for what else `run.dir` may be; returns the settings by which its samples lie elsewhere."""
    folder = config.run.folder
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.dir={folder} is a file, not a folder.")
    return _refuse_another_run(folder, config) if folder.is_dir() else []


@contextlib.contextmanager
def opened(config: RunConfig, data: Data) -> Iterator[None]:
    """Make the folder, lock it, and write config and provenance; rank 0 does. `data` are the training samples."""
    folder = config.run.folder
    with contextlib.ExitStack() as stack:
        with dist.together():
            if dist.is_main():
                try:
                    with parents(folder / CONFIG):
                        stack.enter_context(_locked(folder))
                        with _whole(folder):
                            _begin(config, data)
                except OSError as error:
                    raise RunError(f"run.dir={folder} cannot be written: {cause(error)}.") from error
        yield


def _begin(config: RunConfig, data: Data) -> None:
    """Write config and provenance into the folder of a run, which this process has locked."""
    folder = config.run.folder
    moved = _moved(config)  # again, now that nobody else can have begun
    (folder / "checkpoints").mkdir(exist_ok=True)
    _clear(folder)
    _check_samples(config, data, moved)
    write_text(folder / CONFIG, dump(config))
    if not (folder / PROVENANCE).exists():
        made = provenance_of(config, world_size=dist.world_size(), threads=torch.get_num_threads())
        if config.data.locations:
            made["samples"] = identity(data, config.data.extra)
        write_text(folder / PROVENANCE, json.dumps(made, indent=2) + "\n")


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """If the block fails before anything of a run is in its folder, empty the folder."""
    try:
        yield
    except BaseException:
        left = list(folder.iterdir()) if folder.is_dir() else []
        if all(map(_is_beginning, left)):
            for each in left:
                each.rmdir() if each.is_dir() else each.unlink()
        raise


def log_metrics(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Append a line to the metrics.jsonl of a run's folder; rank 0 does."""
    if dist.is_main():
        with (folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def log_event(folder: Path, step: int, event: str, **more: Any) -> None:
    """Append a line to events.jsonl: what went wrong or was done, and when. Lines are never removed; rank 0 writes."""
    if dist.is_main():
        when = datetime.now(UTC).isoformat(timespec="seconds")
        with (folder / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "event": event, "time": when, **more}) + "\n")


def _check_samples(config: RunConfig, data: Data, moved: list[str]) -> None:
    """Raise `RunError` if the samples lie elsewhere now and are not those of the run's first start.

    A set that has grown or shrunk in its place is only said: the run goes on with the samples that are there.
    """
    path = config.run.folder / PROVENANCE
    if not config.data.locations or not path.is_file():
        there = {}
    else:
        there = read_json(path, RunError, {"samples?": Each(None)}).get("samples", {})
    if moved:
        differ = difference(there, identity(data, config.data.extra)) if there else "no record of its samples"
        if differ:
            raise RunError(
                f"run.dir={config.run.dir} was trained on other samples than those of {listed(moved)}: {differ}. Give "
                "the samples of that run, or choose another run.dir (model.full_ckpt starts from its weights)."
            )
        say(f"{config.run.dir}: the samples lie elsewhere now and are the same ({listed(moved)}).")
    elif there and there["samples"] != len(data):
        log.warning(
            "%s: there were %s samples when the run began, and there are %d now: it will not end with the same bits.",
            config.run.dir,
            there["samples"],
            len(data),
        )


def _refuse_another_run(folder: Path, config: RunConfig) -> list[str]:
    """Raise `RunError` for another run in the folder; returns the settings by which its samples have moved."""
    path = folder / CONFIG
    if not path.exists():
        names = sorted(p.name for p in folder.iterdir() if not _is_beginning(p))
        if names:
            raise RunError(
                f"run.dir={folder} holds something else ({listed(names, 3)}). Choose another folder."
            )
        return []
    try:
        theirs = _with_defaults(saved_tree(path))
    except ConfigError as error:
        raise RunError(str(error)) from error
    # Where borrowed weights lie may differ: another machine has them elsewhere. Their hashes are compared instead.
    free = (*FREE_ON_RESUME, *place_keys(config))
    differ = config_differences(config, theirs, free)
    moved = [key for key in differ if key.split(".")[1] in config.data.locations and key.startswith("data.")]
    if differ := [key for key in differ if key not in moved]:
        there, here = dict(leaves(theirs)), dict(leaves(to_tree(config)))
        told = [f"{key} {_value(there, key)} there, {_value(here, key)} here" for key in differ[:SHOWN]]
        more = len(differ) - len(told)
        rest = f"; {more} more {'setting differs' if more == 1 else 'settings differ'}" if more else ""
        raise RunError(
            f"run.dir={folder} holds another run: {'; '.join(told)}{rest}. "
            f"Choose another run.dir, e.g. run.dir={_free(folder)}, or give the same settings as that run to resume it."
        )
    return moved


def _value(tree: dict[str, Any], key: str) -> str:
    text = inline(tree[key]) if key in tree else "not set"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _free(folder: Path) -> Path:
    """The first of `folder-2`, `folder-3` ... that does not exist."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in names if not path.exists())


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config as this version reads it: settings that are new since then have their defaults."""
    try:
        return to_tree(from_tree(saved, schema=RunConfig))
    except VqcoreError:  # it holds unknown settings; the comparison names them
        return saved


def config_differences(ours: RunConfig, saved: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    """The keys that differ between a config and a saved tree, without the free keys."""
    mine, theirs = dict(leaves(to_tree(ours))), dict(leaves(saved))
    keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    return [key for key in keys if not any(key == f or key.startswith(f"{f}.") for f in free)]


def _is_beginning(path: Path) -> bool:
    """Whether a path is left from a run that was killed while it made its folder."""
    empty = path.is_dir() and not any(path.iterdir())
    return path.name == _LOCK or is_beside(path) or (path.name == "checkpoints" and empty)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a record lock: the system releases it when the process ends in any way, and forks do not inherit it."""
    with (folder / _LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"run.dir={folder}: another process is training in this folder.") from error
        if not (folder / _LOCK).exists():  # a process that could not begin has removed it
            raise RunError(f"run.dir={folder}: another process has just left this folder. Start again.")
        yield


def cut_metrics(path: Path, step: int, *, evaluated: bool) -> None:
    """Remove lines after `step`, and a last line that was cut off: resuming writes them again.

    If the checkpoint of `step` has no evaluation yet (not `evaluated`), the lines of this evaluation go, too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            found = parsed(line.decode())
        except ValueError:
            continue
        if misfit(found, {"step": int}) or found["step"] > step:
            continue
        if evaluated or found["step"] < step or not any(key.startswith("eval") for key in found):
            kept.append(line.decode())
    write_text(path, "".join(kept))


def set_aside(path: Path) -> Path:
    """Give something damaged the name `NAME.damagedN`, so that a good one can take its place; returns the new path."""
    number = 1 + sum(1 for _ in path.parent.glob(f"{glob.escape(path.name)}.damaged*"))
    return path.rename(path.with_name(f"{path.name}.damaged{number}"))


def _clear(folder: Path) -> None:
    """Set aside what lies where a file is written and is no file, such as a folder."""
    for name in (METRICS, EVENTS, PROVENANCE):
        path = folder / name
        if (path.exists() or path.is_symlink()) and not path.is_file():
            say(f"{path}: this is no file; it is now {set_aside(path).name}.")
