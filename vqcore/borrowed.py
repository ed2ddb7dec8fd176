"""Weights that are not ours: a frozen base, a teacher, the network of a perceptual loss.

A module that uses such weights declares them (`vqcore.protocols.Borrows`). For authors of such modules: `read` reads a
file of weights and gives its SHA-256, `fill` fills a module from such a file. For the rest of vqcore: a `Lender` lets
every module borrow, freezes what was borrowed and compares hashes; `weights_of` is a module's state without anything
borrowed.

A key names what is borrowed by its place in the tokenizer, such as `decoder.base` or `objective.percept.clip.net`. The
beginning of a key stands for the key if only one thing is borrowed there. Where the files lie is no part of a saved
tokenizer: it keeps the hash, and `hf://id@revision` if the weights come from there.
"""

import hashlib
import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqcore.artefacts import hub
from vqcore.artefacts.folder import load_tensors
from vqcore.artefacts.formats import read_pickle
from vqcore.data.remembered import place_of, recall, remember
from vqcore.errors import CheckpointError, PluginLoadError, VqcoreError, did_you_mean, listed
from vqcore.files import local
from vqcore.network import asked, asking, closed_unless_asked
from vqcore.protocols import Borrows, borrowed

_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB = "hf://"


class MissingWeights(CheckpointError):
    """Weights that a module borrows are not where they should be, or are not the ones that were recorded."""

    key = ""
    """What is missing, e.g. `decoder.base`."""


class NotThere(CheckpointError):
    """A folder or repository that can be read has no such file."""


@dataclass(frozen=True)
class Access:
    """What loading may use besides the named files.

    `borrowed` says where borrowed weights lie, by key. With `download`, borrowed weights that are missing are fetched
    from the hub. With `allow_pickle`, files of other systems may be pickles.
    """

    borrowed: Mapping[str, str] = field(default_factory=dict)
    download: bool = False
    allow_pickle: bool = False

    def lender(self, recorded: Mapping[str, Mapping[str, Any]] | None = None) -> "Lender":
        """A lender with these places; `recorded` is what a saved tokenizer's provenance says of borrowed weights."""
        return Lender(self.borrowed, recorded, download=self.download)


# For modules that borrow


