"""Product quantization against its definition and vector-quantize-pytorch."""

import pytest
import torch
from vqcore_quant.product import Product

from vqcore.config import Config
from vqcore.testing.conformance import build as build_by_name

VQ = {"name": "quant/vq", "codebook_size": 12, "latent_dim": 3, "normalize": False}


def build(quantizer=VQ, groups=2, **settings):
    torch.manual_seed(0)
    return build_by_name("quantizer", "quant/product", {"quantizer": quantizer, "groups": groups, **settings})


def latents(*shape, seed=1):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shared", [False, True])
def test_every_group_is_quantized_by_itself(shared):
    quantizer = build(shared=shared).eval()
    z = latents(2, 4, 5, 6)
    out = quantizer(z)
    inner = [quantizer.groups[0 if shared else g] for g in range(2)]
    for g, one in enumerate(inner):
        alone = one(z[..., 3 * g : 3 * g + 3])
        assert torch.equal(out.codes[..., g : g + 1], alone.codes)
        assert torch.equal(out.z_q[..., 3 * g : 3 * g + 3], alone.z_q)
        assert out.metrics[f"group{g}/codes/perplexity"] == alone.metrics["codes/perplexity"]
    assert quantizer.dim == 6
    assert quantizer.num_codebooks == 2
    assert float(out.losses["vq/commit"]) == pytest.approx(float((z - out.z_q).square().mean()), rel=1e-5)


def test_a_shared_quantizer_learns_from_all_groups():
    quantizer = build(VQ | {"dead_code": None}, shared=True)
    quantizer(latents(2, 10, 6))
    assert float(quantizer.groups[0].cluster_size.sum()) == pytest.approx(0.01 * 40)
    assert len(quantizer.groups) == 1
    assert set(quantizer.token_state()) == {"groups.0.embed"}


def test_against_the_separate_heads_of_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.VectorQuantize(
        dim=6, codebook_dim=3, heads=2, codebook_size=12, separate_codebook_per_head=True
    ).eval()
    ours = build().eval()
    for g in range(2):
        ours.groups[g].embed.copy_(theirs._codebook.embed[g])
    z = latents(2, 30, 6)
    value, codes, _ = theirs(z)
    out = ours(z)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.z_q, value)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="groups=0 must be at least 1"):
        Product.Config(quantizer=Config(name="quant/fsq"), groups=0)
