"""`vqcore show NAME`: what a component is, where it comes from and every setting it has."""

import argparse
import inspect
import textwrap
from typing import Any

from vqcore.config import REQUIRED, settings
from vqcore.errors import UnknownName, did_you_mean, listed
from vqcore.registry import Registry, registry


def run(args: argparse.Namespace) -> int:
    """Print every component of this name (a name may serve in several kinds)."""
    catalogue = registry()
    id, _, short = args.name.rpartition("/")
    id = id or "core"
    found = [c for c in catalogue.plugin(id).components if short in (c.name, *c.renamed_from)]
    if not found:
        raise UnknownName(_no_component(catalogue, args.name))
    for component in found:
        cls: Any = catalogue.load(component.kind, args.name)
        name = catalogue.find(component.kind, args.name).name
        print(f"{name}  ({component.kind})  {component.summary}")
        print(f"from {catalogue.origin(id)}, {component.target}, {_place(cls)}\n")
        if cls.__doc__:
            print(textwrap.indent(inspect.cleandoc(cls.__doc__), "  ") + "\n")
        for setting in settings(cls.Config):
            required = setting.default == REQUIRED
            default = REQUIRED if required else f"default {setting.default}"
            print(f"  {setting.name}: {setting.type}, {default}")
            print(textwrap.indent(textwrap.fill(setting.text, 96), "      "))
    return 0


def _no_component(catalogue: Registry, name: str) -> str:
    if name in catalogue.ids():
        inside = [found.name for found in catalogue.components() if found.origin.id == name]
        return f"'{name}' is a plugin, no component. It has: {listed(inside, 40)}."
    names = sorted({found.name for found in catalogue.components()})
    same = [other for other in names if other.rpartition("/")[2] == name]
    hint = f" Did you mean '{same[0]}'?" if same else did_you_mean(name, names)
    return f"no component '{name}'.{hint} Installed: {listed(names, 40)}."


def _place(cls: type) -> str:
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return "no source"
