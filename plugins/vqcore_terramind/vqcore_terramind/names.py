"""Tensors by TerraMind's names and by ours; which settings of ours terratorch has too."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vqcore.borrowed import weights_of
from vqcore.config import deciding, leaves, to_tree
from vqcore.errors import CheckpointError, VqcoreError, cannot_import, first_line
from vqcore.registry import registry
from vqcore.schema import TokenizerConfig
from vqcore.tokenizer import Tokenizer
from vqcore_terramind.tables import SCHEDULER

RENAMED = {"proj.": "quant_proj.", "decoder.in_proj.": "post_quant_proj."}
"""How names of tensors begin here and in TerraMind. Those of encoder and ViT decoder are the same."""

SHAPES: set[tuple[int, int, int]] = {(512, 8, 8), (768, 12, 12), (1024, 24, 16)}
"""Width, depth and heads of terratorch's transformers s, b and l."""

DENOISERS: list[Mapping[str, Any]] = [{}]
"""The settings of terratorch's U-Nets; those of `unet_patched` are the defaults of `unet/unet`."""

TRANSFORMER = ("name", "size", "width", "depth", "num_heads", "patch_size", "post_mlp")
"""Settings of a transformer that terratorch has too."""

FREE = ("clip", "threshold", "threshold_max", "as_4m", "spacing", "final_alpha_one", "eta", "clipped_epsilon")
"""Settings of a scheduler that change how codes are decoded, not what the denoiser was trained for."""


def wanted(cfg: TokenizerConfig, where: str) -> dict[str, Tensor]:
    """The tensors of a file of such a tokenizer, without values, by TerraMind's names."""
    try:
        with torch.device("meta"):
            made = weights_of(Tokenizer(cfg, fetch=False))
    except (VqcoreError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where}: no such tokenizer can be built: {first_line(error)}") from error
    return theirs(made, cfg)


def theirs(tensors: Mapping[str, Tensor], cfg: TokenizerConfig) -> dict[str, Tensor]:
    """Tensors of ours by TerraMind's names; the two projections are convolutions of one position."""
    rest, net = _split(tensors, cfg)
    made = {}
    for name, tensor in rest.items():
        begin = next((begin for begin in RENAMED if name.startswith(begin)), None)
        if begin is None:
            made[name] = tensor
            continue
        wide = tensor[..., None, None] if tensor.ndim == 2 else tensor
        made[RENAMED[begin] + name.removeprefix(begin)] = wide
    if net:
        found = _unet().from_unet(net, _depth(cfg))
        made |= {f"decoder.{name}": tensor for name, tensor in found.items()}
    return made


def ours(tensors: Mapping[str, Tensor], cfg: TokenizerConfig) -> dict[str, Tensor]:
    """The inverse of `theirs`, for tensors that fit."""
    rest, net = _split(tensors, cfg)
    made = {}
    for name, tensor in rest.items():
        begin = next((here for here, there in RENAMED.items() if name.startswith(there)), None)
        if begin is None:
            made[name] = tensor
        else:
            made[begin + name.removeprefix(RENAMED[begin])] = (
                tensor.flatten(1) if tensor.ndim == 4 else tensor
            )
    if net:
        made |= {f"decoder.{name}": tensor for name, tensor in _unet().unet(net, _depth(cfg)).items()}
    return made


def foreign_settings(cfg: TokenizerConfig) -> Iterator[str]:
    """What a tokenizer has that terratorch cannot hold, one line each, by the key of the setting."""
    if len(cfg.size) != 2:
        yield f"size={list(cfg.size)}: its samples have two axes"
    if getattr(cfg.modality, "kind", "") == "categorical" and cfg.model.embed_dim is not None:
        yield f"model.embed_dim={cfg.model.embed_dim}: it sees classes one-hot (model.embed_dim=null)"
    yield from _transformer(cfg, "encoder")
    quantizer: Any = cfg.model.quantizer
    if quantizer.name != "quant/fsq":
        yield f"model.quantizer.name={quantizer.name}: it has quant/fsq with form=sigmoid01"
    elif quantizer.form != "sigmoid01":
        yield f"model.quantizer.form={quantizer.form}: its form is sigmoid01"
    decoder: Any = cfg.model.decoder
    if decoder.name == "vit/decoder":
        yield from _transformer(cfg, "decoder")
        yield from _others("objective.name", cfg.objective.name, "reconstruction")
    elif decoder.name == "unet/unet":
        known = [{**{"name": "unet/unet"}, **to_tree(settings)} for settings in DENOISERS]
        found = deciding(decoder, "decoder", registry().identity)
        if found not in known:
            differs = leaves({key: value for key, value in found.items() if key != "name"})
            yield from (f"model.decoder.{key}={value}: its U-Nets have the default" for key, value in differs)
        yield from _scheduler(cfg.objective)
    elif decoder.name != "fourm/none":
        yield f"model.decoder.name={decoder.name}: it has vit/decoder and unet/unet"


def _transformer(cfg: TokenizerConfig, part: str) -> Iterator[str]:
    net: Any = getattr(cfg.model, part)
    if net.name != f"vit/{part}":
        yield f"model.{part}.name={net.name}: it has vit/{part}"
        return
    known = (*TRANSFORMER, f"input_size_{part[:3]}")
    for key, value in leaves(deciding(net, part, registry().identity)):
        if key.partition(".")[0] not in known:
            yield f"model.{part}.{key}={value}: it has no such setting"
    if net.shape not in SHAPES:
        width, depth, heads = net.shape
        yield f"model.{part} has width={width}, depth={depth}, num_heads={heads}: its sizes are s, b and l"


def _scheduler(objective: Any) -> Iterator[str]:
    yield from _others("objective.name", objective.name, "diffusion")
    if objective.name != "diffusion":
        return
    scheduler = objective.scheduler
    yield from _others("objective.scheduler.name", scheduler.name, SCHEDULER["name"])
    if scheduler.name != SCHEDULER["name"]:
        return
    right = type(scheduler)(**SCHEDULER)
    for key, value in to_tree(right).items():
        if key not in FREE:
            yield from _others(f"objective.scheduler.{key}", getattr(scheduler, key), value)


def _others(key: str, value: Any, right: Any) -> Iterator[str]:
    if value != right:
        yield f"{key}={value}: it has {right}"


def _split(
    tensors: Mapping[str, Tensor], cfg: TokenizerConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors without those of a U-Net, and those of the U-Net by their names in it."""
    begin = "decoder." if cfg.model.decoder.name == "unet/unet" else "\0"
    net = {name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(begin)}, net


def _depth(cfg: TokenizerConfig) -> int:
    decoder: Any = cfg.model.decoder
    return decoder.depth


def _unet() -> Any:
    try:
        return importlib.import_module("vqcore_unet.fourm")
    except ImportError as error:
        raise CheckpointError(
            f"TerraMind's diffusion decoders: {cannot_import(error, 'vqcore_unet', 'vqcore-unet')}"
        ) from error
