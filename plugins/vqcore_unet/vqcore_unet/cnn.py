"""The convolutional pair of VQGAN, for inputs of one to three axes.

Paper: VQGAN (arXiv 2012.09841, table 7). Differs from the paper's code: sizes are halved with padding on both sides;
attention has one or more heads.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.config import Config as Base
from vqcore.config import at_least
from vqcore.errors import SettingError
from vqcore.protocols import DataSpec
from vqcore_unet.denoiser import check_groups
from vqcore_unet.layers import EPS, Attention, Downsample, Level, ResBlock, Upsample, conv, runner


@dataclass(frozen=True, kw_only=True)
class PairConfig(Base):
    """Settings that encoder and decoder share; give both the same."""

    training_only = ("dropout", "checkpointing")

    width: int = 128
    """Channels at the full size."""
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level as a multiple of width; every level but the last one halves the size."""
    depth: int = 2
    """Residual blocks a level; the decoder has one more."""
    attention: tuple[int, ...] = (16,)
    """How many times smaller than the sample the levels with self-attention are: 1, 2, 4 ..."""
    mid_attention: bool = True
    """Self-attention between two residual blocks at the smallest size."""
    heads: int = 1
    """Heads of the self-attention."""
    dropout: float = 0.0
    """Probability that a channel is dropped inside a residual branch in training."""
    norm_groups: int = 32
    """Groups of every GroupNorm; the number must divide the channels of every level."""
    checkpointing: bool = False
    """Recompute the blocks in the backward pass instead of storing their activations: less memory, slower."""

    def __post_init__(self) -> None:
        at_least(self, width=1, mult=1, depth=1, heads=1, norm_groups=1)
        if not 0 <= self.dropout < 1:
            raise SettingError("dropout", f"{self.dropout} must be in [0, 1)")
        check_groups(self, "width", self.widths, self.norm_groups)
        scales = [2**index for index in range(len(self.mult))]
        strange = [scale for scale in self.attention if scale not in scales]
        if strange:
            raise SettingError("attention", f"{strange[0]} is not the scale of a level: {scales}")
        for width, scale in zip(self.widths, scales):
            wanted = scale in self.attention or (self.mid_attention and scale == scales[-1])
            if wanted and width % self.heads:
                raise SettingError("heads", f"{self.heads} does not divide {width} channels of a level")

    @property
    def widths(self) -> list[int]:
        """Channels of the levels."""
        return [self.width * mult for mult in self.mult]


class CNNEncoder(nn.Module):
    """Residual convolutions that halve the size `len(mult) - 1` times; latents of width `width * mult[-1]`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PairConfig):
        """Settings of `unet/cnn-encoder`."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        rank, self.checkpointing = spec.rank, cfg.checkpointing
        self.dim, self.multiple = cfg.widths[-1], 2 ** (len(cfg.mult) - 1)
        self.grid(spec.size)
        self.conv_in = conv(rank, spec.channels, cfg.widths[0])
        pairs = list(zip([cfg.widths[0], *cfg.widths], cfg.widths))
        self.levels = nn.ModuleList(
            _level(cfg, rank, index, pairs[index], cfg.depth, Downsample) for index in range(len(cfg.mult))
        )
        self.mid = _middle(cfg, rank)
        self.norm_out = nn.GroupNorm(cfg.norm_groups, self.dim, eps=EPS)

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Positions along each axis. Raises `ValueError` for a size that cannot be halved so often."""
        if any(side < self.multiple or side % self.multiple for side in size):
            raise ValueError(f"size {list(size)} is not a multiple of {self.multiple}")
        return tuple(side // self.multiple for side in size)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *grid d"]:
        """Latents of the samples."""
        self.grid(tuple(x.shape[2:]))
        y = _run(self, self.conv_in(x.to(self.conv_in.weight.dtype)), [*self.levels, self.mid])
        return rearrange(F.silu(self.norm_out(y)), "b d ... -> b ... d")


class CNNDecoder(nn.Module):
    """Residual convolutions that double the size `len(mult) - 1` times."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PairConfig):
        """Settings of `unet/cnn-decoder`."""

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        super().__init__()
        rank, self.checkpointing = spec.rank, cfg.checkpointing
        self.conv_in = conv(rank, dim, cfg.widths[-1])
        self.mid = _middle(cfg, rank)
        pairs = list(zip([*cfg.widths[1:], cfg.widths[-1]], cfg.widths))
        self.levels = nn.ModuleList(
            _level(cfg, rank, index, pairs[index], cfg.depth + 1, Upsample)
            for index in reversed(range(len(cfg.mult)))
        )
        self.norm_out = nn.GroupNorm(cfg.norm_groups, cfg.widths[0], eps=EPS)
        self.conv_out = conv(rank, cfg.widths[0], spec.out_channels)

    @property
    def last_layer(self) -> Tensor:
        """The last weight that affects every value of the output."""
        return self.conv_out.weight

    def forward(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]:
        """Samples of the latents."""
        y = self.conv_in(rearrange(z_q.to(self.conv_in.weight.dtype), "b ... d -> b d ..."))
        y = _run(self, y, [self.mid, *self.levels])
        return self.conv_out(F.silu(self.norm_out(y)))


def _level(cfg: PairConfig, rank: int, index: int, pair: tuple[int, int], depth: int, resample: Any) -> Level:
    """Level `index`, 0 at the full size. An encoder leaves it smaller, except the last; a decoder larger, except 0."""
    first, width = pair
    blocks = [_block(cfg, rank, first if j == 0 else width, width) for j in range(depth)]
    wanted = 2**index in cfg.attention
    attentions = [_attention(cfg, width) for _ in range(depth) if wanted]
    end = len(cfg.mult) - 1 if resample is Downsample else 0
    return Level(blocks, attentions, None if index == end else resample(rank, width))


def _middle(cfg: PairConfig, rank: int) -> Level:
    """Two residual blocks with attention between them, if wanted."""
    width = cfg.widths[-1]
    blocks = [_block(cfg, rank, width, width) for _ in range(2)]
    return Level(blocks, [_attention(cfg, width)] if cfg.mid_attention else [])


def _block(cfg: PairConfig, rank: int, channels: int, channels_out: int) -> ResBlock:
    return ResBlock(rank, channels, channels_out, time=0, groups=cfg.norm_groups, dropout=cfg.dropout)


def _attention(cfg: PairConfig, width: int) -> Attention:
    return Attention(width, heads=cfg.heads, groups=cfg.norm_groups)


def _run(module: Any, x: Tensor, levels: list[Any]) -> Tensor:
    run = runner(module, module.checkpointing)
    for level in levels:
        for index, block in enumerate(level.blocks):
            x = run(block, x)
            if index < len(level.attentions):
                x = run(level.attentions[index], x)
        if level.resample is not None:
            x = level.resample(x)
    return x
