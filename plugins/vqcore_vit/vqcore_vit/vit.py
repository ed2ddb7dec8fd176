"""Transformer encoder and decoder for inputs of one to three axes: images, sequences, volumes, feature maps.

Papers: ViT (arXiv 2010.11929) for patches and blocks; ViT-VQGAN (arXiv 2110.04627), section 3.1, for the point-wise
tanh MLP at the end of either side; 4M (arXiv 2312.06647) for the whole, whose weights fit name by name.
Differs from 4M: positions of grids that are not square have one half of the channels for the row and one for the
column; the decoder owns the projection of its latents (`in_proj`); `grid_convs` and `out_conv: conv` are new.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.config import Config
from vqcore.protocols import DataSpec
from vqcore_vit.blocks import EPS, MLP, Block, linear
from vqcore_vit.convs import ConvNeXtBlock, GridConv, OutputConvs, conv, unpatch
from vqcore_vit.positions import resize_positions, sincos_positions

SIZES = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16)}
"""Width, depth and number of heads of the presets."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """What the encoder's and the decoder's settings have in common."""

    training_only: ClassVar[tuple[str, ...]] = ("drop_path", "dropout", "learnable_positions")

    size: Literal["s", "b", "l"] | None = None
    """Preset of width, depth and num_heads: s 512, 8, 8; b 768, 12, 12; l 1024, 24, 16. Numbers given beside it win."""
    width: int | None = None
    """Channels of a token inside the transformer."""
    depth: int | None = None
    """Number of blocks; 0 leaves the convolutions alone."""
    num_heads: int | None = None
    """Attention heads of a block; they share the width evenly."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, as a multiple of width."""
    patch_size: int | tuple[int, ...] = 16
    """Side of the patch that a token stands for: one number for all axes, or one per axis."""
    patch_proj: bool = True
    """Off: every position of the data is a token (feature maps), and patch_size plays no part."""
    post_mlp: bool = False
    """A point-wise tanh MLP after the blocks."""
    grid_convs: int = 0
    """Convolutions over neighbouring tokens before the blocks; a small model learns faster with them."""
    drop_path: float = 0.0
    """Probability that a sample skips a residual branch in training: 0 at the first block, this at the last."""
    dropout: float = 0.0
    """Probability that a channel is dropped at the end of a residual branch in training."""
    learnable_positions: bool = False
    """Train the position embeddings instead of keeping sines and cosines."""

    def __post_init__(self) -> None:
        missing = [name for name in ("width", "depth", "num_heads") if getattr(self, name) is None]
        if self.size is None and missing:
            raise ValueError(
                f"{', '.join(missing)} missing: give size (s, b or l), or width, depth and num_heads"
            )
        width, depth, num_heads = self.shape
        patch = (self.patch_size,) if isinstance(self.patch_size, int) else self.patch_size
        if min(width, depth + 1, num_heads, *patch) < 1:
            given = f"width={width}, depth={depth}, num_heads={num_heads}, patch_size={self.patch_size}"
            raise ValueError(f"{given}: each must be at least 1 (depth: 0)")
        if width % num_heads:
            raise ValueError(f"width={width} does not divide into num_heads={num_heads}")
        if self.grid_convs < 0:
            raise ValueError(f"grid_convs={self.grid_convs} is below 0")
        if not self.mlp_ratio * width >= 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves width={width} without a hidden channel")
        if not (0 <= self.dropout < 1 and 0 <= self.drop_path < 1):
            raise ValueError(
                f"dropout={self.dropout}, drop_path={self.drop_path}: probabilities lie in [0, 1)"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and number of heads, from the preset and the numbers beside it."""
        width, depth, num_heads = SIZES[self.size] if self.size else (0, 0, 0)
        return (
            width if self.width is None else self.width,
            depth if self.depth is None else self.depth,
            num_heads if self.num_heads is None else self.num_heads,
        )


class ViTEncoder(nn.Module):
    """Patches (or, without `patch_proj`, the data's own positions) to latents of width `dim`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TransformerConfig):
        """Settings of `vit/encoder`."""

        input_size_enc: int | tuple[int, ...] | None = None
        """Size of the data that positions are made for (default: the nominal one); any other is resized to."""

    pos_emb: Tensor
    norm_mlp: nn.LayerNorm | None
    post_mlp: MLP | None

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.dim, _, _ = cfg.shape
        self.patch = _patch(cfg, spec.rank)
        self.proj = conv(spec.rank, spec.channels, self.dim, self.patch, stride=self.patch)
        _add_trunk(self, cfg, self.grid(_size(cfg.input_size_enc, spec)))

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each axis for data of this size. Raises `ValueError` when it is no multiple of the patch."""
        return _grid(size, self.patch)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *grid d"]:
        """Cut, embed, transform."""
        self.grid(tuple(x.shape[2:]))
        x = self.proj(x)
        x = _transform(self, rearrange(x, "b d ... -> b ... d"))
        if self.post_mlp is not None and self.norm_mlp is not None:
            with torch.autocast(x.device.type, enabled=False):
                x = x.float() + self.post_mlp(self.norm_mlp(x.float()))
        return x


class ViTDecoder(nn.Module):
    """Quantized latents of width `dim` to data: `in_proj`, blocks, a patch for every token, optional convolutions."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TransformerConfig):
        """Settings of `vit/decoder`."""

        input_size_dec: int | tuple[int, ...] | None = None
        """Size of the data that positions are made for (default: the nominal one); any other is resized to."""
        out_conv: Literal["none", "convnext", "conv"] = "none"
        """After the patches: none, two ConvNeXt blocks (4M's out_conv: true), or conv, 3-wide convolutions."""
        out_conv_channels: int = 8
        """Channels that `out_conv: conv` works with."""
        out_conv_scale: int = 1
        """How many times coarser than the output `out_conv: conv` works; it divides patch_size."""
        out_conv_depth: int = 0
        """Residual convolutions of `out_conv: conv` before the one to the output."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, least in (("out_conv_channels", 1), ("out_conv_scale", 1), ("out_conv_depth", 0)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name}={getattr(self, name)} is below {least}")

    pos_emb: Tensor
    norm_mlp: nn.LayerNorm | None
    post_mlp: MLP | None
    out_conv: nn.Module | None

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        super().__init__()
        width, _, _ = cfg.shape
        self.patch = _patch(cfg, spec.rank)
        self.in_proj = nn.Linear(dim, width)
        _add_trunk(self, cfg, _grid(_size(cfg.input_size_dec, spec), self.patch))
        self.laid, channels, self.out_conv = self.patch, spec.out_channels, None
        if cfg.out_conv == "convnext":
            self.out_conv = nn.Sequential(*(ConvNeXtBlock(spec.rank, channels) for _ in range(2)))
        if cfg.out_conv == "conv":
            self.laid, channels = _coarser(self.patch, cfg.out_conv_scale), cfg.out_conv_channels
            sizes = {"depth": cfg.out_conv_depth, "scale": cfg.out_conv_scale}
            self.out_conv = OutputConvs(spec.rank, channels, spec.out_channels, **sizes)
        self.out_proj = linear(width, channels * math.prod(self.laid))

    @property
    def last_layer(self) -> Tensor:
        """The last weight that the whole output passes through."""
        # ConvNeXt blocks only add to the picture, at birth a millionth: gradients in them say nothing of a loss's size.
        return self.out_conv.out.weight if isinstance(self.out_conv, OutputConvs) else self.out_proj.weight

    def forward(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]:
        """Project, transform, lay out the patches."""
        x = _transform(self, self.in_proj(z_q))
        if self.post_mlp is not None and self.norm_mlp is not None:
            x = x + self.post_mlp(self.norm_mlp(x))
        x = unpatch(self.out_proj(x), self.laid)
        return x if self.out_conv is None else self.out_conv(x)


def _add_trunk(module: Any, cfg: TransformerConfig, grid: tuple[int, ...]) -> None:
    """Give a module what encoder and decoder share: `pos_emb`, `grid_convs`, `blocks`, `norm_mlp` and `post_mlp`."""
    width, depth, num_heads = cfg.shape
    hidden = round(cfg.mlp_ratio * width)
    pos_emb = sincos_positions(grid, width)
    if cfg.learnable_positions:
        module.pos_emb = nn.Parameter(pos_emb)
    else:
        module.register_buffer("pos_emb", pos_emb)
    skips = [cfg.drop_path * i / max(1, depth - 1) for i in range(depth)]
    module.blocks = nn.ModuleList(Block(width, num_heads, hidden, cfg.dropout, skip) for skip in skips)
    module.grid_convs = nn.ModuleList(GridConv(len(grid), width) for _ in range(cfg.grid_convs))
    module.norm_mlp = nn.LayerNorm(width, eps=EPS) if cfg.post_mlp else None
    module.post_mlp = MLP(width, hidden, nn.Tanh()) if cfg.post_mlp else None


def _transform(module: Any, x: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
    """Add positions, run the convolutions and then the blocks."""
    grid = tuple(x.shape[1:-1])
    x = x + rearrange(resize_positions(module.pos_emb, grid), "1 d ... -> 1 ... d")
    for layer in (*module.grid_convs, *module.blocks):
        x = layer(x)
    return x


def _patch(cfg: TransformerConfig, rank: int) -> tuple[int, ...]:
    if not cfg.patch_proj:
        return (1,) * rank
    patch = (cfg.patch_size,) * rank if isinstance(cfg.patch_size, int) else tuple(cfg.patch_size)
    if len(patch) != rank:
        raise ValueError(f"patch_size={list(patch)} has {len(patch)} axes, the data has {rank}")
    return patch


def _size(size: int | tuple[int, ...] | None, spec: DataSpec) -> tuple[int, ...]:
    size = spec.size if size is None else size
    return (size,) * spec.rank if isinstance(size, int) else tuple(size)


def _grid(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    if len(size) != len(patch):
        raise ValueError(f"size {list(size)} has {len(size)} axes, patch_size {list(patch)} has {len(patch)}")
    if any(side % step for side, step in zip(size, patch)):
        raise ValueError(f"size {list(size)} is no multiple of patch_size {list(patch)}")
    return tuple(side // step for side, step in zip(size, patch))


def _coarser(patch: tuple[int, ...], scale: int) -> tuple[int, ...]:
    if any(side % scale for side in patch):
        raise ValueError(f"out_conv_scale={scale} does not divide patch_size {list(patch)}")
    return tuple(side // scale for side in patch)
