"""`vqcore show NAME`: explain a component (summary, origin, settings, sampling options) or a section of a config."""

import argparse
import dataclasses
import inspect
import textwrap
import typing
from typing import Any

from vqcore.compose.describe import REQUIRED, inline, settings
from vqcore.errors import UnknownName, did_you_mean, listed
from vqcore.registry import Registry, registry
from vqcore.sampling import UNSTATED, options
from vqcore.schema import RunConfig
from vqcore.streams import put


def run(args: argparse.Namespace) -> int:
    """Print every component with this name (several kinds may share a name), else the section with this name."""
    catalogue = registry()
    if args.name is None:
        _list(catalogue)
        return 0
    id, _, short = args.name.rpartition("/")
    id = id or "core"
    found = [c for c in catalogue.plugin(id).components if short in (c.name, *c.renamed_from)]
    if not found and args.name in sections():
        _section(args.name)
    elif not found:
        raise UnknownName(_no_component(catalogue, args.name))
    for component in found:
        cls: Any = catalogue.load(component.kind, args.name)
        name = catalogue.find(component.kind, args.name).name
        put(f"{name}  ({component.kind})  {component.summary}")
        put(f"from {catalogue.origin(id)}, {component.target}, {_place(cls)}\n")
        if cls.__doc__:
            put(textwrap.indent(inspect.cleandoc(cls.__doc__), "  ") + "\n")
        _settings(cls.Config)
        if component.kind == "objective" and hasattr(cls, "decode"):
            _sampling(cls)
    return 0


def sections() -> dict[str, type]:
    """The sections of a config file: the dataclass by name."""
    hints = typing.get_type_hints(RunConfig)
    return {
        name: hint
        for name, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


def _section(name: str) -> None:
    """Print a section and the settings in its mappings (`optim.players`)."""
    cls: Any = sections()[name]
    put(f"{name}  (a section of a config)  {inspect.cleandoc(cls.__doc__)}\n")
    _settings(cls)
    for key, hint in typing.get_type_hints(cls).items():
        inner = typing.get_args(hint)[-1:]
        if typing.get_origin(hint) is dict and inner[0].__module__ == cls.__module__:
            put(f"\n{name}.{key}.NAME  {inspect.cleandoc(inner[0].__doc__)}\n")
            _settings(inner[0])


def _settings(cls: type, above: str = "") -> None:
    """Print the settings of a class, those of a mapping of settings after the mapping itself."""
    for setting in settings(cls):
        default = REQUIRED if setting.default == REQUIRED else f"default {setting.default}"
        _explain(f"{above}{setting.name}", setting.type, default, setting.text)
        for inner in typing.get_args(typing.get_type_hints(cls)[setting.name]):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                _settings(inner, f"{setting.name}.")


def _sampling(objective_cls: type) -> None:
    """Print the sampling options of an objective, if it has any."""
    if found := options(objective_cls):
        put("\nsampling options, for `vqcore decode RUN TOKENS OUT option=value` and eval.sampling:\n")
    for option in found:
        default = REQUIRED if option.default is UNSTATED else f"default {inline(option.default)}"
        _explain(option.name, option.type_text, default, option.text)


def _explain(name: str, type_: str, default: str, text: str) -> None:
    put(f"  {name}: {type_}, {default}")
    put(textwrap.indent(textwrap.fill(text, 96), "      "))


def _list(catalogue: Registry) -> None:
    """Print the names of the sections, then the names of the components by kind."""
    put(textwrap.fill(f"sections of a config: {', '.join(sections())}", 110, subsequent_indent="  "))
    names: dict[str, list[str]] = {}
    for found in catalogue.components():
        names.setdefault(found.component.kind, []).append(found.name)
    for kind, own in names.items():
        put(textwrap.fill(f"{kind}: {', '.join(own)}", 110, subsequent_indent="  "))


def _no_component(catalogue: Registry, name: str) -> str:
    if name in catalogue.ids():
        inside = [found.name for found in catalogue.components() if found.origin.id == name]
        return f"'{name}' is a plugin, not a component. Components of '{name}': {listed(inside, 40)}."
    names = sorted({*(found.name for found in catalogue.components()), *sections()})
    same = [other for other in names if other.rpartition("/")[2] == name]
    hint = f" Did you mean '{same[0]}'?" if same else did_you_mean(name, names)
    return f"no component or section '{name}'.{hint} List all names: vqcore show"


def _place(cls: type) -> str:
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return "no source"
