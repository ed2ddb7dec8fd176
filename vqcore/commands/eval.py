"""`vqcore eval`: figures of a run's tokenizer on its evaluation data, or on other data by override."""

import argparse
import json
from pathlib import Path

import yaml

from vqcore import artefact, pictures
from vqcore.config import overridden, to_tree
from vqcore.console import say
from vqcore.data.loader import EvalBatches
from vqcore.errors import CheckpointError, DataError
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import eval_sizes, evaluate_data, open_eval_data, pick_device


def run(args: argparse.Namespace) -> int:
    """Print a table and write `eval.json` and a contact sheet into the run's folder."""
    folder = Path(args.run)
    weights_folder = artefact.resolve(folder)
    config = _config_of(folder, weights_folder, args.overrides)
    if getattr(config.data, "eval_path", None) is None:
        raise DataError("there is nothing to evaluate on. Set data.eval_path, e.g. data.eval_path=my/photos")
    device = pick_device(config.run.device)
    tokenizer = Tokenizer.load(weights_folder, device, weights=args.weights)
    data = open_eval_data(config, tokenizer.modality)
    report: dict = {
        "weights": args.weights,
        "checkpoint": weights_folder.name,
        "fingerprint": tokenizer.fingerprint,
    }
    for size in eval_sizes(config, tokenizer):
        figures = evaluate_data(tokenizer, config, data, {}, size, step=0)
        report["x".join(map(str, size))] = figures
        say(f"\n{weights_folder} at {' x '.join(map(str, size))}, {len(data)} samples")
        for name, value in figures.items():
            say(f"  {name:20} {value:.5g}")
    target = folder / "eval.json"
    artefact.write_text(target, json.dumps({**report, "config": to_tree(config)["data"]}, indent=2) + "\n")
    first = next(
        iter(
            EvalBatches(
                data,
                tokenizer.modality,
                {},
                config.data,
                size=tokenizer.cfg.size,
                batch_size=config.eval.pictures,
                rank=0,
                world=1,
                limit=config.eval.pictures,
                workers=0,
            )
        )
    )
    sheet = folder / "samples" / "eval.png"
    sheet.parent.mkdir(exist_ok=True)
    pictures.contact_sheet(tokenizer, first.batch.x.to(device)).save(sheet)
    say(f"\nfigures        {target}\ncontact sheet  {sheet} (original, rebuilt, token map)")
    return 0


def _config_of(folder: Path, weights_folder: Path, overrides: list[str]) -> RunConfig:
    """The config of the run that a folder is or belongs to, with overrides on top."""
    for place in (folder, weights_folder.parent.parent):
        path = place / artefact.CONFIG
        if path.is_file() and (place / "checkpoints").is_dir():
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            return overridden(tree, overrides, schema=RunConfig, file=str(path))
    raise CheckpointError(
        f"{folder} is no run folder; an exported tokenizer has no data section to evaluate on."
    )
