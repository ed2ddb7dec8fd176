"""Resuming a run whose samples lie elsewhere now: only with the same samples, and equal to the bit."""

import itertools
import json
import shutil

import numpy as np
import pytest
from toys import run_config, toy  # noqa: F401

from vqcore import dist
from vqcore.check.overlap import copies, overlap
from vqcore.data.identity import CHOSEN, difference, identity
from vqcore.errors import RunError
from vqcore.evaluate.compare import set_sha256
from vqcore.protocols import Window
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


def pictures(folder, count=6, start=0):
    """Small arrays as files, which the toy modality reads."""
    folder.mkdir(parents=True)
    for index in range(start, start + count):
        array = np.random.default_rng(index).uniform(-1, 1, (3, 8, 8)).astype(np.float32)
        np.save(folder / f"p{index}.npy", array)
    return folder


def config(run, path, steps, **changes):
    data = {
        "name": "folder",
        "path": str(path),
        "modality": {"name": "array", "channels": 3, "range": [-1, 1], "size": 8},
        "batch_size": 4,
        "workers": 0,
    }
    return run_config(run, data=data, eval={"every": None}, run__steps=steps, optim__horizon=4, **changes)


def weights(run):
    return (run / "checkpoints/step_4/model.safetensors").read_bytes()


def test_a_run_goes_on_where_the_same_samples_lie_elsewhere(tmp_path, capsys):
    train(config(tmp_path / "whole", pictures(tmp_path / "job1"), 4))
    train(config(tmp_path / "run", tmp_path / "job1", 2))
    (tmp_path / "job1").rename(tmp_path / "job2")
    train(config(tmp_path / "run", tmp_path / "job2", 4))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert "the samples lie elsewhere now and are the same (data.path)" in capsys.readouterr().out
    assert str(tmp_path / "job2") in (tmp_path / "run/config.yaml").read_text()


def add(folder):
    pictures(folder / "more", 1, 9)


def remove(folder):
    (folder / "p3.npy").unlink()


def rename(folder):
    (folder / "p3.npy").rename(folder / "p33.npy")


def lengthen(folder):
    np.save(folder / "p3.npy", np.zeros((3, 9, 9), np.float32))


def change(folder):
    np.save(folder / "p3.npy", np.zeros((3, 8, 8), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, said",
    [
        (add, "6 samples there, 7 here"),
        (remove, "6 samples there, 5 here"),
        (rename, "samples have other names or sizes"),
        (lengthen, "samples have other names or sizes"),
        (change, r"the files have other contents \(6 samples were compared\)"),
    ],
)
def test_other_samples_are_refused_and_nothing_is_changed(tmp_path, fault, said):
    train(config(tmp_path / "run", pictures(tmp_path / "job1"), 2))
    before = (tmp_path / "run/config.yaml").read_text()
    shutil.copytree(tmp_path / "job1", tmp_path / "job2")
    fault(tmp_path / "job2")
    with pytest.raises(RunError, match=f"other samples than those of data.path: {said}"):
        train(config(tmp_path / "run", tmp_path / "job2", 4))
    assert (tmp_path / "run/config.yaml").read_text() == before
    train(config(tmp_path / "run", tmp_path / "job1", 4))


def test_a_set_that_grew_in_its_place_is_said(tmp_path, caplog):
    train(config(tmp_path / "run", pictures(tmp_path / "job1"), 2))
    add(tmp_path / "job1")
    train(config(tmp_path / "run", tmp_path / "job1", 4))
    assert "there were 6 samples when the run began, and there are 7 now" in caplog.text


def test_another_number_of_threads_is_said(tmp_path, caplog, monkeypatch):
    import torch

    train(config(tmp_path / "run", pictures(tmp_path / "job1"), 2))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    train(config(tmp_path / "run", tmp_path / "job1", 4))
    assert f"was saved with {threads} threads and goes on with {threads + 1}" in caplog.text
    assert dist.world_size() == 1


class Few:
    """Samples of every kind that a source may give: files, windows of files, arrays, something else."""

    def __init__(self, given):
        self.given = given

    def __len__(self):
        return len(self.given)

    def key(self, index):
        return f"{index:04d}"

    def get(self, index, label=""):
        return self.given[index]


def test_identity_is_of_the_samples_alone(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(path.name.encode() * 9)
    window = Window(paths[1], (0,), (4,))
    given = [paths[0], window, np.arange(5), {"anything": 1}]
    assert identity(Few(given), []) == identity(Few(list(given)), [])
    assert difference(identity(Few(given), []), identity(Few(given[::-1]), []))
    changed = [*given[:2], np.arange(5) + 1, given[3]]
    assert difference(identity(Few(given), []), identity(Few(changed), [])).startswith("the files have other")


def test_what_is_masked_belongs_to_a_sample():
    numbers = np.arange(6.0).reshape(2, 3)
    plain, one, other = numbers, *(np.ma.masked_equal(numbers, number) for number in (1, 2))
    same = np.ma.MaskedArray(
        np.where(one.mask, 9, numbers), one.mask
    )  # what stands below a mask does not count
    contents = [identity(Few([each]), []) for each in (plain, one, other, same)]
    assert contents[1] == contents[3]
    assert all(difference(a, b) for a, b in itertools.combinations(contents[:3], 2))
    for given, copied in (
        ([plain, one, other], ""),
        ([plain, one, other, same], "0003 has the content of 0001"),
    ):
        found = [finding.what for finding in copies(Few(given), "data.path")]
        assert [what.endswith(copied) for what in found] == [True] * bool(copied)
    assert not [*overlap(Few([plain, one]), Few([other]), "data.eval_path")]
    assert [*overlap(Few([plain, one]), Few([same]), "data.eval_path")]
    sets = [set_sha256(Few([each]), (), None) for each in (plain, one, other, same)]
    assert sets[1] == sets[3] and len(set(sets)) == 3


def test_only_some_contents_are_read(tmp_path):
    read = []

    class Counted(Few):
        def get(self, index, label=""):
            read.append(index)
            return np.full(3, index)

    identity(Counted(range(1000)), [])
    assert len(read) == 1000 + CHOSEN
    assert json.dumps(identity(Few([np.arange(3)]), []))
