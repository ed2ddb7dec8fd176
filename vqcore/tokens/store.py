"""Writes codes, in the files that `vqcore.artefacts.codes` describes, and the manifest of every folder that holds them.

The manifest says which tokenizer made the codes of its own folder, at which size.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.artefacts.codes import MANIFEST, SUFFIXES, Codes, read_manifest
from vqcore.errors import RunError, listed
from vqcore.files import aside, write_text
from vqcore.protocols import RecordCodes


def code_dtype(codebook_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds every code."""
    return np.min_scalar_type(codebook_size - 1)


def refuse_other_store(folder: Path, there: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise `RunError` if a manifest is that of another store."""
    one, other = there.get("store", "folder"), mine.get("store", "folder")
    if one != other:
        raise RunError(
            f"{folder} holds codes as --store {one}, not {other}. Add --store {one}, or choose another folder."
        )


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file."""
    with aside(path) as temporary:
        np.save(temporary, array)


def save_codes(target: Path, key: str, codes: Codes) -> Path:
    """Write what a file holds below a folder: `.npy`, or `.npz` with the places of windows. Returns the path.

    A file has codes of one kind: those of the other kind, from a pass with other settings, go.
    """
    plain, places = (target / f"{key}{suffix}" for suffix in SUFFIXES)
    if isinstance(codes, np.ndarray):
        save_array(plain, codes)
        places.unlink(missing_ok=True)
        return plain
    many = codes if isinstance(codes, list) else [codes]
    rows: list[np.ndarray] = [each.codes for each in many]
    stacked = np.stack(rows) if isinstance(codes, list) else rows[0]
    first: RecordCodes = many[0]
    with aside(places) as temporary:
        np.savez(temporary, codes=stacked, start=first.start, extent=first.extent, size=first.size)
    plain.unlink(missing_ok=True)
    return places


class Claims:
    """The manifest of a pass, which stands in every folder that holds codes: a folder that is moved keeps it.

    As a context, removes the manifests and folders that it made and below which no codes lie in the end: no file with
    one of `suffixes`; None stands for any file other than a manifest.
    """

    def __init__(self, manifest: Mapping[str, Any], suffixes: Sequence[str] | None = SUFFIXES):
        self.manifest, self.suffixes = dict(manifest), suffixes
        self.known: set[Path] = set()
        self._made: list[Path] = []
        self._written: list[Path] = []

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *error: object) -> None:
        for folder in reversed(self._written):
            with contextlib.suppress(OSError):
                if not any(self._is_codes(path) for path in folder.rglob("*")):
                    (folder / MANIFEST).unlink(missing_ok=True)
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()

    def _is_codes(self, path: Path) -> bool:
        known = path.name != MANIFEST if self.suffixes is None else path.suffix in self.suffixes
        return known and path.is_file()

    def check(self, folder: Path, codes: Path | None = None) -> None:
        """Raise `RunError` if a folder has another manifest, or if it has `codes`, a file, and no manifest."""
        if folder in self.known:
            return
        there = read_manifest(folder)
        if there is None:
            if codes is not None:
                raise RunError(
                    f"{codes} exists already, but no {MANIFEST} beside it says which tokenizer made it. Choose another "
                    "folder, or add --overwrite."
                )
            return
        mine = self.manifest
        refuse_other_store(folder, there, mine)
        if differ := sorted(k for k in mine.keys() | there.keys() if mine.get(k) != there.get(k)):
            raise RunError(
                f"{folder} holds other codes (different: {listed(differ)}). Choose another folder."
            )
        self.known.add(folder)

    def write(self, folder: Path) -> None:
        """Write the manifest, unless it is there. Raises `RunError` if another process has written another one."""
        if folder in self.known:
            return
        # Folders that are new; they go again, the deepest first, if nothing comes of them.
        self._made += reversed([each for each in (folder, *folder.parents) if not each.exists()])
        if not (folder / MANIFEST).exists():
            with contextlib.suppress(FileExistsError):
                write_text(folder / MANIFEST, json.dumps(self.manifest, indent=2) + "\n", new=True)
                self._written.append(folder)
        self.check(folder)
