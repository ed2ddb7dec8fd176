"""The toy components of tests/fixtures/toy as an installed plugin, configs made of them, and a fake xFormers."""

import json
import shutil
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vqcore import attention
from vqcore.assembly import tokenizer_config
from vqcore.compose.build import from_tree
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

_kept = tempfile.TemporaryDirectory(prefix="vqcore-toys-")
_trained: dict[str, Path] = {}


@pytest.fixture
def toy(monkeypatch):
    """The names `toy/...` work, as if their distribution were installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fixtures" / "toy"))
    registry.cache_clear()
    yield
    registry.cache_clear()


def run_config(directory, **changes):
    """`run_tree` as a checked config."""
    return from_tree(run_tree(directory, **changes), schema=RunConfig)


def run_tree(directory, **changes):
    """A config of a tiny run on waves, as plain data; `changes` are dotted keys with `__` for dots."""
    tree = {
        "data": {
            "name": "toy/waves",
            "modality": {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1]},
            "batch_size": 4,
            "workers": 0,
        },
        "model": {
            "encoder": {"name": "toy/encoder"},
            "quantizer": {"name": "toy/quantizer"},
            "decoder": {"name": "toy/decoder"},
        },
        "objective": {"name": "reconstruction"},
        "run": {"dir": str(directory), "steps": 6, "save_every": 2, "log_every": 1},
        "optim": {"lr": 0.01},
    }
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def tokenizer_of(config, **more):
    """The tokenizer of a run's config, as initialised; `more` as in `Tokenizer`."""
    wanted = config.data.input_size or config.data.input_size_max
    modality = registry().build("modality", config.data.modality, size=wanted)
    return Tokenizer(tokenizer_config(config, modality), **more)


def trained(directory, **changes):
    """The folder of a finished run of `run_config`: trained once in a process, then copied."""
    key = json.dumps(changes, sort_keys=True, default=str)
    if key not in _trained:
        _trained[key] = Path(_kept.name, str(len(_trained)))
        train(run_config(_trained[key], **changes))
    return Path(shutil.copytree(_trained[key], directory))


def forget_attention():
    """Let the switch of attention look again for xFormers."""
    for cached in (attention._problem, attention._xformers, attention._announce):
        cached.cache_clear()


@pytest.fixture
def xformers(monkeypatch):
    """A fake xFormers with the tensor layout of the real package; `fails` is the error that it raises."""
    ops = types.ModuleType("xformers.ops")
    ops.calls, ops.fails = [], None

    def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0):
        """The formula that the real one documents, and its demands on a bias."""
        if ops.fails:
            raise ops.fails
        ops.calls.append(tuple(q.shape))
        products = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        if attn_bias is not None:
            assert attn_bias.shape == products.shape and attn_bias.dtype == q.dtype
            assert attn_bias.stride(-1) <= 1 and all(step % 8 == 0 for step in attn_bias.stride()[:-1])
            products = products + attn_bias
        return torch.einsum("bhnm,bmhd->bnhd", F.dropout(products.softmax(-1), p), v)

    ops.memory_efficient_attention = memory_efficient_attention
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    forget_attention()
    yield ops
    forget_attention()


@pytest.fixture
def no_xformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    forget_attention()
    yield
    forget_attention()


@pytest.fixture(scope="module")
def tower():
    """A small model of open_clip, under a name of its own."""
    library = pytest.importorskip("open_clip")
    sizes = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    words = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ViT-Tiny-Test.json").write_text(
            json.dumps({"embed_dim": 24, "vision_cfg": sizes, "text_cfg": words})
        )
        library.add_model_config(folder)
    return {"model": "ViT-Tiny-Test", "weights": "random", "blocks": ["transformer.resblocks.0"]}
