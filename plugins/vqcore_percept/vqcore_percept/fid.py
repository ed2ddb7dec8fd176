"""FID (arXiv 1706.08500) and KID (arXiv 1801.01401) with the network and the input of torch-fidelity 0.4."""

import importlib
import io
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.borrowed import read
from vqcore.errors import cannot_import
from vqcore.protocols import DataSpec
from vqcore_percept.judges import FrechetSets
from vqcore_percept.nets import RANDOM, PictureConfig, Seen, fill_like, hub_file, random_weights


class FID(FrechetSets):
    """Frechet distance of reconstructions and samples in Inception's features: rFID, and `kid`, `precision`, `recall`.

    `precision` and `recall` differ from their paper: features of Inception instead of VGG-16.
    """

    name, kernel_name = "percept/fid", "kid"
    convention = (
        "Inception of 2015, pool of 2048, as torch-fidelity 0.4: pictures of 8 bits, 299 x 299 bilinear as in "
        "TensorFlow 1; reference: the crops that the encoder saw; 3 neighbours"
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(PictureConfig):
        """Settings of `percept/fid`."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        self.judge = Inception(cfg, spec=spec)


class Inception(nn.Module):
    """The features of Inception in its last pool: `(b, c, h, w)` in the data's range to `(b, 2048)`."""

    borrowed = ("net",)

    def __init__(self, cfg: PictureConfig, *, spec: DataSpec):
        super().__init__()
        self.cfg = cfg
        self.seen = Seen(cfg, spec, mean=(0.0,) * 3, std=(1.0,) * 3, size=None)
        self.net = _made()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2048"]:
        """The values are rounded to 8 bits."""
        with torch.autocast(x.device.type, enabled=False):
            return self.net((self.seen(x) * 255).round().to(torch.uint8))[0]

    def borrow(self, places: Any) -> dict[str, str]:
        """Fill the network: from a file, from the cache of `torch.hub`, or with `--download`."""
        place = places.get("net", self.cfg.weights)
        if place == RANDOM:
            return {"net": random_weights(self.net, _made, "percept/fid")}
        place = place or str(hub_file(_library().URL_INCEPTION_V3))
        tensors, digest = read(place)
        # Files from before batch norms counted batches lack these counters, which decide nothing.
        counters = {
            name: value for name, value in self.net.state_dict().items() if name.endswith("batches_tracked")
        }
        fill_like(self.net, counters | tensors, place)
        return {"net": digest}


def _library() -> Any:
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        install = "'torch-fidelity>=0.4,<0.5' torchvision"
        raise ValueError(cannot_import(error, "torch_fidelity", install)) from error


def _made() -> nn.Module:
    """The network of torch-fidelity with random weights."""
    base: Any = _library().FeatureExtractorInceptionV3

    class Empty(base):
        """torch-fidelity reads a file while it builds, as a pickle that may run code: the file given here is empty."""

        def load_state_dict(self, state: Any, strict: bool = True) -> Any:
            return super().load_state_dict(state, strict=strict and bool(state))

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        net = Empty("inception-v3-compat", ["2048"], nothing)
        for module in net.modules():
            if isinstance(
                module, nn.Conv2d
            ):  # torch's own start lets features fade to 1e-8 in so many layers
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net
