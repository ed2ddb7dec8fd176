"""The folder of a run: who may write there, its config, metrics.jsonl, checkpoints; saving and taking up again.

Everything is written aside and renamed: a process that is killed at any moment leaves a folder from which the run
goes on.
"""

import contextlib
import fcntl
import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqcore import artefact, dist
from vqcore.config import dump, from_tree, inline, leaves, to_tree
from vqcore.console import say
from vqcore.errors import CheckpointError, RunError, VqcoreError, listed
from vqcore.rng import seeded
from vqcore.schema import FREE_ON_RESUME, RunConfig
from vqcore.tokenizer import Tokenizer

if TYPE_CHECKING:
    from vqcore.trainer import Run

log = logging.getLogger(__name__)
STATE, STATE_TENSORS = "state.json", "state.safetensors"
METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
_LOCK = ".lock"
SHOWN = 5
"""How many settings are shown, with their values, where a folder holds another run."""


def check(config: RunConfig) -> None:
    """Raise `RunError` unless `run.dir` is free or holds this very run. Writes nothing."""
    folder = config.run.folder
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.dir={folder}: this is a file, not a folder.")
    if folder.is_dir():
        _refuse_another_run(folder, config)


@contextlib.contextmanager
def opened(config: RunConfig) -> Iterator[None]:
    """Make the folder, keep other processes out of it, and write config and provenance (rank 0 does all that)."""
    folder = config.run.folder
    with contextlib.ExitStack() as stack:
        with dist.together():
            if dist.is_main():
                try:
                    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                    stack.enter_context(_locked(folder))
                    check(config)  # again, now that nobody else can have begun
                    artefact.write_text(folder / artefact.CONFIG, dump(config))
                    if not (folder / artefact.PROVENANCE).exists():
                        made = artefact.provenance(
                            config, world_size=dist.world_size(), threads=torch.get_num_threads()
                        )
                        artefact.write_text(folder / artefact.PROVENANCE, json.dumps(made, indent=2) + "\n")
                except OSError as error:
                    raise RunError(
                        f"run.dir={folder} cannot be written: {error.strerror or error}."
                    ) from error
        yield


def log_metrics(run: "Run", figures: dict[str, float]) -> None:
    """Append a line to metrics.jsonl."""
    if dist.is_main():
        with (run.dir / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.step, **figures}) + "\n")


def log_event(run: "Run", event: str, **more: Any) -> None:
    """Append a line to events.jsonl: what went wrong or was done, when; never cut."""
    if dist.is_main():
        when = datetime.now(UTC).isoformat(timespec="seconds")
        with (run.dir / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.step, "event": event, "time": when, **more}) + "\n")


def save(run: "Run", score: float | None, fingerprint: str) -> Path:
    """Write `checkpoints/step_N` and drop old ones.

    `score` is this step's evaluation loss, if it was evaluated; `fingerprint` that of the tokenizer as it will be used,
    with the running averages if there are any.
    """
    path = run.dir / "checkpoints" / f"step_{run.step}"
    if dist.is_main():
        more = {"step": run.step, "eval_loss": score, "fingerprint": fingerprint}
        with artefact.staged(path, artefact.provenance(run.config, **more)) as staging:
            figures = run.last_evaluation if score is not None else {}
            artefact.write(staging, run.tokenizer, fingerprint, figures)
            if run.ema:
                artefact.save_tensors(staging / artefact.EMA, run.ema.averages)
            _write_state(run, staging)
        _drop_old(run)
    dist.barrier()
    return path


def resume(run: "Run") -> None:
    """Take up the newest intact checkpoint; damaged ones are named and set aside. Without any, begin at step 0."""
    with dist.together():
        if dist.is_main():
            for left in (run.dir / "checkpoints").glob(".*"):
                shutil.rmtree(left, ignore_errors=True)
            _set_damaged_aside(run.dir)
    found = artefact.checkpoints(run.dir)
    if found:
        _read_state(run, found[max(found)])
        best = artefact.best_step(run.dir)
        run.best_score = None if best is None else artefact.score(found[best])
        say(f"{run.dir}: goes on after step {run.step}.")
        log_event(run, "resumed", processes=dist.world_size())
    if dist.is_main():
        _cut_metrics(run.dir / METRICS, run.step)


def roll_back(run: "Run") -> None:
    """Make the run what its newest checkpoint says, but for how far its stream of samples has come."""
    offset, skipped = run.offset, run.skipped
    dist.barrier()
    _read_state(run, artefact.checkpoints(run.dir)[run.saved_step])
    run.offset, run.skipped = offset, skipped
    if dist.is_main():
        _cut_metrics(run.dir / METRICS, run.step)


def load_players(tokenizer: Tokenizer, checkpoint: Path) -> int:
    """Build what only training needs and fill the players' modules from a checkpoint; returns its step."""
    with seeded(0, "init", "setup"):
        tokenizer.objective.setup(tokenizer)
    if not (checkpoint / STATE).is_file():
        return 0
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    tensors = artefact.load_tensors(checkpoint / STATE_TENSORS)
    for name in state["players"]:
        prefix = f"players/{name}/module/"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if own:
            getattr(tokenizer.objective, name).load_state_dict(own)
    return state["step"]


