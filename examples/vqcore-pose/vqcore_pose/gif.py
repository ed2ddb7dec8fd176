"""A hook that shows a person learning to walk: at each evaluation an animated GIF, original beside rebuilt."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import vqcore.config
from vqcore import dist
from vqcore.plugin import hookimpl

_SIDE = 96


class WalkGif:
    """Writes `samples/walk_STEP.gif`. Only for the modality `pose/keypoints`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `pose/walk-gif`."""

        sample: int = 0
        """Number of the sample to show, of those to evaluate on."""
        frame_ms: int = 60
        """Milliseconds that a frame stays."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    @hookimpl
    def vqcore_evaluated(self, run: Any, step: int) -> None:
        """Rebuild one sample with the weights as they are, and draw it."""
        if not dist.is_main():  # all processes call hooks; one writes
            return
        x = run.tokenizer.read(run.eval_data.get(self.cfg.sample))
        pair = torch.cat([x, run.tokenizer.reconstruct(x).cpu()])
        sides = [run.tokenizer.modality.show(one) for one in pair]  # (frames, joints, 2) each
        frames = [_frame(original, rebuilt) for original, rebuilt in zip(*sides)]
        path = run.dir / "samples" / f"walk_{step}.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=self.cfg.frame_ms, loop=0)


def _frame(original: np.ndarray, rebuilt: np.ndarray) -> Image.Image:
    canvas = Image.new("RGB", (2 * _SIDE, _SIDE), "white")
    draw = ImageDraw.Draw(canvas)
    for left, joints, colour in ((0, original, "navy"), (_SIDE, rebuilt, "firebrick")):
        for right, up in joints:
            across, down = left + _SIDE * (0.5 + 0.42 * right), _SIDE * (0.5 - 0.42 * up)
            draw.ellipse((across - 2, down - 2, across + 2, down + 2), fill=colour)
    return canvas
