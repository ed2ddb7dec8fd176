"""A convolutional discriminator that judges overlapping patches (PatchGAN, arXiv 1611.07004, section 3.2.2)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vqcore import config
from vqcore.config import at_least
from vqcore.convolution import CONVOLUTIONS
from vqcore.protocols import DataSpec

KERNEL = 4


class PatchGAN(nn.Module):
    """Strided convolutions; a logit for each patch. Takes `(b, c, *size)` of 1 to 3 axes, gives `(b, 1, *patches)`.

    `norm: spectral` divides each weight by its largest singular value (arXiv 1802.05957). `batch` is what the paper
    has: a sample's logits then depend on its batch in training, and on running averages in the tokenizer's turn.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `percept/patchgan`."""

        width: int = 64
        """Channels of the first layer; each later layer has twice as many, up to 8 times `width`."""
        depth: int = 3
        """Layers that halve the size. 3 layers see patches of 70 positions an axis, 2 see 34, 1 sees 16."""
        norm: Literal["spectral", "batch", "none"] = "spectral"
        """What keeps the discriminator smooth."""

        def __post_init__(self) -> None:
            at_least(self, width=1, depth=1)

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        rank, kernel = spec.rank, KERNEL
        if not 1 <= rank <= 3:
            raise ValueError(f"patchgan takes data of 1 to 3 axes, the data has {rank}")
        _check_depth(cfg, spec.size)
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        widths = [spec.channels, *(cfg.width * min(2**i, 8) for i in range(cfg.depth + 1))]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            normed = cfg.norm == "batch" and i > 0
            made: Any = CONVOLUTIONS[rank](
                a, b, kernel, stride=2 if i < cfg.depth else 1, padding=1, bias=not normed
            )
            layers += [spectral_norm(made) if cfg.norm == "spectral" else made]
            layers += [norm(b)] if normed else []
            layers += [nn.LeakyReLU(0.2)]
        last: Any = CONVOLUTIONS[rank](widths[-1], 1, kernel, padding=1)
        layers.append(spectral_norm(last) if cfg.norm == "spectral" else last)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b 1 *patches"]:
        """Logits: high for data, low for reconstructions."""
        return self.layers(x)


def _check_depth(cfg: PatchGAN.Config, size: tuple[int, ...]) -> None:
    def left(side: int, depth: int) -> int:
        for _ in range(depth):
            side //= 2  # kernel 4, stride 2, padding 1
        return side - 2  # two layers with kernel 4, stride 1, padding 1

    smallest = min(size)
    if left(smallest, cfg.depth) < 1:
        most = max((depth for depth in range(1, cfg.depth) if left(smallest, depth) >= 1), default=0)
        remedy = f"take depth={most}" if most else "these samples are too small for a patchgan"
        raise ValueError(f"depth={cfg.depth} halves {smallest} positions to fewer than 3: {remedy}")
