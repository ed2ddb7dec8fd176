"""Recipes: the configs in the core and in plugins, found by name (`recipe:NAME`)."""

import functools
import importlib.util
from pathlib import Path

from vqcore.errors import ConfigError, did_you_mean
from vqcore.registry import Registry, registry


def recipe_path(name: str, registry_: Registry | None = None) -> Path:
    """The file behind `recipe:NAME`: in the core, or for `vit/...` in the folder `cfgs/` of the package of `vit`."""
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
    """The names of all recipes in the core and in the installed plugins. Skips ids with two distributions."""
    core = core_recipes()
    names = [_recipe_name(core, path) for path in sorted(core.rglob("*.yaml"))] if core else []
    for id, origins in (registry_ or registry()).ids().items():
        if id != "core" and len(origins) == 1:
            for folder in _plugin_recipes(origins[0].module):
                names += [f"{id}/{_recipe_name(folder, path)}" for path in sorted(folder.rglob("*.yaml"))]
    return names


@functools.cache
def core_recipes() -> Path | None:
    """The folder of the core's recipes: inside the package of a wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
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
