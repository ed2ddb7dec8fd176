"""Paths of users; files that are written so that a reader never meets half a file: first beside their place, then
renamed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqcore.errors import VqcoreError


def local(path: str | Path) -> Path:
    """A path as a user gives it, with `~` expanded: a shell does not expand it after `=`, and Python never does.

    Raises `VqcoreError` for a home folder that nobody knows, and for a text that no path can be.
    """
    if "\0" in str(path):
        raise VqcoreError(f"{str(path)!r} is no path: it holds the character NUL.")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = str(path).partition("/")[0]
        raise VqcoreError(f"{path}: no home folder is known for {home}. Write the whole path.") from None


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
