"""A U-Net that denoises patches; the tokens are more channels beside the patches.

Papers: the U-Net of ADM (arXiv 2105.05233, section 3); patches and conditioning by concatenation as in DiVAE
(arXiv 2206.00386) and 4M (arXiv 2312.06647), whose `unet_patched` is the default.
Differs from 4M: one to three axes; several heads lie one after the other in `qkv`; the original size can be told.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vqcore.config import at_least
from vqcore.errors import SettingError
from vqcore.protocols import DataSpec
from vqcore_unet.denoiser import DenoiserConfig, Pixels, check_groups
from vqcore_unet.layers import (
    EPS,
    Attention,
    Levels,
    ResBlock,
    UShape,
    channels_last,
    conv,
    resized,
    runner,
    swish,
    zeroed,
)

_PATCH = {
    1: "b c (h p) -> b (c p) h",
    2: "b c (h p) (w q) -> b (c p q) h w",
    3: "b c (t p) (h q) (w r) -> b (c p q r) t h w",
}
_UNPATCH = {rank: " -> ".join(reversed(text.split(" -> "))) for rank, text in _PATCH.items()}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Condition(NamedTuple):
    """What the tokens of a batch add to the first layer, and the original sizes."""

    hint: Float[Tensor, "b c *grid"]
    size: Float[Tensor, "b r"] | None


class UNet(Pixels):
    """Predict from noised samples and tokens; hidden tokens are zeros."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DenoiserConfig):
        """Settings of `unet/unet`."""

        width: int = 256
        """Channels of the first level."""
        mult: tuple[int, ...] = (1, 2, 2, 2)
        """Channels of each level as a multiple of width; every level but the last one halves the size."""
        depth: int = 3
        """Residual blocks a level on the way down; there is one more on the way up."""
        attention: tuple[int, ...] = (4, 8)
        """How many times smaller than the grid of patches the levels with self-attention are: 1, 2, 4 ..."""
        heads: int = 1
        """Heads of the self-attention."""

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least(self, width=2, mult=1, depth=0, heads=1)
            if self.width % 2:
                raise SettingError("width", f"{self.width} is odd: half of it are sines of the time")
            check_groups(self, "width", self.widths, self.norm_groups)
            levels = [2**index for index in range(len(self.mult))]
            strange = [scale for scale in self.attention if scale not in levels]
            if strange:
                raise SettingError("attention", f"{strange[0]} is not the scale of a level: {levels}")
            for index, width in enumerate(self.widths):
                if (2**index in self.attention or index == len(self.mult) - 1) and width % self.heads:
                    raise SettingError("heads", f"{self.heads} does not divide {width} channels of a level")

        @property
        def widths(self) -> list[int]:
            """Channels of the levels."""
            return [self.width * mult for mult in self.mult]

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        super().__init__(cfg, spec, cfg.patch_size * 2 ** (len(cfg.mult) - 1))
        rank, patches = spec.rank, spec.channels * cfg.patch_size**spec.rank
        time: Any = {"time": 4 * cfg.width, "groups": cfg.norm_groups, "dropout": cfg.dropout}
        self.level = Levels(cfg.width, rank if cfg.resolution_cond else 0)
        self.conv_in = conv(rank, patches + dim, cfg.widths[0])
        self.u = UShape(
            rank,
            cfg.widths,
            cfg.depth,
            attention=[2**index in cfg.attention for index in range(len(cfg.mult))],
            heads=cfg.heads,
            **time,
        )
        middle = self.u.channels
        self.mid_in = ResBlock(rank, middle, middle, **time)
        self.mid_attention = Attention(middle, heads=cfg.heads, groups=cfg.norm_groups)
        self.mid_out = ResBlock(rank, middle, middle, **time)
        self.norm_out = nn.GroupNorm(cfg.norm_groups, cfg.widths[0], eps=EPS)
        self.conv_out = zeroed(conv(rank, cfg.widths[0], patches))
        channels_last(self)

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
        """The first layer's share of the tokens, at the size of the patches."""
        self.target_shape(size)
        if mask is not None:
            z_q = z_q.masked_fill(mask.unsqueeze(-1), 0.0)
        z = rearrange(z_q.to(self.conv_in.weight.dtype), "b ... d -> b d ...")
        z = channels_last(resized(z, tuple(side // self.patch for side in size)))
        weight = self.conv_in.weight[:, -z.shape[1] :]
        hint = _CONVOLVE[self.rank](z, weight, self.conv_in.bias, padding=1)
        return Condition(hint, self.original(extras, z_q))

    def forward(
        self, x_t: Float[Tensor, "b c *size"], t: Float[Tensor, " b"], cond: Condition
    ) -> Float[Tensor, "b c *size"]:
        """The prediction at the noise levels `t`."""
        run = runner(self, self.checkpointing)
        level = self.level(t, cond.size)
        sides = dict(zip("pqr", [self.patch] * self.rank))
        y = channels_last(rearrange(x_t.to(self.conv_in.weight.dtype), _PATCH[self.rank], **sides))
        y = cond.hint + _CONVOLVE[self.rank](y, self.conv_in.weight[:, : y.shape[1]], padding=1)
        y, seen = self.u.descend(y, level, run)
        y = run(self.mid_out, run(self.mid_attention, run(self.mid_in, y, level)), level)
        y = self.u.ascend(y, seen, level, run)
        y = self.conv_out(swish(self.norm_out(y)))
        return rearrange(y, _UNPATCH[self.rank], **sides)
