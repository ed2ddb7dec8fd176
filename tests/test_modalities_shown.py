"""`read` accepts the results of `show`, in memory and as files; sounds are decoded to files of sounds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from toys import run_tree, toy  # noqa: F401

from vqcore.compose.build import from_tree
from vqcore.errors import DataError
from vqcore.schema import TokenizerConfig
from vqcore.testing.conformance import build
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.passes import _save_shown, decode_folder, tokenize_folder

CASES = {
    "rgb": {"name": "rgb"},
    "depth": {"name": "vision/depth"},
    "depth, linear": {"name": "vision/depth", "scaling": "linear", "range": [0, 10]},
    "depth, log, a validity channel": {
        "name": "vision/depth",
        "scaling": "log",
        "range": [0.1, 80],
        "mask_value": -1,
    },
    "normal": {"name": "vision/normal"},
    "normal, a validity channel": {"name": "vision/normal", "mask_value": 0},
    "normal, any length in the tensor": {"name": "vision/normal", "unit": False},
    "normal, any length": {"name": "vision/normal", "unit": False, "tolerance": None},
    "semseg": {"name": "vision/semseg", "num_labels": 5},
    "semseg, shifted": {"name": "vision/semseg", "num_labels": 134, "shift": True},
    "semseg, 255 is none": {"name": "vision/semseg", "num_labels": 5, "ignore_label": 255},
    "semseg, -1 is none": {"name": "vision/semseg", "num_labels": 5, "ignore_label": -1},
    "semseg, 16 bits": {"name": "vision/semseg", "num_labels": 300},
    "edge": {"name": "vision/edge"},
    "mask": {"name": "mask"},
    "mask, inverted, pure white": {"name": "mask", "invert": True, "threshold": 254},
    "instance": {"name": "vision/instance"},
    "instance, 255 is void": {"name": "vision/instance", "ignore": [0, 255]},
    "instance, white background": {"name": "vision/instance", "ignore": [255]},
    "instance, silhouettes": {"name": "vision/instance", "threshold": 100},
    "features": {"name": "vision/features", "channels": 6},
    "features, tokens": {"name": "vision/features", "channels": 6, "layout": "tokens", "prefix_tokens": 1},
    "features, channels last": {"name": "vision/features", "channels": 6, "layout": "hwc", "std": 3.0},
    "vector": {"name": "vision/vector", "channels": 10},
    "pose": {"name": "vision/pose", "joints": 5},
    "pose, rotations": {"name": "vision/pose", "joints": 5, "value": "rotation-matrix"},
    "pose, angles": {"name": "vision/pose", "joints": 5, "value": "angle"},
    "audio": {"name": "audio/wave"},
    "audio, two channels": {"name": "audio/wave", "channels": 2, "rate": 44100},
    "log-mel": {"name": "audio/log-mel"},
    "array": {"name": "array", "channels": 3, "range": [0, 255]},
    "array, angles": {"name": "array", "channels": 1, "kind": "angle"},
    "array, unit vectors, channels last": {
        "name": "array",
        "channels": 3,
        "kind": "unit-vector",
        "channels_last": True,
    },
    "array, binary": {"name": "array", "channels": 1, "kind": "binary"},
    "array, classes": {"name": "array", "kind": "categorical", "labels": 7},
}
SIZES = {"audio/wave": (400,), "audio/log-mel": (16, 12), "vision/vector": None, "vision/pose": None}


def modality_of(name, **settings):
    node = CASES.get(name, {"name": name}) | settings
    return build("modality", node["name"], {k: v for k, v in node.items() if k != "name"}, size=size_of(node))


def size_of(node):
    return SIZES.get(node["name"], (9, 11))


def save(modality, shown, folder: Path) -> Path:
    _save_shown(modality, folder / "a", shown)
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", CASES)
def test_what_show_writes_read_reads(tmp_path, name, spread):
    modality = modality_of(name)
    spec = modality.spec
    middle = sum(spec.range) / 2 if spec.range else 0.0
    draw = torch.Generator().manual_seed(0)
    said = middle + spread * torch.randn(1, spec.out_channels, *spec.size, generator=draw)
    path = save(modality, modality.show(said), tmp_path)
    assert path.suffix in modality.suffixes
    raw = modality.read(path)
    x = modality.tensor(raw, modality.view(modality.extent(raw), spec.size, None))
    assert x.shape[-spec.rank :] == spec.size
    assert x.isfinite().all()


@pytest.mark.usefixtures("toy")
def test_sounds_are_decoded_to_sounds(tmp_path):
    sound = {"name": "audio/wave", "rate": 8000}
    cfg = from_tree(
        {
            "modality": sound,
            "size": [16],
            "model": run_tree("unused")["model"],
            "objective": {"name": "reconstruction"},
        },
        schema=TokenizerConfig,
    )
    tokenizer, files, tokens = Tokenizer(cfg), tmp_path / "files", tmp_path / "tokens"
    (files / "b").mkdir(parents=True)
    for name in ("a", "b/c"):
        tokenizer.modality.write(np.linspace(-0.5, 0.5, 16), files / f"{name}.wav")
    tokenize_folder(tokenizer, files, tokens, size=(16,))
    assert decode_folder(tokenizer, tokens, tmp_path / "out").written == 2
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert made == ["a.wav", "b/c.wav"]
    shown = tokenizer.show(tokenizer.reconstruct(tokenizer.read(files / "a.wav")))
    assert np.abs(tokenizer.read(tmp_path / "out" / "a.wav")[0, 0].numpy() - shown).max() <= 2**-16
    again = decode_folder(tokenizer, tokens, tmp_path / "out")
    assert (again.written, again.skipped) == (0, 2)


@pytest.mark.parametrize("name", ["rgb", "depth", "semseg", "normal", "edge", "mask", "instance"])
def test_a_tensor_is_no_file(name):
    with pytest.raises(DataError, match=r"a Tensor is no picture; .*Tokenizer\.encode") as caught:
        modality_of(name).read(torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)
