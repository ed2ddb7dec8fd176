"""The toy components and configs of the core's tests, for the runs that these tests watch."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

from toys import run_config, toy  # noqa: F401

from vqcore.run import state


@pytest.fixture
def some_run(toy, tmp_path):  # noqa: F811
    """Makes a run in `tmp_path / "run"` that has done `step` steps; its last codes were 0, 1, 1 and 3."""

    def make(step=0):
        run = state.build(run_config(tmp_path / "run"), torch.device("cpu"))
        run.progress.step = step
        run.window.add(torch.tensor([0, 1, 1, 3]).reshape(1, -1, 1), 0)
        run.dir.mkdir(exist_ok=True)
        return run

    return make
