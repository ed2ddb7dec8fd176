"""Alignment of latents to a teacher and the balancer of gradients: closed forms, whole runs, bad input."""

import numpy as np
import pytest
import torch
from test_trainer import lines, train_killed
from torch import nn
from toys import run_config, toy  # noqa: F401

from vqcore.align import Alignment, aligned
from vqcore.balance import Balancer
from vqcore.errors import VqcoreError
from vqcore.trainer import train

MARGINS = (0.5, 0.25)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_alignment_is_the_formula_position_by_position():
    rng = np.random.default_rng(0)
    z, f = (rng.normal(size=(2, 2, 3, 5)) for _ in range(2))
    cosine, distances = [], []
    for a, b in zip(unit(z).reshape(2, 6, 5), unit(f).reshape(2, 6, 5)):
        for i in range(6):
            cosine.append(max(0.0, 1 - 0.5 - a[i] @ b[i]))
            distances += [max(0.0, abs(a[i] @ a[j] - b[i] @ b[j]) - 0.25) for j in range(6)]
    found = aligned(torch.from_numpy(z), torch.from_numpy(f), MARGINS)
    assert float(found["align/cosine"]) == pytest.approx(np.mean(cosine), rel=1e-9)
    assert float(found["align/distances"]) == pytest.approx(np.mean(distances), rel=1e-9)
    same = aligned(torch.from_numpy(z), 3 * torch.from_numpy(z), (0.0, 0.0))
    assert max(float(term) for term in same.values()) < 1e-12


class Pool(nn.Module):
    """A teacher: means of blocks of 4 x 4, through a frozen map."""

    def __init__(self, dim=6, flat=False):
        super().__init__()
        self.dim, self.flat = dim, flat
        self.net = nn.Conv2d(3, dim, 4, stride=4)

    def forward(self, x):
        found = self.net(x)
        return found.mean((2, 3)) if self.flat else found


def test_gradients_reach_latents_and_map_but_not_the_teacher():
    torch.manual_seed(0)
    align = Alignment(Pool(), dim=5, margins=MARGINS, adaptive=False).train()
    z, x = torch.randn(2, 4, 4, 5, requires_grad=True), torch.rand(2, 3, 16, 16)
    sum(align(z, x).values()).backward()
    assert float(z.grad.abs().max()) > 0 and float(align.head.weight.grad.abs().max()) > 0
    assert not align.teacher.training and all(p.grad is None for p in align.teacher.parameters())
    other = torch.randn(2, 2, 8, 5)
    assert align.features(x, (2, 8)).shape == (2, 2, 8, 6) and len(align(other, x)) == 2


@pytest.mark.parametrize(
    ("teacher", "z", "says"),
    [
        (Pool(flat=True), torch.zeros(2, 4, 4, 5), "the teacher gives 0 axes"),
        (Pool(), torch.zeros(2, 16, 5), "the latents have 1"),
    ],
)
def test_alignment_wants_two_maps(teacher, z, says):
    align = Alignment(teacher, dim=5, margins=MARGINS, adaptive=False)
    with pytest.raises(ValueError, match=says):
        align(z, torch.zeros(2, 3, 16, 16))


# Balancer


def slopes(y, sizes):
    """Terms whose gradient at a sample of `y` has a known norm: one channel each, so that they are orthogonal."""
    rows = y[0, 0].numel()
    return {
        name: (y[:, i] * size / rows**0.5).flatten(1).sum(1).mean()
        for i, (name, size) in enumerate(sizes.items())
    }


def test_weights_become_shares_of_the_gradient():
    """Gradients of norm 3 and 40,000 with weights 1 and 3 and a total of 2: norms of 0.5 and 1.5."""
    balancer, weights = Balancer(("a", "b", "c"), total=2.0), {"a": 1.0, "b": 3.0, "c": 5.0}
    for step in range(3):
        y = torch.randn(4, 2, 3, 3, requires_grad=True)
        terms = slopes(y, {"a": 3.0, "b": 4e4})
        factors = balancer(terms, weights, y, step)
        (slope,) = torch.autograd.grad(sum(weights[n] * factors[n] * terms[n] for n in terms), y)
        norms = 4 * slope.flatten(2).norm(dim=2).mean(0)
        assert norms.tolist() == pytest.approx([0.5, 1.5], rel=1e-5)
        assert factors.keys() == {"a", "b"}


