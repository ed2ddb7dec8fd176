"""Laws that hold for every quantizer of this plugin."""

import copy
import datetime
import subprocess
import sys

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st

from vqcore.protocols import missing_members
from vqcore.testing.conformance import QuantizerConformance
from vqcore.testing.conformance import build as build_by_name

BOUNDED = {"idempotent": "latents are bounded or projected before they are compared"}
SOFT = {"idempotent": "a code's value is not where it is chosen"}
SUMS = {"idempotent": "the sum's first level need not be the first level"}
VQ = {"name": "quant/vq", "codebook_size": 16, "latent_dim": 4, "normalize": False}
CASES = {
    "vq-cosine": ("vq", {"codebook_size": 40, "latent_dim": 5}),
    "vq-euclidean": ("vq", {"codebook_size": 40, "latent_dim": 5, "normalize": False}),
    "vq-norm-latents": ("vq", {"codebook_size": 40, "latent_dim": 5, "norm_latents": True}),
    "vq-kmeans": ("vq", {"codebook_size": 40, "latent_dim": 5, "kmeans_init": True}),
    "fsq": ("fsq", {"levels": (8, 5, 4, 2, 3)}),
    "fsq-sigmoid01": ("fsq", {"levels": (8, 5, 4, 2, 3), "form": "sigmoid01"}),
    "lfq": ("lfq", {"codebook_size": 32}),
    "lfq-groups": ("lfq", {"codebook_size": 32, "group_bits": 2, "entropy_temperature": 0.1}),
    "bsq": ("bsq", {"codebook_size": 32}),
    "memcodes": ("memcodes", {"codebook_size": 12, "latent_dim": 6, "num_codebooks": 3}),
    "simvq": ("simvq", {"codebook_size": 40, "latent_dim": 5}),
    "ibq": ("ibq", {"codebook_size": 40, "latent_dim": 5}),
    "residual": ("residual", {"depth": 3, "quantizer": VQ}),
    "residual-shared": ("residual", {"depth": 3, "shared": True, "quantizer": VQ}),
    "residual-fsq": ("residual", {"depth": 2, "quantizer": {"name": "quant/fsq", "levels": "5-4-3"}}),
    "product": ("product", {"groups": 2, "quantizer": VQ}),
    "product-shared": (
        "product",
        {"groups": 3, "shared": True, "quantizer": {"name": "quant/lfq", "codebook_size": 8}},
    ),
    "product-residual": (
        "product",
        {"groups": 2, "quantizer": {"name": "quant/residual", "depth": 2, "quantizer": VQ}},
    ),
}
RANDOM = ("memcodes",)
"""Quantizers that sample their codes in training."""


def build(case):
    torch.manual_seed(0)
    name, options = CASES[case]
    return build_by_name("quantizer", f"quant/{name}", options)


quantizers = pytest.mark.parametrize("quantizer", CASES, indirect=True)
grids = pytest.mark.parametrize("grid", [(1,), (7,), (3, 4), (2, 3, 2)])


@pytest.fixture
def quantizer(request):
    return build(request.param)


def latents(quantizer, *shape, seed=1):
    return 2 * torch.randn(*shape, quantizer.dim, generator=torch.Generator().manual_seed(seed))


def state(quantizer):
    return copy.deepcopy(quantizer.state_dict())


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


class TestFSQ(QuantizerConformance):
    component, waived = "quant/fsq", BOUNDED
    configs = ({"levels": "8-5-5"}, {"levels": [2, 3]}, {"levels": "8-7-2", "form": "sigmoid01"})


class TestLFQ(QuantizerConformance):
    component, configs = "quant/lfq", ({"codebook_size": 64}, {"codebook_size": 2**31})


class TestBSQ(QuantizerConformance):
    component, configs = "quant/bsq", ({"codebook_size": 64, "group_bits": 9}, {"codebook_size": 2**31})


# The conformance tests compare values that still have the autograd graph of the codebook.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
class TestMemcodes(QuantizerConformance):
    component, waived = "quant/memcodes", SOFT
    configs = (
        {"codebook_size": 20, "latent_dim": 8, "num_codebooks": 4},
        {"codebook_size": 9, "latent_dim": 3},
    )


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
class TestSimVQ(QuantizerConformance):
    component, configs = "quant/simvq", ({"codebook_size": 20, "latent_dim": 4},)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
