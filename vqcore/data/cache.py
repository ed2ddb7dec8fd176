"""Keeps samples as read from their files in memory, up to a limit; a process decodes each cached file once."""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


class Cache:
    """Keeps values by key: the first values that fit into `mib` MiB.

    No value is ever removed: passes over a shuffled data set use every sample equally often, so a new sample is not
    needed sooner than an old one. The caller must not change a value.
    """

    def __init__(self, mib: float):
        self.room = round(mib * 2**20)
        self.kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key. A value that is not in the cache is made with `make`, and kept if it fits."""
        if key in self.kept:
            return self.kept[key]
        value = make()
        size = _bytes(value)
        if size is not None and size <= self.room:
            self.kept[key] = value
            self.room -= size
        return value


def _bytes(value: Any) -> int | None:
    """The memory in bytes of a value that `Modality.read` has returned; None if the memory is not known."""
    if isinstance(value, np.memmap):  # the system keeps what was read, and a map costs a file handle
        return None
    if isinstance(value, (np.ndarray, Tensor)):
        return int(value.nbytes)
    if isinstance(value, (int, float)):
        return 8
    if isinstance(value, Image.Image):
        return value.width * value.height * len(value.getbands()) * (4 if value.mode in ("I", "F") else 1)
    if isinstance(value, (tuple, list)):
        sizes = [_bytes(one) for one in value]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    return None
