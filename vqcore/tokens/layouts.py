"""A pass over a data set into the layout of another system, where a file of codes for each file is all there is.

So what is done is seen from the files, also of what that system's own program has done: those files stay, and the crops
that it has chosen are taken.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqcore import dist
from vqcore.artefacts.codes import MANIFEST
from vqcore.artefacts.stored import layout_named
from vqcore.console import ProgressLine
from vqcore.data.reader import Opened
from vqcore.data.windows import cover
from vqcore.errors import ConfigError, DataError, RunError
from vqcore.protocols import Adopts, Coded, View
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.crops import Crops, Drawn, check_crops, chosen, crops_of
from vqcore.tokens.flow import Done, through
from vqcore.tokens.folder import adopted_by
from vqcore.tokens.inputs import Source, source_of
from vqcore.tokens.parts import Crop, Take, encoded, inputs
from vqcore.tokens.passes import manifest_of, refuse_file, refuse_overlap, writing
from vqcore.tokens.precision import Encoder
from vqcore.tokens.store import Claims

log = logging.getLogger(__name__)

_LEAST = 0.5
"""Share of codes that a tokenizer must find again in a file of the other program. Another tokenizer finds none."""


def tokenize_layout(
    tokenizer: Tokenizer,
    source: str | Path,
    target: Path,
    *,
    store: str,
    size: tuple[int, ...],
    batch_size: int = 16,
    overwrite: bool = False,
    stride: tuple[int, ...] | None = None,
    tiles: bool = False,
    workers: int = 1,
    crops: int | None = None,
    views: str | Path | None = None,
    seed: int = 0,
) -> Done:
    """Write the codes of every sample of a source (`source_of`) in the layout `store` of another system.

    Files that are there are kept, unless `overwrite`; of the others, each of several processes does its share. A file
    has the crops that the other system has chosen for it; where it has chosen none, those of the store `views`, or
    `crops` (1) that are drawn from `seed`. Raises `RunError` if `target` holds codes of another tokenizer or takes no
    more data, `DataError` if no file can be read or for codes that the layout cannot hold, `ConfigError` for what the
    tokenizer cannot do.
    """
    refuse_file(target)
    layout = layout_named(store, "--store")
    made, other = layout.store, layout.adopts
    if other is None:
        raise ConfigError(f"--store {layout.name} is no layout of another system.")
    check_crops(
        tokenizer.modality, cover(tokenizer.modality, size, stride, tiles=tiles), f"--store {layout.name}"
    )
    read = source_of(source, tokenizer)
    if read.folder is not None:
        refuse_overlap(read.folder, target)
    manifest = adopted_by({**manifest_of(tokenizer, size, None), "store": layout.said})
    made.write(target, "", [], manifest)
    chosen = Crop(_Chosen(other, target, _otherwise(tokenizer, read, size, crops, views, seed), crops))
    done = Done(left_out=read.left_out)
    take = Take(tokenizer, size, None, done)
    with Claims(manifest, None) as claims, ProgressLine("tokenize", len(read), unit="file") as line:
        claims.check(target)
        kept = [] if overwrite else _kept(other, target, read, manifest, crops)
        if kept:
            if not (target / MANIFEST).exists():
                _check_codes(
                    other.held(target, read.key(kept[0]), manifest) or (), read, kept[0], take, chosen
                )
            claims.write(target)
        done.skipped = len(kept)
        rank, ranks = dist.share()
        todo = sorted(set(range(rank, len(read), ranks)) - set(kept))
        parts = inputs(read, todo, [take], workers, batch_size, chosen)
        items, encoder = (item for _, item in parts), Encoder(tokenizer)
        for file, finish in encoder.settled_first(through(items, encoder, batch_size, done)):
            with writing(file, done):
                try:
                    made.write(target, "", finish().coded(len(manifest["grid"])), manifest)
                except DataError as error:
                    done.fail(file, error)
                else:
                    claims.write(target)
                    done.written += 1
            line.update(done.count)
        line.update(done.count)
    if done.failed and not done.written and not done.skipped:
        raise DataError(f"{source}: none of the {len(read)} files can be read. The first: {done.failed[0]}")
    return done


def _kept(
    other: Adopts, target: Path, read: Source, manifest: Mapping[str, Any], crops: int | None
) -> list[int]:
    """The samples whose codes are there. Raises `RunError` if one has another number of crops than is asked for."""
    kept = []
    for place in range(len(read)):
        if (rows := other.held(target, read.key(place), manifest)) is not None:
            if crops not in (None, len(rows)):
                raise _other_count(len(rows), read.key(place), crops)
            kept.append(place)
    return kept


def _other_count(count: int, key: str, asked: int | None) -> RunError:
    return RunError(
        f"{count} crops of '{key}' are chosen already, and --crops says {asked}. Without --crops they are taken."
    )


class _Chosen:
    """The crops that the other system has chosen, by key, and where there are none those of `otherwise`."""

    said: Mapping[str, Any] = {}

    def __init__(self, other: Adopts, target: Path, otherwise: Crops, count: int | None):
        self.other, self.target, self.otherwise, self.count = other, target, otherwise, count

    def of(self, key: str, found: Opened) -> tuple[View, ...]:
        """The views of a sample. Raises `DataError` for those of another picture, `RunError` for other numbers."""
        views = chosen(self.other, self.target, key, found)
        if views is None:
            return self.otherwise.of(key, found)
        if self.count not in (None, len(views)):
            raise _other_count(len(views), key, self.count)
        return views


def _otherwise(
    tokenizer: Tokenizer,
    read: Source,
    size: tuple[int, ...],
    crops: int | None,
    views: str | Path | None,
    seed: int,
) -> Crops:
    """The crops of files for which the other system has chosen none."""
    if views is None:
        return Drawn(tokenizer, size, crops or 1, seed)
    if crops is not None:
        raise ConfigError(f"--crops {crops}: --views takes all crops of {views}. Leave one of the two out.")
    return crops_of(views, map(read.key, range(len(read))), len(size))


def _check_codes(rows: Sequence[Coded], read: Source, place: int, take: Take, crop: Crop) -> None:
    """Raise `RunError` if this tokenizer does not find the codes again that the other program gave a file."""
    key, done = read.key(place), Done()
    parts = inputs(read, [place], [replace(take, done=done)], 0, crop=crop)
    ready = list(through((item for _, item in parts), partial(encoded, take.tokenizer), len(rows), done))
    if not ready:
        return  # the file cannot be read, and so tells nothing
    made = [row.codes for row in ready[0][1]().coded(rows[0].codes.ndim - 1)]
    equal = np.stack(made) == np.stack([row.codes for row in rows]) if len(made) == len(rows) else np.zeros(1)
    if (share := float(equal.mean())) < _LEAST:
        raise RunError(
            f"the codes of '{key}' that are there are not those of this tokenizer: {share:.0%} are equal. Choose "
            "another folder, or add --overwrite."
        )
    log.warning(
        f"the codes of '{key}' that are there and those of this tokenizer agree at {share:.1%} of all positions; files "
        "that are there are kept."
    )
