"""A discriminator on features of a frozen network, at several depths (StyleGAN-T, arXiv 2301.09515, section 3.2)."""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from vqcore import config
from vqcore.config import slot
from vqcore.errors import SettingError
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore_percept.nets import as_tokens, tapped
from vqcore_percept.timm import check_blocks


class Dino(nn.Module):
    """Light heads on a teacher's features. Takes `(b, c, *size)`, gives `(b, n)`: a logit for each token and depth.

    Only the heads are trained. The gradient of the tokenizer flows through the teacher. Differs from the paper: heads
    normalize over groups of channels, so a sample's logits do not depend on its batch, and no caption conditions them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `percept/dino`."""

        trunk: config.Config = slot("teacher")
        """The frozen network, e.g. {name: percept/timm, model: vit_small_patch16_dinov3.lvd1689m}."""
        blocks: tuple[str, ...] = ()
        """Submodules of the trunk that get a head each, e.g. [net.blocks.2, net.blocks.5]. None: the trunk's output."""
        kernel: int = 9
        """Tokens that a head sees beside each other, an odd number."""

        def __post_init__(self) -> None:
            if self.kernel < 1 or self.kernel % 2 == 0:
                raise SettingError("kernel", f"{self.kernel} must be odd and at least 1")

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.cfg = cfg
        self.trunk: Any = registry().build("teacher", cfg.trunk, "trunk", spec=spec)
        self.trunk.eval().requires_grad_(False)
        check_blocks(self.trunk, cfg.blocks, cfg.trunk.name)
        with torch.no_grad():
            widths = [one.shape[-1] for one in self._features(torch.zeros(1, spec.channels, *spec.size))]
        self.heads = nn.ModuleList(_Head(width, cfg.kernel) for width in widths)

    def train(self, mode: bool = True) -> "Dino":
        """Set the mode of the heads; the trunk stays in eval mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b n"]:
        """Logits: high for data, low for reconstructions."""
        features = [rearrange(one, "b n d -> b d n") for one in self._features(x)]
        return torch.cat([head(one).flatten(1) for head, one in zip(self.heads, features)], 1)

    def _features(self, x: Tensor) -> list[Float[Tensor, "b n d"]]:
        if not self.cfg.blocks:
            return [as_tokens(self.trunk(x), channels_last=False)]
        found, _ = tapped(self.trunk, self.cfg.blocks, x)
        last = getattr(getattr(self.trunk, "net", None), "output_fmt", "NCHW") == "NHWC"
        return [as_tokens(one, channels_last=last) for one in found]


class _Head(nn.Module):
    """A token's logit: two convolutions along the tokens, the second one beside a short cut, and a projection."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        groups = next(number for number in (32, 16, 8, 4, 2, 1) if width % number == 0)
        self.first = spectral_norm(nn.Conv1d(width, width, 1))
        self.around = spectral_norm(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in range(2))
        self.last = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x: Float[Tensor, "b d n"]) -> Float[Tensor, "b 1 n"]:
        x = F.leaky_relu(self.norms[0](self.first(x)), 0.2)
        return self.last((F.leaky_relu(self.norms[1](self.around(x)), 0.2) + x) / 2**0.5)