class TestIBQ(QuantizerConformance):
    component, configs, waived = "quant/ibq", ({"codebook_size": 20, "latent_dim": 4},), SOFT


class TestResidual(QuantizerConformance):
    component, waived = "quant/residual", SUMS
    configs = (
        {"depth": 3, "quantizer": VQ},
        {"depth": 1, "quantizer": VQ},
        {"depth": 3, "shared": True, "quantizer": {"name": "quant/bsq", "codebook_size": 8}},
    )


class TestProduct(QuantizerConformance):
    component, waived = "quant/product", BOUNDED
    configs = (
        {"groups": 2, "quantizer": VQ},
        {"groups": 3, "shared": True, "quantizer": {"name": "quant/fsq", "levels": "4-4"}},
    )


@quantizers
def test_it_is_a_quantizer(quantizer):
    assert missing_members("quantizer", quantizer) == []
    tensors = quantizer.state_dict()
    deciding = getattr(quantizer, "token_state", quantizer.state_dict)()
    assert all(torch.equal(tensors[k], v) for k, v in deciding.items())


@quantizers
@grids
@pytest.mark.parametrize("training", [True, False])
def test_shapes_ranges_and_the_way_back(quantizer, grid, training):
    if training:
        quantizer(latents(quantizer, 4, *grid, seed=9))
    quantizer.train(training)
    z = latents(quantizer, 2, *grid)
    decode = copy.deepcopy(quantizer).decode  # the codes before the step
    out = quantizer(z)
    assert out.codes.shape == (2, *grid, quantizer.num_codebooks)
    assert out.codes.dtype == torch.int64
    assert out.codes.min() >= 0
    assert out.codes.max() < quantizer.codebook_size
    if not (training and quantizer.state_dict().get("initted", 1) == 0):
        torch.testing.assert_close(out.z_q, decode(out.codes), rtol=0, atol=1e-5)


@quantizers
def test_evaluation_changes_no_state_and_draws_nothing(quantizer):
    quantizer(latents(quantizer, 3, 6))
    before, chance = state(quantizer), torch.get_rng_state()
    first = quantizer.eval()(latents(quantizer, 3, 6, seed=5))
    second = quantizer(latents(quantizer, 3, 6, seed=5))
    assert_same_state(before, quantizer.state_dict())
    assert torch.equal(chance, torch.get_rng_state())
    assert torch.equal(first.codes, second.codes)


@quantizers
def test_evaluation_before_any_training_works(quantizer):
    before = state(quantizer)
    out = quantizer.eval()(latents(quantizer, 2, 3, 3))
    torch.testing.assert_close(quantizer.decode(out.codes), out.z_q, rtol=0, atol=1e-5)
    assert len(out.codes.unique()) > 1
    assert_same_state(before, quantizer.state_dict())


@quantizers
def test_names_are_the_same_in_training_and_evaluation(quantizer):
    trained = quantizer(latents(quantizer, 2, 4))
    evaluated = quantizer.eval()(latents(quantizer, 2, 4))
    assert trained.losses.keys() == evaluated.losses.keys()
    common = {"codes/perplexity", "codes/usage", "codes/entropy", "codes/distance", "codes/nonfinite"}
    assert trained.metrics.keys() == evaluated.metrics.keys() >= common
    for value in (*evaluated.losses.values(), *evaluated.metrics.values()):
        assert value.shape == ()
        assert value.isfinite()
    assert not any(value.requires_grad for value in trained.metrics.values())


@quantizers
def test_permuting_positions_permutes_codes(quantizer):
    quantizer.eval()
    z, order = latents(quantizer, 1, 30), torch.randperm(30)
    assert torch.equal(quantizer(z[:, order]).codes, quantizer(z).codes[:, order])


@quantizers
def test_codes_do_not_depend_on_the_batch_or_the_grid(quantizer):
    quantizer.eval()
    z = latents(quantizer, 6, 4, 5)
    codes = quantizer(z).codes
    assert torch.equal(torch.cat([quantizer(one).codes for one in z.split(1)]), codes)
    assert torch.equal(quantizer(z.reshape(3, 40, -1)).codes.flatten(), codes.flatten())


@quantizers
def test_gradients_reach_the_latents(quantizer):
    z = latents(quantizer, 2, 3, 3).requires_grad_()
    quantizer(z).z_q.square().sum().backward()
    assert z.grad.isfinite().all()
    assert (z.grad.abs().sum(-1) > 0).all()


