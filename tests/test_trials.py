"""Whole runs in which several contracts meet, as a user would make them: killed, on two processes, in half precision.

Equal means equal to the bit: weights, averages, training state and metrics.jsonl.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from test_trainer import train_killed
from torch import nn
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.artefacts.folder import load_tensors
from vqcore.cli import main
from vqcore.errors import PluginLoadError
from vqcore.objectives import Reconstruction
from vqcore.protocols import Losses
from vqcore.rng import generator
from vqcore.run.state import build
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
TOYS = str(Path(__file__).parent / "fixtures" / "toy")
KILLED = -signal.SIGKILL
GAN = {"name": "reconstruction", "adversary": {"name": "toy/gan", "start": 2}}
DENOISER = {"model__decoder": {"name": "toy/denoiser"}}
FLOW = {"name": "diffusion", "scheduler": {"name": "toy/flow"}, "times": "logit-normal"}


def written(folder, name, **changes):
    """A run's config as a file; `changes` as in `run_tree`. Every run may be killed by `TOY_KILL`."""
    small = {"run__threads": 1, "run__save_every": 3, "data__length": 8, "eval__pictures": 2}
    path = folder / f"{name}.yaml"
    tree = run_tree(folder / name, **{**small, "hooks": {"killer": {"name": "toy/killer"}}, **changes})
    path.write_text(yaml.safe_dump(tree))
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
    """The lines of metrics.jsonl; with several processes without codes, of which a checkpoint has those of rank 0."""
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
    "diffusion": ({"objective": {"name": "diffusion", "scheduler": {"name": "toy/ddpm"}}, **DENOISER}, 5),
    "flow": ({"objective": FLOW, **DENOISER, "optim__accumulate": 2}, 10),
    "gan-fp16": ({"objective": GAN, "run__precision": "fp16", "run__steps": 24}, 20),
    "diffusion-fp16": (
        {
            "objective": {"name": "diffusion", "scheduler": {"name": "toy/ddpm"}},
            **DENOISER,
            "run__precision": "fp16",
            "run__steps": 24,
        },
        20,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLS)
