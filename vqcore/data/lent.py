"""Bytes that readers want as files: a few are lent at a time, in a folder that ends with the process."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from vqcore.files import lay, scratch

KEPT = 16
"""So many files are lent at a time, in each thread."""


class _Lent(threading.local):
    """Every thread has a folder of its own, because it may read a file while others ask for more."""

    def __init__(self) -> None:
        self._process, self._kept = -1, OrderedDict[Path, None]()
        self._root = Path()

    def __call__(self, name: Path, content: Callable[[], bytes]) -> Path:
        """A file with this name and content, which stays for the next `KEPT` files that this thread asks for."""
        if self._process != os.getpid():
            self._process, self._kept, self._root = os.getpid(), OrderedDict(), scratch()
        path = self._root / name
        if path in self._kept:
            self._kept.move_to_end(path)
            return path
        held = content()
        lay(path, held)
        self._kept[path] = None
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)[0].unlink(missing_ok=True)
        return path


lent = _Lent()
