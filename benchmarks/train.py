"""What loading, logging and hooks cost: whole training steps, compared with the same steps on batches in memory.

    python benchmarks/train.py cfgs/quickstart.yaml [key=value ...]

Both kinds take turns, step by step, in one process on one model: `--pairs` pairs of `--steps` steps each. The output is
median and quartiles of a ratio, whole steps to bare steps, for wall-clock time and for CPU time (without the time of
the reading processes). The ratio of bare steps to bare steps stands beside it and shows the noise of the machine.

With `--encode`, of a config with data.name=tokens, the first kind are bare steps in which the encoder makes the codes
anew: what training on stored codes saves.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `vqcore train` sets them before torch loads
os.environ.setdefault("GOMP_SPINCOUNT", "50000")
import torch

from vqcore.compose.layers import load
from vqcore.console import ProgressLine
from vqcore.data.feed import Feed
from vqcore.run.state import Run, build
from vqcore.run.step import train_step
from vqcore.schema import RunConfig
from vqcore.trainer import _Loop


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--steps", type=int, default=16, help="a multiple of what is read in one go")
    parser.add_argument("--encode", action="store_true", help="compare stored codes with the encoder")
    args = parser.parse_args()
    config = load(args.config, args.overrides, schema=RunConfig).config
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, dir=folder))
        run = build(config, torch.device("cpu" if not torch.cuda.is_available() else "cuda"))
        run.hooks.vqcore_run_started(run=run)
        with Feed(config, run.data, run.tokenizer.modality, run.extra) as feed:
            _report(args, *_measure(run, feed, args))


def _measure(run: Run, feed: Feed, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, float]:
    """Ratios `(pairs, 2)` of wall-clock and CPU time, whole to bare and bare to bare, and seconds of a bare step."""
    loop, line = _Loop(run), ProgressLine("benchmark", 1 << 30, interval_s=1e9)
    count = 0

    def whole() -> None:
        nonlocal count
        loop.averages.add(train_step(run, feed.next(count)))
        count, run.progress.step = count + 1, run.step + 1
        run.hooks.vqcore_step_done(run=run, step=run.step)
        line.update(count, loop.log(feed) if count % run.config.run.log_every == 0 else None)

    for _ in range(max(args.steps, -(-len(run.data) // run.config.data.batch_size))):
        whole()  # threads, caches and reading processes have begun, and data.cache_mib is filled
    kept = [feed.next(count + step) for step in range(args.steps)]
    count += args.steps

    def bare(step: int) -> None:
        train_step(run, kept[step])
        run.progress.step += 1

    def encoded(step: int) -> None:
        train_step(run, [replace(batch, codes=None) for batch in kept[step]])
        run.progress.step += 1

    pairs = []
    for _ in range(args.pairs):
        times = np.zeros((3, 2))
        for step in range(args.steps):
            other = partial(encoded, step) if args.encode else whole
            kinds: list[Callable[[], None]] = [other, partial(bare, step), partial(bare, step)]
            for turn in range(3):
                kind = (turn + step) % 3
                times[kind] += _seconds(kinds[kind])
        pairs.append(times)
    wholes, first, second = np.array(pairs).transpose(1, 0, 2)
    return wholes / first, second / first, float(np.median(first[:, 0])) / args.steps


def _seconds(work: Callable[[], None]) -> np.ndarray:
    """Wall-clock and CPU seconds."""
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


def _report(args: argparse.Namespace, wholes: np.ndarray, selves: np.ndarray, bare_s: float) -> None:
    print(f"{Path(args.config)} {' '.join(args.overrides)}")
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{bare_s * 1e3:.1f} ms a bare step, {threads} threads, load {load:.1f}")
    for name, ratios in (
        ("encoded / bare" if args.encode else "whole / bare", wholes),
        ("bare / bare", selves),
    ):
        for clock, values in zip(("wall", "CPU"), ratios.T, strict=True):
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            count = f"{len(values)} pairs of {args.steps} steps"
            print(f"{name}, {clock:4}  {middle:.3f}  quartiles {low:.3f} to {high:.3f}  ({count})")


if __name__ == "__main__":
    main()
