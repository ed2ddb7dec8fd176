"""What a pass reads and what it makes of a sample: crops, sources and their shards, several tokenizers, masks."""

import copy
import functools
import json
import re
import shutil
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toys import run_config, tokenizer_of, toy  # noqa: F401

from vqcore.artefacts.codes import packed, unpacked
from vqcore.artefacts.stored import open_store, store_named
from vqcore.cli import main
from vqcore.data.reader import Opened
from vqcore.errors import ConfigError, DataError, RunError
from vqcore.modalities.rgb import RGB as RGBModality
from vqcore.protocols import Coded, Window
from vqcore.tokens import TokenDataset, parts
from vqcore.tokens.crops import Drawn
from vqcore.tokens.inputs import source_of
from vqcore.tokens.parts import _Read as Whole
from vqcore.tokens.passes import tokenize_folder
from vqcore.tokens.sharded import Job, tokenize_all, tokenize_shards
from vqcore.tokens.shards import Shards

pytestmark = pytest.mark.usefixtures("toy")
RGB = {"name": "rgb", "min_crop_scale": 0.3, "ratio": [1.0, 1.0]}
ARRAY = {"name": "array", "channels": 2, "range": [-1, 1]}
NORMAL = {"name": "vision/normal"}
SEED = 3


@functools.cache
def _made(modality, size, seed, codes):
    config = run_config(
        "run",
        data__modality=json.loads(modality),
        data__input_size=size,
        model__quantizer={"name": "toy/quantizer", "codebook_size": codes},
        model__encoder={"name": "toy/encoder", "patch": 2},
    )
    torch.manual_seed(seed)
    return tokenizer_of(config).eval()


def made(modality, size=8, seed=0, codes=4096):
    """A tokenizer with random weights and many codes, so that another input has other codes."""
    return _made(json.dumps(modality), size, seed, codes)


def pictures(folder, *keys, sides=(32, 32)):
    rng = np.random.default_rng(0)
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(folder / f"{key}.png")
    return folder


def coordinates(folder, *keys, sides=(32, 32)):
    """Arrays whose values say where they are, other ones in each file."""
    for number, key in enumerate(keys, 1):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        places = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in sides), indexing="ij"))
        np.save(folder / f"{key}.npy", (places / number).astype(np.float32))
    return folder


def stored(tokenizer, source, target, **how):
    return tokenize_shards(tokenizer, source, target, **{"size": tokenizer.cfg.size, "shard_size": 3, **how})


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def shards_of(folder):
    """The name and the number of rows of each shard of a store."""
    manifest = json.loads((folder / "tokens.json").read_text())
    return [(shard["name"], shard["rows"]) for shard in manifest["shards"]]


def rows(folder):
    """The rows of a store by key."""
    store = open_store(folder)
    return {row.key: row for row in map(store.row, range(len(store.rows)))}


def saved(folder, views, codes):
    """A store whose rows have these views, by key."""
    manifest = {"format": 1, "fingerprint": "x", "grid": [4, 4], "size": [8, 8], "num_codebooks": 1,
                "codebook_size": 4096, "dtype": "uint16", "store": "arrow"}  # fmt: skip
    shards = Shards(folder, store_named("arrow", ""), manifest, 1)
    made = [
        Coded(key, codes, {"record": key.partition("#")[0], "crop": 0, "view": view})
        for key, view in views.items()
    ]
    shards.write("shard-00000", made, {"of": len(made), "failed": []})
    shards.finish()


def cut(array, view, factor=1):
    """The part of an array `(c, h, w)` that a stored view names, by hand."""
    edges = [
        [round(share * n * factor) for share, n in zip(view[name], view["extent"])]
        for name in ("start", "stop")
    ]
    (top, left), (bottom, right) = edges
    part = array[:, top:bottom, left:right]
    return part[..., ::-1] if view["flip"] else part


def code(tokenizer, array):
    return tokenizer.encode(tokenizer.read(np.ascontiguousarray(array)))[0].numpy()


