"""WordPiece: closed forms, the library's own training, 4M's file built by its steps, and the command line."""

from typing import ClassVar

import pytest
from vqcore_text.wordpiece import WordPiece

from vqcore.testing.conformance import TextConformance

SMALL = {"sentinels": 2, "coord_bins": 3, "classes": "none"}
TEXTS = ["A cat, a hat.", "the cat and the hat", "don't do not", "Zürich and 北京"] * 3


def learnt(texts=TEXTS, **settings):
    made = WordPiece(WordPiece.Config(name="text/wordpiece", **{"vocab_size": 200, **SMALL, **settings}))
    made.train(texts)
    return made


def tokens(made):
    return made.pieces(range(made.vocab_size))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    learnt().save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


class TestWordPiece(TextConformance):
    component = "text/wordpiece"
    configs: ClassVar = [{}]
    texts = ("a cat", "", "two cats on a mat [S_1] v0=2 v3=0", "Don't. I do not, you're 'it' !", "日本")

    @pytest.fixture(autouse=True)
    def file(self, saved, monkeypatch):
        monkeypatch.setattr(type(self), "configs", [{"file": str(saved)}])


def test_the_vocabulary_of_a_few_words_in_closed_form():
    """Pairs are joined by frequency: xy (5) before the later uv (3), and q stays alone."""
    made = learnt(["xy"] * 5 + ["uv"] * 3 + ["q"], min_frequency=2)
    special = ["[PAD]", "[UNK]", "[SOS]", "[EOS]", "[S_0]", "[S_1]"]
    coords = [f"v{axis}={number}" for axis in range(4) for number in range(3)]
    letters = list("quvxy")
    assert tokens(made) == [*special, *coords, *letters, *(f"##{one}" for one in letters), "xy", "uv"]
    assert made.encode(["XY uvq qq ?"]) == [[28, 29, 23, 18, 23, 1]] or made.pieces(
        made.encode(["XY uvq qq ?"])[0]
    ) == ["xy", "uv", "##q", "q", "##q", "[UNK]"]
