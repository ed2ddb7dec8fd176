"""How the codes of a store are used. Rows are read some at a time, so memory does not grow with the store."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from vqcore.artefacts.codes import unpacked
from vqcore.artefacts.stored import Opened, open_store
from vqcore.console import ProgressLine
from vqcore.errors import DataError

_AT_ONCE = 2**20
"""Codes that are in memory at once, or as many as there are counters."""
MOST_CODES = 2**24
"""Counters that are kept, one for each code, or one for each code at each position."""
_SHOWN = 10
"""Codes that are named."""


@dataclass(frozen=True)
class Use:
    """How often each code of a store occurs. `counts` has a row for each codebook.

    `places` is the perplexity of each codebook at each position of the grid, None for a codebook that is too large to
    count at every position.
    """

    manifest: Mapping[str, Any]
    rows: int
    counts: Int[np.ndarray, "q codes"]
    places: np.ndarray | None

    @property
    def usage(self) -> list[float]:
        """The share of each codebook that occurs."""
        return (self.counts > 0).mean(1).tolist()

    @property
    def bits(self) -> list[float]:
        """The entropy of the codes of each codebook."""
        return _entropy(self.counts).tolist()

    @property
    def perplexity(self) -> list[float]:
        """2 to the entropy of each codebook: so many codes, evenly used, would have this entropy."""
        return (2 ** _entropy(self.counts)).tolist()

    @property
    def never(self) -> list[int]:
        """How many codes of each codebook never occur."""
        return (self.counts == 0).sum(1).tolist()

    def most(self, limit: int = _SHOWN) -> list[list[tuple[int, int]]]:
        """The most frequent codes of each codebook and how often they occur."""
        return [_first(book, -book, limit) for book in self.counts]

    def least(self, limit: int = _SHOWN) -> list[list[tuple[int, int]]]:
        """The rarest codes of those that occur, of each codebook, and how often they occur."""
        return [_first(book, book, limit) for book in self.counts]

    def facts(self) -> dict[str, Any]:
        """All numbers but the counts, as JSON values; lists have an entry for each codebook."""
        return {
            "rows": self.rows,
            "codebook_size": self.counts.shape[1],
            "usage": self.usage,
            "perplexity": self.perplexity,
            "bits": self.bits,
            "never": self.never,
            "most": self.most(),
            "least": self.least(),
            "places": None if self.places is None else self.places.tolist(),
        }


def stats(folder: Path) -> Use:
    """Count the codes of a store. Raises `DataError` for codes out of range, and for too many codes to count."""
    store = open_store(folder)
    size, books = store.manifest["codebook_size"], store.manifest["num_codebooks"]
    positions = int(np.prod(store.manifest["grid"]))
    if size * books > MOST_CODES:
        raise DataError(
            f"{folder}: the codes of {books} codebooks of {size} are not counted; the most is {MOST_CODES} in all."
        )
    per_place = size * positions * books <= MOST_CODES
    counts = np.zeros((positions if per_place else 1, books, size), np.int64)
    slot = np.arange(books) * size
    if per_place:
        slot = slot + np.arange(positions)[:, None] * (books * size)
    # One call of bincount makes all counters, so that it should count at least as many codes.
    step = max(1, max(_AT_ONCE, counts.size) // (positions * books))
    with ProgressLine("stats", len(store.rows), unit="row") as line:
        for first in range(0, len(store.rows), step):
            places = np.arange(first, min(first + step, len(store.rows)))
            codes = store.rows.many(places).reshape(len(places), positions, books).astype(np.int64)
            if codes.max() >= size:
                raise DataError(
                    f"{folder}: code {codes.max()} is not below {size}; see vqcore tokens verify."
                )
            codes += slot
            known = _known(store, places, positions)
            counted = codes if known is None else codes[known]
            counts += np.bincount(counted.ravel(), minlength=counts.size).reshape(counts.shape)
            line.update(int(places[-1]) + 1)
    entropies = 2 ** _entropy(counts)
    return Use(store.manifest, len(store.rows), counts.sum(0), entropies.T if per_place else None)


def _known(store: Opened, places: np.ndarray, positions: int) -> Bool[np.ndarray, "n positions"] | None:
    """Which positions of rows count; None if all do. Not those that are invalid, or behind the ids of a text.

    Raises `DataError` for extras that do not say so.
    """
    if not {"length", "valid"} & set(store.manifest["extras"]):
        return None
    known = np.empty((len(places), positions), dtype=bool)
    for row, place in zip(known, places):
        extras = store.rows.extras(int(place))
        row[:] = unpacked(extras.get("valid"), store.manifest["grid"]).ravel()
        length = extras.get("length", positions)
        if not isinstance(length, int) or length < 0:
            raise DataError(f"{store.folder}: '{store.rows.key(int(place))}' has the length {length}")
        row[length:] = False
    return known


def _first(counts: np.ndarray, order: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Codes that occur, in an order, and how often they occur; codes that are alike in it by their number."""
    there = np.flatnonzero(counts)
    chosen = there[np.argsort(order[there], kind="stable")[:limit]]
    return [(int(code), int(counts[code])) for code in chosen]


def _entropy(counts: np.ndarray) -> np.ndarray:
    """The entropy of counts along the last axis, in bits."""
    share = counts / np.maximum(1, counts.sum(-1, keepdims=True))
    return (share * np.log2(1 / np.where(share > 0, share, 1))).sum(-1)
