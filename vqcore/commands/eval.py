"""`vqcore eval`: figures of a run's tokenizer on its evaluation data, or on other data by override."""

import argparse
import json
from pathlib import Path

import yaml

from vqcore import artefact, pictures, runfolder
from vqcore.assembly import build_extra, eval_sizes, open_eval_data, pick_device
from vqcore.config import overridden, to_tree
from vqcore.console import say
from vqcore.errors import CheckpointError, ConfigError, DataError
from vqcore.evaluation import evaluate_data, sample_pictures
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer


def run(args: argparse.Namespace) -> int:
    """Print a table and write `eval.json` and a contact sheet into the run's folder."""
    weights = artefact.resolve(args.run)
    folder, config = _run_of(Path(args.run), weights, args.overrides)
    if not config.data.has_eval:
        raise DataError("there is nothing to evaluate on. Set data.eval_path, e.g. data.eval_path=my/photos")
    device = pick_device(config.run.device)
    tokenizer = Tokenizer.load(weights, device, weights=args.weights)
    extra = build_extra(config, tokenizer)
    data = open_eval_data(config, tokenizer.modality, extra)
    step = runfolder.load_players(tokenizer, weights)
    report: dict = {"weights": args.weights, "step": step, "fingerprint": tokenizer.fingerprint}
    for size in eval_sizes(config, tokenizer):
        figures = evaluate_data(tokenizer, config, data, extra, size, step=step)
        report["x".join(map(str, size))] = figures
        say(f"\n{weights} at {' x '.join(map(str, size))}, {len(data)} samples")
        for name, value in figures.items():
            say(f"  {name:20} {value:.5g}")
    artefact.write_text(
        folder / "eval.json", json.dumps({**report, "data": to_tree(config.data)}, indent=2) + "\n"
    )
    batch = sample_pictures(tokenizer, config, data, extra).to(device)
    sheet = folder / "samples" / "eval.png"
    pictures.save_picture(pictures.contact_sheet(tokenizer, batch), sheet)
    say(f"\nfigures        {folder / 'eval.json'}\ncontact sheet  {sheet} (original, rebuilt, token map)")
    return 0


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
