"""The store `tar`, as its readers see it: WebDataset itself, tarfile, and our own."""

import json
import os
import tarfile
from urllib.parse import unquote

import numpy as np
import pytest

from vqcore.artefacts.stored import open_store, store_named
from vqcore.errors import DataError
from vqcore.protocols import Coded
from vqcore.tokens import TokenDataset
from vqcore.tokens.shards import Shards
from vqcore.tokens.work import convert, verify

BYTES = os.fsdecode(b"caf\xe9")
MANIFEST = {
    "format": 1, "fingerprint": "ab12", "grid": [2, 3], "size": [8, 12], "codebook_size": 300, "num_codebooks": 1,
    "dtype": "uint16",
}  # fmt: skip
HARD = (
    "a.b",
    "c.d/e",
    "c.d/e.f.g",
    "__x__/y",
    "_/z",
    "100%",
    "%2E",
    "ü/ñ",
    "n\nl",
    "l" * 150,
    "__u__",
    BYTES,
)
"""Keys that readers of tars would cut, skip or confuse if they were written as they are."""


def view(number):
    return {"start": [0.0, 0.25], "stop": [1.0, 0.75], "flip": bool(number % 2), "extent": [20, 40]}


def crops(key, count, rng):
    return [
        Coded(
            f"{key}#crop{n}", rng.integers(300, size=(2, 3, 1)), {"record": key, "crop": n, "view": view(n)}
        )
        for n in range(count)
    ]


def written(folder, *shards, store="tar"):
    made = Shards(folder, store_named(store, ""), {**MANIFEST, "store": store}, len(shards))
    for name, rows in zip(made.names, shards):
        made.write(name, rows, {"of": len(rows), "failed": []})
    made.finish()
    return folder


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    plain = [Coded(key, rng.integers(300, size=(2, 3, 1))) for key in HARD]
    return written(tmp_path / "tok", plain, [*crops("p/q", 3, rng), *crops("p/r", 3, rng)])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_groups_as_it_was_written(store):
    webdataset = pytest.importorskip("webdataset")
    found = [
        list(webdataset.WebDataset(str(store / f"shard-0000{n}.tar"), shardshuffle=False).decode())
        for n in (0, 1)
    ]
    rows = TokenDataset(store)
    assert [unquote(each["__key__"]) for each in found[0]] == list(HARD)
    for place, each in enumerate(found[0]):
        fields = {name for name in each if not name.startswith("__")}
        assert fields == {"npy"}  # a row without extras: nothing to say
        assert each["npy"].dtype == np.uint16 and np.array_equal(each["npy"], rows[place])
    one, two = found[1]
    assert (one["__key__"], two["__key__"]) == ("p/q", "p/r")
    assert one["npy"].shape == (3, 2, 3, 1) and np.array_equal(two["npy"][2], rows[rows.find("p/r#crop2")])
    assert two["json"] == [
        {"key": f"p/r#crop{n}", "record": "p/r", "crop": n, "view": view(n)} for n in range(3)
    ]


def test_samples_from_a_tar_have_its_names(tmp_path):
    rows = [Coded(f"train-007/{n}", np.full((2, 3, 1), n)) for n in range(2)]
    store, manifest = store_named("tar", ""), {**MANIFEST, "store": "tar"}
    for shard, wanted in (
        ("train-007", ["0.npy", "1.npy"]),
        ("train-07", ["train-007/0.npy", "train-007/1.npy"]),
    ):
        files = store.write(tmp_path, shard, rows, manifest)
        with tarfile.open(tmp_path / f"{shard}.tar") as tar:
            assert tar.getnames() == wanted
        found = store.open(tmp_path, {**manifest, "shards": [{"name": shard, "rows": 2, "files": files}]})
        assert found.key(1) == "train-007/1" and found.find("train-007/0") == 0


def test_members_have_no_owner_and_no_time(store):
    with tarfile.open(store / "shard-00001.tar") as tar:
        members = tar.getmembers()
        content = tar.extractfile("p/q.json").read()
    assert [each.name for each in members] == ["p/q.npy", "p/q.json", "p/r.npy", "p/r.json"]
    assert {(each.mtime, each.uid, each.gid, each.uname, each.mode) for each in members} == {
        (0, 0, 0, "", 0o644)
    }
    assert json.loads(content)[1]["view"] == view(1)


def test_rows_are_views_of_the_mapped_tar(store):
    rows = open_store(store).rows
    place = rows.find("p/r#crop1")
    assert not rows.codes(place).flags.owndata and not rows.codes(place).flags.writeable
    assert rows.extras(place) == {"record": "p/r", "crop": 1, "view": view(1)}
    assert rows.many(np.array([], np.int64)).shape == (0, 2, 3, 1)


def test_a_tar_that_is_cut_off_or_gone_is_refused(store):
    tar = store / "shard-00001.tar"
    raw = tar.read_bytes()
    tar.write_bytes(raw[:-512])
    with pytest.raises(
        DataError, match=rf"shard-00001\.tar: this shard has {len(raw) - 512} bytes, and {len(raw)} w"
    ):
        open_store(store)
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.tar: there is no such file"):
        open_store(store)


def test_crops_and_extras_survive_every_layout(tmp_path):
    rng = np.random.default_rng(0)
    shards = [[*crops("a/b", 3, rng), *crops(BYTES, 3, rng)], crops("c", 3, rng)]
    written(tmp_path / "arrow", *shards, store="arrow")
    for source, target in (("arrow", "tar"), ("tar", "parquet"), ("parquet", "again")):
        store = "arrow" if target == "again" else target
        assert convert(open_store(tmp_path / source), tmp_path / target, store) == 9
        assert not verify([tmp_path / "arrow", tmp_path / target]).problems
        found = open_store(tmp_path / target)
        for place, row in enumerate(row for rows in shards for row in rows):
            copied = found.row(place)
            assert (copied.key, copied.extras) == (row.key, row.extras)
            assert np.array_equal(copied.codes, row.codes)
    for name in ("shard-00000.arrow", "shard-00001.arrow"):
        assert (tmp_path / "arrow" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(
        DataError, match=r"--store folder has no room for the view of a crop \(a/b#crop0\). Take arrow"
    ):
        convert(open_store(tmp_path / "tar"), tmp_path / "folder", "folder")
    assert not (tmp_path / "folder").exists()


def test_a_crop_is_a_sample_of_its_own(store):
    found = open_store(store)
    assert list(found.places)[-3:] == [f"p/r#crop{n}" for n in range(3)]
    assert found.record("p/r#crop1").shape == (2, 3, 1) and list(found.files)[-2:] == ["p/q", "p/r"]
