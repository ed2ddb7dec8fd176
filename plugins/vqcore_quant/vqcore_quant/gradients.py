"""Gradient estimators for a discrete choice."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vqcore_quant.operators import operator


def straight_through(z: Float[Tensor, "*shape"], z_q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return exactly `z_q`; the gradient goes to `z` unchanged (arXiv 1308.3432)."""
    return z_q.detach() + (z - z.detach())


def rotation(z: Float[Tensor, "*shape d"], z_q: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
    """Return exactly `z_q`; the gradient goes to `z` through the rotation and scaling that map `z` to `z_q`.

    Paper: arXiv 2410.06424, section 4. The map from `z` to `z_q` is a constant for autograd: two reflections, the
    first of them at the vector halfway between the two directions, make the rotation in the plane of `z` and `z_q`;
    the ratio of the lengths is the scale. A latent of length 0 has no direction and gets the straight-through gradient.
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
    """Copy a tensor that a later step overwrites, possibly before the backward pass of a loss that uses the tensor.

    The copy is an operator, because a compiler would remove a plain copy and read the overwritten original in the
    backward pass. No gradient flows through the copy.
    """
    return _snapshot_op(x.detach())


def _snapshot(x: Tensor) -> Tensor:
    return x.clone()


_snapshot_op = operator("snapshot", _snapshot, fake=torch.empty_like)
