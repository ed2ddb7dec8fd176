"""Codes on disk: `<key>.npy` of shape (*grid, q) for every sample, and `tokens.json`, the manifest of the folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.data.npy import read_array
from vqcore.errors import DataError, RunError, cause, listed
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
    return codes.astype(np.int64)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file."""
    with aside(path) as temporary:
        np.save(temporary, array)


def claim(target: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder of codes. Raises `RunError` if the folder has a different manifest."""
    there = read_manifest(target)
    if there is not None:
        differ = sorted(k for k in manifest.keys() | there.keys() if manifest.get(k) != there.get(k))
        if differ:
            raise RunError(
                f"{target} holds other codes (different: {listed(differ)}). Choose another folder."
            )
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_text(target / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{target} cannot be written: {cause(error)}.") from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the codes in a folder or file; it may lie in a folder above. None if there is no manifest."""
    start = (folder if folder.is_dir() else folder.parent).resolve()
    path = next((place / MANIFEST for place in (start, *start.parents) if (place / MANIFEST).is_file()), None)
    if path is None:
        return None
    try:
        return read_json(path, DataError, Each(None))
    except DataError as error:
        raise DataError(f"{error} Remove the file, or tokenize again.") from error
