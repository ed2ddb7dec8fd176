"""A hook that writes an animated GIF at each evaluation: an original walk beside its reconstruction."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

import vqcore.config
from vqcore import dist
from vqcore.files import aside
from vqcore.plugin import hookimpl
from vqcore.protocols import RunLike

_SIDE = 96


class WalkGif:
    """Writes `samples/walk_STEP.gif`. Only for the modality `pose/keypoints`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `pose/walk-gif`."""

        sample: int = 0
        """Number of the evaluation sample to show."""
        frame_ms: int = 60
        """Milliseconds per frame."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    @hookimpl
    def vqcore_evaluated(self, run: RunLike, step: int) -> None:
        """Reconstruct one sample with the current weights and draw it."""
        if not dist.is_main() or run.eval_data is None:  # all processes call hooks; only one writes
            return
        x = run.tokenizer.read(run.eval_data.get(self.cfg.sample))
        pair = torch.cat([x, run.tokenizer.reconstruct(x).cpu()])
        sides = [run.tokenizer.modality.show(one) for one in pair]  # (frames, joints, 2) each
        frames = [_frame(original, rebuilt) for original, rebuilt in zip(*sides)]
        path = run.dir / "samples" / f"walk_{step}.gif"
        with aside(path) as temporary:
            frames[0].save(
                temporary, save_all=True, append_images=frames[1:], duration=self.cfg.frame_ms, loop=0
            )


def _frame(original: np.ndarray, rebuilt: np.ndarray) -> Image.Image:
    canvas = Image.new("RGB", (2 * _SIDE, _SIDE), "white")
    draw = ImageDraw.Draw(canvas)
    for left, joints, colour in ((0, original, "navy"), (_SIDE, rebuilt, "firebrick")):
        for right, up in joints:
            across, down = left + _SIDE * (0.5 + 0.42 * right), _SIDE * (0.5 - 0.42 * up)
            draw.ellipse((across - 2, down - 2, across + 2, down + 2), fill=colour)
    return canvas
