"""Hooks: guarded calls, TensorBoard read back from its event files, W&B offline; documented as they are."""

import inspect
import json
import logging
import re
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from toys import run_config, toy  # noqa: F401
from vqcore_track.tensorboard import TensorBoard
from vqcore_track.usage import codebooks, uses_histogram
from vqcore_track.wandb import Wandb

from vqcore.errors import ConfigError, PluginLoadError
from vqcore.evaluate.usage import CodeWindow
from vqcore.plugin import RunHooks, hookimpl
from vqcore.registry import registry
from vqcore.run.hooks import GuardedHooks
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
HOOKS = {name: spec for name, spec in vars(RunHooks).items() if name.startswith("vqcore_")}


class Listener:
    def __init__(self, name="", diary=None):
        self.name, self.diary = name, diary if diary is not None else []

    @hookimpl
    def vqcore_saved(self, step):
        self.diary.append((self.name, "saved", step))

    @hookimpl
    def vqcore_run_ended(self, error):
        self.diary.append((self.name, "ended", error))


class Broken(Listener):
    @hookimpl
    def vqcore_saved(self, step, path):
        raise KeyError("loss")


# ------------------------------------------------------------------------------------------------- guarded


def test_a_hook_that_raises_is_named_once_and_switched_off(caplog):
    diary = []
    hooks = GuardedHooks(
        {"first": Listener("a", diary), "bad": Broken("b", diary), "last": Listener("c", diary)}
    )
    hooks.vqcore_saved(run=None, step=1, path="x")
    hooks.vqcore_saved(run=None, step=2, path="x")
    hooks.vqcore_run_ended(run=None, error=None)
    assert diary == [
        *(("a", "saved", 1), ("c", "saved", 1), ("a", "saved", 2), ("c", "saved", 2)),
        *(("a", "ended", None), ("c", "ended", None)),
    ]
    said = [message for message in caplog.messages if "switched off" in message]
    assert len(said) == 1 and list(hooks.off.values()) == said
    assert re.fullmatch(
        r"hooks.bad \(Broken\) is switched off, the run goes on without it: vqcore_saved raised KeyError: 'loss' "
        r"\(test_hooks.py:\d+\)",
        said[0],
    )


def test_an_interrupt_passes():
    class Impatient:
        @hookimpl
        def vqcore_saved(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedHooks({"x": Impatient()}).vqcore_saved(run=None, step=1, path="x")


def test_misspelt_hooks_and_arguments_are_refused():
    class Misspelt:
        @hookimpl
        def vqcore_save(self, step):
            pass

    class Greedy:
        @hookimpl
        def vqcore_saved(self, loss):
            pass

    with pytest.raises(PluginLoadError, match=r"hooks.x: .*vqcore_save.*docs/hooks.md"):
        GuardedHooks({"x": Misspelt()})
    with pytest.raises(PluginLoadError, match=r"hooks.y: .*loss"):
        GuardedHooks({"y": Greedy()})


# --------------------------------------------------------------------------------------------------- usage


def test_uses_of_codes():
    counts = torch.tensor([0, 0, 1, 2, 3, 4, 7, 8, 100])
    numbers, edges = uses_histogram(counts)
    assert edges.tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert numbers.tolist() == [2, 1, 2, 2, 1, 0, 0, 1] and numbers.sum() == len(counts)
    numbers, edges = uses_histogram(torch.zeros(5, dtype=torch.int64))
    assert numbers.tolist() == [5] and edges.tolist() == [0, 1]
    assert list(codebooks([torch.zeros(4, dtype=torch.int64)])) == ["codes/uses"]
    assert list(codebooks([torch.zeros(4, dtype=torch.int64)] * 2)) == ["codes/uses_0", "codes/uses_1"]


def test_a_power_of_two_falls_into_its_own_bin():
    for most in (1, 2, 4, 8, 15, 16):
        numbers, edges = uses_histogram(torch.tensor([most]))
        (place,) = np.flatnonzero(numbers)
        assert edges[place] <= most < edges[place + 1]


# --------------------------------------------------------------------------------------------- tensorboard


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
        found.Reload()
    return found


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    run = train(run_config(tmp_path / "run", hooks={"tb": {"name": "track/tensorboard"}}))
    found = events(tmp_path / "run/tensorboard")
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]
    for name in ("loss", "pixel/mse", "codes/usage", "lr"):
        seen = [(e.step, e.value) for e in found.Scalars(name)]
        assert seen == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in logged], name
    assert [e.step for e in found.Scalars("eval/psnr")] == [6]
    assert found.Scalars("eval/psnr")[0].value == pytest.approx(
        run.progress.evaluation["eval/psnr"], rel=1e-6
    )
    histogram = found.Histograms("codes/uses")[-1]
    assert histogram.step == 6 and sum(histogram.histogram_value.bucket) == run.tokenizer.codebook_size
    assert histogram.histogram_value.bucket[0] == (run.window.counts()[0] == 0).sum()


