"""The memory of `vqcore tokenize` over very many samples: what its process holds while shard after shard is done.

    python benchmarks/flat_memory.py --samples 100000

Tiny pictures as a folder, as tar shards, as Parquet files (of which 16 MiB of row groups are held) and as rows of an
array file; a small tokenizer, trained one step. The command runs as a user would start it, and its own memory
(`RssAnon`: neither libraries nor mapped files) is read from the system while it runs. Shown are the MiB when a tenth,
half and nine tenths of the shards are done, and the most of all. The script prints Markdown. Linux only.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("folder", "tar", "parquet", "array")
SIDE, KINDS, SHARDS = 16, 256, 20
"""Pixels of a side, different pictures, and shards of a pass."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    args = parser.parse_args()
    print(f"{args.samples:,} pictures of {SIDE} x {SIDE}, {SHARDS} shards\n")
    print("| source | MiB after a tenth, half, nine tenths | most | minutes |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        run = trained(Path(folder))
        for name in args.sources:
            begun = time.perf_counter()
            held = measured(Path(folder), run, name, args.samples)
            minutes = (time.perf_counter() - begun) / 60
            shown = ", ".join(f"{held[SHARDS * tenths // 10]:.0f}" for tenths in (1, 5, 9))
            print(f"| {name} | {shown} | {max(held.values()):.0f} | {minutes:.1f} |", flush=True)


def trained(folder: Path) -> Path:
    """A small tokenizer, trained one step."""
    words = (
        "train",
        "cfgs/smoke/rgb.yaml",
        f"run.dir={folder}/run",
        "run.steps=1",
        f"data.input_size={SIDE}",
    )
    if vqcore(*words).wait():
        raise SystemExit(f"vqcore {' '.join(words)} failed")
    return folder / "run"


def measured(folder: Path, run: Path, name: str, count: int) -> dict[int, float]:
    """Tokenize so many samples; returns the most MiB that the process held, by the number of shards that were done."""
    (folder / name).mkdir()
    source, codes = written(folder / name, name, count), folder / f"{name}-codes"
    # A tar has the shards that it has.
    shards = [] if name == "tar" else ["--shard-size", str(-(-count // SHARDS))]
    return watched([str(run), source, str(codes), "--batch-size", "64", *shards], codes)


def vqcore(*words: str) -> "subprocess.Popen[bytes]":
    """A command of vqcore with one thread; only what goes wrong is shown."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-m", "vqcore", *words], cwd=ROOT, env=env, stdout=quiet, stderr=quiet
    )


def written(folder: Path, name: str, count: int) -> str:
    """The samples as a source that `vqcore tokenize` takes."""
    pictures = np.random.default_rng(0).integers(0, 256, (KINDS, SIDE, SIDE, 3), np.uint8)
    files = [png(picture) for picture in pictures]
    if name == "array":
        np.save(folder / "a.npy", pictures[np.arange(count) % KINDS])
        return f"array:{folder}/a.npy"
    edges = np.linspace(0, count, SHARDS + 1).astype(int)
    for shard, numbers in enumerate(map(range, edges[:-1], edges[1:])):
        members = {f"{number:07d}.png": files[number % KINDS] for number in numbers}
        place = folder / f"{shard:02d}"
        if name == "folder":
            place.mkdir()
            for member, content in members.items():
                (place / member).write_bytes(content)
        elif name == "tar":
            with tarfile.open(place.with_suffix(".tar"), "w") as tar:
                for member, content in members.items():
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        else:
            table = pa.table({"image": list(members.values())})
            pq.write_table(table, place.with_suffix(".parquet"), row_group_size=1000)
    last = f"{{00..{SHARDS - 1:02d}}}"
    return {
        "folder": str(folder),
        "tar": f"{folder}/{last}.tar",
        "parquet": f"parquet[memory_mib=16]:{folder}",
    }[name]


def png(picture: np.ndarray) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def watched(words: Sequence[str], codes: Path) -> dict[int, float]:
    """What `measured` returns, of a command."""
    held: dict[int, float] = {}
    process = vqcore("tokenize", *words)
    while process.poll() is None:
        done = sum(path.name != "tokens.json" for path in codes.glob("[!.]*.json"))
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"RssAnon:\s*(\d+) kB", status):
            held[done] = max(held.get(done, 0.0), int(found[1]) / 1024)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"vqcore tokenize {' '.join(words)} failed")
    return held


if __name__ == "__main__":
    main()
