"""`vqcore decode`: turn codes back into files: pictures as PNG, sounds as WAV, everything else as `.npy`."""

import argparse

from vqcore.assembly import pick_device
from vqcore.commands.loading import load_named
from vqcore.compose.build import COMMAND_LINE
from vqcore.compose.layers import settings_of
from vqcore.console import say
from vqcore.files import local
from vqcore.sampling import resolved
from vqcore.tokens.passes import decode_folder, parse_size


def run(args: argparse.Namespace) -> int:
    """Decode a folder of codes or one file of codes, with the sampling options of the command line."""
    asked = settings_of(args.overrides)
    tokenizer = load_named(args, device=pick_device(args.device, "--device"))
    sampling = resolved(type(tokenizer.objective), asked, COMMAND_LINE)
    done = decode_folder(
        tokenizer,
        args.tokens,
        local(args.output),
        size=parse_size(args.size, tokenizer.cfg.size) if args.size else None,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        force=args.force,
        seed=args.seed,
        sampling=sampling,
    )
    say(done.said)
    say(f"files     {args.output}")
    return 0
