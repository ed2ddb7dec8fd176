"""Strict nested configuration: a YAML file, `defaults:`, the command line. Config layer: omegaconf, no torch.

A component states its settings as a nested frozen dataclass that inherits `Config`; a component inside a
component is a `slot`, several are `slots`. `load` merges the layers (dataclass default < `defaults:` files in
order < the file < command line), looks up every named component in the registry, checks each value against
its type and builds the dataclasses. Mappings merge, lists are atoms, and a node that changes `name` replaces
the whole node.
"""

import ast
import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import inspect
import logging
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException
from packaging.requirements import InvalidRequirement, Requirement

from vqcore.errors import ConfigError, PluginLoadError, VqcoreError, did_you_mean, listed
from vqcore.plugin import a_kind
from vqcore.registry import OURS, Registry, registry

log = logging.getLogger(__name__)
T = TypeVar("T")
COMMAND_LINE = "command line"
DEFAULT = "default"
REQUIRED = "required"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every component's settings. `name` is the component's full name, e.g. `quant/fsq`.

    `training_only` lists settings that cannot change which codes an input gets or what codes decode to; they
    stay out of a tokenizer's fingerprint.
    """

    training_only: ClassVar[tuple[str, ...]] = ()
    name: str = ""


def slot(kind: str, *, default: Any = dataclasses.MISSING) -> Any:
    """A setting that is a component of this kind; `default` is None or a mapping like `{"name": ...}`."""
    metadata = {"slot": kind, "default": default}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=None, metadata=metadata)


def slots(kind: str) -> Any:
    """A setting that is a mapping from labels to components of this kind; empty by default."""
    return dataclasses.field(default_factory=dict, metadata={"slots": kind})


@dataclass(frozen=True)
class Loaded:
    """A checked config, the layer that gave each leaf (by dotted key), and a line per component replaced."""

    config: Any
    origin: Mapping[str, str]
    notes: tuple[str, ...]

    def layer(self, key: str) -> str:
        """The layer that gave a leaf: its own, that of the node it was interpolated with, or the default."""
        while key:
            if key in self.origin:
                return self.origin[key]
            key = key.rpartition(".")[0]
        return DEFAULT


def load(
    path: str, overrides: Sequence[str] = (), *, schema: type, registry_: Registry | None = None
) -> Loaded:
    """Read, merge, check and build. `path` is a file or `recipe:NAME`; an override reads `key.path=value`."""
    layers = _Layers(registry_ or registry())
    layers.add_file(path)
    if any(f.name == "run" for f in dataclasses.fields(schema)):
        stem = Path(path.rpartition(":")[2]).stem
        layers.tree.setdefault("run", {})
        if isinstance(layers.tree["run"], dict):
            layers.tree["run"].setdefault("dir", f"runs/{stem}")
    config: Any = _finish(layers, overrides, schema, path)
    return Loaded(config, layers.origin, tuple(layers.notes))


def overridden(
    tree: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    schema: type[T],
    file: str,
    registry_: Registry | None = None,
) -> T:
    """A saved tree with command-line settings on top, checked and built."""
    layers = _Layers(registry_ or registry())
    layers.add(copy.deepcopy(dict(tree)), file)
    return _finish(layers, overrides, schema, file)


def _finish(layers: "_Layers", overrides: Sequence[str], schema: type[T], file: str) -> T:
    layers.add(_overrides(overrides), COMMAND_LINE)
    for note in layers.notes:
        log.info(note)
    return from_tree(layers.tree, schema=schema, origin=layers.origin, file=file, registry_=layers.registry)


def from_tree(
    tree: Mapping[str, Any],
    *,
    schema: type[T],
    origin: Mapping[str, str] | None = None,
    file: str = "config",
    registry_: Registry | None = None,
) -> T:
    """Check plain nested data against a schema and build it. Errors name the layer and the key."""
    builder = _Builder(origin or {}, file, registry_ or registry(), schema)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(dict(tree)), resolve=True)
    except OmegaConfBaseException as error:
        raise builder.unresolved(error) from error
    assert isinstance(resolved, dict)
    _check_requires(resolved.get("requires"), builder.layer("requires"))
    return builder.build(schema, resolved, "")


def to_tree(config: Any) -> Any:
    """A config as plain nested data: mappings, lists, numbers, strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_tree(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_tree(value) for value in config]
    return config