@quantizers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_but_fp32_inside(quantizer, dtype):
    quantizer(latents(quantizer, 3, 8))
    quantizer.eval()
    z = latents(quantizer, 3, 8).to(dtype)
    wide = quantizer(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(z)
        decoded = quantizer.decode(out.codes)
    torch.testing.assert_close(decoded, wide.z_q, rtol=0, atol=1e-5)
    assert torch.equal(out.codes, wide.codes)
    assert torch.equal(out.z_q, wide.z_q.to(dtype))
    assert all(loss.dtype == torch.float32 for loss in (*out.losses.values(), *out.metrics.values()))
    trained = quantizer.train()(z.requires_grad_())
    trained.z_q.float().sum().backward()
    assert trained.z_q.dtype == z.grad.dtype == dtype


@quantizers
def test_state_dict_round_trip(quantizer):
    for k in range(3):
        quantizer(latents(quantizer, 4, 9, seed=k))
    other = type(quantizer)(quantizer.cfg)
    other.load_state_dict(quantizer.state_dict())
    torch.manual_seed(7)
    ours = quantizer(latents(quantizer, 4, 9, seed=10))
    torch.manual_seed(7)
    theirs = other(latents(quantizer, 4, 9, seed=10))
    assert torch.equal(ours.codes, theirs.codes)
    assert_same_state(quantizer.state_dict(), other.state_dict())


@quantizers
@pytest.mark.parametrize("wrong", [-1, "size"])
def test_decode_names_the_code_and_the_bound(quantizer, wrong):
    size = quantizer.codebook_size
    wrong = size if wrong == "size" else wrong
    codes = torch.zeros(1, 3, quantizer.num_codebooks, dtype=torch.int64)
    codes[0, 1] = wrong
    with pytest.raises(ValueError, match=rf"code {wrong} is out of range: codes lie in \[0, {size}\)"):
        quantizer.decode(codes)


@quantizers
def test_metrics_count_valid_positions_only(quantizer):
    quantizer.eval()
    z = latents(quantizer, 1, 12)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, :4] = True
    out = quantizer(z.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    part = quantizer(z[:, :4])
    assert torch.equal(quantizer(z, mask).codes, quantizer(z).codes)
    for name, value in part.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, msg=name)
    for name, value in part.losses.items():
        torch.testing.assert_close(out.losses[name], value, msg=name)
    columns = [column.double() for column in part.codes.flatten(0, -2).T]
    shares = [torch.unique(column, return_counts=True)[1] / 4 for column in columns]
    used = sum(len(share) for share in shares) / len(shares)
    assert out.metrics["codes/usage"] == pytest.approx(used / quantizer.codebook_size)
    entropy = sum(float(-(share * share.log2()).sum()) for share in shares) / len(shares)
    assert out.metrics["codes/entropy"] == pytest.approx(entropy, rel=1e-5, abs=1e-6)
    nothing = quantizer(z, torch.zeros_like(mask))
    assert nothing.metrics["codes/usage"] == 0
    assert all(value.isfinite() for value in (*nothing.metrics.values(), *nothing.losses.values()))


@quantizers
def test_masked_latents_get_no_gradient_from_losses(quantizer, request):
    # The gradient of a softmax over a row of NaN is NaN, also where it is multiplied by zero.
    fill = 1e3 if "ibq" in request.node.name else torch.nan
    z, mask = latents(quantizer, 2, 6), torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    z = z.masked_fill(~mask.unsqueeze(-1), fill).requires_grad_()
    losses = quantizer(z, mask).losses
    if losses:
        sum(losses.values()).backward()
        assert z.grad[mask].isfinite().all()
        assert not z.grad[~mask].any()


