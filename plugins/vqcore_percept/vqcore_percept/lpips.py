"""LPIPS (arXiv 1801.03924): distances of features of a network, weighed by what people said."""

import importlib
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.borrowed import read, sha256
from vqcore.errors import cannot_import
from vqcore.protocols import DataSpec
from vqcore_percept.nets import RANDOM, NetConfig, Seen, fill_like, hub_file, random_weights, unit

FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""The files of torchvision that LPIPS was calibrated on; each name ends with the beginning of the file's SHA-256."""
URL = "https://download.pytorch.org/models/"

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""The paper's normalization of pictures in [-1, 1]."""


class LPIPS(nn.Module):
    """The distance of the package `lpips`, version 0.1, for samples in the data's range.

    Differs from the package: the norm of a feature vector has its eps inside the root, because the gradient of the
    root of zero is not finite. The values are equal up to rounding.
    """

    borrowed = ("net",)

    @dataclass(frozen=True, kw_only=True)
    class Config(NetConfig):
        """Settings of `percept/lpips`."""

        net: Literal["alex", "vgg", "squeeze"] = "vgg"
        """The network. `vgg` is what most papers train with, `alex` what most of them report."""
        heads: bool = True
        """Weigh channels as people judged, for torchvision's weights. False: all alike, for other weights."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.cfg = cfg
        mean, std = ([(number + 1) / 2 for number in SHIFT], [number / 2 for number in SCALE])
        self.seen = Seen(cfg, spec, mean=mean, std=std, size=None)
        made = _made(cfg)
        self.net = made.net
        self.heads = [f"head{i}" for i in range(made.L)]
        for name, head in zip(self.heads, made.lins if cfg.heads else [None] * made.L):
            weight = torch.ones(()) if head is None else head.model[-1].weight.detach().clone()
            self.register_buffer(name, weight, persistent=False)
        self._check_size(spec)
        self.requires_grad_(False)

    def forward(self, x_hat: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """The sum over layers of the mean over positions of the weighed squared differences."""
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.net(self.seen(x))
            found = self.net(self.seen(x_hat))
            total = torch.zeros(len(x), device=x.device)
            for name, a, b in zip(self.heads, found, wanted):
                square = (unit(a.float(), 1) - unit(b.float(), 1)).square() * getattr(self, name)
                total = total + square.sum(1).mean((1, 2))
        return total

    def borrow(self, places: Any) -> dict[str, str]:
        """Fill the network: from a file, from torchvision's files in the cache of `torch.hub`, or with `--download`."""
        place = places.get("net", self.cfg.weights)
        if place == RANDOM:
            digest = random_weights(self.net, lambda: _made(self.cfg).net, "percept/lpips")
        elif place is None:
            tensors, _ = read(hub_file(URL + FILES[self.cfg.net]))
            self._fill(tensors, FILES[self.cfg.net])
            digest = sha256(tensors)
        else:
            tensors, digest = read(place)
            self._fill(tensors, place)
        self.net.to(self.seen.dtype)
        return {"net": digest}

    def _fill(self, tensors: dict[str, Tensor], place: str) -> None:
        """`features.N.weight` of torchvision, or `N.weight`, is `sliceK.N.weight` here."""
        slices = {name.partition(".")[2]: name for name in self.net.state_dict()}
        named = {
            slices.get(name.removeprefix("features."), name): tensor
            for name, tensor in tensors.items()
            if not name.startswith("classifier.")
        }
        fill_like(self.net, named, place)

    @torch.no_grad()
    def _check_size(self, spec: DataSpec) -> None:
        try:
            self.net(torch.zeros(1, 3, *spec.size))
        except RuntimeError as error:
            raise ValueError(f"pictures of {list(spec.size)} are too small for {self.cfg.net}") from error


def _made(cfg: LPIPS.Config) -> Any:
    try:
        library = importlib.import_module("lpips")
    except ImportError as error:
        raise ValueError(cannot_import(error, "lpips", "lpips torchvision")) from error
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter(
            "ignore"
        )  # torchvision warns of the way in which the package asks for a network
        return library.LPIPS(net=cfg.net, pnet_rand=True, lpips=cfg.heads, verbose=False)
