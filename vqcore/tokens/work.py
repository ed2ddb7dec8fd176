"""What is done with stores that are there: copied to another layout, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.artefacts.stored import FOLDER, Opened, complete_manifest, open_store, store_named
from vqcore.console import ProgressLine
from vqcore.errors import DataError, RunError, cause
from vqcore.protocols import Coded
from vqcore.tokens.dataset import aligned
from vqcore.tokens.passes import refuse_file
from vqcore.tokens.sharded import SHARD_SIZE
from vqcore.tokens.shards import RESULTS, Shards, sha256

_AT_ONCE = 4096
"""Rows that are in memory at once."""


def convert(source: Path, target: Path, store: str) -> int:
    """Copy a store into another layout; returns the number of rows. What is done already is left alone.

    Shards keep their names and rows; those of a folder have 4096 files each. Raises `DataError` for a store that cannot
    be read, `RunError` if `target` holds other codes or takes no more data.
    """
    refuse_file(target)
    if source.resolve() == target.resolve():
        raise RunError(f"{target} is the store itself. Choose another folder.")
    found, made = open_store(source), store_named(store, "--store")
    base = {key: value for key, value in found.manifest.items() if key not in (*RESULTS, "store")}
    names, pieces = _pieces(found)
    try:
        with ProgressLine("convert", len(found.rows), unit="row") as line:
            if store == FOLDER:
                for number, (first, stop) in enumerate(pieces):
                    made.write(target, names[number], _rows(found, first, stop), base)
                    line.update(stop)
                return len(found.rows)
            shards = Shards(target, made, {**base, "store": store}, len(pieces))
            there = shards.done
            for number, (first, stop) in enumerate(pieces):
                if shards.names[number] not in there:
                    rows = _rows(found, first, stop)
                    failed = found.manifest["shards"][number]["failed"] if found.manifest["shards"] else []
                    files = len({row.extras.get("record", row.key) for row in rows}) + len(failed)
                    facts = {"of": files, "failed": failed}
                    if found.manifest["shards"] and (sizes := found.manifest["shards"][number].get("sizes")):
                        facts["sizes"] = sizes
                    shards.write(shards.names[number], rows, facts)
                line.update(stop)
            shards.finish()
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be written: {cause(error)}. The same command goes on from there."
        ) from error
    return len(found.rows)


def _rows(store: Opened, first: int, stop: int) -> list[Coded]:
    return [store.row(place) for place in range(first, stop)]


def _pieces(store: Opened) -> tuple[list[str], list[tuple[int, int]]]:
    """The shards of a store: names, and the first row and that after the last."""
    counts = [shard["rows"] for shard in store.manifest["shards"]]
    if not counts:  # rows of one file stay together
        counts, files = [], iter(store.places.values())
        while many := [count for _, count in islice(files, SHARD_SIZE)]:
            counts.append(sum(many))
    ends = np.cumsum(counts).tolist()
    return [f"shard-{number:05d}" for number in range(len(counts))], list(zip([0, *ends[:-1]], ends))


@dataclass
class Report:
    """What a check of stores found. `problems` are sentences; `said` lines for people."""

    problems: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def verify(folders: Sequence[Path]) -> Report:
    """Check stores: checksums, numbers of rows, codes in range; of several stores also that they have the same keys."""
    report, stores = Report(), {}
    for folder in folders:
        damaged = _damaged(folder, complete_manifest(folder))
        report.problems += damaged
        if damaged:
            continue
        store = open_store(folder)
        report.problems += _out_of_range(store)
        stores[str(folder)] = store
        manifest = store.manifest
        failed = manifest.get("failed", 0)
        report.said.append(
            f"{folder}: {len(store.rows):,} rows, grid {' x '.join(map(str, manifest['grid']))}, "
            f"{len(manifest['shards'])} shards, {failed} files failed"
        )
    if len(stores) > 1 and len(stores) == len(folders):
        try:
            aligned(stores)
            report.said.append(f"the {len(stores)} stores have the same keys")
        except DataError as error:
            report.problems.append(str(error).replace(" common=True takes the keys that all have.", ""))
    return report


def _damaged(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    files = {name: wanted for shard in manifest.get("shards", ()) for name, wanted in shard["files"].items()}
    problems = []
    with ProgressLine("checksums", len(files), unit="file") as line:
        for number, (name, wanted) in enumerate(files.items(), 1):
            path = folder / name
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif sha256(path) != wanted:
                problems.append(f"{path} is damaged: its checksum is not that of {folder / 'tokens.json'}")
            line.update(number)
    return problems


def _out_of_range(store: Opened) -> list[str]:
    most = store.manifest["codebook_size"]
    for first in range(0, len(store.rows), _AT_ONCE):
        places = np.arange(first, min(first + _AT_ONCE, len(store.rows)))
        high = store.rows.many(places).reshape(len(places), -1).max(1)
        if (high >= most).any():
            place = int(places[np.argmax(high >= most)])
            return [f"{store.folder}: code {high.max()} of '{store.rows.key(place)}' is not below {most}"]
    return []
