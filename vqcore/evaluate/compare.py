"""The record of how metrics were measured, and the comparison of two evaluations.

The record holds everything that changes a metric besides the tokenizer: the samples (by content), the sizes, the
settings of the modalities and the weights that these borrow, the metrics' settings and facts, how many samples were
decoded and how, and the precision. Versions are recorded too. Other versions should not change a metric, so they only
cause a warning.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqcore import __version__, dist
from vqcore.artefacts.folder import BASELINES, KMEANS
from vqcore.config import Config, deciding
from vqcore.data.identity import content_of
from vqcore.errors import CheckpointError, DataError, VqcoreError
from vqcore.evaluate.measure import decode_count, metric_configs, sampling_options
from vqcore.evaluate.perturb import NAME
from vqcore.files import local
from vqcore.protocols import Data, Metric, better, expect, facts
from vqcore.reading import REAL, Each, read_json
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

FILE = "eval.json"
SAME = 1e-6
"""Metrics with a smaller relative difference are equal: another order of the sums can cause such a difference."""
_CHUNK = 1 << 20
_REPORT = {
    "checkpoint?": (str, type(None)),
    "protocol": {"set": {"sha256": str}},
    "environment": {"versions?": Each(str)},
    "better?": Each(str),
    "results": [{"weights": str, "size": [int], "fingerprint?": str, "metrics": Each(REAL), **BASELINES}],
    "kmeans?": KMEANS,
}
"""The shape of what `vqcore eval` writes."""


def keys_sha256(data: Data, total: int) -> str:
    """SHA-256 of the keys of the samples that an evaluation measures, without their contents."""
    digest = hashlib.sha256()
    for place in range(total):
        digest.update(data.key(place * len(data) // total).encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def set_sha256(data: Data, labels: Iterable[str], limit: int | None) -> str:
    """SHA-256 of the samples that an evaluation measures: of their keys and contents, in any order.

    Every sample has its own digest, over its key, its content and its extra modalities. The digest of the set is the
    digest of the sum of all these. So every process reads only its share, the memory does not grow with the set, and a
    folder and a tar of the same files have the same digest. All processes call this function together.
    """
    labels = ("", *labels)
    total = len(data) if limit is None else min(limit, len(data))
    columns = np.zeros(32, dtype=np.int64)
    mine = [place * len(data) // total for place in range(dist.rank(), total, dist.world_size())]
    expect(data, mine)
    for index in mine:
        columns += np.frombuffer(_sample_digest(data, index, labels), dtype=np.uint8)
    summed = dist.sum_(torch.from_numpy(columns)).tolist()
    number = sum(value << (8 * place) for place, value in enumerate(summed)) % (1 << 256)
    return hashlib.sha256(f"{total}:{number}".encode()).hexdigest()


def _sample_digest(data: Data, index: int, labels: tuple[str, ...]) -> bytes:
    digest = hashlib.sha256(data.key(index).encode(errors="surrogateescape"))
    for label in labels:
        digest.update(f"\0{label}\0".encode())
        try:
            digest.update(_content(data.get(index, label)))
        except (DataError, OSError) as error:
            digest.update(type(error).__name__.encode())
    return digest.digest()


@functools.lru_cache(maxsize=16)
def _file_sha256(path: Path, mtime_ns: int, size: int) -> bytes:
    """SHA-256 of a file. Windows of one file follow each other, so the last digests are kept."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _content(source: Any) -> bytes:
    """SHA-256 of what a data source gives to a modality; a file and its bytes in memory have the same SHA-256."""
    digest = hashlib.sha256()
    if isinstance(source, Path):
        state = source.stat()
        return _file_sha256(source, state.st_mtime_ns, state.st_size)
    if hasattr(source, "read"):
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    elif dataclasses.is_dataclass(source) and not isinstance(source, type):
        digest.update(_content({f.name: getattr(source, f.name) for f in dataclasses.fields(source)}))
    elif isinstance(source, Mapping):
        for key in sorted(source):
            digest.update(str(key).encode(errors="surrogateescape") + _content(source[key]))
    elif isinstance(source, (list, tuple)):
        for part in source:
            digest.update(_content(part))
    elif isinstance(source, (bytes, bytearray, memoryview)):
        digest.update(source)
    elif isinstance(source, Image.Image):
        digest.update(f"{source.mode}{source.size}".encode() + source.tobytes())
    elif isinstance(source, (str, int, float, type(None))):
        digest.update(str(source).encode(errors="surrogateescape"))
    else:
        digest.update(
            content_of(np.asanyarray(source.detach().cpu() if isinstance(source, Tensor) else source))
        )
    return digest.digest()


def protocol(
    config: RunConfig,
    tokenizer: Tokenizer,
    metrics: Mapping[str, Metric],
    *,
    loans: Mapping[str, Mapping[str, Any]],
    set_hash: str,
    total: int,
    count: int,
    sizes: Iterable[tuple[int, ...]],
) -> dict[str, Any]:
    """Everything that must be equal in two evaluations whose metrics are compared, as plain data.

    `total` is the number of samples that were asked for, `count` the number that could be read. The metrics were set
    up. Of the `loans`, those of the modalities decide what a sample is.
    """
    settings = metric_configs(config.eval.metrics, tokenizer)
    measured = {label: _settings(cfg, "metric") for label, cfg in settings.items()}
    for label, metric in metrics.items():
        if found := facts(metric):
            measured[label]["facts"] = dict(found)
    return {
        "set": {"sha256": set_hash, "count": count},
        "sizes": [list(size) for size in sizes],
        "decode_samples": decode_count(config, tokenizer, total),
        "sampling": sampling_options(config, tokenizer),
        "perturb": config.eval.perturb,
        "precision": tokenizer.precision,
        "modality": _settings(config.data.modality, "modality"),
        "extra": {label: _settings(cfg, "modality") for label, cfg in config.data.extra.items()},
        "borrowed": {
            key: loan["sha256"] for key, loan in loans.items() if key.startswith(("modality.", "extra."))
        },
        "metrics": measured,
    }