class TestCrops:
    KEYS = ("a", "b/c", "d", "e")

    def test_the_next_modality_is_cropped_alike(self, tmp_path):
        rgb, places = made(RGB), made(ARRAY)
        pics = pictures(tmp_path / "rgb", *self.KEYS)
        assert stored(rgb, pics, tmp_path / "one", crops=4, seed=SEED).written == 4
        first = rows(tmp_path / "one")
        assert [*first][:5] == ["a#crop0", "a#crop1", "a#crop2", "a#crop3", "b/c#crop0"]
        whole = {"start": [0, 0], "stop": [1, 1], "flip": False, "extent": [32, 32]}
        assert first["a#crop0"].extras == {"record": "a", "crop": 0, "view": whole}
        views = [row.extras["view"] for row in first.values()]
        assert {view["flip"] for view in views} == {False, True}
        areas = [np.prod(np.subtract(view["stop"], view["start"])) for view in views]
        assert 0.25 < min(areas) < 0.5 and max(areas) == 1  # min_crop_scale, up to whole pixels
        for key, row in first.items():
            picture = np.asarray(Image.open(pics / f"{row.extras['record']}.png"))
            part = cut(picture.transpose(2, 0, 1), row.extras["view"]).transpose(1, 2, 0)
            assert np.array_equal(row.codes, code(rgb, part)), key
        where = coordinates(tmp_path / "in", *self.KEYS, sides=(64, 64))  # of another size
        stored(places, where, tmp_path / "two", views=tmp_path / "one")
        second = rows(tmp_path / "two")
        assert [*second] == [*first]
        for key, row in second.items():
            view = row.extras["view"]
            assert view == first[key].extras["view"]
            part = torch.from_numpy(cut(np.load(where / f"{row.extras['record']}.npy"), view, 2).copy())[None]
            x = torch.nn.functional.interpolate(part, (8, 8), mode="bilinear", antialias=True)
            assert np.array_equal(row.codes, places.encode(x)[0].numpy()), key
        both = TokenDataset({"rgb": tmp_path / "one", "places": tmp_path / "two"})
        assert len(both) == 16 and both.extras(5)["view"] == both.extras(5, "places")["view"]

    def test_normals_are_mirrored_as_vectors(self, tmp_path):
        rng, normals = np.random.default_rng(0), made(NORMAL)
        n = rng.normal(size=(3, 32, 32)).astype(np.float32)
        n /= np.linalg.norm(n, axis=0)
        (tmp_path / "in").mkdir()
        np.save(tmp_path / "in/a.npy", n)
        stored(made(RGB), pictures(tmp_path / "rgb", "a"), tmp_path / "one", crops=8, seed=SEED)
        stored(normals, tmp_path / "in", tmp_path / "two", views=tmp_path / "one")
        found = [(row.codes, row.extras["view"]) for row in rows(tmp_path / "two").values()]
        assert {view["flip"] for _, view in found} == {False, True}
        for codes, view in found:
            sign = np.array([-1 if view["flip"] else 1, 1, 1], np.float32)
            assert np.array_equal(codes, code(normals, cut(n, view) * sign[:, None, None]))

    @pytest.mark.slow
    def test_a_crop_follows_from_seed_key_and_number_alone(self, tmp_path):
        rgb = made(RGB)
        pics = pictures(tmp_path / "in", *self.KEYS)
        stored(rgb, pics, tmp_path / "four", crops=4, workers=0)
        stored(rgb, pics, tmp_path / "two", crops=2, workers=3, shard_size=1, batch_size=1)
        stored(rgb, pictures(tmp_path / "less", "d", "b/c"), tmp_path / "some", crops=3)
        stored(rgb, pics, tmp_path / "other", crops=4, seed=1)
        four, others = rows(tmp_path / "four"), rows(tmp_path / "other")
        for name in ("two", "some"):
            found = rows(tmp_path / name)
            assert all(row.extras == four[key].extras for key, row in found.items())
        same = [key for key in four if four[key].extras == others[key].extras]
        assert same == [f"{key}#crop0" for key in self.KEYS]

    @pytest.mark.slow
    def test_samples_in_one_file(self, tmp_path):
        places = made({**ARRAY, "min_crop_scale": 0.3, "hflip": 0.5})
        (tmp_path / "in").mkdir()
        many = np.random.default_rng(0).uniform(-1, 1, (3, 2, 16, 16)).astype(np.float32)
        np.save(tmp_path / "in/many.npy", many)
        stored(places, tmp_path / "in", tmp_path / "one", crops=2)
        found = rows(tmp_path / "one")
        assert [*found] == [f"many#{n}#crop{crop}" for n in range(3) for crop in range(2)]
        assert {"record": "many", "row": 2, "crop": 1}.items() <= found["many#2#crop1"].extras.items()
        stored(places, tmp_path / "in", tmp_path / "two", views=tmp_path / "one")
        assert {key: row.extras for key, row in rows(tmp_path / "two").items()} == {
            key: row.extras for key, row in found.items()
        }

    def test_windows_in_a_source_have_crops_inside(self):
        """The views of a part of a file are those of the part; what is cut is cut from the file."""
        places = made({**ARRAY, "min_crop_scale": 0.3})
        raw = np.random.default_rng(0).uniform(-1, 1, (2, 20, 40)).astype(np.float32)
        part = Opened(raw, places.modality, Window(raw, (0, 16), (20, 36)))
        views = Drawn(places, (8, 8), 3, 0).of("k", part)
        alone = Drawn(places, (8, 8), 3, 0).of("k", Opened(raw[:, :, 16:36], places.modality))
        assert views == alone and views[0].extent == (20, 20)
        for one, other in (
            (
                places.prepared(part, (8, 8), None, views),
                places.prepared(raw[:, :, 16:36], (8, 8), None, views),
            ),
        ):
            for number in range(3):
                assert torch.equal(one.part(number)[0], other.part(number)[0])

    def test_keys_that_are_missing_are_counted_and_named(self, tmp_path):
        rgb, places = made(RGB), made(ARRAY)
        pics = pictures(tmp_path / "rgb", "a", "b", "c")
        (pics / "c.png").write_bytes(b"junk")
        stored(rgb, pics, tmp_path / "one", crops=2)
        where = coordinates(tmp_path / "in", "a", "b", "c", "x", "y")
        with pytest.raises(DataError, match=r"one lacks 2 of 4 keys \(x, y\)"):
            stored(places, where, tmp_path / "two", views=tmp_path / "one")
        assert not (tmp_path / "two").exists()
        for key in ("x", "y"):
            (where / f"{key}.npy").unlink()
        done = stored(places, where, tmp_path / "two", views=tmp_path / "one")
        assert (done.written, done.keys) == (2, ["c"]) and "one has no views of 'c'" in done.failed[0]
        coordinates(tmp_path / "wide", "a", sides=(32, 40))
        with pytest.raises(DataError, match=r"its extent is 32 x 40, and its crops in .*one are of 32 x 32"):
            stored(places, tmp_path / "wide", tmp_path / "three", views=tmp_path / "one")

    @pytest.mark.parametrize(
        "change",
        [{"flip": 1}, {"stop": [1, 2]}, {"extent": [32]}],
        ids=str,
    )
    def test_a_view_that_is_none_costs_its_sample(self, tmp_path, change):
        good = {"start": [0, 0], "stop": [0.5, 0.5], "flip": False, "extent": [32, 32]}
        codes = np.zeros((4, 4, 1), np.uint16)
        saved(tmp_path / "one", {"a#crop0": {**good, **change}, "b#crop0": good}, codes)
        where = coordinates(tmp_path / "in", "a", "b")
        done = stored(made(ARRAY), where, tmp_path / "two", views=tmp_path / "one")
        assert (done.written, done.keys) == (1, ["a"]) and "one: 'a#crop0': {" in done.failed[0]

    @pytest.mark.slow
    def test_it_goes_on_only_with_the_same_crops(self, tmp_path):
        rgb = made(RGB)
        pics = pictures(tmp_path / "in", "a")
        stored(rgb, pics, tmp_path / "one", crops=2)
        manifest = json.loads((tmp_path / "one/tokens.json").read_text())
        drawn = {"modality": "rgb", "size": [8, 8], "hflip": 0.5, "min_crop_scale": 0.3}
        said = manifest["crops"]
        assert (said["count"], said["seed"]) == (2, 0) and drawn == {key: said["drawn"][key] for key in drawn}
        for change in ({}, {"crops": 3}, {"crops": 2, "seed": 1}, {"views": tmp_path / "one"}):
            with pytest.raises(RunError, match=r"different: crops"):
                stored(rgb, pics, tmp_path / "one", **change)
        softer = made({**RGB, "min_crop_scale": 0.9})
        assert softer.fingerprint == rgb.fingerprint
        with pytest.raises(RunError, match=r"different: crops"):
            stored(softer, pics, tmp_path / "one", crops=2)

    @pytest.mark.parametrize(
        ("modality", "how", "says"),
        [
            ({**ARRAY, "rank": 1}, {"crops": 2}, "--crops is for samples that are cropped"),
            (ARRAY, {"crops": 2}, "all crops of a sample would be alike: the modality array .* --views STORE"),
            ({**ARRAY, "hflip": 0.5}, {"crops": 2, "tiles": True}, "--crops is for samples that are cropped"),
            ({**ARRAY, "hflip": 0.5}, {"crops": 2, "views": "plain"}, "--crops 2: --views takes all crops of"),
            (ARRAY, {"views": "plain"}, "plain: its rows have no views: it was made without --crops"),
            ({"name": "vision/instance"}, {"crops": 2}, "not simply a part of a file"),
        ],
        ids=["windows", "alike", "tiles", "both", "without", "own box"],
    )  # fmt: skip
    def test_what_has_no_crops_is_refused(self, tmp_path, modality, how, says):
        if "views" in how:
            stored(made(ARRAY), coordinates(tmp_path / "in", "a"), tmp_path / "plain")
            how = {**how, "views": tmp_path / how["views"]}
        tokenizer = made(modality)
        coordinates(pictures(tmp_path / "pics", "a"), "b")
        with pytest.raises(ConfigError, match=says):
            stored(tokenizer, tmp_path / "pics", tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()


def tarred(folder, shards):
    """Tar shards of pictures and arrays, `{shard: keys}`; returns the pattern."""
    folder.mkdir(parents=True)
    for shard, keys in shards.items():
        files = pictures(folder / "files" / shard, *keys)
        coordinates(files, *keys)
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for path in sorted(files.rglob("*.*")):
                tar.add(path, path.relative_to(files))
    return f"{folder}/train-{{00..0{len(shards) - 1}}}.tar"


SHARDS = {"train-00": ["a", "b"], "train-01": [], "train-02": ["c", "d/e", "f"]}


class TestSources:
    def test_shards_and_keys_of_tars_survive(self, tmp_path):
        rgb, places = made(RGB), made(ARRAY)
        pattern = tarred(tmp_path / "in", SHARDS)
        assert stored(rgb, pattern, tmp_path / "one", shard_size=None, workers=2).written == 5
        assert shards_of(tmp_path / "one") == [("train-00", 2), ("train-01", 0), ("train-02", 3)]
        keys = ["train-00/a", "train-00/b", "train-02/c", "train-02/d/e", "train-02/f"]
        found = rows(tmp_path / "one")
        assert [*found] == keys
        for key, row in found.items():
            assert np.array_equal(
                row.codes, code(rgb, np.asarray(Image.open(tmp_path / f"in/files/{key}.png")))
            )
        tokenize_folder(rgb, pattern, tmp_path / "files", size=(8, 8))
        assert np.array_equal(np.load(tmp_path / "files/train-02/d/e.npy"), found["train-02/d/e"].codes)
        stored(places, f"tar[suffix=npy]:{pattern}", tmp_path / "two", shard_size=None)
        assert len(TokenDataset({"x": tmp_path / "one", "y": tmp_path / "two"})) == 5
        stored(rgb, pattern, tmp_path / "three", shard_size=2)
        assert shards_of(tmp_path / "three") == [
            ("train-00-00000", 2), ("train-01-00000", 0), ("train-02-00000", 2), ("train-02-00001", 1)
        ]  # fmt: skip
        assert [*rows(tmp_path / "three")] == keys

    def test_files_and_keys_of_parquet_survive(self, tmp_path, monkeypatch):
        places = made(ARRAY)
        values = np.random.default_rng(0).uniform(-1, 1, (7, 2, 8, 8)).astype(np.float32)
        files = {"b": [0, 1, 2, None], "a/100%": [3, 4], "c": [], "d": [5, 6]}
        for name, numbers in files.items():
            held = [None if n is None else values[n].tolist() for n in numbers]
            kind = pa.list_(pa.list_(pa.list_(pa.float32())))
            table = pa.table(
                {"x": pa.array(held, kind), "id": pa.array([f"k{n}" for n in numbers], pa.string())}
            )
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, tmp_path / f"in/{name}.parquet", row_group_size=3)
        given = f"parquet:{tmp_path}/in"
        stored(places, given, tmp_path / "one", shard_size=None)
        assert shards_of(tmp_path / "one") == [("a%2F100%25", 2), ("b", 3), ("c", 0), ("d", 2)]
        found = rows(tmp_path / "one")
        wanted = {
            f"{file}/{row:09}": n for file, ns in files.items() for row, n in enumerate(ns) if n is not None
        }
        assert {*found} == {*wanted}
        assert all(np.array_equal(found[key].codes, code(places, values[n])) for key, n in wanted.items())
        monkeypatch.setattr("vqcore.tokens.inputs.LARGEST", 2)
        stored(places, f"parquet[key=id]:{tmp_path}/in", tmp_path / "two", shard_size=None)
        assert shards_of(tmp_path / "two") == [
            ("a%2F100%25-00000", 2), ("b-00000", 2), ("b-00001", 1), ("c-00000", 0), ("d-00000", 2)
        ]  # fmt: skip
        again = rows(tmp_path / "two")
        assert [*again] == [f"k{n}" for n in (3, 4, 0, 1, 2, 5, 6)]
        assert all(np.array_equal(again[f"k{n}"].codes, found[key].codes) for key, n in wanted.items())

    @pytest.mark.slow
    def test_a_broken_member_is_named_always_alike_and_done_again(self, tmp_path):
        rgb = made(RGB)
        pattern = tarred(tmp_path / "in", SHARDS)
        whole = tmp_path / "in/train-02.tar"
        good = whole.read_bytes()
        at = good.index(b"\x89PNG", good.index(b"d/e.png"))
        whole.write_bytes(good[:at] + b"junk" + good[at + 4 :])
        how = {"shard_size": None, "workers": 1}
        done = stored(rgb, pattern, tmp_path / "one", **how)
        assert (
            done.keys == ["train-02/d/e"] and f"{pattern}: train-02/d/e: is empty, damaged" in done.failed[0]
        )
        stored(rgb, pattern, tmp_path / "two", **{**how, "workers": 3})
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        whole.write_bytes(good)
        (tmp_path / "todo").write_text("train-02/d/e\n")
        done = stored(rgb, pattern, tmp_path / "one", only=tmp_path / "todo", **how)
        assert (done.written, done.skipped) == (3, 2) and "train-02/d/e" in rows(tmp_path / "one")

    @pytest.mark.slow
    def test_a_member_stays_a_file_while_others_are_asked_for(self, tmp_path, monkeypatch):
        """One thread is slow to read its file, and the others ask for more files than are lent at a time."""
        pattern, real = (
            tarred(tmp_path / "in", {"train-00": [f"{n:02}" for n in range(40)]}),
            RGBModality.read,
        )

        def read(self, source, *more):
            time.sleep(0.5 if "/00.png" in str(source) else 0)
            return real(self, source, *more)

        monkeypatch.setattr(RGBModality, "read", read)
        monkeypatch.setattr(RGBModality, "streams", ())
        done = stored(
            made({**RGB, "std": [0.45] * 3}), pattern, tmp_path / "one", shard_size=None, workers=12
        )
        assert (done.written, done.failed) == (40, [])

    def test_tokenizers_that_want_files_get_files_beside_one_that_reads_streams(self, tmp_path, monkeypatch):
        pattern = tarred(tmp_path / "in", SHARDS)
        one, other = made({**RGB, "std": [0.35] * 3}), made({**RGB, "std": [0.3] * 3})
        stored(other, pattern, tmp_path / "alone", shard_size=None)
        modality, given = other.modality, []
        read = modality.read
        monkeypatch.setattr(modality, "streams", (), raising=False)
        monkeypatch.setattr(modality, "reading", "its own")
        monkeypatch.setattr(
            modality, "read", lambda source: given.append(source) or read(source), raising=False
        )
        jobs = [
            Job(tokenizer=each, target=tmp_path / name, size=(8, 8))
            for each, name in ((one, "one"), (other, "other"))
        ]
        tokenize_all(pattern, jobs)
        assert len(given) == 5 and all(isinstance(each, Path) for each in given)
        assert [row.codes.tolist() for row in rows(tmp_path / "other").values()] == [
            row.codes.tolist() for row in rows(tmp_path / "alone").values()
        ]

    @pytest.mark.parametrize(("room", "read"), [(64 << 20, 9), (0, 5)])
    def test_a_batch_of_files_is_read_while_another_is_encoded(self, tmp_path, monkeypatch, room, read):
        """Besides the first one, eight; large ones cost memory: two for each of two threads."""
        monkeypatch.setattr(parts, "AHEAD", room)
        tokenizer = made(ARRAY)
        folder = coordinates(tmp_path / "in", *(f"{number:02}" for number in range(20)), sides=(8, 8))
        source, take, begun = source_of(folder, tokenizer), parts.Take(tokenizer, (8, 8)), []
        monkeypatch.setattr(
            parts, "_Read", lambda source, place, *how: begun.append(place) or Whole(source, place, *how)
        )
        items = parts.inputs(source, range(20), [take], 2, 8)
        next(items)
        end = time.monotonic() + 20
        while len(begun) < read and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)  # and no more
        assert sorted(begun) == list(range(read))
        assert len(list(items)) == 19

    def test_any_source_by_name(self, tmp_path):
        places = made(ARRAY)
        values = np.random.default_rng(0).uniform(-1, 1, (7, 2, 8, 8)).astype(np.float32)
        np.save(tmp_path / "x.npy", values)
        stored(places, f"array:{tmp_path}/x.npy", tmp_path / "one")
        found = rows(tmp_path / "one")
        assert [*found] == [str(n) for n in range(7)]
        assert all(np.array_equal(row.codes, code(places, values[int(key)])) for key, row in found.items())
        stored(places, "toy/waves:", tmp_path / "two")
        assert len(rows(tmp_path / "two")) > 7
        coordinates(tmp_path / "array:odd", "a")
        assert stored(places, str(tmp_path / "array:odd"), tmp_path / "three").written == 1
        for given, says in (
            (f"aray:{tmp_path}/x.npy", r"tokenize: aray:.*: there is no such folder"),
            (f"{tmp_path}/none-{{0..1}}.tar", r"tokenize: 2 of 2 shards cannot be read"),
            (f"{tmp_path}/none.tar", r"tokenize: .*none\.tar: there is no such shard"),
        ):
            with pytest.raises(DataError, match=says):
                stored(places, given, tmp_path / "no", shard_size=None)
        with pytest.raises(ConfigError, match=r"tar\[sufix=npy\].*sufix.*Did you mean 'suffix'"):
            stored(places, f"tar[sufix=npy]:{tmp_path}/a.tar", tmp_path / "no")

    def test_a_shard_with_the_name_of_the_manifest(self, tmp_path):
        tarred(tmp_path / "in", {"tokens": ["a"]})
        with pytest.raises(RunError, match=r"no shard can be called 'tokens'"):
            stored(made(RGB), f"{tmp_path}/in/tokens.tar", tmp_path / "one", shard_size=None)


