"""The laws of readers of files, stores of codes and text tokenizers."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.artefacts.codes import record_of
from vqcore.data.windows import named
from vqcore.errors import DataError
from vqcore.protocols import Adopts, Coded, StoredCodes, adopts, learner, members, named_parts, shows_pieces
from vqcore.testing.basics import check_members, check_waived

TEXT_WAIVABLE = ("round-trip",)
"""Laws that can be waived: a vocabulary may lack words of the texts."""
STORE_WAIVABLE = ("extras", "missing")
"""A store may keep only the places of rows in their files, and may take the files that are there for the store."""


def check_reader(reader: Any, path: Path) -> None:
    """The laws of a reader of files on one small file."""
    check_members("reader", reader)
    strange = [each for each in reader.suffixes if not each.startswith(".") or each.lower() != each]
    assert not strange, f"suffix law: '{strange[0]}' is not a lower-case suffix with a dot"
    assert path.suffix.lower() in reader.suffixes, (
        f"suffix law: {path.name} ends in none of {reader.suffixes}"
    )
    found = reader.read(path)
    good = isinstance(found, np.ndarray) and found.dtype.kind in "biufc"
    assert good, (
        f"array law: read returns {getattr(found, 'dtype', type(found).__name__)}, not an array of numbers"
    )
    assert found.size, "array law: read returns an empty array"
    assert same_values(found, reader.read(path)), "determinism law: two readings of a file differ"
    if (naming := named_parts(reader)) is not None:
        assert hasattr(type(reader).Config, naming.part), (
            f"parts law: '{naming.part}' is no setting of the reader"
        )
        names = naming.parts(path)
        good = bool(names) and len(set(names)) == len(names) and all(isinstance(one, str) for one in names)
        assert good, f"parts law: parts gives {names}, not different names"
    with tempfile.TemporaryDirectory() as folder:
        for suffix in reader.suffixes:
            damaged = Path(folder) / f"damaged{suffix}"
            damaged.write_bytes(b"\x00damaged")
            _refuses(reader.read, damaged, f"a damaged file ({suffix})")
            _refuses(reader.read, damaged.with_stem("absent"), f"a missing file ({suffix})")
            if naming is not None:
                _refuses(naming.parts, damaged, f"a damaged file ({suffix})", "parts")


def same_values(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays have equal values and equal masks; what is masked has no value."""
    hidden = np.ma.getmaskarray(one)
    if one.shape != other.shape or not np.array_equal(hidden, np.ma.getmaskarray(other)):
        return False
    known, again = np.ma.getdata(one)[~hidden], np.ma.getdata(other)[~hidden]
    return np.array_equal(known, again, equal_nan=one.dtype.kind in "fc")


Shards = Sequence[Sequence[Coded]]


def check_store(
    store: Any,
    *,
    given: Sequence[tuple[Mapping[str, Any], Shards]] = (),
    waived: Mapping[str, str] | None = None,
) -> None:
    """The laws of a store: rows that were written come back, in order, by place and by key; bytes are reproducible.

    `given` are manifests, each with the rows of two shards, for a layout of another system that does not hold all rows.
    `waived` maps laws of `STORE_WAIVABLE` that the store does not follow to the reason.
    """
    waived = check_waived(waived, STORE_WAIVABLE)
    check_members("store", store)
    if given:
        assert adopts(store) is not None, "rows law: a store of ours holds all rows; leave out `given`"
        for known, shards in given:
            _check_layout(store, known, shards, waived)
        return
    for top, grid, books in ((2, (2, 3), 1), (2**16 + 1, (5,), 2)):
        manifest: dict[str, Any] = {
            "format": 1,
            "fingerprint": "ab12",
            "grid": list(grid),
            "size": [4 * side for side in grid],
            "codebook_size": top,
            "num_codebooks": books,
            "dtype": str(np.min_scalar_type(top - 1)),
        }
        _check_layout(store, manifest, _rows_of(top, (*grid, books), full="extras" not in waived), waived)


