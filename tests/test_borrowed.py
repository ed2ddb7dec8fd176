"""Weights that are not ours, through the command line: present, missing, another one, on another machine, hostile."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from toys import run_tree, toy  # noqa: F401

from vqcore.artefacts.folder import load_tensors
from vqcore.borrowed import Lender, fill, read, sha256
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.errors import CheckpointError
from vqcore.rng import generator
from vqcore.schema import RunConfig, TokenizerConfig
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy", "cache")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lent(path, seed=0):
    """Weights for the toys' borrowed network."""
    draw = lambda *shape: torch.randn(*shape, generator=generator(seed, *shape))  # noqa: E731
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"linear.weight": draw(3, 2), "linear.bias": draw(3)}, path)
    return path


def config(folder, weights, part="decoder", **changes):
    """A config file of a run with a borrowed base (decoder), trunk (encoder) or perceptual loss."""
    node = {"name": "toy/borrowing", **({} if weights is None else {"weights": str(weights)})}
    if part == "percept":
        node["name"] = "toy/percept"
        tree = run_tree(
            folder / "run", objective={"name": "reconstruction", "percept": {"clip": node}}, **changes
        )
    else:
        tree = run_tree(folder / "run", **{f"model__{part}": node}, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.dump(tree))
    return str(folder / "run.yaml")


KEYS = {"decoder": "decoder.base", "encoder": "encoder.net", "percept": "objective.percept.clip.net"}


@pytest.mark.parametrize("part", KEYS)
def test_what_is_borrowed_is_frozen_and_never_saved(tmp_path, part):
    file = lent(tmp_path / "base.safetensors")
    tensors, digest = read(file)
    run = train(from_tree(yaml.safe_load(Path(config(tmp_path, file, part)).read_text()), schema=RunConfig))
    made = json.loads((tmp_path / "run/checkpoints/step_6/provenance.json").read_text())
    assert made["borrowed"] == {KEYS[part]: {"sha256": digest, "source": None}}
    path, _, name = KEYS[part].rpartition(".")
    owner = {
        "decoder": run.tokenizer.decoder,
        "encoder": run.tokenizer.encoder,
        "objective.percept.clip": getattr(run.objective.percept, "clip", None),
    }[path]
    module = getattr(owner, name)
    assert all(torch.equal(value, tensors[key]) for key, value in module.state_dict().items())
    owner.train()
    assert not any(inner.training for inner in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    checkpoint = tmp_path / "run/checkpoints/step_6"
    names = [
        key for file in ("model", "ema", "state") for key in load_tensors(checkpoint / f"{file}.safetensors")
    ]
    assert not any("base." in key or "net." in key for key in names)
    facts = run.tokenizer.facts().parts
    assert sum(each.borrowed for each in facts.values()) == (0 if part == "percept" else 9)
    saved = (checkpoint / "config.yaml").read_text()
    assert str(tmp_path) not in saved
    assert Tokenizer.load(checkpoint, borrowed={} if part == "percept" else {path: str(file)}).fingerprint


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_present_missing_and_another_one(tmp_path, capsys, part):
    file, other = lent(tmp_path / "base.safetensors"), lent(tmp_path / "other.safetensors", 1)
    assert main(["train", config(tmp_path, file, part)]) == 0
    artefact, key = str(tmp_path / "artefact"), KEYS[part]
    assert main(["export", str(tmp_path / "run"), artefact, "--borrow", f"{key}={file}"]) == 0
    assert str(file) not in (tmp_path / "artefact/config.yaml").read_text()
    capsys.readouterr()
    for given, text in (
        (
            [],
            f"error: {key}: no place is known for these weights. Give the weights with the SHA-256",
        ),
        (
            ["--borrow", f"{key}={other}"],
            f"error: {key}: these are other weights than those of this tokenizer",
        ),
        (["--borrow", f"{key}={tmp_path / 'nothing'}"], "there is no such file or folder"),
        (["--borrow", f"{part}.bsae={file}"], "Did you mean" if part == "decoder" else "no place is known"),
        (["--borrow", "nonsense"], "write KEY=PATH"),
    ):
        assert main(["export", artefact, str(tmp_path / "again"), *given]) == 2
        shown = capsys.readouterr().err
        assert text in shown or (text == "Did you mean" and "no place is known" in shown), shown
        assert len(shown.strip().splitlines()) == 1 and not (tmp_path / "again").exists()
    assert main(["export", artefact, str(tmp_path / "again"), "--borrow", f"{key}={file}"]) == 0
    one, two = (Tokenizer.load(path, borrowed={key: file}) for path in (artefact, tmp_path / "again"))
    x = torch.rand(2, 2, 8, 8)
    assert torch.equal(one.reconstruct(x), two.reconstruct(x)) and one.fingerprint == two.fingerprint
    card = (tmp_path / "artefact/README.md").read_text()
    assert f"| borrows {key} | weights with the SHA-256 `{one.loans[key]['sha256']}` |" in card
    assert f"Tokenizer.load(\".\", borrowed={{'{key}': 'PATH'}})" in card


def test_the_fingerprint_knows_what_decides_tokens(tmp_path):
    """Other weights of a trunk are other tokens; other weights of a base are the same tokens."""
    files = [lent(tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1)]
    for part, same in (("encoder", False), ("decoder", True)):
        node = {"name": "toy/borrowing"}
        tree = run_tree(tmp_path / "run", **{f"model__{part}": node})
        parts = {"modality": tree["data"]["modality"], "model": tree["model"], "objective": tree["objective"]}
        cfg = {**parts, "size": [8, 8]}
        prints = []
        for file in files:
            made = Tokenizer(from_tree(cfg, schema=TokenizerConfig), fetch=False)
            made.borrow(Lender({KEYS[part]: str(file)}))
            prints.append(made.fingerprint)
        assert (prints[0] == prints[1]) is same


@pytest.mark.slow
def test_a_run_knows_where_its_weights_lie(tmp_path, capsys):
    """On the machine of the run no place has to be given; an exported tokenizer knows no place."""
    file = lent(tmp_path / "base.safetensors")
    assert main(["train", config(tmp_path, file), "hooks={report: {name: track/report}}"]) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "Samples cannot be shown" not in (tmp_path / "run/report.html").read_text()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "artefact")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "artefact")]) == 2
    assert "decoder.base: no place is known" in capsys.readouterr().err
    lent(file, 1)
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "these are other weights" in capsys.readouterr().err