def test_tensorboard_keeps_one_axis_when_a_run_goes_on(tmp_path):
    hooks = {"tb": {"name": "track/tensorboard"}}
    train(run_config(tmp_path / "run", run__steps=4, hooks=hooks, optim__horizon=8))
    train(run_config(tmp_path / "run", run__steps=8, hooks=hooks, optim__horizon=8))
    found = events(tmp_path / "run/tensorboard")
    assert [e.step for e in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [e.step for e in found.Histograms("codes/uses")] == [1, 2, 3, 4, 5, 6, 7, 8]


def fake_run(directory, step=0, seen=(0, 1, 1, 3)):
    window = CodeWindow(4, 1)
    window.add(torch.tensor(seen).reshape(1, -1, 1), 0)
    directory.mkdir(exist_ok=True)
    return SimpleNamespace(dir=directory, step=step, config={"a": 1}, window=window)


def test_tensorboard_after_a_roll_back_and_a_killed_run(tmp_path):
    """Steps 3 and 4 are made again; TensorBoard shows the second time only, and after a restart from 2 likewise."""
    hook = TensorBoard(TensorBoard.Config())
    hook.vqcore_run_started(fake_run(tmp_path / "run"))
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (3, 30.0)):
        hook.vqcore_step_ended(fake_run(tmp_path / "run"), step, {"loss": loss})
    hook.vqcore_run_ended()
    found = [(e.step, e.value) for e in events(tmp_path / "run/tensorboard").Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 30.0)]
    again = TensorBoard(TensorBoard.Config())
    again.vqcore_run_started(fake_run(tmp_path / "run", step=2))
    again.vqcore_step_ended(fake_run(tmp_path / "run"), 3, {"loss": 300.0})
    again.vqcore_run_ended()
    found = [(e.step, e.value) for e in events(tmp_path / "run/tensorboard").Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 300.0)]


def test_tensorboard_pictures(tmp_path):
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "row.png")
    for pictures in (True, False):
        hook = TensorBoard(
            TensorBoard.Config(dir=str(tmp_path / str(pictures)), pictures=pictures, histograms=False)
        )
        hook.vqcore_run_started(fake_run(tmp_path / "run"))
        hook.vqcore_pictured(5, "samples", str(tmp_path / "row.png"))
        hook.vqcore_run_ended()
    (seen,) = events(tmp_path / "True").Images("samples")
    assert (seen.step, seen.width, seen.height) == (5, 4, 4)
    assert not events(tmp_path / "False").Tags()["images"]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("vqcore.dist.is_main", lambda: False)
    for hook in (TensorBoard(TensorBoard.Config()), Wandb(Wandb.Config(mode="offline"))):
        hook.vqcore_run_started(fake_run(tmp_path / "run"))
        hook.vqcore_step_ended(fake_run(tmp_path / "run"), 1, {"loss": 1.0})
        hook.vqcore_evaluated(1, {"loss": 1.0})
        hook.vqcore_pictured(1, "sheet", "nowhere")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[name], None)
    cls = registry().load("hook", name)
    with pytest.raises(ConfigError, match=rf"hooks.mine \({name}\): needs {name} .*pip install {name}"):
        registry().build("hook", cls.Config(name=name), "hooks.mine")


# --------------------------------------------------------------------------------------------------- wandb


class FakeWandb(SimpleNamespace):
    """Notes what is asked of it."""

    def __init__(self):
        super().__init__(begun=[], logged=[], finished=[], metrics=[])

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def define_metric(self, name, **settings):
        self.metrics.append((name, settings))

    def log(self, figures):
        self.logged.append(figures)

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
    assert any("eval/psnr" in line and line["step"] == 4 for line in fake.logged)
    numbers, edges = fake.logged[0]["codes/uses"]
    assert sum(numbers) == 16 and len(edges) == len(numbers) + 1
    assert fake.finished == [0, 0]


def test_wandb_pictures_and_failures(tmp_path, fake):
    hook = Wandb(Wandb.Config(mode="offline"))
    hook.vqcore_run_started(fake_run(tmp_path / "run"))
    hook.vqcore_pictured(3, "sheet", "sheet.png")
    hook.vqcore_run_ended(ValueError("x"))
    assert fake.logged == [{"step": 3, "sheet": "picture sheet.png"}] and fake.finished == [1]
    assert fake.begun[0]["mode"] == "offline" and fake.begun[0]["resume"] is None


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path, monkeypatch):
    """The real library writes a real file, which holds the figures."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_CODE", "true")
    train(run_config(tmp_path / "run", hooks={"w": {"name": "track/wandb", "mode": "offline"}}))
    id = json.loads((tmp_path / "run/wandb.json").read_text())["id"]
    (written,) = (tmp_path / "run/wandb").glob(f"offline-run-*-{id}/run-{id}.wandb")
    names = (b"pixel/mse", b"eval/psnr", b"codes/uses")
    for _ in range(60):  # a process of wandb's own writes; on a busy machine it comes later
        content = written.read_bytes()
        if all(name in content for name in names):
            return
        time.sleep(0.5)
    raise AssertionError(f"{len(content)} bytes without {names}")


# ----------------------------------------------------------------------------------------------------- docs


def test_the_manual_holds_every_hook_with_its_signature():
    text = (Path(__file__).parents[1] / "docs/hooks.md").read_text()
    for name, spec in HOOKS.items():
        arguments = ", ".join(list(inspect.signature(spec).parameters)[1:])
        assert f"`{name}({arguments})`" in text, name


def test_the_hook_in_the_manual_works(tmp_path, caplog):
    """The manual's own file, given with --plugin, in a run."""
    from vqcore.cli import main

    text = (Path(__file__).parents[1] / "docs/hooks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    import yaml
    from toys import run_tree

    tree = run_tree(tmp_path / "run", hooks={"best": {"name": "local/best", "metric": "eval/psnr"}})
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(tree))
    caplog.set_level(logging.INFO)
    assert main(["train", str(tmp_path / "cfg.yaml"), "--plugin", str(tmp_path / "mine.py")]) == 0
    last = [line for line in lines(tmp_path / "run") if "eval/psnr" in line][-1]
    assert (tmp_path / "run/best.txt").read_text() == f"step 6: eval/psnr {last['eval/psnr']:.4g}\n"
