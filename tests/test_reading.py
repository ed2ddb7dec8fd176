"""Everything that is read from a folder or a hub: bounds, shapes, seals, broken runs, harmful names."""

import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore import reading
from vqcore.artefacts.folder import load_tensors, save_tensors, seal, sha256, verify
from vqcore.artefacts.provenance import without_places
from vqcore.cli import main
from vqcore.compose.build import saved_tree
from vqcore.console import command
from vqcore.data.npy import map_array, read_array, read_member
from vqcore.errors import CheckpointError, ConfigError, DataError, printable
from vqcore.pictures import strip_rows
from vqcore.reading import Each, misfit, parsed, read_json
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


# Bounds of YAML and JSON

BOMB = "a0: &a0 1\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
YAML = {
    "aliases of aliases": (BOMB, "more than 50,000 values, aliases repeated"),
    "merged aliases": (
        BOMB.replace("[", "{<<: [").replace("]", "]}").replace("&a0 1", "&a0 {x: 1}"),
        "more than 50,000 values",
    ),
    "an alias of itself": ("a: &a {b: *a}", "YAML recursive aliases are not supported"),
    "deep": ("a: " + "[" * 100 + "]" * 100, "more than 64 levels"),
    "very deep": ("a: " + "[" * 100_000, "more than 64 levels"),
    "long": ("a: " + "x" * (1 << 20), "has 1,048,579 bytes; such a file has at most 1,048,576"),
    "a long number": ("a: " + "9" * 5000, "a number of 5,000 letters"),
    "sixties": ("a: " + "1:" * 400_000 + "1", "a number of 800,001 letters"),
    "an object": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "a reference": ("a: [{b: '${oc.env:HOME}'}]", "a.0.b: a saved config has no references"),
    "a list": ("- a", "a config is a mapping"),
    "a set": ("!!set {a, b}", "a config is a mapping"),
    "nothing": ("", "a config is a mapping"),
    "binary": (b"\xff\xfe", "this is not a text file in UTF-8"),
}


@pytest.mark.parametrize(("text", "says"), YAML.values(), ids=list(YAML))
def test_a_saved_config_has_bounds(tmp_path, text, says):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        saved_tree(path)
    assert str(caught.value).startswith(str(path)) and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_only_looks_like_a_reference_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: \\${x}\nb: '\\\\\\${y}'\nc: &c [1]\nd: *c\n")
    assert saved_tree(tmp_path / "a.yaml")["d"] == [1]


@pytest.mark.parametrize("text, says", [
    ("[" * 65 + "]" * 65, "more than 64 levels"),
    ("[" * 200_000 + "]" * 200_000, "more than 64 levels"),
    ('{"a": ' * 65 + "1" + "}" * 65, "more than 64 levels"),
    ("9" * 5000, "not valid JSON: Exceeds the limit"),
    ("{", "not valid JSON"),
    ("", "not valid JSON"),
])  # fmt: skip
def test_json_has_bounds(text, says):
    with pytest.raises(ValueError, match=says):
        parsed(text)


def test_json_within_the_bounds():
    assert parsed("[" * 64 + "]" * 64) and parsed('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("value, shape, says", [
    ({"a": 1}, {"a": int, "b?": str}, ""),
    ({"a": 1, "more": 2}, {"a": int}, ""),
    ({}, {"a": int}, "the content has no 'a'"),
    ([], {"a": int}, "the content is a list, not a mapping"),
    ({"a": True}, {"a": int}, "a is true or false, not a whole number"),
    ({"a": 1.5}, {"a": int}, "a is a number, not a whole number"),
    ({"a": {"b": ["x", 1]}}, {"a": Each([str])}, "a.b[1] is a number, not text"),
    ({"a": None}, {"a": (str, type(None))}, ""),
    ({"a": {}}, {"a": (str, type(None))}, "a is a mapping, not text or null"),
    ({"a": 2**63}, {"a": int}, "a is a whole number of 64 bits"),
    ({"a": [-(10**400)]}, {"a": [(int, float)]}, "a[0] is a whole number of 1329 bits"),
    ("x", Each(str), "the content is text, not a mapping"),
])  # fmt: skip
def test_the_shape_of_plain_data(value, shape, says):
    assert misfit(value, shape) == says


