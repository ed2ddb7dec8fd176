"""A stranger's package beside the core and vit alone, in a fresh environment: built, listed, checked, trained."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Run a command of a new environment that holds the wheels of core, vit and pose, away from the checkout."""
    folder = tmp_path_factory.mktemp("fresh")
    for project in (".", "plugins/vqcore_vit", "examples/vqcore-pose"):
        build = [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(folder / "wheels"),
        ]
        subprocess.run([*build, str(ROOT / project)], check=True, capture_output=True)
    venv.create(folder / "env", with_pip=True)
    binaries = folder / "env" / "bin"
    wheels = [str(path) for path in (folder / "wheels").iterdir()]
    assert len(wheels) == 3
    subprocess.run([binaries / "pip", "install", "--quiet", *wheels], check=True, capture_output=True)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "VQCORE"))}

    def run(*argv):
        done = subprocess.run(
            [binaries / argv[0], *argv[1:]],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_what_is_installed_is_listed(fresh):
    status, out, err = fresh("vqcore", "plugins", "--check")
    assert status == 0, out + err
    assert "vit/encoder" in out and "pose/signs" in out and "quant/" not in out
    assert out.count("checked: manifest") == 3


def test_recipes_travel_in_wheels(fresh):
    status, out, _ = fresh("vqcore", "config", "--list")
    assert status == 0 and {"recipe:quickstart", "recipe:pose/walk"} <= set(out.split())


def test_a_stranger_trains(fresh):
    status, out, err = fresh("vqcore", "train", "recipe:pose/walk", "run.steps=40", "run.dir=walk")
    assert status == 0 and "eval/mae" in out, out + err
    status, out, err = fresh("vqcore", "export", "walk", "made")
    assert status == 0, err


def test_what_is_not_installed_is_named_with_its_package(fresh):
    argv = ["vqcore", "config", "recipe:pose/walk", "model.quantizer={name: quant/vq, codebook_size: 8}"]
    status, _, err = fresh(*argv)
    assert status == 2
    assert err.strip().splitlines()[-1] == (
        "error: command line: model.quantizer.name: no plugin 'quant' is installed. It comes with vqcore-quant: "
        "in a checkout of vqcore, run: pip install ./plugins/vqcore_quant"
    )
