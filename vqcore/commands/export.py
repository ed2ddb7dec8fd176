"""`vqcore export`: write a tokenizer as an artefact without training state, or as the files of another system."""

import argparse

from vqcore.artefacts.formats import settings, write_foreign
from vqcore.commands.loading import load_named
from vqcore.compose.build import COMMAND_LINE
from vqcore.console import say
from vqcore.errors import ConfigError
from vqcore.files import local


def run(args: argparse.Namespace) -> int:
    """Write the folder, upload an artefact if --push is given, and print how to use it."""
    if args.format is None and args.overrides:
        raise ConfigError(
            f"{COMMAND_LINE}: '{args.overrides[0]}': export takes settings of a format only; add --format NAME."
        )
    if args.format is not None and args.push:
        raise ConfigError(
            f"{COMMAND_LINE}: --push uploads an artefact of ours; it cannot stand beside --format."
        )
    cfg = None if args.format is None else settings(args.format, args.overrides, file=COMMAND_LINE)
    tokenizer = load_named(args)
    folder = local(args.folder)
    what = f"{tokenizer.cfg.modality.name} tokenizer, fingerprint {tokenizer.fingerprint[:16]}"
    if cfg is not None:
        write_foreign(tokenizer, folder, cfg)
        say(f"{folder}: {what}, written as {cfg.name}")
        return 0
    tokenizer.save(folder)
    say(f"{folder}: {what}")
    say(f"use it with Tokenizer.load({str(folder)!r}), or as RUN in vqcore tokenize and vqcore decode")
    if args.push:
        address = tokenizer.push_to_hub(args.push, private=args.private)
        say(f"uploaded to {address}: Tokenizer.load({f'hf://{args.push}'!r})")
    return 0
