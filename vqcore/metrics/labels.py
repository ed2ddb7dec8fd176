"""Metrics of class maps and masks: accuracy, intersection over union, F1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqcore.config import Config as BaseConfig
from vqcore.config import NoSettings
from vqcore.metrics.sums import id_counts, position_weights, ratio, refuse_weight, valid_positions
from vqcore.protocols import DataSpec


class Accuracy:
    """Share of the valid positions of class maps whose most likely class is the true class."""

    better = "higher"
    of_constant = True
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        if spec.labels is None:
            raise ValueError("accuracy is for class maps")

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Number of correct positions, and of all valid positions."""
        right = (x_hat.argmax(1) == x).double()
        valid = position_weights(mask, weight)
        valid = torch.ones_like(right) if valid is None else valid
        return {"right": (right * valid).sum(), "all": valid.sum()}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The share of correct positions."""
        return {"": ratio(sums["right"], sums["all"])}

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        return {"convention": "over all positions of the set"}


class IoU:
    """Intersection over union of the predicted and the true positions of a class; mean over the classes that occur.

    A class occurs when it is the true class of a valid position anywhere in the data set. Binary data have one class,
    the upper value.
    """

    better = "higher"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """Settings of `iou`."""

        per_class: bool = False
        """Also report every class that occurs, as iou/<id>."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        if spec.labels is None and spec.kind != "binary":
            raise ValueError(f"iou is for class maps and binary data, not for {spec.kind} data")
        self.cfg, self.labels, self.middle = cfg, spec.labels, _middle(spec)

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Per class, the number of positions where prediction and truth agree, of the prediction, and of the truth."""
        refuse_weight("iou", weight)
        count = self.labels or 2
        if self.labels is None:
            found, true = (x_hat > self.middle).long(), (x > self.middle).long()
        else:
            found, true = x_hat.argmax(1), x.long()
        valid = valid_positions(mask, true)
        found, true = found[valid], true[valid]
        return {
            "both": id_counts(true[found == true], count),
            "found": id_counts(found, count),
            "true": id_counts(true, count),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over the classes that occur; NaN when no class occurs."""
        either = sums["found"] + sums["true"] - sums["both"]
        shares = sums["both"] / either.clamp(min=1)
        occurs = sums["true"] > 0
        if self.labels is None:
            return {"": float(shares[1]) if occurs[1] else math.nan}
        found = {"": float(shares[occurs].mean())}
        if self.cfg.per_class:
            found |= {str(int(k)): float(shares[k]) for k in occurs.nonzero().flatten()}
        return found

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        return {
            "convention": "over all positions of the set, then the mean over the classes that occur in it"
        }


class F1:
    """Harmonic mean of precision and recall of the positions above a threshold, over the whole data set."""

    better = "higher"

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """Settings of `f1`."""

        threshold: float = 0.5
        """Values above this share of the declared range count as positive, in the data and in the reconstruction."""

        def __post_init__(self) -> None:
            if not 0 < self.threshold < 1:
                raise ValueError(f"threshold={self.threshold} must lie between 0 and 1")

    def __init__(self, cfg: Config, *, spec: DataSpec):
        if spec.range is None:
            raise ValueError("f1 needs data with a declared range")
        low, high = spec.range
        self.threshold = low + cfg.threshold * (high - low)

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Number of true positives, of false positives and of false negatives."""
        refuse_weight("f1", weight)
        found, true = x_hat > self.threshold, x > self.threshold
        valid = valid_positions(mask, true)
        return {
            "right": (found & true & valid).double().sum(),
            "false": (found & ~true & valid).double().sum(),
            "missed": (~found & true & valid).double().sum(),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """F1, precision and recall; 0 where the denominator is 0."""
        right, false, missed = (float(sums[name]) for name in ("right", "false", "missed"))
        return {
            "": 2 * right / max(2 * right + false + missed, 1),
            "precision": right / max(right + false, 1),
            "recall": right / max(right + missed, 1),
        }

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        return {
            "convention": f"over all positions of the set; positive above {self.threshold:g}, as the tokenizer sees it"
        }


def _middle(spec: DataSpec) -> float:
    low, high = spec.range or (0.0, 1.0)
    return (low + high) / 2
