"""Masks: files, blocks, and samples that have a mask as an extra modality."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import run_config, toy  # noqa: F401
from vqcore_vision.depth import Depth
from vqcore_vision.features import Features
from vqcore_vision.instance import Instance
from vqcore_vision.normal import Normal
from vqcore_vision.semseg import Semseg

from vqcore.check.checks import cheap, first_batch
from vqcore.check.samples import samples
from vqcore.data.batches import EvalBatches, TrainBatches
from vqcore.data.sources import Folder
from vqcore.errors import ConfigError, DataError
from vqcore.losses import pixel_loss
from vqcore.modalities.array import Array
from vqcore.modalities.mask import Mask
from vqcore.modalities.rgb import RGB
from vqcore.run.state import build
from vqcore.testing.conformance import ModalityConformance
from vqcore.trainer import train

CPU = torch.device("cpu")


def holes(height=40, width=60):
    """All positions are valid except a corner and some pixels."""
    valid = np.random.default_rng(0).random((height, width)) < 0.9
    valid[: height // 3, : width // 2] = False
    return valid


def mask_of(source, size, **settings) -> Tensor:
    modality = Mask(Mask.Config(**settings), size=size)
    raw = modality.read(source)
    return modality.tensor(raw, modality.view(modality.extent(raw), modality.spec.size, None))


class TestMask(ModalityConformance):
    component = "mask"
    configs = ({}, {"threshold": 254, "min_crop_scale": 0.3}, {"invert": True, "pool": 4})
    size = (40, 60)

    def source(self):
        # Blocks have the size of the pool, so that `show` of the third config returns what it reads.
        return np.kron(np.random.default_rng(0).integers(0, 2, (10, 15)), np.full((4, 4), 255)).astype(
            np.uint8
        )


class TestFiles:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "npy", "bool"])
    def test_every_way_to_write_one(self, tmp_path, mode):
        valid = holes()
        path = tmp_path / ("a.npy" if mode in ("npy", "bool") else "a.png")
        if mode in ("npy", "bool"):
            np.save(path, valid.astype(np.float32) if mode == "npy" else valid)
        elif mode == "I;16":
            Image.fromarray(valid.astype(np.uint16) * 65535).save(path)
        elif mode == "P":
            image = Image.fromarray(valid.astype(np.uint8))
            image.putpalette([9, 9, 9] * 256)  # the index counts, not the colour
            image.save(path)
        else:
            Image.fromarray(valid.astype(np.uint8) * 255).convert(mode).save(path)
        assert np.array_equal(mask_of(path, (40, 60))[0] > 0.5, valid)

    def test_pure_white_alone_as_4m(self):
        grey = np.array([[0, 254], [255, 128]], np.uint8)
        assert mask_of(grey, 2, threshold=254.0)[0].tolist() == [[0, 0], [1, 0]]
        assert mask_of(grey, 2)[0].tolist() == [[0, 1], [1, 1]]
        assert mask_of(grey, 2, threshold=128.0, invert=True)[0].tolist() == [[1, 0], [0, 1]]

    @pytest.mark.parametrize("invert", [False, True])
    def test_what_is_not_finite_is_never_valid(self, tmp_path, invert):
        levels = np.array([[0.0, 1.0, np.nan], [np.inf, -np.inf, 0.0]], np.float32)
        wanted = np.array([[invert, not invert, 0], [0, 0, invert]])
        np.save(tmp_path / "a.npy", levels)
        assert np.array_equal(mask_of(tmp_path / "a.npy", (2, 3), invert=invert)[0], wanted)
        with pytest.raises(DataError, match="is an empty mask; no value is finite"):
            mask_of(np.full((2, 3), np.nan), (2, 3), invert=invert)

    @pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB"])
    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_a_mask_is_turned_upright_as_its_picture_is(self, tmp_path, mode, suffix):
        valid = holes(4, 6)
        # Pillow maps plain TIFFs into memory, with their sides exchanged for orientations 5 to 8.
        packed = {"compression": "tiff_lzw"} if suffix == "tif" else {}
        grey = Image.fromarray(valid.astype(np.uint8) * 255)
        if mode == "I;16":
            grey = Image.fromarray(valid.astype(np.uint16) * 65535)
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            picture = Image.fromarray(np.repeat(valid[..., None].astype(np.uint8) * 255, 3, -1))
            picture.save(tmp_path / "photo.png", exif=exif)
            path = tmp_path / f"mask.{suffix}"
            (grey if mode == "I;16" else grey.convert(mode)).save(path, exif=exif, **packed)
            upright = RGB(RGB.Config(), size=4).read(tmp_path / "photo.png")[..., 0] > 0
            assert np.array_equal(Mask(Mask.Config(), size=4).read(path)[0], upright), orientation
            if mode == "RGB":
                assert np.array_equal(RGB(RGB.Config(), size=4).read(path)[..., 0] > 0, upright), orientation

    def test_blocks_are_valid_where_all_of_them_is(self):
        valid = holes(8, 10)
        found = mask_of(valid, (8, 10), pool=4)[0].numpy()
        for top in range(0, 8, 4):
            for left in range(0, 10, 4):
                block = np.s_[top : top + 4, left : left + 4]
                assert (found[block] == valid[block].all()).all()

    @pytest.mark.parametrize(
        "array, settings, says",
        [
            (np.zeros((9, 9), np.uint8), {}, r"a\.png: is an empty mask; its values are 0 to 0"),
            (np.ones((9, 9), np.uint8), {"threshold": 254.0}, "are 1 to 1.* above threshold=254"),
            (np.full((9, 9), 255, np.uint8), {"invert": True}, r"at or below \(invert\) threshold=0"),
            (np.zeros((9, 9, 4), np.uint8), {}, "mode RGBA"),
            (np.random.default_rng(0).integers(0, 9, (9, 9, 3)).astype(np.uint8), {}, "mode RGB"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, array, settings, says):
        Image.fromarray(array).save(tmp_path / "a.png")
        with pytest.raises(DataError, match=says):
            mask_of(tmp_path / "a.png", 9, **settings)


# As an extra modality


MAINS = {
    "rgb": (RGB, {}, lambda rng: rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)),
    "semseg": (Semseg, {"num_labels": 7}, lambda rng: rng.integers(0, 7, (40, 60)).astype(np.uint8)),
    "depth": (
        Depth,
        {"scaling": "linear", "range": (0.0, 255.0)},
        lambda rng: rng.integers(0, 256, (40, 60)).astype(np.uint8),
    ),
    "normal": (Normal, {"tolerance": None}, lambda rng: rng.integers(0, 256, (3, 40, 60)).astype(np.uint8)),
    "features": (Features, {"channels": 5}, lambda rng: rng.normal(size=(5, 40, 60)).astype(np.float32)),
    "array": (Array, {"channels": 2}, lambda rng: rng.normal(size=(2, 40, 60)).astype(np.float32)),
}


class InMemory:
    """A few samples of a modality, and one mask for all samples."""

    def __init__(self, name, mask, count=4):
        make = MAINS[name][2]
        self.samples, self.mask = [make(np.random.default_rng(i)) for i in range(count)], mask

    def __len__(self):
        return len(self.samples)

    def key(self, index):
        return f"s{index}"

    def get(self, index, label=""):
        return self.mask if label else self.samples[index]


def batch(tmp_path, name="rgb", valid=None, size=(24, 24), masks=None, evaluation=False, **settings):
    """One batch of a modality with the mask, and the same batch without the mask."""
    cls, own, _ = MAINS[name]
    modality = cls(cls.Config(**own, **settings), size=size)
    data = InMemory(name, holes() if valid is None else valid)
    cfg = Folder.Config(
        name="folder", path="-", modality=modality.cfg, input_size=size, batch_size=4, workers=0
    )
    wiring = {"rank": 0, "world": 1}
    found = []
    for extra in ({"valid": Mask(Mask.Config(**(masks or {})), size=size)}, {}):
        if evaluation:
            loader = EvalBatches(data, modality, extra, cfg, size=size, batch_size=4, **wiring)
        else:
            loader = TrainBatches(
                data, modality, extra, cfg, seed=0, start_step=0, steps=1, accumulate=1, **wiring
            )
        (loaded,) = loader
        found.append(loaded)
    return found


@pytest.mark.parametrize("name", MAINS)
@pytest.mark.parametrize("evaluation", [False, True])
def test_the_mask_has_the_view_of_its_sample(tmp_path, name, evaluation):
    """The mask equals a mask that is cut by hand, for samples whose pixels are not changed by resizing."""
    (with_mask, plain) = (each.batch for each in batch(tmp_path, name, evaluation=evaluation))
    assert torch.equal(with_mask.x, plain.x) and not with_mask.extras
    assert with_mask.mask.shape == (4, 24, 24) and with_mask.mask.dtype == torch.bool
    if evaluation and name in ("rgb", "semseg", "array"):
        rows, columns = (2 * np.arange(24) + 1) * 40 // 48, 10 + (2 * np.arange(24) + 1) * 40 // 48
        assert np.array_equal(with_mask.mask[0], holes()[rows[:, None], columns])


def test_crop_and_flip_are_those_of_the_picture(tmp_path):
    """A picture that is white at valid positions is white at the same positions after every crop and mirror."""
    valid = np.kron(np.random.default_rng(1).integers(0, 2, (5, 6)), np.ones((8, 10))) > 0
    settings = {"resample": "nearest", "min_crop_scale": 0.3, "hflip": 0.5}
    modality, mask = RGB(RGB.Config(**settings), size=(24, 24)), Mask(Mask.Config(), size=(24, 24))
    picture = np.repeat(valid[..., None] * np.uint8(255), 3, -1)
    flips = set()
    for seed in range(20):
        view = modality.view((40, 60), (24, 24), np.random.default_rng(seed))
        x, seen = modality.tensor(modality.read(picture), view), mask.tensor(mask.read(valid), view)
        assert ((x[0] > 0) == (seen[0] > 0.5)).float().mean() > 0.99  # Pillow's nearest rounds ties otherwise
        flips.add(view.flip)
    assert flips == {False, True}


@pytest.mark.parametrize("name, value", [("rgb", -1.0), ("semseg", 3.0), ("features", 9.5), ("normal", 0.0)])
def test_invalid_positions_get_the_value_that_is_asked_for(tmp_path, name, value):
    (found, plain) = (each.batch for each in batch(tmp_path, name, masks={"mask_value": value}))
    outside = ~found.mask
    assert outside.any() and found.mask.any() and found.x.dtype == plain.x.dtype
    x, wanted = (each.x.movedim(1, -1) if each.x.ndim == 4 else each.x for each in (found, plain))
    if name == "normal":  # holes of the normals are invalid too and keep their value
        outside = outside & plain.mask
    assert (x[outside] == value).all() and torch.equal(x[found.mask], wanted[found.mask])


def test_own_holes_and_the_mask_beside_them_are_one_mask(tmp_path):
    (found, plain) = (each.batch for each in batch(tmp_path, "depth"))
    (of_picture, _) = (each.batch for each in batch(tmp_path, "rgb"))
    assert not plain.mask.all()
    assert torch.equal(found.mask, plain.mask & of_picture.mask)


def test_a_validity_channel_takes_the_mask_in(tmp_path):
    (found, plain) = (each.batch for each in batch(tmp_path, "depth", mask_value=-1.0))
    (of_picture, _) = (each.batch for each in batch(tmp_path, "rgb"))
    assert found.mask is None and plain.mask is None
    valid = of_picture.mask
    assert torch.equal(found.x[:, 1] > 0, (plain.x[:, 1] > 0) & valid)
    assert (found.x[:, 0][~valid] == -1).all() and torch.equal(found.x[:, 0][valid], plain.x[:, 0][valid])


def test_the_loss_does_not_see_what_is_invalid(tmp_path):
    found = batch(tmp_path)[0].batch
    y = torch.randn(found.x.shape, generator=torch.Generator().manual_seed(0))
    other = torch.where(found.mask.unsqueeze(1), y, 1e3)
    assert torch.equal(
        pixel_loss("mse", y, found.x, found.mask), pixel_loss("mse", other, found.x, found.mask)
    )


def test_an_empty_mask_makes_a_sample_unreadable(tmp_path):
    class OneEmpty(InMemory):
        def get(self, index, label=""):
            given = super().get(index, label)
            return np.zeros_like(given) if label and index == 2 else given

    modality = RGB(RGB.Config(), size=24)
    cfg = Folder.Config(name="folder", path="-", modality=modality.cfg, workers=0)
    extra = {"valid": Mask(Mask.Config(), size=24)}
    (loaded,) = EvalBatches(
        OneEmpty("rgb", holes()), modality, extra, cfg, size=(24, 24), batch_size=4, rank=0, world=1
    )
    assert loaded.batch.keys == ("s0", "s1", "s3")
    ((key, reason),) = loaded.bad
    assert key == "s2" and "is an empty mask" in reason


@pytest.mark.parametrize(
    "shape, fits", [((20, 30), True), ((80, 120), True), ((13, 20), True), ((60, 40), False)]
)
def test_masks_of_other_sizes_but_not_of_other_aspects(tmp_path, shape, fits):
    loaded = batch(tmp_path, valid=np.ones(shape, bool), evaluation=True)[0]
    assert len(loaded.bad) == (0 if fits else 4)
    if not fits:
        assert loaded.bad[0][1] == (
            "the mask 'valid' of 60 x 40 does not fit the sample of 40 x 60: the aspect ratios differ"
        )


@pytest.mark.parametrize(
    "name, masks, settings, says",
    [
        ("rgb", {"mask_value": 7.0}, {}, r"data\.extra\.valid\.mask_value=7 is not a value of .*: -1 to 1"),
        ("semseg", {"mask_value": 7.0}, {}, "mask_value=7 is not a class of data.modality: 0 to 6"),
        ("semseg", {"mask_value": 1.5}, {}, "mask_value=1.5 is not a class"),
        ("depth", {"mask_value": 0.0}, {"mask_value": -1.0}, "is set already; remove one of the two"),
    ],
)
def test_settings_that_contradict_the_modality(tmp_path, name, masks, settings, says):
    with pytest.raises(ConfigError, match=says):
        batch(tmp_path, name, masks=masks, **settings)


def test_samples_without_places_take_no_mask(tmp_path):
    data, mask = InMemory("rgb", holes()), {"valid": Mask(Mask.Config(), size=24)}
    for modality, says in (
        (Instance(Instance.Config(), size=None), "crops its samples in its own way"),
        (
            Array(Array.Config(channels=3, size=5, rank=1), size=None),
            "the mask has 2 axes, but the samples have 1",
        ),
    ):
        cfg = Folder.Config(name="folder", path="-", modality=modality.cfg, workers=0)
        with pytest.raises(ConfigError, match=f"data.extra.valid: .*{says}"):
            EvalBatches(data, modality, mask, cfg, size=(24, 24), batch_size=4, rank=0, world=1)


class TestRuns:
    """From a config to a training run, with the toy parts."""

    pytestmark = pytest.mark.usefixtures("toy")

    def tree(self, folder, empty=()):
        for name in ("x", "valid"):
            (folder / name).mkdir()
        rng = np.random.default_rng(0)
        for i in range(8):
            np.save(folder / "x" / f"s{i}.npy", rng.uniform(-1, 1, (2, 8, 8)).astype(np.float32))
            valid = np.zeros((8, 8), np.uint8) if i in empty else np.eye(8, dtype=np.uint8) * 255
            Image.fromarray(valid).save(folder / "valid" / f"s{i}.png")
        return {
            "name": "folder",
            "modality": {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1]},
            "path": str(folder / "x"),
            "extra": {"valid": {"name": "mask", "mask_value": 0.5}},
            "extra_path": {"valid": str(folder / "valid")},
            "batch_size": 4,
            "workers": 0,
        }

    def test_a_run_with_a_folder_of_masks(self, tmp_path):
        run = build(run_config(tmp_path / "run", data=self.tree(tmp_path)), CPU)
        found = first_batch(run)
        assert found.mask.sum() == 4 * 8 and (found.x[:, :, 0, 1] == 0.5).all()
        findings = cheap(run)
        assert not [each for each in findings if each.grade == "error"]
        assert any("12.5% of the positions are valid" in each.what for each in findings)

    def test_check_names_empty_masks(self, tmp_path):
        run = build(run_config(tmp_path / "run", data=self.tree(tmp_path, empty=(1, 5))), CPU)
        (error,) = [each for each in samples(run) if each.grade == "error"]
        assert (
            error.where == "data.path" and "2 of 8 samples" in error.what and "is an empty mask" in error.what
        )

    def test_training_runs(self, tmp_path):
        train(run_config(tmp_path / "run", data=self.tree(tmp_path)))
        assert (tmp_path / "run" / "metrics.jsonl").read_text()
