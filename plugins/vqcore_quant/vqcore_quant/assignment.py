"""Which code is nearest to each latent, how many latents each code got, and their sum. No N x K matrix.

Axes: n latents, d their width, k codes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vqcore import dist

_BLOCK = 64


@torch.no_grad()
def nearest(
    rows: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], *, cosine: bool, chunk_mib: float = 8.0
) -> Int[Tensor, " n"]:
    """Find each row's nearest code: the largest cosine, or the smallest distance. The first of equals wins.

    Scores exist for only as many rows at a time as fit into `chunk_mib` MiB (at least one).
    A row with NaN gets some code in range.
    """
    k = len(codebook)
    # A shift changes no distance, and around the mean |c|^2 is small, so that its rounding does not decide.
    centre = torch.zeros_like(codebook[0]) if cosine else codebook.mean(0)
    keys = F.normalize(codebook, dim=-1) if cosine else codebook - centre
    bias = torch.zeros_like(keys[:, 0]) if cosine else -keys.square().sum(-1) / 2
    blocks = -(-k // _BLOCK)
    chunk = max(1, min(len(rows), _rows_within(chunk_mib, blocks * _BLOCK)))
    scores = rows.new_empty(chunk, blocks * _BLOCK)
    scores[:, k:] = -torch.inf
    codes = rows.new_empty(len(rows), dtype=torch.int64)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        queries = F.normalize(part, dim=-1) if cosine else part - centre
        torch.addmm(bias, queries, keys.T, out=scores[: len(part), :k])
        codes[start : start + chunk] = _first_largest(scores[: len(part)].unflatten(1, (blocks, _BLOCK)))
    return codes


def totals(
    rows: Float[Tensor, "n d"], codes: Int[Tensor, " n"], k: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """Count each code's rows and add them up, over all processes.

    Sums are taken in float64: rounded to fp32 they do not show in which order, or by how many processes.
    """
    both = torch.zeros(k, rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    both[:, 0] = torch.bincount(codes, minlength=k)
    chunk = _rows_within(8.0, 2 * rows.shape[1])
    for part, chosen in zip(rows.split(chunk), codes.split(chunk), strict=True):
        both[:, 1:].index_add_(0, chosen, part.double())
    both = dist.sum_(both).to(rows.dtype)
    return both[:, 0], both[:, 1:]


def _first_largest(scores: Float[Tensor, "n blocks width"]) -> Int[Tensor, " n"]:
    # argmax is several times slower than amax on the CPU: find the block first, then the place inside it.
    block = scores.amax(2).argmax(1)
    within = scores[torch.arange(len(scores), device=scores.device), block].argmax(1)
    return block * scores.shape[2] + within


def _rows_within(mib: float, width: int) -> int:
    return max(1, int(mib * 2**20) // (4 * width))
