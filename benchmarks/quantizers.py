"""Time and memory of a training step of quant/vq, vector-quantize-pytorch, and the matrix product alone.

    python benchmarks/quantizers.py --pairs 31

The script prints Markdown. Linux only. Needs `pip install vector-quantize-pytorch` (the peer).
Time: a step is forward pass, backward pass and update of the codebook, with cosine search, EMA and replacement of dead
codes. One turn runs four things: ours, the peer, the peer again, and the product of all latents and codes
(preallocated, in the fastest of several tile shapes). A ratio compares two times of the same turn.
Memory: the largest resident size during a step minus the resident size before the step. Each measurement runs in a
process of its own, after a small step that loads the libraries.
If "CPUs in use" is far below the number of threads, other programs used the CPUs during the measurement. The load at
the start does not show programs that started later.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

# Set before torch is imported: threads that spin while they wait slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor
from vqcore_quant.vq import VQ

Step = Callable[[], object]
SPEED = {"latents": 12_544, "codes": 16_384, "dim": 32}
MEMORY = (
    {"latents": 1_024, "codes": 262_144, "dim": 16},
    {"latents": 12_544, "codes": 16_384, "dim": 32},
    {"latents": 1_024, "codes": 1_048_576, "dim": 16},
)
PEER_FITS = 2**32
"""The peer needs about 25 bytes per latent and code. It is not run if latents x codes x 8 is above this number."""
COEF = 32.0
TILES = ((64, 16_384), (128, 4_096), (256, 4_096), (512, 4_096), (512, 2_048), (896, 2_048))


def main() -> None:
    """Print the table of times and the table of memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--pairs", type=int, default=31, help="turns of the time measurement; 0: no time measurement"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--no-memory", action="store_true", help="no memory measurement")
    parser.add_argument("--peak", nargs=4, metavar=("WHO", "LATENTS", "CODES", "DIM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pairs == 1:
        parser.error("--pairs 1 gives no quartiles; use 0, or 2 and more")
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(_peak(args.peak[0], *map(int, args.peak[1:]))))
        return
    print(
        f"`python {' '.join(sys.argv)}`: torch {torch.__version__}, vector-quantize-pytorch "
        f"{version('vector-quantize-pytorch')}, {args.threads} threads of {os.cpu_count()} CPUs, "
        f"load {os.getloadavg()[0]:.1f} at the start."
    )
    if args.pairs:
        _print_times(args.pairs)
    if not args.no_memory:
        _print_memory(args.threads)
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}.")


def _print_times(pairs: int) -> None:
    torch.manual_seed(0)
    z = torch.randn(SPEED["latents"], SPEED["dim"])
    product, tile = _fastest_product(z)
    ours, peer = _ours(z, SPEED["codes"]), _peer(z, SPEED["codes"])
    turns = _take_turns({"ours": ours, "peer": peer, "peer again": peer, "product": product}, pairs)
    print(f"\n{_size(**SPEED)}; product in tiles of {tile[0]} x {tile[1]}; {pairs} turns.\n")
    print("| | wall s, median | CPU s, median | CPUs in use |\n| --- | --- | --- | --- |")
    for name, seconds in turns.items():
        used = statistics.median(cpu / wall for wall, cpu in seconds)
        print(f"| {name} | {_median(seconds, 0):.3f} | {_median(seconds, 1):.3f} | {used:.2f} |")
    print("\n| ratio | wall: median (quartiles) | CPU: median (quartiles) |\n| --- | --- | --- |")
    for above, below in (("peer", "ours"), ("ours", "product"), ("peer again", "peer")):
        cells = [
            _quartiles([a[i] / b[i] for a, b in zip(turns[above], turns[below], strict=True)]) for i in (0, 1)
        ]
        print(f"| {above} / {below} | {cells[0]} | {cells[1]} |")


def _print_memory(threads: int) -> None:
    print(
        "\n| training step | ours: MiB, s | peer: MiB, s | peer / ours, memory |\n| --- | --- | --- | --- |"
    )
    for size in MEMORY:
        cells, peaks = [], []
        for who in ("ours", "peer"):
            if who == "peer" and size["latents"] * size["codes"] * 8 > PEER_FITS:
                cells.append("not run")
                continue
            command = [sys.executable, str(Path(__file__)), "--threads", str(threads)]
            command += ["--peak", who, *(str(size[k]) for k in ("latents", "codes", "dim"))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            mib, seconds = json.loads(done.stdout.splitlines()[-1])
            cells.append(f"{mib:,.0f}, {seconds:.1f}")
            peaks.append(mib)
        ratio = f"{peaks[1] / peaks[0]:.0f}" if len(peaks) == 2 else ""
        print(f"| {_size(**size)} | {cells[0]} | {cells[1]} | {ratio} |", flush=True)


def _take_turns(steps: dict[str, Step], pairs: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of all steps, which run one after the other, `pairs` times after one warm-up turn."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(pairs + 1):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if turn:
                turns[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return turns


def _ours(z: Tensor, codes: int) -> Step:
    quantizer = VQ(VQ.Config(codebook_size=codes, latent_dim=z.shape[1], coef_ema_dead_code=COEF))
    latents = z.unsqueeze(0).clone().requires_grad_()

    def step() -> None:
        out = quantizer(latents)
        (out.z_q.sum() + out.losses["vq/commit"]).backward()

    return step


def _peer(z: Tensor, codes: int) -> Step:
    from vector_quantize_pytorch import VectorQuantize  # type: ignore[import-untyped]

    quantizer = VectorQuantize(
        dim=z.shape[1],
        codebook_size=codes,
        use_cosine_sim=True,
        decay=0.99,
        commitment_weight=1.0,
        rotation_trick=False,
        threshold_ema_dead_code=len(z) / codes / COEF,
    )
    latents = z.unsqueeze(0).clone().requires_grad_()

    def step() -> None:
        z_q, _, loss = quantizer(latents)
        (z_q.sum() + loss.sum()).backward()

    return step


def _fastest_product(z: Tensor) -> tuple[Step, tuple[int, int]]:
    codebook = F.normalize(torch.randn(SPEED["codes"], SPEED["dim"]), dim=-1)
    steps = {tile: _product(z, codebook, *tile) for tile in TILES}
    turns = _take_turns({str(tile): step for tile, step in steps.items()}, 5)
    best = min(TILES, key=lambda tile: min(turns[str(tile)]))
    return steps[best], best


def _product(z: Tensor, codebook: Tensor, rows: int, width: int) -> Step:
    room = torch.empty(rows * width)

    def step() -> None:
        for part in codebook.split(width):
            for queries in z.split(rows):
                shape = len(queries), len(part)
                torch.mm(queries, part.T, out=room[: shape[0] * shape[1]].view(shape))

    return step


def _peak(who: str, latents: int, codes: int, dim: int) -> tuple[float, float]:
    """MiB that a step adds to the resident memory, and the seconds of the step."""
    build = {"ours": _ours, "peer": _peer}[who]
    build(torch.randn(64, dim), 128)()
    step = build(torch.randn(latents, dim), codes)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident size of this moment
    before, start = _resident("VmRSS"), time.perf_counter()
    step()
    return (_resident("VmHWM") - before) / 1024, time.perf_counter() - start


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _size(latents: int, codes: int, dim: int) -> str:
    return f"{latents:,} latents x {codes:,} codes of width {dim}"


def _median(seconds: Sequence[tuple[float, float]], which: int) -> float:
    return statistics.median(pair[which] for pair in seconds)


def _quartiles(ratios: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
