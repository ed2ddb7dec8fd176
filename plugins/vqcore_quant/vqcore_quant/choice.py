"""A hard choice of the code with the best score, with the gradient of a softmax; scores are computed chunk by chunk.

The backward pass computes the scores of each chunk again (`torch.utils.checkpoint`), so autograd stores no matrix of
rows x codes and memory does not grow with rows x codes.
Axes: n rows, d width of a row, k codes, e width of a code.
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
    """Choose like `hard_choice`, with the gradient of the softmax-weighted mean of `values` at the logits."""
    value, codes = hard_choice(logits, values)
    soft = logits.softmax(-1)
    return value + (soft - soft.detach()) @ values.detach(), codes


def hard_choice(
    logits: Float[Tensor, "n k"], values: Float[Tensor, "k e"]
) -> tuple[Float[Tensor, "n e"], Int[Tensor, " n"]]:
    """Return each row's best code and the value of this code; a row with NaN gets some code that is in range."""
    codes = logits.detach().nan_to_num(nan=-torch.inf).argmax(-1)
    return F.embedding(codes, values), codes


def gumbel_noise(like: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Standard Gumbel noise from the global random generator."""
    return -torch.empty_like(like).exponential_().log()


def in_chunks(
    choose: Callable[..., tuple[Tensor, Tensor]],
    rows: Float[Tensor, "n d"],
    *others: Tensor,
    width: int,
    chunk_mib: float,
) -> tuple[Float[Tensor, "n e"], Int[Tensor, " n"]]:
    """Call `choose(part, *others)` on parts of `rows`, and concatenate the results.

    A part has as many rows as fit into `chunk_mib` MiB with `width` scores per row. The backward pass computes the
    intermediate results of `choose` again instead of keeping them in memory. An exported program takes all rows in one
    part, because its batch size is not fixed.
    """
    if torch.compiler.is_exporting():
        return choose(rows, *others)
    parts = rows.split(rows_within(chunk_mib, width))
    if torch.is_grad_enabled():
        found = [checkpoint(choose, part, *others, use_reentrant=False) for part in parts]
    else:
        found = [choose(part, *others) for part in parts]
    return torch.cat([values for values, _ in found]), torch.cat([codes for _, codes in found])
