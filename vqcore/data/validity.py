"""Which positions of a sample are valid, said by a modality that rides along: what it does to mask and tensor."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from vqcore.errors import ConfigError, DataError
from vqcore.protocols import Modality, View


def check_masks(modality: Any, masks: Mapping[str, Any]) -> None:
    """Raise `ConfigError` when a mask cannot be one of this modality, or its `mask_value` is no value of it."""
    spec = modality.spec
    for label, rides in masks.items():
        where, value = f"data.extra.{label}", rides.mask_value
        if getattr(modality, "has_own_box", False):
            raise ConfigError(
                f"{where}: data.modality cuts its samples in its own way; a mask beside it fits none"
            )
        if rides.spec.rank != spec.rank:
            raise ConfigError(f"{where}: a mask has {rides.spec.rank} axes where samples have {spec.rank}")
        if value is None:
            continue
        if getattr(modality, "hole_value", None) is not None:
            raise ConfigError(
                f"{where}.mask_value={value:g}: data.modality.mask_value says it already; give one"
            )
        low, high = (0, spec.labels - 1) if spec.labels is not None else spec.range or (value, value)
        if not low <= value <= high or (spec.labels is not None and value != int(value)):
            kind = "class" if spec.labels is not None else "value"
            raise ConfigError(
                f"{where}.mask_value={value:g} is no {kind} of data.modality: {low:g} to {high:g}"
            )


def valid_of(label: str, rides: Any, raw: Any, view: View, extent: tuple[int, ...]) -> Bool[Tensor, "*size"]:
    """Where a mask that rides along says that a view of a sample of this extent is valid.

    Raises `DataError` when mask and sample differ in their aspect by more than a pixel.
    """
    own = rides.extent(raw)
    # One axis gives the scale of the others, give or take half a pixel of the coarser one.
    scale = max(a / b for a, b in zip(own, extent))
    if any(abs(a - scale * b) > max(1.0, 1.01 * scale) for a, b in zip(own, extent)):
        sides = " x ".join(map(str, own)), " x ".join(map(str, extent))
        raise DataError(
            f"its mask '{label}' of {sides[0]} is no mask of a sample of {sides[1]}: the aspects differ"
        )
    return rearrange(rides.tensor(raw, view), "1 ... -> ...") > 0.5


def hidden(modality: Modality, x: Tensor, valid: Bool[Tensor, "*size"], value: float | None) -> Tensor:
    """A sample whose invalid positions hold `value` (None: what they did), or are holes of its validity channel."""
    own = getattr(modality, "hole_value", None)
    if own is not None:
        return torch.cat([torch.where(valid, x[:-1], own), torch.where(valid, x[-1:], -1.0)])
    if value is None:
        return x
    return torch.where(valid, x, value if x.is_floating_point() else int(value))
