"""`vqcore export`: write a tokenizer as an artefact without training state. RUN is a run, a hub id or foreign files."""

import argparse
from pathlib import Path

from vqcore.borrowed import parse_places
from vqcore.console import say
from vqcore.errors import ConfigError
from vqcore.tokenizer import Tokenizer


def run(args: argparse.Namespace) -> int:
    """Write the artefact, upload it if --push is given, and print how to use it."""
    if args.allow_pickle and args.format is None:
        raise ConfigError(
            "--allow-pickle: vqcore's own files are not pickles, so --format is needed too. "
            "Remove --allow-pickle, or add --format NAME."
        )
    tokenizer = Tokenizer.load(
        args.run,
        weights=args.weights,
        format=args.format,
        allow_pickle=args.allow_pickle,
        borrowed=parse_places(args.borrow),
        download=args.download,
    )
    folder = Path(args.folder).expanduser()
    tokenizer.save(folder)
    say(f"{folder}: {tokenizer.cfg.modality.name} tokenizer, fingerprint {tokenizer.fingerprint[:16]}")
    say(f"use it with Tokenizer.load({str(folder)!r}), or as RUN in vqcore tokenize and vqcore decode")
    if args.push:
        address = tokenizer.push_to_hub(args.push, private=args.private)
        say(f"uploaded to {address}: Tokenizer.load({args.push!r})")
    return 0
