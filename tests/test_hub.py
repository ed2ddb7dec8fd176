"""Artefacts that travel: model card, hub (a stand-in on this machine), fingerprints, foreign files and pickles."""

import hashlib
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from hubserver import serving
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.artefacts.folder import save_tensors, seal
from vqcore.artefacts.formats import read_pickle
from vqcore.artefacts.resolve import resolve
from vqcore.borrowed import weights_of
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.config import to_tree
from vqcore.errors import CheckpointError
from vqcore.schema import TokenizerConfig
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


def make(seed=0, **modality):
    settings = {"name": "array", "channels": 2, "range": [-1, 1], "size": [8, 8], **modality}
    tree = {
        "modality": settings,
        "size": settings["size"],
        "model": {**run_tree("unused")["model"], "embed_dim": 5},
        "objective": {"name": "reconstruction"},
    }
    return Tokenizer(from_tree(tree, schema=TokenizerConfig), seed=seed)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An empty hub, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.chdir(tmp_path)
    with serving() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        yield found


def snippet(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def ran(code):
    names: dict = {}
    exec(code, names)
    return names


# --------------------------------------------------------------------------------------------------- card


@pytest.mark.parametrize(
    "modality",
    [{}, {"range": None}, {"kind": "categorical", "labels": 5, "channels": 1, "range": None}, {"size": [8]}],
    ids=["bounded", "unbounded", "classes", "one-axis"],
)
def test_the_cards_snippet_runs_as_it_stands(tmp_path, monkeypatch, modality):
    make(**modality).save(tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    code = snippet((tmp_path / "made/README.md").read_text())
    names = ran(code)
    assert f"{tuple(names['codes'].shape)}, integers from 0 to 15" in code
    assert f"# {tuple(names['x_hat'].shape)}" in code
    assert isinstance(names["shown"], np.ndarray)


def test_the_card_says_what_was_measured_and_on_what(tmp_path, monkeypatch, capsys):
    run = train(run_config(tmp_path / "run", data__note="a | b"))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "made")]) == 0
    card = (tmp_path / "made/README.md").read_text()
    made = json.loads((tmp_path / "made/provenance.json").read_text())
    assert made["metrics"] == run.progress.evaluation and made["data"]["name"] == "toy/waves"
    assert (
        f"| eval/metric/psnr | {run.progress.evaluation['eval/metric/psnr']:.4g} |" in card
        and "Measured after step 6" in card
    )
    assert "| encoder | `toy/encoder`: patch 4, dropout 0.0 |" in card and "| note | `a \\| b` |" in card
    assert f"| fingerprint | `{made['fingerprint']}` |" in card and "vqcore-toy" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "vqcore"
    # Weights that were not the measured ones carry no figures.
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "raw"), "--weights", "model"]) == 0
    assert "Not evaluated." in (tmp_path / "raw/README.md").read_text()


# ---------------------------------------------------------------------------------------------------- hub


def test_what_is_pushed_loads_by_its_id(server, capsys):
    tokenizer = make(seed=3)
    assert tokenizer.push_to_hub("me/tok") == f"{server.address}/me/tok"
    server.files("me/tok")["pickle.bin"] = b"never fetched"
    loaded, x = Tokenizer.load("hf://me/tok"), torch.randn(2, 2, 8, 8)
    assert loaded.fingerprint == tokenizer.fingerprint and torch.equal(loaded.encode(x), tokenizer.encode(x))
    assert not any("pickle.bin" in line for line in server.log)
    card = server.files("me/tok")["README.md"].decode()
    assert (
        'Tokenizer.load("hf://me/tok")' in card
        and ran(snippet(card))["tokenizer"].fingerprint == loaded.fingerprint
    )


def test_revisions(server):
    first, second = make(seed=1), make(seed=2)
    first.push_to_hub("me/tok")
    second.push_to_hub("me/tok", revision="v2")
    assert Tokenizer.load("hf://me/tok").fingerprint == first.fingerprint
    assert Tokenizer.load("hf://me/tok", revision="v2").fingerprint == second.fingerprint
    assert Tokenizer.load("hf://me/tok@v2").fingerprint == second.fingerprint
    with pytest.raises(CheckpointError, match=r"me/tok: the hub has no revision 'v3'"):
        Tokenizer.load("hf://me/tok@v3")


