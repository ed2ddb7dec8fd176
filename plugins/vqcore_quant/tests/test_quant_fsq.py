"""Finite scalar quantization against the paper's formulas in NumPy, the whole range of codes, and the limits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vqcore_quant.fsq import FSQ, parse_levels

from vqcore.errors import ConfigError
from vqcore.testing.conformance import build as by_name

LEVELS = [(8, 8, 8, 5, 5), (2, 3, 4), (7,), (16, 2)]


TERRAMIND = {
    **dict.fromkeys(("8-8-8-6-5", "7-5-5-5-5", "16-16-16-16-16"), "z5"),
    **dict.fromkeys(("8-5-5", "4-3-2", "2-2-2"), "z3"),
    **dict.fromkeys(("16", "2"), "z1"),
}
"""Levels and latents of the recorded case of TerraMind's quantizer (`parity/README.md`)."""


def build(levels, form="tanh"):
    return FSQ(FSQ.Config(levels=levels, form=form))


def oracle(z, levels):
    """Values and codes as in section 3.1 and appendix A.1 of the paper, in float64."""
    levels = np.array(levels)
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    rounded = np.round(np.tanh(z + np.tan(offset / half)) * half - offset)
    basis = np.concatenate([[1], np.cumprod(levels[:-1])])
    return rounded / (levels // 2), ((rounded + levels // 2) * basis).sum(-1).astype(int)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_against_the_paper(levels, scale):
    z = scale * torch.randn(2, 40, len(levels), generator=torch.Generator().manual_seed(1))
    out = build(levels)(z)
    values, codes = oracle(z.double().numpy(), levels)
    assert out.codes.squeeze(-1).tolist() == codes.tolist()
    np.testing.assert_allclose(out.z_q.numpy(), values, atol=1e-6)
    assert out.losses == {}


def test_gradient_is_that_of_the_bound():
    z = torch.randn(1, 9, 3, dtype=torch.float32, requires_grad=True)
    build((8, 5, 2))(z).z_q.sum().backward()
    levels = torch.tensor([8.0, 5.0, 2.0])
    half = (levels - 1) * (1 - 1e-3) / 2
    shift = torch.tan(torch.tensor([0.5, 0.0, 0.5]) / half)
    expected = half / (levels // 2) * (1 - torch.tanh(z.detach() + shift).square())
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5), (64, 3), (2000,)])
def test_every_code_is_reached(dtype, levels):
    quantizer = build(levels).eval()
    codes = torch.arange(quantizer.codebook_size).reshape(1, -1, 1)
    values = quantizer.decode(codes).double()
    count = torch.tensor(levels)
    half = (count - 1) * (1 - torch.clamp(0.5 / (count - 1), max=1e-3).double()) / 2
    offset = (1 - count % 2) / 2
    inside = ((values * (count // 2) + offset) / half).clamp(-1, 1)
    z = torch.atanh(inside).clamp(-9, 9) - torch.tan(offset / half)
    out = quantizer(z.float())
    assert torch.equal(out.codes, codes)
    reached = quantizer(z.to(dtype)).codes if max(levels) <= 64 else out.codes
    assert torch.equal(reached, codes)
    assert values.abs().max() <= 1


def test_codes_count_with_the_first_channel_fastest():
    quantizer = build((4, 3, 5))
    assert quantizer.decode(torch.tensor([[[0], [1], [4], [12]]])).tolist() == [
        [[-1.0, -1.0, -1.0], [-0.5, -1.0, -1.0], [-1.0, 0.0, -1.0], [-1.0, -1.0, -0.5]]
    ]
    assert quantizer.codebook_size == 60


def test_a_codebook_too_large_to_list_costs_nothing():
    quantizer = build((256, 256, 256, 64))
    out = quantizer(torch.randn(2, 5, 4))
    assert torch.equal(quantizer.decode(out.codes), out.z_q)
    assert out.metrics["codes/perplexity"] == pytest.approx(10.0, rel=1e-5)
    assert not quantizer.state_dict()


def test_nan_and_infinity_get_codes_in_range():
    z = torch.tensor([[[torch.nan, 0.0], [torch.inf, -torch.inf], [1e30, -1e30]]])
    codes = build((5, 8)).eval()(z).codes.flatten().tolist()
    assert codes == [2 + 5 * 4, 4, 4]


def test_levels_as_text():
    assert parse_levels("8-8-8-5-5") == (8, 8, 8, 5, 5)
    assert build("8-5").codebook_size == 40
    assert build("7").dim == 1


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ("8-x", "levels='8-x' cannot be read; write it like 8-8-8-5-5"),
        ("8--5", "cannot be read"),
        ((), "is empty"),
        ((8, 1), r"1 is not in \[2, 65536\]"),
        ((70000,), "70000 is not in"),
        ((2**16, 2**15, 2), "gives 4294967296 codes, more than 2147483648"),
    ],
)
def test_levels_that_make_no_sense(levels, message):
    with pytest.raises(ValueError, match=message):
        FSQ.Config(levels=levels)


def test_the_largest_codebook():
    quantizer = build((2**16, 2**15))
    codes = torch.tensor([[[0], [2**31 - 1]]])
    assert quantizer.decode(codes).tolist() == [[[-1.0, -1.0], [1 - 2**-15, 1 - 2**-14]]]


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5), (5, 3), (7, 4, 16)])
def test_codes_mean_what_they_mean_in_vector_quantize_pytorch(levels):
    library = pytest.importorskip("vector_quantize_pytorch").FSQ(list(levels))
    codes = torch.arange(library.codebook_size).reshape(1, -1, 1)
    assert torch.equal(build(levels).decode(codes), library.indices_to_codes(codes.squeeze(-1)))


