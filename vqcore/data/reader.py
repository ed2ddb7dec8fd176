"""Reads one sample: the main modality and all extra modalities with the same view; masks become part of the sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from vqcore.data.cache import Cache
from vqcore.errors import ConfigError, DataError
from vqcore.protocols import Data, Mask, Modality, View, has_own_box, hole_value, is_mask, mask

Bad = tuple[str, str]
"""The key of a sample that could not be read, and the reason."""


@dataclass(frozen=True)
class Sample:
    """One sample as tensors. `extent` is the size of the sample before the crop."""

    x: Tensor
    key: str
    extent: tuple[int, ...]
    mask: Tensor | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


class Reader:
    """Reads one sample of the main modality and of all extra modalities, all with the same view.

    `most` is the largest size in training: the modality may read fewer details than the file has. Raises `ConfigError`
    for a mask that does not fit the main modality.
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
        # With extra modalities the whole sample is read: all crops must begin at the same pixel.
        self.most = None if extra else most
        self.masks = {label: each for label, each in extra.items() if is_mask(each)}
        self.extra = {label: each for label, each in extra.items() if label not in self.masks}
        self.cache = Cache(cache_mib)
        _check_masks(modality, self.masks)

    def read(self, index: int, size: tuple[int, ...], rng: np.random.Generator | None) -> Sample:
        """The sample at `size`; a random view if `rng` is given, else the evaluation view."""
        raw = self._raw(index, "", self.modality, self.most)
        extent = self.modality.extent(raw)
        view = self.modality.view(extent, size, rng)
        extras = {
            label: each.tensor(self._raw(index, label, each), view) for label, each in self.extra.items()
        }
        valid = mask(self.modality, raw, view)
        x = self.modality.tensor(raw, view)
        for label, each in self.masks.items():
            shown = _valid(label, each, self._raw(index, label, each), view, extent)
            x = _hidden(self.modality, x, shown, each.mask_value)
            if hole_value(self.modality) is None:
                valid = shown if valid is None else valid & shown
        return Sample(x, self.data.key(index), extent, valid, extras)

    def try_read(self, index: int, size: tuple[int, ...], rng: np.random.Generator | None) -> Sample | Bad:
        """The sample, or its key and the reason why it cannot be read. Other exceptions are bugs and are raised."""
        try:
            return self.read(index, size, rng)
        except (DataError, OSError) as error:
            return self.data.key(index), str(error)

    def _raw(
        self, index: int, label: str, modality: Modality, at_least: tuple[int, ...] | None = None
    ) -> Any:
        return self.cache.get(
            (index, label), lambda: modality.read(self.data.get(index, label), at_least=at_least)
        )


def _check_masks(modality: Modality, masks: Mapping[str, Mask]) -> None:
    """Raise `ConfigError` if a mask does not fit the main modality, or if a `mask_value` is not one of its values."""
    spec = modality.spec
    for label, each in masks.items():
        where, value = f"data.extra.{label}", each.mask_value
        if has_own_box(modality):
            raise ConfigError(
                f"{where}: a mask cannot be used here, because data.modality crops its samples in its own way"
            )
        if each.spec.rank != spec.rank:
            raise ConfigError(
                f"{where}: the mask has {each.spec.rank} axes, but the samples have {spec.rank}"
            )
        if value is None:
            continue
        if hole_value(modality) is not None:
            raise ConfigError(
                f"{where}.mask_value={value:g}: data.modality.mask_value is set already; remove one of the two"
            )
        low, high = (0, spec.labels - 1) if spec.labels is not None else spec.range or (value, value)
        if not low <= value <= high or (spec.labels is not None and value != int(value)):
            kind = "class" if spec.labels is not None else "value"
            raise ConfigError(
                f"{where}.mask_value={value:g} is not a {kind} of data.modality: {low:g} to {high:g}"
            )


def _valid(
    label: str, modality: Mask, raw: Any, view: View, extent: tuple[int, ...]
) -> Bool[Tensor, "*size"]:
    """The valid positions of a view, from the mask of a sample with this extent.

    Raises `DataError` if the aspect ratios of mask and sample differ by more than a pixel.
    """
    own = modality.extent(raw)
    # The largest ratio of an axis gives the scale; the other axes may differ by one pixel of the coarser of the two.
    scale = max(a / b for a, b in zip(own, extent))
    if any(abs(a - scale * b) > max(1.0, 1.01 * scale) for a, b in zip(own, extent)):
        sides = " x ".join(map(str, own)), " x ".join(map(str, extent))
        raise DataError(
            f"the mask '{label}' of {sides[0]} does not fit the sample of {sides[1]}: the aspect ratios differ"
        )
    return rearrange(modality.tensor(raw, view), "1 ... -> ...") > 0.5


def _hidden(modality: Modality, x: Tensor, valid: Bool[Tensor, "*size"], value: float | None) -> Tensor:
    """The sample with `value` at invalid positions (None: unchanged). Marks holes if there is a validity channel."""
    own = hole_value(modality)
    if own is not None:
        return torch.cat([torch.where(valid, x[:-1], own), torch.where(valid, x[-1:], -1.0)])
    if value is None:
        return x
    return torch.where(valid, x, value if x.is_floating_point() else int(value))
