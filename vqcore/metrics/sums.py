"""Sums that metrics are made of; authors of metrics import them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor


def per_sample(each: Float[Tensor, "b *rest"], mask: Tensor | None) -> Float[Tensor, " b"]:
    if mask is None:
        return reduce(each, "b ... -> b", "mean")
    weight = mask.double().unsqueeze(1).expand_as(each)
    return reduce(each * weight, "b ... -> b", "sum") / reduce(weight, "b ... -> b", "sum").clamp(min=1)


def sample_count(x: Tensor) -> Tensor:
    return torch.tensor(len(x), dtype=torch.float64, device=x.device)


def valid_positions(mask: Tensor | None, like: Tensor) -> Bool[Tensor, "..."]:
    """The mask with the shape of `like`, which may have an axis of channels that the mask lacks."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    return (mask if mask.ndim == like.ndim else rearrange(mask, "b ... -> b 1 ...")).expand_as(like)


def id_counts(ids: Int[Tensor, "..."], count: int) -> Float[Tensor, " k"]:
    return torch.bincount(ids.flatten(), minlength=count).double()


def ratio(total: Tensor, count: Tensor) -> float:
    return float(total / count) if float(count) else math.nan


def summed(each: Float[Tensor, " b"]) -> dict[str, Tensor]:
    return {
        "sum": each.sum(),
        "count": torch.tensor(float(len(each)), dtype=torch.double, device=each.device),
    }


def mean(sums: Mapping[str, Any]) -> dict[str, float]:
    return {"": float(sums["sum"] / sums["count"])}
