"""How samples of any extent get their size: the words for each axis, filtered resizing, what `vqcore check` says."""

import numpy as np
import pytest
import torch
from toys import run_config, toy  # noqa: F401

from vqcore.check.checks import everything
from vqcore.data.reader import Reader
from vqcore.errors import DataError, SettingError
from vqcore.modalities.array import Array


def array(size, **settings):
    return Array(Array.Config(**{"channels": 1, **settings}), size=size)


class Few(list):
    """Arrays in memory as a data source."""

    def key(self, index):
        return str(index)

    def get(self, index, label=""):
        return self[index]


def sample(modality, x, rng=None):
    return Reader(Few([x]), modality, {}).read(0, modality.spec.size, rng)


class TestWords:
    def test_one_axis_takes_windows_and_more_are_cropped(self):
        assert array((16,)).sizing == ("window",)
        assert array((16, 16)).sizing == ("crop", "crop")
        assert array((4, 4, 4)).sizing == ("crop",) * 3
        assert Array(Array.Config(channels=6, size=1), size=(32, 32)).sizing == ("crop",)

    def test_pad_takes_all_of_a_short_sample_and_refuses_a_long_one(self):
        x = np.arange(10.0)[None]
        found = sample(array((16,), sizing="pad"), x, np.random.default_rng(0))
        assert found.x[0].tolist() == [*range(10), *[9.0] * 6]
        assert found.mask.tolist() == [True] * 10 + [False] * 6
        with pytest.raises(
            DataError, match=r"10 positions are more than the 8 of data.input_size, and sizing=pad"
        ):
            sample(array((8,), sizing="pad"), x)

    def test_resize_takes_all_of_every_axis_and_crop_keeps_proportions(self):
        x = np.arange(64.0 * 16).reshape(1, 64, 16)
        assert abs(float(sample(array((8, 8), sizing="resize"), x).x.mean() - x.mean())) < 1
        cropped = sample(array((8, 8)), x).x
        middle = x[:, 24:40]
        assert float(cropped.min()) >= middle.min() and float(cropped.max()) <= middle.max()

    def test_every_axis_may_have_its_own(self):
        x = np.tile(np.arange(30.0), (64, 1))[None]
        found = sample(array((8, 40), sizing=("resize", "window")), x)
        assert found.x.shape == (1, 8, 40) and found.mask[:, :30].all() and not found.mask[:, 30:].any()
        assert np.allclose(found.x[0, :, :30], np.arange(30.0), atol=1e-5)

    @pytest.mark.parametrize(
        "size, sizing, says",
        [
            ((16,), ("window", "window"), "has 2 words, but samples have 1 axes"),
            ((16,), "crop", "crop keeps the proportions of two axes or more; for one axis take window"),
            ((16, 16), ("crop", "window"), "crop keeps the proportions"),
        ],
    )
    def test_words_that_mean_nothing_are_refused(self, size, sizing, says):
        with pytest.raises(SettingError, match=says):
            array(size, sizing=sizing)

    def test_windows_are_not_scaled(self):
        with pytest.raises(SettingError, match="min_crop_scale"):
            array((16,), min_crop_scale=0.5)

    def test_it_decides_tokens(self):
        assert "sizing" not in Array.Config.training_only


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_tone_that_the_new_length_cannot_hold_does_not_come_back_as_another(axes):
    """512 positions become 128, which hold tones of up to 64 periods; this one has 100. It keeps 1 % of its power."""
    tone = np.sin(2 * np.pi * 100 * np.arange(512) / 512)
    x = np.broadcast_to(tone.reshape(-1, *[1] * (axes - 1)), (512, *[4] * (axes - 1)))[None]
    small = sample(array((128, *[4] * (axes - 1)), sizing="resize"), x.astype(np.float32)).x
    assert float(small[..., 4:-4, *[slice(None)] * (axes - 1)].square().mean()) < 0.01 * 0.5


@pytest.mark.usefixtures("toy")
class TestCheck:
    def said(self, folder, modality, size, *arrays):
        (folder / "in").mkdir()
        for number, x in enumerate(arrays):
            np.save(folder / "in" / f"{number}.npy", x.astype(np.float32))
        data = {"name": "folder", "path": str(folder / "in"), "modality": {"name": "array", **modality}}
        data |= {"input_size": size, "batch_size": len(arrays), "workers": 0}
        return [finding.what for finding in everything(run_config(folder / "run", data=data), None)]

    def test_windows_and_what_is_filled_up(self, tmp_path):
        rng = np.random.default_rng(0)
        said = self.said(tmp_path, {"channels": 2}, [16], *(rng.random((2, n)) for n in (10, 40, 100)))
        assert any(
            "sizing window: samples of 10 to 100 become 16; training draws one window" in one for one in said
        )
        assert any("1 of 3 samples are shorter than 16: filled up at the end" in one for one in said)

    def test_what_a_crop_leaves_out(self, tmp_path):
        rng = np.random.default_rng(0)
        said = self.said(tmp_path, {"channels": 2}, [8, 8], *(rng.random((2, 8, 20)) for _ in range(2)))
        text = "sizing crop: samples of 8 x 20 become 8 x 8; 60% of the area is left out"
        assert any(text in one for one in said)


def test_no_value_is_made_up_at_the_borders():
    x = np.ones((1, 100), np.float32)
    for size in (37, 100, 250):
        assert torch.allclose(sample(array((size,), sizing="resize"), x).x, torch.ones(1, size), atol=1e-5)
