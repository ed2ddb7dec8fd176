"""Folders that hold a tokenizer: written aside, checksummed, renamed when complete; verified when read.

An artefact is `model.safetensors`, `config.yaml`, `provenance.json` and `README.md`; a checkpoint is an artefact plus
`ema.safetensors` and the training state. `provenance.json` lists the SHA-256 of every other file. No pickle anywhere,
and no time, path or run name in a safetensors header: equal weights make equal files.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqcore import __version__, card, foreign, hub
from vqcore.config import Config, dump, from_tree, to_tree
from vqcore.errors import CheckpointError, RunError, UnknownPlugin, VqcoreError, did_you_mean
from vqcore.registry import Registry, registry
from vqcore.schema import TokenizerConfig

if TYPE_CHECKING:
    from vqcore.tokenizer import Tokenizer

WEIGHTS, EMA = "model.safetensors", "ema.safetensors"
CONFIG, PROVENANCE, CARD = "config.yaml", "provenance.json", "README.md"
ORIGIN = ("components", "data", "eval", "git", "step", "eval_loss", "figures", "command")
"""Entries of the provenance that go on being true when a tokenizer is loaded and saved elsewhere."""
_STEP = re.compile(r"step_(\d+)")


@contextmanager
def staged(folder: Path, provenance: dict[str, Any]) -> Iterator[Path]:
    """A folder beside `folder` to write into; at the end it is checksummed, flushed to disk and takes its name.

    Whatever goes wrong before that, `folder` does not exist afterwards. Raises `RunError` if it does already.
    """
    if folder.exists():
        raise RunError(
            f"{folder} exists already; nothing is overwritten. Choose another folder or remove it."
        )
    staging = folder.parent / f".{folder.name}.incomplete"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        note(staging, **provenance)
        yield staging
        unsealed = (PROVENANCE, CARD)  # people edit a card, and so does the hub
        note(staging, files={p.name: _sha256(p) for p in sorted(staging.iterdir()) if p.name not in unsealed})
        for path in staging.iterdir():
            _flush(path)
        staging.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write(
    staging: Path, tokenizer: "Tokenizer", fingerprint: str, figures: Mapping[str, float], address: str = "."
) -> None:
    """Weights, config and model card of a tokenizer, into a staging folder; the provenance gets its share too.

    `figures` are those of its evaluation, `address` what the card's snippet loads.
    """
    from vqcore.tokenizer import FINGERPRINT_VERSION

    save_tensors(staging / WEIGHTS, weights_of(tokenizer))
    write_text(staging / CONFIG, dump(tokenizer.cfg))
    made = note(
        staging, fingerprint=fingerprint, fingerprint_version=FINGERPRINT_VERSION, figures=dict(figures)
    )
    write_text(staging / CARD, card.model_card(tokenizer, fingerprint, figures, made, address))


def note(staging: Path, **entries: Any) -> dict[str, Any]:
    """Add entries to the provenance of a staging folder; returns all of it."""
    path = staging / PROVENANCE
    made = {**(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}), **entries}
    write_text(path, json.dumps(made, indent=2) + "\n")
    return made


def write_text(path: Path, text: str) -> None:
    """Write a small file in one go: aside, then renamed."""
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, with a parameter that has several names (tied weights) under the first of them only."""
    once = {name for name, _ in module.named_parameters()}
    again = {name for name, _ in module.named_parameters(remove_duplicate=False)} - once
    return {name: value for name, value in module.state_dict().items() if name not in again}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors by name as safetensors, sorted by name, contiguous, on the CPU."""
    ours = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    try:
        save_file(ours, path)
    except SafetensorError as error:  # it wraps what the system says, number and all
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; `CheckpointError` names a missing or damaged one."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}).") from error


def read_weights(folder: Path, weights: str = "auto") -> dict[str, Tensor]:
    """A folder's weights: `model`, `ema` (averages of the trained parameters), or `auto`: averages if any."""
    if weights not in ("auto", "model", "ema"):
        raise CheckpointError(f"weights='{weights}': it is one of auto, model, ema.")
    state = load_tensors(folder / WEIGHTS)
    if weights == "ema" and not (folder / EMA).exists():
        raise CheckpointError(f"{folder} holds no running average ({EMA}); use weights=model.")
    if weights != "model" and (folder / EMA).exists():
        state.update(load_tensors(folder / EMA))
    return state


def read_config(folder: Path, registry_: Registry | None = None) -> TokenizerConfig:
    """An artefact's config, checked against what is installed."""
    path = folder / CONFIG
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return from_tree(tree, schema=TokenizerConfig, file=str(path), registry_=registry_)
    except UnknownPlugin as error:
        raise made_with(folder, error, registry_) from error
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error


def made_with(folder: Path, error: UnknownPlugin, registry_: Registry | None = None) -> UnknownPlugin:
    """The error with the distribution that the folder's provenance names for the first component that is missing."""
    try:
        recorded = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["components"].values()
        missing = [made for made in recorded if not _is_installed(made["name"], registry_ or registry())]
        whose = f"{missing[0]['distribution']} {missing[0]['version']}".strip()
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        return error
    told = f"{error} '{missing[0]['name']}' was of {whose}"
    if "sha256" in missing[0]:
        return UnknownPlugin(f"{told} (SHA-256 {missing[0]['sha256'][:16]}).")
    return UnknownPlugin(f"{told}: install that, then the same command goes on.")


