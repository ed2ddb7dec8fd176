"""What a user names and what is taken: the parser of names, the checkpoint that counts, files of other systems."""

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hubserver import serving
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.artefacts.folder import CONFIG, EVALUATION
from vqcore.artefacts.formats import read_pickle
from vqcore.artefacts.resolve import Place, best_checkpoint, best_step, parse, resolve
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.compose.describe import dump
from vqcore.compose.layers import load
from vqcore.config import to_tree
from vqcore.errors import CheckpointError, ConfigError
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


def boxes(**settings):
    return registry().load("format", "toy/boxes").Config(name="toy/boxes", **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints after steps 2, 4 and 6, and its tokenizer exported as a toy box, with a prefix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent / "fixtures" / "toy"))
        registry.cache_clear()
        folder = tmp_path_factory.mktemp("trained")
        train(run_config(folder / "run"))
        (folder / "in").mkdir()
        for number in range(3):
            np.save(folder / f"in/{number}.npy", np.random.default_rng(number).uniform(-1, 1, (2, 8, 8)))
        argv = ["export", str(folder / "run"), str(folder / "box"), "--format", "toy/boxes", "prefix=a.b."]
        assert main(argv) == 0
        registry.cache_clear()
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


# --------------------------------------------------------------------------------------------- the parser


@pytest.mark.parametrize(
    ("name", "place", "settings"),
    [
        ("run", Place("run"), None),
        ("nowhere", Place("nowhere"), None),
        ("run@step_4", Place("run", step=4), None),
        ("run@step_99", Place("run", step=99), None),
        ("run@step_4x", Place("run@step_4x"), None),
        ("run@v2", Place("run@v2"), None),
        ("box@step_4", Place("box@step_4"), None),  # no run
        ("nowhere@step_4", Place("nowhere@step_4"), None),
        ("odd@step_4", Place("odd@step_4"), None),  # it exists
        ("hf://me/tok", Place("me/tok", hub=True), None),
        ("hf://me/tok@v1", Place("me/tok", hub=True, revision="v1"), None),
        ("hf://me/tok@refs/pr/1", Place("me/tok", hub=True, revision="refs/pr/1"), None),
        ("hf://run/tok", Place("run/tok", hub=True), None),
        ("me/tok", Place("me/tok"), None),
        ("me/tok@v1", Place("me/tok@v1"), None),
        ("C:\\x\\y", Place("C:\\x\\y"), None),
        ("C:/x", Place("C:/x"), None),
        ("s3://bucket/x", Place("s3://bucket/x"), None),
        ("recipe:base/vqvae", Place("recipe:base/vqvae"), None),
        ("toy/encoder:x.pth", Place("toy/encoder:x.pth"), None),  # no format
        ("toy/boxes", Place("toy/boxes"), None),
        ("./toy/boxes:x", Place("./toy/boxes:x"), None),
        ("toy/boxes:box", Place("box"), {}),
        ("toy/boxes:a:b", Place("a:b"), {}),
        ("toy/boxes:run@step_4", Place("run@step_4"), {}),
        ("toy/boxes:hf://you/box@v3", Place("you/box", hub=True, revision="v3"), {}),
        ("toy/boxes[]:box", Place("box"), {}),
        ("toy/boxes[drop=2]:box", Place("box"), dict(drop=2)),
        ("toy/boxes[drop=2, prefix=x,y]:box", Place("box"), dict(drop=2, prefix="x,y")),
        ("toy/boxes[prefix='[1]',drop=1]:b]:c", Place("b]:c"), dict(drop=1, prefix="[1]")),
        ("toy/boxes:there", Place("toy/boxes:there"), None),  # it exists
    ],
)  # fmt: skip
def test_names(tmp_path, trained, monkeypatch, name, place, settings):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained / "run")
    (tmp_path / "box").symlink_to(trained / "box")
    (tmp_path / "toy").mkdir()
    for existing in ("odd@step_4", "toy/boxes:there"):
        (tmp_path / existing).touch()
    format_ = None if settings is None else boxes(**settings)
    assert parse(name) == replace(place, format=format_)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rum", r"rum: no such run or tokenizer. Did you mean 'run'\?"),
        ("rum@step_4", r"rum@step_4: no such run or tokenizer. Did you mean 'run'\?"),
        ("run@step_3", r"run@step_3: run has no checkpoint of step 3. It has: 2, 4, 6."),
        ("me/tok", r"me/tok: no such run or tokenizer. If it is on the Hugging Face hub: hf://me/tok$"),
        ("toy/boxes:me/tok", r"no such file. If it is on the Hugging Face hub: toy/boxes:hf://me/tok$"),
        ("hf://me", r"hf://me is no hub id; write hf://user/name or"),
        ("toy/boxes[drpo=1]:box", r"^toy/boxes\[drpo=1\]:box: drpo is not a setting of toy/boxes. Did you mean 'drop'"),
        ("toy/boxes[drop=x]:box", r"^toy/boxes\[drop=x\]:box: drop='x' is not an integer"),
        ("toy/boxes[drop]:box", r"'drop' is not a setting; write key=value"),
        ("toy/boxs:box", r"no such run or tokenizer, and .* has no format 'toy/boxs'. Did you mean 'toy/boxes'"),
        ("fourmm/checkpoint:box", r"no such run or tokenizer, and no plugin 'fourmm'"),
        ("toy/boxes:bix", r"toy/boxes:bix: no such file. Did you mean 'box'"),
        ("toy/boxes:run", r"run: no toy box"),
        ("toy/boxes[prefix=x]:box", r"toy/boxes\[prefix=x\]:box: its weights do not fit its config"),
        ("toy/notes:box", r"toy/notes reads training configs, not tokenizers: vqcore import toy/notes box FILE.yaml"),
    ],
)  # fmt: skip
def test_names_of_nothing(here, name, text):
    with pytest.raises((CheckpointError, ConfigError), match=text) as caught:
        Tokenizer.load(name)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------- the checkpoint that counts


