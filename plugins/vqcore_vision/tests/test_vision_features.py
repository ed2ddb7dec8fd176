"""Feature maps: from file to tensor and back, windows, scaling, and errors for bad files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vqcore_vision.features import Features, components

from vqcore.errors import DataError
from vqcore.protocols import DataSpec, View
from vqcore.testing.conformance import ModalityConformance


def maps(channels=6, height=5, width=7, seed=0):
    return np.random.default_rng(seed).normal(2.0, 3.0, (channels, height, width)).astype(np.float32)


def features(size=4, **settings):
    return Features(Features.Config(**{"channels": 6, **settings}), size=size)


def tensor(modality, source, size=None, rng=None):
    raw = modality.read(source)
    return modality.tensor(raw, modality.view(modality.extent(raw), size or modality.spec.size, rng))


class TestFeatures(ModalityConformance):
    component = "vision/features"
    configs = (
        {"channels": 6},
        {"channels": 6, "hflip": 0.5, "norm": 1.0, "mean": 0.5},
        {"channels": 6, "crop": "resize", "min_crop_scale": 0.3, "hflip": 1.0},
        {"channels": 6, "stride": 2},
    )
    size = (4, 4)

    def source(self):
        return maps()


class TestFiles:
    @pytest.mark.parametrize("layout", ["chw", "hwc", "tokens"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
    def test_every_layout_and_type_gives_the_same_tensor_and_comes_back(self, tmp_path, layout, dtype):
        x = maps(height=5, width=5).astype(np.float16).astype(dtype)
        stored = {"chw": x, "hwc": x.transpose(1, 2, 0), "tokens": x.reshape(6, 25).T}[layout]
        np.save(tmp_path / "a.npy", stored)
        modality = features(5, layout=layout)
        found = tensor(modality, tmp_path / "a.npy")
        assert found.dtype == torch.float32 and np.array_equal(found.numpy(), x)
        shown = modality.show(found)
        assert np.array_equal(shown, x.transpose(1, 2, 0) if layout == "tokens" else stored)
        assert np.array_equal(tensor(modality, shown), found)

    def test_tokens_come_back_as_a_map_whatever_its_sides_and_their_prefix(self):
        modality = features((3, 5), layout="tokens", prefix_tokens=1)
        x = torch.from_numpy(maps(height=3, width=5))
        assert modality.show(x).shape == (3, 5, 6) and torch.equal(tensor(modality, modality.show(x)), x)
        with pytest.raises(DataError, match=r"shape \(15, 6\)|are not a square map"):
            modality.read(maps(height=3, width=5).reshape(6, 15).T)

    @pytest.mark.parametrize("prefix", [0, 5])
    def test_a_batch_of_tokens_is_refused(self, tmp_path, prefix):
        modality = features(layout="tokens", prefix_tokens=prefix)
        tokens = np.ones((prefix + 16, 6), np.float32)
        np.save(tmp_path / "a.npy", tokens[None])
        with pytest.raises(
            DataError, match=r"a\.npy: has shape \(1, .* a batch axis; save one map in each file"
        ):
            modality.read(tmp_path / "a.npy")
        assert modality.read(tokens).shape == (6, 4, 4)
        flat = features((1, prefix + 16), layout="tokens", prefix_tokens=prefix)
        assert flat.read(tokens[None]).shape == (
            6,
            1,
            prefix + 16,
        )  # a map of one row, as the nominal size says

    def test_beside_a_picture_a_map_has_the_stride_of_its_network(self):
        """A picture of 48 x 64 and its map with a stride of 16 pixels: every value of the map is its own position."""
        raw = np.stack(np.meshgrid(np.arange(3.0), np.arange(4.0), indexing="ij")).astype(np.float32)
        beside, main = features(48, channels=2, stride=16), DataSpec(channels=3, size=(48, 64))

        def ridden(view: View):
            return beside.tensor(raw, beside.ride(view, main))

        whole = View(start=(0.0, 0.0), stop=(1.0, 1.0), size=(48, 64), extent=(48, 64))
        assert np.array_equal(ridden(whole), raw)
        part = View(start=(0.0, 0.5), stop=(2 / 3, 1.0), size=(32, 32), extent=(48, 64), flip=True)
        assert np.array_equal(ridden(part), raw[:, :2, :1:-1])
        enlarged = View(start=(0.0, 0.0), stop=(1.0, 1.0), size=(96, 128), extent=(48, 64))
        assert ridden(enlarged).shape == (2, 6, 8)
        alone = beside.view((3, 4), (3, 4), None)
        assert np.array_equal(beside.tensor(raw, alone), raw)
        with pytest.raises(ValueError, match="stride=0"):
            features(stride=0)
        with pytest.raises(ValueError, match="needs its stride beside other data: set stride"):
            features(48, channels=2).ride(whole, main)
        with pytest.raises(ValueError, match="the size 48 x 60 is no multiple of stride=16"):
            beside.ride(replace(whole, size=(48, 60)), main)
        with pytest.raises(ValueError, match="samples with 2 axes, but these have 1"):
            beside.ride(whole, DataSpec(channels=1, size=(64,)))

    def test_npz_and_safetensors_by_key(self, tmp_path):
        x = maps(height=4, width=4)
        np.savez(tmp_path / "one.npz", only=x)
        np.savez(tmp_path / "two.npz", other=x + 1, grid=x)
        save_file({"grid": torch.from_numpy(x).bfloat16()}, tmp_path / "b.safetensors")
        assert np.array_equal(features().read(tmp_path / "one.npz"), x)
        assert np.array_equal(features(key="grid").read(tmp_path / "two.npz"), x)
        assert np.array_equal(
            features().read(tmp_path / "b.safetensors"), torch.from_numpy(x).bfloat16().float()
        )

    def test_prefix_tokens_are_left_out(self):
        x = maps(height=4, width=4)
        tokens = np.concatenate([np.full((5, 6), 9.0), x.reshape(6, 16).T])
        assert np.array_equal(features(layout="tokens", prefix_tokens=5).read(tokens), x)

    @pytest.mark.parametrize(
        "array, settings, says",
        [
            (maps(channels=5), {}, "has 5 channels.*data.modality.channels is 6"),
            (maps().transpose(1, 2, 0), {}, "has 5 channels.*layout"),
            (maps()[0], {}, r"shape \(5, 7\), but data.modality.layout=chw means \(channels, h, w\)"),
            (maps(height=5, width=7).reshape(6, 35).T, {"layout": "tokens"}, "35 tokens .* not a square map"),
            (np.where(maps() > 7, np.nan, maps()), {}, "is nan; features are finite"),
            (maps().astype(np.float64) * 1e39, {}, "is -?inf"),
            (maps().astype(np.complex64), {}, "type complex64"),
            (maps()[:, :, :3], {}, "5 x 3 positions has no window of 4 x 4; .*crop=resize"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, array, settings, says):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(DataError, match=says):
            tensor(features(**settings), tmp_path / "a.npy")

    @pytest.mark.parametrize(
        "key, says", [(None, r"a, b[.;] [Cc]hoose one.*data.modality.key"), ("aa", "Did you mean 'a'")]
    )
    def test_the_array_in_a_file_is_named(self, tmp_path, key, says):
        x = maps()
        np.savez(tmp_path / "c.npz", a=x, b=x)
        save_file({"a": torch.from_numpy(x), "b": torch.from_numpy(x + 1)}, tmp_path / "c.safetensors")
        for suffix in (".npz", ".safetensors"):
            with pytest.raises(DataError, match=says):
                features(key=key).read(tmp_path / f"c{suffix}")

    def test_a_damaged_file_is_named(self, tmp_path):
        (tmp_path / "d.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
        with pytest.raises(DataError, match=r"d\.safetensors: "):
            features().read(tmp_path / "d.safetensors")


class TestWindows:
    def test_evaluation_takes_the_middle_untouched(self):
        x = maps(height=8, width=9)
        assert np.array_equal(tensor(features(), x), x[:, 2:6, 2:6])

    def test_training_takes_every_window_and_no_other(self):
        x = maps(height=6, width=7)
        modality = features()
        seen = set()
        for seed in range(200):
            found = tensor(modality, x, rng=np.random.default_rng(seed)).numpy()
            places = [
                (top, left) for top in range(3) for left in range(4)
                if np.array_equal(found, x[:, top : top + 4, left : left + 4])
            ]  # fmt: skip
            assert len(places) == 1
            seen.add(places[0])
        assert len(seen) == 12

    def test_a_mirror_turns_columns_around(self):
        x = maps(height=4, width=4)
        assert np.array_equal(tensor(features(hflip=1.0), x, rng=np.random.default_rng(0)), x[:, :, ::-1])

    def test_resizing_keeps_a_linear_map(self):
        """Bilinear interpolation of a ramp is the ramp, away from the borders; scipy agrees."""
        from scipy.ndimage import zoom

        ramp = np.broadcast_to(np.arange(8.0)[None, :, None] + np.arange(8.0) / 10, (6, 8, 8)).astype(
            np.float32
        )
        found = tensor(features(16, crop="resize"), ramp).numpy()
        wanted = zoom(ramp[0].astype(np.float64), 2, order=1, grid_mode=True, mode="nearest")
        assert np.abs(found - wanted)[:, 1:-1, 1:-1].max() < 1e-5

    def test_a_view_of_a_picture_finds_the_same_part(self):
        x = maps(height=8, width=8)
        view = View(start=(0.25, 0.5), stop=(0.75, 1.0), size=(4, 4))
        assert np.array_equal(features().tensor(features().read(x), view), x[:, 2:6, 4:8])


class TestScaling:
    def test_mean_and_deviation_by_channel_and_back(self):
        x = maps(height=4, width=4)
        mean, std = x.mean((1, 2)), x.std((1, 2))
        modality = features(mean=tuple(map(float, mean)), std=tuple(map(float, std)))
        found = tensor(modality, x)
        assert torch.allclose(found.mean((1, 2)), torch.zeros(6), atol=1e-5)
        assert torch.allclose(found.std((1, 2), correction=0), torch.ones(6), atol=1e-5)
        assert np.allclose(modality.show(found), x, atol=1e-4)
        assert np.allclose(modality.values(found[None])[0], x, atol=1e-4)

    def test_norm_keeps_directions(self):
        x = maps(height=4, width=4)
        found = tensor(features(norm=2.5), x).numpy()
        assert np.allclose(np.linalg.norm(found, axis=0), 2.5, atol=1e-5)
        assert np.allclose(found / 2.5, x / np.linalg.norm(x, axis=0), atol=1e-5)

    @pytest.mark.parametrize(
        "settings, says",
        [
            ({"channels": 0}, "channels=0"),
            ({"mean": (1.0, 2.0)}, "2 numbers for channels=6"),
            ({"std": 0.0}, "std=0.0"),
            ({"std": (1.0,) * 5 + (-1.0,)}, r"std=.*-1.0\] must be above 0"),
            ({"norm": -1.0}, "norm=-1.0"),
            ({"prefix_tokens": 1}, "prefix_tokens=1 with layout=chw"),
            ({"min_crop_scale": 0.0}, "min_crop_scale"),
            ({"hflip": 1.5}, "hflip=1.5"),
            ({"size": None}, "data.input_size"),
        ],
    )
    def test_settings_out_of_range(self, settings, says):
        with pytest.raises(ValueError, match=says):
            features(**settings)


class TestPicture:
    def test_colours_are_the_principal_components(self):
        """Against scikit-learn's PCA. The sign makes the largest loading positive."""
        from sklearn.decomposition import PCA

        x = maps(channels=12, height=6, width=9)
        flat = x.reshape(12, 54).T
        pca = PCA(3).fit(flat)
        signs = np.sign(pca.components_[np.arange(3), np.abs(pca.components_).argmax(1)])
        parts = pca.transform(flat) * signs
        wanted = np.clip(parts / np.sqrt((parts**2).mean(0)) / 4 + 0.5, 0, 1) * 255
        found = np.asarray(components(torch.from_numpy(x)))
        assert found.shape == (6, 9, 3)
        assert np.abs(found.reshape(54, 3) - wanted).max() <= 0.51

    def test_one_or_two_channels_do_too(self):
        assert components(torch.randn(1, 4, 4)).size == (4, 4)
        assert components(torch.zeros(2, 3, 4)).size == (4, 3)
