"""Helpers for authors of metrics: sums over a batch in `measure`, means of the totals in `summary`."""

import math
from collections.abc import Mapping

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqcore.errors import ConfigError, DataError

SLACK = 0.01
"""Samples may lie outside the declared range by this share of its width; metrics count such values as its ends."""


def per_sample(
    each: Float[Tensor, "b c *size"], mask: Tensor | None, weight: Tensor | None = None
) -> Float[Tensor, " b"]:
    """The mean of each sample over its valid positions, weighted if there are weights; 0 if all weights are 0."""
    weight = position_weights(mask, weight)
    if weight is None:
        return reduce(each, "b ... -> b", "mean")
    weight = weight.unsqueeze(1).expand_as(each)
    total = reduce(weight, "b ... -> b", "sum")
    return reduce(each * weight, "b ... -> b", "sum") / total.where(total > 0, 1.0)


def position_weights(mask: Tensor | None, weight: Tensor | None) -> Float[Tensor, "b *size"] | None:
    """Weights of positions in double precision, 0 where the mask is False; None if there is neither."""
    if mask is None or weight is None:
        given = mask if weight is None else weight
        return None if given is None else given.double()
    return mask.double() * weight.double()


def refuse_weight(name: str, weight: Tensor | None) -> None:
    """Raise `ConfigError` if there is a weight: for a metric that cannot use it."""
    if weight is not None:
        raise ConfigError(
            f"metric '{name}' cannot use weights of positions, which these samples have. Name other metrics in "
            "eval.metrics, e.g. mae."
        )


def valid_positions(mask: Tensor | None, like: Tensor) -> Bool[Tensor, "..."]:
    """The mask with the shape of `like`, which may have a channel axis that the mask lacks; all True without a mask."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    return (mask if mask.ndim == like.ndim else rearrange(mask, "b ... -> b 1 ...")).expand_as(like)


def steps(x: Float[Tensor, "..."], span: tuple[float, float], count: int) -> Float[Tensor, "..."]:
    """Values in whole steps of a range, from 0 to `count`, as files of so many levels hold them; double precision."""
    low, high = span
    return ((x.double() - low) / (high - low)).clamp(0, 1).mul(count).round()


def refuse_outside(
    name: str, x: Float[Tensor, "b c *size"], mask: Tensor | None, span: tuple[float, float]
) -> None:
    """Raise `DataError` if a valid value of a sample lies outside the range that a metric takes for the data's."""
    low, high = span
    slack = SLACK * (high - low)
    wrong = ((x < low - slack) | (x > high + slack)) & valid_positions(mask, x)
    if bool(wrong.any()):
        raise DataError(
            f"metric '{name}' is for values from {low:g} to {high:g}, which the modality declares, but a sample has "
            f"{float(x[wrong][0]):.4g}. Correct the range of the modality."
        )


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
