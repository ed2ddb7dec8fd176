"""`--engine ray`: the bytes of one process, whatever becomes of the processes of the cluster."""

import errno
import json
import os
import pickle
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import toys
from toys import toy  # noqa: F401

from vqcore import files
from vqcore.cli import main
from vqcore.errors import ConfigError, DataError, RunError
from vqcore.tokenizer import Tokenizer
from vqcore.tokens import cluster
from vqcore.tokens.inputs import source_of
from vqcore.tokens.sharded import Job, Pass, tokenize_all

pytestmark = pytest.mark.usefixtures("toy")


class RayError(Exception):
    """What Ray raises for a process that died."""


class Fake(types.ModuleType):
    """Ray in this process: all that goes to a task and back is pickled; the last task that was asked is ready first.

    `twice` are tasks that are done, and then done again by another process, as when the first one died in between.
    """

    def __init__(self):
        super().__init__("ray")
        self.machines = [{"CPU": 2.0}]
        self.exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=type("Bug", (RayError,), {}))
        self.twice, self.dead, self.asked, self.order, self.cancelled = (), (), {}, [], []

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {name: sum(each.get(name, 0) for each in self.machines) for name in ("CPU", "GPU")}

    def nodes(self):
        return [{"Alive": True, "Resources": each} for each in self.machines]

    def put(self, value):
        return pickle.dumps(value)

    def remote(self, **needs):
        self.needs = needs

        def taking(function):
            def remote(known, *given):
                number = len(self.asked)
                self.asked[number] = pickle.dumps((function, *given)), known
                return number

            return types.SimpleNamespace(remote=remote)

        return taking

    def get(self, number):
        call, known = self.asked[number]
        if number in self.dead:
            raise RayError("The worker died\nin many words")
        for _ in range(2 if number in self.twice else 1):
            function, *given = pickle.loads(call)
            answer = pickle.dumps(function(pickle.loads(known), *given))
            if number in self.twice:
                cluster._passes.clear()
        return pickle.loads(answer)

    def wait(self, waiting, num_returns, timeout=None):
        self.order.append(waiting[-1])
        return waiting[-1:], waiting[:-1]

    def cancel(self, number, force):
        self.cancelled.append(number)


