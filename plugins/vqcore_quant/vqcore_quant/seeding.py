"""Codes that are made from latents: the first codes of a codebook, and replacements of dead codes.

k-means: see `kmeans.py`. Splitting: Linde, Buzo and Gray, "An algorithm for vector quantizer design" (1980).
`first_codes` and `revived` are custom operators, which `torch.compile` does not trace, because they branch on the
values of tensors. Both are pure functions: they return the new codes. All processes must call them; all processes
get the same codes.
"""

import logging

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vqcore import dist
from vqcore_quant.draws import draw_rows, shared_generator
from vqcore_quant.kmeans import kmeans
from vqcore_quant.operators import operator

log = logging.getLogger(__name__)

_SPLIT_NOISE = 5e-6
"""Relative distance of a split code from its source: just above fp32 resolution, so that both get latents."""


@torch.no_grad()
def first_codes(
    rows: Float[Tensor, "n d"],
    mask: Bool[Tensor, " n"] | None,
    embed: Float[Tensor, "k d"],
    cluster_size: Float[Tensor, " k"],
    initted: Float[Tensor, "1"],
    *,
    iters: int,
    cosine: bool,
    chunk_mib: float,
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"], Float[Tensor, "1"]]:
    """Return codes, cluster sizes and `initted` = 1 from k-means over the valid rows of all processes.

    All three are returned unchanged if `initted` is already 1, if there is no valid row, or if a valid row is not
    finite. With fewer rows than codes some codes start as copies without latents, so that they count as dead; then a
    warning is logged.
    """
    return _first_codes_op(rows, mask, embed, cluster_size, initted, iters, cosine, chunk_mib)


@torch.no_grad()
def revived(
    embed: Float[Tensor, "k d"],
    cluster_size: Float[Tensor, " k"],
    dead: Bool[Tensor, " k"],
    rows: Float[Tensor, "n d"],
    mask: Bool[Tensor, " n"] | None,
    *,
    policy: str,
    cosine: bool,
) -> Float[Tensor, "k d"]:
    """The codes, with dead codes replaced by valid rows (`batch_random`) or by near copies of frequently used codes."""
    return _revived_op(embed, cluster_size, dead, rows, mask, policy, cosine)


def _first_codes(
    rows: Tensor,
    mask: Tensor | None,
    embed: Tensor,
    cluster_size: Tensor,
    initted: Tensor,
    iters: int,
    cosine: bool,
    chunk_mib: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if initted:
        return embed.clone(), cluster_size.clone(), initted.clone()
    rows = rows if mask is None else rows[mask]
    k, held = len(embed), sum(dist.all_counts(len(rows), rows.device))
    if not held or dist.sum_((~rows.isfinite()).sum()):
        return embed.clone(), cluster_size.clone(), initted.clone()
    if held < k and dist.is_main():
        log.warning(
            "k-means initialises %d codes from only %d latents: %d codes start as copies. "
            "Use a larger first batch or a smaller codebook.",
            k,
            held,
            k - held,
        )
    means, counts = kmeans(rows, k, iters, cosine=cosine, generator=shared_generator(), chunk_mib=chunk_mib)
    return means, counts, torch.ones_like(initted)


_first_codes_op = operator(
    "first_codes",
    _first_codes,
    fake=lambda rows, mask, *state_and_settings: tuple(torch.empty_like(x) for x in state_and_settings[:3]),
)


def _revived(
    embed: Tensor,
    cluster_size: Tensor,
    dead: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    policy: str,
    cosine: bool,
) -> Tensor:
    fresh, count = embed.clone(), int(dead.sum())
    if count and policy == "batch_random":
        fresh[dead] = draw_rows(rows if mask is None else rows[mask], count, shared_generator())
    elif count:
        split = _split(embed, cluster_size, count, shared_generator())
        fresh[dead] = F.normalize(split, dim=-1) if cosine else split
    return fresh


_revived_op = operator("revived", _revived, fake=lambda embed, *_: torch.empty_like(embed))


def _split(
    embed: Float[Tensor, "k d"], cluster_size: Float[Tensor, " k"], count: int, generator: torch.Generator
) -> Float[Tensor, "{count} d"]:
    """Near copies of the most frequently used codes, in turn; sources are codes that are not dead, if there are any."""
    order = cluster_size.argsort(descending=True, stable=True)[: max(1, len(embed) - count)]
    source = embed[order[torch.arange(count, device=order.device) % len(order)]]
    noise = torch.randn(source.shape, generator=generator).to(source.device)
    return source + noise * _SPLIT_NOISE * source.square().mean().sqrt()
