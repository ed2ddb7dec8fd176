"""Tar shards behind a server: how many requests, how many at a time, and what becomes of those that fail."""

import io
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from shardserver import serving

from vqcore.data import remote, shards
from vqcore.data.batches import TrainBatches
from vqcore.data.shards import Shards
from vqcore.errors import DataError
from vqcore.registry import registry
from vqcore.testing.conformance import configured

SIZE = 3000
"""Bytes of a member, which takes two blocks of the tar more."""


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0, 0, 0))
    monkeypatch.setattr(remote, "BLOCK", 1 << 14)
    monkeypatch.setattr(shards, "PIECE", 1 << 14)


@pytest.fixture
def shelf():
    with serving() as made:
        for number in range(3):
            made.files[f"/s-{number}.tar"] = packed(number)
        yield made


def packed(seed: int, sizes=(SIZE,) * 24) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as file:
        for number, size in enumerate(sizes):
            entry = tarfile.TarInfo(f"{number:03d}.bin")
            entry.size = size
            file.addfile(entry, io.BytesIO(np.random.default_rng((seed, number)).bytes(size)))
    return held.getvalue()


def opened(shelf, name="s-{0..2}.tar") -> Shards:
    return Shards(f"{shelf.address}/{name}", (".bin",), "data.path")


def is_whole(found: Shards) -> bool:
    """Whether all members of the shards of the shelf are there, with their bytes."""
    wanted = [np.random.default_rng((seed, n)).bytes(SIZE) for seed in range(3) for n in range(24)]
    return len(found) == 72 and [found.content(index) for index in range(72)] == wanted


