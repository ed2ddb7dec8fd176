"""What a quantizer of any codebook size reports of a step: how evenly codes are used, how far latents lie from them.

Shapes depend on no value, so nothing here breaks a graph under torch.compile; memory is that of the codes.
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
    """All that a quantizer without a state of its own can say of a step; `compared` is what latents `z` became.

    In training of all processes together but for `codes/distance` and `latents/rms`; every process must call.
    """
    metrics = code_metrics(codes, valid, codebook_size, training=training)
    metrics |= latent_metrics(z, compared, z_q, valid)
    return metrics | {"codes/nonfinite": count_nonfinite(z, valid, everywhere=training)}


def code_metrics(
    codes: Int[Tensor, "b *grid q"], valid: Bool[Tensor, "b *grid"], codebook_size: int, *, training: bool
) -> dict[str, Float[Tensor, ""]]:
    """Compute perplexity, usage (share) and entropy (bits) of the valid codes, each a mean over codebooks.

    In training of the codes of all processes together; every process must call.
    """
    rows = torch.where(valid.unsqueeze(-1), codes, -1)
    columns = rearrange(_of_all_processes(rows) if training else rows, "b ... q -> q (b ...)")
    return usage_metrics(torch.stack([occurrences(column) for column in columns]), codebook_size)


def occurrences(codes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Count each distinct code, in ascending order, then zeros; codes below 0 count as none."""
    ordered = codes.sort().values
    group = (torch.diff(ordered, prepend=ordered.new_full((1,), -2)) != 0).cumsum(0) - 1
    return torch.zeros_like(ordered, dtype=torch.float32).index_add_(0, group, (ordered >= 0).float())


def latent_metrics(
    z: Float[Tensor, "b *grid d"],
    compared: Float[Tensor, "b *grid d"],
    z_q: Float[Tensor, "b *grid d"],
    valid: Bool[Tensor, "b *grid"],
) -> dict[str, Float[Tensor, ""]]:
    """Compute the root mean square of valid latents, and the mean squared distance of what they became to their codes.

    The first is not finite if a valid latent is not.
    """
    return {
        "latents/rms": valid_mean(z.detach().float().square(), valid).sqrt(),
        "codes/distance": distance(compared.detach(), z_q.detach(), valid),
    }


def entropies_in_bits(token: Float[Tensor, ""], codebook: Float[Tensor, ""]) -> dict[str, Float[Tensor, ""]]:
    """Name the entropy of a token's assignment and that of the mean assignment, given in nats."""
    bits = torch.stack([token, codebook]).detach() / math.log(2)
    return {"entropy/token": bits[0], "entropy/codebook": bits[1]}


def validity(z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None) -> Bool[Tensor, "b *grid"]:
    """`mask`, or True everywhere."""
    return torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if mask is None else mask


def only(x: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]) -> Float[Tensor, "b *grid d"]:
    """`x` with 0 at positions that are not valid, so that nothing there reaches a loss or a gradient."""
    return torch.where(valid.unsqueeze(-1), x, 0.0)


def valid_mean(x: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]) -> Float[Tensor, ""]:
    """Mean over valid positions and channels; 0 if there are none."""
    return only(x, valid).sum() / (valid.sum() * x.shape[-1]).clamp(min=1)


def distance(
    x: Float[Tensor, "b *grid d"], y: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]
) -> Float[Tensor, ""]:
    """Mean squared difference over valid positions and channels; 0 if there are none."""
    return valid_mean((only(x, valid) - only(y, valid)).square(), valid)


def mean_of_all(
    total: Float[Tensor, "*shape"], count: Float[Tensor, ""], *, training: bool
) -> Float[Tensor, "*shape"]:
    """`total / count` summed over all processes in training; the average of their gradients is its gradient.

    (Averaging gradients is what DDP does.) In evaluation this process's own. Every process must call.
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