@pytest.mark.parametrize("make, says", [
    (lambda p: None, "there is no such file"),
    (lambda p: p.mkdir(), "is a folder, no file"),
    (lambda p: os.mkfifo(p), "is a device or a pipe, no file"),
    (lambda p: p.symlink_to("/dev/zero"), "is a device or a pipe, no file"),
    (lambda p: p.symlink_to(p.name), "cannot be read: "),
    (lambda p: p.write_bytes(b"\xff"), "this is not a text file in UTF-8"),
    (lambda p: p.write_text("[]"), "damaged: the content is a list, not a mapping"),
    (lambda p: (p.touch(), os.truncate(p, 1 << 40)), "has 1,099,511,627,776 bytes; such a file has at most"),
])  # fmt: skip
def test_what_is_no_json_file(tmp_path, make, says):
    make(tmp_path / "a.json")
    with pytest.raises(DataError, match=says):
        read_json(tmp_path / "a.json", DataError, Each(None))
    for read in (read_array, map_array, lambda path, where: read_member(path, None, where)):
        with pytest.raises(DataError, match=r"^x: "):
            read(tmp_path / "a.json", "x")
    with pytest.raises(CheckpointError, match=r"a\.json"):
        load_tensors(tmp_path / "a.json")


# Arrays and tensors


def npy(path, shape, descr="'<f4'", body=b"", version=1):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path.write_bytes(b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H", len(text)) + text + body)


@pytest.mark.parametrize("shape, descr, says", [
    ("(2, 3)", "'<f4'", r"an array of shape \[2, 3\] and type float32 has 24 bytes, but 8 bytes follow"),
    ("(1,)", "'<f4'", "has 4 bytes, but 8 bytes follow"),
    ("(99999999999, 99999999999)", "'<f8'", "has 79,999,999,998,400,000,000,008 bytes, but 8"),
    ("(0, 3)", "'<f4'", "which is empty"),
    ("(-1,)", "'<f4'", "which is empty"),
    ("(2,)", "'|O'", "only arrays of numbers"),
    ("(1,)", "[('a', '<f8')]", "only arrays of numbers"),
    ("(1,)", "'<U2'", "only arrays of numbers"),
    ("(2.0,)", "'<f4'", "shape"),
    ("(2,", "'<f4'", "."),
    ("__import__('os').getcwd()", "'<f4'", "."),
])  # fmt: skip
def test_a_header_that_does_not_fit_its_file(tmp_path, shape, descr, says):
    npy(tmp_path / "a.npy", shape, descr, bytes(8))
    for read in (read_array, map_array):
        with pytest.raises(DataError, match=rf"^x: .*{says}"):
            read(tmp_path / "a.npy", "x")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "a.npy")
    with pytest.raises(DataError, match=rf"^x: .*{says}"):
        read_member(tmp_path / "a.npz", None, "x")


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    for array in (np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(3), np.arange(4, dtype=">i2")):
        np.save(tmp_path / "a.npy", array)
        np.savez_compressed(tmp_path / "a.npz", a=array)
        for found in (
            read_array(tmp_path / "a.npy", "x"),
            map_array(tmp_path / "a.npy", "x"),
            read_member(tmp_path / "a.npz", "a", "x"),
        ):
            assert found.dtype == array.dtype and np.array_equal(found, array)


def test_what_no_memory_holds_is_named_with_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "memory", lambda: 1000)
    np.save(tmp_path / "a.npy", np.zeros(1000, np.float32))
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1000, np.float32))
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1000)})
    says = r"needs 4,\d\d\d bytes of memory; this machine has 1,000"
    with pytest.raises(DataError, match=says):
        read_array(tmp_path / "a.npy", "x")
    with pytest.raises(DataError, match=says):
        read_member(tmp_path / "a.npz", None, "x")
    with pytest.raises(CheckpointError, match=says):
        load_tensors(tmp_path / "a.safetensors")
    assert len(map_array(tmp_path / "a.npy", "x")) == 1000


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(DataError, match=r"x: notes\.txt: this member of the archive is no array"):
        read_member(tmp_path / "a.npz", None, "x")


