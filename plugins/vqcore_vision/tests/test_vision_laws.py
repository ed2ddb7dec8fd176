"""The manifest, the README, and the laws of planar modalities on bundled files and of metrics."""

from pathlib import Path
from typing import ClassVar

import yaml

from vqcore.compose.build import from_tree
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.schema import TokenizerConfig
from vqcore.testing.checks import check_plugin
from vqcore.testing.conformance import MetricConformance, ModalityConformance

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "plugins/vqcore_vision/README.md"
TILE = "americas/altiplano_s10_w080"
DEPTH = DataSpec(channels=1, size=(8, 8), range=(0.5, 9.0))
MODALITIES = ("depth", "normal", "semseg", "edge", "instance", "features", "vector", "pose")
METRICS = ("abs-rel", "delta", "joint-error", "rotation-error")


class PlanarConformance(ModalityConformance):
    size = (64, 64)

    def source(self):
        name = self.component.removeprefix("vision/")
        return ROOT / "data/earth/train" / name / f"{TILE}.png"


class TestDepth(PlanarConformance):
    component = "vision/depth"
    configs: ClassVar = (
        {"scaling": "log", "range": [1.0, 20000.0], "factor": 10.0},
        {"scaling": "linear", "range": [0.0, 20000.0], "factor": 10.0},
        {"scaling": "linear", "range": [0.0, 20000.0], "factor": 10.0, "mask_value": 0.0, "resample": "bicubic"},
    )  # fmt: skip


class TestStandardisedDepth(PlanarConformance):
    component = "vision/depth"
    waived: ClassVar = {"round-trip": "mean and deviation of an image are not kept"}


class TestNormal(PlanarConformance):
    component = "vision/normal"
    configs: ClassVar = ({}, {"mask_value": 0.0})


class TestSemseg(PlanarConformance):
    component = "vision/semseg"
    configs: ClassVar = (
        {"num_labels": 8},
        {"num_labels": 9, "shift": True},
        {"num_labels": 8, "ignore_label": 2},
    )


class TestEdge(PlanarConformance):
    component = "vision/edge"


class TestAbsRel(MetricConformance):
    component, spec = "vision/abs-rel", DEPTH


class TestDelta(MetricConformance):
    component, spec = "vision/delta", DEPTH


class TestJointError(MetricConformance):
    component, spec = "vision/joint-error", DataSpec(channels=2, size=(7,), range=None)
    waived: ClassVar = {"mask": "a pose has no invalid positions"}


class TestRotationError(MetricConformance):
    component, spec = "vision/rotation-error", DataSpec(channels=9, size=(7,), range=None)
    waived: ClassVar = {"mask": "a pose has no invalid positions"}


def test_the_manifest_lists_every_component():
    for kind, names in (("modality", MODALITIES), ("metric", METRICS)):
        found = [each.name for each in registry().components(kind) if each.origin.id == "vision"]
        assert found == [f"vision/{name}" for name in names]


def test_the_plugin_passes_its_checks():
    assert check_plugin(registry(), "vision") == []


def blocks(language):
    return [text.partition("```")[0] for text in README.read_text().split(f"```{language}\n")[1:]]


def test_the_yaml_of_the_readme_is_valid():
    (text,) = blocks("yaml")
    tree = yaml.safe_load(text)
    whole = {
        "modality": tree["data"]["modality"],
        "size": [tree["data"]["input_size"]] * 2,
        "model": tree["model"],
        "objective": {"name": "reconstruction"},
    }
    assert from_tree(whole, schema=TokenizerConfig, file="README").modality.name == "vision/depth"


def test_the_python_of_the_readme_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (text,) = blocks("python")
    names = {}
    exec(text, names)
    assert names["x"].shape == (1, 192, 192)
