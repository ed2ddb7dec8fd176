"""Turns a merged tree into checked dataclasses: finds every named component and checks the type of every value."""

import copy
import dataclasses
import functools
import importlib.metadata
import logging
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException
from packaging.requirements import InvalidRequirement, Requirement

from vqcore.compose.describe import type_text, value_text
from vqcore.compose.text import from_text, plain_number
from vqcore.config import Config
from vqcore.errors import (
    ConfigError,
    PluginLoadError,
    SettingError,
    UnknownName,
    UnknownPlugin,
    VqcoreError,
    did_you_mean,
    first_line,
    listed,
)
from vqcore.plugin import a_kind
from vqcore.reading import MOST_YAML, is_mapping, read_text, yaml_reason, yaml_root
from vqcore.registry import OURS, Registry, registry

log = logging.getLogger(__name__)
T = TypeVar("T")

COMMAND_LINE = "command line"
_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
"""A reference of OmegaConf. `describe.dump` escapes what looks like one."""
LARGEST = {int: 1e12, float: 3.4028234663852886e38}
"""No setting takes a number of a larger magnitude. The largest float of 32 bits stands for no-data in many files."""


def from_tree(
    tree: Mapping[str, Any],
    *,
    schema: type[T],
    origin: Mapping[str, str] | None = None,
    file: str = "config",
    registry_: Registry | None = None,
) -> T:
    """Check plain nested data against a schema and build the schema's dataclass. Errors name the layer and the key.

    `origin` is the layer (a file or the command line) of each dotted key; `file` is the layer of all other keys.
    """
    builder = _Builder(origin or {}, file, registry_ or registry(), schema)
    try:
        plain = dict(tree)
        if _is_plain(plain):
            resolved: Any = copy.deepcopy(plain)
        else:
            resolved = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    except OmegaConfBaseException as error:
        key = full_key(error)
        raise ConfigError(
            f"{builder.layer(key.partition('[')[0])}: {omegaconf_reason(error, key)}"
        ) from error
    assert isinstance(resolved, dict)
    _check_requires(resolved.get("requires"), builder.layer("requires"))
    return builder.build(schema, resolved, "")


def _is_plain(tree: Any) -> bool:
    """Whether nested data has no reference that OmegaConf would have to resolve, which takes ten times as long."""
    if isinstance(tree, dict):
        return all(type(key) in (str, int) for key in tree) and all(map(_is_plain, tree.values()))
    if isinstance(tree, list):
        return all(map(_is_plain, tree))
    return "${" not in tree if isinstance(tree, str) else type(tree) in (int, float, bool, type(None))


def component(
    kind: str, node: Mapping[str, Any], *, file: str, where: str = "", registry_: Registry | None = None
) -> Any:
    """The checked settings of a component from a mapping with its name; errors name `file`, and keys under `where`."""
    catalogue = registry_ or registry()
    try:
        catalogue.find(kind, str(node["name"]), where)
    except UnknownName as error:
        raise error.at(where) if where else error from None
    return _Builder({}, file, catalogue, Config).component(kind, dict(node), where, Config)


def check_readable(config: Any, text: str) -> None:
    """Raise `ConfigError` unless a saved config reads back as the same config; `text` is its YAML.

    A component's default that its own type forbids is found here, before anything is saved.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        assert isinstance(tree, dict)
        same = from_tree({str(key): value for key, value in tree.items()}, schema=type(config)) == config
    except ConfigError as error:
        raise ConfigError(f"the resolved config cannot be read back: {error}") from error
    except yaml.YAMLError as error:  # a text in a setting of any type that is no UTF-8
        raise ConfigError(f"the resolved config cannot be read back: {yaml_reason(error)}.") from error
    if not same:
        raise ConfigError("the resolved config reads back as another config; a setting has a wrong default.")


def saved_tree(path: Path) -> dict[str, Any]:
    """A saved config as plain data for `from_tree`. Raises `ConfigError` if the file is missing or damaged."""
    text = read_text(path, ConfigError, most=MOST_YAML)
    try:
        root = yaml_root(text)
        if not is_mapping(root):
            raise ConfigError(f"{path}: cannot be read: a config is a mapping (key: value).")
        tree: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: cannot be read: {omegaconf_reason(error, full_key(error))}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {yaml_reason(error)}.") from error
    saved = {str(key): value for key, value in tree.items()}
    # A reference could stand for any amount of text, or for what stands in the environment of this process.
    if found := next((key for key, value in _texts(saved) if _REFERENCE.search(value)), None):
        raise ConfigError(f"{path}: {found}: a saved config has no references such as ${{key}}.")
    return saved


def _is_a_name(text: str) -> bool:
    """Whether a text can be saved in YAML, which is UTF-8, and can name something."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return bool(text.strip()) and "\0" not in text


