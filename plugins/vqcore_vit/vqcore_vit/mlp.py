"""MLPs that process every position of their input separately: for vectors, poses and feature maps.

Paper: 4M (arXiv 2312.06647). These are its MLP tokenizers; the names of the weights are the same.
Differs from 4M: the plain MLP has an activation function (`activation: none` gives 4M's plain MLP, which is linear
except for its normalizations); the projection of the latents (`in_proj`) is a part of the decoder.
"""

from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.config import Config, at_least, refuse_idle
from vqcore.protocols import DataSpec
from vqcore_vit.blocks import linear
from vqcore_vit.trunk import check_channels


@dataclass(frozen=True, kw_only=True)
class MLPConfig(Config):
    """Settings that the encoder and the decoder share."""

    kind: Literal["bottleneck", "plain"] = "bottleneck"
    """bottleneck: residual blocks (4M's BottleneckMLP). plain: one layer after the other (4M's MLP)."""
    depth: int = 6
    """Number of residual blocks, or of layers of the plain kind, including the output layer (4M's B)."""
    width: int = 1024
    """Number of channels between the blocks (4M's Wi)."""
    expansion: int = 4
    """Hidden channels of a residual block, as a multiple of width (4M's E)."""
    activation: Literal["gelu", "none"] = "gelu"
    """Activation function between the layers; use none for weights of 4M's plain MLP."""

    def __post_init__(self) -> None:
        if self.kind == "plain":
            refuse_idle(self, "kind=plain", "expansion")
        at_least(self, depth=1, width=1, expansion=1)


class _Residual(nn.Module):
    """Two linear layers on a residual branch, under 4M's name `block`."""

    def __init__(self, width: int, hidden: int, act: nn.Module):
        super().__init__()
        self.block = nn.Sequential(linear(width, hidden), act, linear(hidden, width))

    def forward(self, x: Float[Tensor, "b *size d"], norm: nn.LayerNorm) -> Float[Tensor, "b *size d"]:
        return x + self.block(norm(x))


class MLPEncoder(nn.Module):
    """Encode the channels of every position into a latent of width `dim`. The grid equals the size of the input."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MLPConfig):
        """Settings of `vit/mlp-encoder`."""

    linear_in: nn.Linear

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.dim, self.rank, self.channels = cfg.width, spec.rank, spec.channels
        _add_layers(self, cfg, spec.channels, cfg.width)

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The size itself. Raises `ValueError` if `size` has another number of axes than the data."""
        if len(size) != self.rank:
            raise ValueError(f"size {list(size)} has {len(size)} axes, the data has {self.rank}")
        return tuple(size)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *size d"]:
        """Move the channels to the last axis and apply the layers."""
        check_channels(x, self.channels)
        x = rearrange(x, "b c ... -> b ... c")
        return _apply(self, x.to(self.linear_in.weight.dtype))


class MLPDecoder(nn.Module):
    """Decode quantized latents of width `dim` into the channels of every position: `in_proj`, then the layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MLPConfig):
        """Settings of `vit/mlp-decoder`."""

    linear_out: nn.Linear

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        super().__init__()
        self.in_proj = nn.Linear(dim, cfg.width)
        _add_layers(self, cfg, cfg.width, spec.out_channels)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the output layer."""
        return self.linear_out.weight

    def forward(self, z_q: Float[Tensor, "b *size d"]) -> Float[Tensor, "b c *size"]:
        """Project the latents, apply the layers, and move the channels to the first axis."""
        x = _apply(self, self.in_proj(z_q.to(self.in_proj.weight.dtype)))
        return rearrange(x, "b ... c -> b c ...")


def _add_layers(module: Any, cfg: MLPConfig, dim_in: int, dim_out: int) -> None:
    """Add layers with 4M's names to a module: either `blocks` or `layers`, and one of `layernorms` for each of them."""
    act = nn.GELU() if cfg.activation == "gelu" else nn.Identity()
    module.act, module.blocks, module.layers = act, None, None
    module.linear_in = linear(dim_in, cfg.width)
    if cfg.kind == "bottleneck":
        hidden = cfg.expansion * cfg.width
        module.blocks = nn.ModuleList(_Residual(cfg.width, hidden, act) for _ in range(cfg.depth))
    else:
        module.layers = nn.ModuleList(linear(cfg.width, cfg.width) for _ in range(cfg.depth - 1))
    module.layernorms = nn.ModuleList(nn.LayerNorm(cfg.width) for _ in module.blocks or module.layers)
    module.linear_out = linear(cfg.width, dim_out)


def _apply(module: Any, x: Float[Tensor, "b *size c"]) -> Float[Tensor, "b *size d"]:
    x = module.linear_in(x)
    for layer, norm in zip(module.blocks or module.layers, module.layernorms):
        x = layer(x, norm) if module.blocks else module.act(layer(norm(x)))
    return module.linear_out(x)
