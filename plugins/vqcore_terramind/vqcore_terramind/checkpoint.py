"""The format `terramind/checkpoint`: tokenizers of TerraMind (arXiv 2504.11171), whose tensors keep their values.

A published file is one bare state dict. It does not say which tokenizer it is: two tokenizers have the same tensors,
and neither levels nor statistics of the bands are among them. So the user names it (`variant`), and what the shapes do
say is checked. Nothing is ignored: all tensors must fit. A file that vqcore wrote has `vqcore.json` beside it, which
says everything.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vqcore_fourm.names import to_ours, to_theirs, wanted

from vqcore import config
from vqcore.artefacts.folder import load_tensors
from vqcore.artefacts.formats import PICKLES, read_pickle, refuse_misfits
from vqcore.borrowed import weights_of
from vqcore.compose.build import from_tree
from vqcore.config import portable, to_tree
from vqcore.errors import CheckpointError, ConfigError, SettingError, VqcoreError, listed
from vqcore.files import aside, write_text
from vqcore.protocols import Foreign, ForeignConfig
from vqcore.reading import misfit, read_json
from vqcore.registry import registry
from vqcore.schema import TokenizerConfig
from vqcore_terramind.families import FAMILIES, family
from vqcore_terramind.held import foreign_settings
from vqcore_terramind.tables import AION, VARIANTS, Variant, published, variant_of

log = logging.getLogger(__name__)

NOTE, FILE = "vqcore.json", "TerraMind_Tokenizer.pt"
SUFFIXES = (*PICKLES, ".safetensors")
KEPT = ("licence", "classes")
"""What a file that vqcore wrote keeps of where its weights came from."""
WRAPPERS = ("model", "state_dict", "module", "model_state_dict", "model_ema")

OTHERS = {
    ("encoder_embeddings.", "decoder_embeddings."): "it is a generative model, not a tokenizer",
    ("quantize.", "cls_emb."): "it is a tokenizer of 4M; read it with fourm/checkpoint",
    ("subsample_in.", "pre_quant_norm.", "normalization_quantizer.", "quantizer."): AION,
}
"""How names of tensors of other models begin, and what to say of a file with such names."""


@dataclass(frozen=True)
class Facts:
    """What the shapes of a file say."""

    kind: str
    channels: int
    width: int

    def fits(self, row: Variant) -> bool:
        """Whether a file may be this tokenizer."""
        kind = self.kind in (row.kind, "VQ")
        return kind and self.channels == row.channels and self.width == row.levels.count("-") + 1


class Checkpoint:
    """Reads and writes the files that terratorch loads: state dicts in `.pt`, also as `.safetensors`.

    A file without a decoder is read as terratorch's VQ, which only encodes. The published tokenizers are families:
    `vqcore new config --like terramind/DEM FOLDER`.
    """

    published = published()
    families = FAMILIES

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `terramind/checkpoint`."""

        variant: str | None = None
        """Which tokenizer it is: v1-DEM or terramind_v1_tokenizer_dem; the file does not say it. Required, but for
        files that vqcore wrote. In export: the published tokenizer that the written file takes the place of."""
        size: int | tuple[int, ...] | None = None
        """Nominal size: one number, or two. Null: 256, for which the published ones were built. TerraMind has 224."""

        def __post_init__(self) -> None:
            if self.variant is not None:
                try:
                    variant_of(self.variant)
                except ValueError as error:
                    raise SettingError("variant", str(error)) from error
            sides = (self.size,) if isinstance(self.size, int) else self.size or ()
            if len(sides) > 2 or any(side < 1 for side in sides):
                raise SettingError("size", f"{self.size}: give one or two numbers from 1 on")

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.row = None if cfg.variant is None else variant_of(cfg.variant)

    def recognises(self, path: Path) -> bool:
        """Files by their published names, and folders with such a file."""
        known = {row.file for row in VARIANTS.values()} | {FILE}
        return any((path / name).is_file() for name in known) if path.is_dir() else path.name in known

    def read(self, path: Path, *, allow_pickle: bool) -> Foreign:
        """Config and tensors. Raises `CheckpointError` for what is damaged, does not fit, or is another tokenizer."""
        if any(re.match(r"aion-|.*polymathic-ai", part) for part in path.absolute().parts):
            raise CheckpointError(f"{path} is no tokenizer of TerraMind: {AION}.")
        file = _file(path, self.row)
        note = _note(file)
        tensors = _tensors(file, allow_pickle)
        facts = _facts(tensors, file)
        origin: dict[str, Any] = {"system": "TerraMind", "class": facts.kind}
        if note is None:
            row = _checked(self.row, facts, file)
            cfg, where = _config_of(row, facts, self.cfg.size), f"{file} as {row.name}"
            origin |= {"variant": row.full, "licence": row.licence}
            origin |= {"classes": list(row.classes)} if row.classes else {}
        else:
            cfg, where = self._noted(note, file), f"{file} with its {NOTE}"
            origin |= {key: note["origin"][key] for key in KEPT if key in note["origin"]}
            origin |= {"variant": note["variant"]} if note["variant"] else {}
        refuse_misfits(wanted(cfg, where), tensors, where)
        if note is None:
            _warn(row)
        return Foreign(cfg, to_ours(tensors, cfg), origin)

    def like(self, name: str) -> ForeignConfig:
        """How a published tokenizer was trained, for files of other people. Raises `ConfigError` for other names."""
        return family(name)

    def write(self, tokenizer: Any, folder: Path) -> None:
        """Write the state dict, and `vqcore.json` with all that the file does not say.

        Raises `CheckpointError` that names the settings which terratorch does not have.
        """
        cfg = tokenizer.cfg
        if tokenizer.decoder is None:
            raise CheckpointError("this tokenizer has no decoder: it was loaded with encoder_only=True.")
        if wrong := list(foreign_settings(cfg, tokenizer.spec)):
            raise CheckpointError(f"terratorch cannot hold this tokenizer: {'; '.join(wrong)}.")
        made = to_theirs(weights_of(tokenizer), cfg)
        if self.row is not None:
            _check_place(cfg, made, self.row)
        file = FILE if self.row is None else self.row.file
        name = None if self.row is None else self.row.full
        plain = {key: value.detach().float().cpu().contiguous() for key, value in made.items()}
        with aside(folder / file) as temporary:
            torch.save(plain, temporary)
        origin = tokenizer.origin.get("origin", {})
        kept = {key: origin[key] for key in KEPT if key in origin}
        note = {"file": file, "variant": name, "origin": kept, "tokenizer": to_tree(portable(cfg))}
        write_text(folder / NOTE, json.dumps(note, indent=1) + "\n")

    def _noted(self, note: Mapping[str, Any], file: Path) -> TokenizerConfig:
        """The config in a note of ours. Raises `CheckpointError` if the settings of the format say something else."""
        name, where = note["variant"], file.parent / NOTE
        if self.row is not None and name != self.row.full:
            raise CheckpointError(
                f"{where}: the tokenizer is {name or 'no published one'}, not {self.row.full}; leave variant out."
            )
        try:
            cfg = from_tree(note["tokenizer"], schema=TokenizerConfig, file=str(where))
            modality = registry().build("modality", cfg.modality, "data.modality", size=cfg.size)
        except VqcoreError as error:
            raise CheckpointError(str(error)) from error
        if wrong := list(foreign_settings(cfg, modality.spec)):
            raise CheckpointError(f"{where}: terratorch cannot hold such a tokenizer: {'; '.join(wrong)}.")
        if self.cfg.size is not None:
            raise CheckpointError(f"{where}: it says the nominal size, {list(cfg.size)}; leave size out.")
        return cfg


