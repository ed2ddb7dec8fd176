"""Whole runs in which several contracts meet, as a user would make them: killed, on two processes, in half precision.

Equal means equal to the bit: weights, averages, training state and metrics.jsonl.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from toys import run_tree, toy  # noqa: F401

from vqcore.artefacts.folder import load_tensors
from vqcore.cli import main
from vqcore.rng import generator
from vqcore.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("toy")
TOYS = str(Path(__file__).parent / "fixtures" / "toy")
KILLED = -signal.SIGKILL
GAN = {"name": "reconstruction", "adversary": {"name": "toy/gan", "start": 2}}
DENOISER = {"model__decoder": {"name": "toy/denoiser"}}
FLOW = {"name": "toy/diffusion", "scheduler": {"name": "toy/flow"}, "times": "logit-normal"}


def written(folder, name, **changes):
    """A run's config as a file; `changes` as in `run_tree`. Every run may be killed by `TOY_KILL`."""
    changes = {"run__threads": 1, "run__save_every": 3, "hooks": {"killer": {"name": "toy/killer"}}, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run_tree(folder / name, **changes)))
    return path


def command(*argv, ranks=1, kill=0, fails=False):
    """`python -m vqcore ...`; returns what it said. `kill` is a number for `TOY_KILL`: the process must die of it."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    paths = os.pathsep.join([TOYS, *sys.path])
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), "-m", "vqcore", *map(str, argv)],
        env={**os.environ, "PYTHONPATH": paths, "TOY_KILL": str(kill)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = done.stdout + done.stderr
    if kill:
        assert done.returncode == KILLED if ranks == 1 else done.returncode and "SIGKILL" in said, said
    else:
        assert bool(done.returncode) is fails, said
    return said


def lines(run, *, ranks=1):
    """The lines of metrics.jsonl; with several processes without the codes, of which a checkpoint has those of rank 0."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if ranks > 1:
        found = [{k: v for k, v in line.items() if not k.startswith("codes/")} for line in found]
    return found


def evaluations(run):
    return {line["step"]: line for line in lines(run) if "eval/loss" in line}


def same_end(*runs, step=6, ranks=1):
    """The runs have the same last checkpoint and the same metrics."""
    for file in ("model.safetensors", "ema.safetensors", "state.safetensors", "state.json"):
        first, *others = [(run / f"checkpoints/step_{step}" / file).read_bytes() for run in runs]
        assert all(first == other for other in others), file
    first, *others = [lines(run, ranks=ranks) for run in runs]
    for other in others:  # a run that was ended early and lengthened was evaluated at its first end, too
        assert [line for line in other if line in first or "eval/loss" not in line] == first


def lent(path, seed=0):
    """A file of weights for the toys' borrowed networks."""
    draw = lambda *shape: torch.randn(*shape, generator=generator(seed, *shape))  # noqa: E731
    save_file({"linear.weight": draw(3, 2), "linear.bias": draw(3)}, path)
    return str(path)


def waves(folder, count=3):
    """Samples as files."""
    folder.mkdir()
    for number in range(count):
        draw = np.random.default_rng(number)
        np.save(folder / f"{number}.npy", draw.uniform(-1, 1, (2, 8, 8)).astype(np.float32))
    return folder


def arrays(folder):
    return {path.stem: np.load(path) for path in sorted(folder.rglob("*.npy"))}


# ---------------------------------------------------------------------------------------- kill -9 in the middle

KILLS = {
    "gan": ({"objective": GAN, "optim__accumulate": 2}, 10),
    "diffusion": ({"objective": {"name": "toy/diffusion"}, **DENOISER}, 5),
    "flow": ({"objective": FLOW, **DENOISER, "optim__accumulate": 2}, 10),
    "gan-fp16": ({"objective": GAN, "run__precision": "fp16", "run__steps": 24}, 20),
    "diffusion-fp16": (
        {"objective": {"name": "toy/diffusion"}, **DENOISER, "run__precision": "fp16", "run__steps": 24},
        20,
    ),
}


