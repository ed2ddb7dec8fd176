"""Convolutions on three axes have right gradients in bf16, where torch's own read memory that was never written."""

import pytest
import torch

from vqcore.convolution import Conv3d


def gradient(conv, x):
    conv.zero_grad()
    y = conv(x)
    y.float().square().sum().backward()
    return y, conv.weight.grad.float().clone()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "depth"), [(3, 2), (5, 2), (7, 4), (3, 5)])
def test_gradients_in_bf16_are_those_of_fp32(kernel, depth, bias):
    torch.manual_seed(0)
    conv = Conv3d(24, 24, kernel, padding=kernel // 2, bias=bias)
    x = torch.randn(2, 24, depth, 4, 4)
    exact, wanted = gradient(conv, x)
    for _ in range(3):
        full = [torch.full((1000 + n,), torch.nan) for n in range(5)]
        del full  # what was never written is now no number
        with torch.autocast("cpu", torch.bfloat16):
            rough, found = gradient(conv, x)
        assert rough.dtype == torch.bfloat16
        torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_a_module_in_bf16():
    torch.manual_seed(0)
    conv = Conv3d(24, 24, 3, padding=1)
    x = torch.randn(2, 24, 2, 4, 4)
    _, wanted = gradient(conv, x)
    y, found = gradient(conv.bfloat16(), x.bfloat16())
    assert y.dtype == torch.bfloat16 and (found - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert list(conv.state_dict()) == ["weight", "bias"]