def _check_layout(store: Any, manifest: Mapping[str, Any], shards: Shards, waived: Mapping[str, str]) -> None:
    """The laws of a store on the rows of some shards."""
    with tempfile.TemporaryDirectory() as folder_:
        folder = Path(folder_) / "store"  # so that a layout may have something beside it
        folder.mkdir()
        files = {
            f"shard-{number:05d}": _written(store, folder, f"shard-{number:05d}", rows, manifest)
            for number, rows in enumerate(shards)
        }
        listing = [
            {"name": name, "rows": len(rows), "files": files[name]} for name, rows in zip(files, shards)
        ]
        whole = {**manifest, "shards": listing}

        def again(_: Path) -> Any:
            return store.open(folder, whole)

        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        named_ = [name for each in files.values() for name in each]
        missing = [name for name in named_ if name not in there]
        assert not missing, f"files law: write names {missing[:1]}, which is not there"
        before = {name: (folder / name).read_bytes() for name in named_}
        _check_stored(again(folder), [row for rows in shards for row in rows])
        twice = list(store.write(folder, "shard-00000", shards[0], manifest))
        same = twice == files["shard-00000"] and all(
            (folder / name).read_bytes() == content for name, content in before.items()
        )
        assert same, "bytes law: equal rows, written again, give other files"
        if (other := adopts(store)) is not None:
            _check_adopts(store, other, folder, manifest, shards)
        victim = folder / named_[-1]
        victim.write_bytes(before[named_[-1]][: len(before[named_[-1]]) // 2])
        _refuses(again, folder, "a file that is cut off", "open")
        if other is not None:
            half = other.held(folder, record_of(shards[-1][-1]), manifest)
            assert half is None, "held law: held gives rows of a file that is cut off"
        if "missing" not in waived:
            victim.unlink()
            _refuses(again, folder, "a store without a file", "open")


def _check_adopts(
    store: Any, other: Adopts, folder: Path, manifest: Mapping[str, Any], shards: Shards
) -> None:
    """The laws of a layout of another system: it is read without a list of shards, and tells what is there."""
    rows = sorted((row for shard in shards for row in shard), key=lambda row: row.key)
    found = store.open(folder, {**manifest, "shards": []})
    keys = [found.key(place) for place in range(len(found))]
    assert sorted(keys) == [row.key for row in rows], (
        f"alone law: without a list of shards, open gives {keys}"
    )
    held = [other.held(folder, record, manifest) for record in dict.fromkeys(map(record_of, rows))]
    given = [(row.key, row.codes.tolist()) for row in rows]
    same = [(row.key, row.codes.tolist()) for each in held for row in each or ()] == given
    assert same, "held law: the rows that held gives are not those that were written"
    assert other.held(folder, "no/such", manifest) is None, "held law: a file that is not there has rows"
    assert other.views(folder, "no/such", (8, 8)) is None, "views law: a file that is not there has views"


def _written(
    store: Any, folder: Path, shard: str, rows: Sequence[Coded], manifest: Mapping[str, Any]
) -> list[str]:
    """The files of a shard."""
    if rows:
        return list(store.write(folder, shard, rows, manifest))
    try:
        return list(store.write(folder, shard, rows, manifest))
    except Exception as error:
        raise AssertionError(
            f"empty law: a shard without rows raises {type(error).__name__}: {error}"
        ) from error


def _rows_of(top: int, shape: tuple[int, ...], *, full: bool) -> list[list[Coded]]:
    """The rows of shards: whole samples, rows of a file, no row, windows of a record; with extras of many types."""
    rng = np.random.default_rng(0)
    side = [4 * n for n in shape[:-1]]

    def row(key: str, **extras: Any) -> Coded:
        codes = rng.integers(top, size=shape)
        codes.flat[0] = top - 1
        more = {"text": f"{key} ü", "flip": len(key) % 2 == 0, "share": 0.5, "note": {"a": [1]}}
        return Coded(key, codes, {**extras, **(more if full else {})})

    far, zero = [2 * n for n in side], [0] * len(side)
    return [
        [row("a/1"), row("a/2#0", record="a/2", row=0), row("a/2#1", record="a/2", row=1)],
        [],
        [
            row(f"b#{named(zero)}", record="b", start=zero, extent=far),
            row(f"b#{named(side)}", record="b", start=side, extent=far),
            row("ü 3"),
        ],
    ]


def _check_stored(found: Any, rows: Sequence[Coded]) -> None:
    missing = [name for name in members(StoredCodes) if not hasattr(found, name)]
    assert not missing, f"members law: what open returns has no {missing[0]}"
    count = len(rows)
    assert len(found) == count, f"length law: {count} rows were written, {len(found)} come back"
    for place in (2, 0, count - 1, *range(count)):  # random access
        row = rows[place]
        key, one, extras = found.key(place), found.codes(place), dict(found.extras(place))
        assert key == row.key, f"key law: row {place} has the key '{key}', not '{row.key}'"
        assert found.find(row.key) == place, (
            f"key law: '{row.key}' is found at {found.find(row.key)}, not {place}"
        )
        same = np.array_equal(one, row.codes)
        assert same, f"codes law: the codes of row {place} changed, {one.dtype} {one.shape}"
        assert extras == row.extras, f"extras law: the extras of row {place} are {extras}"
    keys = [each.as_py().decode() for each in list(found.keys())]
    assert keys == [row.key for row in rows], f"keys law: keys gives {keys}"
    asked = np.array([count - 1, 0, 0, 2])
    wanted = np.stack([rows[place].codes for place in asked])
    assert np.array_equal(found.many(asked), wanted), "many law: rows that are asked for together differ"
    wrong: tuple[tuple[Callable[[Any], Any], Any, type[Exception]], ...] = (
        (found.codes, count, IndexError),
        (found.key, count, IndexError),
        (found.find, "nothing", KeyError),
    )
    for ask, what, kind in wrong:
        try:
            ask(what)
        except kind:
            continue
        except Exception as error:
            raise AssertionError(
                f"bounds law: {what!r} raises {type(error).__name__}, not {kind.__name__}"
            ) from error
        raise AssertionError(f"bounds law: there is a row {what!r}")


def check_text(text: Any, texts: Sequence[str], *, waived: Mapping[str, str] | None = None) -> None:
    """The laws of a text tokenizer on some texts.

    `waived` maps laws of `TEXT_WAIVABLE` that the tokenizer does not follow to the reason.
    """
    waived = check_waived(waived, TEXT_WAIVABLE)
    check_members("text", text)
    ids = text.encode(texts)
    assert len(ids) == len(texts), f"length law: {len(texts)} texts have {len(ids)} lists of ids"
    for one, given in zip(ids, texts):
        wrong = [each for each in one if not (isinstance(each, int) and 0 <= each < text.vocab_size)]
        assert not wrong, f"range law: {wrong[:1]} is no id below vocab_size={text.vocab_size} ('{given}')"
        assert text.encode([given]) == [one], f"batch law: the ids of '{given}' depend on the other texts"
    again = text.decode(ids)
    assert len(again) == len(texts) and all(isinstance(one, str) for one in again), (
        f"length law: decode gives {len(again)} values for {len(texts)} texts, or values that are no text"
    )
    if "round-trip" not in waived:
        assert text.encode(again) == ids, f"round-trip law: the ids of {again} are not those of {list(texts)}"
    if (looked := shows_pieces(text)) is not None:
        for one in ids:
            pieces = looked.pieces(one)
            good = len(pieces) == len(one) and all(isinstance(piece, str) for piece in pieces)
            assert good, f"pieces law: {len(one)} ids have the pieces {pieces}"
        facts = looked.facts()
        strange = [
            name for name, value in facts.items() if not isinstance(name, str) or not isinstance(value, str)
        ]
        assert not strange, f"pieces law: the fact {strange[0]!r} is no text"


def check_learning(make: Callable[[str | None], Any], texts: Sequence[str]) -> None:
    """The laws of a text tokenizer that learns its vocabulary; `make(file)` builds one with this setting `file`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("one.json", "again.json")]
        for file in files:
            text = make(None)
            trained = learner(text)
            assert trained is not None, "learning law: the text tokenizer has no train and save"
            trained.train(_Once(texts))
            trained.save(file)
        one, again = (file.read_bytes() for file in files)
        assert one == again, "determinism law: two trainings on the same texts save different bytes"
        loaded = make(str(files[0]))
        ids = text.encode(texts)
        assert loaded.vocab_size == text.vocab_size and loaded.encode(texts) == ids, (
            "save law: a tokenizer with the saved vocabulary gives other ids"
        )
        damaged = Path(folder) / "damaged.json"
        damaged.write_bytes(b"\x00damaged")
        _refuses(lambda file: make(str(file)), damaged, "a damaged vocabulary", "file")
        _refuses(lambda file: make(str(file)), damaged.with_stem("absent"), "a missing vocabulary", "file")


class _Once:
    """Texts that are too many to keep: they can be iterated over, several times, and nothing else."""

    def __init__(self, texts: Sequence[str]):
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)


def _refuses(read: Callable[[Any], Any], given: Any, what: str, name: str = "read") -> None:
    try:
        read(given)
    except DataError:
        return
    except Exception as error:
        raise AssertionError(
            f"damage law: {what} raises {type(error).__name__}: {error}; raise DataError"
        ) from error
    raise AssertionError(f"damage law: {name} takes {what}")
