"""Discovery with real metadata: lazy, isolated, conflicts refused; and the error texts a config can meet."""

import copy
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqcore import __version__
from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.errors import PluginApiError, PluginConflict, PluginLoadError, UnknownName, UnknownPlugin
from vqcore.registry import Registry, registry
from vqcore.schema import RunConfig
from vqcore.testing.checks import check_plugin

PLUGINS = Path(__file__).parent / "fixtures" / "plugins"
EVERYTHING = (
    "good",
    "broken",
    "heavy",
    "duplicate",
    "typo_hook",
    "old_api",
    "odd",
    "reserved",
    "headless",
    "sloppy",
)


def imported() -> set[str]:
    return {name for name in sys.modules if name.startswith("fixture_")}


def test_discovery_imports_nothing(installed):
    catalogue = installed(*EVERYTHING)
    ids = catalogue.ids()
    assert str(ids["good"][0]) == "vqcore-good 1.2"
    assert ids["good"][0].module == "fixture_good.plugin"
    assert list(ids) == ["core", *sorted(set(ids) - {"core"})]
    assert imported() == set()


def test_a_name_imports_one_manifest_and_building_one_module(installed):
    catalogue = installed(*EVERYTHING)
    found = catalogue.find("encoder", "good/grid")
    assert (found.name, found.component.summary) == ("good/grid", "an encoder")
    assert imported() == {"fixture_good", "fixture_good.plugin"}
    cls = catalogue.load("encoder", "good/grid")
    assert cls.Config(depth=3).depth == 3
    assert imported() == {"fixture_good", "fixture_good.plugin", "fixture_good.parts"}


def test_the_default_registry_reads_the_environment(installed, monkeypatch):
    installed("good", "heavy")
    assert {"core", "good", "heavy"} <= set(Registry().ids())
    monkeypatch.setenv("VQCORE_DISABLED_PLUGINS", " VQcore_Heavy, ")
    assert "heavy" not in Registry().ids() and "good" in Registry().ids()
    assert registry() is registry()


def test_a_copied_tokenizer_has_the_same_registry(installed):
    assert copy.deepcopy({"registry": (found := installed())})["registry"] is found


def test_a_disabled_distribution_frees_its_id_and_the_error_says_that_it_is_off(installed):
    both = installed("duplicate")
    assert len(both.ids()["vit"]) == 2
    ours = installed("duplicate", disabled=("acme_VIT",))
    assert ours.plugin("vit").summary == "ours"
    neither = installed("duplicate", disabled=("acme-vit", "vqcore-vit"))
    with pytest.raises(UnknownName, match=r"plugin 'vit' .* is disabled: VQCORE_DISABLED_PLUGINS contains"):
        neither.plugin("vit")


def test_conflicts_are_refused_at_first_use_and_only_then(installed):
    catalogue = installed("duplicate", "good")
    assert catalogue.find("encoder", "good/grid")
    for _ in range(2):
        with pytest.raises(PluginConflict, match=r"vqcore-vit 0\.3 and acme-vit 9\.9"):
            catalogue.find("encoder", "vit/encoder")
    assert not any(name.startswith("fixture_duplicate") for name in sys.modules)


def test_the_order_of_the_search_path_decides_nothing(installed):
    entries = installed("duplicate").ids()["vit"]
    found = importlib.metadata.entry_points(group="vqcore", name="vit")
    dists = [e for e in found if e.value.startswith("fixture_duplicate")]
    assert len(dists) == 2
    for order in (dists, dists[::-1]):
        assert Registry(order, ()).ids()["vit"] == entries
        assert Registry([*order, *order], ()).ids()["vit"] == entries  # equal entries collapse


def test_the_catalogue_never_raises_and_says_what_is_wrong(installed):
    catalogue = installed(*EVERYTHING)
    listings = catalogue.catalogue()
    assert {one.id for one in listings if one.plugin} == {"core", "good", "heavy", "headless", "sloppy"}
    problems = [one.problem for one in listings if not one.plugin]
    assert len(problems) > 20 and all(problems) and "\n" not in "".join(problems)
    quantizers = {found.name for found in catalogue.components("quantizer")}
    assert {"good/fsq", "good/vq", "heavy/lead", "sloppy/ghost"} <= quantizers


def test_a_distribution_without_metadata_goes_by_its_module(installed):
    catalogue = installed("headless")
    assert str(catalogue.origin("headless")) == "fixture_headless.plugin"
    assert catalogue.plugin("headless").summary == "works all the same"


