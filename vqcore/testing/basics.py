"""The laws that hold for every component, and helper functions for the laws of the kinds."""

import copy
import dataclasses
import inspect
import os
import subprocess
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqcore.compose.describe import settings
from vqcore.config import Config
from vqcore.plugin import a_kind
from vqcore.protocols import (
    OPTIONAL,
    REQUIRED,
    Denoiser,
    is_denoiser,
    members,
    missing_members,
    optional_members,
    required_members,
    without_decay,
)
from vqcore.rng import generator

HEAVY = ("torch", "numpy", "omegaconf", "PIL", "einops")
BF16_SHARE = 0.1
"""Largest difference between bfloat16 and single precision, as a share of the result's norm."""


def check_manifest(module: str, targets: tuple[str, ...] = ()) -> None:
    """Importing the manifest alone must load neither a heavy package nor a module of a component."""
    inner = [target.partition(":")[0] for target in targets]
    forbidden = [name for name in (*HEAVY, *inner) if name and name != module]
    code = f"import sys, {module}; print(); print(*[m for m in {forbidden!r} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    assert done.returncode == 0, f"manifest law: {module} does not import by itself: {last}"
    loaded = done.stdout.splitlines()[-1].split()  # the manifest may print lines before the last one
    assert not loaded, (
        f"manifest law: importing {module} also imports {', '.join(loaded)}; import them where they are used"
    )


def check_config(cls: type) -> None:
    """`cls.Config` is a frozen keyword-only dataclass that inherits from `Config`; each setting has a text."""
    config: Any = getattr(cls, "Config", None)
    where = f"{cls.__module__}.{cls.__qualname__}"
    assert isinstance(config, type) and issubclass(config, Config), (
        f"config law: {where} has no nested Config"
    )
    params = vars(config).get("__dataclass_params__")  # of the class itself: inherited ones lack new settings
    assert params, f"config law: {where}.Config lacks @dataclass(frozen=True, kw_only=True)"
    kw_only = all(f.kw_only for f in dataclasses.fields(config))
    assert params.frozen and kw_only, f"config law: {where}.Config must be frozen and kw_only"
    hints = typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        assert "slot" in f.metadata or "slots" in f.metadata or _is_setting(hints[f.name]), (
            f"config law: {where}.Config.{f.name} is of type {hints[f.name]}; a setting is int, float, "
            "bool, str, Literal, a tuple or dict[str, ...] of these, a dataclass, or one of several"
        )
    for setting in settings(config):
        assert setting.text, f"config law: {where}.Config.{setting.name} has no text under it"
    names = {f.name for f in dataclasses.fields(config)}
    for name in config.places:
        assert name in names and type(None) in typing.get_args(hints[name]), (
            f"config law: {where}.Config.places names {name}, which is no setting of type str | None"
        )
    unknown = [name for name in config.training_only if name not in names]
    assert not unknown, f"config law: {where}.Config.training_only names {unknown}, which are not settings"


