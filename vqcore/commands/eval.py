"""`vqcore eval`: measure a run or an exported tokenizer on its held-out data or on other data, or compare two."""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from vqcore import dist, pictures
from vqcore.artefacts.folder import EMA
from vqcore.assembly import build_extra, check_size, eval_sizes, lend_riders, open_data, pick_device
from vqcore.borrowed import Lender, Loans, MissingWeights
from vqcore.commands.loading import access
from vqcore.config import to_tree
from vqcore.console import say
from vqcore.errors import ConfigError, DataError, RunError, cause, plural, printable
from vqcore.evaluate import compare as comparison
from vqcore.evaluate.baseline import SAMPLES, Baselines, Source, cache_key, fitted, keep, kept
from vqcore.evaluate.measure import (
    Metrics,
    build_metrics,
    evaluate_data,
    metric_configs,
    sample_pictures,
    sampling_options,
)
from vqcore.evaluate.perturb import NAME as PERTURBED
from vqcore.evaluate.subject import Subject, subject
from vqcore.evaluate.verdict import is_fitted, verdicts
from vqcore.files import local, write_text
from vqcore.protocols import Data, Modality
from vqcore.run.checkpoints import constant_in, load_training
from vqcore.streams import put
from vqcore.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Print a table of metrics, and write JSON and a contact sheet to the run's folder or to --json; or compare two."""
    if args.compare:
        return _compare(args)
    if args.run is None:
        raise ConfigError(
            "command line: no run given. E.g. vqcore eval runs/quickstart, or vqcore eval --compare RUN RUN"
        )
    found = _subject(args, args.run, args.overrides)
    if found.named.why:
        say(f"{found.named.name}: {found.named.why}")
    written = _written(found, args.json)
    with _processes(found) as device:
        report = measure(found, _weights(args.weights, found.weights), device)
        if dist.is_main():
            _show(report, f"{found.title}, {plural(report['protocol']['set']['count'], 'sample')}")
        if written:
            _write(found, report, device, *written)
    return 0


def _subject(args: argparse.Namespace, name: str, overrides: Sequence[str]) -> Subject:
    return subject(name, overrides, access(args))


