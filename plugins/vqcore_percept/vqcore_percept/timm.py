"""Distances of features and logits of any picture model of timm."""

import difflib
import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.borrowed import read, sha256
from vqcore.errors import CheckpointError, SettingError, cannot_import, did_you_mean
from vqcore.protocols import DataSpec
from vqcore_percept.nets import (
    RANDOM,
    Compared,
    Distance,
    NetConfig,
    Seen,
    fill_like,
    random_weights,
)


@dataclass(frozen=True, kw_only=True)
class TimmConfig(NetConfig):
    """Settings of a picture model of timm."""

    model: str
    """timm's name of the model, with its weights: `vit_base_patch14_dinov2.lvd142m`, `convnext_small.fb_in22k`."""
    resize: bool = True
    """Resize samples to the model's own size. False: samples as they are, where the model takes their size."""


class Timm(Compared):
    """The sum over blocks of the distance of two samples' features there, plus the distance of their logits."""

    borrowed = ("net",)

    @dataclass(frozen=True, kw_only=True)
    class Config(TimmConfig):
        """Settings of `percept/timm`."""

        blocks: tuple[str, ...] = ()
        """Submodules whose output is compared, e.g. [blocks.2, blocks.5]; names joined by hyphens are split."""
        logits: bool = False
        """Compare the model's output as well: its class logits."""
        distance: Distance = "cosine"
        """`cosine`: 1 - cosine of two tokens. `l1`: |difference| of unit vectors, summed over channels. `mse`: mean
        square of plain features, the usual one for logits. All are means over tokens."""
        divide_by_batch: bool = False
        """Divide by the number of samples, a second time, as 4M's training did."""

        def __post_init__(self) -> None:
            super().__post_init__()
            object.__setattr__(self, "blocks", tuple(one for name in self.blocks for one in name.split("-")))
            if not (self.blocks or self.logits):
                raise SettingError(
                    "blocks", "[]: name blocks to compare, e.g. [blocks.2, blocks.5], or set logits: true"
                )

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.cfg = cfg
        self.net, self.seen = opened(cfg, spec)
        check_blocks(self.net, cfg.blocks, cfg.model)
        self.channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        self.distance, self.blocks, self.output = cfg.distance, cfg.blocks, cfg.logits
        self.requires_grad_(False)

    def forward(self, x_hat: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """One distance a sample. No gradient is kept for `x`."""
        found = super().forward(x_hat, x)
        return found / len(x) if self.cfg.divide_by_batch else found

    def borrow(self, places: Any) -> dict[str, str]:
        """Fill the model: from a file, from timm's cache, or with `--download`."""
        return {
            "net": filled(self.net, self.cfg, places.get("net", self.cfg.weights), logits=self.cfg.logits)
        }


class TimmTeacher(nn.Module):
    """Features of a frozen picture model of timm: a map of its last layer, or one vector a picture.

    Takes samples in the data's range `(b, c, h, w)`; gives `(b, dim, rows, columns)`, or `(b, dim)` for
    `output: global`.
    """

    borrowed = ("net",)

    @dataclass(frozen=True, kw_only=True)
    class Config(TimmConfig):
        """Settings of the teacher `percept/timm`."""

        output: Literal["patches", "global"] = "patches"
        """`patches`: a vector for each patch, normalized as the model's head sees it. `global`: the head's input."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.cfg = cfg
        self.net, self.seen = opened(cfg, spec)
        with torch.no_grad():
            self.dim: int = self(torch.zeros(1, spec.channels, *spec.size)).shape[1]
        self.requires_grad_(False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d ..."]:
        """Features in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            seen = self.seen(x)
            if self.cfg.output == "global":
                return self.net.forward_head(self.net.forward_features(seen), pre_logits=True).float()
            taken = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
            try:
                return self.net.forward_intermediates(seen, **taken)[-1].float()
            except AssertionError:  # models without a norm to apply
                return self.net.forward_intermediates(seen, **{**taken, "norm": False})[-1].float()

    def borrow(self, places: Any) -> dict[str, str]:
        """Fill the model: from a file, from timm's cache, or with `--download`."""
        return {"net": filled(self.net, self.cfg, places.get("net", self.cfg.weights), logits=False)}


def opened(cfg: TimmConfig, spec: DataSpec) -> tuple[Any, Seen]:
    """A model with random weights, and what makes its input. Raises `ValueError` with what does not fit."""
    net = create(cfg)
    own = net.pretrained_cfg
    side = tuple(own["input_size"][1:])
    seen = Seen(cfg, spec, mean=own["mean"], std=own["std"], size=side if cfg.resize else None)
    net.eval().requires_grad_(False).to(seen.dtype)
    if not cfg.resize:
        try:
            with torch.no_grad():
                net(torch.zeros(1, 3, *spec.size, dtype=seen.dtype))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{cfg.model} does not take pictures of {list(spec.size)}: leave resize out, and they are "
                f"resized to {list(side)}"
            ) from error
    return net, seen


def create(cfg: TimmConfig, *, pretrained: bool = False) -> Any:
    """The model of timm, for any size where it can."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(cannot_import(error, "timm")) from error
    arch, _, tag = cfg.model.partition(".")
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=1, cutoff=0.0)
        raise ValueError(f"timm has no model '{arch}'; the nearest name is '{near[0]}'")
    known = [name.partition(".")[2] for name in timm.list_pretrained(f"{arch}.*")]
    if tag and tag not in known:
        raise ValueError(f"timm's {arch} has no weights '{tag}'.{did_you_mean(tag, known)}")
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(cfg.model, pretrained=pretrained, dynamic_img_size=not cfg.resize)
        except TypeError as error:
            if "keyword argument" not in str(error):
                raise
        return timm.create_model(cfg.model, pretrained=pretrained)


def check_blocks(net: nn.Module, blocks: tuple[str, ...], model: str) -> None:
    """Raise `ValueError` for a name that is no submodule, with the nearest one."""
    known = [name for name, _ in net.named_modules() if name]
    for name in blocks:
        if name not in known:
            raise ValueError(f"{model} has no block '{name}'.{did_you_mean(name, known)}")


def filled(net: Any, cfg: TimmConfig, place: str | None, *, logits: bool) -> str:
    """Fill a model of timm; returns the hash of its weights. Without `logits` its head does not matter."""
    if place == RANDOM:
        return random_weights(net, lambda: create(cfg), cfg.model)
    if place is None:
        try:
            tensors = create(cfg, pretrained=True).state_dict()
        except (OSError, RuntimeError) as error:
            id = net.pretrained_cfg.get("hf_hub_id")
            where = f" (hf://{id})" if id else ""
            raise CheckpointError(
                f"the weights of timm's {cfg.model}{where} are not here: fetch them with --download, or give a file "
                "with weights=FILE"
            ) from error
        digest, place = sha256(tensors), cfg.model
    else:
        tensors, digest = read(place)
    head = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
    heads = (head,) if isinstance(head, str) else tuple(head)
    fill_like(net, tensors, place, spare=() if logits else tuple(f"{name}." for name in heads))
    return digest