def _refuse_another_run(folder: Path, config: RunConfig) -> None:
    path = folder / artefact.CONFIG
    if not path.exists():
        names = sorted(p.name for p in folder.iterdir() if not _is_beginning(p))
        if names:
            raise RunError(
                f"run.dir={folder} holds something else ({listed(names, 3)}). Choose another folder."
            )
        return
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise RunError(f"{path} cannot be read: {error}.") from error
    theirs = _with_defaults(saved if isinstance(saved, dict) else {})
    if differ := config_differences(config, theirs, FREE_ON_RESUME):
        there, here = dict(leaves(theirs)), dict(leaves(to_tree(config)))
        told = [f"{key} {_value(there, key)} there, {_value(here, key)} here" for key in differ[:SHOWN]]
        more = len(differ) - len(told)
        rest = f"; {more} more {'setting differs' if more == 1 else 'settings differ'}" if more else ""
        raise RunError(
            f"run.dir={folder} holds another run: {'; '.join(told)}{rest}. "
            f"Choose another run.dir, e.g. run.dir={_free(folder)}, or give that run's settings to go on with it."
        )


def _value(tree: dict[str, Any], key: str) -> str:
    text = inline(tree[key]) if key in tree else "not set"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _free(folder: Path) -> Path:
    """The first of `folder-2`, `folder-3` ... that does not exist."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in names if not path.exists())


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config as this version sees it: settings that came later have their defaults."""
    try:
        return to_tree(from_tree(saved, schema=RunConfig))
    except VqcoreError:  # it holds what is unknown here; comparing it as it is names that
        return saved


def config_differences(ours: RunConfig, saved: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    """Keys, outside the free ones, that differ between a config and a saved tree."""
    mine, theirs = dict(leaves(to_tree(ours))), dict(leaves(saved))
    keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    return [key for key in keys if not any(key == f or key.startswith(f"{f}.") for f in free)]


def _is_beginning(path: Path) -> bool:
    """Is this all that a run leaves which was killed while it made its folder?"""
    empty = path.is_dir() and not any(path.iterdir())
    return path.name == _LOCK or path.name.endswith(".incomplete") or (path.name == "checkpoints" and empty)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a record lock: the system drops it when the process ends, however it ends, and forks do not inherit it."""
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"run.dir={folder}: another process is training in this folder.") from error
        yield


def _write_state(run: "Run", folder: Path) -> None:
    tensors = {
        f"players/{name}/{key}": value
        for name, player in run.players.items()
        for key, value in player.state().items()
    }
    if run.window:
        tensors |= {f"window/{key}": value for key, value in run.window.state().items()}
    artefact.save_tensors(folder / STATE_TENSORS, tensors)
    state = {
        "step": run.step,
        "players": list(run.players),
        "loss_scales": {name: player.scaler.state_dict() for name, player in run.players.items()},
        "offset": run.offset,
        "skipped": run.skipped,
        "ema_updates": run.ema.updates if run.ema else 0,
        "world_size": dist.world_size(),
    }
    artefact.write_text(folder / STATE, json.dumps(state, indent=2) + "\n")


def _read_state(run: "Run", folder: Path) -> None:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    run.step = run.saved_step = state["step"]
    run.offset, run.skipped = state.get("offset", 0), state.get("skipped", 0)
    run.tokenizer.load_weights(folder, "model")
    tensors = artefact.load_tensors(folder / STATE_TENSORS)
    for name in state["players"]:
        prefix = f"players/{name}/"
        run.player(name).load_state(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
            state.get("loss_scales", {}).get(name, {}),
        )
    if run.ema:
        averages = artefact.load_tensors(folder / artefact.EMA)
        run.ema.averages = {name: averages[name].to(run.device) for name in run.ema.averages}
        run.ema.updates = state["ema_updates"]
    if state["world_size"] != dist.world_size():
        log.warning(
            "%s was saved by %d processes and goes on with %d: it will not end with the same bits.",
            folder,
            state["world_size"],
            dist.world_size(),
        )
    elif run.window:
        run.window.load_state(
            {k.removeprefix("window/"): v for k, v in tensors.items() if k.startswith("window/")}
        )


def _set_damaged_aside(run_dir: Path) -> None:
    found = artefact.checkpoints(run_dir)
    problems = []
    for step in sorted(found, reverse=True):
        try:
            artefact.verify(found[step])
            break
        except CheckpointError as error:
            problems.append((found[step], error))
    else:
        if problems:
            raise CheckpointError(
                f"{problems[0][1]} No intact checkpoint is left in {run_dir}; "
                "restore one, or begin anew in another run.dir."
            )
    for path, problem in problems:
        say(f"{problem} Going back to the checkpoint before it.")
        number = 1 + sum(1 for _ in path.parent.glob(f"{path.name}.damaged*"))
        path.rename(path.with_name(f"{path.name}.damaged{number}"))


def _drop_old(run: "Run") -> None:
    found = artefact.checkpoints(run.dir)
    kept = {*sorted(found)[-run.config.run.keep :], artefact.best_step(run.dir)}
    for step, path in found.items():
        if step not in kept:
            hidden = path.with_name(f".{path.name}.dropped")
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _cut_metrics(path: Path, step: int) -> None:
    """Drop lines after `step`, and a last line that was cut off: they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    artefact.write_text(path, "".join(kept))
