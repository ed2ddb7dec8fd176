"""`vqcore fit` on small tables: what it makes is a run like any other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vqcore.cli import main
from vqcore.evaluate.verdict import is_fitted
from vqcore.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
ROWS = np.random.default_rng(0).lognormal(size=(200, 3)).astype(np.float32)
X = torch.from_numpy(ROWS).unsqueeze(-1)
HELD_OUT = np.random.default_rng(1).lognormal(size=(40, 3)).astype(np.float32)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a table and a config for it."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", ROWS)
    np.save("heldout.npy", HELD_OUT)
    np.save("minus.npy", ROWS - 1)
    np.save("classes.npy", np.arange(60).reshape(60, 1) % 3)
    write({})
    return tmp_path


def write(quantizer, **parts):
    config = {
        "data": {
            "name": "array",
            "path": "rows.npy",
            "eval_path": "heldout.npy",
            "modality": {"name": "array", "channels": ["flux", "width", "age"], "size": 1},
            "batch_size": 64,
            "workers": 0,
        },
        "model": {
            "encoder": {"name": "fit/patches"},
            "quantizer": {"name": "fit/scalar", "latent_dim": 3, "codebook_size": 16, **quantizer},
            "decoder": {"name": "fit/patches"},
        },
        "run": {"epochs": 1},
        **parts,
    }
    Path("table.yaml").write_text(yaml.safe_dump(config))


def refused(capsys, *words):
    """The one line that a command answers."""
    assert main(list(words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_a_table_becomes_codes_and_comes_back(here, capsys):
    assert main(["fit", "table.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "samples" in shown and "3 quantile" in shown
    tokenizer = Tokenizer.load("runs/table")
    codes = tokenizer.encode(X)
    assert codes.shape == (200, 1, 3)
    for column in codes[:, 0].T:  # exactly one pass: 200 values in 16 intervals
        assert {12, 13} == set(torch.bincount(column, minlength=16).tolist())
    assert torch.equal(tokenizer.proj.weight, torch.eye(3))
    assert main(["export", "runs/table", "artefact"]) == 0
    assert torch.equal(Tokenizer.load("artefact").encode(X), codes)
    assert "holds a tokenizer already" in refused(capsys, "fit", "table.yaml")


@pytest.mark.slow
def test_a_table_goes_all_the_way(here):
    assert main(["fit", "table.yaml"]) == 0
    assert main(["fit", "table.yaml", "run.dir=runs/again"]) == 0
    assert main(["fit", "table.yaml", "run.dir=runs/log", "model.quantizer.method=log"]) == 0
    tokenizer, again, log = (Tokenizer.load(f"runs/{name}") for name in ("table", "again", "log"))
    assert tokenizer.fingerprint == again.fingerprint != log.fingerprint

    assert main(["eval", "runs/table"]) == 0
    measured = json.loads((here / "runs/table/eval.json").read_text())["results"][0]
    x_hat = tokenizer.decode(tokenizer.encode(torch.from_numpy(HELD_OUT).unsqueeze(-1)))[..., 0].numpy()
    assert measured["metrics"]["metric/mae"] == pytest.approx(np.abs(x_hat - HELD_OUT).mean(), rel=1e-5)
    assert "k-means" in measured["baselines"]
    assert main(["eval", "runs/log"]) == 0
    assert main(["eval", "--compare", "runs/table", "runs/log"]) == 0
    assert main(["report", "runs/table"]) == 0

    assert main(["tokenize", "runs/table", "heldout.npy", "tokens"]) == 0
    assert main(["decode", "runs/table", "tokens", "rebuilt"]) == 0
    np.testing.assert_array_equal(np.load("rebuilt/heldout.npy"), x_hat)


@pytest.mark.slow
def test_a_decoder_learns_on_the_codes_of_a_fitted_tokenizer(here, capsys):
    assert main(["fit", "table.yaml"]) == 0
    given = {"full_ckpt": "runs/table", "freeze_enc": True}
    decoder = {"name": "vit/mlp-decoder", "depth": 1, "width": 8, "expansion": 2}
    learned = [
        "model.decoder=" + json.dumps(decoder),
        *(f"model.{k}={json.dumps(v)}" for k, v in given.items()),
    ]
    more = ["run.epochs=null", "run.steps=2", "optim.lr=0.01", "run.dir=runs/learned"]
    assert main(["train", "table.yaml", *learned, *more]) == 0
    one, other = Tokenizer.load("runs/learned"), Tokenizer.load("runs/table")
    assert one.fingerprint == other.fingerprint
    assert (is_fitted(one), is_fitted(other)) == (False, True)


@pytest.mark.slow
def test_byte_pairs_are_fitted_to_windows_of_signals(here):
    waves = np.sin(np.arange(64) * np.linspace(0.1, 0.5, 40)[:, None, None]).astype(np.float32)
    np.save("waves.npy", waves)
    data = [
        "data.path=waves.npy",
        "data.eval_path=waves.npy",
        "data.modality.channels=1",
        "data.modality.size=64",
    ]
    data.append("data.modality.rank=1")
    dct = json.dumps({"name": "fit/dct", "patch_size": 16})
    fast = json.dumps({"name": "fit/fast", "latent_dim": 16, "num_codebooks": 16, "codebook_size": 256})
    parts = [f"model.encoder={dct}", f"model.decoder={dct}", f"model.quantizer={fast}"]
    assert main(["fit", "table.yaml", *data, *parts]) == 0
    tokenizer = Tokenizer.load("runs/table")
    x = torch.from_numpy(waves)
    codes = tokenizer.encode(x)
    assert codes.shape == (40, 4, 16)
    off = (tokenizer.decode(codes) - x).unflatten(-1, (4, 16)).square().sum(-1).sqrt()
    assert off.max() <= 0.05 * 16**0.5 * (1 + 1e-5)  # each of 16 coefficients is off by half a tenth at most


def test_what_is_not_fitted_or_not_for_fitting_is_one_line(here, capsys):
    line = refused(capsys, "train", "table.yaml", "optim.lr=0.01")
    assert line.startswith("error: model.quantizer (fit/scalar): is not fitted yet") and "vqcore fit" in line
    fsq = json.dumps({"name": "quant/fsq", "levels": [4, 4, 4]})
    assert "is trained and not fitted" in refused(capsys, "fit", "table.yaml", f"model.quantizer={fsq}")
    mlp = json.dumps({"name": "vit/mlp-encoder", "depth": 1, "width": 8, "expansion": 2})
    assert "vqcore fit trains nothing" in refused(capsys, "fit", "table.yaml", f"model.encoder={mlp}")
    assert main(["check", "table.yaml", "optim.lr=1"]) == 0
    assert "next      vqcore fit table.yaml" in capsys.readouterr().out
    narrow = "model.decoder={name: vit/mlp-decoder, depth: 1, width: 8, expansion: 2}"
    line = refused(capsys, "fit", "table.yaml", narrow, "model.quantizer.latent_dim=4")
    assert "takes 4 values, but the encoder gives 3" in line
    assert "another decoder can be trained" in refused(capsys, "fit", "table.yaml", narrow)
    classes = [
        "data.modality={name: array, kind: categorical, labels: 3, channels: null}",
        "data.path=classes.npy",
    ]
    assert "model.embed_dim=null" in refused(
        capsys, "fit", "table.yaml", *classes, "data.eval_path=classes.npy"
    )
    wide = refused(capsys, "fit", "table.yaml", "model.quantizer.latent_dim=4")
    assert "set model.quantizer.latent_dim=3" in wide
    assert "column 0" in refused(
        capsys, "fit", "table.yaml", "model.quantizer.method=log", "data.path=minus.npy"
    )
    assert not (here / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "smaller"),
    [
        ("kmeans", ["run.epochs=1", "model.quantizer.codebook_size=64"]),
        ("fast", ["run.epochs=2"]),
        ("scalar", ["data.samples=300", "data.eval_samples=20"]),
    ],
)
def test_the_recipes_beat_a_constant_by_far(tmp_path, monkeypatch, recipe, smaller):
    monkeypatch.chdir(ROOT)  # recipes name the bundled data from here
    assert main(["fit", f"cfgs/fit/{recipe}.yaml", f"run.dir={tmp_path}/run", *smaller]) == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    measured = json.loads(line)
    assert measured["eval/error"] < 0.2 * measured["eval/constant/error"]
