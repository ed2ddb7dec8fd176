"""What a run left in its folder, read without asking anything of it: a run that was killed has a page, too."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vqcore.artefacts.folder import CONFIG, PROVENANCE
from vqcore.artefacts.resolve import checkpoints, resolve
from vqcore.errors import CheckpointError, RunError
from vqcore.evaluate import compare as comparison
from vqcore.run.folder import EVENTS, METRICS

Curve = list[tuple[float, float]]
TIMES = " \N{MULTIPLICATION SIGN} "


@dataclass
class Record:
    """A run's files. Anything that is missing or damaged is empty, and `notes` says so."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    saved: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last step that any file tells of."""
        known = [int(points[-1][0]) for points in self.curves.values()]
        return max([*known, *checkpoints(self.folder), 0])

    @property
    def steps(self) -> int | None:
        """The step at which the run ends, where the config says so in steps."""
        return self.section("run").get("steps")

    def section(self, *path: str) -> dict[str, Any]:
        """A mapping of the config by path; empty where there is none."""
        node: Any = self.config
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        return dict(node) if isinstance(node, Mapping) else {}

    def last(self, name: str) -> float | None:
        """The last value of a figure."""
        return self.curves[name][-1][1] if self.curves.get(name) else None


def read(folder: Path) -> Record:
    """All that a run's folder holds. Raises `RunError` when it is no run's folder."""
    if not (folder / CONFIG).is_file() or not (folder / "checkpoints").is_dir():
        raise RunError(
            f"{folder} is no run folder; a report is about a run, e.g. vqcore report runs/quickstart."
        )
    record = Record(folder)
    record.config_text = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    try:
        tree = yaml.safe_load(record.config_text)
        record.config = tree if isinstance(tree, dict) else {}
    except yaml.YAMLError as error:
        record.notes.append(f"{CONFIG} cannot be read: {error}")
    record.provenance = _mapping(record, folder / PROVENANCE)
    record.curves = _curves(_lines(record, folder / METRICS))
    record.events = list(_lines(record, folder / EVENTS))
    try:
        record.evaluation = comparison.read(folder)
    except CheckpointError as error:
        if (folder / comparison.FILE).exists():
            record.notes.append(str(error))
    try:
        record.checkpoint = resolve(folder)
        if record.evaluation.get("checkpoint", record.checkpoint.name) != record.checkpoint.name:
            record.notes.append(
                f"{comparison.FILE} is about {record.evaluation['checkpoint']}, not about {record.checkpoint.name}, "
                f"which this page shows. Measure again: vqcore eval {folder}"
            )
            record.evaluation = {}
        record.saved = _mapping(record, record.checkpoint / PROVENANCE)
    except CheckpointError as error:
        record.notes.append(str(error))
    record.notes += [
        f"checkpoints/{path.name} was damaged and set aside."
        for path in sorted((folder / "checkpoints").glob("*.damaged*"))
    ]
    return record


def _mapping(record: Record, path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return read if isinstance(read, dict) else {}
    except (OSError, ValueError) as error:
        record.notes.append(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}.")
        return {}


def _lines(record: Record, path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a file that grows; a process that was killed may have cut off the last one."""
    if not path.is_file():
        return
    wrong = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, KeyError, TypeError):
            wrong += 1
            continue
        yield line
    if wrong:
        record.notes.append(f"{path.name}: {wrong} damaged {'line' if wrong == 1 else 'lines'} left out.")


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((float(line["step"]), float(value)))
    return curves


def evaluated(record: Record) -> tuple[list[str], list[dict[str, float]]]:
    """Headings and figures of the evaluation: what `vqcore eval` wrote, else that of training at the checkpoint."""
    if record.evaluation:
        results = record.evaluation["results"]
        heads = [
            f"{TIMES.join(map(str, result['size']))}, {_WEIGHTS[result['weights']]}" for result in results
        ]
        return heads, [dict(result["metrics"]) for result in results]
    tables: dict[str, dict[str, float]] = {}
    saved = record.saved.get("step")
    for name, points in record.curves.items():
        place, _, figure = name.partition("/")
        if place == "eval" or place.startswith("eval@"):
            found = [(step, value) for step, value in points if step == saved] or points
            head = f"{place.removeprefix('eval').lstrip('@').replace('x', TIMES)} step {found[-1][0]:,.0f}".strip()
            tables.setdefault(head, {})[figure] = found[-1][1]
    return list(tables), list(tables.values())


_WEIGHTS = {"ema": "running average", "model": "trained weights"}


def train_names(curves: Mapping[str, Curve]) -> list[str]:
    """Figures of training in the order in which they were logged."""
    return [name for name in curves if not name.startswith(("eval/", "eval@"))]


def eval_curves(curves: Mapping[str, Curve], name: str) -> Sequence[tuple[str, Curve]]:
    """An evaluated figure by the size it was measured at ("" when there was only one)."""
    found = []
    for full, points in curves.items():
        place, _, figure = full.partition("/")
        if figure == name and (place == "eval" or place.startswith("eval@")):
            found.append((place.removeprefix("eval").lstrip("@"), points))
    return found
