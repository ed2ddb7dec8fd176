"""`vqcore tokens`: copy stores of codes to another layout, check them, count what is in them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.artefacts.resolve import with_prefix
from vqcore.artefacts.stored import complete_manifest, open_named
from vqcore.assembly import pick_device
from vqcore.commands.loading import access, load_named
from vqcore.console import command, say
from vqcore.errors import ConfigError, RunError, plural
from vqcore.evaluate.usage import reachable
from vqcore.files import local
from vqcore.pictures import save_picture
from vqcore.registry import registry
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.passes import manifest_of, parse_size
from vqcore.tokens.sheet import decoded
from vqcore.tokens.stats import Use, stats
from vqcore.tokens.work import convert, verify

PLACES = {"convert": 2, "verify": None, "stats": 1}
"""How many folders each action takes; None: one or more."""


def run(args: argparse.Namespace) -> int:
    """Do what was asked. `verify` ends with status 2 if something is wrong."""
    wanted = PLACES[args.what]
    if wanted is not None and len(args.folders) != wanted:
        asked = {1: "one folder, that of the store", 2: "two folders, the store and a new one"}[wanted]
        raise ConfigError(f"vqcore tokens {args.what} takes {asked}; {len(args.folders)} are given.")
    for flag, given, verb in (
        ("--store", args.store, "convert"),
        ("--tokenizer", args.tokenizer, "convert"),
        ("--size", args.size, "convert"),
        ("--decode", args.decode, "verify"),
        ("--sheet", args.sheet, "verify"),
        ("--source", args.source, "verify"),
        ("--json", args.json, "stats"),
        ("--html", args.html, "stats"),
    ):
        if given and args.what != verb:
            raise ConfigError(f"{flag} belongs to vqcore tokens {verb}.")
    folders = [local(folder) for folder in args.folders]
    return {"convert": _convert, "verify": _verify, "stats": _stats}[args.what](args, folders)


def _convert(args: argparse.Namespace, folders: list[Path]) -> int:
    source, target = args.folders[0], folders[1]
    if with_prefix(args.folders[1]):
        raise ConfigError(
            f"{args.folders[1]}: the new folder has no layout in its name. Name it with --store."
        )
    for flag, given in (("--tokenizer", args.tokenizer), ("--size", args.size)):
        if given and with_prefix(source) is None:
            raise ConfigError(
                f"{flag} is for codes of another system, LAYOUT:FOLDER. {source} has a manifest."
            )
    rows = convert(open_named(source, _said(args)), target, args.store or "arrow")
    say(plural(rows, "row"))
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
        if args.decode or args.sheet or args.source:
            _sheet(args, folders)
        return 0
    for problem in report.problems[:-1]:
        say(problem)
    count = len(report.problems)
    raise RunError(f"{report.problems[-1]} ({plural(count, 'problem')})")


def _sheet(args: argparse.Namespace, folders: list[Path]) -> None:
    """Decode some rows with the tokenizers that are given, or else those that the manifests name."""
    named = [(str(folder), complete_manifest(folder).get("tokenizer")) for folder in folders]
    if unnamed := [folder for folder, name in named if not name and not args.decode]:
        raise ConfigError(f"{unnamed[0]}: its tokens.json does not name a tokenizer. Add --decode RUN.")
    tokenizers = []
    for run in args.decode or dict.fromkeys(name for _, name in named):
        args.run = run
        tokenizers.append(load_named(args, device=pick_device(None)))
    path = local(args.sheet) if args.sheet else folders[0].with_name(f"{folders[0].name}.png")
    found = decoded(folders, tokenizers, args.source)
    save_picture(found.image, path)
    for folder, share in found.agreement.items():
        say(
            f"{folder}: {share:.1%} of the codes come out again from the {plural(len(found.keys), 'file')} of the sheet"
        )
    say(f"sheet     {path}  (from left to right: {', '.join(found.keys)})")


def _stats(args: argparse.Namespace, folders: list[Path]) -> int:
    report: Any = registry().load("hook", "track/report") if args.html else None
    use = stats(folders[0])
    if args.html:
        report.write_tokens(use, folders[0].name, local(args.html))
    if args.json:
        say(json.dumps(use.facts()))
        return 0
    books, size = use.counts.shape
    grid = " x ".join(map(str, use.manifest["grid"]))
    say(f"{plural(use.rows, 'row')} of {grid} codes, codebook of {size:,}")
    for book in range(books):
        name = f"codebook {book}  " if books > 1 else ""
        say(
            f"{name}usage {use.usage[book]:.1%}  perplexity {use.perplexity[book]:.4g}  entropy {use.bits[book]:.3g} "
            f"bits{_places(use, book)}"
        )
        say(f"  most used   {_codes(use.most()[book])}")
        say(f"  least used  {_codes(use.least()[book])}{_never(use.never[book])}")
    share, _ = reachable(int(use.counts.sum()) // books, size)
    if share < 0.99:
        say(f"So few codes, drawn evenly, would use {share:.1%} of the codebook.")
    if args.html:
        say(f"page      {args.html}")
    return 0


def _codes(many: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{code} ({times:,} times)" for code, times in many[:5])


def _never(codes: int) -> str:
    return f"; {codes:,} codes never occur" if codes else ""


def _places(use: Use, book: int) -> str:
    if use.places is None:
        return ""
    low, middle, high = np.quantile(use.places[book], (0, 0.5, 1))
    return f"  perplexity at a position {low:.4g} to {high:.4g}, median {middle:.4g}"
