"""The picture towers of CLIP (arXiv 2103.00020) and its kin, as open_clip builds them: distances, and features."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
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
from vqcore_percept.timm import check_blocks


@dataclass(frozen=True, kw_only=True)
class ClipConfig(NetConfig):
    """Settings of a picture tower of open_clip."""

    model: str
    """open_clip's name of the model, e.g. ViT-B-16."""
    pretrained: str | None = None
    """open_clip's name of the weights, e.g. openai or laion2b_s34b_b88k; it also says how pictures are normalized.
    Null: `weights` says where they lie."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "imagebind" in self.model.lower():
            raise SettingError(
                "model",
                f"{self.model}: ImageBind's weights are for its own code, and not for commercial use; take a tower "
                "of open_clip, e.g. ViT-H-14",
            )
        if self.pretrained is None and self.weights is None:
            raise SettingError(
                "pretrained", "null: name the weights, e.g. openai, or give a file with weights"
            )


class Clip(Compared):
    """The sum over blocks of the distance of two samples' features there, plus the distance of their embeddings."""

    borrowed = ("net",)

    @dataclass(frozen=True, kw_only=True)
    class Config(ClipConfig):
        """Settings of `percept/clip`."""

        blocks: tuple[str, ...] = ()
        """Submodules of the tower whose output is compared, e.g. [transformer.resblocks.5]."""
        embedding: bool = True
        """Compare the picture's embedding as well."""
        distance: Distance = "cosine"
        """As in `percept/timm`."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not (self.blocks or self.embedding):
                raise SettingError("blocks", "[]: name blocks to compare, or set embedding: true")

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.cfg = cfg
        self.net, self.seen = opened(cfg, spec)
        check_blocks(self.net, cfg.blocks, cfg.model)
        self.distance, self.blocks, self.output = cfg.distance, cfg.blocks, cfg.embedding
        self.requires_grad_(False)

    def borrow(self, places: Any) -> dict[str, str]:
        """Fill the tower: from a file of it or of the whole model, from open_clip's cache, or with `--download`."""
        return {"net": filled(self.net, self.cfg, places.get("net", self.cfg.weights))}


class ClipTeacher(nn.Module):
    """Features of a frozen picture tower: a map of its last tokens, or one vector a picture.

    Takes samples in the data's range `(b, c, h, w)`; gives `(b, dim, rows, columns)`, or `(b, dim)` for
    `output: global`.
    """

    borrowed = ("net",)

    @dataclass(frozen=True, kw_only=True)
    class Config(ClipConfig):
        """Settings of the teacher `percept/clip`."""

        output: Literal["patches", "global"] = "patches"
        """`patches`: a vector for each patch, after the last norm and the projection into CLIP's space, as 4M has
        them. `global`: the picture's embedding."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.cfg = cfg
        self.net, self.seen = opened(cfg, spec)
        if cfg.output == "patches" and not (
            hasattr(self.net, "output_tokens") and hasattr(self.net, "grid_size")
        ):
            raise ValueError(f"{cfg.model} has no tokens of patches: set output=global")
        with torch.no_grad():
            self.dim: int = self(torch.zeros(1, spec.channels, *spec.size)).shape[1]
        self.requires_grad_(False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d ..."]:
        """Features in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            self.net.output_tokens = self.cfg.output == "patches"
            found = self.net(self.seen(x))
            if self.cfg.output == "global":
                return found.float()
            tokens = found[1] if self.net.proj is None else found[1] @ self.net.proj
            rows, columns = self.net.grid_size
            return rearrange(tokens, "b (h w) d -> b d h w", h=rows, w=columns).float()

    def borrow(self, places: Any) -> dict[str, str]:
        """Fill the tower, as `percept/clip` does."""
        return {"net": filled(self.net, self.cfg, places.get("net", self.cfg.weights))}


def opened(cfg: ClipConfig, spec: DataSpec) -> tuple[Any, Seen]:
    """A tower with random weights, and what makes its input. Raises `ValueError` with what does not fit."""
    net = _create(cfg)
    library = _library()
    own = (library.get_pretrained_cfg(cfg.model, cfg.pretrained) if cfg.pretrained else None) or {}
    side = net.image_size if isinstance(net.image_size, tuple) else (net.image_size, net.image_size)
    mean, std = own.get("mean") or library.OPENAI_DATASET_MEAN, own.get("std") or library.OPENAI_DATASET_STD
    seen = Seen(cfg, spec, mean=mean, std=std, size=tuple(side))
    net.eval().requires_grad_(False).to(seen.dtype)
    return net, seen


def _create(cfg: ClipConfig, *, pretrained: str | None = None) -> Any:
    library = _library()
    if cfg.model not in library.list_models():
        raise ValueError(
            f"open_clip has no model '{cfg.model}'.{did_you_mean(cfg.model, library.list_models())}"
        )
    known = library.list_pretrained_tags_by_model(cfg.model)
    if cfg.pretrained is not None and cfg.pretrained not in known:
        raise ValueError(
            f"{cfg.model} has no weights '{cfg.pretrained}'.{did_you_mean(cfg.pretrained, known)}"
        )
    # Some weights were trained with another activation than the model's plain name stands for.
    trained = (library.get_pretrained_cfg(cfg.model, cfg.pretrained) or {}) if cfg.pretrained else {}
    quick = bool(trained.get("quick_gelu", False))
    with torch.random.fork_rng(devices=[]), _silent():
        return library.create_model(cfg.model, pretrained=pretrained, force_quick_gelu=quick).visual


@contextmanager
def _silent() -> Iterator[None]:
    """Without the log of open_clip, which says of every model that it has random weights. What fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _library() -> Any:
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise ValueError(cannot_import(error, "open_clip", "open_clip_torch")) from error


def filled(net: Any, cfg: ClipConfig, place: str | None) -> str:
    """Fill a tower; returns the hash of its weights."""
    if place == RANDOM:
        return random_weights(net, lambda: _create(cfg), cfg.model)
    if place is None:
        try:
            tensors = _create(cfg, pretrained=cfg.pretrained).state_dict()
        except (OSError, RuntimeError) as error:
            known = _library().get_pretrained_cfg(cfg.model, cfg.pretrained) or {}
            id = str(known.get("hf_hub") or "").rstrip("/")
            where = f" (hf://{id})" if id else ""
            raise CheckpointError(
                f"the weights {cfg.pretrained} of open_clip's {cfg.model}{where} are not here: fetch them with "
                "--download, or give a file with weights=FILE"
            ) from error
        digest, place = sha256(tensors), cfg.model
    else:
        tensors, digest = read(place)
    if any(name.startswith("visual.") for name in tensors):
        tensors = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    fill_like(net, tensors, place)
    return digest
