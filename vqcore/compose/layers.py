"""Merges a config: `defaults:` files in order, then the file, then the command line.

Mappings are merged. A list replaces the earlier list. A mapping with another `name` replaces the whole earlier mapping.
`build` then checks the merged tree and builds the config.
"""

import copy
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf.errors import OmegaConfBaseException

from vqcore.compose.build import COMMAND_LINE, from_tree, full_key, joined, omegaconf_reason
from vqcore.compose.describe import value_text
from vqcore.compose.recipes import recipe_path
from vqcore.compose.text import document, word
from vqcore.config import leaves
from vqcore.errors import ConfigError, did_you_mean, first_line, listed
from vqcore.files import local
from vqcore.reading import MOST_YAML, is_mapping, read_text, yaml_reason, yaml_root
from vqcore.registry import Registry, registry
from vqcore.schema import RunConfig, TextConfig

log = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT = "default"


@dataclass(frozen=True)
class Loaded:
    """A checked config, the layer that set each value (by dotted key), and one line per replaced component."""

    config: Any
    origin: Mapping[str, str]
    notes: tuple[str, ...]

    def layer(self, key: str) -> str:
        """The layer that set a value: by its key, or by a key above (an interpolated node); otherwise `default`."""
        while key:
            if key in self.origin:
                return self.origin[key]
            key = key.rpartition(".")[0]
        return DEFAULT


def load(
    path: str,
    overrides: Sequence[str] = (),
    *,
    schema: type | None,
    absent: Mapping[str, Any] | None = None,
    registry_: Registry | None = None,
) -> Loaded:
    """Read, merge, check and build a config. `path` is a file or `recipe:NAME`; an override is `key.path=value`.

    Without a `schema`, the sections of the file decide. `absent` has what stands for sections that no file has.
    """
    layers = _Layers(registry_ or registry())
    layers.add_file(path)
    schema = _schema_of(layers.tree, schema, path)
    layers.tree = {**(absent or {}), **layers.tree}
    if any(f.name == "run" for f in dataclasses.fields(schema)):
        stem = Path(path.rpartition(":")[2]).stem
        layers.tree.setdefault("run", {})
        if isinstance(layers.tree["run"], dict):
            layers.tree["run"].setdefault("dir", f"runs/{stem}")
    config: Any = _finish(layers, overrides, schema, path)
    return Loaded(config, layers.origin, tuple(layers.notes))


def _schema_of(tree: Mapping[str, Any], wanted: type | None, path: str) -> type:
    """`wanted`, or the schema that fits the sections. Raises `ConfigError` for a config of the other kind."""
    kinds = {
        RunConfig: ("model", "a tokenizer", "train"),
        TextConfig: ("text", "a text tokenizer", "text train"),
    }
    if wanted is None:
        return TextConfig if "text" in tree else RunConfig
    for schema, (section, what, verb) in kinds.items():
        if wanted in kinds and wanted is not schema and section in tree and kinds[wanted][0] not in tree:
            raise ConfigError(f"{path}: is a config of {what}. Run: vqcore {verb} {path}")
    return wanted


def overridden(
    tree: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    schema: type[T],
    file: str,
    registry_: Registry | None = None,
) -> T:
    """A saved tree, changed by settings of the command line, checked and built."""
    layers = _Layers(registry_ or registry())
    layers.add(copy.deepcopy(dict(tree)), file)
    return _finish(layers, overrides, schema, file)


def _finish(layers: "_Layers", overrides: Sequence[str], schema: type[T], file: str) -> T:
    layers.add(settings_of(overrides), COMMAND_LINE)
    for note in layers.notes:
        log.info(note)
    return from_tree(layers.tree, schema=schema, origin=layers.origin, file=file, registry_=layers.registry)


