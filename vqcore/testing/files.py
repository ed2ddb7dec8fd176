"""The laws of readers of files, stores of codes and text tokenizers."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.errors import DataError
from vqcore.protocols import named_parts
from vqcore.testing.basics import check_members, check_waived

TEXT_WAIVABLE = ("round-trip",)
"""Laws that can be waived: a vocabulary may lack words of the texts."""
KEYS = ("b/2", "a/1", "ü 3")
"""Keys in the order in which a store gets them."""
MANIFEST = {"fingerprint": "ab12", "grid": [2, 3], "size": None}


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


def check_store(store: Any) -> None:
    """The laws of a store: what was added comes back, in order, by place and by key."""
    check_members("store", store)
    rng = np.random.default_rng(0)
    for top, shape in ((2, (2, 3, 1)), (2**16 + 1, (5, 2))):
        codes = [rng.integers(top, size=shape) for _ in KEYS]
        codes[0].flat[0] = top - 1
        extras: list[dict[str, Any]] = [
            {"text": f"ü{number}", "size": [number, 2]} for number in range(len(KEYS))
        ]
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "codes"
            writer = store.write(folder, dict(MANIFEST))
            for key, one, more in zip(KEYS, codes, extras):
                writer.add(key, one.copy(), dict(more))
            writer.close()
            _check_stored(store.open(folder), codes, extras)
            empty = Path(parent) / "empty"
            empty.mkdir()
            _refuses(store.open, empty, "an empty folder", "open")


def _check_stored(found: Any, codes: Sequence[np.ndarray], extras: Sequence[Mapping[str, Any]]) -> None:
    assert len(found) == len(KEYS), f"length law: {len(KEYS)} samples were added, {len(found)} come back"
    assert dict(found.manifest) == MANIFEST, f"manifest law: {found.manifest} is not {MANIFEST}"
    for place in (2, 0, 1):  # random access
        for asked in (place, KEYS[place]):
            key, one = found[asked]
            assert key == KEYS[place], f"key law: sample {asked!r} has the key '{key}', not '{KEYS[place]}'"
            same = np.array_equal(one, codes[place])
            assert same, f"codes law: the codes of {asked!r} changed, {one.dtype} {one.shape}"
            assert dict(found.extras(asked)) == extras[place], f"extras law: the extras of {asked!r} changed"
    for asked, kind in ((len(KEYS), IndexError), ("nothing", KeyError)):
        try:
            found[asked]
        except kind:
            continue
        except Exception as error:
            raise AssertionError(
                f"bounds law: {asked!r} raises {type(error).__name__}, not {kind.__name__}"
            ) from error
        raise AssertionError(f"bounds law: there is a sample {asked!r}")


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
