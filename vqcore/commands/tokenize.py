"""`vqcore tokenize`: turn files into codes: one `.npy` per sample, in the smallest unsigned integer type that fits."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from vqcore.assembly import pick_device
from vqcore.commands.loading import again, load_named
from vqcore.console import command, say
from vqcore.files import local
from vqcore.tokens.passes import parse_size, tokenize_folder
from vqcore.tokens.store import MANIFEST


def run(args: argparse.Namespace) -> int:
    """Tokenize a folder or a file. Files with existing codes are skipped; unreadable files are named."""
    device = pick_device(args.device, "--device")
    tokenizer = load_named(args, device=device, encoder_only=True)
    size = parse_size(args.size, tokenizer.cfg.size)
    target = local(args.output)
    with _nothing_left(target):
        done = tokenize_folder(
            tokenizer,
            local(args.input),
            target,
            size=size,
            batch_size=args.batch_size,
            overwrite=args.overwrite,
        )
    say(f"{done.written} written, {done.skipped} existed already, {len(done.failed)} unreadable")
    say(
        f"codes     {args.output}  (grid {' x '.join(map(str, tokenizer.grid(size)))}, q {tokenizer.num_codebooks})"
    )
    say(f"next      {command('decode', args.run, args.output, 'rebuilt', *again(args))}")
    return 0


@contextlib.contextmanager
def _nothing_left(target: Path) -> Iterator[None]:
    """If tokenizing fails before codes are written, remove the manifest, and the folder if it did not exist before."""
    existed, claimed = target.exists(), (target / MANIFEST).exists()
    try:
        yield
    except BaseException:
        if not claimed and [path.name for path in target.glob("*")] == [MANIFEST]:
            (target / MANIFEST).unlink()
            if not existed:
                target.rmdir()
        raise
