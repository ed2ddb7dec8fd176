"""Shards at addresses that fsspec knows: requests that fail are made again, and several are under way at a time."""

import errno
import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vqcore.errors import DataError, cannot_import, cause

T = TypeVar("T")

WAITS = (0.5, 2.0, 8.0)
"""Seconds before a request that failed is made for the second, third and fourth time."""
BLOCK = 4 << 20
"""So many bytes of a shard are fetched by one request while its headers are read."""
AHEAD = 2
"""So many blocks are on their way while another one is read."""
REQUESTS = 16
"""So many requests of a process are under way at a time."""
_TAGS = ("ETag", "etag", "LastModified", "Last-Modified", "Content-MD5", "md5Hash", "mtime", "created")
"""What the file systems of fsspec call that which changes when an object changes."""
_FOR_GOOD = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Errors that another try would not mend."""
_OURS = ("fsspec", "aiohttp", "s3fs")
"""Packages of the extra `tar`."""


@dataclass
class Remote:
    """A shard at an address. Its methods raise `FileNotFoundError` if there is none, `DataError` if they failed."""

    name: str
    size: int | None = None
    opened: Any = field(default=None, repr=False)

    def stamp(self) -> str:
        """Size and tags of the object; empty if the place gives no tag, so that a change could not be seen."""
        found = self._tried(lambda system, path: dict(system.info(path)))
        self.size = found.get("size")
        tags = [str(found[key]) for key in _TAGS if found.get(key)]
        return " ".join([str(self.size), *tags]) if tags else ""

    def file(self) -> Any:
        """The object of the size that `stamp` has found, to be read from its start on."""
        if self.size is None:
            raise DataError(f"{self.name}: the server does not say how large it is. Download the shards")
        self._tried(self._check_parts)
        return Ahead(self, self.size)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the object, by one request."""

        def fetch(system: Any, path: str) -> bytes:
            content = bytes(system.cat_file(path, start=offset, end=offset + size))
            if len(content) > size:
                raise self._whole()
            if len(content) < size:
                raise OSError(f"{size - len(content):,} bytes are missing")
            return content

        return self._tried(fetch)

    def ahead(self, offset: int, size: int) -> "Future[bytes]":
        """Bytes that are on their way."""
        return _pool(os.getpid()).submit(self.read, offset, size)

    def close(self) -> None:
        """Nothing is open."""

    def _check_parts(self, system: Any, path: str) -> None:
        """Raise `DataError` for a server that would send the whole shard for each part, before it does."""
        if not self.name.startswith(("http://", "https://")):
            return
        try:
            with system.open(path, "rb", block_size=1, cache_type="none", size=self.size) as file:
                file.seek(1)
                file.read(1)
        except ValueError as error:
            raise self._whole() from error

    def _whole(self) -> DataError:
        return DataError(
            f"{self.name}: the server sends whole files only, no parts (it ignores 'Range'). Download the shards"
        )

    def _tried(self, work: Callable[[Any, str], T], tries: int = 0) -> T:
        """What `work` gives, if need be after some tries."""
        try:
            return work(*self._system())
        except DataError:
            raise
        except Exception as error:  # a file system raises what the library below it raises
            why = _meant(error)
            if isinstance(why, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name) from error
            if tries == len(WAITS) or not _may_pass(why):
                count = f" (tried {tries + 1} times)" if tries else ""
                raise DataError(f"{self.name}: {_said(why)}{count}") from error
        time.sleep(WAITS[tries])
        return self._tried(work, tries + 1)

    def _system(self) -> tuple[Any, str]:
        """The file system and the path in it. A file system does not survive a fork."""
        if self.opened is None or self.opened[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs  # type: ignore[import-untyped]

                self.opened = os.getpid(), url_to_fs(self.name)
            except Exception as error:  # fsspec imports what a protocol needs
                lacks = error.__cause__ if isinstance(error.__cause__, ImportError) else error
                package = (getattr(lacks, "name", None) or "fsspec").partition(".")[0]
                why = cannot_import(lacks, package, "'vqcore[tar]'" if package in _OURS else None)
                known = isinstance(lacks, ImportError)
                raise DataError(f"{self.name}: {why if known else cause(error)}") from error
        return self.opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": None}


class Ahead:
    """A shard as a file to read: in blocks, and where they are read in a row, the next ones are on their way."""

    def __init__(self, place: Remote, size: int):
        self.place, self.size, self.at = place, size, 0
        self._now = -1
        self._blocks: dict[int, Future[bytes]] = {}

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place from the start, or from the end."""
        self.at = offset + (self.size if whence == os.SEEK_END else 0)
        return self.at

    def tell(self) -> int:
        """The place where the next byte is read."""
        return self.at

    def read(self, count: int) -> bytes:
        """The next bytes. Raises what `Remote.read` raises."""
        found, stop = b"", min(self.size, self.at + count)
        while self.at < stop:
            number, within = divmod(self.at, BLOCK)
            part = self._block(number)[within : within + stop - self.at]
            found, self.at = found + part, self.at + len(part)
        return found

    def _block(self, number: int) -> bytes:
        if number != self._now:
            wanted = 1 + AHEAD if number == self._now + 1 else 1
            blocks = range(number, min(number + wanted, -(-self.size // BLOCK)))
            self._blocks = {each: self._blocks.get(each) or self._asked(each) for each in blocks}
            self._now = number
        return self._blocks[number].result()

    def _asked(self, number: int) -> "Future[bytes]":
        first = number * BLOCK
        return self.place.ahead(first, min(BLOCK, self.size - first))

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: Any) -> None:
        for each in self._blocks.values():
            each.cancel()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process: those of the process that forked it are not there."""
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="fetch")


def _meant(error: Exception) -> BaseException:
    """The error that a file system means: whatever goes wrong at a first request is 'not found' to fsspec's HTTP."""
    behind = error.__cause__
    of_http = isinstance(behind, OSError) or type(behind).__module__.startswith("aiohttp")
    if not isinstance(error, FileNotFoundError) or behind is None or not of_http:
        return error
    return error if getattr(behind, "status", None) == 404 else behind


def _may_pass(error: BaseException) -> bool:
    """Whether it makes sense to try again."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 425, 429)
    return not isinstance(error, _FOR_GOOD)


def _said(error: BaseException) -> str:
    status = getattr(error, "status", None)
    return f"the server answers {status} {getattr(error, 'message', '')}".rstrip() if status else cause(error)