def deciding(cfg: Config) -> dict[str, Any]:
    """A component's settings that decide what it does with an input, as plain data.

    Without those that matter in training only, and without those at their default: so a setting that a later version
    adds changes nothing.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
    given = {name: getattr(cfg, name) for name in defaults if name not in cfg.training_only}
    return {
        name: deciding(value) if isinstance(value, Config) else to_tree(value)
        for name, value in given.items()
        if name == "name" or value != defaults[name]
    }


def dump(config: Any) -> str:
    """A config as YAML, complete and resolved; loading it gives an equal object."""
    return _yaml(to_tree(config), default_flow_style=None, width=110)


def inline(value: Any) -> str:
    """A value as it may stand behind `key=` on the command line or `key: ` in a file."""
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)  # 1e-08, where YAML writes 1.0e-08
    return _yaml(value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")


def _yaml(tree: Any, **style: Any) -> str:
    return yaml.dump(_escaped(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)


def _escaped(tree: Any) -> Any:
    """The tree with `${` in its values written so that it is read back as text."""
    if isinstance(tree, Mapping):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    if isinstance(tree, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", tree)
    return tree


class _Dumper(yaml.SafeDumper):
    """Quotes what OmegaConf's reader takes for a number (`1e3`), and what has line breaks (PyYAML turns some)."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A string that is read back as the same string."""
        plain = text[:1].isalpha() or text[:1] in ("_", "/")
        style = None if plain else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of nested data with its value; lists, and empty mappings, are leaves."""
    if isinstance(tree, Mapping) and (tree or not path):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


@dataclass(frozen=True)
class Setting:
    """One setting of a component as `vqcore show` prints it; its default is a YAML text, or `REQUIRED`."""

    name: str
    type: str
    default: str
    text: str


def settings(cls: type) -> list[Setting]:
    """The settings of a config class: type, default and the string under each field in the source."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts.update(_field_texts(base))
    hints = typing.get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        if f.name == "name" and issubclass(cls, Config):
            continue
        kind = f.metadata.get("slot") or f.metadata.get("slots")
        if kind:
            type_name = a_kind(kind) if "slot" in f.metadata else f"a mapping from labels to {_many(kind)}"
        else:
            type_name = _type_name(hints[f.name])
        default: Any = f.metadata.get("default", f.default)
        factory: Any = f.default_factory
        if default is dataclasses.MISSING and factory is not dataclasses.MISSING:
            default = to_tree(factory())
        if isinstance(default, tuple):
            default = to_tree(default)
        text = REQUIRED if default is dataclasses.MISSING else inline(default)
        found.append(Setting(f.name, type_name, text, texts.get(f.name, "")))
    return found


def recipe_path(name: str, registry_: Registry | None = None) -> Path:
    """The file behind `recipe:NAME`: the core's, or for `vit/...` one in the `cfgs/` of vit's package."""
    catalogue = registry_ or registry()
    id, _, rest = name.removesuffix(".yaml").partition("/")
    core = core_recipes()
    candidates = [core / f"{name.removesuffix('.yaml')}.yaml"] if core else []
    if rest and id in catalogue.ids():
        candidates += [folder / f"{rest}.yaml" for folder in _plugin_recipes(catalogue.origin(id).module)]
    for path in candidates:
        if path.is_file():
            return path
    hint = did_you_mean(name, recipes(catalogue))
    raise ConfigError(f"recipe:{name}: no such recipe.{hint} List them: vqcore config --list")


def recipes(registry_: Registry | None = None) -> list[str]:
    """The names of all recipes in the core and in installed plugins, but for ids that are claimed twice."""
    core = core_recipes()
    names = [_recipe_name(core, path) for path in sorted(core.rglob("*.yaml"))] if core else []
    for id, origins in (registry_ or registry()).ids().items():
        if id != "core" and len(origins) == 1:
            for folder in _plugin_recipes(origins[0].module):
                names += [f"{id}/{_recipe_name(folder, path)}" for path in sorted(folder.rglob("*.yaml"))]
    return names


