"""`vqcore tokenize`: turn files into codes, in the smallest unsigned integer type that fits."""

import argparse
from typing import Any

from vqcore.artefacts.stored import FOLDER, store_named
from vqcore.assembly import pick_device
from vqcore.commands.loading import again, load_named
from vqcore.console import command, say
from vqcore.errors import ConfigError
from vqcore.files import local
from vqcore.tokens.passes import parse_size, parse_stride, tokenize_folder
from vqcore.tokens.sharded import SHARD_SIZE, tokenize_shards
from vqcore.tokens.shards import FAILED


def run(args: argparse.Namespace) -> int:
    """Tokenize a folder or a file. What is done already is left alone; unreadable files are named."""
    store_named(args.store, "--store")  # a name that is wrong costs no loading
    in_files = args.store == FOLDER
    if in_files and (args.only or args.shard_size):
        flag = "--only" if args.only else "--shard-size"
        raise ConfigError(
            f"{flag} is for stores of shards, and --store {args.store} keeps a file for each file: every start does "
            "what is missing. Leave it out."
        )
    device = pick_device(args.device, "--device")
    tokenizer = load_named(args, device=device, encoder_only=True)
    size = parse_size(args.size, tokenizer.cfg.size)
    how: dict[str, Any] = {
        "size": size,
        "batch_size": args.batch_size,
        "overwrite": args.overwrite,
        "stride": parse_stride(args.stride, len(size)),
        "tiles": args.tiles,
        "workers": args.workers,
    }
    source, target = local(args.input), local(args.output)
    if in_files:
        done = tokenize_folder(tokenizer, source, target, **how)
    else:
        done = tokenize_shards(
            tokenizer,
            source,
            target,
            store=args.store,
            shard_size=args.shard_size or SHARD_SIZE,
            only=local(args.only) if args.only else None,
            named=args.run,
            **how,
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
    if done.failed and not in_files:
        say(f"failed    {target / FAILED}: mend the files, then give the same command --only with this file")
    say(f"next      {command('decode', args.run, args.output, 'rebuilt', *again(args))}")
    return 0
