"""Passes over a folder: files become codes, codes become files."""

import contextlib
import errno
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from vqcore.console import ProgressLine
from vqcore.data.listing import Listing, counted, suffix_length
from vqcore.errors import ConfigError, DataError, RunError, cause, listed
from vqcore.files import aside
from vqcore.protocols import Batch, Modality, writer
from vqcore.rng import sample_generators
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.store import MANIFEST, Claims, code_dtype, read_codes, read_manifest, save_array

log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass
class Done:
    """What a pass over a folder did. `left_out`: how many entries are no samples, by kind."""

    written: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    left_out: Mapping[str, int] = field(default_factory=dict)

    def fail(self, path: Path, error: Exception) -> None:
        """Note, and say, that a file cannot be used."""
        text = str(error)
        self.failed.append(text if str(path) in text else f"{path}: {text}")
        log.warning("skipped: %s", self.failed[-1])

    @property
    def said(self) -> str:
        """One line for people."""
        rest = f"\nleft out: {counted(self.left_out)}" if self.left_out else ""
        return f"{self.written} written, {self.skipped} existed already, {len(self.failed)} unreadable{rest}"


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

    Files whose codes exist already are skipped, so that an interrupted pass can be resumed. A file that cannot be read
    is named in the result and costs itself alone. Raises `DataError` if no file can be read, `ConfigError` for a size
    that the encoder cannot take, `RunError` if `target` holds the codes of another tokenizer or takes no more data.
    """
    _refuse_file(target)
    if ".npy" in tokenizer.modality.suffixes:
        _refuse_overlap(source, target)
    files, left_out = _files(source, tokenizer.modality.suffixes, "tokenize")
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
    done = Done(left_out=left_out)
    with Claims(manifest) as claims, ProgressLine("tokenize", len(files), unit="file") as line:
        todo = []
        claims.check(target)
        for path, key in files:
            codes = target / f"{key}.npy"
            there = codes.is_file() and not overwrite
            claims.check(codes.parent, codes if there else None)
            done.skipped += there
            if not there:
                todo.append((path, codes))
        for group in _groups(todo, batch_size):
            _tokenize(tokenizer, group, size, done, (claims, target))
            line.update(done.written + done.skipped + len(done.failed))
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
    objective. A file that cannot be decoded is named in the result and costs itself alone. Every folder is measured by
    its own manifest; codes without one are decoded with a warning (unless `force`). Raises `DataError` for the codes of
    another tokenizer (unless `force`), and if no file can be decoded; `RunError` if `target` takes no more data.
    """
    _refuse_file(target)
    _refuse_overlap(source, target)
    files, left_out = _files(source, (".npy",), "decode")
    manifests = {folder: read_manifest(folder) for folder in {path.parent for path, _ in files}}
    _check_makers(tokenizer, source, manifests, force)
    done = Done(left_out=left_out)
    own = writer(tokenizer.modality)
    kinds = (".png", ".npy", own.written if own else ".npy")
    with ProgressLine("decode", len(files), unit="file") as line:
        for group in _groups(files, batch_size):
            fresh = [(path, key) for path, key in group if overwrite or not _written(target, key, kinds)]
            done.skipped += len(group) - len(fresh)
            _decode(tokenizer, fresh, target, manifests, done, seed, sampling or {})
            line.update(done.written + done.skipped + len(done.failed))
    if done.failed and not done.written and not done.skipped:
        raise DataError(
            f"{source}: none of the {len(files)} files can be decoded. The first: {done.failed[0]}"
        )
    return done


def _check_makers(
    tokenizer: Tokenizer, source: Path, manifests: Mapping[Path, Mapping[str, Any] | None], force: bool
) -> None:
    """Raise `DataError` if a manifest names another tokenizer; warn of folders without one. Silent with `force`."""
    if force:
        return
    for folder in sorted(manifests):
        maker = (manifests[folder] or {}).get("fingerprint", tokenizer.fingerprint)
        if maker != tokenizer.fingerprint:
            raise DataError(
                f"{folder}: these codes were made by another tokenizer: their fingerprint is {str(maker)[:16]}, that "
                f"of this tokenizer is {tokenizer.fingerprint[:16]}. Decode the codes with the tokenizer that made "
                "them, or add --force."
            )
    if without := [str(folder) for folder in sorted(manifests) if manifests[folder] is None]:
        log.warning(
            "warning: %s: no %s beside the codes says which tokenizer made them (%s). They are decoded as codes of "
            "this one; --force leaves this line out.",
            source,
            MANIFEST,
            listed(without, 3),
        )