@pytest.mark.parametrize("head", [
    {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
    {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    {"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}},
    {"a": []},
    [],
])  # fmt: skip
def test_a_safetensors_header_that_does_not_fit(tmp_path, head):
    text = json.dumps(head).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: damaged or not a safetensors file"):
        load_tensors(tmp_path / "a.safetensors")


# The seal


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run that was evaluated, a config file to resume it, and an artefact."""
    place = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        from vqcore.registry import registry

        patch.syspath_prepend(str(Path(__file__).parent / "fixtures" / "toy"))
        patch.chdir(place)
        registry.cache_clear()
        (place / "run.yaml").write_text(yaml.dump(run_tree("run", run__save_every=3)))
        assert main(["train", "run.yaml"]) == main(["eval", "run"]) == main(["export", "run", "made"]) == 0
        np.save(place / "a.npy", np.zeros((2, 8, 8), np.float32))
        registry.cache_clear()
    return place


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def changed(folder, change, reseal=True):
    """The provenance of a folder, changed, with checksums and seal made anew."""
    path = folder / "provenance.json"
    made = json.loads(path.read_text())
    change(made)
    if reseal:
        files = {name: sha256(folder / name) for name in made.get("files", {}) if (folder / name).is_file()}
        if "files" in made:
            made["files"] |= files
        made["seal"] = seal(made)
    path.write_text(json.dumps(made))


SEALS = {
    "no checksums": (lambda m: m.update(files={}), True, "it has no checksum of model.safetensors"),
    "no checksum of the config": (
        lambda m: m["files"].pop("config.yaml"),
        True,
        "no checksum of config.yaml",
    ),
    "another step": (lambda m: m.update(step=7), False, "its content has the seal"),
    "another hash of borrowed weights": (lambda m: m.update(borrowed={}, extra=1), False, "has the seal"),
    "no seal": (lambda m: m.pop("seal"), False, "the content has no 'seal'"),
    "a file elsewhere": (
        lambda m: m["files"].update({"../run.yaml": "0" * 64}),
        True,
        r"its checksum of '\.\./run\.yaml' is none of a file of this folder",
    ),
    "a checksum that is none": (lambda m: m["files"].update({"x": "y"}), True, "its checksum of 'x' is none"),
    "a list of checksums": (lambda m: m.update(files=[]), False, "files is a list, not a mapping"),
    "a step that is text": (lambda m: m.update(step="7"), True, "step is text, not a whole number"),
    "components": (
        lambda m: m.update(components={"a": {"name": 1, "distribution": "", "version": ""}}),
        True,
        "components.a.name is a number",
    ),
    "metrics": (lambda m: m.update(metrics={"a": "b"}), True, "metrics.a is text, not a number"),
    "loans": (lambda m: m.update(borrowed={"a": 1}), True, "borrowed.a is a number, not a mapping"),
}


@pytest.mark.parametrize(("change", "reseal", "says"), SEALS.values(), ids=list(SEALS))
def test_a_provenance_that_does_not_hold(here, change, reseal, says):
    changed(here / "made", change, reseal)
    with pytest.raises(CheckpointError, match=rf"provenance\.json: damaged: .*{says}"):
        Tokenizer.load("made")


def test_a_file_that_would_be_read_needs_a_checksum(here):
    shutil.copy("made/model.safetensors", "made/ema.safetensors")
    with pytest.raises(CheckpointError, match=r"it has no checksum of ema\.safetensors"):
        Tokenizer.load("made")
    Path("made/ema.safetensors").unlink()
    (here / "made/.gitattributes").write_text("not read, so not sealed")
    assert verify(Path("made")) and Tokenizer.load("made")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_named(here, value):
    tensors = load_tensors(Path("made/model.safetensors"))
    tensors["proj.weight"][0, 1] = value
    save_tensors(Path("made/model.safetensors"), tensors)
    changed(here / "made", lambda made: None)
    with pytest.raises(CheckpointError, match=rf"made: the weights proj\.weight hold {value} at \[0, 1\]"):
        Tokenizer.load("made")


# Broken runs

CHECKPOINT = Path("run/checkpoints/step_6")


def state(**change):
    def made():
        path = CHECKPOINT / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        changed(CHECKPOINT, lambda made: None)

    return made


def tensors(change):
    def made():
        path = CHECKPOINT / "state.safetensors"
        found = load_tensors(path)
        name = next(key for key in sorted(found) if "exp_avg" in key)
        change(found, name)
        save_tensors(path, found)
        changed(CHECKPOINT, lambda made: None)

    return made


def folder(name):
    def made():
        path = Path(name)
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)

    return made


def cut(name, to=40):
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:to])


def text(name, content):
    return lambda: Path(name).write_text(content)


ASIDE, REFUSED, RIGHT = "set aside", "refused", "right"
BROKEN = {
    "the config is cut": (cut("run/config.yaml"), REFUSED),
    "the config is a list": (text("run/config.yaml", "[]"), REFUSED),
    "the config is a folder": (folder("run/config.yaml"), REFUSED),
    "the config has no data": (text("run/config.yaml", "run: {steps: 6}"), REFUSED),
    "the config is a bomb": (text("run/config.yaml", BOMB), REFUSED),
    "the run's provenance is a list": (text("run/provenance.json", "[]"), RIGHT),
    "a checkpoint's provenance is a list": (text(CHECKPOINT / "provenance.json", "[]"), ASIDE),
    "a checkpoint has no state": (lambda: (CHECKPOINT / "state.json").unlink(), ASIDE),
    "a checkpoint's config is cut": (cut(CHECKPOINT / "config.yaml"), ASIDE),
    "a state without players": (state(players=None), ASIDE),
    "a state of other players": (state(players=["model", "stranger"]), REFUSED),
    "a state in text": (state(step="6"), ASIDE),
    "a state that lacks a tensor": (tensors(lambda found, name: found.pop(name)), ASIDE),
    "a state of another shape": (tensors(lambda f, n: f.update({n: torch.zeros(1, 2, 3)})), ASIDE),
    "a state with codes that do not exist": (
        tensors(lambda found, name: found["window/codes"].fill_(2**24)),
        REFUSED,
    ),
    "an evaluation is a list": (text(CHECKPOINT / "eval.json", "[]"), RIGHT),
    "an evaluation is text": (text(CHECKPOINT / "eval.json", '{"metrics": {"a": "b"}}'), RIGHT),
    "eval.json is a list": (text("run/eval.json", "[]"), RIGHT),
    "metrics with a line []": (
        lambda: Path("run/metrics.jsonl").write_text('[]\n7\n{"step": null}\n"x"\n{"step": [1]}\n'),
        RIGHT,
    ),
    "metrics are no text": (lambda: Path("run/metrics.jsonl").write_bytes(b"\xff\xfe\n" * 9), RIGHT),
    "metrics are a folder": (folder("run/metrics.jsonl"), RIGHT),
    "events are a folder": (folder("run/events.jsonl"), RIGHT),
    "a picture is cut": (cut("run/samples/step_6.png"), RIGHT),
    "a picture is a folder": (folder("run/samples/step_7.png"), RIGHT),
    "a picture of no step": (text("run/samples/step_x.png", "x"), RIGHT),
    "the strip is a folder": (folder("run/samples/strip.png"), RIGHT),
    "the samples are a file": (
        lambda: (shutil.rmtree("run/samples"), Path("run/samples").write_text("")),
        RIGHT,
    ),
}


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if case[1] is RIGHT else ())
        for name, case in BROKEN.items()
    ],
)
def test_a_broken_run_is_named_or_goes_on(here, broken, expected, capsys):
    broken()
    status = main(["train", "run.yaml", "run.steps=7"])
    told = capsys.readouterr()
    assert status == (2 if expected == REFUSED else 0), told.err
    assert "Traceback" not in told.err and (status == 0 or told.err.splitlines()[-1].startswith("error: "))
    aside = [path.name for path in Path("run/checkpoints").glob("*.damaged*")]
    assert aside == (["step_6.damaged1"] if expected == ASIDE else [])
    if expected == ASIDE:
        assert "Using the checkpoint before it." in told.out and "resumed after step 3" in told.out
    if expected == RIGHT:
        assert "resumed after step 6" in told.out


@pytest.mark.parametrize(
    "name", ["the config has no data", "a checkpoint's provenance is a list", "a picture is cut"]
)
@pytest.mark.parametrize("words", ["eval run", "tokenize run a.npy out", "report run", "export run out"])
def test_every_other_verb_names_it_too(here, name, words, capsys):
    BROKEN[name][0]()
    status, told = main(words.split()), capsys.readouterr()
    assert status in (0, 2) and "Traceback" not in told.err
    assert status == 0 or told.err.splitlines()[-1].startswith("error: ")
    assert not Path("out").exists() or status == 0


def test_rows_of_a_strip_are_files_of_a_step(tmp_path):
    for name in ("step_10.png", "step_9.png", "step_x.png", "step_1.png.damaged1", "strip.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "step_11.png").mkdir()
    assert list(strip_rows(tmp_path)) == [9, 10] and strip_rows(tmp_path / "none") == {}


# What is shown


@pytest.mark.parametrize("text, shown", [
    ("plain, ä, 日本, a b\u3000c", "plain, ä, 日本, a b\u3000c"),
    ("\x1b[2J\x07", r"\x1b[2J\x07"),
    ("a\u202egnp.exe", r"a\u202egnp.exe"),
    ("a\nb\rc\td", r"a\nb\rc\td"),
    ("\x9b31m", r"\x9b31m"),
    ("name\udcff", r"name\udcff"),
    ("\u2028\u200f", r"\u2028\u200f"),
])  # fmt: skip
def test_what_would_change_a_terminal_is_escaped(text, shown):
    assert printable(text) == shown


def test_names_that_do_harm_are_escaped_wherever_they_are_shown(here, capsys):
    evil = "\x1b[2J\u202eevil"
    (here / evil).mkdir()
    np.save(here / evil / f"{evil}.npy", np.zeros((3, 3), np.float32))
    np.save(here / evil / "good.npy", np.zeros((2, 8, 8), np.float32))
    assert main(["eval", evil]) == 2
    assert main(["tokenize", "made", evil, "out"]) == 0
    assert main(["decode", "made", "out", f"{evil}/x\x1b"]) == 0
    Path("evil.yaml").write_text(yaml.dump(run_tree(f"{evil}/run", run__steps=1)))
    assert main(["train", "evil.yaml"]) == 0
    told = capsys.readouterr()
    assert not any(letter in told.out + told.err for letter in "\x1b\u202e")
    assert r"\x1b[2J\u202eevil" in told.err


def test_a_command_to_copy_names_the_bytes():
    assert command("eval", "a b", "x\x1b\udcff'") == r"vqcore eval 'a b' $'x\x1b\xff\x27'"


# What an artefact tells of the machine

PLACES = {
    "/home/me/photos": ".../photos",
    "/home/me/my photos, all/x": ".../x",
    "~/photos": ".../photos",
    "data.path=/home/me/my photos": "data.path=.../my photos",
    "model.full_ckpt=a/b[k=v]:/home/me/w.pth": "model.full_ckpt=a/b[k=v]:.../w.pth",
    "data.extra_path={a: /home/x, b: '~/y'}": "data.extra_path={a: .../x, b: '.../y'}",
    "/data/{000..100}.tar": ".../{000..100}.tar",
    "file:///home/me/a.tar": ".../a.tar",
    "C:\\Users\\me\\photos": ".../photos",
    "--plugin=/home/me/mine.py": "--plugin=.../mine.py",
    "hf://user/name@main": "hf://user/name@main",
    "s3://bucket/x": "s3://bucket/x",
    "https://site.org/x/y": "https://site.org/x/y",
    "data/photos": "data/photos",
    "vit/encoder": "vit/encoder",
    "1/2": "1/2",
}


@pytest.mark.parametrize(("text", "left"), PLACES.items(), ids=list(PLACES))
def test_of_an_absolute_path_the_last_part_is_left(text, left):
    assert without_places({"a": {"b": [text]}, "n": 1}) == {"a": {"b": [left]}, "n": 1}


def test_an_exported_tokenizer_names_no_folder_of_this_machine(tmp_path):
    train(run_config(tmp_path / "run", data__note=f"see {tmp_path}/notes"))
    checkpoint = json.loads((tmp_path / "run/checkpoints/step_6/provenance.json").read_text())
    assert str(tmp_path) in checkpoint["data"]["note"]
    Tokenizer.load(tmp_path / "run").save(tmp_path / "made")
    for path in (tmp_path / "made").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert "see .../notes" in (tmp_path / "made/README.md").read_text()
