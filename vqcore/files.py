"""Paths of users, and files that are written so that a reader never meets half of one: first beside their place, then
renamed.

Everything that vqcore writes goes through `aside` (a file) or `folder_aside`. The name beside is short, hidden and
random, so that long names and several processes are no trouble, and it is made anew, never opened through a link. The
process that makes it holds a lock on it, which ends with the process: so `sweep`, which runs before the first write
into a folder, can tell what a killed process left.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vqcore.errors import VqcoreError

_LONGEST_SUFFIX = 16
"""A longer suffix is no type of file, and would make the name beside too long."""
_BESIDE = re.compile(r"\.[0-9a-f]{8}\.incomplete(\.[^.]*)?")
_swept: set[Path] = set()


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
def aside(path: Path, *, new: bool = False) -> Iterator[Path]:
    """An empty file beside `path` to write to, with the same suffix; the block's end flushes it and renames it.

    A file at `path` is replaced; if `path` is a link, the link is replaced. With `new`, nothing is replaced: of several
    processes only the first succeeds, the others get `FileExistsError`. Missing parent folders are made. If the
    block or the renaming fails, nothing is left. An `OSError` has `path` as its `filename`.
    """
    suffix = path.suffix if len(path.suffix) <= _LONGEST_SUFFIX else ""
    with _named(path), parents(path), _beside(path.parent, suffix, _new_file) as (temporary, mode):
        try:
            yield temporary
            temporary.chmod(mode)  # a writer may have made the file anew, closed to other users
            _flush(temporary)
            if new:
                _link(temporary, path)
            else:
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; the block's end flushes all files in it and renames it.

    Raises `FileExistsError` if there is something at `path`, also if another process was faster. Everything else is
    as `aside` does it.
    """
    with _named(path), parents(path):
        if os.path.lexists(path):
            raise _exists(path)
        with _beside(path.parent, "", _new_folder) as (temporary, _):
            try:
                yield temporary
                for each in temporary.rglob("*"):
                    if not each.is_symlink():
                        _flush(each)
                _rename_folder(temporary, path)
                _flush(path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str, *, new: bool = False) -> None:
    """Write a small text file in one go, as `aside` does. Bytes of names that are not UTF-8 become `\\udcXX`."""
    with aside(path, new=new) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def scratch() -> Path:
    """A new folder of this process for passing files; it ends with the process.

    What a killed process left is removed by the next one that asks for such a folder.
    """
    base = Path(tempfile.gettempdir()) / f"vqcore-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    sweep(base)
    held = _beside(base, "", _new_folder)
    path, _ = held.__enter__()
    import multiprocessing.util

    # Unlike atexit, this is also called where a process was made by `multiprocessing`.
    multiprocessing.util.Finalize(None, _discard, args=(path, held, os.getpid()), exitpriority=0)
    return path


def lay(path: Path, content: bytes) -> None:
    """Write a file below a `scratch` folder, which this process alone reads: at once, and not flushed."""
    try:
        path.write_bytes(content)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _discard(path: Path, held: Any, process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(path, ignore_errors=True)
        held.__exit__(None, None, None)


@contextmanager
def parents(path: Path) -> Iterator[None]:
    """Make the folders above a path; if the block fails, remove those that were made and are empty."""
    made = [each for each in path.parents if not each.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise


def sweep(folder: Path) -> None:
    """Remove what killed processes left directly in `folder`; what a living process writes stays."""
    found: list[Path] = []
    with suppress(OSError):  # no folder, or one that may be written and not read
        found = [path for path in folder.iterdir() if is_beside(path)]
    for path in found:
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def is_beside(path: Path) -> bool:
    """Whether a path has the name of a file or folder that is being written, or that a killed process left."""
    return _BESIDE.fullmatch(path.name) is not None


@contextmanager
def _beside(folder: Path, suffix: str, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """A new file or folder under a lock, and its mode. Sweeps a folder when this process first writes there."""
    if (place := folder.absolute()) not in _swept:
        _swept.add(place)
        sweep(folder)
    while True:
        path = folder / f".{secrets.token_hex(4)}.incomplete{suffix}"
        try:
            handle = make(path)
        except FileExistsError:
            continue
        with suppress(OSError):  # a file system without locks: then nobody sweeps there either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists():  # else somebody swept it before it had its lock
            break
        os.close(handle)
    try:
        yield path, os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _rename_folder(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError as error:
        if os.path.lexists(path):  # the system's words differ: "Directory not empty", "Not a directory"
            raise _exists(path) from error
        raise


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a renaming, it never replaces
    except PermissionError:  # a file system without hard links
        if os.path.lexists(path):
            raise _exists(path) from None
        temporary.replace(path)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An `OSError` of the block names `path`, which the user knows, and not a name beside it."""
    try:
        yield
    except OSError as error:
        known = error.filename if isinstance(error.filename, str) else ""
        if not known or any(map(_BESIDE.fullmatch, Path(known).parts)):
            error.filename = str(path)
        error.filename2 = None  # of a renaming
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
