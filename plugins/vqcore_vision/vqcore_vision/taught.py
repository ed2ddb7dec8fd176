"""Features that a frozen network makes of pictures on the device: what maps and vectors have in common."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vqcore.errors import ConfigError
from vqcore.modalities.planes import SUFFIXES
from vqcore.modalities.rgb import RGB
from vqcore.protocols import DataSpec, View
from vqcore.registry import registry


class Taught:
    """Reads pictures as `rgb` does, `stride` pixels for each position, and finishes them with the teacher.

    Goes before a modality of features, which has `cfg`, `scaling` and `spec`, and knows how to show features.
    """

    suffixes: tuple[str, ...] = SUFFIXES
    streams: tuple[str, ...] = SUFFIXES
    cfg: Any
    scaling: Any
    spec: DataSpec

    def take_teacher(self, cfg: RGB.Config) -> None:
        """Build the teacher, on the CPU and with random weights. Raises `ValueError` if it gives other features."""
        self.rgb = RGB(cfg, size=self._pixels(self.spec.size))
        self.reading = self.rgb.reading
        self.teacher: Any = registry().build("teacher", self.cfg.teacher, "teacher", spec=self.rgb.spec)
        dim: int = self.teacher.dim
        if dim != self.cfg.channels:
            raise ValueError(f"the teacher gives {dim} channels, not {self.cfg.channels}: set channels={dim}")
        with torch.no_grad():
            self._features(torch.zeros(1, 3, *self.rgb.spec.size))

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> Any:
        """A picture, in as much detail as `rgb` reads."""
        return self.rgb.read(source, None if at_least is None else self._pixels(at_least))

    def extent(self, raw: Any) -> tuple[int, ...]:
        """Height and width of the full picture in pixels."""
        return self.rgb.extent(raw)

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """As `rgb` cuts pictures. The size is in positions."""
        return replace(self.rgb.view(extent, self._pixels(size), rng), size=size)

    def tensor(self, raw: Any, view: View) -> Float[Tensor, "3 h w"]:
        """The part of the picture that the view names, before the teacher, in [-1, 1]."""
        return self.rgb.tensor(raw, replace(view, size=self._pixels(view.size)))

    def finish(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c *grid"]:
        """What the teacher makes of pictures, scaled."""
        return self.scaling.apply(self._features(x), dim=1)

    def _pixels(self, size: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = size if len(size) == 2 else (*size, *size)
        return rows * self.cfg.stride, columns * self.cfg.stride

    def _features(self, x: Tensor) -> Tensor:
        found = self.teacher(x)
        if len(self.spec.size) == 1:
            if found.ndim != 2:
                raise ValueError("the teacher gives maps: set teacher.output=global for one vector a picture")
            return found[..., None]
        if found.ndim != 4:
            raise ValueError(
                "the teacher gives one vector a picture: set teacher.output=patches, or take vision/vector"
            )
        stride, (height, width) = self.cfg.stride, x.shape[2:]
        wanted, got = (height // stride, width // stride), tuple(found.shape[2:])
        if got != wanted:
            raise ConfigError(
                f"the teacher makes maps of {got[0]} x {got[1]} of pictures of {height} x {width} pixels, but with "
                f"stride={stride} they have {wanted[0]} x {wanted[1]} positions. Give stride and size that fit, or "
                "set teacher.resize=false for a teacher that takes any size."
            )
        return found
