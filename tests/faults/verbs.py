"""What the tables of faults share: a folder in which every verb has something to do, and the verbs that write."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from toys import run_tree

from vqcore.cli import main
from vqcore.files import is_beside


@dataclass(frozen=True)
class Verb:
    """A command that writes.

    `folder` and `file` are where it writes: the folder itself, and one of its files. `result` is a file whose bytes say
    whether the command did all of its work.
    """

    name: str
    argv: tuple[str, ...]
    folder: str
    file: str
    result: str = ""

    def __str__(self) -> str:
        return self.name


_SIX = "run/checkpoints/step_6"
VERBS = (
    Verb(
        "train", ("train", "new.yaml"), "new", "new/config.yaml", "new/checkpoints/step_4/state.safetensors"
    ),
    Verb(
        "resume",
        ("train", "run.yaml", "run.steps=6"),
        "run",
        "run/config.yaml",
        "run/checkpoints/step_6/state.safetensors",
    ),
    Verb("eval", ("eval", "run"), "run", "run/eval.json", "run/eval.json"),
    Verb(
        "eval-json", ("eval", "run", "--json", "made/eval.json"), "made", "made/eval.json", "made/eval.json"
    ),
    Verb("report", ("report", "run"), "run", "run/report.html", "run/report.html"),
    Verb("tokenize", ("tokenize", "run", "in", "out"), "out", "out/tokens.json", "out/shard-00000.arrow"),
    Verb(
        "tokenize-folder",
        ("tokenize", "run", "in", "out", "--store", "folder"),
        "out",
        "out/a.npy",
        "out/c.npy",
    ),
    Verb("decode", ("decode", "run", "tokens", "out"), "out", "out/a.npy", "out/c.npy"),
    Verb("decode-png", ("decode", "pictures", "codes", "out"), "out", "out/a.png", "out/c.png"),
    Verb("export", ("export", "run", "out"), "out", "out", "out/model.safetensors"),
    Verb(
        "export-format",
        ("export", "run", "out", "--format", "toy/boxes"),
        "out",
        "out",
        "out/toybox.safetensors",
    ),
    Verb("import", ("import", "toy/boxes", "box", "out"), "out", "out", "out/model.safetensors"),
    Verb(
        "import-config",
        ("import", "toy/notes", "old.toyrc", "made/out.yaml"),
        "made",
        "made/out.yaml",
        "made/out.yaml",
    ),
)
READERS = (("check", "run.yaml"), ("config", "run.yaml"), ("show", "optim"), ("plugins",))
"""Commands that write nothing, so that a full disk is no matter to them."""


def make_world(place: Path) -> None:
    """Fill a folder: configs, inputs, a run, a tokenizer of pictures, codes, files of another system."""
    with contextlib.chdir(place):
        for name, changes in (("run", {"run__steps": 4}), ("new", {"run__steps": 4, "eval__every": 2})):
            tree = run_tree(name, run__threads=1, hooks={"report": {"name": "track/report"}}, **changes)
            Path(f"{name}.yaml").write_text(yaml.dump(tree))
        tree = run_tree("pictures", run__steps=1)
        tree["data"] |= {"name": "folder", "path": "photos", "modality": {"name": "rgb"}, "input_size": 8}
        Path("pictures.yaml").write_text(yaml.dump(tree))
        rng = np.random.default_rng(0)
        for folder in ("in", "photos", "made"):
            Path(folder).mkdir()
        for name in "abc":
            np.save(f"in/{name}.npy", rng.uniform(-1, 1, (2, 8, 8)).astype(np.float32))
            _picture(Path(f"photos/{name}.png"), rng)
        Path("old.toyrc").write_text("lr 0.01\nsteps 3\n")
        for line in (
            "train run.yaml",
            "train pictures.yaml",
            "eval run",
            "tokenize run in tokens",
            "tokenize pictures photos codes",
            "export run box --format toy/boxes",
        ):
            assert main(line.split()) == 0, line


def _picture(path: Path, rng: np.random.Generator) -> None:
    from PIL import Image

    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def contents(place: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes; None for folders. The lock of a run is no content."""
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
        if path.name != ".lock"
    }


def disturbed(how: int | str, place: str, argv: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start a command that is disturbed at a place: see `disturbed.py`."""
    tests, project = Path(__file__).parents[1], Path(__file__).parents[2]
    first = [str(tests / "fixtures" / "toy"), str(project), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("disturbed.py")), str(how), place, *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(first)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def leftovers(place: Path) -> list[str]:
    """What is there under a name of something that is being written."""
    return [str(path) for path in place.rglob("*") if is_beside(path) or path.name.endswith(".dropped")]


def copied(world: Path, place: Path) -> Path:
    """A copy of the world, for one case."""
    return Path(shutil.copytree(world, place / "w", symlinks=True))


@contextlib.contextmanager
def modes_count() -> Iterator[None]:
    """Inside the block the modes of files count for root, too: two capabilities are laid down and taken up again."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: twice 32 bits
    libc.capget(head, sets)
    before = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(head, sets):
        pytest.skip("root may not lay down capabilities here")
    try:
        yield
    finally:
        sets[0] = before
        libc.capset(head, sets)
