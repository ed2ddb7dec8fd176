"""Loads the tokenizer that RUN names, for the verbs that use one."""

import argparse
from typing import Any

from vqcore.borrowed import parse_places
from vqcore.console import say
from vqcore.tokenizer import Tokenizer


def load_named(args: argparse.Namespace, **more: Any) -> Tokenizer:
    """The tokenizer of a verb's arguments; of a run, one line says which checkpoint was taken and why."""
    given = {
        "borrowed": parse_places(args.borrow),
        "download": args.download,
        "allow_pickle": args.allow_pickle,
    }
    if hasattr(args, "precision"):
        given["precision"] = args.precision
    tokenizer = Tokenizer.load(args.run, weights=args.weights, **given, **more)
    if tokenizer.taken:
        say(f"{args.run}: {tokenizer.taken}")
    return tokenizer


def again(args: argparse.Namespace) -> tuple[str, ...]:
    """The options that another command needs to load the same tokenizer."""
    borrowed = [word for place in args.borrow for word in ("--borrow", place)]
    return (*(("--allow-pickle",) if args.allow_pickle else ()), *borrowed)
