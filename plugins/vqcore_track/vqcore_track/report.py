"""One page about a run for a browser: `report.html`, complete in itself, from the files of the run's folder.

Curves, the best and worst samples with error and token maps, the use of the codes, the evaluation, what went wrong,
config and provenance. What is missing is left out, and the page says why.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqcore import config, dist
from vqcore.artefacts.folder import write_text
from vqcore.console import command
from vqcore.errors import VqcoreError
from vqcore.plugin import hookimpl
from vqcore_track import gallery, page, record

log = logging.getLogger(__name__)
FILE = "report.html"


class Report:
    """Writes the page when the run ends well; `vqcore report RUN` writes it at any time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of the report."""

        samples: int = 512
        """Evaluation samples to look through for the best and the worst."""

        def __post_init__(self) -> None:
            if self.samples < 1:
                raise ValueError(f"samples={self.samples} must be at least 1")

    def __init__(self, cfg: Config):
        self.cfg = cfg

    @hookimpl
    def vqcore_run_ended(self, run: Any, error: BaseException | None) -> None:
        """Write the page on rank 0. It is made of what is on disk already: a failure here loses nothing."""
        if error is not None or run.step == 0 or not dist.is_main():
            return
        try:
            self.write(run.dir, samples=self.cfg.samples)
        except Exception as problem:  # whatever a plugin's pictures raise
            again = command("report", run.dir)
            log.warning("the report could not be written (%s); try: %s", problem, again)

    @staticmethod
    def write(run_dir: Path, *, samples: int = 512) -> Path:
        """Make a run's page in its folder; returns its path. Looks through at most `samples` evaluation samples.

        One process alone may call it. Raises `RunError` when there is no run in `run_dir`.
        """
        found = record.read(run_dir)
        shown = gallery.Gallery()
        if found.checkpoint is not None:
            try:
                shown = gallery.collect(found, samples)
            except (VqcoreError, OSError) as error:
                found.notes.append(f"Samples cannot be shown: {error}")
        path = run_dir / FILE
        write_text(path, page.render(found, shown))
        return path
