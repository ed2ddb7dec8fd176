"""What networks for pictures share: the way from a sample to their input, distances of features, borrowed weights."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vqcore import config
from vqcore.borrowed import sha256
from vqcore.errors import CheckpointError, SettingError, cause, listed
from vqcore.network import asked
from vqcore.protocols import DataSpec
from vqcore.rng import seeded

Distance = Literal["cosine", "l1", "mse"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

log = logging.getLogger(__name__)

EPS = 1e-10
"""Stands inside the root of a norm: the gradient of a root at zero is not finite."""

RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class PictureConfig(config.Config):
    """Settings of every network that was trained on pictures."""

    places: ClassVar[tuple[str, ...]] = ("weights",)

    weights: str | None = None
    """File or `hf://` address of the weights. Null: what the library has downloaded before, or fetches with
    `--download`. `random`: drawn from a fixed seed, which is a weak judge and of use for tests alone."""
    rgb: tuple[int, ...] | None = None
    """The channels that are red, green and blue, e.g. [0, 1, 2], or [0, 0, 0] for grey data. Null: the data has three
    channels, which are red, green and blue."""

    def __post_init__(self) -> None:
        if self.rgb is not None and (len(self.rgb) != 3 or min(self.rgb) < 0):
            raise SettingError("rgb", f"{list(self.rgb)}: give three channels, e.g. [0, 1, 2]")


@dataclass(frozen=True, kw_only=True)
class NetConfig(PictureConfig):
    """Settings of a network whose precision may be chosen."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the network; distances are computed in fp32. (fp16 would lose small gradients.)"""


class Seen(nn.Module):
    """A sample as a network for pictures sees it: three channels, normalized, of the network's size."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        cfg: PictureConfig,
        spec: DataSpec,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None,
    ):
        super().__init__()
        if spec.rank != 2:
            raise ValueError(f"a network for pictures takes data with 2 axes, the data has {spec.rank}")
        if spec.range is None:
            raise ValueError(
                "a network for pictures takes values in a known range, and the data has none: give scale a range"
            )
        if cfg.rgb is None and spec.channels != 3:
            grey = "[0, 0, 0]" if spec.channels == 1 else "[2, 1, 0]"
            raise ValueError(
                f"the network takes red, green and blue, and the data has {spec.channels} channels: say which they "
                f"are, e.g. rgb: {grey}"
            )
        if cfg.rgb is not None and max(cfg.rgb) >= spec.channels:
            raise ValueError(
                f"rgb: {list(cfg.rgb)}, but the data has {spec.channels} channels, 0 to {spec.channels - 1}"
            )
        self.rgb, self.range, self.size = cfg.rgb, spec.range, size
        self.dtype = DTYPES[cfg.dtype] if isinstance(cfg, NetConfig) else torch.float32
        self.mode = "bilinear"
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 rows columns"]:
        """Choose channels, map the data's range to [0, 1], normalize, resize (filtered; by default bilinear)."""
        low, high = self.range
        x = x.float() if self.rgb is None else x[:, list(self.rgb)].float()
        x = ((x - low) / (high - low) - self.mean) / self.std
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode=self.mode, antialias=True)
        return x.to(self.dtype)


def unit(x: Tensor, dim: int) -> Tensor:
    """Vectors of length 1 along an axis; zero stays zero, with a finite gradient."""
    return x / (x.square().sum(dim, keepdim=True) + EPS).sqrt()


def distance(kind: Distance, a: Float[Tensor, "b n d"], b: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
    """The mean over tokens: 1 - cosine; the sum over channels of |difference| of unit vectors; the mean square."""
    if kind == "mse":
        return (a - b).square().mean((1, 2))
    a, b = unit(a, -1), unit(b, -1)
    if kind == "l1":
        return (a - b).abs().sum(-1).mean(1)
    return (1 - (a * b).sum(-1)).mean(1)


class Compared(nn.Module):
    """The sum of the distances of two samples' features in a frozen network. Base class of perceptual losses."""

    net: nn.Module
    seen: "Seen"
    distance: Distance
    blocks: tuple[str, ...]
    output: bool
    """Is the network's output compared as well?"""
    channels_last = False

    def forward(self, x_hat: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """One distance a sample. No gradient is kept for `x`."""
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                wanted = self._features(x)
            found = self._features(x_hat)
            return torch.stack([distance(self.distance, a, b) for a, b in zip(found, wanted)]).sum(0)

    def _features(self, x: Tensor) -> list[Float[Tensor, "b n d"]]:
        if self.output:
            found, out = tapped(self.net, self.blocks, self.seen(x), whole=True)
            kept = [*found, out]
        else:
            kept, _ = tapped(self.net, self.blocks, self.seen(x))
        return [as_tokens(one, channels_last=self.channels_last) for one in kept]


class _Enough(Exception):
    pass


def tapped(net: nn.Module, names: Sequence[str], x: Tensor, *, whole: bool = False) -> tuple[list[Any], Any]:
    """What these submodules return first when `net` takes `x`, in this order, and the output of the whole network.

    What comes after the last of them does not run, and the output is None, unless `whole` asks for it.
    """
    found: dict[str, Any] = {}
    wanted = set(names)

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            found.setdefault(name, out)
            if not whole and len(found) == len(wanted):
                raise _Enough

        return keep

    hooks = [net.get_submodule(name).register_forward_hook(keeper(name)) for name in wanted]
    out = None
    try:
        out = net(x)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [found[name] for name in names], out


def as_tokens(x: Any, *, channels_last: bool) -> Float[Tensor, "b n d"]:
    """Features of any layout as tokens: maps, tokens, or one vector."""
    if isinstance(x, tuple):
        x = x[0]
    if x.ndim == 4:
        return rearrange(x, "b h w d -> b (h w) d" if channels_last else "b d h w -> b (h w) d").float()
    return rearrange(x, "b d -> b 1 d").float() if x.ndim == 2 else x.float()


def fill_like(net: nn.Module, tensors: dict[str, Tensor], place: str, *, spare: tuple[str, ...] = ()) -> None:
    """Fill a network. Tensors whose names begin with one of `spare` may be missing, superfluous or of another shape."""
    own = net.state_dict()

    def matters(name: str) -> bool:
        return not (spare and name.startswith(spare))

    wrong = [
        name
        for name in own
        if matters(name) and (name not in tensors or tensors[name].shape != own[name].shape)
    ]
    wrong += [name for name in tensors if matters(name) and name not in own]
    if wrong:
        raise CheckpointError(f"{place}: these weights do not fit: {listed(wrong, 4)}")
    broken = [name for name in own if matters(name) and not bool(tensors[name].isfinite().all())]
    if broken:
        raise CheckpointError(f"{place}: these weights are not finite: {listed(broken, 4)}")
    net.load_state_dict({name: tensors.get(name, own[name]) if matters(name) else own[name] for name in own})


def hub_file(url: str) -> Path:
    """The file of an address in the cache of `torch.hub`, fetched with `--download`. Its name ends with its hash."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        return path
    missing = f"{path} is missing: put {url} there, give it with weights=FILE, or fetch it with --download"
    if not asked():
        raise CheckpointError(missing)
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{missing} (which failed: {cause(error)})") from error
    return path


def random_weights(net: nn.Module, make: Callable[[], nn.Module], who: str) -> str:
    """Fill a network with the numbers of a fixed seed; returns their hash."""
    log.warning(
        "%s: weights=random, so this network has never seen a picture. Its distances are a weak judge.", who
    )
    with seeded(0, who):
        net.load_state_dict(make().state_dict())
    return sha256(net.state_dict())
