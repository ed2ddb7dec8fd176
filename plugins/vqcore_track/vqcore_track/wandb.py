"""Metrics, pictures and code-usage histograms for Weights & Biases. Needs `wandb`; online runs need a login.

The id of the W&B run is saved in `<run.dir>/wandb.json`: a resumed run continues the same W&B run. The charts use the
metric `step` as their horizontal axis, because W&B's own counter cannot go back to the step of a checkpoint.
"""

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vqcore import config, dist
from vqcore.errors import RunError
from vqcore.files import write_text
from vqcore.plugin import hookimpl
from vqcore.protocols import RunLike
from vqcore.reading import read_json
from vqcore_track.usage import codebooks, uses_histogram

ID = "wandb.json"


class Wandb:
    """Logs on rank 0 only."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of the W&B hook."""

        project: str = "vqcore"
        """Name of the W&B project."""
        entity: str | None = None
        """W&B user or team; default: your own user."""
        run_name: str | None = None
        """Name of the run at W&B; default: the name of the run's folder."""
        tags: tuple[str, ...] = ()
        """Tags of the W&B run."""
        mode: Literal["online", "offline", "disabled"] | None = None
        """offline keeps everything in the run's folder for `wandb sync`; default: WANDB_MODE, or online if unset."""
        pictures: bool = True
        """Log the rows of reconstructions and the contact sheet."""
        histograms: bool = True
        """Log a histogram of how often the codes are used, at every logged step."""

    def __init__(self, cfg: Config):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"needs wandb ({error}): pip install wandb") from error
        self.cfg, self._wandb = cfg, wandb
        self._run: Any = None

    @hookimpl
    def vqcore_run_started(self, run: RunLike) -> None:
        """Begin a W&B run, or continue the W&B run of a resumed run."""
        if not dist.is_main():
            return
        mode: Any = self.cfg.mode or os.environ.get("WANDB_MODE") or "online"
        self._run = self._wandb.init(
            project=self.cfg.project,
            entity=self.cfg.entity,
            name=self.cfg.run_name or run.dir.name,
            tags=self.cfg.tags or None,
            dir=str(run.dir),
            id=_id(run.dir / ID),
            resume="allow" if mode == "online" else None,
            mode=mode,
            config=config.to_tree(run.config),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    @hookimpl
    def vqcore_step_ended(self, run: RunLike, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of training and the code usage."""
        if self._run is None:
            return
        shown: dict[str, Any] = dict(metrics)
        if self.cfg.histograms and run.window is not None:
            for name, counts in codebooks(run.window.counts()).items():
                shown[name] = self._wandb.Histogram(np_histogram=uses_histogram(counts))
        self._run.log({"step": step, **shown})

    @hookimpl
    def vqcore_evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation."""
        if self._run is not None:
            self._run.log({"step": step, **metrics})

    @hookimpl
    def vqcore_pictured(self, step: int, name: str, path: str) -> None:
        """Log a picture of samples."""
        if self._run is not None and self.cfg.pictures:
            self._run.log({"step": step, name: self._wandb.Image(path)})

    @hookimpl
    def vqcore_run_ended(self, error: BaseException | None) -> None:
        """Finish the W&B run; W&B shows whether the run ended with an error."""
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)


def _id(path: Path) -> str:
    if path.exists():
        return read_json(path, RunError, {"id": str})["id"]
    id = secrets.token_hex(4)
    write_text(path, json.dumps({"id": id}) + "\n")
    return id
