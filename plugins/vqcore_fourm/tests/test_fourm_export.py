"""Export to 4M's published form: the recorded tensors come back bit for bit, and what 4M cannot hold is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_fourm_checkpoint import CASES, DATA, FORMAT, read, source_of, stand_ins  # noqa: F401
from vqcore_fourm import arguments, export, names, tables
from vqcore_fourm.checkpoint import Checkpoint

from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.config import to_tree
from vqcore.errors import CheckpointError
from vqcore.registry import registry
from vqcore.schema import TokenizerConfig
from vqcore.testing.conformance import FormatConformance
from vqcore.tokenizer import Tokenizer

CHECKPOINT = Checkpoint(Checkpoint.Config(name=FORMAT))


def written(tokenizer, folder):
    folder.mkdir(exist_ok=True)
    CHECKPOINT.write(tokenizer, folder)
    return folder


def recorded(case):
    """The recorded state, whole: with both names of what safetensors keeps under one of them."""
    path = next(p for name in ("state", "model") if (p := DATA / case / f"{name}.safetensors").is_file())
    state = load_file(path)
    with safe_open(path, "pt") as opened:
        header = opened.metadata() or {}
    return state | {name: state[other] for name, other in header.items() if other in state}


@pytest.mark.parametrize("case", CASES)
def test_recorded_tensors_come_back_bit_for_bit(tmp_path, case):
    (tmp_path / "source").mkdir()
    tokenizer = read(source_of(case, tmp_path / "source"))
    folder = written(tokenizer, tmp_path / "made")
    found, state = load_file(folder / "model.safetensors"), recorded(case)
    assert found.keys() == state.keys()
    assert all(found[key].dtype == state[key].dtype and torch.equal(found[key], state[key]) for key in state)
    given = json.loads((folder / "config.json").read_text())
    for key, value in (CASES[case]["kwargs"] or {}).items():
        if key not in ("sync_codebook", "undo_std"):
            assert given[key] == value, key
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {key: str(value) for key, value in given.items()}
    again, plain = read(folder), load_file(DATA / case / "io.safetensors")["x"]
    assert again.fingerprint == tokenizer.fingerprint and again.cfg == tokenizer.cfg
    (folder / "vqcore.json").unlink()
    x = tokenizer.embed is not None and plain or plain
    assert torch.equal(read(folder).encode(x), tokenizer.encode(x))
    assert torch.equal(read(folder / "model.safetensors").encode(x), tokenizer.encode(x))
