"""Files appear whole or not at all, and nothing is left of a write that failed."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqcore import files
from vqcore.artefacts.folder import complete, save_tensors
from vqcore.errors import RunError, cause
from vqcore.files import aside, folder_aside, sweep, write_text

ROOT = Path(__file__).resolve().parent.parent


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with aside(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.suffix == ".txt" and temporary.parent == path.parent
    assert path.read_text() == "whole" and names(path.parent) == ["a.txt"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(ZeroDivisionError), aside(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and names(tmp_path) == ["a.txt"]


def write_folder(path):
    with folder_aside(path) as staging:
        write_text(staging / "a.txt", "whole")


def write_file(path):
    write_text(path, "whole")


def write_tensors(path):
    save_tensors(path, {"a": torch.zeros(2)})


WRITERS = {"file": write_file, "folder": write_folder, "tensors": write_tensors}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


class TestEveryWriter:
    @pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
    def test_the_umask_decides_who_may_read(self, tmp_path, write, mask):
        before = os.umask(mask)
        try:
            write(tmp_path / "a")
        finally:
            os.umask(before)
        for path in tmp_path.rglob("*"):
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path

    @pytest.mark.parametrize("stem", ["n" * 251, "照" * 83], ids=["ascii", "wide"])
    def test_long_names_are_names(self, tmp_path, write, stem):
        write(tmp_path / f"{stem}.npy")
        write(tmp_path / f"a.{'s' * 250}")
        assert len(names(tmp_path)) == 2

    def test_a_name_beside_that_is_taken_is_not_written_through(self, tmp_path, write, monkeypatch):
        victim = tmp_path / "victim"
        victim.write_text("precious")
        (tmp_path / "in").mkdir()
        tokens = iter(["00000000", *(f"{n:08x}" for n in range(1, 9))])
        monkeypatch.setattr(files.secrets, "token_hex", lambda count: next(tokens))
        for suffix in ("", ".x"):
            (tmp_path / f"in/.00000000.incomplete{suffix}").symlink_to(victim)
        write(tmp_path / "in/a.x")
        assert victim.read_text() == "precious" and (tmp_path / "in/a.x").exists()
        assert (tmp_path / "in/.00000000.incomplete").is_symlink()

    def test_folders_may_be_links(self, tmp_path, write):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        write(tmp_path / "link/a")
        assert names(tmp_path / "real") == ["a"]

    def test_no_folder_is_left_of_a_write_that_failed(self, tmp_path, write, monkeypatch):
        def fail(path):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(files, "_flush", fail)
        with pytest.raises(OSError, match="No space left") as caught:
            write(tmp_path / "new/er/a.x")
        assert caught.value.filename == str(tmp_path / "new/er/a.x")
        assert names(tmp_path) == []

    def test_a_file_in_place_of_a_folder(self, tmp_path, write):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OSError, match=r"file") as caught:
            write(tmp_path / "file/a")
        assert str(tmp_path / "file") in str(caught.value.filename) and names(tmp_path) == ["file"]


def test_a_link_with_the_final_name_is_replaced(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name, target in (("a", victim), ("b", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(target)
        write_text(tmp_path / name, "new")
        assert not (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == "new"
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("there", ["folder", "empty", "file", "link"])
def test_a_folder_is_never_replaced(tmp_path, there):
    path = tmp_path / "a"
    made = {
        "folder": lambda: write_folder(path),
        "empty": path.mkdir,
        "file": path.touch,
        "link": lambda: path.symlink_to(tmp_path / "nowhere"),
    }
    made[there]()
    with pytest.raises(RunError, match="a exists already and is not overwritten"), complete(path):
        pass
    assert names(tmp_path) == ["a"]


def test_the_slower_of_two_writers_of_a_folder_is_refused(tmp_path):
    refused = pytest.raises(RunError, match="a exists already and is not overwritten")
    with refused, complete(tmp_path / "a") as staging:
        (staging / "x").write_text("slow")
        write_folder(tmp_path / "a")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["a.txt"]


RACE = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from vqcore.files import folder_aside, write_text
me, place = sys.argv[1], Path(sys.argv[2])
print("ready", flush=True)
input()
for turn in range(60):
    write_text(place / "file", me * 10_000)
    try:
        with folder_aside(place / f"folder{{turn}}") as staging:
            for name in "ab":
                (staging / name).write_text(me)
        print("made", turn)
    except FileExistsError:
        print("late", turn)
"""


