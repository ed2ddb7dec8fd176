"""How well a decoder bears wrong codes: a share of a sample's codes is replaced before a second decoding.

A generator makes errors, which a decoder that only ever saw true codes may not bear. Tokenizers that lose less by such
errors made better generated pictures, even where their reconstructions were no better (arXiv 2503.08354, section 3).
Differs from the paper: a code is replaced by one of another position of the same sample, so every quantizer can be
measured, also one without a table of codes, and codes that never occur play no part.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

NAME = "perturbed"
"""Values with replaced codes stand under the names of the plain ones, after `perturbed/`."""


def perturbed(
    codes: Int[Tensor, "b *grid q"], share: float, rng: Sequence[torch.Generator]
) -> Int[Tensor, "b *grid q"]:
    """Codes of which a share of the positions, at least one, has those of another position of the same sample.

    Positions are drawn without replacement, what they get is drawn evenly from all others. The codes of all codebooks
    move together. A sample with a single position stays as it is.
    """
    flat = rearrange(codes, "b ... q -> b (...) q")
    changed, positions = flat.clone(), flat.shape[1]
    if positions < 2:
        return codes
    count = max(1, round(share * positions))
    for own, new, one in zip(flat, changed, rng):
        here = torch.randperm(positions, generator=one)[:count]
        away = torch.randint(1, positions, (count,), generator=one)
        there = (here + away) % positions
        new[here.to(codes.device)] = own[there.to(codes.device)]
    return changed.reshape(codes.shape)
