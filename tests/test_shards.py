"""Tar shards: names, damage, the cache of indices, addresses; the same batches as from a folder."""

import io
import os
import re
import subprocess
import sys
import tarfile
import textwrap
from dataclasses import replace
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from PIL import Image

from vqcore.check.overlap import copies, overlap
from vqcore.data import remote, shards
from vqcore.data.batches import TrainBatches
from vqcore.data.identity import CHOSEN, identity
from vqcore.data.lent import KEPT, Content
from vqcore.data.shards import Shards, expand
from vqcore.errors import ConfigError, DataError
from vqcore.files import scratch
from vqcore.modalities.rgb import RGB
from vqcore.registry import registry
from vqcore.testing.conformance import configured

SUFFIXES = (".jpg", ".png")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def packed(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name.replace("_", "."))
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def keys(found: Shards) -> list[str]:
    return [found.key(index) for index in range(len(found))]


def png(seed: int, mode: str = "RGB") -> bytes:
    levels = np.random.default_rng(seed).integers(0, 255, (20, 24, len(mode)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.squeeze()).save(file, "PNG")
    return file.getvalue()


class TestPattern:
    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("a.tar", ["a.tar"]),
            ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
            ("s-{8..10}.tar", ["s-8.tar", "s-9.tar", "s-10.tar"]),
            ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
            ("[x,y]/0.tar", ["x/0.tar", "y/0.tar"]),
        ],
    )
    def test_ranges_and_choices(self, pattern, names):
        assert expand(pattern, "data.path") == names

    @pytest.mark.parametrize(
        ("pattern", "reason"),
        [
            ("pipe:curl x", "would run a command, which is never done"),
            ("s-{9..3}.tar", "ends before it begins"),
            ("s-{0..9999999}.tar", "more than 1,000,000 shards"),
            ("{0..999}{0..9999}.tar", "more than 1,000,000 shards"),
        ],
    )
    def test_what_is_refused(self, pattern, reason):
        with pytest.raises(DataError, match=reason):
            expand(pattern, "data.path")


def test_stars_are_names_on_disk(tmp_path):
    for number in range(2):
        packed(tmp_path / f"s-{number}.tar", a_png=b"1")
    assert keys(Shards(str(tmp_path / "s-*.tar"), SUFFIXES, "data.path")) == ["s-0/a", "s-1/a"]
    with pytest.raises(DataError, match=r"t-\*\.tar: no file has such a name"):
        Shards(str(tmp_path / "t-*.tar"), SUFFIXES, "data.path")


class TestNames:
    def test_keys_begin_with_the_shard_and_fields_with_the_first_dot(self, tmp_path):
        packed(tmp_path / "s-1.tar", b_jpg=b"1", a_depth_png=b"2", a_png=b"3", c_txt=b"4")
        packed(tmp_path / "s-0.tar", b_PNG=b"5")
        found = Shards(str(tmp_path / "s-{0..1}.tar"), SUFFIXES, "data.path")
        assert keys(found) == ["s-0/b", "s-1/a", "s-1/b"]
        assert [found.content(index) for index in range(3)] == [b"5", b"3", b"1"]
        assert found.left_out == {".depth.png": 1, ".txt": 1}
        assert found.path(1).name == "a.png" and found.path(1).read_bytes() == b"3"
        depth = Shards(str(tmp_path / "s-1.tar"), SUFFIXES, "data.path", ["depth.png"])
        assert keys(depth) == ["s-1/a"] and found.without_partner(depth) == [0, 2]

    def test_what_is_no_plain_file_is_counted(self, tmp_path):
        with tarfile.open(packed(tmp_path / "s.tar", a_png=b"1"), "a") as file:
            for kind in (tarfile.SYMTYPE, tarfile.FIFOTYPE):
                entry = tarfile.TarInfo("b.png")
                entry.type, entry.linkname = kind, "/etc/passwd"
                file.addfile(entry)
        found = Shards(str(tmp_path / "s.tar"), SUFFIXES, "data.path")
        assert keys(found) == ["s/a"] and found.left_out == {"no plain file": 2}

    def test_names_that_lead_out_of_the_folder_are_left_out(self, tmp_path):
        with tarfile.open(tmp_path / "s.tar", "w") as file:
            for name in ("../../../up.png", "/root.png"):
                entry = tarfile.TarInfo(name)
                entry.size = 1
                file.addfile(entry, io.BytesIO(b"x"))
        with pytest.raises(DataError, match="Found: 2 x no plain file"):
            Shards(str(tmp_path / "s.tar"), SUFFIXES, "data.path")