def _file(path: Path, row: Variant | None) -> Path:
    """The file with the tensors: the path itself, or the one in a folder."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise CheckpointError(f"{path}: no file of TerraMind's tokenizers; such a file is a .pt.")
        return path
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES and each.is_file())
    if row is not None and (path / row.file) in found:
        return path / row.file
    if len(found) != 1:
        names = listed(each.name for each in found)
        raise CheckpointError(
            f"{path}: holds {len(found)} files of weights ({names}); give one of them, not the folder."
            if found
            else f"{path}: holds no weights of TerraMind. Such a file is a .pt; to download it, give --allow-pickle."
        )
    return found[0]


def _note(file: Path) -> dict[str, Any] | None:
    """What vqcore wrote beside a file when it exported it."""
    path = file.parent / NOTE
    if not path.is_file():
        return None
    shape = {"file": str, "variant": (str, type(None)), "origin": dict, "tokenizer": dict}
    note = read_json(path, CheckpointError, {})
    if note.get("file") != file.name:
        return None  # of another file
    if wrong := misfit(note, shape):
        raise CheckpointError(f"{path}: damaged: {wrong}.")
    return note


def _tensors(file: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if file.suffix.lower() == ".safetensors":
        return load_tensors(file)
    found = read_pickle(file, allow_pickle=allow_pickle)
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{file}: no state dict, but a {type(found).__name__}.")
    for name in WRAPPERS:
        if isinstance(found.get(name), dict):
            raise CheckpointError(
                f"{file}: its tensors lie under '{name}'; a file of TerraMind is the state dict alone (terratorch "
                f"would load nothing from this one). Save that part: torch.save(content['{name}'], 'new.pt')."
            )
    for name, value in found.items():
        if type(name) is not str or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file}: {str(name)[:60]} is no tensor with a name, so it is no state dict."
            )
        if value.layout != torch.strided or not value.is_floating_point() or value.device.type != "cpu":
            raise CheckpointError(f"{file}: {name[:60]} is no plain tensor of floating-point numbers.")
    return found


def _facts(tensors: Mapping[str, Tensor], file: Path) -> Facts:
    """What the shapes say. Raises `CheckpointError` for a file that is no tokenizer of TerraMind."""
    if all(name.startswith("module.") for name in tensors):
        raise CheckpointError(
            f"{file}: all names begin with module. (terratorch would load nothing); save the state dict of the model "
            "inside DistributedDataParallel."
        )
    for begins, what in OTHERS.items():
        if any(name.startswith(begins) for name in tensors):
            raise CheckpointError(f"{file} is no tokenizer of TerraMind: {what}.")
    first, last = (tensors.get(name) for name in ("encoder.proj.weight", "quant_proj.weight"))
    if first is None or last is None or first.ndim != 4 or not last.ndim:
        raise CheckpointError(
            f"{file} is no tokenizer of TerraMind: no encoder.proj.weight, quant_proj.weight."
        )
    names = tuple(tensors)
    has_net = any(name.startswith("decoder.") for name in names)
    kind = "VQVAE" if "decoder.out_proj.weight" in tensors else "DiVAE" if has_net else "VQ"
    return Facts(kind, int(first.shape[1]), int(last.shape[0]))


def _checked(row: Variant | None, facts: Facts, file: Path) -> Variant:
    """The tokenizer that the user named. Raises `CheckpointError` if there is no name, or the file is another one."""
    # Also `TerraMind_Tokenizer_DEM (1).pt`, and in lower case.
    name = file.name.lower()
    said = next((each for each in VARIANTS.values() if name.startswith(Path(each.file).stem.lower())), None)
    fitting = (
        listed(each.name for each in VARIANTS.values() if facts.fits(each)) or "none of the published ones"
    )
    is_a = f"a {facts.kind} of {facts.channels} bands or classes and {facts.width} latent channels"
    if row is None:
        by_name = f"Its name says variant={said.name}. " if said else ""
        raise CheckpointError(
            f"{file}: the file does not say which tokenizer it is; give variant=NAME. {by_name}By its shapes, {is_a}, "
            f"it may be: {fitting}."
        )
    if not facts.fits(row):
        raise CheckpointError(
            f"{file} is not {row.name}, a {row.kind} of {row.what}: it is {is_a}. It may be: {fitting}."
        )
    if said is not None and said != row:
        raise CheckpointError(
            f"{file} is named after {said.name}, and variant={row.name}. The shapes of both fit; statistics and codes "
            f"do not. Take variant={said.name}, or rename the file if its name is wrong."
        )
    return row


def _config_of(row: Variant, facts: Facts, size: int | tuple[int, ...] | None) -> TokenizerConfig:
    sides = (size,) if isinstance(size, int) else size or (row.size,)
    encoder_only = facts.kind == "VQ"
    tree = {
        "modality": row.modality(),
        "size": list(sides * 2 if len(sides) == 1 else sides),
        "model": row.model(encoder_only=encoder_only),
        "objective": row.objective(encoder_only=encoder_only),
    }
    try:
        return from_tree(tree, schema=TokenizerConfig, file=f"{row.name}, as vqcore reads it")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _check_place(cfg: TokenizerConfig, made: Mapping[str, Tensor], row: Variant) -> None:
    """Refuse to write a tokenizer in the place of a published one with other tensors, levels, bands or statistics."""
    right = _config_of(row, Facts(row.kind, row.channels, 0), cfg.size)
    keys = ("kind", "labels", "channels", "scale")
    pairs = [
        ("data.modality.name", cfg.modality.name, right.modality.name),
        *(
            (f"data.modality.{key}", *(to_tree(getattr(each.modality, key, None)) for each in (cfg, right)))
            for key in keys
        ),
        ("model.quantizer.levels", *(_levels(each.model.quantizer) for each in (cfg, right))),
    ]
    where = f"this tokenizer in the place of {row.name}"
    if wrong := [f"{key}={here}, there {there}" for key, here, there in pairs if here != there]:
        raise CheckpointError(
            f"{where}: {'; '.join(wrong)}. Without variant= it is exported under a name of its own."
        )
    refuse_misfits(wanted(right, row.name), made, where)


def _levels(quantizer: Any) -> list[int]:
    levels = quantizer.levels
    return [int(each) for each in (levels.split("-") if isinstance(levels, str) else levels)]


def _warn(row: Variant) -> None:
    if "B02" in row.bands:
        log.warning(
            f"{row.name} takes digital numbers of Sentinel-2 L2A. Products from 2022 on have 1000 added to them; which "
            "of both it was trained on is not published. Compare reconstructions of both."
        )
