"""What the bookkeeping of a very large store costs: notes of shards, the manifest, opening. No codes are made.

    python benchmarks/many_shards.py --shards 100000

A billion pictures in tar shards of 10,000 are 100,000 shards. The script writes as many notes, each as a pass writes it
(aside, flushed, renamed; all shards share one tiny file of codes), and times what a pass does with them.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.artefacts.stored import store_named
from vqcore.protocols import Coded
from vqcore.tokens.shards import Shards

MANIFEST = {
    "format": 1, "fingerprint": "none", "codebook_size": 16_384, "num_codebooks": 1, "grid": [2], "size": [32],
    "dtype": "uint16", "store": "arrow",
}  # fmt: skip


class One:
    """A store whose shards are all the same file."""

    def __init__(self, folder: Path):
        row = Coded("x", np.zeros((2, 1), np.uint16))
        (self.name,) = store_named("arrow", "benchmark").write(folder, "all", [row], MANIFEST)

    def write(
        self, folder: Path, shard: str, rows: Sequence[Coded], manifest: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Write nothing."""
        return (self.name,)

    def open(self, folder: Path, manifest: Mapping[str, Any]) -> Any:
        """Nobody opens it."""
        raise NotImplementedError


def main() -> None:
    """Write the notes and print what each step costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=100_000)
    args = parser.parse_args()
    print(f"{args.shards:,} shards, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "store")
        shards = Shards(folder, One(folder.parent), MANIFEST, args.shards)
        (folder / "all.arrow").write_bytes((folder.parent / "all.arrow").read_bytes())
        row = [Coded("x", np.zeros((2, 1), np.uint16))]
        facts = {"of": 10_000, "failed": [], "sizes": "0" * 64}
        begun = clocks()
        for each in shards.names:
            shards.write(each, row, facts)
        told("a note, written when a shard is done", begun, args.shards)
        begun = clocks()
        assert len(shards.done) == args.shards
        told("all notes, read once by each process that starts", begun)
        begun = clocks()
        manifest = shards.finish()
        assert manifest is not None and manifest["files"] == 10_000 * args.shards
        told("the manifest of the complete store", begun)
        size = (folder / "tokens.json").stat().st_size
        begun = clocks()
        json.loads((folder / "tokens.json").read_text())
        told(f"reading the manifest ({size / 2**20:.0f} MiB)", begun)
        begun = clocks()
        rows = store_named("arrow", "benchmark").open(folder, manifest)
        assert len(rows) == args.shards
        told("opening all shards", begun)
        begun = clocks()
        rows.many(np.random.default_rng(0).integers(args.shards, size=1024))
        told("1,024 rows at random", begun)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{most:.1f} GiB of memory at most")


def clocks() -> np.ndarray:
    """Wall and CPU seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def told(what: str, begun: np.ndarray, parts: int = 1) -> None:
    """Print how long something took, by the clock and in CPU seconds."""
    wall, cpu = (clocks() - begun) / parts
    shown = (
        f"{1000 * wall:.2f} ms, CPU {1000 * cpu:.2f} ms" if parts > 1 else f"{wall:.1f} s, CPU {cpu:.2f} s"
    )
    print(f"{what:56} {shown}")


if __name__ == "__main__":
    main()
