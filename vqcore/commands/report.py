"""`vqcore report`: write an HTML page about a run. The plugin `track` writes the page."""

import argparse
from pathlib import Path
from typing import Any

from vqcore.console import say
from vqcore.registry import registry


def run(args: argparse.Namespace) -> int:
    """Write `report.html` into the run's folder."""
    report: Any = registry().load("hook", "track/report")
    say(f"report         {report.write(Path(args.run).expanduser(), samples=args.samples)}")
    return 0
