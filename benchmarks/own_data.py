"""Data sets that nobody here collected, as somebody's own files would be.

    python benchmarks/own_data.py make FOLDER        the files
    python benchmarks/own_data.py measure FOLDER     the files; for each set new config, check, train, eval; a table

Four folders below FOLDER, always with the same bytes: `ecg` (three leads of 1,024 samples, with an offset and a unit of
their own), `bands` (five bands of 64 x 64 pixels on different scales, -9999 where the scene has no data), `volumes`
(32 x 32 x 32 voxels of soft shapes) and `actions` (seven joints of a robot arm, the last one a gripper, 40 to 90 time
steps). Names begin with the patient, scene, scan or episode, so that data.group can keep one on one side.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Named = Iterator[tuple[str, np.ndarray]]


def ecg(patients: int, each: int = 6, samples: int = 1024, rate: float = 250.0) -> Named:
    """Beats of varying rate, height and shape on a wandering baseline, in three leads, float32."""
    waves = (
        (-0.20, 0.12, 0.025),
        (-0.04, -0.14, 0.010),
        (0.0, 1.1, 0.011),
        (0.04, -0.25, 0.012),
        (0.28, 0.30, 0.05),
    )
    for patient in range(patients):
        draw = np.random.default_rng((1, patient))
        shape = [
            (at, size * draw.lognormal(0, 0.3), width * draw.lognormal(0, 0.15)) for at, size, width in waves
        ]
        mix = np.array([[1.0, 0.1], [0.6, 0.5], [-0.7, 0.4]]) * draw.lognormal(0, 0.2, (3, 2))
        heart = draw.uniform(55, 110)
        for record in range(each):
            time = np.arange(samples) / rate
            beats = np.cumsum(
                np.concatenate([[draw.uniform(-1, 0)], 60 / heart * draw.lognormal(0, 0.06, 20)])
            )
            plain, second = np.zeros(samples), np.zeros(samples)
            for beat in beats:
                height = draw.lognormal(0, 0.08)
                for place, (at, size, width) in enumerate(shape):
                    wave = height * size * np.exp(-0.5 * ((time - beat - at) / width) ** 2)
                    plain += wave
                    second += wave * (1 if place in (0, 4) else 0.4)
            leads = mix @ np.stack([plain, second])
            drift = np.sin(2 * np.pi * (draw.uniform(0.1, 0.4, (3, 1)) * time + draw.random((3, 1))))
            leads += 0.08 * drift + draw.normal(0, 0.012, leads.shape)
            # Raw amplifiers: each lead with its own zero and unit, all of them far from -1..1.
            unit, zero = np.array([[1.0], [0.4], [0.05]]), np.array([[2.5], [-1.0], [0.3]])
            yield f"patient{patient:03}/record{record}", (unit * leads + zero).astype(np.float32)


def bands(scenes: int, each: int = 8, side: int = 64) -> Named:
    """Correlated fields: four reflectances in units of 1e-4 and a temperature in kelvin; corners without data."""
    for scene in range(scenes):
        draw = np.random.default_rng((2, scene))
        for tile in range(each):
            land = _field(draw, side, 2.2)
            green, wet = _field(draw, side, 1.8), 1 / (1 + np.exp(-6 * (land - 0.8)))
            fields = np.tanh(np.stack([land, 0.8 * land + 0.6 * green, land - 0.9 * green])) * 0.5 + 0.5
            near = 0.25 + 0.5 * fields[1] * (1 - wet)
            heat = 288 + 6 * land - 5 * wet + 1.5 * _field(draw, side, 2.5)
            reflect = np.stack(
                [300 + 900 * fields[0], 400 + 1300 * fields[1], 250 + 2200 * fields[2], 9000 * near]
            )
            stack = np.concatenate([reflect + draw.normal(0, 8, reflect.shape), heat[None]]).astype(
                np.float32
            )
            if draw.random() < 0.3:
                down, right = np.mgrid[:side, :side]
                stack[:, down + right * draw.uniform(0.5, 2) < draw.uniform(10, 40)] = -9999
            yield f"scene{scene:03}/tile{tile}", np.round(stack, 2)


def volumes(scans: int, each: int = 4, side: int = 32) -> Named:
    """A soft body with some round lesions, blurred and noisy; int16 as a scanner writes."""
    for scan in range(scans):
        draw = np.random.default_rng((3, scan))
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 3, indexing="ij"))
        for part in range(each):
            radii = draw.uniform(0.55, 0.9, (3, 1, 1, 1))
            depth = 1 - np.sqrt(((grid - draw.normal(0, 0.08, (3, 1, 1, 1))) ** 2 / radii**2).sum(0))
            body = 1 / (1 + np.exp(-18 * depth))
            volume = -1000 + 1040 * body
            for _ in range(draw.integers(2, 7)):
                centre, size = draw.uniform(-0.55, 0.55, (3, 1, 1, 1)), draw.uniform(0.08, 0.3)
                blob = 1 / (1 + np.exp(((np.sqrt(((grid - centre) ** 2).sum(0))) - size) * 30))
                volume += draw.choice([-400.0, 120.0, 350.0]) * blob * body
            yield f"scan{scan:03}/part{part}", (volume + draw.normal(0, 12, volume.shape)).astype(np.int16)


def actions(episodes: int, each: int = 8) -> Named:
    """Smooth ways between random goals, in radians, and a gripper that is open (1) or closed (0)."""
    for episode in range(episodes):
        draw = np.random.default_rng((4, episode))
        for chunk in range(each):
            steps = int(draw.integers(40, 91))
            knots = draw.normal(0, [0.9, 0.6, 0.8, 1.2, 0.5, 1.5], (5, 6))
            at = np.linspace(0, 4, steps)
            low = np.minimum(at.astype(int), 3)
            ease = (at - low)[:, None] ** 2 * (3 - 2 * (at - low)[:, None])
            joints = knots[low] * (1 - ease) + knots[low + 1] * ease + draw.normal(0, 0.004, (steps, 6))
            gripper = np.ones(steps)
            closes = int(draw.integers(5, steps - 10))
            gripper[closes : closes + int(draw.integers(8, 40))] = 0
            yield (
                f"episode{episode:03}/chunk{chunk}",
                np.concatenate([joints.T, gripper[None]]).astype(np.float32),
            )


SETS: dict[str, tuple[Callable[[int], Named], int]] = {
    "ecg": (ecg, 120),
    "bands": (bands, 60),
    "volumes": (volumes, 60),
    "actions": (actions, 100),
}
"""The makers, and the number of patients, scenes, scans and episodes."""


def _field(draw: np.random.Generator, side: int, slope: float) -> np.ndarray:
    """A random field with power falling as frequency to the `slope`; mean 0, deviation 1."""
    waves = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))
    waves[0, 0] = np.inf
    phases = draw.normal(size=waves.shape) + 1j * draw.normal(size=waves.shape)
    found = np.fft.irfft2(phases / waves**slope, (side, side))
    return (found - found.mean()) / found.std()


def make(folder: Path, names: list[str], share: float = 1.0) -> None:
    """Write the named sets below a folder; `share` of their patients, scenes, scans or episodes."""
    for name in names:
        maker, count = SETS[name]
        for key, array in maker(max(2, round(share * count))):
            path = folder / name / f"{key}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
        print(f"{folder / name}: {len(list((folder / name).rglob('*.npy')))} files")


def measure(folder: Path, names: list[str], overrides: list[str]) -> None:
    """The way that docs/own-data.md shows, for each set; prints a table of squared errors and of times."""
    rows = []
    for name in names:
        config, run, found = folder / f"{name}.yaml", folder / "runs" / name, folder / f"{name}.json"
        if not config.exists():
            _vqcore("new", "config", str(folder / name), "--out", str(config))
        _vqcore("check", str(config), *overrides)
        began = time.monotonic()
        _vqcore("train", str(config), f"run.dir={run}", *overrides)
        spent = time.monotonic() - began
        _vqcore("eval", str(run), "--json", str(found))
        made = json.loads(found.read_text())["results"][0]
        metrics, others = made["metrics"], made["baselines"]
        bits = metrics["codes/tokens_per_sample"] * metrics["codes/bits_per_token"]

        def gain(other: str) -> float:
            return 10 * math.log10(others[other]["error"] / metrics["error"])  # noqa: B023

        rows.append(
            f"| {name} | {' x '.join(map(str, made['size']))} | {bits:g} | {spent / 60:.1f} min "
            f"| {gain('constant'):+.1f} dB | {gain('k-means'):+.1f} dB | {len(made['verdict']) or 'none'} |"
        )
    print("| data | size | bits a sample | training | over a constant | over k-means | warnings |")
    print("| --- | --- | --- | --- | --- | --- | --- |", *rows, sep="\n")


def _vqcore(*words: str) -> None:
    print("$ vqcore", *words, flush=True)
    subprocess.run([sys.executable, "-m", "vqcore", *words], check=True, stdin=subprocess.DEVNULL)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=["make", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--share", type=float, default=1.0, help="a smaller set, e.g. 0.1")
    args, overrides = parser.parse_known_args()
    make(args.folder, args.sets, args.share)
    if args.verb == "measure":
        measure(args.folder, args.sets, overrides)


if __name__ == "__main__":
    main()
