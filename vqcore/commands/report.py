"""`vqcore report`: write an HTML page about a run. The plugin `track` writes the page."""

import argparse
import contextlib
from typing import Any

from vqcore.artefacts.resolve import resolve
from vqcore.commands.loading import access
from vqcore.console import say
from vqcore.errors import CheckpointError
from vqcore.files import local
from vqcore.registry import registry


def run(args: argparse.Namespace) -> int:
    """Write `report.html` into the run's folder."""
    report: Any = registry().load("hook", "track/report")
    page = report.write(local(args.run), samples=args.samples, access=access(args))
    with contextlib.suppress(CheckpointError):  # the page says that there is no checkpoint
        say(f"{args.run}: {resolve(args.run).why}")
    say(f"report         {page}")
    return 0
