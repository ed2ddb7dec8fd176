"""The denoisers on a CUDA device: bf16, torch.compile, and xFormers where it is installed."""

import pytest
import torch

from vqcore.attention import attend, choose
from vqcore.protocols import DataSpec
from vqcore.testing.basics import noise, stirred
from vqcore.testing.conformance import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
NETS = {
    "unet/unet": {"patch_size": 2, "width": 32, "mult": (1, 2), "depth": 1, "attention": (2,)},
    "unet/uvit": {
        "patch_size": 2,
        "widths": (32, 64),
        "depth": 1,
        "mid_width": 64,
        "mid_depth": 3,
        "mid_heads": 2,
    },
}


def net(name, **more):
    spec = DataSpec(channels=3, size=(32, 32))
    return stirred(build("decoder", name, {**NETS[name], **more}, dim=8, spec=spec)).eval()


def called(made, device, compiled=False):
    """The prediction for the same inputs on any device; the second sample has some tokens hidden."""
    made.to(device)
    z, x, t = (
        noise(2, 4, 4, 8).to(device),
        noise(2, 3, 32, 32).to(device),
        torch.tensor([3.0, 700.0]).to(device),
    )
    hidden = torch.stack([torch.zeros(4, 4, dtype=torch.bool), noise(4, 4) > 0]).to(device)
    cond = made.condition(z, size=(32, 32), mask=hidden)
    return (torch.compile(made) if compiled else made)(x, t, cond)


def off(found, wanted):
    return float((found.float().cpu() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("name", "more"),
    [("unet/unet", {}), ("unet/uvit", {}), ("unet/uvit", {"conditioning": "cross-attention"})],
)
@torch.no_grad()
def test_predictions_are_those_of_the_cpu(name, more):
    made = net(name, **more)
    wanted = called(made, "cpu")
    assert off(called(made, DEVICE), wanted) < 1e-2  # TF32
    with torch.autocast(DEVICE, torch.bfloat16):
        assert off(called(made, DEVICE), wanted) < 0.05
    assert off(called(made, DEVICE, compiled=True), wanted) < 1e-2


@pytest.mark.parametrize("name", NETS)
def test_a_training_step_in_bf16_has_the_gradients_of_the_cpu(name):
    found = []
    for device in ("cpu", DEVICE):
        made = net(name)
        with torch.autocast(device, torch.bfloat16, enabled=device == DEVICE):
            called(made, device).float().square().mean().backward()
        found.append(made.last_layer.grad.cpu())
    assert off(found[1], found[0]) < 0.05


@pytest.mark.parametrize("keys", [16, 11])
@pytest.mark.parametrize("hides", [False, True])
def test_xformers_computes_what_torch_computes(keys, hides):
    """11 keys are no multiple of what xFormers wants of a bias."""
    pytest.importorskip("xformers")
    q, k = (noise(2, n, 2, 64).to(DEVICE, torch.bfloat16).requires_grad_() for n in (32, keys))
    visible = (noise(2, keys) > 0).to(DEVICE) if hides else None
    assert choose("auto", q, k, hides) == "xformers"
    outs = [attend(q, k, k, visible=visible, backend=backend) for backend in ("sdpa", "xformers")]
    grads = [torch.autograd.grad(out.float().square().sum(), k)[0] for out in outs]
    for one, other in (outs, grads):
        torch.testing.assert_close(other, one, atol=3e-2, rtol=3e-2)
