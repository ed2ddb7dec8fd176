"""Lloyd's k-means, Euclidean or cosine, over the rows of all processes, with bounded memory.

Paper: Lloyd, "Least squares quantization in PCM" (1982); cosine: Dhillon and Modha, "Concept decompositions
for large sparse text data using clustering" (2001).
Differs from the papers: the number of iterations is fixed; a cluster that loses all its rows keeps its mean.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vqcore_quant.assignment import nearest, totals
from vqcore_quant.draws import draw_rows


@torch.no_grad()
def kmeans(
    rows: Float[Tensor, "n d"],
    k: int,
    iters: int,
    *,
    cosine: bool,
    generator: torch.Generator | None = None,
    means: Float[Tensor, "k d"] | None = None,
    chunk_mib: float = 8.0,
) -> tuple[Float[Tensor, "{k} d"], Float[Tensor, "{k}"]]:
    """Fit `k` means in `iters` iterations. Return the means and the number of rows of each in the last assignment.

    The first means are `means`, or else rows drawn with `generator` (on the CPU, in the same state on every process;
    default: the global generator). With `cosine` the rows are compared by direction, and the means have length 1.
    Every process must call this function. Raises ValueError if `iters` is below 1 or if `means` has not `k` rows.
    """
    if iters < 1:
        raise ValueError(f"iters={iters} is below 1: k-means needs at least 1 iteration")
    rows = F.normalize(rows, dim=-1) if cosine else rows
    if means is None:
        means = draw_rows(rows, k, generator or torch.default_generator)
    elif len(means) != k:
        raise ValueError(f"means has {len(means)} rows, but k={k}")
    means = F.normalize(means, dim=-1) if cosine else means
    for _ in range(iters):
        counts, sums = totals(rows, nearest(rows, means, cosine=cosine, chunk_mib=chunk_mib), k)
        size = counts.unsqueeze(1)
        centres = F.normalize(sums, dim=-1) if cosine else sums / size.clamp(min=1)
        means = torch.where(size > 0, centres, means)
    return means, counts
