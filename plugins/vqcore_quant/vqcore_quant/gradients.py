"""How gradients get past a discrete choice."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vqcore_quant.operators import operator


def straight_through(z: Float[Tensor, "*shape"], z_q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Give `z_q` exactly, and its gradient to `z` unchanged (arXiv 1308.3432)."""
    return z_q.detach() + (z - z.detach())


def rotation(z: Float[Tensor, "*shape d"], z_q: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
    """Give `z_q` exactly, and its gradient to `z` turned and scaled as `z_q` is to `z` (arXiv 2410.06424, section 4).

    The map from `z` to `z_q` counts as a constant: a reflection at the vector halfway between the two and one
    more, together the rotation in their plane, times the ratio of lengths. A latent of length 0 has no
    direction: its gradient goes straight through.
    """
    with torch.no_grad():
        length = z.norm(dim=-1, keepdim=True)
        here, there = F.normalize(z, dim=-1), F.normalize(z_q, dim=-1)
        between = F.normalize(here + there, dim=-1)
        scale = z_q.norm(dim=-1, keepdim=True) / length
    reflected = z - 2 * (z * between).sum(-1, keepdim=True) * between
    turned = reflected + 2 * (z * here).sum(-1, keepdim=True) * there
    return straight_through(torch.where(length > 0, scale.nan_to_num() * turned, z), z_q)


def snapshot(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A copy of what a later step overwrites, maybe before the backward pass of a loss on it.

    An operator, because a compiler would drop a plain copy and read the overwritten original in the backward pass.
    No gradient passes.
    """
    return _snapshot_op(x.detach())


def _snapshot(x: Tensor) -> Tensor:
    return x.clone()


_snapshot_op = operator("snapshot", _snapshot, fake=torch.empty_like)