def test_a_former_name_goes_on_working_with_a_warning_that_users_see(installed):
    catalogue = installed("good")
    text = "model.encoder: 'good/mesh' is now called 'good/grid'."
    with pytest.warns(FutureWarning, match=text):
        assert catalogue.find("encoder", "good/mesh", "model.encoder").name == "good/grid"


WHO_BROKEN = "plugin '{0}' (vqcore-broken 0.2, fixture_{1}) does not import: "
WHO_ODD = "plugin '{0}' (vqcore-odd 0.5, fixture_odd.{0})"
MANIFESTS = {
    # plugin id: (fixture, error, its whole text)
    "broken": (
        "broken",
        PluginLoadError,
        WHO_BROKEN.format("broken", "broken.plugin")
        + "No module named 'smplx_not_there'. smplx_not_there is a dependency of vqcore-broken, not of vqcore.",
    ),
    "raises": (
        "broken",
        PluginLoadError,
        WHO_BROKEN.format("raises", "broken.raises") + "RuntimeError: out of luck.",
    ),
    "exits": ("broken", PluginLoadError, WHO_BROKEN.format("exits", "broken.exits") + "SystemExit: 3."),
    "absent": (
        "broken",
        PluginLoadError,
        WHO_BROKEN.format("absent", "absent.plugin")
        + "No module named 'fixture_absent'. vqcore-broken is not completely installed; install vqcore-broken again.",
    ),
    "newer": (
        "broken",
        PluginLoadError,
        WHO_BROKEN.format("newer", "broken.newer") + "No module named 'vqcore.not_yet_there'. "
        f"vqcore-broken 0.2 does not fit vqcore {__version__}; install matching versions.",
    ),
    "colon": (
        "broken",
        PluginLoadError,
        "plugin 'colon' (vqcore-broken 0.2): its entry point is 'fixture_broken.plugin:hook', "
        "but must be the manifest module alone: 'fixture_broken.plugin'.",
    ),
    "typo": (
        "typo_hook",
        PluginLoadError,
        "plugin 'typo' (vqcore-typo 0.1, fixture_typo.plugin) has an invalid manifest: "
        "unknown hook 'vqcore_plugins'. A manifest has one hook, vqcore_plugin(), without arguments.",
    ),
    "argument": (
        "typo_hook",
        PluginLoadError,
        "plugin 'argument' (vqcore-typo 0.1, fixture_typo.argument) has an invalid manifest: "
        "Argument(s) {'registry'} are declared in the hookimpl but can not be found in the hookspec. "
        "A manifest has one hook, vqcore_plugin(), without arguments.",
    ),
    "nohook": (
        "typo_hook",
        PluginLoadError,
        "plugin 'nohook' (vqcore-typo 0.1, fixture_typo.nohook) "
        "must implement vqcore_plugin() and return one vqcore.plugin.Plugin.",
    ),
    "old": (
        "old_api",
        PluginApiError,
        "vqcore-old 0.1 was written for plugin API 0; this vqcore supports 1. "
        "Upgrade vqcore-old, or install an older vqcore.",
    ),
    "future": (
        "old_api",
        PluginApiError,
        "vqcore-old 0.1 was written for plugin API 99; this vqcore supports 1. Upgrade vqcore.",
    ),
    "twice": (
        "odd",
        PluginLoadError,
        WHO_ODD.format("twice") + ": component 'part' is declared twice as a quantizer.",
    ),
    "kind": (
        "odd",
        PluginLoadError,
        WHO_ODD.format("kind") + ": component 'part' is of kind 'quantiser', which does not exist. "
        "Did you mean 'quantizer'?",
    ),
    "name": (
        "odd",
        PluginLoadError,
        WHO_ODD.format("name")
        + ": component 'Part' has an invalid name: use a-z, 0-9 and '-', and begin with a letter.",
    ),
    "target": (
        "odd",
        PluginLoadError,
        WHO_ODD.format("target")
        + ": component 'part' has target 'fixture_odd.parts', but must be 'module:Class'.",
    ),
    "claimed": (
        "odd",
        PluginLoadError,
        WHO_ODD.format("claimed") + ": component 'parts' has the former name 'part', which is also a name of "
        "another quantizer. Each name belongs to one component, because fingerprints contain the name.",
    ),
    "former": (
        "odd",
        PluginLoadError,
        WHO_ODD.format("former") + ": component 'part' has the former name 'former/apart'; "
        "a former name is made of a-z, 0-9 and '-', without the plugin's id.",
    ),
    "answer": (
        "odd",
        PluginLoadError,
        WHO_ODD.format("answer") + " must implement vqcore_plugin() and return one vqcore.plugin.Plugin.",
    ),
    "Bad-Id": (
        "reserved",
        UnknownPlugin,
        "plugin 'Bad-Id' (acme-reserved 1.0) cannot be used: "
        "the id 'Bad-Id' is invalid: use a-z and 0-9, and begin with a letter.",
    ),
    "local": (
        "reserved",
        UnknownPlugin,
        "plugin 'local' (acme-reserved 1.0) cannot be used: "
        "the id 'local' is reserved for vqcore; acme-reserved must choose another id.",
    ),
}


