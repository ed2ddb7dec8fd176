"""The import layers, watched in processes of their own: what must not be in sys.modules yet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parent / "fixtures" / "plugins"
ENV = {**os.environ, "PYTHONPATH": str(PLUGINS / "good"), "PYTHONDONTWRITEBYTECODE": "1"}
LAYERS = """
import contextlib, io, json, sys
seen = [set(sys.modules)]
def look():
    seen.append(set(sys.modules))
import vqcore.plugin
look()
import vqcore.cli
said = io.StringIO()
with contextlib.redirect_stdout(said):
    assert vqcore.cli.main(["--help"]) == 0
    look()
    assert vqcore.cli.main(["plugins"]) == 0
    look()
import vqcore.config, vqcore.schema
look()
import vqcore.compose.layers, vqcore.sampling
look()
tops = [sorted({name.partition(".")[0] for name in seen[i + 1] - seen[i]}) for i in range(len(seen) - 1)]
print(json.dumps({"tops": tops, "targets": "fixture_good.parts" in sys.modules, "said": said.getvalue()}))
"""


@pytest.fixture(scope="module")
def layers() -> dict:
    """The top-level packages that each layer brought, and what the command line said meanwhile."""
    done = subprocess.run([sys.executable, "-c", LAYERS], env=ENV, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def foreign(tops: list[str]) -> set[str]:
    return {name for name in tops if name not in sys.stdlib_module_names}


def test_a_manifest_costs_the_standard_library_and_pluggy(layers):
    assert foreign(layers["tops"][0]) == {"vqcore", "pluggy"}


def test_help_costs_the_same(layers):
    assert foreign(layers["tops"][1]) == {"vqcore"}
    assert "usage: vqcore" in layers["said"] and "tokenize" in layers["said"]


def test_the_list_of_plugins_costs_their_manifests(layers):
    assert "good       vqcore-good 1.2" in layers["said"]
    assert "fixture_good" in layers["tops"][2] and not layers["targets"]
    assert not foreign(layers["tops"][2]) & {"torch", "numpy", "omegaconf", "yaml", "PIL", "einops", "rich"}


@pytest.mark.parametrize("modules", ["vqcore.config", "vqcore.config, vqcore.schema"])
def test_settings_cost_the_standard_library(modules):
    """In a process of their own, so that nothing is imported before."""
    code = f"import sys; before = set(sys.modules); import {modules}; print(*set(sys.modules) - before)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=True)
    assert foreign([name.partition(".")[0] for name in done.stdout.split()]) == {"vqcore"}


def test_reading_files_brings_omegaconf_and_no_torch(layers):
    assert foreign(layers["tops"][3]) == {"vqcore"}
    assert "omegaconf" in layers["tops"][4]
    assert not foreign(layers["tops"][4]) & {"torch", "numpy", "PIL", "einops", "jaxtyping", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["config", "--list"]])
def test_the_command_itself(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "vqcore", *arguments]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "vqcore.cli" in imported
    banned = {"torch", "numpy", "rich", "einops", "PIL"} | (
        {"omegaconf"} if arguments == ["--help"] else set()
    )
    assert not banned & imported
    wanted = "verbs:" if arguments == ["--help"] else "recipe:good/whole"
    assert wanted in done.stdout
