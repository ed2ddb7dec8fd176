"""`vqcore config`: print a config complete and checked, as training uses it."""

import argparse

from vqcore.compose.describe import dump, inline
from vqcore.compose.layers import Loaded, load
from vqcore.compose.recipes import recipes
from vqcore.config import leaves, to_tree
from vqcore.errors import ConfigError
from vqcore.schema import RunConfig
from vqcore.streams import put


def run(args: argparse.Namespace) -> int:
    """Print the resolved YAML; with --origin one line per setting, with the layer that set it."""
    if args.list:
        for name in recipes():
            put(f"recipe:{name}")
        return 0
    if not args.config:
        raise ConfigError(
            "no config given. Run: vqcore config FILE.yaml, or list the recipes: vqcore config --list"
        )
    loaded = load(args.config, args.overrides, schema=None)
    if isinstance(loaded.config, RunConfig):
        _check_optimizers(loaded)
    if not args.origin:
        put(dump(loaded.config).rstrip("\n"))
        return 0
    for key, value in leaves(to_tree(loaded.config)):
        put(f"{key}={inline(value)}  # {loaded.layer(key)}")
    return 0


def _check_optimizers(loaded: Loaded) -> None:
    """Raise `ConfigError` for a wrong optimizer. The schema cannot check the names, because torch has the list."""
    from vqcore.run.optim import check_optimizers  # imports torch, which `vqcore config --list` does not need

    check_optimizers(loaded.config.optim, loaded.layer)
