"""Data sources and batches: which samples are read, in which order, as a function of seed, epoch and step only."""

import logging
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqcore.compose.build import from_tree
from vqcore.data.batches import BadSamples, EvalBatches, TrainBatches, collate
from vqcore.data.listing import Listing
from vqcore.data.reader import Sample
from vqcore.data.sizes import nominal_size, sizes
from vqcore.data.sources import ArrayFile, Folder
from vqcore.errors import ConfigError, DataError, SettingError
from vqcore.modalities.array import Array
from vqcore.modalities.rgb import RGB
from vqcore.protocols import DataSpec
from vqcore.schema import DataConfig

ROOT = Path(__file__).resolve().parent.parent
EARTH = ROOT / "data/earth/train"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def keys_of(listing: Listing) -> list[str]:
    return [listing.key(i) for i in range(len(listing))]


def arrays(tmp_path: Path, count: int, **settings) -> tuple[ArrayFile, Array, ArrayFile.Config]:
    """`count` samples of 12 x 12 whose values show the index of the sample, with random crops and flips."""
    path = tmp_path / f"{count}.npy"
    plane = np.arange(144, dtype=np.float32).reshape(12, 12) / 1000
    np.save(path, np.arange(count, dtype=np.float32)[:, None, None] + plane)
    modality = Array.Config(channels=1, hflip=0.5, min_crop_scale=0.3)
    cfg = ArrayFile.Config(path=str(path), modality=modality, **({"input_size": 12, "workers": 0} | settings))
    built = Array(modality, size=nominal_size(cfg))
    return ArrayFile(cfg, split="train", modality=built, extra={}), built, cfg


def train(parts, steps=8, start_step=0, accumulate=1, rank=0, world=1, seed=0, extra=None, workers=None):
    data, modality, cfg = parts
    return TrainBatches(
        data,
        modality,
        extra or {},
        cfg,
        seed=seed,
        start_step=start_step,
        steps=steps,
        accumulate=accumulate,
        rank=rank,
        world=world,
        workers=workers,
    )


def same(one, two) -> bool:
    a, b = one.batch, two.batch
    extras = a.extras.keys() == b.extras.keys() and all(
        torch.equal(a.extras[k], b.extras[k]) for k in a.extras
    )
    return (
        a.keys == b.keys
        and torch.equal(a.x, b.x)
        and torch.equal(a.size, b.size)
        and extras
        and one.bad == two.bad
    )


