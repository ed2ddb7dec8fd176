"""Checkpoints of a run: saving, resuming, rolling back."""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqcore import dist
from vqcore.artefacts.folder import (
    CONFIG,
    EMA,
    EVALUATION,
    STATE,
    STATE_TENSORS,
    WEIGHTS,
    load_tensors,
    note,
    read_evaluation,
    read_provenance,
    refuse_nonfinite,
    save_tensors,
    staged,
    verify,
)
from vqcore.artefacts.provenance import provenance_of
from vqcore.artefacts.resolve import best_step, checkpoints
from vqcore.borrowed import Lender, compare_loans
from vqcore.console import say
from vqcore.errors import CheckpointError, listed, reason
from vqcore.evaluate.baseline import Constant
from vqcore.files import sweep, write_text
from vqcore.protocols import DataSpec, Objective
from vqcore.reading import REAL, Each, read_json
from vqcore.run.folder import METRICS, cut_metrics, log_event, set_aside
from vqcore.run.players import check_held, fill_held, held
from vqcore.run.start import refuse_other_codes
from vqcore.run.state import Run, set_up
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_STATE = {
    "step": int,
    "players": [str],
    "first_steps": Each((int, type(None))),
    "loss_scales": Each(Each(REAL)),
    "offset": int,
    "skipped": int,
    "ema_updates": int,
    "world_size": int,
    "threads": int,
    "tensors": Each([int]),
}
"""The shape of `state.json`; `tensors` has the shape of each tensor of `state.safetensors`."""


def save(run: Run) -> Path:
    """Write `checkpoints/step_N` and remove old ones. An evaluation is added afterwards (`add_evaluation`)."""
    check_held(run.config, run.objective, run.player_names, run.tokenizer, run.held)
    with run.as_evaluated():
        fingerprint = run.tokenizer.fingerprint
    path, constant = checkpoint_of(run), run.constant.everywhere()
    if dist.is_main():
        with staged(path, provenance_of(run.config, step=run.step)) as staging:
            run.tokenizer.write(staging, fingerprint)
            note(staging, borrowed=run.loans)
            if run.ema:
                save_tensors(staging / EMA, run.ema.averages)
            _write_state(run, constant, staging)
        _drop_old(run)
    dist.barrier()
    run.progress.saved = run.step
    return path


def checkpoint_of(run: Run) -> Path:
    """The folder of the checkpoint of the present step, which need not exist."""
    return run.dir / "checkpoints" / f"step_{run.step}"


def is_evaluated(run: Run) -> bool:
    """Whether the checkpoint of the present step has its evaluation."""
    return bool(read_evaluation(checkpoint_of(run)))


def add_evaluation(run: Run, evaluation: Mapping[str, Any]) -> None:
    """Write `eval.json` into the checkpoint of the present step, if there is one; remove old checkpoints."""
    if dist.is_main() and checkpoint_of(run).is_dir():
        write_text(checkpoint_of(run) / EVALUATION, json.dumps(evaluation, indent=2) + "\n")
        _drop_old(run)
    dist.barrier()


def resume(run: Run) -> None:
    """Resume from the newest intact checkpoint; without checkpoints begin at step 0. Damaged ones are set aside."""
    with dist.together():
        if dist.is_main():
            for folder in (run.dir, *(each for each in run.dir.iterdir() if each.is_dir())):
                sweep(folder)
            for left in (run.dir / "checkpoints").glob(".*.dropped"):
                shutil.rmtree(left, ignore_errors=True)
            _set_damaged_aside(run.dir)
    found = checkpoints(run.dir)
    if found:
        _read_state(run, found[max(found)])
        refuse_other_codes(run.tokenizer, run.data)
        say(f"{run.dir}: resumed after step {run.step}.")
        log_event(run.dir, run.step, "resumed", processes=dist.world_size())
    if dist.is_main():
        cut_metrics(run.dir / METRICS, run.step, evaluated=is_evaluated(run))


def roll_back(run: Run) -> None:
    """Set the run back to its newest checkpoint; the stream of samples and the count of skipped steps stay."""
    kept = replace(run.progress)
    dist.barrier()
    _read_state(run, checkpoints(run.dir)[kept.saved])
    run.progress.offset, run.progress.skipped = kept.offset, kept.skipped
    if dist.is_main():
        cut_metrics(run.dir / METRICS, run.step, evaluated=is_evaluated(run))


def load_training(tokenizer: Tokenizer, checkpoint: Path, config: RunConfig, lender: Lender) -> None:
    """Build the modules that only training needs and fill them from a checkpoint.

    The modules are in eval mode. Raises `CheckpointError` if weights that they borrow are missing.
    """
    set_up(tokenizer, config, lender, anew=True)
    objective: Any = tokenizer.objective
    if isinstance(objective, nn.Module):
        objective.eval()
    if not (checkpoint / STATE).is_file():
        return
    state, tensors = _state_of(checkpoint)
    with _fitting(checkpoint):
        for name in state["players"]:
            if name != "model":
                getattr(objective, name).eval()
    _fill_held(objective, state["players"], tokenizer, tensors, checkpoint)


