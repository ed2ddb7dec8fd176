"""W&B: what is sent to a stand-in, and what the real library writes offline."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
from toys import run_config
from vqcore_track.wandb import Wandb

from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


class FakeWandb(SimpleNamespace):
    """Notes what is asked of it."""

    def __init__(self):
        super().__init__(begun=[], logged=[], finished=[], metrics=[])

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def define_metric(self, name, **settings):
        self.metrics.append((name, settings))

    def log(self, metrics):
        self.logged.append(metrics)

    def finish(self, exit_code):
        self.finished.append(exit_code)

    def Histogram(self, np_histogram):
        return [part.tolist() for part in np_histogram]

    def Image(self, path):
        return f"picture {path}"


@pytest.fixture
def fake(monkeypatch):
    found = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", found)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return found


def test_wandb_goes_on_with_the_same_run(tmp_path, fake):
    hooks = {"w": {"name": "track/wandb", "project": "poses", "tags": ["a"]}}
    train(run_config(tmp_path / "run", run__steps=4, hooks=hooks, optim__horizon=6))
    train(run_config(tmp_path / "run", run__steps=6, hooks=hooks, optim__horizon=6))
    first, second = fake.begun
    assert first["id"] == second["id"] == json.loads((tmp_path / "run/wandb.json").read_text())["id"]
    assert first["resume"] == "allow" and first["project"] == "poses" and first["name"] == "run"
    assert first["config"]["model"]["encoder"]["name"] == "toy/encoder" and first["tags"] == ("a",)
    training = [line["step"] for line in fake.logged if "loss" in line]
    assert training == [1, 2, 3, 4, 5, 6] and ("*", {"step_metric": "step"}) in fake.metrics
    assert any("eval/metric/psnr" in line and line["step"] == 4 for line in fake.logged)
    numbers, edges = fake.logged[0]["codes/uses"]
    assert sum(numbers) == 16 and len(edges) == len(numbers) + 1
    assert fake.finished == [0, 0]


def test_wandb_pictures_and_failures(some_run, fake):
    hook = Wandb(Wandb.Config(mode="offline"))
    hook.vqcore_run_started(some_run())
    hook.vqcore_pictured(3, "sheet", "sheet.png")
    hook.vqcore_run_ended(ValueError("x"))
    assert fake.logged == [{"step": 3, "sheet": "picture sheet.png"}] and fake.finished == [1]
    assert fake.begun[0]["mode"] == "offline" and fake.begun[0]["resume"] is None


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path, monkeypatch):
    """The real library writes a real file, which holds the metrics."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_CODE", "true")
    train(run_config(tmp_path / "run", hooks={"w": {"name": "track/wandb", "mode": "offline"}}))
    id = json.loads((tmp_path / "run/wandb.json").read_text())["id"]
    (written,) = (tmp_path / "run/wandb").glob(f"offline-run-*-{id}/run-{id}.wandb")
    names = (b"loss/pixel/mse", b"eval/metric/psnr", b"codes/uses")
    for _ in range(60):  # a process of wandb's own writes; on a busy machine it comes later
        content = written.read_bytes()
        if all(name in content for name in names):
            return
        time.sleep(0.5)
    raise AssertionError(f"{len(content)} bytes without {names}")
