"""A modality whose last step wants a batch and a device: a teacher over pictures, as main modality and as rider."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from toys import run_tree, toy  # noqa: F401

from vqcore.check.checks import first_batch
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.protocols import Batch, finish
from vqcore.registry import registry
from vqcore.run.state import build
from vqcore.run.step import train_step
from vqcore.schema import RunConfig
from vqcore.testing.checks import check_modality
from vqcore.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("toy")
PLUGIN = '''
from dataclasses import dataclass, replace

import torch
from torch import nn

from vqcore.modalities.rgb import RGB
from vqcore.modalities.views import CropConfig, crop_view
from vqcore.objectives import Reconstruction
from vqcore.plugin import Component, Plugin, hookimpl
from vqcore.protocols import DataSpec, Losses, expand


class Taught:
    """Features of pictures from a frozen network with a stride of 8."""

    suffixes, metrics = RGB.suffixes, ("mae",)
    calls: list = []

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings."""

        seed: int = 0
        """The teacher."""

    def __init__(self, cfg, *, size):
        self.cfg, self.rgb = cfg, RGB(RGB.Config(), size=size)
        self.spec = DataSpec(channels=6, size=expand(size, 2), range=None)
        self.reading = self.rgb.reading
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.teacher = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.Dropout(0.5)).requires_grad_(False)

    def read(self, source, at_least=None):
        return self.rgb.read(source)

    def extent(self, raw):
        return self.rgb.extent(raw)

    def view(self, extent, size, rng):
        return crop_view(self.cfg, extent, size, rng)

    def ride(self, view, main):
        return replace(view, size=tuple(side // 8 for side in view.size))

    def tensor(self, raw, view):
        return self.rgb.tensor(raw, replace(view, size=tuple(8 * side for side in view.size)))

    def finish(self, x):
        self.calls.append(len(x))
        return self.teacher(x)

    def values(self, x):
        return x.float()

    def show(self, x):
        return x.numpy()


class Aligned(Reconstruction):
    """Sees what rides along."""

    seen: list = []

    def losses(self, tokenizer, batch, **options):
        self.seen.append(tuple(batch.extras["taught"].shape))
        found = super().losses(tokenizer, batch, **options)
        return Losses({**found.terms, "align": batch.extras["taught"].square().mean() + 0 * found.x_hat.mean()},
                      found.x_hat, found.codes, found.metrics)

    def decode(self, tokenizer, codes, *, size, rng, extras=None):
        if extras is not None:
            self.seen.append(tuple(extras["taught"].shape) + tuple(extras["original_size"].shape))
        return super().decode(tokenizer, codes, size=size, rng=rng, extras=extras)


@hookimpl
def vqcore_plugin():
    return Plugin(1, "mine", (
        Component("modality", "taught", ":Taught", "features"),
        Component("objective", "aligned", ":Aligned", "with features"),
    ))
'''


@pytest.fixture
def photos(tmp_path):
    """Eight pictures, the plugin file, and a command line."""
    (tmp_path / "rgb").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 72), Image.Resampling.BICUBIC).save(
            tmp_path / f"rgb/{number}.png"
        )
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path


def tree_of(folder, modality, size, extra=None, **changes):
    data = {
        "name": "folder",
        "path": str(folder / "rgb"),
        "eval_path": str(folder / "rgb"),
        "modality": {"name": modality},
        "input_size": size,
        "batch_size": 4,
        "workers": 0,
    }
    if extra:
        paths = {label: str(folder / "rgb") for label in extra}
        data |= {"extra": extra, "extra_path": paths, "eval_extra_path": paths}
    return {**run_tree(folder / "run", run__steps=4, **changes), "data": data}


def vqcore(folder, *words):
    assert main([*map(str, words), "--plugin", str(folder / "mine.py")]) == 0


def written(folder, tree):
    (folder / "cfg.yaml").write_text(yaml.safe_dump(tree))
    return folder / "cfg.yaml"


def taught(folder):
    """The plugin file's modality, in use."""
    registry().add_file(str(folder / "mine.py"))
    return registry().load("modality", "local/taught")


def started(folder, tree):
    taught(folder)
    return build(from_tree(tree, schema=RunConfig), torch.device("cpu"))


@pytest.mark.slow
def test_tokens_of_features_from_files_of_pictures(photos):
    run, tokens = photos / "run", photos / "tokens"
    path = written(photos, tree_of(photos, "local/taught", 8))
    vqcore(photos, "check", path)
    vqcore(photos, "train", path, "eval.every=2", "data.workers=1")
    vqcore(photos, "eval", run)
    report = json.loads((run / "eval.json").read_text())
    assert all(np.isfinite(value) for value in report["results"][0]["metrics"].values())
    vqcore(photos, "tokenize", run, photos / "rgb", tokens, "--batch-size", "5", "--store", "folder")
    vqcore(
        photos, "tokenize", run, photos / "rgb", photos / "alone", "--store", "folder", "--batch-size", "1"
    )
    for number in range(8):
        together = np.load(tokens / f"{number}.npy")
        assert together.shape == (2, 2, 1) and np.array_equal(
            together, np.load(photos / f"alone/{number}.npy")
        )
    vqcore(photos, "decode", run, tokens, photos / "rebuilt")
    assert np.load(photos / "rebuilt/0.npy").shape == (6, 8, 8)
    taught(photos)
    tokenizer = Tokenizer.load(run)
    x = tokenizer.read(photos / "rgb/3.png")
    assert x.shape == (1, 6, 8, 8) and not any("teacher" in name for name in tokenizer.state_dict())
    assert np.array_equal(tokenizer.encode(x)[0].numpy(), np.load(tokens / "3.npy"))
    raw = tokenizer.read_raw(photos / "rgb/3.png")
    assert raw.shape == (1, 3, 64, 64) and torch.equal(tokenizer.prepare(Batch(raw, ("3",))).x, x)


@pytest.mark.slow
def test_a_teacher_rides_beside_pictures(photos):
    extra = {"taught": {"name": "local/taught"}}
    path = written(photos, tree_of(photos, "rgb", 64, extra, objective={"name": "local/aligned"}))
    vqcore(photos, "train", path, "eval.every=2")
    vqcore(photos, "eval", photos / "run")
    run = started(photos, tree_of(photos, "rgb", 64, extra, objective={"name": "local/aligned"}))
    batch = first_batch(run)
    assert batch.extras["taught"].shape == batch.x.shape == (4, 3, 64, 64)
    assert torch.equal(batch.extras["taught"], batch.x)  # the same crop of the same file
    prepared = run.tokenizer.prepare(batch, run.extra)
    assert prepared.extras["taught"].shape == (4, 6, 8, 8) and torch.equal(prepared.x, batch.x)
    seen = type(run.objective).seen
    seen.clear()
    train_step(run, [batch])
    assert seen == [(4, 6, 8, 8)]


def test_a_step_finishes_each_batch_once(photos):
    run = started(photos, tree_of(photos, "local/taught", 8, objective={"name": "toy/adversary", "start": 0}))
    calls = type(run.tokenizer.modality).calls
    batches = [first_batch(run)] * 2
    calls.clear()
    train_step(run, batches)
    assert calls == [4, 4]  # two players, two batches
    prepared = run.tokenizer.prepare(batches[0])
    assert run.tokenizer.prepare(prepared).x is prepared.x and calls == [4, 4, 4]


def test_what_a_modality_holds_is_in_eval_mode_without_gradients_and_without_autocast(photos):
    run = started(photos, tree_of(photos, "local/taught", 8))
    modality = run.tokenizer.modality
    modality.teacher.train()
    x = first_batch(run).x
    with torch.autocast("cpu", torch.bfloat16):
        one, two = finish(modality, x), finish(modality, x)
    assert torch.equal(one, two) and not modality.teacher.training
    assert one.dtype == torch.float32 and not one.requires_grad
    assert not any(name.startswith("modality") for name, _ in run.tokenizer.named_modules())


def test_a_modality_may_be_a_module_itself():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))

        def finish(self, x):
            return self.net(x)

    own, x = Own(), torch.ones(2, 3)
    assert torch.equal(finish(own, x), finish(own, x)) and not own.net.training
    assert not finish(own, x).requires_grad


def test_a_teacher_obeys_the_laws_of_a_modality(photos):
    cls = taught(photos)
    waived = {"round-trip": "reads pictures and shows features", "flip": "a convolution has left and right"}
    check_modality(cls(cls.Config(), size=8), photos / "rgb/0.png", waived=waived)


def test_only_prepare_moves_a_batch():
    """A batch that is moved by hand would not be finished."""
    root = Path(__file__).parents[1]
    files = [
        *root.glob("vqcore/**/*.py"),
        *root.glob("plugins/*/vqcore_*/*.py"),
        *root.glob("examples/**/*.py"),
    ]
    by_hand = [
        str(path)
        for path in files
        if "batch.to(" in path.read_text().replace('batch.to(torch.device("cpu"))', "")
    ]
    assert by_hand == [str(root / "vqcore/tokenizer.py")]
