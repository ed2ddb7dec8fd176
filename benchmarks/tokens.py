"""How quickly codes are read from stores, and how much room they take: one file each, tars, Parquet, Arrow.

    python benchmarks/tokens.py --rows 50000 --turns 31

The script prints Markdown. Codes are those of pictures of 14 x 14 tokens from a codebook of 15,360, drawn evenly, as
rows of a store in a temporary folder whose pages are in memory. Each turn measures every line once, on one thread:
random rows by wall time and by the CPU time of the thread, since other programs may use the machine. Shown are medians
and quartiles.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from vqcore.artefacts.stored import store_named
from vqcore.protocols import Coded
from vqcore.tokens import TokenDataset
from vqcore.tokens.shards import Shards

Line = tuple[int, int, Callable[[Sequence[int]], object]]
"""Rows of the store, rows that are read in a turn, and what reads the rows at some places."""
GRID, CODES = (14, 14), 15_360
SHARD, BATCH = 4096, 1024
RAW = 2 * GRID[0] * GRID[1]
"""Bytes of the codes of a row."""


def main() -> None:
    """Print the table of sizes and the table of rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the stores")
    parser.add_argument("--files", type=int, default=1_000, help="rows of the store of one file each")
    parser.add_argument("--turns", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {args.rows:,} rows, {args.turns} turns\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("arrow", "tar", "parquet", "folder")}
        print("| store | bytes of the codes column / raw | bytes on disk / raw |\n| --- | --- | --- |")
        for name, place in places.items():
            count = args.files if name == "folder" else args.rows
            write(place, name, count)
            used = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
            column = f"{codes_bytes(place, count) / (count * RAW):.3f}" if name == "arrow" else ""
            print(f"| {name} | {column} | {used / (count * RAW):.2f} |")
        rates(lines(places), args.turns)


def write(place: Path, name: str, count: int) -> None:
    """A store of random codes."""
    manifest = {
        "format": 1, "fingerprint": "random", "codebook_size": CODES, "num_codebooks": 1, "grid": list(GRID),
        "size": [16 * side for side in GRID], "dtype": "uint16",
    }  # fmt: skip
    rng, store = np.random.default_rng(0), store_named(name, "benchmark")
    starts = range(0, count, SHARD)
    shards = None if name == "folder" else Shards(place, store, {**manifest, "store": name}, len(starts))
    for number, first in enumerate(starts):
        codes = rng.integers(CODES, size=(min(SHARD, count - first), *GRID, 1), dtype=np.uint16)
        rows = [Coded(f"{first + place:08d}", row) for place, row in enumerate(codes)]
        if shards is None:
            store.write(place, "", rows, manifest)
        else:
            shards.write(shards.names[number], rows, {"of": len(rows), "failed": []})
    if shards is not None:
        shards.finish()


def codes_bytes(place: Path, count: int) -> int:
    """Bytes of the files of a store without its keys (8 letters and an offset of 4 bytes) and its manifest."""
    manifest = json.loads((place / "tokens.json").read_text())
    files = [name for shard in manifest["shards"] for name in shard["files"]]
    return sum((place / name).stat().st_size for name in files) - 12 * count


def lines(places: dict[str, Path]) -> dict[str, Line]:
    """What is measured."""
    data = {name: TokenDataset(place) for name, place in places.items()}
    two = TokenDataset({"one": places["arrow"], "two": places["arrow"]})
    rows, many = data["arrow"].stores[""].rows, len(data["arrow"])

    def batches(read: Callable[[Sequence[int]], object]) -> Callable[[Sequence[int]], object]:
        """As in training, a batch of rows is held at a time."""

        def all_(asked: Sequence[int]) -> None:
            for first in range(0, len(asked), BATCH):
                read(asked[first : first + BATCH])

        return all_

    def each(read: Callable[[int], object]) -> Callable[[Sequence[int]], object]:
        return batches(lambda asked: [read(place) for place in asked])

    return {
        "arrow, rows as NumPy views": (many, 100_000, each(rows.codes)),
        "arrow, TokenDataset[i]": (many, 50_000, each(data["arrow"].__getitem__)),
        "arrow twice, TokenDataset[i]": (many, 20_000, each(two.__getitem__)),
        "arrow, TokenDataset.batch of 1,024": (many, 50_000, batches(data["arrow"].batch)),
        "tar, TokenDataset[i]": (len(data["tar"]), 50_000, each(data["tar"].__getitem__)),
        "parquet (in memory), TokenDataset[i]": (many, 50_000, each(data["parquet"].__getitem__)),
        "folder, TokenDataset[i]": (len(data["folder"]), 500, each(data["folder"].__getitem__)),
    }


def rates(what: dict[str, Line], turns: int) -> None:
    """Measure and print rows a second."""
    wall: dict[str, list[float]] = {name: [] for name in what}
    cpu: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(turns):
        for name, (rows, count, read) in what.items():
            asked = random.Random(turn).choices(range(rows), k=count)
            begun, busy = time.perf_counter(), time.thread_time()
            read(asked)
            wall[name].append(count / (time.perf_counter() - begun))
            cpu[name].append(count / (time.thread_time() - busy))
    print(
        "\n| read at random, one thread | rows/s, wall: median (quartiles) | rows/s of CPU time: median (quartiles) |"
    )
    print("| --- | --- | --- |")
    for name in what:
        print(f"| {name} | {spread(wall[name])} | {spread(cpu[name])} |")


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


if __name__ == "__main__":
    main()
