"""`vqcore export`: a tokenizer that stands alone, without training state."""

import argparse
from pathlib import Path

from vqcore import artefact
from vqcore.console import say
from vqcore.tokenizer import Tokenizer


def run(args: argparse.Namespace) -> int:
    """Write the artefact and say how to use it."""
    source = artefact.resolve(args.run)
    tokenizer = Tokenizer.load(source, weights=args.weights)
    made = artefact.verify(source)
    keep = {key: made[key] for key in ("components", "step", "eval_loss") if key in made}
    provenance = artefact.provenance(
        tokenizer.cfg, **keep, weights=args.weights, fingerprint=tokenizer.fingerprint
    )
    tokenizer.save(Path(args.folder), provenance)
    say(f"{args.folder}: {tokenizer.cfg.modality.name} tokenizer, fingerprint {tokenizer.fingerprint[:16]}")
    say(f"use it with Tokenizer.load({args.folder!r}), or as RUN in vqcore tokenize and vqcore decode")
    return 0