def read(place: str | Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file of weights by name, and their SHA-256.

    `place` is a `.safetensors` file, a `.pth` file of plain tensors (read with `weights_only=True`), a folder with
    `.safetensors` files, or `hf://user/name[@revision][#path/in/it]`. The hub is asked only with `--download`; without,
    the cache of huggingface_hub must hold the files. The hash covers sorted names, types, shapes and bytes as stored.
    Raises `CheckpointError` for a missing or damaged file, and for a pickle with anything but tensors and plain data.
    """
    path = found(str(place))
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path}: this folder has no .safetensors file")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _tensors(file).items():
            if name in tensors:
                names = listed((one.name for one in files), 4)
                raise CheckpointError(f"{path}: two files have a tensor '{name}'; give one of them: {names}")
            tensors[name] = tensor
    return tensors, _sha256(tensors, files)


def fill(module: nn.Module, place: str | Path | None) -> str:
    """Fill a module with the tensors at a place (`read`), which must fit exactly; returns their SHA-256.

    Raises `CheckpointError` as `read` does, and if `place` is None or the tensors do not fit.
    """
    if place is None:
        raise CheckpointError("no place is known for these weights")
    tensors, digest = read(place)
    own = module.state_dict()
    wrong = [name for name in own if name not in tensors or own[name].shape != tensors[name].shape]
    wrong += [name for name in tensors if name not in own]
    if wrong:
        raise CheckpointError(f"{place}: these weights do not fit: {listed(wrong, 4)}")
    module.load_state_dict(tensors)
    return digest


def found(place: str) -> Path:
    """The file or folder at a place (`read`); of a hub, its copy on this machine.

    Raises `CheckpointError`: `NotThere` where only this file is missing.
    """
    if not place.startswith(_HUB):
        path = local(place)
        if not path.exists():
            raise NotThere(f"{place}: there is no such file or folder")
        return path
    id, _, inside = place.partition("#")
    named = hub.hub_id(id)
    if named is None:
        raise CheckpointError(
            f"{place}: write hf://user/name, hf://user/name@revision or hf://user/name#path/in/it"
        )
    patterns = (inside,) if inside else ("*.safetensors",)
    folder = hub.download(*named, patterns, cached=not asked())
    path = folder / inside
    if not path.exists() or not Path(os.path.normpath(path)).is_relative_to(folder):
        raise NotThere(f"{place}: {named[0]} has no file '{inside}'")
    return path


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix.lower() not in _PICKLES:
        return load_tensors(file)
    tree = read_pickle(file, allow_pickle=True)
    return dict(_leaves(tree, ""))


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings by dotted name; other plain data is left out."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: sorted names, types, shapes and bytes as stored, before any cast."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256(tensors: Mapping[str, Tensor], files: list[Path]) -> str:
    """The hash of the tensors of some files; of files with the same path, size and time it is computed once."""
    found = [(file.resolve(), file.stat()) for file in files]
    status = [(str(path), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found]
    place = place_of("weights", json.dumps(status))
    held = recall(place)
    if held is not None and "sha256" in held:
        return held["sha256"].tobytes().hex()
    made = sha256(tensors)
    remember(place, {"sha256": np.frombuffer(bytes.fromhex(made), np.uint8)})
    return made


# For the rest of vqcore


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict without borrowed weights. Tied tensors appear under their first name only."""
    parameters, buffers = (
        {name for name, _ in each(remove_duplicate=False)} - {name for name, _ in each()}
        for each in (module.named_parameters, module.named_buffers)
    )
    again, theirs = parameters | buffers, tuple(borrowed_prefixes(module))
    return {
        name: value
        for name, value in module.state_dict().items()
        if name not in again and not (theirs and name.startswith(theirs))
    }


def borrowed_prefixes(module: nn.Module) -> Iterator[str]:
    """The beginnings of the names that borrowed tensors have in a module's state dict."""
    for path, inner in module.named_modules():
        for name in borrowed(inner):
            yield f"{path}.{name}." if path else f"{name}."


def own_buffers(module: nn.Module) -> Iterator[Tensor]:
    """The buffers of a module without borrowed ones."""
    theirs = tuple(borrowed_prefixes(module))
    for name, buffer in module.named_buffers():
        if not (theirs and name.startswith(theirs)):
            yield buffer


Loans = dict[str, dict[str, Any]]
"""Hash and source of borrowed weights by key, as provenance keeps them."""


class Lender:
    """Lets the modules of a tokenizer and of a run borrow their weights.

    `places` are the files that the user gave, by key. `recorded` is what the provenance of a saved tokenizer says of
    each key: other weights are refused. With `download`, weights that are missing are fetched from the hub.
    """

    def __init__(
        self,
        places: Mapping[str, str] | None = None,
        recorded: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        download: bool = False,
    ):
        self.places = {key: str(place) for key, place in (places or {}).items()}
        self.recorded, self.download = dict(recorded or {}), download
        self.used: set[str] = set()
        self.keys: list[str] = []

    def lend(self, roots: Mapping[str, Any]) -> Loans:
        """Let everything below some objects borrow; returns hash and source by key, as provenance keeps them.

        Raises `CheckpointError` with the key if weights are missing, do not fit, or are others than recorded.
        """
        found = {
            path: module for name, root in roots.items() for path, module in _borrowers(root, name, set())
        }
        keys = [f"{path}.{name}" for path, module in found.items() for name in borrowed(module)]
        self.keys += keys
        loans: Loans = {}
        for path, module in found.items():
            loans |= self._lend(path, module, keys)
        return loans

    def refuse_unused(self, left_out: Sequence[str] = ()) -> None:
        """Raise `CheckpointError` for a place whose key names nothing that borrows; `left_out` are roots not built."""
        for key in self.places:
            if key not in self.used and key.partition(".")[0] not in left_out:
                raise CheckpointError(
                    f"--borrow {key}: nothing here borrows weights under this name.{did_you_mean(key, self.keys)} "
                    f"Names: {listed(self.keys) or 'none'}."
                )

    def _lend(self, path: str, module: Borrows, keys: list[str]) -> Loans:
        names = borrowed(module)
        places = {name: place for name in names if (place := self._place(f"{path}.{name}", keys)) is not None}
        with asking(self.download or asked()), closed_unless_asked():
            try:
                hashes = dict(module.borrow(places))
            except VqcoreError as error:
                key = f"{path}.{names[0]}" if len(names) == 1 else path
                missing = MissingWeights(f"{key}: {str(error).rstrip('.')}. {self._remedy(key)}")
                missing.key = key
                raise missing from error
        wrong = [name for name in names if not _SHA256.fullmatch(str(hashes.get(name, "")))]
        if wrong:
            who = f"{type(module).__module__}.{type(module).__name__}"
            raise PluginLoadError(f"{path}: borrow of {who} returns no SHA-256 for '{wrong[0]}'.")
        loans = {}
        for name in names:
            key = f"{path}.{name}"
            self._compare(key, hashes[name])
            source = places.get(name, "")
            loans[key] = {"sha256": hashes[name], "source": source if source.startswith(_HUB) else None}
            keep_frozen(_submodule(module, name))
        return loans

    def _place(self, key: str, keys: list[str]) -> str | None:
        """The place given for a key or for a beginning that stands for this key alone, else the recorded source."""
        for given, place in self.places.items():
            below = [one for one in keys if one == given or one.startswith(f"{given}.")]
            if key in below and (key == given or len(below) == 1):
                self.used.add(given)
                return place
        source = str(self.recorded.get(key, {}).get("source"))
        return source if source.startswith(_HUB) else None  # nobody else may name a file of this machine

    def _compare(self, key: str, found: str) -> None:
        wanted = self.recorded.get(key, {}).get("sha256")
        if wanted is not None and wanted != found:
            missing = MissingWeights(
                f"{key}: these are other weights than those of this tokenizer: their SHA-256 is {found[:16]}, but the "
                f"provenance says {wanted[:16]}. {self._remedy(key)}"
            )
            missing.key = key
            raise missing

    def _remedy(self, key: str) -> str:
        wanted = self.recorded.get(key, {}).get("sha256")
        which = f" with the SHA-256 {wanted[:16]}" if wanted else ""
        return (
            f"Give the weights{which}: --borrow {key}=PATH (in Python borrowed={{'{key}': PATH}}), "
            "or fetch them from the hub with --download."
        )


def parse_places(words: list[str]) -> dict[str, str]:
    """The places of `--borrow KEY=PATH` words. Raises `CheckpointError` for a word of another form."""
    places = {}
    for word in words:
        key, equals, place = word.partition("=")
        if not (key and equals and place):
            raise CheckpointError(
                f"--borrow {word}: write KEY=PATH, e.g. --borrow decoder.base=weights/base.safetensors."
            )
        places[key] = place
    return places


def compare_loans(
    folder: Path, recorded: Mapping[str, Mapping[str, Any]], loans: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise `CheckpointError` if a checkpoint was trained with other borrowed weights than those of now."""
    for key, loan in loans.items():
        wanted = recorded.get(key, loan)["sha256"]
        if wanted != loan["sha256"]:
            raise CheckpointError(
                f"{folder}: {key} has the SHA-256 {loan['sha256'][:16]}, but this run was trained with {wanted[:16]}. "
                f"Give the weights of this run: --borrow {key}=PATH."
            )


def _borrowers(root: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Borrows]]:
    """Every object at or below `root` that borrows, by path. What is borrowed is not searched."""
    if id(root) in seen:
        return
    seen.add(id(root))
    names = borrowed(root)
    if names:
        yield path, root
    for name, child in _children(root):
        if name not in names:
            yield from _borrowers(child, f"{path}.{name}", seen)


def _children(root: Any) -> Iterator[tuple[str, Any]]:
    """The submodules of a module; of another object the modules and borrowers in its attributes."""
    if isinstance(root, nn.Module):
        yield from root.named_children()
        return
    for name, value in vars(root).items() if hasattr(root, "__dict__") else ():
        if isinstance(value, dict):
            inner = list(value.items())
        else:
            inner = list(enumerate(value)) if isinstance(value, (list, tuple)) else [("", value)]
        for label, one in inner:
            if isinstance(one, (nn.Module, Borrows)):
                yield (name if label == "" else f"{name}.{label}"), one


def _submodule(owner: Any, name: str) -> Any:
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def keep_frozen(module: Any) -> None:
    """Freeze a module and keep it in eval mode, whatever mode its owner is set to."""
    if isinstance(module, nn.Module):
        module.requires_grad_(False)
        module.eval()
        module.train = types.MethodType(train, module)  # type: ignore[method-assign]


def train(module: nn.Module, mode: bool = True) -> nn.Module:
    """The method `train` of a module that stays in eval mode. It has this name so that the module can be pickled."""
    return module