def test_killed_in_the_middle_of_a_step_the_same_command_ends_with_the_same_bits(tmp_path, capsys, case):
    changes, kill = KILLS[case]
    whole, cut = (written(tmp_path, name, **changes) for name in ("whole", "cut"))
    assert main(["train", str(whole)]) == 0
    command("train", cut, kill=kill)
    before = lines(tmp_path / "cut")
    assert main(["train", str(cut)]) == 0
    assert "resumed after step" in capsys.readouterr().out
    steps = changes.get("run__steps", 6)
    assert 3 <= before[-1]["step"] < steps and before[-1]["step"] % 3
    same_end(tmp_path / "whole", tmp_path / "cut", step=steps)
    found = lines(tmp_path / "whole")
    if case.endswith("fp16"):
        scales = [line["loss_scale"] for line in found if "loss_scale" in line]
        trained = [line["loss"] for line in found if "loss" in line]
        assert 0 < min(scales) < 2**16 and 12 < len(trained) < steps  # some steps are left out, most are made
        assert np.isfinite(trained).all()


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
        "model__decoder": {"name": "toy/control", "weights": base, "rider": "echo"},
        "model__quantizer": {"name": "quant/vq", "codebook_size": 16, "latent_dim": 3},
        "objective": {
            "name": "diffusion",
            "scheduler": {"name": "toy/ddpm"},
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


@pytest.mark.slow
@pytest.mark.dist
def test_noise_is_that_of_one_large_batch_on_two_processes_and_in_micro_batches(tmp_path):
    pytest.importorskip("vqcore_quant")
    hidden = {"cls_free_guidance_dropout": 0.3, "masked_cfg": True, "times": "mixed", "times_uniform": 0.5}
    changes = {
        **DENOISER,
        "model__quantizer": {"name": "quant/fsq", "levels": [8, 8]},
        "objective": {**FLOW, **hidden},
        "run__steps": 3,
    }
    ways = {"one": (8, 1, 1), "ranks": (4, 1, 2), "micro": (4, 2, 1)}
    for name, (batch, accumulate, ranks) in ways.items():
        cut = {"data__batch_size": batch, "optim__accumulate": accumulate}
        command("train", written(tmp_path, name, **changes, **cut), ranks=ranks)
    one, *others = (load_tensors(tmp_path / name / "checkpoints/step_3/model.safetensors") for name in ways)
    for other in others:
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.dist
def test_an_encoder_with_running_statistics_is_one_on_two_processes(tmp_path):
    """All processes evaluate with the statistics that are saved, also before a checkpoint was loaded."""
    pytest.importorskip("vqcore_quant")
    changes = {
        "model__encoder": {"name": "toy/normed"},
        "model__quantizer": {"name": "quant/vq", "codebook_size": 16, "latent_dim": 3},
        "optim__horizon": 6,
        "eval__every": 3,
    }
    whole, parts = (written(tmp_path, name, **changes) for name in ("whole", "parts"))
    command("train", whole, ranks=2)
    command("train", parts, "run.steps=3", ranks=2)
    command("train", parts, ranks=2)
    same_end(tmp_path / "whole", tmp_path / "parts", ranks=2)
    in_run = evaluations(tmp_path / "whole")[6]
    for name, value in measured(tmp_path / "whole")["results"][0]["metrics"].items():
        assert in_run[f"eval/{name}"] == pytest.approx(value, rel=1e-6), name


# ------------------------------------------------------------------------------------------------------ teachers


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("place", ["rider", "main"])
def test_a_teacher_on_two_processes(tmp_path, place):
    pytest.importorskip("vqcore_quant")
    array = {"channels": 2, "size": [8, 8], "range": [-1, 1]}
    taught = {"name": "toy/taught", **array, "weights": lent(tmp_path / "teacher.safetensors")}
    changes = {"model__quantizer": {"name": "quant/vq", "codebook_size": 16, "latent_dim": 3}}
    if place == "rider":
        changes |= {"data__extra": {"taught": taught}, "objective": {"name": "toy/aligned"}}
    else:
        changes |= {"data__modality": taught}
    whole, cut = (written(tmp_path, name, eval__every=3, **changes) for name in ("whole", "cut"))
    command("train", whole, ranks=2)
    command("train", cut, ranks=2, kill=5)
    command("train", cut, ranks=2)
    same_end(tmp_path / "whole", tmp_path / "cut", ranks=2)
    key = "extra.taught.teacher" if place == "rider" else "modality.teacher"
    made = json.loads((tmp_path / "whole/checkpoints/step_6/provenance.json").read_text())
    assert list(made["borrowed"]) == [key]
    checkpoint = tmp_path / "whole/checkpoints/step_6"
    names = [
        name
        for file in ("model", "ema", "state")
        for name in load_tensors(checkpoint / f"{file}.safetensors")
    ]
    assert not any("teacher" in name or "norm" in name for name in names)
    borrow = ("--borrow", f"{key}={tmp_path / 'teacher.safetensors'}")
    one, two = (measured(tmp_path / "whole", *borrow, ranks=ranks) for ranks in (1, 2))
    assert one["protocol"] == two["protocol"]
    assert one["results"][0]["metrics"] == pytest.approx(two["results"][0]["metrics"], rel=1e-6)


@pytest.mark.slow
def test_a_teacher_rides_in_an_evaluation_as_it_did_in_training(tmp_path, capsys):
    """The decoder sees what the teacher says, so other weights of the teacher are other metrics and pictures."""
    base, weights = lent(tmp_path / "base.safetensors"), lent(tmp_path / "teacher.safetensors", 1)
    other = lent(tmp_path / "other.safetensors", 2)
    taught = {"name": "toy/taught", "channels": 2, "size": [8, 8], "range": [-1, 1], "weights": weights}
    changes = {
        "data__extra": {"taught": taught},
        "model__decoder": {"name": "toy/control", "weights": base, "rider": "taught", "channels": 3},
        "objective": {"name": "diffusion", "scheduler": {"name": "toy/ddpm"}},
        "optim__lr": 0.1,
        "eval__sampling": {"steps": 2},
    }
    assert main(["train", str(written(tmp_path, "run", **changes))]) == 0
    run, made = str(tmp_path / "run"), str(tmp_path / "made")
    given = ["--borrow", f"decoder.base={base}"]
    assert main(["export", run, made, *given]) == 0
    in_run = evaluations(tmp_path / "run")[6]
    for name in (run, made):
        rider = f"extra.taught.teacher={weights}"
        assert main(["eval", name, *given, "--borrow", rider, "--json", str(tmp_path / "figures.json")]) == 0
        found = json.loads((tmp_path / "figures.json").read_text())
        values = found["results"][0]["metrics"]
        assert all(values[key] == pytest.approx(in_run[f"eval/{key}"], rel=1e-6) for key in values)
        sheet, drawn = (Image.open(tmp_path / path) for path in ("run/samples/sheet.png", "figures.png"))
        assert np.array_equal(np.asarray(sheet), np.asarray(drawn))
    capsys.readouterr()
    assert main(["eval", run, *given, "--borrow", f"extra.taught.teacher={other}"]) == 2
    assert "extra.taught.teacher: these are other weights" in capsys.readouterr().err
    assert main(["eval", made, *given, "--borrow", f"extra.taught.teahcer={weights}"]) == 2
    assert "extra.taught.teacher: no place is known" in capsys.readouterr().err


@pytest.mark.slow
def test_what_other_teachers_say_is_not_compared(tmp_path, capsys):
    """As main modality or rider: the metrics of one teacher's features say nothing about those of another."""
    taught = {"name": "toy/taught", "channels": 2, "size": [8, 8], "range": [-1, 1]}
    for place in ("main", "rider"):
        runs = []
        for seed in (0, 1):
            modality = {**taught, "weights": lent(tmp_path / f"{seed}.safetensors", seed)}
            changes = (
                {"data__modality": modality} if place == "main" else {"data__extra": {"taught": modality}}
            )
            runs.append(tmp_path / f"{place}{seed}")
            assert main(["train", str(written(tmp_path, runs[-1].name, run__steps=1, **changes))]) == 0
            key = "modality.teacher" if place == "main" else "extra.taught.teacher"
            assert main(["eval", str(runs[-1]), "--borrow", f"{key}={modality['weights']}"]) == 0
        capsys.readouterr()
        assert main(["eval", "--compare", *map(str, runs)]) == 2
        assert f"borrowed.{key}" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- a base under a denoiser


@pytest.mark.slow
def test_a_control_net_over_a_borrowed_base_decodes_with_steps_and_a_seed(tmp_path, capsys):
    base, other = lent(tmp_path / "base.safetensors"), lent(tmp_path / "other.safetensors", 1)
    control = {
        "model__decoder": {"name": "toy/control", "weights": base},
        "objective": {"name": "diffusion", "scheduler": {"name": "toy/ddpm"}},
    }
    assert main(["train", str(written(tmp_path, "run", eval__sampling={"steps": 2}, **control))]) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0  # on this machine the run's config knows the place
    artefact = ["export", str(tmp_path / "run"), str(tmp_path / "made")]
    assert main(artefact) == 0 and base not in (tmp_path / "made/config.yaml").read_text()
    assert main(["export", str(tmp_path / "made"), str(tmp_path / "again")]) == 2
    assert "decoder.base: no place is known for these weights" in capsys.readouterr().err
    saved = load_tensors(tmp_path / "run/checkpoints/step_6/model.safetensors")
    assert "decoder.mix.weight" in saved and not any("base" in name for name in saved)
    run, tokens = str(tmp_path / "run"), str(tmp_path / "tokens")
    Path(base).rename(tmp_path / "moved.safetensors")
    assert main(["tokenize", run, str(waves(tmp_path / "in")), tokens]) == 0  # needs no base
    given = ["--borrow", f"decoder.base={tmp_path / 'moved.safetensors'}"]

    def decoded(name, *words):
        assert main(["decode", run, tokens, str(tmp_path / name), *given, *words]) == 0
        return arrays(tmp_path / name)

    first = decoded("a", "steps=3", "--seed", "7")
    for name, words, same in (
        ("b", ("steps=3", "--seed", "7"), True),
        ("c", ("steps=3", "--seed", "7", "--batch-size", "1"), None),
        ("d", ("steps=3", "--seed", "8"), False),
        ("e", ("steps=4", "--seed", "7"), False),
    ):
        again = decoded(name, *words)
        assert first.keys() == again.keys() == {"0", "1", "2"}
        if same is None:
            assert all(np.allclose(again[key], value, atol=1e-5) for key, value in first.items())
        else:
            assert all(np.array_equal(again[key], value) is same for key, value in first.items())
    assert not np.allclose(first["0"], first["1"])
    capsys.readouterr()
    for words, says in (
        ([], "there is no such file or folder. Give the weights with the SHA-256"),
        (
            ["--borrow", f"decoder.base={other}"],
            "decoder.base: these are other weights than those of this tokenizer",
        ),
    ):
        assert main(["decode", run, tokens, str(tmp_path / "none"), *words, "steps=3"]) == 2
        error = capsys.readouterr().err
        assert says in error and len(error.splitlines()) == 1
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------ metrics with a borrowed net


@pytest.mark.slow
def test_metrics_with_another_net_are_not_compared(tmp_path, capsys):
    nets = [lent(tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1)]
    metrics = {name: {"name": f"toy/{name}", "weights": nets[0]} for name in ("frechet", "nearest")}
    assert main(["train", str(written(tmp_path, "run", eval={"every": 3, "metrics": metrics}))]) == 0
    run = str(tmp_path / "run")
    reports = [str(tmp_path / f"{name}.json") for name in ("one", "again", "other", "mixed")]
    again = Path(nets[0]).rename(tmp_path / "moved.safetensors")
    kept = f"eval.metrics.frechet.weights={again}"
    for report, words in zip(
        reports,
        (
            [kept, f"eval.metrics.nearest.weights={again}"],
            [kept, f"eval.metrics.nearest.weights={again}"],
            [f"eval.metrics.{name}.weights={nets[1]}" for name in metrics],
            [kept, f"eval.metrics.nearest.weights={nets[1]}"],
        ),
    ):
        assert main(["eval", run, "--json", report, *words]) == 0
    one, _, other, _ = (json.loads(Path(report).read_text()) for report in reports)
    known = evaluations(tmp_path / "run")[6]
    for name in ("metric/frechet", "metric/nearest"):
        assert one["results"][0]["metrics"][name] == known[f"eval/{name}"]
    assert one["results"][0]["metrics"]["metric/frechet"] != other["results"][0]["metrics"]["metric/frechet"]
    assert str(tmp_path) not in json.dumps(one["protocol"])  # the place is none of the facts
    assert main(["eval", "--compare", *reports[:2]]) == 0
    capsys.readouterr()
    for report, says in (
        (reports[2], "metrics.frechet.facts.net"),
        (reports[3], "metrics.nearest.facts.net"),
    ):
        assert main(["eval", "--compare", reports[0], report]) == 2
        error = capsys.readouterr().err
        assert says in error and ("frechet" in error) is (report == reports[2])


# ------------------------------------------------------------------------------------------- which checkpoint counts


@pytest.mark.slow
def test_the_checkpoint_that_counts_when_an_adversary_enters_late(tmp_path, capsys):
    """PSNR falls from the step where the adversary gets its weight."""
    objective = {**GAN, "weights": {"gan/generator": {4: 0, 5: 30}}}
    rival = {"optim": {"lr": 0.01, "players": {"adversary": {"lr": 0.1}}}}
    more = {"objective": objective, "run__steps": 12, "run__keep": 1, "data__length": 24, **rival}
    last, best = (
        written(tmp_path, name, eval={"every": 2, **asked}, **more)
        for name, asked in (("last", {}), ("best", {"best": "metric/psnr"}))
    )
    for path in (last, best):
        assert main(["train", str(path)]) == 0
    found = evaluations(tmp_path / "best")
    assert found == evaluations(tmp_path / "last")
    top = max(found, key=lambda step: found[step]["eval/metric/psnr"])
    assert top < 12
    whys = {
        "last": "step 12, the last checkpoint",
        "best": f"step {top}, the best by metric/psnr ({found[top]['eval/metric/psnr']:.4g})",
        "best@step_12": "step 12, as named",
    }
    files = str(waves(tmp_path / "in"))
    capsys.readouterr()
    for name, why in whys.items():
        run = str(tmp_path / name)
        for argv in (
            ["tokenize", run, files, f"{run}-tokens"],
            ["decode", run, f"{run}-tokens", f"{run}-out"],
            ["export", run, f"{run}-made"],
            ["eval", run],
        ):
            assert main(argv) == 0
            assert f"{run}: {why}\n" in capsys.readouterr().out
        step = int(why.split()[1].rstrip(","))
        report = json.loads((tmp_path / name.partition("@")[0] / "eval.json").read_text())
        assert report["step"] == step
        for metric in ("loss", "metric/psnr"):
            assert report["results"][0]["metrics"][metric] == pytest.approx(
                found[step][f"eval/{metric}"], rel=1e-6
            )


def test_trained_weights_are_evaluated_at_their_step(tmp_path):
    """Weights by step are those of the checkpoint's step, for the averages and for the trained weights alike."""
    objective = {**GAN, "weights": {"gan/generator": {0: 0, 6: 3.0}}}
    assert main(["train", str(written(tmp_path, "run", objective=objective))]) == 0
    assert main(["eval", str(tmp_path / "run"), "--weights", "both"]) == 0
    report = json.loads((tmp_path / "run/eval.json").read_text())
    assert report["step"] == 6 and [each["weights"] for each in report["results"]] == ["ema", "model"]
    for each in report["results"]:
        found = each["metrics"]
        parts = [found[f"loss/{name}"] for name in ("pixel/mse", "vq/commit", "gan/generator")]
        assert found["loss"] == pytest.approx(parts[0] + parts[1] + 3 * parts[2], rel=1e-6)


# ------------------------------------------------------------------------------------------- files of another system


def test_foreign_weights_are_trained_on_written_and_read_again(tmp_path):
    files = str(waves(tmp_path / "in"))
    assert main(["train", str(written(tmp_path, "base"))]) == 0
    box = f"toy/boxes[prefix=a.]:{tmp_path / 'box'}"
    assert (
        main(["export", str(tmp_path / "base"), str(tmp_path / "box"), "--format", "toy/boxes", "prefix=a."])
        == 0
    )
    assert main(["train", str(written(tmp_path, "new", model__full_ckpt=box, objective=GAN))]) == 0
    assert main(["export", str(tmp_path / "new"), str(tmp_path / "out"), "--format", "toy/boxes"]) == 0
    assert main(["import", "toy/boxes", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    names = ("base", box, "new", "back", f"toy/boxes:{tmp_path / 'out'}")
    codes = []
    for number, name in enumerate(names):
        run, tokens = name if ":" in name else str(tmp_path / name), tmp_path / f"tokens{number}"
        assert main(["tokenize", run, files, str(tokens), "--store", "folder"]) == 0
        codes.append(np.stack(list(arrays(tokens).values())))
    base, of_box, new, *back = codes
    assert np.array_equal(base, of_box) and all(np.array_equal(new, other) for other in back)
    prints = [Tokenizer.load(tmp_path / name).fingerprint for name in ("base", "new", "back")]
    assert prints[0] != prints[1] == prints[2]


# ----------------------------------------------------------------------------------------------------- odd but legal


def changed(monkeypatch, *, setup=None, losses=None, players=None):
    """`reconstruction` with another setup, with terms added by `losses(objective, tokenizer, batch, out)`, or players.

    `losses` is asked for the players other than `model`, too: then `out` is the player's name.
    """
    made, real = Reconstruction.setup, Reconstruction.losses

    def own_setup(self, tokenizer):
        made(self, tokenizer)
        if setup:
            setup(self, tokenizer)

    def own_losses(self, tokenizer, batch, *, player, **more):
        if player not in ("model", "adversary"):
            return Losses(losses(self, tokenizer, batch, player))
        out = real(self, tokenizer, batch, player=player, **more)
        added = losses(self, tokenizer, batch, out) if losses and player == "model" else {}
        return replace(out, terms={**out.terms, **added})

    monkeypatch.setattr(Reconstruction, "setup", own_setup)
    monkeypatch.setattr(Reconstruction, "losses", own_losses)
    if players:
        monkeypatch.setattr(Reconstruction, "players", lambda self, step: players(step))


def last(folder, step=6):
    return load_tensors(folder / f"checkpoints/step_{step}/state.safetensors")


@pytest.mark.slow
def test_two_players_share_a_module(tmp_path, monkeypatch):
    """Both train it, in training mode, and it is saved once."""
    seen = []

    def setup(self, tokenizer):
        trunk = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))
        self.one, self.two = (nn.Sequential(trunk, nn.Linear(4, 1)) for _ in range(2))

    def losses(self, tokenizer, batch, player):
        if isinstance(player, Losses):
            return {}
        module = getattr(self, player)
        seen.append((player, module[0][0].weight.requires_grad, module[0][1].training))
        return {f"{player}/far": (module(batch.x.movedim(1, -1)) - 1).square().mean()}

    changed(monkeypatch, setup=setup, losses=losses, players=lambda step: ("model", "one", "two"))
    train(run_config(tmp_path / "whole"))
    assert {("one", True, True), ("two", True, True)} <= set(seen[2:])
    names = last(tmp_path / "whole")
    assert "players/one/module/0.0.weight" in names and "players/two/module/0.0.weight" not in names
    assert "players/two/optimizer/0.0.weight/exp_avg" in names
    train_killed(monkeypatch, run_config(tmp_path / "killed"), 3, 5)
    same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_head_tied_to_the_tokenizer_is_trained_once_and_evaluated_with_the_averages(tmp_path, monkeypatch):
    def setup(self, tokenizer):
        self.head = nn.Linear(tokenizer.quantizer.dim, 2)
        self.head.weight = tokenizer.decoder.linear.weight

    def losses(self, tokenizer, batch, out):
        return {"head": (self.head(tokenizer.latents(batch.x)) - 0.3).square().mean()}

    changed(monkeypatch, setup=setup, losses=losses)
    run = train(run_config(tmp_path / "whole", optim__lr=0.1))
    assert list(run.players["model"].heads) == ["head.bias"]
    assert [name for name in last(tmp_path / "whole") if name.startswith("objective/")] == [
        "objective/head.bias"
    ]
    assert main(["eval", str(tmp_path / "whole")]) == 0
    found = json.loads((tmp_path / "whole/eval.json").read_text())["results"][0]["metrics"]
    for name, value in found.items():
        assert run.progress.evaluation[f"eval/{name}"] == pytest.approx(value, rel=1e-6), name
    train_killed(monkeypatch, run_config(tmp_path / "killed", optim__lr=0.1), 3, 5)
    same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_player_that_plays_seldom_is_no_head_of_the_model(tmp_path, monkeypatch):
    def setup(self, tokenizer):
        self.judge = nn.Linear(2, 1)

    def losses(self, tokenizer, batch, player):
        far = (self.judge(batch.x.movedim(1, -1)) - 1).square().mean()
        return {} if isinstance(player, Losses) else {"judge/far": far}

    changed(monkeypatch, setup=setup, losses=losses, players=lambda step: ("model", "judge")[: 1 + step % 2])
    run = build(run_config(tmp_path / "long", run__steps=100_000), torch.device("cpu"))
    assert run.player_names == ("model", "judge") and not run.players["model"].heads
    train(run_config(tmp_path / "whole"))
    assert ["loss@judge" in line for line in lines(tmp_path / "whole") if "loss" in line] == [False, True] * 3
    train_killed(monkeypatch, run_config(tmp_path / "killed"), 3, 4)
    same_end(tmp_path / "whole", tmp_path / "killed")
    seldom = lambda step: ("model", "judge") if step % 5000 == 4003 else ("model",)  # noqa: E731
    changed(monkeypatch, setup=setup, losses=losses, players=seldom)
    run = build(run_config(tmp_path / "seldom", run__steps=100_000), torch.device("cpu"))
    with pytest.raises(PluginLoadError, match="it names the player 'judge', but at none of the steps"):
        run.player("judge")


def test_an_adversary_that_joins_after_the_end_plays_when_the_run_is_lengthened(tmp_path):
    late = {"name": "reconstruction", "adversary": {"name": "toy/gan", "start": 4}}
    changes = {"objective": late, "optim__horizon": 6}
    assert main(["train", str(written(tmp_path, "whole", **changes))]) == 0
    path = written(tmp_path, "parts", **changes)
    assert main(["train", str(path), "run.steps=2"]) == 0
    names = last(tmp_path / "parts", 2)
    assert "players/adversary/module/judge.0.weight" in names
    assert not any(name.startswith("players/model/optimizer/objective") for name in names)
    assert main(["train", str(path)]) == 0
    same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_the_model_may_rest_for_a_step(tmp_path, monkeypatch):
    changed(monkeypatch, players=lambda step: ("model",) if step % 2 else ("adversary",))
    gan = {**GAN, "adversary": {"name": "toy/gan", "start": 0}}
    train(run_config(tmp_path / "whole", objective=gan))
    assert ["loss" in line for line in lines(tmp_path / "whole") if "step" in line][:6] == [False, True] * 3
    train_killed(monkeypatch, run_config(tmp_path / "killed", objective=gan), 3, 4)
    same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_perceptual_loss_with_weights_of_its_own_is_not_trained(tmp_path, monkeypatch):
    """BatchNorm keeps its statistics and dropout is off, though the objective is in training mode."""
    from vqcore_toy.training import Percept

    made, modes = Percept.__init__, []

    def init(self, cfg, *, spec):
        made(self, cfg, spec=spec)
        self.own = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))

    def forward(self, x_hat, x):
        modes.append(any(module.training for module in self.modules()))
        return (self.own(self.net(x_hat)) - self.own(self.net(x))).square().flatten(1).mean(1)

    monkeypatch.setattr(Percept, "__init__", init)
    monkeypatch.setattr(Percept, "forward", forward)
    percept = {"name": "toy/percept", "weights": lent(tmp_path / "net.safetensors")}
    config = run_config(tmp_path / "run", objective={"name": "reconstruction", "percept": {"lent": percept}})
    before = {
        k: v.clone() for k, v in build(config, torch.device("cpu")).objective.percept.state_dict().items()
    }
    run = train(config)
    assert not run.players["model"].heads and not any(modes)
    assert all(torch.equal(before[k], v) for k, v in run.objective.percept.state_dict().items())


