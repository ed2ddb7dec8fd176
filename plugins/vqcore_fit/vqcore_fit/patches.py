"""Encoders and decoders without learned weights: patches as they are, and their cosine transform.

The transform is the orthonormal DCT-II along every axis of a patch, so squared errors of coefficients are squared
errors of values. Coefficients stand by frequency, the lowest first, and of one frequency channel by channel (as FAST,
arXiv 2501.09747, section V, orders those of an action chunk).
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqcore import config
from vqcore.protocols import DataSpec, expand


@dataclass(frozen=True, kw_only=True)
class PatchConfig(config.Config):
    """Settings of encoders and decoders of patches."""

    patch_size: int | tuple[int, ...] = 1
    """Positions of a patch along each axis: one number for all axes, or one for each axis. A patch is a token."""

    def __post_init__(self) -> None:
        config.at_least(self, patch_size=1)


class _Layout(nn.Module):
    """Where the values of patches stand in a sample of `channels` channels."""

    def __init__(self, cfg: PatchConfig, channels: int, rank: int):
        super().__init__()
        self.patch, self.channels = expand(cfg.patch_size, rank), channels
        self.width = channels * math.prod(self.patch)
        axes = range(rank)
        self._whole = " ".join(f"(g{axis} p{axis})" for axis in axes)
        self._grid = " ".join(f"g{axis}" for axis in axes)
        self._inside = " ".join(f"p{axis}" for axis in axes)
        self._sides = {f"p{axis}": side for axis, side in enumerate(self.patch)}

    def cut(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *grid_c_patch"]:
        """The patches of a batch."""
        return rearrange(x, f"b c {self._whole} -> b {self._grid} c {self._inside}", **self._sides)

    def joined(self, patches: Float[Tensor, "b *grid_c_patch"]) -> Float[Tensor, "b c *size"]:
        """The batch that has these patches."""
        return rearrange(patches, f"b {self._grid} c {self._inside} -> b c {self._whole}")


class Patches(_Layout):
    """The values of each patch as a latent, channel by channel. There is nothing to learn."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PatchConfig):
        """Settings of `fit/patches`."""

    def __init__(self, cfg: PatchConfig, *, spec: DataSpec):
        super().__init__(cfg, spec.channels, spec.rank)
        self.dim = self.width

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Number of patches along each axis. Raises `ValueError` if `size` is not a multiple of the patch."""
        sides = expand(size, len(self.patch))
        if any(side % step or not side for side, step in zip(sides, self.patch)):
            raise ValueError(f"size {list(sides)} is no multiple of patch_size {list(self.patch)}")
        return tuple(side // step for side, step in zip(sides, self.patch))

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *grid d"]:
        """The latents of a batch. Raises `ValueError` for a size that does not fit."""
        self.grid(tuple(x.shape[2:]))
        return self.latents(self.cut(x))

    def latents(self, patches: Float[Tensor, "b *grid_c_patch"]) -> Float[Tensor, "b *grid d"]:
        """The latents of patches."""
        return patches.flatten(1 + len(self.patch))


class PatchesDecoder(_Layout):
    """Puts patches together. `shift`, a value that is added to each channel, is 0 unless it is trained."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PatchConfig):
        """Settings of `fit/patches`."""

    def __init__(self, cfg: PatchConfig, *, dim: int, spec: DataSpec):
        super().__init__(cfg, spec.out_channels, spec.rank)
        if dim != self.width:
            raise ValueError(
                f"a patch of {list(self.patch)} positions and {self.channels} channels has {self.width} values, but "
                f"the quantizer gives {dim}: set model.quantizer.latent_dim={self.width}, and one patch_size on both "
                "sides"
            )
        self.shift = nn.Parameter(torch.zeros(self.channels))

    @property
    def last_layer(self) -> Tensor:
        """The only parameter."""
        return self.shift

    def forward(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]:
        """The samples of a batch of latents."""
        x = self.joined(self.patches(z_q))
        return x + self.shift.view(-1, *[1] * len(self.patch))

    def patches(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid_c_patch"]:
        """The patches of latents."""
        return z_q.unflatten(-1, (self.channels, *self.patch))


class DCT(Patches):
    """The cosine transform of each patch as a latent, by frequency. There is nothing to learn."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PatchConfig):
        """Settings of `fit/dct`."""

        patch_size: int | tuple[int, ...] = 8
        """Positions of a block along each axis: one number for all axes, or one for each axis. A block is a token."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        _add_tables(self)

    def latents(self, patches: Float[Tensor, "b *grid_c_patch"]) -> Float[Tensor, "b *grid d"]:
        """The coefficients of blocks."""
        found = _along_axes(patches, self._bases())
        flat = rearrange(found.flatten(-len(self.patch)), "b ... c f -> b ... f c")
        return flat.index_select(-2, self.order).flatten(-2)

    order: Tensor

    def _bases(self) -> list[Tensor]:
        return [getattr(self, f"basis{axis}") for axis in range(len(self.patch))]


class DCTDecoder(PatchesDecoder):
    """The inverse of `DCT`. `shift`, a value that is added to each channel, is 0 unless it is trained."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DCT.Config):
        """Settings of `fit/dct`."""

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        super().__init__(cfg, dim=dim, spec=spec)
        _add_tables(self)

    def patches(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid_c_patch"]:
        """The blocks of coefficients."""
        flat = z_q.unflatten(-1, (-1, self.channels)).index_select(-2, self.order.argsort())
        found = rearrange(flat, "b ... f c -> b ... c f").unflatten(-1, self.patch)
        return _along_axes(found, [getattr(self, f"basis{axis}").T for axis in range(len(self.patch))])

    order: Tensor


def _add_tables(module: Any) -> None:
    """The matrices of the transform, and the order of its coefficients: constants, which no checkpoint keeps."""
    for axis, side in enumerate(module.patch):
        module.register_buffer(f"basis{axis}", basis(side), persistent=False)
    module.register_buffer("order", by_frequency(module.patch), persistent=False)


def _along_axes(x: Float[Tensor, "b *grid_c_patch"], bases: list[Tensor]) -> Float[Tensor, "b *grid_c_patch"]:
    """Each of the last axes, multiplied by its matrix."""
    for axis, matrix in enumerate(reversed(bases), start=1):
        x = (x.movedim(-axis, -1) @ matrix.T).movedim(-1, -axis)
    return x


def basis(side: int) -> Float[Tensor, "n n"]:
    """The matrix of the orthonormal DCT-II: row k is the cosine of frequency k."""
    places = torch.arange(side, dtype=torch.float64)
    rows = torch.cos(math.pi / side * torch.outer(places, places + 0.5)) * math.sqrt(2 / side)
    rows[0] /= math.sqrt(2)
    return rows.float()


def by_frequency(patch: tuple[int, ...]) -> Int[Tensor, " n"]:
    """The places of the coefficients of a block: the smallest sum of frequencies, as shares of the axes, first."""
    places = list(itertools.product(*map(range, patch)))
    height = [sum(k / side for k, side in zip(place, patch)) for place in places]
    return torch.tensor(sorted(range(len(places)), key=lambda i: (round(height[i], 9), places[i])))
