"""What a pass reads and what it makes of a sample: crops, sources and their shards, several tokenizers, masks."""

import json
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from toys import run_config, tokenizer_of, toy  # noqa: F401

from vqcore.artefacts.codes import packed, unpacked
from vqcore.artefacts.stored import open_store
from vqcore.cli import main
from vqcore.data.reader import Opened
from vqcore.errors import ConfigError, DataError, RunError
from vqcore.protocols import View, Window
from vqcore.tokens import TokenDataset
from vqcore.tokens.crops import Drawn
from vqcore.tokens.passes import tokenize_folder
from vqcore.tokens.sharded import Job, tokenize_all, tokenize_shards

pytestmark = pytest.mark.usefixtures("toy")
RGB = {"name": "rgb", "min_crop_scale": 0.3, "ratio": [1.0, 1.0]}
ARRAY = {"name": "array", "channels": 2, "range": [-1, 1]}
NORMAL = {"name": "vision/normal"}
SEED = 3


def made(modality, size=8, seed=0, **how):
    """A tokenizer with random weights and many codes, so that another input has other codes."""
    config = run_config(
        "run",
        data__modality=modality,
        data__input_size=size,
        model__quantizer={"name": "toy/quantizer", "codebook_size": 4096},
        model__encoder={"name": "toy/encoder", "patch": 2},
        **how,
    )
    torch.manual_seed(seed)
    return tokenizer_of(config).eval()


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


def rows(folder):
    """The rows of a store by key."""
    store = open_store(folder)
    return {row.key: row for row in map(store.row, range(len(store.rows)))}


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
        for factor, sides in ((1, (32, 32)), (2, (64, 64))):
            where = coordinates(tmp_path / f"in{factor}", *self.KEYS, sides=sides)
            stored(places, where, tmp_path / f"two{factor}", views=tmp_path / "one")
            second = rows(tmp_path / f"two{factor}")
            assert [*second] == [*first]
            for key, row in second.items():
                view = row.extras["view"]
                assert view == first[key].extras["view"]
                part = cut(np.load(where / f"{row.extras['record']}.npy"), view, factor)
                x = torch.nn.functional.interpolate(
                    torch.from_numpy(part.copy())[None], (8, 8), mode="bilinear", antialias=True
                )
                assert np.array_equal(row.codes, places.encode(x)[0].numpy()), key
        both = TokenDataset({"rgb": tmp_path / "one", "places": tmp_path / "two2"})
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
            (places.prepared(part, (8, 8), None, views), places.prepared(raw[:, :, 16:36], (8, 8), None, views)),
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
