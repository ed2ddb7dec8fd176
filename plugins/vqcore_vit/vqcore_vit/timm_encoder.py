"""Any image model of timm as the encoder: its dense features, pretrained or not, frozen or not.

timm (https://github.com/huggingface/pytorch-image-models) is imported when an encoder is built. Only `fetch` asks timm
for weights, and `fetch` is called only if no checkpoint contains the weights. Prefix tokens (class, registers) are
dropped. Inputs are converted from the data's range to the mean and standard deviation that the weights expect.
"""

import difflib
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.config import Config as BaseConfig
from vqcore.errors import CheckpointError, SettingError, cannot_import
from vqcore.protocols import DataSpec
from vqcore_vit.trunk import check_channels


class TimmEncoder(nn.Module):
    """Encode images into the feature map of a timm model, which is the child `model`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """Settings of `vit/timm-encoder`."""

        training_only: ClassVar[tuple[str, ...]] = ("pretrained", "frozen", "drop_path", "checkpointing")

        model: str
        """The name of the model in timm, e.g. vit_small_patch14_dinov2.lvd142m, convnext_tiny, hf-hub:owner/name."""
        pretrained: bool = True
        """Start from timm's weights (a saved tokenizer has its own); --download fetches them once. False: from random
        weights."""
        frozen: bool = False
        """Keep the model fixed: no gradient, and evaluation mode even while the tokenizer trains."""
        layer: int = -1
        """Index of the block or stage whose features are used: 0 is the first, -1 is the last."""
        normalize: bool = True
        """Shift and scale inputs of a bounded range to the mean and deviation of the model's training data."""
        drop_path: float = 0.0
        """Probability that a sample skips a residual branch in training; it rises to this value at the last block."""
        checkpointing: bool = False
        """Recompute the blocks in the backward pass instead of storing their activations: less memory, slower."""

        def __post_init__(self) -> None:
            if not 0 <= self.drop_path < 1:
                raise SettingError("drop_path", f"{self.drop_path}: a probability must be in [0, 1)")

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        if spec.rank != 2:
            raise ValueError(f"timm's models take data with 2 axes, the data has {spec.rank}")
        self.name, self.channels, self.frozen = cfg.model, spec.channels, cfg.frozen
        self._pretrained = functools.partial(_create, cfg, spec, pretrained=True) if cfg.pretrained else None
        self.model = _create(cfg, spec, pretrained=False)
        self.layers, self.stride = _only_up_to(self.model, cfg)
        mean, std = _statistics(self.model, spec) if cfg.normalize else (0.0, 1.0)
        self.register_buffer("mean", torch.as_tensor(mean), persistent=False)
        self.register_buffer("std", torch.as_tensor(std), persistent=False)
        self.norm, self.dim = self._probe(spec)
        if cfg.checkpointing:
            self._save_memory()
        self.model.requires_grad_(not cfg.frozen)
        self.train()

    @torch.no_grad()
    def fetch(self) -> None:
        """Load timm's weights if `pretrained` is true. Raises `CheckpointError` if the weights cannot be loaded."""
        if self._pretrained is None:
            return
        try:
            with torch.random.fork_rng(devices=[]):
                theirs = self._pretrained().state_dict()
        except OSError as error:
            raise CheckpointError(
                f"the weights of timm's {self.name} cannot be loaded ({_reason(error)}). Add --download to fetch "
                "them once, or start from random weights: pretrained=false."
            ) from error
        self.model.load_state_dict({name: theirs[name] for name in self.model.state_dict()})

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The grid of the feature map. Raises `ValueError` if `size` is not a multiple of the model's stride."""
        if len(size) != 2:
            raise ValueError(f"size {list(size)} has {len(size)} axes, timm's models take 2")
        if any(side % self.stride or not side for side in size):
            raise ValueError(f"size {list(size)} is no multiple of {self.stride}, the stride of {self.name}")
        return (size[0] // self.stride, size[1] // self.stride)

    def train(self, mode: bool = True) -> "TimmEncoder":
        """Set training mode or evaluation mode. A frozen model stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b gh gw d"]:
        """Normalize the input, run the model, and return the features of one layer without prefix tokens."""
        check_channels(x, self.channels)
        self.grid(tuple(x.shape[2:]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return rearrange(self._features(x, norm=self.norm), "b d h w -> b h w d")

    def _save_memory(self) -> None:
        try:
            self.model.set_grad_checkpointing(True)
        except AssertionError as error:
            raise ValueError(
                f"checkpointing=true: timm's {self.name} does not support it ({error})"
            ) from error

    def _features(self, x: Float[Tensor, "b c h w"], *, norm: bool) -> Float[Tensor, "b d gh gw"]:
        x = ((x - self.mean) / self.std).to(next(self.model.parameters()).dtype)
        taken = {"indices": self.layers, "norm": norm, "output_fmt": "NCHW", "intermediates_only": True}
        try:
            return self.model.forward_intermediates(x, **taken)[0]
        except AssertionError as error:  # timm raises it for a size that the model does not accept
            raise ValueError(
                f"{self.name} does not accept an input of size {list(x.shape[2:])}: {error}"
            ) from error

    @torch.no_grad()
    def _probe(self, spec: DataSpec) -> tuple[bool, int]:
        """Run the nominal size. Returns whether timm can normalize the features (most models), and their width."""
        self.grid(spec.size)
        self.model.eval()
        x = torch.zeros(1, spec.channels, *spec.size)
        try:
            return True, self._features(x, norm=True).shape[1]
        except ValueError:
            return False, self._features(x, norm=False).shape[1]


def _create(cfg: TimmEncoder.Config, spec: DataSpec, *, pretrained: bool) -> Any:
    """Build the model. Raises `ValueError` if timm does not have it, `OSError` if its weights cannot be loaded."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(cannot_import(error, "timm")) from error
    if ":" not in cfg.model:
        _check_name(cfg)
    settings: dict[str, Any] = {"num_classes": 0, "in_chans": spec.channels}
    if cfg.drop_path:
        settings["drop_path_rate"] = cfg.drop_path
    try:
        return _flexible(timm.create_model, cfg.model, pretrained, settings, spec.size)
    except OSError as error:
        if pretrained:
            raise
        more = ". Add --download to fetch it once" if cfg.model.startswith("hf-hub:") else ""
        raise ValueError(f"timm's {cfg.model} cannot be read: {_reason(error)}{more}") from error


def _reason(error: OSError) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__


def _flexible(
    create: Any, name: str, pretrained: bool, settings: dict[str, Any], size: tuple[int, ...]
) -> Any:
    """Build a model that takes any size; if this is impossible, the nominal size; else the model's default size."""
    for how in ({"dynamic_img_size": True}, {"img_size": size}):
        try:
            return create(name, pretrained=pretrained, **settings, **how)
        except TypeError as error:
            if "keyword argument" not in str(error):
                raise
    return create(name, pretrained=pretrained, **settings)


def _check_name(cfg: TimmEncoder.Config) -> None:
    import timm

    if not timm.is_model(cfg.model):
        arch = cfg.model.partition(".")[0]
        near = difflib.get_close_matches(arch, timm.list_models(), n=1, cutoff=0.0)[0]
        raise ValueError(f"timm has no model '{cfg.model}'; the nearest name is '{near}'")
    arch, _, tag = cfg.model.partition(".")
    known = [name.partition(".")[2] for name in timm.list_pretrained(f"{arch}.*")]
    if tag and tag not in known:
        raise ValueError(f"timm's {arch} has no weights '{tag}'; available: {', '.join(known) or 'none'}")
    if cfg.pretrained and not timm.models.is_model_pretrained(cfg.model):
        raise ValueError(f"pretrained=true: timm has no weights for {arch}; use pretrained=false")


def _only_up_to(model: Any, cfg: TimmEncoder.Config) -> tuple[list[int], int]:
    """Remove all layers after `layer`, which would never get a gradient. Returns the indices and stride of `layer`."""
    info = model.feature_info
    if not -len(info) <= cfg.layer < len(info):
        raise ValueError(f"layer={cfg.layer}: {cfg.model} has {len(info)} layers, 0 to {len(info) - 1}")
    stride = info[cfg.layer]["reduction"]
    layers = model.prune_intermediate_layers([cfg.layer % len(info)], prune_norm=False, prune_head=True)
    return layers, stride


def _statistics(model: Any, spec: DataSpec) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation that convert the data's range to what the weights expect; 0 and 1 if the data has no range."""
    if spec.range is None:
        return 0.0, 1.0
    low, high = spec.range
    stats = torch.tensor([model.pretrained_cfg["mean"], model.pretrained_cfg["std"]])
    # With another number of channels timm spreads the first layer over them, which the mean of means fits.
    if stats.shape[1] != spec.channels:
        stats = stats.mean(1, keepdim=True)
    mean, std = stats[:, :, None, None] * (high - low)
    return mean + low, std
