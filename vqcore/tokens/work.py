"""What is done with stores that are there: copied to another layout, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.artefacts.codes import by_record, record_of
from vqcore.artefacts.stored import Opened, complete_manifest, layout_named, open_store
from vqcore.console import ProgressLine
from vqcore.errors import DataError, RunError, cause, plural
from vqcore.protocols import Adopts, Coded, Store
from vqcore.tokens.dataset import aligned
from vqcore.tokens.folder import adopted_by
from vqcore.tokens.passes import refuse_file
from vqcore.tokens.sharded import SHARD_SIZE
from vqcore.tokens.shards import RESULTS, Shards, sha256
from vqcore.tokens.store import Claims

_AT_ONCE = 4096
"""Rows that are in memory at once."""


def convert(found: Opened, target: Path, store: str) -> int:
    """Copy a store into another layout; returns the number of rows. What is done already is left alone.

    Shards keep their names and rows; those of a folder have 4096 files each. Raises `DataError` for rows that the
    layout cannot hold, `RunError` if `target` holds other codes or takes no more data.
    """
    refuse_file(target)
    if found.folder.resolve() == target.resolve():
        raise RunError(f"{target} is the store itself. Choose another folder.")
    layout = layout_named(store, "--store")
    made = layout.store
    base = {key: value for key, value in found.manifest.items() if key not in (*RESULTS, "store")}
    try:
        with ProgressLine("convert", len(found.rows), unit="row") as line:
            if layout.has_shards:
                _into_shards(found, target, made, {**base, "store": layout.said}, line)
            elif layout.adopts is not None:
                _into_layout(found, target, made, layout.adopts, {**base, "store": layout.said}, line)
            else:
                for name, first, stop in _pieces(found):
                    made.write(target, name, _rows(found, first, stop), base)
                    line.update(stop)
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be written: {cause(error)}. The same command goes on from there."
        ) from error
    return len(found.rows)


def _into_shards(
    found: Opened, target: Path, made: Store, base: Mapping[str, Any], line: ProgressLine
) -> None:
    """Write the shards that are missing."""
    pieces = _pieces(found)
    shards = Shards(target, made, base, [name for name, *_ in pieces])
    there, said = shards.done, {each["name"]: each for each in found.manifest["shards"]}
    if old := [
        name
        for name, first, stop in pieces
        if name in there and not _is_of(there[name], said.get(name), stop - first)
    ]:
        shards.forget(old)  # the store was mended since
        there = shards.done
    for name, first, stop in pieces:
        if name not in there:
            rows = _rows(found, first, stop)
            known = said.get(name, {})
            failed = known.get("failed", [])
            facts = {"of": len({record_of(row) for row in rows}) + len(failed), "failed": failed}
            if sizes := known.get("sizes"):
                facts["sizes"] = sizes
            shards.write(name, rows, facts)
        line.update(stop)
    shards.finish()


def _is_of(copy: Mapping[str, Any], known: Mapping[str, Any] | None, rows: int) -> bool:
    """Whether a shard that is there is a copy of one as it is now."""
    now = known or {}
    facts = now.get("failed", []), now.get("sizes")
    return copy["rows"] == rows and (copy["failed"], copy.get("sizes")) == facts


def _into_layout(
    found: Opened, target: Path, made: Store, other: Adopts, base: Mapping[str, Any], line: ProgressLine
) -> None:
    """Write the files that are missing; those that are there must hold the same codes."""
    made.write(target, "", [], base)
    with Claims(adopted_by(base), None) as claims:
        claims.check(target)
        for name, first, stop in _pieces(found):
            fresh: list[Coded] = []
            for key, rows in by_record(_rows(found, first, stop)):
                there = other.held(target, key, base)
                if there is not None and not _same(there, rows):
                    raise RunError(f"{target} holds other codes of '{key}'. Choose another folder.")
                fresh += [] if there else rows
            made.write(target, name, fresh, base)
            claims.write(target)
            line.update(stop)


def _same(one: Sequence[Coded], other: Sequence[Coded]) -> bool:
    """Whether rows have the same keys and codes."""
    return len(one) == len(other) and all(
        a.key == b.key and np.array_equal(a.codes, b.codes) for a, b in zip(one, other)
    )


def _rows(store: Opened, first: int, stop: int) -> list[Coded]:
    return [store.row(place) for place in range(first, stop)]


def _pieces(store: Opened) -> list[tuple[str, int, int]]:
    """The shards of a store: the name, the first row and that after the last."""
    shards = store.manifest["shards"]
    counts, names = [shard["rows"] for shard in shards], [shard["name"] for shard in shards]
    if not counts:  # rows of one file stay together
        files = iter(store.files.values())
        while many := [count for _, count in islice(files, SHARD_SIZE)]:
            names.append(f"shard-{len(counts):05d}")
            counts.append(sum(many))
    ends = np.cumsum(counts).tolist()
    return list(zip(names, [0, *ends[:-1]], ends))


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
        if manifest.get("rows", len(store.rows)) != len(store.rows):
            report.problems.append(
                f"{folder}: its manifest says {manifest['rows']:,} rows, and its shards have {len(store.rows):,}"
            )
        failed = manifest.get("failed", 0)
        report.said.append(
            f"{folder}: {plural(len(store.rows), 'row')}, grid {' x '.join(map(str, manifest['grid']))}, "
            f"{plural(len(manifest['shards']), 'shard')}, {plural(failed, 'file')} failed"
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
