"""From what a user names (a run, a checkpoint, an artefact, a hub id, files of another system) to what lies there.

`parse` is the one parser of all such names, `resolve` finds the folder or file. A name is one of:

* an existing path, whatever it looks like;
* `RUN@step_N`, a checkpoint of an existing run;
* `hf://user/name` or `hf://user/name@revision`, on the Hugging Face hub;
* `FORMAT:PATH` or `FORMAT[key=value,...]:PATH`, files of another system. FORMAT is an installed format, PATH a path or
  `hf://...`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vqcore.artefacts import hub
from vqcore.artefacts.folder import CONFIG, PROVENANCE, WEIGHTS, read_evaluation
from vqcore.artefacts.formats import PICKLES, refusal, settings
from vqcore.compose.build import saved_tree
from vqcore.compose.text import bracketed
from vqcore.config import Config
from vqcore.errors import CheckpointError, ConfigError, UnknownName, did_you_mean, listed
from vqcore.files import local
from vqcore.registry import Registry, registry

_STEP = re.compile(r"step_(\d+)")
_AT_STEP = re.compile(r"(.+)@step_(\d+)")
_PREFIX = re.compile(r"(([a-z][a-z0-9]*/[a-z][a-z0-9-]*)(?:\[.*?\])?):(.+)", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """A name, taken apart. `path` is a local path, or with `hub` a hub id.

    `revision` belongs to a hub id and `step` to a run. `format` has the settings of the format that reads the path.
    """

    path: str
    hub: bool = False
    revision: str | None = None
    step: int | None = None
    format: Config | None = None


@dataclass(frozen=True)
class Named:
    """What a name stands for: a folder with a tokenizer of ours, or with `format` a file or folder of another system.

    `why` says which checkpoint of a run it is and why: "step 300, the best by metric/psnr (24.5)"; it is empty for
    everything else. `source` is where it comes from, without local folders: a file's name, or `hf://user/name@commit`.
    """

    name: str
    path: Path
    why: str = ""
    source: str = ""
    format: Config | None = None

    @property
    def run(self) -> Path | None:
        """The folder of the run, if the name stands for a checkpoint in one."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else None

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


def parse(name: str, registry_: Registry | None = None) -> Place:
    """Take a name apart. Raises `CheckpointError` for a wrong hub id, `ConfigError` for wrong settings of a format."""
    prefixed = with_prefix(name)
    if prefixed and _is_format(prefixed[0].partition("[")[0], registry_):
        cfg = settings(bracketed(prefixed[0], name), file=name, registry_=registry_)
        return replace(locate(prefixed[1]), format=cfg)
    found = None if _exists(name) else _AT_STEP.fullmatch(name)
    if found and _is_run(_path(found[1])):
        return Place(found[1], step=int(found[2]))
    return locate(name)


def with_prefix(name: str) -> tuple[str, str] | None:
    """`PLUGIN/NAME[key=value,...]:PATH` in two parts. None for every other name, and for a path that exists."""
    found = None if _exists(name) else _PREFIX.fullmatch(name)
    return (found[1], found[3]) if found else None


def locate(name: str) -> Place:
    """The place of a path or of `hf://user/name@revision`."""
    if _exists(name) or not name.startswith(hub.PREFIX):
        return Place(name)
    id = hub.hub_id(name)
    if id is None:
        raise CheckpointError(f"{name} is no hub id; write hf://user/name or hf://user/name@revision.")
    return Place(id[0], hub=True, revision=id[1])


def resolve(
    name: str | Path,
    revision: str | None = None,
    *,
    format: str | Mapping[str, Any] | Config | None = None,
    allow_pickle: bool = False,
    registry_: Registry | None = None,
) -> Named:
    """What a name stands for; files on the hub are downloaded, pickles only with `allow_pickle`.

    Of a run it is the last checkpoint, or the best one if the run's `eval.best` names a metric. `format`, a name or
    settings, reads the path as `FORMAT:PATH` does. Raises `CheckpointError` if there is no such thing.
    """
    text = str(name)
    if format is None:
        place = parse(text, registry_)
    else:
        cfg = settings(format, file="format", registry_=registry_)
        place = replace(locate(text), format=cfg)
    if place.hub:
        return _downloaded(text, replace(place, revision=revision or place.revision), allow_pickle)
    path = _path(place.path)
    if not path.exists():
        raise _missing(text, place, registry_)
    if revision is not None:
        raise CheckpointError(f"{text} is no hub id; revision='{revision}' is for hub ids only.")
    if place.format is not None:
        return Named(text, path, source=path.resolve().name, format=place.format)
    return _of_ours(text, path, place.step)


