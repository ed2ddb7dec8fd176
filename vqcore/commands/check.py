"""`vqcore check`: look at a config before it costs anything. Reads and computes, writes nothing."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

from vqcore import artefact, check, runfolder
from vqcore.assembly import check_size, eval_sizes, pick_device, tokenizer_config_of
from vqcore.config import load
from vqcore.console import command
from vqcore.data.loader import sizes
from vqcore.errors import VqcoreError
from vqcore.evaluation import build_metrics
from vqcore.findings import Finding
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer


def run(args: argparse.Namespace) -> int:
    """Print what was found, as it is found; status 2 if anything would stop the run or spoil it."""
    found = []
    # What the parts say while they are built must not stand in the middle of JSON.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        for finding in findings(args.config, args.overrides):
            found.append(finding)
            if not args.json:
                _print(finding)
    counts = {grade: sum(f.grade == grade for f in found) for grade in ("error", "warning", "note")}
    if args.json:
        print(json.dumps({"config": args.config, **counts, "findings": [asdict(f) for f in found]}, indent=2))
    else:
        print(
            f"\n{args.config}: {_number(counts['error'], 'error')}, {_number(counts['warning'], 'warning')}"
        )
        if not counts["error"]:
            print(f"next      {command('train', args.config, *args.overrides)}")
    return 2 if counts["error"] else 0


def findings(path: str, overrides: list[str]) -> Iterator[Finding]:
    """Everything that can be known about a config before its first step."""
    try:
        config = load(path, overrides, schema=RunConfig).config
    except VqcoreError as error:
        yield Finding("error", "config", str(error))
        return
    yield Finding("note", "config", "every setting is known, every component installed")
    yield from _run_dir(config)
    yield from _checked(replace(config, run=replace(config.run, compile=False)))


def _checked(config: RunConfig) -> Iterator[Finding]:
    from vqcore.trainer import build

    try:
        built = build(config, pick_device(config.run.device))
    except VqcoreError as error:
        yield from _piecewise(config, str(error))
        return
    yield from check.full(built)


def _run_dir(config: RunConfig) -> Iterator[Finding]:
    try:
        runfolder.check(config)
    except VqcoreError as error:
        yield Finding("error", "run.dir", str(error).removeprefix(f"run.dir={config.run.folder} "))
        return
    if found := artefact.checkpoints(config.run.folder):
        yield Finding("note", "run.dir", f"holds this run already: it will go on after step {max(found)}")


def _piecewise(config: RunConfig, first: str) -> Iterator[Finding]:
    """Building failed: try each part by itself, so that all that is wrong is said at once."""
    found: dict[str, str] = {}

    @contextlib.contextmanager
    def part(where: str) -> Iterator[None]:
        try:
            yield
        except VqcoreError as error:
            found.setdefault(str(error), where)

    with part("run.device"):
        pick_device(config.run.device)
    with part("data.modality"):
        wanted = config.data.input_size or config.data.input_size_max
        modality = registry().build("modality", config.data.modality, "data.modality", size=wanted)
        with part("model"):
            tokenizer = Tokenizer(tokenizer_config_of(config), seed=config.run.seed, fetch=False)
            for size in (*sizes(config.data, tokenizer.spec), *eval_sizes(config, tokenizer)):
                with part("model.encoder"):
                    check_size(tokenizer, size)
            with part("eval.metrics"):
                build_metrics(config.eval.metrics, tokenizer)
        with part("data.extra"):
            extra = {
                label: registry().build("modality", cfg, f"data.extra.{label}", size=modality.spec.size)
                for label, cfg in config.data.extra.items()
            }
            for split in ("train", "eval") if config.data.has_eval else ("train",):
                with part("data"):
                    registry().build("data", config.data, "data", split=split, modality=modality, extra=extra)
    for label, cfg in config.hooks.items():
        with part(f"hooks.{label}"):
            registry().build("hook", cfg, f"hooks.{label}")
    found.setdefault(first, "config")
    for text, where in found.items():
        yield Finding("error", where, text)


def _print(finding: Finding) -> None:
    place = "" if finding.what.startswith(finding.where) else f"{finding.where}: "
    print(f"{finding.grade:8}  {place}{finding.what}")
    if finding.remedy:
        print(f"          -> {finding.remedy}")


def _number(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"
