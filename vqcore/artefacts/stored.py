"""Opens a store of codes: the manifest of its folder, and the rows as the store's component gives them.

The manifest `tokens.json` of a store of shards names the store, and lists the shards with rows and checksums.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vqcore.artefacts.codes import (
    MANIFEST,
    Codes,
    CodeShape,
    check_codes,
    joined,
    other_maker,
    read_manifest,
    unusable,
)
from vqcore.artefacts.resolve import with_prefix
from vqcore.compose.build import component
from vqcore.compose.text import bracketed
from vqcore.errors import ConfigError, DataError, did_you_mean
from vqcore.files import local
from vqcore.protocols import Adopts, Coded, Store, StoredCodes, adopts
from vqcore.registry import registry

FOLDER = "folder"
"""The store whose manifests name none: a file of codes for each file."""


@dataclass(frozen=True)
class Opened:
    """A complete store, opened for reading."""

    folder: Path
    manifest: Mapping[str, Any]
    rows: StoredCodes

    @property
    def shape(self) -> CodeShape:
        """What its codes look like."""
        made = self.manifest
        return CodeShape(len(made["grid"]), made["num_codebooks"], made["codebook_size"])

    @cached_property
    def files(self) -> dict[str, tuple[int, int]]:
        """The first row and the number of rows of each file, by the key of the file, in the order of the rows."""
        found: dict[str, tuple[int, int]] = {}
        parts = "record" in self.manifest["extras"]
        for place, key in enumerate(self._keys()):
            if parts:
                key = self.rows.extras(place).get("record", key)
            first, count = found.get(key, (place, 0))
            found[key] = first, count + 1
        return found

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """As `files`, but of a store of crops: there every row is a sample of its own, by its own key."""
        if "crop" not in self.manifest["extras"]:
            return self.files
        return {key: (place, 1) for place, key in enumerate(self._keys())}

    def _keys(self) -> Iterator[str]:
        for raw in self.rows.keys():  # noqa: SIM118 - no mapping
            yield str(raw.as_buffer(), "utf-8", "surrogateescape")

    def row(self, place: int) -> Coded:
        """A row with all that is known of it."""
        rows = self.rows
        return Coded(rows.key(place), rows.codes(place), rows.extras(place) if self.has_extras else {})

    @property
    def has_extras(self) -> bool:
        """Whether any row has extras."""
        return bool(self.manifest["extras"])

    def record(self, key: str) -> Codes:
        """The codes of a file, or of a crop, as int64.

        Raises `KeyError` for an unknown key, `DataError` for codes out of range.
        """
        if key not in self.places:
            raise KeyError(f"{self.folder} has no codes of '{key}'.{did_you_mean(key, self.places)}")
        first, count = self.places[key]
        rows = []
        for place in range(first, first + count):
            row = self.row(place)
            codes = check_codes(row.codes, f"{self.folder}: {row.key}", self.shape, (self.shape.axes + 1,))
            if "crop" in row.extras:
                return codes
            rows.append(Coded(row.key, codes, row.extras))
        return joined(rows, tuple(self.manifest["size"]))


class Records(Mapping[str, Codes]):
    """The codes in a store by the key of the file that they come from; read when asked for."""

    def __init__(self, store: Opened):
        self.store = store

    def __len__(self) -> int:
        return len(self.store.places)

    def __iter__(self) -> Iterator[str]:
        return iter(self.store.places)

    def __getitem__(self, key: str) -> Codes:
        return self.store.record(key)

    def check_maker(self, fingerprint: str) -> None:
        """Raise `DataError` if another tokenizer made the codes."""
        if maker := other_maker(self.store.manifest, fingerprint):
            raise DataError(f"{self.store.folder}: {maker}. Load the tokenizer that made them.")


@dataclass(frozen=True)
class Layout:
    """A store that somebody named: the component, its name alone, and its name with settings, as manifests have it."""

    store: Store
    name: str
    said: str

    @property
    def adopts(self) -> Adopts | None:
        """The store, if its layout is that of another system."""
        return adopts(self.store)

    @property
    def has_shards(self) -> bool:
        """Whether codes lie in shards, and not in a file of codes for each file."""
        return self.name != FOLDER and self.adopts is None


def layout_named(given: str, where: str) -> Layout:
    """A store by its name, or `NAME[key=value,...]`. Raises `ConfigError`, which begins with `where`."""
    cfg: Any = component("store", bracketed(given, where), file=where, where=where)
    settings = given.partition("[")[2].strip().removesuffix("]").strip()
    said = f"{cfg.name}[{settings}]" if settings else cfg.name
    return Layout(registry().build("store", cfg), cfg.name, said)


def store_named(given: str, where: str) -> Store:
    """The store alone of `layout_named`."""
    return layout_named(given, where).store


def store_of(folder: Path) -> str | None:
    """The name of the store of shards in a folder; None if a file each, or nothing, is there."""
    manifest = read_manifest(folder) if folder.is_dir() else None
    return None if manifest is None else manifest.get("store")


def complete_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store. Raises `DataError` for a folder without one, or with a store that is half done."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(
            f"{folder}: there is no {MANIFEST} in this folder, so it is no store of codes. Codes of "
            "another system are named with their layout, LAYOUT:FOLDER."
        )
    if "store" in manifest and not (manifest["complete"] and {"shards", "extras"} <= manifest.keys()):
        raise DataError(
            f"{folder}: this store is not complete. Start the same `vqcore tokenize` command again; it does what is "
            "missing."
        )
    return manifest


def open_named(name: str, says: Mapping[str, Any] | None = None) -> Opened:
    """The store that a user names: a folder, or `LAYOUT:FOLDER` for codes of another system.

    `says` is what a manifest would say of the tokenizer that made those (`fingerprint`, `codebook_size`,
    `num_codebooks`, `grid`, `size`, `dtype`); a manifest that is there counts. Raises `DataError` as `open_store`
    does, and `ConfigError` without either.
    """
    prefixed = with_prefix(name)
    if prefixed is None:
        return open_store(local(name))
    folder, layout = local(prefixed[1]), layout_named(prefixed[0], name)
    if layout.adopts is None:
        raise ConfigError(f"{name}: {layout.name} is no layout of another system. Give the folder alone.")
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None and says is None:
        raise ConfigError(
            f"{name}: there is no {MANIFEST}. Name the tokenizer that made the codes: --tokenizer RUN."
        )
    manifest = manifest or adopted(layout.said, says or {})
    return Opened(folder, manifest, layout.store.open(folder, manifest))


def adopted(layout: str, says: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a folder in the layout of another system: what is there is the store."""
    extras = ["record", "crop", "view"]
    return {**says, "store": layout, "complete": True, "shards": [], "extras": extras}


def open_store(folder: Path) -> Opened:
    """The store in a folder, of any layout. Raises `DataError` for what is missing, half done or damaged."""
    manifest = complete_manifest(folder)
    store = store_named(manifest.get("store", FOLDER), str(folder / MANIFEST))
    if "store" not in manifest:
        if wrong := unusable(manifest):
            raise DataError(f"{folder / MANIFEST}: {wrong}.")
        manifest = {**manifest, "shards": [], "extras": ["record", "row", "start", "extent"]}
    return Opened(folder, manifest, store.open(folder, manifest))
