"""`vqcore train`: train a tokenizer from a config."""

import argparse
import signal
from collections.abc import Mapping

from vqcore import dist
from vqcore.commands.loading import access, again
from vqcore.compose.layers import load
from vqcore.console import command, say
from vqcore.run.state import Run
from vqcore.schema import RunConfig
from vqcore.trainer import train

PICTURES = {
    "strip.png": "reconstructions during training",
    "sheet.png": "original, reconstruction, token map",
}


def run(args: argparse.Namespace) -> int:
    """Train to the end and print where the results are."""
    config = load(args.config, args.overrides, schema=RunConfig).config
    run = train(config, access(args))
    if run.progress.stopped_by:
        return 128 + getattr(signal, run.progress.stopped_by, signal.SIGTERM)
    if dist.is_main():
        used, held = run.window.metrics()["codes/usage"], run.window.held
        show_end(run, {"codebook used": f"{used:.1%} by the last {held:,} training tokens"}, args)
    return 0


def show_end(run: Run, facts: Mapping[str, str], args: argparse.Namespace) -> None:
    """Print the metrics of a run and other facts, where its results are, and what may follow."""
    lines = {name: f"{value:.4g}" for name, value in run.progress.evaluation.items()} | dict(facts)
    say("")
    for name, text in lines.items():
        say(f"  {name:{max(map(len, lines))}}  {text}")
    say(f"\nrun folder     {run.dir}")
    for name, what in PICTURES.items():
        if (path := run.dir / "samples" / name).is_file():
            say(f"pictures       {path} ({what})")
    say(f"next           {command('eval', run.dir, *again(args, ours=True))}")
    say(f"               {command('tokenize', run.dir, 'FOLDER', 'tokens', *again(args, ours=True))}")
    say(f"               {command('export', run.dir, 'my-tokenizer', *again(args, ours=True))}")
