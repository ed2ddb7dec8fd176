"""Vector quantization, cosine or Euclidean; codes follow the means of the latents (EMA) or are trained by gradient.

Paper: "Neural Discrete Representation Learning", arXiv 1711.00937, equation 3 and appendix A.1.
Cosine search and codes of low dimension: "Vector-quantized Image Modeling with Improved VQGAN", arXiv
2110.04627, section 3.2. Orthogonal codes: "Translation-equivariant Image Quantizer", arXiv 2112.00384.
The papers for entropies, rotation, k-means and the replacement of dead codes: see `entropy.py`, `gradients.py` and
`seeding.py`.
Differs from the papers:
* With cosine, the search compares directions, but the output is the stored row. The length of a stored row drifts to a
  little below 1 (EMA) or is trained. An EMA code moves towards the direction of the mean of its latents. A code without
  latents in a step moves back towards length 1.
* A Euclidean code without latents in a step keeps its value. The quotient of its two moving averages is the same value,
  except for a code that was never used: for this code the quotient can be arbitrarily far away.
* Dead codes are replaced. The cluster size of a new code is set to twice the threshold. Therefore a new code without
  latents is dead again after about log 2 / (1 - decay) steps and not already at the next step, and a few latents are
  enough to move a new Euclidean code. The moving average of its sums is set to match its value, so that the new code
  does not jump back.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqcore.config import refuse_idle
from vqcore.errors import SettingError
from vqcore.protocols import Quantized
from vqcore_quant.assignment import nearest
from vqcore_quant.codebook import CodebookConfig, Codes
from vqcore_quant.codes import count_nonfinite, in_range, usage_metrics
from vqcore_quant.entropy import entropies
from vqcore_quant.gradients import rotation, snapshot, straight_through
from vqcore_quant.ranges import check_ranges
from vqcore_quant.usage import distance, entropies_in_bits, valid_mean, validity


class VQ(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) with a codebook that learns in training mode.

    The codebook learns from the latents of all processes. State:
    * `embed`: the codes; a parameter if the codes are trained by gradient, else a buffer.
    * `cluster_size`: EMA of the number of latents per code and step.
    * `embed_avg` (Euclidean EMA only): EMA of the sum of latents per code.
    * `initted`: 0 until k-means has run, then 1. While `initted` is 0, for example in an evaluation before the first
      training step, the codes are random.
    * `project_in` and `project_out`: projections, if the width of a code differs from the width of a latent.
    Separate codebooks add a first axis to `embed`, `cluster_size` and `embed_avg`.
    A training step changes no state if it has no valid latent, or if a valid latent on any process is not finite. The
    metric `codes/nonfinite` counts latents that are not finite, and the losses of such a step are not finite.
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor | None
    initted: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(CodebookConfig):
        """Settings of `quant/vq`."""

        latent_dim: int = 32
        """Width of a latent, at the encoder and at the decoder."""
        num_codebooks: int = 1
        """Number of codes per position. Each codebook quantizes its own part of the latent's channels."""
        shared_codebook: bool = True
        """True: all codebooks share the same codes. False: each codebook has its own codes."""
        code_dim: int | None = None
        """Width of a code; latents are projected to num_codebooks x code_dim and back. Null: latents are split."""
        norm_latents: bool = False
        """Scale latents to length 1 first: changes the gradient and `vq/commit`, and the codes if Euclidean."""
        commitment_weight: float = 1.0
        """Weight of `vq/commit`, the mean squared distance of latents to their codes (0.25 in the paper)."""
        gradient: Literal["straight-through", "rotation"] = "straight-through"
        """The decoder's gradient reaches a latent unchanged, or rotated and scaled as from latent to code."""
        temperature: float = 0.0
        """0: take the nearest code. Above 0: in training, sample the code from the softmax of score / temperature."""
        orthogonal_weight: float = 0.0
        """Weight of `vq/orthogonal`, the mean squared cosine of two codes. Above 0: gradients train the codes."""
        entropy_weight: float = 0.0
        """Weight of `vq/entropy`: a latent's entropy over codes minus entropy_gamma times the batch's entropy."""
        entropy_gamma: float = 1.0
        """Weight of the batch's entropy (even use of codes) relative to a latent's entropy (certain choice)."""
        entropy_temperature: float = 0.01
        """Temperature of the softmax in `vq/entropy`; its scores are cosines or minus squared distances."""

        training_only: ClassVar[tuple[str, ...]] = (
            *CodebookConfig.training_only,
            "commitment_weight",
            "gradient",
            "temperature",
            "orthogonal_weight",
            "entropy_weight",
            "entropy_gamma",
            "entropy_temperature",
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            width = () if self.code_dim is None else ("code_dim",)
            weights = ("commitment_weight", "orthogonal_weight", "entropy_weight", "entropy_gamma")
            check_ranges(
                self,
                counts=("latent_dim", "num_codebooks", *width),
                factors=("temperature", *weights),
                positive=("entropy_temperature",),
            )
            if not self.entropy_weight:
                refuse_idle(self, "entropy_weight=0", "entropy_gamma", "entropy_temperature")
            if self.num_codebooks == 1:
                refuse_idle(self, "num_codebooks=1", "shared_codebook")
            if self.code_dim is None and self.latent_dim % self.num_codebooks:
                raise SettingError(
                    "latent_dim",
                    f"{self.latent_dim} is not divisible by num_codebooks={self.num_codebooks}; "
                    "change one of the two, or set code_dim",
                )

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.dim, self.codebook_size = cfg.latent_dim, cfg.codebook_size
        self.num_codebooks = cfg.num_codebooks
        sets = 1 if cfg.shared_codebook else cfg.num_codebooks
        self._layout = {"s": sets, "h": cfg.num_codebooks // sets}  # each of s sets serves h codebooks
        width = cfg.code_dim or cfg.latent_dim // cfg.num_codebooks
        inner = width * cfg.num_codebooks
        same = inner == cfg.latent_dim
        self.project_in = nn.Identity() if same else nn.Linear(cfg.latent_dim, inner)
        self.project_out = nn.Identity() if same else nn.Linear(inner, cfg.latent_dim)
        embed = nn.init.kaiming_uniform_(torch.empty(sets * cfg.codebook_size, width))
        if cfg.normalize and not embed.is_meta:  # torch loads its compiler for a norm without data: seconds
            embed = F.normalize(embed, dim=-1)
        embed = embed.unflatten(0, (sets, -1)) if sets > 1 else embed
        self.register_buffer("initted", torch.tensor([0.0 if cfg.kmeans_init else 1.0]))
        self.register_buffer("cluster_size", torch.zeros(embed.shape[:-1]))
        if (cfg.codebook == "learned" or cfg.orthogonal_weight > 0) and not cfg.freeze:
            self.embed = nn.Parameter(embed)
            self.without_decay = ("embed",)
        else:
            self.register_buffer("embed", embed)
        averages = torch.zeros_like(embed) if cfg.codebook == "ema" and not cfg.normalize else None
        self.register_buffer("embed_avg", averages)

    @property
    def bits_per_token(self) -> float:
        """Number of bits of all codes at one position."""
        return self.num_codebooks * math.log2(self.codebook_size)

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Give every latent its nearest code; in training, update the codebook. `mask` is True at valid positions."""
        with torch.autocast(z.device.type, enabled=False):
            learns, valid = self.training and not self.cfg.freeze, validity(z, mask)
            nonfinite = count_nonfinite(z.detach(), valid, everywhere=learns)
            latents = self._latents(z.float(), valid)
            rows, rows_valid = self._rows(latents), repeat(valid, "b ... -> s (b ... h)", **self._layout)
            if learns and self.cfg.kmeans_init:
                self._start(rows.detach(), rows_valid & (nonfinite == 0))
            codes = self._search(rows.detach()).reshape(latents.shape[:-1])
            chosen = self._look_up(codes)
            length = valid_mean(z.detach().float().square(), valid).sqrt()
            metrics = {"codes/nonfinite": nonfinite, "latents/rms": length}
            losses = self._losses(latents.flatten(-2), chosen.flatten(-2), valid, metrics)
            metrics |= self._learn(rows.detach(), codes, rows_valid, nonfinite == 0 if learns else None)
            losses |= self._penalties(rows, rows_valid, metrics)
            z_q = self.project_out(self._estimate(latents, chosen.detach()).flatten(-2))
        return Quantized(z_q.to(z.dtype), codes, losses, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Look up the codes. Raises ValueError for a code that is out of range."""
        codes = in_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            return self.project_out(self._look_up(codes).detach().flatten(-2))

    def token_state(self) -> dict[str, Tensor]:
        """The codebook and the projections. The EMA statistics are left out: they do not decide codes."""
        state = self.state_dict()
        return {name: state[name] for name in state if name == "embed" or name.startswith("project_")}

    def _latents(
        self, z: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]
    ) -> Float[Tensor, "b *grid q c"]:
        # Invalid positions may hold NaN or infinity, which would make the gradients of both projections not finite.
        z = torch.where(z.isfinite() | valid.unsqueeze(-1), z, 0)
        latents = rearrange(self.project_in(z), "... (q c) -> ... q c", q=self.num_codebooks)
        return F.normalize(latents, dim=-1) if self.cfg.norm_latents else latents

    def _rows(self, latents: Float[Tensor, "b *grid q c"]) -> Float[Tensor, "s n c"]:
        return rearrange(latents, "b ... (s h) c -> s (b ... h) c", **self._layout)

    def _sets(self) -> list[Codes]:
        """The state as one `Codes` for each set of codes."""
        embed, size, average = self.embed.detach(), self.cluster_size, self.embed_avg
        if self._layout["s"] == 1:
            return [Codes(self.cfg, embed, size, average)]
        averages = [None] * len(embed) if average is None else list(average)
        return [Codes(self.cfg, *each) for each in zip(embed, size, averages, strict=True)]

    def _start(self, rows: Float[Tensor, "s n c"], valid: Bool[Tensor, "s n"]) -> None:
        each = zip(self._sets(), rows, valid, strict=True)
        self.initted.copy_(torch.cat([codes.start(x, ok, self.initted) for codes, x, ok in each]).amin())

    def _search(self, rows: Float[Tensor, "s n c"]) -> Int[Tensor, "m q"]:
        cfg, temperature = self.cfg, self.cfg.temperature if self.training else 0.0
        found = [
            nearest(x, codes.embed, cosine=cfg.normalize, chunk_mib=cfg.chunk_mib, temperature=temperature)
            for x, codes in zip(rows, self._sets(), strict=True)
        ]
        return rearrange(torch.stack(found), "s (n h) -> n (s h)", **self._layout)

    def _look_up(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid q c"]:
        first = torch.arange(self._layout["s"], device=codes.device) * self.codebook_size
        offset = repeat(first, "s -> (s h)", **self._layout)
        return F.embedding(codes + offset, self.embed.flatten(0, -2))

    def _estimate(
        self, latents: Float[Tensor, "b *grid q c"], chosen: Float[Tensor, "b *grid q c"]
    ) -> Float[Tensor, "b *grid q c"]:
        if not self.training:
            return chosen
        return (
            rotation(latents, chosen)
            if self.cfg.gradient == "rotation"
            else straight_through(latents, chosen)
        )

    def _losses(
        self,
        latents: Float[Tensor, "b *grid d"],
        chosen: Float[Tensor, "b *grid d"],
        valid: Bool[Tensor, "b *grid"],
        metrics: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Losses that pull latents to their codes and, if the codes are trained, codes to their latents."""
        apart = distance(latents, chosen.detach(), valid)
        metrics["codes/distance"] = apart.detach()
        weight = self.cfg.commitment_weight
        # Inductor (torch 2.14) removes a factor of 1; loss and metric then share memory, and the backward pass fails.
        losses = {"vq/commit": apart if weight == 1 else weight * apart}
        if self.cfg.codebook == "learned":
            losses["vq/codebook"] = distance(latents.detach(), chosen, valid)
        return losses

    def _penalties(
        self, rows: Float[Tensor, "s n c"], valid: Bool[Tensor, "s n"], metrics: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Losses that keep codes apart and evenly used, computed with the codes as they are after the step."""
        cfg = self.cfg
        losses: dict[str, Tensor] = {}
        if not (cfg.orthogonal_weight or cfg.entropy_weight):
            return losses
        embed = straight_through(self.embed, snapshot(self.embed))
        embed = embed if self._layout["s"] > 1 else embed.unsqueeze(0)
        if cfg.orthogonal_weight > 0:
            losses["vq/orthogonal"] = cfg.orthogonal_weight * _mean_square_cosine(embed)
        if cfg.entropy_weight > 0:
            token, codebook = self._entropies(rows, embed, valid)
            losses["vq/entropy"] = cfg.entropy_weight * (token - cfg.entropy_gamma * codebook)
            metrics |= entropies_in_bits(token, codebook)
        return losses

    def _entropies(
        self, rows: Float[Tensor, "s n c"], embed: Float[Tensor, "s k c"], valid: Bool[Tensor, "s n"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Entropy of a latent's softmax over codes, and entropy of the mean softmax, in nats; means over the sets."""
        each = []
        for queries, keys, mask in zip(rows, embed, valid, strict=True):
            if self.cfg.normalize:
                queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
                bias = torch.zeros_like(keys[:, 0])
            else:  # relative to the mean code the squares are small, so that rounding errors do not change the result
                centre = keys.detach().mean(0)
                queries, keys = 2 * (queries - centre), keys - centre
                bias = -keys.square().sum(-1) / self.cfg.entropy_temperature
            queries = queries / self.cfg.entropy_temperature
            chunk_mib = self.cfg.chunk_mib
            each.append(entropies(queries, keys, bias, mask, chunk_mib=chunk_mib, everywhere=self.training))
        tokens, codebooks = zip(*each, strict=True)
        return torch.stack(tokens).mean(), torch.stack(codebooks).mean()

    @torch.no_grad()
    def _learn(
        self,
        rows: Float[Tensor, "s n c"],
        codes: Int[Tensor, "b *grid q"],
        valid: Bool[Tensor, "s n"],
        sound: Bool[Tensor, ""] | None,
    ) -> dict[str, Tensor]:
        """Update the codes, unless `sound` is None. Return the metrics of codes in use and of dead codes."""
        chosen = rearrange(codes, "b ... (s h) -> s (b ... h)", **self._layout)
        counts, dead = [], []
        for own, x, j, ok in zip(self._sets(), rows, chosen, valid, strict=True):
            if sound is not None:
                count, lost = own.learn(x, j, ok, sound)
            else:
                count = torch.zeros_like(own.size).scatter_add(0, j, ok.to(own.size.dtype))
                lost = own.size < own.threshold(own.size.sum())
            counts.append(count)
            dead.append(lost)
        return usage_metrics(torch.stack(counts), self.codebook_size) | {
            "codes/dead": torch.stack(dead).float().mean()
        }


def _mean_square_cosine(embed: Float[Tensor, "s k c"]) -> Float[Tensor, ""]:
    """Mean of (cosine - [i = j])^2 over all pairs of codes i, j in a set.

    C is the matrix of directions. |C C' - I|^2 = |C' C|^2 - 2 |C|^2 + k needs c x c numbers instead of k x k.
    """
    directions, k = F.normalize(embed, dim=-1), embed.shape[1]
    gram = torch.einsum("skc,skd->scd", directions, directions)
    squares = gram.square().sum((1, 2)) - 2 * directions.square().sum((1, 2)) + k
    return (squares / k**2).mean()
