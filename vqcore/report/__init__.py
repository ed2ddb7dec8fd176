"""One page about a run for a browser: `report.html`, complete in itself, from the files of the run's folder.

Curves, the best and worst samples with error and token maps, the use of the codes, the evaluation, what went wrong,
config and provenance. What is missing is left out, and the page says why.
"""

from pathlib import Path

from vqcore import artefact
from vqcore.errors import VqcoreError
from vqcore.report import gallery, page, record

FILE = "report.html"


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
    artefact.write_text(path, page.render(found, shown))
    return path
