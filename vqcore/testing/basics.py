"""The laws that hold for every component, and what the laws of the kinds share."""

import copy
import dataclasses
import os
import subprocess
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqcore.compose.describe import settings
from vqcore.config import Config
from vqcore.protocols import missing_members
from vqcore.rng import generator

HEAVY = ("torch", "numpy", "omegaconf", "PIL", "einops")
BF16_SHARE = 0.1
"""Largest difference between bfloat16 and single precision, as a share of the result's norm."""


def check_manifest(module: str, targets: tuple[str, ...] = ()) -> None:
    """Importing the manifest alone must load nothing heavy, nor any of the components' own modules."""
    inner = [target.partition(":")[0] for target in targets]
    forbidden = [name for name in (*HEAVY, *inner) if name and name != module]
    code = f"import sys, {module}; print(); print(*[m for m in {forbidden!r} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    assert done.returncode == 0, f"manifest law: {module} does not import by itself: {last}"
    loaded = done.stdout.splitlines()[-1].split()  # lines above the last are the manifest's own
    assert not loaded, (
        f"manifest law: importing {module} also imports {', '.join(loaded)}; import them where they are used"
    )


def check_config(cls: type) -> None:
    """`cls.Config` is a frozen keyword-only dataclass below `Config`, each setting explained."""
    config: Any = getattr(cls, "Config", None)
    where = f"{cls.__module__}.{cls.__qualname__}"
    assert isinstance(config, type) and issubclass(config, Config), (
        f"config law: {where} has no nested Config"
    )
    params = vars(config).get("__dataclass_params__")  # its own: one that is inherited knows no new settings
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
    unknown = [name for name in config.training_only if name not in names]
    assert not unknown, f"config law: {where}.Config.training_only names {unknown}, which are no settings"


def _is_setting(annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return all(arg is type(None) or _is_setting(arg) for arg in args)
    if origin is tuple:
        return all(arg is Ellipsis or _is_setting(arg) for arg in args)
    if origin is dict:
        return args[0] is str and _is_setting(args[1])
    plain = annotation in (int, float, bool, str) or dataclasses.is_dataclass(annotation)
    return plain or origin is typing.Literal


def check_members(kind: str, obj: Any) -> None:
    """The object has every member its kind requires."""
    lacks = missing_members(kind, obj)
    assert not lacks, f"protocol law: {type(obj).__name__} lacks {', '.join(lacks)}, which every {kind} has"
    assert callable(getattr(obj, "fetch", print)), "protocol law: fetch is no method"
    own = {name for name, _ in obj.named_parameters()} if isinstance(obj, nn.Module) else set()
    strange = [name for name in getattr(obj, "without_decay", ()) if name not in own]
    assert not strange, f"protocol law: without_decay names {strange[0]}, which is no parameter"


def check_waived(waived: Mapping[str, str] | None, waivable: tuple[str, ...]) -> Mapping[str, str]:
    """The laws that are waived, each one that can be, with its reason."""
    waived = waived or {}
    strange = sorted(set(waived) - set(waivable))
    assert not strange, f"waived: {strange} cannot be waived; these can: {', '.join(waivable) or 'none'}"
    return waived


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise of a shape, the same at every call."""
    return torch.randn(*shape, generator=generator(seed, "check", *shape))


def stirred(module: Any) -> Any:
    """A copy in eval mode whose parameters are a little off: layers that start at zero would hide what they do."""
    module = copy.deepcopy(module)
    if isinstance(module, nn.Module):
        module.eval()
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                if parameter.is_floating_point():
                    parameter.add_(noise(*parameter.shape, seed=number).to(parameter), alpha=0.02)
    return module


def state_of(module: Any) -> dict[str, Tensor]:
    """A copy of a module's state; nothing for what is no module."""
    return {k: v.clone() for k, v in module.state_dict().items()} if isinstance(module, nn.Module) else {}


def same_state(before: Mapping, after: Mapping, law: str, tolerance: float = 0.0) -> None:
    """Both states hold the same tensors."""
    for name, value in before.items():
        off = (value.double() - after[name].double()).abs().max() if value.numel() else 0.0
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
    """Under autocast to bfloat16 `call(module)` is near the result in single precision."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = call(module).float()
    finite(found, "under autocast to bfloat16")
    off = float((found - wanted).norm() / wanted.norm().clamp(min=1e-6))
    assert off <= BF16_SHARE, (
        f"bf16 law: under autocast to bfloat16 the result differs by {off:.2g} of its norm; "
        f"at most {BF16_SHARE} is rounding"
    )


def check_restored(fresh: Any, module: Any, call: Any) -> None:
    """Another one, built with other random weights, computes the same once it has taken over the state dict."""
    if not isinstance(module, nn.Module):
        return
    restored = copy.deepcopy(fresh)
    restored.load_state_dict(module.state_dict())
    restored.eval()
    with torch.no_grad():
        same = torch.equal(call(restored), call(module))
    assert same, (
        "state law: the result differs after a state-dict round trip; what matters must be in the state"
    )


def check_gradients(module: nn.Module, skip: Iterable[str] = ()) -> None:
    """Every parameter that is trained has a finite gradient; distributed training waits for all of them."""
    unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None and n not in skip]
    assert not unused, (
        f"gradient law: no gradient reaches {unused[0]} ({len(unused)} in all); DDP waits for it"
    )
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert bool(torch.isfinite(parameter.grad).all()), f"gradient law: that of {name} is not finite"
