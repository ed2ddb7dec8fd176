"""Texts into a store of ids and back: a row is `(length, 1)`, the ids of a text and zeros behind them.

The extra `length` of a row is the number of ids of its text; a larger one than the row's says that the row was cut.
Shards are as those of `vqcore.tokens.sharded`: crash-safe, by any number of processes, with equal bytes.
"""

import hashlib
import logging
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from vqcore import __version__, dist
from vqcore.artefacts.codes import other_maker
from vqcore.artefacts.stored import layout_named, open_store
from vqcore.console import ProgressLine
from vqcore.data.texts import Text, Texts
from vqcore.errors import ConfigError, DataError, RunError, cause, printable
from vqcore.protocols import Coded
from vqcore.protocols import Text as TextTokenizer
from vqcore.tokens.passes import refuse_file
from vqcore.tokens.shards import Shards
from vqcore.tokens.store import code_dtype

log = logging.getLogger(__name__)

SHARD_SIZE = 16_384
"""Texts in a shard."""
_BATCH = 1024
MIB = 2**20


@dataclass
class Written:
    """What a pass did: texts of the store, texts that this pass encoded, their ids, and how many were cut."""

    texts: int
    encoded: int = 0
    ids: int = 0
    cut: int = 0


def encode_texts(
    text: TextTokenizer,
    texts: Texts,
    target: Path,
    *,
    name: str,
    fingerprint: str,
    length: int,
    store: str = "arrow",
) -> Written:
    """Write the ids of all texts as a store. Shards that are done are left alone.

    `name` and `fingerprint` are those of the text tokenizer. Raises `DataError` if there are no texts or two have one
    key, `ConfigError` for a store without shards, `RunError` if `target` holds other codes or takes no more data.
    """
    refuse_file(target)
    rank, ranks = dist.share()
    layout = layout_named(store, "--store")
    if not layout.has_shards:
        raise ConfigError(
            f"--store {layout.name} does not keep the lengths of texts; take arrow, parquet or tar."
        )
    done = Written(0)
    total, digest = _counted(texts)
    manifest = {
        "format": 1,
        "fingerprint": fingerprint,
        "codebook_size": text.vocab_size,
        "num_codebooks": 1,
        "grid": [length],
        "size": [length],
        "dtype": str(code_dtype(text.vocab_size)),
        "store": layout.said,
        "layout": "the ids of a text, then zeros",
        "tokenizer": name,
        "source": {"texts": total, "sha256": digest},
        "shard_size": SHARD_SIZE,
        "versions": {"vqcore": __version__},
    }
    done.texts = total
    try:
        shards = Shards(target, layout.store, manifest, -(-total // SHARD_SIZE))
        there = shards.done
        rest = iter(Watched(texts, "encoding"))
        for number, shard in enumerate(shards.names):
            part = islice(rest, SHARD_SIZE)
            if number % ranks != rank or shard in there:
                deque(part, maxlen=0)
                continue
            rows = list(_rows(text, part, length, done))
            shards.write(shard, rows, {"of": len(rows), "failed": []})
        deque(rest, maxlen=0)
        if shards.finish() is None:
            log.warning(
                f"{target}: other processes are at the other shards. The same command does what is missing."
            )
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be written: {cause(error)}. The same command goes on from there."
        ) from error
    return done


def decode_texts(text: TextTokenizer, source: Path, fingerprint: str) -> Iterator[tuple[str, str]]:
    """The key and the text of each row of a store. Raises `DataError` for a store that another tokenizer made."""
    store = open_store(source)
    if maker := other_maker(store.manifest, fingerprint):
        raise DataError(f"{source}: {maker}. Take the text tokenizer that made them.")
    rows, count = store.rows, len(store.rows)
    with ProgressLine("decoding", count, unit="text") as line:
        for first in range(0, count, _BATCH):
            places = range(first, min(first + _BATCH, count))
            lengths = [rows.extras(place).get("length") for place in places]
            if not all(isinstance(length, int) for length in lengths):
                raise DataError(f"{source}: is a store of codes, and no store of texts.")
            ids = [rows.codes(place)[:length, 0].tolist() for place, length in zip(places, lengths)]
            yield from zip(map(rows.key, places), text.decode(ids))
            line.update(places[-1] + 1)


class Watched:
    """Texts, with a line of progress by the bytes of their files each time that they are read."""

    def __init__(self, texts: Texts, label: str):
        self.texts, self.label = texts, label
        self.total = max(1, texts.total // MIB)

    def __iter__(self) -> Iterator[Text]:
        with ProgressLine(self.label, self.total, unit="MiB") as line:
            for number, each in enumerate(self.texts):
                if number % _BATCH == 0:
                    line.update(min(each.done // MIB, self.total - 1))
                yield each
            line.update(self.total)


def _counted(texts: Texts) -> tuple[int, str]:
    """The number of texts, and a hash of keys and texts. Raises `DataError` if two texts have one key."""
    whole, seen = hashlib.sha256(), array("Q")
    for each in Watched(texts, "counting"):
        key = hashlib.sha256(each.key.encode("utf-8", "surrogateescape")).digest()
        seen.frombytes(key[:8])
        whole.update(key + hashlib.sha256(each.text.encode()).digest())
    if not seen:
        raise DataError(f"{texts.cfg.path}: holds no texts.")
    _, first = np.unique(np.frombuffer(seen, np.uint64), return_index=True)
    if len(first) < len(seen):
        again = int(np.setdiff1d(np.arange(len(seen)), first)[0])
        twice = next(islice(iter(texts), again, None)).key
        raise DataError(
            f"{texts.cfg.path}: two texts have the key '{printable(twice)}'; a key names one text."
        )
    return len(seen), whole.hexdigest()


def _rows(text: TextTokenizer, texts: Iterator[Text], length: int, done: Written) -> Iterator[Coded]:
    dtype = code_dtype(text.vocab_size)
    while batch := list(islice(texts, _BATCH)):
        for one, ids in zip(batch, text.encode([each.text for each in batch])):
            codes = np.zeros((length, 1), dtype)
            codes[: len(ids), 0] = ids[:length]
            done.ids += len(ids)
            done.cut += len(ids) > length
            yield Coded(one.key, codes, {"length": len(ids)})
        done.encoded += len(batch)
