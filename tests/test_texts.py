"""Texts in files of every kind, their keys, what is refused; and texts in a store, with a tokenizer of letters."""

import gzip
import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqcore.artefacts.stored import open_store
from vqcore.data.texts import Texts
from vqcore.errors import ConfigError, DataError, RunError
from vqcore.schema import TextsConfig
from vqcore.tokens import TokenDataset
from vqcore.tokens import texts as passes
from vqcore.tokens.texts import decode_texts, encode_texts


def found(path, **settings):
    return {each.key: each.text for each in Texts(TextsConfig(path=str(path), **settings))}


def packed(members, mode="w"):
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return blob.getvalue()


def as_parquet(**columns):
    blob = io.BytesIO()
    pq.write_table(pa.table(columns), blob)
    return blob.getvalue()


def zipped(content):
    """Zipped bytes, equal at any time, because they name tests."""
    return gzip.compress(content, mtime=0)


LINES = b"a cat\n\n  \r\ntwo cats\r\n"
READ = [
    ("one.txt", b"a cat", {}, {"one": "a cat"}),
    ("one.txt", LINES, {}, {"one/00000000": "a cat", "one/00000003": "two cats"}),
    ("one.txt.gz", zipped(LINES), {}, {"one/00000000": "a cat", "one/00000003": "two cats"}),
    ("a.json", b'["x", {"caption": "y"}]', {}, {"a/0": "x", "a/1": "y"}),
    ("a.json.gz", zipped(b'{"t": "x", "u": "y"}'), {"field": "u"}, {"a": "y"}),
    ("a.jsonl", b'{"t": "x"}\n{"t": ["y", "z"]}', {"field": "t"},
     {"a/00000000": "x", "a/00000001/0": "y", "a/00000001/1": "z"}),
    ("a.jsonl", b'{"id": 7, "t": "x"}\n{"id": "b/c", "t": "y"}', {"key": "id"}, {"7": "x", "b/c": "y"}),
    ("a.parquet", as_parquet(t=["x", "y"], n=[1, 2]), {}, {"a/00000000": "x", "a/00000001": "y"}),
    ("a.parquet", as_parquet(t=[["x"], ["y", "z"]], k=["p", "q"]), {"field": "t", "key": "k"},
     {"p": "x", "q/0": "y", "q/1": "z"}),
    ("a.tar", packed({"b/1.txt": b"x", "b/2.json": b'"y"', "b/3.jpg": b"z"}), {}, {"b/1": "x", "b/2": "y"}),
    ("a.tar.gz", packed({"1.txt.gz": zipped(LINES)}, "w:gz"), {},
     {"1/00000000": "a cat", "1/00000003": "two cats"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "settings", "texts"), READ)
def test_the_texts_of_a_file(tmp_path, name, content, settings, texts):
    (tmp_path / name).write_bytes(content)
    assert found(tmp_path / name, **settings) == texts


def test_folders_and_patterns_and_the_share_that_is_done(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/c/3.TXT.GZ"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(zipped(b"x") if name.endswith("GZ") else name.encode())
    (tmp_path / "a/4.jpg").write_bytes(b"")
    assert list(found(tmp_path)) == ["a/1", "a/c/3", "b/2"]
    assert list(found(tmp_path / "a")) == ["1", "c/3"]
    assert list(found(tmp_path / "*/*.txt")) == ["a/1", "b/2"]
    assert list(found(tmp_path / "**/*.txt*")) == ["a/1", "b/2"]
    texts = Texts(TextsConfig(path=str(tmp_path)))
    done = [each.done for each in texts]
    assert done == sorted(done) and 0 < done[0] <= done[-1] <= texts.total == sum(
        each.stat().st_size for each in texts.files
    )
    assert [each.text for each in texts] == [each.text for each in texts]  # as often as they are asked for


REFUSED = [
    ("a.txt", b"x\n\xff\n", {}, r"a\.txt: line 2: is not UTF-8"),
    ("a.txt.gz", zipped(b"x\n" * 9000)[:-20], {}, r"a\.txt\.gz: cannot be read: Compressed file ended"),
    ("a.txt.gz", b"x", {}, r"a\.txt\.gz: cannot be read: Not a gzipped file"),
    ("a.jsonl", b'"x"\n{', {}, r"a\.jsonl: line 2: is no JSON"),
    ("a.jsonl", b"5", {}, r"a\.jsonl: line 1: 5 is no text"),
    ("a.json", rb'"\ud800"', {}, "half a surrogate pair"),
    ("a.json", b"[" * 100_000, {}, "is no JSON"),
    ("a.json", b'{"a": "x", "b": "y"}', {}, "which member is the text. Set data.field to one of a, b"),
    ("a.json", b'{"caption": "x"}', {"field": "captoin"}, "has no member 'captoin'. Did you mean 'caption'"),
    ("a.parquet", as_parquet(n=[1]), {}, "which column is the text"),
    ("a.parquet", as_parquet(n=[1]), {"field": "n"}, "row 1: 1 is no text"),
    ("a.parquet", b"PAR1", {}, r"a\.parquet: cannot be read"),
    ("a.tar", packed({"1.txt": b"x" * 2000})[:1000], {}, r"a\.tar"),
    ("a.tar", packed({"1.txt": b"x", "2.txt": b"y"})[:1024], {}, r"a\.tar: cannot be read: it has no end"),
    ("a.tar", packed({"1.txt": b"\xff"}), {}, r"a\.tar: 1\.txt: line 1: is not UTF-8"),
    ("a.jpg", b"", {}, "texts are read from .txt, .jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "settings", "text"), REFUSED)
def test_what_is_refused(tmp_path, name, content, settings, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=text):
        found(tmp_path / name, **settings)


def test_a_path_without_texts(tmp_path):
    (tmp_path / "captions").mkdir()
    with pytest.raises(DataError, match="captions: holds no files of texts"):
        found(tmp_path / "captions")
    with pytest.raises(
        DataError, match=r"no such file, .*matches no files of texts. Did you mean 'captions'"
    ):
        found(tmp_path / "captoins")


def test_lines_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr("vqcore.data.texts.LONGEST", 100)
    (tmp_path / "a.txt").write_text("x" * 99 + "\n" + "y" * 99 + "\n" + "z" * 101)
    texts = iter(Texts(TextsConfig(path=str(tmp_path))))
    assert [next(texts).text[:1] for _ in range(2)] == ["x", "y"]
    with pytest.raises(DataError, match="line 3: is longer than 100 bytes"):
        next(texts)


class Letters:
    """A text tokenizer of 300 ids."""

    vocab_size = 300

    def encode(self, texts):
        return [[ord(letter) for letter in text] for text in texts]

    def decode(self, ids):
        return ["".join(map(chr, one)) for one in ids]


def encoded(folder, texts, **settings):
    settings = {"name": "toy/letters", "fingerprint": "ab", "length": 5, **settings}
    return encode_texts(Letters(), Texts(TextsConfig(path=str(texts))), folder, **settings)


@pytest.fixture
def captions(tmp_path):
    (tmp_path / "captions").mkdir()
    for key, text in {"a": "cat", "b": "two cats", "c": "\u012b"}.items():
        (tmp_path / "captions" / f"{key}.txt").write_text(text)
    return tmp_path / "captions"


def test_a_store_of_texts(tmp_path, captions, monkeypatch):
    monkeypatch.setattr(passes, "SHARD_SIZE", 2)
    done = encoded(tmp_path / "store", captions)
    assert (done.texts, done.encoded, done.ids, done.cut) == (3, 3, 3 + 8 + 1, 1)
    store = open_store(tmp_path / "store")
    assert [store.rows.key(place) for place in range(3)] == ["a", "b", "c"]
    assert [store.rows.extras(place)["length"] for place in range(3)] == [3, 8, 1]
    assert (
        store.rows.codes(0).tolist() == [[99], [97], [116], [0], [0]]
        and store.rows.codes(0).dtype == np.uint16
    )
    data = TokenDataset({"caption": tmp_path / "store"})
    assert data[data.find("c")]["caption"][:, 0].tolist() == [0x12B, 0, 0, 0, 0]
    assert list(decode_texts(Letters(), tmp_path / "store", "ab")) == [
        ("a", "cat"),
        ("b", "two c"),
        ("c", "\u012b"),
    ]
    with pytest.raises(DataError, match="made by another tokenizer"):
        next(decode_texts(Letters(), tmp_path / "store", "cd"))


def test_a_pass_goes_on_where_another_ended(tmp_path, captions, monkeypatch):
    monkeypatch.setattr(passes, "SHARD_SIZE", 2)
    encoded(tmp_path / "whole", captions)

    class Dies(Letters):
        def encode(self, texts):
            if "\u012b" in texts:
                raise KeyboardInterrupt
            return super().encode(texts)

    texts = Texts(TextsConfig(path=str(captions)))
    with pytest.raises(KeyboardInterrupt):
        encode_texts(Dies(), texts, tmp_path / "store", name="toy/letters", fingerprint="ab", length=5)
    assert encoded(tmp_path / "store", captions).encoded == 1
    for name in ("tokens.json", "shard-00000.arrow", "shard-00001.arrow"):
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(RunError, match="different: grid"):
        encoded(tmp_path / "store", captions, length=6)
    (captions / "c.txt").write_text("d")
    with pytest.raises(RunError, match="different: source"):
        encoded(tmp_path / "store", captions)


def test_two_processes_share_the_shards(tmp_path, captions, monkeypatch):
    monkeypatch.setattr(passes, "SHARD_SIZE", 1)
    monkeypatch.setattr(passes.dist, "share", lambda: (1, 2))
    assert encoded(tmp_path / "store", captions).encoded == 1
    monkeypatch.setattr(passes.dist, "share", lambda: (0, 2))
    assert encoded(tmp_path / "store", captions).encoded == 2
    assert len(open_store(tmp_path / "store").rows) == 3


def test_keys_name_one_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"k": 1, "t": "x"}\n{"k": 2, "t": "y"}\n{"k": 1, "t": "z"}')
    texts = Texts(TextsConfig(path=str(tmp_path / "a.jsonl"), key="k"))
    with pytest.raises(DataError, match="two texts have the key '1'"):
        encode_texts(Letters(), texts, tmp_path / "s", name="n", fingerprint="f", length=5)
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(ConfigError, match="--store folder does not keep the lengths"):
        encoded(tmp_path / "s", tmp_path / "a.jsonl", store="folder[]")
    with pytest.raises(DataError, match="holds no texts"):
        encoded(tmp_path / "s", tmp_path / "b.txt")