@pytest.fixture
def ray(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def samples(folder, count):
    folder.mkdir()
    for number in range(count):
        values = np.random.default_rng(number).uniform(-1, 1, (2, 2, 2)).astype(np.float32)
        np.save(folder / f"{number:02}.npy", values.repeat(4, -1).repeat(4, -2))
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def jobs(runs, targets):
    return [
        Job(tokenizer=Tokenizer.load(run), target=target, size=(8, 8), batch_size=2)
        for run, target in zip(runs, targets)
    ]


def made(source, runs, targets, device):
    """A pass, made where it is done."""
    assert device == "cpu"
    there = jobs(runs, targets)
    return Pass(source_of(source, there[0].tokenizer), there, shard_size=3)


@pytest.fixture
def runs(tmp_path):
    return [toys.trained(tmp_path / "run", run__steps=1)] * 2


class TestSameBytes:
    def test_as_one_process_with_two_tokenizers(self, runs, ray, tmp_path, caplog):
        pics = samples(tmp_path / "in", 10)
        (pics / "04.npy").write_bytes(b"junk")
        one, other = ([tmp_path / f"{name}{n}" for n in (0, 1)] for name in ("one", "ray"))
        alone = tokenize_all(pics, jobs(runs, one), shard_size=3)
        caplog.clear()
        done = cluster.tokenize_by_ray(partial(made, pics, runs, other))
        assert [contents(folder) for folder in other] == [contents(folder) for folder in one]
        assert done == alone and done[0].keys == ["04"]
        assert ray.needs == {"num_cpus": 1, "num_gpus": 0, "max_retries": cluster.RETRIES}
        assert ray.order == [4, 3, 2, 1]  # not as they were asked
        here = [each.getMessage() for each in caplog.records if each.name == "vqcore.tokens.cluster"]
        assert len(here) == 2 and all(line.startswith("skipped: ") for line in here)  # a line for each store
        again = cluster.tokenize_by_ray(partial(made, pics, runs, other))
        assert [(each.written, each.skipped, each.keys) for each in again] == [(0, 9, ["04"])] * 2
        (tmp_path / "todo").write_text("04\n")
        samples(tmp_path / "good", 10)
        (tmp_path / "good/04.npy").replace(pics / "04.npy")
        done = cluster.tokenize_by_ray(partial(made, pics, runs, other), only=tmp_path / "todo")
        assert (done[0].written, done[0].skipped, done[0].failed) == (3, 7, [])
        tokenize_all(tmp_path / "in", jobs(runs[:1], [tmp_path / "whole"]), shard_size=3)
        assert contents(other[0]) == contents(tmp_path / "whole")

    def test_a_shard_whose_process_died_after_it_is_not_done_again(self, runs, ray, tmp_path, monkeypatch):
        pics, written = samples(tmp_path / "in", 9), []
        monkeypatch.setattr(Pass, "do", noting(Pass.do, written))
        ray.twice = (2,)
        done = cluster.tokenize_by_ray(partial(made, pics, runs[:1], [tmp_path / "tok"]))
        assert written == [2, 1, 0]
        assert (done[0].written, done[0].skipped) == (6, 3)

    def test_a_shard_that_kills_its_processes_ends_the_pass_in_one_line(self, runs, ray, tmp_path):
        pics = samples(tmp_path / "in", 9)
        make = partial(made, pics, runs[:1], [tmp_path / "tok"])
        ray.dead = (2,)
        with pytest.raises(
            RunError, match=r"shard 1: its process died, and 3 others after it: The worker died\. Sha"
        ):
            cluster.tokenize_by_ray(make)
        assert ray.cancelled == [1]
        ray.dead = ()
        done = cluster.tokenize_by_ray(make)
        assert (done[0].written, done[0].skipped) == (6, 3)
        tokenize_all(pics, jobs(runs[:1], [tmp_path / "whole"]), shard_size=3)
        assert contents(tmp_path / "tok") == contents(tmp_path / "whole")


def noting(do, written):
    """`Pass.do` that notes the shards that it writes."""

    def wrapped(self, number, line):
        before = self.written
        do(self, number, line)
        written.extend([number] * (self.written > before))

    return wrapped


class TestBad:
    def test_a_full_disk(self, runs, ray, tmp_path, monkeypatch):
        pics = samples(tmp_path / "in", 9)
        real = files._flush

        def refuse(path):
            if (tmp_path / "tok/shard-00002.json").exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path)

        monkeypatch.setattr(files, "_flush", refuse)
        with pytest.raises(
            RunError, match=r"shard-00001\.arrow cannot be written: No space.* 1 shards were finished"
        ):
            cluster.tokenize_by_ray(partial(made, pics, runs[:1], [tmp_path / "tok"]))

    def test_nothing_readable_leaves_nothing(self, runs, ray, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a.npy").write_bytes(b"junk")
        with pytest.raises(DataError, match=r"none of the 1 files can be read. The first: .*a.npy"):
            cluster.tokenize_by_ray(partial(made, tmp_path / "in", runs[:1], [tmp_path / "tok"]))
        assert not (tmp_path / "tok").exists()

    def test_a_precision_that_will_not_do_leaves_nothing(self, runs, ray, tmp_path, monkeypatch):
        def refuse(self, number, line):
            raise ConfigError("--precision bf16: no")

        monkeypatch.setattr(Pass, "do", refuse)
        with pytest.raises(ConfigError, match=r"--precision bf16: no"):
            cluster.tokenize_by_ray(partial(made, samples(tmp_path / "in", 9), runs[:1], [tmp_path / "tok"]))
        assert ray.cancelled == [1, 2] and not (tmp_path / "tok").exists()

    def test_no_machine_has_room(self, runs, ray, tmp_path, monkeypatch):
        make = partial(made, tmp_path, runs[:1], [tmp_path / "tok"])
        with pytest.raises(
            ConfigError, match=r"takes 3 CPUs and 0 GPUs, and no machine has them \(2 CPUs, 0 GPUs\)"
        ):
            cluster.tokenize_by_ray(make, readers=3)
        with pytest.raises(ConfigError, match=r"takes 1 CPUs and 1 GPUs"):
            cluster.tokenize_by_ray(make, device="cuda")
        ray.machines = [{"CPU": 2.0}, {"GPU": 1.0}]
        with pytest.raises(ConfigError, match=r"2 CPUs, 0 GPUs; 0 CPUs, 1 GPUs"):
            cluster.tokenize_by_ray(make)

    def test_the_command_line(self, runs, tmp_path, monkeypatch, capsys):
        pics = samples(tmp_path / "in", 2)
        words = ["tokenize", str(runs[0]), str(pics), str(tmp_path / "tok"), "--engine", "ray"]
        monkeypatch.setitem(sys.modules, "ray", None)
        for more, says in (
            ([], "--engine ray: the package 'ray' is not installed; run: pip install 'vqcore[ray]'."),
            (["--store", "folder"], "--engine ray does shards, and --store folder has none"),
            (["--device", "gpu"], "--device"),
        ):
            assert main([*words, *more]) == 2
            assert says in capsys.readouterr().err
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(words) == 2
        assert "--engine ray is for one process, and this is one of 2" in capsys.readouterr().err


KILLING = '''
import os, signal
from pathlib import Path
from vqcore.plugin import Component, Plugin, hookimpl
from vqcore.tokens.arrow import Arrow

class Store(Arrow):
    """Dies once, after a shard is written and before its note is."""

    def write(self, folder, shard, rows, manifest):
        files = super().write(folder, shard, rows, manifest)
        died = Path(__file__).with_name("died")
        if shard == "shard-00002" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return files

@hookimpl
def vqcore_plugin():
    return Plugin(api=1, summary="", components=(Component("store", "killing", "mine:Store", ""),))
'''


@pytest.mark.slow
def test_a_cluster_of_this_machine(runs, tmp_path):
    """Real Ray, by the command line, in a folder of its own: paths are relative, and one process is killed."""
    pytest.importorskip("ray")
    pics = samples(tmp_path / "in", 12)
    (pics / "07.npy").write_bytes(b"junk")
    (tmp_path / "mine.py").write_text(KILLING)
    paths = [str(Path(__file__).parent / "fixtures" / "toy"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def tokenize(target, *more):
        words = ["tokenize", "run", "in", target, "--shard-size", "2", "--batch-size", "2", "--store", "local/killing",
                 "--plugin", "mine.py", *more]  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", "vqcore", *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    (tmp_path / "died").touch()
    assert tokenize("one").returncode == 0
    (tmp_path / "died").unlink()
    done = tokenize("tok", "--engine", "ray")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    assert contents(tmp_path / "tok") == contents(tmp_path / "one")
    assert "11 written, 0 existed already, 1 unreadable" in done.stdout and "skipped: " in done.stderr
    assert json.loads((tmp_path / "tok/tokens.json").read_text())["threads"] == 1
