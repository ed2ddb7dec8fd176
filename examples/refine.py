"""Better codes from the same weights: a search at encoding that looks at what the codes decode to.

    python examples/refine.py RUN INPUT OUTPUT [--sweeps 2] [--size N]

INPUT is a file or a folder. OUTPUT gets the same layout as from `vqcore tokenize`, and `vqcore decode` reads it. Give
refined codes a folder of their own, since `tokens.json` does not tell them from the encoder's codes.

An encoder chooses all codes in one pass, but what a decoder makes of a code depends on the neighbouring codes. The
search starts from the encoder's codes. It moves latents down the gradient of the decoding error and quantizes them. The
length of the step comes from the curvature of the error: Newton's step with the mean of the Hessian's diagonal,
estimated by Hutchinson's method. A new code is kept if the error around its token gets smaller. Neighbours take turns:
tokens that move at once are three positions apart.

This is content-adaptive coding as in arXiv 1906.01223 (analysis by synthesis), but over codes and not over continuous
latents. Nothing is trained, no sample gets worse, and no sample depends on its batch. The decoder must be
deterministic and differentiable, and the data must be continuous: the error is the mean squared error.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vqcore.assembly import pick_device
from vqcore.errors import ConfigError, VqcoreError
from vqcore.losses import output_of
from vqcore.metrics.pixels import PSNR
from vqcore.objectives import decoded
from vqcore.protocols import is_denoiser
from vqcore.rng import generator
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.passes import parse_size, tokenize_folder

REACH = 3
"""Tokens that move at once are so many positions apart; the error in a window of this width judges a token."""
NUDGE = 0.01
"""Length of the step over which the curvature is measured, relative to the root mean square of the latents."""

ErrorOf = Callable[[Float[Tensor, "b *grid d"]], Float[Tensor, "b *size"]]


class Refined(Tokenizer):
    """A tokenizer whose `encode` searches for better codes; it adds up how well both kinds of codes decode."""

    sweeps = 2

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check(self)
        self.samples, self.before, self.after = 0, 0.0, 0.0
        self.psnr = None if self.spec.range is None else PSNR(PSNR.Config(), spec=self.spec)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Bool[Tensor, "b *size"] | None = None) -> Int[Tensor, "b *grid q"]:
        """The codes that the search finds."""
        plain = super().encode(x, mask)
        found = refine(self, x, plain, self.sweeps)
        self.samples += len(x)
        self.before += self._quality(plain, x)
        self.after += self._quality(found, x)
        return found

    def _quality(self, codes: Int[Tensor, "b *grid q"], x: Tensor) -> float:
        """Sum over samples of the PSNR, or of the mean squared error where the data has no declared range."""
        x_hat = self.decode(codes, size=tuple(x.shape[2:])).cpu()
        if self.psnr is None:
            return float((x_hat.double() - x.cpu()).square().flatten(1).mean(1).sum())
        return float(self.psnr.measure(x_hat, x.cpu())["sum"])

    def said(self) -> str:
        """One line: the quality of the encoder's codes and of the refined ones."""
        name, unit = ("mean squared error", "") if self.psnr is None else ("PSNR", " dB")
        before, after = (total / max(1, self.samples) for total in (self.before, self.after))
        change = f"{before:.5g}{unit} before, {after:.5g}{unit} after {self.sweeps} sweeps"
        return f"{name} of {self.samples} samples: {change}"


