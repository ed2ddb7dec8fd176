"""Layers of the U-Nets and convolutional networks of this package, on one to three axes.

Papers: residual blocks, attention and the U-shape of ADM (arXiv 2105.05233, section 3), which VQGAN (arXiv 2012.09841)
and the U-ViT of 4M (arXiv 2312.06647) share; sines and cosines of time (arXiv 2006.11239, appendix B).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqcore.attention import attend
from vqcore.convolution import CONVOLUTIONS

EPS = 1e-5
"""Epsilon of every GroupNorm."""
MAX_PERIOD = 1e4
"""Longest period of the sines and cosines of a time."""

_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def conv(rank: int, channels_in: int, channels_out: int, kernel: Any = 3, **options: Any) -> Any:
    """Make a convolution over `rank` axes; a kernel of 3 keeps the size unless there is a stride."""
    if kernel == 3:
        options.setdefault("padding", 1)
    return CONVOLUTIONS[rank](channels_in, channels_out, kernel, **options)


def transposed(rank: int, channels_in: int, channels_out: int, kernel: Any, **options: Any) -> Any:
    """Make a transposed convolution over `rank` axes."""
    return _TRANSPOSED[rank](channels_in, channels_out, kernel, **options)


def channels_last(x: Any) -> Any:
    """The same tensor, or module with all its convolutions, with the channels innermost in memory.

    Shapes and values stay the same, only strides change. Convolutions of many channels are faster so, and attention
    need not move the channels.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if isinstance(x, nn.Module):
        for parameter in x.parameters():
            parameter.data = channels_last(parameter.data)
        return x
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else x


def zeroed(module: Any) -> Any:
    """The same module with all its parameters at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def swish(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else sees: in its own memory where no gradient is wanted."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def waves(t: Float[Tensor, "..."], width: int) -> Float[Tensor, "... d"]:
    """Cosines and then sines of numbers, with `width // 2` frequencies each, fp32."""
    half = width // 2
    omega = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device) / half)
    angle = t.float().unsqueeze(-1) * omega
    return torch.cat([angle.cos(), angle.sin()], -1)


class Embedding(nn.Module):
    """A number per sample as a vector: cosines and sines, then two linear layers with SiLU between them."""

    def __init__(self, width: int, width_out: int):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, width_out)
        self.linear_2 = nn.Linear(width_out, width_out)

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        y = waves(t, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(y)))


class Levels(nn.Module):
    """The noise level and, with `axes` above 0, the original size of a sample, as one vector of `4 * width`."""

    def __init__(self, width: int, axes: int):
        super().__init__()
        self.time = Embedding(width, 4 * width)
        self.sizes = nn.ModuleList(Embedding(width, 4 * width) for _ in range(axes))

    def forward(self, t: Float[Tensor, " b"], size: Float[Tensor, "b r"] | None) -> Float[Tensor, "b d"]:
        y = self.time(t)
        # An unknown size adds nothing, but keeps a gradient, for which distributed training waits.
        told = torch.zeros(len(t), len(self.sizes), device=t.device) if size is None else size
        for axis, embedding in enumerate(self.sizes):
            y = y + embedding(told[:, axis]) * (size is not None)
        return y


class ResBlock(nn.Module):
    """Two 3-wide convolutions on a residual branch; the second one starts at zero. `time` is a width, 0 for none."""

    def __init__(
        self, rank: int, channels: int, channels_out: int, *, time: int, groups: int, dropout: float
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=EPS)
        self.conv1 = conv(rank, channels, channels_out)
        self.time_emb_proj = nn.Linear(time, channels_out) if time else None
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(conv(rank, channels_out, channels_out))
        self.conv_shortcut = None if channels == channels_out else conv(rank, channels, channels_out, 1)

    def forward(
        self, x: Float[Tensor, "b c *size"], level: Float[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b c_out *size"]:
        y = self.conv1(swish(self.norm1(x)))
        if self.time_emb_proj is not None and level is not None:
            shift = self.time_emb_proj(F.silu(level))
            y += shift.view(*shift.shape, *[1] * (y.ndim - 2))
        y = self.conv2(self.dropout(swish(self.norm2(y))))
        y += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return y


class Attention(nn.Module):
    """Self-attention over all positions on a residual branch, whose last layer starts at zero."""

    def __init__(self, channels: int, *, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        y = rearrange(self.norm(x).flatten(2), "b c n -> b n c")
        q, k, v = rearrange(self.qkv(y), "b n (part h d) -> part b n h d", part=3, h=self.heads)
        y = attend(q, k, v, backend="sdpa")
        y = rearrange(self.proj_out(rearrange(y, "b n h d -> b n (h d)")), "b n c -> b c n")
        return x + y.unflatten(2, tuple(x.shape[2:]))


class Downsample(nn.Module):
    """Halve the size with a convolution."""

    def __init__(self, rank: int, channels: int):
        super().__init__()
        self.conv = conv(rank, channels, channels, stride=2)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *half"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the size: nearest neighbours, then a convolution."""

    def __init__(self, rank: int, channels: int):
        super().__init__()
        self.conv = conv(rank, channels, channels)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *double"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one size, with attention after each where wanted, and then a change of size where wanted."""

    def __init__(self, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module], resample: Any = None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def run(self, index: int, run: Callable, x: Tensor, level: Tensor | None) -> Tensor:
        """One residual block and its attention."""
        x = run(self.blocks[index], x, level)
        return run(self.attentions[index], x) if self.attentions else x


