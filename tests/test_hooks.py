"""Hooks: a hook that fails is switched off, a hook whose plugin is absent is left out; the manual is complete."""

import importlib.metadata
import inspect
import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.errors import PluginLoadError, UnknownName
from vqcore.plugin import RunHooks, hookimpl
from vqcore.protocols import RunLike
from vqcore.registry import Registry
from vqcore.run.hooks import GuardedHooks
from vqcore.schema import RunConfig
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
        r"hooks.bad \(Broken\) is switched off and the run continues: vqcore_saved raised KeyError: 'loss' "
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

    with pytest.raises(
        PluginLoadError, match=r"hooks.x: .*unknown hook 'vqcore_save'. Did you mean 'vqcore_saved'"
    ):
        GuardedHooks({"x": Misspelt()})
    with pytest.raises(PluginLoadError, match=r"hooks.y: .*loss"):
        GuardedHooks({"y": Greedy()})


# -------------------------------------------------------------------------------------------- absent plugins


def test_an_absent_plugin_is_one_warning_and_the_run_goes_on(tmp_path, caplog):
    entries = importlib.metadata.entry_points(group="vqcore")
    without = Registry(entry for entry in entries if entry.name != "track")
    tree = run_tree(tmp_path / "run", hooks={"report": {"name": "track/report"}})
    config = from_tree(tree, schema=RunConfig, registry_=without)
    assert config.hooks == {} and train(config).step == 6
    (said,) = [message for message in caplog.messages if "track" in message]
    assert said.startswith("warning: ") and "hooks.report.name: no plugin 'track' is installed" in said
    assert "vqcore-track" in said and "pip install ./plugins/vqcore_track" in said
    assert said.endswith("The run continues without hooks.report.")


def test_a_misspelt_name_in_an_installed_plugin_is_an_error(tmp_path):
    with pytest.raises(
        UnknownName, match=r"hooks.report.name: .*'track/reprot'.*Did you mean 'track/report'"
    ):
        run_config(tmp_path / "run", hooks={"report": {"name": "track/reprot"}})


def test_a_hook_hears_of_every_step(tmp_path, monkeypatch):
    diary = []

    class Diary:
        @hookimpl
        def vqcore_run_started(self, run):
            diary.append(("started", run.step, isinstance(run, RunLike)))

        @hookimpl
        def vqcore_step_done(self, run, step):
            diary.append(("done", step, run.step == step))

        @hookimpl
        def vqcore_step_ended(self, step, metrics):
            diary.append(("ended", step, "loss" in metrics))

    monkeypatch.setattr("vqcore.run.state.build_hooks", lambda config: GuardedHooks({"diary": Diary()}))
    train(run_config(tmp_path / "run", run__steps=3, run__log_every=2))
    assert diary == [
        *(("started", 0, True), ("done", 1, True), ("done", 2, True), ("ended", 2, True)),
        *(("done", 3, True), ("ended", 3, True)),
    ]


# ----------------------------------------------------------------------------------------------------- docs


def test_the_manual_holds_every_hook_with_its_signature():
    text = (Path(__file__).parents[1] / "docs/hooks.md").read_text()
    for name, spec in HOOKS.items():
        arguments = ", ".join(list(inspect.signature(spec).parameters)[1:])
        assert f"`{name}({arguments})`" in text, name


def test_the_hook_in_the_manual_works(tmp_path, caplog):
    """The manual's own file, given with --plugin, in a run."""
    text = (Path(__file__).parents[1] / "docs/hooks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    tree = run_tree(tmp_path / "run", hooks={"best": {"name": "local/best", "metric": "eval/metric/psnr"}})
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(tree))
    caplog.set_level(logging.INFO)
    assert main(["train", str(tmp_path / "cfg.yaml"), "--plugin", str(tmp_path / "mine.py")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/metric/psnr" in line][-1]
    assert (
        tmp_path / "run/best.txt"
    ).read_text() == f"step 6: eval/metric/psnr {last['eval/metric/psnr']:.4g}\n"