def constant_in(checkpoint: Path, spec: DataSpec) -> Tensor | None:
    """The constant prediction that a run has added up until a checkpoint; None for weights without such a state."""
    if not (checkpoint / STATE).is_file():
        return None
    _, tensors = _state_of(checkpoint)
    found = Constant(spec)
    with _fitting(checkpoint):
        found.load_state(_below("constant/", tensors))
    return found.value()


def _write_state(run: Run, constant: Constant, folder: Path) -> None:
    tensors = {
        f"players/{name}/{key}": value
        for name, player in run.players.items()
        for key, value in player.state().items()
    }
    tensors |= held(run.objective, run.players, run.tokenizer)
    tensors |= {f"window/{key}": value for key, value in run.window.state().items()}
    tensors |= {f"constant/{key}": value for key, value in constant.state().items()}
    save_tensors(folder / STATE_TENSORS, tensors)
    state = {
        "step": run.step,
        "players": list(run.players),
        "first_steps": {name: player.first for name, player in run.players.items()},
        "loss_scales": {name: player.scaler.state_dict() for name, player in run.players.items()},
        "offset": run.progress.offset,
        "skipped": run.progress.skipped,
        "ema_updates": run.ema.updates if run.ema else 0,
        "world_size": dist.world_size(),
        "threads": torch.get_num_threads(),
        "tensors": {name: list(value.shape) for name, value in sorted(tensors.items())},
    }
    write_text(folder / STATE, json.dumps(state, indent=2) + "\n")


def _read_state(run: Run, folder: Path) -> None:
    state, tensors = _state_of(folder)
    run.progress.step = run.progress.saved = state["step"]
    run.progress.offset, run.progress.skipped = state["offset"], state["skipped"]
    compare_loans(folder, read_provenance(folder).get("borrowed", {}), run.loans)
    run.tokenizer.load_weights(folder, "model")
    _fill_held(run.objective, run.player_names, run.tokenizer, tensors, folder)
    with _fitting(folder):
        for name in state["players"]:
            player = run.player(name)
            player.load_state(_below(f"players/{name}/", tensors), state["loss_scales"].get(name, {}))
            player.first = state["first_steps"][name]
        run.constant.load_state(_below("constant/", tensors))
    if run.ema:
        averages, own = load_tensors(folder / EMA), run.ema.averages
        refuse_nonfinite(averages, folder / EMA)
        if {k: v.shape for k, v in averages.items()} != {k: v.shape for k, v in own.items()}:
            raise CheckpointError(f"{folder / EMA}: these are no averages of the weights of this run.")
        run.ema.averages = {name: averages[name].to(run.device) for name in own}
        run.ema.updates = state["ema_updates"]
    if state["world_size"] != dist.world_size():
        log.warning(
            "%s was saved by %d processes and goes on with %d: it will not end with the same bits.",
            folder,
            state["world_size"],
            dist.world_size(),
        )
        return
    if run.device.type == "cpu" and state["threads"] != torch.get_num_threads():
        log.warning(
            "%s was saved with %d threads and goes on with %d: it will not end with the same bits. run.threads sets "
            "their number.",
            folder,
            state["threads"],
            torch.get_num_threads(),
        )
    with _fitting(folder):
        run.window.load_state(_below("window/", tensors))


def _state_of(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of training in a checkpoint: plain data and tensors. Raises `CheckpointError`."""
    state: dict[str, Any] = read_json(checkpoint / STATE, CheckpointError, _STATE)
    tensors = load_tensors(checkpoint / STATE_TENSORS)
    ours, theirs = state["tensors"], {name: list(value.shape) for name, value in tensors.items()}
    differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differ:
        raise CheckpointError(
            f"{checkpoint / STATE_TENSORS}: its tensors are not those that {STATE} names: {listed(differ, 4)}."
        )
    return state, tensors


@contextmanager
def _fitting(checkpoint: Path) -> Iterator[None]:
    """A state that was saved by another run, or was changed by hand, makes torch raise various errors."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{checkpoint}: the state of training does not fit this run ({reason(error)})."
        ) from error


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _fill_held(
    objective: Objective,
    players: Iterable[str],
    tokenizer: Tokenizer,
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    theirs = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith("objective/") or (name.startswith("players/") and name.split("/")[2] == "module")
    }
    wrong = fill_held(objective, players, tokenizer, theirs)
    if wrong:
        raise CheckpointError(
            f"{folder}: the training state does not fit this objective and its players: {listed(wrong, 4)}. Their code "
            "or settings have changed since the checkpoint was saved."
        )


def _set_damaged_aside(run_dir: Path) -> None:
    found = checkpoints(run_dir)
    problems = []
    for step in sorted(found, reverse=True):
        try:
            verify(found[step], (WEIGHTS, CONFIG, STATE, STATE_TENSORS))
            _state_of(found[step])
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
        set_aside(path)


def _drop_old(run: Run) -> None:
    found = checkpoints(run.dir)
    kept = {*sorted(found)[-run.config.run.keep :], best_step(run.dir, run.config.eval.best)}
    for step, path in found.items():
        if step not in kept:
            hidden = path.with_name(f".{path.name}.dropped")
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
