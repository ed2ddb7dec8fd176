"""Compare the speed of the ViT encoder with timm's ViT of the same shape: forward passes, in turn, in one process.

    python benchmarks/backbones.py --threads 2 --pairs 31

Both models are ViT-B/16 without a class token, and our encoder uses timm's weights. The script first checks that the
features are equal and then measures the times. A round runs ours, timm's and timm's again, in a changing order, and
gives two ratios: ours / timm's and timm's / timm's. The goal is met if the third quartile of ours / timm's is at most
1.05 times the median of timm's / timm's.
Needs timm (pip install timm).
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # torch reads it when it loads; waiting threads then sleep

import timm
import torch
from einops import rearrange
from torch import Tensor, nn
from vqcore_vit.vit import ViTEncoder

from vqcore.protocols import DataSpec

SLACK = 1.05
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Check that features are equal, measure and print the times, and write them to `--json` if given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[224, 448], help="sizes of the images, in pixels"
    )
    parser.add_argument("--pairs", type=int, default=31, help="rounds for each size")
    parser.add_argument("--batch", type=int, default=1, help="images per forward pass")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reports = []
    for size in args.sizes:
        ours, theirs = models(size)
        x = torch.randn(args.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        check_equal(ours, theirs, x)
        report = measure(ours, theirs, x, args.pairs)
        report |= {"size": size, "batch": args.batch, "pairs": args.pairs, "threads": args.threads}
        show(report)
        reports.append(report)
    if args.json:
        args.json.write_text(json.dumps(reports, indent=2) + "\n")


def models(size: int) -> tuple[nn.Module, Any]:
    """Build our encoder and timm's model with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    theirs = timm.create_model(
        "vit_base_patch16_224",
        img_size=size,
        class_token=False,
        global_pool="avg",
        num_classes=0,
        fc_norm=False,
    )
    spec = DataSpec(channels=3, size=(size, size))
    ours = ViTEncoder(ViTEncoder.Config(size="b", patch_size=16), spec=spec)
    state = {name.replace("patch_embed.", ""): value for name, value in theirs.state_dict().items()}
    grid = ours.grid((size, size))
    state["pos_emb"] = rearrange(state.pop("pos_embed"), "1 (h w) d -> 1 d h w", h=grid[0])
    ours.load_state_dict({name: value for name, value in state.items() if not name.startswith("norm.")})
    return ours.eval(), theirs.eval()


@torch.inference_mode()
def check_equal(ours: nn.Module, theirs: Any, x: Tensor) -> None:
    """Stop if the features of the two models differ. timm's last normalization is applied to both."""
    features = theirs.norm(ours(x).flatten(1, 2))
    off = float((features - theirs.forward_features(x)).abs().max())
    assert off < 1e-3, (
        f"the features of the two models differ by {off:.2g}: a comparison of times makes no sense"
    )


@torch.inference_mode()
def measure(ours: nn.Module, theirs: Any, x: Tensor, pairs: int) -> dict[str, Any]:
    """Seconds and ratios of `pairs` rounds, after two warm-up rounds."""
    passes = {"ours": ours, "timm": theirs.forward_features, "timm again": theirs.forward_features}
    names = list(passes)
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in names} for clock in CLOCKS}
    load = [os.getloadavg()[0]]
    for turn in range(-2, pairs):
        for name in names[turn % 3 :] + names[: turn % 3]:
            before = {clock: now() for clock, now in CLOCKS.items()}
            passes[name](x)
            for clock, now in CLOCKS.items():
                if turn >= 0:
                    seconds[clock][name].append(now() - before[clock])
    load.append(os.getloadavg()[0])
    return {"load": load, **{clock: _quartiles(seconds[clock]) for clock in CLOCKS}}


def _quartiles(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    def ratio(name: str) -> list[float]:
        return [a / b for a, b in zip(seconds[name], seconds["timm"])]

    values = {"ours, s": seconds["ours"], "timm, s": seconds["timm"]}
    values |= {"ours / timm": ratio("ours"), "timm / timm": ratio("timm again")}
    return {name: statistics.quantiles(value, n=4, method="inclusive") for name, value in values.items()}


def show(report: dict[str, Any]) -> None:
    """Print the results of one size, and whether the goal is met for each of the two clocks."""
    load = " to ".join(f"{value:.1f}" for value in report["load"])
    print(
        f"\nViT-B/16 at {report['size']} px, batch {report['batch']}, {report['pairs']} pairs, "
        f"{report['threads']} threads, load {load}"
    )
    for clock in CLOCKS:
        for name, (low, middle, high) in report[clock].items():
            print(f"  {clock:5} {name:12} median {middle:.3f}   quartiles {low:.3f} {high:.3f}")
        bound = SLACK * report[clock]["timm / timm"][1]
        verdict = "met" if report[clock]["ours / timm"][2] <= bound else "not shown"
        print(
            f"  {clock:5} goal         {verdict}: {report[clock]['ours / timm'][2]:.3f} against {bound:.3f}"
        )


if __name__ == "__main__":
    main()
