"""How gradients get past a discrete choice."""

from jaxtyping import Float
from torch import Tensor


def straight_through(z: Float[Tensor, "*shape"], z_q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Give `z_q` exactly, and its gradient to `z` unchanged (arXiv 1308.3432)."""
    return z_q.detach() + (z - z.detach())
