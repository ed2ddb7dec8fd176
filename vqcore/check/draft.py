"""Looks at somebody's files and drafts a config for them: what can be seen is settled, what cannot is asked.

The recipe is that of `cfgs/quickstart.yaml`: patches, convolutions on the grid, no attention, a codebook that starts
from samples. It learns in minutes on two cores.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.check.values import fills, propose_scale, summarise
from vqcore.compose.build import component
from vqcore.compose.describe import inline
from vqcore.data.listing import Listing, counted, suffix_length
from vqcore.data.parquet import SUFFIX, sample_columns
from vqcore.data.readers import CORE, BySuffix
from vqcore.data.split import held_out
from vqcore.errors import ConfigError, DataError, VqcoreError, did_you_mean, listed, plural
from vqcore.protocols import Modality, SampleReader, named_parts
from vqcore.registry import registry

LOOKED_AT = 48
"""Files that are read."""
MOST_CHANNELS = 64
"""An axis that is longer holds no channels, as long as nobody says so."""
MOST_LABELS = 64
"""Whole numbers from 0 to less than this may be classes."""
LEAST = 8
"""Fewer samples can neither be trained on nor held out."""
ANSWERS = ("modality", "reader", "kind", "vector", "channels_last", "nodata")
"""What may be said beforehand: name=value."""
_SIDES = (1024, 128, 32)
"""The largest side of a sample with 1, 2 and 3 axes."""
_SECONDS = 1.3e-4
"""Seconds of two cores for one token of one training step."""
_TRAIN, _HELD = ("train", "training"), ("eval", "val", "valid", "validation", "heldout", "test", "dev")

Ask = Callable[[str, Sequence[str], str], tuple[str, bool]]
"""Question, possible answers and the likely answer -> the answer, and whether a person gave it."""


@dataclass
class Draft:
    """The lines of `data.modality`, of `data` and of the whole, and what is said about the files."""

    modality: dict[str, Any]
    size: tuple[int, ...]
    patch: tuple[int, ...]
    values: int
    """Numbers in one patch."""
    files: Listing
    notes: dict[str, str] = field(default_factory=dict)
    """The reason of a setting, by name."""
    data: dict[str, Any] = field(default_factory=dict)
    vector: bool = False
    held: int = 0
    """Files that are held out by a share."""
    windows: float = 1.0
    """Windows that a file has on average."""
    extents: Sequence[tuple[int, ...]] = ()
    """The sizes of the files that were read."""

    @property
    def samples(self) -> int:
        """How many files there are."""
        return len(self.files)

    @property
    def parts(self) -> int:
        """About how many different samples training may draw."""
        return round(self.samples * self.windows)


def draft(
    folder: Path, answers: dict[str, Any], ask: Ask, first: Callable[[Path], Draft | None] = lambda path: None
) -> Draft:
    """Look at a folder. Raises `DataError` if nothing in it can be read, and `ConfigError` for an unknown answer.

    `first` may know what the files are; where it gives None, their suffixes and values decide.
    """
    for name in answers:
        if name not in ANSWERS:
            hint = did_you_mean(name, ANSWERS) or f" Answers: {listed(ANSWERS)}."
            raise ConfigError(f"{name}: there is no such question.{hint}")
    path, held = _sides(folder)
    found = first(path)
    if found is None:
        name, reason = _modality(path, answers, ask)
        found = _array(path, answers, ask) if name == "array" else _other(name, path)
        found.notes["modality"] = reason
    if found.samples < 2 or found.parts < LEAST:
        raise DataError(
            f"{path}: too few: {plural(found.samples, 'file')}, {plural(found.parts, 'sample')}. A config needs "
            f"{LEAST} samples, or windows of them, to train on and to hold out, in two files or more. Add files, or "
            "cut long ones into several. One array of many samples is no folder: data.name=array, data.path=FILE.npy"
        )
    found.data = {"path": str(path), **_split(path, held, found, ask)}
    return found


def _sides(folder: Path) -> tuple[Path, Path | None]:
    """The folder of the training samples, and the folder of the held-out samples if there are two by name."""
    names = (
        {entry.name.lower(): entry for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else {}
    )
    train = next((names[name] for name in _TRAIN if name in names), None)
    held = next((names[name] for name in _HELD if name in names), None)
    return (train, held) if train and held else (folder, None)


def _modality(path: Path, answers: dict[str, Any], ask: Ask) -> tuple[str, str]:
    """The modality for most of the files, and why."""
    if "modality" in answers:
        return str(answers["modality"]), "as you said"
    if "reader" in answers:
        return "array", "because you named a reader"
    kinds = _kinds(path)
    pictures = registry().load("modality", "rgb").suffixes  # type: ignore[attr-defined]
    arrays = sum(count for suffix, count in kinds.items() if suffix in CORE)
    plain = sum(count for suffix, count in kinds.items() if suffix in pictures and suffix not in CORE)
    sounds = sum(
        count for suffix, count in kinds.items() if suffix in (".wav", ".flac", ".ogg", ".aif", ".aiff")
    )
    said = counted({f"*{kind}": count for kind, count in kinds.most_common(3)})
    if sounds > max(arrays, plain):
        known = [found.name for found in registry().components("modality") if found.name.startswith("audio/")]
        if not known:
            raise DataError(
                f"{path}: holds {said}. Sounds need the package vqcore-audio (plugins/vqcore_audio)"
            )
        name, sure = ask("Sounds as spectrograms or as waveforms?", known, "audio/log-mel")
        more = (
            ""
            if sure
            else f"  # please check: spectrograms are easier to learn; the other way: {listed(set(known) - {name})}"
        )
        return name, f"{said}{more}"
    if plain > arrays:
        return "rgb", said
    return "array", said


def _kinds(path: Path) -> Counter[str]:
    """How many files there are of each suffix."""
    found: Counter[str] = Counter()
    for _, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                length = suffix_length(name, tuple(CORE))
                found[name[-length:].lower() if length else Path(name).suffix.lower()] += 1
    return found


def _other(name: str, path: Path) -> Draft:
    """Pictures and sounds: their modality knows how to read them."""
    settings: dict[str, Any] = {"name": name}
    size: tuple[int, ...]
    patch: tuple[int, ...]
    if name == "rgb":
        settings |= {"min_crop_scale": 0.45, "ratio": [1, 1]}
        size, patch, values = (128, 128), (8, 8), 192
    elif name == "audio/wave":
        size, patch, values = (16000,), (80,), 80
    elif name == "audio/log-mel":
        size, patch, values = (64, 128), (8, 8), 64
    else:
        raise ConfigError(
            f"modality={name}: a config is drafted for rgb, array and sounds. vqcore show {name} lists its settings"
        )
    modality: Modality = made("modality", settings, size=size)
    return Draft(settings, size, patch, values, Listing(str(path), modality.suffixes, str(path)))


# Arrays


def _array(path: Path, answers: dict[str, Any], ask: Ask) -> Draft:
    settings: dict[str, Any] = {"name": "array"}
    notes: dict[str, str] = {}
    reader, files, names = _reader(path, answers, ask, settings, notes)
    arrays = list(_read(reader, files))
    axes = Counter(array.ndim for array in arrays)
    if len(axes) > 1:
        raise DataError(
            f"{path}: the files have different numbers of axes: {counted({f'{n} axes': c for n, c in axes.items()})}"
        )
    classes = _classes(arrays, answers, ask, notes)
    if classes:
        settings |= {"kind": "categorical", "labels": classes}
        extents, channels, vector = [array.shape for array in arrays], 1, False
    else:
        arrays, channels, vector = _channels_first(arrays, answers, ask, settings, notes)
        if names and len(names) == channels:
            settings["channels"] = list(names)
        extents = [array.shape[1:] for array in arrays]
    if not 1 <= len(extents[0]) <= 3:
        raise DataError(f"{path}: arrays of {len(extents[0])} axes besides channels; a sample has 1 to 3")
    size, patch = _size(extents, channels)
    if vector:
        size, patch = (1,), (1,)
    settings["size"] = list(size)
    notes["size"] = _about(extents, size)
    if not classes:
        settings |= _scale(arrays, channels, answers, notes)
    if vector:
        notes["size"] = "one vector a sample"
    windows = 1.0
    if len(size) == 1:
        windows = sum(max(1, extent[0] // size[0]) for extent in extents) / len(extents)
    values = channels * math.prod(patch)
    return Draft(settings, size, patch, values, files, notes, vector=vector, windows=windows, extents=extents)


def _reader(
    path: Path, answers: dict[str, Any], ask: Ask, settings: dict[str, Any], notes: dict[str, str]
) -> tuple[SampleReader, Listing, Sequence[str]]:
    """The reader of most of the files, these files, and the names of the columns if the files are tables."""
    kinds = {suffix: count for suffix, count in _kinds(path).items() if suffix in CORE}
    node = answers.get("reader")
    node = {"name": node} if isinstance(node, str) else node
    if node is None and len({CORE[suffix] for suffix in kinds}) > 1:
        most = max(kinds, key=lambda suffix: kinds[suffix])
        node = {"name": CORE[most].__name__.lower()}
        notes["reader"] = f"please check: there are {counted({f'*{k}': c for k, c in kinds.items()})}"
    if node is None and kinds:
        node = {"name": CORE[next(iter(kinds))].__name__.lower()}
    elif node is not None:
        settings["reader"] = node
    reader: Any = BySuffix() if node is None else made("reader", node)
    files = Listing(str(path), reader.suffixes, str(path))
    if SUFFIX[0] in kinds and SUFFIX[0] in reader.suffixes and not (node or {}).get("columns"):
        _refuse_rows(path, sample_columns(files.path(0)))
    naming = named_parts(reader)
    if naming is None or node is None or node.get(naming.part) is not None:
        return reader, files, (node or {}).get("columns") or ()
    parts = naming.parts(files.path(0))
    if naming.many:
        chosen: Any = list(parts)
        if not parts or _reads(reader, files.path(0)):
            return reader, files, parts
        notes["reader"] = "please check: the columns of numbers; others hold something else"
    else:
        if len(parts) < 2:
            return reader, files, ()
        chosen, sure = ask(f"{files.path(0).name} holds several arrays: which one?", parts, parts[0])
        if not sure:
            notes["reader"] = f"please check: the files hold {listed(parts)}"
    settings["reader"] = {**node, naming.part: chosen}
    return made("reader", settings["reader"]), files, chosen if naming.many else ()


def _refuse_rows(path: Path, columns: Sequence[str]) -> None:
    """Raise `DataError` for tables with columns that hold whole samples."""
    if columns:
        raise DataError(
            f"{path}: each row is a sample here (columns {listed(columns)}), and a config is drafted for folders of "
            f"files. Write one with data.name=parquet and data.column={columns[0]}; vqcore show parquet lists more "
            "settings. If columns are channels and rows are positions, name the columns: reader='{name: parquet, "
            "columns: [a, b]}'"
        )


def _reads(reader: SampleReader, path: Path) -> bool:
    try:
        reader.read(path)
    except DataError:
        return False
    return True


def made(kind: str, node: dict[str, Any], **wiring: Any) -> Any:
    """A component from a mapping with its name."""
    return registry().build(kind, component(kind, node, file="answer"), **wiring)


def _read(reader: SampleReader, files: Listing) -> Iterator[np.ndarray]:
    """Some arrays from all over the folder. Raises `DataError` if none of the files can be read."""
    good, first = 0, None
    for place in places(len(files)):
        try:
            array = reader.read(files.path(place))
        except (DataError, OSError) as error:
            first = first or error
            continue
        if array.dtype.kind not in "biuf" or not array.ndim:
            first = first or DataError(
                f"{files.path(int(place))}: {array.dtype} of shape {array.shape}; no real numbers"
            )
            continue
        good += 1
        yield array
    if not good:
        raise first if isinstance(first, VqcoreError) else DataError(str(first))


def places(count: int) -> list[int]:
    """The numbers of the files that are read, from all over a folder of `count` files."""
    return [int(one) for one in np.unique(np.linspace(0, count - 1, LOOKED_AT).round())]


def _classes(arrays: Sequence[np.ndarray], answers: dict[str, Any], ask: Ask, notes: dict[str, str]) -> int:
    """The number of classes if the arrays are class maps, else 0."""
    kind = answers.get("kind")
    arrays = [found for array in arrays if (found := np.ma.compressed(array)).size]
    whole = all(array.dtype.kind in "biu" for array in arrays)
    low = min((int(array.min()) for array in arrays), default=-1) if whole else -1
    high = max(int(array.max()) for array in arrays) if low >= 0 else -1
    if not 0 <= high < MOST_LABELS or kind not in (None, "categorical"):
        if kind == "categorical":
            raise ConfigError("kind=categorical: class maps hold whole numbers from 0 to less than 64")
        return 0
    if kind is None:
        kind, sure = ask(
            f"Whole numbers from 0 to {high}: class ids or quantities?",
            ["categorical", "continuous"],
            "categorical",
        )
        if not sure:
            notes["kind"] = f"please check: whole numbers from 0 to {high} look like class ids"
    return high + 1 if kind == "categorical" else 0


def _channels_first(
    arrays: list[np.ndarray],
    answers: dict[str, Any],
    ask: Ask,
    settings: dict[str, Any],
    notes: dict[str, str],
) -> tuple[list[np.ndarray], int, bool]:
    """The arrays with a channel axis in front, the number of channels, and whether they are vectors."""
    shapes = [array.shape for array in arrays]
    said = shapes_text(shapes)
    if len(shapes[0]) == 1:
        same = len(set(shapes)) == 1
        if answers.get("vector") and not same:
            raise DataError(f"vector=true: vectors have one length, and these files have shapes {said}")
        if answers.get("vector", same and shapes[0][0] <= MOST_CHANNELS):
            settings["channels"] = shapes[0][0]
            other = "" if "vector" in answers else "; please check: or a signal of one channel (vector=false)"
            notes["channels"] = f"shapes {said}: a vector{other}"
            return [array.reshape(-1, 1) for array in arrays], shapes[0][0], True
        settings["channels"], settings["rank"] = 1, 1
        notes["channels"] = f"shapes {said}: a signal of one channel"
        return [array[None] for array in arrays], 1, False
    first, last = (_holds_channels(shapes, axis) for axis in (0, -1))
    guess, doubt = (
        ("last", False) if last and not first else ("first", False) if first and not last else ("none", False)
    )
    if first and last:
        guess, doubt = ("last" if min(s[-1] for s in shapes) < min(s[0] for s in shapes) else "first"), True
    if len(shapes[0]) == 4 and guess == "none":
        guess, doubt = "first", True
    if len(shapes[0]) == 2 and guess == "none" and min(min(s) for s in shapes) <= MOST_CHANNELS:
        doubt = True
    if "channels_last" in answers:
        guess, doubt = ("last" if answers["channels_last"] else "first"), False
    if doubt:
        guess, sure = ask(f"Shapes {said}: which axis holds the channels?", ["first", "last", "none"], guess)
        doubt = not sure
    check = "please check: " if doubt else ""
    if guess == "none":
        settings["channels"] = 1
        notes["channels"] = f"{check}shapes {said}: no axis of channels"
        return [array[None] for array in arrays], 1, False
    if guess == "last":
        settings["channels_last"] = True
        arrays = [np.moveaxis(array, -1, 0) for array in arrays]
    counts = Counter(len(array) for array in arrays)
    channels = counts.most_common(1)[0][0]
    settings["channels"] = channels
    notes["channels"] = f"{check}shapes {said}: the {guess} axis holds the channels"
    return [array for array in arrays if len(array) == channels], channels, False


def _holds_channels(shapes: Sequence[tuple[int, ...]], axis: int) -> bool:
    """Whether an axis looks like channels: of one length everywhere, and short beside each other axis."""
    sides = {shape[axis] for shape in shapes}
    if len(sides) > 1 or not 1 <= min(sides) <= MOST_CHANNELS:
        return False
    others = [side for shape in shapes for side in (shape[1:] if axis == 0 else shape[:-1])]
    return 2 * min(sides) <= min(others)


def _size(extents: Sequence[tuple[int, ...]], channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and patch: sides that nearly every sample has, in whole patches of roughly 50 to 200 numbers."""
    rank = len(extents[0])
    sides = [int(np.quantile([extent[axis] for extent in extents], 0.05)) for axis in range(rank)]
    sides = [min(side, _SIDES[rank - 1]) for side in sides]
    best = {1: (16, 8, 4, 2), 2: (8, 4, 2), 3: (4, 2)}[rank]
    patches = []
    for side in sides:
        fitting = [
            one
            for one in best
            if side >= (8 if rank == 1 else 4) * one
            and (rank > 1 or channels * one <= 200 or one == best[-1])
        ]
        patches.append(fitting[0] if fitting else 1)
    return tuple(max(one, side // one * one) for side, one in zip(sides, patches)), tuple(patches)


def _about(extents: Sequence[tuple[int, ...]], size: tuple[int, ...]) -> str:
    """What becomes of samples of other sizes: the default of the setting `sizing` of `array`, in words."""
    if all(extent == size for extent in extents):
        return "every file that was read has this size"
    if len(size) == 1:
        what = "windows of this length; evaluation and tokenize take all of a file"
        return f"the files have {shapes_text(extents)}: {what}"
    return (
        f"the files have {shapes_text(extents)}: the largest part in these proportions, resized (see sizing)"
    )


def _scale(
    arrays: Sequence[np.ndarray], channels: int, answers: dict[str, Any], notes: dict[str, str]
) -> dict[str, Any]:
    nodata = answers.get("nodata")
    if nodata is None:
        nodata = fills(arrays)
        if nodata:
            notes["nodata"] = (
                f"please check: {listed(f'{one:g}' for one in nodata)} lies far from all other values of a channel"
            )
    nodata = [float(one) for one in (nodata if isinstance(nodata, (list, tuple)) else [nodata])]
    found = propose_scale(summarise(arrays, channels=channels, nodata=nodata))
    if nodata:
        found = {"nodata": nodata, **found}
    notes["scale"] = (
        f"from the values of {plural(len(arrays), 'file')}; vqcore check CONFIG --values shows them"
    )
    return found


def shapes_text(shapes: Sequence[tuple[int, ...]]) -> str:
    """Shapes in words: one, or from the smallest to the largest along each axis."""
    low, high = [min(s) for s in zip(*shapes)], [max(s) for s in zip(*shapes)]
    return " x ".join(str(a) if a == b else f"{a}..{b}" for a, b in zip(low, high))


# Splits, text


def _split(path: Path, held: Path | None, found: Draft, ask: Ask) -> dict[str, Any]:
    if held is not None:
        found.notes["eval_path"] = "the folders say which samples are held out"
        return {"eval_path": str(held)}
    keys = [found.files.key(index) for index in range(found.samples)]
    settings: dict[str, Any] = {}
    tops = Counter(key.partition("/")[0] for key in keys if "/" in key)
    if len(tops) >= 10 and sum(tops.values()) == len(keys) and len(tops) < len(keys):
        example = next(iter(tops))
        choice, sure = ask(
            f"Folders such as {example}: does each belong to one patient, scene or recording?",
            ["yes", "no"],
            "yes",
        )
        if choice == "yes":
            settings["group"] = "^([^/]+)/"
            note = f"{len(tops)} folders such as {example} each stay on one side"
            found.notes["group"] = note if sure else f"please check: {note}"
    for share in (0.1, 0.15, 0.2, 0.3, 0.5):
        count = sum(held_out(keys, share, settings.get("group")))
        if min(8, len(keys) // 4) <= count < len(keys) and count:
            found.held = count
            found.notes["eval_share"] = (
                f"{count} of {len(keys)} samples are held out, by a hash of their names"
            )
            return {"eval_share": share, **settings}
    raise DataError(
        f"{path}: {len(keys)} samples are too few to hold some out. Add files, or make two folders, train and val"
    )


def written(found: Draft, folder: Path) -> str:
    """The config as YAML with a reason beside each choice."""
    tokens = math.prod(side // one for side, one in zip(found.size, found.patch))
    trained = tokens * found.samples
    codes = next((n for n in (4096, 1024, 256) if trained >= 16 * n), 64)
    solid = len(found.size) == 3
    batch = max(2 if solid else 4, min(64, 1024 // tokens, found.samples // 4 or 1))
    steps = 1000 if solid else 2000
    # A convolution on a grid of three axes multiplies 27 neighbours, one of two axes 9.
    minutes = max(1, round(steps * batch * tokens * (3 if solid else 1) * _SECONDS / 60))
    has_report = any(one.name == "track/report" for one in registry().components("hook"))
    lines = [
        f"# Drafted by `vqcore new config {folder}`. Lines with 'please check' are guesses.",
        "# vqcore check THIS    vqcore train THIS    (settings of a part: vqcore show NAME)",
        "data:",
        "  name: folder",
        *(_line("  ", name, value, found.notes.get(name)) for name, value in found.data.items()),
        "  modality:" + (f"  # {found.notes['modality']}" if found.notes.get("modality") else ""),
        *(_line("    ", name, value, found.notes.get(name)) for name, value in found.modality.items()),
        *([] if "size" in found.modality else [f"  input_size: {sides_text(found.size)}"]),
        f"  batch_size: {batch}",
        "  workers: 0",
        "  cache_mib: 256",
        "model:",
    ]
    quantizer = (
        f"  quantizer: {{name: quant/vq, codebook_size: {codes}, latent_dim: 8, normalize: false, decay: 0.97, "
        "commitment_weight: 0.1}"
    )
    bits = int(math.log2(codes))
    why = f"  # {trained:,} training tokens of {found.values} numbers each; {codes} codes are {bits} bits a token"
    if found.vector:
        lines += [
            "  encoder: {name: vit/mlp-encoder, depth: 2, width: 160}",
            why,
            quantizer,
            "  decoder: {name: vit/mlp-decoder, depth: 2, width: 160}",
        ]
    else:
        patch = sides_text(found.patch)
        lines += [
            f"  # {by(found.size)} becomes {tokens} tokens, one for each patch of {by(found.patch)}",
            f"  encoder: {{name: vit/encoder, width: 160, depth: 0, num_heads: 4, patch_size: {patch}, grid_convs: 3}}",
            why,
            quantizer,
            "  decoder:",
            "    name: vit/decoder",
            "    width: 160",
            "    depth: 0",
            "    num_heads: 4",
            f"    patch_size: {patch}",
            "    grid_convs: 3",
        ]
    categorical = found.modality.get("kind") == "categorical"
    lines += [
        *(["  embed_dim: 8"] if categorical else []),
        f"objective: {{name: reconstruction, loss: {'cross_entropy' if categorical else 'mse'}}}",
        f"# About {plural(minutes, 'minute')} on two cores. More steps are better.",
        f"run: {{steps: {steps}, log_every: 50, save_every: 500}}",
        "optim: {name: muon, lr: 4.0e-3, warmup: 50, args: {rms: 0.1, fused: true}}",
        "ema: {decay: 0.99}",
        *(["hooks: {report: {name: track/report}}"] if has_report else []),
    ]
    return "\n".join(lines) + "\n"


def by(sides: Sequence[int]) -> str:
    """Sides as text: `64 x 48`."""
    return " x ".join(map(str, sides))


def _line(indent: str, name: str, value: Any, note: str | None) -> str:
    return f"{indent}{name}: {inline(value)}" + (f"  # {note}" if note else "")


def sides_text(sides: Sequence[int]) -> str:
    """A size as YAML: one number if all sides are equal."""
    return str(sides[0]) if len(set(sides)) == 1 else str(list(sides))
