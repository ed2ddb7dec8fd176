"""Helpers for authors of metrics: sums over a batch in `measure`, means of the totals in `summary`."""

import math
from collections.abc import Mapping

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor


def per_sample(each: Float[Tensor, "b c *size"], mask: Tensor | None) -> Float[Tensor, " b"]:
    """The mean of each sample over its valid positions; 0 for a sample without a valid position."""
    if mask is None:
        return reduce(each, "b ... -> b", "mean")
    weight = mask.double().unsqueeze(1).expand_as(each)
    return reduce(each * weight, "b ... -> b", "sum") / reduce(weight, "b ... -> b", "sum").clamp(min=1)


def valid_positions(mask: Tensor | None, like: Tensor) -> Bool[Tensor, "..."]:
    """The mask with the shape of `like`, which may have a channel axis that the mask lacks; all True without a mask."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    return (mask if mask.ndim == like.ndim else rearrange(mask, "b ... -> b 1 ...")).expand_as(like)


def id_counts(ids: Int[Tensor, "..."], count: int) -> Float[Tensor, " k"]:
    """How often each id from 0 to `count` - 1 occurs, in double precision."""
    return torch.bincount(ids.flatten(), minlength=count).double()


def count_of(x: Tensor) -> Float[Tensor, ""]:
    """The length of the first axis as a double on the device of `x`: the number of samples, or of selected values."""
    return torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)


def ratio(total: Tensor, count: Tensor) -> float:
    """The total over the count; NaN where the count is 0."""
    return float(total / count) if float(count) else math.nan


def summed(each: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """The sum and the number of values, under the names that `mean` takes."""
    return {"sum": each.sum(), "count": count_of(each)}


def mean(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of the values that `summed` added up, under the metric's own name; NaN when there was no value."""
    return {"": ratio(sums["sum"], sums["count"])}
