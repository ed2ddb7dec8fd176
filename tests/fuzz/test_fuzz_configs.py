"""Mutated configs end in one clean line or in a right result: no traceback, no hang, nothing left behind."""

import contextlib
import dataclasses
import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from configs import Case, case

from vqcore.assembly import assemble
from vqcore.cli import main
from vqcore.compose.build import check_readable
from vqcore.compose.describe import dump
from vqcore.compose.layers import load
from vqcore.config import leaves, to_tree
from vqcore.errors import VqcoreError
from vqcore.schema import RunConfig

pytest.importorskip("vqcore_vit")
pytest.importorskip("vqcore_quant")
PHOTOS = Path(__file__).resolve().parents[2] / "data" / "photos"
LIMIT_S = 60
"""No case takes longer on any machine; a case that does hangs."""
GOOD: dict[str, Any] = {
    "data": {"name": "folder", "path": "pics", "modality": {"name": "rgb"}, "input_size": 16, "batch_size": 2,
             "workers": 0},
    "model": {
        "encoder": {"name": "vit/encoder", "width": 8, "depth": 0, "num_heads": 1, "patch_size": 8, "grid_convs": 1},
        "quantizer": {"name": "quant/vq", "codebook_size": 8, "latent_dim": 4},
        "decoder": {"name": "vit/decoder", "width": 8, "depth": 0, "num_heads": 1, "patch_size": 8, "grid_convs": 1},
    },
    "objective": {"name": "reconstruction", "weights": {"vq/commit": 0.5}},
    "run": {"steps": 2, "dir": "runs/r", "threads": 1},
    "optim": {"name": "adamw", "lr": 1e-3},
    "eval": {"pictures": 1},
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with pictures, and what cases leave there is noticed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    for picture in sorted((PHOTOS / "train").iterdir())[:3]:
        (tmp_path / "pics" / picture.name).symlink_to(picture)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def settings(here: Path) -> dict[str, Any]:
    """Every setting of the good config as it is resolved, with its defaults."""
    (here / "good.yaml").write_text(yaml.safe_dump(GOOD))
    config = load("good.yaml", schema=RunConfig).config
    return dict(leaves(to_tree(config)))


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """Fail after `LIMIT_S` seconds, whatever runs."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"hangs: {what}")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def written(one: Case) -> str:
    """The case as a file; what YAML cannot write safely is left to the words."""
    try:
        Path("a.yaml").write_text(
            yaml.safe_dump(one.tree, allow_unicode=True), encoding="utf-8", errors="surrogateescape"
        )
    except (yaml.YAMLError, ValueError):
        Path("a.yaml").write_text(repr(one.tree), encoding="utf-8", errors="backslashreplace")
    return "a.yaml"


def composed(one: Case) -> str:
    """Compose, save and read back, and build the parts; `built`, or the one line that refuses the case."""
    try:
        config = load(written(one), one.overrides, schema=RunConfig).config
        check_readable(config, dump(config))
        built = assemble(config)
        assert built is not None
        return "built"
    except VqcoreError as error:
        text = str(error)
        assert text.strip() and len(text) < 1200, (one.what, text)
        return "refused"


def run(numbers: range, here: Path, look: Any) -> dict[str, int]:
    """The number of cases by result; the names in the folder must not change."""
    known = settings(here)
    before = {*here.iterdir(), here / "a.yaml"}
    found: dict[str, int] = {}
    for number in numbers:
        one = case(GOOD, known, number)
        try:
            with limited(f"case {number}: {one.what}"):
                result = look(one)
        except Exception as error:
            raise AssertionError(f"case {number}: {one.what} {one.overrides}") from error
        assert set(here.iterdir()) <= before, f"case {number} left something: {one.what}"
        found[result] = found.get(result, 0) + 1
    return found


def checked(one: Case) -> str:
    """The same through the command line, up to a training step."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        status = main(["check", written(one), *one.overrides])
    assert status in (0, 2) and "Traceback" not in err.getvalue(), err.getvalue()[-2000:]
    return {0: "built", 2: "refused"}[status]


def test_mutated_configs(here):
    found = run(range(40), here, composed)
    assert found["refused"] > 15 and found["built"] > 3, found


def test_mutated_configs_on_the_command_line(here):
    found = run(range(1000, 1003), here, checked)
    assert sum(found.values()) == 3


@pytest.mark.slow
def test_many_mutated_configs(here):
    found = run(range(2000, 3000), here, checked)
    print(found)
    assert found["refused"] > 300 and found["built"] > 50, found


def test_a_case_is_the_same_every_time():
    keys = dict(leaves(GOOD))
    assert repr(case(GOOD, keys, 5)) == repr(case(GOOD, keys, 5)) != repr(case(GOOD, keys, 6))
    assert dataclasses.is_dataclass(Case)
