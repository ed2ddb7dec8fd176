"""Vector quantization with one codebook that follows the means of the latents (EMA), cosine or Euclidean.

Paper: "Neural Discrete Representation Learning", arXiv 1711.00937, equation 3 (third term) and appendix A.1.
Cosine search: "Vector-quantized Image Modeling with Improved VQGAN", arXiv 2110.04627, section 3.2.
Differs from the papers:
* Cosine compares directions but returns the stored row, whose length drifts a little below 1. A code moves
  towards the direction of its latents' mean; without latents it moves back to length 1.
* A Euclidean code without latents stays where it is. The quotient of its averages is the same place, except
  for a code that was never used: there it is arbitrarily far away.
* Dead codes are replaced. The new code's cluster size is twice the threshold: without latents it is dead
  again after about log 2 / (1 - decay) steps, not at the next, and few latents suffice to move a Euclidean
  code. Its average of sums agrees with its value, so it does not jump back.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

import vqcore.config
from vqcore import dist
from vqcore.protocols import Quantized
from vqcore_quant.assignment import nearest, totals
from vqcore_quant.codes import check_range, usage_metrics
from vqcore_quant.draws import draw_rows, shared_generator
from vqcore_quant.gradients import straight_through
from vqcore_quant.kmeans import kmeans

_SPLIT_NOISE = 5e-6
"""Relative distance of a split code from its source: just above fp32 resolution, so both win latents."""


class VQ(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) with a codebook that learns in training mode.

    It learns from the latents of all processes. State: `embed` (the codes), `cluster_size` (EMA of latents
    per code and step), `embed_avg` (Euclidean: EMA of the sums of latents), `initted` (0 while k-means has
    still to run; until then, and so in evaluation before the first training step, random codes serve).
    A step without any valid latent, or with one that is not finite, changes no state.
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/vq`."""

        codebook_size: int
        """Number of codes."""
        latent_dim: int = 32
        """Width of a latent and of a code."""
        normalize: bool = True
        """Compare directions (cosine); false compares positions (Euclidean)."""
        norm_latents: bool = False
        """Scale latents to length 1 first: changes gradient and `vq/commit`; codes only if Euclidean."""
        decay: float = 0.99
        """Share of a code's statistics that survives a step, 0 <= decay < 1."""
        eps: float = 1e-5
        """Laplace smoothing of the Euclidean cluster sizes, in latents per step."""
        commitment_weight: float = 1.0
        """Factor on `vq/commit`, the mean squared distance of latents to their codes."""
        kmeans_init: bool = False
        """Start the codebook from k-means over the first training batch instead of from random directions."""
        kmeans_iters: int = 10
        """Iterations of that k-means."""
        dead_code: Literal["batch_random", "linde_buzo_gray"] | None = "batch_random"
        """A dead code becomes a random latent of the batch or a near copy of a much used code. Null: off."""
        threshold_ema_dead_code: float | None = None
        """A code is dead below this EMA of latents per step; 0: never. Null: see coef_ema_dead_code."""
        coef_ema_dead_code: float | None = 32.0
        """A code is dead if its EMA is this many times smaller than the step's mean per code. Null: never."""
        chunk_mib: float = 8.0
        """Extra memory for distances, in MiB; more does not change a code."""

        training_only: ClassVar[tuple[str, ...]] = (
            "decay",
            "eps",
            "commitment_weight",
            "kmeans_init",
            "kmeans_iters",
            "dead_code",
            "threshold_ema_dead_code",
            "coef_ema_dead_code",
            "chunk_mib",
        )

        def __post_init__(self) -> None:
            for name in ("codebook_size", "latent_dim", "kmeans_iters"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} is below 1")
            for name in ("eps", "chunk_mib", "coef_ema_dead_code"):
                if getattr(self, name) is not None and getattr(self, name) <= 0:
                    raise ValueError(f"{name}={getattr(self, name)} is not above 0")
            for name in ("commitment_weight", "threshold_ema_dead_code"):
                if getattr(self, name) is not None and getattr(self, name) < 0:
                    raise ValueError(f"{name}={getattr(self, name)} is below 0")
            if not 0 <= self.decay < 1:
                raise ValueError(f"decay={self.decay} is not in [0, 1)")

    num_codebooks: ClassVar[int] = 1

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.dim, self.codebook_size = cfg.latent_dim, cfg.codebook_size
        embed = nn.init.kaiming_uniform_(torch.empty(cfg.codebook_size, cfg.latent_dim))
        self.register_buffer("initted", torch.tensor([0.0 if cfg.kmeans_init else 1.0]))
        self.register_buffer("cluster_size", torch.zeros(cfg.codebook_size))
        self.register_buffer("embed", F.normalize(embed, dim=-1) if cfg.normalize else embed)
        if not cfg.normalize:
            self.register_buffer("embed_avg", torch.zeros_like(embed))

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Give every latent its nearest code; in training, let the codebook follow. `mask`: True is valid."""
        with torch.autocast(z.device.type, enabled=False):
            latents = F.normalize(z.float(), dim=-1) if self.cfg.norm_latents else z.float()
            rows = self._in_geometry(_flat(latents.detach(), mask))
            if self.training:
                self._initialise(rows)
            codes = self._search(latents.detach())
            z_q = F.embedding(codes, self.embed)
            distance = (_flat(latents, mask) - _flat(z_q, mask)).square()
            commit = self.cfg.commitment_weight * distance.sum() / max(distance.numel(), 1)
            if self.training:
                z_q = straight_through(latents, z_q)
            counts, dead = self._learn(rows, _flat(codes.unsqueeze(-1), mask).squeeze(-1))
            metrics = usage_metrics(counts, self.codebook_size) | {"codes/dead": dead.float().mean()}
        return Quantized(z_q.to(z.dtype), codes.unsqueeze(-1), {"vq/commit": commit}, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Look the codes up. Raises ValueError for one out of range."""
        check_range(codes, self.codebook_size)
        return F.embedding(rearrange(codes, "... 1 -> ..."), self.embed)

    def token_state(self) -> dict[str, Tensor]:
        """The codebook; the statistics decide no code."""
        return {"embed": self.embed}

    def _in_geometry(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return F.normalize(rows, dim=-1) if self.cfg.normalize else rows

    def _search(self, latents: Float[Tensor, "b *grid d"]) -> Int[Tensor, "b *grid"]:
        cosine, chunk_mib = self.cfg.normalize, self.cfg.chunk_mib
        codes = nearest(_flat(latents), self.embed, cosine=cosine, chunk_mib=chunk_mib)
        return codes.reshape(latents.shape[:-1])

    @torch.no_grad()
    def _initialise(self, rows: Float[Tensor, "n d"]) -> None:
        if not self.cfg.kmeans_init or bool(self.initted):
            return
        unusable = dist.sum_((~rows.isfinite()).sum())
        if unusable or not sum(dist.all_counts(len(rows), rows.device)):
            return
        means, counts = kmeans(
            rows,
            self.codebook_size,
            self.cfg.kmeans_iters,
            cosine=self.cfg.normalize,
            generator=shared_generator(),
            chunk_mib=self.cfg.chunk_mib,
        )
        self._set(torch.ones_like(counts, dtype=torch.bool), means, counts)
        self.initted.fill_(1)

    @torch.no_grad()
    def _learn(self, rows: Float[Tensor, "n d"], codes: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """Let the codebook follow (in training); return how often each code occurs and which are dead."""
        if not self.training:
            counts = torch.bincount(codes, minlength=self.codebook_size).float()
            return counts, self.cluster_size < self._threshold(self.cluster_size.sum())
        counts, sums = totals(rows, codes, self.codebook_size)
        tokens = counts.sum()
        if not (tokens > 0 and sums.isfinite().all()):
            return counts, self.cluster_size < self._threshold(self.cluster_size.sum())
        self._follow(counts, sums)
        threshold = self._threshold(tokens)
        dead = self.cluster_size < threshold
        if self.cfg.dead_code is not None and dead.any():
            self._replace(dead, rows, 2 * threshold)
        return counts, dead

    def _follow(self, counts: Float[Tensor, " k"], sums: Float[Tensor, "k d"]) -> None:
        rate = 1 - self.cfg.decay
        used = rearrange(counts > 0, "k -> k 1")
        self.cluster_size.lerp_(counts, rate)
        if self.cfg.normalize:
            means = torch.where(used, F.normalize(sums, dim=-1), F.normalize(self.embed, dim=-1))
            self.embed.lerp_(means, rate)
            return
        self.embed_avg.lerp_(sums, rate)
        total, eps = self.cluster_size.sum(), self.cfg.eps
        smoothed = (self.cluster_size + eps) * (total / (total + self.codebook_size * eps))
        means = self.embed_avg / rearrange(smoothed, "k -> k 1")
        self.embed.copy_(torch.where(used, means, self.embed))

    def _threshold(self, tokens: Float[Tensor, ""]) -> Float[Tensor, ""]:
        if self.cfg.threshold_ema_dead_code is not None:
            return torch.full_like(tokens, self.cfg.threshold_ema_dead_code)
        if self.cfg.coef_ema_dead_code is None:
            return torch.zeros_like(tokens)
        return tokens / self.codebook_size / self.cfg.coef_ema_dead_code

    def _replace(self, dead: Bool[Tensor, " k"], rows: Float[Tensor, "n d"], size: Float[Tensor, ""]) -> None:
        count, generator = int(dead.sum()), shared_generator()
        if self.cfg.dead_code == "batch_random":
            fresh = draw_rows(rows, count, generator)
        else:
            fresh = self._split(count, generator)
        self._set(dead, fresh, size.expand(count))

    def _split(self, count: int, generator: torch.Generator) -> Float[Tensor, "{count} d"]:
        """Near copies of the most used codes, in turn; of living ones only, unless none lives."""
        order = self.cluster_size.argsort(descending=True, stable=True)
        order = order[: max(1, self.codebook_size - count)]
        source = self.embed[order[torch.arange(count, device=order.device) % len(order)]]
        noise = torch.randn(source.shape, generator=generator).to(source.device)
        return self._in_geometry(source + noise * _SPLIT_NOISE * source.square().mean().sqrt())

    def _set(
        self, where: Bool[Tensor, " k"], codes: Float[Tensor, "m d"], sizes: Float[Tensor, " m"]
    ) -> None:
        """Give codes a value and statistics that agree with it."""
        self.embed[where] = codes
        self.cluster_size[where] = sizes
        if not self.cfg.normalize:
            self.embed_avg[where] = codes * rearrange(sizes, "m -> m 1")


def _flat(
    x: Shaped[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
) -> Shaped[Tensor, "n d"]:
    return rearrange(x, "b ... d -> (b ...) d") if mask is None else x[mask]