def test_two_players_may_not_have_a_name_in_common(tmp_path, monkeypatch, capsys):
    from vqcore_toy.training import Gan

    real = Gan.discriminator

    def discriminator(self, *args, **more):
        return Losses({"gan/generator": real(self, *args, **more).terms["gan/discriminator"]})

    monkeypatch.setattr(Gan, "discriminator", discriminator)
    assert main(["train", str(written(tmp_path, "run", objective=GAN))]) == 2
    says = "the players model and adversary both return loss/gan/generator. Give each its own name."
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("owner", ["objective", "adversary"])
def test_what_is_made_after_setup_is_refused_before_it_is_lost(tmp_path, monkeypatch, capsys, owner):
    def losses(self, tokenizer, batch, out):
        if tokenizer.training:
            (self if owner == "objective" else self.adversary).register_buffer("late", batch.x.mean())
        return {}

    changed(monkeypatch, losses=losses)
    path = str(written(tmp_path, "run", objective=GAN))
    place = "objective/late" if owner == "objective" else "players/adversary/module/late"
    assert main(["check", path]) == 2
    assert f"{place} came or went after setup" in capsys.readouterr().out
    assert main(["train", path]) == 2
    assert f"{place} came or went after setup" in capsys.readouterr().err
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


def test_lazy_parameters_are_refused(tmp_path, monkeypatch, capsys):
    changed(monkeypatch, setup=lambda self, tokenizer: setattr(self, "head", nn.LazyLinear(2)))
    assert main(["train", str(written(tmp_path, "run"))]) == 2
    assert "it has lazy parameters after setup; give their sizes there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_term_of_weight_0_that_is_not_finite_leaves_the_adaptive_weight_alone(tmp_path, monkeypatch):
    def judged(self, tokenizer, made, batch, **more):
        terms = {**made.terms, "nan": made.x_hat.mean() * float("nan")}
        return real(self, tokenizer, dataclasses.replace(made, terms=terms), batch, **more)

    real = Reconstruction.judged
    gan = {**GAN, "adversary": {"name": "toy/gan", "start": 0}}
    train(run_config(tmp_path / "plain", objective=gan))
    monkeypatch.setattr(Reconstruction, "judged", judged)
    train(run_config(tmp_path / "nan", objective={**gan, "weights": {"nan": 0}}))
    same_end(tmp_path / "plain", tmp_path / "nan")


def test_the_loss_of_an_adversary_cannot_choose_a_checkpoint(tmp_path, capsys):
    """No evaluation measures it."""
    path = written(tmp_path, "run", objective=GAN, eval={"every": 2, "best": "loss/gan/discriminator"})
    assert main(["train", str(path)]) == 2
    assert "no metric and no loss has this name" in capsys.readouterr().err


def test_rows_that_some_batches_lack_are_named(tmp_path, monkeypatch):
    from vqcore.metrics.pixels import MAE

    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        rows = (x_hat - x).abs().flatten(1).mean(1)
        return {"all": rows, **({"some": rows} if "wave000" in keys else {})}

    monkeypatch.setattr(MAE, "rows", True, raising=False)
    monkeypatch.setattr(MAE, "measure", measure)
    with pytest.raises(ValueError, match="'some' has 4 rows for 24 samples: some batches lack them"):
        train(run_config(tmp_path / "run", run__steps=1, eval={"metrics": {"far": {"name": "mae"}}}))