@settings(max_examples=30, deadline=None)
@given(
    case=st.sampled_from([case for case in CASES if case not in RANDOM]),
    batch=st.integers(1, 3),
    grid=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    training=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_rank_type_and_scale(case, batch, grid, dtype, training, scale, seed):
    quantizer = build(case).train(training)
    z = (scale * latents(quantizer, batch, *grid, seed=seed)).to(dtype).requires_grad_()
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    assert out.z_q.dtype == dtype
    assert out.codes.shape == (batch, *grid, quantizer.num_codebooks)
    assert 0 <= out.codes.min() <= out.codes.max() < quantizer.codebook_size
    values = (*out.losses.values(), *out.metrics.values(), out.z_q)
    assert all(value.isfinite().all() for value in values)
    if training:
        sum(out.losses.values(), out.z_q.float().sum()).backward()
        assert z.grad.isfinite().all()


COMPILED = """
import sys, torch
from vqcore.testing.conformance import build
torch.set_num_threads(1)
cases, export = {cases!r}, {export!r}
for case, (name, options) in cases.items():
    for training in (True, False):
        quantizer = build("quantizer", "quant/" + name, options)
        quantizer(torch.randn(4, 20, quantizer.dim))
        quantizer.train(training)
        z, mask = torch.randn(2, 3, 4, quantizer.dim), torch.rand(2, 3, 4) < 0.7
        torch._dynamo.reset()
        compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
        out = compiled(z.requires_grad_(), mask)
        if training:
            sum(out.losses.values(), out.z_q.sum()).backward()
    again = torch.compile(quantizer.decode, fullgraph=True, backend="eager")(out.codes)
    assert torch.allclose(again, out.z_q, atol=1e-5), case
    if case in export:
        class Encode(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner
            def forward(self, z):
                return self.inner(z).codes
        class Decode(Encode):
            def forward(self, codes):
                return self.inner.decode(codes)
        batch = torch.export.Dim("batch", min=2, max=64)
        encode = torch.export.export(Encode(quantizer), (z.detach(),), dynamic_shapes=({{0: batch}},)).module()
        decode = torch.export.export(Decode(quantizer), (out.codes,), dynamic_shapes=({{0: batch}},)).module()
        more = torch.randn(5, 3, 4, quantizer.dim)
        assert torch.equal(encode(more), quantizer(more).codes), case
        assert torch.allclose(decode(quantizer(more).codes), quantizer(more).z_q, atol=1e-5), case
    print("good", case, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_graph_breaks(case):
    code = COMPILED.format(cases={case: CASES[case]}, export=list(CASES))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"good {case}" in done.stdout, done.stderr[-2000:]


RANKED = ("fsq", "lfq", "bsq", "simvq", "ibq", "residual", "residual-shared", "product", "product-shared")


def ranked_step(case, part, training):
    """Loss, metrics, gradients of the parameters and state of the quantizer after one step on a part of a batch."""
    quantizer = build(case).train(training)
    z = latents(quantizer, 4, 6, 5, seed=3)[part]
    mask = (torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(4)) < 0.7).repeat(2, 1, 1)[part]
    z = z.clone().requires_grad_()
    out = quantizer(z, mask)
    sum(out.losses.values(), out.z_q.square().sum() * 0).backward()
    grads = {name: p.grad for name, p in quantizer.named_parameters() if p.grad is not None}
    detached = {name: value.detach() for name, value in (*out.losses.items(), *out.metrics.items())}
    return out.codes, detached, grads, quantizer.state_dict(), z.grad


def ranked_work(rank, folder):
    torch.set_num_threads(1)
    # On a busy machine one process may start minutes after the other.
    timeout = datetime.timedelta(minutes=10)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout
    )
    part = slice(0, 2) if rank == 0 else slice(2, 4)
    torch.save({case: ranked_step(case, part, True) for case in RANKED}, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # no process closes the group while the other process still communicates
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranked_work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("case", RANKED)
def test_two_processes_equal_one(two, case):
    codes, metrics, grads, after, on_z = ranked_step(case, slice(0, 4), True)
    first, second = two[0][case], two[1][case]
    assert torch.equal(torch.cat([first[0], second[0]]), codes)
    for name, value in metrics.items():
        if name.endswith("rms"):
            continue  # the root of a mean cannot be averaged over processes
        mean = (first[1][name] + second[1][name]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6, msg=name)
        if name.startswith("codes/") and "distance" not in name:
            assert first[1][name] == second[1][name], name
    for name, grad in grads.items():
        mean = (first[2][name] + second[2][name]) / 2  # DDP averages gradients
        torch.testing.assert_close(mean, grad, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in after.items():
        assert torch.equal(first[3][name], second[3][name])
        torch.testing.assert_close(first[3][name], value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([first[4], second[4]]) / 2, on_z, rtol=1e-4, atol=1e-6)
