"""`vqcore tokenize`: files become codes, one `.npy` a sample, in the smallest unsigned integer that holds them."""

import argparse
from pathlib import Path

from vqcore.assembly import pick_device
from vqcore.console import say
from vqcore.tokenizer import Tokenizer
from vqcore.tokens import parse_size, tokenize_folder


def run(args: argparse.Namespace) -> int:
    """Tokenize a folder or a file; files whose codes exist are skipped, unreadable ones named."""
    device = pick_device(args.device)
    tokenizer = Tokenizer.load(args.run, device, encoder_only=not args.refine, weights=args.weights)
    size = parse_size(args.size, tokenizer.cfg.size)
    done = tokenize_folder(
        tokenizer,
        Path(args.input).expanduser(),
        Path(args.output).expanduser(),
        size=size,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        refine=args.refine,
    )
    say(f"{done.written} written, {done.skipped} there already, {len(done.failed)} unreadable")
    say(
        f"codes     {args.output}  (grid {' x '.join(map(str, tokenizer.grid(size)))}, q {tokenizer.num_codebooks})"
    )
    say(f"next      vqcore decode {args.run} {args.output} rebuilt")
    return 0
