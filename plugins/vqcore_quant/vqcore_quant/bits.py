"""Codes whose bits are the signs of the latent's channels. The first channel is the lowest bit.

Paper: "Language Model Beats Diffusion", arXiv 2310.05737, section 3.1.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


def bits_of(codebook_size: int) -> int:
    """Number of bits of a code. Raises ValueError if `codebook_size` is not a power of two from 2 to 2^31."""
    bits = codebook_size.bit_length() - 1
    if not 2 <= codebook_size <= 2**31:
        raise ValueError(f"codebook_size={codebook_size} is not in [2, {2**31}]")
    if codebook_size != 2**bits:
        raise ValueError(
            f"codebook_size={codebook_size} is not a power of two; the nearest are {2**bits} and {2 ** (bits + 1)}"
        )
    return bits


def pack(bits: Bool[Tensor, "b *grid d"]) -> Int[Tensor, "b *grid 1"]:
    """The integer that has these bits."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1, keepdim=True)


def signs(codes: Int[Tensor, "b *grid 1"], bits: int) -> Float[Tensor, "b *grid d"]:
    """1.0 for each bit that is 1, and -1.0 for each bit that is 0."""
    found = rearrange(codes, "... 1 -> ... 1") >> torch.arange(bits, device=codes.device) & 1
    return (2 * found - 1).float()