def _texts(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested plain data, with its dotted key."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        here = joined(path, str(key))
        if isinstance(value, str):
            yield here, value
        yield from _texts(value, here)


def full_key(error: OmegaConfBaseException) -> str:
    """The config key in one of OmegaConf's errors, or an empty text."""
    return str(getattr(error, "full_key", None) or "")


def omegaconf_reason(error: OmegaConfBaseException, key: str) -> str:
    """The message for one of OmegaConf's errors: `key: what is wrong. What to write.`"""
    reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", first_line(error)).strip('"')
    if "nvironment variable" in reason:
        hint = " Set the variable, or give a default: ${oc.env:NAME,default}."
    elif isinstance(error, (InterpolationResolutionError, GrammarParseError)):
        hint = (
            " An interpolation is ${key.path}, where the config sets key.path, or ${oc.env:NAME};"
            " write \\${ for a literal ${."
        )
    else:
        hint = ""
    return f"{key}: {reason}.{hint}" if key else f"{reason}.{hint}"


def joined(path: str, name: str) -> str:
    """The dotted key of a setting `name` below `path`; an empty path is the top level."""
    return f"{path}.{name}" if path else name


class _Builder:
    """Turns a plain tree into dataclasses, slot by slot. `path` is always the dotted key of the node."""

    def __init__(self, origin: Mapping[str, str], file: str, registry_: Registry, schema: type):
        self.origin, self.file, self.registry, self.schema = origin, file, registry_, schema

    def build(self, cls: type[T], node: Any, path: str, component: str = "") -> T:
        """A dataclass from a mapping. `component` is the full name if `cls` is the Config of a component."""
        if not isinstance(node, dict):
            raise self._error(path, f" must be a mapping, not {value_text(node)}.")
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
            value = self._setting(field, hints[name], given, joined(path, name))
            if value is not dataclasses.MISSING:
                values[name] = value
        try:
            return cls(**values)
        except SettingError as error:
            raise self._refused(cls, path, values, error) from error
        except ValueError as error:
            raise self._error(path, f": {_sentence(error)}") from error

    def layer(self, path: str) -> str:
        """The layer that set a key, or the one layer that set all keys below, or the layer of the next key above."""
        if path in self.origin:
            return self.origin[path]
        inside = {label for key, label in self.origin.items() if path and key.startswith(f"{path}.")}
        if len(inside) == 1:
            return inside.pop()
        above = path.rpartition(".")[0]
        return self.layer(above) if above and not inside else self.file

    def _setting(self, field: dataclasses.Field, annotation: Any, given: Any, path: str) -> Any:
        if "slot" in field.metadata:
            return self._slot(field, given, path, annotation)
        if "slots" in field.metadata:
            return self._slots(field, given, path)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            return self.build(annotation, {} if given is dataclasses.MISSING else given, path)
        if given is not dataclasses.MISSING:
            if given == "" == field.default:
                return given
            return self._leaf(annotation, given, path)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise self._error(path, f" is required ({type_text(annotation)}).")
        return given  # MISSING: the dataclass has a default

    def _slot(self, field: dataclasses.Field, given: Any, path: str, base: Any) -> Any:
        kind, default = field.metadata["slot"], field.metadata["default"]
        if given is dataclasses.MISSING:
            if default is dataclasses.MISSING:
                raise self._error(path, f" is required: {self._wish(kind)}")
            given = default
        if given is None:
            if default is dataclasses.MISSING:
                raise self._error(path, f" cannot be null. Expected: {self._wish(kind)}")
            return None
        if isinstance(given, dict) and isinstance(default, Mapping) and "name" not in given:
            given = {**default, **given}
        return self.component(kind, given, path, base if isinstance(base, type) else Config)

    def _slots(self, field: dataclasses.Field, given: Any, path: str) -> Any:
        """The components by label. A label with the value null removes the component that an earlier layer set."""
        if given is dataclasses.MISSING or given is None:
            return {}
        if not isinstance(given, dict):
            raise self._error(path, f" must be a mapping from labels to components, not {value_text(given)}.")
        found = {}
        for label, node in given.items():
            if node is None:
                continue
            try:
                found[label] = self.component(field.metadata["slots"], node, f"{path}.{label}", Config)
            except UnknownPlugin as error:
                if not field.metadata["optional"]:
                    raise
                log.warning("warning: %s The run continues without %s.", error, f"{path}.{label}")
        return found

    def component(self, kind: str, node: Any, path: str, base: type) -> Any:
        """The settings of the component that a mapping names; `base` is the class that they must inherit."""
        if isinstance(node, str):
            raise self._error(
                path,
                f"={value_text(node)} is not a mapping. Write {{name: {node}}}, "
                f"or {path}.name={node} on the command line.",
            )
        if not isinstance(node, dict):
            raise self._error(
                path, f" must be a mapping with a name, not {value_text(node)}. Expected: {self._wish(kind)}"
            )
        if not isinstance(node.get("name"), str) or not node["name"]:
            raise self._error(path, f" has no name. Expected: {self._wish(kind)}")
        name_key = joined(path, "name")
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
            is_not = f"is not {type_text(found.annotation)}."
            text = f"={value_text(found.value)} {found.why or is_not}"
            if found.why:
                pass
            elif (number := plain_number(str(found.value))) is not None and isinstance(found.value, str):
                text += f" A number is written in digits: write {number}."
            elif found.annotation is str and isinstance(found.value, (int, float)):
                quotes = (
                    "quote it twice, '\"...\"'" if self.layer(path) == COMMAND_LINE else "put it in quotes"
                )
                text += f" If it is meant as text, {quotes}."
            raise self._error(found.path, text) from found

    def _typed(self, annotation: Any, value: Any, path: str) -> Any:
        """The value as the type of its setting. Only values that YAML cannot write in this type are converted.

        A list becomes a tuple, an integer becomes a float, a float without a fraction becomes an integer, and a text
        becomes a number or a truth value (environment variables are always text).
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
            return {
                self._key(args[0], key, path): self._typed(args[1], v, f"{path}.{key}")
                for key, v in value.items()
            }
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            return self.build(annotation, value, path)
        plain = from_text(value) if annotation in (int, float, bool) and isinstance(value, str) else value
        if (
            annotation in LARGEST
            and type(plain) in LARGEST
            and not abs(plain) <= (most := LARGEST[annotation])
        ):
            raise _Mismatch(path, value, annotation, f"must be a number from -{most:g} to {most:g}.")
        if annotation is float and type(plain) in (int, float):
            return float(plain)
        if annotation is int and type(plain) is float and plain.is_integer():
            return int(plain)  # YAML reads 1e4 as a float
        if annotation is str and isinstance(plain, str) and not _is_a_name(plain):
            raise _Mismatch(path, value, annotation, "is no text that a path or a name can be.")
        if annotation in (int, bool, str, type(None)) and type(plain) is annotation:
            return plain
        raise _Mismatch(path, value, annotation)

    def _key(self, annotation: Any, key: Any, path: str) -> Any:
        """The key of a mapping as text, or as an integer where the setting has integer keys."""
        if annotation is int:
            if not re.fullmatch("0|[1-9][0-9]{0,11}", str(key)):
                raise _Mismatch(f"{path}.{key}", key, int)
            return int(key)
        return str(key)

    def _one_of(self, annotation: Any, value: Any, path: str) -> Any:
        inside = refused = None
        args = typing.get_args(annotation)
        for arg in sorted(args, key=lambda arg: type(value) is not arg):  # the value's own type first
            try:
                return self._typed(arg, value, path)
            except _Mismatch as found:
                inside = found if found.path != path else inside
                refused = found if found.why else refused
        raise inside or refused or _Mismatch(path, value, annotation)

    def _unknown(self, key: str, known: list[str], path: str, component: str) -> VqcoreError:
        here = joined(path, key)
        whose = f"a setting of {component or path}" if component or path else "a top-level setting"
        hint = did_you_mean(key, known)
        if not hint and not path and not component:
            inner = [leaf for leaf in _schema_leaves(self.schema) if leaf.rpartition(".")[2] == key]
            hint = f" Did you mean '{inner[0]}'?" if inner else ""
        hint = hint or f" Settings: {listed(k for k in known if k != 'name') or 'none'}."
        return ConfigError(f"{self.layer(here)}: {here} is not {whose}.{hint}")

    def _refused(self, cls: type, path: str, values: Mapping[str, Any], error: SettingError) -> ConfigError:
        """The error for values that a dataclass has refused, with the layer that set these values.

        If several settings contradict each other and the command line sets one of them, the error names the command
        line, and says which settings of a file can be removed with null.
        """
        text = _sentence(error)
        if len(error.names) == 1:
            return ConfigError(f"{self.layer(joined(path, error.names[0]))}: {joined(path, text)}")
        keys = {joined(path, name): name for name in error.names if values.get(name) is not None}
        given = {key: self.origin[key] for key in keys if key in self.origin}
        if COMMAND_LINE not in given.values():
            return self._error(path, f": {text}")
        theirs = {key: layer for key, layer in given.items() if layer != COMMAND_LINE}
        free = [key for key in theirs if type(None) in typing.get_args(_hints(cls)[keys[key]])]
        remedy = "".join(f" {key} comes from {theirs[key]}; {key}=null removes this value." for key in free)
        return ConfigError(f"{COMMAND_LINE}: {path}: {text}{remedy}")

    def _error(self, path: str, text: str) -> ConfigError:
        layer = self.layer(path.partition("[")[0])
        return ConfigError(f"{layer}: {path}{text}" if path else f"{layer}{text}")


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


def _sentence(error: ValueError) -> str:
    """The first line of an error with a full stop, unless the line ends with a question mark."""
    text = first_line(error)
    return text if text.endswith("?") else f"{text}."


class _Mismatch(Exception):
    """A value does not have the type of its setting, or has it and is refused (`why`)."""

    def __init__(self, path: str, value: Any, annotation: Any, why: str = ""):
        self.path, self.value, self.annotation, self.why = path, value, annotation, why


def _check_requires(requires: Any, layer: str) -> None:
    """Compare `requires:` with the installed packages. Runs before all other checks."""
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
