"""Metrics, pictures and code-usage histograms as TensorBoard event files in the run's folder. Needs `tensorboard`.

A run that is resumed or rolled back continues the same curves: TensorBoard drops everything after the step from which
the run continues.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqcore import config, dist
from vqcore.compose.describe import dump
from vqcore.files import local
from vqcore.plugin import hookimpl
from vqcore.protocols import RunLike
from vqcore_track.usage import codebooks, uses_histogram


class TensorBoard:
    """Writes on rank 0 only. To look at the files, run `tensorboard --logdir runs`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of the TensorBoard hook."""

        dir: str | None = None
        """Folder of the event files; default: <run.dir>/tensorboard."""
        pictures: bool = True
        """Log the rows of reconstructions and the contact sheet."""
        histograms: bool = True
        """Log a histogram of how often the codes are used, at every logged step."""

    def __init__(self, cfg: Config):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"needs tensorboard ({error}): pip install tensorboard") from error
        self.cfg, self._make = cfg, SummaryWriter
        self._writer: Any = None
        self._folder, self._last = Path(), 0

    @hookimpl
    def vqcore_run_started(self, run: RunLike) -> None:
        """Open the event file."""
        if dist.is_main():
            self._folder = local(self.cfg.dir) if self.cfg.dir else run.dir / "tensorboard"
            self._open(run.step)
            if run.step == 0:
                text = dump(run.config)
                self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)

    @hookimpl
    def vqcore_step_ended(self, run: RunLike, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of training and the code usage."""
        if self._writer is None:
            return
        if step <= self._last:  # rolled back
            self._writer.close()
            self._open(step - 1)
        self._last = step
        self._scalars(step, metrics)
        if self.cfg.histograms and run.window is not None:
            for name, counts in codebooks(run.window.counts()).items():
                self._histogram(name, *uses_histogram(counts), step)

    @hookimpl
    def vqcore_evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation."""
        if self._writer is not None:
            self._scalars(step, metrics)

    @hookimpl
    def vqcore_pictured(self, step: int, name: str, path: str) -> None:
        """Log a picture of samples."""
        if self._writer is not None and self.cfg.pictures:
            with Image.open(path) as picture:
                self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    @hookimpl
    def vqcore_run_ended(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, after: int) -> None:
        self._last = after
        self._writer = self._make(str(self._folder), purge_step=after + 1 if after else None)

    def _scalars(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def _histogram(self, name: str, numbers: np.ndarray, edges: np.ndarray, step: int) -> None:
        middles = (edges[:-1] + edges[1:] - 1) / 2
        self._writer.add_histogram_raw(
            name,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(numbers.sum()),
            sum=float(numbers @ middles),
            sum_squares=float(numbers @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=numbers.tolist(),
            global_step=step,
        )
