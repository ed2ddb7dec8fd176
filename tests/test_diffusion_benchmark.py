"""The settings of the benchmarks of losses and of diffusion decoders exist; the runs themselves take hours."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from vqcore.compose.layers import load
from vqcore.schema import RunConfig

pytest.importorskip("skimage")
for plugin in ("unet", "percept", "vit", "quant"):
    pytest.importorskip(f"vqcore_{plugin}")
WORDS = {"WEIGHTS": "file", "PLAIN": "run", "FLOW": "run", "DIFFUSION": "5", "DISTILLED": "5", "FIXED": "0.1"}
WORDS |= {"TENTH": "1", "FIFTH": "2", "THIRD": "3", "HALF": "4"}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("name", ["losses", "diffusion_quality"])
def test_every_run_has_settings_that_exist(benchmark, name):
    for settings in benchmark(name).RUNS.values():
        given = [re.sub(r"\b[A-Z]{4,}\b", lambda word: WORDS[word[0]], one) for one in settings]
        load(str(ROOT / "cfgs/quickstart.yaml"), given, schema=RunConfig)


def test_means_of_all_crops_and_of_every_fourth(benchmark):
    made = benchmark("diffusion_quality")
    photographs = np.repeat([0, 1], [8, 24])
    values = np.where(photographs == 0, 1.0, 3.0)
    assert made._mean(values, photographs) == 2.0
    assert made._mean(values[:: made.SPARSE], photographs) == 2.0


def test_the_ratio_of_means_over_photographs(benchmark):
    made, photographs = benchmark("diffusion_quality"), np.repeat([0, 1], [2, 6])
    teacher = np.where(photographs == 0, 1.0, 3.0)
    assert made.ratio(2 * teacher, teacher, photographs) == "2.00 (2.00 to 2.00)"
    assert made.ratio(np.ones(8), teacher, photographs) == "0.50 (0.33 to 1.00)"
