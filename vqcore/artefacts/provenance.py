"""Provenance: what made a tokenizer (versions, command, git commit, data), and the config that is saved beside it."""

import dataclasses
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from vqcore import __version__
from vqcore.artefacts.folder import CONFIG, PROVENANCE
from vqcore.compose.build import from_tree, saved_tree
from vqcore.config import Config, place_keys, placed, portable, to_tree
from vqcore.errors import CheckpointError, ConfigError, UnknownPlugin, VqcoreError
from vqcore.reading import read_json
from vqcore.registry import Registry, registry
from vqcore.schema import RunConfig, TokenizerConfig

_ABSOLUTE = re.compile(
    r"(?<![\w./\\~-])(?:file://|[A-Za-z]:)?(?:~[\w.-]*)?[/\\](?![/\\])[^\s,;:'\"=\[\]{}()]+"
)
"""An absolute path in a text; `~/x` is one, `hf://user/name` and `1/2` are none."""
ORIGIN = ("components", "data", "eval", "git", "step", "metrics", "command", "origin")
"""Entries of the provenance that are kept when a tokenizer is loaded and saved elsewhere."""


def read_config(folder: Path, registry_: Registry | None = None) -> TokenizerConfig:
    """An artefact's config, checked against what is installed."""
    path = folder / CONFIG
    try:
        tree = saved_tree(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    try:
        return from_tree(tree, schema=TokenizerConfig, file=str(path), registry_=registry_)
    except UnknownPlugin as error:
        raise made_with(folder, error, registry_) from error


def with_places(cfg: TokenizerConfig, run: Path, registry_: Registry | None = None) -> TokenizerConfig:
    """The config of a run's checkpoint with the places of borrowed weights that the run's own config names."""
    if not any(place_keys(cfg)):
        return cfg
    try:
        path = run / CONFIG
        whole = from_tree(saved_tree(path), schema=RunConfig, file=str(path), registry_=registry_)
    except VqcoreError:  # the user can still name the places
        return cfg
    modality, model = placed(cfg.modality, whole.data.modality), placed(cfg.model, whole.model.bare)
    return dataclasses.replace(cfg, modality=modality, model=model)


def made_with(folder: Path, error: UnknownPlugin, registry_: Registry | None = None) -> UnknownPlugin:
    """The same error, with the distribution of the first missing component as the folder's provenance names it."""
    try:
        recorded = read_json(folder / PROVENANCE, CheckpointError)["components"].values()
        missing = [made for made in recorded if not _is_installed(made["name"], registry_ or registry())]
        whose = f"{missing[0]['distribution']} {missing[0]['version']}".strip()
    except (CheckpointError, KeyError, IndexError, AttributeError, TypeError):
        return error
    if (registry_ or registry()).is_disabled(missing[0]["name"].partition("/")[0]):
        return error
    told = f"{error} '{missing[0]['name']}' came from {whose}"
    if "sha256" in missing[0]:
        return UnknownPlugin(f"{told} (SHA-256 {missing[0]['sha256'][:16]}).")
    return UnknownPlugin(f"{told}: install it, then run the same command again.")


def _is_installed(name: str, catalogue: Registry) -> bool:
    return "/" not in name or name.partition("/")[0] in catalogue.ids()


def provenance_of(config: Any, **more: Any) -> dict[str, Any]:
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
        **(
            {"data": _data(portable(config)), "eval": to_tree(config.eval)} if hasattr(config, "data") else {}
        ),
        **more,
    }


def without_places(made: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance for others: of each absolute path in it only the last part is left, as in `.../photos`.

    So it tells nothing of the folders of the machine where the tokenizer was made. No data can be found by such a path.
    """
    return {key: _without_places(value) for key, value in made.items()}


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(one) for one in value]
    if not isinstance(value, str):
        return value
    key, equals, rest = value.partition("=")
    if _ABSOLUTE.match(value):
        return _shortened(value)
    if equals and _ABSOLUTE.match(rest):
        return f"{key}={_shortened(rest)}"
    return _ABSOLUTE.sub(lambda found: _shortened(found[0]), value)


def _shortened(path: str) -> str:
    return f".../{PurePath(path.replace(chr(92), '/')).name}"


def _data(config: Any) -> dict[str, Any]:
    """The data section of a run's config, without the modality (which is in the artefact's config)."""
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