def evaluated(run, step, value, best="metric/psnr", better="higher", protocol="one"):
    """Write what the trainer writes into a checkpoint after its evaluation."""
    record = {"step": step, "best": best, "value": value, "better": better, "protocol": {"set": protocol}}
    (run / f"checkpoints/step_{step}" / EVALUATION).write_text(json.dumps({**record, "metrics": {}}))


def asking(folder, best):
    """A run of three checkpoints whose config asks for the best by a metric."""
    train(run_config(folder / "run"))
    tree = yaml.safe_load((folder / "run" / CONFIG).read_text())
    tree["eval"]["best"] = best
    (folder / "run" / CONFIG).write_text(yaml.safe_dump(tree))
    return folder / "run"


def test_the_last_checkpoint_counts_unless_the_config_asks(tmp_path):
    run = asking(tmp_path, None)
    evaluated(run, 2, 99.0)
    assert (resolve(run).path.name, resolve(run).why) == ("step_6", "step 6, the last checkpoint")
    assert best_step(run, None) is None


NAN = float("nan")


@pytest.mark.parametrize(
    ("entries", "best"),
    [
        ([(2, 1.0), (4, 3.0), (6, 2.0)], 4),
        ([(2, 1.0), (4, 1.0), (6, 0.5)], 4),  # of equal values the later
        ([(2, NAN), (4, 1.0), (6, NAN)], 4),
        ([(2, NAN)], None),
        ([(2, None), (4, 1.0)], 4),
        ([(2, 3.0), (4, 2.0)], 2),  # the last one was not evaluated
        ([(2, 9.0, {"protocol": "other"}), (4, 1.0), (6, 0.5)], 4),
        ([(2, 9.0), (4, 8.0), (6, 1.0, {"protocol": "other"})], 6),  # the newest is the reference
        ([(2, 9.0, {"best": "loss/pixel/mse", "better": "lower"}), (4, 1.0), (6, 0.5)], 4),
        ([(6, 9.0, {"best": "loss/pixel/mse", "better": "lower"})], None),
        ([(2, 9.0, {"better": None}), (4, 1.0)], 4),
        ([(2, 3.0, {"better": "lower"}), (4, 1.0, {"better": "lower"}), (6, 1.5, {"better": "lower"})], 4),
        ([], None),
    ],
)
def test_the_best_checkpoint(tmp_path, entries, best):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoints/step_{step}").mkdir(parents=True)
    for step, value, *more in entries:
        evaluated(tmp_path, step, value, **(more[0] if more else {}))
    assert best_step(tmp_path, "metric/psnr") == best


