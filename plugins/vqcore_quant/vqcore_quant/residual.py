"""Residual quantization: each level quantizes what the levels before it left over; the sum is the latent's value.

Papers: "SoundStream: An End-to-End Neural Audio Codec", arXiv 2107.03312, section III.C (levels, quantizer dropout).
Differs from the paper:
* Any quantizer serves at the levels.
* The gradient at the latents is the mean of the levels' gradients: with straight-through levels the identity. Added
  up it would grow with the depth.
* Dropout takes a share of the samples; the paper takes all (`dropout: 1`).
* A shared codebook learns once a step, from what all levels saw; learning level after level it would be another one
  at each.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore.config import slot
from vqcore.protocols import Quantized
from vqcore_quant.gradients import straight_through
from vqcore_quant.nested import average, broken, build_inner, each, token_states
from vqcore_quant.usage import latent_metrics, validity


class Residual(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) made of `depth` others; codes of a level stand side by side.

    Its losses are the levels', added up under their names. The first codes alone decode too, to a coarser value.
    In training with dropout, codes of levels that a sample does without are in range and mean nothing.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/residual`."""

        quantizer: vqcore.config.Config = slot("quantizer")
        """The quantizer of a level."""
        depth: int
        """Number of levels."""
        shared: bool = False
        """One quantizer serves at all levels."""
        dropout: float = 0.0
        """Share of training samples that use only the first levels, 1 to depth with equal chances."""

        training_only: ClassVar[tuple[str, ...]] = ("dropout",)

        def __post_init__(self) -> None:
            if self.depth < 1:
                raise ValueError(f"depth={self.depth} is below 1")
            if not 0 <= self.dropout <= 1:
                raise ValueError(f"dropout={self.dropout} is not in [0, 1]")

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.levels = build_inner(cfg.quantizer, 1 if cfg.shared else cfg.depth)
        first: Any = self.levels[0]
        self.dim: int = first.dim
        self.codebook_size: int = first.codebook_size
        self.num_codebooks: int = cfg.depth * first.num_codebooks

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Quantize level by level. `mask`: True is valid."""
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
        """Add up what codes of the first levels, or of all, stand for. Raises ValueError for one out of range."""
        width = self.num_codebooks // self.cfg.depth
        count, rest = divmod(codes.shape[-1], width)
        if rest or not 1 <= count <= self.cfg.depth:
            raise ValueError(
                f"{codes.shape[-1]} codes a position; a level has {width} and there are {self.cfg.depth} levels"
            )
        parts = codes.split(width, dim=-1)
        return torch.stack([self._level(i).decode(part) for i, part in enumerate(parts)]).cumsum(0)[-1]

    def token_state(self) -> dict[str, Tensor]:
        """What decides the levels' codes."""
        return token_states(self.levels, "levels")

    def _level(self, i: int) -> Any:
        return self.levels[0 if self.cfg.shared else i]

    def _on(self, z: Float[Tensor, "b *grid d"]) -> Bool[Tensor, "l b *ones"]:
        """Which levels each sample uses; all but b and l are axes of length 1."""
        depth, samples = self.cfg.depth, z.shape[0]  # len() would fix the batch in an exported program
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
        """Learn from all levels together: what they leave over is found first, with the codebook as it is."""
        with torch.no_grad():
            self.levels.eval()
            values = self._in_turn(latents.detach(), on, used).values
            self.levels.train()
        lefts = latents - (values.cumsum(0) - values)
        depth = self.cfg.depth
        # Sample by sample, so that several processes' batches in a row are the rows of one process.
        out = self.levels[0](
            rearrange(lefts, "l b ... -> (b l) ..."), rearrange(used, "l b ... -> (b l) ...")
        )
        values = torch.where(on, rearrange(out.z_q, "(b l) ... -> l b ...", l=depth), 0.0)
        codes = rearrange(out.codes, "(b l) ... -> l b ...", l=depth)
        losses = {name: depth * value for name, value in out.losses.items()}
        return _Levels(values, codes, losses, dict(out.metrics))


@dataclass(frozen=True)
class _Levels:
    """What the levels say: values and codes level by level, losses added up, metrics averaged."""

    values: Float[Tensor, "l b *grid d"]
    codes: Int[Tensor, "l b *grid q"]
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