class TestSeveral:
    def test_each_store_has_the_bytes_of_a_pass_of_its_own(self, tmp_path, monkeypatch):
        pics = pictures(tmp_path / "in", *"abcdefgh")
        (pics / "d.png").write_bytes(b"junk")
        how = {"shard_size": 3, "crops": 3}
        calls = []
        real = RGBModality.read
        monkeypatch.setattr(
            RGBModality,
            "read",
            lambda self, source, *more: calls.append(source) or real(self, source, *more),
        )
        one, other = (
            made({**RGB, "std": [0.4] * 3}),
            made({**RGB, "mean": [0.4] * 3}, size=16),
        )  # know the new read
        jobs = [
            Job(tokenizer=one, target=tmp_path / "one", size=(8, 8), batch_size=4),
            Job(tokenizer=other, target=tmp_path / "other", size=(16, 16), batch_size=5, store="parquet"),
        ]
        done = tokenize_all(pics, jobs, workers=2, **how)
        assert [(each.written, each.keys) for each in done] == [(7, ["d"])] * 2
        assert len(calls) == 8 + 1  # the broken one fails for both
        stored(one, pics, tmp_path / "one-alone", batch_size=4, **how)
        assert contents(tmp_path / "one") == contents(tmp_path / "one-alone")
        views = {key: row.extras["view"] for key, row in rows(tmp_path / "one").items()}
        assert {key: row.extras["view"] for key, row in rows(tmp_path / "other").items()} == views
        before = contents(tmp_path / "other")
        kept = (tmp_path / "one/shard-00000.arrow").stat().st_mtime_ns
        shutil.rmtree(tmp_path / "other")
        done = tokenize_all(pics, jobs, **how)  # one store has all, the other none
        assert [(each.written, each.skipped) for each in done] == [(0, 7), (7, 0)]
        assert contents(tmp_path / "other") == before
        assert (tmp_path / "one/shard-00000.arrow").stat().st_mtime_ns == kept

    @pytest.mark.slow
    def test_so_have_windows_and_vectors_of_arrays(self, tmp_path):
        """Of modalities that read for themselves, with files of several samples, and with windows."""
        one, other = made({**ARRAY, "rank": 1}), made({**ARRAY, "rank": 1, "range": [-2, 2]}, size=4, seed=1)
        (tmp_path / "in").mkdir()
        for number, length in enumerate((8, 20, 3, 11)):
            sound = np.random.default_rng(number).uniform(-1, 1, (2, length)).astype(np.float32)
            np.save(tmp_path / f"in/{number}.npy", sound)
        np.save(
            tmp_path / "in/many.npy", np.random.default_rng(9).uniform(-1, 1, (3, 2, 10)).astype(np.float32)
        )
        jobs = [
            Job(tokenizer=one, target=tmp_path / "one", size=(8,), batch_size=2),
            Job(tokenizer=other, target=tmp_path / "other", size=(4,), batch_size=3),
        ]
        tokenize_all(tmp_path / "in", jobs, shard_size=2)
        for job in jobs:
            alone = tmp_path / "alone" / job.target.name
            stored(
                job.tokenizer, tmp_path / "in", alone, size=job.size, batch_size=job.batch_size, shard_size=2
            )
            assert contents(alone) == contents(job.target)

    def test_what_does_not_fit_is_refused(self, tmp_path):
        rgb, places = made(RGB), made(ARRAY)
        pics = pictures(tmp_path / "in", "a")
        first = Job(tokenizer=rgb, target=tmp_path / "one", size=(8, 8))
        other = Job(tokenizer=places, target=tmp_path / "two", size=(8, 8), named="runs/xy")
        says = r"--also runs/xy: it does not read the same kinds .* alone reads .*\.npy"
        with pytest.raises(ConfigError, match=says):
            tokenize_all(pics, [first, other])
        with pytest.raises(ConfigError, match=r"two tokenizers write to .*one"):
            tokenize_all(pics, [first, replace(first, size=(16, 16))])
        assert not (tmp_path / "one").exists()


