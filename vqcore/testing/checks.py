"""The laws of each kind, as functions that raise `AssertionError` with the law, the input and what was found.

They draw their own inputs from fixed seeds and need no pytest.
"""

import copy
import dataclasses
import math
import os
import subprocess
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqcore.config import Config, settings
from vqcore.errors import VqcoreError
from vqcore.protocols import missing_members
from vqcore.registry import Registry
from vqcore.rng import generator

HEAVY = ("torch", "numpy", "omegaconf", "PIL", "einops")
GRIDS = ((7,), (3, 4), (2, 3, 2), (1,), (1, 1))
WAIVABLE = ("position-wise", "idempotent", "gradient")


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


def check_plugin(registry: Registry, id: str) -> list[str]:
    """Everything that can be checked of a plugin cheaply; returns what is wrong, one line each."""
    failures: list[str] = []
    plugin, origin = registry.plugin(id), registry.origin(id)
    unknown = dict.fromkeys(WAIVABLE, "only the component's own tests know whether it claims this law")

    def attempt(label: str, check: Any, *args: Any) -> None:
        try:
            check(*args)
        except (AssertionError, VqcoreError) as error:
            failures.append(f"{label}: {error}")
        except Exception as error:
            failures.append(f"{label}: {type(error).__name__}: {error}")

    if not origin.digest:  # a --plugin file may import what it likes
        attempt(id, check_manifest, origin.module, tuple(c.target for c in plugin.components))
    for component in plugin.components:
        name = component.name if id == "core" else f"{id}/{component.name}"
        try:
            cls: Any = registry.load(component.kind, name)
        except VqcoreError as error:
            failures.append(f"{name}: {error}")
            continue
        attempt(name, check_config, cls)
        if component.kind == "quantizer" and not _required(cls.Config):
            attempt(
                name, lambda cls=cls, name=name: check_quantizer(cls(cls.Config(name=name)), waived=unknown)
            )
    return failures


def check_members(kind: str, obj: Any) -> None:
    """The object has every member its kind requires."""
    lacks = missing_members(kind, obj)
    assert not lacks, f"protocol law: {type(obj).__name__} lacks {', '.join(lacks)}, which every {kind} has"


def check_quantizer(quantizer: Any, *, waived: Mapping[str, str] | None = None) -> None:
    """The laws of a quantizer. `waived` maps the laws of `WAIVABLE` that it does not claim to the reason."""
    waived = waived or {}
    strange = sorted(set(waived) - set(WAIVABLE))
    assert not strange, f"waived: {strange} cannot be waived; these can: {', '.join(WAIVABLE)}"
    check_members("quantizer", quantizer)
    module = copy.deepcopy(quantizer)
    for grid in GRIDS:
        _quantizer_shapes(module, grid)
    z = _latents(module, (4, 3, 4))
    module.train()
    module(z)  # a codebook that is initialised from data now is
    module.eval()
    before = _state(module)
    out = module(z)
    _same_state(before, _state(module), "eval changes no state")
    _quantizer_eval(module, z, out, waived)
    _quantizer_names(module, z, out)
    if "gradient" not in waived:
        _quantizer_gradient(module, z)
    _quantizer_masks(module, z)
    _quantizer_state(quantizer, module, z, out)
    _quantizer_range(module, out.codes)


def _quantizer_shapes(module: Any, grid: tuple[int, ...]) -> None:
    z = _latents(module, (3, *grid))
    module.train()
    module(z)
    module.eval()
    out = module(z)
    grid_out = getattr(module, "grid_out", lambda grid: grid)(grid)
    wanted, found = (3, *grid_out, module.num_codebooks), tuple(out.codes.shape)
    assert found == wanted, f"shape law: codes are {found}, not {wanted}, for {grid}"
    assert out.z_q.shape == z.shape, f"shape law: z_q is {tuple(out.z_q.shape)}, not {tuple(z.shape)}"
    assert out.codes.dtype == torch.int64, f"shape law: codes are {out.codes.dtype}, not int64"