def test_damaged_evaluations_do_not_count(tmp_path):
    for step, text in ((2, "{"), (4, "[1]")):
        (tmp_path / f"checkpoints/step_{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step}" / EVALUATION).write_text(text)
    assert best_checkpoint(tmp_path, "metric/psnr") is None


@pytest.mark.slow
def test_every_verb_says_which_checkpoint_it_took_and_why(tmp_path, capsys, monkeypatch):
    run = asking(tmp_path, "metric/psnr")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", np.zeros((2, 8, 8), np.float32))
    assert (
        resolve(run).why == "step 6, the last checkpoint, because no checkpoint was evaluated by metric/psnr"
    )
    evaluated(run, 2, 24.5)
    evaluated(run, 6, 23.0)
    by = {step: Tokenizer.load(run / f"checkpoints/step_{step}") for step in (2, 4, 6)}
    assert Tokenizer.load("run").fingerprint == by[2].fingerprint
    for name, step, why in (
        ("run", 2, "step 2, the best by metric/psnr (24.5)"),
        ("run@step_4", 4, "step 4, as named"),
        ("run/checkpoints/step_6", 6, "step 6, as named"),
    ):
        commands = (
            ["tokenize", name, "in", f"tokens{step}"],
            ["decode", name, f"tokens{step}", f"out{step}"],
            ["eval", name],
            ["export", name, f"made{step}"],
        )
        for argv in commands:
            assert main(argv) == 0
            assert f"{name}: {why}\n" in capsys.readouterr().out
        made = Tokenizer.load(f"made{step}")
        assert made.fingerprint == by[step].fingerprint and made.taken == ""
        assert json.loads((run / "eval.json").read_text())["checkpoint"] == f"step_{step}"
    assert main(["eval", "--compare", "run@step_4", "made4"]) == 0
    assert "equal" in capsys.readouterr().out


def test_a_damaged_config_leaves_open_which_checkpoint_counts(tmp_path):
    run = asking(tmp_path, "metric/psnr")
    (run / CONFIG).write_text("eval: [")
    with pytest.raises(CheckpointError, match=r"nobody knows which checkpoint of this run counts; name one"):
        Tokenizer.load(run)
    assert Tokenizer.load(f"{run}@step_4").taken == "step 4, as named"


# -------------------------------------------------------------------------------------- files of other systems

BOX = "toy/boxes[prefix=a.b.]:box"


def codes(folder):
    return {path.name: np.load(path) for path in sorted(folder.glob("*.npy"))}


def test_out_and_in_again_the_codes_are_equal(here, tmp_path, capsys):
    assert sorted(path.name for path in (here / "box").iterdir()) == ["toybox.json", "toybox.safetensors"]
    assert main(["import", "toy/boxes", "box", str(tmp_path / "back"), "prefix=a.b."]) == 0
    assert f"next      vqcore eval {tmp_path / 'back'} data.eval_path=FOLDER" in capsys.readouterr().out
    names = ("run", str(tmp_path / "back"), BOX)
    for number, name in enumerate(names):
        assert main(["tokenize", name, "in", str(tmp_path / f"tokens{number}"), "--store", "folder"]) == 0
    ours, *others = (codes(tmp_path / f"tokens{number}") for number in range(len(names)))
    assert len(ours) == 3
    for theirs in others:
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_a_format_reads_in_every_verb(here, tmp_path, capsys):
    assert main(["tokenize", BOX, "in", str(tmp_path / "tokens")]) == 0
    assert main(["decode", BOX, str(tmp_path / "tokens"), str(tmp_path / "out")]) == 0
    assert len(codes(tmp_path / "out")) == 3
    figures = tmp_path / "figures.json"
    assert main(["eval", BOX, "data.name=toy/waves", "--json", str(figures)]) == 0
    (result,) = json.loads(figures.read_text())["results"]
    assert result["fingerprint"] == Tokenizer.load("run").fingerprint and result["metrics"]["samples"] == 24
    assert main(["export", BOX, str(tmp_path / "made")]) == 0
    assert main(["eval", "--compare", BOX, str(figures), "data.name=toy/waves"]) == 0
    assert "equal" in capsys.readouterr().out
    assert main(["export", BOX, str(tmp_path / "box"), "--format", "toy/boxes"]) == 0
    assert Tokenizer.load(f"toy/boxes:{tmp_path / 'box'}").fingerprint == result["fingerprint"]
    with pytest.raises(CheckpointError, match="weights=ema is for checkpoints of ours"):
        Tokenizer.load(BOX, weights="ema")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "mapping"])