class TestValid:
    def test_bits(self):
        rng = np.random.default_rng(0)
        for grid in ((3,), (4, 2), (14, 14), (2, 3, 5)):
            valid = rng.random(grid) < 0.5
            assert np.array_equal(unpacked(packed(valid), grid), valid)
        assert packed(np.array([[True, False], [True, True]])) == "b0" and unpacked(None, (2, 2)).all()
        for bad in ("b", "zz", "b000", ""):
            with pytest.raises(DataError, match="does not say which of 4 positions are valid"):
                unpacked(bad, (2, 2))

    def test_holes_of_depth_stand_in_the_rows(self, tmp_path):
        depth = made({"name": "vision/depth", "scaling": "linear", "range": [0, 10], "hflip": 0.5})
        z = np.random.default_rng(0).uniform(1, 9, (8, 8)).astype(np.float32)
        (tmp_path / "in").mkdir()
        np.save(tmp_path / "in/whole.npy", z)
        z[:4, 6:] = np.nan
        z[7, 7] = np.nan  # of a cell with other positions
        np.save(tmp_path / "in/holes.npy", z)
        stored(depth, tmp_path / "in", tmp_path / "one")
        data = TokenDataset(tmp_path / "one")
        assert data.extras(data.find("whole")) == {}
        place = data.find("holes")
        wanted = np.ones((4, 4), dtype=bool)
        wanted[:2, 3] = False
        assert data.extras(place) == {"valid": packed(wanted)}
        assert (
            torch.equal(data.valid(place), torch.from_numpy(wanted)) and data.valid(data.find("whole")).all()
        )
        view = {"start": [0, 0], "stop": [1, 1], "flip": True, "extent": [8, 8]}
        saved(
            tmp_path / "views",
            {"holes#crop0": view, "whole#crop0": view},
            rows(tmp_path / "one")["holes"].codes,
        )
        stored(depth, tmp_path / "in", tmp_path / "two", views=tmp_path / "views")
        mirrored = rows(tmp_path / "two")["holes#crop0"]
        assert np.array_equal(unpacked(mirrored.extras["valid"], (4, 4)), wanted[:, ::-1])
        assert np.array_equal(mirrored.codes, code(depth, z[:, ::-1]))

    @pytest.mark.parametrize(
        "how",
        [
            pytest.param({}, id="whole"),
            pytest.param({"crops": 3, "seed": SEED}, id="crops", marks=pytest.mark.slow),
            pytest.param({"tiles": True}, id="tiles", marks=pytest.mark.slow),
        ],
    )
    def test_masks_beside(self, tmp_path, how):
        """As if the pictures were black where the mask is."""
        rgb, rng = made(RGB), np.random.default_rng(1)
        pics = pictures(tmp_path / "in", "a", "b/c", sides=(16, 16))
        hidden = {"a": rng.random((16, 16)) < 0.3, "b/c": np.zeros((16, 16), dtype=bool)}
        hidden["a"][:8, 8:] = True
        for key, where in hidden.items():
            for folder, picture in (("masks", np.where(where, 0, 255)), ("black", None)):
                (tmp_path / folder / key).parent.mkdir(parents=True, exist_ok=True)
                if picture is None:
                    picture = np.where(where[..., None], 0, np.asarray(Image.open(pics / f"{key}.png")))
                Image.fromarray(picture.astype(np.uint8)).save(tmp_path / folder / f"{key}.png")
        given = f"mask[mask_value=-1]:{tmp_path}/masks"
        size = {"size": (16, 16)} if how.get("crops") is None and "tiles" not in how else {}
        stored(rgb, pics, tmp_path / "one", masks=given, **size, **how)
        stored(rgb, tmp_path / "black", tmp_path / "two", **size, **how)
        found, black = rows(tmp_path / "one"), rows(tmp_path / "two")
        assert [*found] == [*black]
        for key, row in found.items():
            plain = {name: value for name, value in row.extras.items() if name != "valid"}
            assert plain == black[key].extras
            if "crops" not in how:  # else black and colours are mixed by the resize
                assert np.array_equal(row.codes, black[key].codes), key
        if not how:
            cells = ~hidden["a"].reshape(8, 2, 8, 2).all((1, 3))
            assert np.array_equal(unpacked(found["a"].extras["valid"], (8, 8)), cells)
            assert found["b/c"].extras == {}
        assert any("valid" in row.extras for row in found.values())

    def test_masks_that_do_not_fit_are_refused(self, tmp_path):
        rgb, pics = made(RGB), pictures(tmp_path / "in", "a", "b", "c")
        pictures(tmp_path / "masks", "a", sides=(32, 40))
        for given, how, says in (
            (f"{tmp_path}/masks", {}, r"masks: 2 of 3 samples have no mask \(b, c\)"),
            (
                f"mask[mask_value=-2]:{tmp_path}/masks",
                {},
                r"mask\.mask_value=-2 is not a value of data\.modality",
            ),
            (f"rgb:{tmp_path}/masks", {}, r"rgb is no modality of masks"),
            (f"mask[treshold=3]:{tmp_path}/masks", {}, r"Did you mean 'threshold'"),
            (f"{tmp_path}/nothing", {}, r"--masks: .*nothing: there is no such folder"),
        ):
            with pytest.raises((ConfigError, DataError), match=says):
                stored(rgb, pics, tmp_path / "one", masks=given, **how)
        assert not (tmp_path / "one").exists()
        Image.fromarray(np.full((32, 40), 255, np.uint8)).save(tmp_path / "masks/a.png")
        for key in "bc":
            Image.fromarray(np.full((64, 64), 255, np.uint8)).save(tmp_path / f"masks/{key}.png")
        done = stored(rgb, pics, tmp_path / "one", masks=f"{tmp_path}/masks")
        assert (done.written, done.keys) == (
            2,
            ["a"],
        ) and "of 32 x 40 does not fit the sample of 32 x 32" in done.failed[0]

    def test_what_fills_up_a_window_is_not_valid(self, tmp_path):
        wave = made({**ARRAY, "rank": 1})
        (tmp_path / "in").mkdir()
        np.save(tmp_path / "in/long.npy", np.random.default_rng(0).uniform(-1, 1, (2, 12)).astype(np.float32))
        stored(wave, tmp_path / "in", tmp_path / "one")
        found = rows(tmp_path / "one")
        assert "valid" not in found["long#0"].extras
        assert unpacked(found["long#8"].extras["valid"], (4,)).tolist() == [True, True, False, False]


