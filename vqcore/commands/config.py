"""`vqcore config`: a config as training would see it, complete and checked."""

import argparse

from vqcore.config import dump, inline, leaves, load, recipes, to_tree
from vqcore.errors import ConfigError
from vqcore.schema import RunConfig


def run(args: argparse.Namespace) -> int:
    """Print the resolved YAML; with --origin one line a setting and the layer it came from."""
    if args.list:
        for name in recipes():
            print(f"recipe:{name}")
        return 0
    if not args.config:
        raise ConfigError("name a config: vqcore config FILE.yaml (or --list the recipes).")
    loaded = load(args.config, args.overrides, schema=RunConfig)
    if not args.origin:
        print(dump(loaded.config), end="")
        return 0
    for key, value in leaves(to_tree(loaded.config)):
        print(f"{key}={inline(value)}  # {loaded.layer(key)}")
    return 0
