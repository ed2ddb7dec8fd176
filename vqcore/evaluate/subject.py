"""What `vqcore eval` measures: a run or an exported tokenizer, and the settings of its evaluation.

An exported tokenizer (an artefact, a hub id) has no run. Its provenance records the data that it was trained and
evaluated on. These data may not exist on this machine, so every `data.` key can be given on the command line.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vqcore.artefacts.folder import CONFIG, PROVENANCE, verify
from vqcore.artefacts.formats import read_foreign
from vqcore.artefacts.provenance import made_with, read_config
from vqcore.artefacts.resolve import Named, resolve
from vqcore.borrowed import Access, Lender
from vqcore.compose.build import saved_tree
from vqcore.compose.describe import inline
from vqcore.compose.layers import overridden
from vqcore.config import to_tree
from vqcore.errors import ConfigError, UnknownName, UnknownPlugin, VqcoreError
from vqcore.schema import RunConfig, TokenizerConfig
from vqcore.tokenizer import Tokenizer

_UNRECORDED = {"name": "folder", "path": "unrecorded"}
_ELSEWHERE = (
    "The tokenizer was trained with these settings. To measure it on your own data: data.eval_path=FOLDER, or, if "
    "its data source was not a folder, data.name=folder data.path=FOLDER data.eval_path=FOLDER"
)
_BESIDE = ("data.extra", "data.extra_path", "data.eval_extra_path")
"""The settings of extra modalities. Other samples have no extra modalities, unless the overrides name them."""


@dataclass(frozen=True)
class Subject:
    """The folder of the weights, their run (None for an exported tokenizer), and the settings of the evaluation."""

    named: Named
    run: Path | None
    config: RunConfig
    overrides: tuple[str, ...] = ()
    access: Access = field(default_factory=Access)

    @property
    def weights(self) -> Path:
        """The folder of the weights, or the files of another system."""
        return self.named.path

    @property
    def title(self) -> str:
        """What is measured, as text: the checkpoint of a run, else the name that the user gave."""
        return self.named.name if self.run is None else str(self.weights)

    def load(self, device: torch.device, weights: str) -> Tokenizer:
        """The tokenizer, with these weights."""
        return Tokenizer.load(
            self.weights,
            device,
            weights=weights,
            format=self.named.format,
            precision=self.config.eval.precision,
            **vars(self.access),
        )

    @functools.cached_property
    def made(self) -> dict[str, Any]:
        """The provenance of the weights; empty for files of another system."""
        return verify(self.weights) if self.named.format is None else {}

    def lender(self) -> Lender:
        """Lends what the tokenizer itself does not borrow: to riders and to the objective."""
        return self.access.lender(self.made.get("borrowed", {}))

    def explained(self, error: VqcoreError) -> VqcoreError:
        """An error about the data; for an exported tokenizer its text says how to name other data."""
        return _explained(error, self.overrides) if self.run is None else error


def subject(name: str, overrides: Sequence[str] = (), access: Access | None = None) -> Subject:
    """The subject that RUN names, with overrides. Raises `CheckpointError` and `ConfigError`."""
    for override in overrides:
        section = override.partition("=")[0]
        if section.split(".")[0] not in ("data", "eval", "run") or section.startswith("data.modality"):
            raise ConfigError(
                f"command line: {override}: this setting of a trained tokenizer cannot change. eval takes data.* "
                "(without data.modality), eval.* and run.*"
            )
    access = access or Access()
    named = resolve(name, allow_pickle=access.allow_pickle)
    run = named.run
    if named.format is not None:
        foreign = read_foreign(
            named.path, named.format, source=named.source, allow_pickle=access.allow_pickle
        )
        run, config = None, _alone(named.path, {}, foreign.config, overrides)
    elif run is None or not (run / CONFIG).is_file():
        made = verify(named.path)
        run, config = None, _alone(named.path, made, read_config(named.path), overrides)
    else:
        config = _config(saved_tree(run / CONFIG), overrides, run / CONFIG)
    return Subject(named, run, config, tuple(overrides), access)


def _alone(
    folder: Path, made: Mapping[str, Any], cfg: TokenizerConfig, overrides: Sequence[str]
) -> RunConfig:
    """The settings to evaluate a tokenizer without a run: those in its provenance `made`, with overrides."""
    data = made.get("data") or _UNRECORDED
    given = {override.partition("=")[0] for override in overrides}
    if "data.eval_path" in given and not any(key.startswith(_BESIDE) for key in given):
        data = {key: value for key, value in data.items() if f"data.{key}" not in _BESIDE}
    tree = {
        "data": {**data, "modality": to_tree(cfg.modality)},
        "model": to_tree(cfg.model),
        "objective": to_tree(cfg.objective),
        "eval": made.get("eval", {}),
        # A RunConfig requires these settings; no evaluation reads them.
        "run": {"dir": str(folder), "steps": 1},
        "optim": {"lr": 1.0},
    }
    try:
        return _config(tree, overrides, folder / PROVENANCE)
    except UnknownName as error:
        raise _explained(error, overrides) from error


def _config(tree: dict[str, Any], overrides: Sequence[str], file: Path) -> RunConfig:
    """The config with overrides; another `data.name` replaces all of `data` except the modality."""
    data = tree.get("data")
    given = {override.partition("=")[0] for override in overrides}
    if isinstance(data, dict) and "data.eval_path" in given and "data.eval_share" not in given:
        # Other samples than the held-out share of those for training.
        tree = {**tree, "data": data | {"eval_share": None, "group": None}}
    kept = (
        [f"data.modality={inline(data['modality'])}"] if isinstance(data, dict) and "modality" in data else []
    )
    try:
        return overridden(tree, [*overrides, *kept], schema=RunConfig, file=str(file))
    except UnknownPlugin as error:
        raise made_with(file.parent, error) from error


def _explained(error: VqcoreError, overrides: Sequence[str]) -> VqcoreError:
    if any(override.startswith("data.") for override in overrides):
        return error
    return type(error)(f"{error} {_ELSEWHERE}")
