"""Peak memory of a training step, foretold from two small ones.

Every allocation of a step is noted with the bytes alive after it. Two steps with batches of one and two samples make
the same allocations in the same order, and each moment's bytes are linear in the batch; so each moment is extrapolated
by itself and the highest one is the answer. (Extrapolating the two peaks alone fails where a small step peaks in the
optimizer and a large one in its activations.)
"""

import functools
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Peak:
    """Bytes a step needs: `held` before it begins (weights, averages, optimizer), `total` at its highest moment."""

    held: int
    total: int


class Ledger(TorchDispatchMode):
    """Notes, after each new tensor, the bytes of the tensors that were made while it is active and are still alive.

    It sees every tensor of every operator, forward and backward; not what a kernel or a custom operator needs inside,
    nor the holes that the allocator keeps: malloc takes up to twice as much for many small tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.moments = 0, [0]
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(Tensor, lambda given: self._note(given, 0), (args, kwargs or {}))
        made = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, lambda new: self._note(new, new.untyped_storage().nbytes()), made)

    def _note(self, tensor: Tensor, size: int) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.ref(storage, functools.partial(self._forget, key, size))
            if size:
                self.alive += size
                self.moments.append(self.alive)
        return tensor

    def _forget(self, key: int, size: int, _: weakref.ref) -> None:
        del self._known[key]
        self.alive -= size


def foretell(step: Callable[[int], object], batch: int, device: torch.device) -> Peak:
    """The peak of `step(batch)`, from calls of `step(1)` (the first one warms up) and `step(2)`."""
    step(1)
    if device.type == "cuda":
        return _foretell_cuda(step, batch, device)
    held = _held()
    one, two = _moments(step, 1), _moments(step, 2)
    if len(one) != len(
        two
    ):  # other kernels, or data that decide what is done: only the peaks can be compared
        one, two = [max(one)], [max(two)]
    return Peak(
        held, held + max(first + (batch - 1) * max(0, second - first) for first, second in zip(one, two))
    )


def available(device: torch.device) -> int:
    """Bytes this process may still use: of the GPU, or of the machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").is_file() else "max"
    if limit != "max":
        free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return free


def _moments(step: Callable[[int], object], batch: int) -> list[int]:
    with Ledger() as ledger:
        step(batch)
    return ledger.moments


def _held() -> int:
    """Bytes of all tensors that are alive."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _foretell_cuda(step: Callable[[int], object], batch: int, device: torch.device) -> Peak:
    held, peaks = torch.cuda.memory_allocated(device), []
    for size in (1, 2):
        torch.cuda.reset_peak_memory_stats(device)
        step(size)
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device))
    return Peak(held, peaks[0] + (batch - 1) * max(0, peaks[1] - peaks[0]))
