"""Metrics of one step of any quantizer: how evenly codes are used, and the distance of latents to their codes.

No shape depends on a tensor's values, so there are no graph breaks under torch.compile. Memory grows with the number
of codes in the batch, and not with the codebook size.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqcore import dist
from vqcore_quant.codes import count_nonfinite, usage_metrics


def step_metrics(
    z: Float[Tensor, "b *grid d"],
    compared: Float[Tensor, "b *grid d"],
    z_q: Float[Tensor, "b *grid d"],
    codes: Int[Tensor, "b *grid q"],
    valid: Bool[Tensor, "b *grid"],
    codebook_size: int,
    *,
    training: bool,
) -> dict[str, Float[Tensor, ""]]:
    """All metrics of one step that need no state. `compared` are the latents `z` after the quantizer's own transform.

    In training the metrics cover all processes, except `codes/distance` and `latents/rms`, which cover this process.
    Every process must call this function.
    """
    metrics = code_metrics(codes, valid, codebook_size, training=training)
    metrics |= latent_metrics(z, compared, z_q, valid)
    return metrics | {"codes/nonfinite": count_nonfinite(z, valid, everywhere=training)}


def code_metrics(
    codes: Int[Tensor, "b *grid q"], valid: Bool[Tensor, "b *grid"], codebook_size: int, *, training: bool
) -> dict[str, Float[Tensor, ""]]:
    """Compute perplexity, usage (share) and entropy (bits) of the valid codes, each a mean over codebooks.

    In training the codes of all processes count together; every process must call this function.
    """
    rows = torch.where(valid.unsqueeze(-1), codes, -1)
    columns = rearrange(_of_all_processes(rows) if training else rows, "b ... q -> q (b ...)")
    return usage_metrics(torch.stack([occurrences(column) for column in columns]), codebook_size)


def occurrences(codes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Counts of the distinct codes in ascending order, followed by zeros. Codes below 0 are not counted."""
    ordered = codes.sort().values
    group = (torch.diff(ordered, prepend=ordered.new_full((1,), -2)) != 0).cumsum(0) - 1
    return torch.zeros_like(ordered, dtype=torch.float32).index_add_(0, group, (ordered >= 0).float())


def latent_metrics(
    z: Float[Tensor, "b *grid d"],
    compared: Float[Tensor, "b *grid d"],
    z_q: Float[Tensor, "b *grid d"],
    valid: Bool[Tensor, "b *grid"],
) -> dict[str, Float[Tensor, ""]]:
    """Compute the root mean square of valid latents `z`, and the mean squared distance of `compared` to `z_q`.

    The root mean square is not finite if a valid latent is not finite.
    """
    return {
        "latents/rms": valid_mean(z.detach().float().square(), valid).sqrt(),
        "codes/distance": distance(compared.detach(), z_q.detach(), valid),
    }


def entropies_in_bits(token: Float[Tensor, ""], codebook: Float[Tensor, ""]) -> dict[str, Float[Tensor, ""]]:
    """Metrics in bits, from nats: the entropy of one token's assignment, and the entropy of the mean assignment."""
    bits = torch.stack([token, codebook]).detach() / math.log(2)
    return {"entropy/token": bits[0], "entropy/codebook": bits[1]}


def validity(z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None) -> Bool[Tensor, "b *grid"]:
    """`mask`, or True at every position if `mask` is None."""
    return torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if mask is None else mask


def only(x: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]) -> Float[Tensor, "b *grid d"]:
    """`x` with 0 at invalid positions, so that invalid positions reach no loss and no gradient."""
    return torch.where(valid.unsqueeze(-1), x, 0.0)


def valid_mean(x: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]) -> Float[Tensor, ""]:
    """Mean over valid positions and channels; 0 if there are no valid positions."""
    return only(x, valid).sum() / (valid.sum() * x.shape[-1]).clamp(min=1)


def distance(
    x: Float[Tensor, "b *grid d"], y: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]
) -> Float[Tensor, ""]:
    """Mean squared difference over valid positions and channels; 0 if there are no valid positions."""
    return valid_mean((only(x, valid) - only(y, valid)).square(), valid)


def mean_of_all(
    total: Float[Tensor, "*shape"], count: Float[Tensor, ""], *, training: bool
) -> Float[Tensor, "*shape"]:
    """In training: the sum of `total` over all processes divided by the sum of `count` over all processes.

    The gradients are scaled so that their average over the processes (DDP averages gradients) is the gradient of this
    quotient. In evaluation: `total / count` of this process. Every process must call this function.
    """
    world = dist.world_size() if training else 1
    if world == 1:
        return total / count.clamp(min=1)
    totals, counts = dist.sum_(total.detach().clone()), dist.sum_(count.detach().clone()).clamp(min=1)
    return totals / counts + world * (total - total.detach()) / counts


def _of_all_processes(rows: Int[Tensor, "b *grid q"]) -> Int[Tensor, "_ *grid q"]:
    if dist.world_size() == 1:
        return rows
    held = dist.all_counts(len(rows), rows.device)
    gathered = rows.new_zeros(sum(held), *rows.shape[1:])
    start = sum(held[: dist.rank()])
    gathered[start : start + len(rows)] = rows
    return dist.sum_(gathered)