def test_a_run_starts_from_foreign_weights(here, tmp_path, capsys, form):
    given = BOX if form == "text" else {"name": "toy/boxes", "path": "box", "prefix": "a.b."}
    tree = run_tree(tmp_path / "new", model__full_ckpt=given, model__freeze_enc=True, run__steps=1)
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(tree))
    assert main(["check", str(tmp_path / "new.yaml")]) == 0
    assert main(["train", str(tmp_path / "new.yaml")]) == 0
    said = capsys.readouterr().out
    shown = BOX if form == "text" else "box"
    assert f"model.full_ckpt: encoder, proj, quantizer, decoder from {shown}." in said
    assert Tokenizer.load(tmp_path / "new").fingerprint == Tokenizer.load("run").fingerprint
    config = load(str(tmp_path / "new.yaml"), schema=RunConfig).config
    assert from_tree(yaml.safe_load(dump(config)), schema=RunConfig) == config
    assert to_tree(config)["model"]["full_ckpt"] == given
    # The same command finds this very run, finished.
    assert main(["train", str(tmp_path / "new.yaml")]) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("{name: toy/boxes, path: box, drpo: 1}", "model.full_ckpt.drpo is not a setting of toy/boxes. Did you mean"),
        ("{name: toy/boxes, path: box, drop: x}", "model.full_ckpt.drop='x' is not an integer"),
        ("{name: toy/boxs, path: box}", "model.full_ckpt: .* has no format 'toy/boxs'. Did you mean 'toy/boxes'"),
        ("{name: toy/boxes}", "model.full_ckpt needs a name, the format, and a path"),
        ("{path: box}", "model.full_ckpt needs a name, the format, and a path"),
        ("toy/boxes:bix", "model.full_ckpt: toy/boxes:bix: no such file. Did you mean 'box'"),
        ("run@step_3", "model.full_ckpt: run@step_3: run has no checkpoint of step 3"),
    ],
)  # fmt: skip
def test_foreign_weights_that_cannot_be(here, tmp_path, capsys, given, text):
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(run_tree(tmp_path / "new")))
    assert main(["train", str(tmp_path / "new.yaml"), f"model.full_ckpt={given}"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(text, error)
    assert not (tmp_path / "new").exists()


def test_the_origin_stands_in_provenance_and_card_and_survives(here, tmp_path):
    loaded = Tokenizer.load(BOX)
    files = {
        name: hashlib.sha256((here / "box" / name).read_bytes()).hexdigest()
        for name in ("toybox.json", "toybox.safetensors")
    }
    origin = {"source": "box", "licence": "MIT", "sha256": files}
    loaded.save(tmp_path / "one")
    Tokenizer.load(tmp_path / "one").save(tmp_path / "two")
    for name in ("one", "two"):
        text = (tmp_path / name / "provenance.json").read_text()
        assert json.loads(text)["origin"] == origin and str(here) not in text.partition('"files"')[0].replace(
            json.dumps(json.loads(text)["command"]), ""
        )
        card = (tmp_path / name / "README.md").read_text()
        assert "| origin: licence | `MIT` |" in card and files["toybox.json"] in card


def test_a_file_has_one_hash(here, tmp_path):
    tokenizer = Tokenizer.load("run")
    torch.save({"config": to_tree(tokenizer.cfg), "tensors": tokenizer.state_dict()}, tmp_path / "x.toy.pth")
    loaded = Tokenizer.load(f"toy/plain:{tmp_path}/x.toy.pth", allow_pickle=True)
    digest = hashlib.sha256((tmp_path / "x.toy.pth").read_bytes()).hexdigest()
    assert loaded.origin == {"origin": {"source": "x.toy.pth", "sha256": digest}}


def test_foreign_files_on_the_hub(here, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        files = {path.name: path.read_bytes() for path in (here / "box").iterdir()}
        server.repositories["you/box"] = {"main": {**files, "evil.pth": b"..."}, "v2": files}
        name = "toy/boxes[prefix=a.b.]:hf://you/box@v2"
        loaded = Tokenizer.load(name)
        assert loaded.fingerprint == Tokenizer.load("run").fingerprint
        source = loaded.origin["origin"]["source"]
        assert source.startswith("hf://you/box@") and len(source.partition("@")[2]) == 40
        assert main(["import", "toy/boxes", "hf://you/box", str(tmp_path / "made"), "prefix=a.b."]) == 0
        assert not any("evil.pth" in line for line in server.log)
        settings = {"name": "toy/boxes", "prefix": "a.b."}
        again = Tokenizer.load("hf://you/box", revision="v2", format=settings)
        assert again.fingerprint == loaded.fingerprint


def test_nothing_half_written_and_nothing_overwritten(here, tmp_path, capsys, monkeypatch):
    argv = ["export", "run", str(tmp_path / "box"), "--format", "toy/boxes"]
    cls = registry().load("format", "toy/boxes")

    def broken(self, tokenizer, folder):
        (folder / "toybox.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cls, "write", broken)
        assert main(argv) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(argv) == 0
    before = (tmp_path / "box/toybox.json").read_bytes()
    assert main(argv) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "box/toybox.json").read_bytes() == before
    assert main(["import", "toy/boxes", str(tmp_path / "box"), str(tmp_path / "box")]) == 2


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["export", "run", "x", "--format", "toy/plain"],
         "toy/plain reads files and writes none. Installed formats that write: "),
        (["export", "run", "x", "--format", "toy/boxes", "drpo=1"],
         "command line: drpo is not a setting of toy/boxes. Did you mean 'drop'"),
        (["export", "run", "x", "drop=1"], "command line: 'drop=1': export takes settings of a format only"),
        (["export", "run", "x", "--format", "toy/boxes", "--push", "me/x"], "--push uploads an artefact of ours"),
        (["import", "toy/boxes", "box"], "import needs a format, a source and a new folder"),
        (["import"], "toy/plain, toy/boxes, toy/notes."),
        (["import", "toy/boxes", "box", "x", "drpo=1"],
         "command line: drpo is not a setting of toy/boxes. Did you mean 'drop'"),
        (["import", "toy/boxes", "box", "x", "y"], "command line: 'y' is not a setting; write key=value."),
        (["import", "toy/boxes", "bix", "x"], "bix: no such file. Did you mean 'box'?"),
        (["import", "toy/bxes", "box", "x"], "has no format 'toy/bxes'. Did you mean 'toy/boxes'?"),
        (["import", "toy/boxes", "box", "x.yaml"], "toy/boxes reads tokenizers, not training configs; give a folder"),
        (["import", "toy/boxes", "box", "--list"], "--list takes a format alone"),
        (["tokenize", "box", "in", "x"], "box is not a vqcore tokenizer; nothing was read. It looks like toy/boxes: "),
        (["tokenize", "in/a.toyrc", "in", "x"],
         "It looks like a training config of toy/notes: vqcore import toy/notes in/a.toyrc FILE.yaml"),
    ],
)  # fmt: skip
def test_wrong_commands(here, capsys, argv, text):
    (here / "in/a.toyrc").touch()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert text in error and len(error.splitlines()) == 1 and not (here / "x").exists()


