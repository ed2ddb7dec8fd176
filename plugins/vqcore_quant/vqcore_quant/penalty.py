"""Entropy of codes that consist of independent bits, without a matrix of tokens x codes.

Papers: "Language Model Beats Diffusion", arXiv 2310.05737, section 3.1 (the penalty: certain choice of codes, even use
of codes); "Image and Video Tokenization with Binary Spherical Quantization", arXiv 2406.07548, section 4
(both terms from the probabilities of single bits).
With p(c | z) proportional to exp(-|z - c|^2 / T) the bits of a token are independent. Therefore
* the entropy of a token is the sum of the entropies of its bits: exact, at a cost of O(bits);
* the mean distribution over g bits is a product of two matrices of tokens x 2^(g/2): exact, with the memory of these
  two matrices.
Differs from the first paper: for codes of more than `group_bits` bits the entropy of the mean distribution is replaced
by the sum of the entropies of groups of bits. This sum is an upper bound, because it ignores the dependence between
groups. The second paper's approximation is the same sum with groups of one bit.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

import vqcore.config
from vqcore.config import refuse_idle
from vqcore.errors import SettingError
from vqcore_quant.bits import bits_of
from vqcore_quant.ranges import check_ranges
from vqcore_quant.usage import entropies_in_bits, mean_of_all, only, valid_mean

MAX_GROUP_BITS = 20


@dataclass(frozen=True, kw_only=True)
class BinaryConfig(vqcore.config.Config):
    """Settings that the quantizers to signs (`lfq`, `bsq`) share."""

    codebook_size: int
    """Number of codes, a power of two. Its base-2 logarithm is the width of a latent."""
    entropy_weight: float = 0.01
    """Weight of the entropy loss (certain choice, even use of codes); default: for an MSE loss; others use 0.1."""
    entropy_gamma: float = 1.0
    """Weight, inside the entropy loss, of even use of codes relative to a certain choice of codes."""
    entropy_temperature: float = 1.0
    """T of the soft assignment exp(-|z - c|^2 / T) in the entropy loss; for small T the gradient vanishes."""
    group_bits: int = 12
    """The codebook's entropy is exact up to this many bits, then a sum over groups; memory: tokens x 2^(bits / 2)."""
    commitment_weight: float = 0.05
    """Weight of the squared distance of latents to their codes."""

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
        if not self.entropy_weight:
            names = ("entropy_gamma", "entropy_temperature", "group_bits")
            refuse_idle(self, "entropy_weight=0", *names)
        if not 1 <= self.group_bits <= MAX_GROUP_BITS:
            raise SettingError("group_bits", f"{self.group_bits} is not in [1, {MAX_GROUP_BITS}]")


def entropy_penalty(
    cfg: BinaryConfig,
    logits: Float[Tensor, "b *grid bits"],
    valid: Bool[Tensor, "b *grid"],
    *,
    training: bool,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The weighted entropy loss in nats, and its two entropies in bits as metrics.

    The loss is the mean entropy of a token minus `entropy_gamma` times the entropy of the mean distribution. `logits`
    are the log odds of the bits. In training the mean distribution is over all processes; every process must call this
    function.
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
    """Entropy of the valid tokens' mean distribution in nats: exact up to `group_bits` bits, else a sum over groups."""
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
    """For each token, the probability of every combination of the bits."""
    log_p = logits.new_zeros(logits.shape[0], 1)
    for i in range(logits.shape[-1]):
        bit = logits[:, i : i + 1]
        log_p = torch.cat([log_p + F.logsigmoid(-bit), log_p + F.logsigmoid(bit)], dim=-1)
    return log_p.exp()