def test_the_command_line_takes_hub_ids(server, tmp_path, capsys, monkeypatch):
    make().push_to_hub("me/tok")
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", np.zeros((2, 8, 8), np.float32))
    assert main(["tokenize", "hf://me/tok", "in", "tokens"]) == 0
    assert main(["decode", "hf://me/tok", "tokens", "out"]) == 0
    assert np.load(tmp_path / "out/a.npy").shape == (2, 8, 8)
    assert main(["eval", "hf://me/tok", "data.name=toy/waves", "--json", "figures.json"]) == 0
    (result,) = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert result["fingerprint"] == make().fingerprint and result["metrics"]["samples"] == 24
    assert main(["export", "hf://me/tok", "mine", "--push", "me/copy"]) == 0
    assert set(server.files("me/copy")) == {
        "model.safetensors",
        "config.yaml",
        "provenance.json",
        "README.md",
    }
    assert "Tokenizer.load('hf://me/copy')" in capsys.readouterr().out
    assert main(["tokenize", "hf://me/tik", "in", "other"]) == 2
    assert "error: me/tik: the hub has no such repository" in capsys.readouterr().err
    asked = len(server.log)
    assert main(["tokenize", "me/tok", "in", "other"]) == 2
    hint = "me/tok: no such run or tokenizer. If it is on the Hugging Face hub: hf://me/tok"
    assert hint in capsys.readouterr().err and len(server.log) == asked


def test_a_folder_wins_over_the_hub_and_a_typo_in_it_stays_local(server, tmp_path):
    make().save(tmp_path / "runs/quickstart")
    assert Tokenizer.load("runs/quickstart").codebook_size == 16
    with pytest.raises(CheckpointError, match=r"Did you mean 'quickstart'"):
        Tokenizer.load("runs/quickstrat")
    assert not server.log
    with pytest.raises(CheckpointError, match="revision='v1' is for hub ids only"):
        Tokenizer.load("runs/quickstart", revision="v1")


def test_what_was_fetched_once_loads_without_the_hub(server, monkeypatch):
    make(seed=5).push_to_hub("me/tok")
    expected = Tokenizer.load("hf://me/tok").fingerprint
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert Tokenizer.load("hf://me/tok").fingerprint == expected
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Tokenizer.load("hf://me/tok").fingerprint == expected
    with pytest.raises(CheckpointError, match=r"me/other: .*\(HF_HUB_OFFLINE is set\)"):
        Tokenizer.load("hf://me/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="me/other: the hub cannot be reached"):
        Tokenizer.load("hf://me/other")


def test_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"me/tok: .* pip install huggingface_hub"):
        Tokenizer.load("hf://me/tok")


def test_a_repository_of_another_system_is_refused_with_the_way(server):
    server.repositories["you/vae"] = {"main": {"config.json": b"{}", "pytorch_model.bin": b"evil"}}
    with pytest.raises(CheckpointError, match=r"hf://you/vae is not a vqcore tokenizer; nothing"):
        Tokenizer.load("hf://you/vae")
    assert not any("pytorch_model.bin" in line for line in server.log)


# ------------------------------------------------------------------------------------------- fingerprints


def resealed(folder):
    """Checksums made anew, as somebody would who does not know of fingerprints."""
    path = folder / "provenance.json"
    made = json.loads(path.read_text())
    made["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in made["files"]}
    path.write_text(json.dumps(made | {"seal": seal(made)}))


def test_a_flipped_byte_names_file_and_both_checksums(tmp_path):
    make().save(tmp_path / "made")
    path = tmp_path / "made/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    with pytest.raises(
        CheckpointError,
        match=rf"model.safetensors: damaged.*the file is {digest[:16]}, but .* says [0-9a-f]{{16}}",
    ):
        Tokenizer.load(tmp_path / "made")


@pytest.mark.parametrize("what", ["weights", "config"])
def test_another_tokenizer_under_the_old_name_is_refused_with_both_fingerprints(tmp_path, what):
    make(seed=1).save(tmp_path / "made")
    before = json.loads((tmp_path / "made/provenance.json").read_text())["fingerprint"]
    if what == "weights":
        other = make(seed=2)
        save_tensors(tmp_path / "made/model.safetensors", weights_of(other))
    else:
        other = make(seed=1, channels_last=True)
        path = tmp_path / "made/config.yaml"
        path.write_text(path.read_text().replace("channels_last: false", "channels_last: true"))
    resealed(tmp_path / "made")
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(tmp_path / "made")
    assert other.fingerprint[:16] in str(caught.value) and before[:16] in str(caught.value)
    assert other.fingerprint != before and "\n" not in str(caught.value)