class UShape(nn.Module):
    """The two sides of a U: levels that halve, and levels that double and see what the first side saw.

    `widths` are the channels of the levels, `depth` their residual blocks (one more on the way up), `attention` says
    which levels have attention. Between both sides the caller does what it wants.
    """

    def __init__(
        self,
        rank: int,
        widths: Sequence[int],
        depth: int,
        *,
        attention: Sequence[bool],
        time: int,
        groups: int,
        dropout: float,
        heads: int,
    ):
        super().__init__()

        def level(pairs: Sequence[tuple[int, int]], index: int, resample: Any) -> Level:
            blocks = [ResBlock(rank, a, b, time=time, groups=groups, dropout=dropout) for a, b in pairs]
            attentions = [Attention(b, heads=heads, groups=groups) for _, b in pairs if attention[index]]
            return Level(blocks, attentions, resample)

        seen, channels, last = [widths[0]], widths[0], len(widths) - 1
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for index, width in enumerate(widths):
            pairs = [(channels if j == 0 else width, width) for j in range(depth)]
            channels = width if depth else channels
            seen += [channels] * (depth + (index < last))
            self.down.append(level(pairs, index, Downsample(rank, channels) if index < last else None))
        self.channels = channels
        for index in reversed(range(len(widths))):
            pairs = []
            for _ in range(depth + 1):
                pairs.append((channels + seen.pop(), widths[index]))
                channels = widths[index]
            self.up.append(level(pairs, index, Upsample(rank, channels) if index else None))

    def descend(self, x: Tensor, level: Tensor, run: Callable) -> tuple[Tensor, list[Tensor]]:
        """The way down, and what the way up will see."""
        seen, levels = [x], list[Any](self.down)
        for part in levels:
            for index in range(len(part.blocks)):
                x = part.run(index, run, x, level)
                seen.append(x)
            if part.resample is not None:
                x = part.resample(x)
                seen.append(x)
        return x, seen

    def ascend(self, x: Tensor, seen: list[Tensor], level: Tensor, run: Callable) -> Tensor:
        """The way up; `seen` is emptied."""
        levels: list[Any] = list(self.up)
        for part in levels:
            for index in range(len(part.blocks)):
                x = part.run(index, run, torch.cat([x, seen.pop()], 1), level)
            if part.resample is not None:
                x = part.resample(x)
        return x


def runner(module: nn.Module, checkpointing: bool) -> Callable:
    """How a module runs its blocks: as usual, or in training storing only their inputs."""
    if checkpointing and module.training:
        return lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    return lambda block, *args: block(*args)


def resized(x: Float[Tensor, "b c *grid"], size: tuple[int, ...]) -> Float[Tensor, "b c *size"]:
    """Nearest neighbours at another size."""
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size=size, mode="nearest")