def _quantizer_eval(module: Any, z: Tensor, out: Any, waived: Mapping[str, str]) -> None:
    low, high = int(out.codes.min()), int(out.codes.max())
    assert 0 <= low <= high < module.codebook_size, (
        f"range law: codes {low}..{high}, size {module.codebook_size}"
    )
    decoded = module.decode(out.codes)
    off = float((decoded - out.z_q).abs().max())
    assert off <= 1e-5, f"inverse law: decode(codes) differs from z_q by {off:.2g} in eval mode"
    alone = torch.cat([module(z[i : i + 1]).codes for i in range(len(z))])
    assert torch.equal(alone, out.codes), "batch law: a sample's codes depend on the samples beside it"
    if "position-wise" not in waived:
        moved = module(z.flip(1)).codes.flip(1)
        assert torch.equal(moved, out.codes), "position law: permuting positions does not permute codes"
    if "idempotent" not in waived:
        again = module(out.z_q).codes
        assert torch.equal(again, out.codes), "idempotence law: quantizing z_q gives other codes"


def _quantizer_names(module: Any, z: Tensor, out: Any) -> None:
    train = copy.deepcopy(module).train()(z)
    for what in ("losses", "metrics"):
        here, there = set(getattr(out, what)), set(getattr(train, what))
        assert here == there, (
            f"names law: {what} are {sorted(here)} in eval mode, {sorted(there)} in training"
        )
        for name, value in {**getattr(out, what), **getattr(train, what)}.items():
            assert value.ndim == 0, f"names law: {name} is no scalar but of shape {tuple(value.shape)}"
            assert bool(torch.isfinite(value)), f"names law: {name} is {float(value)}"


def _quantizer_gradient(module: Any, z: Tensor) -> None:
    module = copy.deepcopy(module).train()
    z = z.clone().requires_grad_()
    out = module(z)
    weight = torch.randn(out.z_q.shape, generator=generator(3, "check"))
    (out.z_q * weight).sum().backward()
    assert z.grad is not None and bool(torch.isfinite(z.grad).all()), (
        "gradient law: none, or not finite, at z"
    )
    assert float(z.grad.abs().max()) > 0, "gradient law: the gradient that reaches z is zero"


def _quantizer_masks(module: Any, z: Tensor) -> None:
    """Positions that are masked out change neither losses nor statistics."""
    mask = torch.ones(z.shape[:-1], dtype=torch.bool)
    mask[:, 0] = False
    results = []
    for fill in (0.0, 1000.0):
        trained = copy.deepcopy(module).train()
        filled = z.clone()
        filled[:, 0] = fill
        torch.manual_seed(0)
        results.append((trained(filled, mask).losses, _state(trained)))
    (losses, state), (other_losses, other_state) = results
    for name, value in losses.items():
        same = torch.allclose(value, other_losses[name], atol=1e-6)
        assert same, f"mask law: masked positions change {name}"
    _same_state(state, other_state, "mask law: masked positions change the state", tolerance=1e-6)


def _quantizer_state(fresh: Any, module: Any, z: Tensor, out: Any) -> None:
    if not isinstance(module, nn.Module):
        return
    restored = copy.deepcopy(fresh)
    restored.load_state_dict(module.state_dict())
    restored.eval()
    assert torch.equal(restored(z).codes, out.codes), "state law: codes differ after a state-dict round trip"


def _quantizer_range(module: Any, codes: Tensor) -> None:
    wrong = codes.clone()
    wrong.view(-1)[0] = module.codebook_size
    try:
        module.decode(wrong)
    except ValueError as error:
        text = str(error)
        assert str(module.codebook_size) in text, f"bounds law: the error names no bound: {text}"
        return
    raise AssertionError(f"bounds law: decode takes code {module.codebook_size} without a ValueError")


