"""Several crops of each sample: which ones, from the tokenizer's own settings or from a store that has them already."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vqcore.artefacts.codes import MANIFEST, read_manifest
from vqcore.artefacts.resolve import with_prefix
from vqcore.artefacts.stored import open_store, store_named
from vqcore.config import to_tree
from vqcore.data.reader import Opened, proportional, sized
from vqcore.data.windows import Cover
from vqcore.errors import ConfigError, DataError, listed
from vqcore.files import local
from vqcore.protocols import Adopts, Modality, View, adopts, fills_up, has_own_box
from vqcore.reading import REAL, misfit
from vqcore.rng import numpy_generator
from vqcore.tokenizer import Tokenizer

_VIEW = {"start": [REAL], "stop": [REAL], "flip": bool, "extent": [int]}
_TRIES = 8
"""So many crops of a sample are drawn to see whether they differ."""


class Crops(Protocol):
    """Which crops samples have. `said` is what a manifest says of them: all that decides them."""

    said: Mapping[str, Any]

    def of(self, key: str, found: Opened) -> tuple[View, ...]:
        """The views of a sample. The first is the centre; none has a random choice beside box and flip."""
        ...


class Drawn:
    """`count` crops of each sample: the centre, then boxes and flips as the modality draws them in training.

    A crop follows from the seed, the key and its number. Raises `ConfigError` if the modality draws none.
    """

    def __init__(self, tokenizer: Tokenizer, size: tuple[int, ...], count: int, seed: int):
        self.modality, self.size, self.count, self.seed = tokenizer.modality, size, count, seed
        cfg: Any = tokenizer.cfg.modality
        if count > 1 and not _draws(self.modality, size):
            raise ConfigError(
                f"--crops {count}: all crops of a sample would be alike: the modality {cfg.name} of this tokenizer "
                "draws neither boxes nor flips in training. --views STORE takes the crops of another store."
            )
        names = set(getattr(type(cfg), "training_only", ()))
        drawn = {name: value for name, value in to_tree(cfg).items() if name in names}
        said = {"modality": cfg.name, "size": list(size), **drawn}
        self.said: Mapping[str, Any] = {"count": count, "seed": seed, "drawn": said}

    def of(self, key: str, found: Opened) -> tuple[View, ...]:
        """The views of a sample, drawn for its extent."""
        views = [sized(self.modality, found, self.size)]
        for number in range(1, self.count):
            rng = numpy_generator(self.seed, "crop", key, number)
            views.append(replace(sized(self.modality, found, self.size, rng), draw=0))
        return tuple(replace(view, extent=view.extent or found.extent) for view in views)


def _draws(modality: Modality, size: tuple[int, ...]) -> bool:
    """Whether random views of a large sample differ from each other in more than their `draw`."""
    large = tuple(4 * side for side in size)
    views = [modality.view(large, size, np.random.default_rng(seed)) for seed in range(_TRIES)]
    return len({(view.start, view.stop, view.flip) for view in views}) > 1


class Saved:
    """The crops that the rows of a store have, by key. Raises `ConfigError` for a store without any."""

    def __init__(self, folder: Path):
        self.folder, self.store = folder, open_store(folder)
        self.rows = self.store.rows
        if not len(self.rows) or "view" not in self.rows.extras(0):
            raise ConfigError(f"--views {folder}: its rows have no views: it was made without --crops.")
        shards = self.store.manifest.get("shards", ())
        facts = json.dumps([shard["files"] for shard in shards] or self._views())
        self.said: Mapping[str, Any] = {"views": hashlib.sha256(facts.encode()).hexdigest()}
        self.failed = {key for shard in shards for key, _ in shard.get("failed", ())}

    def _views(self) -> list[Any]:
        """The views of a store that keeps no checksums."""
        return [
            [self.rows.key(place), self.rows.extras(place).get("view")] for place in range(len(self.rows))
        ]

    def check(self, keys: Iterable[str]) -> None:
        """Raise `DataError` if the store lacks keys, other than those of files that failed there."""
        asked = [key for key in keys if key not in self.failed]
        known = self.rows.keys()
        there = np.zeros(len(asked), dtype=bool)
        for first in ("#crop0", "#0#crop0"):  # of a file with one sample, and with several
            wanted = pa.array(
                [f"{key}{first}".encode("utf-8", "surrogateescape") for key in asked], pa.binary()
            )
            there |= np.asarray(
                pc.is_in(wanted, value_set=_whole(known)).to_numpy(zero_copy_only=False), dtype=bool
            )
        if missing := [key for key, has in zip(asked, there) if not has]:
            raise DataError(
                f"--views {self.folder} lacks {len(missing)} of {len(asked)} keys ({listed(missing, 3)})."
            )

    def of(self, key: str, found: Opened) -> tuple[View, ...]:
        """The views of a sample. Raises `DataError` if there are none, or if they are of other proportions."""
        try:
            place = self.rows.find(f"{key}#crop0")
        except KeyError:
            raise DataError(f"{self.folder} has no views of '{key}'") from None
        views: list[View] = []
        while place < len(self.rows) and self.rows.key(place) == f"{key}#crop{len(views)}":
            views.append(
                view_of(self.rows.extras(place).get("view"), f"{self.folder}: '{self.rows.key(place)}'")
            )
            place += 1
        extent = views[0].extent or ()
        if len(extent) != len(found.extent) or not proportional(found.extent, extent):
            own, theirs = (" x ".join(map(str, each)) for each in (found.extent, extent))
            raise DataError(f"its extent is {own}, and its crops in {self.folder} are of {theirs}")
        return tuple(views)


class Chosen:
    """The crops that another system has chosen for the files of some keys, in a folder of its own: `LAYOUT:FOLDER`.

    Raises `ConfigError` for a layout of ours, and `DataError` if crops of keys are missing.
    """

    def __init__(self, named: str, layout: str, folder: Path, keys: Sequence[str], axes: int):
        where = f"--views {named}"
        other = adopts(store_named(layout, where))
        if other is None:
            raise ConfigError(f"{where}: {layout} is no layout of another system. Give the folder alone.")
        self.other, self.folder = other, folder
        # For an extent of 1, so in the units of the other system.
        there = {key: other.views(folder, key, (1,) * axes) for key in keys}
        if missing := [key for key, views in there.items() if views is None]:
            raise DataError(f"{where} lacks {len(missing)} of {len(keys)} keys ({listed(missing, 3)}).")
        facts = [
            (key, [(each.start, each.stop, each.flip) for each in views or ()])
            for key, views in there.items()
        ]
        self.said: Mapping[str, Any] = {"views": hashlib.sha256(json.dumps(facts).encode()).hexdigest()}

    def of(self, key: str, found: Opened) -> tuple[View, ...]:
        """The views of a sample. Raises `DataError` for those of another picture."""
        views = chosen(self.other, self.folder, key, found)
        if views is None:
            raise DataError(f"{self.folder} has no crops of '{key}'")
        return views


def chosen(other: Adopts, folder: Path, key: str, found: Opened) -> tuple[View, ...] | None:
    """The crops that another system has chosen for a sample. Raises `DataError` for those of another picture."""
    views = other.views(folder, key, found.extent)
    if any(not 0 <= low < high <= 1 for view in views or () for low, high in zip(view.start, view.stop)):
        sides = " x ".join(map(str, found.extent))
        raise DataError(f"the crops of '{key}' that are chosen already do not lie inside of {sides}.")
    return None if views is None else tuple(views)


def crops_of(named: str | Path, keys: Iterable[str], axes: int) -> Crops:
    """The crops that `--views` names, for samples of so many axes: those of a store, or of `LAYOUT:FOLDER`.

    Raises `ConfigError` for a store without any, and `DataError` if crops of keys are missing.
    """
    if prefixed := with_prefix(str(named)):
        return Chosen(str(named), prefixed[0], local(prefixed[1]), list(keys), axes)
    folder = local(named)
    if folder.is_dir() and read_manifest(folder) is None:
        raise DataError(
            f"--views {named}: there is no {MANIFEST} in this folder, so it is no store of codes. Crops of 4M are "
            f"named with their layout: --views fourm/tokens:{named}"
        )
    saved = Saved(folder)
    saved.check(keys)
    return saved


def _whole(keys: Any) -> pa.Array:
    made = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    return made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made


def view_of(kept: Any, where: str) -> View:
    """A view as `saved_view` gave it. Raises `DataError` for what is none."""
    if misfit(kept, _VIEW):
        raise DataError(f"{where}: {str(kept)[:80]} is no view")
    start, stop = (tuple(map(float, kept[name])) for name in ("start", "stop"))
    extent = tuple(kept["extent"])
    inside = all(0 <= low < high <= 1 for low, high in zip(start, stop))
    if not len(start) == len(stop) == len(extent) or not inside or min(extent, default=0) < 1:
        raise DataError(f"{where}: {str(kept)[:80]} is no part of a sample")
    return View(start=start, stop=stop, size=(), flip=kept["flip"], extent=extent)


def saved_view(view: View) -> dict[str, Any]:
    """A view as the extra `view` of a row."""
    extent = list(view.extent or ())
    return {"start": list(view.start), "stop": list(view.stop), "flip": view.flip, "extent": extent}


def check_crops(modality: Modality, covering: Cover | None, flag: str) -> None:
    """Raise `ConfigError` for a tokenizer whose samples have no crops."""
    if covering is not None or fills_up(modality):
        raise ConfigError(
            f"{flag} is for samples that are cropped, and those of this tokenizer are cut into windows or filled up. "
            "Leave it out."
        )
    if has_own_box(modality):
        raise ConfigError(f"{flag}: samples of this tokenizer are not simply a part of a file. Leave it out.")
