"""Metrics of each reconstruction beside its own sample: LPIPS, and structural similarity at several scales."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vqcore.config import NoSettings
from vqcore.errors import cannot_import
from vqcore.metrics.sums import ratio
from vqcore.protocols import DataSpec
from vqcore_percept.judges import Judge, Pictures
from vqcore_percept.lpips import LPIPS

SMALLEST = 176
"""MS-SSIM halves a picture four times, and its window is 11 wide."""


class LPIPSMetric(Judge):
    """LPIPS (arXiv 1801.03924), version 0.1, of pictures rounded to 8 bits, mean over samples."""

    name = "percept/lpips"

    @dataclass(frozen=True, kw_only=True)
    class Config(LPIPS.Config):
        """Settings of the metric `percept/lpips`."""

        net: Literal["alex", "vgg", "squeeze"] = "alex"
        """The network. Most papers report `alex`, some `vgg`: the values of two networks cannot be compared."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        self.judge = LPIPS(cfg, spec=spec)
        heads = "" if cfg.heads else " without heads"
        self.convention = f"LPIPS 0.1, {cfg.net}{heads}, pictures of 8 bits as they are, mean over samples"

    @torch.no_grad()
    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One distance a sample."""
        return {"distance": self.judge(*self.seen(x_hat, x, mask, weight))}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return {"": ratio(sums["distance"], sums["count"])}


class MSSSIM(Pictures):
    """MS-SSIM (Wang, Simoncelli, Bovik, Asilomar 2003) of torchmetrics, mean over samples; needs 176 pixels.

    Five scales with the paper's weights, Gaussian window 11 wide, sigma 1.5. Negative similarities count as 0. The last
    scale sees mirrored borders, the others only windows inside the picture, as in torchmetrics.
    """

    name = "percept/ms-ssim"
    better: Literal["higher"] = "higher"
    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        if spec.rank != 2:
            raise ValueError(f"ms-ssim is for pictures with 2 axes, the data has {spec.rank}")
        _check_size(spec.size)
        self.measured: Any = _library().multiscale_structural_similarity_index_measure

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The similarity of each sample."""
        _check_size(tuple(x.shape[2:]))
        low, high = self.range
        pair = ((one - low) / (high - low) for one in self.seen(x_hat, x, mask, weight))
        return {"similarity": self.measured(*pair, data_range=1.0, normalize="relu", reduction="none")}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return {"": ratio(sums["similarity"], sums["count"])}

    def facts(self) -> dict[str, str]:
        """How this metric measures."""
        low, high = self.range
        return {
            "convention": "torchmetrics, 5 scales, Gaussian window 11, sigma 1.5, range "
            f"{low:g} to {high:g} in 255 steps, negative as 0, mean over channels at each scale, mean over samples"
        }


def _check_size(size: tuple[int, ...]) -> None:
    if min(size) < SMALLEST:
        raise ValueError(
            f"ms-ssim needs {SMALLEST} pixels along each axis; the size is {' x '.join(map(str, size))}"
        )


def _library() -> Any:
    try:
        return importlib.import_module("torchmetrics.functional.image")
    except ImportError as error:
        raise ValueError(cannot_import(error, "torchmetrics")) from error