def _settings(cfg: Config, kind: str) -> dict[str, Any]:
    return deciding(cfg, kind, registry().identity)


def environment(
    components: Mapping[str, tuple[str, str]], *, seed: int, device: torch.device
) -> dict[str, Any]:
    """What should not change a metric but may: versions, device, seed. `components` are (kind, name) by place."""
    versions = {"vqcore": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {name: importlib.metadata.version(name) for name in ("numpy", "pillow")}
    for kind, name in components.values():
        try:
            origin = registry().find(kind, name).origin
        except VqcoreError:  # the caller built it with another registry
            continue
        versions[origin.distribution] = origin.version
    return {"versions": versions, "device": device.type, "seed": seed}


def directions(metrics: Mapping[str, Metric], names: Iterable[str]) -> dict[str, str]:
    """Which values are better, "higher" or "lower", for those of the `names` of an evaluation where this is known."""
    names = list(names)
    known = {f"metric/{label}": way for label, metric in metrics.items() if (way := better(metric))}
    losses = {name: "lower" for name in names if name in ("loss", "error") or name.startswith("loss/")}
    both = {**losses, **known}
    return both | {again: way for name, way in both.items() if (again := f"{NAME}/{name}") in names}


def is_written(name: str) -> bool:
    """Whether the metrics of `name` are read from a file: `name` is this file, or a run, whose folder holds it."""
    path = local(name)
    return path.is_file() or (path / FILE).is_file() or (path / "checkpoints").is_dir()


def read(run: str | Path) -> dict[str, Any]:
    """What `vqcore eval` wrote for a run. `run` is the run's folder or the file."""
    folder = local(run)
    path = folder / FILE if folder.is_dir() else folder
    if not path.exists():
        raise CheckpointError(f"{path}: no such file. Measure the run first: vqcore eval {run}")
    try:
        report: dict[str, Any] = read_json(path, CheckpointError, _REPORT)
        if report["results"]:
            return report
    except CheckpointError:
        pass
    raise CheckpointError(
        f"{path}: this version of vqcore eval did not write this file. Measure again: vqcore eval {run}"
    )


def refuse_unequal(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Raise `CheckpointError` if two evaluations were measured differently; the text names every difference."""
    ours, theirs = _leaves(a["protocol"]), _leaves(b["protocol"])
    differ = [
        f"{key} ({_short(ours.get(key))} / {_short(theirs.get(key))})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differ:
        raise CheckpointError(
            f"{names[0]} and {names[1]} were not measured alike: {', '.join(differ)}. "
            "Evaluate both with the same settings, e.g. the same data.eval_path and eval.sizes."
        )


def warnings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Differences of versions, device and seed, as lines."""
    ours, theirs = _leaves(a["environment"]), _leaves(b["environment"])
    return [
        f"measured with another {key}: {ours.get(key, 'none')} / {theirs.get(key, 'none')}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested data by dotted path."""
    if not isinstance(tree, Mapping) or not tree:
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{path}.{key}".lstrip("."))
    return leaves


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:8]}…"


@dataclass(frozen=True)
class Row:
    """One metric of two evaluations. `better` is "a", "b", "=", or "" where no value is better."""

    name: str
    a: float
    b: float
    better: str


def rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The metrics that both evaluations have, side by side; one table for each size and kind of weights, by title."""
    better = {**b.get("better", {}), **a.get("better", {})}
    tables = {}
    for ours, theirs in _pairs(a["results"], b["results"]):
        weights = " / ".join(dict.fromkeys((ours["weights"], theirs["weights"])))
        title = f"{' x '.join(map(str, ours['size']))}, {weights} weights"
        both = [name for name in ours["metrics"] if name in theirs["metrics"]]
        tables[title] = [
            Row(name, x, y, _judge(x, y, better.get(name)))
            for name in both
            for x, y in [(ours["metrics"][name], theirs["metrics"][name])]
        ]
    return tables


def _pairs(ours: list[dict], theirs: list[dict]) -> list[tuple[dict, dict]]:
    """Pairs of results of the same size: with the same weights where both have them, else with the default weights."""
    pairs = []
    for size in dict.fromkeys(tuple(result["size"]) for result in ours):
        left = {result["weights"]: result for result in ours if tuple(result["size"]) == size}
        right = {result["weights"]: result for result in theirs if tuple(result["size"]) == size}
        common = [name for name in left if name in right]
        if common:
            pairs += [(left[name], right[name]) for name in common]
        elif right:
            pairs.append(
                (left.get("ema") or next(iter(left.values())), right.get("ema") or next(iter(right.values())))
            )
    return pairs


def _judge(a: float, b: float, better: str | None) -> str:
    if better is None or math.isnan(a + b):
        return ""
    if math.isclose(a, b, rel_tol=SAME):
        return "="
    return "a" if (a > b) == (better == "higher") else "b"
