"""The published tokenizers of TerraMind: what their files do not say. A new tokenizer is a row of `VARIANTS`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vqcore.errors import did_you_mean, listed, plural
from vqcore.protocols import Published

S2 = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12"
"""The bands of Sentinel-2 L2A, in the order of TerraMind; there is no cirrus band (B10)."""

ESRI = (
    *("no data", "water", "trees", "flooded vegetation", "crops"),
    *("built area", "bare ground", "snow/ice", "clouds", "rangeland"),
)
"""The land-cover classes of version 1: ESRI's, whose ids 1 2 4 5 7 8 9 10 11 became 1 to 9."""

DENOISER: Mapping[str, Any] = {"name": "unet/unet"}
"""The decoder of all tokenizers but land cover: 4M's `unet_patched`, which is the default of `unet/unet`."""

SCHEDULER: Mapping[str, Any] = {
    "name": "unet/ddim",
    "prediction": "sample",
    "schedule": "linear",
    "zero_terminal_snr": True,
    "clip": 1.0,
    "as_4m": True,
}
"""How such a decoder is sampled: DDIM, x_0 clipped to [-1, 1]; the steps are 4M's, e.g. 8 where 7 are asked for."""

SEEN = "apache-2.0"
CARDS = "apache-2.0 by the card of S2L2A; see its own card"
UNKNOWN = "licence unknown: the repository needs an account with access"
"""The licence of a file: its card was read; the card of another one was read; nothing public says it."""


@dataclass(frozen=True)
class Variant:
    """One published tokenizer. `mean` and `std` have a number for each band; class maps have none."""

    name: str
    id: str
    file: str
    licence: str
    bands: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    labels: int | None = None
    classes: tuple[str, ...] = ()
    levels: str = "8-8-8-6-5"
    size: int = 256
    patch: int = 16
    transformer: Mapping[str, Any] = field(default_factory=lambda: {"size": "b"})
    denoiser: Mapping[str, Any] = field(default_factory=lambda: DENOISER)

    @property
    def full(self) -> str:
        """The name in terratorch: `terramind_v1_tokenizer_dem`."""
        version, _, what = self.name.partition("-")
        return f"terramind_{version.replace('.', '')}_tokenizer_{what.lower()}"

    @property
    def channels(self) -> int:
        """Channels of the first layer: bands or classes."""
        return self.labels or len(self.bands)

    @property
    def kind(self) -> str:
        """The class of terratorch."""
        return "VQVAE" if self.labels else "DiVAE"

    @property
    def what(self) -> str:
        """What the first layer takes, for people."""
        if self.labels:
            return f"{self.labels} classes"
        return f"{plural(len(self.bands), 'band')} ({' '.join(self.bands)})"

    def model(self, *, encoder_only: bool = False) -> dict[str, Any]:
        """Encoder, quantizer and decoder, as in a config file."""
        part = {**self.transformer, "patch_size": self.patch, "post_mlp": True}
        decoder: Mapping[str, Any] = self.denoiser
        if self.labels:
            decoder = {"name": "vit/decoder", **part, "input_size_dec": self.size}
        return {
            "encoder": {"name": "vit/encoder", **part, "input_size_enc": self.size},
            "quantizer": {"name": "quant/fsq", "levels": self.levels, "form": "sigmoid01"},
            "decoder": {"name": "fourm/none"} if encoder_only else dict(decoder),
            **({"embed_dim": None} if self.labels else {}),
        }

    def modality(self) -> dict[str, Any]:
        """How files are read, as in a config file."""
        if self.labels:
            return {"name": "array", "kind": "categorical", "labels": self.labels}
        scale = {"kind": "standard", "mean": list(self.mean), "std": list(self.std)}
        made = {"name": "array", "channels": list(self.bands), "scale": scale}
        return made | ({"picture": ["B04", "B03", "B02"]} if "B04" in self.bands else {})

    def objective(self, *, encoder_only: bool = False) -> dict[str, Any]:
        """How codes are decoded, as in a config file."""
        if self.labels or encoder_only:
            return {"name": "reconstruction"}
        return {"name": "diffusion", "scheduler": dict(SCHEDULER)}


def _row(name: str, licence: str, bands: str, statistics: str = "", **more: Any) -> Variant:
    """A row; `statistics` are the means of all bands, then their deviations."""
    version, _, what = name.partition("-")
    old, names = version == "v0.1", tuple(bands.split())
    id = f"FAST-EO/TerraMind-v0.1-Tokenizer-{what}" if old else f"{V1}{what}"
    file = f"TerraMind_{'v01_' if old else ''}Tokenizer_{what}.pt"
    numbers = tuple(float(number) for number in statistics.split())
    mean, std = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    return Variant(name, id, file, licence, names, mean, std, **more)


