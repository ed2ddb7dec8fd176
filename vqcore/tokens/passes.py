"""Passes over a folder: files become codes, codes become files."""

import contextlib
import errno
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vqcore.artefacts.codes import FORMAT, MANIFEST, SUFFIXES, Codes, other_maker, read_codes, read_manifest
from vqcore.artefacts.resolve import with_prefix
from vqcore.artefacts.stored import open_named, store_of
from vqcore.console import ProgressLine
from vqcore.data.listing import Listing, suffix_length
from vqcore.data.windows import Cover, Whole, cover, named
from vqcore.errors import ConfigError, DataError, RunError, cause, listed
from vqcore.files import aside, local
from vqcore.protocols import Modality, RecordCodes, is_denoiser, writer
from vqcore.rng import sample_generators
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.flow import Done, File, Item, through
from vqcore.tokens.inputs import source_of
from vqcore.tokens.parts import Take, inputs
from vqcore.tokens.precision import Encoder
from vqcore.tokens.store import Claims, code_dtype, save_array, save_codes

log = logging.getLogger(__name__)


def parse_size(text: str | None, nominal: Sequence[int]) -> tuple[int, ...]:
    """`256` (every axis) or `256x192`; None is the nominal size. Raises `ConfigError`."""
    if text is None:
        return tuple(nominal)
    sides = _sides("--size", text, len(nominal))
    return sides * len(nominal) if len(sides) == 1 else sides


def parse_stride(text: str | None, axes: int) -> tuple[int, ...] | None:
    """`256` (every axis) or `256x192`; None is no stride. Raises `ConfigError`."""
    return None if text is None else _sides("--stride", text, axes)


def _sides(flag: str, text: str, axes: int) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(re.fullmatch("[1-9][0-9]{0,11}", part) for part in parts) or len(parts) not in (1, axes):
        several = f", or {axes} numbers joined by x" if axes > 1 else ""
        raise ConfigError(f"{flag} {text}: write one number{several}.")
    return tuple(int(part) for part in parts)


def tokenize_folder(
    tokenizer: Tokenizer,
    source: str | Path,
    target: Path,
    *,
    size: tuple[int, ...],
    batch_size: int = 16,
    overwrite: bool = False,
    stride: tuple[int, ...] | None = None,
    tiles: bool = False,
    workers: int = 1,
) -> Done:
    """Write the codes of every sample of a source (`source_of`) below `target`, under the same relative names.

    A record of a modality with windows is covered by them, `stride` positions from one to the next; `tiles` covers a
    sample that would be cropped. An `.npy` file of n samples gives one file of codes. Files whose codes exist already
    are skipped, so that an interrupted pass can be resumed. A file that cannot be read
    is named in the result and costs itself alone. Raises `DataError` if no file can be read, `ConfigError` for a size
    that the encoder cannot take, `RunError` if `target` holds the codes of another tokenizer or takes no more data.
    """
    refuse_file(target)
    covering = cover(tokenizer.modality, size, stride, tiles=tiles)
    read = source_of(source, tokenizer)
    if read.folder is not None and ".npy" in tokenizer.modality.suffixes:
        refuse_overlap(read.folder, target)
    manifest = manifest_of(tokenizer, size, covering)
    done = Done(left_out=read.left_out)
    with Claims(manifest) as claims, ProgressLine("tokenize", len(read), unit="file") as line:
        todo = []
        claims.check(target)
        for place in range(len(read)):
            key = read.key(place)
            there = None if overwrite else _written(target, key, SUFFIXES)
            claims.check((target / key).parent, there)
            done.skipped += there is not None
            if there is None:
                todo.append(place)

        parts = inputs(read, todo, [Take(tokenizer, size, covering, done)], workers, batch_size)
        items, encoder = (item for _, item in parts), Encoder(tokenizer)
        for file, finish in encoder.settled_first(through(items, encoder, batch_size, done)):
            with writing(file, done):
                claims.write(target)
                claims.write((target / file.key).parent)
                save_codes(target, file.key, finish().codes())
                done.written += 1
            line.update(done.count)
        if done.failed or done.skipped:  # those at the end, too
            line.update(done.count)
    if done.failed and not done.written and not done.skipped:
        raise DataError(f"{source}: none of the {len(read)} files can be read. The first: {done.failed[0]}")
    return done


def manifest_of(tokenizer: Tokenizer, size: tuple[int, ...], covering: Cover | None) -> dict[str, Any]:
    """What a manifest says of a tokenizer and a size. Raises `ConfigError` for a size that the encoder cannot take."""
    try:
        grid = tokenizer.grid(size)
    except ValueError as error:
        raise ConfigError(f"--size {'x'.join(map(str, size))}: {error}.") from error
    manifest = {
        "format": FORMAT,
        "fingerprint": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "num_codebooks": tokenizer.num_codebooks,
        "grid": list(grid),
        "size": list(size),
        "dtype": str(code_dtype(tokenizer.codebook_size)),
        "precision": tokenizer.code_precision,
    }
    if covering is not None:
        manifest["stride"] = list(covering.stride)
    return manifest


