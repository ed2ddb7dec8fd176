"""Wheels in fresh environments: a third party's package beside core and vit; each plugin with what it declares."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


PLUGINS = sorted(path.name for path in (ROOT / "plugins").glob("vqcore_*"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheels of the core, of every plugin and of the example, by the name of their folder."""
    folder = tmp_path_factory.mktemp("wheels")
    made = {}
    for project in (".", *(f"plugins/{name}" for name in PLUGINS), "examples/vqcore-pose"):
        build = [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(folder / project),
        ]
        subprocess.run([*build, str(ROOT / project)], check=True, capture_output=True)
        (made[Path(project).name],) = (str(path) for path in (folder / project).glob("*.whl"))
    return made


def environment(folder, *wheels):
    """A new environment that holds these wheels; returns what runs a command in it, away from the checkout.

    PyTorch is linked from the environment of the suite: a copy takes 5.5 GB.
    """
    venv.create(folder / "env", with_pip=True)
    binaries = folder / "env" / "bin"
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    for each in importlib.metadata.distributions():
        if re.match(r"torch$|triton$|nvidia-|nvidia_|cuda-|cuda_", each.name):
            for top in {path.parts[0] for path in each.files} - {".."}:
                link = packages / top
                link.is_symlink() or link.symlink_to(Path(each.locate_file(top)).resolve())
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

    status, out, err = run("pip", "install", "--quiet", *wheels)
    assert status == 0, out + err
    return run


@pytest.fixture(scope="module")
def fresh(wheels, tmp_path_factory):
    """Core, vit and the example."""
    return environment(
        tmp_path_factory.mktemp("fresh"), wheels[""], wheels["vqcore_vit"], wheels["vqcore-pose"]
    )


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
    assert status == 0 and "eval/metric/mae" in out, out + err
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


def test_core_vit_and_quant_train_photographs(wheels, tmp_path):
    run = environment(tmp_path, wheels[""], wheels["vqcore_vit"], wheels["vqcore_quant"])
    photos = ROOT / "data" / "photos"
    paths = [f"data.path={photos / 'train'}", f"data.eval_path={photos / 'heldout'}"]
    status, out, err = run("vqcore", "train", "recipe:quickstart", "run.steps=20", "run.dir=q", *paths)
    assert status == 0 and "eval/metric/psnr" in out, out + err
    warned = [line for line in err.splitlines() if "hooks.report" in line]
    assert len(warned) == 1 and "vqcore-track" in warned[0], err
    status, out, err = run("vqcore", "tokenize", "q", str(photos / "heldout"), "tokens")
    assert status == 0 and "7 written" in out, out + err


def needed(name):
    """The other plugins that this one declares in its pyproject.toml, as names of folders."""
    with (ROOT / "plugins" / name / "pyproject.toml").open("rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    return [re.split(r"\W", each.replace("-", "_"))[0] for each in wanted if each.startswith("vqcore-")]


def test_each_plugin_alone_with_the_core_passes_its_checks(wheels, tmp_path):
    run = environment(tmp_path, wheels[""])
    for name in PLUGINS:
        names = [name, *needed(name)]
        status, out, err = run("pip", "install", "--quiet", *(wheels[each] for each in names))
        assert status == 0, out + err
        status, out, err = run("vqcore", "plugins", "--check")
        checked = out.count("checked: manifest")
        assert status == 0 and checked == 1 + len(names) and "FAILED" not in out, out + err
        assert f"\n{name.removeprefix('vqcore_')} " in out
        run("pip", "uninstall", "--yes", "--quiet", *(each.replace("_", "-") for each in names))
