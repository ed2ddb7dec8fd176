"""Depth, normals, class maps and edges: from files to tensors and back, holes, flips, and one crop for all."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from vqcore_vision.depth import Depth
from vqcore_vision.edge import Edge
from vqcore_vision.normal import Normal
from vqcore_vision.semseg import Semseg

from vqcore.compose.build import from_tree
from vqcore.errors import DataError
from vqcore.modalities.colours import class_colours, gradient
from vqcore.modalities.rgb import RGB
from vqcore.modalities.views import view_of
from vqcore.pictures import picture
from vqcore.protocols import View

EARTH = Path(__file__).resolve().parents[3] / "data" / "earth" / "train"
TILE = "americas/altiplano_s10_w080"
LINEAR = {"scaling": "linear", "range": (0.0, 20000.0), "factor": 10.0}
COCO = {"num_labels": 134, "shift": True, "resample": "pillow-nearest"}
needs_exr = pytest.mark.skipif(not importlib.util.find_spec("OpenEXR"), reason="OpenEXR is not installed")


def earth(name: str) -> Path:
    return EARTH / name / f"{TILE}.{'jpg' if name == 'rgb' else 'png'}"


def whole(*size: int, flip: bool = False) -> View:
    return View(start=(0.0, 0.0), stop=(1.0, 1.0), size=size, flip=flip)


def depth(size=8, **settings) -> Depth:
    return Depth(Depth.Config(**settings), size=size)


def normal(size=8, **settings) -> Normal:
    return Normal(Normal.Config(**settings), size=size)


def semseg(size=8, **settings) -> Semseg:
    return Semseg(Semseg.Config(**settings), size=size)


def edge(size=8, **settings) -> Edge:
    return Edge(Edge.Config(**settings), size=size)


def tensor_of(modality, source, view=None):
    """The tensor of a view, by default of the whole source at its own size."""
    raw = modality.read(source)
    return modality.tensor(raw, view or whole(*modality.extent(raw)))


def metres(seed=0, shape=(9, 11)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 80, shape).astype(np.float32)


def unit_vectors(seed=0, shape=(9, 11)) -> np.ndarray:
    n = np.random.default_rng(seed).normal(size=(*shape, 3)) + np.array([0, 0, 2.0])
    return (n / np.linalg.norm(n, axis=-1, keepdims=True)).astype(np.float32)


class TestDepth:
    @pytest.mark.parametrize("scaling", ["linear", "log"])
    def test_scalings_by_their_formulas(self, scaling):
        d, near, far = metres(), 2.0, 50.0
        modality = depth(scaling=scaling, range=(near, far))
        d[0, 0], d[0, 1] = 1.0, 75.0
        c = np.clip(d, near, far).astype(np.float64)
        share = np.log(c / near) / np.log(far / near) if scaling == "log" else (c - near) / (far - near)
        x = tensor_of(modality, d)
        assert np.allclose(x[0], 2 * share - 1, atol=1e-6) and modality.spec.range == (-1, 1)
        assert (float(x.min()), float(x.max())) == (-1, 1)
        assert np.allclose(modality.show(x), c, rtol=1e-5)
        assert np.allclose(modality.values(x[None] * 3)[0].numpy().min(), near)  # a decoder may overshoot
        assert (
            modality.metrics == ("vision/abs-rel", "vision/delta", "mae")
            and modality.spec.loss == "smooth_l1"
        )

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    def test_integers_have_a_factor_and_an_offset(self, tmp_path, suffix):
        values = np.random.default_rng(0).integers(1, 65536, (9, 11)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        modality = depth(scaling="linear", range=(-100.0, 1000.0), factor=0.01, offset=-50.0)
        for source in (tmp_path / f"a.{suffix}", values, Image.open(tmp_path / f"a.{suffix}")):
            x = tensor_of(modality, source)
            assert np.allclose(modality.show(x), 0.01 * values - 50, atol=1e-3)

    def test_round_trip_in_the_units_of_the_files(self, tmp_path):
        np.save(tmp_path / "a.npy", metres())
        for settings in (
            {"scaling": "linear", "range": (0.5, 80.0)},
            {"scaling": "log", "range": (0.5, 80.0)},
        ):
            modality = depth(**settings)
            shown = modality.show(tensor_of(modality, tmp_path / "a.npy")[None])
            assert shown.dtype == np.float32 and np.allclose(shown, metres(), rtol=1e-5)
            np.save(tmp_path / "again.npy", shown)
            again = modality.show(tensor_of(modality, tmp_path / "again.npy"))
            assert np.allclose(again, shown, rtol=1e-6)

    def test_earth_in_metres(self):
        modality = depth((192, 192), **LINEAR)
        x = tensor_of(modality, earth("depth"))
        assert np.allclose(modality.show(x), 10.0 * np.asarray(Image.open(earth("depth"))), atol=0.01)

    def test_holes_are_zeros_nan_and_infinities(self):
        d = metres()
        d[0, :4] = [0.0, np.nan, np.inf, -np.inf]
        modality = depth(scaling="linear", range=(1.0, 80.0))
        raw = modality.read(d)
        mask, x = modality.mask(raw, whole(9, 11)), modality.tensor(raw, whole(9, 11))
        assert modality.spec.mask and mask.dtype == torch.bool
        assert (~mask).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
        assert x[0, 0, :4].tolist() == [0.0] * 4 and x.isfinite().all()
        flipped = modality.mask(raw, whole(9, 11, flip=True))
        assert torch.equal(flipped, mask.flip(-1))
        other = depth(scaling="linear", range=(0.0, 80.0), invalid=(-1.0,))
        assert int(other.mask(other.read(np.where(d > 0, d, -1)), whole(9, 11)).sum()) == 9 * 11 - 4
        assert int(other.mask(other.read(d), whole(9, 11)).sum()) == 9 * 11 - 3  # 0 is a value there

    def test_a_validity_channel_instead_of_a_mask(self):
        d = metres()
        d[2, 3] = 0
        modality = depth(scaling="log", range=(1.0, 80.0), mask_value=-1.0)
        x = tensor_of(modality, d)
        assert (modality.spec.channels, modality.spec.mask) == (2, False)
        assert x[:, 2, 3].tolist() == [-1.0, -1.0] and (x[1].sum() == 9 * 11 - 2)
        shown = modality.show(x)
        assert np.isnan(shown[2, 3]) and np.isfinite(shown).sum() == 9 * 11 - 1
        assert torch.equal(tensor_of(modality, shown), x)

    @pytest.mark.parametrize("resample", ["bilinear", "bicubic", "box"])
    def test_filters_leave_holes_out(self, resample):
        d = np.full((16, 16), 7.0, np.float32)
        d[4:7, 5:9] = 0
        modality = depth(8, scaling="linear", range=(0.0, 14.0), resample=resample)
        raw = modality.read(d)
        x, mask = modality.tensor(raw, whole(8, 8))[0], modality.mask(raw, whole(8, 8))
        assert 0 < (~mask).sum() < 12
        assert torch.allclose(x[mask], torch.zeros(()), atol=1e-5)  # 7 everywhere, never mixed with 0

    def test_4m_standardises_the_middle_of_each_image(self, tmp_path):
        values = np.random.default_rng(0).integers(0, 65536, (40, 30)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png")
        modality = depth((40, 30), factor=1 / 65535, invalid=())
        x = tensor_of(modality, tmp_path / "a.png")
        shares = torch.tensor(values / 65535.0, dtype=torch.float32)
        ranked = shares.flatten().sort().values[120:1080].double().numpy()  # 10% to 90% of 1200
        expected = (shares.double().numpy() - ranked.mean()) / np.sqrt(ranked.var(ddof=1) + 1e-6)
        assert np.allclose(x[0], expected, atol=2e-6)
        assert modality.spec.range is None and modality.metrics == ("mae",)

    def test_every_16_bit_value_is_the_float_that_4m_saw(self):
        values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        raw = depth(factor=1 / 65535, invalid=())._units(values, "u").astype(np.float32)
        assert np.array_equal(raw, (values / 65535.0).astype(np.float32))

    def test_4m_crops_then_takes_pillows_nearest_then_standardises(self):
        modality = depth((112, 112), factor=1 / 65535, invalid=(), resample="pillow-nearest")
        view = view_of(((10, 22), (160, 160)), (192, 192), (112, 112))
        x = tensor_of(modality, earth("depth"), view)
        image = (
            Image.open(earth("depth")).crop((22, 10, 182, 170)).resize((112, 112), Image.Resampling.NEAREST)
        )
        shares = torch.tensor(np.asarray(image) / 65535.0, dtype=torch.float32)[None]
        n = shares.numel()
        middle = shares.flatten().sort().values[int(0.1 * n) : int(0.9 * n)]
        assert torch.equal(x, (shares - middle.mean()) / torch.sqrt(middle.var() + 1e-6))

    def test_a_crop_without_a_measurement_is_empty_not_an_error(self):
        d = metres(shape=(8, 8))
        d[:4, :4] = 0
        for settings in ({}, {"scaling": "linear", "range": (0.0, 80.0)}):
            modality = depth(4, **settings)
            raw, view = modality.read(d), view_of(((0, 0), (4, 4)), (8, 8), (4, 4))
            assert not modality.mask(raw, view).any() and not modality.tensor(raw, view).any()

    def test_pictures_use_the_whole_scale_for_the_whole_range(self):
        modality = depth((1, 3), scaling="linear", range=(0.0, 10.0))
        shown = np.asarray(modality.picture(tensor_of(modality, np.array([[1e-6, 5.0, 10.0]], np.float32))))
        assert shown[0, 0].tolist() == [68, 1, 84] and shown[0, 2].tolist() == [253, 231, 37]
        luma = np.asarray(gradient(np.linspace(0, 1, 50)[None]).convert("L")).astype(int)[0]
        assert (np.diff(luma) >= 0).all() and luma[-1] - luma[0] > 150
        holes = depth((1, 2), scaling="linear", range=(0.0, 10.0), mask_value=0.0)
        assert (
            np.asarray(picture(holes, tensor_of(holes, np.array([[0, 5]], np.float32))))[0, 0].tolist()
            == [128] * 3
        )

    @needs_exr
    def test_exr(self, tmp_path):
        import OpenEXR

        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        modality = depth(scaling="linear", range=(0.0, 80.0), factor=99.0)
        for name in ("Z", "Y", "R", "disparity"):
            OpenEXR.File(header, {name: metres()}).write(str(tmp_path / "a.exr"))
            assert np.allclose(modality.show(tensor_of(modality, tmp_path / "a.exr")), metres(), rtol=1e-5)
        both = {"Y": metres(1), "Z": metres(2)}
        OpenEXR.File(header, both).write(str(tmp_path / "b.exr"))
        assert np.allclose(modality.show(tensor_of(modality, tmp_path / "b.exr")), metres(2), rtol=1e-5)
        vectors = {"RGB": unit_vectors()}
        OpenEXR.File(header, vectors).write(str(tmp_path / "n.exr"))
        n = tensor_of(normal(), tmp_path / "n.exr")
        assert np.allclose(rearrange(n, "c h w -> h w c"), unit_vectors(), atol=1e-5)
        with pytest.raises(DataError, match=r"n\.exr: has the channels B, G, R; expected are Z or Y"):
            modality.read(tmp_path / "n.exr")
        with pytest.raises(DataError, match=r"a\.exr: has the channels disparity; expected are R\+G\+B or X"):
            normal().read(tmp_path / "a.exr")
        (tmp_path / "cut.exr").write_bytes((tmp_path / "a.exr").read_bytes()[:300])
        with pytest.raises(DataError, match=r"cut\.exr: ."):
            modality.read(tmp_path / "cut.exr")

    def test_without_the_library_for_exr_the_error_says_what_to_install(self, tmp_path, monkeypatch):
        import sys

        (tmp_path / "a.exr").write_bytes(b"v/1\x01")
        monkeypatch.setitem(sys.modules, "OpenEXR", None)
        with pytest.raises(
            DataError, match=r"a\.exr: .* 'OpenEXR' is not installed; run: pip install OpenEXR"
        ):
            depth().read(tmp_path / "a.exr")


@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
def test_integers_below_zero_are_heights_too(tmp_path, resample):
    heights = np.array([[-400, 0, 800], [-9999, 100, -10]], np.int16)
    np.save(tmp_path / "a.npy", heights)
    modality = depth(scaling="linear", range=(-1000.0, 1000.0), invalid=(-9999.0,), resample=resample)
    raw = modality.read(tmp_path / "a.npy")
    shown, mask = modality.show(modality.tensor(raw, whole(2, 3))), modality.mask(raw, whole(2, 3))
    assert mask.tolist() == [[True] * 3, [False, True, True]]
    assert np.allclose(shown[mask], heights[mask], atol=0.1)


class TestNormal:
    def test_eight_bits(self, tmp_path):
        levels = np.round((unit_vectors() + 1) * 127.5).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / "a.png")
        for source in (tmp_path / "a.png", levels):
            modality = normal()
            x = tensor_of(modality, source)
            assert np.allclose(rearrange(x, "c h w -> h w c"), unit_vectors(), atol=0.02)
            assert torch.allclose(x.norm(dim=0), torch.ones(9, 11), atol=1e-6)
            assert np.abs(np.asarray(modality.show(x)).astype(int) - levels).max() <= 1
        assert normal().spec.kind == "unit-vector" and normal().spec.loss == "mse" and normal().spec.mask

    @pytest.mark.parametrize("layout", ["h w c -> h w c", "h w c -> c h w"])
    def test_floats(self, tmp_path, layout):
        np.save(tmp_path / "a.npy", rearrange(unit_vectors(), layout))
        x = tensor_of(normal(), tmp_path / "a.npy")
        assert np.allclose(rearrange(x, "c h w -> h w c"), unit_vectors(), atol=1e-6)

    def test_4m_scales_levels_and_leaves_lengths_alone(self):
        modality = normal((112, 112), unit=False, tolerance=None)
        view = view_of(((10, 22), (160, 160)), (192, 192), (112, 112))
        x = tensor_of(modality, earth("normal"), view)
        image = (
            Image.open(earth("normal")).crop((22, 10, 182, 170)).resize((112, 112), Image.Resampling.BICUBIC)
        )
        levels = rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")
        assert torch.equal(x, levels.float().div(255).sub(0.5).div(0.5))
        assert np.array_equal(np.asarray(modality.show(x)), np.asarray(image))
        flipped = tensor_of(modality, earth("normal"), View(view.start, view.stop, view.size, flip=True))
        mirrored = levels.flip(-1)
        mirrored[0] = 255 - mirrored[0]
        assert torch.equal(flipped, mirrored.float().div(255).sub(0.5).div(0.5))

    def test_length_one_survives_a_resize(self):
        modality = normal((50, 50))
        x = tensor_of(modality, earth("normal"), whole(50, 50))
        assert torch.allclose(x.norm(dim=0), torch.ones(50, 50), atol=1e-5)
        plain = tensor_of(normal((50, 50), unit=False), earth("normal"), whole(50, 50))
        assert float(plain.norm(dim=0).min()) < 0.98

    def test_holes(self):
        n = unit_vectors()
        n[1, 2], n[3, 4] = 0, np.nan
        modality = normal()
        raw = modality.read(n)
        mask = modality.mask(raw, whole(9, 11))
        assert (~mask).nonzero().tolist() == [[1, 2], [3, 4]]
        assert modality.tensor(raw, whole(9, 11)).isfinite().all()
        levels = np.round((np.nan_to_num(n) + 1) * 127.5).astype(np.uint8)
        assert torch.equal(modality.mask(modality.read(levels), whole(9, 11)), mask)
        four = normal(mask_value=0.0)
        x = tensor_of(four, n)
        assert four.spec.channels == 4 and not four.spec.mask
        assert x[:, 1, 2].tolist() == [0, 0, 0, -1] and int((x[3] > 0).sum()) == 97
        assert four.values(x[None])[0, :, 1, 2].isnan().all()
        assert np.asarray(four.show(x))[1, 2].tolist() == [128, 128, 128]

    def test_show_gives_unit_vectors_whatever_a_decoder_says(self):
        x = torch.tensor([0.0, 0.3, 0.4]).reshape(3, 1, 1).expand(3, 2, 2)
        assert np.asarray(normal().show(x))[0, 0].tolist() == [128, 204, 230]

    @pytest.mark.parametrize("settings", [{}, {"unit": False}, {"mask_value": 0.0}])
    def test_what_it_shows_it_reads(self, settings):
        # The length 0.0996 is below the limit for a direction; rounded to 8 bits, it is above the limit.
        modality = normal(**settings)
        short = torch.tensor([0.09, 0.04, 0.0166]).reshape(3, 1, 1)
        x = torch.stack([short[:, 0, 0], torch.tensor([0.0, 0.3, 0.4])], dim=-1).reshape(3, 1, 2)
        x = x if modality.spec.channels == 3 else torch.cat([x, torch.ones(1, 1, 2)])
        shown = modality.show(x)
        assert np.asarray(shown)[0, 0].tolist() == [128, 128, 128]
        raw = modality.read(shown)
        assert modality.tensor(raw, whole(1, 2)).shape == x.shape


class TestSemseg:
    @pytest.mark.parametrize("mode", ["L", "P", "I;16", "npy", "1"])
    def test_ids_from_every_kind_of_file(self, tmp_path, mode):
        ids = np.random.default_rng(0).integers(0, 2 if mode == "1" else 8, (9, 11))
        path = tmp_path / ("a.npy" if mode == "npy" else "a.png")
        if mode == "npy":
            np.save(path, ids)
        elif mode == "I;16":
            Image.fromarray(ids.astype(np.uint16)).save(path)
        elif mode == "1":
            Image.fromarray(ids.astype(bool)).save(path)
        else:
            image = Image.fromarray(ids.astype(np.uint8))
            if mode == "P":
                image.putpalette(class_colours(8).tobytes())
            image.save(path)
        modality = semseg(num_labels=8)
        x = tensor_of(modality, path)
        assert x.dtype == torch.int64 and np.array_equal(x, ids)
        assert (modality.spec.labels, modality.spec.loss, modality.spec.mask) == (8, "cross_entropy", False)

    def test_show_is_a_picture_that_can_be_read_again(self, tmp_path):
        ids = np.random.default_rng(0).integers(0, 8, (9, 11)).astype(np.uint8)
        modality = semseg(num_labels=8)
        x = tensor_of(modality, ids)
        scores = rearrange(torch.nn.functional.one_hot(x, 8).float(), "h w k -> k h w")
        for shown in (
            modality.show(x),
            modality.show(x[None]),
            modality.show(scores),
            modality.show(scores[None]),
        ):
            shown.save(tmp_path / "a.png")
            assert shown.mode == "P" and np.array_equal(tensor_of(modality, tmp_path / "a.png"), x)
        many = semseg(num_labels=3000)
        y = tensor_of(many, np.array([[0, 2999]]))
        assert many.show(y).mode == "I;16" and np.asarray(many.show(y)).tolist() == [[0, 2999]]
        assert many.picture(y).mode == "RGB"

    def test_the_palette_colours_pictures_and_nothing_else(self):
        colours = ((1, 2, 3), (9, 8, 7), (50, 60, 70))
        modality = semseg(num_labels=3, palette=colours)
        x = tensor_of(modality, np.array([[0, 1, 2]]))
        expected = np.array(colours, np.uint8)[None]
        assert np.array_equal(np.asarray(picture(modality, x)), expected)
        assert np.array_equal(np.asarray(modality.show(x).convert("RGB")), expected)
        assert len({tuple(c) for c in class_colours(256)}) == 256
        assert class_colours(4).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
        config = {"name": "vision/semseg", "num_labels": 2, "palette": [[0, 0, 0], [255, 255, 255]]}
        assert from_tree(config, schema=Semseg.Config).palette == ((0, 0, 0), (255, 255, 255))

    def test_4m_adds_one_and_makes_255_zero(self, tmp_path):
        ids = np.array([[0, 1, 132, 255], [7, 255, 8, 9]], np.uint8)
        Image.fromarray(ids).save(tmp_path / "a.png")
        modality = semseg(**COCO)
        x = tensor_of(modality, tmp_path / "a.png")
        assert np.array_equal(x, (ids + np.uint8(1)).astype(np.int64))  # in 8 bits, 255 + 1 is 0
        assert modality.spec.labels == 134 and not modality.spec.mask
        assert np.array_equal(np.asarray(modality.show(x)), ids)

    def test_4m_resizes_by_pillows_nearest(self):
        modality = semseg((112, 112), num_labels=9, shift=True, resample="pillow-nearest")
        view = view_of(((10, 22), (160, 160)), (192, 192), (112, 112))
        image = (
            Image.open(earth("semseg")).crop((22, 10, 182, 170)).resize((112, 112), Image.Resampling.NEAREST)
        )
        assert np.array_equal(tensor_of(modality, earth("semseg"), view), np.asarray(image).astype(int) + 1)

    def test_a_label_to_ignore_is_masked_and_has_a_class_of_its_own(self):
        ids = np.array([[0, 1, 255, 2]], np.uint8)
        modality = semseg(num_labels=3, ignore_label=255)
        raw = modality.read(ids)
        assert modality.spec.labels == 4 and modality.spec.mask
        assert modality.tensor(raw, whole(1, 4)).tolist() == [[0, 1, 3, 2]]
        assert modality.mask(raw, whole(1, 4)).tolist() == [[True, True, False, True]]
        assert modality.mask(raw, whole(1, 4, flip=True)).tolist() == [[True, False, True, True]]
        assert np.array_equal(np.asarray(modality.show(modality.tensor(raw, whole(1, 4)))), ids)
        void = semseg(num_labels=3, ignore_label=0)
        assert void.spec.labels == 3 and void.mask(void.read(ids * (ids < 3)), whole(1, 4)).sum() == 2
        with pytest.raises(DataError, match=r"the id 3 at \[0, 0\] is no class"):
            modality.read(np.array([[3]]))

    def test_minus_one_may_mean_none(self, tmp_path):
        ids = np.array([[0, 1, -1, 2]])
        np.save(tmp_path / "a.npy", ids)
        modality = semseg(num_labels=3, ignore_label=-1)
        for source in (ids, tmp_path / "a.npy", ids.astype(np.int8)):
            raw = modality.read(source)
            assert modality.tensor(raw, whole(1, 4)).tolist() == [[0, 1, 3, 2]]
            assert modality.mask(raw, whole(1, 4)).tolist() == [[True, True, False, True]]
        shown = modality.show(modality.tensor(modality.read(ids), whole(1, 4)))
        assert isinstance(shown, np.ndarray) and np.array_equal(shown, ids)
        assert semseg(num_labels=3, ignore_label=-1, resample="pillow-nearest").tensor(
            raw, whole(1, 2)
        ).shape == (1, 2)
        for wrong in (-2, 3):
            with pytest.raises(DataError, match=rf"the id {wrong} at \[0, 1\] is no class"):
                modality.read(np.array([[0, wrong]]))

    def test_what_has_no_colour_of_its_own_is_grey(self):
        modality = semseg(num_labels=2, ignore_label=-1, palette=((1, 2, 3), (9, 8, 7)))
        x = tensor_of(modality, np.array([[0, 1, -1]]))
        assert np.asarray(modality.picture(x)).tolist() == [[[1, 2, 3], [9, 8, 7], [128, 128, 128]]]

    def test_resizing_invents_no_class(self):
        ids = np.zeros((30, 30), np.uint8)
        ids[:, 15:] = 5
        x = tensor_of(semseg(num_labels=6), ids, whole(7, 7))
        assert set(np.unique(x)) == {0, 5}


class TestEdge:
    def test_levels(self, tmp_path):
        levels = np.random.default_rng(0).integers(0, 256, (9, 11)).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / "grey.png")
        Image.fromarray(levels).convert("RGB").save(tmp_path / "rgb.png")
        modality = edge()
        for source in (tmp_path / "grey.png", tmp_path / "rgb.png", levels):
            x = tensor_of(modality, source)
            assert torch.equal(x[0], torch.from_numpy(levels).float().div(255).sub(0.5).div(0.5))
            assert np.array_equal(np.asarray(modality.show(x)), levels)
        assert tensor_of(modality, np.eye(3, dtype=bool))[0].tolist() == [
            [1, -1, -1],
            [-1, 1, -1],
            [-1, -1, 1],
        ]
        assert modality.spec.channels == 1 and modality.spec.loss == "smooth_l1"

    def test_4m_resizes_edges_as_pictures(self):
        x = tensor_of(edge(), earth("edge"), whole(64, 64))
        image = Image.open(earth("edge")).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        levels = torch.from_numpy(np.array(image)).float().div(255).sub(0.5).div(0.5)
        assert torch.equal(x[0], levels[..., 0]) and torch.equal(x[0], levels[..., 2])

    def test_a_picture_without_edges_is_one(self, tmp_path):
        modality = edge()
        assert (tensor_of(modality, np.zeros((4, 4), np.uint8)) == -1).all()
        faint = torch.full((1, 4, 4), -0.99)
        modality.show(faint).save(tmp_path / "a.png")
        assert (tensor_of(modality, tmp_path / "a.png") == -1).all()

    def test_jpeg_may_tint_a_little(self, tmp_path):
        levels = (np.random.default_rng(0).random((32, 32)) < 0.1).astype(np.uint8) * 255
        Image.fromarray(levels).convert("RGB").save(tmp_path / "a.jpg", quality=90)
        assert tensor_of(edge(), tmp_path / "a.jpg").shape == (1, 32, 32)


def heights(x: torch.Tensor) -> np.ndarray:
    """Metres above the sea, from a linear depth tensor of the earth tiles."""
    return np.round((x[0].numpy().astype(np.float64) + 1) * 10000) - 11000


def drawn_views() -> list[View]:
    """Random crops and flips of a tile, as the main modality draws them in training."""
    rgb = RGB(RGB.Config(min_crop_scale=0.2, hflip=0.5), size=64)
    return [rgb.view((192, 192), (64, 64), np.random.default_rng(seed)) for seed in range(12)]


class TestAlignment:
    """One view cuts all modalities of a tile in the same way."""

    def test_views_vary(self):
        assert {view.flip for view in drawn_views()} == {True, False}
        assert len({view.start for view in drawn_views()}) == 12

    def test_class_maps_follow_from_the_cropped_depth(self):
        limits = np.array([-4000, -200])
        for view in drawn_views():
            h = heights(tensor_of(depth(**LINEAR), earth("depth"), view))
            classes = tensor_of(semseg(num_labels=8), earth("semseg"), view).numpy()
            land = classes >= 3
            assert np.array_equal(classes[~land], np.digitize(h[~land], limits))
            assert np.array_equal(classes[land], 3 + np.digitize(h[land], [200, 500, 1500, 3000]))
            assert len(np.unique(classes)) >= 3

    def test_normals_follow_from_the_flipped_depth(self):
        # The tile at its own size: east is to the right, and to the left when it is mirrored.
        pitch = 40007863 / 360 / 12
        latitude = np.radians(-10 - (np.arange(192) + 0.5) / 12)[:, None]
        for flip in (False, True):
            z = heights(tensor_of(depth((192, 192), **LINEAR), earth("depth"), whole(192, 192, flip=flip)))
            down, right = np.gradient(z, pitch)
            n = np.stack([-10 * right / np.cos(latitude), 10 * down, np.ones_like(z)])
            n /= np.linalg.norm(n, axis=0)
            x = tensor_of(normal((192, 192)), earth("normal"), whole(192, 192, flip=flip))
            off = np.degrees(np.arccos(np.clip((x.numpy() * n).sum(0), -1, 1)))
            assert np.median(off) < 0.3 and np.percentile(off, 99) < 1

    def test_edges_follow_the_crop_of_the_picture(self):
        for view in drawn_views():
            start = [round(a * 192) for a in view.start]
            stop = [round(b * 192) for b in view.stop]
            box = slice(start[0], stop[0]), slice(start[1], stop[1])
            level = View(view.start, view.stop, (stop[0] - start[0], stop[1] - start[1]), view.flip)
            for name, modality in (("edge", edge()), ("rgb", RGB(RGB.Config(), size=64))):
                pixels = np.asarray(Image.open(earth(name)))[box]
                shown = np.asarray(modality.show(tensor_of(modality, earth(name), level)))
                assert np.array_equal(shown, pixels[:, ::-1] if view.flip else pixels)

    def test_a_view_of_the_picture_fits_a_coarser_map(self):
        ids = np.asarray(Image.open(earth("semseg")))
        fine = ids.repeat(2, axis=0).repeat(2, axis=1)
        view = view_of(((64, 96), (128, 128)), (384, 384), (64, 64))
        modality = semseg((64, 64), num_labels=8)
        assert torch.equal(tensor_of(modality, ids, view), tensor_of(modality, fine, view))


BAD = [
    (
        "three channels for depth",
        lambda: depth(),
        np.zeros((3, 8, 8), np.float32),
        r"shape \(3, 8, 8\); expected one channel and two axes",
    ),
    (
        "colours for depth",
        lambda: depth(),
        Image.new("RGB", (8, 8)),
        r"mode RGB; a depth map is a grey picture",
    ),
    (
        "one channel for normals",
        lambda: normal(),
        np.zeros((8, 8), np.float32),
        r"shape \(8, 8\); expected 3 channels and two axes",
    ),
    (
        "grey for normals",
        lambda: normal(),
        Image.new("L", (8, 8)),
        r"mode L; normals are pictures of three 8-bit",
    ),
    (
        "16 bits for normals",
        lambda: normal(),
        Image.new("I;16", (8, 8)),
        r"16-bit grey .*three 8-bit channels",
    ),
    (
        "a 16-bit array for normals",
        lambda: normal(),
        np.full((3, 8, 8), 999),
        r"16-bit integers; normals are 8-bit",
    ),
    (
        "16 bits for edges",
        lambda: edge(),
        Image.new("I;16", (8, 8)),
        r"16-bit grey or floats .*8-bit pictures",
    ),
    (
        "colours for edges",
        lambda: edge(),
        Image.new("RGB", (8, 8), (9, 90, 200)),
        "has colours; an edge map is a grey",
    ),
    (
        "floats for edges",
        lambda: edge(),
        np.ones((8, 8), np.float32),
        "an array of shape|type float32; edge maps are 8-bit",
    ),
    (
        "colours for classes",
        lambda: semseg(num_labels=3),
        Image.new("RGB", (8, 8)),
        r"has colours .*mode RGB.*not class ids",
    ),
    (
        "floats for classes",
        lambda: semseg(num_labels=3),
        np.zeros((8, 8)),
        "has floats; class ids are integers",
    ),
    (
        "id at num_labels",
        lambda: semseg(num_labels=3),
        np.array([[0, 2], [3, 1]]),
        r"the id 3 at \[1, 0\] .*num_labels=3 \(0 to 2\)",
    ),
    (
        "id above num_labels",
        lambda: semseg(num_labels=3),
        np.full((2, 2), 255),
        r"the id 255 .*data\.modality\.ignore_label",
    ),
    (
        "4M's 254",
        lambda: semseg(**COCO),
        np.full((2, 2), 254, np.uint8),
        r"the id 254 .*shift, ids are 0 to 132, and 255",
    ),
    (
        "a negative id",
        lambda: semseg(num_labels=3),
        np.full((2, 2), -1),
        r"the id -1 at \[0, 0\] is no class; .*data\.modality\.ignore_label",
    ),
    (
        "a negative id where ids are shifted",
        lambda: semseg(**COCO),
        np.array([[3, -1]]),
        r"the id -1 at \[0, 1\] is no class; .*shift",
    ),
    (
        "numbers of 64 bits",
        lambda: depth(),
        np.array([[3, 2**40]]),
        r"integers from 3 to 1099511627776; integers must fit into 32 bits",
    ),
    (
        "negative integers for normals",
        lambda: normal(),
        np.full((3, 8, 8), -1),
        r"32-bit integers; normals are 8-bit",
    ),
    (
        "zeros and ones for edges",
        lambda: edge(),
        np.eye(8, dtype=np.uint8),
        "has only 0 and 1, where an edge is 255; multiply the values by 255",
    ),
    (
        "a palette's or a label map's ones for edges",
        lambda: edge(),
        Image.fromarray(np.eye(8, dtype=np.uint8)),
        "has only 0 and 1",
    ),
    (
        "nothing but ignored",
        lambda: semseg(num_labels=3, ignore_label=9),
        np.full((2, 2), 9),
        "no valid value; every id is",
    ),
    (
        "not unit",
        lambda: normal(),
        np.full((8, 8, 3), 0.5, np.float32),
        r"the vector at \[0, 0\] has length 0\.866, not 1 .*tolerance=0\.1",
    ),
    (
        "an empty mask of depth",
        lambda: depth(),
        np.zeros((8, 8), np.float32),
        "no valid value; 0, NaN and infinity are holes",
    ),
    ("all NaN", lambda: depth(), np.full((8, 8), np.nan), "no valid value"),
    (
        "an empty mask of normals",
        lambda: normal(),
        np.full((8, 8, 3), 128, np.uint8),
        "no valid value; zero vectors and NaN",
    ),
    (
        "one depth to standardise",
        lambda: depth(),
        np.full((8, 8), 300, np.uint16),
        "same value everywhere, 300; scaling 'standardise' needs different values",
    ),
]


class TestBadInput:
    @pytest.mark.parametrize("make, source, says", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
    def test_it_is_named(self, tmp_path, make, source, says):
        modality = make()
        with pytest.raises(DataError, match=says) as caught:
            modality.read(source)
        assert "\n" not in str(caught.value)
        if isinstance(source, Image.Image):
            source.save(tmp_path / "bad.png")
            with pytest.raises(DataError, match=rf"bad\.png: .*({says})"):
                modality.read(tmp_path / "bad.png")
        elif ".npy" in modality.suffixes:
            np.save(tmp_path / "bad.npy", source)
            with pytest.raises(DataError, match=rf"bad\.npy: .*({says})"):
                modality.read(tmp_path / "bad.npy")

    @pytest.mark.parametrize(
        "make", [lambda: depth(), lambda: normal(), lambda: semseg(num_labels=3), lambda: edge()]
    )
    def test_damaged_and_missing_files(self, tmp_path, make):
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
        with pytest.raises(DataError, match=r"a\.png: "):
            make().read(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"gone\.png: No such file"):
            make().read(tmp_path / "gone.png")

    def test_one_constant_depth_is_fine_elsewhere(self):
        modality = depth(scaling="linear", range=(0.0, 10.0))
        assert tensor_of(modality, np.full((4, 4), 5.0)).abs().max() == 0

    @pytest.mark.parametrize(
        "build, says",
        [
            (lambda: Depth.Config(scaling="linear"), "range=None with scaling 'linear'"),
            (
                lambda: Depth.Config(range=(0.0, 1.0)),
                "with scaling 'standardise': linear and log need a range",
            ),
            (lambda: Depth.Config(scaling="log", range=(0.0, 1.0)), "must be above 0 for scaling 'log'"),
            (lambda: Depth.Config(scaling="linear", range=(1.0, 1.0)), "ascending order"),
            (lambda: Depth.Config(factor=0.0), "factor=0.0"),
            (lambda: Depth.Config(hflip=2.0), "hflip=2.0"),
            (lambda: Depth.Config(scaling="linear", range=(0.0, 1.0), mask_value=2.0), "mask_value=2.0"),
            (lambda: Normal.Config(tolerance=1.0), "tolerance=1.0"),
            (lambda: Normal.Config(mask_value=-3.0), "mask_value=-3.0"),
            (lambda: Semseg.Config(num_labels=0), "num_labels=0"),
            (lambda: Semseg.Config(num_labels=300, shift=True), "num_labels=300 with shift"),
            (lambda: Semseg.Config(num_labels=3, ignore_label=70000), "ignore_label=70000"),
            (
                lambda: Semseg.Config(num_labels=3, shift=True, ignore_label=-1),
                "ignore_label=-1 with shift=True",
            ),
            (
                lambda: Semseg.Config(num_labels=3, palette=((0, 0, 0),)),
                "palette has 1 colours for num_labels=3",
            ),
            (
                lambda: Semseg.Config(num_labels=1, palette=((0, 0, 256),)),
                r"\[0, 0, 256\]; colours lie in 0..255",
            ),
        ],
    )
    def test_settings_out_of_range(self, build, says):
        with pytest.raises(ValueError, match=says):
            build()


@pytest.mark.parametrize(
    "modality, name",
    [
        (depth((64, 64)), "depth"),
        (depth((64, 64), **LINEAR, mask_value=0.0, resample="bicubic"), "depth"),
        (normal((64, 64)), "normal"),
        (normal((64, 64), mask_value=0.0), "normal"),
        (semseg((64, 64), num_labels=8), "semseg"),
        (edge((64, 64)), "edge"),
    ],
)
def test_pictures_are_rgb_and_a_size_is_needed(modality, name):
    assert picture(modality, tensor_of(modality, earth(name), whole(64, 64))).mode == "RGB"
    with pytest.raises(ValueError, match=r"data\.input_size"):
        type(modality)(modality.cfg, size=None)
