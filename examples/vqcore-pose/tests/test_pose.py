"""The laws that vqcore asks of each component, and the recipe with its hook, run for two steps."""

from PIL import Image
from vqcore_pose.walks import Walks

from vqcore.compose.layers import load
from vqcore.schema import RunConfig
from vqcore.testing.conformance import ModalityConformance, QuantizerConformance


class TestSigns(QuantizerConformance):
    component = "pose/signs"
    configs = ({}, {"bits": 1, "groups": 3})


class TestKeypoints(ModalityConformance):
    component = "pose/keypoints"
    size = (32,)

    def source(self):
        data = Walks.Config(name="pose/walks", modality=None)
        return Walks(data, split="train", modality=None, extra={}).get(3)


def test_the_recipe_and_its_hook(tmp_path):
    from vqcore.trainer import train

    overrides = [f"run.dir={tmp_path / 'run'}", "run.steps=2", "data.length=16", "hooks.gif.frame_ms=100"]
    train(load("recipe:pose/walk", overrides, schema=RunConfig).config)
    with Image.open(tmp_path / "run/samples/walk_2.gif") as made:
        assert made.n_frames == 32 and made.size == (192, 96) and made.info["duration"] == 100