class TestDamage:
    def test_a_shard_that_ends_early_counts_up_to_there(self, tmp_path, caplog):
        whole = packed(tmp_path / "s-0.tar", a_png=b"1" * 900, b_png=b"2" * 900).read_bytes()
        (tmp_path / "s-1.tar").write_bytes(whole[: 512 + 1024 + 512 + 100])
        found = Shards(str(tmp_path / "s-{0..1}.tar"), SUFFIXES, "data.path")
        assert keys(found) == ["s-0/a", "s-0/b", "s-1/a"]
        assert "s-1.tar: ends inside b.png; what comes before counts" in caplog.text
        assert found.left_out["damaged shard"] == 1

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda whole: whole[:2048], "has no end"),
            (lambda whole: whole[:2048] + b"?" * 512 + whole[2560:], "what follows is no member"),
        ],
    )
    def test_a_shard_that_goes_on_with_no_header_does_not_end_there(self, tmp_path, caplog, damage, reason):
        whole = packed(tmp_path / "s.tar", a_png=b"1", b_png=b"2", c_png=b"3").read_bytes()
        (tmp_path / "s.tar").write_bytes(damage(whole))
        found = Shards(str(tmp_path / "s.tar"), SUFFIXES, "data.path")
        assert keys(found) == ["s/a", "s/b"] and found.left_out["damaged shard"] == 1
        assert reason in caplog.text

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"\x1f\x8b" + b"x" * 600, "packed with gzip"),
            (b"no tar" * 200, "is damaged"),
            (b"", "is damaged"),
        ],
    )
    def test_what_is_no_shard(self, tmp_path, content, reason):
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            Shards(str(tmp_path / "s.tar"), SUFFIXES, "data.path")

    def test_missing_shards_are_counted_and_the_first_is_named(self, tmp_path):
        packed(tmp_path / "s-0.tar", a_png=b"1")
        with pytest.raises(
            DataError, match=r"2 of 3 shards cannot be read\. .*s-1\.tar: there is no such shard"
        ):
            Shards(str(tmp_path / "s-{0..2}.tar"), SUFFIXES, "data.path")

    def test_two_members_with_one_key(self, tmp_path):
        packed(tmp_path / "s.tar", a_png=b"1", a_jpg=b"2")
        with pytest.raises(DataError, match="two members are called a"):
            Shards(str(tmp_path / "s.tar"), SUFFIXES, "data.path")
        assert keys(Shards(str(tmp_path / "s.tar"), SUFFIXES, "data.path", ["jpg"])) == ["s/a"]

    def test_two_shards_with_one_name(self, tmp_path):
        for folder in "xy":
            (tmp_path / folder).mkdir()
            packed(tmp_path / folder / "s.tar", a_png=b"1")
        with pytest.raises(DataError, match="two shards are called s; keys begin with this name"):
            Shards(str(tmp_path / "{x,y}/s.tar"), SUFFIXES, "data.path")

    def test_nothing_to_read_says_what_there_is(self, tmp_path):
        packed(tmp_path / "s.tar", a_txt=b"1")
        with pytest.raises(DataError, match=r"contains no \.jpg or \.png\. Found: 1 x \.txt"):
            Shards(str(tmp_path / "s.tar"), SUFFIXES, "data.path")


def test_a_shard_is_scanned_once_until_it_changes(tmp_path, monkeypatch):
    path = packed(tmp_path / "s.tar", a_png=b"1")
    scans, scan = [], shards._scan

    def counted(place):
        scans.append(place.name)
        return scan(place)

    monkeypatch.setattr(shards, "_scan", counted)
    for _ in range(2):
        assert keys(Shards(str(path), SUFFIXES, "data.path")) == ["s/a"]
    assert len(scans) == 1
    packed(path, a_png=b"1", b_png=b"2")
    assert keys(Shards(str(path), SUFFIXES, "data.path")) == ["s/a", "s/b"]
    assert len(scans) == 2


