"""The system says no, to every verb that writes: one line, status 2, nothing left, what was there stays."""

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from verbs import READERS, VERBS, Verb, contents, copied, leftovers, modes_count

from vqcore.cli import main

Fault = Callable[[Verb], contextlib.AbstractContextManager[None]]


def full(limit: int) -> Fault:
    """A disk on which a file takes `limit` bytes."""

    @contextlib.contextmanager
    def fault(verb: Verb) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return fault


def refusing(number: int, *names: str) -> Fault:
    """A system whose calls `names` fail with an error number."""

    @contextlib.contextmanager
    def fault(verb: Verb) -> Iterator[None]:
        def refuse(*given: object, **more: object) -> None:
            raise OSError(number, os.strerror(number))

        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(os, name, refuse)
            yield

    return fault


@contextlib.contextmanager
def closed(verb: Verb) -> Iterator[None]:
    """A folder in which this user may not write."""
    folder = Path(verb.folder) if Path(verb.folder).is_dir() else Path()
    folder.chmod(0o555)
    try:
        with modes_count():
            yield
    finally:
        folder.chmod(0o755)


@contextlib.contextmanager
def file_for_folder(verb: Verb) -> Iterator[None]:
    """A file where the folder should be."""
    if Path(verb.folder).exists():
        shutil.rmtree(verb.folder)
    Path(verb.folder).write_text("mine")
    yield


@contextlib.contextmanager
def folder_for_file(verb: Verb) -> Iterator[None]:
    """A folder, with something in it, where a file should be."""
    Path(verb.file).unlink(missing_ok=True)
    Path(verb.file, "mine").mkdir(parents=True)
    yield


@contextlib.contextmanager
def vanishing(verb: Verb) -> Iterator[None]:
    """Somebody removes the folder while the verb writes into it."""
    real = os.fsync

    def remove(handle: int) -> None:
        shutil.rmtree(verb.folder, ignore_errors=True)
        for path in Path().glob(".*.incomplete*"):
            shutil.rmtree(path, ignore_errors=True)
        real(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", remove)
        yield


FAULTS: dict[str, Fault] = {
    "no byte": full(0),
    "60 bytes": full(60),
    "no room at the flush": refusing(errno.ENOSPC, "fsync"),
    "a broken disk": refusing(errno.EIO, "fsync"),
    "read-only at the end": refusing(errno.EROFS, "rename", "replace", "link"),
    "closed folder": closed,
    "file for folder": file_for_folder,
    "folder for file": folder_for_file,
    "vanishing folder": vanishing,
}


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    place = copied(world, tmp_path)
    monkeypatch.chdir(place)
    return place


def one_line(said: str) -> str:
    """The line of an error; there is one, and no traceback."""
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said.splitlines()[-1] == lines[0], said
    return lines[0]


QUICK = ("60 bytes", "closed folder")
"""What `make test` tries; the others are alike enough to wait for `make test-slow`."""


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAULTS]
)
@pytest.mark.parametrize("verb", VERBS, ids=str)
def test_the_system_says_no(here, capsys, verb, fault):
    with FAULTS[fault](verb):
        before = contents(here)
        status = main(verb.argv)
        after = contents(here)
    said = capsys.readouterr()
    line = one_line(said.err)
    assert status == 2
    assert verb.folder in line and "incomplete" not in line, line
    assert leftovers(here) == []
    if fault == "vanishing folder":
        before, after = (
            {k: v for k, v in each.items() if k.split("/")[0] != verb.folder} for each in (before, after)
        )
    assert after == before
    if verb.name.startswith("eval") and "for" not in fault:
        assert "eval/" not in said.out and "psnr" in said.out, "what was computed is shown"


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS, ids=str)
def test_the_same_command_goes_on_when_there_is_room(here, capsys, verb):
    with full(60)(verb):
        assert main(verb.argv) == 2
    assert main(verb.argv) == 0
    assert leftovers(here) == []


@pytest.mark.parametrize("argv", READERS, ids=lambda argv: argv[0])
def test_what_writes_nothing_needs_no_room(here, capsys, argv):
    before = contents(here)
    with full(0)(VERBS[0]):
        assert main(argv) == 0
    assert contents(here) == before


@pytest.mark.parametrize(
    "limit", [60, pytest.param(900, marks=pytest.mark.slow)], ids=["metrics", "checkpoint"]
)
def test_a_disk_that_fills_up_during_training_loses_nothing(here, capsys, monkeypatch, limit):
    """Lines of metrics.jsonl fail at 60 bytes, one of them in the middle; tensors and state at 900."""
    from vqcore import trainer

    command, step = VERBS[0].argv, trainer.train_step
    assert main((*command, "run.dir=whole")) == 0
    with full(limit)(VERBS[0]) as _, monkeypatch.context() as patch:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[1], before[1]))

        def filling(run, batches):
            if run.step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            return step(run, batches)

        patch.setattr(trainer, "train_step", filling)
        assert main(command) == 2
    said = capsys.readouterr()
    line = one_line(said.err)
    assert "run.dir=new" in line and "File too large" in line
    assert leftovers(here) == [] and [path.name for path in Path("new/checkpoints").iterdir()] == ["step_2"]
    assert main(command) == 0
    for name in ("model.safetensors", "state.safetensors"):
        path = f"checkpoints/step_4/{name}"
        assert Path("new", path).read_bytes() == Path("whole", path).read_bytes()
