"""Riders beside the main modality, files that labels share, windows of files, weights of positions."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from toys import run_tree, toy  # noqa: F401

from vqcore.check.checks import first_batch
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.data.batches import EvalBatches, TrainBatches, collate
from vqcore.data.reader import Reader, Sample
from vqcore.data.sources import Folder
from vqcore.errors import ConfigError, DataError
from vqcore.evaluate.compare import set_sha256
from vqcore.modalities.array import Array
from vqcore.modalities.mask import Mask
from vqcore.modalities.rgb import RGB
from vqcore.objectives import doubled
from vqcore.protocols import Batch, Window
from vqcore.registry import registry
from vqcore.run.state import build
from vqcore.schema import DataConfig, RunConfig

pytest.importorskip("vqcore_vision")
pytestmark = pytest.mark.usefixtures("toy")
ROOT = Path(__file__).resolve().parent.parent


def counted(cls):
    """A modality that writes down what it reads."""

    class Counted(cls):
        asked: list = []  # noqa: RUF012

        def read(self, source, at_least=None):
            Counted.asked.append(source)
            return super().read(source, at_least)

    return Counted


def scenes(folder: Path, count=4, side=64):
    """Pictures whose red channel is the column, depth maps of it with holes, and feature maps of 8 x 8."""
    for name in ("rgb", "depth", "clip"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        columns = np.broadcast_to(np.arange(side, dtype=np.uint8), (side, side))
        Image.fromarray(np.stack([columns, columns * 0, columns * 0 + number], -1)).save(
            folder / f"rgb/{number}.png"
        )
        depth = columns.astype(np.uint16) + 100
        depth[rng.random(depth.shape) < 0.31] = 0
        Image.fromarray(depth).save(folder / f"depth/{number}.png")
        np.save(folder / f"clip/{number}.npy", columns[None, ::8, ::8].astype(np.float32))


def scene_tree(folder: Path, extra, **changes):
    """The config of a run on such scenes."""
    data = {
        "name": "folder",
        "path": str(folder / "rgb"),
        "eval_path": str(folder / "rgb"),
        "modality": {"name": "rgb", "min_crop_scale": 1.0, "ratio": [1.0, 1.0], "hflip": 0.5},
        "extra": extra,
        "extra_path": {label: str(folder / label) for label in extra},
        "eval_extra_path": {label: str(folder / label) for label in extra},
        "input_size": 64,
        "batch_size": 4,
        "workers": 0,
    }
    tree = run_tree(folder / "run", **changes)
    return {**tree, "data": data | tree["data"].get("more", {})}


def batch_of(tree):
    run = build(from_tree(tree, schema=RunConfig), torch.device("cpu"))
    return first_batch(run), run


class TestRiders:
    def test_a_feature_map_has_its_own_grid_and_the_same_flip(self, tmp_path):
        scenes(tmp_path)
        batch, _ = batch_of(
            scene_tree(tmp_path, {"clip": {"name": "vision/features", "channels": 1, "stride": 8}})
        )
        assert batch.x.shape == (4, 3, 64, 64) and batch.extras["clip"].shape == (4, 1, 8, 8)
        red = (batch.x[:, :1] + 1) * 127.5
        flipped = red[:, 0, 0, 0] > red[:, 0, 0, -1]
        assert flipped.any() and not flipped.all()
        kept = torch.where(flipped.view(-1, 1, 1, 1), red.flip(-1), red)[:, :, ::8, ::8]
        turned = torch.where(flipped.view(-1, 1, 1, 1), batch.extras["clip"].flip(-1), batch.extras["clip"])
        assert torch.allclose(turned, kept, atol=1e-3)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({}, "data.extra.clip: a feature map needs its stride beside other data: set stride"),
            ({"stride": 24}, "data.extra.clip: the size 64 x 64 is no multiple of stride=24"),
        ],
    )
    def test_a_stride_that_is_missing_or_does_not_fit_is_said_before_training(
        self, tmp_path, capsys, settings, says
    ):
        scenes(tmp_path)
        tree = scene_tree(tmp_path, {"clip": {"name": "vision/features", "channels": 1, **settings}})
        (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(tree))
        assert main(["train", str(tmp_path / "cfg.yaml")]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_a_size_of_an_evaluation_that_does_not_fit_is_said_too(self, tmp_path, capsys):
        scenes(tmp_path)
        tree = scene_tree(tmp_path, {"clip": {"name": "vision/features", "channels": 1, "stride": 8}})
        (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(tree))
        assert main(["train", str(tmp_path / "cfg.yaml")]) == 0
        for workers in (0, 2):
            assert main(["eval", str(tmp_path / "run"), "eval.sizes=[60]", f"data.workers={workers}"]) == 2
            says = "error: data.extra.clip: the size 60 x 60 is no multiple of stride=8\n"
            assert capsys.readouterr().err.endswith(says)

    def test_the_holes_of_a_rider_arrive_at_its_own_size(self, tmp_path):
        scenes(tmp_path)
        depth = {"name": "vision/depth", "scaling": "linear", "range": [100, 164]}
        batch, run = batch_of(scene_tree(tmp_path, {"depth": depth}))
        holes = ~batch.masks["depth"]
        assert batch.mask is None and holes.shape == (4, 64, 64)
        assert 0.29 < float(holes.float().mean()) < 0.33
        assert bool((batch.extras["depth"][:, 0][holes] == 0).all())
        prepared = run.tokenizer.prepare(batch, run.extra)
        assert torch.equal(prepared.masks["depth"], batch.masks["depth"])

    def test_the_name_of_the_original_size_is_taken(self):
        with pytest.raises(
            ValueError, match=r"extra\.original_size: this name is taken by the size of a sample"
        ):
            DataConfig(modality=RGB.Config(), extra={"original_size": RGB.Config()})


class TestBatch:
    batch = Batch(
        torch.zeros(3, 1, 4),
        ("a", "b", "c"),
        torch.ones(3, 4).bool(),
        {"depth": torch.ones(3, 2).bool()},
        torch.ones(3, 4),
        torch.tensor([[4], [5], [6]]),
        {"text": ["x", "y", "z"], "map": torch.arange(3), "more": {"deep": torch.arange(3)}},
    )

    def test_decoding_gets_extras_and_the_original_size(self):
        more = {"original_size": self.batch.size, "masks": self.batch.masks}
        assert self.batch.conditions == {**self.batch.extras, **more}
        assert replace(self.batch, size=None, masks={}).conditions == self.batch.extras

    def test_a_batch_moves_with_everything_in_it(self):
        moved = self.batch.to(torch.device("meta"))
        tensors = (moved.x, moved.mask, moved.masks["depth"], moved.weight, moved.size, moved.extras["map"])
        assert all(each.device.type == "meta" for each in (*tensors, moved.extras["more"]["deep"]))
        assert moved.keys == self.batch.keys and moved.extras["text"] == ["x", "y", "z"]

    def test_a_part_has_a_part_of_everything(self):
        part = self.batch.part(slice(1, 2))
        assert part.keys == ("b",) and part.size.tolist() == [[5]] and part.extras["text"] == ["y"]
        assert part.extras["map"].tolist() == part.extras["more"]["deep"].tolist() == [1]
        assert all(len(each) == 1 for each in (part.x, part.mask, part.masks["depth"], part.weight))

    def test_guidance_doubles_what_is_inside(self):
        twice = doubled({**self.batch.conditions, "scale": 2.0, "none": None, "pair": ("p", "q")})
        assert twice["map"].tolist() == twice["more"]["deep"].tolist() == [0, 1, 2, 0, 1, 2]
        assert twice["text"] == ["x", "y", "z"] * 2 and twice["pair"] == ("p", "q", "p", "q")
        assert twice["original_size"].shape == (6, 1) and (twice["scale"], twice["none"]) == (2.0, None)


def test_samples_without_weights_count_1():
    x = torch.zeros(1, 2)
    weights = (None, torch.tensor([0.0, 3.0]), None)
    batch = collate([Sample(x, "k", (2,), weight=weight) for weight in weights])
    assert batch.weight.tolist() == [[1.0, 1.0], [0.0, 3.0], [1.0, 1.0]]
    assert collate([Sample(x, "k", (2,))]).weight is None


class TestOneReading:
    def parts(self, folder, labels, cls=RGB, cache=0.0, **riders):
        main = RGB.Config()
        cfg = Folder.Config(
            path=str(folder / "rgb"),
            modality=main,
            extra=dict.fromkeys(labels, main),
            extra_path={label: str(folder / "rgb") for label in labels},
            input_size=32,
            batch_size=4,
            workers=0,
            cache_mib=cache,
        )
        modality = cls(main, size=32)
        extra = {label: riders.get(label, cls(main, size=32)) for label in labels}
        data = Folder(cfg, split="train", modality=modality, extra=extra)
        keys = {"seed": 0, "start_step": 0, "steps": 3, "accumulate": 1, "rank": 0, "world": 1}
        return TrainBatches(data, modality, extra, cfg, **keys)

    @pytest.mark.parametrize(("cache", "reads"), [(0.0, 12), (8.0, 4)])
    def test_labels_that_share_a_file_read_it_once_a_sample(self, tmp_path, cache, reads):
        scenes(tmp_path)
        cls = counted(RGB)
        for loaded in self.parts(tmp_path, ("a", "b"), cls, cache):
            assert torch.equal(loaded.batch.extras["a"], loaded.batch.x)
        assert len(cls.asked) == reads

    def test_what_is_read_in_another_way_is_read_for_itself(self, tmp_path):
        scenes(tmp_path)
        cls = counted(RGB)
        grey = cls(RGB.Config(background=(9, 9, 9)), size=32)
        unknown = cls(RGB.Config(), size=32)
        unknown.reading = object()
        list(self.parts(tmp_path, ("a", "b"), cls, a=grey, b=unknown))
        assert len(cls.asked) == 3 * 12


@dataclass
class Recordings:
    """Files of 5,000 samples in windows of 1,024, and a rider for each file."""

    folder: Path
    rider: str = "whole"

    def __len__(self):
        return 10

    def key(self, index):
        return f"{index // 5}/{index % 5}"

    def get(self, index, label=""):
        start = index % 5 * 1024
        stop = min(start + 1024, 5000)
        if not label:
            return Window(self.folder / f"{index // 5}.npy", (start,), (stop,))
        path = self.folder / f"{index // 5}-slow.npy"
        return path if self.rider == "whole" else Window(path, (start // 4,), (stop // 4,))


class TestWindows:
    def parts(self, folder, rider="whole"):
        for number in range(2):
            np.save(folder / f"{number}.npy", np.arange(5000.0)[None] + 10_000 * number)
            np.save(folder / f"{number}-slow.npy", np.arange(0.0, 5000.0, 4)[None] + 10_000 * number)
        cls = counted(Array)
        modality = cls(Array.Config(channels=1, size=(256,)), size=None)
        slow = Array(Array.Config(channels=1, size=(256,)), size=None)
        return Recordings(folder, rider), modality, {"slow": slow}

    def eval(self, data, modality, extra=None, size=(256,), count=5):
        cfg = DataConfig(modality=modality.cfg, workers=0)
        batches = EvalBatches(data, modality, extra or {}, cfg, size=size, batch_size=count, rank=0, world=1)
        return [loaded.batch for loaded in batches]

    def test_samples_are_windows_of_files_that_are_read_once(self, tmp_path):
        data, modality, _ = self.parts(tmp_path)
        whole = np.arange(5000.0)
        batch, _ = self.eval(data, modality, size=(904,))
        assert len(type(modality).asked) == 2  # ten samples
        assert batch.keys == tuple(f"0/{i}" for i in range(5))
        assert batch.size.tolist() == [[1024]] * 4 + [[904]]
        assert torch.allclose(batch.x[4, 0], torch.from_numpy(whole[4096:]).float())  # no resize
        middle = torch.from_numpy(whole[1024:2048]).float()
        assert abs(float(batch.x[1].mean() - middle.mean())) < 1

    @pytest.mark.parametrize("rider", ["whole", "window"])
    def test_crops_stay_inside_and_riders_follow(self, tmp_path, rider):
        data, modality, extra = self.parts(tmp_path, rider)
        reader = Reader(data, modality, extra)
        for index in range(10):
            for seed in range(3):
                sample = reader.read(index, (256,), np.random.default_rng(seed))
                low = 10_000 * (index // 5) + index % 5 * 1024
                assert low <= float(sample.x.min()) < float(sample.x.max()) < low + sample.extent[0]
                assert float((sample.extras["slow"] - sample.x).abs().max()) < 8

    def test_a_window_outside_its_file_is_a_bad_sample(self, tmp_path):
        data, modality, _ = self.parts(tmp_path)
        data.get = lambda index, label="": Window(tmp_path / "0.npy", (4500,), (5100,))
        says = r"the window \[4500\] to \[5100\] does not lie inside the file, whose extent is \[5000\]"
        with pytest.raises(DataError, match=says):
            Reader(data, modality, {}).read(0, (256,), None)
        assert isinstance(Reader(data, modality, {}).try_read(0, (256,), None), tuple)

    def test_arrays_in_memory_have_windows_too(self, tmp_path):
        data, modality, _ = self.parts(tmp_path)
        held = np.load(tmp_path / "0.npy")
        data.get = lambda index, label="": Window(held, (100,), (356,))
        reader = Reader(data, modality, {}, cache_mib=8.0)
        x = [reader.read(index, (256,), None).x for index in range(4)]
        assert x[0].flatten().tolist() == list(range(100, 356)) and len(type(modality).asked) == 1

    def test_a_mask_lies_on_the_window_or_on_the_file(self, tmp_path):
        Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "a.png")
        flat = np.zeros((64, 64), np.uint8)
        flat[:, 40:] = 255
        Image.fromarray(flat).save(tmp_path / "m.png")
        rgb, mask = RGB(RGB.Config(), size=16), Mask(Mask.Config(), size=16)
        box = (0, 32), (32, 64)
        for source in (tmp_path / "m.png", Window(tmp_path / "m.png", *box)):
            data = Recordings(tmp_path)
            data.get = lambda index, label="", s=source: s if label else Window(tmp_path / "a.png", *box)
            sample = Reader(data, rgb, {"valid": mask}).read(0, (32, 32), None)
            assert sample.mask.tolist() == [[column >= 8 for column in range(32)]] * 32


RECORDINGS = """
import numpy as np
from dataclasses import dataclass
from pathlib import Path
from vqcore.plugin import Component, Plugin, hookimpl
from vqcore.protocols import Window
from vqcore.schema import DataConfig
from vqcore.modalities.array import Array


