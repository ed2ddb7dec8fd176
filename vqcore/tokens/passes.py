"""Passes over a folder: files become codes, codes become files."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vqcore.console import ProgressLine
from vqcore.errors import ConfigError, DataError, RunError, cause, listed
from vqcore.files import aside
from vqcore.protocols import Batch, Modality, writer
from vqcore.rng import sample_generators
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.store import claim, code_dtype, read_codes, read_manifest, save_array

log = logging.getLogger(__name__)


@dataclass
class Done:
    """What a pass over a folder did."""

    written: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)


def parse_size(text: str | None, nominal: Sequence[int]) -> tuple[int, ...]:
    """`256` (every axis) or `256x192`; None is the nominal size. Raises `ConfigError`."""
    if text is None:
        return tuple(nominal)
    parts = text.split("x")
    if not all(re.fullmatch("[1-9][0-9]{0,11}", part) for part in parts) or len(parts) not in (
        1,
        len(nominal),
    ):
        several = f", or {len(nominal)} numbers joined by x" if len(nominal) > 1 else ""
        raise ConfigError(f"--size {text}: write one number{several}.")
    sides = [int(part) for part in parts]
    return tuple(sides * len(nominal) if len(sides) == 1 else sides)


def tokenize_folder(
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    *,
    size: tuple[int, ...],
    batch_size: int = 16,
    overwrite: bool = False,
) -> Done:
    """Write the codes of every file below `source` (or of one file) below `target`, under the same relative names.

    Files whose codes exist already are skipped, so that an interrupted pass can be resumed. Raises `DataError` if no
    file can be read, `ConfigError` for a size that the encoder cannot take, `RunError` if `target` holds the codes of
    another tokenizer.
    """
    if ".npy" in tokenizer.modality.suffixes:
        _refuse_overlap(source, target)
    files = _files(source, tokenizer.modality.suffixes)
    try:
        grid = tokenizer.grid(size)
    except ValueError as error:
        raise ConfigError(f"--size {'x'.join(map(str, size))}: {error}.") from error
    manifest = {
        "format": 1,
        "fingerprint": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "num_codebooks": tokenizer.num_codebooks,
        "grid": list(grid),
        "size": list(size),
        "dtype": str(code_dtype(tokenizer.codebook_size)),
    }
    if tokenizer.precision != "fp32":  # a folder holds no mixture of precisions
        manifest["precision"] = tokenizer.precision
    claim(target, manifest)
    done = Done()
    todo = []
    for path in files:
        key = path.relative_to(source if source.is_dir() else source.parent).with_suffix(".npy")
        if (target / key).exists() and not overwrite:
            done.skipped += 1
        else:
            todo.append((path, target / key))
    with ProgressLine("tokenize", len(todo), unit="file") as line:
        for group in _groups(todo, batch_size):
            _tokenize(tokenizer, group, size, done)
            line.update(done.written + len(done.failed))
    if done.failed and not done.written and not done.skipped:
        raise DataError(f"{source}: none of the {len(files)} files can be read. The first: {done.failed[0]}")
    return done


def decode_folder(
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    *,
    batch_size: int = 16,
    overwrite: bool = False,
    force: bool = False,
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
) -> Done:
    """Decode every `.npy` of codes below `source` (or one file) into `target`, as PNG, WAV or `.npy`.

    A decoder that draws noise draws it from `seed` and the name of the file; `sampling` are the options of the
    objective. Raises `DataError` for the codes of another tokenizer (unless `force`), and for arrays that cannot be
    codes.
    """
    _refuse_overlap(source, target)
    manifest = read_manifest(source)
    if manifest and manifest.get("fingerprint") != tokenizer.fingerprint and not force:
        raise DataError(
            f"{source}: these codes were made by another tokenizer: their fingerprint is "
            f"{str(manifest.get('fingerprint'))[:16]}, that of this tokenizer is {tokenizer.fingerprint[:16]}. "
            "Decode the codes with the tokenizer that made them, or add --force."
        )
    files = _files(source, (".npy",))
    size = tuple(manifest["size"]) if manifest else None
    done = Done()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{target} cannot be written: {cause(error)}.") from error
    with ProgressLine("decode", len(files), unit="file") as line:
        for group in _groups(files, batch_size):
            stems = [
                path.relative_to(source if source.is_dir() else source.parent).with_suffix("")
                for path in group
            ]
            own = writer(tokenizer.modality)
            kinds = (".png", ".npy", own.written if own else ".npy")
            fresh = [(p, s) for p, s in zip(group, stems) if overwrite or not _written(target, s, kinds)]
            done.skipped += len(group) - len(fresh)
            _decode(tokenizer, fresh, target, size, done, seed, sampling or {})
            line.update(done.written + done.skipped)
    return done


def _tokenize(
    tokenizer: Tokenizer, group: list[tuple[Path, Path]], size: tuple[int, ...], done: Done
) -> None:
    inputs: list[torch.Tensor] = []
    targets: list[Path] = []
    for path, target in group:
        try:
            inputs.append(tokenizer.read_raw(path, size))
            targets.append(target)
        except (DataError, OSError) as error:
            log.warning("skipped: %s", error)
            done.failed.append(str(error))
    if not inputs:
        return
    batch = tokenizer.prepare(Batch(torch.cat(inputs), tuple(map(str, targets))))
    codes = tokenizer.encode(batch.x).cpu().numpy()
    codes = codes.astype(code_dtype(tokenizer.codebook_size))
    for one, target in zip(codes, targets):
        save_array(target, one)
        done.written += 1


def _decode(
    tokenizer: Tokenizer,
    group: list[tuple[Path, Path]],
    target: Path,
    size: tuple[int, ...] | None,
    done: Done,
    seed: int,
    sampling: Mapping[str, Any],
) -> None:
    by_shape: dict[tuple[int, ...], list[tuple[np.ndarray, Path]]] = {}
    for path, stem in group:
        codes = read_codes(path, tokenizer)
        by_shape.setdefault(codes.shape, []).append((codes, stem))
    for members in by_shape.values():
        stacked = torch.from_numpy(np.stack([each for each, _ in members]))
        try:
            rng = sample_generators([stem.as_posix() for _, stem in members], seed, "decode")
            x_hat = tokenizer.decode(stacked, size=size, rng=rng, **sampling)
        except ValueError as error:
            raise DataError(f"{members[0][1]}: {error}.") from error
        for one, (_, stem) in zip(x_hat, members):
            _save_shown(tokenizer.modality, target / stem, tokenizer.show(one))
            done.written += 1


def _save_shown(modality: Modality, stem: Path, shown: Any) -> None:
    """Write what `show` gave: as the modality writes it, if it does, else a picture as PNG and the rest as `.npy`."""
    own = writer(modality)
    if own is None and not isinstance(shown, Image.Image):
        save_array(stem.with_name(f"{stem.name}.npy"), np.asarray(shown))
        return
    with aside(stem.with_name(f"{stem.name}{own.written if own else '.png'}")) as temporary:
        if own:
            own.write(shown, temporary)
        else:
            shown.save(temporary)


def _written(target: Path, stem: Path, suffixes: Sequence[str]) -> bool:
    return any((target / stem.parent / f"{stem.name}{suffix}").exists() for suffix in suffixes)


def _files(source: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files below a folder that end in one of `suffixes`, sorted, without hidden files and folders."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder.")
    files = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    ]
    if not files:
        raise DataError(f"{source}: no file in this folder ends in {listed(suffixes)}.")
    same: dict[Path, Path] = {}
    for path in files:
        stem = path.with_suffix("")
        if stem in same:
            raise DataError(
                f"{same[stem]} and {path} would both be written as {stem.name}.npy; rename one of them."
            )
        same[stem] = path
    return files


def _refuse_overlap(source: Path, target: Path) -> None:
    """Raise `RunError` if a pass could overwrite the files that it reads."""
    here = (source if source.is_dir() else source.parent).resolve()
    there = target.resolve()
    nested = source.is_dir() and (here in there.parents or there in here.parents)
    if here == there or nested:
        raise RunError(
            f"{target} and {source} overlap, so that files could be overwritten. Choose another output folder."
        )


def _groups(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
