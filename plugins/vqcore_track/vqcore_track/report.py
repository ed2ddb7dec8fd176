"""One page about a run for a browser: `report.html`, a single file, made from the files in the run's folder.

It shows curves, the best and worst samples with error maps and token maps, the use of the codes, the evaluation, what
went wrong, the config and the provenance. If something is missing, the page says why.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from vqcore import config, dist
from vqcore.borrowed import Access
from vqcore.config import at_least
from vqcore.console import command, say
from vqcore.errors import VqcoreError
from vqcore.files import write_text
from vqcore.plugin import hookimpl
from vqcore.protocols import RunLike
from vqcore.tokens.stats import Use
from vqcore_track import gallery, page, record, tokens

log = logging.getLogger(__name__)
FILE = "report.html"


class Report:
    """Writes the page when the run ends without an error; `vqcore report RUN` writes it at any time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of the report."""

        samples: int = 512
        """Number of evaluation samples among which to find the best and the worst."""

        def __post_init__(self) -> None:
            at_least(self, samples=1)

    def __init__(self, cfg: Config):
        self.cfg = cfg

    @hookimpl
    def vqcore_run_ended(self, run: RunLike, error: BaseException | None) -> None:
        """Write the page on rank 0."""
        if error is not None or run.step == 0 or not dist.is_main():
            return
        try:
            path = self.write(run.dir, samples=self.cfg.samples)
            say(f"\nreport         {path} (curves, best and worst samples, codes)")
        except Exception as problem:  # a plugin's picture may raise anything, and the run itself is saved
            again = command("report", run.dir)
            log.warning("warning: the report could not be written: %s. To try again, run: %s", problem, again)

    @staticmethod
    def write(run_dir: Path, *, samples: int = 512, access: Access | None = None) -> Path:
        """Write the page into the run's folder and return its path. Looks through at most `samples` samples.

        Only one process may call this. Raises `RunError` if `run_dir` is not the folder of a run.
        """
        found = record.read(run_dir)
        shown = gallery.Gallery()
        if found.checkpoint is not None:
            try:
                shown = gallery.collect(found, samples, access)
            except (VqcoreError, OSError) as error:
                found.notes.append(f"Samples cannot be shown: {error}")
        path = run_dir / FILE
        write_text(path, page.render(found, shown))
        return path

    @staticmethod
    def write_tokens(use: Use, name: str, path: Path) -> None:
        """Write a page about a store of codes; `name` is its heading."""
        write_text(path, tokens.render(use, name))