def decode_folder(
    tokenizer: Tokenizer,
    source: str | Path,
    target: Path,
    *,
    size: tuple[int, ...] | None = None,
    batch_size: int = 16,
    overwrite: bool = False,
    force: bool = False,
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
) -> Done:
    """Decode a store, or every `.npy` of codes below `source` (or one file), into `target`, as PNG, WAV or `.npy`.

    `LAYOUT:FOLDER` are codes of another system (`open_named`); where nothing says so, they were made at `size`. Of
    other codes a denoiser makes samples of this size (default: the size at which they were made).

    A decoder that draws noise draws it from `seed` and the name of the file; `sampling` are the options of the
    objective. A file that cannot be decoded is named in the result and costs itself alone. Every folder is measured by
    its own manifest; codes without one are decoded with a warning (unless `force`). Raises `DataError` for the codes of
    another tokenizer (unless `force`), and if no file can be decoded; `RunError` if `target` takes no more data.
    """
    refuse_file(target)
    held = _held_by(tokenizer, source, size, force)
    refuse_overlap(held.place, target)
    done, made = Done(left_out=held.left_out), None if with_prefix(str(source)) else size
    own = writer(tokenizer.modality)
    kinds = (".png", ".npy", own.written if own else ".npy")
    fresh = [each for each in held.files if overwrite or not _written(target, each.key, kinds)]
    done.skipped = len(held.files) - len(fresh)

    def decoded(items: Sequence[Item]) -> Sequence[Any]:
        rng = sample_generators([item.given[1] for item in items], seed, "decode")
        codes = np.stack([item.given[0] for item in items])
        return list(tokenizer.decode(codes, size=items[0].alike[1], rng=rng, **(sampling or {})))

    with ProgressLine("decode", len(held.files), unit="file") as line:
        for file, finish in through(_codes(tokenizer, fresh, done, made), decoded, batch_size, done):
            with writing(file, done):
                finish(target)
                done.written += 1
            line.update(done.count)
        if done.failed or done.skipped:  # those at the end, too
            line.update(done.count)
    if done.failed and not done.written and not done.skipped:
        raise DataError(
            f"{source}: none of the {len(held.files)} files can be decoded. The first: {done.failed[0]}"
        )
    return done


@dataclass(frozen=True)
class _Coded:
    """The codes that were made of one file: where they lie, their key, and how to read them."""

    path: Path
    key: str
    manifest: Mapping[str, Any] | None
    read: Callable[[], Codes]


@dataclass(frozen=True)
class _Held:
    """What is to be decoded, where it lies, and how many entries are no codes, by kind."""

    files: Sequence[_Coded]
    place: Path
    left_out: Mapping[str, int] = field(default_factory=dict)


def _held_by(tokenizer: Tokenizer, name: str | Path, size: tuple[int, ...] | None, force: bool) -> _Held:
    """The codes of a store, or in the files below a folder. Raises `DataError` for those of another tokenizer."""
    source = local(name)
    if source.is_file() and source.suffix not in SUFFIXES and store_of(source.parent):
        raise DataError(f"{source} is a part of a store. Give the folder of the store: {source.parent}.")
    prefixed = with_prefix(str(name))
    if size is not None and prefixed is None:
        _check_made(tokenizer.decoder, size)
    if prefixed is not None or store_of(source):
        says = manifest_of(tokenizer, size or tokenizer.cfg.size, None) if prefixed else None
        store = open_named(str(name), says)
        _check_makers(tokenizer, store.folder, {store.folder: read_manifest(store.folder)}, force)
        found = [
            _Coded(store.folder / key, key, store.manifest, partial(store.record, key))
            for key in store.places
        ]
        return _Held(found, store.folder)
    files, left_out = files_of(source, SUFFIXES, "decode")
    manifests = {folder: read_manifest(folder) for folder in {path.parent for path, _ in files}}
    _check_makers(tokenizer, source, manifests, force)
    shape = tokenizer.code_shape
    return _Held(
        [_Coded(path, key, manifests[path.parent], partial(read_codes, path, shape)) for path, key in files],
        source,
        left_out,
    )


def _check_made(decoder: Any, size: tuple[int, ...]) -> None:
    """Raise `ConfigError` for samples of a size of their own, unless a denoiser can make them."""
    if not is_denoiser(decoder):
        raise ConfigError(
            "--size is for diffusion decoders, and for codes of another system, LAYOUT:FOLDER. This decoder makes "
            "samples of the size at which the codes were made."
        )
    try:
        decoder.target_shape(size)
    except ValueError as error:
        raise ConfigError(f"--size: {error}.") from error


def _check_makers(
    tokenizer: Tokenizer, source: Path, manifests: Mapping[Path, Mapping[str, Any] | None], force: bool
) -> None:
    """Raise `DataError` if a manifest names another tokenizer; warn of folders without one. Silent with `force`."""
    if force:
        return
    for folder in sorted(manifests):
        if maker := other_maker(manifests[folder], tokenizer.fingerprint):
            raise DataError(
                f"{folder}: {maker}. Decode the codes with the tokenizer that made them, or add --force."
            )
    if without := [str(folder) for folder in sorted(manifests) if manifests[folder] is None]:
        log.warning(
            "warning: %s: no %s beside the codes says which tokenizer made them (%s). They are decoded as codes of "
            "this one; --force leaves this line out.",
            source,
            MANIFEST,
            listed(without, 3),
        )


