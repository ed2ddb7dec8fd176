"""Attention against its formula, the kernels against each other, and the choice of the kernel."""

import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import forget_attention, no_xformers, xformers  # noqa: F401

from vqcore.attention import attend, choose
from vqcore.errors import ConfigError


def noise(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(q, k, v, visible=None):
    """Softmax of scaled products, sample by sample and head by head, in NumPy; hidden keys are left out."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        seen = np.ones(k.shape[1], bool) if visible is None else visible[b].numpy()
        for h in range(q.shape[2]):
            weights = np.exp(q[b, :, h].numpy() @ k[b, seen, h].numpy().T / np.sqrt(q.shape[-1]))
            out[b, :, h] = weights / weights.sum(1, keepdims=True) @ v[b, seen, h].numpy()
    return torch.from_numpy(out)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "xformers", "math"])
def test_attention_is_softmax_of_scaled_products(backend, hides, xformers):
    """Queries and keys of different numbers; 11 keys are no multiple of what xFormers wants of a bias."""
    q, k, v = (noise(2, n, 3, 4, seed=n).double() for n in (5, 11, 11))
    visible = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.5 if hides else None
    out = attend(q, k, v, backend=backend, visible=visible)
    torch.testing.assert_close(out, formula(q, k, v, visible))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "xformers", "math"])
def test_kernels_agree(backend, dtype, xformers):
    results = []
    for name in ("sdpa", backend):
        qkv = noise(2, 3, 6, 5, 4, dtype=dtype).transpose(2, 3).requires_grad_()
        out = attend(*qkv.unbind(1), backend=name)
        assert out.dtype == dtype
        (out * noise(*out.shape)).sum().backward()
        results.append((out.detach(), qkv.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(*results):
        assert torch.allclose(one, other, atol=tolerance, rtol=tolerance)


class Operators(TorchDispatchMode):
    """Records the names of the operators that torch runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_plain_products_are_asked_for_as_such():
    q = noise(1, 4, 2, 8)
    with Operators() as math:
        attend(q, q, q, backend="math")
    with Operators() as fused:
        attend(q, q, q, backend="sdpa")
    assert "_softmax" in math.names or "_safe_softmax" in math.names
    assert any("flash" in name for name in fused.names) and not any("flash" in name for name in math.names)


def test_without_xformers_it_is_torchs_own_and_that_is_said_once(no_xformers, capsys):
    q = noise(1, 4, 2, 8)
    assert choose("auto", q, q) == choose("auto", *[noise(2, 6, 2, 8)] * 2) == "sdpa"
    assert capsys.readouterr().out == "attention on cpu: sdpa (xFormers is not installed)\n"


def test_xformers_is_taken_where_it_runs(xformers, capsys):
    q = noise(1, 4, 2, 8).requires_grad_()
    assert choose("auto", q, q) == "xformers"
    assert choose("sdpa", q, q) == "sdpa" and choose("math", q, q) == "math"
    attend(q, q, q)
    assert capsys.readouterr().out == "attention on cpu: xformers\n"


def test_xformers_is_tried_once_for_each_kind_of_tensor(xformers):
    for _ in range(3):
        choose("auto", *[noise(1, 4, 2, 8)] * 2)
    assert len(xformers.calls) == 1
    choose("auto", *[noise(1, 6, 2, 8)] * 2)
    choose("auto", *[noise(1, 6, 2, 8, dtype=torch.bfloat16)] * 2)
    assert len(xformers.calls) == 3


def test_xformers_that_imports_and_cannot_run_is_passed_over(xformers, capsys):
    xformers.fails = NotImplementedError(
        "No operator found for `memory_efficient_attention_forward`:\n query: ..."
    )
    q = noise(1, 4, 2, 8)
    assert torch.equal(attend(q, q, q), attend(q, q, q, backend="sdpa"))
    attend(*[q.bfloat16()] * 3)
    said = capsys.readouterr().out
    assert said.startswith("attention on cpu: sdpa (xFormers does not run here: No operator found")
    assert said.count("\n") == 1


def test_a_backward_pass_that_fails_counts_as_well(xformers):
    class NoWayBack(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return q.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("no operator for the way back")

    xformers.memory_efficient_attention = lambda q, k, v, attn_bias=None, p=0.0: NoWayBack.apply(q)
    assert choose("auto", *[noise(1, 4, 2, 8)] * 2) == "xformers"
    assert choose("auto", *[noise(1, 4, 2, 8).requires_grad_()] * 2) == "sdpa"


def test_a_broken_installation_is_none(monkeypatch, capsys):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "xformers":
                raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    forget_attention()
    assert choose("auto", *[noise(1, 4, 2, 8)] * 2) == "sdpa"
    forget_attention()


def test_xformers_by_name_must_run(no_xformers):
    q = noise(1, 4, 2, 8)
    with pytest.raises(
        ConfigError, match=r"^attention=xformers: xFormers is not installed\. Use attention=auto"
    ):
        attend(q, q, q, backend="xformers")
