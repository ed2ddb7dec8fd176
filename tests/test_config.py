"""Configs: layers, types, interpolations, error messages, and saving and loading again."""

import logging
import re
from dataclasses import dataclass, field, make_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vqcore.cli import main
from vqcore.compose.build import from_tree, saved_tree
from vqcore.compose.describe import dump, inline
from vqcore.compose.describe import settings as settings_of
from vqcore.compose.layers import load, overridden
from vqcore.compose.recipes import recipes
from vqcore.config import Config, slot, to_tree
from vqcore.errors import ConfigError, VqcoreError
from vqcore.registry import registry
from vqcore.schema import RunConfig

STEPS, STEPS_ = "mapping from steps to numbers", "mappings from steps to numbers"
CFGS = Path(__file__).parents[1] / "cfgs"
WHOLE = {
    "data": {"name": "good/made", "modality": {"name": "good/dots"}},
    "model": {
        "encoder": {"name": "good/grid"},
        "quantizer": {"name": "good/fsq", "levels": [8, 5]},
        "decoder": {"name": "good/flat"},
    },
    "objective": {"name": "good/copy"},
    "run": {"steps": 10},
    "optim": {"lr": 0.001},
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, so that error messages contain short file names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def good(installed):
    return installed("good")


def write(path: str, tree: Any = None, **changes: Any) -> str:
    """Write a config; `changes` are dotted keys with `__` for dots."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(tree, str):
        tree = yaml.safe_load(yaml.safe_dump(WHOLE if tree is None else tree))
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        tree = yaml.safe_dump(tree)
    Path(path).write_text(tree)
    return path


def refused(good, path: str, *overrides: str) -> str:
    """The error message, in one line, for a config that is refused."""
    with pytest.raises(VqcoreError) as raised:
        load(path, overrides, schema=RunConfig, registry_=good)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- layers ---------------------------------------------------------------------------------------------------------


def test_the_nearer_layer_wins(here, good):
    write("base/one.yaml", {"run": {"seed": 1, "keep": 1, "log_every": 1}, "optim": {"warmup": 1}})
    write("base/two.yaml", {"run": {"seed": 2, "keep": 2, "log_every": 2}})
    write("cfgs/a.yaml", defaults=["../base/one.yaml", "../base/two.yaml"], run__seed=3, run__keep=3)
    loaded = load("cfgs/a.yaml", ["run.seed=4"], schema=RunConfig, registry_=good)
    run = loaded.config.run
    assert (run.seed, run.keep, run.log_every, run.save_every) == (4, 3, 2, 1000)
    layers = [loaded.layer(f"run.{key}") for key in ("seed", "keep", "log_every", "save_every")]
    assert layers == ["command line", "cfgs/a.yaml", "base/two.yaml", "default"]
    assert (loaded.config.optim.warmup, loaded.layer("optim.warmup")) == (1, "base/one.yaml")
    assert run.dir == "runs/a"  # named after the file
    assert not loaded.notes


def test_defaults_nest_and_a_file_may_be_reached_twice(here, good):
    write("ground.yaml", {"run": {"seed": 1, "keep": 5}})
    write("left.yaml", {"defaults": ["ground.yaml"], "run": {"seed": 2}})
    write("right.yaml", {"defaults": ["ground.yaml"]})
    write("a.yaml", defaults=["left.yaml", "right.yaml"])
    run = load("a.yaml", schema=RunConfig, registry_=good).config.run
    assert (run.seed, run.keep) == (1, 5)  # right.yaml brought ground.yaml again, later


def test_defaults_that_lead_back_to_themselves_are_refused(here, good):
    write("a.yaml", {"defaults": ["sub/b.yaml"]})
    write("sub/b.yaml", {"defaults": ["../a.yaml"]})
    assert refused(good, "a.yaml") == (
        "a.yaml: its defaults lead back to this file: a.yaml -> sub/b.yaml -> a.yaml."
    )


@pytest.mark.parametrize(
    "tree, message",
    [
        (
            {"defaults": ["bsae.yaml"]},
            "a.yaml: defaults: bsae.yaml: there is no such file. Did you mean 'base.yaml'?",
        ),
        (
            {"defaults": "base.yaml"},
            "a.yaml: defaults must be a list of files, e.g. defaults: [../base/train.yaml]",
        ),
        ({"defaults": None}, "a.yaml: defaults must be a list of files, e.g. defaults: [../base/train.yaml]"),
        (
            {"defaults": ["recipe:good/hole"]},
            "recipe:good/hole: no such recipe. Did you mean 'good/whole'? List them: vqcore config --list",
        ),
    ],
)
def test_defaults_that_are_not_there(here, good, tree, message):
    write("base.yaml", {})
    write("a.yaml", tree)
    assert refused(good, "a.yaml") == message


def test_recipes_of_a_plugins_package(here, good):
    assert [name for name in recipes(good) if name.startswith("good/")] == [
        "good/base/parts",
        "good/whole",
    ]
    for name in ("recipe:good/whole", "recipe:good/whole.yaml"):
        loaded = load(name, ["run.steps=20"], schema=RunConfig, registry_=good)
        assert loaded.config.run.steps == 20 and loaded.config.run.dir == "runs/whole"
    assert loaded.config.model.encoder.depth == 3
    assert loaded.layer("model.encoder.depth").endswith("fixture_good/cfgs/base/parts.yaml")
    assert loaded.layer("optim.lr") == "recipe:good/whole.yaml"
    tree = {k: v for k, v in WHOLE.items() if k != "model"}
    write("a.yaml", {"defaults": ["recipe:good/base/parts"], **tree})
    loaded = load("a.yaml", schema=RunConfig, registry_=good)
    assert loaded.config.model.encoder.depth == 3
    assert loaded.layer("model.encoder.depth") == "recipe:good/base/parts"


def test_recipes_of_the_core_go_before_those_of_a_plugin(here, good, monkeypatch):
    monkeypatch.setattr("vqcore.compose.recipes.core_recipes", lambda: here / "core")
    write("core/good/whole.yaml", run__seed=9)
    assert load("recipe:good/whole", schema=RunConfig, registry_=good).config.run.seed == 9


def test_a_changed_name_replaces_the_node_with_one_log_line(here, good, caplog):
    write("base.yaml", objective__weights={"vq/commit": 0.5}, objective__percept={"a": {"name": "good/feel"}})
    changed = {"model": {"quantizer": {"name": "good/vq", "codebook_size": 4}}}
    write("a.yaml", {"defaults": ["base.yaml"], **changed})
    with caplog.at_level(logging.INFO, logger="vqcore.compose.layers"):
        loaded = load("a.yaml", schema=RunConfig, registry_=good)
    note = (
        "model.quantizer: 'good/vq' (a.yaml) replaces 'good/fsq' (base.yaml); its settings levels are dropped"
    )
    assert [record.message for record in caplog.records] == list(loaded.notes) == [note]
    assert to_tree(loaded.config.model.quantizer) == {
        "name": "good/vq",
        "codebook_size": 4,
        "normalize": True,
    }
    assert loaded.layer("model.quantizer.levels") == "default"
    assert loaded.config.objective.weights == {"vq/commit": 0.5}  # other nodes keep what they had


def test_a_changed_name_on_the_command_line_replaces_the_node_too(here, good):
    write("a.yaml", model__quantizer={"name": "good/vq", "codebook_size": 4, "normalize": False})
    for override in (
        ["model.quantizer.name=good/fsq", "model.quantizer.levels=[3,3]"],
        ["model.quantizer.levels=[3,3]", "model.quantizer.name=good/fsq"],
        ["model.quantizer={name: good/fsq, levels: [3, 3]}"],
    ):
        loaded = load("a.yaml", override, schema=RunConfig, registry_=good)
        assert to_tree(loaded.config.model.quantizer) == {"name": "good/fsq", "levels": [3, 3]}
        assert loaded.notes == (
            "model.quantizer: 'good/fsq' (command line) replaces 'good/vq' (a.yaml); "
            "its settings codebook_size, normalize are dropped",
        )
    assert refused(good, "a.yaml", "model.quantizer.name=good/fsq") == (
        "command line: model.quantizer.levels is required (a list of integers)."
    )


def test_the_same_name_again_changes_settings_only(here, good):
    write("a.yaml", model__encoder={"name": "good/grid", "depth": 5, "size": "b"})
    loaded = load("a.yaml", ["model.encoder={name: good/grid, depth: 6}"], schema=RunConfig, registry_=good)
    assert (loaded.config.model.encoder.depth, loaded.config.model.encoder.size) == (6, "b")
    assert not loaded.notes


def test_lists_are_atoms_and_mappings_merge(here, good):
    write("base.yaml", {"optim": {"betas": [0.5, 0.6]}, "objective": {"weights": {"a": 1, "b": 2}}})
    write("a.yaml", defaults=["base.yaml"], optim__betas=[0.1, 0.2], objective__weights={"b": 3})
    loaded = load("a.yaml", ["objective.weights.c=4"], schema=RunConfig, registry_=good)
    assert loaded.config.optim.betas == (0.1, 0.2)
    assert loaded.config.objective.weights == {"a": 1.0, "b": 3.0, "c": 4.0}


def test_null_takes_a_labelled_component_away(here, good):
    write("a.yaml", hooks={"one": {"name": "good/tell"}, "two": {"name": "good/tell", "every": 2}})
    loaded = load("a.yaml", ["hooks.one=null"], schema=RunConfig, registry_=good)
    assert {label: cfg.every for label, cfg in loaded.config.hooks.items()} == {"two": 2}


def test_a_node_without_a_name_keeps_the_default_one(good):
    default = {"name": "good/grid", "depth": 7}
    schema = make_dataclass("Schema", [("part", Config, slot("encoder", default=default))], frozen=True)
    for tree, depth in (({}, 7), ({"part": {"depth": 8}}, 8), ({"part": {"size": "b"}}, 7)):
        assert from_tree(tree, schema=schema, registry_=good).part.depth == depth
    assert from_tree({"part": {"name": "good/grid"}}, schema=schema, registry_=good).part.depth == 2
    assert from_tree({"part": None}, schema=schema, registry_=good).part is None


def test_an_override_over_a_saved_tree_leaves_the_tree_alone(good, caplog):
    tree = to_tree(from_tree({**WHOLE, "run": {"steps": 10, "dir": "d"}}, schema=RunConfig, registry_=good))
    kept = yaml.safe_dump(tree)
    with caplog.at_level(logging.INFO, logger="vqcore.compose.layers"):
        changed = overridden(
            tree,
            ["run.seed=7", "model.quantizer={name: good/vq, codebook_size: 2}"],
            schema=RunConfig,
            file="runs/d/config.yaml",
            registry_=good,
        )
    assert changed.run.seed == 7 and changed.model.quantizer.name == "good/vq"
    assert yaml.safe_dump(tree) == kept
    assert "replaces 'good/fsq' (runs/d/config.yaml)" in caplog.text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["run.steps"], "command line: 'run.steps' is not a setting; write key.path=value."),
        (["=3"], "command line: '=3' is not a setting; write key.path=value."),
        (["run..steps=3"], "command line: 'run..steps=3' is not a setting; write key.path=value."),
        (
            ["data.path=[a] b"],
            "command line: data.path=[a] b is not valid YAML. "
            "If the value is text, quote it twice: data.path='\"[a] b\"'",
        ),
        (
            ["data.path=${x"],
            "command line: data.path: no viable alternative at input '${x'. An interpolation is ${key.path}, where "
            "the config sets key.path, or ${oc.env:NAME}; write \\${ for a literal ${.",
        ),
        (
            ["data=3", "data.path=x"],
            "command line: data.path=x contradicts another setting of 'data'.",
        ),
        (["data.path=x", "data=3"], "command line: data=3 contradicts another setting of 'data'."),
        (
            ["objective.weights={1.5: 2}"],
            "command line: objective.weights: the key 1.5 is not text; put the key in quotes.",
        ),
        (
            ["data.path=2024"],
            "command line: data.path=2024 is not text. If it is meant as text, quote it twice, '\"...\"'.",
        ),
        (
            ["model.encoder=good/grid"],
            "command line: model.encoder='good/grid' is not a mapping. Write {name: good/grid}, "
            "or model.encoder.name=good/grid on the command line.",
        ),
    ],
)
def test_overrides_that_cannot_be(here, good, overrides, message):
    write("a.yaml")
    assert refused(good, "a.yaml", *overrides) == message


def test_overrides_are_yaml_and_the_last_one_counts(here, good):
    write("a.yaml")
    given = [
        "optim.lr=1e-5",
        "run.seed=1",
        "run.seed=2",
        "data.path=~/a b",
        "data.extra={}",
        "ema.decay=null",
    ]
    loaded = load("a.yaml", given, schema=RunConfig, registry_=good)
    cfg = loaded.config
    assert (cfg.optim.lr, cfg.run.seed, cfg.data.path, cfg.data.extra, cfg.ema.decay) == (
        1e-5,
        2,
        "~/a b",
        {},
        None,
    )


# --- files ----------------------------------------------------------------------------------------------------------

NO_MAPPING = "a.yaml: a config is a mapping (key: value), not {}."


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1, 2]", NO_MAPPING.format("a list")),
        ("just words", NO_MAPPING.format("'just words'")),
        ("# a remark: with a colon\nhttp://words", NO_MAPPING.format("'http://words'")),
        ("5", NO_MAPPING.format("'5'")),
        ("''", NO_MAPPING.format("''")),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "a.yaml: this is not a text file in UTF-8."),
        (
            "a: \x00",
            "a.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed.",
        ),
        ("run: {seed: 1\nmodel: [", "a.yaml: line 2, column "),
        ("run: *nothing", "a.yaml: line 1, column 6: not valid YAML: found undefined alias"),
        (
            "run: {seed: 1}\nrun: {seed: 2}",
            "a.yaml: line 2, column 1: not valid YAML: found duplicate key run.",
        ),
        ("run:\n  seed: 1\n  seed: 1", "a.yaml: line 3, column 3: not valid YAML: found duplicate key seed."),
        (
            "run: &x [*x]",
            "a.yaml: line 1, column 10: not valid YAML: YAML recursive aliases are not supported.",
        ),
        ("run: 1\n---\nrun: 2", "a.yaml: line 2, column 1: not valid YAML: but found another document."),
        (
            "run: !!python/object:os.x {}",
            "a.yaml: line 1, column 6: not valid YAML: could not determine a constr",
        ),
        ("1.5: 1", "a.yaml: the key 1.5 is not text; put the key in quotes."),
        ("run: {on: 1}", "a.yaml: run: the key True is not text; put the key in quotes."),
        ("run: {a: {1.5: 1}}", "a.yaml: run.a: the key 1.5 is not text; put the key in quotes."),
        (
            "run: ${seed",
            "a.yaml: run: no viable alternative at input '${seed'. An interpolation is ${key.path}",
        ),
        (
            "",
            "a.yaml: data is required: a data source, e.g. {name: folder}. "
            "Installed: folder, tar, parquet, array, tokens, good/made.",
        ),
        (
            "# only a remark\n",
            "a.yaml: data is required: a data source, e.g. {name: folder}. Installed: folder, ",
        ),
    ],
)
def test_a_file_that_is_no_config(here, good, content, message):
    Path("a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refused(good, "a.yaml")
    assert found.startswith(message) if not message.endswith(".") else found == message


def test_a_file_that_is_not_there(here, good):
    Path("cfgs").mkdir()
    write("cfgs/vit-vq.yaml")
    assert refused(good, "cfgs/vit-qv.yaml") == (
        "cfgs/vit-qv.yaml: there is no such file. Did you mean 'vit-vq.yaml'?"
    )
    assert refused(good, "nowhere/a.yaml") == "nowhere/a.yaml: there is no such file."
    assert refused(good, "cfgs") == "cfgs: is a folder, no file."
    assert refused(good, "recipe:whole") == (
        "recipe:whole: no such recipe. Did you mean 'good/whole'? List them: vqcore config --list"
    )


def test_a_byte_order_mark_does_no_harm(here, good):
    Path("a.yaml").write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(WHOLE).encode())
    assert load("a.yaml", schema=RunConfig, registry_=good).config.run.steps == 10


# --- strictness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, message",
    [
        ("optm", "a.yaml: optm is not a top-level setting. Did you mean 'optim'?"),
        ("steps", "a.yaml: steps is not a top-level setting. Did you mean 'run.steps'?"),
        ("run.stpes", "a.yaml: run.stpes is not a setting of run. Did you mean 'steps'?"),
        ("ema.half_life", "a.yaml: ema.half_life is not a setting of ema. Settings: decay."),
        ("model.encodr", "a.yaml: model.encodr is not a setting of model. Did you mean 'encoder'?"),
        (
            "model.encoder.dept",
            "a.yaml: model.encoder.dept is not a setting of good/grid. Did you mean 'depth'?",
        ),
        ("data.modality.pth", "a.yaml: data.modality.pth is not a setting of good/dots. Settings: none."),
        (
            "data.batch_sise",
            "a.yaml: data.batch_sise is not a setting of good/made. Did you mean 'batch_size'?",
        ),
        (
            "objective.percept.a.laier",
            "a.yaml: objective.percept.a.laier is not a setting of good/feel. Did you mean 'layer'?",
        ),
        ("hooks.b.evry", "a.yaml: hooks.b.evry is not a setting of good/tell. Did you mean 'every'?"),
    ],
)
def test_a_key_that_no_level_knows(here, good, key, message):
    nodes = {"objective__percept": {"a": {"name": "good/feel"}}, "hooks": {"b": {"name": "good/tell"}}}
    write("a.yaml", **nodes)
    assert refused(good, "a.yaml", f"{key}=1") == message.replace("a.yaml", "command line")
    write("a.yaml", **nodes, **{key.replace(".", "__"): 1})
    assert refused(good, "a.yaml") == message


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("run.seed", "x", "run.seed='x' is not an integer."),
        ("run.seed", 1.5, "run.seed=1.5 is not an integer."),
        ("run.seed", True, "run.seed=True is not an integer."),
        ("run.seed", None, "run.seed=null is not an integer."),
        ("run.steps", [3], "run.steps=[3] is not an integer or null."),
        ("optim.eps", "tiny", "optim.eps='tiny' is not a number."),
        ("optim.eps", False, "optim.eps=False is not a number."),
        ("optim.clip", "none", "optim.clip='none' is not a number or null."),
        ("run.precision", "fp8", "run.precision='fp8' is not one of fp32, bf16, fp16."),
        ("run.precision", None, "run.precision=null is not one of fp32, bf16, fp16."),
        ("optim.betas", [0.9], "optim.betas=[0.9] is not a list of 2 numbers."),
        ("optim.betas", 0.9, "optim.betas=0.9 is not a list of 2 numbers."),
        ("optim.betas", [0.9, "b"], "optim.betas[1]='b' is not a number."),
        ("data.input_size", "big", "data.input_size='big' is not an integer or a list of integers or null."),
        ("data.input_size", [8, "b"], "data.input_size[1]='b' is not an integer."),
        ("data.path", 2024, "data.path=2024 is not text. If it is meant as text, put it in quotes."),
        ("data.path", None, "data.path=null is not text."),
        (
            "objective.weights",
            {"a": "b"},
            "objective.weights.a='b' is not a number or a mapping from steps to numbers.",
        ),
        (
            "objective.weights",
            [1],
            "objective.weights=[1] is not a mapping from names to numbers or mappings from steps to numbers.",
        ),
        ("model.encoder.bias", 1, "model.encoder.bias=1 is not true or false."),
        ("model.encoder.stages", {"a": [1, None]}, "model.encoder.stages.a[1]=null is not an integer."),
        ("model.decoder.note", ["a"], "model.decoder.note=['a'] is not text or null."),
        ("requires", ["a b"], "requires: 'a b' is not a requirement such as 'vqcore-vit>=0.1'."),
        ("run", 5, "run must be a mapping, not 5."),
        ("ema", None, "ema must be a mapping, not null."),
        ("model", [1], "model must be a mapping, not [1]."),
        ("hooks", ["good/tell"], "hooks must be a mapping from labels to components, not ['good/tell']."),
        (
            "hooks",
            {"a": 3},
            "hooks.a must be a mapping with a name, not 3. Expected: a hook, e.g. {name: good/tell}. "
            "Installed: good/tell.",
        ),
        (
            "model.encoder",
            "good/grid",
            "model.encoder='good/grid' is not a mapping. Write {name: good/grid}, "
            "or model.encoder.name=good/grid on the command line.",
        ),
        (
            "model.encoder",
            None,
            "model.encoder cannot be null. Expected: an encoder, e.g. {name: good/grid}. Installed: good/grid.",
        ),
        (
            "model.encoder",
            {"depth": 3},
            "model.encoder has no name. Expected: an encoder, e.g. {name: good/grid}. Installed: good/grid.",
        ),
        (
            "model.encoder",
            {"name": 3},
            "model.encoder has no name. Expected: an encoder, e.g. {name: good/grid}. Installed: good/grid.",
        ),
        (
            "model.encoder",
            [1],
            "model.encoder must be a mapping with a name, not [1]. Expected: an encoder, e.g. {name: good/grid}. "
            "Installed: good/grid.",
        ),
        (
            "model.quantizer.levels",
            [8, 1],
            "model.quantizer.levels=[8, 1]: a channel wants at least 2 levels.",
        ),
        ("optim.betas", [0.9, 1.5], "optim.betas=[0.9, 1.5] must lie in [0, 1)."),
        ("optim.base_lr", 0.1, "optim: give either lr or base_lr."),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range(here, good, key, value, message):
    write("a.yaml", **{key.replace(".", "__"): value})
    assert refused(good, "a.yaml") == f"a.yaml: {message}"


@pytest.mark.parametrize(
    "key, value, result",
    [
        ("optim.lr", 1, 1.0),
        ("optim.betas", [0, 0.5], (0.0, 0.5)),
        ("data.input_size", 8, 8),
        ("data.input_size", [8, 9], (8, 9)),
        ("data.input_size", None, None),
        ("model.encoder.stages", {"a": [1, 2], "b": []}, {"a": (1, 2), "b": ()}),
        ("model.decoder.note", "12", "12"),
        ("model.decoder.note", "null", "null"),
        ("objective.second", {"name": "good/feel"}, None),
        ("run.seed", "12", 12),  # environment variables are always text
        ("model.encoder.bias", "false", False),
    ],
)
def test_values_become_what_their_setting_says(here, good, key, value, result):
    write("a.yaml", **{key.replace(".", "__"): value})
    found = load("a.yaml", schema=RunConfig, registry_=good).config
    for part in key.split("."):
        found = getattr(found, part)
    if result is None and value is not None:
        assert to_tree(found) == {"name": "good/feel", "layer": 1}
    else:
        assert found == result and type(found) is type(result)
        assert not isinstance(found, tuple) or [type(x) for x in found] == [type(x) for x in result]


@pytest.mark.parametrize(
    "drop, message",
    [
        (
            "data",
            "data is required: a data source, e.g. {name: folder}. "
            "Installed: folder, tar, parquet, array, tokens, good/made.",
        ),
        (
            "model.encoder",
            "model.encoder is required: an encoder, e.g. {name: good/grid}. Installed: good/grid.",
        ),
        ("model", "model.encoder is required: an encoder, e.g. {name: good/grid}. Installed: good/grid."),
        ("model.quantizer.levels", "model.quantizer.levels is required (a list of integers)."),
        ("run", "run: give either steps or epochs."),
        ("optim.lr", "optim: give either lr or base_lr."),
    ],
)
def test_what_is_required_and_missing(here, good, drop, message):
    tree = yaml.safe_load(yaml.safe_dump(WHOLE))
    node = tree
    *parents, last = drop.split(".")
    for part in parents:
        node = node[part]
    del node[last]
    write("a.yaml", tree)
    assert refused(good, "a.yaml") == f"a.yaml: {message}"
    if not isinstance(WHOLE.get(drop), dict):
        node[last] = "???"  # OmegaConf's word for a value that is required
        write("a.yaml", tree)
        assert refused(good, "a.yaml") == f"a.yaml: {message}"


# --- interpolation, requirements ------------------------------------------------------------------------------------


def test_interpolation(here, good, monkeypatch):
    monkeypatch.setenv("VQCORE_TEST_STEPS", "12")
    write(
        "a.yaml",
        run={
            "steps": "${oc.env:VQCORE_TEST_STEPS}",
            "seed": "${data.batch_size}",
            "dir": "runs/${data.name}",
        },
        data__batch_size=3,
        data__path="a \\${literal}",
        model__decoder__patch="${model.quantizer.levels}",
        optim__lr="${oc.env:VQCORE_TEST_NONE,0.5}",
    )
    cfg = load("a.yaml", ["data.batch_size=5"], schema=RunConfig, registry_=good).config
    assert (cfg.run.steps, cfg.run.seed, cfg.run.dir) == (12, 5, "runs/good/made")
    assert (cfg.data.path, cfg.model.decoder.patch, cfg.optim.lr) == ("a ${literal}", (8, 5), 0.5)
    assert "${oc" not in dump(cfg) and "\\${literal}" in dump(cfg)


def test_a_whole_node_may_be_interpolated(here, good):
    write(
        "a.yaml",
        objective__percept={"a": {"name": "good/feel", "layer": 4}},
        objective__second="${objective.percept.a}",
    )
    loaded = load("a.yaml", schema=RunConfig, registry_=good)
    assert loaded.config.objective.second.layer == 4
    assert loaded.layer("objective.second.layer") == "a.yaml"


READS = (
    " An interpolation is ${key.path}, where the config sets key.path, or ${oc.env:NAME};"
    " write \\${ for a literal ${."
)


@pytest.mark.parametrize(
    "value, message",
    [
        (
            "${oc.env:VQCORE_NOT_SET}",
            "Environment variable 'VQCORE_NOT_SET' not found. "
            "Set the variable, or give a default: ${oc.env:NAME,default}.",
        ),
        ("${run.seeed}", "Interpolation key 'run.seeed' not found." + READS),
        ("${run.dir}", "Recursive interpolation detected." + READS),
        ("${env:HOME}", "Unsupported interpolation type env." + READS),
    ],
)
def test_an_interpolation_that_leads_nowhere(here, good, value, message):
    write("a.yaml", run__dir=value)
    assert refused(good, "a.yaml") == f"a.yaml: run.dir: {message}"
    write("a.yaml")
    assert refused(good, "a.yaml", f"run.dir='{value}'") == f"command line: run.dir: {message}"


@pytest.mark.parametrize(
    "requires, message",
    [
        (["vqcore-nope>=1"], "requires vqcore-nope>=1, but vqcore-nope is not installed."),
        (["vqcore-good>=2"], "requires vqcore-good>=2, but vqcore-good 1.2 is installed."),
        (["vqcore-good<1.2"], "requires vqcore-good<1.2, but vqcore-good 1.2 is installed."),
        (["vqcore good"], "requires: 'vqcore good' is not a requirement such as 'vqcore-vit>=0.1'."),
        ("vqcore-good", "requires must be a list, e.g. requires: ['vqcore-vit>=0.1']"),
    ],
)
def test_requirements_are_checked_before_names_are_looked_up(here, good, requires, message):
    write("a.yaml", requires=requires, model__encoder__name="nowhere/at-all")
    assert refused(good, "a.yaml") == f"a.yaml: {message}"


def test_a_requirement_of_ours_says_where_it_comes_from(here, good, monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    write("a.yaml", requires=["vqcore-vit>=0.1"])
    assert refused(good, "a.yaml") == (
        "a.yaml: requires vqcore-vit>=0.1, but vqcore-vit is not installed. "
        "In a checkout of vqcore, run: pip install ./plugins/vqcore_vit"
    )


def test_requirements_that_are_met_or_concern_others(here, good):
    wanted = ["vqcore-good>=1.2", "VQcore_good", "nope>3; python_version < '3'"]
    write("a.yaml", requires=wanted)
    assert load("a.yaml", schema=RunConfig, registry_=good).config.requires == tuple(wanted)


# --- there and back -------------------------------------------------------------------------------------------------

# Shrinking these trees takes minutes. The examples are the same in every run.
PROPERTY = settings(deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
TEXT = st.text(max_size=8).filter(lambda text: text != "???" and text.strip() and "\0" not in text)
# fmt: off
ODD = st.sampled_from([
    "1e3", "0o7", "007", "1:30", "1_0", "~", "null",
    "yes", "2024-01-01", "=", "<<", "???!", "a: b", "#a", "- a",
    "[a]", "{a}", "*a", "&a", "!a", "%a", "@a", "`a`",
    "'", "\"", " a", "\ta", "a\n", "a\u0085", "${a}", "\\${a}",
    "\\\\${oc.env:X}",
])
# fmt: on
WORDS = ODD | TEXT
FLOATS = st.floats(-1e12, 1e12)
WHOLE_NUMBERS = st.integers(-(10**12), 10**12)
PERCEPT = st.fixed_dictionaries({"name": st.just("good/feel")}, optional={"layer": WHOLE_NUMBERS})
TREES = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {"name": st.just("good/made"), "modality": st.just({"name": "good/dots"}), "path": WORDS},
            optional={
                "input_size": st.none()
                | st.integers(1, 9)
                | st.lists(st.integers(1, 9), min_size=1, max_size=3),
                "max_bad_share": st.floats(0, 1),
                "extra": st.dictionaries(WORDS, st.just({"name": "good/dots"}), max_size=2),
            },
        ),
        "model": st.fixed_dictionaries(
            {
                "encoder": st.fixed_dictionaries(
                    {"name": st.just("good/grid")},
                    optional={
                        "depth": WHOLE_NUMBERS,
                        "size": st.sampled_from(["s", "b"]),
                        "dropout": FLOATS,
                        "bias": st.booleans(),
                        "stages": st.dictionaries(WORDS, st.lists(WHOLE_NUMBERS, max_size=3), max_size=3),
                    },
                ),
                "quantizer": st.fixed_dictionaries(
                    {
                        "name": st.just("good/fsq"),
                        "levels": st.lists(st.integers(2, 9), min_size=1, max_size=4),
                    }
                ),
                "decoder": st.fixed_dictionaries(
                    {"name": st.just("good/flat")}, optional={"note": st.none() | WORDS}
                ),
            }
        ),
        "objective": st.fixed_dictionaries(
            {"name": st.just("good/copy")},
            optional={
                "weights": st.dictionaries(WORDS, st.floats(0, 1e12), max_size=3),
                "percept": st.dictionaries(WORDS, PERCEPT, max_size=2),
                "second": st.none() | PERCEPT,
            },
        ),
        "run": st.fixed_dictionaries({"steps": st.integers(1, 10**12), "dir": WORDS}),
        "optim": st.fixed_dictionaries({"lr": st.floats(1e-300, 1e12)}),
    }
)


def test_a_dumped_config_loads_to_an_equal_object(installed, tmp_path):
    good = installed("good")
    file = tmp_path / "config.yaml"

    @settings(PROPERTY, max_examples=10)
    @given(TREES)
    def there_and_back(tree: dict) -> None:
        cfg = from_tree(escaped(tree), schema=RunConfig, registry_=good)
        assert (cfg.data.path, cfg.run.dir) == (tree["data"]["path"], tree["run"]["dir"])
        assert cfg.objective.weights == tree["objective"].get("weights", {})
        text = dump(cfg)
        file.write_text(text, encoding="utf-8")
        assert load(str(file), schema=RunConfig, registry_=good).config == cfg
        # a saved run is read in this way
        assert from_tree(yaml.safe_load(text), schema=RunConfig, registry_=good) == cfg

    there_and_back()


def escaped(node: Any) -> Any:
    """A tree in which OmegaConf reads every text literally."""
    if isinstance(node, dict):
        return {key: escaped(value) for key, value in node.items()}
    if isinstance(node, list):
        return [escaped(value) for value in node]
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", node) if isinstance(node, str) else node


@pytest.mark.parametrize("file", sorted(CFGS.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CFGS)))
def test_every_recipe_loads_and_its_dump_loads_to_the_same(file, tmp_path):
    ids = {name.partition("/")[0] for name in _names(yaml.safe_load(file.read_text())) if "/" in name}
    if missing := ids - set(registry().ids()):
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")
    if file.parent.name == "base":
        assert isinstance(yaml.safe_load(file.read_text()), dict)  # only some sections, not a whole config
        return
    cfg = load(str(file), schema=None).config
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(cfg))
    assert load(str(saved), schema=type(cfg)).config == cfg


def _names(node: Any) -> list[str]:
    if not isinstance(node, dict):
        return []
    own = [node["name"]] if isinstance(node.get("name"), str) else []
    return own + [name for value in node.values() for name in _names(value)]


@given(WORDS | WHOLE_NUMBERS | FLOATS | st.booleans() | st.none() | st.lists(WORDS, max_size=3))
@settings(PROPERTY, max_examples=30)
def test_a_printed_value_can_be_given_on_the_command_line(value):
    text = inline(value)
    assert "\n" not in text
    schema = make_dataclass(
        "Schema",
        [("value", bool | int | float | str | tuple[str, ...] | None, field(default=None))],
        frozen=True,
    )
    found = overridden({}, [f"value={text}"], schema=schema, file="x", registry_=registry()).value
    assert (list(found) if isinstance(found, tuple) else found) == value


# --- as the command line shows it -----------------------------------------------------------------------------------


def test_the_config_verb_prints_what_loads_again(here, installed, capsys):
    good = installed("good")
    write("a.yaml", run__dir="runs/${oc.env:HOME}")
    assert main(["config", "a.yaml", "run.seed=5"]) == 0
    Path("b.yaml").write_text(capsys.readouterr().out)
    assert load("b.yaml", schema=RunConfig, registry_=good).config == (
        load("a.yaml", ["run.seed=5"], schema=RunConfig, registry_=good).config
    )


def test_origin_names_the_layer_of_every_value(here, installed, capsys):
    installed("good")
    write("base.yaml", {"run": {"seed": 1}})
    write("a.yaml", defaults=["base.yaml"])
    assert main(["config", "a.yaml", "--origin", "optim.clip=null", "optim.betas=[0.1,0.2]"]) == 0
    lines = dict(line.split("  # ") for line in capsys.readouterr().out.splitlines())
    assert lines["run.seed=1"] == "base.yaml"
    assert lines["run.steps=10"] == "a.yaml"
    assert lines["optim.clip=null"] == "command line"
    assert lines["optim.betas=[0.1, 0.2]"] == "command line"
    assert lines["model.encoder.bias=true"] == "default"
    assert lines["model.encoder.name=good/grid"] == "a.yaml"
    assert lines["run.dir=runs/a"] == "default"
    assert lines["hooks={}"] == "default"


def test_the_config_verb_wants_a_file_and_lists_recipes(here, installed, capsys):
    installed("good")
    assert main(["config"]) == 2
    assert capsys.readouterr().err.startswith("error: no config given. Run: vqcore config FILE.yaml, or ")
    assert main(["config", "--list"]) == 0
    assert "recipe:good/base/parts\nrecipe:good/whole\n" in capsys.readouterr().out


def test_settings_come_with_type_default_and_text():
    @dataclass(frozen=True, kw_only=True)
    class Inner:
        deep: int = 1

    @dataclass(frozen=True, kw_only=True)
    class Outer(Config):
        size: int | tuple[int, ...] | None = None
        """How large, over
        two lines."""
        mode: Literal["a", "b"] = "a"
        pair: tuple[float, float] = (0.9, 1e-5)
        """Two of them."""
        mixed: tuple[int, str] = (1, "x")
        """One of each."""
        inner: Inner = field(default_factory=Inner)
        """Nested."""
        part: Config = slot("encoder")
        """A component."""

    assert [(s.name, s.type, s.default, s.text) for s in settings_of(Outer)] == [
        ("size", "an integer or a list of integers or null", "null", "How large, over two lines."),
        ("mode", "one of a, b", "a", ""),
        ("pair", "a list of 2 numbers", "[0.9, 1.0e-05]", "Two of them."),
        ("mixed", "a list (an integer, text)", "[1, x]", "One of each."),
        ("inner", "a mapping of settings", "{deep: 1}", "Nested."),
        ("part", "an encoder", "required", "A component."),
    ]


def test_a_plain_value_error_blames_the_node(here, good, monkeypatch):
    """A Config of a third party may raise ValueError: no key is guessed from the words of the message."""

    def refuse(self) -> None:
        raise ValueError("levels=[8, 5] do not fit\na second line")

    monkeypatch.setattr(good.load("quantizer", "good/fsq").Config, "__post_init__", refuse)
    write("base.yaml", {"model": {"quantizer": WHOLE["model"]["quantizer"]}})
    model = {kind: WHOLE["model"][kind] for kind in ("encoder", "decoder")}
    write("a.yaml", {**WHOLE, "defaults": ["base.yaml"], "model": model})
    text = "model.quantizer: levels=[8, 5] do not fit."
    assert refused(good, "a.yaml") == f"base.yaml: {text}"
    write("b.yaml", {**WHOLE, "model": model})
    whole = "model.quantizer={name: good/fsq, levels: [8, 5]}"
    assert refused(good, "b.yaml", whole) == f"command line: {text}"
    assert refused(good, "a.yaml", "model.quantizer.levels=[8]") == f"a.yaml: {text}"  # two layers: the file


@pytest.mark.parametrize(
    ("tree", "overrides", "message"),
    [
        (
            {"optim": {"base_lr": 0.1, "lr": None}},
            ["optim.lr=1"],
            "command line: optim: give either lr or base_lr. "
            "optim.base_lr comes from a.yaml; optim.base_lr=null removes this value.",
        ),
        ({"optim": {"base_lr": 0.1}}, [], "a.yaml: optim: give either lr or base_lr."),
        (
            {"data": {"input_size": 8}},
            ["data.input_size_min=8", "data.input_size_max=16"],
            "command line: data: give either input_size, or input_size_min and input_size_max. "
            "data.input_size comes from a.yaml; data.input_size=null removes this value.",
        ),
        ({"optim": {"players": {"d": {"lr": 0}}}}, [], "a.yaml: optim.players.d: lr=0.0 must be above 0."),
        (
            {},
            ["optim.players.d={lr: 1, base_lr: 1}"],
            "command line: optim.players.d: give either lr or base_lr.",
        ),
        (
            {},
            ["data={name: folder, path: x, modality: {name: rgb}, extra: {depth: {name: rgb}}}"],
            "command line: data.extra.depth has no source. Set data.extra_path.depth.",
        ),
        (
            {},
            ["data={name: folder, path: x, modality: {name: rgb}, extra_path: {depth: y}}"],
            "command line: data.extra_path.depth: data.extra.depth does not exist. Labels: none.",
        ),
    ],
)
def test_settings_that_contradict_each_other(here, good, tree, overrides, message):
    """Among several settings, those of the command line are named as the cause."""
    changes = {f"{section}__{key}": value for section, own in tree.items() for key, value in own.items()}
    write("a.yaml", **changes)
    assert refused(good, "a.yaml", *overrides) == message


def test_an_error_of_the_config_is_a_config_error(here, good):
    write("a.yaml", run__seed="x")
    with pytest.raises(ConfigError):
        load("a.yaml", schema=RunConfig, registry_=good)


def test_a_ramp_is_one_value_and_reads_back(here, good):
    """Numbers by step: from a file, replaced as a whole by a later layer, checked, and equal after saving."""
    path = write("a.yaml", objective={"name": "reconstruction", "weights": {"gan/a": {0: 0, 10: 1}}})
    config = load(path, [], schema=RunConfig).config
    assert config.objective.weights == {"gan/a": {0: 0.0, 10: 1.0}}
    weights = [config.objective.weight("gan/a", step) for step in (0, 5, 10, 99)]
    assert weights == [0.0, 0.5, 1.0, 1.0] and config.objective.weight("other", 3) == 1.0
    later = load(path, ["objective.weights.gan/a={20: 0.5}"], schema=RunConfig).config
    assert later.objective.weights == {"gan/a": {20: 0.5}} and later.objective.weight("gan/a", 0) == 0.5
    (here / "saved.yaml").write_text(dump(later))
    assert from_tree(saved_tree(here / "saved.yaml"), schema=RunConfig) == later
    for wrong, text in (("{x: 1}", "weights.gan/a"), ("{1: two}", "is not"), ("{-1: 2}", "is not")):
        with pytest.raises(ConfigError, match=text):
            load(path, [f"objective.weights.gan/a={wrong}"], schema=RunConfig)
