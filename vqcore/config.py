"""Settings of components: the base class `Config`, slots for nested components, configs as plain data. Ground: standard library only.

A component states its settings as a nested frozen dataclass that inherits `Config`; a component inside a component is a
`slot`, several are `slots`. `vqcore.compose` reads files into these classes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


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


def slots(kind: str, *, optional: bool = False) -> Any:
    """A setting that is a mapping from labels to components of this kind; empty by default.

    With `optional` a component whose plugin is not installed is left out with a warning, and is no error.
    """
    return dataclasses.field(default_factory=dict, metadata={"slots": kind, "optional": optional})


def to_tree(config: Any) -> Any:
    """A config as plain nested data: mappings, lists, numbers, strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_tree(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_tree(value) for value in config]
    return config


def deciding(cfg: Config, kind: str, identity: Callable[[str, str], str]) -> dict[str, Any]:
    """A component's settings that decide what it does with an input, as plain data; what fingerprints are made of.

    Settings that matter in training only are left out, and so are those at their default: a setting that a later
    version adds changes nothing. `identity(kind, name)` is the name that a component keeps through renamings
    (`Registry.identity`).
    """
    found: dict[str, Any] = {"name": identity(kind, cfg.name)}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if f.name == "name" or f.name in cfg.training_only or value == f.default:
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


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of nested data with its value; lists, and empty mappings, are leaves."""
    if isinstance(tree, Mapping) and (tree or not path):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