def check(tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` for a tokenizer whose codes cannot be refined by a squared error."""
    spec, problem = tokenizer.spec, ""
    if spec.labels is not None:
        problem = "its data are class maps, which have no squared error"
    elif spec.mask:
        problem = "its data has invalid positions, which must not count in the error"
    elif tokenizer.decoder is None:
        problem = "it was loaded without its decoder"
    elif is_denoiser(tokenizer.decoder):
        problem = (
            f"its decoder '{tokenizer.cfg.model.decoder.name}' is a denoiser, which draws random numbers"
        )
    if problem:
        raise ConfigError(f"the codes of this tokenizer cannot be refined: {problem}.")


def refine(
    tokenizer: Tokenizer, x: Float[Tensor, "b c *size"], codes: Int[Tensor, "b *grid q"], sweeps: int
) -> Int[Tensor, "b *grid q"]:
    """Codes that decode at least as close to `x` as `codes` do. The tokenizer must be in eval mode.

    A sweep visits every position once. It has `3 ** axes` steps, each of which decodes twice and differentiates once.
    """
    check(tokenizer)
    with torch.inference_mode(False), torch.no_grad():
        # Tensors made in inference mode cannot be differentiated, their copies can.
        target, codes = x.to(tokenizer.device).clone(), codes.to(tokenizer.device).clone()
        size, loss = tuple(x.shape[2:]), getattr(tokenizer.objective, "loss", tokenizer.spec.loss)

        def decode(z: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]:
            return output_of(loss, decoded(tokenizer.decoder, z, size=size), tokenizer.spec)

        def error(z: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *size"]:
            return reduce((decode(z) - target).square(), "b c ... -> b ...", "mean")

        latents, expected = tokenizer.lookup(codes), tokenizer.decode(codes, size=size)
        if latents.shape[1:-1] != codes.shape[1:-1]:
            raise ConfigError(
                "the codes cannot be refined: the quantizer gives them another grid than latents."
            )
        if not torch.allclose(decode(latents), expected, rtol=1e-3, atol=1e-3):
            raise ConfigError(
                f"the codes cannot be refined: the objective '{tokenizer.cfg.objective.name}' does more to decode "
                "them than to call the decoder."
            )
        return _search(tokenizer, error, codes, sweeps)


def _search(
    tokenizer: Tokenizer, error: ErrorOf, codes: Int[Tensor, "b *grid q"], sweeps: int
) -> Int[Tensor, "b *grid q"]:
    step = _step(error, tokenizer.lookup(codes))
    best, least = codes, torch.full((len(codes),), torch.inf, device=codes.device)
    for _ in range(sweeps):
        for turn in _turns(codes.shape[1:-1], tokenizer.spec.rank, codes.device):
            z = tokenizer.lookup(codes)
            before, slope = _slope(error, z)
            best, least = _better(codes, before, best, least)
            moved = torch.where(turn[..., None], tokenizer.quantize(z - step * slope).codes, codes)
            after = error(tokenizer.lookup(moved))
            gain = _around(before, turn.shape) > _around(after, turn.shape)
            codes = torch.where(gain[..., None], moved, codes)
    return _better(codes, error(tokenizer.lookup(codes)), best, least)[0]


def _better(codes: Tensor, error: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample the better codes, and their error."""
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
    """For each sample one over the mean of the Hessian's diagonal: u * H u has this mean for random signs u."""
    signs = torch.randint(2, z.shape[1:], generator=generator("refine")).to(z) * 2 - 1
    axes = tuple(range(1, z.ndim))
    far = NUDGE * z.square().mean(axes, keepdim=True).sqrt()
    bend = (_slope(error, z + far * signs)[1] - _slope(error, z - far * signs)[1]) / (2 * far)
    curvature = (signs * bend).mean(axes, keepdim=True).abs()  # far from a minimum it may be negative
    return torch.where(curvature > 0, 1 / curvature, 0.0)


def _turns(grid: torch.Size, rank: int, device: torch.device) -> Iterator[Bool[Tensor, "*grid"]]:
    """Which tokens move together. Tokens that belong to no place all affect each other and move alone."""
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
    # avg_pool3d's own padding refuses a grid that is smaller than its window.
    wide = F.pad(each, (REACH // 2, REACH // 2) * rank)
    return rearrange(mean(wide, REACH, stride=1), "b 1 ... -> b ...")


def main(argv: list[str] | None = None) -> None:
    """Tokenize a file or a folder with refined codes, and print how much they gain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run, an exported tokenizer or hf://user/name")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--sweeps", type=int, default=Refined.sweeps, help="visits of every token (default: 2)"
    )
    parser.add_argument("--size", help="input size, e.g. 256 or 256x192 (default: the tokenizer's own)")
    args = parser.parse_args(argv)
    if args.sweeps < 1:
        parser.error(f"--sweeps {args.sweeps}: it must be at least 1.")
    try:
        tokenizer = Refined.load(args.run, pick_device(None))
        assert isinstance(tokenizer, Refined)
        tokenizer.sweeps = args.sweeps
        size = parse_size(args.size, tokenizer.cfg.size)
        done = tokenize_folder(tokenizer, args.input, args.output, size=size)
    except VqcoreError as error:
        parser.exit(2, f"error: {error}\n")
    print(
        f"{done.written} written, {done.skipped} existed already, {len(done.failed)} unreadable: {args.output}"
    )
    if tokenizer.samples:
        print(tokenizer.said())


if __name__ == "__main__":
    main()
