"""`vqcore eval`: figures of a run on its evaluation data, or on other data by override; two runs compared."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from vqcore import artefact, comparison, dist, pictures, runfolder
from vqcore.assembly import build_extra, check_size, eval_sizes, open_eval_data, pick_device
from vqcore.config import overridden, to_tree
from vqcore.console import say
from vqcore.errors import CheckpointError, ConfigError, DataError
from vqcore.evaluation import build_metrics, evaluate_data, loss_names, metric_configs, sample_pictures
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Print a table and write `eval.json` and a contact sheet into the run's folder; or compare two such files."""
    if args.compare:
        return _compare(args)
    if args.run is None:
        raise ConfigError("command line: which run? E.g. vqcore eval runs/quickstart, or --compare RUN RUN.")
    checkpoint = artefact.resolve(args.run)
    folder, config = _run_of(Path(args.run), checkpoint, args.overrides)
    if not config.data.has_eval:
        raise DataError("there is nothing to evaluate on. Set data.eval_path, e.g. data.eval_path=my/photos")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = pick_device(config.run.device)
    with dist.process_group(device):
        report = measure(config, checkpoint, _weights(args.weights, checkpoint), device)
        if dist.is_main():
            _show(report, f"{checkpoint}, {report['protocol']['set']['count']} samples")
            text = json.dumps({**report, "data": to_tree(config.data)}, indent=2)
            artefact.write_text(folder / comparison.FILE, text + "\n")
            sheet = _contact_sheet(config, checkpoint, report["results"][0]["weights"], folder, device)
            say(f"\nfigures        {folder / comparison.FILE}")
            say(f"contact sheet  {sheet} (original, rebuilt, token map)")
    return 0


def measure(
    config: RunConfig, checkpoint: Path, weights: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Figures by weights and size, with the record of how they were measured. All processes call it together."""
    results = []
    for kind in weights:
        tokenizer = Tokenizer.load(checkpoint, device, weights=kind)
        extra = build_extra(config, tokenizer)
        data = open_eval_data(config, tokenizer.modality, extra)
        sizes = eval_sizes(config, tokenizer)
        for size in sizes:
            check_size(tokenizer, size)
        step = runfolder.load_players(tokenizer, checkpoint)
        for size in sizes:
            figures = evaluate_data(tokenizer, config, data, extra, size, step=step)
            found = {"weights": kind, "size": list(size), "fingerprint": tokenizer.fingerprint}
            results.append({**found, "figures": figures})
    metrics = metric_configs(config.eval.metrics, tokenizer)
    components = {"modality": ("modality", config.data.modality.name)}
    components |= {label: ("metric", cfg.name) for label, cfg in metrics.items()}
    return {
        "checkpoint": checkpoint.name,
        "step": step,
        "results": results,
        "better": comparison.directions(
            build_metrics(config.eval.metrics, tokenizer), loss_names(figures, metrics)
        ),
        "protocol": comparison.protocol(
            set_hash=comparison.set_sha256(data, extra, config.eval.samples),
            count=int(figures["samples"]),
            sizes=sizes,
            modality=config.data.modality,
            extra=config.data.extra,
            metrics=metrics,
        ),
        "environment": comparison.environment(components, seed=config.run.seed, device=device),
    }


def _weights(asked: str, checkpoint: Path) -> list[str]:
    """Which weights to measure: `auto` and `both` by what the checkpoint holds."""
    has_average = (checkpoint / artefact.EMA).is_file()
    if asked == "both":
        return ["ema", "model"] if has_average else ["model"]
    if asked == "auto":
        return ["ema" if has_average else "model"]
    return [asked]


def _contact_sheet(
    config: RunConfig, checkpoint: Path, weights: str, folder: Path, device: torch.device
) -> Path:
    tokenizer = Tokenizer.load(checkpoint, device, weights=weights)
    extra = build_extra(config, tokenizer)
    data = open_eval_data(config, tokenizer.modality, extra)
    batch = sample_pictures(tokenizer, config, data, extra).to(device)
    path = folder / "samples" / "eval.png"
    pictures.save_picture(pictures.contact_sheet(tokenizer, batch), path)
    return path


def _show(report: dict[str, Any], title: str) -> None:
    results = report["results"]
    heads = [f"{'x'.join(map(str, r['size']))} {r['weights']}" for r in results]
    names = list(dict.fromkeys(name for r in results for name in r["figures"]))
    lines = [[name, *(_number(r["figures"].get(name)) for r in results)] for name in names]
    print_table(title, ["", *heads], lines)


def _compare(args: argparse.Namespace) -> int:
    if args.run is not None or args.overrides:
        raise ConfigError(
            "command line: --compare takes two runs that were measured already, and nothing else."
        )
    names = tuple(args.compare)
    a, b = (comparison.read(run) for run in names)
    comparison.refuse_unequal(a, b, names)
    for line in comparison.warnings(a, b):
        log.warning("%s", line)
    for title, rows in comparison.rows(a, b).items():
        winner = {"a": names[0], "b": names[1], "=": "equal", "": ""}
        lines = [
            [row.name, _number(row.a), _number(row.b), f"{row.b - row.a:+.4g}", winner[row.better]]
            for row in rows
        ]
        print_table(title, ["", *names, "difference", "better"], lines)
    return 0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def print_table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table: ruled on a terminal, plain aligned lines elsewhere. The first column is text."""
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left", title_style="bold")
        for column, name in enumerate(head):
            table.add_column(name, justify="left" if column == 0 else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        return
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    print(f"\n{title}")
    for line in (head, *lines):
        cells = (text.rjust(width) for text, width in zip(line[1:], widths[1:]))
        print("  " + "  ".join((line[0].ljust(widths[0]), *cells)).rstrip())


def _run_of(folder: Path, weights: Path, overrides: list[str]) -> tuple[Path, RunConfig]:
    """The run that a folder is, or that a checkpoint belongs to, and its config with overrides on top."""
    for override in overrides:
        section = override.partition("=")[0]
        if section.split(".")[0] not in ("data", "eval", "run") or section.startswith("data.modality"):
            raise ConfigError(
                f"command line: {override}: a trained tokenizer is what it is; eval takes data.*, eval.* and run.*"
            )
    for place in (folder, weights.parent.parent):
        path = place / artefact.CONFIG
        if path.is_file() and (place / "checkpoints").is_dir():
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            return place, overridden(tree, overrides, schema=RunConfig, file=str(path))
    raise CheckpointError(
        f"{folder} is no run folder; an exported tokenizer has no data section to evaluate on."
    )
