"""How figures were measured, written beside them, and when two evaluations may be compared.

The record holds everything that changes a figure besides the tokenizer itself: the samples (by content), the sizes, how
a sample becomes a tensor, the metrics. Versions are written down too; they should not matter, so they only warn.
"""

import dataclasses
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
from vqcore.config import Config, deciding
from vqcore.errors import CheckpointError, DataError, VqcoreError
from vqcore.protocols import Data, Metric
from vqcore.registry import registry

FILE = "eval.json"
SAME = 1e-6
"""Figures that differ by less, relatively, are equal: another order of the sums does as much."""
_CHUNK = 1 << 20


def set_sha256(data: Data, labels: Iterable[str], limit: int | None) -> str:
    """SHA-256 of the samples that an evaluation measures: their keys and contents, whatever their order.

    Every sample has its own digest, over its key and all that rides along; the set's is that of their sum. So every
    process reads its share once, nothing as long as the set is kept, and a folder and a tar of the same files agree.
    All processes call it together.
    """
    labels = ("", *labels)
    total = len(data) if limit is None else min(limit, len(data))
    columns = np.zeros(32, dtype=np.int64)
    for place in range(dist.rank(), total, dist.world_size()):
        columns += np.frombuffer(_sample_digest(data, place * len(data) // total, labels), dtype=np.uint8)
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


def _content(source: Any) -> bytes:
    """SHA-256 of what a source hands to a modality; a file and its bytes in memory have the same."""
    digest = hashlib.sha256()
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    if hasattr(source, "read"):
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    elif dataclasses.is_dataclass(source) and not isinstance(source, type):
        digest.update(_content({f.name: getattr(source, f.name) for f in dataclasses.fields(source)}))
    elif isinstance(source, Mapping):
        for key in sorted(source):
            digest.update(str(key).encode() + _content(source[key]))
    elif isinstance(source, (list, tuple)):
        for part in source:
            digest.update(_content(part))
    elif isinstance(source, (bytes, bytearray, memoryview)):
        digest.update(source)
    elif isinstance(source, Image.Image):
        digest.update(f"{source.mode}{source.size}".encode() + source.tobytes())
    elif isinstance(source, (str, int, float, type(None))):
        digest.update(str(source).encode())
    else:
        array = np.asarray(source.detach().cpu() if isinstance(source, Tensor) else source)
        digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


def protocol(
    *,
    set_hash: str,
    count: int,
    sizes: Iterable[tuple[int, ...]],
    modality: Config,
    extra: Mapping[str, Config],
    metrics: Mapping[str, Config],
) -> dict[str, Any]:
    """All that two evaluations must share for their figures to mean the same, as plain data."""
    return {
        "set": {"sha256": set_hash, "count": count},
        "sizes": [list(size) for size in sizes],
        "modality": _settings(modality, "modality"),
        "extra": {label: _settings(cfg, "modality") for label, cfg in extra.items()},
        "metrics": {label: _settings(cfg, "metric") for label, cfg in metrics.items()},
    }


def _settings(cfg: Config, kind: str) -> dict[str, Any]:
    return deciding(cfg, kind, registry().identity)


def environment(
    components: Mapping[str, tuple[str, str]], *, seed: int, device: torch.device
) -> dict[str, Any]:
    """What should not change a figure but may: versions, device, seed. `components` are (kind, name) by place."""
    versions = {"vqcore": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {name: importlib.metadata.version(name) for name in ("numpy", "pillow")}
    for kind, name in components.values():
        try:
            origin = registry().find(kind, name).origin
        except VqcoreError:  # built from a registry of the caller's own
            continue
        versions[origin.distribution] = origin.version
    return {"versions": versions, "device": device.type, "seed": seed}


def directions(metrics: Mapping[str, Metric], losses: Iterable[str]) -> dict[str, str]:
    """Which way figures are better, "higher" or "lower", as far as it is known."""
    known = {label: getattr(metric, "better", None) for label, metric in metrics.items()}
    return {name: "lower" for name in losses} | {name: way for name, way in known.items() if way}


def is_written(name: str) -> bool:
    """Are the figures of this in a file, or should they be? So it is with a run and with the file itself."""
    path = Path(name)
    return path.is_file() or (path / FILE).is_file() or (path / "checkpoints").is_dir()


def read(run: str | Path) -> dict[str, Any]:
    """What `vqcore eval` wrote for a run: its folder, or the file itself."""
    path = Path(run) / FILE if Path(run).is_dir() else Path(run)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["protocol"]["set"]["sha256"], report["results"][0]["metrics"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is none. Measure it first: vqcore eval {run}") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise CheckpointError(
            f"{path}: not a file that this vqcore eval wrote. Measure again: vqcore eval {run}"
        ) from None
    return report


def refuse_unequal(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Raise `CheckpointError`, naming all that differs, unless two evaluations measured the same thing."""
    ours, theirs = _facts(a["protocol"]), _facts(b["protocol"])
    differ = [
        f"{key} ({_short(ours.get(key))} / {_short(theirs.get(key))})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differ:
        raise CheckpointError(
            f"{names[0]} and {names[1]} were not measured alike: {', '.join(differ)}. "
            "Evaluate both the same way, e.g. with the same data.eval_path and eval.sizes."
        )


def warnings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Differences of versions, device and seed, as lines."""
    ours, theirs = _facts(a["environment"]), _facts(b["environment"])
    return [
        f"measured with another {key}: {ours.get(key, 'none')} / {theirs.get(key, 'none')}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _facts(tree: Any, path: str = "") -> dict[str, Any]:
    """A tree's leaves by dotted path; the path says to a person what differs."""
    if not isinstance(tree, Mapping) or not tree:
        return {path: tree}
    facts: dict[str, Any] = {}
    for key, value in tree.items():
        facts |= _facts(value, f"{path}.{key}".lstrip("."))
    return facts


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:8]}…"


@dataclass(frozen=True)
class Row:
    """One figure of two evaluations. `better` is "a", "b", "=" or, where nothing is better, ""."""

    name: str
    a: float
    b: float
    better: str


def rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The figures that both have, side by side, by a title of weights and size."""
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
    """Results of one size and, where both have them, the same weights; else those that are used by default."""
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
