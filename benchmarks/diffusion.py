"""Compare the speed of the denoisers: one denoising step at 224 px, batch 1, all variants in turn, in one process.

    python benchmarks/diffusion.py speed --threads 2 --pairs 31

Part `unet`: `{name: unet/unet}`, whose settings are 4M's, in fp32 and under bf16 autocast; diffusers' UNet2DModel with
the same widths, depths and attention; and the U-Net's convolutions alone, as the U-Net itself calls them.
Part `uvit`: `{name: unet/uvit, size: b}` in fp32 and bf16. 4M's own code does not run beside ours: its time on an idle
machine is a number (`--uvit-4m`), so this goal means something on that machine only, when it is idle.
Part `steps`: sampling with 25 steps and the U-ViT, from codes to a picture, against 25 calls of the U-ViT.

A round runs all variants of a part, in a changing order, and gives one ratio for each goal. A goal is met if the third
quartile of its ratio is at most the bound. `again` is the same variant a second time: how far ratios wander by chance.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # torch reads it when it loads; waiting threads then sleep

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vqcore_unet.unet import UNet
from vqcore_unet.uvit import UViT

from vqcore.protocols import DataSpec
from vqcore.rng import sample_generators
from vqcore.testing.conformance import build

SIZE, GRID, DIM, STEPS = 224, 14, 32, 25
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
GOALS = {
    "unet": (
        ("unet again", "unet", None),
        ("unet", "diffusers", 1.0),
        ("unet", "convolutions", 1.1),
        ("unet bf16", "unet", 0.6),
    ),
    "uvit": (("uvit again", "uvit", None), ("uvit", "4M", 1 / 1.2), ("uvit bf16", "uvit", None)),
    "steps": (("25 steps", "25 calls", 26 / 25),),
}
"""Numerator, denominator, and the largest ratio that meets the goal; None: no goal. `4M` is a number of seconds."""


def main() -> None:
    """Parse the command line and run the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    speed = commands.add_parser("speed", help="times of a denoising step and of sampling")
    speed.add_argument("--parts", nargs="+", choices=list(GOALS), default=list(GOALS))
    speed.add_argument("--pairs", type=int, default=31, help="rounds of each part")
    speed.add_argument("--threads", type=int, default=2, help="threads of torch")
    speed.add_argument("--uvit-4m", type=float, default=0.61, help="wall seconds of a step of 4M's U-ViT")
    speed.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reports = []
    for part in args.parts:
        report = measured(VARIANTS[part](), args.pairs)
        report |= {"part": part, "pairs": args.pairs, "threads": args.threads}
        show(report, args.uvit_4m)
        reports.append(report)
    if args.json:
        args.json.write_text(json.dumps(reports, indent=2) + "\n")


def unet_variants() -> dict[str, Callable[[], Any]]:
    """A step of the U-Net in fp32 and bf16, of its convolutions, and of diffusers' U-Net."""
    step = step_of(UNet(UNet.Config(), dim=DIM, spec=spec()))
    return {
        "unet": step,
        "unet again": step,
        "unet bf16": in_bf16(step),
        "convolutions": convolutions(step),
        "diffusers": diffusers_step(),
    }


def uvit_variants() -> dict[str, Callable[[], Any]]:
    """A step of the U-ViT in fp32 and bf16."""
    step = step_of(UViT(UViT.Config(size="b"), dim=DIM, spec=spec()))
    return {"uvit": step, "uvit again": step, "uvit bf16": in_bf16(step)}


def steps_variants() -> dict[str, Callable[[], Any]]:
    """All of a sample, and as many calls of the network."""
    net = UViT(UViT.Config(size="b"), dim=DIM, spec=spec()).eval()
    step, z = step_of(net), inputs()[2]
    objective = build("objective", "diffusion", {"scheduler": {"name": "unet/flow"}}, spec=spec())
    tokenizer = SimpleNamespace(decoder=net, lookup=lambda codes: z)

    def sample() -> Tensor:
        rng = sample_generators(("sample",), 0)
        return objective.decode(tokenizer, None, size=(SIZE, SIZE), rng=rng, steps=STEPS)

    return {"25 steps": sample, "25 calls": lambda: [step() for _ in range(STEPS)]}


VARIANTS = {"unet": unet_variants, "uvit": uvit_variants, "steps": steps_variants}


