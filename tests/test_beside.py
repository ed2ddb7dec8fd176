"""Captions and targets: what rides beside a sample and is no sample itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vqcore.data.batches import TrainBatches
from vqcore.errors import ConfigError, DataError
from vqcore.modalities.beside import Caption, Target
from vqcore.protocols import View
from vqcore.registry import registry
from vqcore.testing.conformance import configured

CAPTION = Caption(Caption.Config(), size=None)
VIEW = View((0.0, 0.0), (1.0, 1.0), (8, 8))


class TestCaption:
    @pytest.mark.parametrize(
        ("name", "text", "captions"),
        [
            ("a.txt", "a cat\n on a mat\n", ("a cat on a mat",)),
            ("a.json", json.dumps("a cat"), ("a cat",)),
            ("a.json", json.dumps(["a", "b"]), ("a", "b")),
            ("a.json", json.dumps({"caption": "a", "id": 3}), ("a",)),
            ("a.json", json.dumps({"caption": ["a", "b"]}), ("a", "b")),
        ],
    )
    def test_files(self, tmp_path, name, text, captions):
        (tmp_path / name).write_text(text)
        assert CAPTION.read(tmp_path / name) == captions

    @pytest.mark.parametrize("tree", [3, [], [1], {}, {"caption": None}, {"caption": []}])
    def test_what_is_no_caption(self, tmp_path, tree):
        (tmp_path / "a.json").write_text(json.dumps(tree))
        with pytest.raises(
            DataError, match=r"a\.json: is no text, no list of texts and no mapping with 'caption'"
        ):
            CAPTION.read(tmp_path / "a.json")

    def test_training_draws_one_and_evaluation_takes_the_first(self):
        drawn = {CAPTION.tensor(("a", "b"), View((0.0,), (1.0,), (1,), draw=draw)) for draw in range(1, 9)}
        assert drawn == {"a", "b"} and CAPTION.tensor(("a", "b"), VIEW) == "a"

    def test_captions_are_no_samples(self):
        with pytest.raises(ConfigError, match=r"captions ride beside samples \(data\.extra\)"):
            CAPTION.view((1,), (1,), None)


def test_a_target_of_other_proportions_is_refused():
    target = Target(configured("modality", "target", {"modality": {"name": "rgb"}, "size": [16, 32]}), size=8)
    with pytest.raises(ValueError, match="other proportions"):
        target.ride(VIEW, target.spec)


def test_a_target_in_another_range_is_refused():
    target = Target(configured("modality", "target", {"modality": {"name": "rgb"}, "size": 16}), size=8)
    with pytest.raises(ValueError, match=r"range=.*-1.0.* data.modality .0.0, 1.0.: take the same"):
        target.ride(VIEW, replace(target.spec, range=(0.0, 1.0)))


def test_both_ride_beside_pictures(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 50).astype(np.uint8)[None, :, None], (40, 50, 3))
    for name in "abc":
        for folder in ("rgb", "texts"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(ramp).save(tmp_path / f"rgb/{name}.png")
        (tmp_path / f"texts/{name}.txt").write_text(f"picture {name}")
    plain = {"name": "rgb", "hflip": 0.5}
    tree = {
        "modality": plain, "input_size": 8, "batch_size": 3, "path": str(tmp_path / "rgb"),
        "extra": {"target": {"name": "target", "size": 16, "modality": plain}, "caption": {"name": "caption"}},
        "extra_path": {"target": str(tmp_path / "rgb"), "caption": str(tmp_path / "texts")},
    }  # fmt: skip
    cfg = configured("data", "folder", tree)
    extra = {label: registry().build("modality", node, size=(8, 8)) for label, node in cfg.extra.items()}
    modality = registry().build("modality", cfg.modality, size=(8, 8))
    data = registry().build("data", cfg, split="train", modality=modality, extra=extra)
    found = [
        [loaded.batch for loaded in TrainBatches(data, modality, extra, cfg, seed=0, start_step=0, steps=2,
                                                 accumulate=1, rank=0, world=1, workers=workers)]
        for workers in (0, 1)
    ]  # fmt: skip
    for batch, again in zip(*found, strict=True):
        assert batch.extras["caption"] == [f"picture {key}" for key in batch.keys] == again.extras["caption"]
        target = batch.extras["target"]
        assert target.shape == (3, 3, 16, 16) and torch.equal(target, again.extras["target"])
        small = torch.nn.functional.avg_pool2d(target, 2)  # the same crop, mirrored alike
        assert (small - batch.x).abs().mean() < 0.05 < (small.flip(-1) - batch.x).abs().mean()


def test_a_target_has_the_label_that_objectives_know():
    node = {"name": "target", "size": 16, "modality": {"name": "rgb"}}
    tree = {"modality": {"name": "rgb"}, "path": ".", "extra": {"big": node}, "extra_path": {"big": "."}}
    with pytest.raises(ConfigError, match=r"extra\.big: objectives know this modality by the label target"):
        configured("data", "folder", tree)
