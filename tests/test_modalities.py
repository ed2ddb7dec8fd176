"""The modalities of the core against pixels and numbers that are computed by hand or by NumPy."""

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqcore.compose.build import from_tree
from vqcore.errors import DataError
from vqcore.modalities.array import Array
from vqcore.modalities.planes import cut_planes
from vqcore.modalities.rgb import RGB, Reduced
from vqcore.modalities.views import (
    CropConfig,
    centred_box,
    crop_view,
    pixels,
    resized_crop_box,
    scaled_box,
    smallest_crop,
    view_of,
)
from vqcore.protocols import DataSpec, View
from vqcore.testing.checks import check_modality

ROOT = Path(__file__).resolve().parent.parent


def picture(height: int = 5, width: int = 7, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels_of(source, **settings) -> np.ndarray:
    return np.asarray(RGB(RGB.Config(**settings), size=8).read(source))


def whole(size: tuple[int, ...], flip: bool = False) -> View:
    return View(start=(0.0,) * len(size), stop=(1.0,) * len(size), size=size, flip=flip)


def array(size=None, **settings) -> Array:
    return Array(Array.Config(**settings), size=size)


class TestViews:
    def test_centred_box_is_the_largest_of_its_aspect(self):
        assert centred_box((10, 20), (8, 8)) == ((0, 5), (10, 10))
        assert centred_box((20, 11), (8, 8)) == ((4, 0), (11, 11))
        assert centred_box((100, 100), (50, 100)) == ((25, 0), (50, 100))
        assert centred_box((7,), (3,)) == ((0,), (7,))
        assert centred_box((4, 8, 8), (2, 2, 2)) == ((0, 2, 2), (4, 4, 4))

    def test_a_matching_aspect_keeps_the_whole_sample(self):
        for n in range(1, 200):
            assert centred_box((3 * n, 7 * n), (21, 49)) == ((0, 0), (3 * n, 7 * n))

    def test_views_return_to_whole_pixels(self):
        rng = np.random.default_rng(0)
        for _ in range(500):
            extent = tuple(int(n) for n in rng.integers(1, 9000, 2))
            start = tuple(int(rng.integers(0, n)) for n in extent)
            sides = tuple(int(rng.integers(1, n - a + 1)) for n, a in zip(extent, start))
            found = pixels(view_of((start, sides), extent, (8, 8)), extent)
            assert found == (start, tuple(a + s for a, s in zip(start, sides)))

    @pytest.mark.parametrize("size", [(64, 64), (32, 64), (90, 30)])
    def test_random_resized_crop_has_the_declared_areas_and_aspects(self, size):
        # The sample has the target's aspect, so that nearly every drawn box fits.
        extent, rng = (size[0] * 50, size[1] * 50), np.random.default_rng(1)
        area, aspect, inside = [], [], []
        for _ in range(2000):
            start, sides = resized_crop_box(extent, size, rng, 0.1, (0.75, 4 / 3))
            area.append(sides[0] * sides[1] / (extent[0] * extent[1]))
            aspect.append(sides[1] / sides[0] / (size[1] / size[0]))
            inside.append(all(a >= 0 and a + s <= n for a, s, n in zip(start, sides, extent)))
        assert all(inside)
        assert 0.0999 < min(area) < 0.12 and 0.9 < max(area) <= 1
        assert 0.7499 < min(aspect) < 0.76 and 1.32 < max(aspect) < 1.334
        assert abs(np.mean(np.log(aspect))) < 0.02  # as often wide as tall
        assert 0.45 < np.mean(area) < 0.55 + 0.05

    def test_a_panorama_falls_back_to_the_widest_centred_crop(self):
        # No box of 0.8 of a 6:1 picture is as narrow as 4:3.
        box = resized_crop_box((100, 600), (8, 8), np.random.default_rng(0), 0.8, (0.75, 4 / 3))
        assert box == ((0, 233), (100, 133))
        box = resized_crop_box((600, 100), (8, 8), np.random.default_rng(0), 0.8, (0.75, 4 / 3))
        assert box == ((233, 0), (133, 100))

    @pytest.mark.parametrize("extent", [(1, 1), (1, 50), (3, 2)])
    def test_tiny_pictures_have_crops(self, extent):
        rng = np.random.default_rng(0)
        for _ in range(50):
            start, sides = resized_crop_box(extent, (8, 8), rng, 0.2, (0.75, 4 / 3))
            assert all(a >= 0 and s >= 1 and a + s <= n for a, s, n in zip(start, sides, extent))

    @pytest.mark.parametrize(
        "extent, size", [((400,), (10,)), ((300, 400), (8, 8)), ((40, 60, 80), (2, 3, 4))]
    )
    def test_scaled_boxes_keep_aspect_and_volume(self, extent, size):
        rng, largest = np.random.default_rng(0), math.prod(centred_box(extent, size)[1])
        shares = []
        for _ in range(500):
            start, sides = scaled_box(extent, size, rng, 0.5)
            assert all(a >= 0 and a + s <= n for a, s, n in zip(start, sides, extent))
            assert max(s / t for s, t in zip(sides, size)) < 1.1 * min(s / t for s, t in zip(sides, size))
            shares.append(math.prod(sides) / largest)
        assert 0.45 < min(shares) < 0.55 and 0.95 < max(shares) <= 1

    def test_no_crop_is_smaller_than_the_smallest(self):
        rng = np.random.default_rng(0)
        ratios = [(1.0, 1.0), (0.75, 4 / 3), (0.2, 0.5), (2.0, 3.0)]
        for turn in range(400):
            cfg = CropConfig(min_crop_scale=float(rng.uniform(0.05, 1)), ratio=ratios[turn % 4])
            extent, size = (tuple(map(int, rng.integers(1, 300, 2))) for _ in range(2))
            least = smallest_crop(cfg, extent, size)
            for _ in range(5):
                view = crop_view(cfg, extent, size, rng)
                start, stop = pixels(view, extent)
                assert all(b - a >= side for a, b, side in zip(start, stop, least)), (cfg, extent, size)

    def test_the_smallest_crop_by_hand(self):
        assert smallest_crop(CropConfig(min_crop_scale=0.25, ratio=(1.0, 1.0)), (400, 400), (8, 8)) == (
            200,
            200,
        )
        assert smallest_crop(CropConfig(min_crop_scale=1.0, ratio=(1.0, 1.0)), (400, 800), (8, 8)) == (
            400,
            400,
        )
        assert smallest_crop(CropConfig(min_crop_scale=0.25, ratio=(1.0, 4.0)), (400, 400), (8, 8)) == (
            100,
            200,
        )


class TestCuttingPlanes:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    @pytest.mark.parametrize("n, m", [(640, 224), (512, 224), (80, 30), (7, 20), (49, 3)])
    def test_nearest_is_exact_for_every_type(self, dtype, n, m):
        # (2 i + 1) n / 2 m is often a whole number, where Pillow's rounding errors choose either neighbour.
        planes = np.arange(n).astype(dtype)[None, None]
        places = [(2 * i + 1) * n // (2 * m) for i in range(m)]
        assert np.array_equal(cut_planes(planes, whole((1, m)), "nearest")[0, 0], planes[0, 0, places])

    def test_nearest_within_a_crop_and_between_pixels(self):
        planes = np.arange(100).reshape(1, 1, 100)
        view = view_of(((0, 20), (1, 60)), (1, 100), (1, 30))
        assert cut_planes(planes, view, "nearest")[0, 0].tolist() == [20 + 2 * i + 1 for i in range(30)]
        coarse = View(start=(0.0, 0.205), stop=(1.0, 0.805), size=(1, 6))
        assert cut_planes(planes, coarse, "nearest")[0, 0].tolist() == [25, 35, 45, 55, 65, 75]

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_pillows_own_nearest(self, dtype):
        planes = np.random.default_rng(0).integers(0, 250, (1, 50, 80)).astype(dtype)
        expected = Image.fromarray(planes[0]).resize((30, 21), Image.Resampling.NEAREST)
        assert np.array_equal(cut_planes(planes, whole((21, 30)), "pillow-nearest")[0], np.asarray(expected))

    def test_averaging_filters(self):
        planes = np.random.default_rng(0).integers(0, 60000, (1, 8, 12)).astype(np.uint16)
        means = planes.reshape(2, 4, 3, 4).mean((1, 3))
        assert np.allclose(cut_planes(planes, whole((2, 3)), "box")[0], means)


class TestReadingPictures:
    @pytest.mark.parametrize(
        "suffix, options", [("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("tiff", {})]
    )
    def test_lossless_rgb_files_keep_every_pixel(self, tmp_path, suffix, options):
        Image.fromarray(picture()).save(tmp_path / f"a.{suffix}", **options)
        assert np.array_equal(pixels_of(tmp_path / f"a.{suffix}"), picture())
        assert np.array_equal(pixels_of(str(tmp_path / f"a.{suffix}")), picture())

    def test_a_jpeg_is_what_pillow_decodes(self):
        path = next((ROOT / "data/photos/heldout").glob("*.jpg"))
        assert np.array_equal(pixels_of(path), np.asarray(Image.open(path)))

    def test_pictures_and_arrays_in_memory(self):
        a = picture()
        assert np.array_equal(pixels_of(a), a)
        assert np.array_equal(pixels_of(Image.fromarray(a)), a)
        assert np.array_equal(pixels_of(a[..., 0]), np.repeat(a[..., :1], 3, axis=2))
        assert np.array_equal(pixels_of(a[:, ::-1]), a[:, ::-1])

    def test_grey_is_repeated(self, tmp_path):
        grey = picture()[..., 0]
        Image.fromarray(grey).save(tmp_path / "a.png")
        assert np.array_equal(pixels_of(tmp_path / "a.png"), np.stack([grey] * 3, axis=-1))

    def test_one_bit_is_black_and_white(self, tmp_path):
        Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1").save(tmp_path / "a.png")
        assert pixels_of(tmp_path / "a.png")[..., 0].tolist() == [[0, 255], [255, 0]]

    @pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
    def test_transparency_shows_the_background(self, tmp_path, background):
        rgba = picture(channels=4)
        rgba[..., 3] = np.where(np.arange(7) % 2, 255, 0)
        Image.fromarray(rgba).save(tmp_path / "a.png")
        expected = np.where(rgba[..., 3:] == 255, rgba[..., :3], np.array(background, dtype=np.uint8))
        assert np.array_equal(pixels_of(tmp_path / "a.png", background=background), expected)
        assert np.array_equal(pixels_of(rgba, background=background), expected)

    def test_half_transparency_mixes(self):
        rgba = picture(20, 20, 4)
        alpha = rgba[..., 3:] / 255
        mixed = rgba[..., :3] * alpha + np.array([0, 100, 200]) * (1 - alpha)
        off = np.abs(pixels_of(rgba, background=(0, 100, 200)) - mixed)
        assert off.max() <= 1

    def test_grey_with_alpha(self, tmp_path):
        grey, alpha = np.full((2, 2), 40, np.uint8), np.array([[255, 0], [0, 255]], np.uint8)
        Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "a.png")
        assert pixels_of(tmp_path / "a.png")[..., 1].tolist() == [[40, 255], [255, 40]]

    def test_palette_with_and_without_transparency(self, tmp_path):
        image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8)).convert("P")
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        image.putdata([0, 1, 2, 1])
        image.save(tmp_path / "plain.png")
        image.save(tmp_path / "clear.png", transparency=1)
        image.save(tmp_path / "bytes.png", transparency=bytes([255, 0, 255]))
        red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
        assert pixels_of(tmp_path / "plain.png").tolist() == [[red, green], [blue, green]]
        assert pixels_of(tmp_path / "clear.png").tolist() == [[red, white], [blue, white]]
        assert pixels_of(tmp_path / "bytes.png").tolist() == [[red, white], [blue, white]]

    def test_a_transparent_colour_without_alpha_channel(self, tmp_path):
        a = np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8)
        Image.fromarray(a).save(tmp_path / "a.png", transparency=(9, 9, 9))
        assert pixels_of(tmp_path / "a.png").tolist() == [[[1, 2, 3], [255, 255, 255]]]

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    def test_sixteen_bit_grey_is_scaled_not_clipped(self, tmp_path, suffix):
        values = np.array([[0, 128, 129, 257], [300 * 100, 40000, 65406, 65535]], dtype=np.uint16)
        expected = np.round(values / 257).astype(np.uint8)
        assert expected.tolist() == [[0, 0, 1, 1], [117, 156, 254, 255]]
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        for source in (tmp_path / f"a.{suffix}", values):
            assert np.array_equal(pixels_of(source), np.stack([expected] * 3, axis=-1))

    def test_the_bundled_depth_maps_are_read(self):
        path = sorted((ROOT / "data/earth/train/depth").rglob("*.png"))[0]
        expected = np.round(np.asarray(Image.open(path)) / 257)
        assert np.array_equal(pixels_of(path)[..., 0], expected)

    def test_cmyk_follows_the_plain_formula(self, tmp_path):
        inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255], [90, 7, 200, 33]]])
        expected = np.round((255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255)
        Image.frombytes("CMYK", (5, 1), inks.astype(np.uint8).tobytes()).save(tmp_path / "a.tiff")
        assert np.abs(pixels_of(tmp_path / "a.tiff") - expected).max() <= 1
        assert np.array_equal(pixels_of(tmp_path / "a.tiff")[:, :4], expected[:, :4])

    def test_a_cmyk_jpeg_is_not_inverted(self, tmp_path):
        Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
        assert np.abs(pixels_of(tmp_path / "a.jpg").astype(int) - [0, 255, 255]).max() <= 3

    def test_exif_orientation_is_applied(self, tmp_path):
        a = picture(2, 3)
        upright = {
            1: a,
            2: a[:, ::-1],
            3: a[::-1, ::-1],
            4: a[::-1],
            5: a.transpose(1, 0, 2),
            6: np.rot90(a, -1),
            7: a[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(a, 1),
        }
        for orientation, expected in upright.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.fromarray(a).save(tmp_path / "a.png", exif=exif)
            assert np.array_equal(pixels_of(tmp_path / "a.png"), expected), orientation
            Image.fromarray(a).save(tmp_path / "a.webp", exif=exif, lossless=True)
            assert np.array_equal(pixels_of(tmp_path / "a.webp"), expected), orientation
        rgb = RGB(RGB.Config(), size=8)
        assert rgb.extent(rgb.read(tmp_path / "a.png")) == (3, 2)

    def test_of_several_frames_the_first(self, tmp_path):
        frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
        frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
        assert np.array_equal(pixels_of(tmp_path / "a.webp"), picture(seed=0))


class TestReadingLess:
    """In training, pictures are read at a whole fraction of their size if no crop needs more detail."""

    def rgb(self, **settings) -> RGB:
        return RGB(RGB.Config(min_crop_scale=1.0, ratio=(1.0, 1.0), hflip=0.0, **settings), size=16)

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    @pytest.mark.parametrize(("size", "factor"), [(16, 4), (33, 2), (40, 1), (5, 14)])
    def test_by_the_largest_factor_that_leaves_enough(self, tmp_path, suffix, size, factor):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(picture(74, 101)).save(path)
        found = self.rgb().read(path, at_least=(size, size))
        if factor == 1:
            assert np.array_equal(found, self.rgb().read(path))
            return
        assert isinstance(found, Reduced) and found.extent == (74, 101) == self.rgb().extent(found)
        height, width = found.levels.shape[:2]
        # JPEG decodes at 1/1, 1/2, 1/4 or 1/8; the remaining factor is a whole number.
        least = 2 ** int(math.log2(min(factor, 8))) if suffix == "jpg" else factor
        assert least <= found.factor <= factor
        assert (height, width) == (-(-74 // found.factor), -(-101 // found.factor))
        assert height >= size

    def test_means_of_blocks_where_the_file_is_exact(self):
        a = picture(64, 96)
        found = self.rgb().read(a, at_least=(16, 16))
        assert np.abs(found.levels - a.reshape(16, 4, 24, 4, 3).mean((1, 3))).max() <= 1

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
    def test_pictures_that_lie_stand_up(self, tmp_path, orientation, suffix):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{suffix}"
        smooth = Image.fromarray(picture(6, 4)).resize((96, 64), Image.Resampling.BICUBIC)
        smooth.save(path, exif=exif)
        full, found = self.rgb().read(path), self.rgb().read(path, at_least=(16, 16))
        assert found.extent == full.shape[:2] == ((64, 96) if orientation < 5 else (96, 64))
        reduced = np.asarray(Image.fromarray(full).reduce(4)).astype(float)
        assert np.abs(found.levels - reduced).mean() < 4

    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_nearly_square_pictures_that_lie_have_their_own_extent(self, tmp_path, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for width, height in ((97, 100), (100, 97), (480, 473)):
            Image.fromarray(picture(height, width)).save(tmp_path / "a.jpg", exif=exif)
            assert self.rgb().read(tmp_path / "a.jpg", at_least=(16, 16)).extent == (width, height)

    @pytest.mark.parametrize("side", [351, 479, 223, 97])
    @pytest.mark.parametrize("suffix", ["jpg", "png"])
    def test_nothing_moves_in_pictures_that_no_factor_divides(self, tmp_path, side, suffix):
        edges = (np.array([0.25, 0.5, 0.75, 0.9]) * side).round()
        row = np.where(np.searchsorted(edges, np.arange(side), side="right") % 2, 230, 20).astype(np.uint8)
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(np.stack([np.tile(row, (side, 1))] * 3, 2)).save(path, quality=95)
        rgb = RGB(RGB.Config(min_crop_scale=1.0, ratio=(1.0, 1.0), hflip=0.0), size=32)
        view = replace(rgb.view((side, side), (32, 32), np.random.default_rng(0)), flip=False)
        whole_, less = (
            rgb.tensor(raw, view)[0, 16] for raw in (rgb.read(path), rgb.read(path, at_least=(32, 32)))
        )
        # The sum of a step function is the place of the step, to a fraction of a pixel.
        for first, last in ((0, 12), (12, 20), (20, 26), (26, 32)):
            moved = (whole_[first:last] - less[first:last]).sum() / 1.65
            # A crop's edges lie at whole pixels of the reduced picture.
            assert abs(float(moved)) < 0.35, (first, float(moved))

    def test_a_picture_of_the_callers_stays_as_it_is(self, tmp_path):
        Image.fromarray(picture(200, 120)).save(tmp_path / "a.jpg")
        with Image.open(tmp_path / "a.jpg") as held:
            assert self.rgb().read(held, at_least=(16, 16)).extent == (200, 120)
            assert held.size == (120, 200)

    def test_a_crop_of_it_is_nearly_that_of_the_whole(self):
        rgb = RGB(RGB.Config(min_crop_scale=0.4), size=64)
        for path in sorted((ROOT / "data/photos/train").glob("*.jpg"))[:5]:
            whole_, less = rgb.read(path), rgb.read(path, at_least=(64, 64))
            assert isinstance(less, Reduced)
            for seed in range(4):
                view = rgb.view(rgb.extent(less), (64, 64), np.random.default_rng(seed))
                off = (rgb.tensor(whole_, view) - rgb.tensor(less, view)).square().mean()
                # dB: a shift of half a pixel of the reduced picture changes sharp edges.
                assert 10 * math.log10(4 / off) > 27

    def test_filters_that_torch_lacks_read_everything(self):
        rgb = self.rgb(resample="lanczos")
        assert np.array_equal(rgb.read(picture(90, 90), at_least=(16, 16)), picture(90, 90))

    def test_what_evaluation_makes_of_it_has_the_right_shape(self):
        rgb = self.rgb()
        less = rgb.read(picture(90, 70), at_least=(16, 16))
        assert rgb.tensor(less, rgb.view(rgb.extent(less), (16, 16), None)).shape == (3, 16, 16)

    def test_a_damaged_file_is_named(self, tmp_path):
        path = tmp_path / "cut.jpg"
        Image.fromarray(picture(90, 90)).save(path)
        path.write_bytes(path.read_bytes()[:900])
        with pytest.raises(DataError, match=r"cut\.jpg"):
            self.rgb().read(path, at_least=(16, 16))


class TestDamagedPictures:
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
    def test_a_truncated_file_is_named(self, tmp_path, suffix, share):
        buffer = io.BytesIO()
        Image.fromarray(picture(64, 64)).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
        with pytest.raises(DataError, match=rf"cut\.{suffix}: ."):
            pixels_of(path)

    def test_bytes_at_random_give_a_picture_or_a_data_error(self, tmp_path):
        rng, path, refused = np.random.default_rng(0), tmp_path / "a.png", 0
        for suffix in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM"):
            buffer = io.BytesIO()
            Image.fromarray(picture(12, 12)).save(buffer, suffix)
            for _ in range(60):
                damaged = bytearray(buffer.getvalue())
                for place in rng.integers(0, min(len(damaged), 300), 4):
                    damaged[place] = int(rng.integers(256))
                path.write_bytes(damaged)
                try:
                    assert pixels_of(path).shape[2] == 3
                except DataError as error:
                    refused += 1
                    assert "a.png: " in str(error)
        assert refused > 50

    @pytest.mark.parametrize(
        "content, says",
        [
            (b"", "no picture in JPEG"),
            (b"hello", "no picture in JPEG"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no picture"),
        ],
    )
    def test_what_is_no_picture(self, tmp_path, content, says):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.jpg: .*{says}"):
            pixels_of(tmp_path / "a.jpg")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(DataError, match=r"gone\.png: No such file"):
            pixels_of(tmp_path / "gone.png")

    def test_floats_and_long_integers_are_refused(self, tmp_path):
        Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "f.tiff")
        Image.fromarray(np.ones((2, 2), dtype=np.int32)).save(tmp_path / "i.tiff")
        with pytest.raises(DataError, match=r"f\.tiff: has floats \(mode F\)"):
            pixels_of(tmp_path / "f.tiff")
        with pytest.raises(DataError, match=r"i\.tiff: has 32-bit integers \(mode I\)"):
            pixels_of(tmp_path / "i.tiff")

    @pytest.mark.parametrize(
        "limit, size", [(20, 5), (20, 10)]
    )  # Pillow warns at the limit, raises at its double
    def test_decompression_bombs(self, tmp_path, monkeypatch, limit, size):
        Image.fromarray(picture(size, 5)).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=rf"a\.png: .*{size * 5} pixels.*limit of"):
            pixels_of(tmp_path / "a.png")

    @pytest.mark.parametrize(
        "a", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)]
    )
    def test_arrays_that_are_no_pictures(self, a):
        with pytest.raises(DataError, match=r"picture in memory: an array of shape \(\d, 4, \d\)"):
            pixels_of(a)


class TestPicturesAsTensors:
    def test_identity_is_exact(self):
        a = picture()
        rgb = RGB(RGB.Config(), size=(5, 7))
        expected = (a.transpose(2, 0, 1) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
        x = rgb.tensor(rgb.read(a), rgb.view((5, 7), (5, 7), None))
        assert x.dtype == torch.float32 and x.is_contiguous()
        assert np.array_equal(x.numpy(), expected)
        assert np.array_equal(rgb.tensor(rgb.read(a), whole((5, 7), flip=True)).numpy(), expected[..., ::-1])

    def test_a_crop_is_resized_as_if_there_were_nothing_around_it(self):
        # First cut, then resized: published encoders saw these pixels.
        a = picture(31, 41)
        rgb = RGB(RGB.Config(), size=16)
        alone = Image.fromarray(a[3:27, 9:33]).resize((16, 16), Image.Resampling.BICUBIC)
        x = rgb.tensor(rgb.read(a), view_of(((3, 9), (24, 24)), (31, 41), (16, 16)))
        assert np.array_equal(np.asarray(rgb.show(x)), np.asarray(alone))

    @pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
    def test_training_crops_are_pillows_but_for_rounding(self, resample):
        rgb = RGB(RGB.Config(resample=resample), size=(40, 56))
        raw = rgb.read(next((ROOT / "data/photos/train").glob("*.jpg")))
        for seed in range(8):
            view = replace(rgb.view(raw.shape[:2], (40, 56), np.random.default_rng(seed)), flip=False)
            trained, exact = (rgb.tensor(raw, replace(view, draw=draw)) for draw in (view.draw, 0))
            off = ((trained - exact) * 127.5).round().abs()
            assert off.max() <= 1 and off.mean() < 0.02
            assert trained.is_contiguous()

    def test_a_training_view_between_pixels_is_cut_by_pillow(self):
        rgb = RGB(RGB.Config(), size=8)
        view = View(start=(0.1, 0.1), stop=(0.9, 0.9), size=(8, 8))
        raw = rgb.read(picture(23, 31))
        assert torch.equal(rgb.tensor(raw, view), rgb.tensor(raw, replace(view, draw=1)))

    def test_the_deviation_of_imagenet(self):
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        a = picture()
        rgb = RGB(RGB.Config(mean=mean, std=std), size=(5, 7))
        x = rgb.tensor(rgb.read(a), whole((5, 7)))
        assert np.allclose(x, (a / 255 - mean).transpose(2, 0, 1) / np.array(std)[:, None, None], atol=1e-6)
        assert np.array_equal(np.asarray(rgb.show(x)), a)
        assert rgb.spec.range == pytest.approx((-0.485 / 0.229, (1 - 0.406) / 0.225))

    @pytest.mark.parametrize("resample", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
    def test_a_crop_of_the_wanted_size_is_exact(self, resample):
        a = picture(31, 41)
        rgb = RGB(RGB.Config(resample=resample), size=(9, 13))
        view = view_of(((17, 5), (9, 13)), (31, 41), (9, 13))
        x = rgb.tensor(rgb.read(a), view)
        assert np.array_equal(np.asarray(rgb.show(x)), a[17:26, 5:18])

    def test_box_filter_means_blocks(self):
        a = picture(8, 12)
        rgb = RGB(RGB.Config(resample="box"), size=(4, 4))
        means = a.reshape(4, 2, 4, 3, 3).mean((1, 3))
        shown = np.asarray(rgb.show(rgb.tensor(rgb.read(a), whole((4, 4)))))
        assert np.abs(shown - means).max() <= 1  # Pillow rounds once for each axis

    def test_a_view_drawn_at_one_resolution_fits_another(self):
        small = picture(6, 8)
        large = small.repeat(2, axis=0).repeat(2, axis=1)
        rgb = RGB(RGB.Config(resample="box"), size=(3, 4))
        view = view_of(((2, 4), (6, 8)), (12, 16), (3, 4))
        assert torch.equal(rgb.tensor(rgb.read(small), view), rgb.tensor(rgb.read(large), view))

    def test_show_undoes_tensor_for_every_level(self):
        a = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, axis=2)
        rgb = RGB(RGB.Config(), size=16)
        x = rgb.tensor(rgb.read(a), whole((16, 16)))
        assert float(x.min()) == -1 and float(x.max()) == 1
        assert np.array_equal(np.asarray(rgb.show(x)), a)
        assert np.array_equal(np.asarray(rgb.show(x[None])), a)
        assert np.asarray(rgb.show(x * 5)).min() == 0

    def test_flips_have_their_share(self):
        rng = np.random.default_rng(0)
        for share in (0.0, 0.3, 1.0):
            rgb = RGB(RGB.Config(hflip=share), size=8)
            flips = [rgb.view((20, 30), (8, 8), rng).flip for _ in range(1000)]
            assert abs(np.mean(flips) - share) < 0.05 and (share not in (0, 1) or np.mean(flips) == share)

    def test_non_square_targets(self):
        rgb = RGB(RGB.Config(), size=(4, 12))
        assert rgb.spec.size == (4, 12)
        view = rgb.view((100, 100), (4, 12), None)
        assert pixels(view, (100, 100)) == ((33, 0), (66, 100))
        assert rgb.tensor(rgb.read(picture(50, 40)), rgb.view((50, 40), (4, 12), None)).shape == (3, 4, 12)

    def test_laws(self):
        check_modality(RGB(RGB.Config(), size=(16, 24)), next((ROOT / "data/photos/train").glob("*.jpg")))

    def test_a_size_is_required(self):
        with pytest.raises(ValueError, match=r"data\.input_size"):
            RGB(RGB.Config(), size=None)
        with pytest.raises(ValueError, match="has 3 axes, but samples have 2"):
            RGB(RGB.Config(), size=(1, 2, 3))

    @pytest.mark.parametrize(
        "settings",
        [
            {"hflip": 1.5},
            {"min_crop_scale": 0.0},
            {"ratio": (2.0, 1.0)},
            {"background": (0, 0, 300)},
            {"std": (1.0, 0.0, 1.0)},
        ],
    )
    def test_settings_out_of_range(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            RGB.Config(**settings)


class TestArrays:
    def test_values_stay_as_they_are_without_a_range(self):
        a = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32) * 100
        modality = array(channels=3, size=(4, 5))
        assert (modality.spec.range, modality.spec.kind, modality.metrics) == (
            None,
            "continuous",
            ("mae", "channels"),
        )
        x = modality.tensor(modality.read(a), modality.view((4, 5), (4, 5), None))
        assert np.array_equal(x.numpy(), a)
        assert np.array_equal(
            modality.tensor(modality.read(a), whole((4, 5), flip=True)).numpy(), a[..., ::-1]
        )
        assert np.array_equal(modality.show(x), a) and np.array_equal(modality.show(x[None]), a)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, np.float16])
    def test_a_declared_range_becomes_minus_one_to_one(self, tmp_path, dtype):
        a = np.random.default_rng(0).integers(0, 100, (4, 5)).astype(dtype)
        a[0, 0], a[0, 1] = 0, 100
        np.save(tmp_path / "a.npy", a)
        modality = array(channels=1, size=(4, 5), range=(0.0, 100.0))
        assert (modality.spec.range, modality.metrics) == ((-1.0, 1.0), ("psnr", "mae", "channels"))
        x = modality.tensor(modality.read(tmp_path / "a.npy"), whole((4, 5)))
        assert np.array_equal(x.numpy(), (a.astype(np.float64)[None] / 50 - 1).astype(np.float32))
        assert (float(x.min()), float(x.max())) == (-1, 1)
        assert np.allclose(modality.show(x), a, atol=1e-4) and modality.show(x).shape == (4, 5)

    def test_what_is_shown_lies_in_the_declared_range(self):
        """A decoder may return values outside the range; `values` keeps them for metrics."""
        modality = array(channels=1, size=4, rank=1, range=(10.0, 20.0))
        x = torch.tensor([[-1.5, -1.0, 0.5, 3.0]])
        assert modality.show(x).tolist() == [10, 10, 17.5, 20]
        assert modality.values(x[None]).flatten().tolist() == [7.5, 10, 17.5, 30]
        free = array(channels=1, size=4, rank=1)
        assert free.show(x).tolist() == [-1.5, -1, 0.5, 3]

    def test_slightly_outside_is_clipped(self):
        modality = array(channels=1, size=3, rank=1, range=(0.0, 1.0))
        x = modality.tensor(modality.read(np.array([-0.005, 0.5, 1.005])), whole((3,)))
        assert x.tolist() == [[-1.0, 0.0, 1.0]]

    def test_channels_last(self):
        a = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
        modality = array(channels=3, size=(4, 5), channels_last=True)
        x = modality.tensor(modality.read(a), whole((4, 5)))
        assert np.array_equal(x.numpy(), a.transpose(2, 0, 1))
        assert np.array_equal(modality.show(x), a)

    def test_class_maps(self, tmp_path):
        a = np.random.default_rng(0).integers(0, 7, (4, 6)).astype(np.uint8)
        np.save(tmp_path / "a.npy", a)
        modality = array(kind="categorical", labels=7, size=(4, 6))
        spec = modality.spec
        assert (spec.labels, spec.range, spec.loss, spec.out_channels) == (7, None, "cross_entropy", 7)
        assert modality.metrics == ("accuracy", "iou")
        for source in (tmp_path / "a.npy", a[None], a):
            x = modality.tensor(modality.read(source), whole((4, 6)))
            assert x.dtype == torch.int64 and np.array_equal(x.numpy(), a)
        scores = torch.nn.functional.one_hot(x, 7).permute(2, 0, 1).float()
        for shown in (x, x[None], scores, scores[None]):
            assert np.array_equal(modality.show(shown), a)

    def test_angles(self):
        a = np.random.default_rng(0).uniform(-3.1, 3.1, (2, 4, 5))
        modality = array(kind="angle", channels=2, size=(4, 5))
        assert modality.spec.channels == 4
        x = modality.tensor(modality.read(a), whole((4, 5)))
        assert np.allclose(x, np.concatenate([np.sin(a), np.cos(a)]), atol=1e-6)
        assert np.allclose(modality.show(x * 3), a, atol=1e-6)  # the length does not matter
        smaller = modality.tensor(modality.read(a), whole((2, 2)))
        assert torch.allclose(smaller[:2] ** 2 + smaller[2:] ** 2, torch.ones(2, 2, 2), atol=1e-6)

    def test_angles_do_not_average_across_the_jump(self):
        a = np.array([np.pi - 0.1, -np.pi + 0.1])
        modality = array(kind="angle", channels=1, size=(1,), sizing="resize")
        middle = modality.show(modality.tensor(modality.read(a[None]), whole((1,))))
        assert np.allclose(np.abs(middle), np.pi, atol=1e-6)

    def test_unit_vectors_keep_their_length(self):
        a = np.random.default_rng(0).normal(size=(3, 6, 6)).astype(np.float32)
        a /= np.linalg.norm(a, axis=0)
        modality = array(kind="unit-vector", channels=3, size=(6, 6))
        assert np.allclose(modality.tensor(modality.read(a), whole((6, 6))), a, atol=1e-6)
        nearly = modality.tensor(modality.read(a * 0.995), whole((6, 6)))
        assert np.allclose(nearly, a, atol=1e-6)
        smaller = modality.tensor(modality.read(a), whole((4, 4)))
        assert torch.allclose(smaller.norm(dim=0), torch.ones(4, 4), atol=1e-6)
        assert np.allclose(np.linalg.norm(modality.show(smaller * 0.3), axis=0), 1, atol=1e-6)

    def test_values_are_those_of_the_files(self):
        rng = np.random.default_rng(0)
        a = rng.uniform(-3, 3, (2, 3, 4, 5)).astype(np.float32)
        for settings in ({"range": (-3.0, 3.0)}, {"kind": "angle"}, {}):
            modality = array(channels=3, size=(4, 5), **settings)
            batch = torch.stack([modality.tensor(modality.read(one), whole((4, 5))) for one in a])
            assert np.allclose(modality.values(batch), a, atol=1e-5)

    def test_binary(self):
        a = np.random.default_rng(0).integers(0, 2, (4, 5)).astype(bool)
        modality = array(kind="binary", channels=1, size=(4, 5))
        x = modality.tensor(modality.read(a), whole((4, 5)))
        assert np.array_equal(x.numpy(), np.where(a, 1, -1)[None])
        assert np.array_equal(modality.show(x * 0.2), a) and modality.show(x).dtype == np.uint8
        ends = array(kind="binary", channels=1, size=(4, 5), range=(0.0, 255.0))
        assert np.array_equal(ends.tensor(ends.read(a * np.uint8(255)), whole((4, 5))), x)
        assert np.array_equal(ends.show(x), a * 255.0)

    def test_vectors_and_numbers(self):
        a = np.arange(6, dtype=np.float32)
        modality = array(channels=6, size=1)
        for source in (a, a[:, None]):
            x = modality.tensor(modality.read(source), modality.view((1,), (1,), None))
            assert x.shape == (6, 1) and np.array_equal(modality.show(x), a)
        for wrong in (np.ones((6, 6)), np.ones((6, 3)), np.ones((3, 6))):
            with pytest.raises(DataError, match=r"has shape .*, but a sample is a vector of 6 numbers"):
                modality.read(wrong)
            with pytest.raises(DataError, match=r"data\.name=array"):
                modality.extent_of(wrong)
        assert array(channels=6, size=1, sizing="resize").read(np.ones((6, 3))).shape == (6, 3)
        label = array(kind="categorical", labels=10, size=1)
        assert label.tensor(label.read(np.uint8(3)), whole((1,))).tolist() == [3]

    def test_laws_for_every_kind_and_rank(self):
        rng = np.random.default_rng(0)
        for size, how in (((8,), "resize"), ((8,), "window"), ((8, 6), "crop"), ((4, 4, 6), "crop")):
            extent = tuple(n + 3 for n in size)
            crops = {"hflip": 0.5, "sizing": how, "size": size}
            crops |= {} if how == "window" else {"min_crop_scale": 0.5}
            check_modality(array(channels=2, range=(-9.0, 9.0), **crops), rng.normal(size=(2, *extent)))
            check_modality(array(channels=2, kind="angle", **crops), rng.normal(size=(2, *extent)))
            directions = rng.normal(size=(3, *extent))
            directions /= np.linalg.norm(directions, axis=0)
            check_modality(array(channels=3, kind="unit-vector", **crops), directions)
            check_modality(array(channels=1, kind="binary", **crops), rng.integers(0, 2, extent))
            check_modality(array(labels=5, kind="categorical", **crops), rng.integers(0, 5, extent))


def tents(n, m):
    """Weights `(m, n)` of linear interpolation; where it shrinks, a triangle as wide as two new pixels."""
    centres = (np.arange(m) + 0.5) * n / m
    weights = np.maximum(0, 1 - np.abs(np.arange(n) + 0.5 - centres[:, None]) / max(n / m, 1))
    return weights / weights.sum(1, keepdims=True)


class TestResizingArrays:
    @pytest.mark.parametrize("n, m", [(5, 9), (9, 5), (7, 7), (4, 2), (1, 3)])
    def test_nearest_takes_the_element_under_each_centre(self, n, m):
        a = np.arange(n * 3).reshape(n, 3)
        modality = array(kind="categorical", labels=30, size=(m, 3))
        places = [int((i + 0.5) * n / m) for i in range(m)]
        assert np.array_equal(modality.tensor(modality.read(a), whole((m, 3))).numpy(), a[places])

    @pytest.mark.parametrize("n, m", [(5, 9), (9, 5)])
    def test_one_axis(self, n, m):
        a = np.random.default_rng(0).normal(size=n)
        modality = array(channels=1, size=(m,))
        expected = tents(n, m) @ a
        assert np.allclose(modality.tensor(modality.read(a), whole((m,)))[0], expected, atol=1e-6)

    def test_two_axes(self):
        a = np.random.default_rng(0).normal(size=(2, 12, 9))
        modality = array(channels=2, size=(5, 14))
        expected = np.einsum("ih,chw,jw->cij", tents(12, 5), a, tents(9, 14))
        assert np.allclose(modality.tensor(modality.read(a), whole((5, 14))), expected, atol=1e-5)

    def test_three_axes(self):
        a = np.random.default_rng(0).normal(size=(2, 3, 7, 5))
        modality, size = array(channels=2, size=(6, 3, 8)), (6, 3, 8)
        expected = np.einsum("dz,hy,wx,czyx->cdhw", *map(tents, (3, 7, 5), size), a)
        assert np.allclose(modality.tensor(modality.read(a), whole(size)), expected, atol=1e-5)

    def test_a_crop_of_the_wanted_size_is_exact(self):
        a = np.random.default_rng(0).normal(size=(2, 10, 12)).astype(np.float32)
        modality = array(channels=2, size=(4, 5))
        x = modality.tensor(modality.read(a), view_of(((3, 7), (4, 5)), (10, 12), (4, 5)))
        assert np.array_equal(x.numpy(), a[:, 3:7, 7:12])

    def test_training_crops_only_when_asked(self):
        rng = np.random.default_rng(0)
        still, moving = array(channels=1, size=(8, 8)), array(channels=1, size=(8, 8), min_crop_scale=0.3)
        assert {still.view((16, 16), (8, 8), rng) for _ in range(20)} == {
            replace(whole((8, 8)), extent=(16, 16))
        }
        assert len({moving.view((16, 16), (8, 8), rng) for _ in range(20)}) > 10
        assert moving.view((16, 16), (8, 8), None) == replace(whole((8, 8)), extent=(16, 16))

    def test_a_view_of_another_rank_is_not_for_this_array(self):
        modality = Array(Array.Config(channels=6, size=1), size=(32, 32))
        assert modality.spec.size == (1,)
        view = View(start=(0.2, 0.2), stop=(0.5, 0.5), size=(32, 32), flip=True)
        own = modality.ride(view, DataSpec(channels=3, size=(32, 32)))
        assert modality.tensor(modality.read(np.arange(6.0)), own)[:, 0].tolist() == list(range(6))


class TestWrongArrays:
    @pytest.mark.parametrize(
        "settings, a, says",
        [
            (
                {"channels": 3},
                np.zeros((2, 8, 8)),
                r"has 2 channels \(shape \(2, 8, 8\), channels first\), but 3 are declared",
            ),
            ({"channels": 3, "channels_last": True}, np.zeros((3, 8, 8)), "has 8 channels .*channels last"),
            ({"channels": 3}, np.zeros((8, 8)), r"shape \(8, 8\), but 3 channels and 2 axes are declared"),
            ({"channels": 1}, np.zeros((2, 2, 8, 8)), r"shape \(2, 2, 8, 8\)"),
            ({"channels": 1}, np.zeros((0, 8)), r"shape \(0, 8\)"),
            ({"channels": 1}, np.where(np.eye(8), np.nan, 1), r"the value nan at \[0, 0, 0\] .* not finite"),
            ({"channels": 1}, np.full((8, 8), 1e300), r"the value 1e\+300 .* not finite in single"),
            ({"channels": 1, "range": (0.0, 1.0)}, np.full((8, 8), 7.5), "7.5 at .* declared range 0 to 1"),
            ({"channels": 1, "range": (0.0, 1.0)}, np.full((8, 8), np.inf), "the value inf .* not finite"),
            (
                {"kind": "categorical", "labels": 3},
                np.full((8, 8), 3),
                r"the value 3 .* no label; data\.modality\.labels=3 \(0 to 2\)",
            ),
            ({"kind": "categorical", "labels": 3}, np.full((8, 8), -1), "the value -1 .* no label"),
            ({"kind": "categorical", "labels": 3}, np.zeros((8, 8)), "type float64; class ids are integers"),
            (
                {"kind": "unit-vector", "channels": 2},
                np.full((2, 8, 8), 100),
                r"the value 100 .* length 141, not 1 \(data\.modality\.tolerance=0\.01\); .*range",
            ),
            (
                {"kind": "unit-vector", "channels": 2, "tolerance": 0.2},
                np.full((2, 8, 8), 0.5),
                r"the value 0\.5 .* length 0\.707, not 1 \(data\.modality\.tolerance=0\.2\)",
            ),
            ({"kind": "binary", "channels": 1}, np.full((8, 8), 2), "the value 2 .* neither 0 nor 1"),
            ({"channels": 1}, np.zeros((8, 8), dtype=complex), "type complex128; only real numbers"),
            ({"channels": 1}, np.array([["a"] * 8] * 8), "type <U1; only"),
        ],
    )
    def test_what_is_not_as_declared_is_named(self, tmp_path, settings, a, says):
        np.save(tmp_path / "bad.npy", a)
        modality = array(size=(8, 8), **settings)
        with pytest.raises(DataError, match=rf"bad\.npy: .*{says}"):
            modality.read(tmp_path / "bad.npy")
        with pytest.raises(DataError, match=rf"array in memory: .*{says}"):
            modality.read(a)

    def test_objects_are_never_unpickled(self, tmp_path):
        np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(DataError, match=r"a\.npy: holds values of type object"):
            array(channels=1, size=(8, 8)).read(tmp_path / "a.npy")

    def test_damaged_files(self, tmp_path):
        modality = array(channels=1, size=(8, 8))
        np.save(tmp_path / "whole.npy", np.zeros((8, 8)))
        content = (tmp_path / "whole.npy").read_bytes()
        for length in (0, 3, 20, len(content) - 9):
            (tmp_path / "cut.npy").write_bytes(content[:length])
            with pytest.raises(DataError, match=r"cut\.npy: ."):
                modality.read(tmp_path / "cut.npy")
        np.savez(tmp_path / "zip.npz", a=np.zeros(3))
        (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
        with pytest.raises(DataError, match=r"zip\.npy: this is an archive"):
            modality.read(tmp_path / "zip.npy")
        (tmp_path / "zip.npy").write_bytes((tmp_path / "zip.npy").read_bytes()[:90])
        with pytest.raises(DataError, match=r"zip\.npy: this is an archive"):
            modality.read(tmp_path / "zip.npy")
        with pytest.raises(DataError, match=r"gone\.npy: there is no such file"):
            modality.read(tmp_path / "gone.npy")

    @pytest.mark.parametrize(
        "settings, says",
        [
            ({}, "channels is required"),
            ({"channels": 0}, "channels=0 must be at least 1"),
            ({"channels": 1, "kind": "unit-vector"}, "channels=1 must be at least 2"),
            ({"kind": "categorical"}, "labels=None with kind 'categorical'"),
            ({"channels": 1, "labels": 3}, "labels=3 with kind 'continuous'"),
            ({"kind": "categorical", "labels": 3, "channels": 2}, "channels=2"),
            ({"kind": "categorical", "labels": 0}, "labels=0"),
            ({"channels": 1, "kind": "angle", "range": (0.0, 1.0)}, "no meaning for kind 'angle'"),
            ({"channels": 1, "range": (1.0, 1.0)}, "ascending order"),
            ({"channels": 1, "rank": 4}, "rank=4"),
            ({"channels": 2, "kind": "unit-vector", "tolerance": 0.0}, r"tolerance=0\.0"),
            ({"channels": 1, "hflip": -0.1}, "hflip=-0.1"),
            ({"channels": 1, "min_crop_scale": 1.1}, "min_crop_scale=1.1"),
        ],
    )
    def test_settings_that_contradict_each_other(self, settings, says):
        with pytest.raises(ValueError, match=says):
            Array.Config(**settings)

    def test_where_the_size_comes_from(self):
        assert array(channels=1, size=9).spec.size == (9, 9)
        assert array(channels=1, size=9, rank=3).spec.size == (9, 9, 9)
        cfg = Array.Config(channels=1, size=(9,))
        assert Array(cfg, size=None).spec.size == (9,)
        assert Array(cfg, size=5).spec.size == (5,)
        assert Array(Array.Config(channels=1), size=(3, 4, 5)).spec.size == (3, 4, 5)
        with pytest.raises(ValueError, match=r"data\.input_size or data\.modality\.size"):
            Array(Array.Config(channels=1), size=None)
        with pytest.raises(ValueError, match="has 2 axes, but samples have 3"):
            Array(Array.Config(channels=1, rank=3), size=(4, 4))


def test_settings_come_from_a_config_file():
    tree = {"name": "array", "channels": 1, "range": [0, 255], "size": [28, 28], "kind": "continuous"}
    cfg = from_tree(tree, schema=Array.Config)
    assert (cfg.range, cfg.size) == ((0.0, 255.0), (28, 28))
    cfg = from_tree({"name": "rgb", "resample": "lanczos", "background": [0, 0, 0]}, schema=RGB.Config)
    assert (cfg.resample, cfg.background) == ("lanczos", (0, 0, 0))


class TestColourJitter:
    def _tensor(self, draw, strength=0.3):
        rgb = RGB(RGB.Config(color_jitter=strength), size=16)
        picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        return rgb.tensor(picture, replace(rgb.view((16, 16), (16, 16), None), draw=draw))

    def test_evaluation_sees_the_colours_as_they_are(self):
        assert torch.equal(self._tensor(0), self._tensor(0, strength=0.0))

    def test_it_follows_from_the_view_alone_and_stays_in_range(self):
        plain, one, other = self._tensor(0), self._tensor(5), self._tensor(6)
        assert torch.equal(one, self._tensor(5))
        assert not torch.equal(one, other) and not torch.equal(one, plain)
        assert one.min() >= -1 and one.max() <= 1

    def test_each_channel_is_an_increasing_function_of_what_it_was(self):
        plain, one = self._tensor(0).flatten(1), self._tensor(7).flatten(1)
        for before, after in zip(plain, one):
            assert (after[before.argsort(stable=True)].diff() >= -1e-6).all()

    def test_training_views_differ_in_what_else_is_drawn(self):
        rgb = RGB(RGB.Config(), size=16)
        draws = {rgb.view((40, 40), (16, 16), np.random.default_rng(i)).draw for i in range(8)}
        assert len(draws) == 8 and 0 not in draws
