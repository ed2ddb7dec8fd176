"""Weight decay applies to all matrices except those that hold codes."""

import pytest
import torch

from vqcore.run.optim import parameter_groups
from vqcore.testing.conformance import build

LEARNED = {"name": "quant/vq", "codebook_size": 16, "latent_dim": 4, "codebook": "learned"}
CASES = [
    (LEARNED, {"embed"}, set()),
    (LEARNED | {"code_dim": 2}, {"embed"}, {"project_in.weight", "project_out.weight"}),
    (LEARNED | {"codebook": "ema", "orthogonal_weight": 1.0}, {"embed"}, set()),
    (LEARNED | {"freeze": True, "code_dim": 2}, set(), {"project_in.weight", "project_out.weight"}),
    ({"name": "quant/ibq", "codebook_size": 16, "latent_dim": 4}, {"embed"}, set()),
    ({"name": "quant/simvq", "codebook_size": 16, "latent_dim": 4}, {"map.weight"}, set()),
    (
        {"name": "quant/memcodes", "codebook_size": 16, "latent_dim": 4},
        {"codes", "to_k.weight", "to_v.weight"},
        set(),
    ),
    (
        {"name": "quant/residual", "depth": 2, "quantizer": LEARNED},
        {"levels.0.embed", "levels.1.embed"},
        set(),
    ),
    (
        {"name": "quant/product", "groups": 2, "shared": True, "quantizer": LEARNED},
        {"groups.0.embed"},
        set(),
    ),
]


@pytest.mark.parametrize(("node", "tables", "matrices"), CASES)
def test_codes_do_not_decay_and_projections_do(node, tables, matrices):
    quantizer = build("quantizer", node["name"], {key: node[key] for key in node if key != "name"})
    names = {p: name for name, p in quantizer.named_parameters()}
    decay = {
        names[p]: group["weight_decay"] for group in parameter_groups(quantizer, 0.1) for p in group["params"]
    }
    assert {name for name in decay if decay[name] == 0 and not name.endswith("bias")} == tables
    assert {name for name in decay if decay[name] == 0.1} == matrices


@pytest.mark.parametrize(
    ("method", "tables"),
    [("vq", ["inner._codebook.embed"]), ("residual-sim-vq", ["inner.layers.0.code_transform.weight"])],
)
def test_the_codes_of_the_library_do_not_decay(method, tables):
    pytest.importorskip("vector_quantize_pytorch")
    learned = {"learnable_codebook": True, "ema_update": False} if method == "vq" else {}
    node = {"method": method, "latent_dim": 4, "codebook_size": 16, "options": learned}
    assert list(build("quantizer", "quant/vqp", node).without_decay) == tables


def test_an_unused_code_stays_where_it_is():
    quantizer = build(
        "quantizer", "quant/vq", {k: v for k, v in LEARNED.items() if k != "name"} | {"dead_code": None}
    )
    before = quantizer.embed.detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(quantizer, 0.5), lr=0.1)
    out = quantizer(torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0)))
    out.losses["vq/codebook"].backward()
    optimizer.step()
    unused = torch.arange(16) != out.codes.item()
    assert torch.equal(quantizer.embed[unused], before[unused])
    assert not torch.equal(quantizer.embed[~unused], before[~unused])
