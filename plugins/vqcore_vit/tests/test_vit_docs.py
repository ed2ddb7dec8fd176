"""The YAML excerpts of docs/backbones.md and the README are valid; with smaller settings they encode and decode."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from vqcore.compose.build import from_tree
from vqcore.schema import TokenizerConfig
from vqcore.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
DATA = {"modality": {"name": "rgb"}, "input_size": 224}
needs_quantizers = pytest.mark.skipif(not importlib.util.find_spec("vqcore_quant"), reason="vqcore-quant")


def excerpts():
    for page in ("docs/backbones.md", "plugins/vqcore_vit/README.md"):
        for text in (ROOT / page).read_text().split("```yaml\n")[1:]:
            tree = yaml.safe_load(text.partition("```")[0])
            yield pytest.param({"data": DATA, **tree}, id=f"{page}: {tree['model']['encoder']['name']}")


def config(tree):
    size = tree["data"].get("input_size") or tree["data"]["modality"]["size"]
    size = [size, size] if isinstance(size, int) else size
    whole = {"modality": tree["data"]["modality"], "size": size, "model": tree["model"]}
    return from_tree({**whole, "objective": {"name": "reconstruction"}}, schema=TokenizerConfig, file="docs")


def smaller(node):
    if "timm" in node["name"]:
        return {**node, "pretrained": False}
    if "mlp" in node["name"]:
        return {**node, "depth": 1, "width": 16}
    node = {key: value for key, value in node.items() if key != "size"}
    return {**node, "width": 16, "depth": min(1, node.get("depth", 1)), "num_heads": 2}


@needs_quantizers
@pytest.mark.parametrize("tree", list(excerpts()))
def test_excerpts_work(tree):
    config(tree)
    model = {**tree["model"], **{part: smaller(tree["model"][part]) for part in ("encoder", "decoder")}}
    if "timm" in model["encoder"]["name"]:
        pytest.importorskip("timm")
    tokenizer = Tokenizer(config({**tree, "model": model})).eval()
    spec = tokenizer.spec
    x = torch.rand(1, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(x)
    assert codes.shape[:-1] == (1, *tokenizer.grid())
    assert tokenizer.decode(codes).shape == x.shape


@needs_quantizers
def test_query_tokens_decode_to_any_size():
    tree = next(p.values[0] for p in excerpts() if "query" in p.id)
    model = {**tree["model"], **{part: smaller(tree["model"][part]) for part in ("encoder", "decoder")}}
    tokenizer = Tokenizer(config({**tree, "model": model})).eval()
    x = torch.zeros(2, 3, 320, 256)
    codes = tokenizer.encode(x)
    assert codes.shape == (2, 64, 1)
    assert tokenizer.decode(codes, size=(320, 256)).shape == tokenizer.reconstruct(x).shape == x.shape


def test_every_component_is_documented():
    from vqcore_vit.plugin import vqcore_plugin

    for page in ("docs/backbones.md", "plugins/vqcore_vit/README.md"):
        text = (ROOT / page).read_text()
        without = [c.name for c in vqcore_plugin().components if f"`vit/{c.name}`" not in text]
        assert not without, page
