"""What rides beside a sample and is no sample itself: a caption, and the same sample at another size."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vqcore.config import Config as Base
from vqcore.config import NoSettings, slot
from vqcore.errors import ConfigError, DataError
from vqcore.protocols import DataSpec, View, expand, reading
from vqcore.reading import misfit, read_json, read_text
from vqcore.registry import registry

MOST = 1 << 20
"""Most bytes of a file of captions."""


class Caption:
    """A text for a sample, as an extra modality: a string in `Batch.extras`.

    A `.txt` file is one caption. A `.json` file is a text, a list of texts, or a mapping with one of both under
    `caption`; in training one text of a list is drawn, in evaluation it is the first.
    """

    suffixes = (".txt", ".json")
    metrics: tuple[str, ...] = ()
    reading = "caption"
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, size: int | tuple[int, ...] | None):
        self.cfg = cfg
        self.spec = DataSpec(channels=1, size=(1,))

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> tuple[str, ...]:
        """The captions of a file, or a text itself. Raises `DataError` for anything else, and for no text at all."""
        if isinstance(source, Path):
            where = str(source)
            is_json = source.suffix.lower() == ".json"
            found = (
                read_json(source, DataError, most=MOST)
                if is_json
                else read_text(source, DataError, most=MOST)
            )
        else:
            where, found = "caption in memory", source
        if isinstance(found, dict):
            found = found.get("caption")
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, (list, tuple)) or not texts or misfit(list(texts), [str]):
            raise DataError(f"{where}: is no text, no list of texts and no mapping with 'caption'")
        return tuple(" ".join(text.split()) for text in texts)

    def extent(self, raw: tuple[str, ...]) -> tuple[int, ...]:
        """A caption has no extent."""
        return (1,)

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """Captions draw no view: raises `ConfigError`."""
        raise ConfigError(
            "data.modality=caption: captions ride beside samples (data.extra). Name another modality"
        )

    def ride(self, view: View, main: DataSpec) -> View:
        """The view of the main sample; only its draw counts."""
        return view

    def tensor(self, raw: tuple[str, ...], view: View) -> str:
        """One caption."""
        return raw[view.draw % len(raw)]

    def show(self, x: str) -> str:
        """The caption."""
        return x


class Target:
    """The same sample at a size of its own, as an extra modality called `target`: what a denoiser learns to make.

    Example: the encoder sees 224 pixels, Stable Diffusion 512. The file is read once. It is cropped as the main sample
    is; everything but the size is what `modality` says, whose samples are of the kind and range of the main ones.
    """

    metrics: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()

    @dataclass(frozen=True, kw_only=True)
    class Config(Base):
        """Settings of a target."""

        training_only: ClassVar[tuple[str, ...]] = ("modality", "size")

        modality: Base = slot("modality")
        """How the sample is read: as data.modality."""
        size: int | tuple[int, ...] = 512
        """Size of the target, in the proportions of the main sample."""

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        self.cfg = cfg
        self.inner: Any = registry().build("modality", cfg.modality, "modality", size=cfg.size)
        self.spec, self.suffixes = self.inner.spec, self.inner.suffixes
        self.reading = reading(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # a copy or pickle that is not filled yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> Any:
        """As `modality` reads."""
        return self.inner.read(source, at_least)

    def extent(self, raw: Any) -> tuple[int, ...]:
        """The extent of what was read."""
        return self.inner.extent(raw)

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """As `modality` draws."""
        return self.inner.view(extent, size, rng)

    def ride(self, view: View, main: DataSpec) -> View:
        """The main view at the own size. Raises `ValueError` for other proportions, or values of another kind."""
        size = expand(self.cfg.size, main.rank)
        for name in ("kind", "channels", "range"):
            ours, theirs = getattr(self.spec, name), getattr(main, name)
            if ours != theirs:
                raise ValueError(
                    f"its samples have {name}={ours}, and those of data.modality {theirs}: take the same modality"
                )
        if any(a * view.size[0] != b * size[0] for a, b in zip(size, view.size)):
            raise ValueError(f"size {list(size)} has other proportions than samples of {list(view.size)}")
        return replace(view, size=size)

    def tensor(self, raw: Any, view: View) -> Any:
        """As `modality` makes it."""
        return self.inner.tensor(raw, view)

    def show(self, x: Any) -> Any:
        """As `modality` shows it."""
        return self.inner.show(x)
