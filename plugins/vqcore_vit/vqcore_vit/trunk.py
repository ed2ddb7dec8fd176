"""Shared parts of the transformers of this package: settings, patches, positions, blocks, and the output of a decoder.

These are functions that act on a module, and not modules, because in 4M's checkpoints all these weights are children of
one module.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqcore.attention import Backend
from vqcore.config import Config, at_least, refuse_idle
from vqcore.errors import SettingError
from vqcore.protocols import DataSpec
from vqcore_vit.blocks import EPS, MLP, Block, linear
from vqcore_vit.convs import ConvNeXtBlock, GridConv, OutputConvs, unpatch
from vqcore_vit.positions import resize_positions, sincos_positions

SIZES = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16)}
"""Width, depth and number of heads of the presets."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Settings that all transformers of this package share."""

    training_only: ClassVar[tuple[str, ...]] = (
        "drop_path",
        "dropout",
        "attn_dropout",
        "learnable_positions",
        "attention",
        "checkpointing",
    )

    size: Literal["s", "b", "l"] | None = None
    """Preset of width, depth, num_heads: s 512, 8, 8; b 768, 12, 12; l 1024, 24, 16. Single settings override it."""
    width: int | None = None
    """Number of channels of a token inside the transformer."""
    depth: int | None = None
    """Number of transformer blocks; with 0 only convolutions remain."""
    num_heads: int | None = None
    """Number of attention heads; it must divide width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, as a multiple of width."""
    patch_size: int | tuple[int, ...] = 16
    """Size of the patch of one token: one number for all axes, or one per axis."""
    patch_proj: bool = True
    """False: every position of the data is a token (feature maps), and patch_size is not used."""
    post_mlp: bool = False
    """A point-wise tanh MLP after the blocks."""
    grid_convs: int = 0
    """Number of convolutions over neighbouring tokens before the blocks; a small model learns faster with them."""
    drop_path: float = 0.0
    """Probability that a sample skips a residual branch in training: 0 at the first block, this value at the last."""
    dropout: float = 0.0
    """Probability that a channel is dropped at the end of a residual branch in training."""
    attn_dropout: float = 0.0
    """Probability that an attention weight is dropped in training."""
    learnable_positions: bool = False
    """Train the position embeddings, which start as sines and cosines, instead of keeping them fixed."""
    attention: Backend = "auto"
    """Attention kernel: torch's sdpa, xformers, math (plain matrix products, slow), or auto: xformers where it runs."""
    checkpointing: bool = False
    """Recompute the blocks in the backward pass instead of storing their activations: less memory, slower."""

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
            raise ValueError(f"{given}: each must be at least 1, depth at least 0")
        if width % num_heads:
            raise SettingError("width", f"{width} is not divisible by num_heads={num_heads}")
        at_least(self, grid_convs=0)
        if not self.mlp_ratio * width >= 1:
            raise SettingError("mlp_ratio", f"{self.mlp_ratio} times width={width} is below 1 hidden channel")
        shares = {name: getattr(self, name) for name in ("dropout", "attn_dropout", "drop_path")}
        if not all(0 <= share < 1 for share in shares.values()):
            given = ", ".join(f"{name}={share}" for name, share in shares.items())
            raise ValueError(f"{given}: each probability must be in [0, 1)")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and number of heads: from the single settings, else from the preset."""
        width, depth, num_heads = SIZES[self.size] if self.size else (0, 0, 0)
        return (
            width if self.width is None else self.width,
            depth if self.depth is None else self.depth,
            num_heads if self.num_heads is None else self.num_heads,
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(TransformerConfig):
    """Settings of transformers that decode tokens into patches."""

    input_size_dec: int | tuple[int, ...] | None = None
    """Data size for which position embeddings are built (default: nominal size); interpolated to other sizes."""
    out_conv: Literal["none", "convnext", "conv"] = "none"
    """Convolutions on the output: none, convnext (two ConvNeXt blocks, 4M's out_conv: true), or conv (3-wide)."""
    out_conv_channels: int = 8
    """Number of channels of `out_conv: conv`."""
    out_conv_scale: int = 1
    """`out_conv: conv` works at a resolution this many times coarser than the output; it must divide patch_size."""
    out_conv_depth: int = 0
    """Number of residual convolutions of `out_conv: conv` before the convolution to the output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out_conv != "conv":
            names = ("out_conv_channels", "out_conv_scale", "out_conv_depth")
            refuse_idle(self, f"out_conv={self.out_conv}", *names)
        for name, least in (("out_conv_channels", 1), ("out_conv_scale", 1), ("out_conv_depth", 0)):
            if getattr(self, name) < least:
                raise SettingError(name, f"{getattr(self, name)} is below {least}")


def add_blocks(module: Any, cfg: TransformerConfig, grid: tuple[int, ...]) -> None:
    """Add `pos_emb` (built for `grid`), `grid_convs`, `blocks`, `norm_mlp` and `post_mlp` to a module."""
    width, depth, num_heads = cfg.shape
    hidden = round(cfg.mlp_ratio * width)
    pos_emb = sincos_positions(grid, width)
    if cfg.learnable_positions:
        module.pos_emb = nn.Parameter(pos_emb)
    else:
        module.register_buffer("pos_emb", pos_emb)
    module.interpolated = ("pos_emb",)
    module.checkpointing = cfg.checkpointing
    module.grid_convs = nn.ModuleList(GridConv(len(grid), width) for _ in range(cfg.grid_convs))
    module.blocks = nn.ModuleList(
        Block(
            width,
            num_heads,
            hidden,
            backend=cfg.attention,
            dropout=cfg.dropout,
            attn_dropout=cfg.attn_dropout,
            drop_path=cfg.drop_path * i / max(1, depth - 1),
        )
        for i in range(depth)
    )
    module.norm_mlp = nn.LayerNorm(width, eps=EPS) if cfg.post_mlp else None
    module.post_mlp = MLP(width, hidden, nn.Tanh()) if cfg.post_mlp else None


def add_positions(module: Any, x: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
    """Add the position embeddings, interpolated to the grid of `x`."""
    pos_emb = resize_positions(module.pos_emb, tuple(x.shape[1:-1]))
    # Make `x` contiguous once: otherwise each LayerNorm copies its input, and a block has two of them.
    return x.contiguous() + rearrange(pos_emb, "1 d ... -> 1 ... d")


def run_blocks(module: Any, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Apply the blocks, with or without gradient checkpointing."""
    for block in module.blocks:
        recompute = module.checkpointing and module.training
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


def exact_post_mlp(module: Any, x: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
    """Apply an encoder's tanh MLP in the precision of its weights, even under autocast: the output decides codes."""
    if module.post_mlp is None:
        return x
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(module.norm_mlp.weight.dtype)
        return x + module.post_mlp(module.norm_mlp(x))


def add_output(module: Any, cfg: DecoderConfig, spec: DataSpec) -> None:
    """Add `out_proj` and `out_conv` to a decoder; `laid` is the size of a patch at the resolution of `out_conv`."""
    width, _, _ = cfg.shape
    module.laid, channels, module.out_conv = module.patch, spec.out_channels, None
    if cfg.out_conv == "convnext":
        module.out_conv = nn.Sequential(*(ConvNeXtBlock(spec.rank, channels) for _ in range(2)))
    if cfg.out_conv == "conv":
        module.laid, channels = _coarser(module.patch, cfg.out_conv_scale), cfg.out_conv_channels
        sizes = {"depth": cfg.out_conv_depth, "scale": cfg.out_conv_scale}
        module.out_conv = OutputConvs(spec.rank, channels, spec.out_channels, **sizes)
    module.out_proj = linear(width, channels * math.prod(module.laid))


def write_output(module: Any, x: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]:
    """Apply the tanh MLP, turn tokens into patches, and apply the convolutions on the output."""
    if module.post_mlp is not None:
        x = x + module.post_mlp(module.norm_mlp(x))
    x = unpatch(module.out_proj(x), module.laid)
    return x if module.out_conv is None else module.out_conv(x)


def last_layer(module: Any) -> Tensor:
    """The last weight of a decoder that affects every value of the output."""
    # ConvNeXt blocks only add to the output, at first with a factor of 1e-6: their gradient does not scale with a loss.
    is_conv = isinstance(module.out_conv, OutputConvs)
    return module.out_conv.out.weight if is_conv else module.out_proj.weight


def patch_of(cfg: TransformerConfig, rank: int) -> tuple[int, ...]:
    """The patch size, one number per axis. Raises `ValueError` if it has another number of axes than the data."""
    if not cfg.patch_proj:
        return (1,) * rank
    patch = (cfg.patch_size,) * rank if isinstance(cfg.patch_size, int) else tuple(cfg.patch_size)
    if len(patch) != rank:
        raise ValueError(f"patch_size={list(patch)} has {len(patch)} axes, the data has {rank}")
    return patch


def size_of(size: int | tuple[int, ...] | None, spec: DataSpec) -> tuple[int, ...]:
    """`size` with one number per axis; the nominal size if `size` is None."""
    size = spec.size if size is None else size
    return (size,) * spec.rank if isinstance(size, int) else tuple(size)


def grid_of(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Number of patches along each axis. Raises `ValueError` if the size is not a multiple of the patch."""
    if len(size) != len(patch):
        raise ValueError(f"size {list(size)} has {len(size)} axes, patch_size {list(patch)} has {len(patch)}")
    if any(side % step or not side for side, step in zip(size, patch)):
        raise ValueError(f"size {list(size)} is no multiple of patch_size {list(patch)}")
    return tuple(side // step for side, step in zip(size, patch))


def check_channels(x: Float[Tensor, "b c *size"], channels: int) -> None:
    """Raise `ValueError` if the input has another number of channels than the encoder was built for."""
    if x.shape[1] != channels:
        raise ValueError(f"the input has {x.shape[1]} channels, but this encoder was built for {channels}")


def _coarser(patch: tuple[int, ...], scale: int) -> tuple[int, ...]:
    if any(side % scale for side in patch):
        raise ValueError(f"out_conv_scale={scale} does not divide patch_size {list(patch)}")
    return tuple(side // scale for side in patch)
