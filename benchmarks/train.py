"""What loading, logging and hooks cost: whole steps of a run against the same steps on batches that lie in memory.

    python benchmarks/train.py cfgs/quickstart.yaml [key=value ...]

Both take turns in one process on one and the same model: `--pairs` pairs of `--steps` steps each. Reported are median
and quartiles of the ratio of wall-clock time and of CPU time (without the reading processes'), whole to bare, and
beside it bare to bare, which says what the machine can tell apart. A goal of 3 % is met when the upper quartile of the
wall-clock time is below 1.03.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `vqcore train` sets them before torch loads
os.environ.setdefault("GOMP_SPINCOUNT", "50000")
import torch

from vqcore.config import load
from vqcore.console import ProgressLine
from vqcore.feed import Feed
from vqcore.schema import RunConfig
from vqcore.trainer import Run, _Averages, _log, build, train_step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    config = load(args.config, args.overrides, schema=RunConfig).config
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, dir=folder))
        run = build(config, torch.device("cpu" if not torch.cuda.is_available() else "cuda"))
        run.hooks.vqcore_run_started(run=run)
        with Feed(config, run.data, run.tokenizer.modality, run.extra) as feed:
            _report(args, *_measure(run, feed, args))


def _measure(run: Run, feed: Feed, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, float]:
    """Ratios `(pairs, 2)` of wall-clock and CPU time, whole to bare and bare to bare, and seconds of the bare steps."""
    kept = [feed.next(step) for step in range(args.steps)]
    averages, line = _Averages(), ProgressLine("benchmark", 1 << 30, interval_s=1e9)

    def bare() -> None:
        for batches in kept:
            train_step(run, batches)
            run.step += 1

    def whole() -> None:
        for _ in range(args.steps):
            averages.add(train_step(run, feed.next(run.step)))
            run.step += 1
            shown = _log(run, averages, feed) if run.step % run.config.run.log_every == 0 else None
            line.update(run.step, shown)

    bare_s = [_seconds(bare) for _ in range(3)]
    wholes, selves = [], []
    feed.next(run.step)  # the reading processes start here, not in what is measured
    for pair in range(args.pairs):
        feed.position = run.step  # the stream goes on; which samples come does not matter here
        first, second = (whole, bare) if pair % 2 else (bare, whole)
        times = {one: _seconds(one) for one in (first, second)}
        wholes.append(times[whole] / times[bare])
        again = _seconds(bare)
        selves.append(again / times[bare])
        bare_s.append(again)
    return np.array(wholes), np.array(selves), float(np.median(bare_s, axis=0)[0])


def _seconds(work: Callable[[], None]) -> np.ndarray:
    """Wall-clock and CPU seconds."""
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


def _report(args: argparse.Namespace, wholes: np.ndarray, selves: np.ndarray, bare_s: float) -> None:
    print(f"{Path(args.config)} {' '.join(args.overrides)}")
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{bare_s / args.steps * 1e3:.1f} ms a bare step, {threads} threads, load {load:.1f}")
    for name, ratios in (("whole / bare", wholes), ("bare / bare", selves)):
        for clock, values in zip(("wall", "CPU"), ratios.T, strict=True):
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            count = f"{len(values)} pairs of {args.steps} steps"
            print(f"{name}, {clock:4}  {middle:.3f}  quartiles {low:.3f} to {high:.3f}  ({count})")


if __name__ == "__main__":
    main()
