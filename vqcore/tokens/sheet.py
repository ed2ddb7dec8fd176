"""Some rows of stores, decoded: a picture for each store and key, below the file that the codes were made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqcore.artefacts.stored import Opened, open_store
from vqcore.data.npy import map_array
from vqcore.data.windows import Cover
from vqcore.errors import ConfigError, DataError, listed
from vqcore.pictures import picture, sheet
from vqcore.protocols import Batch, Coded
from vqcore.rng import sample_generators
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.crops import view_of
from vqcore.tokens.dataset import aligned
from vqcore.tokens.inputs import source_of

COLUMNS = 6
"""Keys of a sheet, spread evenly over the rows."""
_LETTERS = 14


@dataclass(frozen=True)
class Decoded:
    """A sheet: a column for each key; of each store whose files are known, the share of codes that they give again."""

    image: Image.Image
    keys: Sequence[str]
    agreement: Mapping[Path, float]


@torch.no_grad()
def decoded(folders: Sequence[Path], tokenizers: Sequence[Tokenizer], sources: Sequence[str]) -> Decoded:
    """Decode the same keys of each store with the tokenizer of its fingerprint.

    `sources` are the files of the stores (`source_of`), in the order of the stores; there may be none. Raises
    `DataError` for codes that none of the tokenizers made, and for a key without a file, `ConfigError` for too few or
    too many sources.
    """
    if sources and len(sources) != len(folders):
        raise ConfigError(
            f"--source is given {len(sources)} times, for {len(folders)} stores. Give the files of each store, in the "
            "order of the stores."
        )
    stores = {str(folder): open_store(folder) for folder in folders}
    places = aligned(stores, common=True)
    first = places[str(folders[0])]
    count = len(stores[str(folders[0])].rows) if first is None else len(first)
    columns = np.unique(np.linspace(0, count - 1, COLUMNS).round().astype(int))
    lines: list[tuple[str, list[Image.Image]]] = []
    keys: list[str] = []
    agreement: dict[Path, float] = {}
    for number, (folder, (label, store)) in enumerate(zip(folders, stores.items())):
        tokenizer = _maker(store, tokenizers)
        chosen = places[label]
        rows = [store.row(int(at if chosen is None else chosen[at])) for at in columns]
        keys = keys or [row.key for row in rows]
        codes = np.stack([row.codes for row in rows])
        name, modality = folder.name[:_LETTERS], tokenizer.modality
        files: list[Tensor | None] = [None] * len(rows)
        if sources and "masks" in store.manifest:
            raise ConfigError(
                f"--source: {folder} was made with --masks, which are not read here. Leave --source out."
            )
        if sources:
            parts = _read(tokenizer, store, rows, sources[number])
            agreement[folder] = float((tokenizer.encode_parts(parts).cpu().numpy() == codes).mean())
            files, shown = [], []
            for key, (x, valid) in zip(keys, parts):
                one = tokenizer.prepare(Batch(x[None], (key,), None if valid is None else valid[None]))
                files.append(one.x[0].cpu())
                shown.append(
                    picture(modality, one.x[0].cpu(), mask=None if one.mask is None else one.mask[0])
                )
            lines.append((f"{name}\nfiles", shown))
        rng = sample_generators([row.key for row in rows], 0, "decode")
        x_hat = tokenizer.decode(codes, size=tuple(store.manifest["size"]), rng=rng).cpu()
        made = x_hat.argmax(1) if tokenizer.spec.labels is not None else x_hat
        lines.append((f"{name}\ndecoded", [picture(modality, x, like) for x, like in zip(made, files)]))
    return Decoded(sheet(lines), keys, agreement)


def _maker(store: Opened, tokenizers: Sequence[Tokenizer]) -> Tokenizer:
    """The tokenizer that made the codes of a store."""
    wanted = store.manifest["fingerprint"]
    found = next((each for each in tokenizers if each.fingerprint == wanted), None)
    if found is None:
        given = listed(each.fingerprint[:16] for each in tokenizers)
        raise DataError(
            f"{store.folder}: the tokenizer with the fingerprint {wanted[:16]} made these codes, not one of those that "
            f"are given ({given}). Add --decode RUN with this tokenizer."
        )
    return found


def _read(
    tokenizer: Tokenizer, store: Opened, rows: Sequence[Coded], given: str
) -> list[tuple[Tensor, Tensor | None]]:
    """What the encoder was given for rows of a store: samples, and where they are valid."""
    source = source_of(given, tokenizer, "--source")
    wanted = {row.extras.get("record", row.key) for row in rows}
    places = {key: place for place in range(len(source)) if (key := source.key(place)) in wanted}
    if missing := wanted - places.keys():
        raise DataError(
            f"--source {given}: has no file with the key '{min(missing)}', which {store.folder} has."
        )
    return [
        _part(tokenizer, source.get(places[row.extras.get("record", row.key)]), row.extras, store.manifest)
        for row in rows
    ]


def _part(
    tokenizer: Tokenizer, given: Any, extras: Mapping[str, Any], manifest: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The crop, the window or the whole of a file that a row was made of."""
    size, stride = tuple(manifest["size"]), manifest.get("stride")
    covering = Cover(size, tuple(stride)) if stride else None
    views = (view_of(extras["view"], f"the row of {given}"),) if "view" in extras else ()
    row = map_array(given, str(given))[extras["row"]] if "row" in extras else given
    sample = tokenizer.prepared(row, size, covering, views)
    if covering is None or "start" not in extras:
        return sample.part(0)
    at = [begin // (step or 1) for begin, step in zip(extras["start"], covering.stride)]
    return sample.part(int(np.ravel_multi_index(at, covering.counts(sample.found.extent))))
