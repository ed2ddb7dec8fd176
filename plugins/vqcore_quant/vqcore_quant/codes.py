"""For the codes of every quantizer: the check of their range, usage metrics, and the count of latents not finite."""

import logging

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqcore import dist
from vqcore_quant.operators import operator

log = logging.getLogger(__name__)


def in_range(codes: Int[Tensor, "*shape"], codebook_size: int) -> Int[Tensor, "*shape"]:
    """The codes as int64, from any integer type. Raise ValueError with the first code outside `[0, codebook_size)`.

    Compiled and exported programs skip the check, because they cannot branch on the values of a tensor.
    """
    codes = codes.long()  # torch neither compares nor looks up the unsigned types in which codes are stored
    if torch.compiler.is_compiling():
        return codes
    outside = codes[(codes < 0) | (codes >= codebook_size)]
    if len(outside):
        raise ValueError(f"code {int(outside[0])} is out of range: codes lie in [0, {codebook_size})")
    return codes


def usage_metrics(counts: Float[Tensor, "*q k"], codebook_size: int) -> dict[str, Float[Tensor, ""]]:
    """Compute from counts: entropy (bits), perplexity (1 to `codebook_size`) and the share of codes in use.

    `counts` may leave out codes that do not occur. With several codebooks, each metric is the mean over codebooks.
    """
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    entropy = -torch.xlogy(share, share).sum(-1)
    return {
        "codes/entropy": (entropy / torch.log(torch.tensor(2.0))).mean(),
        "codes/perplexity": entropy.exp().mean(),
        "codes/usage": ((counts > 0).sum(-1) / codebook_size).mean(),
    }


def count_nonfinite(
    z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None, *, everywhere: bool
) -> Float[Tensor, ""]:
    """Count valid latents that hold NaN or infinity; `everywhere`: on all processes, and log the place of the first."""
    broken = ~z.isfinite().all(-1)
    if mask is not None:
        broken = broken & mask
    return _count_everywhere_op(broken) if everywhere else broken.sum().float()


def _count_everywhere(broken: Tensor) -> Tensor:
    count = broken.sum()
    if count:
        log.warning(
            "%d of %d latents are not finite; the first is at [sample, *grid] = %s on rank %d",
            int(count),
            broken.numel(),
            broken.nonzero()[0].tolist(),
            dist.rank(),
        )
    return dist.sum_(count.float())


_count_everywhere_op = operator(
    "count_everywhere", _count_everywhere, fake=lambda broken: broken.new_empty((), dtype=torch.float32)
)