@functools.cache
def core_recipes() -> Path | None:
    """The folder of the core's recipes: inside the package if it came as a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next((path for path in (package / "cfgs", package.parent / "cfgs") if path.is_dir()), None)


def _plugin_recipes(module: str) -> list[Path]:
    package = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    except (ImportError, ValueError):
        return []
    places = (spec.submodule_search_locations or []) if spec else []
    return [Path(place) / "cfgs" for place in places if (Path(place) / "cfgs").is_dir()]


def _recipe_name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


class _Layers:
    """The merged tree, growing layer by layer, and where each leaf came from."""

    def __init__(self, registry_: Registry) -> None:
        self.registry = registry_
        self.tree: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.notes: list[str] = []

    def add_file(self, path: str, parents: Mapping[Path, str] | None = None) -> None:
        """Add what a file's `defaults:` name, in order, then the file; `parents` led here."""
        recipe = path.startswith("recipe:")
        file = recipe_path(path.removeprefix("recipe:"), self.registry) if recipe else Path(path)
        chain = {**(parents or {}), file.resolve(): path}
        if parents and file.resolve() in parents:
            raise ConfigError(
                f"{path}: its defaults lead back to itself: {' -> '.join([*parents.values(), path])}."
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
            here = f"{path}.{key}" if path else key
            old = base.get(key)
            if isinstance(value, dict) and isinstance(old, dict):
                new_name, old_name = value.get("name"), old.get("name")
                if new_name is None or old_name is None or new_name == old_name:
                    if value:
                        self.origin.pop(here, None)  # an empty mapping is a leaf until something is in it
                    self._merge(old, value, label, here)
                    continue
                dropped = [k for k in old if k != "name"]
                self.notes.append(
                    f"{here}: '{new_name}' ({label}) replaces '{old_name}' ({self._origin_of(here)})"
                    + (f"; its settings {listed(dropped)} are dropped" if dropped else "")
                )
            base[key] = value
            for stale in [k for k in self.origin if k == here or k.startswith(f"{here}.")]:
                del self.origin[stale]
            self.origin.update({leaf: label for leaf, _ in leaves(value, here)})

    def _origin_of(self, path: str) -> str:
        return self.origin.get(f"{path}.name", DEFAULT)


class _Mismatch(Exception):
    """A value that is not of the type its setting wants."""

    def __init__(self, path: str, value: Any, annotation: Any):
        self.path, self.value, self.annotation = path, value, annotation


class _Builder:
    """Turns a plain tree into dataclasses, slot by slot."""

    def __init__(self, origin: Mapping[str, str], file: str, registry_: Registry, schema: type):
        self.origin, self.file, self.registry, self.schema = origin, file, registry_, schema

    def build(self, cls: type[T], node: Any, path: str, component: str = "") -> T:
        """A dataclass from a mapping; `component` is the full name if it is the Config of one."""
        if not isinstance(node, dict):
            raise self._error(path, f" must be a mapping, not {_shown(node)}.")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in node:
            if key not in fields:
                raise self._unknown(key, list(fields), path, component)
        hints = _hints(cls)  # type: ignore[arg-type]
        values = {}
        for name, field in fields.items():
            given = node.get(name, dataclasses.MISSING)
            if name == "name" and component:
                given = component
            if isinstance(given, str) and given == MISSING:
                given = dataclasses.MISSING
            value = self._setting(field, hints[name], given, _join(path, name))
            if value is not dataclasses.MISSING:
                values[name] = value
        try:
            return cls(**values)
        except ValueError as error:
            raise self._refused(cls, path, values, str(error).rstrip(".")) from error

    def layer(self, path: str) -> str:
        """Which layer gave a key: itself, all that is below it, or the nearest node above; else the file."""
        if path in self.origin:
            return self.origin[path]
        inside = {label for key, label in self.origin.items() if path and key.startswith(f"{path}.")}
        if len(inside) == 1:
            return inside.pop()
        above = path.rpartition(".")[0]
        return self.layer(above) if above and not inside else self.file

    def unresolved(self, error: OmegaConfBaseException) -> ConfigError:
        """What OmegaConf says of an interpolation, with the layer that holds it."""
        key = _full_key(error)
        return ConfigError(f"{self.layer(key.partition('[')[0])}: {_omegaconf_reason(error, key)}")

    def _setting(self, field: dataclasses.Field, annotation: Any, given: Any, path: str) -> Any:
        if "slot" in field.metadata:
            return self._slot(field, given, path, annotation)
        if "slots" in field.metadata:
            return self._slots(field, given, path)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            return self.build(annotation, {} if given is dataclasses.MISSING else given, path)
        if given is not dataclasses.MISSING:
            return self._leaf(annotation, given, path)
        if _required(field):
            raise self._error(path, f" is required ({_type_name(annotation)}).")
        return given

    def _slot(self, field: dataclasses.Field, given: Any, path: str, base: Any) -> Any:
        kind, default = field.metadata["slot"], field.metadata["default"]
        if given is dataclasses.MISSING:
            if default is dataclasses.MISSING:
                raise self._error(path, f" is required: {self._wish(kind)}")
            given = default
        if given is None:
            if default is dataclasses.MISSING:
                raise self._error(path, f" cannot be null; it wants {self._wish(kind)}")
            return None
        if isinstance(given, dict) and isinstance(default, Mapping) and "name" not in given:
            given = {**default, **given}
        return self._component(kind, given, path, base if isinstance(base, type) else Config)

    def _slots(self, field: dataclasses.Field, given: Any, path: str) -> Any:
        """The components by label; null takes away what a layer below has given."""
        if given is dataclasses.MISSING or given is None:
            return {}
        if not isinstance(given, dict):
            raise self._error(path, f" must be a mapping from labels to components, not {_shown(given)}.")
        kind = field.metadata["slots"]
        return {
            label: self._component(kind, node, f"{path}.{label}", Config)
            for label, node in given.items()
            if node is not None
        }

    def _component(self, kind: str, node: Any, path: str, base: type) -> Any:
        if isinstance(node, str):
            raise self._error(
                path,
                f"={_shown(node)} is no mapping. Write {{name: {node}}}, "
                f"or {path}.name={node} on the command line.",
            )
        if not isinstance(node, dict):
            raise self._error(
                path, f" must be a mapping with a name, not {_shown(node)}; it wants {self._wish(kind)}"
            )
        if not isinstance(node.get("name"), str) or not node["name"]:
            raise self._error(path, f" has no name; it wants {self._wish(kind)}")
        name_key = f"{path}.name"
        try:
            found = self.registry.find(kind, node["name"], path)
            cls: Any = self.registry.load(kind, found.name, path)
            if not issubclass(cls.Config, base):
                wanted = f"{base.__module__}.{base.__name__}"
                raise PluginLoadError(f"'{found.name}' of {found.origin}: its Config must inherit {wanted}.")
        except VqcoreError as error:
            raise error.at(f"{self.layer(name_key)}: {name_key}") from error
        return self.build(cls.Config, node, path, found.name)

    def _wish(self, kind: str) -> str:
        names = [found.name for found in self.registry.components(kind)]
        example = f", e.g. {{name: {names[0]}}}" if names else ""
        return f"{a_kind(kind)}{example}. Installed: {listed(names) or 'none'}."

    def _leaf(self, annotation: Any, value: Any, path: str) -> Any:
        try:
            return self._typed(annotation, value, path)
        except _Mismatch as found:
            text = f"={_shown(found.value)} is not {_type_name(found.annotation)}."
            if found.annotation is str and isinstance(found.value, (int, float)):
                quotes = (
                    "quote it twice, '\"...\"'" if self.layer(path) == COMMAND_LINE else "put it in quotes"
                )
                text += f" If it is meant as text, {quotes}."
            raise self._error(found.path, text) from found

    def _typed(self, annotation: Any, value: Any, path: str) -> Any:
        """The value as the type that its setting wants; nothing is converted but what YAML cannot say.

        Lists become tuples, an integer a float where a float is wanted, a float without a fraction an integer, and a
        text a number or a truth value where one of these is wanted (the environment knows only text).
        """
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin in (typing.Union, types.UnionType):
            return self._one_of(annotation, value, path)
        if origin is typing.Literal and any(value == arg and type(value) is type(arg) for arg in args):
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            inner = args[:1] * len(value) if args[-1] is Ellipsis else args
            if len(inner) == len(value):
                return tuple(
                    self._typed(arg, v, f"{path}[{i}]") for i, (arg, v) in enumerate(zip(inner, value))
                )
        if origin is dict and isinstance(value, dict):
            return {key: self._typed(args[1], v, f"{path}.{key}") for key, v in value.items()}
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            return self.build(annotation, value, path)
        plain = _from_text(value) if annotation in (int, float, bool) and isinstance(value, str) else value
        if annotation is float and type(plain) in (int, float):
            return float(plain)
        if annotation is int and type(plain) is float and plain.is_integer():
            return int(plain)  # YAML knows 1e4 for a float only
        if annotation in (int, bool, str, type(None)) and type(plain) is annotation:
            return plain
        raise _Mismatch(path, value, annotation)

    def _one_of(self, annotation: Any, value: Any, path: str) -> Any:
        inside = None
        args = typing.get_args(annotation)
        for arg in sorted(args, key=lambda arg: type(value) is not arg):  # a text stays one where it may
            try:
                return self._typed(arg, value, path)
            except _Mismatch as found:
                inside = found if found.path != path else inside
        raise inside or _Mismatch(path, value, annotation)

    def _unknown(self, key: str, known: list[str], path: str, component: str) -> VqcoreError:
        here = _join(path, key)
        whose = f"a setting of {component or path}" if path else "a top-level setting"
        hint = did_you_mean(key, known)
        if not hint and not path:
            inner = [leaf for leaf in _schema_leaves(self.schema) if leaf.rpartition(".")[2] == key]
            hint = f" Did you mean '{inner[0]}'?" if inner else ""
        hint = hint or f" Settings: {listed(k for k in known if k != 'name') or 'none'}."
        return ConfigError(f"{self.layer(here)}: {here} is not {whose}.{hint}")

    def _refused(self, cls: type, path: str, values: Mapping[str, Any], text: str) -> ConfigError:
        """What a dataclass says of bad values; of those that its text names, the command line's are to blame.

        A text that begins with `setting=` speaks of that one; in any other, what a file gives can be taken back.
        """
        first = re.match(r"\w+(?==)", text)
        if first and first[0] in _hints(cls):
            return ConfigError(f"{self.layer(_join(path, first[0]))}: {_join(path, text)}.")
        named = dict.fromkeys(re.findall(r"\w+", text))
        keys = {_join(path, name): name for name in named if values.get(name) is not None}
        given = {key: self.origin[key] for key in keys if key in self.origin}
        if COMMAND_LINE not in given.values():
            return self._error(path, f": {text}.")
        theirs = {key: layer for key, layer in given.items() if layer != COMMAND_LINE}
        free = [key for key in theirs if type(None) in typing.get_args(_hints(cls)[keys[key]])]
        remedy = "".join(f" {key} comes from {theirs[key]}; {key}=null takes it back." for key in free)
        return ConfigError(f"{COMMAND_LINE}: {path}: {text}.{remedy}")

    def _error(self, path: str, text: str) -> ConfigError:
        layer = self.layer(path.partition("[")[0])
        return ConfigError(f"{layer}: {path}{text}" if path else f"{layer}{text}")


def _beside(file: Path, entry: str) -> str:
    """The path of an entry of `defaults:`, without `..` in it where that changes nothing (a link may)."""
    path = file.parent / entry
    tidy = os.path.normpath(path)
    return tidy if Path(tidy).resolve() == path.resolve() else str(path)


def _read(file: Path, shown: str, chain: list[str]) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        asked = f"{chain[-2]}: defaults: " if len(chain) > 1 else ""
        hint = did_you_mean(file.name, siblings)
        raise ConfigError(f"{asked}{shown}: there is no such file.{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not a text file; a config is YAML in UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}.") from error


def _parse(text: str, shown: str) -> dict[str, Any]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            found = _shown(root.value) if isinstance(root, yaml.ScalarNode) else "a list"
            raise ConfigError(f"{shown}: a config is a mapping (key: value), not {found}.")
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if root else {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown}: {_yaml_reason(error)}.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{shown}: {_omegaconf_reason(error, _full_key(error))}") from error
    assert isinstance(tree, dict)
    return _string_keys(tree, shown)


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    reason = str(getattr(error, "problem", None) or _first_line(error)).rstrip(".")
    return f"{place}not valid YAML: {reason}"


def _omegaconf_reason(error: OmegaConfBaseException, key: str) -> str:
    """`key: what is wrong. What to write.`, from one of OmegaConf's errors."""
    reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", _first_line(error)).strip('"')
    if "nvironment variable" in reason:
        hint = " Set it, or give a default: ${oc.env:NAME,default}."
    elif isinstance(error, (InterpolationResolutionError, GrammarParseError)):
        hint = (
            " An interpolation reads ${key.path}, of a setting that the config gives, or ${oc.env:NAME};"
            " a ${ that is meant as text is written \\${."
        )
    else:
        hint = ""
    return f"{key}: {reason}.{hint}" if key else f"{reason}.{hint}"


def _full_key(error: OmegaConfBaseException) -> str:
    return str(getattr(error, "full_key", None) or "")


def _string_keys(tree: dict[Any, Any], shown: str, path: str = "") -> dict[str, Any]:
    for key, value in tree.items():
        if not isinstance(key, str):
            place = f"{path}: " if path else ""
            raise ConfigError(
                f"{shown}: {place}the key {_shown(key)} is no text; if it is meant, put it in quotes."
            )
        if isinstance(value, dict):
            _string_keys(value, shown, _join(path, key))
    return tree


def _overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"{COMMAND_LINE}: '{override}' is no override; write key.path=value.")
        *parents, last = key.split(".")
        node: dict[str, Any] = {last: _override_value(key, text)}
        for part in reversed(parents):
            node = {part: node}
        _lay(tree, node, override)
    return tree


