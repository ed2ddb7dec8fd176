"""The files of 4M: training checkpoints, published folders and single safetensors files, checked for their form."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqcore.artefacts.folder import load_tensors
from vqcore.artefacts.formats import PICKLES, read_pickle
from vqcore.errors import CheckpointError, first_line, listed
from vqcore.reading import read_json
from vqcore_fourm.arguments import ARGUMENTS, DIVAE, VQCONTROLNET

CONFIG, WEIGHTS, NOTE = "config.json", "model.safetensors", "vqcore.json"
LONGEST = 10_000
"""A longer text in the header of a safetensors file is no argument."""


@dataclass(frozen=True)
class Source:
    """Tensors by 4M's names, and the arguments of the class, or with `options` those of a training script.

    `note` is what vqcore wrote beside a tokenizer that it exported.
    """

    tensors: Mapping[str, Tensor]
    given: Mapping[str, Any]
    options: bool = False
    epoch: int | None = None
    note: Mapping[str, Any] | None = None


def read_source(path: Path, *, ema: bool, allow_pickle: bool) -> Source:
    """Read a source of any form. Raises `CheckpointError` for what is damaged or is something else."""
    if path.is_dir():
        found = _folder(path)
    elif path.suffix.lower() in PICKLES:
        return _training(path, ema=ema, allow_pickle=allow_pickle)
    elif path.suffix.lower() == ".safetensors":
        found = _one_file(path)
    else:
        raise CheckpointError(
            f"{path}: no file of 4M's tokenizers; expected a checkpoint .pth, a .safetensors, or a folder with "
            f"{CONFIG} and {WEIGHTS}."
        )
    if ema:
        raise CheckpointError(f"{path}: ema=true is for training checkpoints (.pth); leave it out.")
    return found


def _training(path: Path, *, ema: bool, allow_pickle: bool) -> Source:
    content = read_pickle(path, allow_pickle=allow_pickle, allow=[argparse.Namespace])
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "args" not in content:
        raise CheckpointError(
            f"{path}: no training checkpoint of 4M; such a file holds a dictionary with model and args."
        )
    args = content["args"]
    options = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise CheckpointError(f"{path}: args is no set of options, but a {type(args).__name__}.")
    key = "model_ema" if ema else "model"
    if not isinstance(content.get(key), dict):
        raise CheckpointError(f"{path}: has no averaged weights (model_ema); leave ema=true out.")
    epoch = content.get("epoch")
    return Source(_tensors(content[key], path), options, True, epoch if type(epoch) is int else None)


def _tensors(found: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    wrong = [
        str(name)[:60]
        for name, value in found.items()
        if not isinstance(value, Tensor) or type(name) is not str
    ]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]} in its weights is no tensor with a name.")
    return found


def _folder(path: Path) -> Source:
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    if missing:
        pickles = sorted(p.name for p in path.iterdir() if p.suffix.lower() in PICKLES)
        hint = f" To read {pickles[0]}, give this file, not the folder." if pickles else ""
        raise CheckpointError(f"{path}: no published tokenizer of 4M: it lacks {listed(missing)}.{hint}")
    try:
        given = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / CONFIG}: damaged or no JSON ({first_line(error)}).") from error
    if not isinstance(given, dict):
        raise CheckpointError(f"{path / CONFIG}: no configuration, but a {type(given).__name__}.")
    return Source(load_tensors(path / WEIGHTS), given, note=_note(path))


def _note(folder: Path) -> dict[str, Any] | None:
    path = folder / NOTE
    return read_json(path, CheckpointError, {"tokenizer": dict, "origin": dict}) if path.is_file() else None


def _one_file(path: Path) -> Source:
    tensors = load_tensors(path)
    try:
        with safe_open(path, "pt") as opened:
            header = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({first_line(error)}).") from error
    given = {}
    for name in header.keys() & {**ARGUMENTS, **DIVAE, **VQCONTROLNET}.keys():
        text = header[name]
        try:
            # Python writes tuples with parentheses, which YAML takes as text.
            plain = (
                text.replace("(", "[").replace(")", "]") if name.endswith(("size", "_dec", "_enc")) else text
            )
            given[name] = text if len(text) > LONGEST else yaml.safe_load("null" if text == "None" else plain)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise CheckpointError(
                f"{path}: {name} in its header is no plain value ({first_line(error)[:120]})."
            ) from error
    if not given:
        beside = f" Its folder has a {CONFIG}: give the folder." if (path.parent / CONFIG).is_file() else ""
        raise CheckpointError(f"{path}: its header holds no configuration of a tokenizer of 4M.{beside}")
    return Source(tensors, given, note=_note(path.parent) if path.name == WEIGHTS else None)