class TestListing:
    def test_files_at_any_depth_in_the_order_of_their_keys(self, tmp_path):
        touch(
            tmp_path, "b.png", "a/z.PNG", "a-b.png", "a.png", "a/b/c.jpg", "é.png", "a/notes.txt", "a b.jpeg"
        )
        found = Listing(str(tmp_path), (".png", ".jpg", ".jpeg"), "data.path")
        keys = ["a", "a b", "a-b", "a/b/c", "a/z", "b", "é"]
        assert keys_of(found) == keys == sorted(keys)
        assert found.path(3) == tmp_path / "a/b/c.jpg" and found.path(4) == tmp_path / "a/z.PNG"
        assert [found.find(key) for key in keys] == list(range(7))
        assert [found.find(key) for key in ("", "a/", "a/z.PNG", "zz")] == [None] * 4

    def test_hidden_files_and_folders_are_skipped(self, tmp_path):
        touch(tmp_path, "a.png", ".b.png", ".git/c.png", "d/.e/f.png", "._a.png")
        assert keys_of(Listing(str(tmp_path), (".png",), "data.path")) == ["a"]

    def test_the_longest_suffix_is_cut(self, tmp_path):
        touch(tmp_path, "a.json.gz", "b.gz")
        assert keys_of(Listing(str(tmp_path), (".gz", ".json.gz"), "data.path")) == ["a", "b"]

    def test_linked_folders_are_listed_once(self, tmp_path):
        root, outside = tmp_path / "root", tmp_path / "outside"
        touch(root, "real/a.png", "x.png", ".store/s.png")
        touch(outside, "o.png", "deep/p.png")
        (root / "again").symlink_to(root / "real")
        (root / "loop").symlink_to(root)
        (root / "real/up").symlink_to(root)
        (root / "first").symlink_to(outside)
        (root / "second").symlink_to(outside)
        (root / "stored").symlink_to(root / ".store")
        (outside / "back").symlink_to(outside)
        (root / "one.png").symlink_to(outside / "o.png")
        expected = ["first/deep/p", "first/o", "one", "real/a", "stored/s", "x"]
        assert keys_of(Listing(str(root), (".png",), "data.path")) == expected

    def test_a_dead_link_is_listed_and_fails_when_it_is_read(self, tmp_path):
        (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
        found = Listing(str(tmp_path), (".png",), "data.path")
        with pytest.raises(DataError, match=r"a\.png: No such file"):
            RGB(RGB.Config(), size=8).read(found.path(0))

    def test_two_files_with_one_key_are_refused(self, tmp_path):
        touch(tmp_path, "d/a.png", "d/a.b.png", "d/a.jpg")
        with pytest.raises(
            DataError, match=r"data\.path: .*d: a\.jpg and a\.png differ in their suffix only"
        ):
            Listing(str(tmp_path), (".png", ".jpg"), "data.path")

    def test_what_can_be_wrong_with_a_folder(self, tmp_path):
        touch(tmp_path, "photos/a.tif", "photos/b.TIF", "photos/c.txt", "photos/README", "file.png")
        with pytest.raises(
            DataError, match=r"data\.path: .*fotos: there is no such folder\. Did you mean '.*/photos'\?"
        ):
            Listing(str(tmp_path / "fotos"), (".png",), "data.path")
        with pytest.raises(DataError, match=r"file\.png: this is a file, not a folder"):
            Listing(str(tmp_path / "file.png"), (".png",), "data.path")
        says = r"no file of a readable type \(\.png, \.jpg\)\. Found: 2 x \.tif, 1 x .*"
        with pytest.raises(DataError, match=says):
            Listing(str(tmp_path / "photos"), (".png", ".jpg"), "data.path")
        (tmp_path / "void").mkdir()
        with pytest.raises(DataError, match="Found: nothing"):
            Listing(str(tmp_path / "void"), (".png",), "data.path")

    def test_a_listing_is_small(self, tmp_path):
        touch(tmp_path, *(f"some_folder/picture_{i:06d}.png" for i in range(2000)))
        found = Listing(str(tmp_path), (".png",), "data.path")
        assert len(found) == 2000 and len(pickle.dumps(found)) < 2000 * 48
        copy = pickle.loads(pickle.dumps(found))
        assert keys_of(copy) == keys_of(found) and copy.path(7) == found.path(7)

    def test_names_that_are_no_utf8(self, tmp_path):
        name = os.fsdecode(b"caf\xe9.png")
        touch(tmp_path, name, "a.png")
        found = Listing(str(tmp_path), (".png",), "data.path")
        assert found.path(1) == tmp_path / name and found.find(name[:-4]) == 1


class TestFolder:
    def config(self, tmp_path, **settings):
        return Folder.Config(path=str(tmp_path / "rgb"), modality=RGB.Config(), input_size=8, **settings)

    def open(self, cfg, split="train"):
        rgb = RGB(RGB.Config(), size=8)
        extra = {label: RGB(RGB.Config(), size=8) for label in cfg.extra}
        return Folder(cfg, split=split, modality=rgb, extra=extra)

    def test_keys_and_files_of_both_splits(self, tmp_path):
        touch(tmp_path, "rgb/a.png", "rgb/x/b.jpg", "val/c.webp")
        cfg = self.config(tmp_path, eval_path=str(tmp_path / "val"))
        data = self.open(cfg)
        assert (len(data), data.key(1), data.get(1)) == (2, "x/b", tmp_path / "rgb/x/b.jpg")
        assert self.open(cfg, "eval").get(0) == tmp_path / "val/c.webp"

    def test_evaluation_needs_a_folder(self, tmp_path):
        touch(tmp_path, "rgb/a.png")
        with pytest.raises(DataError, match=r"Set data\.eval_share=0\.1, or data\.eval_path="):
            self.open(self.config(tmp_path), "eval")

    def test_partners_are_found_by_name(self, tmp_path):
        touch(tmp_path, *(f"rgb/{c}/{i}.jpg" for c in "ab" for i in range(3)), "depth/stranger.png")
        touch(tmp_path, *(f"depth/{c}/{i}.png" for c in "ab" for i in range(3)))
        extra = {"depth": RGB.Config()}
        data = self.open(self.config(tmp_path, extra=extra, extra_path={"depth": str(tmp_path / "depth")}))
        for i in range(6):
            assert data.get(i, "depth") == tmp_path / "depth" / f"{data.key(i)}.png"

    def test_a_missing_partner_is_named_with_its_sample(self, tmp_path):
        touch(tmp_path, "rgb/a.jpg", "rgb/b.jpg", "rgb/c.jpg", "depth/a.png", "depth/c.png")
        settings = {"extra": {"depth": RGB.Config()}, "extra_path": {"depth": str(tmp_path / "depth")}}
        data = self.open(self.config(tmp_path, max_bad_share=0.5, **settings))
        assert data.get(2, "depth") == tmp_path / "depth/c.png"
        with pytest.raises(
            DataError, match=r"rgb/b\.jpg: has no file for 'depth': .*depth/b\.jpg\|.* does not exist"
        ):
            data.get(1, "depth")
        with pytest.raises(
            DataError, match=r"data\.extra_path\.depth: 1 of 3 samples .* rgb/b\.jpg".replace(" rgb", ".*rgb")
        ):
            self.open(self.config(tmp_path, **settings))

    @pytest.mark.parametrize(
        "settings, says",
        [
            (
                {"extra": {"depth": RGB.Config()}},
                r"extra\.depth has no source\. Set data\.extra_path\.depth",
            ),
            (
                {"extra_path": {"depth": "x"}},
                r"extra_path\.depth: data\.extra\.depth does not exist\. Labels: none",
            ),
            (
                {"extra": {"depth": RGB.Config()}, "extra_path": {"deptth": "x"}},
                r"extra_path\.deptth: data\.extra\.deptth does not exist\. Did you mean 'depth'\?",
            ),
            (
                {"extra": {"depth": RGB.Config()}, "extra_path": {"depth": "x"}, "eval_path": "y"},
                r"Set data\.eval_extra_path\.depth",
            ),
        ],
    )
    def test_labels_and_paths_belong_together(self, tmp_path, settings, says):
        with pytest.raises(ValueError, match=says):
            self.config(tmp_path, **settings)


class TestArrayFile:
    def build(self, path, extra=None, split="train", **settings):
        cfg = ArrayFile.Config(
            path=str(path), modality=Array.Config(channels=1), extra=extra or {}, **settings
        )
        rides = {label: Array(each, size=1) for label, each in cfg.extra.items()}
        return ArrayFile(cfg, split=split, modality=Array(Array.Config(channels=1), size=4), extra=rides)

    def test_npy_is_mapped_and_keys_are_numbers(self, tmp_path):
        a = np.random.default_rng(0).normal(size=(11, 4, 4))
        np.save(tmp_path / "a.npy", a)
        data = self.build(tmp_path / "a.npy")
        assert (len(data), data.key(0), data.key(10)) == (11, "00", "10")
        assert all(np.array_equal(data.get(i), a[i]) for i in range(11))
        assert isinstance(data._array(""), np.memmap)
        assert len(pickle.dumps(data)) < 2000 and np.array_equal(
            pickle.loads(pickle.dumps(data)).get(3), a[3]
        )

    def test_npz_with_labels_that_ride_along(self):
        data = self.build(
            ROOT / "data/fashion/train.npz",
            {"label": Array.Config(kind="categorical", labels=10)},
            key="images",
            extra_key={"label": "labels"},
        )
        archive = np.load(ROOT / "data/fashion/train.npz")
        assert np.array_equal(data.get(1234), archive["images"][1234])
        assert data.get(1234, "label") == archive["labels"][1234]

    def test_what_can_be_wrong(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros((3, 4, 4)))
        np.savez(tmp_path / "b.npz", images=np.zeros((3, 4, 4)), labels=np.zeros(2))
        np.save(tmp_path / "number.npy", np.float32(3))
        np.save(tmp_path / "none.npy", np.zeros((0, 4)))
        np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
        (tmp_path / "bad.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:100])
        (tmp_path / "really_npz.npy").write_bytes((tmp_path / "b.npz").read_bytes())
        (tmp_path / "really_npy.npz").write_bytes((tmp_path / "a.npy").read_bytes())
        (tmp_path / "a.txt").write_text("1 2 3")
        for name, settings, says in (
            ("aa.npy", {}, r"data\.path: .*aa\.npy: there is no such file\. Did you mean '.*/a\.npy'"),
            (".", {}, "this is a folder, not a file. To read a folder of files, set data.name=folder"),
            ("a.txt", {}, r"the suffix is '\.txt', but an array file is \.npy or \.npz"),
            ("b.npz", {}, r"contains the arrays images, labels\. Choose one, e\.g\. data\.key=images"),
            ("b.npz", {"key": "image"}, "contains no array 'image'. Did you mean 'images'"),
            ("a.npy", {"key": "images"}, "the name 'images' needs a .npz file"),
            ("number.npy", {}, r"contains no samples \(shape \(\)\)"),
            ("none.npy", {}, r"has the shape \(0, 4\), which is empty"),
            ("objects.npy", {}, "holds values of type object; only arrays of numbers"),
            ("bad.npz", {}, r"bad\.npz: ."),
            ("really_npz.npy", {}, "this is an archive of arrays, not a .npy file. Rename the file to .npz"),
            (
                "really_npy.npz",
                {},
                "this is a single array, not an archive of arrays. Rename the file to .npy",
            ),
        ):
            with pytest.raises(DataError, match=says):
                self.build(tmp_path / name, **settings)
        extra = {"label": Array.Config(channels=1)}
        with pytest.raises(DataError, match="'labels' has 2 samples, but the main array has 3"):
            self.build(tmp_path / "b.npz", extra, key="images", extra_key={"label": "labels"})
        with pytest.raises(ValueError, match=r"Set data\.extra_key\.label"):
            self.build(tmp_path / "b.npz", extra, key="images")
        with pytest.raises(DataError, match=r"data\.eval_path"):
            self.build(tmp_path / "a.npy", split="eval")


class TestSizes:
    def config(self, **settings):
        return DataConfig(modality=RGB.Config(), **settings)

    @pytest.mark.parametrize(
        "settings, expected",
        [
            ({}, [(64, 48)]),
            ({"input_size": 32}, [(32, 32)]),
            ({"input_size": (32, 16)}, [(32, 16)]),
            ({"input_size_min": 32, "input_size_max": 128}, [(32, 32), (64, 64), (96, 96), (128, 128)]),
            ({"input_size_min": 32, "input_size_max": 127}, [(32, 32), (64, 64), (96, 96)]),
            ({"input_size_min": (32, 64), "input_size_max": (96, 128)}, [(32, 64), (64, 96), (96, 128)]),
            (
                {"input_size_min": 48, "input_size_max": (64, 64), "resolution_step": 8},
                [(48, 48), (56, 56), (64, 64)],
            ),
        ],
    )
    def test_from_the_minimum_in_steps_never_above_the_maximum(self, settings, expected):
        assert sizes(self.config(**settings), DataSpec(channels=3, size=(64, 48))) == expected

    @pytest.mark.parametrize(
        "settings, says",
        [
            ({"input_size_min": (32, 64), "input_size_max": (64, 32)}, "minimum is above|is above"),
            ({"input_size_min": (32, 32), "input_size_max": (64, 128)}, r"take \[1, 3\] steps"),
            ({"input_size": (32, 32, 32)}, r"data\.input_size: .*3 axes, but samples have 2"),
        ],
    )
    def test_sizes_that_do_not_go_together(self, settings, says):
        with pytest.raises((ConfigError, SettingError), match=says):
            sizes(self.config(**settings), DataSpec(channels=3, size=(64, 48)))

    def test_nominal_size(self):
        assert nominal_size(self.config()) is None
        assert nominal_size(self.config(input_size=32)) == 32
        assert nominal_size(self.config(input_size=32), 3) == (32, 32, 32)
        assert nominal_size(self.config(input_size_min=32, input_size_max=(64, 96)), 2) == (64, 96)


class TestTrainBatches:
    def test_the_number_of_workers_changes_nothing(self, tmp_path):
        parts = arrays(
            tmp_path,
            10,
            batch_size=3,
            input_size=None,
            input_size_min=6,
            input_size_max=12,
            resolution_step=2,
        )
        alone, helped = list(train(parts, 12)), list(train(parts, 12, workers=2))
        assert len(alone) == 12 and all(same(a, b) for a, b in zip(alone, helped, strict=True))
        assert not same(alone[0], alone[1])

    def test_worker_batches_of_pictures_are_the_same_to_the_bit(self):
        modality = RGB.Config()
        cfg = Folder.Config(
            path=str(ROOT / "data/photos/train"), modality=modality, input_size=32, batch_size=4
        )
        rgb = RGB(modality, size=32)
        parts = Folder(cfg, split="train", modality=rgb, extra={}), rgb, cfg
        alone, helped = list(train(parts, 3, workers=0)), list(train(parts, 3, workers=2))
        assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
        x = alone[0].batch.x
        assert x.shape == (4, 3, 32, 32) and -1 <= float(x.min()) < float(x.max()) <= 1

    def test_without_workers_a_batch_is_read_when_it_is_asked_for(self, tmp_path, monkeypatch):
        parts, read = arrays(tmp_path, 10, batch_size=2), []
        monkeypatch.setattr(parts[1], "tensor", lambda *a, f=parts[1].tensor: read.append(1) or f(*a))
        assert [len(read) for _ in train(parts, 4)] == [2, 4, 6, 8]

    def test_a_bug_comes_where_its_batch_was_asked_for(self, tmp_path, monkeypatch):
        parts, asked = arrays(tmp_path, 10, batch_size=1), []

        def tensor(*given, f=parts[1].tensor):
            asked.append(1)
            if len(asked) == 6:
                raise ValueError("a bug in a sample")
            return f(*given)

        monkeypatch.setattr(parts[1], "tensor", tensor)
        batches = iter(train(parts, 20))
        assert len([next(batches) for _ in range(5)]) == 5
        with pytest.raises(ValueError, match="a bug"):
            next(batches)

    def test_a_child_with_its_own_read_is_read_as_it_says(self, tmp_path):
        Image.effect_noise((96, 64), 80).convert("RGB").save(tmp_path / "a.png")

        class Black(RGB):
            def read(self, source, at_least=None):
                return super().read(source) * 0

        modality = RGB.Config(min_crop_scale=1.0, ratio=(1.0, 1.0))
        cfg = Folder.Config(path=str(tmp_path), modality=modality, input_size=16, batch_size=1)
        black = Black(modality, size=16)
        data = Folder(cfg, split="train", modality=black, extra={})
        (loaded,) = train((data, black, cfg), 1, workers=0)
        assert float(loaded.batch.x.max()) == -1

    def test_less_is_read_only_where_nothing_rides_along(self, tmp_path, monkeypatch):
        Image.effect_noise((96, 64), 80).convert("RGB").save(tmp_path / "a.png")
        modality = RGB.Config(min_crop_scale=1.0, ratio=(1.0, 1.0))
        cfg = Folder.Config(path=str(tmp_path), modality=modality, input_size=16, batch_size=1)
        asked: list[tuple[int, ...] | None] = []

        class Watched(RGB):
            def read(self, source, at_least=None):
                asked.append(at_least)
                return super().read(source, at_least)

        rgb = Watched(modality, size=16)
        data = Folder(cfg, split="train", modality=rgb, extra={})
        (loaded,) = train((data, rgb, cfg), 1, workers=0)
        assert asked == [(16, 16)] and loaded.batch.size.tolist() == [[64, 96]]
        asked.clear()
        monkeypatch.setattr(Folder, "get", lambda self, index, label="": tmp_path / "a.png")
        list(train((data, rgb, cfg), 1, extra={"again": rgb}, workers=0))
        assert asked == [None]

    def test_taking_up_again_skips_what_was_done(self, tmp_path):
        parts = arrays(tmp_path, 7, batch_size=2)
        everything = list(train(parts, 9, accumulate=2))
        for start in (1, 5):
            rest = list(train(parts, 9, start_step=start, accumulate=2))
            assert all(same(a, b) for a, b in zip(everything[2 * start :], rest, strict=True))

    def test_iterating_again_starts_again(self, tmp_path):
        batches = train(arrays(tmp_path, 5, batch_size=2), 3)
        assert all(same(a, b) for a, b in zip(batches, batches, strict=True))

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_two_ranks_see_what_one_sees_with_the_double_batch(self, tmp_path, accumulate):
        half = arrays(
            tmp_path, 7, batch_size=3, input_size=None, input_size_min=4, input_size_max=8, resolution_step=4
        )
        double = arrays(
            tmp_path, 7, batch_size=6, input_size=None, input_size_min=4, input_size_max=8, resolution_step=4
        )
        one = list(train(double, 6, accumulate=accumulate))
        ranks = [list(train(half, 6, accumulate=accumulate, rank=rank, world=2)) for rank in range(2)]
        for whole, first, second in zip(one, *ranks, strict=True):
            assert whole.batch.keys == first.batch.keys + second.batch.keys
            assert torch.equal(whole.batch.x, torch.cat([first.batch.x, second.batch.x]))

    def test_accumulating_equals_a_larger_batch(self, tmp_path):
        small, large = arrays(tmp_path, 7, batch_size=3), arrays(tmp_path, 7, batch_size=6)
        halves = list(train(small, 4, accumulate=2))
        for k, whole in enumerate(train(large, 4)):
            assert whole.batch.keys == halves[2 * k].batch.keys + halves[2 * k + 1].batch.keys

    def test_each_epoch_holds_every_sample_once_in_its_own_order(self, tmp_path):
        batches = train(arrays(tmp_path, 10, batch_size=4), 10)  # 40 samples: epochs end inside batches
        stream = [key for loaded in batches for key in loaded.batch.keys]
        epochs = [tuple(stream[start : start + 10]) for start in range(0, 40, 10)]
        assert all(sorted(epoch) == [str(i) for i in range(10)] for epoch in epochs)
        assert len(set(epochs)) == 4

    def test_crops_differ_between_epochs_and_seeds(self, tmp_path):
        parts = arrays(tmp_path, 1, batch_size=1)
        first, second = list(train(parts, 2))
        (other,) = train(parts, 1, seed=1)
        assert not torch.equal(first.batch.x, second.batch.x) and not torch.equal(
            first.batch.x, other.batch.x
        )

    def test_samples_carry_key_and_extent(self, tmp_path):
        (loaded,) = train(arrays(tmp_path, 20, batch_size=5), 1)
        batch = loaded.batch
        assert batch.size.dtype == torch.int64 and batch.size.tolist() == [[12, 12]] * 5
        assert [int(x.min()) for x in batch.x] == [int(key) for key in batch.keys]
        assert batch.mask is None and loaded.bad == ()

    def test_every_size_is_drawn_and_all_ranks_draw_the_same(self, tmp_path):
        settings = {
            "input_size": None,
            "input_size_min": (4, 6),
            "input_size_max": (12, 14),
            "resolution_step": 4,
        }
        parts = arrays(tmp_path, 5, batch_size=1, **settings)
        shapes = [
            [tuple(loaded.batch.x.shape[2:]) for loaded in train(parts, 30, accumulate=2, rank=rank, world=3)]
            for rank in range(3)
        ]
        assert shapes[0] == shapes[1] == shapes[2]
        assert shapes[0][::2] == shapes[0][1::2]  # one size for the whole step
        assert set(shapes[0]) == {(4, 6), (8, 10), (12, 14)}

    def test_global_generators_are_left_alone(self, tmp_path):
        def states():
            return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

        before = states()
        for workers in (0, 1):
            list(train(arrays(tmp_path, 4, batch_size=2), 2, workers=workers))
        assert states() == before

    def test_non_square_pictures(self):
        modality = RGB.Config()
        cfg = Folder.Config(
            path=str(ROOT / "data/photos/train"),
            modality=modality,
            input_size=(24, 40),
            batch_size=2,
            workers=0,
        )
        rgb = RGB(modality, size=nominal_size(cfg))
        (loaded,) = train((Folder(cfg, split="train", modality=rgb, extra={}), rgb, cfg), 1)
        assert loaded.batch.x.shape == (2, 3, 24, 40)


class TestExtras:
    def parts(self, label: str, modality, folder: Path, **settings):
        main = RGB.Config()
        cfg = Folder.Config(
            path=str(EARTH / "rgb"),
            modality=main,
            extra={label: modality},
            extra_path={label: str(folder)},
            input_size=24,
            batch_size=6,
            **({"workers": 0} | settings),
        )
        rgb = RGB(main, size=24)
        extra = {label: RGB(modality, size=24)}
        return (Folder(cfg, split="train", modality=rgb, extra=extra), rgb, cfg), extra

    def test_extras_share_crop_and_flip(self):
        parts, extra = self.parts("copy", RGB.Config(), EARTH / "rgb")
        for loaded in train(parts, 4, extra=extra):
            assert torch.equal(loaded.batch.extras["copy"], loaded.batch.x)

    def test_extras_of_half_the_resolution_share_the_crop(self, tmp_path):
        for path in (EARTH / "rgb").rglob("*.jpg"):
            target = tmp_path / path.relative_to(EARTH / "rgb").with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).resize((96, 96), Image.Resampling.BOX).save(target)
        parts, extra = self.parts("half", RGB.Config(), tmp_path)
        for loaded in train(parts, 4, extra=extra):
            off = (loaded.batch.extras["half"] - loaded.batch.x).abs().mean()
            turned = (loaded.batch.extras["half"].flip(-1) - loaded.batch.x).abs().mean()
            assert off < 0.02 < 5 * 0.02 < turned

    def test_labels_ride_along_as_numbers(self):
        label = Array.Config(kind="categorical", labels=10, size=1, rank=1)
        cfg = ArrayFile.Config(
            path=str(ROOT / "data/fashion/train.npz"),
            key="images",
            extra={"label": label},
            extra_key={"label": "labels"},
            modality=Array.Config(channels=1, range=(0.0, 255.0)),
            input_size=28,
            batch_size=8,
            workers=0,
        )
        modality, extra = Array(cfg.modality, size=28), {"label": Array(label, size=(28, 28))}
        data = ArrayFile(cfg, split="train", modality=modality, extra=extra)
        archive = np.load(ROOT / "data/fashion/train.npz")
        (loaded,) = train((data, modality, cfg), 1, extra=extra)
        places = [int(key) for key in loaded.batch.keys]
        assert loaded.batch.extras["label"][:, 0].tolist() == archive["labels"][places].tolist()
        expected = (archive["images"][places].astype(np.float64) * (2 / 255) - 1).astype(np.float32)
        assert np.array_equal(loaded.batch.x[:, 0].numpy(), expected)

    def test_what_is_no_tensor_becomes_a_list(self):
        samples = [
            Sample(
                torch.full((1, 2), i),
                str(i),
                (2,),
                torch.tensor([True, i > 0]),
                extras={"text": f"t{i}", "n": torch.tensor(i)},
            )
            for i in range(3)
        ]
        batch = collate(samples)
        assert batch.extras["text"] == ["t0", "t1", "t2"] and batch.extras["n"].tolist() == [0, 1, 2]
        assert batch.mask.tolist() == [[True, False], [True, True], [True, True]]
        assert batch.keys == ("0", "1", "2") and batch.size.tolist() == [[2]] * 3


class TestDamagedSamples:
    def parts(self, tmp_path, good: int, bad: int, **settings):
        for i in range(good):
            Image.new("RGB", (12, 12), (i, 0, 0)).save(tmp_path / f"good{i}.png")
        touch(tmp_path, *(f"bad{i}.png" for i in range(bad)))
        cfg = Folder.Config(
            path=str(tmp_path),
            modality=RGB.Config(),
            **({"input_size": 8, "workers": 0, "batch_size": 4} | settings),
        )
        rgb = RGB(RGB.Config(), size=8)
        return Folder(cfg, split="train", modality=rgb, extra={}), rgb, cfg

    def test_another_sample_takes_the_place(self, tmp_path):
        parts = self.parts(tmp_path, good=6, bad=2)
        epoch = list(train(parts, 2))  # eight samples: one epoch
        keys = Counter(key for loaded in epoch for key in loaded.batch.keys)
        named = dict(bad for loaded in epoch for bad in loaded.bad)
        assert sum(keys.values()) == 8 and not any(key.startswith("bad") for key in keys)
        assert set(keys) == {f"good{i}" for i in range(6)}
        assert set(named) == {"bad0", "bad1"} and "bad0.png: " in named["bad0"]

    def test_replacements_do_not_depend_on_workers_ranks_or_history(self, tmp_path):
        parts = self.parts(tmp_path, good=3, bad=3, batch_size=2)
        alone, helped = list(train(parts, 8)), list(train(parts, 8, workers=2))
        assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
        assert all(same(a, b) for a, b in zip(alone[5:], train(parts, 8, start_step=5), strict=True))
        assert any(loaded.bad for loaded in alone)
        ranks = [list(train((*parts[:2], parts[2]), 4, rank=rank, world=2)) for rank in range(2)]
        interleaved = [loaded for pair in zip(*ranks) for loaded in pair]
        assert all(same(a, b) for a, b in zip(alone, interleaved, strict=True))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_nothing_but_damage_ends_with_one_line(self, tmp_path, workers):
        parts = self.parts(tmp_path, good=0, bad=3)
        with pytest.raises(
            DataError, match=r"^17 samples in a row cannot be read. The last one is bad\d: .*bad\d\.png: "
        ) as caught:
            list(train(parts, 2, workers=workers))
        assert "Traceback" not in str(caught.value)

    def test_bugs_are_not_taken_for_damage(self, tmp_path):
        data, rgb, cfg = self.parts(tmp_path, good=2, bad=0)
        rgb.tensor = lambda raw, view: 1 / 0
        with pytest.raises(ZeroDivisionError):
            list(train((data, rgb, cfg), 1))

    def test_bad_samples_are_named_once_and_counted(self, tmp_path, caplog):
        data, _, cfg = self.parts(tmp_path, good=9, bad=1, max_bad_share=0.2)
        bad = BadSamples(data, cfg)
        assert bad.metrics() == {}
        with caplog.at_level(logging.WARNING):
            bad.add([("a", "torn"), ("a", "torn")])
            bad.add([("a", "torn"), ("b", "burnt")])
        assert [record.getMessage() for record in caplog.records] == [
            "sample a is skipped: torn",
            "sample b is skipped: burnt",
        ]
        assert len(bad) == 2 and bad.metrics() == {"data/bad": 2.0}

    def test_too_many_end_the_run(self, tmp_path, caplog):
        data, _, cfg = self.parts(tmp_path, good=9, bad=1, max_bad_share=0.2)
        bad = BadSamples(data, cfg)
        bad.add([("a", "torn"), ("b", "burnt")])
        with pytest.raises(DataError, match=r"3 of 10 .*data\.max_bad_share=0\.2 allows: a, b, c\. a: torn"):
            bad.add([("c", "lost")])


class TestEvalBatches:
    def batches(self, parts, rank=0, world=1, batch_size=4, **settings):
        data, modality, cfg = parts
        size = modality.spec.size
        return EvalBatches(
            data, modality, {}, cfg, size=size, batch_size=batch_size, rank=rank, world=world, **settings
        )

    @pytest.mark.parametrize("world", [1, 2, 3])
    @pytest.mark.parametrize("count", [1, 2, 8, 11])
    def test_every_sample_once_over_all_ranks(self, tmp_path, count, world):
        parts = arrays(tmp_path, count)
        seen = []
        for rank in range(world):
            batches = self.batches(parts, rank, world)
            loaded = list(batches)
            assert len(loaded) == len(batches)
            assert all(len(each.batch.keys) == 4 for each in loaded[:-1])
            seen += [key for each in loaded for key in each.batch.keys]
        assert sorted(seen) == [parts[0].key(i) for i in range(count)]

    def test_the_view_is_the_centre_and_never_flipped(self, tmp_path):
        parts = arrays(tmp_path, 5)
        x = torch.cat([loaded.batch.x for loaded in self.batches(parts)])
        assert np.array_equal(x[:, 0].numpy(), np.load(tmp_path / "5.npy"))

    def test_workers_change_nothing(self, tmp_path):
        parts = arrays(tmp_path, 11)
        batches = self.batches(parts, workers=2)
        for _ in range(2):
            assert all(same(a, b) for a, b in zip(self.batches(parts), batches, strict=True))

    def test_a_limit_is_spread_over_the_set(self, tmp_path):
        parts = arrays(tmp_path, 10)
        for limit, expected in ((4, [0, 2, 5, 7]), (10, list(range(10))), (99, list(range(10)))):
            found = [
                int(key)
                for rank in range(2)
                for loaded in self.batches(parts, rank, 2, limit=limit)
                for key in loaded.batch.keys
            ]
            assert sorted(found) == expected

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("damaged", [{0}, {3, 4, 5}, {9}, {0, 1, 2, 6, 9}])
    def test_damaged_samples_are_left_out_and_reported(self, tmp_path, damaged, workers):
        for i in range(10):
            path = tmp_path / f"{i}.png"
            path.write_bytes(b"") if i in damaged else Image.new("RGB", (8, 8)).save(path)
        cfg = Folder.Config(path=str(tmp_path), modality=RGB.Config(), input_size=8)
        rgb = RGB(RGB.Config(), size=8)
        parts = Folder(cfg, split="train", modality=rgb, extra={}), rgb, cfg
        loaded = list(self.batches(parts, batch_size=3, workers=workers))
        assert {key for each in loaded for key, _ in each.bad} == {str(i) for i in damaged}
        assert [key for each in loaded for key in each.batch.keys] == [
            str(i) for i in range(10) if i not in damaged
        ]

    def test_nothing_to_evaluate_on(self, tmp_path):
        touch(tmp_path, "a.png", "b.png")
        cfg = Folder.Config(path=str(tmp_path), modality=RGB.Config(), input_size=8, workers=0)
        rgb = RGB(RGB.Config(), size=8)
        (report,) = self.batches((Folder(cfg, split="train", modality=rgb, extra={}), rgb, cfg))
        assert report.batch is None and [key for key, _ in report.bad] == ["a", "b"]


def test_settings_come_from_a_config_file():
    tree = {
        "name": "folder",
        "path": "data/photos/train",
        "modality": {"name": "rgb"},
        "extra": {"depth": {"name": "array", "channels": 1}},
        "extra_path": {"depth": "x"},
        "input_size": [32, 64],
    }
    cfg = from_tree(tree, schema=Folder.Config)
    assert cfg.extra_path == {"depth": "x"} and cfg.input_size == (32, 64)
    tree = {"name": "array", "path": "a.npz", "key": "images", "modality": {"name": "array", "channels": 1}}
    assert from_tree(tree, schema=ArrayFile.Config).key == "images"
