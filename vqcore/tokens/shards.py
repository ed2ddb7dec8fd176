"""A store in work: which shards are done, what each one holds, and the manifest that the last one completes.

What a shard holds is a function of the list of files alone, never of who writes it. So any number of processes,
started at any time, do the shards that are missing. A shard is written first, then its note beside it
(`shard-00000.json`: rows, checksums, files that failed). The notes of all shards become one manifest; then they go.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqcore.artefacts.codes import MANIFEST, SHARD, read_manifest
from vqcore.errors import DataError, RunError, listed
from vqcore.files import aside, write_text
from vqcore.protocols import Coded, Store
from vqcore.reading import read_json
from vqcore.tokens.store import refuse_other_store

FAILED = "failed.txt"
"""The files of a complete store that could not be tokenized: a key, a tab and the reason on each line."""
RESULTS = ("complete", "files", "rows", "failed", "extras", "shards")
"""What a manifest says when the store is complete."""
_NOT_COMPARED = (*RESULTS, "versions", "tokenizer", "modality")


class Shards:
    """The shards of a store in work. `manifest` is what is known before the first one; `store` writes them.

    `names` are those of the shards, or their number. Raises `RunError` if the folder holds other codes, or codes that
    another command would make, and for a name that the manifest has.
    """

    def __init__(self, folder: Path, store: Store, manifest: Mapping[str, Any], names: int | Sequence[str]):
        self.folder, self.store, self.known = folder, store, dict(manifest)
        self.names = numbered(names) if isinstance(names, int) else list(names)
        if (taken := Path(MANIFEST).stem) in self.names:
            raise RunError(f"{folder}: no shard can be called '{taken}', as the manifest is. Rename it.")
        self.made = not folder.exists()
        there = read_manifest(folder)
        if there is None:
            if folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir()):
                raise RunError(
                    f"{folder} is not empty, and no {MANIFEST} in it says which tokenizer made what it holds. Choose "
                    "another folder."
                )
            with contextlib.suppress(
                FileExistsError
            ):  # another process was faster: then its manifest is compared
                write_text(folder / MANIFEST, _text({**self.known, "complete": False}), new=True)
            there = read_manifest(folder) or {}
        self._compare(there)

    def _compare(self, there: Mapping[str, Any]) -> None:
        refuse_other_store(self.folder, there, self.known)
        keys = sorted((self.known.keys() | there.keys()) - set(_NOT_COMPARED))
        if differ := [key for key in keys if self.known.get(key) != there.get(key)]:
            found = listed(_difference(key, there.get(key), self.known.get(key)) for key in differ)
            raise RunError(f"{self.folder} holds other codes (different: {found}). Choose another folder.")
        self.versions = there.get("versions", {})

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """What is known of each shard that is done, by its name."""
        notes = {name: note for name in self.names if (note := self.note(name)) is not None}
        # Read after the notes: another process completes the manifest before it removes them.
        manifest = read_manifest(self.folder) or {}
        return {each["name"]: each for each in manifest.get("shards", ())} | notes

    def note(self, name: str) -> dict[str, Any] | None:
        """What is known of a shard that was done since the manifest was written; None if nothing is."""
        note = self.folder / f"{name}.json"
        with contextlib.suppress(DataError):  # none, or damaged: then the shard is not done
            if note.is_file():
                return read_json(note, DataError, SHARD)
        return None

    def write(self, name: str, rows: Sequence[Coded], facts: Mapping[str, Any]) -> None:
        """Write a shard and its note. `facts` are the numbers of files, and those that failed with their reasons."""
        files = self.store.write(self.folder, name, rows, self.known)
        note = {
            "name": name,
            "rows": len(rows),
            **facts,
            "extras": sorted({extra for row in rows for extra in row.extras}),
            "files": {each: sha256(self.folder / each) for each in files},
        }
        write_text(self.folder / f"{name}.json", _text(note))

    def forget(self, names: Sequence[str]) -> None:
        """Let these shards count as not done. What they hold stays until they are written again."""
        done = self.done
        kept = [done[name] for name in self.names if name in done and name not in names]
        base = self._base() if kept else self.known
        write_text(self.folder / MANIFEST, _text({**base, "complete": False, "shards": kept}))
        for name in self.names:
            (self.folder / f"{name}.json").unlink(missing_ok=True)

    def finish(self) -> dict[str, Any] | None:
        """If all shards are done, write the complete manifest and return it; else None. Several processes may do so."""
        done = self.done
        if any(name not in done for name in self.names):
            return None
        shards = [done[name] for name in self.names]
        failed = [line for shard in shards for line in shard["failed"]]
        manifest = {
            **self._base(),
            "complete": True,
            "files": sum(shard["of"] for shard in shards),
            "rows": sum(shard["rows"] for shard in shards),
            "failed": len(failed),
            "extras": sorted({extra for shard in shards for extra in shard["extras"]}),
            "shards": shards,
        }
        if failed:
            lines = "".join(f"{key}\t{' '.join(reason.split())}\n" for key, reason in failed)
            with aside(
                self.folder / FAILED
            ) as temporary:  # keys as the system spells them: --only reads them
                temporary.write_bytes(os.fsencode(lines))
        else:
            (self.folder / FAILED).unlink(missing_ok=True)
        write_text(self.folder / MANIFEST, _text(manifest))
        for name in self.names:
            (self.folder / f"{name}.json").unlink(missing_ok=True)
        return manifest

    def discard(self) -> None:
        """Remove all that this store wrote, and the folder if nothing else is in it."""
        for shard in self.done.values():
            for each in shard["files"]:
                (self.folder / each).unlink(missing_ok=True)
        for name in (MANIFEST, FAILED, *(f"{each}.json" for each in self.names)):
            (self.folder / name).unlink(missing_ok=True)
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _base(self) -> dict[str, Any]:
        """The manifest without results, as it was begun."""
        there = read_manifest(self.folder) or self.known
        return {key: value for key, value in there.items() if key not in RESULTS}


def numbered(count: int) -> list[str]:
    """Names for so many shards."""
    return [f"shard-{number:05d}" for number in range(count)]


def _difference(key: str, there: Any, here: Any) -> str:
    """How a value of two manifests differs, short where it is short."""
    shown = [str(value) for value in (there, here)]
    return key if max(map(len, shown)) > 40 else f"{key} {shown[0]} there, {shown[1]} here"


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"
