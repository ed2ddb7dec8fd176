"""A hard choice among codes by their scores, with the gradient of the soft one; scores exist for a few rows at a time.

The backward pass computes the scores of each chunk again (`torch.utils.checkpoint`), so memory grows neither with
rows x codes nor with what autograd keeps.
Axes: n rows, d their width, k codes, e a code's width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vqcore_quant.assignment import rows_within


def soft_choice(
    logits: Float[Tensor, "n k"], values: Float[Tensor, "k e"]
) -> tuple[Float[Tensor, "n e"], Int[Tensor, " n"]]:
    """Choose like `hard_choice`; the gradient at the logits is that of the softmax's mean value."""
    value, codes = hard_choice(logits, values)
    soft = logits.softmax(-1)
    return value + (soft - soft.detach()) @ values.detach(), codes


def hard_choice(
    logits: Float[Tensor, "n k"], values: Float[Tensor, "k e"]
) -> tuple[Float[Tensor, "n e"], Int[Tensor, " n"]]:
    """Give the value of each row's best code, and that code; a row with NaN gets some code in range."""
    codes = logits.detach().nan_to_num(nan=-torch.inf).argmax(-1)
    return F.embedding(codes, values), codes


def gumbel_noise(like: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Standard Gumbel noise from the global generator."""
    return -torch.empty_like(like).exponential_().log()


def in_chunks(
    choose: Callable[..., tuple[Tensor, Tensor]],
    rows: Float[Tensor, "n d"],
    *others: Tensor,
    width: int,
    chunk_mib: float,
) -> tuple[Float[Tensor, "n e"], Int[Tensor, " n"]]:
    """Call `choose(part, *others)` on parts of `rows` whose `width` scores a row fit into `chunk_mib` MiB; join.

    What `choose` computes on the way is computed again in the backward pass instead of kept. An exported program,
    whose batch is of any size, asks for all rows at once.
    """
    if torch.compiler.is_exporting():
        return choose(rows, *others)
    parts = rows.split(rows_within(chunk_mib, width))
    if torch.is_grad_enabled():
        found = [checkpoint(choose, part, *others, use_reentrant=False) for part in parts]
    else:
        found = [choose(part, *others) for part in parts]
    return torch.cat([values for values, _ in found]), torch.cat([codes for _, codes in found])
