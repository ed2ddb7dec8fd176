"""Bytes that readers want as files: a few are lent at a time, in a folder of the process that ends with the process."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from vqcore.files import lay, scratch

KEPT = 16
"""So many files are lent at a time, in each process."""


class _Lent:
    """Every process has a folder of its own."""

    def __init__(self) -> None:
        self._process, self._root = -1, ""
        self._kept = OrderedDict[str, Path]()

    def __call__(self, name: str, content: Callable[[], bytes]) -> Path:
        """A file with this name and content, which stays for the next `KEPT` files that this process asks for."""
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
