"""The format `fourm/checkpoint`: tokenizers of 4M (arXiv 2312.06647), whose tensors keep their values.

What 4M ignores by design is ignored here too: arguments that its classes do not know (`origin` names them), and the
optimizer, the gradient scaler, the epoch and the loss balancer of a training checkpoint. Everything else must fit.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vqcore import config
from vqcore.artefacts.folder import save_tensors
from vqcore.artefacts.formats import refuse_misfits
from vqcore.borrowed import weights_of
from vqcore.compose.build import from_tree
from vqcore.config import portable, to_tree
from vqcore.errors import CheckpointError, SettingError, VqcoreError, first_line, listed
from vqcore.files import write_text
from vqcore.protocols import Foreign
from vqcore.registry import registry
from vqcore.schema import TokenizerConfig
from vqcore_fourm.arguments import Arguments, check, from_options, known, to_config
from vqcore_fourm.base import base_of, refuse_another
from vqcore_fourm.export import arguments_of
from vqcore_fourm.names import THEIR_ADAPTER, completed, to_ours, to_theirs, wanted
from vqcore_fourm.sources import CONFIG, NOTE, WEIGHTS, Source, read_source
from vqcore_fourm.tables import LICENCE, MLP, PUBLISHED, ours

OF_DECODERS = ("dec_type", "image_size_dec", "patch_size_dec", "out_conv")
"""Arguments that mean nothing to a VQ."""


class Checkpoint:
    """Reads a training checkpoint (.pth), a folder or hub repository with config.json and model.safetensors, or one
    .safetensors file with its configuration in the header. Writes folders."""

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
        files: bool = False
        """Read the files of the domain as 4M does: depth in 16-bit PNG, class maps, poses in JSON. False: arrays."""
        sd_path: str | None = None
        """VQControlNet only: Stable Diffusion, as a folder in the layout of diffusers or hf://user/name. Null: the
        address on the hub that the checkpoint says."""

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
        if source.note is not None and (
            said := [key for key in ("size", "domain", "files") if getattr(self.cfg, key)]
        ):
            raise CheckpointError(f"{path}: its {NOTE} says all of the tokenizer; leave {listed(said)} out.")
        args = understood(source, path, self.cfg.domain, self.cfg.sd_path)
        args = replace(args, files=self.cfg.files)
        return assembled(source, args, path, size=self.cfg.size, ema=self.cfg.ema)

    def write(self, tokenizer: Any, folder: Path) -> None:
        """Write the published form, and beside it what this form does not hold: `vqcore.json`.

        Raises `CheckpointError` that names every setting which 4M cannot hold.
        """
        if said := [key for key in ("ema", "size", "domain", "files", "sd_path") if getattr(self.cfg, key)]:
            raise CheckpointError(f"export: {listed(said)} is for reading; leave it out.")
        if tokenizer.decoder is None:
            raise CheckpointError("this tokenizer has no decoder: it was loaded with encoder_only=True.")
        kind, given = arguments_of(tokenizer.cfg, tokenizer.spec)
        held = {name: value for name, value in given.items() if kind != "VQ" or name not in OF_DECODERS}
        header = {name: str(value) for name, value in held.items()}
        tensors = to_theirs(weights_of(tokenizer), tokenizer.cfg)
        _refuse_unfilled(tensors, "this tokenizer")
        save_tensors(folder / WEIGHTS, tensors, header)
        note = {"tokenizer": to_tree(portable(tokenizer.cfg)), "origin": tokenizer.origin.get("origin", {})}
        for name, content in ((CONFIG, held), (NOTE, note)):
            write_text(folder / name, json.dumps(content, indent=2) + "\n")


def assembled(
    source: Source,
    args: Arguments,
    path: Path,
    *,
    size: int | tuple[int, ...] | None = None,
    ema: bool = False,
) -> Foreign:
    """Config and tensors of a source with these arguments. Raises `CheckpointError` for what does not fit."""
    made = (
        to_config(args, size=size, where=str(path))
        if source.note is None
        else _noted(source.note, args, path)
    )
    if args.files:
        _check_files(made, args, path)
    right = wanted(made, str(path))
    tensors = completed(source.tensors, right, str(path))
    refuse_misfits(right, tensors, str(path))
    _refuse_unfilled(tensors, str(path))
    if args.base is not None and args.base.folder is not None:
        refuse_another(args.base.folder, source.tensors, str(path))
    return Foreign(made, to_ours(tensors, made), _origin(source, path, args.kind, ema))


def _refuse_unfilled(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `CheckpointError` for a codebook that waits for k-means.

    4M runs k-means on the first batch that it sees, also to encode: what its tokens mean then depends on this batch.
    """
    initted = tensors.get("quantize._codebook.initted")
    if initted is not None and not initted.all():
        raise CheckpointError(
            f"{where}: its codebook is not filled yet (kmeans_init, and initted is 0), so it has no tokens. Train it "
            "first."
        )


def _check_files(cfg: TokenizerConfig, args: Arguments, path: Path) -> None:
    """Raise `CheckpointError` if the files of the domain do not become what this tokenizer takes."""
    spec = registry().build("modality", cfg.modality, "modality", size=cfg.size).spec
    takes, gets = args["n_labels"] or args["n_channels"], spec.labels or spec.channels
    if takes != gets or (spec.labels is None) != (args["n_labels"] is None):
        what = "classes" if args["n_labels"] else "channels"
        raise CheckpointError(
            f"{path}: it takes {takes} {what}, and files of the domain {args.domain} have {gets} "
            f"{'classes' if spec.labels else 'channels'} ({cfg.modality.name}). Give another domain=NAME, or leave "
            "files=true out."
        )


