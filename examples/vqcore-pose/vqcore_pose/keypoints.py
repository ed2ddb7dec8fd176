"""Sequences of 2-D keypoints as a modality: files and arrays of shape (frames, joints, 2), coordinates in [-1, 1]."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

import vqcore.config
from vqcore.data.npy import read_array
from vqcore.errors import DataError
from vqcore.protocols import DataSpec, View


class Keypoints:
    """A stretch of frames. Each coordinate of each joint is a channel; the only axis is time. x points right, y up."""

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `pose/keypoints`."""

        joints: int = 9
        """Joints of a frame."""
        mirror: float = 0.5
        """Probability that left and right are exchanged in training."""

        training_only: ClassVar[tuple[str, ...]] = ("mirror",)

    suffixes = (".npy",)
    metrics = ("mae",)

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError("set data.input_size, the number of frames of a sequence")
        self.cfg = cfg
        frames = size if isinstance(size, int) else size[0]
        self.spec = DataSpec(channels=2 * cfg.joints, size=(frames,))

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A sequence from a `.npy` file or an array. Raises `DataError` for a damaged file or a wrong shape."""
        raw = source if isinstance(source, np.ndarray) else read_array(Path(source), str(source))
        if raw.ndim != 3 or raw.shape[1:] != (self.cfg.joints, 2):
            raise DataError(f"{source}: shape {raw.shape}, not (frames, {self.cfg.joints}, 2)")
        return raw

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """The number of frames."""
        return (len(raw),)

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A stretch of the length of a sample: at a random place in training, else in the middle."""
        spare = max(0, extent[0] - size[0])
        start = spare // 2 if rng is None else int(rng.integers(spare + 1))
        flip = rng is not None and rng.random() < self.cfg.mirror
        return View((start / extent[0],), (min(start + size[0], extent[0]) / extent[0],), size, flip)

    def tensor(self, raw: np.ndarray, view: View) -> Tensor:
        """The stretch as (2 * joints, frames), resampled in time if the sequence is too short."""
        at = np.linspace(round(view.start[0] * len(raw)), round(view.stop[0] * len(raw)) - 1, view.size[0])
        frames = torch.from_numpy(raw[at.round().astype(int)]).float()
        if view.flip:
            frames = frames * torch.tensor([-1.0, 1.0])
        return rearrange(frames, "t j c -> (j c) t")

    def show(self, x: Tensor) -> np.ndarray:
        """Back to (frames, joints, 2)."""
        return rearrange(x, "(j c) t -> t j c", c=2).numpy()

    def picture(self, x: Tensor) -> Image.Image:
        """Eight frames side by side, joints as dots."""
        canvas = Image.new("RGB", (128, 128), "white")
        draw = ImageDraw.Draw(canvas)
        frames = self.show(x)
        for column, frame in enumerate(frames[np.linspace(0, len(frames) - 1, 8).astype(int)]):
            for right, up in frame:
                across, down = 8 + 16 * column + 7 * right, 64 - 56 * up
                draw.ellipse((across - 1, down - 1, across + 1, down + 1), fill="navy")
        return canvas
