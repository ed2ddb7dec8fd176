"""What the denoisers of this package share: settings, the space that is noised, and sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.config import Config, at_least, refuse_idle
from vqcore.errors import SettingError
from vqcore.protocols import DataSpec, expand


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(Config):
    """Settings that the denoisers of this package share."""

    training_only: ClassVar[tuple[str, ...]] = ("dropout", "checkpointing")

    patch_size: int = 4
    """Side of the patches that the network sees as one position."""
    dropout: float = 0.0
    """Probability that a channel is dropped inside a residual branch in training."""
    norm_groups: int = 32
    """Groups of every GroupNorm; the number must divide the channels of every level."""
    resolution_cond: bool = False
    """Tell the network the size that a sample had before it was cropped and resized."""
    missing_resolution: int | tuple[int, ...] | None = 512
    """The size to tell where the original size is not known, as in decoding tokens; null: tell nothing."""
    checkpointing: bool = False
    """Recompute the blocks in the backward pass instead of storing their activations: less memory, slower."""

    def __post_init__(self) -> None:
        if not self.resolution_cond:
            refuse_idle(self, "resolution_cond=false", "missing_resolution")
        at_least(self, missing_resolution=1, patch_size=1, norm_groups=1)
        if not 0 <= self.dropout < 1:
            raise SettingError("dropout", f"{self.dropout} must be in [0, 1)")


def check_groups(cfg: Any, name: str, widths: Sequence[int], groups: int) -> None:
    """Refuse widths that GroupNorm cannot divide."""
    for width in widths:
        if width % groups:
            raise SettingError(
                (name, "norm_groups"), f"{width} channels are not divisible by norm_groups={groups}"
            )


class Pixels(nn.Module):
    """A denoiser that predicts in the space of the samples themselves."""

    is_denoiser: Literal[True] = True

    def __init__(self, cfg: DenoiserConfig, spec: DataSpec, multiple: int):
        super().__init__()
        if spec.kind == "categorical":
            raise ValueError(
                "a denoiser adds noise to numbers, and these samples are labels: take a plain decoder"
            )
        self.channels, self.rank, self.multiple = spec.channels, spec.rank, multiple
        self.patch, self.checkpointing = cfg.patch_size, cfg.checkpointing
        self.missing = (
            None
            if not cfg.resolution_cond or cfg.missing_resolution is None
            else expand(cfg.missing_resolution, spec.rank)
        )
        self.resolution_cond = cfg.resolution_cond
        self.target_shape(spec.size)

    def to_target(self, x: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
        """The sample itself."""
        return x

    def from_target(self, y: Tensor, size: tuple[int, ...]) -> Tensor:
        """The sample itself."""
        return y

    def target_shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Channels and size. Raises `ValueError` for a size that the network cannot take."""
        if len(size) != self.rank:
            raise ValueError(f"size {list(size)} has {len(size)} axes, but the network is for {self.rank}")
        if any(side < self.multiple or side % self.multiple for side in size):
            raise ValueError(
                f"size {list(size)} is not a multiple of {self.multiple}: patches of {self.patch} are halved "
                f"{(self.multiple // self.patch).bit_length() - 1} times"
            )
        return (self.channels, *size)

    def original(self, extras: Mapping[str, Any] | None, like: Tensor) -> Float[Tensor, "b r"] | None:
        """The size that the network is told, for each sample; None if nothing is told. Raises `ValueError`."""
        if not self.resolution_cond:
            return None
        known = (extras or {}).get("original_size")
        if known is None and self.missing is not None:
            known = torch.tensor([self.missing] * len(like))
        if known is None:
            return None
        told = torch.as_tensor(known, dtype=torch.float32, device=like.device)
        if told.shape != (len(like), self.rank):
            raise ValueError(
                f"original_size is (samples, {self.rank} sides), here {len(like)} rows, not {list(told.shape)}"
            )
        return told
