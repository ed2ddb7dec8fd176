"""Loads the tokenizer that RUN names, for the verbs that use one."""

import argparse
from typing import Any

from vqcore.borrowed import Access, parse_places
from vqcore.console import say
from vqcore.tokenizer import Tokenizer


def access(args: argparse.Namespace) -> Access:
    """What the arguments of a verb let loading use: --borrow, --download, --allow-pickle."""
    return Access(parse_places(args.borrow), args.download, args.allow_pickle)


def load_named(args: argparse.Namespace, **more: Any) -> Tokenizer:
    """The tokenizer of a verb's arguments; of a run, one line says which checkpoint was taken and why."""
    if hasattr(args, "precision"):
        more["precision"] = args.precision
    tokenizer = Tokenizer.load(args.run, weights=args.weights, **vars(access(args)), **more)
    if tokenizer.taken:
        say(f"{args.run}: {tokenizer.taken}")
    return tokenizer


def again(args: argparse.Namespace, *, ours: bool = False) -> tuple[str, ...]:
    """The options that another command needs to load the same tokenizer; with `ours`, one that this command wrote.

    What vqcore writes holds no pickle.
    """
    borrowed = [word for place in args.borrow for word in ("--borrow", place)]
    given = (("--allow-pickle", args.allow_pickle and not ours), ("--download", args.download))
    return (*(flag for flag, is_given in given if is_given), *borrowed)
