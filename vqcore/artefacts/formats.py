"""Files of other systems: settings of formats, what they read and write, and the only place that may read a pickle.

A component of kind `format` reads a file or folder into a config of ours and tensors under our names
(`vqcore.protocols.Foreign`); `Tokenizer.load` builds the tokenizer and fills it, exactly.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqcore.artefacts.folder import PROVENANCE, complete, refuse_nonfinite, sha256
from vqcore.compose.build import component
from vqcore.compose.text import pairs
from vqcore.config import Config
from vqcore.errors import CheckpointError, VqcoreError, first_line, listed
from vqcore.protocols import Foreign, tokenizer_reader, tokenizer_writer
from vqcore.registry import Registry, registry

PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".pickle")
"""Suffixes of files that Python's pickle made."""
SHOWN = 8
"""So many tensors that do not fit are named; of the others the number."""
_CLASS = re.compile(r"GLOBAL ([\w.]+)")
_DETAIL = re.compile(r"WeightsUnpickler error:\s*(.+)")


def settings(
    format: str | Mapping[str, Any] | Config,
    words: Iterable[str] = (),
    *,
    file: str,
    where: str = "",
    registry_: Registry | None = None,
) -> Config:
    """The checked settings of a format, from its name or a mapping with its name; `words` are more: `key=value`.

    Errors name `file`, and keys below `where`.
    """
    if isinstance(format, Config):
        return format
    node = {"name": format} if isinstance(format, str) else dict(format)
    return component("format", {**node, **pairs(words, file)}, file=file, where=where, registry_=registry_)


def read_foreign(
    path: Path, cfg: Config, *, source: str, allow_pickle: bool = False, registry_: Registry | None = None
) -> Foreign:
    """What a file or folder of another system holds; `source` says where it comes from, without local folders."""
    reader = tokenizer_reader((registry_ or registry()).build("format", cfg, "format"))
    if reader is None:
        raise CheckpointError(
            f"{cfg.name} reads training configs, not tokenizers: vqcore import {cfg.name} {path} FILE.yaml"
        )
    return completed(reader.read(path, allow_pickle=allow_pickle), path, source=source)


def completed(found: Foreign, path: Path, *, source: str) -> Foreign:
    """What was read from `path`, with source and hash. Raises `CheckpointError` for weights that are not finite."""
    refuse_nonfinite(found.tensors, path)
    origin = {"source": source, **found.origin}
    if "sha256" not in origin:
        origin["sha256"] = digests(path)
    return replace(found, origin=origin)


def write_foreign(tokenizer: Any, folder: Path, cfg: Config) -> None:
    """Write a `Tokenizer` as files of another system into a new folder, which appears only when it is complete."""
    writer = tokenizer_writer(registry().build("format", cfg, "format"))
    if writer is None:
        raise CheckpointError(f"{cfg.name} reads files and writes none. {_others()}")
    with complete(folder) as staging:
        writer.write(tokenizer, staging)


def digests(path: Path) -> str | dict[str, str]:
    """The SHA-256 of a file; of a folder, that of each file in it by relative name."""
    if path.is_file():
        return sha256(path)
    return {p.relative_to(path).as_posix(): sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}


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
        with torch.serialization.safe_globals(list(allow)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that torch may not support; then an error follows
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything
        if found := _CLASS.search(str(error)):
            raise CheckpointError(
                f"{path} holds more than tensors and plain data: {found[1]}. So it was not read, and nothing in it ran."
            ) from error
        why = _reason(error)
        shown = f" ({why})" if " " in why else ""  # one word, as of a KeyError, says nothing
        raise CheckpointError(f"{path}: damaged, or not a PyTorch file{shown}.") from error


def _reason(error: Exception) -> str:
    """Why torch read nothing, without its advice to read the file with code, or to report the text."""
    found = _DETAIL.search(str(error))
    said = found[1] if found else first_line(error).partition(" In PyTorch 2.6")[0]
    return said.partition(" (Could this error message")[0].strip()[:160]


def refuse_misfits(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Raise `CheckpointError` that lists tensors that are missing, unknown, wrongly shaped or of another kind.

    `wanted` are the tensors that must be there, with their shapes; `where` names file and tokenizer.
    """
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name[:80]} is unknown" for name in found if name not in wanted]
    wrong += [
        f"{name} has the shape {list(found[name].shape)} instead of {list(each.shape)}"
        for name, each in wanted.items()
        if name in found and each.shape != found[name].shape
    ]
    wrong += [f"{name} holds no numbers" for name in wanted if name in found and found[name].is_meta]
    wrong += [
        f"{name} is {found[name].dtype} and not {each.dtype}"
        for name, each in wanted.items()
        if name in found and (_kind(each) != _kind(found[name]))
    ]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(f"{where}: its tensors do not fit: {'; '.join(wrong[:SHOWN])}{more}.")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    """What no conversion of numbers may change: fractions or whole numbers, and plain tensors or others."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    return tensor.is_floating_point(), tensor.is_complex(), plain


def refusal(name: str, path: Path) -> CheckpointError:
    """The error for a path that is no vqcore tokenizer: why nothing was read, and the command that would read it.

    `name` is what the user gave.
    """
    if path.is_file() and (path.parent / PROVENANCE).is_file():
        return CheckpointError(f"{name} is one file of a tokenizer; give the folder: {path.parent}")
    is_pickle = path.suffix.lower() in PICKLES
    kind = "a pickle of another system" if is_pickle else "not a vqcore tokenizer"
    what = f"{name} is {kind}; nothing was read."
    more = (", allow_pickle=True", " --allow-pickle") if is_pickle else ("", "")
    known = _recognising(path)
    names = [format_ for format_ in known if tokenizer_reader(known[format_])]
    if known and not names:
        config = next(iter(known))
        return CheckpointError(
            f"{what} It looks like a training config of {config}: vqcore import {config} {name} FILE.yaml"
        )
    if not names:
        others = f"No installed format recognises it (installed: {listed(_installed()) or 'none'})."
        return CheckpointError(
            f"{what} {others} With a format that does: vqcore import FORMAT {name} FOLDER{more[1]}"
        )
    call = f"Tokenizer.load({name!r}, format={names[0]!r}{more[0]})"
    command = f"vqcore import {names[0]} {name} FOLDER{more[1]}"
    return CheckpointError(f"{what} It looks like {names[0]}: {call}, or {command}")


def _others() -> str:
    able = [name for name in _installed() if tokenizer_writer(registry().load("format", name))]
    return f"Installed formats that write: {listed(able) or 'none'}."


def _installed() -> list[str]:
    return [found.name for found in registry().components("format")]


def _recognising(path: Path) -> dict[str, Any]:
    """The installed formats that recognise a file, by name. A broken one is left out: this is for an error's text."""
    found = {}
    for name in _installed():
        try:
            built = registry().build("format", settings(name, file="format"))
            if built.recognises(path):
                found[name] = built
        except (VqcoreError, OSError):
            continue
    return found
