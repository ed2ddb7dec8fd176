"""`vqcore fit`: make a tokenizer that needs no training."""

import argparse

from vqcore.commands.loading import access, again
from vqcore.compose.layers import load
from vqcore.console import command, say
from vqcore.schema import RunConfig
from vqcore.trainer import fit

UNUSED = {"optim": {"lr": 1.0}}
"""Nothing is trained, so a config for `vqcore fit` needs no optimizer."""


def run(args: argparse.Namespace) -> int:
    """Fit, and print what was found and where the results are."""
    config = load(args.config, args.overrides, schema=RunConfig, absent=UNUSED).config
    run, facts = fit(config, access(args))
    facts = {**facts, **{name: f"{value:.4g}" for name, value in run.progress.evaluation.items()}}
    say("")
    for name, text in facts.items():
        say(f"  {name:{max(map(len, facts))}}  {text}")
    say(f"\nrun folder     {run.dir}")
    if run.progress.evaluation:
        say(f"pictures       {run.dir / 'samples' / 'sheet.png'} (original, reconstruction, token map)")
    say(f"next           {command('eval', run.dir, *again(args, ours=True))}")
    say(f"               {command('tokenize', run.dir, 'FOLDER', 'tokens', *again(args, ours=True))}")
    say(f"               {command('export', run.dir, 'my-tokenizer', *again(args, ours=True))}")
    return 0