def test_encoding_needs_no_base_of_the_decoder(tmp_path, capsys):
    import numpy as np

    file = lent(tmp_path / "base.safetensors")
    assert main(["train", config(tmp_path, file)]) == 0
    file.unlink()
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", np.zeros((2, 8, 8), np.float32))
    run, tokens = str(tmp_path / "run"), str(tmp_path / "tokens")
    assert main(["tokenize", run, str(tmp_path / "in"), tokens]) == 0
    capsys.readouterr()
    assert main(["decode", run, tokens, str(tmp_path / "out")]) == 2
    assert "decoder.base" in capsys.readouterr().err


@pytest.mark.slow
def test_another_machine_has_the_weights_elsewhere(tmp_path, capsys):
    file = lent(tmp_path / "here/base.safetensors")
    path = config(tmp_path, file)
    assert main(["train", path, "run.steps=4", "optim.horizon=6"]) == 0
    file.rename(tmp_path / "moved.safetensors")
    moved = f"model.decoder.weights={tmp_path / 'moved.safetensors'}"
    assert main(["train", path, moved, "optim.horizon=6"]) == 0
    assert "resumed after step 4" in capsys.readouterr().out
    lent(tmp_path / "moved.safetensors", 1)
    assert main(["train", path, moved, "optim.horizon=6", "run.steps=8"]) == 2
    assert "this run was trained with" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_without_the_perceptual_network_gives_metrics_and_says_what_is_left_out(
    tmp_path, capsys, caplog
):
    file = lent(tmp_path / "net.safetensors")
    assert main(["train", config(tmp_path, file, "percept")]) == 0
    run = str(tmp_path / "run")
    assert main(["eval", run]) == 0
    assert "percept/clip" in capsys.readouterr().out
    file.rename(tmp_path / "away.safetensors")
    assert main(["eval", run]) == 0
    shown = capsys.readouterr()
    assert "the losses are left out: objective.percept.clip.net" in caplog.text and "psnr" in shown.out
    assert "percept/clip" not in shown.out
    assert main(["eval", run, "--borrow", f"objective.percept.clip={tmp_path / 'away.safetensors'}"]) == 0
    assert "percept/clip" in capsys.readouterr().out


