"""What holds for the codes of every quantizer: their range, and how a batch uses them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def check_range(codes: Int[Tensor, "*shape"], codebook_size: int) -> None:
    """Raise ValueError that names the first code outside `[0, codebook_size)`."""
    outside = codes[(codes < 0) | (codes >= codebook_size)]
    if len(outside):
        raise ValueError(f"code {int(outside[0])} is out of range: codes lie in [0, {codebook_size})")


def usage_metrics(counts: Float[Tensor, " k"], codebook_size: int) -> dict[str, Float[Tensor, ""]]:
    """Compute perplexity (1 to `codebook_size`) and the share of codes in use from each code's frequency.

    Codes that do not occur may be left out of `counts`.
    """
    share = counts / counts.sum().clamp(min=1)
    return {
        "codes/perplexity": torch.exp(-torch.xlogy(share, share).sum()),
        "codes/usage": (counts > 0).sum() / codebook_size,
    }
