"""`vqcore check`: check a config before training. Reads samples and trains a few steps; writes nothing."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

from vqcore.artefacts.resolve import checkpoints
from vqcore.borrowed import Access
from vqcore.check.checks import everything
from vqcore.check.findings import Finding
from vqcore.commands.loading import access
from vqcore.compose.layers import load
from vqcore.console import command
from vqcore.errors import VqcoreError, printable
from vqcore.run.folder import check_folder
from vqcore.schema import RunConfig
from vqcore.streams import put


def run(args: argparse.Namespace) -> int:
    """Print each finding as soon as it is known. Status 2 if there is an error."""
    found = []
    # Messages that components print while they are built must not be mixed with the JSON.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        for finding in findings(args.config, args.overrides, access(args)):
            found.append(finding)
            if not args.json:
                _print(finding)
    counts = {grade: sum(f.grade == grade for f in found) for grade in ("error", "warning", "note")}
    if args.json:
        put(json.dumps({"config": args.config, **counts, "findings": [asdict(f) for f in found]}, indent=2))
    else:
        put(f"\n{args.config}: {_number(counts['error'], 'error')}, {_number(counts['warning'], 'warning')}")
        if not counts["error"]:
            put(f"next      {command('train', args.config, *args.overrides)}")
    return 2 if counts["error"] else 0


def findings(path: str, overrides: list[str], given: Access | None = None) -> Iterator[Finding]:
    """The findings of all checks that run before the first training step."""
    try:
        config = load(path, overrides, schema=RunConfig).config
    except VqcoreError as error:
        yield Finding("error", "config", str(error))
        return
    yield Finding("note", "config", "every setting is known and has a possible value")
    yield from _run_dir(config)
    yield from everything(replace(config, run=replace(config.run, compile=False)), given)


def _run_dir(config: RunConfig) -> Iterator[Finding]:
    try:
        check_folder(config)
    except VqcoreError as error:
        yield Finding("error", "run.dir", str(error).removeprefix(f"run.dir={config.run.folder} "))
        return
    if found := checkpoints(config.run.folder):
        yield Finding("note", "run.dir", f"this run has checkpoints: it will resume after step {max(found)}")


def _print(finding: Finding) -> None:
    place = "" if finding.what.startswith(finding.where) else f"{finding.where}: "
    put(f"{finding.grade:8}  {printable(f'{place}{finding.what}')}")
    if finding.remedy:
        put(f"          -> {printable(finding.remedy)}")


def _number(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"