def test_the_means_are_those_of_the_steps_before():
    balancer, sizes, decay = Balancer(("a",), decay=0.9), [1.0, 5.0, 2.0, 8.0], 0.9
    for step, size in enumerate(sizes):
        y = torch.randn(2, 1, 4, requires_grad=True)
        own = [float(balancer(slopes(y, {"a": s}), {"a": 1.0}, y, step)["a"]) for s in (size, size + 1)]
        before = [one + 0.5 for one in sizes[:step]]  # two micro-batches a step
        shares = [decay ** (step - 1 - i) for i in range(step)]
        mean = np.dot(shares, before) / sum(shares) if before else size
        assert own == pytest.approx([1 / mean] * 2, rel=1e-5)


def test_a_late_term_starts_with_its_own_norm_and_bad_norms_are_left_out():
    balancer, y = Balancer(("a", "b"), decay=0.5), torch.randn(2, 2, 4, requires_grad=True)
    for step, (late, size) in enumerate([(0.0, 1.0), (1.0, 7.0), (1.0, float("inf")), (1.0, 7.0)]):
        found = balancer(slopes(y, {"a": 2.0, "b": size}), {"a": 1.0, "b": late}, y, step)
        if late and step != 2:
            assert float(found["b"]) == pytest.approx(1 / (2 * 7), rel=1e-5)
        assert float(found["a"]) == pytest.approx(1 / ((1 + late) * 2), rel=1e-5)


# Whole runs

RUNS = {
    "balance": {
        "objective": {"name": "reconstruction", "balance": 1.0, "adversary": {"name": "toy/gan", "start": 2}}
    },
    "align": {
        "objective": {
            "name": "reconstruction",
            "align": {"name": "toy/teacher"},
            "align_weight": "adaptive",
            "balance": 1.0,
            "weights": {"align/cosine": 0.1, "align/distances": {"0": 0.0, "3": 0.1}},
        },
        "optim__accumulate": 2,
    },
}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in list(RUNS)[:-1]), list(RUNS)[-1]]
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, name):
    train(run_config(tmp_path / "whole", **RUNS[name]))
    train_killed(monkeypatch, run_config(tmp_path / "killed", **RUNS[name]), 1, 3, 5)
    ends = [tmp_path / run / "checkpoints/step_6" for run in ("whole", "killed")]
    for file in ("model.safetensors", "state.safetensors", "state.json"):
        one, other = [(end / file).read_bytes() for end in ends]
        assert one == other, file
    logged = [line for line in lines(tmp_path / "whole") if "loss" in line]
    assert logged == [line for line in lines(tmp_path / "killed") if "loss" in line]
    assert all("factor/pixel/mse" in line for line in logged)
    if name == "balance":
        assert ["factor/gan/generator" in line for line in logged] == [False] * 2 + [True] * 4
    else:
        assert all("loss/align/distances" in line for line in logged)
        assert logged[0]["factor/align/cosine"] == 1 != logged[1]["factor/align/cosine"]
        assert "objective.align.head.weight" not in (ends[0] / "model.safetensors").read_bytes().decode(
            "latin-1"
        )


BAD = [
    ({"balance": 0.0}, r"balance=0.0 must be above 0|balance: 0.0 must be above 0"),
    ({"balance_decay": 0.9}, r"does nothing with balance=null"),
    ({"balance": 1.0, "balance_decay": 1.0}, r"must be at least 0 and below 1"),
    ({"align_margins": [0.5, 3.0]}, r"must lie in 0..2"),
    ({"align": {"name": "toy/teachr"}}, r"Did you mean 'toy/teacher'"),
]


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(("settings", "says"), BAD)
def test_settings_that_make_no_sense_are_one_line(tmp_path, settings, says):
    with pytest.raises(VqcoreError, match=says):
        run_config(tmp_path / "run", objective={"name": "reconstruction", **settings})
