"""Bytes out of larger files, for readers: in memory, or, for readers that want a path, as a file that is lent.

A few files are lent at a time, in a folder that ends with the process.
"""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from vqcore.files import lay, scratch

KEPT = 16
"""So many files are lent at a time, in each thread."""


class Content(io.BytesIO):
    """What a file would hold. `name` says where it lies, for people; `file` is its name where it is lent as a file."""

    def __init__(self, content: bytes, name: str, file: str):
        super().__init__(content)
        self.name, self.file = name, file

    def for_reader(self, streams: tuple[str, ...]) -> "Content | Path":
        """The content itself for a reader of streams with one of these suffixes, else a file that is lent."""
        return self if self.file.lower().endswith(streams) else self.as_file()

    def as_file(self) -> Path:
        """A file that is lent."""
        return lent(self.file, self.getvalue)


class _Lent(threading.local):
    """Every thread has a folder of its own, because it may read a file while others ask for more."""

    def __init__(self) -> None:
        self._process, self._root = -1, ""
        self._kept = OrderedDict[str, Path]()

    def __call__(self, name: str, content: Callable[[], bytes]) -> Path:
        """A file with this name and content, which stays for the next `KEPT` files that this thread asks for."""
        if self._process != os.getpid():
            self._process, self._root, self._kept = os.getpid(), str(scratch()), OrderedDict()
        path = self._kept.get(name)
        if path is not None:
            self._kept.move_to_end(name)
            return path
        path = Path(f"{self._root}/{name}")
        lay(path, content())
        self._kept[name] = path
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)[1].unlink(missing_ok=True)
        return path


lent = _Lent()
