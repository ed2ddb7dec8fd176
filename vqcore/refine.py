"""Better codes from the same weights: encoding that looks at what its codes decode to (analysis by synthesis).

An encoder chooses all codes in one pass; what a decoder makes of a code depends on its neighbours. `refine` goes on
from the encoder's codes. It moves latents down the gradient of the decoding error, by the length that its curvature
asks for (Newton's step with the mean of the Hessian's diagonal, estimated by Hutchinson's method), quantizes, and
keeps what lowers the error around the token. Neighbours take turns: nothing within two positions moves at once.

Content-adaptive coding as in arXiv 1906.01223, but over the codes themselves and not over continuous latents: every
answer is a grid of codes that any `decode` takes. Nothing learns, no sample gets worse, and none depends on its batch.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vqcore.errors import ConfigError
from vqcore.rng import generator

REACH = 3
"""Positions along an axis, a token in the middle, whose error judges it; so far apart are those that move at once."""
NUDGE = 0.01
"""Size of the step, relative to the latents' own, over which the curvature is measured."""

ErrorOf = Callable[[Tensor], Float[Tensor, "b *size"]]


def refine(
    tokenizer: Any,
    x: Tensor,
    codes: Int[Tensor, "b *grid q"],
    sweeps: int,
    mask: Bool[Tensor, "b *size"] | None = None,
) -> Int[Tensor, "b *grid q"]:
    """Codes that decode at least as close to `x`, in the objective's own loss; where `mask` is False nothing counts.

    A sweep visits every position once: `3 ** axes` steps, each of which decodes twice and differentiates once. Raises
    `ConfigError` where nothing says the error (`check_refine`). The tokenizer must be in eval mode.
    """
    check_refine(tokenizer)
    with torch.inference_mode(False):  # its tensors cannot be differentiated, those made here can
        target, mask, codes = x.clone(), None if mask is None else mask.clone(), codes.clone()

    def error(z: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *size"]:
        each = tokenizer.objective.error(tokenizer, z, target)
        return each if mask is None else torch.where(mask, each, 0.0)

    with torch.inference_mode(False), torch.no_grad():
        return _search(tokenizer, error, codes, sweeps, x.ndim - 1 - (tokenizer.spec.labels is None))


def _search(
    tokenizer: Any, error: ErrorOf, codes: Int[Tensor, "b *grid q"], sweeps: int, rank: int
) -> Int[Tensor, "b *grid q"]:
    step = _step(error, tokenizer.lookup(codes))
    best, least = codes, torch.full((len(codes),), torch.inf, device=codes.device)
    for _ in range(sweeps):
        for turn in _turns(codes.shape[1:-1], rank, codes.device):
            z = tokenizer.lookup(codes)
            before, slope = _slope(error, z)
            best, least = _better(codes, before, best, least)
            moved = torch.where(turn[..., None], tokenizer.quantizer(z - step * slope).codes, codes)
            after = error(tokenizer.lookup(moved))
            gain = _around(before, turn.shape) > _around(after, turn.shape)
            codes = torch.where(gain[..., None], moved, codes)
    best, _ = _better(codes, error(tokenizer.lookup(codes)), best, least)
    return best


def check_refine(tokenizer: Any) -> None:
    """Raise `ConfigError` unless there is a decoder to ask, and an objective that says what it gets wrong."""
    if tokenizer.decoder is None:
        raise ConfigError(
            "codes are refined by what they decode to; this tokenizer was loaded with encoder_only=True."
        )
    if not hasattr(tokenizer.objective, "error"):
        raise ConfigError(
            f"codes cannot be refined with the objective '{tokenizer.cfg.objective.name}': it has no error to lower, "
            "since its decoding is drawn. Leave refine at 0."
        )


def _better(codes: Tensor, error: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sample the better codes, and their error."""
    now = error.flatten(1).mean(1)
    wins = (now < least).view(-1, *[1] * (codes.ndim - 1))
    return torch.where(wins, codes, best), torch.minimum(now, least)


@torch.enable_grad()
def _slope(
    error: ErrorOf, z: Float[Tensor, "b *grid d"]
) -> tuple[Float[Tensor, "b *size"], Float[Tensor, "b *grid d"]]:
    """The error at every position, and the gradient of each sample's sum."""
    z = z.detach().requires_grad_()
    each = error(z)
    (slope,) = torch.autograd.grad(each.sum(), z)
    return each.detach(), slope


def _step(error: ErrorOf, z: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *ones"]:
    """Of each sample one over the mean of the Hessian's diagonal: u * H u has it as its mean for random signs u."""
    signs = torch.randint(2, z.shape[1:], generator=generator("refine")).to(z) * 2 - 1
    axes = tuple(range(1, z.ndim))
    far = NUDGE * z.square().mean(axes, keepdim=True).sqrt()
    bend = (_slope(error, z + far * signs)[1] - _slope(error, z - far * signs)[1]) / (2 * far)
    curvature = (signs * bend).mean(axes, keepdim=True).abs()  # it may bend downwards far from a minimum
    return torch.where(curvature > 0, 1 / curvature, 0.0)


def _turns(grid: torch.Size, rank: int, device: torch.device) -> Iterator[Bool[Tensor, "*grid"]]:
    """Which positions move together. Tokens that belong to no place all see each other and move alone."""
    if len(grid) != rank:
        for place in torch.eye(grid.numel(), dtype=torch.bool, device=device):
            yield place.view(grid)
        return
    for first in product(range(REACH), repeat=rank):
        turn = torch.zeros(grid, dtype=torch.bool, device=device)
        turn[tuple(slice(start, None, REACH) for start in first)] = True
        if turn.any():
            yield turn


def _around(error: Float[Tensor, "b *size"], grid: torch.Size) -> Float[Tensor, "b *grid"]:
    """The error near each token: over `REACH` positions of the grid along each axis, or over everything."""
    rank = len(grid)
    if error.ndim - 1 != rank:
        return error.flatten(1).mean(1).view(-1, *[1] * rank).expand(-1, *grid)
    to_grid: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[rank - 1]
    mean: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    each = to_grid(rearrange(error, "b ... -> b 1 ..."), tuple(grid))
    # Padded apart: avg_pool3d's own padding refuses a grid that is smaller than its window.
    wide = F.pad(each, (REACH // 2, REACH // 2) * rank)
    return rearrange(mean(wide, REACH, stride=1), "b 1 ... -> b ...")
