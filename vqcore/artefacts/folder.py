"""Folders that hold a tokenizer: written beside their place, checksummed, renamed when complete; verified when read.

An artefact is `model.safetensors`, `config.yaml`, `provenance.json` and `README.md`. A checkpoint has no README.md, but
`ema.safetensors` and the training state. `provenance.json` lists the SHA-256 of every other file, and seals itself with
a hash over all that it says. The seal is against accidents: whoever can write the folder can seal it anew. The card,
and `eval.json`, the evaluation of a checkpoint, are written or edited afterwards and not sealed. There is no pickle,
and no time, path or run name in a safetensors header, so equal weights make equal files.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqcore.errors import CheckpointError, RunError, cause, first_line
from vqcore.files import aside, folder_aside, write_text
from vqcore.reading import REAL, Each, check_memory, read_json, size_of

WEIGHTS, EMA = "model.safetensors", "ema.safetensors"

CONFIG, PROVENANCE, CARD = "config.yaml", "provenance.json", "README.md"
STATE, STATE_TENSORS = "state.json", "state.safetensors"
FILES = (WEIGHTS, EMA, CONFIG, PROVENANCE, CARD)
"""What an artefact may consist of."""
EVALUATION = "eval.json"
"""In a checkpoint: how it was evaluated. Written after the other files, so that no checksum covers it."""
FINGERPRINT_VERSION = 2
"""Version of `Tokenizer.fingerprint`; fingerprints of other versions are not compared."""
_READ = (WEIGHTS, EMA, CONFIG, STATE, STATE_TENSORS)
"""What is read of a folder, and therefore must be in the list of checksums."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MADE = {
    "files": Each(str),
    "seal": str,
    "fingerprint": str,
    "fingerprint_version": int,
    "vqcore?": str,
    "step?": int,
    "components?": Each({"name": str, "distribution": str, "version": str, "sha256?": str}),
    "borrowed?": Each({"sha256": str, "source": (str, type(None))}),
    "data?": Each(None),
    "eval?": Each(None),
    "metrics?": Each(REAL),
    "origin?": Each(None),
}
"""The shape of the provenance."""
BASELINES = {
    "baselines?": Each(Each(REAL)),
    "verdict?": [str],
}
"""What a result of an evaluation says about baselines: what each one scores, and sentences about what is wrong."""

KMEANS = {
    "bits?": REAL,
    "of_bits?": REAL,
    "patches?": int,
    "crops?": int,
    "source?": str,
    "note?": str,
    "short?": str,
}
"""How k-means was fitted, or why it was not."""

_EVALUATED = {
    "step?": int,
    "best?": (str, type(None)),
    "value?": (*REAL, type(None)),
    "better?": (str, type(None)),
    "protocol?": Each(None),
    "metrics": Each(REAL),
    "results?": [{"size": [int], "metrics": Each(REAL), **BASELINES}],
    "kmeans?": KMEANS,
}
"""The shape of the evaluation of a checkpoint."""


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
    """A `complete` folder with provenance; the block's end adds the checksums of its files, and the seal."""
    with complete(folder) as staging:
        note(staging, **provenance)
        yield staging
        unsealed = (PROVENANCE, CARD)  # people and the hub edit a card
        files = {p.name: sha256(p) for p in sorted(staging.iterdir()) if p.name not in unsealed}
        note(staging, seal=seal(note(staging, files=files)))


def note(staging: Path, **entries: Any) -> dict[str, Any]:
    """Add entries to the provenance in a staging folder; returns the whole provenance."""
    path = staging / PROVENANCE
    made = {**(read_json(path, CheckpointError, Each(None)) if path.exists() else {}), **entries}
    write_text(path, json.dumps(made, indent=2) + "\n")
    return made


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write tensors by name as safetensors, sorted by name; `header` are texts beside them."""
    ours = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    with aside(path) as temporary:
        try:
            save_file(ours, temporary, metadata=None if header is None else dict(header))
        except SafetensorError as error:  # it wraps the system's error, whose number stands in the text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `CheckpointError` for a missing or damaged file."""
    check_memory(size_of(path, CheckpointError), CheckpointError, str(path))
    try:
        return load_file(path)  # the library compares the header with the file
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({first_line(error)}).") from error


def read_weights(folder: Path, weights: str = "auto") -> dict[str, Tensor]:
    """A folder's weights: `model` (as trained), `ema` (with running averages), `auto` (averages if there are any)."""
    if weights not in ("auto", "model", "ema"):
        raise CheckpointError(f"weights='{weights}' is unknown; choose auto, model or ema.")
    state = load_tensors(folder / WEIGHTS)
    if weights == "ema" and not (folder / EMA).exists():
        raise CheckpointError(f"{folder} has no running averages ({EMA}); use weights=model.")
    if weights != "model" and (folder / EMA).exists():
        state.update(load_tensors(folder / EMA))
    refuse_nonfinite(state, folder)
    return state


def refuse_nonfinite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise `CheckpointError` for the first of some weights that holds infinity or NaN."""
    for name, value in tensors.items():
        if value.is_floating_point():
            value = value.float() if value.dtype.itemsize == 1 else value  # of 8 bits: torch has no isfinite
            if not (finite := value.isfinite()).all():
                place = (~finite).nonzero()[0].tolist()
                raise CheckpointError(
                    f"{source}: the weights {name} hold {value[tuple(place)].item()} at {place}."
                )


def seal(made: Mapping[str, Any]) -> str:
    """SHA-256 over all that a provenance says, without the seal itself."""
    content = {key: value for key, value in made.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(folder: Path, wanted: Iterable[str] = (WEIGHTS, CONFIG)) -> dict[str, Any]:
    """Compare the provenance with its seal and every file with its checksum; returns the provenance.

    The list of checksums must name the files `wanted`, and every file of the folder that is read. Raises
    `CheckpointError` for whatever is missing or damaged.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so {folder.name} is not a complete tokenizer.")
    provenance = read_provenance(folder)
    if (found := seal(provenance)) != provenance["seal"]:
        raise CheckpointError(
            f"{path}: damaged: its content has the seal {found[:16]}, but it says {provenance['seal'][:16]} (SHA-256)."
        )
    files = provenance["files"]
    for name in dict.fromkeys((*wanted, *(name for name in _READ if (folder / name).exists()))):
        if name not in files:
            raise CheckpointError(f"{path}: damaged: it has no checksum of {name}.")
    for name, digest in files.items():
        if Path(name).name != name or not _SHA256.fullmatch(digest):
            raise CheckpointError(
                f"{path}: damaged: its checksum of {name!r} is none of a file of this folder."
            )
        size_of(folder / name, CheckpointError)
        if (found := sha256(folder / name)) != digest:
            raise CheckpointError(
                f"{folder / name}: damaged: the checksum of the file is {found[:16]}, but {PROVENANCE} says "
                f"{digest[:16]} (SHA-256)."
            )
    return provenance


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a folder without a look at its seal. Raises `CheckpointError` if it has another shape."""
    return read_json(folder / PROVENANCE, CheckpointError, _MADE)


def read_evaluation(checkpoint: Path) -> dict[str, Any]:
    """What the trainer measured of a checkpoint: step, metrics and how it measured them; empty if it did not.

    A damaged file is no evaluation; training makes it again.
    """
    try:
        return read_json(checkpoint / EVALUATION, CheckpointError, _EVALUATED)
    except CheckpointError:
        return {}


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
