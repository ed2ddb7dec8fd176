"""Files of other systems: finds the format that reads them, and is the only place that may read a pickle.

A component of kind `format` reads a file or folder into a config of ours and tensors under our names
(`vqcore.protocols.Foreign`); `Tokenizer.load` builds the tokenizer and fills it, exactly.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vqcore.artefacts import hub
from vqcore.config import Config
from vqcore.errors import CheckpointError, VqcoreError, listed
from vqcore.protocols import Foreign
from vqcore.registry import Registry, registry

PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".pickle")
"""Suffixes of files that Python's pickle made."""


def read_foreign(
    path: Path, format: str | Config, *, allow_pickle: bool = False, registry_: Registry | None = None
) -> Foreign:
    """What a file or folder of another system holds; `format` is a component's name or its settings."""
    catalogue = registry_ or registry()
    cfg = format if isinstance(format, Config) else _defaults(catalogue, format)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file.")
    return catalogue.build("format", cfg, "format").read(path, allow_pickle=allow_pickle)


def fetch_foreign(path: str | Path, revision: str | None, *, allow_pickle: bool) -> Path:
    """The file or folder itself, or the downloaded folder of a hub id. Pickles are downloaded only if allowed."""
    found = None if Path(path).exists() else hub.hub_id(path)
    if found is None:
        return Path(path)
    pickles = tuple(f"*{suffix}" for suffix in PICKLES) if allow_pickle else ()
    return hub.download(found[0], revision or found[1], hub.FOREIGN + pickles)


def read_pickle(path: Path, *, allow_pickle: bool, allow: Sequence[Any] = ()) -> Any:
    """The tensors and plain data of a PyTorch pickle; other classes only if they are in `allow`.

    Raises `CheckpointError` unless `allow_pickle` is true, and for pickles that hold anything else.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a PyTorch file; give the file.")
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle: Python could run code from it. If you trust its origin, give allow_pickle=True "
            "(--allow-pickle); even then only tensors and plain data are read."
        )
    try:
        with torch.serialization.safe_globals(list(allow)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} holds more than tensors and plain data and is not read ({reason[:160]})."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged, or not a PyTorch file ({error}).") from error


def refusal(path: Path) -> CheckpointError:
    """The error for a path that is no vqcore tokenizer: why nothing was read, and the command that would read it."""
    if path.is_file() and (path.parent / "provenance.json").is_file():
        return CheckpointError(f"{path} is one file of a tokenizer; give the folder: {path.parent}")
    is_pickle = path.suffix.lower() in PICKLES
    kind = "a pickle of another system" if is_pickle else "not a vqcore tokenizer"
    what = f"{path} is {kind}; nothing was read."
    more = (", allow_pickle=True", " --allow-pickle") if is_pickle else ("", "")
    names = _recognising(path)
    if not names:
        others = f"No installed format recognises it (installed: {listed(_installed()) or 'none'})."
        return CheckpointError(
            f"{what} {others} With a format that does: vqcore export {path} FOLDER --format NAME{more[1]}"
        )
    call = f"Tokenizer.load({str(path)!r}, format={names[0]!r}{more[0]})"
    command = f"vqcore export {path} FOLDER --format {names[0]}{more[1]}"
    return CheckpointError(f"{what} It looks like {names[0]}: {call}, or {command}")


def _defaults(catalogue: Registry, name: str) -> Config:
    cls: Any = catalogue.load("format", name, "format")
    return cls.Config(name=catalogue.find("format", name).name)


def _installed() -> list[str]:
    return [found.name for found in registry().components("format")]


def _recognising(path: Path) -> list[str]:
    """The installed formats that recognise a file. A broken format is left out: this is for the text of an error."""
    names = []
    for name in _installed():
        try:
            if registry().build("format", _defaults(registry(), name)).recognises(path):
                names.append(name)
        except (VqcoreError, OSError):
            continue
    return names