class TestPrecision:
    def test_it_is_compared_with_fp32_and_said_or_refused(self, tmp_path, caplog):
        caplog.set_level("INFO")
        one, many = made(RGB, codes=1), made(RGB)
        pics = pictures(tmp_path / "in", *"abcdefgh", sides=(8, 8))
        x = torch.cat([many.read(pics / f"{key}.png") for key in "abcdefgh"])
        exact = many.encode(x)
        one, many = copy.copy(one), copy.copy(many)
        one.precision = many.precision = "bf16"
        assert stored(one, pics, tmp_path / "one").written == 8  # a single code is always the same
        assert "--precision bf16: 100.00% of 48 positions have the codes of fp32." in caplog.messages
        share = float((many.encode(x) == exact)[:3].float().mean())
        says = (
            f"--precision bf16: {share:.2%} of 48 positions have the codes of fp32, and at least 99.5% must."
        )
        with pytest.raises(ConfigError, match=re.escape(says)):
            stored(many, pics, tmp_path / "many")
        with pytest.raises(ConfigError, match=r"of 128 positions have the codes of fp32, and at least"):
            tokenize_folder(many, pics, tmp_path / "many", size=(8, 8), batch_size=2)
        assert not (tmp_path / "many").exists()


def test_the_command_line(tmp_path, capsys):
    one, other = (str(tmp_path / name) for name in "ab")
    made(ARRAY).save(one), made(ARRAY, seed=1).save(other)
    pics = coordinates(tmp_path / "in", "a", "b/c")
    out = [str(tmp_path / name) for name in ("one", "two", "three")]
    argv = [
        "tokenize",
        one,
        str(pics),
        out[0],
        "--also",
        other,
        out[1],
        "size=16",
        "store=parquet",
        "batch_size=2",
    ]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "2 written, 0 existed already" in said and f"{other}: 2 written" in said
    assert (
        f"codes     {out[1]}  (grid 8 x 8, q 1)" in said and f"vqcore decode {other} {out[1]} rebuilt" in said
    )
    assert main(argv) == 0 and "0 written, 2 existed already" in capsys.readouterr().out
    assert len(TokenDataset(out[1])) == 2
    for more, says in (
        (["--also", other], "--also " + other + ": write --also RUN OUT, and then settings key=value"),
        (["--also", other, out[2], "sise=8"], "'sise=8' is no setting of a further tokenizer. Did you mean 'size'?"),
        (["--also", other, out[2], "batch_size=no"], "batch_size=no must be a whole number above 0"),
        (["--also", other, out[2], "store=folder[]"], "store=folder[] has no shards"),
        (["--store", "folder", "--crops", "2"], "--crops is for stores of shards, and --store folder keeps files"),
        (["--crops", "2"], "--crops 2: all crops of a sample would be alike"),
        (["--seed", "2"], "--seed 2 decides random crops, and --crops asks for none"),
        (["--views", out[0]], f"--views {out[0]}: its rows have no views"),
    ):  # fmt: skip
        assert main(["tokenize", one, str(pics), out[2], *more]) == 2, more
        assert says in capsys.readouterr().err, more
