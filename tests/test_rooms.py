"""The rooms of the core: imports point downwards and form no circle; a plugin imports no other plugin."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

CORE = Path(__file__).parents[1] / "vqcore"
PLUGINS = Path(__file__).parents[1] / "plugins"
PAGE = Path(__file__).parents[1] / "docs/architecture.md"
ROOMS = [
    re.findall(r"`(\w+)/?`", row.split("|")[1])
    for row in re.search(r"\| room \|.*?\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"))[1].splitlines()[
        1:
    ]
]
"""The rows of the table: a file may import what stands in its own row or in a row above it."""


def modules(root: Path, package: str) -> dict[str, Path]:
    """Every module below a package by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join((package, *parts))] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules, and what is taken from them, that a file imports, wherever in the file, for types as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def packages(path: Path) -> set[str]:
    """The packages that a file imports from."""
    return {name.partition(".")[0] for name in imports(path)}


CORE_MODULES = modules(CORE, "vqcore")


def graph() -> dict[str, set[str]]:
    return {
        name: imports(path) & CORE_MODULES.keys() - {"vqcore", name} for name, path in CORE_MODULES.items()
    }


def room(name: str) -> int:
    top = name.split(".")[1]
    return next(place for place, names in enumerate(ROOMS) if top in names)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, each sorted."""
    reach = {name: set(targets) for name, targets in arrows.items()}
    changed = True
    while changed:
        changed = False
        for targets in reach.values():
            more = set().union(*(reach.get(target, set()) for target in targets)) - targets
            if more:
                targets |= more
                changed = True
    groups = {tuple(sorted(o for o in reach[n] if n in reach.get(o, ()))) for n in reach if n in reach[n]}
    return sorted(list(group) for group in groups)


def test_every_module_has_a_room():
    strays = [n for n in CORE_MODULES if "." in n and not any(n.split(".")[1] in names for names in ROOMS)]
    assert not strays


def test_no_import_points_upwards():
    upwards = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in targets
        if name != "vqcore" and room(target) > room(name)
    ]
    assert not upwards


def test_no_circles():
    assert circles(graph()) == []


def test_the_finder_of_circles_finds_them():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}
    assert circles(arrows) == [["a", "b", "c"], ["e"]]


def test_the_core_imports_no_plugin():
    ours = {folder.name for folder in PLUGINS.glob("vqcore_*")}
    for name, path in CORE_MODULES.items():
        assert not ours & packages(path), name


def test_what_installs_all_plugins_names_them_all():
    """The extra `all`, the Makefile, and the command of the README."""
    root = PLUGINS.parent
    ours = sorted(folder.name for folder in PLUGINS.glob("vqcore_*"))
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["all"]
    named = [need.partition("==")[0].replace("-", "_") for need in extra if need.startswith("vqcore-")]
    made = re.search(r"^PLUGINS := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    command = re.search(r"^pip install -e \. (.*)$", (root / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == ours
    assert sorted(f"vqcore_{name}" for name in made[1].split()) == ours
    assert sorted(re.findall(r"-e plugins/(\w+)", command[1])) == ours


@pytest.mark.parametrize("folder", sorted(PLUGINS.glob("vqcore_*")), ids=lambda path: path.name)
def test_a_plugin_imports_no_other_plugin_but_those_it_declares(folder):
    needs = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {need.partition("==")[0].replace("-", "_") for need in needs}
    others = {path.name for path in PLUGINS.glob("vqcore_*")} - {folder.name} - declared
    for path in (folder / folder.name).rglob("*.py"):
        assert not packages(path) & others, path


def test_omegaconf_is_named_in_one_room():
    named = [name for name, path in CORE_MODULES.items() if "omegaconf" in packages(path)]
    assert {name.rpartition(".")[0] for name in named} == {"vqcore.compose"}
