"""What the hooks have in common, and the profile."""

import json
import sys

import pytest
from toys import run_config
from vqcore_track.profile import Profile
from vqcore_track.tensorboard import TensorBoard
from vqcore_track.wandb import Wandb

from vqcore.errors import ConfigError
from vqcore.registry import registry
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


def test_other_ranks_write_nothing(tmp_path, monkeypatch, some_run):
    monkeypatch.setattr("vqcore.dist.is_main", lambda: False)
    for hook in (TensorBoard(TensorBoard.Config()), Wandb(Wandb.Config(mode="offline"))):
        hook.vqcore_run_started(some_run())
        hook.vqcore_step_ended(some_run(), 1, {"loss": 1.0})
        hook.vqcore_evaluated(1, {"loss": 1.0})
        hook.vqcore_pictured(1, "sheet", "nowhere")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[name], None)
    full = f"track/{name}"
    cls = registry().load("hook", full)
    with pytest.raises(ConfigError, match=rf"hooks.mine \({full}\): needs {name} .*pip install {name}"):
        registry().build("hook", cls.Config(name=full), "hooks.mine")


def test_a_profile_of_the_run(tmp_path, capsys):
    hooks = {"profile": {"name": "track/profile", "steps": 3, "after": 2}}
    train(run_config(tmp_path / "run", run__steps=10, hooks=hooks))
    table = (tmp_path / "run/profile/table.txt").read_text()
    assert "Self CPU" in table
    assert len([row for row in table.splitlines() if row.strip().startswith("aten::")]) >= 5
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    names = [str(event.get("name")) for event in trace["traceEvents"]]
    for part in ("vqcore/load", "vqcore/step", "Optimizer.step"):
        assert any(part in name for name in names)
    assert "trace.json for a trace viewer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "after, recorded", [pytest.param(0, True, marks=pytest.mark.slow), (4, True), (9, False)]
)
def test_a_run_that_ends_early_keeps_the_steps_it_recorded(tmp_path, after, recorded):
    hooks = {"profile": {"name": "track/profile", "steps": 50, "after": after}}
    train(run_config(tmp_path / "run", hooks=hooks))
    assert (tmp_path / "run/profile/table.txt").exists() == recorded


@pytest.mark.parametrize("setting, least", [("steps", 1), ("after", 0), ("rows", 1)])
def test_settings_of_the_profile_have_bounds(setting, least):
    with pytest.raises(ValueError, match=f"{setting}={least - 1} must be at least {least}"):
        Profile.Config(**{setting: least - 1})