class _Layers:
    """The tree merged so far, and the layer that set each value."""

    def __init__(self, registry_: Registry) -> None:
        self.registry = registry_
        self.tree: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.notes: list[str] = []

    def add_file(self, path: str, parents: Mapping[Path, str] | None = None) -> None:
        """Add the files under `defaults:` in their order, then the file. `parents` are the files that led here."""
        recipe = path.startswith("recipe:")
        file = recipe_path(path.removeprefix("recipe:"), self.registry) if recipe else local(path)
        chain = {**(parents or {}), file.resolve(): path}
        if parents and file.resolve() in parents:
            raise ConfigError(
                f"{path}: its defaults lead back to this file: {' -> '.join([*parents.values(), path])}."
            )
        tree = _parse(_read(file, path, list(chain.values())), path)
        above = tree.pop("defaults", [])
        if not isinstance(above, list) or not all(isinstance(entry, str) for entry in above):
            raise ConfigError(
                f"{path}: defaults must be a list of files, e.g. defaults: [../base/train.yaml]"
            )
        for entry in above:
            self.add_file(entry if entry.startswith("recipe:") else _beside(file, entry), chain)
        self.add(tree, path)

    def add(self, tree: dict[str, Any], label: str) -> None:
        self._merge(self.tree, tree, label, "")

    def _merge(self, base: dict[str, Any], top: dict[str, Any], label: str, path: str) -> None:
        for key, value in top.items():
            here = joined(path, key)
            old = base.get(key)
            if isinstance(value, dict) and isinstance(old, dict) and not _is_ramp(value):
                new_name, old_name = value.get("name"), old.get("name")
                if new_name is None or old_name is None or self.registry.same(new_name, old_name):
                    if value:
                        self.origin.pop(here, None)  # an empty mapping is a value until it gets a key
                    self._merge(old, value, label, here)
                    continue
                dropped = [k for k in old if k != "name"]
                old_label = self.origin.get(f"{here}.name", DEFAULT)
                self.notes.append(
                    f"{here}: '{new_name}' ({label}) replaces '{old_name}' ({old_label})"
                    + (f"; its settings {listed(dropped)} are dropped" if dropped else "")
                )
            base[key] = value
            for stale in [k for k in self.origin if k == here or k.startswith(f"{here}.")]:
                del self.origin[stale]
            self.origin.update({leaf: label for leaf, _ in leaves(value, here)})


def _beside(file: Path, entry: str) -> str:
    """The path of an entry of `defaults:`; without `..` unless a link in the path makes a difference."""
    path = file.parent / local(entry)
    tidy = os.path.normpath(path)
    return tidy if Path(tidy).resolve() == path.resolve() else str(path)


def _read(file: Path, shown: str, chain: list[str]) -> str:
    if not file.exists():
        siblings = [p.name for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        asked = f"{chain[-2]}: defaults: " if len(chain) > 1 else ""
        hint = did_you_mean(file.name, siblings)
        raise ConfigError(f"{asked}{shown}: there is no such file.{hint}")
    return read_text(file, ConfigError, most=MOST_YAML, where=shown)


def _parse(text: str, shown: str) -> dict[str, Any]:
    try:
        root = yaml_root(text)
        if root is not None and not is_mapping(root):
            found = value_text(root.value) if isinstance(root, yaml.ScalarNode) else "a list"
            raise ConfigError(f"{shown}: a config is a mapping (key: value), not {found}.")
        tree = document(text) if root else {}
    except OmegaConfBaseException as error:
        raise ConfigError(f"{shown}: {omegaconf_reason(error, full_key(error))}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{shown}: {yaml_reason(error)}.") from error
    assert isinstance(tree, dict)
    return _string_keys(tree, shown)


def _string_keys(tree: dict[Any, Any], shown: str, path: str = "") -> dict[str, Any]:
    """The same tree with whole numbers as text keys. Raises `ConfigError` for any other key that is not text."""
    found = {}
    for key, value in tree.items():
        if not isinstance(key, str) and type(key) is not int:
            place = f"{path}: " if path else ""
            raise ConfigError(
                f"{shown}: {place}the key {value_text(key)} is not text; put the key in quotes."
            )
        text = str(key)
        found[text] = _string_keys(value, shown, joined(path, text)) if isinstance(value, dict) else value
    return found


def _is_ramp(value: dict[str, Any]) -> bool:
    """Whether a mapping has numbers by step. Such a mapping is one value: it replaces an earlier one."""
    return bool(value) and all(key.isascii() and key.isdigit() for key in value)


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Words `key.path=value` of the command line as one tree. Raises `ConfigError` for other words."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            raise ConfigError(
                f"{COMMAND_LINE}: {value_text(override)} is not a setting; write key.path=value."
            )
        *parents, last = key.split(".")
        node: dict[str, Any] = {last: _override_value(key, text)}
        for part in reversed(parents):
            node = {part: node}
        _lay(tree, node, override)
    return tree


def _override_value(key: str, text: str) -> Any:
    try:
        value = word(text)
    except yaml.YAMLError as error:
        shown = value_text(text)[1:-1]
        why = "" if isinstance(error, yaml.MarkedYAMLError) else f": {first_line(error)}"
        raise ConfigError(
            f"{COMMAND_LINE}: {key}={shown} is not valid YAML{why}. "
            f"""If the value is text, quote it twice: {key}='"{shown}"'"""
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{COMMAND_LINE}: {omegaconf_reason(error, key)}") from error
    return _string_keys(value, COMMAND_LINE, key) if isinstance(value, dict) else value


def _lay(tree: dict[str, Any], top: dict[str, Any], override: str) -> None:
    """Add one override to the tree. The last value of a key wins; a value and a mapping for one key are an error."""
    for key, value in top.items():
        old = tree.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _lay(old, value, override)
        elif key in tree and isinstance(value, dict) != isinstance(old, dict):
            raise ConfigError(
                f"{COMMAND_LINE}: {value_text(override)[1:-1]} contradicts another setting of '{key}'."
            )
        else:
            tree[key] = value
