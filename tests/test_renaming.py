"""A plugin renames its modality, encoder and quantizer: all that was saved under the former names goes on working."""

import importlib
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toys import run_tree, toy  # noqa: F401

from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.config import Config, deciding, slot, slots
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.usefixtures("toy"),
    pytest.mark.filterwarnings("ignore:.*is now called:FutureWarning"),
]
TARGETS = {
    "modality": "vqcore.modalities.array:Array",
    "encoder": "vqcore_toy.parts:Encoder",
    "quantizer": "vqcore_toy.parts:Quantizer",
}
MANIFEST = """\
from vqcore.plugin import API, Component, Plugin, hookimpl

@hookimpl
def vqcore_plugin():
    return Plugin(API, "Parts that are renamed", ({components}))
"""
RENAMINGS = {
    # situation: (the names until the plugin saved something, its names now), each oldest first
    "once": (("old",), ("old", "new")),
    "twice, saved by the first": (("oldest",), ("oldest", "older", "new")),
    "twice, saved by the second": (("oldest", "older"), ("oldest", "older", "new")),
    "there and back": (("first", "second"), ("first", "second", "first")),
}


def write_plugin(folder: Path, id: str, version: str, names: tuple[str, ...]) -> Path:
    """A distribution whose three components are called `names[-1]`, and were called by the others before."""
    components = "".join(
        f"Component({kind!r}, {names[-1]!r}, {target!r}, 'a part', renamed_from={names[:-1]!r}), "
        for kind, target in TARGETS.items()
    )
    package, info = folder / f"fixture_{id}", folder / f"acme_{id}-{version}.dist-info"
    for made in (package, info):
        made.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text(MANIFEST.format(components=components))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{id}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[vqcore]\n{id} = fixture_{id}.plugin\n")
    return folder


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a version of a plugin in place of the one before, as pip would."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    installed: dict[str, str] = {}

    def forget():
        for name in [name for name in sys.modules if name.startswith("fixture_")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        registry.cache_clear()

    def install(*names, id="shape"):
        version = f"1.{len(list(tmp_path.glob(f'plugins/{id}-*')))}"
        folder = write_plugin(tmp_path / f"plugins/{id}-{version}", id, version, names)
        if id in installed:
            sys.path.remove(installed[id])
        installed[id] = str(folder)
        sys.path.insert(0, str(folder))
        forget()

    yield install
    forget()


def tree_of(folder: Path, name: str, id: str = "shape", **changes) -> dict:
    """A tiny run whose modality, encoder and quantizer have this name."""
    modality = {"name": f"{id}/{name}", "channels": 2, "size": [8, 8], "range": [-1, 1]}
    parts = {"model__encoder": {"name": f"{id}/{name}"}, "model__quantizer": {"name": f"{id}/{name}"}}
    return run_tree(
        folder, data__modality=modality, data__length=7, run__steps=2, optim__horizon=9, **parts, **changes
    )


def written(file: Path, tree: dict) -> str:
    file.write_text(yaml.dump(tree))
    return str(file)


def weights(run: Path, step: int) -> bytes:
    return (run / f"checkpoints/step_{step}/model.safetensors").read_bytes()


@dataclass(frozen=True)
class Saved:
    """What a plugin's earlier version has left behind."""

    config: str
    run: Path
    made: Path
    files: Path
    tokens: Path
    evaluation: Path
    fingerprint: str
    codes: torch.Tensor
    names: tuple[str, ...]


SHORT = ("once",)


@pytest.fixture(
    params=[name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in RENAMINGS]
)
def saved(request, install, tmp_path) -> Saved:
    """A run, its export, its tokens and its evaluation, made before the renaming; the plugin is renamed now."""
    before, now = RENAMINGS[request.param]
    install(*before)
    run, made, files, tokens = (tmp_path / name for name in ("run", "made", "files", "tokens"))
    config = written(tmp_path / "run.yaml", tree_of(run, before[-1]))
    files.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        np.save(files / f"f{index}.npy", rng.uniform(-1, 1, (2, 8, 8)).astype(np.float32))
    for argv in (
        ["train", config],
        ["eval", str(run)],
        ["export", str(run), str(made)],
        ["tokenize", str(run), str(files), str(tokens)],
    ):
        assert main(argv) == 0
    evaluation = tmp_path / "before.json"
    shutil.move(run / "eval.json", evaluation)
    tokenizer = Tokenizer.load(made)
    assert tokenizer.cfg.model.quantizer.name == f"shape/{before[-1]}"
    x = tokenizer.read(files / "f0.npy")
    found = Saved(
        config, run, made, files, tokens, evaluation, tokenizer.fingerprint, tokenizer.encode(x), now
    )
    install(*now)
    return found


def test_runs_and_tokenizers_load_and_encode_as_before(saved, tmp_path):
    for path in (saved.run, saved.made):
        tokenizer = Tokenizer.load(path)
        cfg = tokenizer.cfg
        named = {cfg.modality.name, cfg.model.encoder.name, cfg.model.quantizer.name}
        assert named == {f"shape/{saved.names[-1]}"}
        assert tokenizer.fingerprint == saved.fingerprint
        assert torch.equal(tokenizer.encode(tokenizer.read(saved.files / "f0.npy")), saved.codes)
    Tokenizer.load(saved.made).save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").fingerprint == saved.fingerprint


@pytest.mark.parametrize("saved", ["once"], indirect=True)
def test_a_former_name_in_what_was_saved_is_named(saved):
    former = RENAMINGS["once"][0][0]
    with pytest.warns(FutureWarning, match=f"model.quantizer: 'shape/{former}' is now called 'shape/new'"):
        Tokenizer.load(saved.made)


@pytest.mark.slow
def test_codes_go_on(saved, tmp_path, capsys):
    for source in (saved.run, saved.made):
        rebuilt = tmp_path / f"rebuilt-{source.name}"
        assert main(["decode", str(source), str(saved.tokens), str(rebuilt)]) == 0
        assert len(list(rebuilt.glob("*.npy"))) == 3
    capsys.readouterr()
    assert main(["tokenize", str(saved.made), str(saved.files), str(saved.tokens)]) == 0
    assert "0 written, 3 existed already" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluations_are_compared(saved, tmp_path, capsys):
    new = tmp_path / "now.json"
    assert main(["eval", str(saved.run), "--json", str(new)]) == 0
    before, now = (json.loads(path.read_text()) for path in (saved.evaluation, new))
    assert before["protocol"] == now["protocol"]
    assert before["results"] == now["results"]  # fingerprints too
    assert main(["eval", "--compare", str(saved.evaluation), str(new)]) == 0
    assert main(["eval", "--compare", str(saved.evaluation), str(saved.made)]) == 0
    assert "psnr" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_resumed_under_its_former_and_its_present_name(saved, tmp_path):
    assert main(["train", saved.config, "run.steps=3"]) == 0
    present = written(tmp_path / "now.yaml", tree_of(saved.run, saved.names[-1]))
    assert main(["train", present, "run.steps=4"]) == 0
    assert main(["train", present, f"run.dir={tmp_path / 'other'}", "run.steps=4"]) == 0
    assert weights(saved.run, 4) == weights(tmp_path / "other", 4)
    config = yaml.safe_load((saved.run / "config.yaml").read_text())
    assert config["model"]["encoder"]["name"] == f"shape/{saved.names[-1]}"


@pytest.mark.slow
def test_a_new_run_keeps_the_tokens_of_what_was_saved(saved, tmp_path):
    start = {"model__full_ckpt": str(saved.made), "model__freeze_enc": True}
    config = written(tmp_path / "now.yaml", tree_of(tmp_path / "more", saved.names[-1], **start))
    assert main(["train", config]) == 0
    assert Tokenizer.load(tmp_path / "more").fingerprint == saved.fingerprint


def test_settings_of_a_file_below_stay_where_only_the_name_changed(install, tmp_path):
    """A plugin's recipe has the present name, a config that was written before has the former one."""
    install("old", "new")
    tree = tree_of(tmp_path / "run", "new")
    tree["model"]["quantizer"]["rate"] = 0.5
    written(tmp_path / "recipe.yaml", tree)
    mine = {"defaults": ["recipe.yaml"], "model": {"quantizer": {"name": "shape/old", "codebook_size": 8}}}
    found = load(written(tmp_path / "mine.yaml", mine), ["data.modality.name=shape/old"], schema=RunConfig)
    quantizer, modality = found.config.model.quantizer, found.config.data.modality
    assert (quantizer.name, quantizer.rate, quantizer.codebook_size) == ("shape/new", 0.5, 8)
    assert (modality.name, modality.channels) == ("shape/new", 2)


def test_nobody_claims_the_fingerprint_of_another_plugin(install, tmp_path):
    install("old", "new")
    install("old", "new", id="other")
    catalogue = registry()
    for kind in TARGETS:
        identities = {catalogue.identity(kind, name) for name in ("shape/old", "shape/new")}
        assert identities == {"shape/old"}
        assert catalogue.identity(kind, "other/new") == "other/old"
    made = []
    for id in ("shape", "other"):
        file = written(tmp_path / f"{id}.yaml", tree_of(tmp_path / id, "new", id))
        assert main(["train", file]) == 0
        made.append(Tokenizer.load(tmp_path / id))
    ours, theirs = made
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    assert ours.fingerprint != theirs.fingerprint


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    width: int = 1


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    inner: Config = slot("quantizer")
    parts: dict[str, Config] = slots("encoder")
    sizes: tuple[int, ...] = field(default=(1, 2))


def test_parts_inside_parts_have_their_identity(install):
    def decided(name):
        inner, part = Inner(name=name, width=3), Inner(name=name)
        cfg = Outer(name=name, inner=inner, parts={"a": part})
        return deciding(cfg, "quantizer", registry().identity)

    install("old")
    before = decided("shape/old")
    install("old", "new")
    assert decided("shape/new") == before
    assert before == {
        "name": "shape/old",
        "inner": {"name": "shape/old", "width": 3},
        "parts": {"a": {"name": "shape/old"}},
    }