def check_encoder(encoder: Any, x: Tensor) -> None:
    """The laws of an encoder on a batch `x` of at least two samples."""
    check_members("encoder", encoder)
    encoder = copy.deepcopy(encoder).eval()
    size = tuple(x.shape[2:])
    with torch.no_grad():
        z = encoder(x)
        wanted = (len(x), *encoder.grid(size), encoder.dim)
        assert tuple(z.shape) == wanted, f"shape law: latents are {tuple(z.shape)}, grid and dim say {wanted}"
        assert torch.equal(encoder(x), z), "determinism law: two calls in eval mode differ"
        alone = torch.cat([encoder(x[i : i + 1]) for i in range(len(x))])
    off, most = float((alone - z).abs().max()), 1e-4 * max(1.0, float(z.abs().max()))
    assert off <= most, f"batch law: a sample's latents change by {off:.2g} in a batch"


def check_decoder(decoder: Any, z_q: Tensor, shape: tuple[int, ...]) -> None:
    """The laws of a plain decoder: `shape` is that of a batch of outputs for `z_q`."""
    check_members("decoder", decoder)
    decoder = copy.deepcopy(decoder).eval()
    with torch.no_grad():
        x_hat = decoder(z_q)
        assert tuple(x_hat.shape) == shape, f"shape law: the output is {tuple(x_hat.shape)}, not {shape}"
        alone = torch.cat([decoder(z_q[i : i + 1]) for i in range(len(z_q))])
    off, most = float((alone - x_hat).abs().max()), 1e-4 * max(1.0, float(x_hat.abs().max()))
    assert off <= most, f"batch law: a sample changes by {off:.2g} in a batch"
    names = [name for name in decoder.state_dict() if name.endswith("last_layer")]
    assert not names, "state law: last_layer is a second name in the state dict; make it a property"
    decoder(z_q.clone().requires_grad_()).sum().backward()
    assert decoder.last_layer.grad is not None, "gradient law: no gradient reaches last_layer"


def check_modality(modality: Any, source: Any) -> None:
    """The laws of a modality on one sample that its `read` takes."""
    check_members("modality", modality)
    spec, rng = modality.spec, np.random.default_rng(0)
    raw = modality.read(source)
    extent = modality.extent(raw)
    assert len(extent) == spec.rank, f"extent law: {extent} has not the rank {spec.rank} of the spec"
    for draw in (None, rng, rng):
        view = modality.view(extent, spec.size, draw)
        x = modality.tensor(raw, view)
        lead = () if spec.labels is not None else (spec.channels,)
        wanted, found = (*lead, *spec.size), tuple(x.shape)
        assert found == wanted, f"shape law: {found}, not {wanted}"
        if spec.range and x.is_floating_point():
            low, high = float(x.min()), float(x.max())
            slack = 1e-3 * (spec.range[1] - spec.range[0])
            inside = spec.range[0] - slack <= low <= high <= spec.range[1] + slack
            assert inside, f"range law: values {low:.3g}..{high:.3g}, the spec says {spec.range}"
    assert modality.view(extent, spec.size, None) == modality.view(extent, spec.size, None), (
        "determinism law: the view for evaluation is not always the same"
    )
    shown = modality.show(modality.tensor(raw, modality.view(extent, spec.size, None)))
    assert shown is not None, "show law: show returns nothing"


def _latents(quantizer: Any, shape: tuple[int, ...]) -> Tensor:
    seed = generator(math.prod(shape), "check")
    return torch.randn(*shape, quantizer.dim, generator=seed)


def _state(module: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()} if isinstance(module, nn.Module) else {}


def _same_state(before: dict, after: dict, law: str, tolerance: float = 0.0) -> None:
    for name, value in before.items():
        off = (value.double() - after[name].double()).abs().max() if value.numel() else 0.0
        assert float(off) <= tolerance, f"state law: {law} ({name} moved by {float(off):.2g})"


def _required(config: type) -> list[str]:
    return [
        f.name
        for f in dataclasses.fields(config)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
