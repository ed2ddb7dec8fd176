"""Codes as a data set for training a model of them: random access, several modalities by key."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import Dataset

from vqcore.artefacts.codes import unpacked
from vqcore.artefacts.stored import Opened, open_store
from vqcore.errors import DataError, listed
from vqcore.files import local

_COMPARED = 64
"""So many crops of each store are compared, spread over all of them."""
Places = str | Path | Mapping[str, str | Path]


class TokenDataset(Dataset[Any]):
    """The rows of a store, or of several stores that are joined by key: `TokenDataset({"rgb": A, "depth": B})`.

    `dataset[i]` is `(*grid, q)` int64, of several stores such tensors by label; `dataset.batch(places)`, or
    `dataset[list]`, stacks rows. The order is that of the first store. All stores must have the same keys; with
    `common` the keys that they share are the data set. Crops are joined by the key of the file and their number.
    Raises `DataError` for a store that is damaged or not complete, and for keys or crops that do not match.
    """

    def __init__(self, places: Places, *, common: bool = False):
        self._given = (places, common)
        named = places if isinstance(places, Mapping) else {"": places}
        self.stores: dict[str, Opened] = {label: open_store(local(place)) for label, place in named.items()}
        if not self.stores:
            raise DataError("TokenDataset: no store is given.")
        self.manifests = {label: store.manifest for label, store in self.stores.items()}
        self._alone = None if isinstance(places, Mapping) else self.stores[""].rows
        self._rows = list(self.stores.items())
        self._where = aligned(self.stores, common=common)
        first = self._rows[0][0]
        chosen = self._where[first]
        self._length = len(self.stores[first].rows) if chosen is None else len(chosen)
        self._check_views()

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked opens the files itself.
        return {"given": self._given}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        places, common = state["given"]
        TokenDataset.__init__(self, places, common=common)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | np.integer | Sequence[int] | np.ndarray) -> Any:
        if not isinstance(index, (int, np.integer)):
            return self.batch(index)
        if not 0 <= index < self._length:
            if not -self._length <= index < 0:
                raise IndexError(f"{index}: the data set has {self._length} rows")
            index += self._length
        index = int(index)
        if self._alone is not None:
            return torch.from_numpy(self._alone.codes(index).astype(np.int64))
        return {
            label: torch.from_numpy(store.rows.codes(self._place(label, index)).astype(np.int64))
            for label, store in self._rows
        }

    def batch(self, places: Sequence[int] | np.ndarray | Tensor) -> Any:
        """The codes of rows by their places, stacked: `(n, *grid, q)` int64, or such tensors by label.

        Raises `IndexError` for places beyond the rows, negative ones too, and for a mask of booleans.
        """
        asked = np.asarray(places)
        if asked.dtype == bool:
            raise IndexError("rows are chosen by their places, not by a mask: take numpy.flatnonzero(mask)")
        asked = asked.astype(np.int64)
        if asked.size and not 0 <= asked.min() <= asked.max() < self._length:
            raise IndexError(f"places lie in [0, {self._length})")
        made = {
            label: torch.from_numpy(store.rows.many(self._places(label, asked)).astype(np.int64))
            for label, store in self._rows
        }
        return made[""] if self._alone is not None else made

    def key(self, index: int) -> str:
        """The key of a row, the same in all stores."""
        label, store = self._rows[0]
        return store.rows.key(self._place(label, index))

    def find(self, key: str) -> int:
        """The place of a key. Raises `KeyError` for an unknown one."""
        label, store = self._rows[0]
        place, chosen = store.rows.find(key), self._where[label]
        if chosen is None:
            return place
        found = int(np.searchsorted(chosen, place))
        if found == len(chosen) or chosen[found] != place:
            raise KeyError(f"not all stores have codes of '{key}'")
        return found

    def extras(self, index: int, label: str | None = None) -> Mapping[str, Any]:
        """What else the store `label` (by default the first one) knows of a row, such as where its window begins."""
        label = self._rows[0][0] if label is None else label
        return self.stores[label].rows.extras(self._place(label, index))

    def valid(self, index: int, label: str | None = None) -> Bool[Tensor, "*grid"]:
        """Which positions of a row of the store `label` (by default the first one) are valid."""
        label = self._rows[0][0] if label is None else label
        return torch.from_numpy(
            unpacked(self.extras(index, label).get("valid"), self.manifests[label]["grid"])
        )

    def _place(self, label: str, index: int) -> int:
        chosen = self._where[label]
        return index if chosen is None else int(chosen[index])

    def _places(self, label: str, asked: np.ndarray) -> np.ndarray:
        chosen = self._where[label]
        return asked if chosen is None else chosen[asked]

    def _check_views(self) -> None:
        """Raise `DataError` if crops with one key show other parts in different stores; `_COMPARED` are compared."""
        (first, store), *others = self._rows
        if "view" not in store.manifest["extras"]:
            return
        for index in np.unique(np.linspace(0, len(self) - 1, min(_COMPARED, len(self))).astype(int)).tolist():
            seen = self.extras(index, first).get("view")
            for label, other in others:
                if not _alike(seen, self.extras(index, label).get("view")):
                    raise DataError(
                        f"{store.folder} and {other.folder} have other crops with the same keys, e.g. "
                        f"{self.key(index)}: tokenize one of them with --views and the other store."
                    )


def _alike(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two views show the same part of a sample."""
    if one is None or other is None:
        return one is other
    here, there = (np.array([*view["start"], *view["stop"]]) for view in (one, other))
    near = here.shape == there.shape and np.allclose(here, there, atol=1e-6)
    return near and one["flip"] == other["flip"]


def aligned(stores: Mapping[str, Opened], *, common: bool = False) -> dict[str, np.ndarray | None]:
    """Where the rows of each store are, in the order of the first one: None for all rows as they are.

    Raises `DataError` if the keys differ; with `common`, only if there is no common one.
    """
    labels = list(stores)
    keys = {label: _chunked(store.rows.keys()) for label, store in stores.items()}
    base = keys[labels[0]]
    if all(each.equals(base) for each in keys.values()):
        return dict.fromkeys(labels)
    places = {label: pc.index_in(base, value_set=_whole(keys[label])) for label in labels}
    everywhere = np.ones(len(base), dtype=bool)
    problems = []
    for label in labels[1:]:
        there = places[label].is_valid().to_numpy()
        everywhere &= there
        lonely = ~np.asarray(pc.is_in(keys[label], value_set=_whole(base)).to_numpy(), dtype=bool)
        for missing, source, other in ((~there, base, label), (lonely, keys[label], labels[0])):
            if missing.any():
                names = [_text(source[int(place)]) for place in np.flatnonzero(missing)[:3]]
                problems.append(
                    f"{stores[other].folder} lacks {missing.sum()} of {len(source)} keys ({listed(names)})"
                )
    if problems and not common:
        raise DataError(f"{'; '.join(problems)}. common=True takes the keys that all have.")
    chosen = np.flatnonzero(everywhere)
    if not len(chosen):
        raise DataError(
            f"{listed(str(store.folder) for store in stores.values())}: no key is in all of them."
        )
    found = {label: places[label].to_numpy(zero_copy_only=False) for label in labels}
    return {label: found[label][chosen].astype(np.int64) for label in labels}


def _chunked(keys: Any) -> pa.ChunkedArray:
    return keys if isinstance(keys, pa.ChunkedArray) else pa.chunked_array([keys])


def _whole(keys: pa.ChunkedArray) -> pa.Array:
    made = keys.combine_chunks()
    return made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made


def _text(key: Any) -> str:
    return key.as_py().decode("utf-8", "surrogateescape")
