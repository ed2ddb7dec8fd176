"""How quickly samples are read: folder, tar, parquet and array, beside torchvision's ImageFolder and webdataset.

    python benchmarks/data.py --samples 2000 --turns 31

Everybody does the same work: a JPEG picture of 500 x 375 becomes a random crop of 224 x 224 (a tenth of the area or
more, bilinear), perhaps mirrored, as a normalised float tensor in batches of 32, in a random order. `array` has the
pictures unpacked. Each turn measures every line once, over the next `--take` samples of its order, by wall time and by
CPU time (workers included), since other programs may use the machine. The ratio of a turn is that of a line to
the better of the two peers; a peer beside itself shows the noise. The script prints Markdown, then the memory of one
reading process over an epoch of each source. Needs torchvision and webdataset.
"""

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `vqcore train` sets it before torch loads
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision  # type: ignore[import-untyped]
import webdataset
from PIL import Image
from torchvision import transforms

from vqcore.data.batches import TrainBatches
from vqcore.data.order import Order
from vqcore.registry import registry
from vqcore.testing.conformance import configured

PHOTOS = Path(__file__).resolve().parents[1] / "data/photos/train"
EXTENT, SIZE, BATCH, LEAST = (500, 375), 224, 32, 0.1
SHARDS, GROUP, UNPACKED = 8, 100, 256
"""Shards of the data set, rows of a row group, and samples of the array."""
PEERS = ("ImageFolder", "webdataset")
Pass = Callable[[int], Iterator[Any]]
"""From the number of a turn to batches."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--take", type=int, default=512, help="samples of a line in one turn")
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        name, folder = args.memory.split("=")
        print(memory(ours(Path(folder), name, 0), args.samples))
        return
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write(folder, args.samples)
        size = sum(path.stat().st_size for path in (folder / "files").rglob("*.jpg")) / args.samples
        print(
            f"{args.samples:,} pictures of {size / 1000:.0f} kB, {args.workers} workers, {args.turns} turns of "
            f"{args.take} samples, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
        )
        lines = {
            "ImageFolder": image_folder(folder, args.workers),
            "webdataset": web(folder, args.workers),
            "ImageFolder again": image_folder(folder, args.workers),
            **{
                name: ours(folder, name, args.workers, args.take)
                for name in ("folder", "tar", "parquet", "array")
            },
        }
        rates(lines, args.turns, args.take // BATCH)
        print(access(folder, args.take))
        print("\n| source | MiB of the process after a tenth, half and all of an epoch |\n| --- | --- |")
        for name in ("folder", "tar", "parquet"):
            command = [
                sys.executable,
                __file__,
                "--samples",
                str(args.samples),
                "--memory",
                f"{name}={folder}",
            ]
            print(
                f"| {name} | {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()} |"
            )


def write(folder: Path, count: int) -> None:
    """The same pictures as a folder, as tar shards, as Parquet files and, some of them, unpacked as an array."""
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.rglob("*.jpg"))]
    rng = np.random.default_rng(0)
    unpacked = np.empty((min(count, UNPACKED), *EXTENT[::-1], 3), np.uint8)
    for shard in range(SHARDS):
        rows = []
        (folder / f"files/{shard}").mkdir(parents=True)
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                photo = photos[int(rng.integers(len(photos)))]
                share = float(rng.uniform(0.6, 1))
                sides = [round(share * side) for side in photo.size]
                left, top = (int(rng.integers(side - short + 1)) for side, short in zip(photo.size, sides))
                box = (left, top, left + sides[0], top + sides[1])
                picture, file = photo.resize(EXTENT, Image.Resampling.BICUBIC, box), io.BytesIO()
                picture.save(file, "JPEG", quality=90)
                content, name = file.getvalue(), f"{number:06d}.jpg"
                (folder / f"files/{shard}/{name}").write_bytes(content)
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
                rows.append({"bytes": content, "path": name})
                if number < len(unpacked):
                    unpacked[number] = np.asarray(picture)
        (folder / "parquet").mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": rows}), folder / f"parquet/{shard}.parquet", row_group_size=GROUP)
    np.save(folder / "array.npy", unpacked)


def ours(folder: Path, name: str, workers: int, take: int = BATCH) -> Pass:
    """A data source of vqcore, as a run reads it."""
    data, built, cfg = opened(folder, name)
    place = {"seed": 0, "accumulate": 1, "rank": 0, "world": 1, "steps": sys.maxsize, "workers": workers}

    def batches(turn: int) -> Iterator[Any]:
        made = TrainBatches(data, built, {}, cfg, start_step=turn * take // BATCH, **place)
        return (loaded.batch.x for loaded in made if loaded.batch is not None)

    return batches


def opened(folder: Path, name: str) -> tuple[Any, Any, Any]:
    """A source, its modality and its config."""
    where = {
        "folder": "files",
        "tar": f"{{0..{SHARDS - 1}}}.tar",
        "parquet": "parquet",
        "array": "array.npy",
    }[name]
    modality = {"name": "rgb", "min_crop_scale": LEAST, "resample": "bilinear"}
    tree = {"path": str(folder / where), "modality": modality, "input_size": SIZE, "batch_size": BATCH}
    cfg = configured("data", name, tree | ({"memory_mib": 32} if name == "parquet" else {}))
    built = registry().build("modality", cfg.modality, size=(SIZE, SIZE))
    return registry().build("data", cfg, split="train", modality=built, extra={}), built, cfg


def transform() -> Any:
    """What ours does, as torchvision does it."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(LEAST, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )


