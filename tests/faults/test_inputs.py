"""What a verb reads is gone, closed to this user or a folder: one line that names it, and nothing is written."""

import shutil
from pathlib import Path

import pytest
from test_system import one_line
from verbs import contents, copied, leftovers, modes_count

from vqcore.cli import main

RUN = "run/checkpoints/step_4/model.safetensors"
READS = (
    ("train new.yaml", "new.yaml"),
    ("check new.yaml", "new.yaml"),
    ("config new.yaml", "new.yaml"),
    ("train run.yaml run.steps=6", "run/config.yaml"),
    ("train pictures.yaml run.dir=new", "photos"),
    ("check pictures.yaml run.dir=new", "photos"),
    ("eval pictures data.eval_path=photos", "photos"),
    ("eval run", RUN),
    ("tokenize run in out", RUN),
    ("tokenize run in out", "in"),
    ("decode run tokens out", RUN),
    ("decode run tokens out", "tokens"),
    ("export run out", RUN),
    ("import toy/boxes box out", "box/toybox.safetensors"),
    ("import toy/notes old.toyrc made/out.yaml", "old.toyrc"),
)


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    place = copied(world, tmp_path)
    monkeypatch.chdir(place)
    return place


def spoil(path: Path, how: str) -> None:
    if how == "closed":
        path.chmod(0)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()


@pytest.mark.parametrize("how", ["gone", "closed", "folder"])
@pytest.mark.parametrize(("line", "path"), READS)
def test_an_input_that_cannot_be_read(here, capsys, line, path, how):
    if how == "folder" and Path(path).is_dir():
        pytest.skip("it is a folder")
    spoil(Path(path), how)
    with modes_count():
        status = main(line.split())
    Path(path).chmod(0o755) if Path(path).exists() else None
    said = capsys.readouterr()
    if line.startswith("check") and "error: " not in said.err:
        assert any(each.startswith("error") and path in each for each in said.out.splitlines()), said.out
    else:
        assert path.partition("/")[0] in one_line(said.err)
    assert status == 2
    assert leftovers(here) == [] and not Path("out").exists() and not Path("made/out.yaml").exists()


@pytest.mark.parametrize("line", ["tokenize run in out --store folder", "decode run kept out"])
def test_one_closed_file_costs_itself_alone(here, capsys, caplog, line):
    source = line.split()[2]
    assert main(["tokenize", "run", "in", "kept", "--store", "folder"]) == 0
    capsys.readouterr()
    Path(source, "b.npy").chmod(0)
    with modes_count():
        assert main(line.split()) == 0
    said = capsys.readouterr()
    assert f"{source}/b.npy: Permission denied" in caplog.text and "1 unreadable" in said.out, said
    assert sorted(path.name for path in Path("out").glob("*.npy")) == ["a.npy", "c.npy"]


def test_files_that_vanish_under_a_pass_are_named(here, capsys, caplog, monkeypatch):
    from vqcore.tokens import passes

    assert main(["tokenize", "run", "in", "kept", "--store", "folder"]) == 0
    capsys.readouterr()
    for name in ("in", "kept"):
        with monkeypatch.context() as patch:
            real = passes.through
            gone = Path(name, "b.npy")
            vanishing = lambda *given, real=real, gone=gone: gone.unlink() or real(*given)  # noqa: E731
            patch.setattr(passes, "through", vanishing)
            verb = "tokenize" if name == "in" else "decode"
            store = ["--store", "folder"] if verb == "tokenize" else []
            assert main([verb, "run", name, f"out-{name}", *store]) == 0
        said = capsys.readouterr()
        assert f"{name}/b.npy" in caplog.text and "1 unreadable" in said.out
        assert sorted(path.name for path in Path(f"out-{name}").glob("*.npy")) == ["a.npy", "c.npy"]
    assert leftovers(here) == [] and contents(here)