@pytest.mark.parametrize("levels", TERRAMIND)
def test_sigmoid01_is_the_quantizer_of_terramind(levels):
    io = load_file(Path(__file__).parent / "parity/terramind_fsq.safetensors")
    quantizer = build(levels, "sigmoid01")
    z = io[TERRAMIND[levels]].movedim(1, -1).clone().requires_grad_()
    out = quantizer.eval()(z)
    assert torch.equal(out.codes[..., 0], io[f"tokens/{levels}"].long())
    assert torch.equal(out.z_q, io[f"quant/{levels}"].movedim(1, -1))
    assert torch.equal(quantizer.decode(out.codes), io[f"lookup/{levels}"].movedim(1, -1))
    assert out.losses == {} and not quantizer.state_dict()
    for name, codes in (("codebook", slice(None)), ("some", slice(0, 97 * 40, 97))):
        if f"{name}/{levels}" in io:
            found = quantizer.decode(torch.arange(quantizer.codebook_size)[codes].reshape(1, -1, 1))
            assert torch.equal(found[0], io[f"{name}/{levels}"])
    weights = io["weights"].unsqueeze(-1) * torch.arange(1.0, z.shape[-1] + 1)
    (quantizer.train()(z).z_q * weights).sum().backward()
    wanted = io[f"grad/{levels}"].movedim(1, -1)
    assert (z.grad - wanted).abs().max() <= 1e-5 * max(1, float(wanted.abs().max()))


def test_exact_ties_of_sigmoid01_go_to_the_even_neighbour():
    io = load_file(Path(__file__).parent / "parity/terramind_fsq.safetensors")
    found = {name.removeprefix("zero/"): int(code) for name, code in io.items() if name.startswith("zero/")}
    assert len(found) == 9
    for levels, code in found.items():
        quantizer = build(levels, "sigmoid01")
        assert quantizer(torch.zeros(1, 1, quantizer.dim)).codes.item() == code


def test_codes_of_sigmoid01_are_those_of_fp32_in_every_type():
    """TerraMind adds digits up in the type of the latents: in fp16 most of its codes are wrong."""
    quantizer = build("8-8-8-6-5", "sigmoid01").eval()
    codes = torch.arange(quantizer.codebook_size).reshape(1, -1, 1)
    z = torch.logit(quantizer.decode(codes), eps=1e-3)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantizer(z.to(dtype)).codes, codes)
    assert quantizer.codes_in_fp32 and not build("8-5").codes_in_fp32


def test_nan_gets_the_value_0_in_both_forms():
    z = torch.full((1, 1, 2), torch.nan)
    for form in ("tanh", "sigmoid01"):
        assert build((5, 8), form).eval()(z).z_q.tolist() == [[[0.0, 0.0]]]


def test_another_form_is_refused():
    with pytest.raises(ConfigError, match="form='sigmoid' is not one of tanh, sigmoid01"):
        by_name("quantizer", "quant/fsq", {"levels": "8-5", "form": "sigmoid"})
