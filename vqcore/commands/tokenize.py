"""`vqcore tokenize`: turn files into codes, in the smallest unsigned integer type that fits."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vqcore import dist
from vqcore.artefacts.stored import Layout, layout_named
from vqcore.assembly import pick_device
from vqcore.commands.loading import again, load_named
from vqcore.console import command, say
from vqcore.errors import ConfigError, did_you_mean, listed, plural
from vqcore.files import local
from vqcore.tokens.cluster import tokenize_by_ray
from vqcore.tokens.flow import Done
from vqcore.tokens.inputs import source_of
from vqcore.tokens.layouts import tokenize_layout
from vqcore.tokens.passes import parse_size, parse_stride, refuse_file, tokenize_folder
from vqcore.tokens.sharded import Job, Pass, tokenize_all
from vqcore.tokens.shards import FAILED

ALSO = ("size", "store", "batch_size", "borrow")
"""What may be said of a further tokenizer."""


def run(args: argparse.Namespace) -> int:
    """Tokenize a data set. What is done already is left alone; unreadable files are named."""
    layout = layout_named(args.store, "--store")  # a name that is wrong costs no loading
    if args.seed and not args.crops:
        raise ConfigError(
            f"--seed {args.seed} decides random crops, and --crops asks for none. Leave it out."
        )
    if not layout.has_shards:
        return _in_files(args, layout)
    only = local(args.only) if args.only else None
    if args.engine == "ray":
        return _on_ray(args, only)
    jobs = _jobs(args, pick_device(args.device, "--device"))
    one = [job for _, job in jobs]
    return _report(
        args, jobs, tokenize_all(args.input, one, overwrite=args.overwrite, only=only, **_how(args))
    )


def _in_files(args: argparse.Namespace, layout: Layout) -> int:
    """A file of codes for each file, in the layout of vqcore or of another system."""
    _refuse_flags(args, layout)
    tokenizer = load_named(args, device=pick_device(args.device, "--device"), encoder_only=True)
    size = parse_size(args.size, tokenizer.cfg.size)
    job = Job(tokenizer=tokenizer, target=local(args.output), size=size)
    how: dict[str, Any] = {
        "size": size,
        "batch_size": args.batch_size,
        "overwrite": args.overwrite,
        "stride": parse_stride(args.stride, len(size)),
        "tiles": args.tiles,
        "workers": args.workers,
    }
    if layout.adopts is None:
        done = tokenize_folder(tokenizer, args.input, job.target, **how)
    else:
        how |= {"store": args.store, "crops": args.crops, "views": args.views, "seed": args.seed}
        done = tokenize_layout(tokenizer, args.input, job.target, **how)
    return _report(args, [(args, job)], [done])


def _on_ray(args: argparse.Namespace, only: Path | None) -> int:
    """A pass on a cluster. This process loads the tokenizers only to say at once what is wrong with them."""
    if not (args.device or "cuda").startswith("cuda"):
        pick_device(args.device, "--device")
    if dist.share()[1] > 1:
        raise ConfigError(f"--engine ray is for one process, and this is one of {dist.share()[1]}.")
    jobs = _jobs(args, torch.device("cpu"))
    for _, job in jobs:
        refuse_file(job.target)
    done_by = tokenize_by_ray(
        partial(_passed, args), device=args.device, readers=args.workers, overwrite=args.overwrite, only=only
    )
    return _report(args, jobs, done_by)


def _passed(args: argparse.Namespace, device: str) -> Pass:
    """The pass of a command, in a process of a cluster."""
    jobs = [job for _, job in _jobs(args, pick_device(device))]
    return Pass(source_of(args.input, jobs[0].tokenizer), jobs, **_how(args))


def _jobs(args: argparse.Namespace, device: torch.device) -> list[tuple[argparse.Namespace, Job]]:
    """The tokenizers of a command and the stores of their codes, each with its arguments."""
    also = [_parsed(words) for words in args.also]
    tokenizer = load_named(args, device=device, encoder_only=True)
    size = parse_size(args.size, tokenizer.cfg.size)
    job = Job(
        tokenizer=tokenizer,
        target=local(args.output),
        size=size,
        store=args.store,
        batch_size=args.batch_size,
        stride=parse_stride(args.stride, len(size)),
        tiles=args.tiles,
        named=args.run,
    )
    return [(args, job), *(_further(args, job, *each) for each in also)]


def _how(args: argparse.Namespace) -> dict[str, Any]:
    """How a pass is done, for all tokenizers."""
    return {
        "shard_size": args.shard_size,
        "workers": args.workers,
        "crops": args.crops,
        "views": args.views,
        "seed": args.seed,
        "masks": args.masks,
    }


def _refuse_flags(args: argparse.Namespace, layout: Layout) -> None:
    """Raise `ConfigError` for what a file of codes for each file cannot hold."""
    for flag, given in (("--only", args.only), ("--shard-size", args.shard_size)):
        if given:
            raise ConfigError(
                f"{flag} is for stores of shards, and --store {args.store} keeps a file for each file: every start "
                "does what is missing. Leave it out."
            )
    if args.engine == "ray":
        raise ConfigError(
            f"--engine ray does shards, and --store {args.store} has none. Leave one of the two out."
        )
    crops = (("--crops", args.crops), ("--views", args.views)) if layout.adopts is None else ()
    for flag, given in (*crops, ("--masks", args.masks), ("--also", args.also)):
        if given:
            raise ConfigError(
                f"{flag} is for stores of shards, and --store {args.store} keeps files of codes. Leave --store out."
            )


def _parsed(words: Sequence[str]) -> tuple[str, str, dict[str, list[str]]]:
    """A further tokenizer, its output, and what else is said of it. Raises `ConfigError`."""
    where = f"--also {' '.join(words)}"
    if len(words) < 2:
        raise ConfigError(f"{where}: write --also RUN OUT, and then settings key=value: {listed(ALSO)}.")
    given: dict[str, list[str]] = {}
    for word in words[2:]:
        key, sign, value = word.partition("=")
        if not sign or key not in ALSO or (key in given and key != "borrow"):
            hint = did_you_mean(key, ALSO)
            raise ConfigError(
                f"{where}: '{word}' is no setting of a further tokenizer.{hint} Settings: {listed(ALSO)}."
            )
        given.setdefault(key, []).append(value)
    for value in given.get("store", ()):
        if not layout_named(value, f"{where}: store").has_shards:
            raise ConfigError(f"{where}: store={value} has no shards. Take another store.")
    return words[0], words[1], given


def _further(
    args: argparse.Namespace, first: Job, run: str, output: str, given: dict[str, list[str]]
) -> tuple[argparse.Namespace, Job]:
    """A further tokenizer, loaded as the first one is, and its arguments."""
    its = argparse.Namespace(
        **{**vars(args), "run": run, "output": output, "borrow": given.get("borrow", [])}
    )
    tokenizer = load_named(its, device=first.tokenizer.device, encoder_only=True)
    (size,), (batch_size,) = given.get("size", [None]), given.get("batch_size", [str(first.batch_size)])
    if not batch_size.isdecimal() or not int(batch_size):
        raise ConfigError(f"--also {run}: batch_size={batch_size} must be a whole number above 0.")
    job = replace(
        first,
        tokenizer=tokenizer,
        target=local(output),
        size=parse_size(size, tokenizer.cfg.size),
        store=given.get("store", [first.store])[0],
        batch_size=int(batch_size),
        named=run,
    )
    return its, job


def _report(
    args: argparse.Namespace, jobs: Sequence[tuple[argparse.Namespace, Job]], done_by: Sequence[Done]
) -> int:
    """Say what became of the files, and of each store."""
    say(done_by[0].said)
    for (its, job), done in zip(jobs, done_by):
        if done is not done_by[0]:
            say(f"{its.run}: {done.said.splitlines()[0]}")
        for what, count in (("crops", done.crops), ("tiles" if args.tiles else "windows", done.windows)):
            if count > done.seen:
                size = " x ".join(map(str, job.size))
                say(f"{what:10}{count:,} of {size}, for {plural(done.seen, 'sample')}")
        if done.share_lost >= 0.005:
            area = "area" if len(job.size) == 2 else "samples"
            say(f"left out  {done.share_lost:.0%} of the {area}: each is cropped; --tiles takes all of it")
        grid = " x ".join(map(str, job.tokenizer.grid(job.size)))
        say(f"codes     {its.output}  (grid {grid}, q {job.tokenizer.num_codebooks})")
        if done.failed and (job.target / FAILED).exists():
            say(
                f"failed    {job.target / FAILED}: mend the files, then give the same command --only with this file"
            )
    for number, (its, _) in enumerate(jobs):
        rebuilt = f"rebuilt-{number + 1}" if len(jobs) > 1 else "rebuilt"
        say(f"next      {command('decode', its.run, its.output, rebuilt, *again(its))}")
    return 0
