"""The format `fourm/checkpoint`: tokenizers of 4M (arXiv 2312.06647), whose tensors keep their values.

What 4M ignores by design is ignored here too: arguments that its classes do not know (`origin` names them), and the
optimizer, the gradient scaler, the epoch and the loss balancer of a training checkpoint. Everything else must fit.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqcore import config
from vqcore.borrowed import weights_of
from vqcore.errors import CheckpointError, SettingError, VqcoreError
from vqcore.protocols import Foreign
from vqcore.schema import TokenizerConfig
from vqcore.tokenizer import Tokenizer
from vqcore_fourm.arguments import ARGUMENTS, Arguments, check, from_options, to_config
from vqcore_fourm.sources import CONFIG, WEIGHTS, Source, read_source
from vqcore_fourm.tables import CLASSES, LICENCE, MLP, POINTWISE, PUBLISHED, ours, theirs

SHOWN = 8
"""So many tensors that do not fit are named; of the others the number."""


class Checkpoint:
    """Reads a training checkpoint (.pth), a folder or hub repository with config.json and model.safetensors, or one
    .safetensors file with its configuration in the header."""

    published = tuple(row for row, _ in PUBLISHED)

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `fourm/checkpoint`."""

        ema: bool = False
        """Take the averaged weights (model_ema) of a training checkpoint; 4M itself never does."""
        size: int | tuple[int, ...] | None = None
        """Nominal size of the tokenizer: one number, or two. Null: that of the checkpoint; 1 for MLPs."""
        domain: str | None = None
        """What the tokenizer is for, by 4M's name, e.g. rgb. Null: as the checkpoint says."""

        def __post_init__(self) -> None:
            sides = (self.size,) if isinstance(self.size, int) else self.size or ()
            if len(sides) > 2 or any(side < 1 for side in sides):
                raise SettingError("size", f"{self.size}: give one or two numbers from 1 on")

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def recognises(self, path: Path) -> bool:
        """Training checkpoints by their name, folders by their files."""
        if path.is_dir():
            return all((path / name).is_file() for name in (CONFIG, WEIGHTS))
        return re.fullmatch(r"checkpoint-(\d+|final)\.pth", path.name) is not None

    def read(self, path: Path, *, allow_pickle: bool) -> Foreign:
        """Config and tensors. Raises `CheckpointError` for what is damaged, does not fit, or is not a tokenizer."""
        source = read_source(path, ema=self.cfg.ema, allow_pickle=allow_pickle)
        args, kind = understood(source, path, self.cfg.domain)
        made = to_config(args, encoder_only=kind == "VQ", size=self.cfg.size, where=str(path))
        tensors = renamed(source.tensors)
        _check_fit(made, tensors, args, str(path))
        return Foreign(made, tensors, _origin(source, path, kind, self.cfg.ema))


def understood(source: Source, path: Path, domain: str | None = None) -> tuple[Arguments, str]:
    """The arguments and the class that a source amounts to. Raises `CheckpointError` if it cannot be read."""
    names = source.tensors.keys()
    kind = kind_of(source, path)
    if why := CLASSES[kind]:
        raise CheckpointError(f"{path} is a {kind} of 4M: {why}. VQ and VQVAE are read.")
    given = source.given
    known = next((domain for row, domain in PUBLISHED if _is_of(path, row.id)), "")
    if source.options:
        given = from_options(given, {name: tuple(tensor.shape) for name, tensor in source.tensors.items()})
        known = str(given.get("domain", ""))
    standardised = given.get("imagenet_default_mean_and_std") is True
    args = check(given, str(path), domain=known if domain is None else domain, standardised=standardised)
    for key in ("enc_type", "dec_type"):
        # Before anything of this size is built.
        if (found := MLP.fullmatch(args[key])) and int(found[2]) > len(names):
            raise CheckpointError(
                f"{path}: {key} is {args[key]}, but the file has only {len(names)} tensors."
            )
    return args, kind


def kind_of(source: Source, path: Path) -> str:
    """The class of 4M, as 4M itself finds it: by names of tensors, and in training checkpoints by an option."""
    names = [ours(name) for name in source.tensors]
    if not any(name.startswith(("quantizer.", "proj.")) for name in names):
        if any(name.startswith(("encoder_embeddings.", "decoder_embeddings.")) for name in names):
            raise CheckpointError(
                f"{path} is a checkpoint of 4M's generative model, not of a tokenizer; vqcore reads tokenizers."
            )
        raise CheckpointError(f"{path} has no quantizer (quantize.*): it is no tokenizer of 4M.")
    if any(name.startswith("decoder.controlnet.") for name in names):
        return "VQControlNet"
    if not any(name.startswith("decoder.") for name in names):
        return "VQ"
    if source.options:
        return "DiVAE" if "beta_schedule" in source.given else "VQVAE"
    return "VQVAE" if any(name.startswith("decoder.in_proj.") for name in names) else "DiVAE"


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names, with convolutions of one position as matrices."""
    pointwise = {ours(name) for name in POINTWISE}
    return {
        ours(name): tensor.flatten(1)
        if ours(name) in pointwise and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
        else tensor
        for name, tensor in tensors.items()
    }


def _check_fit(cfg: TokenizerConfig, tensors: Mapping[str, Tensor], args: Arguments, where: str) -> None:
    """Raise `CheckpointError` that lists every tensor, by 4M's name, that is missing, unknown or wrongly shaped."""
    try:
        with torch.device("meta"):
            wanted = weights_of(Tokenizer(cfg, fetch=False))
    except (VqcoreError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where}: no such tokenizer can be built: {error}") from error
    wrong = [f"{theirs(name)} is missing" for name in wanted if name not in tensors]
    wrong += [f"{theirs(name)} is unknown" for name in tensors if name not in wanted]
    wrong += [
        f"{theirs(name)} has the shape {list(tensors[name].shape)} instead of {list(each.shape)}"
        for name, each in wanted.items()
        if name in tensors and each.shape != tensors[name].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(
            f"{where}: its weights do not fit its configuration: {'; '.join(wrong[:SHOWN])}{more}."
        )


def _origin(source: Source, path: Path, kind: str, ema: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"system": "4M", "class": kind}
    if source.options:
        made["weights"] = "model_ema" if ema else "model"
        if source.epoch is not None:
            made["epoch"] = source.epoch
        if isinstance(domain := source.given.get("domain"), str):
            made["domain"] = domain
    elif ignored := sorted(name for name in source.given if name not in ARGUMENTS):
        made["ignored"] = ignored
    if any(_is_of(path, row.id) for row, _ in PUBLISHED):
        made["licence"] = LICENCE
    return made


def _is_of(path: Path, id: str) -> bool:
    """Whether a path is a copy of a hub repository: in the hub's cache, or in a folder or file of its name."""
    parts = path.absolute().parts
    return f"models--{id.replace('/', '--')}" in parts or id.rpartition("/")[2] in (*parts, path.stem)
