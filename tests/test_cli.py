"""The command line as users see it: every verb on real files, and one helpful line for every error."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.cli import VERBS, main
from vqcore.registry import registry
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.store import code_dtype
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


def pictures(folder, count=6, size=(20, 24)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"p{index}.png")
    return folder


def photo_tree(tmp_path, **changes):
    """A tiny run on a folder of pictures, written as a config file; returns the file."""
    tree = run_tree(tmp_path / "run", run__steps=2, **changes)
    tree["data"] = {
        "name": "folder",
        "path": str(tmp_path / "train"),
        "eval_path": str(tmp_path / "heldout"),
        "modality": {"name": "rgb"},
        "input_size": 16,
        "batch_size": 4,
        "workers": 0,
        **changes.get("data", {}),
    }
    file = tmp_path / "cfg.yaml"
    file.write_text(yaml.dump(tree))
    return file


@pytest.fixture
def photos(tmp_path):
    pictures(tmp_path / "train")
    pictures(tmp_path / "heldout", 3)
    return tmp_path


def test_from_photographs_to_a_used_tokenizer(photos, capsys):
    assert main(["train", str(photo_tree(photos))]) == 0
    said = capsys.readouterr().out
    assert str(photos / "run") in said and "eval/metric/psnr" in said and "vqcore tokenize" in said
    run = str(photos / "run")
    assert main(["eval", run, "--weights", "model", "eval.batch_size=2"]) == 0
    (result,) = json.loads((photos / "run/eval.json").read_text())["results"]
    assert result["size"] == [16, 16] and result["weights"] == "model"
    assert result["metrics"]["samples"] == 3 and result["metrics"]["metric/psnr"] > 0
    assert (photos / "run/samples/eval.png").is_file()

    (photos / "train/deep/er").mkdir(parents=True)
    Image.new("L", (30, 30)).save(photos / "train/deep/er/grey.JPG", format="JPEG")
    (photos / "train/broken.png").write_bytes(b"no picture")
    assert main(["tokenize", run, str(photos / "train"), str(photos / "tokens"), "--batch-size", "3"]) == 0
    assert "7 written, 0 existed already, 1 unreadable" in capsys.readouterr().out
    codes = Tokenizer.load(run).load_tokens(photos / "tokens")
    assert codes["deep/er/grey"].shape == (4, 4, 1)
    manifest = json.loads((photos / "tokens/tokens.json").read_text())
    assert manifest["fingerprint"] == Tokenizer.load(run).fingerprint and manifest["grid"] == [4, 4]
    assert manifest["dtype"] == "uint8" and manifest["rows"] == 7
    assert main(["tokenize", run, str(photos / "train"), str(photos / "tokens"), "--batch-size", "3"]) == 0
    said = capsys.readouterr().out
    assert (
        "0 written, 7 existed already, 1 unreadable" in said and "tokens/failed.txt: mend the files" in said
    )

    assert main(["decode", run, str(photos / "tokens"), str(photos / "rebuilt")]) == 0
    assert len(list((photos / "rebuilt").rglob("*.png"))) == 7
    with Image.open(photos / "rebuilt/p0.png") as rebuilt:
        tokenizer = Tokenizer.load(run)
        expected = tokenizer.show(tokenizer.reconstruct(tokenizer.read(photos / "train/p0.png")))
        assert np.array_equal(np.asarray(rebuilt), np.asarray(expected))

    assert main(["export", run, str(photos / "made")]) == 0
    assert main(["tokenize", str(photos / "made"), str(photos / "train/p0.png"), str(photos / "one")]) == 0
    assert np.array_equal(Tokenizer.load(run).load_tokens(photos / "one")["p0"], codes["p0"])


def test_other_sizes(photos):
    assert main(["train", str(photo_tree(photos))]) == 0
    run = str(photos / "run")
    assert main(["tokenize", run, str(photos / "train"), str(photos / "wide"), "--size", "16x24"]) == 0
    assert Tokenizer.load(run).load_tokens(photos / "wide")["p0"].shape == (4, 6, 1)
    assert main(["decode", run, str(photos / "wide"), str(photos / "rebuilt")]) == 0
    with Image.open(photos / "rebuilt/p0.png") as rebuilt:
        assert rebuilt.size == (24, 16)


def test_code_dtypes_are_the_smallest_that_hold_the_codebook():
    assert [str(code_dtype(k)) for k in (2, 256, 257, 65536, 65537)] == [
        "uint8", "uint8", "uint16", "uint16", "uint32",
    ]  # fmt: skip


def other_tokens(photos):
    assert main(["train", str(photo_tree(photos, run__seed=1)), f"run.dir={photos / 'other'}"]) == 0
    assert main(["tokenize", str(photos / "other"), str(photos / "train"), str(photos / "tokens")]) == 0


def test_tokens_of_another_tokenizer_are_not_mixed_in(photos, capsys):
    assert main(["train", str(photo_tree(photos))]) == 0
    other_tokens(photos)
    run, tokens = str(photos / "run"), str(photos / "tokens")
    capsys.readouterr()
    assert main(["tokenize", run, str(photos / "train"), tokens]) == 2
    assert (
        "tokens holds other codes (different: fingerprint). Choose another folder." in capsys.readouterr().err
    )
    assert main(["decode", run, tokens, str(photos / "rebuilt")]) == 2
    assert "were made by another tokenizer" in capsys.readouterr().err
    assert not (photos / "rebuilt").exists()
    assert main(["decode", run, tokens, str(photos / "rebuilt"), "--force"]) == 0


def test_codes_that_cannot_be(photos, capsys):
    assert main(["train", str(photo_tree(photos))]) == 0
    for name, array, message in (
        ("range", np.full((4, 4, 1), 99, np.uint8), "code 99 is out of range: codes lie in [0, 16)"),
        ("float", np.zeros((4, 4, 1)), "not float64 of shape [4, 4, 1]"),
        ("axis", np.zeros((4, 4), np.uint8), "not uint8 of shape [4, 4]"),
    ):
        np.save(photos / f"{name}.npy", array)
        assert (
            main(["decode", str(photos / "run"), str(photos / f"{name}.npy"), str(photos / "rebuilt")]) == 2
        )
        assert message in capsys.readouterr().err, name


# Errors before training: overrides of the config file of `photo_tree`, a change to the files, a part of the message.
WRONG = {
    "unknown plugin": (["model.encoder={name: vti/encoder}"], None, "model.encoder.name: no plugin 'vti'."),
    "unknown component": (
        ["model.encoder={name: toy/encodr}"],
        None,
        "command line: model.encoder.name: vqcore-toy 0.0 has no encoder 'toy/encodr'. Did you mean 'toy/encoder'?",
    ),
    "wrong kind": (
        ["model.encoder={name: toy/decoder}"],
        None,
        "command line: model.encoder.name: 'toy/decoder' is a decoder; model.encoder needs an encoder.",
    ),
    "unknown key": (
        ["model.quantizer.codebok_size=8"],
        None,
        "command line: model.quantizer.codebok_size is not a setting of toy/quantizer. Did you mean 'codebook_size'?",
    ),
    "type": (["optim.lr=fast"], None, "command line: optim.lr='fast' is not a number or null."),
    "out of range": (["run.steps=0"], None, "steps=0 must be at least 1"),
    "contradiction": (["run.epochs=2"], None, "give either steps or epochs"),
    "override": (["run.steps"], None, "command line: 'run.steps' is not a setting; write key.path=value."),
    "not a mapping": ([], lambda p: (p / "cfg.yaml").write_text("- a\n- b\n"), "a config is a mapping"),
    "broken": ([], lambda p: (p / "cfg.yaml").write_text("run: {dir: a"), "not valid YAML"),
    "binary": ([], lambda p: (p / "cfg.yaml").write_bytes(b"\xff\xfe\x00\x01"), "not a text file"),
    "no file": (
        [],
        lambda p: (p / "cfg.yaml").rename(p / "cgf.yaml"),
        "there is no such file. Did you mean 'cgf.yaml'?",
    ),
    "data missing": ([], lambda p: (p / "train").rename(p / "trains"), "data.path"),
    "data empty": ([], lambda p: [f.unlink() for f in (p / "train").iterdir()], "data.path"),
    "nothing readable": (
        [],
        lambda p: [f.rename(f.with_suffix(".txt")) for f in (p / "train").iterdir()],
        ".txt",
    ),
    "eval missing": ([], lambda p: (p / "heldout").rename(p / "other"), "data.eval_path"),
    "eval not given": (
        ["data.eval_path=null", "eval.every=1"],
        None,
        "Set data.eval_share=0.1 or data.eval_path.",
    ),
    "size": (
        ["data.input_size=18"],
        None,
        "model.encoder (toy/encoder): size [18, 18] is no multiple of the patch 4",
    ),
    "run folder is a file": ([], lambda p: (p / "run").write_text("mine"), "run is a file, not a folder."),
    "run folder unwritable": (
        ["run.dir=/dev/null/run"],
        None,
        "run.dir=/dev/null/run cannot be written: Not a directory.",
    ),
    "run folder of another": (
        [],
        lambda p: ((p / "run").mkdir(), (p / "run" / "notes.txt").write_text("mine")),
        "holds something else (notes.txt). Choose another folder.",
    ),
    "weight without a loss": (
        ["objective.weights={pixel/mes: 2}"],
        None,
        "objective.weights: no loss is called 'pixel/mes'. Did you mean 'pixel/mse'?",
    ),
    "device": (["run.device=cuda:7"], None, "run.device=cuda:7: this torch sees no CUDA device"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_go_wrong_says_so_in_one_line(photos, capsys, case):
    overrides, change, message = WRONG[case]
    file = photo_tree(photos)
    if change:
        change(photos)
    before = {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()}
    assert main(["train", str(file), *overrides]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    after = {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()}
    assert after == before


def test_a_checkpoint_cut_in_half(photos, capsys):
    assert main(["train", str(photo_tree(photos))]) == 0
    path = photos / "run/checkpoints/step_2/model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()}
    capsys.readouterr()
    for argv in (
        ["eval", str(photos / "run")],
        ["tokenize", str(photos / "run"), str(photos / "train"), str(photos / "tokens")],
        ["decode", str(photos / "run"), str(photos / "train"), str(photos / "rebuilt")],
        ["export", str(photos / "run"), str(photos / "made")],
        ["train", str(photos / "cfg.yaml")],
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and "model.safetensors: damaged" in error
    assert before == {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "nowhere"], "nowhere: no such run or tokenizer."),
        (["tokenize", "nowhere", "a", "b"], "nowhere: no such run or tokenizer."),
        (["show", "encodr"], "no component or section 'encodr'."),
        (["show", "toy/encodr"], "Did you mean 'toy/encoder'?"),
        (["plugins", "toi"], "no plugin 'toi'. Did you mean 'toy'?"),
        (["config"], "no config given"),
        (["plugins", "--plugin", "none.py"], "--plugin none.py: there is no such file."),
    ],
)
def test_wrong_words_after_a_verb(capsys, argv, message):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_help_and_usage(capsys):
    assert main([]) == 0
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert f"example: vqcore {verb} " in " ".join(capsys.readouterr().out.split())
    assert main(["trian", "x"]) == 2
    assert main(["train"]) == 2
    assert main(["show", "rgb", "--colour"]) == 2


def test_overrides_may_stand_behind_options(photos):
    file = str(photo_tree(photos))
    assert main(["train", file, "--debug", "run.steps=1"]) == 0
    assert (photos / "run/checkpoints/step_1").is_dir()


def test_an_export_is_measured_and_never_overwritten(photos, capsys):
    assert main(["train", str(photo_tree(photos))]) == 0
    assert main(["export", str(photos / "run"), str(photos / "made")]) == 0
    assert main(["eval", str(photos / "made")]) == 2
    told = capsys.readouterr().err
    assert ".../heldout" in told and "To measure it on your own data: data.eval_path=" in told
    assert main(["eval", str(photos / "made"), f"data.eval_path={photos / 'heldout'}"]) == 0
    assert "psnr" in capsys.readouterr().out
    for name in ("README.md", "provenance.json", "config.yaml"):
        assert str(photos) not in (photos / "made" / name).read_text()
    assert main(["export", str(photos / "run"), str(photos / "made")]) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err


def test_show_and_config_and_plugins(photos, capsys):
    assert main(["show", "rgb"]) == 0
    shown = capsys.readouterr().out
    assert "hflip" in shown and "min_crop_scale" in shown and "modality" in shown
    assert main(["config", str(photo_tree(photos)), "run.steps=7", "--origin"]) == 0
    origin = capsys.readouterr().out.splitlines()
    assert "run.steps=7  # command line" in origin
    assert any(line.startswith("optim.eps=1e-08  # default") for line in origin)
    assert main(["plugins", "toy", "core"]) == 0
    assert "toy/encoder" in capsys.readouterr().out
    assert main(["config", "--list"]) == 0
    assert "recipe:quickstart" in capsys.readouterr().out


def test_a_plugin_from_a_file(photos, capsys):
    mine = photos / "mine.py"
    mine.write_text(
        "from vqcore.plugin import Component, Plugin, hookimpl\n"
        "from vqcore_toy.parts import Quantizer as Mine\n"
        "@hookimpl\n"
        "def vqcore_plugin():\n"
        "    return Plugin(1, 'mine', (Component('quantizer', 'mine', ':Mine', 'my own'),))\n"
    )
    try:
        argv = ["train", str(photo_tree(photos)), "--plugin", str(mine), "model.quantizer={name: local/mine}"]
        assert main(argv) == 0
    finally:
        registry.cache_clear()
    made = json.loads((photos / "run/provenance.json").read_text())["components"]["model.quantizer"]
    assert made["name"] == "local/mine" and len(made["sha256"]) == 64


def test_bugs_show_their_traceback(monkeypatch, capsys):
    import vqcore.commands.show as show

    monkeypatch.setattr(show, "run", lambda args: 1 / 0)
    assert main(["show", "rgb"]) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "this is a bug" in error


def test_a_toy_run_is_a_run(tmp_path):
    """`run_config` and the command line agree on what a config means."""
    assert train(run_config(tmp_path / "run", run__steps=1)).step == 1


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(photos, monkeypatch):
    """A shell does not expand `~` after `=`, and the README has a command with `~` there."""
    file = photo_tree(photos)
    monkeypatch.setenv("HOME", str(photos))
    argv = ["data.path=~/train", "data.eval_path=~/heldout", "run.dir=~/mine"]
    assert main(["train", str(file), *argv]) == 0
    assert (photos / "mine/checkpoints/step_2").is_dir()
