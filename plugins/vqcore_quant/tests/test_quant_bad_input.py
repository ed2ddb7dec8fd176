"""Invalid input and invalid settings: quantizers raise an error that names the cause, or show it in their metrics."""

import pytest
import torch

from vqcore.errors import ConfigError
from vqcore.testing.conformance import build as build_by_name

FSQ = {"name": "quant/fsq", "levels": "5-4"}
VQ = {"name": "quant/vq", "codebook_size": 8, "latent_dim": 3, "normalize": False, "dead_code": None}
WORKING = {
    "fsq": {"levels": "8-5-5"},
    "lfq": {"codebook_size": 8},
    "bsq": {"codebook_size": 8},
    "memcodes": {"codebook_size": 8, "latent_dim": 4, "num_codebooks": 2},
    "simvq": {"codebook_size": 8, "latent_dim": 3},
    "ibq": {"codebook_size": 8, "latent_dim": 3},
    "residual": {"depth": 2, "quantizer": VQ},
    "product": {"groups": 2, "quantizer": VQ},
}
REFUSED = [
    ("fsq", {"levels": "8-1"}, "levels=8-1: 1 is not in [2, 65536]"),
    ("fsq", {"levels": []}, "levels=[] is empty"),
    ("fsq", {"levels": "8,5"}, "levels='8,5' cannot be read; write it like 8-8-8-5-5"),
    ("fsq", {"levels": [65536, 65536]}, "gives 4294967296 codes, more than 2147483648"),
    (
        "lfq",
        {"codebook_size": 1000},
        "codebook_size=1000 is not a power of two; the nearest are 512 and 1024",
    ),
    ("lfq", {"codebook_size": 1}, "codebook_size=1 is not in [2, 2147483648]"),
    ("lfq", {"codebook_size": 2**32}, "codebook_size=4294967296 is not in [2, 2147483648]"),
    ("lfq", {"codebook_size": 8, "group_bits": 21}, "group_bits=21 is not in [1, 20]"),
    ("lfq", {"codebook_size": 8, "entropy_temperature": 0.0}, "entropy_temperature=0.0 must be above 0"),
    ("bsq", {"codebook_size": 100}, "not a power of two; the nearest are 64 and 128"),
    ("bsq", {"codebook_size": 2**39}, "codebook_size=549755813888 is not in [2, 2147483648]"),
    ("bsq", {"codebook_size": 8, "commitment_weight": -1.0}, "commitment_weight=-1.0 must be at least 0"),
    (
        "memcodes",
        {"codebook_size": 8, "latent_dim": 10, "num_codebooks": 4},
        "latent_dim=10 is not divisible by num_codebooks=4",
    ),
    ("memcodes", {"codebook_size": 0}, "codebook_size=0 must be at least 1"),
    ("memcodes", {"codebook_size": 2**32}, "codebook_size=4294967296 is more than 2147483648"),
    ("simvq", {"codebook_size": 2**32}, "codebook_size=4294967296 is more than 2147483648"),
    ("simvq", {"codebook_size": 8, "chunk_mib": 0.0}, "chunk_mib=0.0 must be above 0"),
    ("ibq", {"codebook_size": 2**32}, "codebook_size=4294967296 is more than 2147483648"),
    ("ibq", {"codebook_size": 8, "latent_dim": 0}, "latent_dim=0 must be at least 1"),
    ("residual", {"depth": 0, "quantizer": FSQ}, "depth=0 must be at least 1"),
    ("residual", {"depth": 2, "dropout": -0.1, "quantizer": FSQ}, "dropout=-0.1 is not in [0, 1]"),
    ("residual", {"depth": 2, "quantizer": {"name": "quant/fsq", "levels": "1-4"}}, "1 is not in [2, 65536]"),
    ("residual", {"depth": 2}, "quantizer is required"),
    (
        "residual",
        {"depth": 2, "quantizer": {"name": "quant/fsqq", "levels": "4"}},
        "Did you mean 'quant/fsq'?",
    ),
    ("product", {"groups": 0, "quantizer": FSQ}, "groups=0 must be at least 1"),
    ("product", {"groups": 2, "quantizer": FSQ | {"level": "4"}}, "Did you mean 'levels'?"),
]


def build(name, settings):
    torch.manual_seed(0)
    return build_by_name("quantizer", f"quant/{name}", settings)


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_settings_are_refused_in_one_line_that_names_them(name, settings, message):
    with pytest.raises(Exception) as caught:
        build(name, settings)
    assert type(caught.value).__name__ in ("ConfigError", "UnknownName")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "part" in str(caught.value), "the key"


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("code", [-1, 2**31, "size"])
def test_codes_out_of_range_are_named_with_the_bound(name, code):
    quantizer = build(name, WORKING[name])
    size = quantizer.codebook_size
    code = size if code == "size" else code
    codes = torch.zeros(2, 3, quantizer.num_codebooks, dtype=torch.int64)
    codes[1, 2, -1] = code
    with pytest.raises(ValueError) as caught:
        quantizer.decode(codes)
    assert f"code {code} is out of range: codes lie in [0, {size})" in str(caught.value)


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("training", [True, False])
def test_a_latent_that_is_not_finite_shows_and_does_not_spread(name, value, training):
    quantizer = build(name, WORKING[name]).train(training)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    z = torch.randn(2, 3, 4, quantizer.dim, generator=torch.Generator().manual_seed(1))
    whole = z.clone()
    z[1, 2, 3, 0] = value  # in one group only
    z.requires_grad_()
    other = build(name, WORKING[name]).train(training)
    torch.manual_seed(5)
    out = quantizer(z)
    assert out.metrics["codes/nonfinite"] == 1
    assert not out.metrics["latents/rms"].isfinite()
    if out.losses:
        assert not all(loss.isfinite() for loss in out.losses.values())
        (slope,) = torch.autograd.grad(sum(out.losses.values()), z, retain_graph=True)
        assert not slope.isfinite().all()  # the trainer reacts to this gradient
    assert 0 <= out.codes.min() <= out.codes.max() < quantizer.codebook_size
    elsewhere = torch.ones(2, 3, 4, dtype=torch.bool)
    elsewhere[1, 2, 3] = False
    assert out.z_q[elsewhere].isfinite().all()
    torch.manual_seed(5)
    assert torch.equal(out.codes[elsewhere], other(whole).codes[elsewhere])
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())


@pytest.mark.parametrize("name", WORKING)
def test_finite_latents_show_none(name):
    quantizer = build(name, WORKING[name])
    assert quantizer(torch.randn(2, 5, quantizer.dim)).metrics["codes/nonfinite"] == 0


def test_a_quantizer_that_changes_the_grid_cannot_stand_inside_another(monkeypatch):
    from vqcore_quant import fsq

    class Coarser(fsq.FSQ):
        def grid_out(self, grid):
            return grid

    monkeypatch.setattr(fsq, "FSQ", Coarser)
    for name in ("residual", "product"):
        with pytest.raises(ConfigError, match="quantizer=quant/fsq changes the grid"):
            build(name, {"depth" if name == "residual" else "groups": 2, "quantizer": FSQ})
