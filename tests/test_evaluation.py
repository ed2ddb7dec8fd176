"""Evaluation: SSIM against scikit-image, what is recorded beside figures, refusals to compare, several processes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from toys import run_config, run_tree, toy, trained  # noqa: F401

from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.data.sources import ArrayFile, Folder
from vqcore.evaluate import compare as comparison
from vqcore.metrics.ssim import SSIM, ssim_map
from vqcore.modalities.array import Array
from vqcore.modalities.rgb import RGB
from vqcore.protocols import DataSpec
from vqcore.schema import TokenizerConfig
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
SPEC = DataSpec(channels=3, size=(23, 31))


def pair(seed=0, count=4, size=(23, 31)):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-1, 1, (count, 3, *size)).astype(np.float32))
    noise = torch.from_numpy(rng.normal(0, 0.3, x.shape).astype(np.float32))
    return x + noise, x


def eight_bits(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def value(metric, *batches):
    parts = [metric.measure(*batch) for batch in batches]
    return metric.summary({name: sum(part[name] for part in parts) for name in parts[0]})[""]


def by_the_paper(x, y):
    """SSIM of one channel, window by window, in plain NumPy: eq. 13 with the Gaussian window of its section III.C."""
    axis = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    w = np.outer(axis, axis) / axis.sum() ** 2
    scores = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = (each[i : i + 11, j : j + 11].astype(float) for each in (x, y))
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (
                (w * (a - ma) ** 2).sum(),
                (w * (b - mb) ** 2).sum(),
                (w * (a - ma) * (b - mb)).sum(),
            )
            c1, c2 = 2.55**2, 7.65**2
            scores.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(scores)


def test_ssim_is_the_papers():
    x_hat, x = pair(count=2)
    each = [by_the_paper(a, b) for p, q in zip(eight_bits(x), eight_bits(x_hat)) for a, b in zip(p, q)]
    assert value(SSIM(SSIM.Config(), spec=SPEC), (x_hat, x)) == pytest.approx(np.mean(each), abs=1e-9)


def test_ssim_is_that_of_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    x_hat, x = pair()
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    each = [
        skimage.structural_similarity(a, b, channel_axis=0, **how)
        for a, b in zip(eight_bits(x), eight_bits(x_hat))
    ]
    metric = SSIM(SSIM.Config(), spec=SPEC)
    assert value(metric, (x_hat, x)) == pytest.approx(np.mean(each), abs=1e-9)
    assert value(metric, (x_hat[:3], x[:3]), (x_hat[3:], x[3:])) == pytest.approx(np.mean(each), abs=1e-9)


def test_ssim_of_equal_samples_is_one_and_falls_with_noise():
    metric = SSIM(SSIM.Config(), spec=SPEC)
    x_hat, x = pair()
    assert value(metric, (x, x)) == pytest.approx(1)
    assert value(metric, (x_hat, x)) < value(metric, (x + 0.1 * (x_hat - x), x)) < 1
    # Rounding hides what nobody can see.
    seen = torch.from_numpy(eight_bits(x).astype(np.float32) / 127.5 - 1)
    assert value(metric, (seen + 0.001, seen)) == pytest.approx(1)


@pytest.mark.parametrize("size", [(20,), (12, 14), (11, 12, 13)])
def test_ssim_of_any_rank(size):
    x = torch.rand(2, 1, *size, dtype=torch.float64) * 255
    assert ssim_map(x, x).shape == (2, 1, *(side - 10 for side in size))
    assert torch.allclose(ssim_map(x, x), torch.ones(()).double())


def test_ssim_counts_whole_valid_windows_only():
    metric = SSIM(SSIM.Config(), spec=SPEC)
    x_hat, x = pair()
    mask = torch.zeros(4, 23, 31, dtype=torch.bool)
    mask[:, :, :20] = True
    inside = value(SSIM(SSIM.Config(), spec=SPEC), (x_hat[..., :20], x[..., :20]))
    assert value(metric, (x_hat, x, mask)) == pytest.approx(inside, abs=1e-9)
    mask[1:] = False
    alone = value(metric, (x_hat[:1, ..., :20], x[:1, ..., :20]))
    assert value(metric, (x_hat, x, mask)) == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (DataSpec(channels=3, size=(8, 8)), "11 positions along every axis; the size is 8 x 8"),
        (DataSpec(channels=3, size=(16, 16), range=None), "declared range"),
    ],
)
def test_ssim_refuses(spec, says):
    with pytest.raises(ValueError, match=says):
        SSIM(SSIM.Config(), spec=spec)


def photos(folder, count=5):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"p{index}.png")
    return folder


def folder_data(path):
    cfg = Folder.Config(path=str(path), eval_path=str(path), modality=RGB.Config())
    return Folder(cfg, split="eval", modality=RGB(RGB.Config(), size=16), extra={})


def test_the_sets_hash_is_of_keys_and_contents(tmp_path):
    one, two = photos(tmp_path / "one"), photos(tmp_path / "two")
    before = comparison.set_sha256(folder_data(one), (), None)
    assert before == comparison.set_sha256(folder_data(two), (), None)
    (two / "p4.png").rename(two / "p5.png")
    renamed = comparison.set_sha256(folder_data(two), (), None)
    Image.new("RGB", (20, 24)).save(two / "p5.png")
    changed = comparison.set_sha256(folder_data(two), (), None)
    (two / "p5.png").unlink()
    fewer = comparison.set_sha256(folder_data(two), (), None)
    assert len({before, renamed, changed, fewer}) == 4
    assert comparison.set_sha256(folder_data(one), (), 4) == fewer  # 4 of the 5 are measured: p0 to p3
    assert comparison.set_sha256(folder_data(one), (), 3) not in (before, fewer)


def test_the_sets_hash_of_arrays_sees_shape_and_type(tmp_path):
    hashes = set()
    for index, array in enumerate(
        (np.zeros((3, 4, 4), np.float32), np.zeros((3, 4, 4), np.int32), np.ones((3, 2, 8)))
    ):
        np.save(tmp_path / f"{index}.npy", array)
        modality = Array(Array.Config(channels=1, size=(4, 4)), size=None)
        path = str(tmp_path / f"{index}.npy")
        cfg = ArrayFile.Config(path=path, eval_path=path, modality=modality.cfg)
        data = ArrayFile(cfg, split="eval", modality=modality, extra={})
        hashes.add(comparison.set_sha256(data, (), None))
    assert len(hashes) == 3


def test_a_file_and_its_bytes_are_the_same_content(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    with (tmp_path / "a").open("rb") as file:
        as_file = comparison._content(file)
    assert comparison._content(tmp_path / "a") == comparison._content(b"x" * 100) == as_file
    assert comparison._content({"a": 1, "b": "2"}) != comparison._content({"a": 1, "b": "3"})


@pytest.fixture
def runs(tmp_path):
    """Two short runs on the same samples with other seeds."""
    return tuple(
        trained(tmp_path / f"run{seed}", run__seed=seed, run__steps=2, data__length=7) for seed in (0, 1)
    )


def report_of(run):
    return json.loads((run / "eval.json").read_text())


@pytest.mark.slow
def test_several_sizes_on_weights_and_their_average(runs, capsys):
    assert (
        main(["eval", str(runs[0]), "--weights", "both", "eval.sizes=[8, [8, 16]]", "eval.batch_size=3"]) == 0
    )
    report = report_of(runs[0])
    assert [(r["weights"], r["size"]) for r in report["results"]] == [
        ("ema", [8, 8]), ("ema", [8, 16]), ("model", [8, 8]), ("model", [8, 16]),
    ]  # fmt: skip
    figures = report["results"][0]["metrics"]
    assert figures["samples"] == 7 and figures["codes/tokens_per_sample"] == 4
    assert report["protocol"]["set"]["count"] == 7 and report["better"]["loss"] == "lower"
    assert set(report["environment"]["versions"]) >= {"vqcore", "torch", "numpy", "pillow", "python"}
    assert "hflip" not in report["protocol"]["modality"]
    said = capsys.readouterr().out
    assert "8x16 model" in said and "loss/pixel/mse" in said

    alone = {"auto": "ema", "ema": "ema", "model": "model"}
    for asked, got in alone.items():
        assert main(["eval", str(runs[0]), "--weights", asked]) == 0
        (result,) = report_of(runs[0])["results"]
        twin = next(r for r in report["results"] if r["weights"] == got)
        assert result["weights"] == got and result["fingerprint"] == twin["fingerprint"]
        assert result["metrics"] == pytest.approx(twin["metrics"], rel=1e-6)


def test_a_run_without_averages_has_its_weights_measured(tmp_path):
    train(run_config(tmp_path / "run", ema__decay=None, run__steps=2))
    for asked in ("auto", "both"):
        assert main(["eval", str(tmp_path / "run"), "--weights", asked]) == 0
        assert [r["weights"] for r in report_of(tmp_path / "run")["results"]] == ["model"]


def test_batches_of_any_size_give_the_same_figures(runs, capsys):
    found = []
    for size in (1, 2, 7):
        assert main(["eval", str(runs[0]), f"eval.batch_size={size}"]) == 0
        found.append(report_of(runs[0])["results"][0]["metrics"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] == pytest.approx(found[2], rel=1e-6)
    assert main(["eval", str(runs[0]), "eval.sizes=[4]", "eval.perturb=0.5"]) == 2
    assert "eval.perturb: a sample of size [4, 4] has one token" in capsys.readouterr().err


def test_two_runs_side_by_side(runs, capsys, caplog):
    for run in runs:
        assert main(["eval", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", "--compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    a, b = (report_of(run)["results"][0]["metrics"] for run in runs)
    (line,) = [line for line in said.splitlines() if line.split()[:1] == ["loss"]]
    assert line.split()[1:3] == [f"{a['loss']:.5g}", f"{b['loss']:.5g}"]
    assert line.split()[-1] == str(runs[a["loss"] > b["loss"]])
    (line,) = [line for line in said.splitlines() if line.split()[:1] == ["samples"]]
    assert line.split() == ["samples", "7", "7", "+0"]
    assert "another seed: 0 / 1" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.length=6", "set.count (7 / 6), set.sha256 ("),
        ("data.note=other", ""),
        ("eval.perturb=0.5", "perturb (none / 0.5)"),
        ("eval.sizes=[16]", "sizes ([[8, 8]] / [[16, 16]])"),
        ("eval.metrics={mae: {name: mae}, other: {name: mae}}", "metrics.other"),
    ],
)
def test_unequal_measurements_are_not_compared(runs, capsys, override, says):
    assert main(["eval", str(runs[0])]) == 0
    assert main(["eval", str(runs[1]), override]) == 0
    assert ("perturbed: 0.5 of a sample's positions" in capsys.readouterr().out) is ("perturb" in override)
    status = main(["eval", "--compare", *map(str, runs)])
    error = capsys.readouterr().err
    assert status == (2 if says else 0)
    if says:
        assert error.startswith("error: ") and len(error.splitlines()) == 1
        assert "were not measured alike" in error and says in error


def test_other_versions_only_warn(runs, caplog):
    for run in runs:
        assert main(["eval", str(run), "run.seed=3"]) == 0
    report = report_of(runs[1])
    report["environment"]["versions"]["torch"] = "1.0"
    (runs[1] / "eval.json").write_text(json.dumps(report))
    assert main(["eval", "--compare", *map(str, runs)]) == 0
    assert "measured with another versions.torch: " in caplog.text and "/ 1.0" in caplog.text
    assert "seed" not in caplog.text


def test_figures_are_compared_by_what_is_better():
    a = {
        "results": [
            {"weights": "ema", "size": [8], "metrics": {"metric/psnr": 30.0, "loss": 1.0, "n": 1.0, "x": 0.0}}
        ],
        "better": {"metric/psnr": "higher", "loss": "lower"},
    }
    b = {
        "results": [
            {"weights": "model", "size": [8], "metrics": {"metric/psnr": 31.0, "loss": 1.0, "n": 2.0}}
        ]
    }
    (title, rows), *others = comparison.rows(a, b).items()
    assert not others and title == "8, ema / model weights"
    assert [(row.name, row.better) for row in rows] == [("metric/psnr", "b"), ("loss", "="), ("n", "")]
    for value, better in ((1 + 1e-9, "="), (1 + 1e-5, "a"), (1 - 1e-5, "b"), (float("nan"), "")):
        b["results"][0]["metrics"]["loss"] = value
        assert comparison.rows(a, b)[title][1].better == better


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["eval"], "no run given. E.g. vqcore eval runs/quickstart"),
        (["eval", "--compare", "{0}", "{1}"], "eval.json: no such file. Measure the run first: vqcore eval"),
        (
            ["eval", "{0}", "--compare", "{0}", "{1}"],
            "--compare takes two evaluated runs and no other argument",
        ),
        (["eval", "{0}", "eval.sizes=[10]"], "no multiple of the patch 4"),
    ],
)
def test_one_line_for_what_is_wrong(runs, capsys, argv, says):
    argv = [word.format(*runs) for word in argv]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_a_damaged_evaluation_is_named(runs, capsys):
    for content in ("{", "{}", '{"protocol": {"set": {"sha256": ""}}, "results": []}'):
        (runs[0] / "eval.json").write_text(content)
        assert main(["eval", "--compare", *map(str, runs)]) == 2
        assert f"Measure again: vqcore eval {runs[0]}" in capsys.readouterr().err


@pytest.fixture
def alone(runs, tmp_path, monkeypatch):
    """The first run, measured, and the same tokenizer exported."""
    assert main(["eval", str(runs[0])]) == 0
    assert main(["export", str(runs[0]), str(tmp_path / "made")]) == 0
    monkeypatch.chdir(tmp_path)
    return runs[0], tmp_path / "made"


def test_an_exported_tokenizer_is_measured_as_its_run_was(alone, capsys):
    """All but the losses, which need what only training has; and its folder is left as it is."""
    run, made = alone
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    capsys.readouterr()
    assert main(["eval", str(made)]) == 0
    said = capsys.readouterr().out
    assert f"{made}, 7 samples" in said and "psnr" in said and "figures  " not in said
    assert main(["eval", str(made), "--json", "made.json"]) == 0
    report, wanted = json.loads(Path("made.json").read_text()), report_of(run)
    assert report["protocol"] == wanted["protocol"] and report["environment"] == wanted["environment"]
    assert report["step"] == wanted["step"] == 2 and report["data"]["length"] == 7
    (figures,), (others,) = ([r["metrics"] for r in each["results"]] for each in (report, wanted))
    losses = others.keys() - figures.keys()
    assert losses == {"loss", "loss/pixel/mse", "loss/vq/commit"} and "metric/psnr" in figures
    assert figures == pytest.approx({k: v for k, v in others.items() if k not in losses}, rel=1e-6)
    assert Path("made.png").is_file()
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_figures_of_a_run_go_where_json_says(alone):
    run, _ = alone
    before = report_of(run)
    assert main(["eval", str(run), "data.length=5", "--json", "few.json"]) == 0
    assert json.loads(Path("few.json").read_text())["protocol"]["set"]["count"] == 5
    assert Path("few.png").is_file() and report_of(run) == before


@pytest.mark.slow
def test_metrics_of_training_come_along_and_may_be_changed(tmp_path, monkeypatch, capsys):
    metrics = {"far": {"name": "mae"}, "near": {"name": "psnr"}}
    train(run_config(tmp_path / "run", run__steps=2, eval__metrics=metrics, eval__sizes=[16]))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "made")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "made")]) == 0
    said = capsys.readouterr().out
    assert "far" in said and "near" in said and "16x16" in said
    assert main(["eval", str(tmp_path / "made"), "eval.metrics=null", "eval.sizes=null"]) == 0
    said = capsys.readouterr().out
    assert "far" not in said and "psnr" in said and "8x8" in said


def test_what_rides_along_comes_along(tmp_path, capsys):
    extra = {"again": {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1]}}
    train(run_config(tmp_path / "run", run__steps=2, data__extra=extra))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "made")]) == 0
    assert main(["eval", str(tmp_path / "made"), "--json", str(tmp_path / "made.json")]) == 0
    assert json.loads((tmp_path / "made.json").read_text())["protocol"]["extra"].keys() == {"again"}


def test_what_rode_along_is_not_asked_of_other_samples(tmp_path, capsys):
    rgb, mask = tmp_path / "rgb", tmp_path / "mask"
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for folder, array in ((rgb, levels), (mask, levels[..., 0])):
        folder.mkdir()
        Image.fromarray(array).save(folder / "a.png")
    data = {
        "name": "folder", "path": str(rgb), "eval_path": str(rgb), "modality": {"name": "rgb"}, "input_size": 16,
        "batch_size": 1, "workers": 0, "extra": {"valid": {"name": "mask"}}, "extra_path": {"valid": str(mask)},
        "eval_extra_path": {"valid": str(mask)},
    }  # fmt: skip
    train(run_config(tmp_path / "run", run__steps=1, data=data))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "made")]) == 0
    (mask / "a.png").unlink()
    mask.rmdir()
    made = ["eval", str(tmp_path / "made"), "--json", str(tmp_path / "made.json")]
    assert main(made) == 2
    assert main([*made, f"data.eval_path={rgb}"]) == 0
    assert json.loads((tmp_path / "made.json").read_text())["protocol"]["extra"] == {}


def test_a_checkpoint_of_a_run_belongs_to_it_and_a_tokenizer_beside_one_does_not(alone):
    run, made = alone
    (run / "eval.json").unlink()
    assert main(["eval", str(run / "checkpoints/step_2")]) == 0
    assert "loss" in report_of(run)["results"][0]["metrics"]
    (run / "eval.json").unlink()
    assert main(["export", str(made), str(run / "out/made")]) == 0
    assert main(["eval", str(run / "out/made")]) == 0
    assert not (run / "eval.json").exists()


@pytest.mark.slow
def test_exported_tokenizers_side_by_side(runs, alone, capsys):
    """Of a run the figures are read, an exported tokenizer is measured, on whatever data is named."""
    run, made = alone
    assert main(["export", str(runs[1]), "other"]) == 0
    capsys.readouterr()
    assert main(["eval", "--compare", str(run), str(made)]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["metric/psnr"] == [f"{report_of(run)['results'][0]['metrics']['metric/psnr']:.5g}"] * 2 + [
        "+0",
        "equal",
    ]
    assert main(["eval", "--compare", str(made), "other", "data.length=3", "eval.sizes=[16]"]) == 0
    said = capsys.readouterr().out
    assert "16 x 16, model weights" in said and ["samples", "3", "3", "+0"] in [
        s.split() for s in said.splitlines()
    ]
    assert main(["eval", "other", "--json", "other.json"]) == 0
    assert main(["eval", "--compare", "other.json", str(run)]) == 0
    assert main(["eval", "--compare", "other.json", str(made), "data.length=3"]) == 2
    assert "other.json and " in (error := capsys.readouterr().err) and "set.count (7 / 3)" in error


def of_photos(tmp_path, **data):
    """A tokenizer of pictures whose provenance names this data."""
    tree = {
        "modality": {"name": "rgb"}, "size": [16, 16], "objective": {"name": "reconstruction"},
        "model": run_tree("unused")["model"],
    }  # fmt: skip
    tokenizer = Tokenizer(from_tree(tree, schema=TokenizerConfig))
    tokenizer.origin = {"data": data} if data else {}
    tokenizer.save(tmp_path / "made")
    return str(tmp_path / "made")


def test_data_that_are_not_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "mine")
    made = of_photos(tmp_path, name="folder", path="gone/train", eval_path="gone/val")
    assert main(["eval", made]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: data.eval_path: gone/val: there is no such folder.")
        and len(error.splitlines()) == 1
    )
    assert "To measure it on your own data: data.eval_path=FOLDER" in error
    assert main(["eval", made, "data.eval_path=mein"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'mine'?" in error and "FOLDER" not in error
    assert main(["eval", made, "data.eval_path=mine", "--json", "mine.json"]) == 0
    assert json.loads(Path("mine.json").read_text())["data"]["path"] == "gone/train"


NOTHING = "data.eval_path: no held-out data is given. Set data.eval_path=my/photos, or data.eval_share=0.1"


@pytest.mark.parametrize(
    ("data", "says", "mended"),
    [
        ({}, NOTHING, ["data.eval_path=mine"]),
        pytest.param(
            {"name": "folder", "path": "gone"}, NOTHING, ["data.eval_path=mine"], marks=pytest.mark.slow
        ),
        pytest.param(
            {"name": "array", "path": "gone.npy", "eval_path": "gone.npy"},
            "gone.npy: there is no such file. The tokenizer was trained with these settings.",
            None,
            marks=pytest.mark.slow,
        ),
        ({"name": "nowhere/waves"}, "data.name: no plugin 'nowhere'", None),
    ],
)
def test_data_of_another_kind_or_of_none(tmp_path, monkeypatch, capsys, data, says, mended):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "mine")
    made = of_photos(tmp_path, **data)
    assert main(["eval", made]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert ("data.name=folder data.path=FOLDER data.eval_path=FOLDER" in error) is (mended is None)
    mended = mended or ["data.name=folder", "data.path=mine", "data.eval_path=mine"]
    assert main(["eval", made, *mended]) == 0
    assert "psnr" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["modality.name=array", "modality={name: array}"])
def test_the_modality_is_no_setting_of_an_evaluation(tmp_path, capsys, given):
    assert main(["eval", of_photos(tmp_path), f"data.{given}"]) == 2
    assert "this setting of a trained tokenizer cannot change" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["{0}", "{0}/no/figures.json"])
def test_figures_need_a_place(alone, tmp_path, capsys, name):
    assert main(["eval", str(alone[1]), "--json", name.format(tmp_path)]) == 2
    assert "this is a folder, or its parent folder does not exist" in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_several_processes_measure_what_one_does(tmp_path):
    """7 samples on 2 ranks in batches of 2: ragged everywhere, and one rank has a batch more."""
    pytest.importorskip("vqcore_vit")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.uniform(-1, 1, (7, 2, 16, 16)).astype(np.float32))
    vit = {"width": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
    tree = {
        **run_tree("run", run__steps=2, run__threads=1),
        "data": {
            "name": "array", "path": "x.npy", "eval_path": "x.npy", "batch_size": 2, "workers": 0,
            "modality": {"name": "array", "channels": 2, "size": [16, 16], "range": [-1, 1]},
        },
        "model": {
            "encoder": {"name": "vit/encoder", **vit},
            "quantizer": {"name": "quant/vq", "codebook_size": 32, "latent_dim": 8},
            "decoder": {"name": "vit/decoder", **vit},
        },
        "eval": {"metrics": {name: {"name": name} for name in ("psnr", "ssim", "mae")}},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.dump(tree))
    many = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    reports = []
    for argv in (["train", "run.yaml"], ["eval", "run"], ["eval", "run"]):
        launcher = many if reports else []
        command = [sys.executable, *launcher, "-m", "vqcore", *argv]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        reports += [report_of(tmp_path / "run")] if argv[0] == "eval" else []
    one, two = reports
    assert one["protocol"] == two["protocol"] and one["protocol"]["set"]["count"] == 7
    figures, others = (report["results"][0]["metrics"] for report in reports)
    assert figures == pytest.approx(others, rel=1e-6)
    assert done.stdout.count("psnr") == 1 and Path(tmp_path / "run/samples/eval.png").is_file()


def test_eval_draws_what_an_objective_draws_as_training_did(tmp_path, monkeypatch):
    """What `setup` draws besides the players follows the run's seed, so `vqcore eval` gives training's losses."""
    from vqcore.objectives import Reconstruction

    losses = Reconstruction.losses

    def setup(self, tokenizer):
        self.factor = float(torch.rand(()))

    def scaled(self, *args, **more):
        out = losses(self, *args, **more)
        return dataclasses.replace(out, terms={name: self.factor * term for name, term in out.terms.items()})

    monkeypatch.setattr(Reconstruction, "setup", setup)
    monkeypatch.setattr(Reconstruction, "losses", scaled)
    run = train(run_config(tmp_path / "run", run__seed=7, ema__decay=None))
    assert main(["eval", str(tmp_path / "run"), "eval.samples=null"]) == 0
    measured = json.loads((tmp_path / "run/eval.json").read_text())["results"][0]["metrics"]
    assert measured["loss"] == pytest.approx(run.progress.evaluation["eval/loss"], rel=1e-6)
