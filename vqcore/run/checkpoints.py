"""Checkpoints of a run: saving, resuming, rolling back."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqcore import dist
from vqcore.artefacts.folder import EMA, load_tensors, save_tensors, staged, verify
from vqcore.artefacts.provenance import provenance_of
from vqcore.artefacts.resolve import best_step, checkpoints
from vqcore.console import say
from vqcore.errors import CheckpointError
from vqcore.files import write_text
from vqcore.rng import seeded
from vqcore.run.folder import METRICS, cut_metrics, log_event
from vqcore.run.state import Run
from vqcore.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STATE, STATE_TENSORS = "state.json", "state.safetensors"


def save(run: Run, score: float | None, evaluation: Mapping[str, float]) -> Path:
    """Write `checkpoints/step_N` and remove old ones.

    `score` is this step's evaluation loss and `evaluation` its metrics, if it was evaluated.
    """
    with run.as_evaluated():
        fingerprint = run.tokenizer.fingerprint
    path = run.dir / "checkpoints" / f"step_{run.step}"
    if dist.is_main():
        more = {"step": run.step, "eval_loss": score, "fingerprint": fingerprint}
        with staged(path, provenance_of(run.config, **more)) as staging:
            run.tokenizer.write(staging, fingerprint, evaluation)
            if run.ema:
                save_tensors(staging / EMA, run.ema.averages)
            _write_state(run, staging)
        _drop_old(run)
    dist.barrier()
    run.progress.saved = run.step
    return path


def resume(run: Run) -> None:
    """Resume from the newest intact checkpoint; without checkpoints begin at step 0. Damaged ones are set aside."""
    with dist.together():
        if dist.is_main():
            for left in (run.dir / "checkpoints").glob(".*"):
                shutil.rmtree(left, ignore_errors=True)
            _set_damaged_aside(run.dir)
    found = checkpoints(run.dir)
    if found:
        _read_state(run, found[max(found)])
        say(f"{run.dir}: resumed after step {run.step}.")
        log_event(run.dir, run.step, "resumed", processes=dist.world_size())
    if dist.is_main():
        cut_metrics(run.dir / METRICS, run.step)


def roll_back(run: Run) -> None:
    """Set the run back to its newest checkpoint; the stream of samples and the count of skipped steps stay."""
    kept = replace(run.progress)
    dist.barrier()
    _read_state(run, checkpoints(run.dir)[kept.saved])
    run.progress.offset, run.progress.skipped = kept.offset, kept.skipped
    if dist.is_main():
        cut_metrics(run.dir / METRICS, run.step)


def load_players(tokenizer: Tokenizer, checkpoint: Path, seed: int) -> int:
    """Build the modules that only training needs and fill them from a checkpoint; returns the checkpoint's step.

    `seed` is that of the run: what an objective draws in `setup` is the same as in training.
    """
    with seeded(seed, "init", "setup"):
        tokenizer.objective.setup(tokenizer)
    if not (checkpoint / STATE).is_file():
        return 0
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    tensors = load_tensors(checkpoint / STATE_TENSORS)
    for name in state["players"]:
        prefix = f"players/{name}/module/"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if own:
            getattr(tokenizer.objective, name).load_state_dict(own)
    return state["step"]


def _write_state(run: Run, folder: Path) -> None:
    tensors = {
        f"players/{name}/{key}": value
        for name, player in run.players.items()
        for key, value in player.state().items()
    }
    tensors |= {f"window/{key}": value for key, value in run.window.state().items()}
    save_tensors(folder / STATE_TENSORS, tensors)
    state = {
        "step": run.step,
        "players": list(run.players),
        "loss_scales": {name: player.scaler.state_dict() for name, player in run.players.items()},
        "offset": run.progress.offset,
        "skipped": run.progress.skipped,
        "ema_updates": run.ema.updates if run.ema else 0,
        "world_size": dist.world_size(),
    }
    write_text(folder / STATE, json.dumps(state, indent=2) + "\n")


def _read_state(run: Run, folder: Path) -> None:
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    run.progress.step = run.progress.saved = state["step"]
    run.progress.offset, run.progress.skipped = state["offset"], state["skipped"]
    run.tokenizer.load_weights(folder, "model")
    tensors = load_tensors(folder / STATE_TENSORS)
    for name in state["players"]:
        prefix = f"players/{name}/"
        run.player(name).load_state(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
            state["loss_scales"].get(name, {}),
        )
    if run.ema:
        averages = load_tensors(folder / EMA)
        run.ema.averages = {name: averages[name].to(run.device) for name in run.ema.averages}
        run.ema.updates = state["ema_updates"]
    if state["world_size"] != dist.world_size():
        log.warning(
            "%s was saved by %d processes and goes on with %d: it will not end with the same bits.",
            folder,
            state["world_size"],
            dist.world_size(),
        )
    else:
        run.window.load_state(
            {k.removeprefix("window/"): v for k, v in tensors.items() if k.startswith("window/")}
        )


def _set_damaged_aside(run_dir: Path) -> None:
    found = checkpoints(run_dir)
    problems = []
    for step in sorted(found, reverse=True):
        try:
            verify(found[step])
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
        say(f"{problem} Using the checkpoint before it.")
        number = 1 + sum(1 for _ in path.parent.glob(f"{path.name}.damaged*"))
        path.rename(path.with_name(f"{path.name}.damaged{number}"))


def _drop_old(run: Run) -> None:
    found = checkpoints(run.dir)
    kept = {*sorted(found)[-run.config.run.keep :], best_step(run.dir, run.config.eval.best)}
    for step, path in found.items():
        if step not in kept:
            hidden = path.with_name(f".{path.name}.dropped")
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