def test_published_weights_are_listed(capsys):
    assert main(["import", "toy/boxes", "--list"]) == 0
    said = capsys.readouterr().out
    assert "hf://toys/small-box  8 x 8 waves, MIT\n" in said and "hf://toys/large-box\n" in said
    assert main(["import", "--list"]) == 0
    everything = capsys.readouterr().out
    assert said in everything and "toy/plain" in everything and "toy/notes" in everything


def test_a_foreign_training_config_becomes_one_of_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.toyrc").write_text("steps 3\nnote ${a}\n")
    assert main(["import", "toy/notes", "old.toyrc", "new.yaml", "lr=0.02"]) == 0
    digest = hashlib.sha256((tmp_path / "old.toyrc").read_bytes()).hexdigest()
    first = (tmp_path / "new.yaml").read_text().splitlines()[0]
    assert first == f"# From old.toyrc (SHA-256 {digest}), read by toy/notes."
    config = load("new.yaml", schema=RunConfig).config
    assert (config.run.steps, config.optim.lr, config.run.dir) == (3, 0.02, "runs/new")
    assert config.data.note == "${a}"
    assert "next      vqcore check new.yaml" in capsys.readouterr().out
    assert main(["train", "new.yaml"]) == 0
    assert main(["import", "toy/notes", "old.toyrc", "new.yaml"]) == 2
    assert "new.yaml exists already" in capsys.readouterr().err
    for steps, text in (("0", "run.steps=0 must be at least 1"), ("x", "no toy notes")):
        (tmp_path / "old.toyrc").write_text(f"steps {steps}\n")
        assert main(["import", "toy/notes", "old.toyrc", "other.yaml"]) == 2
        assert text in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.yaml", "old.toyrc", "runs"]