def spec() -> DataSpec:
    """Photographs."""
    return DataSpec(channels=3, size=(SIZE, SIZE))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """A noised sample, its noise level, and dequantized tokens."""
    rng = torch.Generator().manual_seed(0)
    x, z = torch.randn(1, 3, SIZE, SIZE, generator=rng), torch.randn(1, GRID, GRID, DIM, generator=rng)
    return x, torch.tensor([500.0]), z


def step_of(net: Any) -> Callable[[], Tensor]:
    """One denoising step; what depends on the tokens alone is computed before, as in sampling."""
    net.eval()
    x, t, z = inputs()
    cond = net.condition(z, size=(SIZE, SIZE))
    return lambda: net(x, t, cond)


def in_bf16(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step under autocast. Weights are cast once, as in sampling: `measured` holds an autocast around all rounds."""

    def cast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return step()

    return cast


class Convolutions(TorchDispatchMode):
    """Keeps the calls of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "conv" in func.__name__:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def convolutions(step: Callable[[], Tensor]) -> Callable[[], None]:
    """All convolutions of a step on what they saw, one after the other, and nothing else."""
    with Convolutions() as kept:
        step()

    def run() -> None:
        for func, args in kept.calls:
            func(*args)

    return run


def diffusers_step() -> Callable[[], Any]:
    """A step of a plain U-Net of the same shape on the same patches, with the tokens as more channels."""
    from diffusers import UNet2DModel

    ours, theirs = UNet.Config(), {True: "Attn{}Block2D", False: "{}Block2D"}
    kinds = [theirs[2**index in ours.attention] for index in range(len(ours.widths))]
    patches = 3 * ours.patch_size**2
    net: Any = UNet2DModel(
        in_channels=patches + DIM,
        out_channels=patches,
        block_out_channels=ours.widths,
        layers_per_block=ours.depth,
        down_block_types=[kind.format("Down") for kind in kinds],
        up_block_types=[kind.format("Up") for kind in reversed(kinds)],
        attention_head_dim=ours.widths[-1] // ours.heads,
    )
    net.eval()
    x = torch.randn(1, patches + DIM, SIZE // ours.patch_size, SIZE // ours.patch_size)
    return lambda: net(x, 500)


@torch.inference_mode()
def measured(variants: dict[str, Callable[[], Any]], pairs: int) -> dict[str, Any]:
    """Seconds of `pairs` rounds by clock and variant, after one round to warm up."""
    names = list(variants)
    seconds: dict[str, Any] = {clock: {name: [] for name in names} for clock in CLOCKS}
    load = [os.getloadavg()[0]]
    with torch.autocast("cpu", enabled=False):
        for turn in range(-1, pairs):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                before = {clock: now() for clock, now in CLOCKS.items()}
                variants[name]()
                for clock, now in CLOCKS.items():
                    if turn >= 0:
                        seconds[clock][name].append(now() - before[clock])
    return {"load": [*load, os.getloadavg()[0]], "seconds": seconds}


def show(report: dict[str, Any], uvit_4m: float) -> None:
    """Print the times and ratios of one part, and which goals are met."""
    load = " to ".join(f"{value:.1f}" for value in report["load"])
    print(
        f"\n{report['part']} at {SIZE} px, batch 1, {report['pairs']} rounds, {report['threads']} threads, load {load}"
    )
    for clock, by_name in report["seconds"].items():
        for name, seconds in by_name.items():
            _line(clock, f"{name}, s", seconds)
        for over, under, bound in GOALS[report["part"]]:
            if under == "4M" and clock != "wall":
                continue
            below = [uvit_4m] * report["pairs"] if under == "4M" else by_name[under]
            ratios = [a / b for a, b in zip(by_name[over], below)]
            high = _line(clock, f"{over} / {under}", ratios)
            if bound is not None:
                verdict = "met" if high <= bound else "not shown"
                print(f"  {clock:5} {'':28} goal {verdict}: {high:.3f} against {bound:.3f}")


def _line(clock: str, name: str, values: list[float]) -> float:
    """Print median and quartiles; returns the third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    print(f"  {clock:5} {name:28} median {middle:.3f}   quartiles {low:.3f} {high:.3f}", flush=True)
    return high


if __name__ == "__main__":
    main()
