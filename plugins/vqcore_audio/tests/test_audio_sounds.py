"""Sounds: WAV of every width, windows, lengths from headers; mel bands and SI-SNR against NumPy; the manifest."""

import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scipy.io import wavfile
from vqcore_audio.metrics import SISNR
from vqcore_audio.sounds import LogMel, Wave, mel_filters

from vqcore.data.reader import Reader
from vqcore.errors import DataError
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.testing.checks import check_plugin
from vqcore.testing.conformance import MetricConformance, ModalityConformance

ROOT = Path(__file__).resolve().parents[3]
CROW = ROOT / "data/audio/train/misc_crow.wav"


def waves(size=1000, **settings):
    return Wave(Wave.Config(**settings), size=size)


def log_mel(size=(32, 16), **settings):
    return LogMel(LogMel.Config(**{"window": 512, "hop": 128, **settings}), size=size)


def tone(hertz=1000.0, seconds=0.25, rate=16000, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path, sound, width=2, rate=16000):
    """A WAV file of `(n,)` or `(n, channels)` integers."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 3:
            content = b"".join(int(v).to_bytes(3, "little", signed=True) for v in sound.reshape(-1))
        else:
            content = sound.astype({1: "u1", 2: "<i2", 4: "<i4"}[width]).tobytes()
        file.writeframes(content)
    return path


class FewSounds(list):
    """Sounds in memory as a data source."""

    def key(self, index):
        return str(index)

    def get(self, index, label=""):
        return self[index]


def write_shown(modality, shown, folder):
    modality.write(shown, folder / "a.wav")
    return folder / "a.wav"


def tensor(modality, source, rng=None):
    raw = modality.read(source)
    return modality.tensor(raw, modality.view(modality.extent(raw), modality.spec.size, rng))


class TestWave(ModalityConformance):
    component = "audio/wave"
    configs = ({}, {"channels": 2})
    size = (4096,)

    def source(self):
        return CROW


class TestLogMel(ModalityConformance):
    component = "audio/log-mel"
    configs = (
        {"window": 512, "hop": 128},
        {"window": 512, "hop": 64, "f_min": 100.0, "f_max": 7000.0},
    )
    size = (32, 32)

    def source(self):
        return CROW


class TestFiles:
    def test_sixteen_bits_against_scipy(self):
        rate, wanted = wavfile.read(CROW)
        assert rate == 16000
        assert np.array_equal(waves().read(CROW), wanted[None].astype(np.float32) / 32768)

    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    def test_every_width_is_the_same_sound(self, tmp_path, width):
        scale = 2 ** (8 * width - 1)
        levels = np.round(tone() * scale).clip(-scale, scale - 1) + (128 if width == 1 else 0)
        found = waves().read(write(tmp_path / "a.wav", levels, width))
        assert found.dtype == np.float32 and found.shape == (1, 4000)
        assert np.abs(found[0] - tone()).max() <= 0.51 / scale + 1e-6

    def test_channels(self, tmp_path):
        both = np.stack([tone(), tone(2000)], 1)
        path = write(tmp_path / "a.wav", np.round(both * 32767))
        left, right = waves(channels=2).read(path)
        assert np.abs(left - tone()).max() < 1e-4 and np.abs(right - tone(2000)).max() < 1e-4
        assert np.allclose(waves().read(path)[0], (left + right) / 2, atol=1e-7)
        assert np.array_equal(waves(channels=3).read(tone().astype(np.float32))[2], tone().astype(np.float32))
        with pytest.raises(DataError, match=r"has 2 channels, but data.modality.channels is 3"):
            waves(channels=3).read(path)

    def test_another_rate_is_converted(self, tmp_path):
        path = write(tmp_path / "a.wav", np.round(tone(rate=44100) * 32767), rate=44100)
        found = waves().read(path)[0]
        assert abs(len(found) - 4000) <= 1
        n = min(len(found), 4000)
        assert np.abs(found[200 : n - 200] - tone()[200 : n - 200]).max() < 0.01
        with pytest.raises(DataError, match=r"44100 samples per second, but data.modality.rate is 16000"):
            waves(resample=False).read(path)

    def test_arrays_and_back(self, tmp_path):
        sound = tone().astype(np.float32)
        np.save(tmp_path / "a.npy", sound)
        modality = waves(size=4000)
        found = tensor(modality, tmp_path / "a.npy")
        assert np.array_equal(found[0], sound) and np.array_equal(modality.show(found), sound)
        assert np.array_equal(modality.show(found * 4), np.clip(sound * 4, -1, 1))
        assert np.array_equal(
            waves().read((sound * 32767).astype(np.int16))[0], np.trunc(sound * 32767) / 32768
        )
        stereo = waves(size=4000, channels=2)
        assert stereo.show(tensor(stereo, np.stack([sound, -sound]))).shape == (2, 4000)

    @pytest.mark.parametrize(
        "array, says",
        [
            (np.zeros((0,)), "has no samples"),
            (np.where(np.arange(2000) == 7, np.nan, 0.0), "sample 7 of channel 0 is nan"),
            (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\)"),
            (np.zeros(2000, np.uint8), "type uint8"),
        ],
    )
    def test_what_is_wrong_is_said(self, array, says):
        with pytest.raises(DataError, match=says):
            tensor(waves(), array)

    @pytest.mark.parametrize(
        "content", [b"", b"RIFF", b"no sound at all, only a few words", b"RIFF\x24\0\0\0WAVEfmt "]
    )
    def test_damaged_files_are_named(self, tmp_path, content):
        (tmp_path / "a.wav").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.wav: .+"):
            waves().read(tmp_path / "a.wav")

    def test_a_cut_file_gives_what_is_there(self, tmp_path):
        path = write(tmp_path / "a.wav", np.round(tone() * 32767))
        path.write_bytes(path.read_bytes()[:-2001])
        assert np.abs(waves().read(path)[0] - tone()[:2999]).max() < 1e-4

    def test_flac_and_wav_of_floats(self, tmp_path):
        for name, kind in (("a.flac", "PCM_24"), ("b.wav", "FLOAT"), ("c.ogg", "VORBIS")):
            soundfile.write(tmp_path / name, tone(), 16000, subtype=kind)
            found = waves().read(tmp_path / name)[0]
            assert np.abs(found[:4000] - tone()).max() < (0.1 if kind == "VORBIS" else 1e-6)


class TestWriting:
    @pytest.mark.parametrize("channels", [1, 2])
    def test_sixteen_bits_come_back_to_the_bit(self, tmp_path, channels):
        modality = Wave(Wave.Config(rate=22050, channels=channels), size=500)
        levels = np.random.default_rng(0).integers(-(2**15), 2**15, (channels, 500))
        shown = modality.show(torch.from_numpy(levels / 2.0**15).float())
        path = write_shown(modality, shown, tmp_path)
        with wave.open(str(path)) as file:
            found = file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()
            content = np.frombuffer(file.readframes(500), "<i2").reshape(500, channels).T
        assert found == (channels, 2, 22050, 500) and np.array_equal(content, levels)
        assert np.array_equal(modality.read(path), (levels / 2.0**15).astype(np.float32))

    def test_what_is_too_loud_is_clipped_not_wrapped(self, tmp_path):
        modality = Wave(Wave.Config(), size=3)
        path = write_shown(modality, modality.show(torch.tensor([[1.0, 7.0, -7.0]])), tmp_path)
        assert modality.read(path)[0].tolist() == [1 - 2**-15, 1 - 2**-15, -1]


class TestWindows:
    def test_evaluation_takes_the_middle(self):
        sound = np.arange(3000) / 3000
        assert np.array_equal(tensor(waves(), sound)[0], sound[1000:2000].astype(np.float32))

    def test_training_takes_stretches_from_anywhere(self):
        sound = (np.arange(1003) / 2000).astype(np.float32)
        starts = {
            round(float(tensor(waves(), sound, np.random.default_rng(s))[0, 0]) * 2000) for s in range(100)
        }
        assert starts == {0, 1, 2, 3}

    @pytest.mark.parametrize("modality, size", [(waves, (1000,)), (log_mel, (32, 16))])
    def test_short_sounds_end_in_silence_that_is_masked(self, modality, size):
        data = FewSounds([tone(seconds=0.05)])
        sample = Reader(data, modality(), {}).read(0, size, np.random.default_rng(0))
        there = sample.extent[-1]
        assert sample.x.shape == (1, *size) and there == (800 if len(size) == 1 else 7)
        assert (sample.x[..., there:] == modality().fill).all() and sample.x[..., :there].std() > 0.01
        assert sample.mask[..., :there].all() and not sample.mask[..., there:].any()

    @pytest.mark.parametrize("kind", ["wav", "flac", "npy"])
    @pytest.mark.parametrize("modality", [waves, log_mel])
    def test_the_length_is_known_from_the_header(self, tmp_path, kind, modality):
        modality = modality(rate=16000)
        path = tmp_path / f"a.{kind}"
        if kind == "npy":
            np.save(path, tone())
        else:
            soundfile.write(path, tone(), 11025)
        assert modality.extent_of(path) == modality.extent(modality.read(path))

    def test_the_length_of_a_cut_file_is_what_is_there(self, tmp_path):
        path = write(tmp_path / "a.wav", np.round(tone() * 32767))
        path.write_bytes(path.read_bytes()[:-2001])
        assert waves().extent_of(path) == waves().extent(waves().read(path)) == (2999,)


class TestSpectrograms:
    def test_a_tone_has_its_level_in_its_band(self):
        """1 kHz at half of full scale is -6 dB in the band whose middle is nearest to 1 kHz on the mel scale."""
        found = log_mel().read(tone(seconds=0.5))[0, ::-1].copy()
        edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 34) / 2595) - 1)
        steady = found[:, 8:-8].mean(1)
        assert steady.argmax() == np.abs(edges[1:-1] - 1000).argmin()
        assert abs(steady.max() + 6) < 3 and steady[-8:].max() < -80

    def test_filters_against_a_loop(self):
        found = mel_filters(20, 256, 8000, 50.0, 3500.0).numpy()
        mel = np.linspace(2595 * np.log10(1 + 50 / 700), 2595 * np.log10(1 + 3500 / 700), 22)
        edges = 700 * (10 ** (mel / 2595) - 1)
        for band in range(20):
            low, mid, high = edges[band : band + 3]
            for k in range(129):
                f = k * 8000 / 256
                wanted = max(0.0, min((f - low) / (mid - low), (high - f) / (high - mid)))
                assert abs(found[band, k] - wanted) < 1e-5

    def test_levels_come_back(self, tmp_path):
        modality = log_mel(db=(-100.0, 20.0))
        x = tensor(modality, CROW)
        shown = modality.show(x)
        assert shown.shape == (32, 16) and shown.min() >= -100
        np.save(tmp_path / "a.npy", shown)
        assert torch.allclose(tensor(modality, tmp_path / "a.npy"), x, atol=1e-5)
        assert np.allclose(modality.values(x[None])[0, 0], shown)

    @pytest.mark.parametrize(
        "array, says",
        [
            (np.zeros(100), "100 samples, fewer than data.modality.window=512"),
            (np.zeros((31, 40)), "31 rows, but data.input_size has 32 mel bands"),
        ],
    )
    def test_what_is_wrong_is_said(self, array, says):
        with pytest.raises(DataError, match=says):
            tensor(log_mel(), array)

    @pytest.mark.parametrize(
        "settings, says",
        [
            ({"rate": 0}, "rate=0"),
            ({"hop": 0}, "hop=0"),
            ({"f_min": 9000.0}, "f_min=9000"),
            ({"f_max": 9000.0}, r"0\.\.8000 Hz"),
            ({"db": (0.0, -80.0)}, "db="),
            ({"size": (128, 16)}, "band 0 of mels=128 has no frequency of window=512"),
            ({"size": None}, r"\[mels, frames\]"),
        ],
    )
    def test_settings_out_of_range(self, settings, says):
        with pytest.raises(ValueError, match=says):
            log_mel(**settings)


class TestSISNRLaws(MetricConformance):
    component, spec = "audio/si-snr", DataSpec(channels=1, size=(64,))


class TestSISNR:
    def measure(self, x_hat, x, mask=None):
        metric = SISNR(SISNR.Config(), spec=waves().spec)
        return metric.summary(metric.measure(torch.tensor(x_hat), torch.tensor(x), mask))[""]

    def test_against_numpy(self):
        rng = np.random.default_rng(0)
        x, noise = rng.normal(size=(3, 2, 500)), rng.normal(size=(3, 2, 500))
        x_hat = 0.3 * x + 0.1 * noise + 5
        wanted = []
        for s, e in zip(x.reshape(6, 500), x_hat.reshape(6, 500)):
            s, e = s - s.mean(), e - e.mean()
            target = e @ s / (s @ s) * s
            wanted.append(10 * np.log10((target @ target) / ((e - target) @ (e - target))))
        assert abs(self.measure(x_hat, x) - np.mean(wanted)) < 1e-9

    def test_scale_and_offset_do_not_matter_a_constant_has_the_floor(self):
        x = np.random.default_rng(1).normal(size=(1, 1, 400))
        assert self.measure(-3 * x + 1, x) == pytest.approx(100)
        assert self.measure(np.full_like(x, 0.7), x) == pytest.approx(-100)

    def test_silence_is_left_out_and_masked_samples_do_not_count(self):
        x = np.random.default_rng(2).normal(size=(2, 1, 400))
        x_hat = x + 0.5 * np.random.default_rng(3).normal(size=x.shape)
        alone = self.measure(x_hat[:1], x[:1])
        x[1] = 0
        assert self.measure(x_hat, x) == pytest.approx(alone)
        long = np.concatenate([x[:1], 9 * np.ones((1, 1, 100))], -1)
        longer = np.concatenate([x_hat[:1], np.zeros((1, 1, 100))], -1)
        assert self.measure(longer, long, torch.arange(500)[None] < 400) == pytest.approx(alone)
        assert np.isnan(self.measure(x_hat[1:], x[1:]))


def test_pictures_show_level_and_pitch():
    modality = waves(size=4000)
    loud, soft = (
        np.asarray(modality.picture(tensor(modality, tone(amplitude=a))))[:64].astype(int) for a in (0.9, 0.1)
    )
    ink = [(one.sum(-1) < 700).sum() for one in (loud, soft)]
    assert loud.shape == (64, 128, 3) and ink[0] > 3 * ink[1] > 0
    low, high = (
        np.asarray(modality.picture(tensor(modality, tone(f))))[64:].sum((1, 2)).argmax()
        for f in (1000, 6000)
    )
    assert high < 32 < low  # higher is further up
    mel = log_mel()
    assert mel.picture(tensor(mel, CROW)).size == (16, 32)


def test_the_manifest_lists_every_component():
    names = [each.name for kind in ("modality", "metric") for each in registry().components(kind)]
    assert [name for name in names if name.startswith("audio/")] == [
        "audio/wave",
        "audio/log-mel",
        "audio/si-snr",
    ]
    assert check_plugin(registry(), "audio") == []


def test_the_python_of_the_readme_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "plugins/vqcore_audio/README.md").read_text().split("```python\n")[1].partition("```")[0]
    names = {}
    exec(text, names)
    assert names["x"].shape == (1, 4096)