def image_folder(folder: Path, workers: int) -> Pass:
    """torchvision's ImageFolder with a DataLoader."""
    data = torchvision.datasets.ImageFolder(str(folder / "files"), transform())

    def batches(turn: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(turn)
        loader = torch.utils.data.DataLoader(
            data, BATCH, shuffle=True, num_workers=workers, generator=generator
        )
        return (x for x, _ in loader)

    return batches


def web(folder: Path, workers: int) -> Pass:
    """webdataset's usual pipeline: shards and a buffer of samples are shuffled."""
    shards = f"{folder}/{{0..{SHARDS - 1}}}.tar"
    work = transform()

    def batches(turn: int) -> Iterator[Any]:
        data = webdataset.WebDataset(shards, shardshuffle=SHARDS, seed=turn).shuffle(1000, initial=100)
        data = data.decode("pilrgb").to_tuple("jpg").map_tuple(work).batched(BATCH)
        return (x for (x,) in webdataset.WebLoader(data, batch_size=None, num_workers=workers))

    return batches


def rates(lines: dict[str, Pass], turns: int, batches: int) -> None:
    """Measure and print samples a second, and their ratios to the better peer of the turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in lines}
    for turn in range(-1, turns):  # the first turn only warms up
        for name, line in lines.items():
            begun, busy = time.perf_counter(), cpu()
            source = line(max(turn, 0))
            for _ in range(batches):
                x = next(source)
                assert x.shape == (BATCH, 3, SIZE, SIZE) and x.dtype == torch.float32
            del source  # workers end, and their CPU time counts
            spent = time.perf_counter() - begun, cpu() - busy
            if turn >= 0:
                found[name].append((batches * BATCH / spent[0], batches * BATCH / spent[1]))
    print("| line | samples/s, wall | to the better peer | samples/s of CPU time | to the better peer |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in found.items():
        cells = []
        for clock in range(2):
            best = [max(found[peer][turn][clock] for peer in PEERS) for turn in range(turns)]
            ratios = [value[clock] / top for value, top in zip(values, best)]
            cells += [spread([value[clock] for value in values], 0), spread(ratios, 2)]
        print(f"| {name} | {' | '.join(cells)} |")


def access(folder: Path, count: int) -> str:
    """What a row of Parquet costs in CPU time, in the order of training and at random."""
    said = []
    for where, shuffled in (("in the order of training", False), ("at random", True)):
        data, *_ = opened(folder, "parquet")
        order, rng = Order(data, 0), np.random.default_rng(0)
        begun = cpu()
        for place in range(count):
            data.get(int(rng.integers(len(data))) if shuffled else order(0, place))
        said.append(f"{1e6 * (cpu() - begun) / count:,.0f} us {where}")
    return f"\na row of Parquet, not decoded: {', '.join(said)}"


def cpu() -> float:
    """Seconds of the CPU of this process and of the workers that have ended."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def memory(line: Pass, samples: int) -> str:
    """MiB of this process after a tenth, half and all of an epoch."""
    number, said = samples // BATCH, []
    source = line(0)
    for batch in range(1, number + 1):
        next(source)
        if batch in (number // 10, number // 2, number):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            said.append(f"{pages * resource.getpagesize() / 2**20:.0f}")
    return ", ".join(said)


def spread(values: Sequence[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
