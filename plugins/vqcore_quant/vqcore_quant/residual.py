"""Residual quantization: each level quantizes the residual of the levels before it; `z_q` is the sum over levels.

Papers: "SoundStream: An End-to-End Neural Audio Codec", arXiv 2107.03312, section III.C (levels, quantizer dropout).
Differs from the paper:
* A level may use any quantizer.
* The gradient at the latents is the mean of the gradients of the levels (with straight-through levels the identity),
  because the sum would grow with the depth.
* Dropout applies to a share of the samples; in the paper it applies to all samples (`dropout: 1`).
* A shared codebook is updated once per step, from the residuals of all levels. With one update per level, the levels of
  the same step would use different codebooks.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.config import at_least, refuse_idle, slot
from vqcore.errors import SettingError
from vqcore.protocols import Quantized, Quantizer
from vqcore_quant.gradients import straight_through
from vqcore_quant.nested import average, broken, build_inner, each, token_states
from vqcore_quant.usage import latent_metrics, validity


class Residual(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) with `depth` levels.

    The last axis of the codes holds the codes of level after level.
    Losses: the losses of the inner quantizers under the same names, summed over levels. The codes of the first levels
    can be decoded alone, to a coarser value. In training with dropout, the codes of levels that a sample does not use
    are in range but have no meaning.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/residual`."""

        quantizer: vqcore.config.Config = slot("quantizer")
        """The quantizer of one level."""
        depth: int
        """Number of levels."""
        shared: bool = False
        """True: all levels share one quantizer. False: each level has its own quantizer."""
        dropout: float = 0.0
        """Share of training samples that use only the first n levels; n is 1 to depth with equal probability."""

        training_only: ClassVar[tuple[str, ...]] = ("dropout",)

        def __post_init__(self) -> None:
            at_least(self, depth=1)
            if self.depth == 1:
                refuse_idle(self, "depth=1", "shared", "dropout")
            if not 0 <= self.dropout <= 1:
                raise SettingError("dropout", f"{self.dropout} is not in [0, 1]")

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.levels = build_inner(cfg.quantizer, 1 if cfg.shared else cfg.depth)
        first = cast(Quantizer, self.levels[0])
        self.dim = first.dim
        self.codebook_size = first.codebook_size
        self.num_codebooks = cfg.depth * first.num_codebooks

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Quantize level by level. `mask` is True at valid positions."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            latents, on = z.float(), self._on(z)
            used = on.squeeze(-1) & valid | broken(z, valid)
            learn = self._at_once if self.cfg.shared and self.training else self._in_turn
            found = learn(latents, on, used)
            sums = found.values.detach().cumsum(0)
            z_q = sums[-1]
            parts = zip(found.codes, latents - sums, used, strict=True)
            metrics = found.metrics | latent_metrics(z, latents, z_q, valid)
            metrics |= each("level", parts, self.codebook_size, training=self.training)
            z_q = straight_through(found.values.sum(0) / on.sum(0), z_q)
        codes = rearrange(found.codes, "l b ... q -> b ... (l q)").contiguous()
        return Quantized(z_q.to(z.dtype), codes, found.losses, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Sum the values of the codes of all or of the first levels. Raises ValueError for a code out of range."""
        width = self.num_codebooks // self.cfg.depth
        count, rest = divmod(codes.shape[-1], width)
        if rest or not 1 <= count <= self.cfg.depth:
            raise ValueError(
                f"{codes.shape[-1]} codes per position; a level has {width}, and there are {self.cfg.depth} levels"
            )
        parts = codes.split(width, dim=-1)
        return torch.stack([self._level(i).decode(part) for i, part in enumerate(parts)]).cumsum(0)[-1]

    def token_state(self) -> dict[str, Tensor]:
        """The tensors that decide the codes of all levels."""
        return token_states(self.levels, "levels")

    def _level(self, i: int) -> Quantizer:
        return cast(Quantizer, self.levels[0 if self.cfg.shared else i])

    def _on(self, z: Float[Tensor, "b *grid d"]) -> Bool[Tensor, "l b *ones"]:
        """True for the levels that each sample uses; all axes except l and b have length 1."""
        depth, samples = self.cfg.depth, z.shape[0]  # len() would fix the batch size of an exported program
        count = torch.full((samples,), depth, device=z.device)
        if self.training and self.cfg.dropout:
            few = torch.randint(1, depth + 1, (samples,), device=z.device)
            count = torch.where(torch.rand(samples, device=z.device) < self.cfg.dropout, few, depth)
        on = count > rearrange(torch.arange(depth, device=z.device), "l -> l 1")
        return on.view(*on.shape, *(1,) * (z.ndim - 1))

    def _in_turn(
        self,
        latents: Float[Tensor, "b *grid d"],
        on: Bool[Tensor, "l b *ones"],
        used: Bool[Tensor, "l b *grid"],
    ) -> "_Levels":
        left, values, found = latents, [], []
        for i in range(self.cfg.depth):
            out = self._level(i)(left, used[i])
            values.append(torch.where(on[i], out.z_q, 0.0))
            left = left - values[-1].detach()
            found.append(out)
        losses = {name: torch.stack([out.losses[name] for out in found]).sum() for name in found[0].losses}
        metrics = average([out.metrics for out in found])
        return _Levels(torch.stack(values), torch.stack([out.codes for out in found]), losses, metrics)

    def _at_once(
        self,
        latents: Float[Tensor, "b *grid d"],
        on: Bool[Tensor, "l b *ones"],
        used: Bool[Tensor, "l b *grid"],
    ) -> "_Levels":
        """Train the shared quantizer once, on the residuals of all levels as the current codes leave them."""
        with torch.no_grad():
            self.levels.eval()
            values = self._in_turn(latents.detach(), on, used).values
            self.levels.train()
        lefts = latents - (values.cumsum(0) - values)
        depth = self.cfg.depth
        # The sample is the outer axis, so that concatenated batches of several processes are the batch of one process.
        out = self.levels[0](
            rearrange(lefts, "l b ... -> (b l) ..."), rearrange(used, "l b ... -> (b l) ...")
        )
        values = torch.where(on, rearrange(out.z_q, "(b l) ... -> l b ...", l=depth), 0.0)
        codes = rearrange(out.codes, "(b l) ... -> l b ...", l=depth)
        losses = {name: depth * value for name, value in out.losses.items()}
        return _Levels(values, codes, losses, dict(out.metrics))


@dataclass(frozen=True)
class _Levels:
    """Results of all levels: values and codes of each level, the sum of their losses, the mean of their metrics."""

    values: Float[Tensor, "l b *grid d"]
    codes: Int[Tensor, "l b *grid q"]
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
