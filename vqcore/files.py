"""Writes files so that a reader never meets half a file: first beside their place, then renamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, with the same suffix; the block's end renames the file to `path`.

    Parent folders are made. If the block fails, nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.incomplete{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file in one go."""
    with aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