class Recordings:
    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        '''Long recordings.'''

        path: str
        '''Folder.'''
        has_eval = True

    def __init__(self, cfg, *, split, modality, extra):
        self.files = sorted(Path(cfg.path).glob("*.npy"))

    def __len__(self):
        return 4 * len(self.files)

    def key(self, index):
        return f"{self.files[index // 4].stem}/{index % 4}"

    def get(self, index, label=""):
        start = index % 4 * 1024
        return Window(self.files[index // 4], (start,), (start + 1024,))


class Sure(Array):
    '''Knows that the second half of a window is noise.'''

    def weight(self, raw, view):
        import torch

        return (torch.arange(view.size[0]) < view.size[0] // 2).float()


@hookimpl
def vqcore_plugin():
    return Plugin(1, "mine", (
        Component("data", "recordings", ":Recordings", "windows"),
        Component("modality", "sure", ":Sure", "weights"),
    ))
"""


@pytest.mark.slow
def test_a_run_on_windows_with_weights(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(RECORDINGS)
    (tmp_path / "long").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        np.save(
            tmp_path / f"long/{number}.npy", np.sin(np.arange(5000) / 40 + rng.random()).astype(np.float32)
        )
    modality = {"name": "local/sure", "channels": 1, "size": [256], "range": [-1, 1]}
    data = {"name": "local/recordings", "path": str(tmp_path / "long"), "modality": modality, "batch_size": 4}
    tree = {**run_tree(tmp_path / "run"), "data": {**data, "workers": 2}}
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(tree))
    plugin = ["--plugin", str(tmp_path / "mine.py")]
    assert main(["check", str(tmp_path / "cfg.yaml"), *plugin]) == 0
    assert main(["train", str(tmp_path / "cfg.yaml"), *plugin]) == 0
    assert main(["eval", str(tmp_path / "run"), *plugin]) == 0
    assert "12" in capsys.readouterr().out
    registry().add_file(str(tmp_path / "mine.py"))
    run = build(from_tree(tree, schema=RunConfig), torch.device("cpu"))
    batch = run.tokenizer.prepare(first_batch(run))
    assert batch.weight.shape == (4, 256) and batch.weight.mean() == 0.5
    rng_ = [torch.Generator()] * 4
    run.tokenizer.eval()

    @torch.no_grad()
    def loss(each):
        losses = run.objective.losses(run.tokenizer, each, player="model", step=0, rng=rng_, shared={})
        return float(losses.terms["pixel/mse"])

    masked = replace(batch, weight=None, mask=batch.weight > 0)
    assert loss(batch) == pytest.approx(loss(masked)) != pytest.approx(loss(replace(batch, weight=None)))


def test_a_mask_cannot_replace_values_that_are_computed_later():
    class Later(RGB):
        def finish(self, x):
            return x

    mask = Mask(Mask.Config(mask_value=-1.0), size=8)
    with pytest.raises(
        ConfigError, match=r"data\.extra\.valid: a mask cannot replace values here.*remove mask_value"
    ):
        Reader(Recordings(Path()), Later(RGB.Config(), size=8), {"valid": mask})


def test_the_digest_of_a_set_of_windows_sees_their_bounds_and_reads_a_file_once(tmp_path, monkeypatch):
    read = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: read.append(1) or file_digest(*given))
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.arange(5000.0))
    whole = set_sha256(Recordings(tmp_path), (), None)
    assert len(read) == 2
    shifted = Recordings(tmp_path)
    shifted.get = lambda index, label="": replace(Recordings.get(shifted, index), stop=(4096,))
    assert set_sha256(shifted, (), None) != whole