@pytest.mark.parametrize("id", MANIFESTS)
def test_a_manifest_that_cannot_be_used_says_why_in_one_line(installed, id):
    fixture, error, text = MANIFESTS[id]
    catalogue = installed(fixture, "good")
    with pytest.raises(error) as raised:
        catalogue.plugin(id)
    assert (type(raised.value), str(raised.value)) == (error, text)
    assert catalogue.find("encoder", "good/grid")  # the others do not notice


UNTYPED = {
    "comma": ": components must be a tuple of Component (a single one needs a comma: (Component(...),)).",
    "number": ": api='1' is not an integer.",
    "renamed": ": component 'part' has a renamed_from that is not a tuple (a single name needs a comma: ('old',)).",
}


def test_records_of_the_wrong_types_are_refused_where_nothing_checks_types():
    """In a process of its own: in this one beartype would refuse them first."""
    env = {**os.environ, "PYTHONPATH": str(PLUGINS / "odd"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "vqcore", "plugins", *UNTYPED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[1::2] == [WHO_ODD.format(id) + text for id, text in UNTYPED.items()]


def test_nobody_can_take_the_id_of_the_core(installed):
    catalogue = installed("reserved")
    assert catalogue.plugin("core").summary.startswith("Protocols")
    assert [listing.id for listing in catalogue.catalogue()] == ["core", "core", "local", "Bad-Id"]
    assert not imported()


CONFIG = """\
data: {name: good/made, modality: {name: good/dots}}
model:
  encoder: {name: good/grid}
  quantizer: {name: good/vq, codebook_size: 16}
  decoder: {name: good/flat}
objective: {name: good/copy}
run: {steps: 10}
optim: {lr: 1.0e-3}
"""
FILE = "cfgs/rgb/a.yaml"
KEY = FILE + ": model.{0}.name: "
# situation: (plugins that are installed, (text in CONFIG, what it becomes), overrides, the message)
ERRORS = {
    "unknown plugin": (
        ("good",),
        ("good/grid", "god/grid"),
        (),
        KEY.format("encoder") + "no plugin 'god'. Did you mean 'good'?",
    ),
    "a plugin of ours that is not installed": (
        ("good",),
        ("good/vq", "quant/vq"),
        (),
        KEY.format("quantizer") + "no plugin 'quant' is installed. It comes with vqcore-quant: "
        "in a checkout of vqcore, run: pip install ./plugins/vqcore_quant",
    ),
    "a plugin of ours, misspelt": (
        (),
        ("good/vq", "qant/vq"),
        (
            "data={name: array, path: a.npy, modality: {name: array, channels: 1}}",
            "model.encoder.name=vitt/x",
        ),
        "command line: model.encoder.name: no plugin 'vitt'. Did you mean 'vit'?",
    ),
    "a name that only --plugin could bring": (
        ("good",),
        ("good/vq", "local/vq"),
        (),
        KEY.format("quantizer")
        + "no plugin 'local': its components come from a Python file. Give this file with --plugin FILE; "
        "in Python, first call vqcore.registry.registry().add_file('FILE').",
    ),
    "unknown component": (
        ("good",),
        ("good/grid", "good/gird"),
        (),
        KEY.format("encoder") + "vqcore-good 1.2 has no encoder 'good/gird'. Did you mean 'good/grid'?",
    ),
    "unknown component, nothing like it": (
        ("good",),
        ("good/vq", "good/residual"),
        (),
        KEY.format("quantizer")
        + "vqcore-good 1.2 has no quantizer 'good/residual'. It has: good/fsq, good/vq.",
    ),
    "a kind that the plugin does not have": (
        ("good", "heavy"),
        ("good/made", "heavy/made"),
        (),
        f"{FILE}: data.name: vqcore-heavy 1.0 has no data source 'heavy/made'. It has: no data source at all.",
    ),
    "the plugin's id forgotten": (
        ("good",),
        ("good/vq", "vq"),
        (),
        KEY.format("quantizer") + f"vqcore {__version__} has no quantizer 'vq'. Did you mean 'good/vq'?",
    ),
    "a slash before a name of the core": (
        ("good",),
        ("good/made", "core/folder"),
        (),
        f"{FILE}: data.name: no plugin 'core': the names of vqcore's own components have no slash. "
        "Did you mean 'folder'?",
    ),
    "right name, wrong kind": (
        ("good",),
        ("good/grid", "good/flat"),
        (),
        KEY.format("encoder") + "'good/flat' is a decoder; model.encoder needs an encoder.",
    ),
    "right name, wrong kind, where the article needs care": (
        ("good",),
        ("good/made", "good/dots"),
        (),
        f"{FILE}: data.name: 'good/dots' is a modality; data needs a data source.",
    ),
    "unknown key": (
        ("good",),
        ("codebook_size", "codebok_size"),
        (),
        f"{FILE}: model.quantizer.codebok_size is not a setting of good/vq. Did you mean 'codebook_size'?",
    ),
    "unknown key of a section, on the command line": (
        ("good",),
        (),
        ("optim.warmpu=5",),
        "command line: optim.warmpu is not a setting of optim. Did you mean 'warmup'?",
    ),
    "a setting without its section": (
        ("good",),
        (),
        ("lr=1",),
        "command line: lr is not a top-level setting. Did you mean 'optim.lr'?",
    ),
    "unknown section": (
        ("good",),
        ("objective:", "objektive:"),
        (),
        f"{FILE}: objektive is not a top-level setting. Did you mean 'objective'?",
    ),
    "bad value": (
        ("good",),
        (),
        ("optim.lr='fast'",),
        "command line: optim.lr='fast' is not a number or null.",
    ),
    "value out of range": (
        ("good",),
        (),
        ("data.batch_size=0",),
        "command line: data.batch_size=0 must be at least 1.",
    ),
    "value out of range in the file while the command line gives its neighbours": (
        ("good",),
        ("steps: 10", "steps: -5"),
        ("run.seed=3",),
        f"{FILE}: run.steps=-5 must be at least 1.",
    ),
    "settings that contradict each other": (
        ("good",),
        (),
        ("run.epochs=2",),
        "command line: run: give either steps or epochs. "
        f"run.steps comes from {FILE}; run.steps=null removes this value.",
    ),
    "conflict": (
        ("good", "duplicate"),
        ("good/grid", "vit/encoder"),
        (),
        KEY.format("encoder") + "plugin 'vit' is claimed by vqcore-vit 0.3 and acme-vit 9.9. "
        "Uninstall one, or set VQCORE_DISABLED_PLUGINS=acme-vit.",
    ),
    "manifest does not import": (
        ("good", "broken"),
        ("good/vq", "broken/vq"),
        (),
        KEY.format("quantizer") + MANIFESTS["broken"][2],
    ),
    "too old": (
        ("good", "old_api"),
        ("good/vq", "old/vq"),
        (),
        KEY.format("quantizer") + MANIFESTS["old"][2],
    ),
    "too new": (
        ("good", "old_api"),
        ("good/vq", "future/vq"),
        (),
        KEY.format("quantizer") + MANIFESTS["future"][2],
    ),
    "a component's own dependency is missing": (
        ("good", "sloppy"),
        ("{name: good/vq, codebook_size: 16}", "{name: sloppy/needy}"),
        (),
        KEY.format("quantizer")
        + "plugin 'sloppy' (vqcore-sloppy 0.4, fixture_sloppy.needy) does not import: "
        "No module named 'smplx_not_there'. smplx_not_there is a dependency of vqcore-sloppy, not of vqcore.",
    ),
    "a component's module is missing": (
        ("good", "sloppy"),
        ("{name: good/vq, codebook_size: 16}", "{name: sloppy/lost}"),
        (),
        KEY.format("quantizer")
        + "plugin 'sloppy' (vqcore-sloppy 0.4, fixture_sloppy.absent) does not import: "
        "No module named 'fixture_sloppy.absent'. vqcore-sloppy is not completely installed; "
        "install vqcore-sloppy again.",
    ),
    "a component's module fails": (
        ("good", "sloppy"),
        ("{name: good/vq, codebook_size: 16}", "{name: sloppy/crash}"),
        (),
        KEY.format("quantizer")
        + "plugin 'sloppy' (vqcore-sloppy 0.4, fixture_sloppy.crash) does not import: "
        "AttributeError: module 'math' has no attribute 'no_such_function'.",
    ),
    "a component's class is missing": (
        ("good", "sloppy"),
        ("{name: good/vq, codebook_size: 16}", "{name: sloppy/ghost}"),
        (),
        KEY.format("quantizer") + "'sloppy/ghost' of vqcore-sloppy 0.4 points to fixture_sloppy.parts:Hollw, "
        "but fixture_sloppy.parts has no class 'Hollw'. Did you mean 'Hollow'?",
    ),
    "a component without settings": (
        ("good", "sloppy"),
        ("{name: good/vq, codebook_size: 16}", "{name: sloppy/bare}"),
        (),
        KEY.format("quantizer") + "'sloppy/bare' of vqcore-sloppy 0.4 has no nested class "
        "Config(vqcore.config.Config); every component declares its settings there.",
    ),
    "a data source with the settings of another kind": (
        ("good", "sloppy"),
        ("good/made", "sloppy/wrong-base"),
        (),
        f"{FILE}: data.name: 'sloppy/wrong-base' of vqcore-sloppy 0.4: "
        "its Config must inherit vqcore.schema.DataConfig.",
    ),
    "not conforming": (
        ("good", "sloppy"),
        ("{name: good/vq, codebook_size: 16}", "{name: sloppy/hollow}"),
        (),
        "sloppy/hollow was built but is not a valid quantizer: it lacks 'codebook_size'. "
        "Run: vqcore plugins --check sloppy",
    ),
}


@pytest.mark.parametrize("situation", ERRORS)
def test_error_texts(situation, installed, tmp_path, monkeypatch):
    plugins, change, overrides, message = ERRORS[situation]
    catalogue = installed(*plugins)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cfgs/rgb").mkdir(parents=True)
    assert not change or change[0] in CONFIG
    (tmp_path / FILE).write_text(CONFIG.replace(*change) if change else CONFIG)
    with pytest.raises(Exception) as raised:
        config = load(FILE, overrides, schema=RunConfig, registry_=catalogue).config
        catalogue.build("quantizer", config.model.quantizer)
    assert str(raised.value) == message


def test_the_config_of_the_table_is_good(installed, tmp_path):
    (tmp_path / "a.yaml").write_text(CONFIG)
    catalogue = installed("good", "broken", "heavy", "duplicate")
    config = load(str(tmp_path / "a.yaml"), schema=RunConfig, registry_=catalogue).config
    built = catalogue.build("quantizer", config.model.quantizer)
    assert built.cfg.codebook_size == 16 and built.cfg.name == "good/vq"
    assert imported() == {"fixture_good", "fixture_good.plugin", "fixture_good.parts"}


MINE = """\
from dataclasses import dataclass
from vqcore import config
from vqcore.plugin import Component, Plugin, hookimpl

class Mine:
    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        depth: int = 1
        "How deep."

@hookimpl
def vqcore_plugin():
    return Plugin(1, "mine", (Component("encoder", "mine", ":Mine", "my own"),))
"""


def test_a_file_as_a_plugin(installed, tmp_path):
    catalogue = installed()
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    catalogue.add_file(str(file))
    found = catalogue.find("encoder", "local/mine")
    assert found.origin.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert str(found.origin) == str(file)
    assert catalogue.load("encoder", "local/mine").__name__ == "Mine"
    assert [f.name for f in catalogue.components("encoder")] == ["local/mine"]
    assert check_plugin(catalogue, "local") == []
    catalogue.add_file(str(file))  # the same again
    other = tmp_path / "other.py"
    other.write_text(MINE.replace("my own", "another"))
    with pytest.raises(PluginLoadError, match="only one file can be given"):
        catalogue.add_file(str(other))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("none.py", None, "there is no such file."),
        ("mine.txt", MINE, "the name of the Python file must end in .py."),
        ("mine.py", "import nope_nope", "the file does not run: No module named 'nope_nope'."),
        ("mine.py", "x = = 1", "the file does not run: SyntaxError: invalid syntax (mine.py, line 1)."),
        ("mine.py", "raise SystemExit", "the file does not run: SystemExit."),
    ],
)
def test_a_file_that_is_no_plugin(installed, tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    catalogue = installed()
    with pytest.raises(PluginLoadError) as raised:
        catalogue.add_file(name)
    assert str(raised.value) == f"--plugin {name}: {message}"
    assert "local" not in catalogue.ids()


def test_a_file_without_a_manifest_is_refused_at_once(installed, tmp_path):
    (tmp_path / "empty.py").write_text("")
    catalogue = installed()
    with pytest.raises(PluginLoadError, match=r"plugin 'local' .* must implement vqcore_plugin\(\)"):
        catalogue.add_file(str(tmp_path / "empty.py"))
    assert "local" not in catalogue.ids()


def test_the_list_of_plugins_shows_the_broken_beside_the_good(installed, capsys):
    installed("good", "broken", "reserved")
    assert main(["plugins", "good", "broken", "Bad-Id"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["broken", "vqcore-broken", "0.2", "unusable"]
    assert lines[1].strip() == MANIFESTS["broken"][2]
    assert lines[2].split() == ["good", "vqcore-good", "1.2", "ok"]
    assert "           quantizer      good/vq                a codebook" in lines
    assert lines[-2].split() == ["Bad-Id", "acme-reserved", "1.0", "unusable"]
    assert main(["plugins", "goood"]) == 2
    assert capsys.readouterr().err.startswith("error: no plugin 'goood'. Did you mean 'good'? Installed: ")


def test_check_imports_targets_and_names_every_law_that_is_broken(installed, capsys):
    catalogue = installed("good", "heavy", "sloppy")
    assert check_plugin(catalogue, "good") == []
    failures = check_plugin(catalogue, "sloppy")
    text: dict[str, str] = {}
    for failure in failures:
        name = failure.partition(": ")[0].removeprefix("sloppy/")
        text[name] = text.get(name, "") + failure
    assert list(text) == [c.name for c in catalogue.plugin("sloppy").components if c.kind == "quantizer"]
    assert "Hollow lacks codebook_size, which every quantizer has" in text["hollow"]
    assert "Untold.Config.depth has no text under it" in text["untold"]
    assert "Undecorated.Config lacks @dataclass(frozen=True, kw_only=True)" in text["undecorated"]
    assert "Pathy.Config.folder is of type <class 'pathlib.Path'>" in text["pathy"]
    assert main(["plugins", "--check", "heavy"]) == 2
    said = capsys.readouterr().out
    assert "manifest law: importing fixture_heavy.plugin also imports numpy, fixture_heavy.parts;" in said


def test_show_prints_origin_and_every_setting(installed, capsys):
    installed("good")
    assert main(["show", "good/grid"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "good/grid  (encoder)  an encoder\nfrom vqcore-good 1.2, fixture_good.parts:Grid, "
    )
    assert "fixture_good/parts.py:" in shown
    assert "  depth: an integer, default 2\n      Blocks.\n" in shown
    assert "  size: one of s, b, default s\n" in shown
    assert "  bias: true or false, default true\n" in shown
    assert "  stages: a mapping from names to lists of integers, default {}\n" in shown
    assert main(["show", "good/fsq"]) == 0
    assert "  levels: a list of integers, required\n" in capsys.readouterr().out
    assert main(["show", "good/copy"]) == 0
    shown = capsys.readouterr().out
    assert "  percept: a mapping from labels to percepts, default {}\n" in shown
    assert "  second: a percept, default null\n" in shown


@pytest.mark.parametrize(
    "name, message",
    [
        ("grid", "no component or section 'grid'. Did you mean 'good/grid'? List all names: vqcore show"),
        (
            "good/gird",
            "no component or section 'good/gird'. Did you mean 'good/grid'? List all names: vqcore show",
        ),
        (
            "good",
            "'good' is a plugin, not a component. Components of 'good': good/grid, good/fsq, good/vq, good/flat, ",
        ),
        ("god/grid", "no plugin 'god'. Did you mean 'good'?\n"),
    ],
)
def test_show_helps_to_the_right_name(installed, capsys, name, message):
    installed("good")
    assert main(["show", name]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_show_knows_former_names(installed, capsys):
    installed("good")
    with pytest.warns(FutureWarning, match="is now called 'good/grid'"):
        assert main(["show", "good/mesh"]) == 0
    assert capsys.readouterr().out.startswith("good/grid  (encoder)")
