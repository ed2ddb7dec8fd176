"""The conformance kit on the components of the core: data sources, metrics, modalities, objectives."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from toys import run_tree, toy  # noqa: F401

from vqcore.builtin import vqcore_plugin
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.testing import conformance
from vqcore.testing.basics import noise
from vqcore.testing.checks import check_plugin

PICTURE = DataSpec(channels=3, size=(16, 16))
CLASSES = DataSpec(channels=1, size=(8, 8), kind="categorical", range=None, labels=5, loss="cross_entropy")
NORMALS = DataSpec(channels=3, size=(8, 8), kind="unit-vector")
EDGES = DataSpec(channels=1, size=(8, 8), kind="binary")
FEATURES = DataSpec(channels=6, size=(4, 4), range=None)


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


class TestTar(conformance.DataConformance):
    component, modality, size = "tar", {"name": "rgb"}, (8, 8)
    configs: ClassVar = [
        {"extra": {"valid": {"name": "mask"}}, "extra_suffix": {"valid": "mask.png"}},
        {"suffix": "png"},
    ]

    def settings(self, folder):
        rng = np.random.default_rng(0)
        for shard, names in (("a-0", ("two", "one")), ("a-1", ("one",)), ("b-0", ("one",))):
            with tarfile.open(folder / f"{shard}.tar", "w") as file:
                for name in names:
                    picture = Image.fromarray(rng.integers(0, 255, (12, 9, 3), np.uint8))
                    for suffix in ("mask.png", "png"):
                        picture.convert("L" if suffix == "mask.png" else "RGB").save(folder / f"x.{suffix}")
                        file.add(folder / f"x.{suffix}", arcname=f"{name}.{suffix}")
        return {"path": str(folder / "a-{0..1}.tar"), "eval_path": str(folder / "b-0.tar")}


class TestParquet(conformance.DataConformance):
    component, modality, size = "parquet", {"name": "rgb"}, (8, 8)
    configs: ClassVar = [
        {"extra": {"valid": {"name": "mask"}}, "column": "image", "extra_column": {"valid": "mask"}},
        {"column": "image", "key": "name", "memory_mib": 1},
    ]

    def settings(self, folder):
        rng = np.random.default_rng(0)
        for name, count in (("train", 9), ("eval", 2)):
            held = {"image": [], "mask": [], "name": [f"{row}.png" for row in range(count)]}
            for _ in range(count):
                picture = Image.fromarray(rng.integers(0, 255, (12, 9, 3), np.uint8))
                for column, mode in (("image", "RGB"), ("mask", "L")):
                    file = io.BytesIO()
                    picture.convert(mode).save(file, "PNG")
                    held[column].append({"bytes": file.getvalue(), "path": None})
            pq.write_table(pa.table(held), folder / f"{name}.parquet", row_group_size=2)
        return {"path": str(folder / "train.parquet"), "eval_path": str(folder / "eval.parquet")}


class TestTarget(conformance.ModalityConformance):
    component, size = "target", (16, 16)
    configs: ClassVar = [{"modality": {"name": "rgb"}, "size": 16}]

    def source(self):
        return np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)


class TestArrayFile(conformance.DataConformance):
    component, size = "array", (8, 8)
    modality: ClassVar = {"name": "array", "channels": 2}

    def settings(self, folder):
        np.save(folder / "train.npy", noise(5, 2, 9, 9).numpy())
        np.savez(folder / "eval.npz", noise(3, 2, 9, 9).numpy())
        return {"path": str(folder / "train.npy"), "eval_path": str(folder / "eval.npz")}


# Stores


class TestArrow(conformance.StoreConformance):
    component = "arrow"


class TestParquetStore(conformance.StoreConformance):
    component = "parquet"


class TestTarStore(conformance.StoreConformance):
    component = "tar"


class TestFolderStore(conformance.StoreConformance):
    component = "folder"
    waived: ClassVar = {
        "extras": "a .npy has no room for them",
        "missing": "the files that are there are the store",
    }


# Metrics


class TestPSNR(conformance.MetricConformance):
    component, spec = "psnr", PICTURE


class TestSSIM(conformance.MetricConformance):
    component, spec = "ssim", PICTURE


class TestMAE(conformance.MetricConformance):
    component, spec = "mae", PICTURE


class TestChannels(conformance.MetricConformance):
    component, spec = "channels", replace(PICTURE, names=("red", "green", "blue"))


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


# Modalities


class TestRGB(conformance.ModalityConformance):
    component, size = "rgb", (32, 32)

    def source(self):
        return sorted((Path(__file__).parents[1] / "data/photos/heldout").rglob("*.jpg"))[0]


class TestArray(conformance.ModalityConformance):
    component, size = "array", (8, 8)
    configs: ClassVar = (
        {"channels": 2, "range": [-9.0, 9.0], "hflip": 0.5},
        {"channels": 2, "kind": "angle"},
        {"channels": 2, "min_crop_scale": 0.5},
    )

    def source(self):
        return noise(2, 12, 12).numpy()


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
class TestDiffusion(conformance.ObjectiveConformance):
    component = "diffusion"
    configs: ClassVar = (
        {
            "scheduler": {"name": "toy/ddpm"},
            "cls_free_guidance_dropout": 0.5,
            "adversary": {"name": "toy/gan"},
        },
        {"scheduler": {"name": "toy/flow"}, "times": "mixed", "min_snr": 5, "loss": "huber"},
    )
    tokenizer: ClassVar = {
        **TestReconstruction.tokenizer,
        "model": {**TestReconstruction.tokenizer["model"], "decoder": {"name": "toy/denoiser"}},
    }


@pytest.mark.usefixtures("toy")
class TestDiary(conformance.HookConformance):
    component = "toy/diary"
    run: ClassVar = run_tree("unused", run__steps=2)


# All components


def test_every_component_of_the_core_has_a_class_here():
    """Components that another test file checks with the kit are listed with this file."""
    elsewhere = {"mask": "tests/test_modalities_mask.py", "caption": "tests/test_beside.py"}
    elsewhere["tokens"] = "tests/test_train_on_tokens.py"
    elsewhere |= dict.fromkeys(("npy", "npz", "tiff", "csv", "parquet", "hdf5"), "tests/test_readers.py")
    classes = [cls for cls in globals().values() if isinstance(cls, type) and hasattr(cls, "component")]
    covered = {(cls.kind, cls.component) for cls in classes}
    missing = [
        component.name
        for component in vqcore_plugin().components
        if (component.kind, component.name) not in covered and component.name not in elsewhere
    ]
    assert not missing


def test_the_core_passes_the_checks_of_plugins():
    assert check_plugin(registry(), "core") == []
