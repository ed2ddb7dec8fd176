"""`vqcore report`: one page about a run, for a browser."""

import argparse
from pathlib import Path

from vqcore import report
from vqcore.console import say


def run(args: argparse.Namespace) -> int:
    """Write `report.html` into the run's folder."""
    say(f"report         {report.write(Path(args.run), samples=args.samples)}")
    return 0
