"""MLPs that treat every position of their input alone: for vectors, poses and feature maps.

Paper: 4M (arXiv 2312.06647), whose MLP tokenizers this is; weights fit name by name.
Differs from 4M: the plain MLP has an activation function (`activation: none` gives 4M's, which is linear up to its
normalisations); the decoder owns the projection of its latents (`in_proj`).
"""

from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.config import Config
from vqcore.protocols import DataSpec
from vqcore_vit.blocks import linear
from vqcore_vit.trunk import check_channels


@dataclass(frozen=True, kw_only=True)
class MLPConfig(Config):
    """What the encoder's and the decoder's settings have in common."""

    kind: Literal["bottleneck", "plain"] = "bottleneck"
    """Residual blocks (4M's BottleneckMLP), or one layer after the other (4M's MLP)."""
    depth: int = 6
    """Residual blocks, or layers of the plain kind, whose last one leads to the output (4M's B)."""
    width: int = 1024
    """Channels between the blocks (4M's Wi)."""
    expansion: int = 4
    """Hidden channels of a residual block, as a multiple of width (4M's E)."""
    activation: Literal["gelu", "none"] = "gelu"
    """Between the layers; none is for weights of 4M's plain MLP."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")


class _Residual(nn.Module):
    """Two linear layers on a residual branch; 4M calls them `block`."""

    def __init__(self, width: int, hidden: int, act: nn.Module):
        super().__init__()
        self.block = nn.Sequential(linear(width, hidden), act, linear(hidden, width))

    def forward(self, x: Float[Tensor, "b *size d"], norm: nn.LayerNorm) -> Float[Tensor, "b *size d"]:
        return x + self.block(norm(x))


class MLPEncoder(nn.Module):
    """Channels at every position to latents of width `dim`; the grid is the size."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MLPConfig):
        """Settings of `vit/mlp-encoder`."""

    linear_in: nn.Linear

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.dim, self.rank, self.channels = cfg.width, spec.rank, spec.channels
        _add_layers(self, cfg, spec.channels, cfg.width)

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The size itself. Raises `ValueError` for another number of axes than the data's."""
        if len(size) != self.rank:
            raise ValueError(f"size {list(size)} has {len(size)} axes, the data has {self.rank}")
        return tuple(size)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *size d"]:
        """Channels last, then layer by layer."""
        check_channels(x, self.channels)
        x = rearrange(x, "b c ... -> b ... c")
        return _apply(self, x.to(self.linear_in.weight.dtype))


class MLPDecoder(nn.Module):
    """Quantized latents of width `dim` to the channels of every position: `in_proj`, then layer by layer."""

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
        """The weight of the layer that writes the output."""
        return self.linear_out.weight

    def forward(self, z_q: Float[Tensor, "b *size d"]) -> Float[Tensor, "b c *size"]:
        """Project, transform, channels first."""
        x = _apply(self, self.in_proj(z_q.to(self.in_proj.weight.dtype)))
        return rearrange(x, "b ... c -> b c ...")


def _add_layers(module: Any, cfg: MLPConfig, dim_in: int, dim_out: int) -> None:
    """Give a module its layers, under 4M's names: of `blocks` and `layers` it has one, with as many `layernorms`."""
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