@pytest.mark.parametrize(
    "case", [name if name == "gan" else pytest.param(name, marks=pytest.mark.slow) for name in KILLS]
)
def test_killed_in_the_middle_of_a_step_the_same_command_ends_with_the_same_bits(tmp_path, case):
    changes, kill = KILLS[case]
    whole, cut = (written(tmp_path, name, **changes) for name in ("whole", "cut"))
    assert main(["train", str(whole)]) == 0
    command("train", cut, kill=kill)
    before = lines(tmp_path / "cut")
    assert "resumed after step" in command("train", cut)
    steps = changes.get("run__steps", 6)
    assert 3 <= before[-1]["step"] < steps and before[-1]["step"] % 3
    same_end(tmp_path / "whole", tmp_path / "cut", step=steps)
    found = lines(tmp_path / "whole")
    if case.endswith("fp16"):
        scales = [line["loss_scale"] for line in found if "loss_scale" in line]
        assert scales and 0 < min(scales)
        made = [line for line in found if "loss" in line]
        assert made and all(np.isfinite(line["loss"]) for line in made)


@pytest.mark.slow
def test_diffusion_on_a_frozen_encoder_is_killed_too_and_keeps_the_codes(tmp_path):
    assert main(["train", str(written(tmp_path, "base"))]) == 0
    frozen = {"model__full_ckpt": str(tmp_path / "base"), "model__freeze_enc": True}
    changes = {**DENOISER, **frozen, "objective": FLOW}
    whole, cut = (written(tmp_path, name, **changes) for name in ("whole", "cut"))
    assert main(["train", str(whole)]) == 0
    command("train", cut, kill=5)
    command("train", cut)
    same_end(tmp_path / "whole", tmp_path / "cut")
    assert Tokenizer.load(tmp_path / "cut").fingerprint == Tokenizer.load(tmp_path / "base").fingerprint


# ------------------------------------------------------------------------------------------- everything at once


def everything(folder):
    """Diffusion with an adversary over a borrowed base, judged by a borrowed net, on windows, with a masked rider."""
    base, net = lent(folder / "base.safetensors"), lent(folder / "net.safetensors", 1)
    return {
        "data": {
            "name": "toy/windows",
            "modality": {"name": "array", "channels": 2, "size": [16], "range": [-1, 1]},
            "extra": {"echo": {"name": "toy/echo", "channels": 1, "size": [4]}},
            "batch_size": 4,
            "workers": 1,
        },
        "model__decoder": {"name": "toy/control", "weights": base, "echo": True},
        "model__quantizer": {"name": "quant/vq", "codebook_size": 16, "latent_dim": 3},
        "objective": {
            "name": "toy/judged-diffusion",
            "percept": {"lent": {"name": "toy/percept", "weights": net}},
            "adversary": {"name": "toy/gan", "start": 2},
            "weights": {"gan/generator": {2: 0.1, 6: 1.0}},
        },
        "optim": {"lr": 0.01, "accumulate": 2, "horizon": 6, "warmup": 2},
        "run__precision": "bf16",
        "eval": {"every": 3, "sampling": {"steps": 2}},
    }


def measured(run, *argv, ranks=1):
    """The metrics of `vqcore eval`."""
    command("eval", run, *argv, ranks=ranks)
    return json.loads((run / "eval.json").read_text())


@pytest.mark.slow
@pytest.mark.dist
def test_everything_at_once_on_two_processes(tmp_path):
    pytest.importorskip("vqcore_quant")
    changes = everything(tmp_path)
    whole, parts, cut = (written(tmp_path, name, **changes) for name in ("whole", "parts", "cut"))
    command("train", whole, ranks=2)
    command("train", parts, "run.steps=4", ranks=2)
    command("train", parts, ranks=2)
    command("train", cut, ranks=2, kill=10)
    command("train", cut, ranks=2)
    same_end(*(tmp_path / name for name in ("whole", "parts", "cut")), ranks=2)
    training = [line for line in lines(tmp_path / "whole") if "loss" in line]
    assert ["loss@adversary" in line for line in training] == [False] * 2 + [True] * 4
    assert {"loss/percept/lent", "loss/diffusion/mse", "factor/gan/generator"} <= training[-1].keys()
    assert training[-1]["factor/gan/generator"] != 1.0
    made = json.loads((tmp_path / "whole/checkpoints/step_6/provenance.json").read_text())
    assert made["borrowed"].keys() == {"decoder.base", "objective.percept.lent.net"}
    base = ("--borrow", f"decoder.base={tmp_path / 'base.safetensors'}")
    one, two = (measured(tmp_path / "whole", *base, ranks=ranks) for ranks in (1, 2))
    assert one["protocol"] == two["protocol"]
    assert one["results"][0]["metrics"] == pytest.approx(two["results"][0]["metrics"], rel=1e-6)
    in_run = evaluations(tmp_path / "whole")[6]
    for name, value in one["results"][0]["metrics"].items():
        assert in_run[f"eval/{name}"] == pytest.approx(value, rel=1e-6), name
