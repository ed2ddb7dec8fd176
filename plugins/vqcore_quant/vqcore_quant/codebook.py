"""How one set of codes learns from the latents: first codes, moving averages, replacement of dead codes.

All updates are written in place and are the same on every process. No Python branch depends on a tensor's values: in a
step that must not count, every change is multiplied by 0. For differences from the papers see `vq.py`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

import vqcore.config
from vqcore.config import refuse_idle
from vqcore.errors import SettingError
from vqcore_quant.assignment import totals
from vqcore_quant.ranges import check_ranges
from vqcore_quant.seeding import first_codes, revived


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(vqcore.config.Config):
    """Settings of a set of codes."""

    codebook_size: int
    """Number of codes in a codebook."""
    normalize: bool = True
    """True: search by cosine. False: search by Euclidean distance."""
    codebook: Literal["ema", "learned"] = "ema"
    """ema: codes follow the means of their latents. learned: codes are trained by the loss `vq/codebook`."""
    freeze: bool = False
    """Keep the codes fixed in training too: no EMA, no gradient, no k-means, no replacement of dead codes."""
    decay: float = 0.99
    """EMA decay: the share of a code's statistics that is kept at each step, 0 <= decay < 1."""
    eps: float = 1e-5
    """Laplace smoothing of the cluster sizes (Euclidean EMA), in latents per step."""
    kmeans_init: bool = False
    """Initialise the codebook by k-means on the first training batch instead of with random directions."""
    kmeans_iters: int = 10
    """Number of iterations of the k-means initialisation."""
    dead_code: Literal["batch_random", "linde_buzo_gray"] | None = "batch_random"
    """Replace a dead code by a random latent of the batch or by a near copy of a frequently used code. Null: never."""
    threshold_ema_dead_code: float | None = None
    """A code is dead when its EMA of latents per step is below this value; 0: never. Null: use coef_ema_dead_code."""
    coef_ema_dead_code: float | None = 32.0
    """A code is dead when its EMA is this many times smaller than the step's mean number per code. Null: never."""
    chunk_mib: float = 8.0
    """Extra memory for distances, in MiB. This value does not change any code."""

    training_only: ClassVar[tuple[str, ...]] = (
        "codebook",
        "freeze",
        "decay",
        "eps",
        "kmeans_init",
        "kmeans_iters",
        "dead_code",
        "threshold_ema_dead_code",
        "coef_ema_dead_code",
        "chunk_mib",
    )

    def __post_init__(self) -> None:
        threshold = () if self.threshold_ema_dead_code is None else ("threshold_ema_dead_code",)
        coef = () if self.coef_ema_dead_code is None else ("coef_ema_dead_code",)
        check_ranges(
            self,
            counts=("codebook_size", "kmeans_iters"),
            factors=threshold,
            positive=("eps", "chunk_mib", *coef),
        )
        if not self.kmeans_init:
            refuse_idle(self, "kmeans_init=false", "kmeans_iters")
        if self.dead_code is None:
            refuse_idle(self, "dead_code=null", "threshold_ema_dead_code")
        if self.threshold_ema_dead_code is not None and self.coef_ema_dead_code is not None:
            given = f"threshold_ema_dead_code={self.threshold_ema_dead_code:g}"
            refuse_idle(self, given, "coef_ema_dead_code")
        if not 0 <= self.decay < 1:
            raise SettingError("decay", f"{self.decay} is not in [0, 1)")


@dataclass(frozen=True)
class Codes:
    """One set of codes: tensors that share memory with a quantizer's state, without autograd."""

    cfg: CodebookConfig
    embed: Float[Tensor, "k c"]
    size: Float[Tensor, " k"]
    """EMA of the number of latents per code and step."""
    average: Float[Tensor, "k c"] | None
    """EMA of the sum of latents per code; only for Euclidean codes with `codebook: ema`."""

    def start(
        self, rows: Float[Tensor, "n c"], valid: Bool[Tensor, " n"], initted: Float[Tensor, "1"]
    ) -> Float[Tensor, "1"]:
        """Initialise the codes by k-means unless `initted` is 1. Return the new value of `initted`."""
        means, counts, done = first_codes(
            rows,
            valid,
            self.embed,
            self.size,
            initted,
            iters=self.cfg.kmeans_iters,
            cosine=self.cfg.normalize,
            chunk_mib=self.cfg.chunk_mib,
        )
        self._set((done > initted).expand(len(counts)), means, counts)
        return done

    def learn(
        self,
        rows: Float[Tensor, "n c"],
        codes: Int[Tensor, " n"],
        valid: Bool[Tensor, " n"],
        sound: Bool[Tensor, ""],
    ) -> tuple[Float[Tensor, " k"], Bool[Tensor, " k"]]:
        """Update the codes from all processes' valid rows if `sound`; return the rows per code and the dead codes."""
        rows = F.normalize(rows, dim=-1) if self.cfg.normalize else rows
        follows = self.cfg.codebook == "ema"
        counts, sums = totals(rows if follows else rows[:, :0], codes, self.cfg.codebook_size, valid)
        tokens = counts.sum()
        sound = sound & (tokens > 0) & ((0 * sums).sum() == 0)  # 0 * sum is NaN if the sum is not finite
        self.size.lerp_(counts, (1 - self.cfg.decay) * sound)
        if follows:
            self._follow(counts, sums, sound)
        threshold = self.threshold(torch.where(sound, tokens, self.size.sum()))
        dead = self.size < threshold
        if self.cfg.dead_code is not None:
            policy, cosine, lost = self.cfg.dead_code, self.cfg.normalize, dead & sound
            fresh = revived(self.embed, self.size, lost, rows, valid, policy=policy, cosine=cosine)
            self._set(lost, fresh, (2 * threshold).expand_as(self.size))
        return counts, dead

    def threshold(self, tokens: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Cluster size below which a code is dead after a step of `tokens` latents."""
        if self.cfg.threshold_ema_dead_code is not None:
            return torch.full_like(tokens, self.cfg.threshold_ema_dead_code)
        if self.cfg.coef_ema_dead_code is None:
            return torch.zeros_like(tokens)
        return tokens / self.cfg.codebook_size / self.cfg.coef_ema_dead_code

    def _follow(
        self, counts: Float[Tensor, " k"], sums: Float[Tensor, "k c"], sound: Bool[Tensor, ""]
    ) -> None:
        rate, used = (1 - self.cfg.decay) * sound, ((counts > 0) & sound).unsqueeze(1)
        if self.cfg.normalize:
            self.embed.lerp_(F.normalize(torch.where(used, sums, self.embed), dim=-1), rate)
        if self.average is not None:
            self.average.lerp_(torch.where(sound, sums, 0), rate)
            total, eps = self.size.sum(), self.cfg.eps
            smoothed = (self.size + eps) * (total / (total + self.cfg.codebook_size * eps))
            self.embed.copy_(torch.where(used, self.average / smoothed.unsqueeze(1), self.embed))

    def _set(self, where: Bool[Tensor, " k"], embed: Float[Tensor, "k c"], size: Float[Tensor, " k"]) -> None:
        """Set the value of some codes, and their statistics to match the value."""
        column = where.unsqueeze(1)
        self.embed.copy_(torch.where(column, embed, self.embed))
        self.size.copy_(torch.where(where, size, self.size))
        if self.average is not None:
            self.average.copy_(torch.where(column, embed * size.unsqueeze(1), self.average))
