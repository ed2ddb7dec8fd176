"""One feature vector a sample, `(c, 1)`: a class token or a pooled embedding. The loss compares directions.

4M's tokenizers of global DINOv2 and ImageBind features (arXiv 2406.09406) do the same: the values of the files, and a
cosine loss over channels. With `teacher`, the files are pictures, and a frozen network makes a vector of each.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vqcore import config
from vqcore.errors import DataError
from vqcore.modalities.rgb import RGB
from vqcore.protocols import DataSpec, View
from vqcore_vision.features import SUFFIXES, FeatureConfig, Scaling, read_numbers
from vqcore_vision.taught import Taught


class Vector:
    """Vectors of `channels` numbers, from arrays of any shape with this number of values; never cropped or mirrored."""

    suffixes: tuple[str, ...] = SUFFIXES
    metrics = ("cosine", "mae")

    @dataclass(frozen=True, kw_only=True)
    class Config(FeatureConfig):
        """Settings of feature vectors."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.teacher is None:
                config.refuse_idle(self, "teacher=null", "stride")

    def __new__(cls, cfg: Any = None, *, size: Any = None) -> "Vector":
        """Vectors from files, or with a teacher vectors of pictures. Copies and pickles come without settings."""
        taught = cls is Vector and cfg is not None and cfg.teacher is not None
        return super().__new__(TaughtVector if taught else cls)

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if isinstance(size, int) and size != 1:
            raise ValueError(f"a vector has size 1, not {size}: remove data.input_size")
        self.cfg, self.scaling = cfg, Scaling(cfg)
        self.spec = DataSpec(channels=cfg.channels, size=(1,), range=None, loss="cosine")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, an array or a tensor as `(c,)` float32. Raises `DataError` for another number of values."""
        array, name = read_numbers(source, self.cfg.key)
        if array.size != self.cfg.channels:
            raise DataError(
                f"{name}: has {array.size} values (shape {array.shape}), but data.modality.channels is "
                f"{self.cfg.channels}"
            )
        return array.reshape(-1)

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """One position."""
        return (1,)

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """The whole vector, always."""
        return View(start=(0.0,), stop=(1.0,), size=(1,))

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "c 1"]:
        """The vector, scaled. As an extra modality it ignores the view of the main modality."""
        return self.scaling.apply(rearrange(torch.from_numpy(raw.copy()), "c -> c 1"))

    def values(self, x: Float[Tensor, "b c 1"]) -> Float[Tensor, "b c 1"]:
        """A batch in the units of the files."""
        return rearrange(self.scaling.undo(rearrange(x, "b c 1 -> b c")), "b c -> b c 1")

    def show(self, x: Float[Tensor, "*b c 1"]) -> np.ndarray:
        """One vector in the units of the files."""
        return self._single(x).numpy()

    def picture(self, x: Float[Tensor, "*b c 1"]) -> Image.Image:
        """The channels row by row in a square, red above 0 and blue below; full colour at 3 root mean squares."""
        return barcode(self._single(x))

    def _single(self, x: Tensor) -> Float[Tensor, " c"]:
        x = x.detach().cpu().float()
        return rearrange(self.values(x if x.ndim == 3 else rearrange(x, "c 1 -> 1 c 1")), "1 c 1 -> c")


class TaughtVector(Taught, Vector):
    """Vectors that a teacher makes of pictures."""

    def __init__(self, cfg: Vector.Config, *, size: int | tuple[int, ...] | None):
        Vector.__init__(self, cfg, size=size)
        self.take_teacher(RGB.Config())

    extent, view = Vector.extent, Vector.view

    def tensor(self, raw: Any, view: View) -> Float[Tensor, "3 h w"]:
        """The largest centred square of the picture, `stride` pixels along each axis, whatever the view is."""
        return self.rgb.tensor(raw, self.rgb.view(self.rgb.extent(raw), self.rgb.spec.size, None))


def barcode(values: Float[Tensor, " c"]) -> Image.Image:
    """Numbers row by row in a square: white at 0, red above, blue below, grey in the unused rest of the square."""
    side = math.ceil(math.sqrt(len(values)))
    share = (values / (3 * values.square().mean().sqrt().clamp(min=1e-12))).clamp(-1, 1).numpy()
    fade = 1 - np.abs(share)
    colours = np.stack([np.where(share > 0, 1, fade), fade, np.where(share < 0, 1, fade)], -1)
    tiles = np.full((side * side, 3), 128, dtype=np.uint8)
    tiles[: len(share)] = (colours * 255).round()
    return Image.fromarray(rearrange(tiles, "(h w) c -> h w c", h=side))