@pytest.mark.slow
def test_a_process_leaves_no_files(tmp_path):
    path = packed(tmp_path / "s.tar", **{f"x{number}_png": b"1" * 100 for number in range(50)})
    code = f"""
    from vqcore.data.lent import KEPT
    from vqcore.data.shards import Shards
    found = Shards({str(path)!r}, (".png",), "data.path")
    files = [found.path(index) for index in range(len(found))]
    assert sum(file.exists() for file in files) == KEPT
    print(files[-1].parents[2])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert not Path(done.stdout.strip()).exists()
    assert scratch().parent == Path(done.stdout.strip()).parent


def test_an_address_is_read_like_a_file(tmp_path):
    for number in range(2):
        content = packed(tmp_path / f"s-{number}.tar", a_png=b"%d" % number * 700, b_png=b"9").read_bytes()
        fsspec.filesystem("memory").pipe(f"/bucket/s-{number}.tar", content)
    there = Shards("memory://bucket/s-{0..1}.tar", SUFFIXES, "data.path")
    here = Shards(str(tmp_path / "s-{0..1}.tar"), SUFFIXES, "data.path")
    assert keys(there) == keys(here)
    assert [there.content(index) for index in range(4)] == [here.content(index) for index in range(4)]
    with pytest.raises(DataError, match=r"memory://bucket/t\.tar: there is no such shard"):
        Shards("memory://bucket/t.tar", SUFFIXES, "data.path")
    with pytest.raises(DataError, match="nowhere://x"):
        Shards("nowhere://x/t.tar", SUFFIXES, "data.path")


def test_members_at_an_address_are_fetched_in_pieces(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    for shard in range(2):
        held = {f"x{n:02d}_png": png(100 * shard + n) for n in range(48)} | {"y_txt": b"9" * 3000}
        memory.pipe(f"/pieces/s-{shard}.tar", packed(tmp_path / f"s-{shard}.tar", **held).read_bytes())
    size = len(png(0))
    monkeypatch.setattr(shards, "PIECE", 8 * (size + 1024))
    requests, read = [], remote.Remote.read
    monkeypatch.setattr(remote.Remote, "read", lambda *args: requests.append(args) or read(*args))
    there, modality, extra, cfg = source("tar", path="memory://pieces/s-{0..1}.tar", suffix="png", extra={})
    here, *_ = source("tar", path=str(tmp_path / "s-{0..1}.tar"), suffix="png", extra={})
    assert here.blocks is None and sum(there.blocks.sizes) == 96 and max(there.blocks.sizes) <= 12
    requests.clear()
    assert [there.get(n).getvalue() for n in range(96)] == [here.get(n).getvalue() for n in range(96)]
    assert len(requests) == len(there.blocks.sizes) < 16
    # An epoch with room for four of the pieces.
    small = Shards("memory://pieces/s-{0..1}.tar", SUFFIXES, "data.path", ["png"], room=4 * 8 * (size + 1024))
    there._files, there.blocks = small, small.blocks
    requests.clear()
    made = [batch.keys for batch in batches(0, there, modality, extra, replace(cfg, batch_size=24))]
    keys_seen = {key for keys in made for key in keys}
    assert len(keys_seen) == 96
    assert len(requests) < 1.5 * len(small.blocks.sizes)


def test_an_address_that_shows_no_change_is_not_remembered(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    content = packed(tmp_path / "a.tar", a_png=b"1").read_bytes()
    other = packed(tmp_path / "b.tar", b_png=b"1").read_bytes()
    monkeypatch.setattr(remote, "_TAGS", ())
    for held, name in ((content, "a"), (other, "b")):
        memory.pipe("/silent/s.tar", held)
        assert keys(Shards("memory://silent/s.tar", SUFFIXES, "data.path")) == [f"s/{name}"]


def test_members_of_a_size_of_their_own_are_not_fetched_to_find_copies(tmp_path, monkeypatch):
    packed(tmp_path / "train.tar", **{f"x{n}_png": b"x" * (100 + n) for n in range(9)}, y_png=b"y" * 104)
    packed(tmp_path / "held.tar", **{f"z{n}_png": b"z" * (50 + n) for n in range(9)}, x_png=b"x" * 108)
    train, *_ = source("tar", path=str(tmp_path / "train.tar"), suffix="png", extra={})
    held, *_ = source("tar", path=str(tmp_path / "held.tar"), suffix="png", extra={})
    fetched, get = [], type(train).get
    monkeypatch.setattr(
        type(train), "get", lambda self, n, *more: fetched.append(self.key(n)) or get(self, n, *more)
    )
    assert not list(copies(train, "data.path"))
    assert set(fetched) == {"train/x4", "train/y"}
    fetched.clear()
    (both,) = overlap(train, held, "data.eval_path")
    assert "1 of 10 held-out samples that were compared with 10 training samples" in both.what
    assert "held/x has the content of train/x8" in both.what and set(fetched) == {"held/x", "train/x8"}


def test_check_finds_copies_among_more_members_than_lie_about(tmp_path):
    held = {f"x{number}_png": png(number) for number in range(3 * KEPT)}
    packed(tmp_path / "s.tar", **held, y_png=held["x1_png"])
    packed(tmp_path / "t.tar", z_png=held["x2_png"], other_png=png(999))
    train, *_ = source("tar", path=str(tmp_path / "s.tar"), extra={})
    eval_, *_ = source("tar", path=str(tmp_path / "t.tar"), extra={})
    (copy,) = copies(train, "data.path")
    assert {"s/x1", "s/y"} <= set(re.findall(r"s/\w+", copy.what))
    (both,) = overlap(train, eval_, "data.eval_path")
    assert "t/z has the content of s/x2" in both.what


def source(name: str, **settings):
    extra = {"valid": {"name": "mask"}}
    tree = {"modality": {"name": "rgb"}, "extra": extra, "input_size": 16, "batch_size": 3, **settings}
    cfg = configured("data", name, tree)
    built = {label: registry().build("modality", node, size=(16, 16)) for label, node in cfg.extra.items()}
    modality = registry().build("modality", cfg.modality, size=(16, 16))
    data = registry().build("data", cfg, split="train", modality=modality, extra=built)
    return data, modality, built, cfg


def batches(workers: int, *parts):
    data, modality, extra, cfg = parts
    made = TrainBatches(
        data,
        modality,
        extra,
        cfg,
        seed=0,
        start_step=0,
        steps=4,
        accumulate=1,
        rank=0,
        world=1,
        workers=workers,
    )
    return [loaded.batch for loaded in made]


class TestStreams:
    def test_a_member_stays_in_memory_for_modalities_that_read_streams(self, tmp_path):
        values = io.BytesIO()
        np.save(values, np.zeros((2, 4, 4), np.float32))
        packed(tmp_path / "s.tar", a_png=png(0), b_png=b"no picture", c_npy=values.getvalue())
        data, modality, *_ = source("tar", path=str(tmp_path / "s.tar"), extra={})
        given = data.get(0)
        assert isinstance(given, Content) and given.getvalue() == png(0)
        assert np.array_equal(modality.read(given), modality.read(given.as_file()))
        with pytest.raises(DataError, match=r"^.*/s\.tar: b\.png: is empty, damaged or no picture"):
            modality.read(data.get(1))
        array = {"name": "array", "channels": 2, "size": [4, 4]}
        arrays, *_ = source("tar", path=str(tmp_path / "s.tar"), modality=array, input_size=None, extra={})
        assert isinstance(arrays.get(0), Path) and arrays.get(0).name == "c.npy"

    def test_labels_that_read_alike_read_a_member_once(self, tmp_path, monkeypatch):
        packed(tmp_path / "s.tar", **{f"x{number}_png": png(number) for number in range(3)})
        calls, read = [], RGB.read
        monkeypatch.setattr(
            RGB, "read", lambda self, *args, **more: calls.append(args) or read(self, *args, **more)
        )
        again = {"extra": {"again": {"name": "rgb"}}, "extra_suffix": {"again": "png"}}
        made = batches(0, *source("tar", path=str(tmp_path / "s.tar"), **again))
        assert all(torch.equal(batch.x, batch.extras["again"]) for batch in made)
        assert len(calls) == sum(len(batch.keys) for batch in made) == 12

    def test_the_samples_are_those_of_a_modality_that_wants_files(self, tmp_path, monkeypatch):
        packed(tmp_path / "s.tar", **{f"x{number}_png": png(number) for number in range(3)})
        found = source("tar", path=str(tmp_path / "s.tar"), extra={})
        streamed, known = batches(0, *found), identity(found[0], ())
        monkeypatch.setattr(RGB, "streams", ())
        found = source("tar", path=str(tmp_path / "s.tar"), extra={})
        assert isinstance(found[0].get(0), Path)
        for one, other in zip(streamed, batches(0, *found), strict=True):
            assert torch.equal(one.x, other.x)
        assert identity(found[0], ()) == known


@pytest.mark.parametrize("own", [False, True], ids=["in the same shards", "in shards of their own"])
def test_batches_are_those_of_a_folder_with_the_same_keys(tmp_path, own):
    (tmp_path / "masks").mkdir()
    for shard in range(2):
        pictures = {f"x{n}_png": png(10 * shard + n) for n in range(4)}
        masks = {f"x{n}_{'png' if own else 'valid_png'}": png(90 + n, "L") for n in range(4)}
        packed(tmp_path / f"s-{shard}.tar", **pictures, **({} if own else masks))
        packed(tmp_path / f"masks/s-{shard}.tar", **masks)
        for name, held in (("rgb", pictures), ("mask", masks)):
            folder = tmp_path / name / f"s-{shard}"
            folder.mkdir(parents=True)
            for member, content in held.items():
                (folder / f"{member.split('_')[0]}.png").write_bytes(content)
    paths = {"extra_path": {"valid": str(tmp_path / "masks/s-{0..1}.tar")}} if own else {}
    fields = {} if own else {"extra_suffix": {"valid": "valid.png"}}
    tar = source("tar", path=str(tmp_path / "s-{0..1}.tar"), **paths, **fields)
    folder = source("folder", path=str(tmp_path / "rgb"), extra_path={"valid": str(tmp_path / "mask")})
    expected = batches(0, *folder)
    for workers in (0, 2):
        for one, other in zip(batches(workers, *tar), expected, strict=True):
            assert (
                one.keys == other.keys and torch.equal(one.x, other.x) and torch.equal(one.mask, other.mask)
            )


def test_the_shards_of_4m(tmp_path):
    """root/<modality>/shard-N.tar with members <id>.<ext>; brackets name modalities."""
    for folder, kind in (("rgb", "RGB"), ("mask_valid", "L")):
        (tmp_path / folder).mkdir()
        for shard in range(2):
            held = {f"{shard}{n:03d}_png": png(10 * shard + n, kind) for n in range(3)}
            packed(tmp_path / folder / f"shard-{shard:05d}.tar", **held)
    theirs = f"{tmp_path}/[rgb,mask_valid]/shard-{{00000..00001}}.tar"
    with pytest.raises(DataError, match=r"two shards are called shard-00000.*as in 4M.*data\.extra_path"):
        source("tar", path=theirs, extra_path={"valid": theirs})
    rgb, masks = (theirs.replace("rgb,mask_valid", each) for each in ("rgb", "mask_valid"))
    data, *rest = source("tar", path=rgb, extra_path={"valid": masks})
    assert [data.key(index) for index in (0, 5)] == ["shard-00000/0000", "shard-00001/1002"]
    assert all(
        batch.mask is not None and batch.x.shape == (3, 3, 16, 16) for batch in batches(0, data, *rest)
    )


def test_extras_need_a_field_or_shards_of_their_own(tmp_path):
    with pytest.raises(ConfigError, match=r"set data\.extra_suffix\.valid"):
        source("tar", path="s.tar")
    packed(tmp_path / "s.tar", a_png=png(0), b_png=png(1), a_valid_png=png(2, "L"))
    with pytest.raises(
        DataError, match=r"1 of 2 samples have no file for 'valid'.*s\.tar: b\.png: has no file"
    ):
        source("tar", path=str(tmp_path / "s.tar"), extra_suffix={"valid": "valid.png"})


def test_a_run_starts_without_reading_all_samples(tmp_path, monkeypatch):
    packed(tmp_path / "s.tar", **{f"x{number}_png": png(number) for number in range(CHOSEN + 9)})
    data, *_ = source("tar", path=str(tmp_path / "s.tar"), extra={})
    read, content = [], Shards.content

    def counted(self, index):
        read.append(index)
        return content(self, index)

    monkeypatch.setattr(Shards, "content", counted)
    assert identity(data, ())["samples"] == CHOSEN + 9
    assert len(read) == CHOSEN


def test_a_shard_that_vanished_is_a_bad_sample(tmp_path):
    path = packed(tmp_path / "s.tar", a_png=png(0))
    found = Shards(str(path), SUFFIXES, "data.path")
    os.truncate(path, 600)
    with pytest.raises(DataError, match=r"s\.tar: a\.png: [\d,]+ bytes are missing"):
        found.content(0)
