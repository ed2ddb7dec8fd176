"""docs/from-4m.md: the suite makes its files and runs its commands, on small networks and a small Stable Diffusion."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_contracts_page import FENCE, NAME, Section, follow
from vqcore_fourm import domains, tables
from vqcore_fourm.arguments import check, to_config
from vqcore_fourm.names import to_theirs

from vqcore.borrowed import weights_of
from vqcore.cli import main
from vqcore.registry import registry
from vqcore.tokenizer import Tokenizer
from vqcore.tokens import TokenDataset

PAGE = Path(__file__).parents[3] / "docs/from-4m.md"
EARTH = Path(__file__).parents[3] / "data/earth"
STABLE_DIFFUSION = Path(__file__).parents[2] / "vqcore_controlnet/tests/parity/stable-diffusion"
TASKS = {"rgb": "rgb", "depth": "depth", "semseg": "semseg_coco"}
SMALL = """
data: {batch_size: 1, workers: 0}
model:
  decoder: {widths: [8, 16], attention_levels: [0], depth: 1, heads: [4, 4], text_width: 16, norm_groups: 4,
            input_size_sd: 64}
run: {epochs: null, steps: 2, precision: fp32}
optim: {warmup_epochs: null}
eval: {sampling: {steps: 2}}
"""
"""A try of the config with the small Stable Diffusion of the tests of controlnet."""
MISSING = "americas/alaska_n68_w160.png"


@pytest.fixture
def moved_in(tmp_path, monkeypatch):
    """The working directory of a user of 4M: its tree of files, a training checkpoint, and Stable Diffusion."""
    monkeypatch.chdir(tmp_path)
    for part in ("enc", "dec"):
        monkeypatch.setitem(tables.VIT, f"vit_b_{part}", {"width": 32, "depth": 1, "num_heads": 2})
    micro = {"name": "unet/unet", "width": 32, "mult": [1, 2], "depth": 0, "attention": [2]}
    monkeypatch.setitem(tables.DENOISERS, "unet_patched", micro)
    for split, ours in (("train", "train"), ("heldout", "val")):
        for folder, task in TASKS.items():
            shutil.copytree(EARTH / split / folder, Path("data", ours, task))
    for task in TASKS.values():
        shutil.copytree(f"data/train/{task}", f"data/shifted/{task}")
    Path("data/shifted/depth", MISSING).unlink()
    for path in Path("data/train/rgb").rglob("*.jpg"):
        target = Path("data/train/sam_mask", path.relative_to("data/train/rgb")).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        square = np.array([[10, 10], [90, 10], [90, 90], [10, 90]], np.int32)[:, None]
        np.save(target, np.array([{"points": square}], object), allow_pickle=True)
    shutil.copytree(STABLE_DIFFUSION, "stable-diffusion")
    options = {
        "domain": "rgb",
        "encoder_type": "vit_b_enc",
        "decoder_type": "vit_b_dec",
        "patch_size": 16,
        "post_mlp": True,
        "input_size_max": 224,
        "codebook_size": 1024,
        "latent_dim": 32,
    }
    given = {"enc_type": "vit_b_enc", "post_mlp": True, "codebook_size": 1024}
    made = Tokenizer(to_config(check(given, "test", domain="rgb"), size=None, where="test"))
    state = to_theirs(weights_of(made), made.cfg)
    averaged = {name: tensor * 1.01 for name, tensor in state.items()}
    Path("tokenizer_ckpts").mkdir()
    content = {"model": state, "model_ema": averaged, "args": argparse.Namespace(**options), "epoch": 49}
    torch.save(content, "tokenizer_ckpts/rgb.pth")
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.mark.slow
def test_the_page_does_what_it_says(moved_in, capfd):
    blocks = [
        (language, text)
        for language, text in FENCE.findall(PAGE.read_text())
        if language == "console" or NAME.match(text)
    ]
    follow(Section("from-4m", blocks), capfd)
    assert TokenDataset("tokens")[0].shape == TokenDataset("averaged")[0].shape == (14, 14, 1)
    assert len(list(Path("rebuilt").rglob("*.png"))) == 12
    Path("small.yaml").write_text(f"defaults: [controlnet.yaml]\n{SMALL}")
    assert main(["train", "small.yaml"]) == 0
    frozen = [Tokenizer.load(run).fingerprint for run in ("runs/vqvae", "runs/divae", "runs/controlnet")]
    assert len(set(frozen)) == 1  # all have the tokens of the first stage


def test_the_page_has_the_table_of_the_domains():
    assert domains.table() in PAGE.read_text(), "docs/from-4m.md: print(vqcore_fourm.domains.table())"


def test_the_page_names_each_command_of_4m():
    text = PAGE.read_text()
    for each in ("run_training_vqvae.py", "run_training_divae.py", "run_training_vqcontrolnet.py",
                 "get_image_tokenizer", "train_wordpiece_tokenizer.py", "from_pretrained", "xFormers",
                 "resolution_step", "freeze_enc", "--data_path", "--eval_data_path", "nproc_per_node=8"):  # fmt: skip
        assert each in text
