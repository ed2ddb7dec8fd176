"""Reads the files of a run's folder. Every file may be missing or damaged: a run that was killed has a page, too."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqcore.artefacts.folder import CONFIG, PROVENANCE, read_evaluation
from vqcore.artefacts.resolve import checkpoints, resolve
from vqcore.console import command
from vqcore.errors import CheckpointError, RunError
from vqcore.evaluate import compare as comparison
from vqcore.reading import Each, misfit, parsed, read_json, read_text, read_yaml
from vqcore.run.folder import EVENTS, METRICS

Curve = list[tuple[float, float]]
TIMES = " \N{MULTIPLICATION SIGN} "


@dataclass
class Record:
    """The contents of a run's files. A missing or damaged file gives an empty value and a sentence in `notes`.

    `evaluation` is what `vqcore eval` wrote. `judged` has results with baselines: this, else the one of training.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    judged: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    taken: str = ""
    saved: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last step in any of the files."""
        known = [int(points[-1][0]) for points in self.curves.values()]
        return max([*known, *checkpoints(self.folder), 0])

    @property
    def steps(self) -> int | None:
        """The step at which the run ends, if the config counts in steps (not in epochs)."""
        return self.section("run").get("steps")

    def section(self, *path: str) -> dict[str, Any]:
        """A section of the config by its path; empty if the config has no such section."""
        node: Any = self.config
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        return dict(node) if isinstance(node, Mapping) else {}

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if the metric was never logged."""
        return self.curves[name][-1][1] if self.curves.get(name) else None


def read(folder: Path) -> Record:
    """Read a run's folder. Raises `RunError` if `folder` is not the folder of a run."""
    if not (folder / CONFIG).is_file() or not (folder / "checkpoints").is_dir():
        raise RunError(
            f"{folder} is not a run folder. Give the folder of a run, e.g. vqcore report runs/quickstart."
        )
    record = Record(folder)
    try:
        tree = read_yaml(folder / CONFIG, RunError)
        record.config_text = read_text(folder / CONFIG, RunError)
        record.config = tree if isinstance(tree, dict) else {}
    except RunError as error:
        record.notes.append(str(error))
    record.provenance = _mapping(record, folder / PROVENANCE)
    record.curves = _curves(_lines(record, folder / METRICS))
    record.events = list(_lines(record, folder / EVENTS))
    try:
        record.evaluation = comparison.read(folder)
    except CheckpointError as error:
        if (folder / comparison.FILE).exists():
            record.notes.append(str(error))
    try:
        named = resolve(folder)
        record.checkpoint, record.taken = named.path, named.why
        if record.evaluation.get("checkpoint", record.checkpoint.name) != record.checkpoint.name:
            record.notes.append(
                f"{comparison.FILE} describes {record.evaluation['checkpoint']}, but this page shows "
                f"{record.checkpoint.name}. Measure again: {command('eval', folder)}"
            )
            record.evaluation = {}
        record.saved = _mapping(record, record.checkpoint / PROVENANCE)
        record.judged = record.evaluation or read_evaluation(record.checkpoint)
    except CheckpointError as error:
        record.notes.append(str(error))
    record.notes += [
        f"A damaged checkpoint was renamed to checkpoints/{path.name}."
        for path in sorted((folder / "checkpoints").glob("*.damaged*"))
    ]
    return record


def _mapping(record: Record, path: Path) -> dict[str, Any]:
    try:
        return read_json(path, RunError, Each(None), where=path.name)
    except RunError as error:
        record.notes.append(str(error))
        return {}


def _lines(record: Record, path: Path) -> Iterable[dict[str, Any]]:
    """The complete lines of a file. If the process was killed, the last line may be incomplete."""
    if not path.is_file():
        return
    wrong = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parsed(text)
        except ValueError:
            line = None
        if misfit(line, {"step": int}):
            wrong += 1
        else:
            yield line
    if wrong:
        record.notes.append(
            f"{path.name}: {wrong} damaged {'line is' if wrong == 1 else 'lines are'} left out."
        )


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((float(line["step"]), float(value)))
    return curves


def evaluated(record: Record) -> tuple[list[str], list[dict[str, float]]]:
    """Headings and metrics: what `vqcore eval` measured, else the evaluation of training at the checkpoint's step."""
    if record.evaluation:
        results = record.evaluation["results"]
        heads = [
            f"{TIMES.join(map(str, result['size']))}, {_WEIGHTS[result['weights']]}" for result in results
        ]
        return heads, [dict(result["metrics"]) for result in results]
    tables: dict[str, dict[str, float]] = {}
    saved = record.saved.get("step")
    for name, points in record.curves.items():
        if place := _eval_place(name):
            found = [(step, value) for step, value in points if step == saved] or points
            size = place.removeprefix("eval").lstrip("@").replace("x", TIMES)
            head = f"{size} step {found[-1][0]:,.0f}".strip()
            tables.setdefault(head, {})[name.removeprefix(f"{place}/")] = found[-1][1]
    return list(tables), list(tables.values())


_WEIGHTS = {"ema": "running average", "model": "trained weights"}


def train_names(curves: Mapping[str, Curve]) -> list[str]:
    """The metrics of training, in the order in which they were logged."""
    return [name for name in curves if not _eval_place(name)]


def eval_names(curves: Mapping[str, Curve]) -> list[str]:
    """The metrics of the evaluations, in the order in which they were logged."""
    return list(dict.fromkeys(name.partition("/")[2] for name in curves if _eval_place(name)))


def eval_curves(curves: Mapping[str, Curve], metric: str) -> list[tuple[str, Curve]]:
    """The curves of one metric of the evaluations, by the input size ("" where there was only one size)."""
    return [
        (place.removeprefix("eval").lstrip("@"), points)
        for name, points in curves.items()
        if (place := _eval_place(name)) and name == f"{place}/{metric}"
    ]


def _eval_place(name: str) -> str:
    """`eval` or `eval@SIZE` for a metric of an evaluation, "" for a metric of training."""
    place, found, _ = name.partition("/")
    return place if found and (place == "eval" or place.startswith("eval@")) else ""
