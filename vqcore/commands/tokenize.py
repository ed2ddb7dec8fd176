"""`vqcore tokenize`: turn files into codes: one file per sample, in the smallest unsigned integer type that fits."""

import argparse

from vqcore.assembly import pick_device
from vqcore.commands.loading import again, load_named
from vqcore.console import command, say
from vqcore.files import local
from vqcore.tokens.passes import parse_size, parse_stride, tokenize_folder


def run(args: argparse.Namespace) -> int:
    """Tokenize a folder or a file. Files with existing codes are skipped; unreadable files are named."""
    device = pick_device(args.device, "--device")
    tokenizer = load_named(args, device=device, encoder_only=True)
    size = parse_size(args.size, tokenizer.cfg.size)
    stride = parse_stride(args.stride, len(size))
    done = tokenize_folder(
        tokenizer,
        local(args.input),
        local(args.output),
        size=size,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        stride=stride,
        tiles=args.tiles,
    )
    say(done.said)
    if done.windows > done.seen:
        samples = f"{done.seen:,} sample{'' if done.seen == 1 else 's'}"
        say(f"windows   {done.windows:,} of {' x '.join(map(str, size))}, for {samples}")
    if done.share_lost >= 0.005:
        what = "area" if len(size) == 2 else "samples"
        say(f"left out  {done.share_lost:.0%} of the {what}: each is cropped; --tiles takes all of it")
    say(
        f"codes     {args.output}  (grid {' x '.join(map(str, tokenizer.grid(size)))}, q {tokenizer.num_codebooks})"
    )
    say(f"next      {command('decode', args.run, args.output, 'rebuilt', *again(args))}")
    return 0
