"""All use of torch.distributed. Rank and world size are read when they are needed and are never stored."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqcore.errors import RunError, VqcoreError

T = TypeVar("T")


def rank() -> int:
    """The number of this process; 0 without a process group."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """The number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Whether this process (rank 0) writes files and prints. Also valid before joining the group and after leaving."""
    return (rank() if _active() else int(os.environ.get("RANK", "0"))) == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join torchrun's process group and leave the group at the end: gloo for CPU tensors, nccl for CUDA tensors."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, own_rank, size = next(dist.rendezvous("env://"))
    # After a restart by torchrun, the store still holds the addresses of the dead processes: use another prefix.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        backend, store=store, rank=own_rank, world_size=size, timeout=timedelta(minutes=30)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share() -> tuple[int, int]:
    """Which of how many processes this is that share a work without talking to each other.

    It counts those of torchrun, or those of a step of Slurm, and times them the tasks of a Slurm array.
    """

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    if "WORLD_SIZE" in os.environ:
        own, size = number("RANK", 0), number("WORLD_SIZE", 1)
    else:  # SLURM_NTASKS also stands where one process runs alone, outside srun
        size = number("SLURM_STEP_NUM_TASKS", 1)
        own = number("SLURM_PROCID", 0) if size > 1 else 0
    step = number("SLURM_ARRAY_TASK_STEP", 1)
    task = (number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)) // step
    return task * size + own, number("SLURM_ARRAY_TASK_COUNT", 1) * size


def sum_(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values of rank 0, in place; one message for all tensors of a type and device."""
    if world_size() == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
        dist.broadcast(flat, 0)
        for tensor, value in zip(group, flat.split([tensor.numel() for tensor in group])):
            tensor.detach().copy_(value.view_as(tensor))


def shared_seed() -> int:
    """A seed drawn from the global generator of rank 0, the same in all processes."""
    seed = torch.randint(2**62, ())
    if world_size() > 1:
        dist.broadcast(seed, 0)
    return int(seed)


def all_counts(count: int, device: torch.device) -> list[int]:
    """The `count` of every process, in the order of ranks."""
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = count
    return sum_(counts).tolist()


def sum_dicts(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums by name over all processes, on the CPU in float64. The processes may have different names.

    The numbers travel as one tensor; only names and shapes are pickled.
    """
    own = {name: value.detach().cpu().double() for name, value in sums.items()}
    if world_size() == 1:
        return own
    shapes: dict[str, tuple[int, ...]] = {}
    for part in gathered({name: tuple(value.shape) for name, value in own.items()}):
        for name, shape in part.items():
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(f"the processes have different shapes of '{name}': {shapes[name]}, {shape}")
    flat = torch.zeros(sum(map(math.prod, shapes.values())), dtype=torch.float64)
    pieces = flat.split([math.prod(shape) for shape in shapes.values()])
    total = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces)}
    for name, value in own.items():
        total[name].copy_(value)
    sum_(flat)
    return total


def joined(rows: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Tensors by name of all processes, joined along the first axis in the order of ranks: on rank 0, else None.

    All tensors are on the CPU. The processes may have different names; axes other than the first have one size.
    """
    if world_size() == 1:
        return dict(rows)
    parts = gathered({name: (tuple(value.shape), value.dtype) for name, value in rows.items()})
    if rank() != 0:
        for value in rows.values():
            if value.numel():
                dist.send(value.contiguous(), 0)
        return None
    lengths: dict[str, int] = {}
    for part in parts:
        for name, (shape, _) in part.items():
            lengths[name] = lengths.get(name, 0) + shape[0]
    whole, filled = dict[str, Tensor](), dict.fromkeys(lengths, 0)
    for other, part in enumerate(parts):
        for name, (shape, dtype) in part.items():
            target = whole.setdefault(name, torch.empty(lengths[name], *shape[1:], dtype=dtype))
            piece = target[filled[name] : filled[name] + shape[0]]
            filled[name] += shape[0]
            if other == 0:
                piece.copy_(rows[name])
            elif piece.numel():
                dist.recv(piece, other)
    return whole


def from_main(value: T | None) -> T:
    """The value that rank 0 gives, in all processes. Only for small values."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]  # type: ignore[return-value]


def any_(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether any process has set it; all processes get the same answer."""
    if world_size() == 1:
        return flags
    counts = sum_(torch.tensor(flags, dtype=torch.int32))
    return tuple(bool(count) for count in counts)


def max_(tensor: Tensor) -> Tensor:
    """Maximum over all processes, element by element, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gathered(value: T) -> list[T]:
    """The value of every process, in the order of ranks. Only for small values, since pickling is slow."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """If one process fails inside this block, raise an error in all processes at the end of the block.

    Inside the block, no process may wait for another. Of the processes with a `VqcoreError`, the lowest rank prints the
    message (`VqcoreError.elsewhere` is True in the others). A process with a bug raises its own exception.
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
