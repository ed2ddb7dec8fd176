"""Loads the tokenizer that RUN names, for the verbs that use one."""

import argparse
from typing import Any

from vqcore.console import say
from vqcore.tokenizer import Tokenizer


def load_named(args: argparse.Namespace, **more: Any) -> Tokenizer:
    """The tokenizer of a verb's arguments; of a run, one line says which checkpoint was taken and why."""
    tokenizer = Tokenizer.load(args.run, weights=args.weights, allow_pickle=args.allow_pickle, **more)
    if tokenizer.taken:
        say(f"{args.run}: {tokenizer.taken}")
    return tokenizer


def again(args: argparse.Namespace) -> tuple[str, ...]:
    """The options that another command needs to load the same tokenizer."""
    return ("--allow-pickle",) if args.allow_pickle else ()
