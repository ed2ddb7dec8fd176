"""The conformance kit on the core's own components: data sources, metrics, modalities, objectives."""

from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from vqcore_synth.source import Scenes

from tests.toys import run_tree, toy  # noqa: F401
from vqcore.builtin import vqcore_plugin
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.testing import conformance
from vqcore.testing.basics import noise
from vqcore.testing.checks import check_plugin

PICTURE = DataSpec(channels=3, size=(16, 16))
CLASSES = DataSpec(channels=1, size=(8, 8), kind="categorical", range=None, labels=5, loss="cross_entropy")
DEPTH = DataSpec(channels=1, size=(8, 8), range=(0.5, 9.0))
NORMALS = DataSpec(channels=3, size=(8, 8), kind="unit-vector")
EDGES = DataSpec(channels=1, size=(8, 8), kind="binary")
FEATURES = DataSpec(channels=6, size=(4, 4), range=None)


def scene(what, size=32):
    """A label of a synthetic scene."""
    modality = registry().build("modality", conformance.configured("modality", "rgb", {}), size=size)
    cfg = Scenes.Config(name="synth/scenes", modality=modality.cfg, what=what, side=2 * size)
    return Scenes(cfg, split="train", modality=modality, extra={}).get(3)


# Data sources


class TestFolder(conformance.DataConformance):
    component, modality, size = "folder", {"name": "rgb"}, (8, 8)

    def settings(self, folder):
        for name in ("train/a", "train/b", "eval/a", "depth", "depth_eval"):
            (folder / name).mkdir(parents=True)
        rng = np.random.default_rng(0)
        for name in ("a/one", "a/two", "b/one"):
            Image.fromarray(rng.integers(0, 255, (12, 9, 3), np.uint8)).save(folder / f"train/{name}.png")
        Image.fromarray(rng.integers(0, 255, (12, 9, 3), np.uint8)).save(folder / "eval/a/one.png")
        return {"path": str(folder / "train"), "eval_path": str(folder / "eval")}


class TestArrayFile(conformance.DataConformance):
    component, size = "array", (8, 8)
    modality: ClassVar = {"name": "array", "channels": 2}

    def settings(self, folder):
        np.save(folder / "train.npy", noise(5, 2, 9, 9).numpy())
        np.savez(folder / "eval.npz", noise(3, 2, 9, 9).numpy())
        return {"path": str(folder / "train.npy"), "eval_path": str(folder / "eval.npz")}


class TestSynthetic(conformance.DataConformance):
    component, modality, size = "synthetic", {"name": "rgb"}, (16, 16)
    configs: ClassVar = (
        {
            "samples": 1_000_000,
            "extra": {"depth": {"name": "vision/depth"}, "normal": {"name": "vision/normal"}},
        },
        {"eval_samples": 0, "side": [12, 20], "objects": [0, 1]},
    )


# Metrics


class TestPSNR(conformance.MetricConformance):
    component, spec = "psnr", PICTURE


class TestSSIM(conformance.MetricConformance):
    component, spec = "ssim", PICTURE


class TestMAE(conformance.MetricConformance):
    component, spec = "mae", PICTURE


class TestAccuracy(conformance.MetricConformance):
    component, spec = "accuracy", CLASSES


class TestIoU(conformance.MetricConformance):
    component, spec = "iou", CLASSES


class TestIoUOfMasks(conformance.MetricConformance):
    component, spec = "iou", EDGES


class TestF1(conformance.MetricConformance):
    component, spec = "f1", EDGES


class TestAngle(conformance.MetricConformance):
    component, spec = "angle", NORMALS


class TestCosine(conformance.MetricConformance):
    component, spec = "cosine", FEATURES


class TestAbsRel(conformance.MetricConformance):
    component, spec = "abs-rel", DEPTH


class TestDelta(conformance.MetricConformance):
    component, spec = "delta", DEPTH


class TestSISNR(conformance.MetricConformance):
    component, spec = "si-snr", DataSpec(channels=1, size=(64,))


class TestJointError(conformance.MetricConformance):
    component, spec = "joint-error", DataSpec(channels=2, size=(7,), range=None)
    waived: ClassVar = {"mask": "a pose is whole"}


class TestRotationError(conformance.MetricConformance):
    component, spec = "rotation-error", DataSpec(channels=9, size=(7,), range=None)
    waived: ClassVar = {"mask": "a pose is whole"}


