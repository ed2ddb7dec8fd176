"""Loads the weights that a run starts from (`model.full_ckpt`, `model.encoder_ckpt`), and checks `model.freeze_enc`.

A part (embedding, encoder, projection, quantizer, decoder) is loaded as a whole or not at all: nobody would notice a
part that is half loaded. Messages name the parts that are not loaded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqcore.artefacts.codes import other_maker
from vqcore.artefacts.folder import read_weights, verify
from vqcore.artefacts.formats import read_foreign, settings
from vqcore.artefacts.provenance import read_config
from vqcore.artefacts.resolve import Named, resolve
from vqcore.borrowed import weights_of
from vqcore.config import leaves, to_tree
from vqcore.console import say
from vqcore.errors import CheckpointError, ConfigError, DataError, listed
from vqcore.protocols import Data, interpolated, knows_codes
from vqcore.schema import ModelConfig, TokenizerConfig
from vqcore.tokenizer import Tokenizer

TOKENS = ("embed", "encoder", "proj", "quantizer")
"""The parts that decide the tokens; `freeze_enc` keeps them."""
_MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}


def start_from(tokenizer: Tokenizer, model: ModelConfig, *, allow_pickle: bool = False) -> None:
    """Fill a new tokenizer from the checkpoint that its config names; other parts load their published weights, if any.

    Raises `CheckpointError` if the weights cannot be read or no part of them fits, and `ConfigError` if the tokens
    would change in spite of `freeze_enc`.
    """
    key = "full_ckpt" if model.full_ckpt else "encoder_ckpt"
    given = model.full_ckpt or model.encoder_ckpt
    if given is None:
        return tokenizer.fetch()
    try:
        named = _named(given, f"model.{key}", allow_pickle)
        source, state = _contents(named, allow_pickle)
    except CheckpointError as error:
        raise error.at(f"model.{key}") from error
    recorded = verify(named.path).get("borrowed", {}) if named.format is None else {}
    parts = (*TOKENS, "decoder") if model.full_ckpt else TOKENS[:2]
    problems = {
        part: _other_loans(tokenizer, part, recorded) or _take(tokenizer, part, source, state)
        for part in parts
    }
    taken = [part for part in parts if getattr(tokenizer, part) is not None and not problems[part]]
    if not taken:
        raise CheckpointError(
            f"model.{key}={named.name}: none of its parts fits this model. {_reasons(problems)}"
        )
    if model.freeze_enc:
        _refuse_other_tokens(tokenizer, named, source, state, problems, recorded)
    say(f"model.{key}: {listed(taken)} from {named}.")
    rest = [
        part for part in (*TOKENS, "decoder") if getattr(tokenizer, part) is not None and part not in taken
    ]
    tokenizer.fetch(rest)
    if rest:
        say(f"model.{key}: {listed(rest)} newly initialised. {_reasons(problems)}".rstrip())


def refuse_other_codes(tokenizer: Tokenizer, data: Data) -> None:
    """Raise `DataError` if the data source has the codes of another tokenizer. The weights must be there."""
    coded = knows_codes(data)
    if coded and (maker := other_maker(coded.made, tokenizer.fingerprint)):
        raise DataError(f"data.codes: {maker}. Set model.full_ckpt to the tokenizer that made them.")


def _named(given: str | Mapping[str, Any], key: str, allow_pickle: bool) -> Named:
    """What the config names: as RUN on the command line, or a mapping of a format's settings with a path."""
    if isinstance(given, str):
        return resolve(given, allow_pickle=allow_pickle)
    node = {name: value for name, value in given.items() if name != "path"}
    cfg = settings(node, file="config", where=key)
    return resolve(str(given["path"]), format=cfg, allow_pickle=allow_pickle)


def _contents(named: Named, allow_pickle: bool) -> tuple[TokenizerConfig, Mapping[str, Tensor]]:
    if named.format is not None:
        found = read_foreign(named.path, named.format, source=named.source, allow_pickle=allow_pickle)
        return found.config, found.tensors
    verify(named.path)
    return read_config(named.path), read_weights(named.path)


