"""Samples as they were read, kept in memory up to a limit: files that fit are decoded once a process."""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


class Cache:
    """Keeps what a function of a key returned, the first ones that fit into `mib` MiB.

    Nothing is ever thrown out: passes over a shuffled set visit every sample equally often, so that the newest one is
    no better a guess than the first. What is kept must not be changed by its users.
    """

    def __init__(self, mib: float):
        self.room = round(mib * 2**20)
        self.kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under a key, or a new one."""
        if key in self.kept:
            return self.kept[key]
        value = make()
        size = _bytes(value)
        if size is not None and size <= self.room:
            self.kept[key] = value
            self.room -= size
        return value


def _bytes(value: Any) -> int | None:
    """Memory of what a modality's `read` returns; None where it cannot be told."""
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
