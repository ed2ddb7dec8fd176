"""The wrapper of vector-quantize-pytorch: the laws for each method, and the error when the package is not installed."""

import sys

import pytest
import torch
from vqcore_quant.vqp import VQP

from vqcore.errors import ConfigError, PluginLoadError
from vqcore.testing.conformance import QuantizerConformance, build

library = pytest.importorskip("vector_quantize_pytorch")
RESIDUAL = {"method": "residual-vq", "latent_dim": 4, "codebook_size": 16, "num_codebooks": 3}


# The conformance tests compare values that still have the autograd graph of the codebook.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
class TestVQP(QuantizerConformance):
    component = "quant/vqp"
    waived = {"idempotent": "not all methods of the library are idempotent"}  # noqa: RUF012
    configs = (
        {"method": "vq", "latent_dim": 4, "codebook_size": 16},
        {"method": "vq", "latent_dim": 8, "codebook_size": 16, "num_codebooks": 2},
        {"method": "vq", "latent_dim": 4, "codebook_size": 16, "options": {"threshold_ema_dead_code": 2}},
        RESIDUAL,
        RESIDUAL | {"options": {"implicit_neural_codebook": True}},
        RESIDUAL | {"options": {"quantize_dropout": True}},
        {"method": "grouped-residual-vq", "latent_dim": 8, "codebook_size": 16, "num_codebooks": 4},
        {"method": "residual-sim-vq", "latent_dim": 4, "codebook_size": 16, "num_codebooks": 3},
        {"method": "residual-lfq", "latent_dim": 4, "codebook_size": 16, "num_codebooks": 3},
        {"method": "residual-fsq", "latent_dim": 3, "levels": [8, 5, 5], "num_codebooks": 2},
        {"method": "latent", "latent_dim": 3, "levels": [5, 5, 8]},
        {"method": "latent", "latent_dim": 6, "levels": [5, 5, 8]},
        {"method": "fsp", "latent_dim": 3, "levels": [5, 5, 8]},
    )


def test_it_says_what_the_library_says():
    torch.manual_seed(0)
    quantizer = build("quantizer", "quant/vqp", RESIDUAL).train()
    torch.manual_seed(0)
    alone = library.ResidualVQ(dim=4, codebook_size=16, num_quantizers=3).train()
    z = torch.randn(2, 3, 5, 4)
    value, codes, losses = alone(z.flatten(0, 2).unsqueeze(0))
    out = quantizer(z)
    assert torch.equal(out.codes.flatten(0, 2), codes.squeeze(0))
    torch.testing.assert_close(out.z_q.flatten(0, 2), value.squeeze(0))
    assert float(out.losses["vqp/loss"].detach()) == pytest.approx(float(losses.sum().detach()), rel=1e-5)


def test_a_latent_that_is_not_finite_is_named_and_teaches_nothing():
    torch.manual_seed(0)
    quantizer = build("quantizer", "quant/vqp", RESIDUAL).train()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    z = torch.randn(1, 6, 4)
    z[0, 2, 1] = torch.nan
    out = quantizer(z)
    assert not out.losses["vqp/loss"].isfinite()
    assert out.metrics["codes/nonfinite"] == 1
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())


def test_without_the_package_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(PluginLoadError, match="pip install vector-quantize-pytorch") as caught:
        build("quantizer", "quant/vqp", RESIDUAL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "vq", "latent_dim": 4}, "method=vq needs codebook_size and takes no levels"),
        ({"method": "fsp", "latent_dim": 4, "codebook_size": 8}, "method=fsp needs levels"),
        (
            {"method": "fsp", "latent_dim": 2, "levels": [4, 4], "num_codebooks": 2},
            "method=fsp allows only 1",
        ),
        (RESIDUAL | {"options": {"beem_size": 2}}, "Did you mean 'beam_size'"),
        (RESIDUAL | {"options": {"dim": 2}}, "already give this argument"),
        (RESIDUAL | {"codebook_size": 1}, "codebook_size=1 must be at least 2"),
        (RESIDUAL | {"method": "grouped-residual-vq"}, "num_codebooks=3 is not divisible by groups=2"),
        (RESIDUAL | {"method": "random-projection"}, "method"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build("quantizer", "quant/vqp", settings)
    assert "\n" not in str(caught.value)


def test_settings_can_be_written_in_python():
    quantizer = VQP(VQP.Config(method="latent", latent_dim=2, levels=(3, 5)))
    assert quantizer.codebook_size == 15