def test_processes_that_write_one_place(tmp_path):
    code = RACE.format(root=str(ROOT))
    racers = [
        subprocess.Popen([sys.executable, "-c", code, me, str(tmp_path)], stdin=-1, stdout=-1, text=True)
        for me in "xyz"
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60)[0].splitlines() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    for turn in range(60):
        assert sum(f"made {turn}" in lines for lines in said) == 1
        assert len({(tmp_path / f"folder{turn}" / name).read_text() for name in "ab"}) == 1
    text = (tmp_path / "file").read_text()
    assert len(text) == 10_000 and len(set(text)) == 1
    assert len(names(tmp_path)) == 61


HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from vqcore.files import aside, folder_aside
place = Path(sys.argv[1])
with aside(place / "a.txt") as one, folder_aside(place / "b") as two:
    one.write_text("half")
    (two / "half").write_text("half")
    print("writing", flush=True)
    input()
"""


def test_only_what_killed_processes_left_is_swept(tmp_path):
    code = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(tmp_path)]
    writer = subprocess.Popen(code, stdin=-1, stdout=-1, text=True)
    assert writer.stdout.readline() == "writing\n"
    mine = [".hidden", ".a.incomplete", "00000000.incomplete", ".0000000g.incomplete", ".step_2.incomplete"]
    for name in mine:
        (tmp_path / name).touch()
    (tmp_path / ".00000000.incomplete").symlink_to(tmp_path / ".hidden")  # nothing of ours is a link
    before = names(tmp_path)
    assert len(before) == len(mine) + 3
    sweep(tmp_path)
    assert names(tmp_path) == before
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*mine, ".00000000.incomplete"])
    sweep(tmp_path / "absent")


def test_text_of_names_that_are_no_utf8(tmp_path):
    write_text(tmp_path / "a", f"<b>{os.fsdecode(b'caf')}{os.fsdecode(bytes([0xE9]))} \N{SNOWMAN}</b>")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "<b>caf\\udce9 \N{SNOWMAN}</b>"


APPENDED = {"vqcore/run/folder.py"}  # logs and the lock of a run: appended to, not replaced
ONE_HELPER = {"vqcore/files.py"}
WRITES = re.compile(
    r"\.write_(text|bytes)$|save_file$|^(np|torch)\.save|\.(tofile|savez|export_chrome_trace)$"
)


def writes_of(path):
    """Lines that open or make files by themselves, outside of a block of `aside` or of a folder that is made aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(
            isinstance(item.context_expr, ast.Call)
            and getattr(item.context_expr.func, "id", "") in ("aside", "folder_aside")
            for item in node.items
        ):
            inside |= {id(each) for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in inside:
            called = ast.unparse(node.func)
            given = [ast.unparse(each) for each in (*node.args, *(key.value for key in node.keywords))]
            opens = called.endswith("open") and any(re.fullmatch(r"'[wax]b?\+?'", one) for one in given)
            if opens or WRITES.search(called):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {called}"


def test_one_helper_writes_everything():
    roots = [ROOT / "vqcore", *(p / p.name for p in (ROOT / "plugins").iterdir() if p.is_dir())]
    found = [
        line
        for root in roots
        for path in sorted(root.rglob("*.py"))
        if "testing" not in path.parts and str(path.relative_to(ROOT)) not in ONE_HELPER | APPENDED
        for line in writes_of(path)
    ]
    # A modality writes to the path that it is given; a library asks for a file, which is made in memory.
    writes = [line for line in found if "sounds.py" not in line and "fid.py" not in line]
    assert writes == []
    assert len(found) == 2, "the search finds what it looks for"


@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError(13, "Permission denied", "/a/b"), "Permission denied"),
        (
            OSError("encoder error -2 when writing image file\nmore"),
            "encoder error -2 when writing image file",
        ),
        (ValueError("no number."), "no number"),
        (EOFError(), "EOFError"),
    ],
)
def test_the_cause_of_a_failed_read_or_write(error, words):
    assert cause(error) == words
