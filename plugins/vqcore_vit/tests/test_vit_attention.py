"""Attention in the transformers of this package: one setting chooses the kernel, dropout is for training."""

import numpy as np
import pytest
import torch
from vqcore_vit.blocks import Attention
from vqcore_vit.vit import ViTDecoder, ViTEncoder

from vqcore.protocols import DataSpec


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


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


def test_dropout_of_attention_is_for_training_alone():
    torch.manual_seed(0)
    attn, x = Attention(8, 2, attn_dropout=0.5), noise(2, 6, 8)
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))
