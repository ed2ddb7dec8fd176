"""A pass on a Ray cluster (`--engine ray`): each shard is a task. All machines share a file system.

A task is `Pass.do` of one shard, in a process that keeps its tokenizer for the next task. So the bytes are those of
one process. Ray runs as many tasks as the machines of the moment have room for, also on those that join later, and
gives the task of a process or machine that died to another one.

Tasks, not Ray Data: its actors start one after the other, it tries a shard that kills its process again without end,
and it has nothing to stream, because a shard is read and written where it is done.
"""

import contextlib
import logging
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqcore.console import ProgressLine
from vqcore.errors import ConfigError, RunError, VqcoreError, cannot_import, cause, first_line
from vqcore.registry import registry
from vqcore.tokens.flow import Done
from vqcore.tokens.sharded import Pass, not_written

log = logging.getLogger(__name__)

RETRIES = 3
"""So often a shard is tried again whose process died."""
_PATIENCE_S = 5
_IN_FLIGHT = 1000
"""Tasks that Ray knows of at once: what a cluster that grows by demand looks at."""


@dataclass(frozen=True)
class Recipe:
    """How a process of the cluster makes the pass: the same there as here."""

    name: str
    make: Callable[[str], Pass]
    device: str
    threads: int
    folder: str
    plugin: str

    def __call__(self) -> Pass:
        """The pass."""
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise RunError(
                f"{self.folder}: {cause(error)} on {os.uname().nodename}. --engine ray needs a file system that all "
                "machines share, with the same paths."
            ) from error
        torch.set_num_threads(self.threads)
        if self.plugin:
            registry().add_file(self.plugin)
        return self.make(self.device)


@dataclass(frozen=True)
class Answer:
    """What a task gives back: a value or an error of the user, and what it said, with the levels of logging."""

    value: Any = None
    error: VqcoreError | OSError | None = None
    said: tuple[tuple[int, str], ...] = ()


def tokenize_by_ray(
    make: Callable[[str], Pass],
    *,
    device: str | None = None,
    readers: int = 1,
    overwrite: bool = False,
    only: Path | None = None,
) -> list[Done]:
    """Do a pass on the cluster of `RAY_ADDRESS`, or that of this machine, or on one that is started for it.

    `make` makes the pass for a device. It is called in each process of the cluster, so it is a function of a module, or
    a partial of one. A task takes a GPU if there are any, unless `device` is cpu, and as many CPUs as this process has
    threads, or as many as `readers` that read files ahead. Returns what became of the files, for each tokenizer. Raises
    `ConfigError` without Ray and without room for a task, `RunError` for a shard whose process died again and again,
    and what `tokenize_all` raises.
    """
    with _cluster() as ray:
        gpus = ray.cluster_resources().get("GPU", 0) >= 1 if device is None else device.startswith("cuda")
        threads = torch.get_num_threads()
        needs = {"CPU": max(threads, readers), "GPU": int(gpus)}
        _check_room(ray, needs)
        recipe = Recipe(
            uuid.uuid4().hex, make, "cuda" if gpus else "cpu", threads, str(Path.cwd()), registry().file
        )
        known = ray.put(recipe)
        task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_retries=RETRIES)(_answer)

        def ask(work: Callable[..., Any], *given: Any) -> Any:
            return task.remote(known, work, *given)

        begun: _Begun = _value(ray, ask(_begin, overwrite, only), "the list of shards", 0)
        with ProgressLine("tokenize", begun.files, unit="file") as line:
            try:
                for told in _shards(ray, ask, begun.todo):
                    for done, more in zip(begun.dones, told):
                        done.add(more)
                    line.update(sum(done.count for done in begun.dones))
            except ConfigError:  # a precision that will not do
                _value(ray, ask(_abandon, begun), "the manifest", 0)
                raise
        _value(ray, ask(_finish, begun), "the manifest", len(begun.todo))
    return begun.dones


def _shards(ray: Any, ask: Callable[..., Any], todo: Sequence[int]) -> Iterator[list[Done]]:
    """What became of the files of each shard, in the order in which shards are ready."""
    waiting: dict[Any, int] = {}
    rest, written = iter(todo), 0
    try:
        while True:
            for number in rest:
                waiting[ask(_shard, number)] = number
                if len(waiting) >= _IN_FLIGHT:
                    break
            if not waiting:
                return
            (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
            yield _value(ray, ready, f"shard {waiting.pop(ready)}", written)
            written += 1
    finally:
        for each in waiting:
            ray.cancel(each, force=True)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=_PATIENCE_S)


