"""What is remembered of folders: which folders are read again, and what `vqcore index` says."""

import os
import re
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_shards import packed

from vqcore.cli import main
from vqcore.data import remembered, tree
from vqcore.data.listing import Listing
from vqcore.data.tree import Tree

PNG = (".png",)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own; folders that were made just now are trusted."""
    monkeypatch.setattr(tree, "_FRESH", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return made(tmp_path / "root", "a/1.png", "a/2.png", "b/c/3.png", "b/4.txt", "5.PNG")


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


@pytest.fixture
def scanned(monkeypatch):
    """The folders that are read, by their names."""
    folders, read = [], tree._read

    def counted(folder, status):
        folders.append(os.path.basename(os.fsdecode(folder).rstrip("/")))  # noqa: PTH119
        return read(folder, status)

    monkeypatch.setattr(tree, "_read", counted)
    return folders


def keys(root: Path, suffixes=PNG) -> list[str]:
    time.sleep(0.02)  # longer than a tick of the clock of files
    found = Listing(str(root), suffixes, "data.path")
    return [found.key(index) for index in range(len(found))]


class TestTree:
    @pytest.fixture(autouse=True)
    def large(self, monkeypatch):
        monkeypatch.setattr(tree, "LARGE", 3)

    def test_only_folders_that_changed_are_read_again(self, root, scanned):
        assert keys(root) == ["5", "a/1", "a/2", "b/c/3"] and sorted(scanned) == ["a", "b", "c", "root"]
        scanned.clear()
        assert keys(root) == ["5", "a/1", "a/2", "b/c/3"] and not scanned
        (root / "a/6.png").touch()
        (root / "b/c/3.png").rename(root / "b/c/7.png")
        assert keys(root) == ["5", "a/1", "a/2", "a/6", "b/c/7"] and sorted(scanned) == ["a", "c"]
        (root / "a/6.png").unlink()
        scanned.clear()
        assert keys(root) == ["5", "a/1", "a/2", "b/c/7"] and scanned == ["a"]
        scanned.clear()
        assert keys(root, (".txt",)) == ["b/4"] and not scanned

    def test_folders_come_and_go(self, root, scanned):
        keys(root)
        made(root, "d/e/8.png")
        assert keys(root) == ["5", "a/1", "a/2", "b/c/3", "d/e/8"]
        for name in ("d/e/8.png", "a/1.png", "a/2.png"):
            (root / name).unlink()
        for name in ("d/e", "d", "a"):
            (root / name).rmdir()
        assert keys(root) == ["5", "b/c/3"]

    def test_a_folder_that_changed_just_now_is_not_trusted(self, root, scanned, monkeypatch):
        monkeypatch.setattr(
            tree, "_FRESH", 2_000_000_000
        )  # within one tick of the clock, two changes have one time
        keys(root)
        scanned.clear()
        assert keys(root) and set(scanned) == {"root", "a", "b", "c"}

    def test_a_time_that_was_set_back_hides_nothing(self, root):
        keys(root)
        then = (root / "a").stat().st_mtime_ns
        (root / "a/6.png").touch()
        os.utime(root / "a", ns=(then, then))  # as tar and rsync do
        assert "a/6" in keys(root)

    def test_what_a_link_leads_to_later(self, root, tmp_path):
        (root / "link").symlink_to(tmp_path / "else")
        keys(root)
        made(tmp_path / "else", "9.png")
        assert "link/9" in keys(root)
        made(tmp_path / "else", "deep/10.png")
        assert "link/deep/10" in keys(root)

    def test_a_link_that_leads_nowhere_now(self, root, tmp_path):
        made(tmp_path / "else", "9.png")
        (root / "link").symlink_to(tmp_path / "else")
        assert "link/9" in keys(root)
        (tmp_path / "else").rename(tmp_path / "gone")
        assert keys(root) == ["5", "a/1", "a/2", "b/c/3"]

    def test_what_is_left_out_is_remembered(self, root):
        (root / ".hidden").touch()
        os.mkfifo(root / "pipe")
        counts = [Listing(str(root), PNG, "data.path").left_out for _ in range(2)]
        assert counts == [{"hidden": 1, "no file": 1, ".txt": 1}] * 2

    def test_a_damaged_memory_only_costs_time(self, root, scanned):
        keys(root)
        place = Tree(root).place
        for content in (b"", b"no archive", place.read_bytes()[:-30]):
            place.write_bytes(content)
            assert keys(root) == ["5", "a/1", "a/2", "b/c/3"]
        np.savez(place, inner=np.zeros(3))
        assert keys(root) == ["5", "a/1", "a/2", "b/c/3"]

    def test_names_are_bytes(self, tmp_path):
        root = made(tmp_path / "r", os.fsdecode(b"caf\xe9/x\n.png"), "b.png", "c.png")
        assert keys(root) == keys(root) == ["b", "c", os.fsdecode(b"caf\xe9/x\n")]


def test_small_folders_leave_nothing_in_the_cache(root, tmp_path):
    keys(root)
    assert not (tmp_path / "cache").exists()


class TestVerb:
    def said(self, capsys, *words: str, status: int = 0) -> str:
        time.sleep(0.02)
        assert main(["index", *words]) == status
        out, err = capsys.readouterr()
        return out if status == 0 else out + err

    def test_names_sizes_and_hashes(self, root, tmp_path, capsys):
        (root / "b/copy.png").write_bytes(b"a/1.png")
        first = self.said(capsys, str(root), "--hash", "--out", str(tmp_path / "list.parquet"))
        assert "6 files, 42 bytes, in 4 folders" in first and "5 x .png, 1 x .txt" in first
        assert "read      4 folders; 0 as they were" in first
        assert "hashed    6 files; 0 as they were" in first
        assert "copies    a/1.png, b/copy.png" in first
        rows = pq.read_table(tmp_path / "list.parquet").to_pylist()
        assert [row["path"] for row in rows] == [
            "5.PNG",
            "a/1.png",
            "a/2.png",
            "b/4.txt",
            "b/c/3.png",
            "b/copy.png",
        ]
        assert rows[1]["bytes"] == 7 and rows[1]["sha256"] == rows[5]["sha256"] != rows[2]["sha256"]
        (root / "a/2.png").write_bytes(b"in place")
        again = self.said(capsys, str(root), "--hash")
        assert "read      0 folders; 4 as they were" in again
        assert "hashed    1 file; 5 as they were" in again

    def test_later_commands_read_nothing(self, root, scanned, capsys):
        self.said(capsys, str(root))
        scanned.clear()
        assert keys(root) == ["5", "a/1", "a/2", "b/c/3"] and not scanned

    def test_what_cannot_be_read_is_named(self, root, capsys):
        (root / "a/dead.png").symlink_to(root / "nothing")
        said = self.said(capsys, str(root), "--hash", status=2)
        assert "unread    a/dead.png: No such file" in said and "5 files" in said

    def test_shards(self, tmp_path, capsys):
        for number in range(2):
            packed(tmp_path / f"s-{number}.tar", a_png=b"123", a_txt=b"4")
        pattern = str(tmp_path / "s-{0..1}.tar")
        assert "4 files, 8 bytes, in 2 shards\nkinds     2 x .png, 2 x .txt" in self.said(capsys, pattern)
        with (tmp_path / "s-1.tar").open("r+b") as file:
            file.truncate(700)
        said = self.said(capsys, str(tmp_path / "s-{0..2}.tar"), status=2)
        assert "s-1.tar" in said and "s-2.tar: there is no such shard" in said

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["fotos"], "there is no such folder. Did you mean '.*photos'"),
            (["photos", "--out", "x.csv"], "Give a name that ends with .parquet"),
            (["photos", "--out", "there.parquet"], "exists already"),
            (["x.tar", "--hash"], "--hash and --out are for folders"),
        ],
    )
    def test_mistakes(self, tmp_path, monkeypatch, capsys, words, reason):
        monkeypatch.chdir(tmp_path)
        made(tmp_path / "photos", "a.png")
        (tmp_path / "there.parquet").touch()
        said = self.said(capsys, *words, status=2)
        assert re.search(reason, said)


def test_what_was_not_used_for_long_is_forgotten(tmp_path, monkeypatch):
    def entry(name, days):
        place = remembered.place_of("shards", name)
        remembered.remember(place, {"x": np.arange(3)})
        at = time.time() - 86_400 * days
        os.utime(place, (at, at))
        return place

    old, used, fresh = entry("old", 61), entry("used", 61), entry("fresh", 59)
    mine = old.with_name("notes.txt")  # nothing that vqcore keeps
    mine.write_text("")
    os.utime(mine, (0, 0))
    assert remembered.recall(used)["x"].tolist() == [0, 1, 2]
    remembered.remember(fresh, {"x": np.arange(2)})
    assert old.exists()  # a process looks once
    monkeypatch.setattr(remembered, "_pruned", set())
    with old.open("rb") as reader:
        remembered.remember(remembered.place_of("parquet", "new"), {})
        assert not old.exists() and used.exists() and fresh.exists() and mine.exists()
        with np.load(reader) as held:  # whoever is at it reads on
            assert held["x"].tolist() == [0, 1, 2]
    assert remembered.recall(old) is None
