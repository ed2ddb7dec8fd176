"""`vqcore fit`: make a tokenizer that needs no training."""

import argparse

from vqcore import dist
from vqcore.commands.loading import access
from vqcore.commands.train import show_end
from vqcore.compose.layers import load
from vqcore.schema import RunConfig
from vqcore.trainer import fit

UNUSED = {"optim": {"lr": 1.0}}
"""Nothing is trained, so a config for `vqcore fit` needs no optimizer."""


def run(args: argparse.Namespace) -> int:
    """Fit, and print what was found and where the results are."""
    config = load(args.config, args.overrides, schema=RunConfig, absent=UNUSED).config
    run, facts = fit(config, access(args))
    if dist.is_main():
        show_end(run, facts, args)
    return 0
