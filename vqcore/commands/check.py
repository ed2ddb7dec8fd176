"""`vqcore check`: check a config before training. Reads samples and trains a few steps; writes nothing."""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from vqcore.artefacts.resolve import checkpoints
from vqcore.assembly import open_data
from vqcore.borrowed import Access
from vqcore.check.checks import UNFITTED, everything
from vqcore.check.findings import Finding
from vqcore.check.values import VALUES, Declared, channel_name, flow, propose_scale, summary_of
from vqcore.commands.eval import print_table
from vqcore.commands.loading import access
from vqcore.compose.layers import load
from vqcore.console import command
from vqcore.errors import DataError, VqcoreError, plural, printable
from vqcore.registry import registry
from vqcore.run.folder import check_folder
from vqcore.schema import RunConfig
from vqcore.streams import put


def run(args: argparse.Namespace) -> int:
    """Print each finding as soon as it is known. Status 2 if there is an error."""
    if args.values:
        return _values(args)
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
        put(f"\n{args.config}: {_number(counts, 'error')}, {_number(counts, 'warning')}")
        if not counts["error"]:
            verb = "fit" if any(f.what == UNFITTED for f in found) else "train"
            put(f"next      {command(verb, args.config, *args.overrides)}")
    return 2 if counts["error"] else 0


def _values(args: argparse.Namespace) -> int:
    """Print what the channels of the training samples hold, and the settings that suit these values."""
    config = load(args.config, args.overrides, schema=RunConfig).config
    wanted = config.data.input_size or config.data.input_size_max
    modality = registry().build("modality", config.data.modality, "data.modality", size=wanted)
    data = open_data(config, modality, {}, "train")
    declared = Declared(config.data.modality, modality.spec, data)
    summary = summary_of(declared, VALUES)
    if summary is None:
        raise DataError(
            f"data.path: none of the samples can be read. vqcore check {args.config} says why, sample by sample."
        )
    names = [channel_name(modality.spec, place) for place in range(len(summary.channels))]
    settings = propose_scale(summary) if declared.has_scale else {}
    if args.json:
        found = {name: asdict(one) for name, one in zip(names, summary.channels)}
        channels = {
            name: {key: None if math.isnan(value) else value for key, value in one.items() if key != "some"}
            for name, one in found.items()
        }
        whole = {"config": args.config, "samples": summary.arrays, "channels": channels, "settings": settings}
        put(json.dumps(whole, indent=2))
        return 0
    head = ["channel", "minimum", "1 %", "median", "99 %", "maximum", "mean", "deviation", "NaN", "no data"]
    lines = [
        [
            name,
            *(
                f"{value:.4g}"
                for value in (c.minimum, c.low, c.median, c.high, c.maximum, c.mean, c.deviation)
            ),
            f"{c.unknown:.2%}",
            f"{c.nodata:.2%}",
        ]
        for name, c in zip(names, summary.channels)
    ]
    print_table(f"{args.config}: {summary.arrays} of {len(data)} training samples", head, lines)
    put("")
    for line in _to_paste(declared, settings):
        put(line)
    return 0


def _to_paste(declared: Declared, settings: dict[str, Any]) -> Iterator[str]:
    """What to write below `data.modality`, as lines of YAML."""
    if not declared.has_scale:
        yield f"{declared.where} has no scale to set."
        return
    if not settings:
        yield "A channel has no value at all: leave it out, or read other files."
        return
    yield "below data.modality, instead of range and scale:"
    for key, value in settings.items():
        yield f"  {key}: {flow(value) if isinstance(value, dict) else value}"


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


def _number(counts: Mapping[str, int], grade: str) -> str:
    return plural(counts[grade], grade) if counts[grade] else f"no {grade}s"