def measure(found: Subject, weights: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Metrics by weights and size, with the record of the measurement. All processes call this function together.

    Losses need parts that only a training run has (discriminators, feature networks), so losses of runs only. Where
    the objective misses weights that it borrows, one line says so and the losses are left out.
    """
    config, losses, results = found.config, found.run is not None, list[dict[str, Any]]()
    step = found.made.get("step", 0)
    baselines: Baselines | None = None
    metrics = Metrics()  # built once, for all weights
    for kind in weights:
        tokenizer = found.load(device, kind)
        metrics = metrics or build_metrics(config.eval.metrics, tokenizer)
        metrics.ready(device)  # before anything that takes time
        lender = found.lender()
        extra, loans = _riders(found, tokenizer, lender)
        data = _opened(found, tokenizer, extra)
        sizes = eval_sizes(config, tokenizer)
        for size in sizes:
            check_size(tokenizer, size)
        losses = losses and _with_training_parts(found, tokenizer, lender)
        if losses:
            lender.refuse_unused(("modality", "encoder", "quantizer", "decoder"))  # these are lent already
        if baselines is None:  # they do not depend on the weights
            key = cache_key(tokenizer, config, data, sizes, tokenizer.loans | loans)
            baselines = _baselines(found, tokenizer, data, extra, sizes, key)
        scores = dict[tuple[int, ...], Any]()
        for size in sizes:
            got = evaluate_data(
                tokenizer,
                config,
                data,
                extra,
                size,
                metrics=metrics,
                step=step,
                losses=losses,
                baselines=baselines.at(size),
            )
            scores[size] = baselines.joined(size, got.baselines)
            results.append(_result(tokenizer, kind, size, got.metrics, scores[size]))
        baselines = baselines.scored(scores)
    assert baselines is not None
    # What was fitted to held-out samples, because those of training were not here, is not for later.
    if found.run is not None and dist.is_main() and baselines.facts.get("source", "training") == "training":
        with contextlib.suppress(OSError):  # a folder of somebody else
            keep(found.run, key, baselines)
    how = _how(found, tokenizer, data, metrics, sizes, got.metrics, tokenizer.loans | loans)
    fit = {"kmeans": {**baselines.facts, "note": baselines.note}}
    return {"checkpoint": found.weights.name, "step": step, "results": results, **fit, **how}


def _riders(found: Subject, tokenizer: Tokenizer, lender: Lender) -> tuple[dict[str, Modality], Loans]:
    """The extra modalities by label, and what they borrow."""
    extra = build_extra(found.config, tokenizer.cfg.size)
    return extra, lend_riders(extra, lender)


def _with_training_parts(found: Subject, tokenizer: Tokenizer, lender: Lender) -> bool:
    """Load what only training needs; False, with one line, if the objective misses weights that it borrows."""
    try:
        load_training(tokenizer, found.weights, found.config, lender)
    except MissingWeights as error:
        if dist.is_main():
            log.warning("warning: the losses are left out: %s", error)
        return False
    return True


def _baselines(
    found: Subject,
    tokenizer: Tokenizer,
    data: Data,
    extra: dict[str, Modality],
    sizes: Sequence[tuple[int, ...]],
    key: str,
) -> Baselines:
    """The constant of the run, and k-means: its scores if they are known, else it is fitted to training crops.

    Where there is no training set on this machine, held-out samples take its place. Rank 0 works, and tells the others.
    """
    baselines = Baselines()
    with dist.together():
        if dist.is_main():
            constant = None if found.named.format else constant_in(found.weights, tokenizer.spec)
            before = None if found.run is None else kept(found.run, key, constant)
            if before is not None:
                baselines = before
            else:
                try:
                    train = open_data(found.config, tokenizer.modality, extra, "train")
                    source = Source(train, extra, "training")
                except DataError:
                    source = Source(data, extra, "evaluation")
                baselines = fitted(tokenizer, found.config, source, sizes, constant)
    return dist.from_main(baselines)


def _how(
    found: Subject,
    tokenizer: Tokenizer,
    data: Data,
    metrics: Metrics,
    sizes: Sequence[tuple[int, ...]],
    measured: Mapping[str, float],
    loans: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The record of a measurement: the settings that decide the metrics, and the environment."""
    config = found.config
    components = {"modality": ("modality", config.data.modality.name)}
    components |= {
        label: ("metric", cfg.name) for label, cfg in metric_configs(config.eval.metrics, tokenizer).items()
    }
    return {
        "better": comparison.directions(metrics, measured),
        "protocol": comparison.protocol(
            config,
            tokenizer,
            metrics,
            loans=loans,
            set_hash=comparison.set_sha256(data, config.data.extra, config.eval.samples),
            total=min(len(data), config.eval.samples or len(data)),
            count=int(measured["samples"]),
            sizes=sizes,
        ),
        "environment": comparison.environment(components, seed=config.run.seed, device=tokenizer.device),
    }


def _result(
    tokenizer: Tokenizer,
    weights: str,
    size: tuple[int, ...],
    metrics: dict[str, float],
    baselines: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The stored result of one evaluation. Logs a warning if the codes have collapsed, and what the verdict is."""
    said = verdicts(metrics, baselines, fitted=is_fitted(tokenizer))
    for warning in said if dist.is_main() else ():
        log.warning("warning: %s %s: %s", "x".join(map(str, size)), weights, warning)
    made = {"weights": weights, "size": list(size), "fingerprint": tokenizer.fingerprint}
    return {**made, "metrics": metrics, "baselines": baselines, "verdict": said}


@contextlib.contextmanager
def _processes(found: Subject) -> Iterator[torch.device]:
    """Set the CPU threads of this process, join torchrun's process group and yield the device."""
    run = found.config.run
    if run.threads:
        torch.set_num_threads(run.threads)
    device = pick_device(run.device)
    with dist.process_group(device):
        yield device


def _opened(found: Subject, tokenizer: Tokenizer, extra: dict[str, Modality]) -> Data:
    if not found.config.data.evaluates:
        raise DataError(
            "data.eval_path: no held-out data is given. Set data.eval_path=my/photos, or data.eval_share=0.1"
        )
    try:
        return open_data(found.config, tokenizer.modality, extra, "eval")
    except DataError as error:
        raise found.explained(error) from error


def _written(found: Subject, json_file: str | None) -> tuple[Path, Path] | None:
    """The paths for metrics and contact sheet: --json, else the run's folder; None for an exported tokenizer."""
    if json_file is None:
        run = found.run
        if run is None:
            return None
        if (run / comparison.FILE).is_dir():
            raise ConfigError(
                f"{run / comparison.FILE} is a folder. Remove it, or name another file with --json."
            )
        return run / comparison.FILE, run / "samples" / "eval.png"
    path = local(json_file)
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"--json {json_file}: this is a folder, or its parent folder does not exist. Give the path of a file in "
            "an existing folder."
        )
    return path, path.with_suffix(".png")


def _write(found: Subject, report: dict[str, Any], device: torch.device, metrics: Path, sheet: Path) -> None:
    """Write the metrics, then the contact sheet; all processes call this function together."""
    with dist.together(), _saying(metrics):
        if dist.is_main():
            text = json.dumps({**report, "data": to_tree(found.config.data)}, indent=2)
            write_text(metrics, text + "\n")
            say(f"\nmetrics        {metrics}")
    shown = _contact_sheet(found, report["results"][0]["weights"], device)
    with dist.together(), _saying(sheet):
        if shown:
            pictures.save_picture(shown, sheet)
            say(f"contact sheet  {sheet} (original, reconstruction, token map)")


@contextlib.contextmanager
def _saying(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {cause(error)}. The metrics stand above.") from error


def _weights(asked: str, checkpoint: Path) -> list[str]:
    """The weights to measure. `auto` and `both` depend on whether the checkpoint has a running average."""
    has_average = (checkpoint / EMA).is_file()
    if asked == "both":
        return ["ema", "model"] if has_average else ["model"]
    if asked == "auto":
        return ["ema" if has_average else "model"]
    return [asked]


def _contact_sheet(found: Subject, weights: str, device: torch.device) -> Image.Image | None:
    """The contact sheet on rank 0; all processes call this function together."""
    tokenizer = found.load(device, weights)
    extra, _ = _riders(found, tokenizer, found.lender())
    data = open_data(found.config, tokenizer.modality, extra, "eval")
    batch = sample_pictures(tokenizer, found.config, data, extra)
    return pictures.contact_sheet(tokenizer, batch, sampling_options(found.config, tokenizer))


def _show(report: dict[str, Any], title: str) -> None:
    columns: dict[str, Mapping[str, float]] = {}
    for result in report["results"]:
        size = "x".join(map(str, result["size"]))
        start, found = f"{PERTURBED}/", result["metrics"]
        columns[f"{size} {result['weights']}"] = {k: v for k, v in found.items() if not k.startswith(start)}
        if again := {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}:
            columns[f"{size} {result['weights']} {PERTURBED}"] = again
    for result in report["results"]:
        for name, scores in result["baselines"].items():
            columns.setdefault(f"{'x'.join(map(str, result['size']))} {name}", scores)
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [[name, *(_number(column.get(name)) for column in columns.values())] for name in names]
    print_table(title, ["", *columns], lines)
    for line in _explained(report):
        say(f"  {line}")


def _explained(report: Mapping[str, Any]) -> Iterator[str]:
    """What the columns are."""
    if share := report["protocol"]["perturb"]:
        yield f"{PERTURBED}: {share:.3g} of a sample's positions have the codes of others: docs/evaluation.md"
    known = {name for result in report["results"] for name in result["baselines"]}
    if "constant" in known:
        yield (
            "constant: predicts one value everywhere: each channel's mean (class maps: the most frequent class) over "
            f"about {SAMPLES} samples, those of training where they are known"
        )
    facts = report["kmeans"]
    if "k-means" in known:
        short = facts.get("short") if facts["bits"] < facts["of_bits"] - 0.1 else ""
        less = f" (of {facts['of_bits']:.4g}: {short})" if short else ""
        yield (
            f"k-means: the nearest of as many raw patches as {facts['bits']:.4g} bits{less} can name, fitted to "
            f"{facts['patches']:,} patches of {facts['crops']:,} {facts['source']} crops in {facts['steps']} steps"
        )
    elif facts["note"]:
        yield facts["note"]


def _compare(args: argparse.Namespace) -> int:
    """Compare two evaluations. Results of runs are read from their files; exported tokenizers are measured now."""
    # After the two names of --compare, argparse takes the first override for RUN.
    overrides = [args.run, *args.overrides] if args.run else args.overrides
    names = tuple(args.compare)
    alone = [name for name in names if not comparison.is_written(name)]
    if args.json or (overrides and not alone) or not all("=" in word for word in overrides):
        raise ConfigError(
            "command line: --compare takes two evaluated runs and no other argument. Settings can be given only if one "
            "of the two is an exported tokenizer, which is measured now."
        )
    reports = {name: comparison.read(name) for name in names if name not in alone}
    reports |= _measured({name: _subject(args, name, overrides) for name in alone}, args.weights)
    a, b = (reports[name] for name in names)
    if not dist.is_main():
        return 0
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


def _measured(subjects: Mapping[str, Subject], weights: str) -> dict[str, dict[str, Any]]:
    if not subjects:
        return {}
    with _processes(next(iter(subjects.values()))) as device:
        return {
            name: measure(found, _weights(weights, found.weights), device) for name, found in subjects.items()
        }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def print_table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table: with borders on a terminal, as plain aligned lines elsewhere. The first column is text."""
    title = printable(title)
    head, *lines = ([printable(cell) for cell in line] for line in (head, *lines))
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left", title_style="bold")
        for column, name in enumerate(head):
            table.add_column(name, justify="left" if column == 0 else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        return
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    put(f"\n{title}")
    for line in (head, *lines):
        cells = (text.rjust(width) for text, width in zip(line[1:], widths[1:]))
        put("  " + "  ".join((line[0].ljust(widths[0]), *cells)).rstrip())
