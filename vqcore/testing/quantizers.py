"""The laws of a quantizer."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqcore.errors import ConfigError
from vqcore.protocols import NeedsFp32, fitter, grid_out
from vqcore.rng import generator
from vqcore.testing.basics import check_members, check_waived, same_state, state_of

GRIDS = ((7,), (3, 4), (2, 3, 2), (1,), (1, 1))
WAIVABLE = ("position-wise", "idempotent", "gradient")
"""Laws that can be waived."""


def check_quantizer(quantizer: Any, *, waived: Mapping[str, str] | None = None) -> None:
    """The laws of a quantizer. `waived` maps laws of `WAIVABLE` that it does not follow to the reason.

    A quantizer that is fitted is fitted to noise first.
    """
    waived = check_waived(waived, WAIVABLE)
    check_members("quantizer", quantizer)
    module = copy.deepcopy(quantizer) if fitter(quantizer) is None else _fitted(quantizer)
    for grid in GRIDS:
        _quantizer_shapes(module, grid)
    z = _latents(module, (4, 3, 4))
    module.train()
    module(z)  # a codebook may be initialised from the first batch
    module.eval()
    before = state_of(module)
    out = module(z)
    same_state(before, state_of(module), "eval changes no state")
    _quantizer_eval(module, z, out, waived)
    _quantizer_names(module, z, out)
    if "gradient" not in waived:
        _quantizer_gradient(module, z)
    _quantizer_masks(module, z)
    _quantizer_autocast(module, z, out)
    _quantizer_empty(module, z)
    _quantizer_state(quantizer, module, z, out)
    _quantizer_range(module, out.codes)


def _fitted(fresh: Any) -> Any:
    """A fitted copy of a quantizer that is fitted, and the laws of `fit`."""
    z = _latents(fresh, (8, 8, 8))
    for what, call in {"a call": fresh, "decode": _zeros_decoded}.items():
        try:
            call(z) if what == "a call" else call(fresh, z)
        except ConfigError:
            continue
        except Exception as error:
            raise AssertionError(
                f"fit law: before fit, {what} raises {type(error).__name__}: {error}; raise ConfigError"
            ) from error
        raise AssertionError(f"fit law: before fit, {what} raises nothing; raise ConfigError")
    mask = torch.ones(z.shape[:-1], dtype=torch.bool)
    mask[:, 0] = False
    made = []
    for fill in (0.0, 1000.0):
        module, filled = copy.deepcopy(fresh), z.clone()
        filled[:, 0] = fill
        given = filled.clone()
        facts = module.fit(_Again(filled, mask), generator(0, "check"))
        assert torch.equal(given, filled), "purity law: fit changes the latents"
        strange = [key for key, value in facts.items() if not isinstance(value, str)]
        assert not strange, f"fit law: the fact {strange[0]} is no text"
        assert bool(module.fitted), "fit law: fitted is not True after fit"
        made.append(module)
    same_state(
        state_of(made[0]), state_of(made[1]), "fit law: invalid positions, or a second fit, change the state"
    )
    return made[0]


def _zeros_decoded(module: Any, z: Tensor) -> Tensor:
    shape = (len(z), *grid_out(module, tuple(z.shape[1:-1])), module.num_codebooks)
    return module.decode(torch.zeros(shape, dtype=torch.int64))


class _Again:
    """Latents with their mask in two batches, as often as they are asked for."""

    def __init__(self, z: Tensor, mask: Tensor):
        self.z, self.mask = z, mask

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.z.chunk(2), self.mask.chunk(2))


def _quantizer_shapes(module: Any, grid: tuple[int, ...]) -> None:
    z = _latents(module, (3, *grid))
    module.train()
    module(z)
    module.eval()
    out = module(z)
    wanted, found = (3, *grid_out(module, grid), module.num_codebooks), tuple(out.codes.shape)
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
            assert value.ndim == 0, f"names law: {name} is not a scalar but of shape {tuple(value.shape)}"
            assert bool(torch.isfinite(value)), f"names law: {name} is {float(value)}"


def _quantizer_gradient(module: Any, z: Tensor) -> None:
    module = copy.deepcopy(module).train()
    z = z.clone().requires_grad_()
    out = module(z)
    weight = torch.randn(out.z_q.shape, generator=generator(3, "check"))
    (out.z_q * weight).sum().backward()
    assert z.grad is not None and bool(torch.isfinite(z.grad).all()), (
        "gradient law: no gradient at z, or it is not finite"
    )
    assert float(z.grad.abs().max()) > 0, "gradient law: the gradient that reaches z is zero"


def _quantizer_masks(module: Any, z: Tensor) -> None:
    """Invalid positions change neither losses nor statistics."""
    mask = torch.ones(z.shape[:-1], dtype=torch.bool)
    mask[:, 0] = False
    results = []
    for fill in (0.0, 1000.0):
        trained = copy.deepcopy(module).train()
        filled = z.clone()
        filled[:, 0] = fill
        torch.manual_seed(0)
        results.append((trained(filled, mask).losses, state_of(trained)))
    (losses, state), (other_losses, other_state) = results
    whole = copy.deepcopy(module).eval()
    valid = torch.ones_like(mask)
    assert torch.equal(whole(z, valid).codes, whole(z).codes), "mask law: a mask of all True changes codes"
    for name, value in losses.items():
        same = torch.allclose(value, other_losses[name], atol=1e-6)
        assert same, f"mask law: invalid positions change {name}"
    same_state(state, other_state, "mask law: invalid positions change the state", tolerance=1e-6)


def _quantizer_autocast(module: Any, z: Tensor, out: Any) -> None:
    """Latents in bfloat16 have codes too: an encoder under autocast returns such latents."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        coarse = module(z.bfloat16())
    same = coarse.codes.dtype == torch.int64 and coarse.codes.shape == out.codes.shape
    assert same, f"bf16 law: codes of bfloat16 latents are {coarse.codes.dtype} {tuple(coarse.codes.shape)}"
    assert bool(torch.isfinite(coarse.z_q).all()), "bf16 law: z_q of bfloat16 latents is not finite"
    wants = module.codes_in_fp32 if isinstance(module, NeedsFp32) else False
    assert isinstance(wants, bool), f"fp32 law: codes_in_fp32 is {wants!r}, neither True nor False"
    if wants:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            same = torch.equal(module(z).codes, out.codes)
        assert same, "fp32 law: codes_in_fp32, but under autocast latents in fp32 have other codes"


def _quantizer_empty(module: Any, z: Tensor) -> None:
    """A batch without samples is a batch: the last part of a pass may be one."""
    grid = grid_out(module, tuple(z.shape[1:-1]))
    wanted = {"z_q": z[:0].shape, "codes": (0, *grid, module.num_codebooks), "decode": z[:0].shape}
    codes: Any = None
    for name in wanted:
        try:
            made = module.decode(codes) if name == "decode" else getattr(module(z[:0]), name)
        except Exception as error:
            raise AssertionError(
                f"empty law: a batch without samples raises {type(error).__name__}: {error}"
            ) from error
        found, codes = tuple(made.shape), made
        assert found == wanted[name], (
            f"empty law: {name} of no sample: the shape is {found}, not {tuple(wanted[name])}"
        )


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
        assert str(module.codebook_size) in text, f"bounds law: the error does not name the bound: {text}"
        return
    raise AssertionError(f"bounds law: decode accepts code {module.codebook_size}; it must raise ValueError")


def _latents(quantizer: Any, shape: tuple[int, ...]) -> Tensor:
    seed = generator(math.prod(shape), "check")
    return torch.randn(*shape, quantizer.dim, generator=seed)
