"""Which tokenizers of ours terratorch can hold."""

from collections.abc import Iterator, Mapping
from typing import Any

from vqcore.config import deciding, leaves, to_tree
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.schema import TokenizerConfig
from vqcore_terramind.tables import SCHEDULER

SHAPES: set[tuple[int, int, int]] = {(512, 8, 8), (768, 12, 12), (1024, 24, 16)}
"""Width, depth and heads of terratorch's transformers s, b and l."""

DENOISERS: list[Mapping[str, Any]] = [{}]
"""The settings of terratorch's U-Nets; those of `unet_patched` are the defaults of `unet/unet`."""

TRANSFORMER = ("name", "size", "width", "depth", "num_heads", "patch_size", "post_mlp")
"""Settings of a transformer that terratorch has too."""

FREE = ("clip", "threshold", "threshold_max", "as_4m", "spacing", "final_alpha_one", "eta", "clipped_epsilon")
"""Settings of a scheduler that change how codes are decoded, not what the denoiser was trained for."""


def foreign_settings(cfg: TokenizerConfig, spec: DataSpec) -> Iterator[str]:
    """What a tokenizer has that terratorch cannot hold, one line each, by the key of the setting."""
    if spec.rank != 2:
        yield f"size={list(cfg.size)}: its samples have two axes"
    if spec.labels is not None and cfg.model.embed_dim is not None:
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
