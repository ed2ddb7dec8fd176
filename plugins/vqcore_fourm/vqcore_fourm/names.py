"""A tokenizer's tensors by 4M's names and in 4M's shapes, and back."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vqcore.borrowed import weights_of
from vqcore.errors import CheckpointError, VqcoreError, first_line
from vqcore.schema import TokenizerConfig
from vqcore.tokenizer import Tokenizer
from vqcore_fourm.base import COMPUTED, PARTS
from vqcore_fourm.tables import CONTROLNET, OLDER, POINTWISE, begun, ours, theirs

DECODER = "decoder."
HINT, THEIR_HINT = "decoder.hint.", "decoder.controlnet.controlnet_cond_embedding."
ADAPTER, THEIR_ADAPTER = f"{HINT}adapter.", f"{THEIR_HINT}adapter_model."
BORROWED = (*PARTS.values(), COMPUTED)
"""How names of Stable Diffusion begin in a VQControlNet, which holds all of it."""
CLOSE = 1e-4
"""Fixed positions of 4M, computed elsewhere, differ by this at most."""


def wanted(cfg: TokenizerConfig, where: str) -> dict[str, Tensor]:
    """The tensors of 4M's state of such a tokenizer; only fixed ones have values."""
    try:
        with torch.device("meta"):
            made = weights_of(Tokenizer(cfg, fetch=False))
    except (VqcoreError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where}: no such tokenizer can be built: {first_line(error)}") from error
    return to_theirs(made, cfg)


def to_theirs(tensors: Mapping[str, Tensor], cfg: TokenizerConfig) -> dict[str, Tensor]:
    """4M's whole state from ours, with what 4M has twice and what 4M computes."""
    decoder = cfg.model.decoder.name
    if decoder == CONTROLNET:
        for ours_, theirs_ in ((ADAPTER, THEIR_ADAPTER), (HINT, THEIR_HINT)):
            tensors = {_swapped(name, ours_, theirs_): tensor for name, tensor in tensors.items()}
    net = {name: tensor for name, tensor in tensors.items() if _is_of_denoiser(name, decoder)}
    made = {theirs(name): tensor for name, tensor in tensors.items() if name not in net}
    made |= {name: made[name][..., None, None] for name in POINTWISE if name in made}
    if net:
        fourm = _fourm()
        plain = {name.removeprefix(DECODER): tensor for name, tensor in net.items()}
        named = fourm.from_uvit(plain) if decoder == "unet/uvit" else fourm.from_unet(plain, _depth(cfg))
        made |= {DECODER + name: tensor for name, tensor in named.items()}
    return made


def to_ours(tensors: Mapping[str, Tensor], cfg: TokenizerConfig) -> dict[str, Tensor]:
    """The inverse of `to_theirs`, for tensors that fit."""
    decoder = cfg.model.decoder.name
    net = {name: tensor for name, tensor in tensors.items() if _is_of_denoiser(name, decoder)}
    left = {name: tensor for name, tensor in tensors.items() if name not in net}
    if decoder == CONTROLNET:
        for ours_, theirs_ in ((ADAPTER, THEIR_ADAPTER), (HINT, THEIR_HINT)):
            left = {_swapped(name, theirs_, ours_): tensor for name, tensor in left.items()}
    made = {ours(name): tensor.flatten(1) if name in POINTWISE else tensor for name, tensor in left.items()}
    if net:
        fourm = _fourm()
        plain = {name.removeprefix(DECODER): tensor for name, tensor in net.items()}
        named = fourm.uvit(plain) if decoder == "unet/uvit" else fourm.unet(plain, _depth(cfg))
        made |= {DECODER + name: tensor for name, tensor in named.items()}
    return made


def completed(tensors: Mapping[str, Tensor], right: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A file's tensors by the latest names, with both names of what has two; `right` is from `wanted`.

    Files keep one of two names (safetensors) or both. Raises `CheckpointError` for two names with different values, and
    for fixed positions with other values than 4M's.
    """
    made = {begun(name, OLDER): tensor for name, tensor in tensors.items()}
    if any(name.startswith(THEIR_HINT) for name in right):
        made = {name: tensor for name, tensor in made.items() if not name.startswith(BORROWED)}
    if not any(name.startswith(f"{DECODER}mid_block.") for name in right):
        return made
    fourm = _fourm()
    first, second = (DECODER + begin for begin in fourm.TWICE)
    for name in [name for name in right if name.startswith(first)]:
        other = second + name.removeprefix(first)
        both = [made[each] for each in (name, other) if each in made]
        if len(both) == 2 and not torch.equal(*both):
            raise CheckpointError(f"{where}: {name} and {other} are one tensor in 4M, but differ here.")
        made |= {each: both[0] for each in (name, other) if both}
    fixed = DECODER + fourm.POSITIONS
    found = made.get(fixed)
    if found is not None and found.shape == right[fixed].shape:
        if not torch.allclose(found.float(), right[fixed], rtol=0, atol=CLOSE):
            raise CheckpointError(f"{where}: {fixed} has other values than the fixed ones of 4M.")
        made[fixed] = right[fixed]
    return made


def _swapped(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _fourm() -> Any:
    """The names of 4M's denoisers. Who builds a denoiser has its plugin, so this module is there."""
    return importlib.import_module("vqcore_unet.fourm")


def _is_of_denoiser(name: str, decoder: str) -> bool:
    return decoder in ("unet/unet", "unet/uvit") and name.startswith(DECODER)


def _depth(cfg: TokenizerConfig) -> int:
    decoder: Any = cfg.model.decoder
    return decoder.depth