def _tokenize(
    tokenizer: Tokenizer,
    group: list[tuple[Path, Path]],
    size: tuple[int, ...],
    done: Done,
    claimed: tuple[Claims, Path],
) -> None:
    inputs = []
    for path, codes in group:
        try:
            inputs.append((path, (tokenizer.read_raw(path, size), codes)))
        except (DataError, OSError) as error:
            done.fail(path, error)

    def encoded(members: Sequence[tuple[torch.Tensor, Path]]) -> list[np.ndarray]:
        raw = torch.cat([x for x, _ in members])
        batch = tokenizer.prepare(Batch(raw, tuple(str(codes) for _, codes in members)))
        codes = tokenizer.encode(batch.x).cpu().numpy()
        return list(codes.astype(code_dtype(tokenizer.codebook_size)))

    claims, target = claimed
    for path, (_, codes), made in _apart(encoded, inputs, done):
        with _writing(path, done):
            claims.write(target)
            claims.write(codes.parent)
            save_array(codes, made)
            done.written += 1


def _decode(
    tokenizer: Tokenizer,
    group: list[tuple[Path, str]],
    target: Path,
    manifests: Mapping[Path, Mapping[str, Any] | None],
    done: Done,
    seed: int,
    sampling: Mapping[str, Any],
) -> None:
    alike: dict[Any, list[tuple[Path, tuple[np.ndarray, str]]]] = {}
    for path, key in group:
        manifest = manifests[path.parent]
        try:
            codes = read_codes(path, tokenizer)
            if manifest and list(codes.shape[:-1]) != manifest["grid"]:
                raise DataError(
                    f"{path}: its grid is {list(codes.shape[:-1])}, but {MANIFEST} says {manifest['grid']}."
                )
        except DataError as error:
            done.fail(path, error)
            continue
        size = tuple(manifest["size"]) if manifest else None
        alike.setdefault((codes.shape, size), []).append((path, (codes, key)))
    for (_, size), members in alike.items():

        def decoded(
            members: Sequence[tuple[np.ndarray, str]], size: tuple[int, ...] | None = size
        ) -> Sequence[Any]:
            rng = sample_generators([key for _, key in members], seed, "decode")
            x_hat = tokenizer.decode(
                np.stack([codes for codes, _ in members]), size=size, rng=rng, **sampling
            )
            return [tokenizer.show(one) for one in x_hat]

        for path, (_, key), shown in _apart(decoded, members, done):
            with _writing(path, done):
                _save_shown(tokenizer.modality, target / key, shown)
                done.written += 1


def _apart(
    work: Callable[[Sequence[Item]], Sequence[Any]], members: list[tuple[Path, Item]], done: Done
) -> Iterator[tuple[Path, Item, Any]]:
    """Do a batch; if it is refused, one by one, so that a bad file is named and costs itself alone."""
    if not members:
        return
    try:
        made = work([item for _, item in members])
    except (ValueError, DataError) as error:
        if len(members) == 1:
            done.fail(members[0][0], error)
        else:
            for one in members:
                yield from _apart(work, [one], done)
        return
    for (path, item), result in zip(members, made, strict=True):
        yield path, item, result


@contextlib.contextmanager
def _writing(path: Path, done: Done) -> Iterator[None]:
    """A name that is too long costs one file; every other refusal of the system ends the pass with one line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            done.fail(path, DataError(f"{path}: its output cannot be written: {cause(error)}"))
            return
        raise RunError(
            f"{error.filename} cannot be written: {cause(error)}. {done.written} files were written before it; the "
            "same command goes on from there."
        ) from error


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


def _written(target: Path, key: str, suffixes: Sequence[str]) -> bool:
    return any((target / f"{key}{suffix}").is_file() for suffix in suffixes)


def _files(
    source: Path, suffixes: Sequence[str], verb: str
) -> tuple[list[tuple[Path, str]], Mapping[str, int]]:
    """The files below a folder with their keys, or one file; and what was left out."""
    if source.is_file():
        cut = suffix_length(source.name, suffixes) or len(source.suffix)
        return [(source, source.name[: len(source.name) - cut])], {}
    found = Listing(str(source), suffixes, verb)
    return [(found.path(index), found.key(index)) for index in range(len(found))], found.left_out


def _refuse_file(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file, not a folder. Give the folder for the output.")


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