class TestRequests:
    def test_they_are_few_and_several_at_a_time(self, shelf):
        shelf.delay = 0.02
        found = opened(shelf)
        blocks = sum(-(-len(content) // remote.BLOCK) for content in shelf.files.values())
        # Of each shard: its size, whether parts of it can be had, and its blocks.
        assert len(shelf.log) == 2 * 3 + blocks and shelf.most > 3
        shelf.log.clear()
        shelf.most = 0
        found.expect(range(len(found)))
        assert is_whole(found)
        pieces = len(found.blocks.sizes)
        assert len(shelf.log) == pieces < 24 and shelf.most >= shards.AHEAD
        shelf.log.clear()
        assert is_whole(opened(shelf)) and sum(line.startswith("HEAD") for line in shelf.log) == 3
        assert len(shelf.log) == 3 + pieces  # what the headers say is remembered

    def test_what_is_expected_no_more_is_let_go(self, shelf):
        found = opened(shelf)
        for _ in range(3):
            found.expect([0, 30, 60])
            found.expect([71, 0])
        assert found.content(71) and found.content(0) and not found._pieces.coming
        assert is_whole(found)

    def test_few_of_many_come_without_their_neighbours(self, shelf):
        found = opened(shelf)
        shelf.log.clear()
        found.expect([5, 30, 60], alone=True)
        for index in (5, 30, 60, 30):
            assert found.content(index) == np.random.default_rng((index // 24, index % 24)).bytes(SIZE)
        first = 5 * (SIZE // 512 + 2) * 512 + 512
        assert f"GET /s-0.tar bytes={first}-{first + SIZE - 1}" in shelf.log and len(shelf.log) == 4
        found.expect(range(72))
        assert is_whole(found)

    def test_large_members_are_not_fetched_for_their_headers(self, shelf, monkeypatch):
        monkeypatch.setattr(remote, "BLOCK", 1024)
        shelf.files["/t.tar"] = packed(0, (0, *[7 * 512] * 24))  # no header begins a block
        assert len(opened(shelf, "t.tar")) == 25
        assert sum("GET" in line for line in shelf.log) <= 1 + 25 + 2 * remote.AHEAD

    def test_a_worker_that_was_forked_asks_for_itself(self, shelf):
        for number in range(3):
            shelf.files[f"/p-{number}.tar"] = pictures(number)
        wanted, found = (list(batches(shelf, workers)) for workers in (0, 2))
        assert [each.keys for each in wanted] == [each.keys for each in found]
        assert all(torch.equal(one.x, other.x) for one, other in zip(wanted, found))
        assert len({key for each in wanted for key in each.keys}) == 24


def pictures(seed: int) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as file:
        for number in range(8):
            content = io.BytesIO()
            levels = np.random.default_rng((seed, number)).integers(0, 255, (20, 24, 3), np.uint8)
            Image.fromarray(levels).save(content, "PNG")
            entry = tarfile.TarInfo(f"{number}.png")
            entry.size = content.tell()
            file.addfile(entry, io.BytesIO(content.getvalue()))
    return held.getvalue()


def batches(shelf, workers: int):
    tree = {"path": f"{shelf.address}/p-{{0..2}}.tar", "modality": {"name": "rgb"}, "input_size": 16}
    cfg = configured("data", "tar", {**tree, "batch_size": 6})
    modality = registry().build("modality", cfg.modality, size=(16, 16))
    data = registry().build("data", cfg, split="train", modality=modality, extra={})
    how = {"seed": 0, "start_step": 0, "steps": 4, "accumulate": 1, "rank": 0, "world": 1}
    return (each.batch for each in TrainBatches(data, modality, {}, cfg, workers=workers, **how))


class TestFaults:
    @pytest.mark.parametrize("fault", [503, "drop", "refuse"])
    def test_what_passes_costs_nothing(self, shelf, fault):
        for before in range(4):
            shelf.faults = [None] * before + [fault, fault]
            found = opened(shelf)
            shelf.faults = [None] * before + [fault]
            found.expect(range(0, 72, 2))
            assert is_whole(found)

    @pytest.mark.parametrize("fault", [500, "drop", "refuse"])
    def test_what_stays_is_refused_and_no_shard_counts_as_shorter(self, shelf, fault):
        whole = shelf.files["/s-1.tar"]
        shelf.faults = [None] * 3 + [fault] * 999
        with pytest.raises(DataError, match=r"data\.path: .*/s-1\.tar: .*\(tried 4 times\)$") as said:
            opened(shelf, "s-1.tar")
        assert "\n" not in str(said.value)
        shelf.faults = []
        assert len(opened(shelf, "s-1.tar")) == 24 and shelf.files["/s-1.tar"] == whole

    @pytest.mark.parametrize(
        ("status", "says"), [(404, "No such file"), (403, "the server answers 403 Forbidden$")]
    )
    def test_an_answer_that_is_final_is_not_asked_for_again(self, shelf, status, says):
        found = opened(shelf)
        shelf.log.clear()
        shelf.faults = [status]
        with pytest.raises(DataError, match=rf"/s-0\.tar: {says}"):
            found.content(0)
        assert len(shelf.log) == 1 and is_whole(found)

    def test_no_shard_and_no_server(self, shelf):
        with pytest.raises(DataError, match=r"/t\.tar: there is no such shard"):
            opened(shelf, "t.tar")
        with pytest.raises(DataError, match=r"/s\.tar: .*onnect.*\(tried 4 times\)"):
            Shards("http://127.0.0.1:1/s.tar", (".bin",), "data.path")

    def test_a_server_that_sends_whole_files_only(self, shelf):
        found = opened(shelf)
        shelf.whole = True
        with pytest.raises(DataError, match=r"s-0\.tar: the server sends whole files only"):
            found.content(3)
        shelf.files["/t.tar"] = packed(9)
        with pytest.raises(DataError, match=r"data\.path: .*/t\.tar: the server sends whole files only"):
            opened(shelf, "t.tar")

    def test_without_the_package(self):
        code = """
        import sys
        sys.modules["aiohttp"] = None
        from vqcore.data.remote import Remote
        from vqcore.errors import DataError
        try:
            Remote("https://127.0.0.1/s.tar").stamp()
        except DataError as error:
            print(error)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
        )
        wanted = "the package 'aiohttp' is not installed; run: pip install 'vqcore[tar]'"
        assert done.stdout == f"https://127.0.0.1/s.tar: {wanted}\n"