def _other_loans(tokenizer: Tokenizer, part: str, recorded: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the part borrows here that differs from what it borrowed when the checkpoint was trained."""
    return [
        f"{key} has other borrowed weights here"
        for key, loan in tokenizer.loans.items()
        if key.startswith(f"{part}.") and recorded.get(key, loan)["sha256"] != loan["sha256"]
    ]


def _take(tokenizer: Tokenizer, part: str, source: TokenizerConfig, state: Mapping[str, Tensor]) -> list[str]:
    """Fill one part; returns the reasons why it cannot be filled."""
    module = getattr(tokenizer, part)
    theirs = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
    if module is None:
        return [f"this model has no {part}"] if theirs else []
    names = [getattr(cfg.model, part, None) for cfg in (source, tokenizer.cfg)]
    if names[0] is not None and names[1] is not None and names[0].name != names[1].name:
        return [f"{part} is {names[0].name} in the checkpoint and {names[1].name} here"]
    own = weights_of(module)
    resizable = interpolated(module)
    fitted = {key: _fitted(value, own[key], key in resizable) for key, value in theirs.items() if key in own}
    problems = [f"{part}.{key} is missing in the checkpoint" for key in own if key not in theirs]
    problems += [f"{part}.{key} is unknown here" for key in theirs if key not in own]
    problems += [
        f"{part}.{key} is {tuple(theirs[key].shape)} in the checkpoint and {tuple(own[key].shape)} here"
        for key, value in fitted.items()
        if value is None
    ]
    if not problems:
        module.load_state_dict(fitted, strict=False)
    return problems


def _fitted(value: Tensor, own: Tensor, resizable: bool) -> Tensor | None:
    """The tensor in the shape of `own`, or None. Positions `(1, d, *grid)` of another grid are interpolated."""
    if value.shape == own.shape:
        return value
    if not resizable or value.ndim != own.ndim or value.shape[:2] != own.shape[:2]:
        return None
    grid = tuple(own.shape[2:])
    return F.interpolate(value.float(), grid, mode=_MODES[len(grid)], align_corners=False).to(own.dtype)


@torch.no_grad()
def _refuse_other_tokens(
    tokenizer: Tokenizer,
    named: Named,
    source: TokenizerConfig,
    state: Mapping[str, Tensor],
    problems: Mapping[str, list[str]],
    recorded: Mapping[str, Any],
) -> None:
    lost = {part: found for part, found in problems.items() if part in TOKENS and found}
    if lost:
        raise ConfigError(
            f"model.freeze_enc: the tokens would differ from those of {named}. {_reasons(lost)}"
        )
    there = Tokenizer(source, encoder_only=True, fetch=False)
    there.fill(state, str(named))
    there.loans = {key: recorded.get(key, loan) for key, loan in tokenizer.loans.items()}
    if tokenizer.fingerprint != there.fingerprint:
        differ = [
            f"{section} ({name})"
            for section in ("modality", "model.encoder", "model.quantizer")
            for name in _differing(_node(source, section), _node(tokenizer.cfg, section))
        ]
        differ += [
            f"{key} (other weights)"
            for key, loan in tokenizer.loans.items()
            if there.loans[key]["sha256"] != loan["sha256"]
        ]
        differ = differ or [
            "weights whose size was changed, such as positions: set input_size_enc as it is there"
        ]
        raise ConfigError(
            f"model.freeze_enc: the tokens would differ from those of {named}: {listed(differ, 5)} differ."
        )


def _node(cfg: TokenizerConfig, section: str) -> Any:
    for name in section.split("."):
        cfg = getattr(cfg, name)
    return cfg


def _differing(a: Any, b: Any) -> list[str]:
    ours, theirs = dict(leaves(to_tree(a))), dict(leaves(to_tree(b)))
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    return [key for key in keys if key not in (*a.training_only, *a.places)]


def _reasons(problems: Mapping[str, list[str]]) -> str:
    found = [line for lines in problems.values() for line in lines]
    return f"{listed(found, 6)}." if found else ""
