"""How well a decoder bears wrong codes: a share of a sample's codes is replaced before a second decoding.

A generator makes errors, which a decoder that only ever saw true codes may not bear. Tokenizers that lose less by such
errors made better generated pictures, even where their reconstructions were no better (arXiv 2503.08354, section 3).
Differs from the paper: a code is replaced by one of another position of the same sample, so every quantizer can be
measured, also one without a table of codes, and codes that never occur play no part.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

NAME = "perturbed"
"""Values with replaced codes stand under the names of the plain ones, after `perturbed/`."""


def perturbed(
    codes: Int[Tensor, "b *grid q"],
    share: float,
    rng: Sequence[torch.Generator],
    valid: Bool[Tensor, "b *grid"] | None = None,
) -> Int[Tensor, "b *grid q"]:
    """Codes of which a share of the valid positions, at least one, has those of another valid position of the sample.

    Positions are drawn without replacement, what they get is drawn evenly from all others. The codes of all codebooks
    move together. A sample with a single valid position stays as it is.
    """
    flat = rearrange(codes, "b ... q -> b (...) q").cpu()
    known = torch.ones(flat.shape[:2], dtype=torch.bool) if valid is None else valid.cpu().flatten(1)
    changed = flat.clone()
    for own, new, here, one in zip(flat, changed, known, rng):
        places = here.nonzero().flatten()
        if len(places) < 2:
            continue
        count = max(1, round(share * len(places)))
        order = torch.randperm(len(places), generator=one)[:count]
        away = torch.randint(1, len(places), (count,), generator=one)
        new[places[order]] = own[places[(order + away) % len(places)]]
    return changed.reshape(codes.shape).to(codes.device)