def _codes(
    tokenizer: Tokenizer, coded: Iterable[_Coded], done: Done, made: tuple[int, ...] | None
) -> Iterator[Item]:
    """The codes of all files, as a decoder takes them; `given` also has a name, from which noise is drawn.

    `made` is the size of the decoded samples, by default that at which the codes were made.
    """
    for each in coded:
        path, key, manifest = each.path, each.key, each.manifest
        try:
            codes = each.read()
        except DataError as error:
            done.fail(File(str(path), key), error)
            continue
        several = isinstance(codes, list) or (
            isinstance(codes, np.ndarray) and codes.ndim == tokenizer.code_shape.axes + 2
        )
        samples: Sequence[Any] = codes if several else [codes]  # type: ignore[assignment]
        first = samples[0].codes[0] if isinstance(samples[0], RecordCodes) else samples[0]
        if manifest and list(first.shape[:-1]) != manifest["grid"]:
            grids = f"its grid is {list(first.shape[:-1])}, but {MANIFEST} says {manifest['grid']}."
            done.fail(File(str(path), key), DataError(f"{path}: {grids}"))
            continue
        file = File(str(path), key)
        shown: list[Any] = []
        if made is not None and isinstance(samples[0], RecordCodes):
            windows = "the windows of a record have a size of their own: leave --size out."
            done.fail(File(str(path), key), DataError(f"{path}: {windows}"))
            continue
        size = made or (tuple(manifest["size"]) if manifest else None)
        for place, sample in enumerate(samples):
            name = f"{key}/{place}" if several else key
            parts = list(_parts(tokenizer, sample, size, name, shown.append))
            finish = partial(_save_decoded, tokenizer.modality, key, shown, several)
            for part, (row, each_size, label, take) in enumerate(parts):
                is_last = place == len(samples) - 1 and part == len(parts) - 1
                alike = row.shape, each_size
                yield Item(file, alike, (row, label), take, finish if is_last else None)


def _parts(
    tokenizer: Tokenizer,
    sample: Any,
    size: tuple[int, ...] | None,
    name: str,
    done: Callable[[Any], None],
) -> Iterator[tuple[np.ndarray, tuple[int, ...] | None, str, Callable[[Tensor], None]]]:
    """The parts of one sample: codes, size, a name, and what takes the decoded part; `done` gets the whole, shown."""
    if not isinstance(sample, RecordCodes):
        yield sample, size, name, lambda x: done(tokenizer.show(x))
        return
    whole, count, starts = Whole(sample.extent), len(sample.codes), sample.start.tolist()

    def take(place: int, x: Tensor) -> None:
        whole.add(x, starts[place])
        if place == count - 1:
            done(tokenizer.show(whole.mean))

    for place, (row, start) in enumerate(zip(sample.codes, starts)):
        yield row, sample.size, f"{name}#{named(start)}", partial(take, place)


def _save_decoded(modality: Modality, key: str, shown: Sequence[Any], several: bool, target: Path) -> None:
    """Write one sample as its modality writes it, and n samples as the array that they were."""
    stem = target / key
    if several:
        save_array(stem.with_name(f"{stem.name}.npy"), np.stack([np.asarray(one) for one in shown]))
    else:
        _save_shown(modality, stem, shown[0])


@contextlib.contextmanager
def writing(file: File, done: Done) -> Iterator[None]:
    """A name that is too long costs one file; every other refusal of the system ends the pass with one line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            done.fail(file, DataError(f"{file.where}: its output cannot be written: {cause(error)}"))
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


def _written(target: Path, key: str, suffixes: Sequence[str]) -> Path | None:
    """The output of a file that is there already."""
    return next((path for suffix in suffixes if (path := target / f"{key}{suffix}").is_file()), None)


def files_of(
    source: Path, suffixes: Sequence[str], verb: str
) -> tuple[list[tuple[Path, str]], Mapping[str, int]]:
    """The files below a folder with their keys, or one file; and what was left out."""
    if source.is_file():
        cut = suffix_length(source.name, suffixes) or len(source.suffix)
        return [(source, source.name[: len(source.name) - cut])], {}
    found = Listing(str(source), suffixes, verb)
    return [(found.path(index), found.key(index)) for index in range(len(found))], found.left_out


def refuse_file(target: Path) -> None:
    """Raise `RunError` if there is a file where a folder should be."""
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file, not a folder. Give the folder for the output.")


def refuse_overlap(source: Path, target: Path) -> None:
    """Raise `RunError` if a pass could overwrite the files that it reads."""
    here = (source if source.is_dir() else source.parent).resolve()
    there = target.resolve()
    nested = source.is_dir() and (here in there.parents or there in here.parents)
    if here == there or nested:
        raise RunError(
            f"{target} and {source} overlap, so that files could be overwritten. Choose another output folder."
        )
