"""A U-ViT: convolutions at high resolution around a transformer, which sees the tokens, at low resolution.

Papers: simple diffusion (arXiv 2301.11093, section 3.3) for the U-ViT; all are worth words (arXiv 2209.12152) for long
skips; DiT (arXiv 2212.09748, section 3.2) for modulation and gates by the noise level; 4M (arXiv 2312.06647), whose
`uvit_*` are the sizes.
Differs from 4M: one to three axes; with cross-attention, hidden tokens leave nothing when all of them are hidden, and
positions are interpolated as with `concat`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vqcore.attention import Backend, attend
from vqcore.config import at_least
from vqcore.errors import SettingError
from vqcore.protocols import DataSpec, expand
from vqcore_unet.denoiser import DenoiserConfig, Pixels, check_groups
from vqcore_unet.layers import (
    EPS,
    Downsample,
    Levels,
    Upsample,
    UShape,
    conv,
    resized,
    runner,
    transposed,
)

SIZES = {"b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}
"""Width, depth and number of heads of the transformer in the presets."""
NORM_EPS = 1e-5
"""Epsilon of every LayerNorm."""
POSITIONS = 1e4
"""Ratio of the highest to the lowest frequency of the position embeddings."""
_SMOOTH = {1: "linear", 2: "bicubic", 3: "trilinear"}


class Condition(NamedTuple):
    """What the tokens of a batch are for the transformer, and the original sizes.

    With `concat`, `tokens` is added at the middle's grid. With `cross-attention` there are keys and values for each
    block, and `visible` is False at hidden tokens (None: all are visible).
    """

    tokens: Float[Tensor, "b n d"] | None
    keys: tuple[tuple[Tensor, Tensor], ...]
    visible: Bool[Tensor, "b m"] | None
    size: Float[Tensor, "b r"] | None


class UViT(Pixels):
    """Predict from noised samples and tokens."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DenoiserConfig):
        """Settings of `unet/uvit`."""

        dropout: float = 0.0
        """Probability that a channel is dropped inside a branch of the transformer in training (4M: 0.2)."""
        size: Literal["b", "l", "h"] | None = None
        """Preset of mid_width, mid_depth, mid_heads: b 768, 12, 12; l 1024, 24, 16; h 1280, 32, 16."""
        widths: tuple[int, ...] = (128, 256)
        """Channels of each level of convolutions; every level but the last one halves the size."""
        depth: int = 2
        """Residual blocks a level on the way down; there is one more on the way up."""
        downsample_before_mid: bool = True
        """Halve the size once more for the transformer."""
        mid_width: int | None = None
        """Channels of a token inside the transformer."""
        mid_depth: int | None = None
        """Blocks of the transformer; with long skips the number must be odd, and a preset has one block more."""
        mid_heads: int | None = None
        """Attention heads of the transformer; they must divide mid_width."""
        mid_grid: int | None = None
        """Side of the grid for which positions are built (default: 32, for three axes 8); other grids interpolate."""
        mlp_ratio: float = 4.0
        """Hidden width of the transformer's MLPs as a multiple of mid_width."""
        long_skips: bool = False
        """Blocks of the transformer's second half also see the output of their partner in the first half."""
        conditioning: Literal["concat", "cross-attention"] = "concat"
        """How the transformer sees tokens: added at its grid, a learned vector where hidden; or by cross-attention."""
        attention: Backend = "auto"
        """Attention kernel: torch's sdpa, xformers, math (plain products, slow), or auto: xformers where it runs."""
        attn_dropout: float = 0.0
        """Probability that an attention weight is dropped in training."""
        drop_path: float = 0.0
        """Probability that a sample skips a branch in training: 0 at the first block, this value at the last."""
        as_4m: bool = False
        """Cross-attention with 4M's errors, for its checkpoints: nearest positions, all tokens hidden still seen."""

        training_only = (*DenoiserConfig.training_only, "attention", "attn_dropout", "drop_path")

        def __post_init__(self) -> None:
            super().__post_init__()
            missing = [
                name for name in ("mid_width", "mid_depth", "mid_heads") if getattr(self, name) is None
            ]
            if self.size is None and missing:
                raise ValueError(
                    f"{', '.join(missing)} missing: give size (b, l or h), or mid_width, mid_depth and mid_heads"
                )
            width, depth, heads = self.mid
            for name, value in (("mid_width", width), ("mid_depth", depth), ("mid_heads", heads)):
                if value < 1:
                    raise SettingError(name, f"{value} must be at least 1")
            if width % heads:
                raise SettingError("mid_width", f"{width} is not divisible by mid_heads={heads}")
            if self.long_skips and depth % 2 == 0:
                raise SettingError("mid_depth", f"{depth} must be odd with long_skips=true")
            at_least(self, widths=2, depth=0, mid_grid=1)
            if self.widths[0] % 2:
                raise SettingError("widths", f"{self.widths[0]} is odd: half of it are sines of the time")
            check_groups(self, "widths", self.widths, self.norm_groups)
            if not self.mlp_ratio * width >= 1:
                raise SettingError("mlp_ratio", f"{self.mlp_ratio} is below one hidden channel")
            for name in ("attn_dropout", "drop_path"):
                if not 0 <= getattr(self, name) < 1:
                    raise SettingError(name, f"{getattr(self, name)} must be in [0, 1)")
            if self.as_4m and self.conditioning == "concat":
                raise SettingError("as_4m", "True does nothing with conditioning=concat; leave it out")

        @property
        def mid(self) -> tuple[int, int, int]:
            """Width, depth and heads of the transformer: from the single settings, else from the preset."""
            width, depth, heads = SIZES[self.size] if self.size else (0, 0, 0)
            depth += bool(self.size) and self.long_skips
            return (
                width if self.mid_width is None else self.mid_width,
                depth if self.mid_depth is None else self.mid_depth,
                heads if self.mid_heads is None else self.mid_heads,
            )

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        halvings = len(cfg.widths) - 1 + cfg.downsample_before_mid
        super().__init__(cfg, spec, cfg.patch_size * 2**halvings)
        rank, first = spec.rank, cfg.widths[0]
        self.level = Levels(first, rank if cfg.resolution_cond else 0)
        self.conv_in = conv(rank, spec.channels, first, cfg.patch_size, stride=cfg.patch_size, padding=0)
        self.u = UShape(
            rank,
            cfg.widths,
            cfg.depth,
            attention=[False] * len(cfg.widths),
            heads=1,
            time=4 * first,
            groups=cfg.norm_groups,
            dropout=0.0,  # simple diffusion and 4M: only where positions are few
        )
        self.downsample_mid = Downsample(rank, self.u.channels) if cfg.downsample_before_mid else None
        self.mid = Middle(cfg, rank, self.u.channels, dim)
        self.upsample_mid = Upsample(rank, self.u.channels) if cfg.downsample_before_mid else None
        self.norm_out = nn.GroupNorm(cfg.norm_groups, first, eps=EPS)
        self.conv_out = transposed(rank, first, spec.channels, cfg.patch_size, stride=cfg.patch_size)

    @property
    def last_layer(self) -> Tensor:
        """The last weight that affects every value of the output."""
        return self.conv_out.weight

    def condition(
        self,
        z_q: Float[Tensor, "b *grid d"],
        *,
        size: tuple[int, ...],
        mask: Bool[Tensor, "b *grid"] | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> Condition:
        """What the transformer needs of the tokens."""
        self.target_shape(size)
        grid = tuple(side // self.multiple for side in size)
        tokens, keys, visible = self.mid.condition(z_q.to(self.conv_in.weight.dtype), grid, mask)
        return Condition(tokens, keys, visible, self.original(extras, z_q))

    def forward(
        self, x_t: Float[Tensor, "b c *size"], t: Float[Tensor, " b"], cond: Condition
    ) -> Float[Tensor, "b c *size"]:
        """The prediction at the noise levels `t`."""
        run = runner(self, self.checkpointing)
        level = self.level(t, cond.size)
        y, seen = self.u.descend(self.conv_in(x_t.to(self.conv_in.weight.dtype)), level, run)
        if self.downsample_mid is not None:
            y = self.downsample_mid(y)
        y = self.mid(y, level, cond, run)
        if self.upsample_mid is not None:
            y = self.upsample_mid(y)
        y = self.u.ascend(y, seen, level, run)
        return self.conv_out(F.silu(self.norm_out(y)))


class Middle(nn.Module):
    """The transformer of a U-ViT, between two linear layers."""

    pos_emb: Tensor

    def __init__(self, cfg: UViT.Config, rank: int, channels: int, dim: int):
        super().__init__()
        width, depth, heads = cfg.mid
        self.long_skips, self.cross, self.as_4m = cfg.long_skips, cfg.conditioning != "concat", cfg.as_4m
        grid = expand(cfg.mid_grid or (32, 32, 8)[rank - 1], rank)
        self.register_buffer("pos_emb", positions(grid, width), persistent=False)
        self.proj_in = _linear(channels, width)
        if not self.cross:
            self.cond_proj = _linear(dim, width)
            self.mask_token = nn.Parameter(torch.empty(width).normal_(std=0.02))
        half = depth // 2 if cfg.long_skips else depth
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                round(cfg.mlp_ratio * width),
                time=4 * cfg.widths[0],
                context=dim if self.cross else 0,
                skip=index > half,
                backend=cfg.attention,
                dropout=cfg.dropout,
                attn_dropout=cfg.attn_dropout,
                drop_path=cfg.drop_path * index / max(1, depth - 1),
            )
            for index in range(depth)
        )
        self.proj_out = _linear(width, channels)

    def condition(
        self, z: Float[Tensor, "b *grid d"], grid: tuple[int, ...], mask: Bool[Tensor, "b *grid"] | None
    ) -> tuple[Tensor | None, tuple[tuple[Tensor, Tensor], ...], Tensor | None]:
        """Tokens at the transformer's grid; or keys and values for each block, and which of them may be seen."""
        if self.cross:
            blocks: Iterable[Any] = self.blocks
            keys = tuple(block.keys(z.flatten(1, -2)) for block in blocks)
            return None, keys, None if mask is None else ~mask.flatten(1)
        y = rearrange(resized(rearrange(z, "b ... d -> b d ..."), grid), "b d ... -> b (...) d")
        y = self.cond_proj(y)
        # Without a mask as well, so that distributed training always has a gradient of mask_token.
        mask = torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device) if mask is None else mask
        hidden = resized(mask.unsqueeze(1).to(z), grid).flatten(2).mT > 0.5
        return torch.where(hidden, self.mask_token.to(y.dtype), y), (), None

    def forward(
        self, x: Float[Tensor, "b c *grid"], level: Float[Tensor, "b d"], cond: Condition, run: Any
    ) -> Float[Tensor, "b c *grid"]:
        grid = tuple(x.shape[2:])
        mode = "nearest" if self.as_4m else _SMOOTH[len(grid)]
        y = self.proj_in(rearrange(x, "b c ... -> b (...) c"))
        y = y + _resized_positions(self.pos_emb, grid, mode).flatten(2).mT.to(y.dtype)
        if cond.tokens is not None:
            y = y + cond.tokens
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            key, value = cond.keys[index] if self.cross else (None, None)
            skip = kept.pop() if block.skip_linear is not None else None
            y = run(block, y, level, skip, key, value, cond.visible, self.as_4m)
            if self.long_skips and index < len(self.blocks) // 2:
                kept.append(y)
        return rearrange(self.proj_out(y), "b n c -> b c n").unflatten(2, grid)