# ----------------------------------------------------------------------------------------------------- pickles


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("flag", [[], ["--allow-pickle"]])
def test_a_pickle_with_a_program_in_it_is_refused_by_name_and_runs_nothing(here, tmp_path, capsys, flag):
    path = tmp_path / "model.toy.pth"
    torch.save({"config": {}, "tensors": {}, "more": Evil(tmp_path / "done")}, path)
    name, config = f"toy/plain:{path}", tmp_path / "new.yaml"
    config.write_text(yaml.safe_dump(run_tree(tmp_path / "new", model__full_ckpt=name)))
    text = (
        "holds more than tensors and plain data: posix.mkdir"
        if flag
        else "is a pickle: Python could run code"
    )
    for argv in (
        ["import", "toy/plain", str(path), str(tmp_path / "made")],
        ["export", name, str(tmp_path / "made")],
        ["tokenize", name, "in", str(tmp_path / "tokens")],
        ["decode", name, "in", str(tmp_path / "out")],
        ["eval", name, "data.name=toy/waves"],
        ["train", str(config)],
        ["eval", "--compare", name, name],
    ):
        assert main([*argv, *flag]) == 2
        error = capsys.readouterr().err
        assert text in error and len(error.splitlines()) == 1
    assert main(["check", str(config), *flag]) == 2
    assert text in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.toy.pth", "new.yaml"]


def test_a_harmless_pickle_is_read_with_the_flag_alone(here, tmp_path, capsys):
    tokenizer = Tokenizer.load("run")
    path = tmp_path / "x.toy.pth"
    torch.save({"config": to_tree(tokenizer.cfg), "tensors": tokenizer.state_dict()}, path)
    tree = run_tree(tmp_path / "new", model__full_ckpt=f"toy/plain:{path}", run__steps=1)
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(tree))
    for argv in (
        ["tokenize", f"toy/plain:{path}", "in", str(tmp_path / "tokens")],
        ["eval", f"toy/plain:{path}", "data.name=toy/waves"],
        ["check", str(tmp_path / "new.yaml")],
        ["train", str(tmp_path / "new.yaml")],
    ):
        assert main(argv) == 2
        assert main([*argv, "--allow-pickle"]) == 0
        if argv[0] == "tokenize":
            assert f"{tmp_path / 'tokens'} rebuilt --allow-pickle" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"\x80\x04\x95", b"PK\x03\x04 cut", b"\x00" * 64])
def test_a_damaged_pickle(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x.pth: damaged, or not a PyTorch file") as caught:
        read_pickle(tmp_path / "x.pth", allow_pickle=True)
    assert "\n" not in str(caught.value)
