"""torch.compile has no graph breaks in training and evaluation and the same results; encoding and decoding export."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from torch import nn
from vqcore_quant import assignment, codes, entropy, gradients, seeding
from vqcore_quant.vq import VQ

CASES = {
    "cosine": {},
    "euclidean-kmeans": {"normalize": False, "kmeans_init": True},
    "everything": {
        "codebook": "learned",
        "num_codebooks": 2,
        "shared_codebook": False,
        "code_dim": 3,
        "orthogonal_weight": 0.1,
        "entropy_weight": 0.1,
        "gradient": "rotation",
    },
    "orthogonal-split": {"orthogonal_weight": 0.5, "dead_code": "linde_buzo_gray", "num_codebooks": 2},
}


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


def build(settings):
    torch.manual_seed(0)
    return VQ(VQ.Config(codebook_size=16, latent_dim=6, coef_ema_dead_code=2.0, decay=0.9, **settings))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 5, 4, 6, generator=generator), torch.rand(2, 5, 4, generator=generator) < 0.8


def run(module, quantizer, step):
    """One step with all its results. Step 2 is an evaluation, the other steps are training."""
    quantizer.train(step != 2).zero_grad()
    z, mask = batch(step)
    torch.manual_seed(step)
    out = module(z.requires_grad_(), mask)
    if quantizer.training:
        (out.z_q.square().sum() + sum(out.losses.values())).backward()
    gradients_ = {name: p.grad for name, p in quantizer.named_parameters() if p.grad is not None}
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    return {
        "z_q": out.z_q,
        "codes": out.codes,
        "z": z.grad if z.grad is not None else torch.zeros(()),
        **out.losses,
        **out.metrics,
        **{f"gradient of {k}": v.clone() for k, v in gradients_.items()},
        **state,
    }


def compare(backend, case):
    torch._dynamo.reset()
    plain = build(CASES[case])
    quantizer = copy.deepcopy(plain)
    compiled = torch.compile(quantizer, fullgraph=True, backend=backend)
    for step in range(4):
        expected, found = run(plain, plain, step), run(compiled, quantizer, step)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=f"{name} at step {step}")
    print(case)


@pytest.mark.parametrize(
    ("backend", "cases"),
    [
        pytest.param("eager", [*CASES], marks=pytest.mark.slow),
        pytest.param("aot_eager", [*CASES], marks=pytest.mark.slow),
        pytest.param("inductor", ["cosine"], marks=[pytest.mark.slow, needs_compiler]),
    ],
)
def test_one_graph_and_the_same_results_in_training_and_evaluation(backend, cases):
    """Run in a separate process: the shape checks of the test process cannot be compiled."""
    command = [sys.executable, __file__, backend, *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == cases, done.stderr[-3000:]


class Encode(nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, z):
        return self.quantizer(z).codes


class Decode(Encode):
    def forward(self, codes):
        return self.quantizer.decode(codes)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cosine", "euclidean-kmeans", "everything"])
def test_exported_programs_need_nothing_of_ours_and_take_other_sizes(case):
    quantizer = build(CASES[case]).eval()
    z = batch(0)[0]
    sizes = ({0: torch.export.Dim("b", min=1), 1: torch.export.Dim("h", min=1)},)
    encode = torch.export.export(Encode(quantizer), (z,), dynamic_shapes=sizes)
    decode = torch.export.export(Decode(quantizer), (quantizer(z).codes,), dynamic_shapes=sizes)
    for program in (encode, decode):
        assert not [node for node in program.graph.nodes if "vqcore" in str(node.target)]
    other = torch.randn(3, 1, 4, 6)
    codes = encode.module()(other)
    assert torch.equal(codes, quantizer(other).codes)
    assert torch.equal(decode.module()(codes), quantizer.decode(codes))


def operators():
    generator = torch.Generator().manual_seed(0)
    rows, embed = torch.randn(20, 3, generator=generator), torch.randn(6, 3, generator=generator)
    j, size, mask = torch.arange(20) % 6, torch.arange(6.0), torch.arange(20) % 4 > 0
    weight, leaf = mask.float(), rows.clone().requires_grad_()
    yield assignment._nearest_op, (rows, embed, True, 8.0, 0.0)
    yield assignment._totals_op, (rows, j, 6, mask)
    yield codes._count_everywhere_op, (torch.zeros(2, 3, dtype=torch.bool),)
    yield gradients._snapshot_op, (embed,)
    yield seeding._first_codes_op, (rows, mask, embed, size, torch.ones(1), 3, True, 8.0)
    yield seeding._revived_op, (embed, size, size < 0, rows, mask, "batch_random", True)
    yield entropy._entropies_op, (leaf, embed, torch.zeros(6), weight, 8.0, False)
    yield (
        entropy._entropies_backward_op,
        (rows, embed, torch.zeros(6), weight, torch.rand(6), torch.ones(2), 8.0),
    )


@pytest.mark.parametrize("index", range(8))
def test_operators_are_what_they_declare(index):
    operator, arguments = list(operators())[index]
    results = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(results.values()) == {"SUCCESS"}


WITHOUT_COMPILER = """
import sys, torch
from vqcore.testing.conformance import build
for training in (True, False):
    for normalize in (True, False):
        node = {"codebook_size": 8, "latent_dim": 4, "kmeans_init": True, "normalize": normalize}
        quantizer = build("quantizer", "quant/vq", node).train(training)
        z = torch.randn(2, 20, 4, requires_grad=True)
        out = quantizer(z)
        (out.z_q.sum() + out.losses["vq/commit"]).backward()
        quantizer.decode(out.codes)
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_using_a_codebook_loads_no_compiler():
    """Loading the compiler would take longer than a short command."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["False"], done.stderr[-2000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        compare(sys.argv[1], name)
