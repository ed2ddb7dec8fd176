"""Folders that hold a tokenizer: written beside their place, checksummed, renamed when complete; verified when read.

An artefact is `model.safetensors`, `config.yaml`, `provenance.json` and `README.md`. A checkpoint has no README.md, but
`ema.safetensors` and the training state. `provenance.json` lists the SHA-256 of every other file. `eval.json`, the
evaluation of a checkpoint, is written afterwards and is not in this list. There is no pickle, and no time, path or run
name in a safetensors header, so equal weights make equal files.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqcore.errors import CheckpointError, RunError, cause
from vqcore.files import aside, folder_aside, write_text

WEIGHTS, EMA = "model.safetensors", "ema.safetensors"

CONFIG, PROVENANCE, CARD, EVALUATION = "config.yaml", "provenance.json", "README.md", "eval.json"
FILES = (WEIGHTS, EMA, CONFIG, PROVENANCE, CARD)
"""What an artefact may consist of."""
EVALUATION = "eval.json"
"""In a checkpoint: how it was evaluated. Written after the other files, so that no checksum covers it."""
FINGERPRINT_VERSION = 2
"""Version of `Tokenizer.fingerprint`; fingerprints of other versions are not compared."""


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; the block's end flushes it to disk and renames it.

    If the block fails, `folder` does not exist afterwards. Raises `RunError` if `folder` exists already, or if another
    process has written it in the meantime.
    """
    try:
        with folder_aside(folder) as staging:
            yield staging
    except FileExistsError as error:
        raise RunError(
            f"{folder} exists already and is not overwritten. Choose another folder, or remove this one."
        ) from error
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {cause(error)}.") from error


@contextmanager
def staged(folder: Path, provenance: dict[str, Any]) -> Iterator[Path]:
    """A `complete` folder with provenance; the block's end adds the checksums of its files to the provenance."""
    with complete(folder) as staging:
        note(staging, **provenance)
        yield staging
        unsealed = (PROVENANCE, CARD)  # people and the hub edit a card
        note(staging, files={p.name: sha256(p) for p in sorted(staging.iterdir()) if p.name not in unsealed})


def note(staging: Path, **entries: Any) -> dict[str, Any]:
    """Add entries to the provenance in a staging folder; returns the whole provenance."""
    path = staging / PROVENANCE
    made = {**(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}), **entries}
    write_text(path, json.dumps(made, indent=2) + "\n")
    return made


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors, sorted by name."""
    ours = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    with aside(path) as temporary:
        try:
            save_file(ours, temporary)
        except SafetensorError as error:  # it wraps the system's error, whose number stands in the text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `CheckpointError` for a missing or damaged file."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}).") from error


def read_weights(folder: Path, weights: str = "auto") -> dict[str, Tensor]:
    """A folder's weights: `model` (as trained), `ema` (with running averages), `auto` (averages if there are any)."""
    if weights not in ("auto", "model", "ema"):
        raise CheckpointError(f"weights='{weights}' is unknown; choose auto, model or ema.")
    state = load_tensors(folder / WEIGHTS)
    if weights == "ema" and not (folder / EMA).exists():
        raise CheckpointError(f"{folder} has no running averages ({EMA}); use weights=model.")
    if weights != "model" and (folder / EMA).exists():
        state.update(load_tensors(folder / EMA))
    return state


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file with its checksum and return the provenance. Raises `CheckpointError` for a damaged file."""
    path = folder / PROVENANCE
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
        files = provenance["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: missing or damaged, so {folder.name} is not a complete tokenizer."
        ) from error
    for name, digest in files.items():
        if name == CARD:
            continue
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing.")
        if (found := sha256(folder / name)) != digest:
            raise CheckpointError(
                f"{folder / name}: damaged: the checksum of the file is {found[:16]}, but {PROVENANCE} says "
                f"{digest[:16]} (SHA-256)."
            )
    return provenance


def read_evaluation(checkpoint: Path) -> dict[str, Any]:
    """What the trainer measured of a checkpoint: step, metrics and how it measured them; empty if it did not."""
    try:
        found = json.loads((checkpoint / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_fingerprint(folder: Path, made: Mapping[str, Any], found: str) -> None:
    """Raise `CheckpointError` unless a tokenizer has the fingerprint in its provenance (checksums can be faked)."""
    if made.get("fingerprint_version") == FINGERPRINT_VERSION and made.get("fingerprint") != found:
        raise CheckpointError(
            f"{folder}: the fingerprint of this tokenizer is {found[:16]}, but {PROVENANCE} says "
            f"{str(made.get('fingerprint'))[:16]}. Weights or settings were changed after the tokenizer was saved; "
            "codes from before the change do not fit."
        )


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
