"""Everything that says torch.distributed. Rank and world size are read when they are used, never kept."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqcore.errors import RunError, VqcoreError

T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Is this the process that writes files and talks? Also before the group is joined and after it is left."""
    return (rank() if _active() else int(os.environ.get("RANK", "0"))) == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that torchrun announced and leave it at the end: gloo for CPU tensors, nccl for CUDA's."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, own_rank, size = next(dist.rendezvous("env://"))
    # Where torchrun starts processes again, its store still holds the addresses of the dead ones.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        backend, store=store, rank=own_rank, world_size=size, timeout=timedelta(minutes=30)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def sum_(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def shared_seed() -> int:
    """A seed drawn from this process's global generator on rank 0 and known to all."""
    seed = torch.randint(2**62, ())
    if world_size() > 1:
        dist.broadcast(seed, 0)
    return int(seed)


def all_counts(count: int, device: torch.device) -> list[int]:
    """Every process's `count`, in the order of ranks."""
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = count
    return sum_(counts).tolist()


def sum_dicts(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums by name over all processes, which need not all have the same names; on the CPU, in float64."""
    own = {name: value.detach().cpu().double() for name, value in sums.items()}
    if world_size() == 1:
        return own
    gathered: list[dict[str, Tensor]] = [{} for _ in range(world_size())]
    dist.all_gather_object(gathered, own)
    total: dict[str, Tensor] = {}
    for part in gathered:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def any_(*flags: bool) -> tuple[bool, ...]:
    """Which of these flags are set on any process: the same answer everywhere."""
    if world_size() == 1:
        return flags
    counts = sum_(torch.tensor(flags, dtype=torch.int32))
    return tuple(bool(count) for count in counts)


def max_(tensor: Tensor) -> Tensor:
    """Largest value over all processes, element by element, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of ranks; for small things that pickle, on rare occasions."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Let all processes pass the end of this block or none: what one finds wrong is raised in all of them.

    Inside, no process may wait for another. The first process that found something says so (`VqcoreError.elsewhere`);
    a bug's traceback is that of its own process.
    """
    own: VqcoreError | None = None
    bug: Exception | None = None
    try:
        yield
    except VqcoreError as error:
        own = error
    except Exception as error:
        bug, own = error, RunError(f"process {rank()} ended with {type(error).__name__}: {error}")
    found = gathered(own)
    if bug is not None:
        raise bug
    first = next((number for number, error in enumerate(found) if error is not None), None)
    if first is None:
        return
    if own is not None and first == rank():
        raise own
    theirs = found[first]
    assert theirs is not None
    theirs.elsewhere = True
    raise theirs


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
