"""`vqcore decode`: turn codes back into files: pictures as PNG, sounds as WAV, everything else as `.npy`."""

import argparse
from pathlib import Path

from vqcore.assembly import pick_device
from vqcore.console import say
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.passes import decode_folder


def run(args: argparse.Namespace) -> int:
    """Decode a folder of codes or one file of codes."""
    device = pick_device(args.device)
    tokenizer = Tokenizer.load(args.run, device, weights=args.weights, precision=args.precision)
    done = decode_folder(
        tokenizer,
        Path(args.tokens).expanduser(),
        Path(args.output).expanduser(),
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        force=args.force,
    )
    say(f"{done.written} written to {args.output}, {done.skipped} existed already")
    return 0