def _noted(note: Mapping[str, Any], args: Arguments, path: Path) -> TokenizerConfig:
    """The config that vqcore wrote beside the file. Raises `CheckpointError` if it is that of another tokenizer."""
    where = f"{path}: its {NOTE}"
    try:
        cfg = from_tree(note["tokenizer"], schema=TokenizerConfig, file=where)
        spec = registry().build("modality", cfg.modality, "data.modality", size=cfg.size).spec
        kind, right = arguments_of(cfg, spec)
    except VqcoreError as error:
        raise CheckpointError(f"{where}: {first_line(error)}") from error
    if kind != args.kind:
        raise CheckpointError(f"{where} is of a {kind}, and the file holds a {args.kind}.")
    for name, value in right.items():
        if value != args[name] and not (kind == "VQ" and name in OF_DECODERS):
            raise CheckpointError(
                f"{where} says {name}={value}, and its configuration {args[name]}: they are of two tokenizers. "
                f"Without {NOTE} the file is read as 4M's."
            )
    return cfg


def understood(
    source: Source, path: Path, domain: str | None = None, sd_path: str | None = None
) -> Arguments:
    """The arguments that a source amounts to. Raises `CheckpointError` if it cannot be read."""
    names = source.tensors.keys()
    kind = kind_of(source, path)
    if sd_path is not None and kind != "VQControlNet":
        raise CheckpointError(f"{path} is a {kind}: sd_path={sd_path} is for a VQControlNet; leave it out.")
    given = source.given
    found = next((domain for row, domain in PUBLISHED if _is_of(path, row.id)), "")
    if source.options:
        given = from_options(given, {name: tuple(tensor.shape) for name, tensor in source.tensors.items()})
        found = str(given.get("domain", ""))
    standardised = given.get("imagenet_default_mean_and_std") is True
    args = check(
        given,
        str(path),
        kind=kind,
        domain=found if domain is None else domain,
        standardised=standardised,
        sees_size=any(name.startswith("decoder.height_embedding.") for name in names),
    )
    if kind == "VQControlNet":
        shapes = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
        found_base = base_of(sd_path, args["sd_path"], shapes, str(path))
        if args["adapter"] or any(name.startswith(THEIR_ADAPTER) for name in names):
            found_base = replace(found_base, decoder={**found_base.decoder, "hint": "adapter-4m"})
        args = replace(args, base=found_base)
    # Before anything of this size is built.
    most = sum(tensor.numel() for tensor in source.tensors.values())
    for key in ("n_channels", "n_labels", "latent_dim", "codebook_size"):
        if (args[key] or 0) > most:
            raise CheckpointError(f"{path}: {key} is {args[key]}, but the file has only {most:,} numbers.")
    for key in ("enc_type", "dec_type"):
        if (mlp := MLP.fullmatch(args[key])) and int(mlp[2]) > len(names):
            raise CheckpointError(
                f"{path}: {key} is {args[key]}, but the file has only {len(names)} tensors."
            )
    return args


def kind_of(source: Source, path: Path) -> str:
    """The class of 4M, as 4M itself finds it: by names of tensors, and in training checkpoints by an option."""
    names = [ours(name) for name in source.tensors]
    if not any(name.startswith(("quantizer.", "proj.")) for name in names):
        if any(name.startswith(("encoder_embeddings.", "decoder_embeddings.")) for name in names):
            raise CheckpointError(
                f"{path} is a checkpoint of 4M's generative model, not of a tokenizer; vqcore reads tokenizers."
            )
        if any(name.startswith("vq_model.") for name in names):
            raise CheckpointError(
                f"{path} is an adapter of 4M (Token2VAE) alone; give the checkpoint of a VQControlNet that was trained "
                "with it."
            )
        if names and all(name.startswith("module.") for name in names):
            raise CheckpointError(
                f"{path}: all names begin with module., of which 4M would load nothing; save the state dict of the "
                "model inside DistributedDataParallel."
            )
        raise CheckpointError(f"{path} has no quantizer (quantize.*): it is no tokenizer of 4M.")
    if any(name.startswith("decoder.controlnet.") for name in names):
        return "VQControlNet"
    if not any(name.startswith("decoder.") for name in names):
        return "VQ"
    if source.options:
        return "DiVAE" if "beta_schedule" in source.given else "VQVAE"
    if isinstance(decoder := source.given.get("dec_type"), str):
        return "DiVAE" if decoder.startswith(("unet_", "uvit_")) else "VQVAE"
    return "VQVAE" if any(name.startswith("decoder.in_proj.") for name in names) else "DiVAE"


def _origin(source: Source, path: Path, kind: str, ema: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"system": "4M", "class": kind}
    if source.options:
        made["weights"] = "model_ema" if ema else "model"
        if source.epoch is not None:
            made["epoch"] = source.epoch
        if isinstance(domain := source.given.get("domain"), str):
            made["domain"] = domain
    elif ignored := sorted(name for name in source.given if name not in known(kind)):
        made["ignored"] = ignored
    if any(_is_of(path, row.id) for row, _ in PUBLISHED):
        made["licence"] = LICENCE
    elif source.note is not None and isinstance(licence := source.note["origin"].get("licence"), str):
        made["licence"] = licence
    return made


def _is_of(path: Path, id: str) -> bool:
    """Whether a path is a copy of a hub repository: in the hub's cache, or in a folder or file of its name."""
    parts = path.absolute().parts
    return f"models--{id.replace('/', '--')}" in parts or id.rpartition("/")[2] in (*parts, path.stem)
