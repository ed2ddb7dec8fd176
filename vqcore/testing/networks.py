"""The laws of networks: encoders, decoders, denoisers, perceptual losses, discriminators, teachers."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqcore.borrowed import Lender, weights_of
from vqcore.errors import VqcoreError, reason
from vqcore.network import closed_unless_asked
from vqcore.protocols import borrowed, interpolated, needs_size
from vqcore.rng import generator
from vqcore.testing.basics import (
    check_bf16,
    check_gradients,
    check_members,
    check_restored,
    close,
    finite,
    noise,
    same_state,
    state_of,
    stirred,
)


def check_encoder(encoder: Any, x: Tensor, *, fresh: Any = None) -> None:
    """The laws of an encoder on a batch `x` of at least two samples; `fresh` is an encoder with other weights."""
    check_members("encoder", encoder)
    module, size = stirred(encoder), tuple(x.shape[2:])
    _check_network(module, encoder if fresh is None else fresh, x, "a sample's latents change in a batch")
    with torch.no_grad():
        wanted, found = (len(x), *module.grid(size), module.dim), tuple(module(x).shape)
    assert found == wanted, f"shape law: latents are {found}, grid and dim say {wanted}"
    for axis in range(len(size)):
        _check_grid(module, x, tuple(side + (i == axis) for i, side in enumerate(size)))
    _check_interpolated(module)
    z = module(x)
    if z.requires_grad:  # a frozen encoder has no gradient
        z.square().mean().backward()
        check_gradients(module)


def check_decoder(decoder: Any, z_q: Tensor, shape: tuple[int, ...], *, fresh: Any = None) -> None:
    """The laws of a plain decoder: `shape` is the shape of a batch of outputs for `z_q`."""
    check_members("decoder", decoder)
    module = stirred(decoder)
    sized = {"size": shape[2:]} if needs_size(module) else {}
    _check_network(
        module, decoder if fresh is None else fresh, z_q, "a sample's output changes in a batch", **sized
    )
    with torch.no_grad():
        found = tuple(module(z_q, **sized).shape)
    assert found == shape, f"shape law: the output is {found}, not {shape}"
    _check_interpolated(module)
    module(z_q, **sized).square().mean().backward()
    _check_last_layer(module)
    check_gradients(module)


def check_denoiser(
    denoiser: Any,
    z_q: Tensor,
    shape: tuple[int, ...],
    *,
    times: tuple[float, float] = (1.0, 500.0),
    fresh: Any = None,
) -> None:
    """The laws of a denoiser: `shape` is the shape of a batch of samples for `z_q`, `times` are two noise levels."""
    check_members("decoder", denoiser)
    assert denoiser.is_denoiser is True, "protocol law: is_denoiser is not True"
    module, size = stirred(denoiser), shape[2:]
    x, t = noise(*shape, seed=1), torch.linspace(*times, len(z_q))
    with torch.no_grad():
        y = _check_target(module, x, size)

        def predict(net: Any, rows: slice = slice(None), z: Tensor = z_q, **hidden: Tensor) -> Tensor:
            return net(y[rows], t[rows], net.condition(z[rows], size=size, **hidden))

        whole = predict(module)
        assert whole.shape == y.shape, (
            f"shape law: the prediction is {tuple(whole.shape)}, not {tuple(y.shape)}"
        )
        finite(whole, "the prediction")
        assert torch.equal(predict(module), whole), "determinism law: two calls in eval mode differ"
        alone = torch.cat([predict(module, slice(i, i + 1)) for i in range(len(z_q))])
        close(alone, whole, "batch law: a sample's prediction changes in a batch")
        _check_hiding(module, predict, z_q, whole)
        check_bf16(module, predict, whole)
        check_restored(denoiser if fresh is None else fresh, module, predict)
    predict(module).square().mean().backward()
    _check_last_layer(module)
    check_gradients(module)


def check_percept(percept: Any, x_hat: Tensor, x: Tensor) -> None:
    """The laws of a perceptual loss on two different batches of at least two samples."""
    check_members("percept", percept)
    _check_frozen(percept)
    module = copy.deepcopy(percept)
    before = state_of(module)
    if isinstance(module, nn.Module):
        module.train()  # the module around it may be in training mode
    moving = x_hat.clone().requires_grad_()
    distance = module(moving, x)
    found = tuple(distance.shape)
    assert found == (len(x),), f"shape law: distances are {found}, not one per sample, {(len(x),)}"
    finite(distance, "the distance")
    assert bool((distance > 0).all()), (
        f"distance law: the distance of different samples is {float(distance.min()):.2g}"
    )
    assert distance.requires_grad, "gradient law: no gradient reaches x_hat"
    (slope,) = torch.autograd.grad(distance.sum(), moving, materialize_grads=True)
    finite(slope, "the gradient at x_hat")
    assert float(slope.abs().max()) > 0, "gradient law: the gradient at x_hat is zero"
    with torch.no_grad():
        zero = float(module(x, x).abs().max())
        assert zero <= 1e-5, f"distance law: the distance of a sample from itself is {zero:.2g}, not 0"
        assert torch.equal(module(x_hat, x), distance.detach()), "determinism law: two calls differ"
        alone = torch.cat([module(x_hat[i : i + 1], x[i : i + 1]) for i in range(len(x))])
    close(alone, distance.detach(), "batch law: a sample's distance changes in a batch")
    same_state(before, state_of(module), "a call changes no state")


def check_discriminator(discriminator: Any, x: Tensor, *, fresh: Any = None) -> None:
    """The laws of a discriminator on a batch of at least two samples."""
    check_members("discriminator", discriminator)
    module = stirred(discriminator)
    fresh = discriminator if fresh is None else fresh
    _check_network(module, fresh, x, "a sample's logits change in a batch (in eval mode)")
    moving = x.clone().requires_grad_()
    logits = module(moving)
    assert len(logits) == len(x), f"shape law: {len(logits)} logits for {len(x)} samples"
    logits.square().mean().backward()
    slope = torch.zeros(()) if moving.grad is None else moving.grad
    assert float(slope.abs().max()) > 0, (
        "gradient law: no gradient reaches x, or it is zero; a decoder learns from this gradient"
    )
    check_gradients(module)


def check_adversary(adversary: Any, x_hat: Tensor, x: Tensor, *, fresh: Any = None) -> None:
    """The laws of an adversary on reconstructions `x_hat` of a batch `x` of at least two samples."""
    check_members("adversary", adversary)
    assert isinstance(adversary, nn.Module), (
        "players law: the adversary is no module, so it cannot be a player"
    )
    start: Any = adversary.start
    assert start >= 0, f"start law: start is {start}, not a step"
    module, rng = stirred(adversary), [generator(i, "check") for i in range(len(x))]

    def judge(net: Any) -> Tensor:
        out = net.discriminator(x_hat, x, mask=None, step=10**6, rng=_again(rng))
        return _sum_of(out, "discriminator")

    def fool(net: Any, shown: Tensor) -> Tensor:
        out = net.generator(shown, x, mask=None, step=10**6, rng=_again(rng))
        return _sum_of(out, "generator")

    before = state_of(module)
    with torch.no_grad():
        assert torch.equal(judge(module), judge(module)), "determinism law: two calls in eval mode differ"
        assert torch.equal(fool(module, x_hat), fool(module, x_hat)), (
            "determinism law: two calls of generator in eval mode differ"
        )
        check_restored(adversary if fresh is None else fresh, module, judge)
    same_state(before, state_of(module), "eval changes no state")
    moving = x_hat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fool(module, moving), moving, materialize_grads=True)
    assert float(slope.abs().max()) > 0, (
        "gradient law: no gradient of generator reaches x_hat, or it is zero; the model learns from this gradient"
    )
    module.zero_grad()
    judge(module).backward()
    check_gradients(module)


def _again(rng: list[torch.Generator]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(one.initial_seed()) for one in rng]


def _sum_of(out: Any, turn: str) -> Tensor:
    strange = [name for name in out.terms if not name.startswith("gan/")]
    assert out.terms and not strange, (
        f"names law: losses of {turn} are called gan/..., not {strange or 'nothing'}"
    )
    for name, term in out.terms.items():
        assert term.ndim == 0, f"names law: {name} is not a scalar but of shape {tuple(term.shape)}"
        finite(term, name)
    return torch.stack(list(out.terms.values())).sum()


def check_borrowed(make: Callable[[], Any], places: Mapping[str, str]) -> None:
    """The laws of a module that borrows weights: `make` builds the module, `places` says where its weights lie."""
    module, other = make(), make()
    names = borrowed(module)
    strange = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
    assert names and not strange, (
        f"borrowing law: borrowed names {strange or 'nothing'}, which is no submodule"
    )
    try:
        with closed_unless_asked():
            make().borrow({})
    except VqcoreError:
        pass
    except Exception as error:
        raise AssertionError(
            f"borrowing law: without a place, borrow raises {reason(error)}; raise CheckpointError instead"
        ) from error
    loans = Lender({f"part.{name}": place for name, place in places.items()}).lend({"part": module})
    again = other.borrow(dict(places))
    for name in names:
        assert loans[f"part.{name}"]["sha256"] == again[name], (
            f"borrowing law: two modules with the same weights have different hashes of '{name}'"
        )
        for (key, a), (_, b) in zip(
            getattr(module, name).state_dict().items(), getattr(other, name).state_dict().items()
        ):
            assert torch.equal(a, b), f"borrowing law: borrow does not fill {name}.{key} from the file"
    lent = {t.data_ptr() for name in names for t in getattr(module, name).state_dict().values() if t.numel()}
    for key, tensor in weights_of(module).items():
        assert tensor.data_ptr() not in lent, (
            f"borrowing law: {key} is borrowed, and would be saved under this name"
        )


def check_teacher(teacher: Any, x: Tensor) -> None:
    """The laws of a frozen feature network on a batch of at least two samples."""
    check_members("teacher", teacher)
    _check_frozen(teacher)
    module = copy.deepcopy(teacher)
    if isinstance(module, nn.Module):
        module.train()
    before, given = state_of(module), x.clone()
    with torch.no_grad():
        features = module(x)
        assert len(features) == len(x) and module.dim in features.shape[1:], (
            f"shape law: features are {tuple(features.shape)}, with {len(x)} samples and dim {module.dim}"
        )
        finite(features, "features")
        assert torch.equal(module(x), features), (
            "determinism law: two calls differ; a frozen network is deterministic in training mode too"
        )
        alone = torch.cat([module(x[i : i + 1]) for i in range(len(x))])
    close(alone, features, "batch law: a sample's features change in a batch")
    assert torch.equal(given, x), "purity law: the input is changed"
    same_state(before, state_of(module), "a call changes no state")


def _check_network(module: Any, fresh: Any, x: Tensor, batch_law: str, **sized: Any) -> None:
    """The laws of every map from a batch to a batch; `fresh` has other weights."""
    before, given = state_of(module), x.clone()

    def call(net: Any) -> Tensor:
        return net(x, **sized)

    with torch.no_grad():
        y = call(module)
        finite(y, "the output")
        assert torch.equal(call(module), y), "determinism law: two calls in eval mode differ"
        alone = torch.cat([module(x[i : i + 1], **sized) for i in range(len(x))])
        close(alone, y, f"batch law: {batch_law}")
    assert torch.equal(given, x), "purity law: the input is changed"
    same_state(before, state_of(module), "eval changes no state")
    check_bf16(module, call, y)
    check_restored(fresh, module, call)


def _check_grid(module: Any, x: Tensor, size: tuple[int, ...]) -> None:
    """`grid` accepts a size and the encoder makes this grid, or `grid` refuses the size with both numbers."""
    try:
        grid = module.grid(size)
    except ValueError as error:
        numbers = re.findall(r"\d+", str(error))
        both = len(set(numbers)) >= 2 and any(str(side) in numbers for side in size)
        assert both, (
            f"grid law: grid({size}) refuses without both numbers, the side and the number it must fit: {error}"
        )
        return
    except Exception as error:
        raise AssertionError(
            f"grid law: grid({size}) raises {type(error).__name__}: {error}; raise ValueError for an unfit size"
        ) from error
    x = noise(1, x.shape[1], *size)
    with torch.no_grad():
        try:
            found = tuple(module(x).shape)
        except Exception as error:
            raise AssertionError(
                f"grid law: grid({size}) is {grid}, but the encoder cannot take it: {error}"
            ) from error
    wanted = (1, *grid, module.dim)
    assert found == wanted, f"grid law: grid({size}) is {grid}, but the latents are {found}"


def _check_interpolated(module: Any) -> None:
    for name in interpolated(module):
        shape = tuple(state_of(module)[name].shape) if name in state_of(module) else None
        assert shape is not None and shape[0] == 1 and len(shape) >= 3, (
            f"state law: interpolated names {name}, which is {shape or 'not in the state'}, not (1, d, *grid)"
        )


def _check_last_layer(module: Any) -> None:
    names = [name for name in module.state_dict() if name.endswith("last_layer")]
    assert not names, "state law: last_layer is a second name in the state dict; make last_layer a property"
    is_lent = bool(borrowed(module)) and not module.last_layer.requires_grad  # then no adversary can be used
    assert is_lent or module.last_layer.grad is not None, "gradient law: no gradient reaches last_layer"


def _check_frozen(module: Any) -> None:
    if isinstance(module, nn.Module):
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        assert not trained, f"frozen law: {trained[0]} requires a gradient; no parameter may be trained"


def _check_target(module: Any, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The target space: its shape, `to_target` with one generator per sample, `from_target`."""

    def target() -> Tensor:
        return module.to_target(x, [generator(i, "check") for i in range(len(x))])

    y, wanted = target(), (len(x), *module.target_shape(size))
    assert tuple(y.shape) == wanted, (
        f"target law: to_target gives {tuple(y.shape)}, target_shape says {wanted}"
    )
    assert torch.equal(target(), y), "target law: to_target has another source of randomness than rng"
    back = module.from_target(y, size)
    assert back.shape == x.shape, f"target law: from_target gives {tuple(back.shape)}, not {tuple(x.shape)}"
    finite(back, "from_target")
    return noise(*y.shape, seed=2)


def _check_hiding(module: Any, predict: Any, z_q: Tensor, whole: Tensor) -> None:
    """Hidden tokens do not matter, visible tokens do; a mask of all False changes nothing."""
    other = noise(*z_q.shape, seed=3)
    assert not torch.allclose(predict(module, z=other), whole), (
        "condition law: the prediction does not depend on z_q"
    )
    nothing = torch.zeros(z_q.shape[:-1], dtype=torch.bool)
    close(predict(module, mask=nothing), whole, "condition law: a mask of all False changes the prediction")
    some = nothing.clone()
    some.flatten(1)[:, ::2] = True
    mixed = torch.where(some.unsqueeze(-1), other, z_q)
    close(
        predict(module, z=mixed, mask=some),
        predict(module, mask=some),
        "condition law: a hidden token changes the prediction",
    )
    close(
        predict(module, z=other, mask=~nothing),
        predict(module, mask=~nothing),
        "condition law: with all tokens hidden the prediction still depends on them",
    )