def _is_installed(name: str, catalogue: Registry) -> bool:
    return "/" not in name or name.partition("/")[0] in catalogue.ids()


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file with its checksum and return the provenance. `CheckpointError` names what is damaged."""
    path = folder / PROVENANCE
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
        files = provenance["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: missing or damaged; {folder.name} is no complete tokenizer."
        ) from error
    for name, digest in files.items():
        if name == CARD:
            continue
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing.")
        if (found := _sha256(folder / name)) != digest:
            raise CheckpointError(
                f"{folder / name}: damaged: its checksum is not the one in {PROVENANCE} "
                f"(SHA-256 {found[:16]}, there {digest[:16]})."
            )
    return provenance


def check_fingerprint(folder: Path, made: Mapping[str, Any], found: str) -> None:
    """Refuse a tokenizer that is not the one its provenance speaks of (checksums may have been made anew)."""
    from vqcore.tokenizer import FINGERPRINT_VERSION

    if made.get("fingerprint_version") == FINGERPRINT_VERSION and made.get("fingerprint") != found:
        raise CheckpointError(
            f"{folder}: is not the tokenizer it says it is: its fingerprint is {found[:16]}, {PROVENANCE} says "
            f"{str(made.get('fingerprint'))[:16]}. Its weights or settings were changed after it was saved; codes of "
            "the one do not fit the other."
        )


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by step, ascending; complete ones, as far as their names tell."""
    folder = run / "checkpoints"
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _STEP.fullmatch(path.name))]
    return dict(sorted(found))


def score(checkpoint: Path) -> float | None:
    """The evaluation loss that a checkpoint had, or None when it was not evaluated (or cannot be read)."""
    try:
        return json.loads((checkpoint / PROVENANCE).read_text()).get("eval_loss")
    except (OSError, ValueError):
        return None


def best_step(run: Path) -> int | None:
    """The step whose checkpoint had the lowest evaluation loss, or None if none was evaluated."""
    scores = {step: found for step, path in checkpoints(run).items() if (found := score(path)) is not None}
    return min(scores, key=lambda step: (scores[step], -step)) if scores else None


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """The folder that holds the weights: an artefact or checkpoint itself, a run's best (else last) checkpoint.

    What is no path but looks like a hub id (`user/name`, `user/name@revision`) is fetched from the hub.
    """
    folder = Path(path)
    if not folder.exists():
        if (found := hub.hub_id(path)) is not None:
            fetched = hub.download(found[0], revision or found[1])
            if not (fetched / PROVENANCE).is_file():
                raise foreign.refusal(folder)
            return fetched
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise CheckpointError(
            f"{path}: there is no such run or tokenizer.{did_you_mean(folder.name, siblings)}"
        )
    if revision is not None:
        raise CheckpointError(f"{path}: is a folder; revision='{revision}' belongs to a hub id.")
    steps = checkpoints(folder)
    if steps:
        return steps[best_step(folder) or max(steps)]
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: this run has saved no checkpoint yet.")
    if (folder / PROVENANCE).is_file() or ((folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()):
        return folder
    if folder.is_file() or any(folder.glob("*.safetensors")):
        raise foreign.refusal(folder)
    raise CheckpointError(
        f"{path}: neither a run (no checkpoints/) nor a tokenizer (no {WEIGHTS}). "
        "A run folder is what `vqcore train` printed, a tokenizer what `vqcore export` wrote."
    )


def provenance(config: Any, **more: Any) -> dict[str, Any]:
    """What made this: versions, command line, git commit, and where every named component came from."""
    catalogue = registry()
    components = {}
    for path, kind, name in _named(config):
        try:
            found = catalogue.find(kind, name)
        except VqcoreError:  # built from a registry of the caller's own
            continue
        components[path] = {
            "name": name,
            "distribution": found.origin.distribution,
            "version": found.origin.version,
            "target": found.component.target,
            **({"sha256": found.origin.digest} if found.origin.digest else {}),
        }
    return {
        "vqcore": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "omegaconf": importlib.metadata.version("omegaconf"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": _git_commit(),
        "components": components,
        **({"data": _data(config), "eval": to_tree(config.eval)} if hasattr(config, "data") else {}),
        **more,
    }


def _data(config: Any) -> dict[str, Any]:
    """What a run was trained on: its data section without the modality, which the artefact's config holds."""
    return {key: value for key, value in to_tree(config.data).items() if key not in ("modality", "workers")}


def _named(config: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), f"{path}.{field.name}".lstrip(".")
        kind = field.metadata.get("slot") or field.metadata.get("slots")
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for label, part in inner:
            if dataclasses.is_dataclass(part):
                place = f"{here}.{label}" if label else here
                if kind and isinstance(part, Config):
                    yield place, kind, part.name
                yield from _named(part, place)


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "-q", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