def _value(ray: Any, ready: Any, what: str, written: int) -> Any:
    """The value of a task; what it said is said here. Raises its error, and `RunError` if its process died.

    `written` is the number of shards that were finished before it.
    """
    try:
        answer: Answer = ray.get(ready)
    except ray.exceptions.RayTaskError:
        raise  # a bug: the traceback of the process is in it
    except ray.exceptions.RayError as error:
        raise RunError(
            f"--engine ray: {what}: its process died, and {RETRIES} others after it: {first_line(error)}. Shards that "
            "are finished stay; the same command goes on from there."
        ) from error
    for level, line in answer.said:
        log.log(level, "%s", line)
    if isinstance(answer.error, OSError):
        raise not_written(answer.error, written) from answer.error
    if answer.error is not None:
        raise answer.error
    return answer.value


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected for this pass; left as it was found. Raises `ConfigError` without the package."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would ask a server of its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of what changes one day
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--engine ray: {cannot_import(error, 'ray', chr(39) + 'vqcore[ray]' + chr(39))}."
        ) from error
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        if found := re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address):
            socket.create_connection(
                (found[1], int(found[2])), _PATIENCE_S
            ).close()  # Ray would try for minutes
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--engine ray: there is no cluster at RAY_ADDRESS={address or 'auto'} ({cause(error)}). `ray status` "
            "on its first machine shows whether it runs; without RAY_ADDRESS one is started on this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_room(ray: Any, needs: dict[str, int]) -> None:
    """Raise `ConfigError` if no machine has room for a task, which would wait for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(each.get(name, 0) >= count for name, count in needs.items()) for each in machines):
        has = "; ".join(f"{each.get('CPU', 0):g} CPUs, {each.get('GPU', 0):g} GPUs" for each in machines[:4])
        raise ConfigError(
            f"--engine ray: a task takes {needs['CPU']} CPUs and {needs['GPU']} GPUs, and no machine has them ({has}). "
            "OMP_NUM_THREADS and --workers say how many CPUs, --device cpu does without a GPU."
        )


_passes: dict[str, Pass] = {}
"""In a process of the cluster: the pass that it made, by the name of its recipe."""


def _answer(recipe: Recipe, work: Callable[..., Any], *given: Any) -> Answer:
    """Do something with the pass, in a process of the cluster."""
    heard = _Heard()
    logger = logging.getLogger("vqcore")
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    value: Any = None
    wrong: VqcoreError | OSError | None = None
    try:
        if recipe.name not in _passes:
            _passes.clear()
            one = recipe()
            if work is not _begin:
                one.begin()
            _passes[recipe.name] = one
        value = work(_passes[recipe.name], *given)
    except (VqcoreError, OSError) as error:
        wrong = error
    finally:
        logger.removeHandler(heard)
    return Answer(value, wrong, tuple(heard.lines))


@dataclass(frozen=True)
class _Begun:
    """The shards that are to do, and of each store what became of the files of the others and whether it is new."""

    todo: list[int]
    dones: list[Done]
    new: list[bool]
    files: int


def _begin(one: Pass, overwrite: bool, only: Path | None) -> _Begun:
    """Open the stores for the first time."""
    one.begin(overwrite=overwrite, only=only)
    numbers = range(len(one.pieces))
    todo = [number for number in numbers if one.lacks(number)]
    one.skip(number for number in numbers if not one.lacks(number))
    dones, new = [lane.done.taken() for lane in one.lanes], [lane.shards.made for lane in one.lanes]
    return _Begun(todo, dones, new, one.count(numbers))


def _shard(one: Pass, number: int) -> list[Done]:
    """Do a shard, but not for a store that has it: whoever did it died before it could say so."""
    for lane in one.lanes:
        if (note := lane.shards.note(one.names[number])) is not None:
            lane.there[note["name"]] = note
    one.skip([number])
    line = ProgressLine("tokenize", one.count([number]), unit="file")
    line.silent = True
    one.do(number, line)
    return [lane.done.taken() for lane in one.lanes]


def _finish(one: Pass, begun: _Begun) -> None:
    """Complete the stores."""
    for lane, done, new in zip(one.lanes, begun.dones, begun.new):
        lane.done.add(done)
        lane.shards.made = new
    one.finish()


def _abandon(one: Pass, begun: _Begun) -> None:
    """Remove stores that are begun and have no shard."""
    for lane, new in zip(one.lanes, begun.new):
        lane.shards.made = new
    one.abandon()


class _Heard(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append((record.levelno, record.getMessage()))
