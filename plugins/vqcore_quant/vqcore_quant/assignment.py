"""The nearest code of each latent, and the number and the sum of the latents of each code, without an N x K matrix.

Axes: n latents, d width of a latent, k codes. The work is done by custom operators, which `torch.compile` does not
trace, because it would unroll their loops. An exported program has one matrix product of all latents and codes
instead, so that it runs without this package.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqcore import dist
from vqcore_quant.operators import operator

_BLOCK = 64
_TILE = 4096
"""Number of codes that are compared at a time: they stay in the CPU cache for all latents of a chunk."""


@torch.no_grad()
def nearest(
    rows: Float[Tensor, "n d"],
    codebook: Float[Tensor, "k d"],
    *,
    cosine: bool,
    chunk_mib: float = 8.0,
    temperature: float = 0.0,
) -> Int[Tensor, " n"]:
    """Find each row's nearest code: the largest cosine, or the smallest distance. Among equals the first code wins.

    Scores are computed for as many rows and codes at a time as fit into `chunk_mib` MiB. A row with NaN gets some code
    that is in range. With a `temperature` above 0 the code is sampled with the global random generator: its
    probability is the softmax of score / temperature, where a score is the cosine or minus the squared distance.
    """
    if torch.compiler.is_exporting():
        keys, centre = _geometry(codebook, cosine)
        return (_queries(rows, centre) @ keys.T).argmax(1)
    return _nearest_op(rows, codebook, cosine, chunk_mib, temperature)


def totals(
    rows: Float[Tensor, "n d"], codes: Int[Tensor, " n"], k: int, mask: Bool[Tensor, " n"] | None = None
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """Count and sum the rows of each code, over all processes. `mask` is True for rows that count.

    Sums are computed in float64 and rounded to fp32, so that the result does not depend on the order of the rows or
    on the number of processes.
    """
    return _totals_op(rows, codes, k, mask)


def _nearest(rows: Tensor, codebook: Tensor, cosine: bool, chunk_mib: float, temperature: float) -> Tensor:
    keys, centre = _geometry(codebook, cosine)
    scale = (1.0 if cosine else 2.0) / temperature if temperature else 1.0
    width = min(_TILE, -(-len(keys) // _BLOCK) * _BLOCK)
    chunk = max(1, min(len(rows), rows_within(chunk_mib, width * (2 if temperature else 1))))
    scores = rows.new_empty(chunk, width)
    codes = rows.new_empty(len(rows), dtype=torch.int64)
    for start in range(0, len(rows), chunk):
        queries = _queries(rows[start : start + chunk], centre) * scale
        best = rows.new_full((len(queries),), -torch.inf)
        found = codes[start : start + chunk].zero_()
        for first in range(0, len(keys), width):
            part = keys[first : first + width]
            scores[:, len(part) :] = -torch.inf
            room = scores[: len(queries)]
            torch.mm(queries, part.T, out=room[:, : len(part)])
            if temperature:
                room -= torch.empty_like(room).exponential_().log_()
            value, code = _first_largest(room.unflatten(1, (width // _BLOCK, _BLOCK)))
            better = value > best
            torch.where(better, code + first, found, out=found)
            torch.where(better, value, best, out=best)
    return codes


_nearest_op = operator(
    "nearest", _nearest, fake=lambda rows, *_: rows.new_empty(rows.shape[0], dtype=torch.int64)
)


def _totals(rows: Tensor, codes: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is not None:
        rows, codes = rows[mask], codes[mask]
    both = torch.zeros(k, rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    both[:, 0] = torch.bincount(codes, minlength=k)
    chunk = rows_within(8.0, 2 * rows.shape[1])
    for part, chosen in zip(rows.split(chunk), codes.split(chunk), strict=True):
        both[:, 1:].index_add_(0, chosen, part.double())
    dist.sum_(both)
    return both[:, 0].to(rows.dtype), both[:, 1:].to(rows.dtype)


_totals_op = operator(
    "totals", _totals, fake=lambda rows, _, k, *__: (rows.new_empty(k), rows.new_empty(k, rows.shape[1]))
)


def rows_within(mib: float, width: int) -> int:
    """The number of rows of `width` fp32 numbers that fit into `mib` MiB; at least 1."""
    return max(1, int(mib * 2**20) // (4 * max(1, width)))


def _geometry(codebook: Tensor, cosine: bool) -> tuple[Tensor, Tensor | None]:
    """Keys and centre. The nearest code has the key with the largest dot product with `_queries(rows, centre)`."""
    if cosine:
        return F.normalize(codebook, dim=-1), None
    # A shift changes no distance. Relative to the mean |c|^2 is small, so rounding does not decide the code.
    centre = codebook.mean(0)
    keys = codebook - centre
    return torch.cat([keys, -keys.square().sum(-1, keepdim=True) / 2], 1), centre


def _queries(rows: Tensor, centre: Tensor | None) -> Tensor:
    if centre is None:
        return F.normalize(rows, dim=-1)
    # The 1 is multiplied by the key's last number, -|c|^2 / 2. Adding it as a bias would write all scores twice.
    return torch.cat([rows - centre, torch.ones_like(rows[:, :1])], 1)


def _first_largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    # On the CPU argmax is several times slower than amax: find the best block first, then the position inside it.
    value, block = scores.amax(2).max(1)
    rows, blocks, size = scores.shape
    place = torch.arange(0, rows * blocks, blocks, device=scores.device) + block
    within = scores.flatten(0, 1).index_select(0, place).argmax(1)
    return value, block * size + within
