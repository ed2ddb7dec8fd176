"""Attention against its formula, the kernels against each other, and the choice of the kernel."""

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from vqcore_vit import attention
from vqcore_vit.attention import attend, choose
from vqcore_vit.blocks import Attention
from vqcore_vit.vit import ViTDecoder, ViTEncoder

from vqcore.errors import ConfigError
from vqcore.protocols import DataSpec


def noise(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def forget():
    for cached in (attention._problem, attention._xformers, attention._announce):
        cached.cache_clear()


@pytest.fixture
def xformers(monkeypatch):
    """A fake xFormers with the tensor layout of the real package; `fails` is the error that it raises."""
    ops = types.ModuleType("xformers.ops")
    ops.calls, ops.fails = [], None

    def memory_efficient_attention(q, k, v, p=0.0):
        if ops.fails:
            raise ops.fails
        ops.calls.append(tuple(q.shape))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2)

    ops.memory_efficient_attention = memory_efficient_attention
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    forget()
    yield ops
    forget()


@pytest.fixture
def no_xformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    forget()
    yield
    forget()


def test_attention_is_softmax_of_scaled_products():
    attn, x = Attention(8, 2).double(), noise(1, 5, 8).double()
    qkv = attn.qkv(x).detach().numpy()[0].reshape(5, 3, 2, 4)
    heads = []
    for head in range(2):
        q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        weights = np.exp(q @ k.T / np.sqrt(4))
        heads.append(weights / weights.sum(1, keepdims=True) @ v)
    weight, bias = attn.proj.weight.detach().numpy(), attn.proj.bias.detach().numpy()
    assert np.allclose(attn(x).detach().numpy()[0], np.concatenate(heads, 1) @ weight.T + bias)


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


@pytest.mark.parametrize(("size", "patch"), [((12,), 2), ((8, 12), 4), ((4, 4, 6), 2)])
def test_backends_agree_in_models_of_any_rank(size, patch, xformers):
    spec, outputs = DataSpec(channels=2, size=size), {}
    for backend in ("auto", "sdpa", "xformers", "math"):
        torch.manual_seed(0)
        tiny = {"width": 12, "depth": 2, "num_heads": 3, "patch_size": patch, "attention": backend}
        encoder = ViTEncoder(ViTEncoder.Config(**tiny), spec=spec)
        decoder = ViTDecoder(ViTDecoder.Config(**tiny), dim=12, spec=spec)
        outputs[backend] = decoder(encoder(noise(2, 2, *size)))
    assert xformers.calls
    for out in outputs.values():
        assert torch.allclose(out, outputs["sdpa"], atol=1e-5)


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
    assert choose("auto", q) == choose("auto", noise(2, 6, 2, 8)) == "sdpa"
    assert capsys.readouterr().out == "attention on cpu: sdpa (xFormers is not installed)\n"


def test_xformers_is_taken_where_it_runs(xformers, capsys):
    q = noise(1, 4, 2, 8).requires_grad_()
    assert choose("auto", q) == "xformers"
    assert choose("sdpa", q) == "sdpa" and choose("math", q) == "math"
    attend(q, q, q)
    assert capsys.readouterr().out == "attention on cpu: xformers\n"


def test_xformers_is_tried_once_for_each_kind_of_tensor(xformers):
    for _ in range(3):
        choose("auto", noise(1, 4, 2, 8))
    assert len(xformers.calls) == 1
    choose("auto", noise(1, 6, 2, 8))
    choose("auto", noise(1, 6, 2, 8, dtype=torch.bfloat16))
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

    xformers.memory_efficient_attention = lambda q, k, v, p=0.0: NoWayBack.apply(q)
    assert choose("auto", noise(1, 4, 2, 8)) == "xformers"
    assert choose("auto", noise(1, 4, 2, 8).requires_grad_()) == "sdpa"


def test_a_broken_installation_is_none(monkeypatch, capsys):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "xformers":
                raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    forget()
    assert choose("auto", noise(1, 4, 2, 8)) == "sdpa"
    forget()


def test_xformers_by_name_must_run(no_xformers):
    q = noise(1, 4, 2, 8)
    with pytest.raises(
        ConfigError, match=r"^attention=xformers: xFormers is not installed\. Use attention=auto"
    ):
        attend(q, q, q, backend="xformers")


def test_dropout_of_attention_is_for_training_alone():
    torch.manual_seed(0)
    attn, x = Attention(8, 2, attn_dropout=0.5), noise(2, 6, 8)
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))
