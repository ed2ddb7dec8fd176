"""Reads one sample: the main modality and all extra modalities with the same view; masks become part of the sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from vqcore.data.cache import Cache
from vqcore.errors import ConfigError, DataError
from vqcore.protocols import Data, Modality, View

Bad = tuple[str, str]
"""Key of a sample that could not be read, and why."""


@dataclass(frozen=True)
class Sample:
    """One sample as tensors. `extent` is what it measured before it was cropped."""

    x: Tensor
    key: str
    extent: tuple[int, ...]
    mask: Tensor | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


class Reader:
    """Reads one sample with everything that rides along, all with one view; masks become part of the sample.

    `most` is the largest size that training asks for: the modality may read less detail than the file has. Raises
    `ConfigError` for a mask that does not fit the modality.
    """

    def __init__(
        self,
        data: Data,
        modality: Modality,
        extra: Mapping[str, Modality],
        cache_mib: float = 0.0,
        most: tuple[int, ...] | None = None,
    ):
        self.data, self.modality = data, modality
        # Beside extra modalities samples stay whole: a crop must begin where theirs does, to the pixel.
        self.most = None if extra else most
        self.masks = {label: rides for label, rides in extra.items() if getattr(rides, "is_mask", False)}
        self.extra = {label: rides for label, rides in extra.items() if label not in self.masks}
        self.cache = Cache(cache_mib)
        check_masks(modality, self.masks)

    def read(self, index: int, size: tuple[int, ...], rng: np.random.Generator | None) -> Sample:
        raw = self._raw(index, "", self.modality, self.most)
        extent = self.modality.extent(raw)
        view = self.modality.view(extent, size, rng)
        extras = {
            label: rides.tensor(self._raw(index, label, rides), view) for label, rides in self.extra.items()
        }
        mask = self.modality.mask(raw, view) if self.modality.spec.mask else None  # type: ignore[attr-defined]
        sample = Sample(self.modality.tensor(raw, view), self.data.key(index), extent, mask, extras)
        for label, rides in self.masks.items():
            sample = self._masked(sample, label, rides, index, view)
        return sample

    def _masked(self, sample: Sample, label: str, rides: Any, index: int, view: View) -> Sample:
        """A sample of which only what a mask calls valid is left."""
        valid = valid_of(label, rides, self._raw(index, label, rides), view, sample.extent)
        x = hidden(self.modality, sample.x, valid, rides.mask_value)
        if getattr(self.modality, "hole_value", None) is not None:
            return replace(sample, x=x)
        return replace(sample, x=x, mask=valid if sample.mask is None else sample.mask & valid)

    def _raw(
        self, index: int, label: str, modality: Modality, at_least: tuple[int, ...] | None = None
    ) -> Any:
        return self.cache.get(
            (index, label), lambda: modality.read(self.data.get(index, label), at_least=at_least)
        )

    def try_read(self, index: int, size: tuple[int, ...], rng: np.random.Generator | None) -> Sample | Bad:
        """The sample, or its key and why there is none. Any other exception is a bug and passes."""
        try:
            return self.read(index, size, rng)
        except (DataError, OSError) as error:
            return self.data.key(index), str(error)


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
