"""`vqcore tokenize`: files become codes, one `.npy` a sample, in the smallest unsigned integer that holds them."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from vqcore.assembly import pick_device
from vqcore.console import command, say
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.passes import parse_size, tokenize_folder
from vqcore.tokens.store import MANIFEST


def run(args: argparse.Namespace) -> int:
    """Tokenize a folder or a file; files whose codes exist are skipped, unreadable ones named."""
    device = pick_device(args.device)
    tokenizer = Tokenizer.load(args.run, device, encoder_only=True, weights=args.weights)
    size = parse_size(args.size, tokenizer.cfg.size)
    target = Path(args.output).expanduser()
    with _nothing_left(target):
        done = tokenize_folder(
            tokenizer,
            Path(args.input).expanduser(),
            target,
            size=size,
            batch_size=args.batch_size,
            overwrite=args.overwrite,
        )
    say(f"{done.written} written, {done.skipped} there already, {len(done.failed)} unreadable")
    say(
        f"codes     {args.output}  (grid {' x '.join(map(str, tokenizer.grid(size)))}, q {tokenizer.num_codebooks})"
    )
    say(f"next      {command('decode', args.run, args.output, 'rebuilt')}")
    return 0


@contextlib.contextmanager
def _nothing_left(target: Path) -> Iterator[None]:
    """Where tokenizing fails before there are codes, take away the manifest, and the folder if it was made for it."""
    existed, claimed = target.exists(), (target / MANIFEST).exists()
    try:
        yield
    except BaseException:
        if not claimed and [path.name for path in target.glob("*")] == [MANIFEST]:
            (target / MANIFEST).unlink()
            if not existed:
                target.rmdir()
        raise