def _of_ours(text: str, folder: Path, step: int | None) -> Named:
    steps = checkpoints(folder)
    if step is not None:
        if step not in steps:
            raise CheckpointError(
                f"{text}: {folder} has no checkpoint of step {step}. It has: {listed(map(str, steps)) or 'none'}."
            )
        return Named(text, steps[step], f"step {step}, as named")
    if steps:
        chosen, why = _that_counts(folder, max(steps))
        return Named(text, steps[chosen], why)
    if _is_run(folder):
        raise CheckpointError(f"{text}: this run has no checkpoint yet.")
    if (folder / PROVENANCE).is_file() or ((folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()):
        of_run = _STEP.fullmatch(folder.name) if folder.parent.name == "checkpoints" else None
        return Named(text, folder, f"step {of_run[1]}, as named" if of_run else "")
    if folder.is_file() or any(folder.glob("*.safetensors")):
        raise refusal(text, folder)
    raise CheckpointError(
        f"{text} is neither a run (it has no checkpoints/) nor a tokenizer (it has no {WEIGHTS}). "
        "Give the run folder that `vqcore train` printed, or a folder that `vqcore export` wrote."
    )


def _downloaded(text: str, place: Place, allow_pickle: bool) -> Named:
    pickles = tuple(f"*{suffix}" for suffix in PICKLES) if allow_pickle else ()
    patterns = hub.FILES if place.format is None else hub.FOREIGN + pickles
    folder = hub.download(place.path, place.revision, patterns)
    if place.format is None and not (folder / PROVENANCE).is_file():
        raise refusal(text, Path(place.path))
    # huggingface_hub names the folder of a snapshot after the commit.
    return Named(text, folder, source=f"{hub.PREFIX}{place.path}@{folder.name}", format=place.format)


def _missing(text: str, place: Place, registry_: Registry | None) -> CheckpointError:
    """The error for a path that does not exist, with the nearest right name."""
    path = _path(place.path)
    what = "no such run or tokenizer" if place.format is None else "no such file"
    if hint := did_you_mean(
        path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    ):
        return CheckpointError(f"{text}: {what}.{hint}")
    if (found := _AT_STEP.fullmatch(place.path)) and not _exists(found[1]):
        return _missing(text, Place(found[1]), registry_)
    if hub.hub_id(place.path) and not _exists(place.path.partition("/")[0]):
        named = text.removesuffix(place.path)
        return CheckpointError(
            f"{text}: {what}. If it is on the Hugging Face hub: {named}{hub.PREFIX}{place.path}"
        )
    if place.format is None and (found := _PREFIX.fullmatch(text)):
        try:
            (registry_ or registry()).find("format", found[2])
        except UnknownName as error:
            return CheckpointError(f"{text}: {what}, and {error}")
    return CheckpointError(f"{text}: {what}.")


def _is_format(name: str, registry_: Registry | None) -> bool:
    try:
        (registry_ or registry()).find("format", name)
    except UnknownName:
        return False
    return True


def _path(text: str) -> Path:
    return local(text)


def _exists(text: str) -> bool:
    try:
        return _path(text).exists()
    except (OSError, ValueError):  # longer than any name, or with a NUL
        return False


# The checkpoints of a run


@dataclass(frozen=True)
class Best:
    """The best checkpoint of a run: its step, the value that decided, and which direction is better."""

    step: int
    value: float
    better: str


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by step, ascending. Only complete checkpoints have such names."""
    folder = run / "checkpoints"
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _STEP.fullmatch(path.name))]
    return dict(sorted(found))


def best_checkpoint(run: Path, best: str | None) -> Best | None:
    """The best checkpoint by the metric or loss `best`; None if no checkpoint has a value, or `best` is None.

    Checkpoints are compared that were evaluated as the newest evaluation was (`protocol` in their `eval.json`). NaN is
    no value; of equal values the later one wins.
    """
    found = {step: read_evaluation(path) for step, path in checkpoints(run).items()}
    evaluated = {step: one for step, one in found.items() if one}
    if best is None or not evaluated:
        return None
    protocol = evaluated[max(evaluated)].get("protocol")
    scores = [
        Best(step, one["value"], one["better"])
        for step, one in evaluated.items()
        if one.get("best") == best
        and one.get("protocol") == protocol
        and isinstance(one.get("value"), (int, float))
        and not math.isnan(one["value"])
        and one.get("better") in ("higher", "lower")
    ]
    return max(scores, key=lambda s: (s.value if s.better == "higher" else -s.value, s.step), default=None)


def best_step(run: Path, best: str | None) -> int | None:
    """The step of `best_checkpoint`, or None."""
    found = best_checkpoint(run, best)
    return None if found is None else found.step


def _that_counts(run: Path, last: int) -> tuple[int, str]:
    """The step of the checkpoint that a run stands for, and why: the best by `eval.best`, else the last."""
    best = _asked(run)
    if best is None:
        return last, f"step {last}, the last checkpoint"
    found = best_checkpoint(run, best)
    if found is None:
        return last, f"step {last}, the last checkpoint, because no checkpoint was evaluated by {best}"
    return found.step, f"step {found.step}, the best by {best} ({found.value:.4g})"


def _asked(run: Path) -> str | None:
    """The run's `eval.best`."""
    if not (run / CONFIG).is_file():
        return None
    try:
        section = saved_tree(run / CONFIG).get("eval")
    except ConfigError as error:
        raise CheckpointError(
            f"{error} So nobody knows which checkpoint of this run counts; name one: {run}@step_N"
        ) from error
    return section.get("best") if isinstance(section, dict) else None


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()