class Block(nn.Module):
    """A transformer block whose branches are shifted, scaled and gated by the noise level; the gates start at zero."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        time: int,
        context: int,
        skip: bool,
        backend: Backend,
        dropout: float,
        attn_dropout: float,
        drop_path: float,
    ):
        super().__init__()
        self.heads, self.backend = heads, backend
        self.attn_dropout, self.drop_path = attn_dropout, drop_path
        self.skip_linear = _linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = _linear(width, 3 * width, parts=3)
        self.attn_proj = _linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1, self.fc2 = _linear(width, hidden), _linear(hidden, width)
        branches = 3 if context else 2
        self.modulation = _linear(time, 2 * branches * width)
        self.gate = _linear(time, branches * width)
        nn.init.zeros_(self.gate.weight)
        self.dropout = nn.Dropout(dropout)
        if context:
            self.query_norm = nn.LayerNorm(width, eps=NORM_EPS)
            self.context_norm = nn.LayerNorm(context, eps=NORM_EPS)
            self.cross_q, self.cross_kv = _linear(width, width), _linear(context, 2 * width, parts=2)
            self.cross_proj = _linear(width, width)

    def keys(self, z: Float[Tensor, "b m d"]) -> tuple[Float[Tensor, "b m w"], Float[Tensor, "b m w"]]:
        """Keys and values of the tokens for the cross-attention."""
        key, value = self.cross_kv(self.context_norm(z)).chunk(2, -1)
        return key, value

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        level: Float[Tensor, "b d"],
        skip: Float[Tensor, "b n w"] | None,
        key: Float[Tensor, "b m w"] | None,
        value: Float[Tensor, "b m w"] | None,
        visible: Bool[Tensor, "b m"] | None,
        as_4m: bool,
    ) -> Float[Tensor, "b n w"]:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        level = F.silu(level).unsqueeze(1)
        modulation = self.modulation(level).chunk(4 if key is None else 6, -1)
        gates = self.gate(level).chunk(2 if key is None else 3, -1)
        q, k, v = self.qkv(_modulated(self.norm1(x), modulation[0], modulation[1])).chunk(3, -1)
        y = self.dropout(self.attn_proj(self._attend(q, k, v)))
        x = x + self._drop_path(gates[0] * y)
        if key is not None:
            q = self.cross_q(_modulated(self.query_norm(x), modulation[2], modulation[3]))
            x = x + self._drop_path(gates[1] * self._cross(q, key, value, visible, as_4m))
        y = self.fc1(_modulated(self.norm2(x), modulation[-2], modulation[-1]))
        return x + self._drop_path(gates[-1] * self.dropout(self.fc2(F.gelu(y))))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attention of all heads; the last axis has one head after the other."""
        q, k, v = (rearrange(x, "b n (h d) -> b n h d", h=self.heads) for x in (q, k, v))
        dropout = self.attn_dropout if self.training else 0.0
        y = attend(q, k, v, visible=visible, backend=self.backend, dropout=dropout)
        return rearrange(y, "b n h d -> b n (h d)")

    def _cross(self, q: Tensor, key: Any, value: Any, visible: Tensor | None, as_4m: bool) -> Tensor:
        """Cross-attention. Where a sample has no visible token, the branch is zero (4M: the mean of all tokens)."""
        if visible is None:
            return self.dropout(self.cross_proj(self._attend(q, key, value)))
        some = visible.any(-1, keepdim=True)
        q = q * some.unsqueeze(-1) if as_4m else q  # without a query all keys weigh the same
        y = self.dropout(self.cross_proj(self._attend(q, key, value, visible | ~some)))
        return y if as_4m else y * some.unsqueeze(-1)

    def _drop_path(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


def positions(grid: tuple[int, ...], width: int) -> Float[Tensor, "1 d *grid"]:
    """Sines and cosines of the index along each axis in turn, each with `width // (2 * rank)` frequencies.

    The remaining channels are 0. MoCo v3 (arXiv 2104.02057) for two axes.
    """
    freqs = width // (2 * len(grid))
    # The bits of 4M. A number to the power of a tensor would load torch's compiler on the meta device.
    omega = 1 / torch.pow(torch.tensor(POSITIONS), torch.arange(freqs) / max(1, freqs))
    pos_emb = torch.zeros(1, width, *grid)
    for axis, length in enumerate(grid):
        angle = omega[:, None] * torch.arange(length)
        shape = [-1, *(length if other == axis else 1 for other in range(len(grid)))]
        start = 2 * freqs * axis
        pos_emb[0, start : start + 2 * freqs] = torch.cat([angle.sin(), angle.cos()]).reshape(shape)
    return pos_emb


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _resized_positions(pos_emb: Tensor, grid: tuple[int, ...], mode: str) -> Tensor:
    if tuple(pos_emb.shape[2:]) == grid:
        return pos_emb
    smooth = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(pos_emb.float(), size=grid, mode=mode, **smooth)


def _linear(dim_in: int, dim_out: int, *, parts: int = 1) -> nn.Linear:
    """A linear layer, Xavier-uniform with zero bias; `parts` stacked layers are initialised like single ones."""
    layer = nn.Linear(dim_in, dim_out)
    bound = (6 / (dim_in + dim_out / parts)) ** 0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer
