"""Seeded mutations of saved files: every verb ends with a right result or one clear line. No hang, nothing executed."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from toys import run_tree, toy  # noqa: F401

from vqcore.artefacts.folder import seal, sha256
from vqcore.cli import main
from vqcore.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("toy")
SECONDS = 60
"""A command on files of a few kilobytes that takes longer hangs."""
INPUT = torch.linspace(-1, 1, 2 * 8 * 8).reshape(1, 2, 8, 8)
NONSENSE: tuple[Any, ...] = (
    None,
    [],
    {},
    "",
    -1,
    True,
    0.5,
    10**400,
    float("nan"),
    float("inf"),
    "../../etc/passwd",
    "\x1b[2Jevil\u202e",
    [[1], {"a": []}],
    {"name": ["x"]},
)


# Mutations: each changes one file in place


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    for _ in range(rng.choice((1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_in_head(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[rng.randrange(min(128, len(content)))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def insert(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    path.write_bytes(content[:at] + rng.randbytes(rng.choice((1, 16, 4096))) + content[at:])


def zeros(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    at = rng.randrange(len(content))
    content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)


def twice(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() * 2)


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def gone(path: Path, rng: random.Random) -> None:
    path.unlink()


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def endless_link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def device(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def value(path: Path, rng: random.Random) -> None:
    """Another value, a key less or a key more somewhere in JSON or YAML."""
    is_yaml = path.suffix == ".yaml"
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    tree = [yaml.safe_load(one) if is_yaml else json.loads(one) for one in lines]
    node: Any = tree
    key: Any = rng.randrange(len(tree))
    while isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    kind = rng.randrange(5)
    if kind == 0 and node is not tree:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node["unknown"] = rng.choice(NONSENSE)
    else:
        node[key] = rng.choice(NONSENSE)
    path.write_text("\n".join(yaml.dump(one) if is_yaml else json.dumps(one) for one in tree) + "\n")


def deep(path: Path, rng: random.Random) -> None:
    depth = rng.choice((70, 900, 100_000))
    path.write_text("[" * depth + "]" * depth if rng.random() < 0.5 else '{"a": ' * depth + "1" + "}" * depth)


def hostile_yaml(path: Path, rng: random.Random) -> None:
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    marker = path.parent / "executed"
    path.write_text(
        rng.choice(
            (
                f"a0: &a0 1\n{bomb}",
                f"x: !!python/object/apply:os.mkdir ['{marker}']\n{path.read_text()}",
                path.read_text() + "more: ${oc.env:HOME}\n",
                path.read_text()
                + "".join(f"b{n}: ${{b{n + 1}}}${{b{n + 1}}}\n" for n in range(60))
                + "b60: x\n",
                f"x: &x {{y: *x}}\n{path.read_text()}",
                f"x: {'9' * 900_000}\n",
                f"x: {'1:' * 400_000}1\n",
                f"x: 2020-13-45\n{path.read_text()}",
                "? [a]\n: b\n",
                "- a\n",
                "%YAML 9.9\n---\n",
            )
        )
    )


def header(path: Path, rng: random.Random) -> None:
    """Another shape or type in the header of a `.npy` file; the length of the header is kept."""
    content = path.read_bytes()
    size = struct.unpack("<H", content[8:10])[0]
    shape = rng.choice(
        ("(0,)", "(-1,)", "(9999999999999,)", "(3, 3, 3, 3)", "(2, 1e3)", "()", "(True, 2)", "x")
    )
    descr = rng.choice(("'|O'", "'<f8'", "'|V8'", "'<U9'", "'|u1'", "[('a', '<f4')]", "None"))
    text = f"{{'descr': {descr}, 'fortran_order': {rng.choice((True, False))}, 'shape': {shape}, }}"
    path.write_bytes(content[:10] + text.encode()[: size - 1].ljust(size - 1) + b"\n" + content[10 + size :])


def tensors(path: Path, rng: random.Random) -> None:
    """Another header of a safetensors file, or numbers that are not finite."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    head, body = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    name = rng.choice([key for key in head if key != "__metadata__"])
    kind = rng.randrange(7)
    if kind == 0:
        head[name]["shape"] = rng.choice(([0], [2**40], [-1], [[1]], "x", [1] * 70))
    elif kind == 1:
        head[name]["data_offsets"] = rng.choice(([0, 2**50], [8, 0], [], [0, 1]))
    elif kind == 2:
        head[name]["dtype"] = rng.choice(("F64", "I64", "BOOL", "F8_E4M3", "F4", "X"))
    elif kind == 3:
        head["more" if rng.random() < 0.5 else f"x{name}"] = head.pop(name)
    elif kind == 4:
        start, _ = head[name]["data_offsets"]
        body[start : start + 4] = struct.pack("<f", rng.choice((float("inf"), float("nan"))))
    elif kind == 5:
        head = {}
        body = bytearray()
    text = json.dumps(head).encode()
    length = rng.choice((2**63, 2**30, 0, len(text) + 1)) if kind == 6 else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + bytes(body))


def archive(path: Path, rng: random.Random) -> None:
    """An archive with a member that is no array, a bomb, or the same member twice."""
    kind = rng.randrange(3)
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        if kind == 0:
            made.writestr("images.npy", b"no array" * 9)
        elif kind == 1:
            text = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                text, {"descr": "<f8", "fortran_order": False, "shape": (2 ** rng.choice((24, 60)),)}
            )
            made.writestr("images.npy", text.getvalue() + bytes(1 << 20))
        else:
            made.writestr("../images", b"")


ANY = (cut, flip, flip_in_head, insert, zeros, twice, empty, gone, folder, pipe, endless_link, device)
BY_SUFFIX: dict[str, tuple[Callable[[Path, random.Random], None], ...]] = {
    ".json": (value, value, value, value, deep, cut, flip),
    ".jsonl": (value, value, value, deep, cut),
    ".yaml": (value, value, value, hostile_yaml, hostile_yaml, deep, cut),
    ".npy": (header, header, header),
    ".npz": (archive, archive),
    ".arrow": (cut, flip),
    ".parquet": (cut, flip),
    ".safetensors": (tensors, tensors, tensors, tensors),
    ".png": (cut, flip),
    ".md": (cut, deep),
}


# What is mutated, and the commands that read it

FILES = {
    "artefact": ("model.safetensors", "config.yaml", "provenance.json", "README.md"),
    "run": (
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "events.jsonl",
        "eval.json",
        "samples/step_6.png",
        "samples/strip.png",
        *(
            f"checkpoints/step_6/{name}"
            for name in (
                "model.safetensors",
                "ema.safetensors",
                "config.yaml",
                "provenance.json",
                "state.json",
                "state.safetensors",
                "eval.json",
            )
        ),
    ),
    "tokens": ("tokens.json", "a.npy", "b.npy"),
    "shards": ("tokens.json", "shard-00000.arrow", "shard-00000.arrow"),
    "tables": ("tokens.json", "shard-00000.parquet"),
    "in": ("a.npy", "set.npz"),
}
QUICK = 3
"""How many of the commands below are quick: they come first."""
VERBS = {
    "artefact": (
        "tokenize artefact in out",
        "export artefact out",
        "decode artefact tokens out",
        "eval artefact data.name=toy/waves --json report.json",
        "train start.yaml model.full_ckpt=artefact",
    ),
    "run": (
        "train run.yaml",
        "tokenize run in out",
        "export run out",
        "train run.yaml run.steps=7",
        "eval run",
        "report run",
    ),
    "tokens": (
        "decode artefact tokens out",
        "decode artefact tokens/a.npy out",
        "tokenize artefact in tokens --store folder",
    ),
    "shards": (
        "decode artefact shards out",
        "tokens verify shards",
        "tokens convert shards out --store folder",
        "tokenize artefact in shards",
        "tokens stats shards",
    ),
    "tables": ("decode artefact tables out", "tokens convert tables out", "tokens verify tables"),
    "in": ("tokenize artefact in out", "check array.yaml"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run, an artefact, inputs and their tokens."""
    place = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "fixtures" / "toy"))
        from vqcore.registry import registry

        registry.cache_clear()
        patch.chdir(place)
        tree = run_tree("run", ema__decay=0.9, run__keep=2)
        Path("run.yaml").write_text(yaml.dump(tree))
        Path("start.yaml").write_text(yaml.dump({**tree, "run": {"dir": "new", "steps": 1}}))
        tree["data"] |= {"name": "array", "path": "in/set.npz", "eval_path": None, "key": "images"}
        Path("array.yaml").write_text(yaml.dump(tree))
        Path("in").mkdir()
        for name in "ab":
            np.save(f"in/{name}.npy", np.random.default_rng(0).random((2, 8, 8), np.float32))
        with _quiet():
            assert main(["train", "run.yaml"]) == main(["eval", "run"]) == 0
            assert main(["export", "run", "artefact"]) == 0
            for folder, store in (("tokens", "folder"), ("shards", "arrow"), ("tables", "parquet")):
                assert main(["tokenize", "artefact", "in", folder, "--store", store]) == 0
        Path("run/events.jsonl").write_text('{"step": 2, "event": "skipped", "time": "2026-01-01"}\n')
        np.savez("in/set.npz", images=np.zeros((8, 2, 8, 8), np.float32))
        yield place
        registry.cache_clear()


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _reseal(path: Path) -> None:
    """Make checksums and seal anew, as somebody would who wants a changed file to be read."""
    made = path.parent / "provenance.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = json.loads(made.read_text()) if made.stat().st_size < 1 << 20 and made.is_file() else {}
        for name in found["files"]:
            if (path.parent / name).is_file():
                found["files"][name] = sha256(path.parent / name)
        made.write_text(json.dumps(found | {"seal": seal(found)}))


def _try(saved: Path, place: Path, number: int, verbs: int) -> list[str]:
    """Mutate one file, run some commands on it (one: a quick one), and return what they ended with."""
    rng = random.Random(number)
    what = rng.choices(list(FILES), weights=(4, 8, 2, 3, 2, 2))[0]
    name = rng.choice(FILES[what])
    mutation = rng.choice((*ANY, *BY_SUFFIX[Path(name).suffix] * 3))
    ends = []
    commands = VERBS[what][:QUICK] if verbs == 1 else VERBS[what]
    for command in rng.sample(commands, min(verbs, len(commands))):
        here = place / f"{number}-{len(ends)}"
        shutil.copytree(saved, here, symlinks=True)
        os.chdir(here)
        path = here / what / name
        mutation(path, random.Random(number))
        resealed = (
            rng.random() < 0.5 and not path.is_symlink() and path.is_file() and path.name != "README.md"
        )
        if resealed:
            _reseal(path)
        told = f"case {number}: {mutation.__name__} of {what}/{name}{', resealed' if resealed else ''}: {command}"
        with _quiet() as said, _in_time():
            status = main(command.split())
        text = said.getvalue()
        assert status in (0, 2), f"{told}\n{text}"
        assert "Traceback" not in text and "\x1b" not in text, f"{told}\n{text}"
        if status == 2:
            errors = [line for line in text.splitlines() if line.startswith(("error", "error:"))]
            assert errors, f"{told}: no line says what is wrong\n{text}"
        assert not list(here.rglob("executed")), told
        assert not [path for path in here.rglob("*incomplete*")], f"{told}: half a file is left\n{text}"
        if what == "artefact" and status == 0 and command.startswith("tokenize"):
            codes = Tokenizer.load("artefact").encode(INPUT)
            assert torch.equal(codes, Tokenizer.load(saved / "artefact").encode(INPUT)), told
        ends.append("refused" if status else "right")
        os.chdir(place)
        shutil.rmtree(here)
    return ends


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_mutated_files_short(saved: Path, place: Path) -> None:
    for number in range(20):
        _try(saved, place, number, verbs=1)


@pytest.mark.slow
def test_mutated_files_long(saved: Path, place: Path) -> None:
    ends: Counter[str] = Counter()
    for number in range(1000, 1200):
        ends.update(_try(saved, place, number, verbs=6))
    print(dict(ends))
    assert ends["right"] > 50 and ends["refused"] > 50