def test_the_card_may_be_edited_and_weights_of_both_kinds_load(tmp_path):
    run = train(run_config(tmp_path / "run"))
    checkpoint = resolve(run.dir).path
    (checkpoint / "README.md").write_text("# mine")
    average, raw = (Tokenizer.load(run.dir, weights=kind) for kind in ("ema", "model"))
    assert average.fingerprint != raw.fingerprint
    assert average.fingerprint == json.loads((checkpoint / "provenance.json").read_text())["fingerprint"]


# ------------------------------------------------------------------------------------------ foreign files


def foreign_file(path, tokenizer):
    torch.save({"config": to_tree(tokenizer.cfg), "tensors": tokenizer.state_dict()}, path)
    return path


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_read_unasked(tmp_path, capsys):
    path = foreign_file(tmp_path / "model.toy.pth", make())
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(path)
    line = f"Tokenizer.load({str(path)!r}, format='toy/plain', allow_pickle=True)"
    assert line in str(caught.value) and "nothing was read" in str(caught.value)
    with pytest.raises(CheckpointError, match="is a pickle: Python could run code"):
        Tokenizer.load(path, format="toy/plain")
    assert main(["export", str(path), str(tmp_path / "made")]) == 2
    command = re.search(r"or vqcore (import .*--allow-pickle)", capsys.readouterr().err)[1]
    assert main(command.replace("FOLDER", str(tmp_path / "made")).split()) == 0


def test_with_leave_a_foreign_file_is_a_tokenizer(tmp_path):
    tokenizer = make(seed=7)
    path = foreign_file(tmp_path / "model.toy.pth", tokenizer)
    loaded, x = Tokenizer.load(path, format="toy/plain", allow_pickle=True), torch.randn(2, 2, 8, 8)
    assert loaded.fingerprint == tokenizer.fingerprint and torch.equal(
        loaded.reconstruct(x), tokenizer.reconstruct(x)
    )
    loaded.save(tmp_path / "made")
    assert Tokenizer.load(tmp_path / "made").fingerprint == tokenizer.fingerprint


def test_a_pickle_with_a_program_in_it_runs_nothing(tmp_path):
    torch.save({"config": {}, "tensors": {}, "more": Evil(tmp_path / "done")}, tmp_path / "model.toy.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors and plain data"):
        Tokenizer.load(tmp_path / "model.toy.pth", format="toy/plain", allow_pickle=True)
    assert not (tmp_path / "done").exists()
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(CheckpointError, match=r"cut.pth: damaged"):
        read_pickle(tmp_path / "cut.pth", allow_pickle=True)


@pytest.mark.parametrize("name", ["model.pkl", "weights.bin", "model.safetensors", "notes.txt"])
def test_a_file_nobody_knows_is_refused_with_what_there_is(tmp_path, name):
    (tmp_path / name).write_bytes(b"...")
    with pytest.raises(
        CheckpointError, match=r"No installed format recognises it \(installed: .*toy/plain, .*\)"
    ):
        Tokenizer.load(tmp_path / name)


def test_a_file_of_an_artefact_names_its_folder(tmp_path):
    make().save(tmp_path / "made")
    with pytest.raises(CheckpointError, match=rf"give the folder: {tmp_path / 'made'}"):
        Tokenizer.load(tmp_path / "made/model.safetensors")


def test_an_unknown_format(tmp_path):
    from vqcore.errors import UnknownName

    with pytest.raises(UnknownName, match=r"has no format 'toy/plane'. Did you mean 'toy/plain'"):
        Tokenizer.load(tmp_path / "x.pth", format="toy/plane")
    with pytest.raises(CheckpointError, match=r"x.pth: no such file"):
        Tokenizer.load(tmp_path / "x.pth", format="toy/plain")


def test_a_folder_is_no_pickle(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder, not a PyTorch file"):
        read_pickle(tmp_path, allow_pickle=True)
