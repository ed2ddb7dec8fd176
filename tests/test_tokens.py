"""Passes over folders: which files, whose codes, and what is left when something goes wrong."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toys
from toys import run_config, toy  # noqa: F401

from vqcore import files
from vqcore.cli import main
from vqcore.errors import DataError, RunError
from vqcore.tokenizer import Tokenizer
from vqcore.tokens import store
from vqcore.tokens.passes import decode_folder, tokenize_folder
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
BYTES = os.fsdecode(b"caf\xe9")
FOLDER = ("--store", "folder")
HERE = Path(__file__).resolve().parent


def samples(folder, *keys):
    rng = np.random.default_rng(0)
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{key}.npy", rng.uniform(-1, 1, (2, 8, 8)).astype(np.float32))
    return folder


def below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def made(tmp_path):
    return trained(tmp_path / "run")


def trained(folder, seed=0):
    return Tokenizer.load(toys.trained(folder, run__steps=1, run__seed=seed))


class TestManifests:
    def test_every_folder_of_codes_has_its_own(self, made, tmp_path):
        pics = samples(tmp_path / "in", "a", "b/c", "d/e/f")
        tokenize_folder(made, pics, tmp_path / "tok", size=(8, 8))
        found = [path for path in below(tmp_path / "tok") if path.endswith("tokens.json")]
        assert found == ["b/tokens.json", "d/e/tokens.json", "tokens.json"]
        other = trained(tmp_path / "other", seed=1)
        shutil.move(tmp_path / "tok/d/e", tmp_path / "moved")
        for place in ("moved", "tok", "tok/b", "tok/a.npy", "moved/f.npy"):
            with pytest.raises(DataError, match="were made by another tokenizer"):
                decode_folder(other, tmp_path / place, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert decode_folder(made, tmp_path / "moved", tmp_path / "out").written == 1

    @pytest.mark.parametrize(
        "text", ['{"bos": 1}', '["<s>"]', "junk", "[" * 100_000, '{"fingerprint": "a"}', "\xff"]
    )
    def test_one_of_somebody_else_above_does_not_matter_and_beside_is_named(self, made, tmp_path, text):
        pics = samples(tmp_path / "in", "a")
        (tmp_path / "up").mkdir()
        (tmp_path / "up/tokens.json").write_text(text, encoding="latin-1")
        tokenize_folder(made, pics, tmp_path / "up/deep/er", size=(8, 8))
        assert decode_folder(made, tmp_path / "up/deep/er", tmp_path / "out").written == 1
        with pytest.raises(DataError, match=r"up/tokens\.json"):
            tokenize_folder(made, pics, tmp_path / "up", size=(8, 8))
        assert (tmp_path / "up/tokens.json").read_text(encoding="latin-1") == text
        assert below(tmp_path / "up") == ["deep/er/a.npy", "deep/er/tokens.json", "tokens.json"]

    def test_another_tokenizer_may_use_a_folder_inside(self, made, tmp_path):
        pics = samples(tmp_path / "in", "a", "b/c")
        other = trained(tmp_path / "other", seed=1)
        tokenize_folder(made, pics, tmp_path / "tok", size=(8, 8))
        tokenize_folder(other, pics, tmp_path / "tok/new", size=(8, 8))
        with pytest.raises(RunError, match=r"tok/b holds other codes \(different: fingerprint\)"):
            tokenize_folder(other, pics / "b", tmp_path / "tok/b", size=(8, 8))

    def test_codes_without_one_are_decoded_with_a_warning(self, made, tmp_path, caplog):
        samples(tmp_path / "in", "a")
        tokenize_folder(made, tmp_path / "in", tmp_path / "tok", size=(8, 8))
        (tmp_path / "tok/tokens.json").unlink()
        assert decode_folder(made, tmp_path / "tok", tmp_path / "out").written == 1
        assert "no tokens.json beside the codes" in caplog.text
        caplog.clear()
        assert decode_folder(made, tmp_path / "tok/a.npy", tmp_path / "two", force=True).written == 1
        assert caplog.text == ""
        with pytest.raises(RunError, match=r"a\.npy exists already, but no tokens\.json beside it"):
            tokenize_folder(made, tmp_path / "in", tmp_path / "tok", size=(8, 8))
        assert below(tmp_path / "tok") == ["a.npy"]

    def test_who_comes_second_leaves_what_the_first_has_written(self, tmp_path, monkeypatch):
        real, mine = store.write_text, {"grid": [2], "size": [8]}

        def late(path, text, **how):
            if not path.exists():
                real(path, json.dumps({"fingerprint": "of the first", **mine}))
            real(path, text, **how)

        monkeypatch.setattr(store, "write_text", late)
        with (
            pytest.raises(RunError, match="holds other codes"),
            store.Claims({"fingerprint": "", **mine}) as claims,
        ):
            claims.write(tmp_path / "out")
        assert below(tmp_path) == ["out/tokens.json"]

    def test_the_output_is_a_folder(self, made, tmp_path):
        pics = samples(tmp_path / "in", "a")
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="file is a file, not a folder"):
            tokenize_folder(made, pics, tmp_path / "file", size=(8, 8))


BAD = {
    "range": (np.full((2, 2, 1), 99, np.uint8), "code 99 is out of range"),
    "negative": (np.full((2, 2, 1), -1, np.int8), "code -1 is out of range"),
    "float": (np.zeros((2, 2, 1)), "not float64"),
    "axis": (np.zeros((2, 2), np.uint8), r"shape \[2, 2\]"),
    "grid": (np.zeros((3, 2, 1), np.uint8), r"its grid is \[3, 2\], but tokens\.json says \[2, 2\]"),
    "junk": (b"no array", "this is no .npy file"),
    "empty": (b"", "this is no .npy file"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_of_codes_is_named_and_costs_itself_alone(made, tmp_path, bad):
    samples(tmp_path / "in", "a", "b", "c")
    tokenize_folder(made, tmp_path / "in", tmp_path / "tok", size=(8, 8))
    array, says = BAD[bad]
    path = tmp_path / "tok/b.npy"
    path.write_bytes(array) if isinstance(array, bytes) else np.save(path, array)
    done = decode_folder(made, tmp_path / "tok", tmp_path / "out")
    assert below(tmp_path / "out") == ["a.npy", "c.npy"] and done.written == 2
    (failed,) = done.failed
    assert str(path) in failed
    with pytest.raises(DataError, match=says):
        decode_folder(made, path, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_a_sample_that_the_tokenizer_refuses_costs_itself_alone(made, tmp_path, monkeypatch):
    samples(tmp_path / "in", "a", "b", "c")
    real, broken = made.encode, made.read_raw(tmp_path / "in/b.npy", (8, 8))

    def encode(x, mask=None):
        if any(bool((one == broken[0]).all()) for one in x):
            raise ValueError("strange values")
        return real(x)

    monkeypatch.setattr(made, "encode", encode)
    done = tokenize_folder(made, tmp_path / "in", tmp_path / "tok", size=(8, 8))
    assert done.failed == [f"{tmp_path / 'in/b.npy'}: strange values"]
    assert below(tmp_path / "tok") == ["a.npy", "c.npy", "tokens.json"]


def test_what_is_left_out_is_counted_and_said(made, tmp_path, capsys):
    pics = samples(tmp_path / "in", "a", "b/c")
    far = samples(tmp_path / "far", "x")
    (pics / "link").symlink_to(far)
    (pics / "again").symlink_to(pics / "b")
    (pics / "dead.npy").symlink_to(pics / "nowhere")
    (pics / "self.npy").symlink_to(pics / "self.npy")
    os.mkfifo(pics / "pipe.npy")
    for name in ("n.txt", "m.TXT", ".hidden.npy", "README"):
        (pics / name).touch()
    assert main(["tokenize", str(tmp_path / "run"), str(pics), str(tmp_path / "tok"), *FOLDER]) == 0
    said = capsys.readouterr().out
    assert "3 written, 0 existed already, 2 unreadable" in said
    left = next(line for line in said.splitlines() if line.startswith("left out: "))
    parts = {"2 x .txt", "1 x hidden", "1 x no suffix", "1 x no file", "1 x folder listed under another name"}
    assert set(left.removeprefix("left out: ").split(", ")) == parts
    assert below(tmp_path / "tok") == [
        "a.npy", "b/c.npy", "b/tokens.json", "link/tokens.json", "link/x.npy", "tokens.json",
    ]  # fmt: skip


def test_names_that_are_no_utf8_go_all_the_way(tmp_path, capsys):
    samples(tmp_path / "in", "a", BYTES, f"{BYTES}/b", "d", "e")
    data = {
        "name": "folder",
        "path": str(tmp_path / "in"),
        "eval_path": str(tmp_path / "in"),
        "modality": {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1]},
        "batch_size": 2,
        "workers": 1,
    }
    hooks = {"report": {"name": "track/report"}}
    train(run_config(tmp_path / "run", run__steps=3, data=data, hooks=hooks))
    run = str(tmp_path / "run")
    assert main(["eval", run]) == 0
    assert main(["report", run]) == 0
    (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert main(["tokenize", run, str(tmp_path / "in"), str(tmp_path / "tok"), *FOLDER]) == 0
    assert main(["decode", run, str(tmp_path / "tok"), str(tmp_path / "out")]) == 0
    assert below(tmp_path / "out") == below(tmp_path / "in")


REFUSED = {"full": errno.ENOSPC, "read-only": errno.EROFS, "forbidden": errno.EACCES}


class TestTheSystemSaysNo:
    @pytest.mark.parametrize("code", REFUSED.values(), ids=list(REFUSED))
    def test_every_verb_that_writes(self, made, tmp_path, monkeypatch, capsys, code):
        samples(tmp_path / "in", "a", "b/c")
        run = str(tmp_path / "run")
        assert main(["tokenize", run, str(tmp_path / "in"), str(tmp_path / "tok"), *FOLDER]) == 0
        capsys.readouterr()
        before = below(tmp_path)

        def refuse(path):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files, "_flush", refuse)
        for argv, path in (
            (["tokenize", run, str(tmp_path / "in"), str(tmp_path / "new/er")], "new/er/tokens.json"),
            (
                ["tokenize", run, str(tmp_path / "in"), str(tmp_path / "new/er"), *FOLDER],
                "new/er/tokens.json",
            ),
            (["decode", run, str(tmp_path / "tok"), str(tmp_path / "out/er")], "out/er/a.npy"),
            (["eval", run, "--json", str(tmp_path / "e.json")], "e.json"),
            (["report", run], "run/report.html"),
            (["export", run, str(tmp_path / "exported/er")], "exported/er"),
        ):
            assert main(argv) == 2, argv
            said = capsys.readouterr()
            last = said.err.strip().splitlines()[-1]
            assert last.startswith("error: ") and os.strerror(code) in last and str(tmp_path / path) in last
            assert "Traceback" not in said.err
            assert argv[0] != "eval" or "pixel/mse" in said.out  # what was measured is shown
            assert below(tmp_path) == before and not (tmp_path / "new").exists(), argv

    def test_no_room_in_the_middle_keeps_what_is_whole(self, made, tmp_path, monkeypatch):
        samples(tmp_path / "in", *"abcd")
        real = store.save_array

        def save(path, array):
            if path.stem == "c":
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            real(path, array)

        with monkeypatch.context() as patch:
            patch.setattr(store, "save_array", save)
            with pytest.raises(
                RunError, match=r"c\.npy cannot be written: No space left.*2 files were written"
            ):
                tokenize_folder(made, tmp_path / "in", tmp_path / "tok", size=(8, 8))
        assert below(tmp_path / "tok") == ["a.npy", "b.npy", "tokens.json"]
        done = tokenize_folder(made, tmp_path / "in", tmp_path / "tok", size=(8, 8))
        assert (done.written, done.skipped) == (2, 2)

    def test_a_file_that_vanishes_costs_itself_alone(self, made, tmp_path, monkeypatch):
        pics = samples(tmp_path / "in", "a", "b")
        real = made.prepared
        monkeypatch.setattr(
            made, "prepared", lambda p, *how: (pics / "b.npy").unlink(missing_ok=True) or real(p, *how)
        )
        done = tokenize_folder(made, pics, tmp_path / "tok", size=(8, 8))
        assert done.written == 1 and "b.npy" in done.failed[0]


RACE = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from vqcore.errors import VqcoreError
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.passes import decode_folder, tokenize_folder
place, run = Path(sys.argv[1]), sys.argv[2]
tokenizer = Tokenizer.load(place / run)
print("ready", flush=True)
input()
try:
    tokenize_folder(tokenizer, place / "in", place / "tok", size=(8, 8), batch_size=1, overwrite=True)
    decode_folder(tokenizer, place / "tok", place / "out", batch_size=1, overwrite=True)
    tokenizer.save(place / "made")
    print("done")
except VqcoreError as error:
    print("REFUSED", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("runs", [("run", "run"), ("run", "other")], ids=["same", "different"])
def test_two_processes_at_one_place(made, tmp_path, runs):
    other = trained(tmp_path / "other", seed=1)
    samples(tmp_path / "in", *(f"{n:03}" for n in range(100)))
    code = RACE.format(paths=[str(HERE.parent), str(HERE / "fixtures/toy")])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), run], stdin=-1, stdout=-1, stderr=-1, text=True
        )
        for run in runs
    ]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.communicate(timeout=120) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    first = json.loads((tmp_path / "tok/tokens.json").read_text())["fingerprint"]
    winner = next(t for t in (made, other) if t.fingerprint == first)
    assert sum(out.startswith("REFUSED") for out, _ in said) >= 1  # of two exports to one folder, one is late
    for path in sorted((tmp_path / "in").iterdir()):
        assert np.array_equal(
            np.load(tmp_path / "tok" / path.name), winner.encode(winner.read(path))[0].numpy()
        )
    assert Tokenizer.load(tmp_path / "made").fingerprint == first
    assert not [path for path in tmp_path.rglob("*") if "incomplete" in path.name]