def _override_value(key: str, text: str) -> Any:
    try:
        value = _yaml_value(text)
    except yaml.YAMLError as error:
        quoted = f"""{key}='"{text}"'"""
        raise ConfigError(
            f"{COMMAND_LINE}: {key}={text} is not valid YAML. If the value is text, quote it twice: {quoted}"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{COMMAND_LINE}: {_omegaconf_reason(error, key)}") from error
    return _string_keys(value, COMMAND_LINE, key) if isinstance(value, dict) else value


def _yaml_value(text: str) -> Any:
    """What OmegaConf's YAML reader, which knows `1e-3` for a number, makes of a value."""
    tree: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)
    return tree["value"]


def _lay(tree: dict[str, Any], top: dict[str, Any], override: str) -> None:
    """Lay one override over the others: the last value of a key counts, a value and a mapping do not mix."""
    for key, value in top.items():
        old = tree.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _lay(old, value, override)
        elif key in tree and isinstance(value, dict) != isinstance(old, dict):
            raise ConfigError(f"{COMMAND_LINE}: {override} contradicts another override of '{key}'.")
        else:
            tree[key] = value


def _check_requires(requires: Any, layer: str) -> None:
    """Compare `requires:` with what is installed, before anything else is looked at."""
    if requires is None:
        return
    if not isinstance(requires, list):
        raise ConfigError(f"{layer}: requires must be a list, e.g. requires: ['vqcore-vit>=0.1']")
    for text in requires:
        try:
            wanted = Requirement(str(text))
        except InvalidRequirement as error:
            raise ConfigError(
                f"{layer}: requires: '{text}' is not a requirement such as 'vqcore-vit>=0.1'."
            ) from error
        if wanted.marker and not wanted.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            folder = dict(OURS.values()).get(wanted.name)
            cure = f" In a checkout of vqcore, run: pip install ./{folder}" if folder else ""
            raise ConfigError(
                f"{layer}: requires {wanted}, but {wanted.name} is not installed.{cure}"
            ) from None
        if not wanted.specifier.contains(version, prereleases=True):
            raise ConfigError(f"{layer}: requires {wanted}, but {wanted.name} {version} is installed.")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _schema_leaves(cls: type, path: str = "") -> Iterable[str]:
    for f in dataclasses.fields(cls):
        here = f"{path}.{f.name}" if path else f.name
        annotation = _hints(cls)[f.name]
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) and not f.metadata:
            yield from _schema_leaves(annotation, here)
        else:
            yield here


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _field_texts(cls: type) -> dict[str, str]:
    """The string literal under each annotated field, read from the source."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    texts, previous = {}, None
    for node in getattr(body, "body", []):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and previous and isinstance(node.value.value, str):
            texts[previous] = " ".join(node.value.value.split())
        is_field = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        previous = node.target.id if is_field else None
    return texts


def _type_name(annotation: Any, many: bool = False) -> str:
    """A type in words: `an integer`, or with `many` `integers`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _type_name(arg, many) for arg in args)
    if origin is tuple:
        same = Ellipsis in args or len(set(args)) == 1
        count = "" if Ellipsis in args else f"{len(args)} "
        inner = (
            f" of {count}{_type_name(args[0], many=True)}"
            if same
            else f" ({', '.join(map(_type_name, args))})"
        )
        return f"lists{inner}" if many else f"a list{inner}"
    if origin is dict:
        inner = f"from names to {_type_name(args[1], many=True)}"
        return f"mappings {inner}" if many else f"a mapping {inner}"
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return "settings" if many else "a mapping of settings"
    words = {int: ("an integer", "integers"), float: ("a number", "numbers"), str: ("text", "texts")}
    words[bool] = ("true or false", "truth values")
    return (
        words[annotation][many] if annotation in words else getattr(annotation, "__name__", str(annotation))
    )


def _many(kind: str) -> str:
    return f"{kind[:-1]}ies" if kind.endswith("y") else kind if kind == "data" else f"{kind}s"


def _from_text(text: str) -> Any:
    try:
        return _yaml_value(text)
    except (yaml.YAMLError, OmegaConfBaseException):
        return text


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
