"""`vqcore tokens`: copy stores of codes to another layout, check them, count what is in them."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.artefacts.resolve import with_prefix
from vqcore.artefacts.stored import open_named
from vqcore.commands.loading import access
from vqcore.console import command, say
from vqcore.errors import ConfigError, RunError
from vqcore.files import local
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.passes import manifest_of, parse_size
from vqcore.tokens.work import Use, convert, stats, verify

PLACES = {"convert": 2, "verify": None, "stats": 1}
"""How many folders each action takes; None: one or more."""


def run(args: argparse.Namespace) -> int:
    """Do what was asked. `verify` ends with status 2 if something is wrong."""
    wanted = PLACES[args.what]
    if wanted is not None and len(args.folders) != wanted:
        asked = {1: "one folder, that of the store", 2: "two folders, the store and a new one"}[wanted]
        raise ConfigError(f"vqcore tokens {args.what} takes {asked}; {len(args.folders)} are given.")
    flags = {"--store": args.store, "--tokenizer": args.tokenizer, "--size": args.size}
    for flag, given, verb in (
        *((*each, "convert") for each in flags.items()),
        ("--json", args.json, "stats"),
    ):
        if given and args.what != verb:
            raise ConfigError(f"{flag} belongs to vqcore tokens {verb}.")
    folders = [local(folder) for folder in args.folders]
    return {"convert": _convert, "verify": _verify, "stats": _stats}[args.what](args, folders)


def _convert(args: argparse.Namespace, folders: list[Path]) -> int:
    source, target = args.folders[0], folders[1]
    for flag, given in (("--tokenizer", args.tokenizer), ("--size", args.size)):
        if given and with_prefix(source) is None:
            raise ConfigError(
                f"{flag} is for codes of another system, LAYOUT:FOLDER. {source} has a manifest."
            )
    rows = convert(open_named(source, _said(args)), target, args.store or "arrow")
    say(f"{rows:,} rows")
    say(f"codes     {target}  ({args.store or 'arrow'})")
    stores = (target,) if with_prefix(source) else (source, target)
    say(f"next      {command('tokens', 'verify', *stores)}")
    return 0


def _said(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the tokenizer of --tokenizer says of codes that have no manifest."""
    if args.tokenizer is None:
        return None
    tokenizer = Tokenizer.load(args.tokenizer, weights=args.weights, encoder_only=True, **vars(access(args)))
    named = {"tokenizer": args.tokenizer}
    return {**manifest_of(tokenizer, parse_size(args.size, tokenizer.cfg.size), None), **named}


def _verify(args: argparse.Namespace, folders: list[Path]) -> int:
    report = verify(folders)
    for line in report.said:
        say(line)
    if not report.problems:
        return 0
    for problem in report.problems[:-1]:
        say(problem)
    count = len(report.problems)
    raise RunError(f"{report.problems[-1]} ({count} problem{'s' if count > 1 else ''})")


def _stats(args: argparse.Namespace, folders: list[Path]) -> int:
    use = stats(folders[0])
    if args.json:
        say(json.dumps(asdict(use)))
        return 0
    say(f"{use.rows:,} rows, codebook of {use.codebook_size:,}")
    for book, (usage, perplexity, bits) in enumerate(zip(use.usage, use.perplexity, use.bits)):
        name = f"codebook {book}  " if len(use.usage) > 1 else ""
        say(
            f"{name}usage {usage:.1%}  perplexity {perplexity:.4g}  entropy {bits:.3g} bits{_places(use, book)}"
        )
    return 0


def _places(use: Use, book: int) -> str:
    if use.places is None:
        return ""
    low, middle, high = np.quantile(use.places[book], (0, 0.5, 1))
    return f"  perplexity at a position {low:.4g} to {high:.4g}, median {middle:.4g}"
