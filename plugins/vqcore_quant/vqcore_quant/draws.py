"""Random rows of all processes: every process gets the same rows, as if one process held all of them."""

import torch
from jaxtyping import Float
from torch import Tensor

from vqcore import dist


def shared_generator() -> torch.Generator:
    """A CPU generator in the same state on every process. Its seed is one draw of rank 0's global generator."""
    return torch.Generator().manual_seed(dist.shared_seed())


def draw_rows(
    rows: Float[Tensor, "n d"], count: int, generator: torch.Generator
) -> Float[Tensor, "{count} d"]:
    """Draw `count` rows of all processes, without repetition; from fewer rows, each row equally often (+-1).

    `generator` is on the CPU and in the same state on every process. Every process must call this function, and at
    least one process must have a row.
    """
    held = dist.all_counts(len(rows), rows.device)
    order = torch.randperm(sum(held), generator=generator)
    positions = order[torch.arange(count) % len(order)].to(rows.device) - sum(held[: dist.rank()])
    mine = (positions >= 0) & (positions < len(rows))
    drawn = rows.new_zeros(count, rows.shape[1])
    drawn[mine] = rows[positions[mine]]
    return dist.sum_(drawn)
