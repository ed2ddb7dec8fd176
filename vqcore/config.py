"""Settings of components: the base class `Config`, slots for nested components, configs as plain data.

A component declares its settings as a nested frozen dataclass that inherits `Config`. A setting that is another
component is a `slot`; a setting that is a mapping of components is `slots`. `vqcore.compose` reads files into these
classes. This module needs the standard library only.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from vqcore.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of every component's settings. `name` is the component's full name, e.g. `quant/fsq`.

    `training_only` lists the settings that change neither the codes of an input nor the decoding of codes, other than
    by what tensors of the component hold. A tokenizer's fingerprint leaves these settings out. `places` lists the
    settings that say where borrowed weights lie (`vqcore.borrowed`): they are null or a text, and only `hf://`
    addresses are kept in a saved tokenizer.
    """

    training_only: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[tuple[str, ...]] = ()
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class NoSettings(Config):
    """The `Config` of a component without settings: `Config = NoSettings`."""


def refuse_idle(config: Any, because: str, *names: str) -> None:
    """Raise `SettingError` for the first of these settings that was changed: it does nothing, for the reason given.

    `because` is the setting that switches the others off, as it is set: `out_conv=none`. Call it in `__post_init__`.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if f.name in names and value != default:
            shown = list(value) if isinstance(value, tuple) else value
            raise SettingError(f.name, f"{shown} does nothing with {because}; leave it out")


def at_least(config: Any, **least: int) -> None:
    """Raise `SettingError` for the first of these settings that is below its number, or has one in a list that is.

    Null passes. Call it in `__post_init__`: `at_least(self, steps=1, warmup=0)`.
    """
    for name, low in least.items():
        _check(config, name, partial(operator.le, low), f"at least {low}")


def above_zero(config: Any, *names: str) -> None:
    """As `at_least`, for settings whose numbers must be above 0."""
    for name in names:
        _check(config, name, partial(operator.lt, 0), "above 0")


def _check(config: Any, name: str, holds: Callable[[Any], bool], rule: str) -> None:
    value = getattr(config, name)
    shown = list(value) if isinstance(value, tuple) else value
    if shown == []:
        raise SettingError(name, "[] is empty")
    if value is not None and not all(map(holds, value if isinstance(value, tuple) else (value,))):
        raise SettingError(name, f"{shown} must be {rule}")


def slot(kind: str, *, default: Any = dataclasses.MISSING) -> Any:
    """A setting that is a component of this kind. `default` is None or a mapping such as `{"name": ...}`."""
    metadata = {"slot": kind, "default": default}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=None, metadata=metadata)


def slots(kind: str, *, optional: bool = False) -> Any:
    """A setting that is a mapping from labels to components of this kind; empty by default.

    With `optional`, a component whose plugin is not installed is left out with a warning. Without, this is an error.
    """
    return dataclasses.field(default_factory=dict, metadata={"slots": kind, "optional": optional})


def to_tree(config: Any) -> Any:
    """A config as plain nested data: mappings, lists, numbers and strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_tree(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_tree(value) for value in config]
    return config


def deciding(cfg: Config, kind: str, identity: Callable[[str, str], str]) -> dict[str, Any]:
    """The settings that decide what a component does with an input, as plain data. Fingerprints are computed from them.

    Settings in `training_only` and settings with their default value are left out, so a setting that a later version
    adds does not change the fingerprint. `identity(kind, name)` is the name that a component keeps when the component
    is renamed (`Registry.identity`).
    """
    found: dict[str, Any] = {"name": identity(kind, cfg.name)}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if f.name in ("name", *cfg.training_only, *cfg.places) or value == default:
            continue
        if "slot" in f.metadata and isinstance(value, Config):
            found[f.name] = deciding(value, f.metadata["slot"], identity)
        elif "slots" in f.metadata:
            found[f.name] = {
                label: deciding(part, f.metadata["slots"], identity) for label, part in value.items()
            }
        else:
            found[f.name] = to_tree(value)
    return found


def portable(config: Any) -> Any:
    """The same config for another machine: without local paths of borrowed weights, without parts for training only.

    Parts for training only are components in settings that `training_only` lists, such as the adversary of an
    objective: a saved tokenizer must load without the plugins of such parts.
    """
    if isinstance(config, Mapping):
        return {key: portable(value) for key, value in config.items()}
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changed = {f.name: portable(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Config):
        for f in dataclasses.fields(config):
            if f.name in config.places and not str(changed[f.name]).startswith("hf://"):
                changed[f.name] = None
            elif f.name in config.training_only and "slots" in f.metadata:
                changed[f.name] = {}
            elif f.name in config.training_only and f.metadata.get("default", "required") is None:
                changed[f.name] = None
    return dataclasses.replace(config, **changed)


def placed(config: Any, other: Any) -> Any:
    """The config with the places of borrowed weights that another config of the same components has."""
    if isinstance(config, Mapping) and isinstance(other, Mapping):
        return {key: placed(value, other.get(key)) for key, value in config.items()}
    if type(config) is not type(other) or not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changed = {}
    for f in dataclasses.fields(config):
        ours, theirs = getattr(config, f.name), getattr(other, f.name)
        is_place = isinstance(config, Config) and f.name in config.places
        changed[f.name] = (theirs if ours is None else ours) if is_place else placed(ours, theirs)
    return dataclasses.replace(config, **changed)


def place_keys(config: Any, path: str = "") -> Iterator[str]:
    """The dotted keys of all settings that say where borrowed weights lie."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from place_keys(value, f"{path}.{key}" if path else str(key))
    elif dataclasses.is_dataclass(config):
        for f in dataclasses.fields(config):
            here = f"{path}.{f.name}" if path else f.name
            if isinstance(config, Config) and f.name in config.places:
                yield here
            else:
                yield from place_keys(getattr(config, f.name), here)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of nested data with its value. Lists and empty mappings are values."""
    if isinstance(tree, Mapping) and (tree or not path):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
