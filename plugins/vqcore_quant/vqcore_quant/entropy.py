"""Two entropies with gradients and without an N x K matrix: certainty of each latent's code, and even use of all codes.

Paper: "Language Model Beats Diffusion - Tokenizer is Key to Visual Generation", arXiv 2310.05737, equation 6: with
p_i the softmax of the scores of latent i, mean_i H(p_i) should be small and H(mean_i p_i) should be large.
Differs from the paper: the means are over all processes; the backward pass computes the scores again, chunk by chunk,
instead of keeping the scores in memory.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vqcore import dist
from vqcore_quant.assignment import rows_within
from vqcore_quant.operators import differentiable, operator

_BUFFERS = 4
"""Number of matrices of the size of a chunk that exist at the same time."""


def entropies(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "k d"],
    bias: Float[Tensor, " k"],
    mask: Bool[Tensor, " n"] | None = None,
    *,
    chunk_mib: float = 8.0,
    everywhere: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean entropy of a row's softmax over `queries @ keys.T + bias`, and entropy of the mean softmax, in nats.

    `mask` is True for rows that count; both results are 0 if no row counts. `everywhere`: the means are over the rows
    of all processes; then every process must call this function, and the gradient is the average of the gradients of
    the processes.
    """
    weight = queries.new_ones(queries.shape[0]) if mask is None else mask.to(queries.dtype)
    sample, batch, _, _ = _entropies_op(queries, keys, bias, weight, chunk_mib, everywhere)
    return sample, batch


def _entropies(
    queries: Tensor, keys: Tensor, bias: Tensor, weight: Tensor, chunk_mib: float, everywhere: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sample, share = queries.new_zeros(()), torch.zeros_like(bias)
    chunk = rows_within(chunk_mib, _BUFFERS * len(keys))
    for part, valid in zip(queries.split(chunk), weight.split(chunk), strict=True):
        _, probs, own = _softmax(part, keys, bias)
        sample = sample + torch.where(valid > 0, own, 0).sum()
        share.addmv_(probs.nan_to_num_().T, valid)
    both = torch.cat([share, torch.stack([sample, weight.sum()])])
    if everywhere:
        dist.sum_(both)
    total = both[-1].clamp(min=1)
    share = both[:-2] / total
    scale = (dist.world_size() if everywhere else 1) / total
    return both[-2] / total, -torch.xlogy(share, share).sum(), share, scale


_entropies_op = operator(
    "entropies",
    _entropies,
    fake=lambda queries, keys, bias, *_: (
        queries.new_empty(()),
        queries.new_empty(()),
        torch.empty_like(bias),
        queries.new_empty(()),
    ),
)


def _entropies_backward(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    weight: Tensor,
    share: Tensor,
    scale: Tensor,
    chunk_mib: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at queries, keys and bias. `scale` is the gradient at each entropy divided by the number of rows."""
    log_share = share.clamp(min=torch.finfo(share.dtype).tiny).log()
    to_queries, to_keys, to_bias = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(bias)
    chunk = rows_within(chunk_mib, _BUFFERS * len(keys))
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        logs, probs, own = _softmax(part, keys, bias)
        even = probs @ log_share
        slope = logs.add_(own.unsqueeze(1)).mul_(-scale[0])
        slope.sub_(scale[1] * log_share).add_((scale[1] * even).unsqueeze(1))
        slope.mul_(probs).mul_(weight[start : start + chunk].unsqueeze(1))
        to_queries[start : start + chunk] = slope @ keys
        to_keys.addmm_(slope.T, part)
        to_bias.add_(slope.sum(0))
    return to_queries, to_keys, to_bias


_entropies_backward_op = operator(
    "entropies_backward", _entropies_backward, fake=lambda *inputs: tuple(map(torch.empty_like, inputs[:3]))
)


def _softmax(part: Tensor, keys: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, probabilities and entropy of each row."""
    logs = torch.addmm(bias, part, keys.T).log_softmax(1)
    probs = logs.exp()
    return logs, probs, -torch.einsum("nk,nk->n", probs, logs)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk_mib, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, sample: Tensor, batch: Tensor, _share: Tensor, _scale: Tensor) -> tuple[Any, ...]:
    *inputs, share, scale = ctx.saved_tensors
    scale = scale * torch.stack([sample, batch])
    with torch.autocast(share.device.type, enabled=False):  # backward may be called inside another autocast
        return *_entropies_backward_op(*inputs, share, scale, ctx.chunk_mib), None, None, None


differentiable("entropies", _backward, _remember)
