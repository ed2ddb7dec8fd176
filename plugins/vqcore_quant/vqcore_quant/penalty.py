"""Entropy of codes made of independent bits, without a table of tokens x codes.

Papers: "Language Model Beats Diffusion", arXiv 2310.05737, section 3.1 (the penalty: tokens certain of their code,
codes evenly used); "Image and Video Tokenization with Binary Spherical Quantization", arXiv 2406.07548, section 4
(both terms from the probabilities of single bits).
With p(c | z) proportional to exp(-|z - c|^2 / T) the bits of a token are independent, so
* a token's entropy is the sum over its bits: exact at O(bits);
* the mean distribution over g bits is a product of two matrices, tokens x 2^(g/2) each: exact at that memory.
Differs from the first paper: for codes of more than `group_bits` bits the entropy of the mean distribution is the
sum over groups of bits, an upper bound (it does not see what groups tell of one another). The second paper's
approximation is the same with groups of one bit.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

import vqcore.config
from vqcore_quant.bits import bits_of
from vqcore_quant.ranges import check_ranges
from vqcore_quant.usage import entropies_in_bits, mean_of_all, only, valid_mean

MAX_GROUP_BITS = 20


@dataclass(frozen=True, kw_only=True)
class BinaryConfig(vqcore.config.Config):
    """Settings that quantizers to signs have in common."""

    codebook_size: int
    """Number of codes, a power of two; its logarithm is the latent's width."""
    entropy_weight: float = 0.01
    """Factor on the entropy loss (tokens certain of their code, codes evenly used), beside an MSE; others take 0.1."""
    entropy_gamma: float = 1.0
    """Weight of even use against certainty within that loss."""
    entropy_temperature: float = 1.0
    """T of the soft assignment exp(-|z - c|^2 / T) that the entropies are of; small ones have no gradient."""
    group_bits: int = 12
    """Even use is exact up to this many bits, beyond it a sum over groups; memory: tokens x 2^(half of it)."""
    commitment_weight: float = 0.05
    """Factor on the squared distance of latents to their codes."""

    training_only: ClassVar[tuple[str, ...]] = (
        "entropy_weight",
        "entropy_gamma",
        "entropy_temperature",
        "group_bits",
        "commitment_weight",
    )

    def __post_init__(self) -> None:
        bits_of(self.codebook_size)
        factors = ("entropy_weight", "entropy_gamma", "commitment_weight")
        check_ranges(self, factors=factors, positive=("entropy_temperature",))
        if not 1 <= self.group_bits <= MAX_GROUP_BITS:
            raise ValueError(f"group_bits={self.group_bits} is not in [1, {MAX_GROUP_BITS}]")


def entropy_penalty(
    cfg: BinaryConfig,
    logits: Float[Tensor, "b *grid bits"],
    valid: Bool[Tensor, "b *grid"],
    *,
    training: bool,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Mean entropy of a token minus `entropy_gamma` times that of the mean, in nats and weighted; and both in bits.

    `logits` are the log odds of the bits. In training the mean goes over all processes; every process must call.
    """
    logits = only(logits, valid)
    token = valid_mean(token_entropy(logits).unsqueeze(-1), valid)
    codebook = codebook_entropy(logits, valid, group_bits=cfg.group_bits, training=training)
    return cfg.entropy_weight * (token - cfg.entropy_gamma * codebook), entropies_in_bits(token, codebook)


def token_entropy(logits: Float[Tensor, "*shape bits"]) -> Float[Tensor, "*shape"]:
    """Entropy of each token's distribution over codes, in nats."""
    odds = logits.abs()
    return (F.softplus(-odds) + odds * torch.sigmoid(-odds)).sum(-1)


def codebook_entropy(
    logits: Float[Tensor, "b *grid bits"], valid: Bool[Tensor, "b *grid"], *, group_bits: int, training: bool
) -> Float[Tensor, ""]:
    """Entropy of the valid tokens' mean distribution, in nats: exact up to `group_bits` bits, else group by group."""
    kept = only(logits, valid).flatten(0, -2)
    weight = valid.flatten().to(logits.dtype).unsqueeze(-1)
    entropy = logits.new_zeros(())
    for group in kept.tensor_split(-(-kept.shape[-1] // group_bits), dim=-1):
        half = group.shape[-1] // 2
        low, high = _joint(group[:, :half]), _joint(group[:, half:])
        share = mean_of_all(low.T @ (high * weight), weight.sum(), training=training)
        entropy = entropy - (share * share.clamp(min=1e-30).log()).sum()
    return entropy


def _joint(logits: Float[Tensor, "n bits"]) -> Float[Tensor, "n codes"]:
    """Each token's probabilities of all combinations of the bits."""
    log_p = logits.new_zeros(logits.shape[0], 1)
    for i in range(logits.shape[-1]):
        bit = logits[:, i : i + 1]
        log_p = torch.cat([log_p + F.logsigmoid(-bit), log_p + F.logsigmoid(bit)], dim=-1)
    return log_p.exp()
