"""Codes on disk: `<key>.npy` of shape (*grid, q) for every sample, and `tokens.json` in every folder that holds codes.

The manifest says which tokenizer made the codes of its own folder, at which size.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.data.npy import read_array
from vqcore.errors import DataError, RunError, listed
from vqcore.files import aside, write_text
from vqcore.reading import Each, read_json
from vqcore.tokenizer import Tokenizer

MANIFEST = "tokens.json"


def code_dtype(codebook_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds every code."""
    return np.min_scalar_type(codebook_size - 1)


def read_codes(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The codes in a file as int64 `(*grid, q)`. Raises `DataError` for what cannot be codes of this tokenizer."""
    codes = read_array(path, str(path))
    rank = len(tokenizer.grid())
    if codes.dtype.kind not in "iu" or codes.ndim != rank + 1 or codes.shape[-1] != tokenizer.num_codebooks:
        raise DataError(
            f"{path}: codes of this tokenizer are integers with {rank} grid axes and a last axis of "
            f"{tokenizer.num_codebooks}, not {codes.dtype} of shape {list(codes.shape)}."
        )
    outside = codes[(codes < 0) | (codes >= tokenizer.codebook_size)]
    if outside.size:
        raise DataError(
            f"{path}: code {outside[0]} is out of range: codes lie in [0, {tokenizer.codebook_size})."
        )
    return codes.astype(np.int64)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file."""
    with aside(path) as temporary:
        np.save(temporary, array)


class Claims:
    """The manifest of a pass, which stands in every folder that holds codes: a folder that is moved keeps it.

    As a context, removes the manifests and folders that it made and that hold no codes in the end.
    """

    def __init__(self, manifest: Mapping[str, Any]):
        self.manifest = dict(manifest)
        self.known: set[Path] = set()
        self._made: list[Path] = []

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *error: object) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                if not any(path.suffix == ".npy" and path.is_file() for path in folder.iterdir()):
                    (folder / MANIFEST).unlink(missing_ok=True)
                if not any(folder.iterdir()):
                    folder.rmdir()

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
            self._made += [folder] if folder not in self._made else []
            with contextlib.suppress(FileExistsError):
                write_text(folder / MANIFEST, json.dumps(self.manifest, indent=2) + "\n", new=True)
        self.check(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the codes in a folder; None if the folder has none. Manifests of other folders do not count.

    Raises `DataError` if the file is damaged, or is not a manifest of codes.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = read_json(path, DataError, Each(None))
    except DataError as error:
        raise DataError(f"{error} Remove the file, or tokenize again.") from error
    if not isinstance(found.get("fingerprint"), str) or not _has_sizes(found):
        raise DataError(
            f"{path} is not a manifest that vqcore tokenize wrote: it lacks fingerprint, grid or size. Move the file "
            "away, or choose another folder."
        )
    return found


def _has_sizes(manifest: Mapping[str, Any]) -> bool:
    return all(
        isinstance(sides := manifest.get(key), list)
        and sides
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
        for key in ("grid", "size")
    )