V1 = "ibm-esa-geospatial/TerraMind-1.0-Tokenizer-"
LULC: Mapping[str, Any] = {"levels": "7-5-5-5-5"}
S1GRD = "-12.599 -20.293 5.195 5.89"
S2_V1 = (
    "1390.458 1503.317 1718.197 1853.91 2199.1 2779.975 2987.011 3083.234 3132.22 3162.988 2424.884 1857.648 "
    "2106.761 2141.107 2038.973 2134.138 2085.321 1889.926 1820.257 1871.918 1753.829 1797.379 1434.261 1334.311"
)
S2_V01 = (
    "794.311 925.161 1183.128 1338.041 1667.254 2233.633 2460.96 2555.569 2619.542 2703.298 2406.497 1841.645 "
    "1164.883 1205.586 1223.713 1399.638 1403.298 1378.513 1434.924 1491.141 1454.089 1660.395 1473.248 1365.08"
)

VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        _row("v1-S2L2A", SEEN, S2, S2_V1),
        _row("v1-S1RTC", CARDS, "VV VH", "-10.93 -17.329 4.391 4.459"),
        _row("v1-S1GRD", CARDS, "VV VH", S1GRD),
        _row("v1-DEM", CARDS, "elevation", "670.665 951.272"),
        _row("v1-LULC", CARDS, "class", labels=10, classes=ESRI, **LULC),
        _row("v1-NDVI", CARDS, "NDVI", "0.327 0.322"),
        _row("v0.1-S2L2A", UNKNOWN, S2, S2_V01),
        _row("v0.1-S1GRD", UNKNOWN, "VV VH", S1GRD),
        _row("v0.1-DEM", UNKNOWN, "elevation", "435.726 560.326"),
        _row("v0.1-LULC", UNKNOWN, "class", labels=9, **LULC),
    )
}
"""The ten published tokenizers by their short names."""


@dataclass(frozen=True)
class Training:
    """How a tokenizer of version 1 was trained, as far as terratorch says it. `accumulate` is for 8 processes.

    Sizes from `low` to `Variant.size` by `step`, `total` samples a step, learning rate, epochs, and the data's names.
    """

    low: int
    step: int
    total: int
    lr: float
    epochs: int
    data: str
    accumulate: int = 4

    @property
    def batch(self) -> int:
        """Samples of one of 8 processes at once."""
        return self.total // (8 * self.accumulate)


TRAININGS = {
    "S2L2A": Training(224, 32, 2048, 1.41e-4, 100, "MajorTOM-Core and SSL4EO-S12"),
    "S1RTC": Training(224, 32, 2048, 1.41e-4, 100, "MajorTOM-Core"),
    "S1GRD": Training(224, 32, 384, 1e-4, 100, "SSL4EO-S12", accumulate=1),
    "DEM": Training(256, 32, 2048, 1.41e-4, 20, "TerraMesh"),
    "LULC": Training(224, 16, 2048, 3.5e-5, 20, "TerraMesh"),
    "NDVI": Training(256, 32, 2048, 1.41e-4, 20, "TerraMesh"),
}
"""How each tokenizer of version 1 was trained; of version 0.1 nothing is published."""


def published() -> tuple[Published, ...]:
    """The rows of `vqcore import terramind/checkpoint --list`."""
    return tuple(Published(row.full, row.id, _note(row), row.licence) for row in VARIANTS.values())


def _note(row: Variant) -> str:
    codes = math.prod(map(int, row.levels.split("-")))
    return f"variant={row.name}, {row.kind}, {row.what}, {codes} codes"


def variant_of(name: str) -> Variant:
    """The tokenizer of a name, short (`v1-DEM`) or as in terratorch. Raises `ValueError` for other names."""
    known = {each: row for row in VARIANTS.values() for each in (row.name, row.full)}
    plain = {each.lower(): row for each, row in known.items()}
    if name.lower() in plain:
        return plain[name.lower()]
    if re.match(r"aion", name, re.IGNORECASE):
        raise ValueError(f"{name}: {AION}")
    raise ValueError(
        f"{name} is no tokenizer of TerraMind.{did_you_mean(name, known)} There are: {listed(VARIANTS)}"
    )


AION = "the codecs of AION are not read yet; they are next, see docs/from-terramind.md"
