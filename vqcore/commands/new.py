"""`vqcore new config`: look at files and write a config for them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vqcore.check.draft import draft, written
from vqcore.check.family import family, like
from vqcore.compose.layers import load
from vqcore.console import command, say
from vqcore.errors import ConfigError, first_line, plural
from vqcore.files import local, write_text
from vqcore.schema import RunConfig


def run(args: argparse.Namespace) -> int:
    """Write the config and print it. Never overwrites a file."""
    words = [*filter(None, [args.folder]), *args.overrides]
    if not words:
        if args.like is not None:
            family(args.like)
        raise ConfigError("new config needs the folder of your files: vqcore new config ~/my-data")
    folder = local(words.pop(0))
    out = local(args.out) if args.out else Path(f"{folder.resolve().name}.yaml")
    if out.exists():
        raise ConfigError(f"{out} exists already. Name another file with --out, or remove this one.")
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    answers, ask = _answers(words), _ask if asks else _assume
    text = (
        written(draft(folder, answers, ask), folder)
        if args.like is None
        else like(args.like, folder, answers, ask)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    load(str(out), [], schema=RunConfig)
    say(text)
    say(f"written   {out}")
    if count := sum(
        "please check" in line for line in text.splitlines()[1:]
    ):  # the first line explains the words
        say(f"          {plural(count, 'line')} with 'please check'")
    say(f"next      {command('check', out)}")
    say(f"          {command('train', out)}")
    return 0


def _answers(given: Sequence[str]) -> dict[str, Any]:
    found = {}
    for one in given:
        name, equals, text = one.partition("=")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{one}: not valid YAML: {first_line(error)}") from error
        if not equals:
            raise ConfigError(f"{one}: an answer is written name=value")
    return found


def _ask(question: str, options: Sequence[str], likely: str) -> tuple[str, bool]:
    """The answer of the person at the terminal. An empty line takes the likely answer; so does the end of the input."""
    while True:
        try:
            text = input(f"{question} {' | '.join(options)} [{likely}] ").strip() or likely
        except EOFError:
            return _assume(question, options, likely)
        fitting = [option for option in options if option.startswith(text)]
        if len(fitting) == 1 or text in options:
            return text if text in options else fitting[0], True


def _assume(question: str, options: Sequence[str], likely: str) -> tuple[str, bool]:
    return likely, False
