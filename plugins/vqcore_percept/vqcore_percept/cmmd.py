"""CMMD (arXiv 2401.09603): the kernel distance of two sets of CLIP's embeddings."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.protocols import DataSpec
from vqcore_percept.clip import ClipConfig, filled, opened
from vqcore_percept.judges import Features, Sets, interval, mmd, split
from vqcore_percept.nets import unit

SIGMA, SCALE = 10.0, 1000.0
"""Width of the Gaussian kernel, and the number that values are multiplied with, as in the authors' code."""


class CMMD(Sets):
    """1000 times the squared discrepancy of CLIP's embeddings of reconstructions and samples, Gaussian kernel.

    All pairs of a set count, also a sample with itself, as in the authors' code.
    """

    name = "percept/cmmd"

    @dataclass(frozen=True, kw_only=True)
    class Config(ClipConfig):
        """Settings of `percept/cmmd`."""

        model: str = "ViT-L-14-336"
        """open_clip's name of the model. The paper has ViT-L/14 at 336 pixels."""
        pretrained: str | None = "openai"
        """open_clip's name of the weights; it also says how pictures are normalized."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        self.judge = Embedding(cfg, spec=spec)
        side = " x ".join(map(str, self.judge.seen.size or ()))
        self.convention = (
            f"{cfg.model} {cfg.pretrained}: pictures of 8 bits, {side} bicubic, filtered; unit embeddings, "
            f"sigma {SIGMA:g}, times {SCALE:g}, all pairs; reference: the crops that the encoder saw"
        )

    def compared(self, hat: Features, true: Features) -> dict[str, float]:
        """The discrepancy and its interval."""
        values = mmd(gaussian, hat, true, split(len(hat)), unbiased=False)
        return interval("", [SCALE * value for value in values])


def gaussian(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """exp(-|a - b|^2 / (2 sigma^2))."""
    return torch.exp(-torch.cdist(a, b).square() / (2 * SIGMA**2))


class Embedding(nn.Module):
    """CLIP's embedding of pictures, of length 1."""

    borrowed = ("net",)

    def __init__(self, cfg: ClipConfig, *, spec: DataSpec):
        super().__init__()
        self.cfg = cfg
        self.net, self.seen = opened(cfg, spec)
        self.seen.mode = "bicubic"

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Embeddings in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return unit(self.net(self.seen(x)).float(), 1)

    def borrow(self, places: Any) -> dict[str, str]:
        """Fill the tower, as `percept/clip` does."""
        return {"net": filled(self.net, self.cfg, places.get("net", self.cfg.weights))}