def _is_setting(annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return all(arg is type(None) or _is_setting(arg) for arg in args)
    if origin is tuple:
        return all(arg is Ellipsis or _is_setting(arg) for arg in args)
    if origin is dict:
        return args[0] in (str, int) and _is_setting(args[1])
    plain = annotation in (int, float, bool, str) or dataclasses.is_dataclass(annotation)
    return plain or origin is typing.Literal


class MisspeltMember(UserWarning):
    """A public attribute has a name one letter off an optional member, so vqcore does not read it."""


def check_members(kind: str, obj: Any) -> None:
    """The object has all required members of its kind, and all members or none of each optional Protocol.

    Warns with `MisspeltMember` about a public attribute that looks like a misspelt optional member.
    """
    who = type(obj).__name__
    lacks = missing_members(kind, obj)
    assert not lacks, f"protocol law: {who} lacks {', '.join(lacks)}, which every {kind} has"
    optional = [protocol for protocol in OPTIONAL.get(kind, ()) if protocol is not Denoiser]
    for protocol in optional:
        names = [name for name in members(protocol) if name in optional_members(kind)]
        has, lacks = ([name for name in names if hasattr(obj, name) is there] for there in (True, False))
        assert not has or not lacks, (
            f"protocol law: {who} has {', '.join(has)} but lacks {', '.join(lacks)}; these members belong together"
        )
    whole = Denoiser if kind == "decoder" and is_denoiser(obj) else REQUIRED[kind]
    for protocol in (whole, *optional):
        methods = [name for name in members(protocol) if inspect.isfunction(vars(protocol).get(name))]
        wrong = [name for name in methods if hasattr(obj, name) and not callable(getattr(obj, name))]
        assert not wrong, f"protocol law: {wrong[0]} of {who} is not a method"
    own = {name for name, _ in obj.named_parameters()} if isinstance(obj, nn.Module) else set()
    strange = [name for name in without_decay(obj) if name not in own]
    assert not strange, f"protocol law: without_decay names {strange[0]}, which is not a parameter of {who}"
    for text in misspellings(kind, obj):
        warnings.warn(text, MisspeltMember, stacklevel=2)


def misspellings(kind: str, thing: Any) -> list[str]:
    """One warning for each public attribute of a component, or of its class, that looks like a misspelt member."""
    who = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    return [
        f"{who} has '{found}', one letter off '{meant}', an optional member of {a_kind(kind)}. vqcore does not read "
        f"'{found}': rename it to '{meant}', or give it a name that differs more."
        for found, meant in misspelt_members(kind, thing).items()
    ]


def check_waived(waived: Mapping[str, str] | None, waivable: tuple[str, ...]) -> Mapping[str, str]:
    """The waived laws with their reasons. Raises `AssertionError` for a law that cannot be waived."""
    waived = waived or {}
    strange = sorted(set(waived) - set(waivable))
    assert not strange, f"waived: {strange} cannot be waived; these can: {', '.join(waivable) or 'none'}"
    return waived


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise of a shape, the same at every call."""
    return torch.randn(*shape, generator=generator(seed, "check", *shape))


def stirred(module: Any) -> Any:
    """A copy in eval mode with slightly changed parameters, since layers that start at zero could hide an error."""
    module = copy.deepcopy(module)
    if isinstance(module, nn.Module):
        module.eval()
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                if parameter.is_floating_point():
                    parameter.add_(noise(*parameter.shape, seed=number).to(parameter), alpha=0.02)
    return module


def state_of(module: Any) -> dict[str, Tensor]:
    """A copy of a module's state; empty for an object that is not a module."""
    return {k: v.clone() for k, v in module.state_dict().items()} if isinstance(module, nn.Module) else {}


def same_state(before: Mapping, after: Mapping, law: str, tolerance: float = 0.0) -> None:
    """Two states hold the same tensors, up to `tolerance`."""
    for name, value in before.items():
        moved = (value.double() - after[name].double()).abs()
        moved = torch.where(
            value.isnan() & after[name].isnan(), 0.0, moved
        )  # what is not known yet may stay so
        off = moved.max() if value.numel() else 0.0
        assert float(off) <= tolerance, f"state law: {law} ({name} moved by {float(off):.2g})"


def close(found: Tensor, wanted: Tensor, law: str, share: float = 1e-4) -> None:
    """Two tensors differ by at most a share of the largest value of the wanted one (at least of 0.001)."""
    assert found.shape == wanted.shape, f"{law}: the shape is {tuple(found.shape)}, not {tuple(wanted.shape)}"
    off = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    most = share * max(1e-3, float(wanted.abs().max())) if wanted.numel() else 0.0
    assert off <= most, f"{law} by {off:.2g}"


def finite(x: Tensor, law: str) -> None:
    """No NaN and no infinity."""
    bad = int((~torch.isfinite(x)).sum()) if x.is_floating_point() else 0
    assert not bad, f"finite law: {law}: {bad} of {x.numel()} values are NaN or infinite"


def check_bf16(module: Any, call: Any, wanted: Tensor) -> None:
    """Under autocast to bfloat16, `call(module)` is close to `wanted`, the result in single precision."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = call(module).float()
    finite(found, "under autocast to bfloat16")
    off = float((found - wanted).norm() / wanted.norm().clamp(min=1e-6))
    assert off <= BF16_SHARE, (
        f"bf16 law: under autocast to bfloat16 the result differs by {off:.2g} of its norm; "
        f"at most {BF16_SHARE} is rounding"
    )


def check_restored(fresh: Any, module: Any, call: Any) -> None:
    """A module with other random weights (`fresh`) computes the same result after it loads the state dict."""
    if not isinstance(module, nn.Module):
        return
    restored = copy.deepcopy(fresh)
    restored.load_state_dict(module.state_dict())
    restored.eval()
    with torch.no_grad():
        same = torch.equal(call(restored), call(module))
    assert same, (
        "state law: the result differs after a state-dict round trip; the state dict must hold all that matters"
    )


def check_gradients(module: nn.Module, skip: Iterable[str] = ()) -> None:
    """Every trained parameter has a finite gradient; distributed training waits for all gradients."""
    unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None and n not in skip]
    assert not unused, (
        f"gradient law: no gradient reaches {unused[0]} ({len(unused)} in all); DDP waits for it"
    )
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert bool(torch.isfinite(parameter.grad).all()), (
                f"gradient law: the gradient of {name} is not finite"
            )


def misspelt_members(kind: str, thing: Any) -> dict[str, str]:
    """Public attributes of a component (or of its class) that look like a misspelt optional member: found -> meant.

    Such a name is one letter off the name of an optional member and is no member of this kind itself.
    """
    optional = optional_members(kind)
    known = {"Config", *required_members(kind), *optional, *dir(nn.Module)}
    own = [name for name in dir(thing) if not name.startswith("_") and name not in known]
    return {name: meant for name in own for meant in optional if _one_letter_off(name, meant)}


def _one_letter_off(a: str, b: str) -> bool:
    """Do two different words differ by one insertion, deletion or substitution, or by a swap of two neighbours?"""
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    a, b = a[same:], b[same:]
    swapped = a[:2] == b[:2][::-1] and a[2:] == b[2:]
    return a != b and (a[1:] == b[1:] or a[1:] == b or a == b[1:] or swapped)
