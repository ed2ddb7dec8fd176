"""Laws that hold for every quantizer of this plugin."""

import copy

import pytest
import torch
from vqcore_quant.fsq import FSQ
from vqcore_quant.vq import VQ

from vqcore.protocols import missing_members


def build(name):
    torch.manual_seed(0)
    if name.startswith("fsq"):
        return FSQ(FSQ.Config(levels=(8, 5, 4, 2, 3)))
    settings = {
        "normalize": "euclidean" not in name,
        "norm_latents": "norm" in name,
        "kmeans_init": "kmeans" in name,
    }
    return VQ(VQ.Config(codebook_size=40, latent_dim=5, **settings))


quantizers = pytest.mark.parametrize(
    "quantizer",
    ["vq-cosine", "vq-euclidean", "vq-norm-latents", "vq-kmeans", "vq-euclidean-kmeans", "fsq"],
    indirect=True,
)
grids = pytest.mark.parametrize("grid", [(1,), (7,), (3, 4), (2, 3, 2)])


@pytest.fixture
def quantizer(request):
    return build(request.param)


def latents(*shape, seed=1):
    return 2 * torch.randn(*shape, 5, generator=torch.Generator().manual_seed(seed))


def state(quantizer):
    return copy.deepcopy(quantizer.state_dict())


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@quantizers
def test_it_is_a_quantizer(quantizer):
    assert missing_members("quantizer", quantizer) == []
    assert quantizer.dim == 5
    assert quantizer.num_codebooks == 1
    assert all(k in dict(quantizer.named_buffers()) for k in quantizer.token_state())


@quantizers
@grids
@pytest.mark.parametrize("training", [True, False])
def test_shapes_ranges_and_the_way_back(quantizer, grid, training):
    if training:
        quantizer(latents(4, *grid, seed=9))
    quantizer.train(training)
    z = latents(2, *grid)
    decode = copy.deepcopy(quantizer).decode  # as it was before the step
    out = quantizer(z)
    assert out.codes.shape == (2, *grid, 1)
    assert out.codes.dtype == torch.int64
    assert out.codes.min() >= 0
    assert out.codes.max() < quantizer.codebook_size
    if not (training and quantizer.state_dict().get("initted", 1) == 0):
        assert torch.equal(out.z_q, decode(out.codes))


@quantizers
def test_evaluation_changes_no_state_and_draws_nothing(quantizer):
    quantizer(latents(3, 6))
    before, chance = state(quantizer), torch.get_rng_state()
    first = quantizer.eval()(latents(3, 6, seed=5))
    second = quantizer(latents(3, 6, seed=5))
    assert_same_state(before, quantizer.state_dict())
    assert torch.equal(chance, torch.get_rng_state())
    assert torch.equal(first.codes, second.codes)


@quantizers
def test_evaluation_before_any_training_works(quantizer):
    before = state(quantizer)
    out = quantizer.eval()(latents(2, 3, 3))
    assert torch.equal(quantizer.decode(out.codes), out.z_q)
    assert len(out.codes.unique()) > 1
    assert_same_state(before, quantizer.state_dict())


@quantizers
def test_names_are_the_same_in_training_and_evaluation(quantizer):
    trained = quantizer(latents(2, 4))
    evaluated = quantizer.eval()(latents(2, 4))
    assert trained.losses.keys() == evaluated.losses.keys()
    assert trained.metrics.keys() == evaluated.metrics.keys() >= {"codes/perplexity", "codes/usage"}
    for value in (*evaluated.losses.values(), *evaluated.metrics.values()):
        assert value.shape == ()
        assert value.isfinite()


@quantizers
def test_permuting_positions_permutes_codes(quantizer):
    quantizer.eval()
    z, order = latents(1, 30), torch.randperm(30)
    assert torch.equal(quantizer(z[:, order]).codes, quantizer(z).codes[:, order])


@quantizers
def test_codes_do_not_depend_on_the_batch_or_the_grid(quantizer):
    quantizer.eval()
    z = latents(6, 4, 5)
    codes = quantizer(z).codes
    assert torch.equal(torch.cat([quantizer(one).codes for one in z.split(1)]), codes)
    assert torch.equal(quantizer(z.reshape(3, 40, 5)).codes.flatten(), codes.flatten())


@quantizers
def test_gradients_reach_the_latents(quantizer):
    z = latents(2, 3, 3).requires_grad_()
    quantizer(z).z_q.square().sum().backward()
    assert z.grad.isfinite().all()
    assert (z.grad.abs().sum(-1) > 0).all()


@quantizers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_but_fp32_inside(quantizer, dtype):
    quantizer(latents(3, 8))
    quantizer.eval()
    z = latents(3, 8).to(dtype)
    wide = quantizer(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(z)
    assert torch.equal(out.codes, wide.codes)
    assert torch.equal(out.z_q, wide.z_q.to(dtype))
    assert all(loss.dtype == torch.float32 for loss in out.losses.values())
    trained = quantizer.train()(z.requires_grad_())
    trained.z_q.float().sum().backward()
    assert trained.z_q.dtype == z.grad.dtype == dtype


@quantizers
def test_state_dict_round_trip(quantizer):
    for k in range(3):
        quantizer(latents(4, 9, seed=k))
    other = type(quantizer)(quantizer.cfg) if isinstance(quantizer, VQ) else build("fsq")
    other.load_state_dict(quantizer.state_dict())
    torch.manual_seed(7)
    ours = quantizer(latents(4, 9, seed=10))
    torch.manual_seed(7)
    theirs = other(latents(4, 9, seed=10))
    assert torch.equal(ours.codes, theirs.codes)
    assert_same_state(quantizer.state_dict(), other.state_dict())


@quantizers
@pytest.mark.parametrize("wrong", [-1, "size"])
def test_decode_names_the_code_and_the_bound(quantizer, wrong):
    size = quantizer.codebook_size
    wrong = size if wrong == "size" else wrong
    codes = torch.zeros(1, 3, 1, dtype=torch.int64)
    codes[0, 1] = wrong
    with pytest.raises(ValueError, match=rf"code {wrong} is out of range: codes lie in \[0, {size}\)"):
        quantizer.decode(codes)


@quantizers
def test_metrics_count_valid_positions_only(quantizer):
    quantizer.eval()
    z = latents(1, 12)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, :4] = True
    out = quantizer(z, mask)
    part = quantizer(z[:, :4])
    assert torch.equal(out.codes, quantizer(z).codes)
    for name in ("codes/perplexity", "codes/usage"):
        assert out.metrics[name] == part.metrics[name]
    share = torch.bincount(part.codes.flatten()).double() / 4
    share = share[share > 0]
    assert out.metrics["codes/usage"] == pytest.approx(len(share) / quantizer.codebook_size)
    assert out.metrics["codes/perplexity"] == pytest.approx(
        float(torch.exp(-(share * share.log()).sum())), rel=1e-5
    )
    nothing = quantizer(z, torch.zeros_like(mask))
    assert nothing.metrics["codes/usage"] == 0
    assert all(value.isfinite() for value in (*nothing.metrics.values(), *nothing.losses.values()))
