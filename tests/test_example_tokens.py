"""examples/train-on-tokens: its commands, shortened, from files to samples of both modalities."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqcore.cli import main
from vqcore.tokens import TokenDataset

ROOT = Path(__file__).parents[1]
HERE = ROOT / "examples" / "train-on-tokens"
SHORTER = {
    "--stride 16": "--stride 32",
    "rgb.yaml": "rgb.yaml run.steps=60",
    "depth.yaml": "depth.yaml run.steps=60",
    "runs/earth/samples": "runs/earth/samples --batch 16",
}


@pytest.mark.slow
def test_the_way_from_files_to_samples(tmp_path, monkeypatch):
    pytest.importorskip("vqcore_vit")
    pytest.importorskip("vqcore_vision")
    monkeypatch.chdir(tmp_path)
    for name in ("data", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (block,) = re.findall(r"^```\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    found = {}
    for line in filter(None, block.splitlines()):
        for long, short in SHORTER.items():
            if not line.startswith("vqcore decode") and line.endswith(long):
                line = line.removesuffix(long) + short
        program, *words = shlex.split(line)
        if program == "vqcore":
            assert main(words) == 0, line
        else:
            script = runpy.run_path(words[0])
            found[Path(words[0]).name] = script["main"](words[1:])
    alone, losses = found["model.py"]
    assert len(losses) == 200 and np.mean(losses[:3]) > alone
    assert np.mean(losses[-20:]) < 0.8 * alone
    data = TokenDataset({label: f"runs/earth/tokens/{label}" for label in ("rgb", "depth")})
    assert len(data) == 12 * 25
    frequency = [np.bincount(codes.flatten()) for codes in data.batch(range(len(data))).values()]
    share = [each[each > 0] / each.sum() for each in frequency]
    assert alone == pytest.approx(np.mean([-(each * np.log(each)).sum() for each in share]), rel=1e-6)
    pictures = sorted(Path("runs/earth/pictures/rgb").glob("*.png"))
    heights = sorted(Path("runs/earth/pictures/depth").glob("*.npy"))
    assert len(pictures) == len(heights) == 16
    for picture, height in zip(pictures, heights):
        with Image.open(picture) as opened:
            assert opened.size == (64, 64) and picture.stem == height.stem
        metres = np.load(height)
        assert metres.shape[-2:] == (64, 64) and 0 <= metres.min() < metres.max() <= 18000
    with Image.open("runs/earth/sheet.png") as sheet:
        assert sheet.width == 16 * 132
