"""What a pass costs beside what it cannot do without: JPEG files to a store, against encoding and decoding alone.

    OMP_NUM_THREADS=1 python benchmarks/tokenizing.py --json tokenizing.json

One process for each core shares the files as under torchrun, with one thread each; tokenizers are loaded and warm. A
round has three parts in a changing order: the pass (what `vqcore tokenize` does with its shards: read, encode, write,
flush, and the manifest), and the work alone: the CPU seconds of the encoder on batches in memory, and of reading the
same files to tensors, each in all processes at once. The ratio is the wall time of the pass, from the first process
that begins to the last one that ends, to (encoder + reading) / cores. The start of a process (files listed, fingerprint
of the weights, store opened) is shown apart. "Each process beside itself" leaves out that one ends before the other.
The goal is met if the third quartile of the ratio is at most 1.05. The machine must be idle: wall time is compared with
CPU time.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `vqcore tokenize` sets it before torch loads

import torch

from vqcore.assembly import tokenizer_config
from vqcore.compose.build import from_tree
from vqcore.console import ProgressLine
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.inputs import source_of
from vqcore.tokens.sharded import Job, Pass

ROOT = Path(__file__).resolve().parents[1]
GOAL = 1.05
Times = tuple[float, float, float]
"""Begin and end by the clock of the machine, and CPU seconds of the process."""


def main() -> None:
    """Measure and print each model, and write the numbers to `--json` if given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["s", "b"], help="sizes of the ViT (default s and b)")
    parser.add_argument("--files", type=int, nargs="+", default=[128, 48], help="JPEG files for each model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=1, help="threads of a process that read ahead")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    reports = []
    for model, count in zip(args.models, args.files, strict=True):
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            rounds = measured(args, model, copies(Path(folder) / "in", count), Path(folder))
        reports.append(report(args, model, count, rounds, load))
    if args.json:
        args.json.write_text(json.dumps(reports, indent=2) + "\n")


def copies(folder: Path, count: int) -> Path:
    """A folder of so many JPEG files: the bundled photographs, some of them several times."""
    photos = sorted((ROOT / "data/photos/train").glob("*.jpg"))
    folder.mkdir()
    for number in range(count):
        shutil.copy(photos[number % len(photos)], folder / f"{number:05d}.jpg")
    return folder


def measured(
    args: argparse.Namespace, model: str, source: Path, folder: Path
) -> list[dict[str, list[Times]]]:
    """What each process measured in each round, by part; the first round is not counted."""
    spawned = multiprocessing.get_context("spawn")
    barrier = spawned.Barrier(args.cores)
    ends, processes = [], []
    for rank in range(args.cores):
        here, there = spawned.Pipe()
        given = (args, model, source, folder, rank, barrier, there)
        processes.append(spawned.Process(target=process, args=given))
        processes[-1].start()
        ends.append(here)
    rounds = []
    for _ in range(args.rounds + 1):
        told = [end.recv() for end in ends]
        rounds.append({part: [one[part] for one in told] for part in told[0]})
    for each in processes:
        each.join()
    return rounds[1:]


def process(
    args: argparse.Namespace, model: str, source: Path, folder: Path, rank: int, barrier: Any, out: Connection
) -> None:
    """One process: its share of the pass, and of the work alone."""
    os.environ.update(WORLD_SIZE=str(args.cores), RANK=str(rank))
    torch.set_num_threads(1)
    tokenizer = built(model)
    size = tuple(tokenizer.cfg.size)
    paths = sorted(source.iterdir())
    share = -(-len(paths) // args.cores)
    mine = paths[rank * share : (rank + 1) * share]
    loaded = [tokenizer.prepared(path, size).part(0)[0] for path in mine]
    batches = [torch.stack(loaded[at : at + args.batch]) for at in range(0, len(loaded), args.batch)]

    def start(number: int) -> Pass:
        job = Job(tokenizer=tokenizer, target=folder / f"out{number}", size=size, batch_size=args.batch)
        begun = Pass(source_of(source, tokenizer), [job], shard_size=share, workers=args.workers)
        begun.begin()
        return begun

    def whole(begun: Pass) -> None:
        with contextlib.redirect_stderr(io.StringIO()), ProgressLine("tokenize", len(mine)) as line:
            begun.do(rank, line)
            begun.finish()

    def encode() -> None:
        for batch in batches:
            tokenizer.encode(batch)

    def read() -> None:
        for path in mine:
            tokenizer.prepared(path, size).part(0)

    for number in range(args.rounds + 1):
        begun: list[Pass] = []
        told = {"start": timed(lambda: begun.append(start(number)))}  # noqa: B023 - called at once
        parts: list[tuple[str, Callable[[], None]]] = [
            ("pass", lambda: whole(begun[0])), ("encode", encode), ("read", read),  # noqa: B023
        ]  # fmt: skip
        turn = number % len(parts)
        for name, work in parts[turn:] + parts[:turn]:
            barrier.wait()
            told[name] = timed(work)
        out.send(told)
        barrier.wait()
        if rank == 0:
            shutil.rmtree(folder / f"out{number}")


def built(model: str) -> Tokenizer:
    """A tokenizer with a ViT of this size, 224 pixels, patches of 16, and weights as initialised."""
    parts = {"width": 64, "depth": 0, "num_heads": 1, "patch_size": 16}
    tree = {
        "data": {"name": "folder", "path": str(ROOT), "modality": {"name": "rgb"}, "input_size": 224},
        "model": {
            "encoder": {"name": "vit/encoder", "size": model, "patch_size": 16},
            "quantizer": {"name": "quant/fsq", "levels": [8, 8, 8, 6, 5]},
            "decoder": {"name": "vit/decoder", **parts},
        },
        "objective": {"name": "reconstruction"},
        "run": {"dir": "unused", "steps": 1},
        "optim": {"lr": 1.0},
    }
    config = from_tree(tree, schema=RunConfig)
    modality = registry().build("modality", config.data.modality, size=config.data.input_size)
    return Tokenizer(tokenizer_config(config, modality), encoder_only=True).eval()


def timed(work: Callable[[], None]) -> Times:
    """Do something and time it."""
    begun, busy = time.monotonic(), time.process_time()
    work()
    return begun, time.monotonic(), time.process_time() - busy


def report(
    args: argparse.Namespace, model: str, count: int, rounds: Sequence[dict[str, list[Times]]], load: float
) -> dict[str, Any]:
    """Print medians and quartiles, and whether the goal is met."""

    def cpu(one: dict[str, list[Times]], *parts: str) -> float:
        return sum(seconds for part in parts for _, _, seconds in one[part])

    def wall(one: dict[str, list[Times]]) -> float:
        return max(end for _, end, _ in one["pass"]) - min(begun for begun, _, _ in one["pass"])

    alone = [cpu(one, "encode", "read") for one in rounds]
    values = {
        "start of a process, wall s": [max(end - begun for begun, end, _ in one["start"]) for one in rounds],
        "pass, wall s": [wall(one) for one in rounds],
        "encoder, CPU s": [cpu(one, "encode") for one in rounds],
        "reading, CPU s": [cpu(one, "read") for one in rounds],
        "wall of the pass / (CPU alone / cores)": [
            wall(one) * args.cores / one_alone for one, one_alone in zip(rounds, alone)
        ],
        "the same, each process beside itself": [
            statistics.mean(
                (end - begun) / (encode[2] + read[2])
                for (begun, end, _), encode, read in zip(one["pass"], one["encode"], one["read"])
            )
            for one in rounds
        ],
        "CPU of the pass / CPU alone": [
            cpu(one, "pass") / one_alone for one, one_alone in zip(rounds, alone)
        ],
    }
    quartiles = {
        name: statistics.quantiles(many, n=4, method="inclusive") if len(many) > 1 else many * 3
        for name, many in values.items()
    }
    print(
        f"ViT-{model.upper()}/16 at 224 pixels, {count} JPEG files, {args.cores} processes of one thread, batches of "
        f"{args.batch}, {len(rounds)} rounds, load {load:.1f} before"
    )
    for name, (low, middle, high) in quartiles.items():
        print(f"  {name:40} {middle:8.3f}  quartiles {low:.3f} to {high:.3f}")
    high = quartiles["wall of the pass / (CPU alone / cores)"][2]
    print(f"  goal {'met' if high <= GOAL else 'not shown'}: {high:.3f} against {GOAL}")
    return {"model": model, "files": count, "rounds": len(rounds), "cores": args.cores, **quartiles}


if __name__ == "__main__":
    main()
