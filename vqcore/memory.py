"""Refuses parts that no memory holds while they are built, before their memory is touched."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from vqcore.errors import in_bytes, no_memory

MOST_TENSORS = 20_000
"""Parameters of one component. More of them come from a slip in a setting such as `depth`, and take hours to build."""
_BY_SIZE = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)


class TooLarge(ValueError):
    """A part needs more memory than this machine has; the text says how much."""


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


@contextmanager
def within_memory() -> Iterator[None]:
    """Raise `TooLarge` if what is built inside the block needs more memory than this machine has."""
    most, taken, count = machine_memory(), 0, 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal taken, count
        if parameter is not None and parameter.device.type != "meta":
            taken, count = taken + parameter.numel() * parameter.element_size(), count + 1
        if taken > most:
            raise TooLarge(_text(taken, most))
        if count > MOST_TENSORS:
            raise TooLarge(f"it would have more than {MOST_TENSORS:,} tensors")

    handle = register_module_parameter_registration_hook(add)
    try:
        with _Sizes(most):
            yield
    except (MemoryError, RuntimeError, TypeError) as error:
        if text := no_memory(error):
            raise TooLarge(text) from error
        raise
    finally:
        handle.remove()


class _Sizes(TorchFunctionMode):
    """Looks at the size of each tensor before it is made: the system may grant more than it has, and then end us."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, unless it makes a tensor that is too large."""
        kwargs = kwargs or {}
        if func in _BY_SIZE:
            size = args[0] if args and not isinstance(args[0], int) else kwargs.get("size", args)
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            needed = math.prod(int(side) for side in size) * dtype.itemsize
            if needed > self.most and str(kwargs.get("device")) != "meta":
                raise TooLarge(_text(needed, self.most))
        return func(*args, **kwargs)


def _text(needed: int, most: int) -> str:
    return f"it needs at least {in_bytes(needed)} of memory, and this machine has {in_bytes(most)}"