def test_the_hub_is_asked_only_with_download(tmp_path, capsys, monkeypatch):
    from vqcore.artefacts import hub

    asked = []
    folder = tmp_path / "cached"
    lent(folder / "base.safetensors")

    def download(id, revision=None, patterns=(), *, cached=False):
        asked.append((id, revision, cached))
        if cached:
            raise CheckpointError(f"{id} is not in the cache of huggingface_hub")
        return folder

    monkeypatch.setattr(hub, "download", download)
    path = config(tmp_path, "hf://someone/base@main")
    assert main(["train", path]) == 2
    assert "not in the cache of huggingface_hub" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", path, "--download"]) == 0
    assert asked == [("someone/base", "main", True), ("someone/base", "main", False)]
    saved = yaml.safe_load((tmp_path / "run/checkpoints/step_6/config.yaml").read_text())
    assert saved["model"]["decoder"]["weights"] == "hf://someone/base@main"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "made"), "--download"]) == 0
    card = (tmp_path / "made/README.md").read_text()
    assert 'Tokenizer.load(".", download=True)' in card and "` from `hf://someone/base@main` |" in card


class Evil:
    def __reduce__(self):
        return (open, ("EVIL", "w"))


def test_a_hostile_pickle_is_not_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"linear.weight": Evil()}))
    torch.save({"linear.weight": torch.ones(3, 2), "more": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        assert main(["train", config(tmp_path, tmp_path / name)]) == 2
        shown = capsys.readouterr().err
        assert len(shown.strip().splitlines()) == 1 and "decoder.base" in shown
        assert not (tmp_path / "EVIL").exists()


def test_a_pickle_of_plain_tensors_is_read_without_a_flag(tmp_path):
    tensors, digest = read(lent(tmp_path / "base.safetensors"))
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "nested.pth")
    torch.save(tensors, tmp_path / "base.pth")
    assert read(tmp_path / "base.pth")[1] == digest
    assert set(read(tmp_path / "nested.pth")[0]) == {"state_dict.linear.weight", "state_dict.linear.bias"}


def test_the_hash_is_of_names_types_shapes_and_bytes():
    base = {"a": torch.zeros(2, 3), "b": torch.tensor(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.tensor(1)},
        {"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.tensor(1)},
        {"c": torch.zeros(2, 3), "b": torch.tensor(1)},
        {"a": torch.zeros(2, 3), "b": torch.tensor(2)},
    ]
    hashes = {sha256(each) for each in (base, *others)}
    assert len(hashes) == 5 and sha256(dict(reversed(base.items()))) == sha256(base)


def test_the_hash_is_computed_once_and_again_after_a_change(tmp_path, monkeypatch):
    from vqcore import borrowed

    file, calls = lent(tmp_path / "base.safetensors"), []
    real = borrowed.sha256
    monkeypatch.setattr(borrowed, "sha256", lambda tensors: calls.append(0) or real(tensors))
    one = read(file)[1]
    assert read(file)[1] == one and len(calls) == 1
    lent(file, 1)
    assert read(file)[1] != one and len(calls) == 2
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    assert read(file)[1] != one  # a cache that cannot be written is no error


def test_a_module_is_filled_exactly(tmp_path):
    file, net = lent(tmp_path / "base.safetensors"), nn.Sequential()
    net.add_module("linear", nn.Linear(2, 3))
    assert fill(net, file) == read(file)[1]
    assert torch.equal(net.linear.weight, read(file)[0]["linear.weight"])
    with pytest.raises(CheckpointError, match="no place is known for these weights"):
        fill(net, None)
    with pytest.raises(CheckpointError, match=r"base.safetensors: these weights do not fit: linear.weight$"):
        fill(nn.ModuleDict({"linear": nn.Linear(5, 3)}), file)
    with pytest.raises(CheckpointError, match=r"do not fit: linear.bias$"):
        fill(nn.ModuleDict({"linear": nn.Linear(2, 3, bias=False)}), file)


def test_a_folder_of_files_is_read_whole(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "2.safetensors")
    assert set(read(tmp_path)[0]) == {"a", "b"}
    save_file({"b": torch.ones(2)}, tmp_path / "3.safetensors")
    with pytest.raises(CheckpointError, match="two files have a tensor 'b'"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        (tmp_path / "empty").mkdir()
        read(tmp_path / "empty")


def test_a_home_folder_that_nobody_knows_costs_only_time(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(2)}, tmp_path / "net.safetensors")

    def unknown(path):
        if not str(path).startswith("~"):
            return path
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", unknown)
    assert read(str(tmp_path / "net.safetensors"))[1] == sha256({"a": torch.zeros(2)})
