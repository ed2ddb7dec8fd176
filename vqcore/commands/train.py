"""`vqcore train`: a config becomes a run."""

import argparse
import signal

from vqcore import dist
from vqcore.config import load
from vqcore.console import command, say
from vqcore.schema import RunConfig


def run(args: argparse.Namespace) -> int:
    """Train to the end and say where to look."""
    config = load(args.config, args.overrides, schema=RunConfig).config
    from vqcore.trainer import train

    finished = train(config)
    if finished.stopped_by:
        return 128 + getattr(signal, finished.stopped_by, signal.SIGTERM)
    if dist.is_main() and finished.last_evaluation:
        say("")
        for name, value in finished.last_evaluation.items():
            say(f"  {name:24} {value:.4g}")
    if dist.is_main() and finished.window:
        used, held = finished.window.figures()["codes/usage"], finished.window.held
        say(f"  codebook used            {used:.1%} of it by the last {held:,} training tokens")
    say(f"\nrun folder     {finished.dir}")
    say(f"pictures       {finished.dir / 'samples' / 'strip.png'} (as it learned)")
    if finished.last_evaluation:
        say(f"               {finished.dir / 'samples' / 'sheet.png'} (original, rebuilt, token map)")
    say(f"report         {finished.dir / 'report.html'} (curves, best and worst samples, codes)")
    say(f"next           {command('eval', finished.dir)}")
    say(f"               {command('tokenize', finished.dir, 'FOLDER', 'tokens')}")
    say(f"               {command('export', finished.dir, 'my-tokenizer')}")
    return 0
