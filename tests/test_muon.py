"""`optim.name: muon` against torch's Muon and AdamW, each on the part that is its own."""

import copy

import pytest
import torch
from torch import nn

from vqcore.run import muon
from vqcore.run.muon import Muon, orthogonal
from vqcore.run.optim import build_optimizer, parameter_groups
from vqcore.schema import OptimSection


class Mixed(nn.Module):
    """One of each: matrices of two shapes, a kernel, vectors, a table and a parameter that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.wide, self.tall, self.again = nn.Linear(12, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.kernel = nn.Conv2d(4, 6, 3)
        self.table = nn.Embedding(5, 12)
        self.idle = nn.Parameter(torch.ones(3, 3))


def mixed(seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed()


def give_gradients(module: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.grad = None if name == "idle" else torch.randn(p.shape, generator=draw)


def build(module: nn.Module, **settings) -> torch.optim.Optimizer:
    optimizer = build_optimizer(OptimSection(name="muon", lr=1.0, **settings), module)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return optimizer


@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (8, 8), (1, 5)])
def test_singular_values_end_near_one(shape):
    values = torch.linalg.svdvals(
        orthogonal(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))
    )
    assert bool(((values > 0.6) & (values < 1.25)).all())


@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (7, 7)])
@pytest.mark.parametrize("rank", [1, 2, 6])
def test_the_iteration_is_the_published_one(shape, rank):
    draw = torch.Generator().manual_seed(0)
    m = torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw)
    x = m.double() / m.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    assert torch.allclose(orthogonal(m[None])[0].double(), x, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
def test_rounding_does_not_grow(steps, noise):
    draw = torch.Generator().manual_seed(0)
    m = torch.randn(64, 1, generator=draw) @ torch.randn(1, 576, generator=draw)
    m = m + noise * torch.randn(64, 576, generator=draw)
    x = m.double() / m.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    off = (orthogonal(m[None], steps)[0].double() - x).norm() / x.norm()
    assert (
        float(off) < 0.05
    )  # of rank one, ten steps blow up what is 0 but for rounding; published or gathered alike


def test_directions_stay():
    x = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x[0], full_matrices=False)
    inside = u.T @ orthogonal(x)[0] @ v.T
    assert torch.allclose(inside, inside.diagonal().diag(), atol=1e-4)


def test_no_gradient_at_all_changes_nothing():
    assert torch.equal(orthogonal(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_matrices_as_torch_does():
    ours, theirs = mixed(), mixed()
    optimizer = build(ours, weight_decay=0.3)
    matrices = [theirs.wide.weight, theirs.tall.weight, theirs.again.weight]
    reference = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        optimizer.step()
        reference.step()
    start = mixed()
    for name in ("wide", "tall", "again"):
        mine, other, was = (getattr(module, name).weight for module in (ours, theirs, start))
        # theirs iterates in bf16
        change = (other - was).detach()
        assert torch.allclose(mine - was, change, atol=0.02 * float(change.abs().max())), name


def test_a_kernel_is_a_matrix_of_its_outputs():
    module, flat = mixed(), mixed().kernel.weight.detach().flatten(1).requires_grad_()
    optimizer = build(module)
    alone = Muon([{"params": [flat], "matrices": True, "weight_decay": 0.05}], lr=0.01)
    give_gradients(module, 0)
    flat.grad = module.kernel.weight.grad.flatten(1)
    optimizer.step()
    alone.step()
    assert torch.allclose(module.kernel.weight.flatten(1), flat, atol=1e-6)


def test_the_rest_as_adamw_to_the_bit():
    ours, theirs = mixed(), mixed()
    optimizer = build(ours, betas=(0.8, 0.95), eps=1e-6)
    names = [n for n, p in theirs.named_parameters() if p.ndim < 2 or n == "table.weight"]
    rest = [dict(theirs.named_parameters())[name] for name in names]
    reference = torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        optimizer.step()
        reference.step()
    for name in names:
        assert torch.equal(dict(ours.named_parameters())[name], dict(theirs.named_parameters())[name]), name


def test_updates_are_as_long_as_the_rms_says():
    module = mixed()
    before = module.wide.weight.detach().clone()
    optimizer = build(module, weight_decay=0.0, args={"rms": 0.4, "momentum": 0.0})
    give_gradients(module, 0)
    optimizer.step()
    found = (module.wide.weight.detach() - before).square().mean().sqrt() / 0.01
    assert 0.4 * 0.65 < float(found) < 0.4 * 1.25


def test_what_has_no_gradient_stays():
    module = mixed()
    optimizer = build(module)
    give_gradients(module, 0)
    optimizer.step()
    assert torch.equal(module.idle, torch.ones(3, 3)) and module.idle not in optimizer.state


def test_a_loaded_state_goes_on_to_the_bit():
    whole, parts = mixed(), mixed()
    one, first = build(whole), build(parts)
    for seed in range(4):
        give_gradients(whole, seed)
        one.step()
    for seed in range(2):
        give_gradients(parts, seed)
        first.step()
    second = build(parts)
    second.load_state_dict(first.state_dict())
    for seed in range(2, 4):
        give_gradients(parts, seed)
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_copy_goes_on_alike():
    module = mixed()
    optimizer = build(module)
    for seed in range(2):
        give_gradients(module, seed)
        optimizer.step()
    twin, again = copy.deepcopy((module, optimizer))
    for one, its in ((module, optimizer), (twin, again)):
        give_gradients(one, 2)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def test_tensors_of_one_row_are_no_matrices():
    module = nn.Linear(4, 3)
    module.positions = nn.Parameter(torch.randn(1, 4, 2, 2))
    groups = parameter_groups(module, 0.1)
    assert [(len(g["params"]), g["weight_decay"], g.get("matrices", False)) for g in groups] == [
        (1, 0.1, True), (1, 0.1, False), (1, 0.0, False)
    ]  # fmt: skip
    assert groups[1]["params"][0] is module.positions


def test_stacks_are_bounded(monkeypatch):
    sizes, whole, parts = [], mixed(), mixed()
    give_gradients(whole, 0)
    give_gradients(parts, 0)
    build(whole).step()
    monkeypatch.setattr(muon, "_STACKED", 100)
    monkeypatch.setattr(muon, "orthogonal", lambda m, n: sizes.append(m.numel()) or orthogonal(m, n))
    build(parts).step()
    assert max(sizes) == 6 * 36  # one kernel alone is larger
    assert sorted(sizes) == [72, 72, 72, 216]
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(whole.parameters(), parts.parameters(), strict=True)
    )


def test_matrices_without_gradients_are_left():
    module = nn.Linear(3, 3)
    module.bias.grad = torch.ones(3)
    before = module.weight.detach().clone()
    build(module).step()
    assert torch.equal(module.weight, before)


def test_matrices_alone_need_no_adamw():
    module = nn.Linear(4, 4, bias=False)
    module.weight.grad = torch.randn(4, 4)
    before = module.weight.detach().clone()
    build(module).step()
    assert not torch.equal(module.weight, before)


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"rms": 0.0}, {"ns_steps": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Muon(parameter_groups(mixed(), 0.0), **wrong)
