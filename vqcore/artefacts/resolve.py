"""From what a user names (a run, a checkpoint, an artefact, a hub id) to the folder that holds the weights."""

import re
from pathlib import Path

from vqcore.artefacts import hub
from vqcore.artefacts.folder import CONFIG, PROVENANCE, WEIGHTS
from vqcore.artefacts.formats import refusal
from vqcore.errors import CheckpointError, did_you_mean

_STEP = re.compile(r"step_(\d+)")


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by step, ascending. Only complete checkpoints have such names."""
    folder = run / "checkpoints"
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _STEP.fullmatch(path.name))]
    return dict(sorted(found))


def best_step(run: Path, best: str | None) -> int | None:
    return None


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """The folder with the weights: an artefact or a checkpoint itself; of a run its best checkpoint, else the last.

    A hub id (`user/name`, `user/name@revision`) that is no existing path is fetched from the hub. Raises
    `CheckpointError` for everything else.
    """
    folder = Path(path)
    if not folder.exists():
        if (found := hub.hub_id(path)) is not None:
            fetched = hub.download(found[0], revision or found[1])
            if not (fetched / PROVENANCE).is_file():
                raise refusal(folder)
            return fetched
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"{path}: no such run or tokenizer.{did_you_mean(folder.name, siblings)}")
    if revision is not None:
        raise CheckpointError(f"{path} is a folder; revision='{revision}' is for hub ids only.")
    steps = checkpoints(folder)
    if steps:
        return steps[best_step(folder, None) or max(steps)]
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: this run has no checkpoint yet.")
    if (folder / PROVENANCE).is_file() or ((folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()):
        return folder
    if folder.is_file() or any(folder.glob("*.safetensors")):
        raise refusal(folder)
    raise CheckpointError(
        f"{path} is neither a run (it has no checkpoints/) nor a tokenizer (it has no {WEIGHTS}). "
        "Give the run folder that `vqcore train` printed, or a folder that `vqcore export` wrote."
    )