# Modalities


class TestRGB(conformance.ModalityConformance):
    component, size = "rgb", (32, 32)

    def source(self):
        return scene("rgb")


class TestArray(conformance.ModalityConformance):
    component, size = "array", (8, 8)
    configs: ClassVar = (
        {"channels": 2, "range": [-9.0, 9.0], "hflip": 0.5},
        {"channels": 2, "kind": "angle"},
        {"channels": 2, "min_crop_scale": 0.5},
    )

    def source(self):
        return noise(2, 12, 12).numpy()


class TestDepth(conformance.ModalityConformance):
    component, size = "depth", (32, 32)
    configs: ClassVar = (
        {"scaling": "log", "range": [0.1, 20.0]},
        {"scaling": "linear", "range": [0.1, 20.0]},
    )

    def source(self):
        return scene("depth")


class TestStandardisedDepth(TestDepth):
    configs: ClassVar = ({},)
    waived: ClassVar = {"round-trip": "mean and deviation of an image are not kept"}


class TestNormal(conformance.ModalityConformance):
    component, size = "normal", (32, 32)

    def source(self):
        return scene("normal")


class TestSemseg(conformance.ModalityConformance):
    component, size = "semseg", (32, 32)
    configs: ClassVar = (
        {"num_labels": 6},
        {"num_labels": 7, "shift": True},
        {"num_labels": 6, "ignore_label": 2},
    )

    def source(self):
        return scene("semseg")


class TestEdge(conformance.ModalityConformance):
    component, size = "edge", (32, 32)

    def source(self):
        return scene("edge")


class TestInstance(conformance.ModalityConformance):
    component, size = "instance", (32, 32)

    def source(self):
        return scene("instance")


class TestPose(conformance.ModalityConformance):
    component, size = "pose", (1,)
    configs: ClassVar = ({"joints": 17, "dims": 2, "center": [32, 32], "scale": 32.0},)

    def source(self):
        return scene("pose")


class TestAudio(conformance.ModalityConformance):
    component, size = "audio", (4000,)

    def source(self):
        return scene("audio")


class TestLogMel(conformance.ModalityConformance):
    component, size = "log-mel", (32, 32)

    def source(self):
        return scene("audio")


class TestFeatures(conformance.ModalityConformance):
    component, size = "features", (8, 8)
    configs: ClassVar = ({"channels": 4},)

    def source(self):
        return noise(4, 8, 8).numpy()


class TestVector(conformance.ModalityConformance):
    component = "vector"
    configs: ClassVar = ({"channels": 6},)

    def source(self):
        return noise(6).numpy()


# Objectives and hooks, with toys around them


@pytest.mark.usefixtures("toy")
class TestReconstruction(conformance.ObjectiveConformance):
    component = "reconstruction"
    configs: ClassVar = ({}, {"loss": "l1"})
    tokenizer: ClassVar = {
        "modality": {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1]},
        "size": [8, 8],
        "model": {part: {"name": f"toy/{part}"} for part in ("encoder", "quantizer", "decoder")},
    }


@pytest.mark.usefixtures("toy")
class TestReconstructionOfClasses(TestReconstruction):
    configs: ClassVar = ({},)
    tokenizer: ClassVar = {
        **TestReconstruction.tokenizer,
        "modality": {"name": "array", "kind": "categorical", "labels": 5, "size": [8, 8]},
    }


@pytest.mark.usefixtures("toy")
class TestDiary(conformance.HookConformance):
    component = "toy/diary"
    run: ClassVar = run_tree("unused", run__steps=2)


# All of them


def test_every_component_of_the_core_has_a_class_here():
    """Hooks of services and what other test files check with the kit are named with their reason."""
    elsewhere = {
        "tensorboard": "tests/test_hooks.py",
        "wandb": "tests/test_hooks.py",
        "mask": "tests/test_modalities_mask.py",
    }
    classes = [cls for cls in globals().values() if isinstance(cls, type) and hasattr(cls, "component")]
    covered = {(cls.kind, cls.component) for cls in classes}
    missing = [
        component.name
        for component in vqcore_plugin().components
        if (component.kind, component.name) not in covered and component.name not in elsewhere
    ]
    assert not missing


def test_the_core_passes_what_plugins_check_runs():
    assert check_plugin(registry(), "core") == []
