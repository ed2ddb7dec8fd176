"""Sounds: `audio/wave`, a waveform `(channels, n)` in -1..1, and `audio/log-mel`, a spectrogram `(1, mels, frames)`.

The standard library reads WAV files of 8 to 32 bits; soundfile reads WAV of floats, FLAC, OGG and AIFF. Scipy converts
other sampling rates (polyphase filter).
"""

import itertools
import math
import wave
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from vqcore import config
from vqcore.config import at_least
from vqcore.data.npy import map_array, read_array
from vqcore.errors import DataError, SettingError, cause
from vqcore.modalities.views import sized_box, view_of
from vqcore.protocols import DataSpec, Sizing, View

SUFFIXES = (".wav", ".flac", ".ogg", ".aif", ".aiff", ".npy")
_INFERNO = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Colours of a spectrogram from the lowest to the highest level: evenly spaced colours of matplotlib's inferno."""


@dataclass(frozen=True, kw_only=True)
class SoundConfig(config.Config):
    """Settings that waveforms and spectrograms have in common."""

    rate: int = 16000
    """Samples per second."""
    resample: bool = True
    """Convert files of another rate. False: such files are refused. Arrays always have the declared rate."""

    def __post_init__(self) -> None:
        at_least(self, rate=1)


class Wave:
    """Waveforms. Training takes windows from anywhere; evaluation and `vqcore tokenize` go over all of a sound."""

    suffixes = SUFFIXES
    sizing: tuple[Sizing, ...] = ("window",)
    fill = 0.0
    metrics = ("audio/si-snr", "mae")
    written = ".wav"

    @dataclass(frozen=True, kw_only=True)
    class Config(SoundConfig):
        """Settings of waveforms."""

        channels: int = 1
        """Number of channels. 1: the channels of a file are averaged. A file of one channel is repeated for more."""

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least(self, channels=1)

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError(
                f"waveforms need a size: set data.input_size in samples, e.g. {cfg.rate} for one second"
            )
        self.cfg = cfg
        nominal = (size,) if isinstance(size, int) else tuple(size[:1])
        self.spec = DataSpec(channels=cfg.channels, size=nominal, loss="l1")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> Float[np.ndarray, "c n"]:
        """A sound as `(channels, n)` float32: a file, or an array `(n,)` or `(channels, n)` of the declared rate.

        Integers are scaled to -1..1. Raises `DataError` for another rate with `resample: false`, for a number of
        channels that cannot be converted, and for values that are not finite.
        """
        sound, name = read_sound(source, self.cfg)
        if len(sound) == self.cfg.channels:
            return sound
        if self.cfg.channels == 1:
            return sound.mean(0, keepdims=True)
        if len(sound) == 1:
            return np.repeat(sound, self.cfg.channels, axis=0)
        raise DataError(
            f"{name}: has {len(sound)} channels, but data.modality.channels is {self.cfg.channels}"
        )

    def extent(self, raw: Float[np.ndarray, "c n"]) -> tuple[int, ...]:
        """Length in samples."""
        return raw.shape[1:]

    def extent_of(self, source: Any) -> tuple[int, ...]:
        """Length in samples, from the header of a file."""
        return (length_of(source, self.cfg),)

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A window: the middle, or in training from anywhere."""
        return view_of(sized_box(extent, size, self.sizing, rng), extent, size)

    def tensor(self, raw: Float[np.ndarray, "c n"], view: View) -> Float[Tensor, "c length"]:
        """The window; beside a sound of another rate it ends in silence, or early."""
        return _part(raw, view, self.fill)

    def show(self, x: Float[Tensor, "*b c n"]) -> np.ndarray:
        """One sound in -1..1: `(n,)` for one channel, else `(channels, n)`."""
        sound = self._single(x).clamp(-1, 1).numpy()
        return sound[0] if len(sound) == 1 else sound

    def write(self, shown: Float[np.ndarray, "n"] | Float[np.ndarray, "c n"], path: Path) -> None:
        """Write a sound from `show` as a WAV file of 16 bits at the declared rate."""
        levels = np.clip(np.round(np.atleast_2d(shown) * 2.0**15), -(2**15), 2**15 - 1)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(len(levels))
            file.setsampwidth(2)
            file.setframerate(self.cfg.rate)
            file.writeframes(rearrange(levels, "c n -> (n c)").astype("<i2").tobytes())

    def picture(self, x: Float[Tensor, "*b c n"]) -> Image.Image:
        """The waveform (-1 to 1) above its spectrogram (up to half the rate, -90 to 0 dB), mean over channels."""
        sound = self._single(x).mean(0)
        window = min(512, max(1, len(sound) // 8))
        levels = decibels(_spectrum(sound, window, max(1, window // 4)))
        shades = shaded(levels.flip(0), (-90.0, 0.0)).resize((128, 64), Image.Resampling.BILINEAR)
        canvas = Image.new("RGB", (128, 128), (255, 255, 255))
        canvas.paste(_wave(sound.numpy()), (0, 0))
        canvas.paste(shades, (0, 64))
        return canvas

    def _single(self, x: Tensor) -> Float[Tensor, "c n"]:
        x = x.detach().cpu().float()
        return rearrange(x, "1 c n -> c n") if x.ndim == 3 else x


class LogMel:
    """Spectrograms in decibels over mel bands; the lowest band is the last row. A tone of full scale has about 0 dB."""

    suffixes = SUFFIXES
    sizing: tuple[Sizing, ...] = ("resize", "window")
    fill = -1.0
    metrics = ("mae", "psnr")

    @dataclass(frozen=True, kw_only=True)
    class Config(SoundConfig):
        """Settings of spectrograms. data.input_size is [mels, frames]."""

        window: int = 1024
        """Length of the Hann window, in samples."""
        hop: int = 256
        """Distance from one frame to the next, in samples."""
        f_min: float = 0.0
        """Lower edge of the lowest band, in Hz."""
        f_max: float | None = None
        """Upper edge of the highest band, in Hz. Null: half of the rate."""
        db: tuple[float, float] = (-80.0, 0.0)
        """Levels that become -1 and 1; levels outside are clipped."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if min(self.window, self.hop) < 1:
                raise SettingError(
                    ("window", "hop"), f"window={self.window} and hop={self.hop} must be at least 1"
                )
            top = self.rate / 2 if self.f_max is None else self.f_max
            if not 0 <= self.f_min < top <= self.rate / 2:
                raise SettingError(
                    ("f_min", "f_max"),
                    f"f_min={self.f_min:g}, f_max={top:g} must be in ascending order within 0..{self.rate / 2:g} Hz",
                )
            if not self.db[0] < self.db[1]:
                raise SettingError("db", f"{list(self.db)} must be two numbers in ascending order")

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None or (isinstance(size, tuple) and len(size) != 2):
            raise ValueError(
                "spectrograms need a size: set data.input_size to [mels, frames], e.g. [64, 128]"
            )
        self.cfg = cfg
        mels, frames = (size, size) if isinstance(size, int) else size
        top = cfg.rate / 2 if cfg.f_max is None else cfg.f_max
        self.filters = mel_filters(mels, cfg.window, cfg.rate, cfg.f_min, top)
        self.spec = DataSpec(channels=1, size=(mels, frames), loss="l1")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> Float[np.ndarray, "1 m t"]:
        """The spectrogram of a whole sound in dB, mean over channels. Arrays of several rows are spectrograms already.

        Raises `DataError` as `audio/wave` does, for a sound shorter than a window, and for a spectrogram with another
        number of bands.
        """
        sound, name = read_sound(source, self.cfg)
        mels = self.spec.size[0]
        if len(sound) > 1 and _is_array(source):
            if len(sound) != mels:
                raise DataError(f"{name}: has {len(sound)} rows, but data.input_size has {mels} mel bands")
            return rearrange(sound, "m t -> 1 m t")
        if sound.shape[1] < self.cfg.window:
            raise DataError(
                f"{name}: has {sound.shape[1]} samples, fewer than data.modality.window={self.cfg.window}"
            )
        power = self.filters @ _spectrum(torch.from_numpy(sound.mean(0)), self.cfg.window, self.cfg.hop)
        return rearrange(decibels(power).flip(0), "m t -> 1 m t").numpy()

    def extent(self, raw: Float[np.ndarray, "1 m t"]) -> tuple[int, ...]:
        """Bands and frames."""
        return raw.shape[1:]

    def extent_of(self, source: Any) -> tuple[int, ...]:
        """Bands and frames, from the header of a file."""
        if _is_array(source):
            return self.extent(self.read(source))
        return (self.spec.size[0], length_of(source, self.cfg) // self.cfg.hop + 1)

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """All bands of a window."""
        if size[0] != extent[0]:
            raise DataError(
                f"data.input_size {list(size)} has {size[0]} mel bands, but the spectrogram has {extent[0]}"
            )
        return view_of(sized_box(extent, size, self.sizing, rng), extent, size)

    def tensor(self, raw: Float[np.ndarray, "1 m t"], view: View) -> Float[Tensor, "1 m frames"]:
        """The window in -1..1."""
        low, high = self.cfg.db
        unit = (raw.astype(np.float32) - np.float32(low)) * np.float32(2 / (high - low)) - 1
        return _part(unit.clip(-1, 1), view, self.fill)

    def values(self, x: Float[Tensor, "b 1 m t"]) -> Float[Tensor, "b 1 m t"]:
        """A batch in dB."""
        low, high = self.cfg.db
        return (x + 1) * ((high - low) / 2) + low

    def show(self, x: Float[Tensor, "*b 1 m t"]) -> Float[np.ndarray, "m t"]:
        """One spectrogram in dB; the lowest band is the last row."""
        levels = self.values(rearrange(x.detach().cpu().float(), "... m t -> (...) 1 m t")[:1])
        return rearrange(levels, "1 1 m t -> m t").numpy()

    def picture(self, x: Float[Tensor, "*b 1 m t"]) -> Image.Image:
        """Levels as colours from black (the lowest of `db`) to pale yellow."""
        return shaded(torch.from_numpy(self.show(x)), self.cfg.db)


def read_sound(source: Any, cfg: SoundConfig) -> tuple[Float[np.ndarray, "c n"], str]:
    """A sound as `(channels, n)` float32 at the declared rate, and its name for errors. Integers become -1..1.

    Raises `DataError` for a damaged or empty file, for another rate with `resample: false`, and for values that are not
    finite.
    """
    name = str(source) if isinstance(source, (str, Path)) else "sound in memory"
    if _is_array(source):
        array = np.asarray(read_array(Path(source), name) if isinstance(source, (str, Path)) else source)
        sound, rate = _from_array(array, name), cfg.rate
    elif Path(source).suffix.lower() == ".wav":
        sound, rate = _read_wav(Path(source), name)
    else:
        sound, rate = _read_soundfile(Path(source), name)
    if not sound.size:
        raise DataError(f"{name}: has no samples")
    if not np.isfinite(sound).all():
        place = np.argwhere(~np.isfinite(sound))[0].tolist()
        raise DataError(f"{name}: sample {place[1]} of channel {place[0]} is {sound[tuple(place)]}")
    if rate == cfg.rate:
        return sound, name
    if not cfg.resample:
        raise DataError(
            f"{name}: has {rate} samples per second, but data.modality.rate is {cfg.rate}; "
            "data.modality.resample=true converts such files"
        )
    return _resampled(sound, rate, cfg.rate), name


def length_of(source: Any, cfg: SoundConfig) -> int:
    """The number of samples at the declared rate that `read_sound` gives, from the header of a file.

    Raises `DataError` for a file whose header cannot be read.
    """
    if _is_array(source):
        name = str(source) if isinstance(source, (str, Path)) else "sound in memory"
        array = map_array(Path(source), name) if isinstance(source, (str, Path)) else np.asarray(source)
        return _from_array(np.asarray(array), name).shape[-1]
    path = Path(source)
    count, rate = _wav_length(path) if path.suffix.lower() == ".wav" else _soundfile_length(path)
    common = math.gcd(rate, cfg.rate)
    return -(-count * (cfg.rate // common) // (rate // common))


@cache
def mel_filters(mels: int, window: int, rate: int, f_min: float, f_max: float) -> Float[Tensor, "m f"]:
    """Triangular filters of height 1, evenly spaced in mel (2595 log10(1 + f / 700), O'Shaughnessy 1987).

    Raises `ValueError` when a band is so narrow that it contains no frequency of the window.
    """
    low, high = (2595 * math.log10(1 + f / 700) for f in (f_min, f_max))
    edges = 700 * (10 ** (np.linspace(low, high, mels + 2) / 2595) - 1)
    bins = np.arange(window // 2 + 1) * rate / window
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    empty = np.flatnonzero(filters.max(1) <= 0)
    if empty.size:
        raise ValueError(
            f"band {empty[0]} of mels={mels} has no frequency of window={window}; use fewer bands or a longer window"
        )
    return torch.from_numpy(filters.astype(np.float32))


def decibels(power: Float[Tensor, "f t"]) -> Float[Tensor, "f t"]:
    """Powers in dB, at least -120."""
    return 10 * power.clamp(min=1e-12).log10()


def shaded(levels: Float[Tensor, "f t"], span: tuple[float, float]) -> Image.Image:
    """Levels as colours, one pixel for each; the lower end of the span is black."""
    share = ((levels - span[0]) / (span[1] - span[0])).clamp(0, 1).numpy()
    stops = np.linspace(0, 1, len(_INFERNO))
    colours = [np.interp(share, stops, [colour[k] for colour in _INFERNO]) for k in range(3)]
    return Image.fromarray(np.stack(colours, -1).round().astype(np.uint8))


def _spectrum(sound: Float[Tensor, " n"], window: int, hop: int) -> Float[Tensor, "f t"]:
    """Power by frequency and frame, 1 for a tone of full scale; frames are centred, ends are padded by reflection."""
    hann = torch.hann_window(window)
    stft = torch.stft(sound, window, hop, window=hann, center=True, pad_mode="reflect", return_complex=True)
    return stft.abs().square() * (2 / hann.sum()) ** 2


def _wave(sound: Float[np.ndarray, " n"]) -> Image.Image:
    """A picture of the lowest to the highest value within each of 128 columns."""
    canvas = Image.new("RGB", (128, 64), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    draw.line((0, 32, 127, 32), fill=(200, 200, 200))
    edges = np.linspace(0, len(sound), 129).round().astype(int)
    for column, (first, last) in enumerate(itertools.pairwise(edges)):
        part = np.clip(sound[first : max(last, first + 1)], -1, 1)
        if part.size:
            draw.line((column, 32 - 31 * part.max(), column, 32 - 31 * part.min()), fill=(31, 119, 180))
    return canvas


def _part(sound: Float[np.ndarray, "... n"], view: View, silence: float) -> Float[Tensor, "... length"]:
    """The stretch of a sound along its last axis that the view names; what the sound lacks is silent."""
    length, start = view.size[-1], round(view.start[-1] * sound.shape[-1])
    x = torch.full((*sound.shape[:-1], length), silence)
    there = torch.from_numpy(np.ascontiguousarray(sound[..., start : start + length]))
    x[..., : there.shape[-1]] = there
    return x


def _is_array(source: Any) -> bool:
    return not isinstance(source, (str, Path)) or Path(source).suffix.lower() == ".npy"


def _from_array(array: np.ndarray, name: str) -> Float[np.ndarray, "c n"]:
    if array.dtype.kind not in "if" or array.ndim not in (1, 2):
        raise DataError(
            f"{name}: has shape {array.shape} and type {array.dtype}; a sound is (n,) or (channels, n), of floats in "
            "-1..1 or of signed integers"
        )
    scale = float(-np.iinfo(array.dtype).min) if array.dtype.kind == "i" else 1.0
    array = (array.astype(np.float64) / scale).astype(np.float32)
    return rearrange(array, "n -> 1 n") if array.ndim == 1 else array


def _read_wav(path: Path, name: str) -> tuple[Float[np.ndarray, "c n"], int]:
    try:
        with path.open("rb") as file, wave.open(file) as sound:
            channels, width, rate = sound.getnchannels(), sound.getsampwidth(), sound.getframerate()
            content = sound.readframes(sound.getnframes())
    except wave.Error as error:
        if "unknown format" in str(error):  # WAV of floats, or with the extensible header
            return _read_soundfile(path, name)
        raise DataError(f"{name}: {error}") from error
    except (OSError, EOFError) as error:
        raise DataError(
            f"{name}: {cause(error) if isinstance(error, OSError) else 'ends in its header'}"
        ) from error
    content = content[: len(content) // (channels * width) * channels * width]
    if width == 3:  # the three bytes become the upper ones of four
        bytes_ = rearrange(np.frombuffer(content, np.uint8), "(n b) -> n b", b=3)
        values = np.pad(bytes_, ((0, 0), (1, 0))).view("<i4").reshape(-1).astype(np.float64)
    else:
        values = np.frombuffer(content, {1: "u1", 2: "<i2", 4: "<i4"}[width]).astype(np.float64)
    scaled = (values - 128) / 128 if width == 1 else values / 2.0 ** (15 if width == 2 else 31)
    return rearrange(scaled.astype(np.float32), "(n c) -> c n", c=channels), rate


def _wav_length(path: Path) -> tuple[int, int]:
    """Samples that are there, and their rate."""
    try:
        with path.open("rb") as file, wave.open(file) as sound:
            begin, held = file.tell(), path.stat().st_size
            there = (held - begin) // (sound.getnchannels() * sound.getsampwidth())
            return min(sound.getnframes(), there), sound.getframerate()
    except (wave.Error, EOFError):
        return _soundfile_length(path)


def _soundfile_length(path: Path) -> tuple[int, int]:
    import soundfile

    try:
        info = soundfile.info(path)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: {cause(error)}") from error
    return info.frames, info.samplerate


def _read_soundfile(path: Path, name: str) -> tuple[Float[np.ndarray, "c n"], int]:
    import soundfile

    try:
        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name}: {cause(error)}") from error
    return rearrange(sound, "n c -> c n"), int(rate)


def _resampled(sound: Float[np.ndarray, "c n"], rate: int, wanted: int) -> Float[np.ndarray, "c m"]:
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return resample_poly(sound, wanted // common, rate // common, axis=1).astype(np.float32)
