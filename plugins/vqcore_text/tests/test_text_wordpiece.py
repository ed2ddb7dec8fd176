"""WordPiece: closed forms, the library's own training, 4M's file built by its steps, and the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from vqcore_text.classes import COCO
from vqcore_text.wordpiece import WordPiece, characters

from vqcore.artefacts.stored import open_store
from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.errors import ConfigError, DataError
from vqcore.schema import TextConfig
from vqcore.testing.conformance import TextConformance

RECIPE = Path(__file__).parents[3] / "cfgs/text/wordpiece-30k.yaml"
SMALL = {"sentinels": 2, "coord_bins": 3, "classes": "none"}
TEXTS = ["A cat, a hat.", "the cat and the hat", "don't do not", "Zürich and 北京"] * 3
SPECIAL = ["[PAD]", "[UNK]", "[SOS]", "[EOS]", "[S_0]", "[S_1]"]
COORDS = [f"v{axis}={number}" for axis in range(4) for number in range(3)]


def wordpiece(**settings):
    return WordPiece(WordPiece.Config(name="text/wordpiece", **{"vocab_size": 200, **SMALL, **settings}))


def learnt(texts=TEXTS, **settings):
    made = wordpiece(**settings)
    made.train(texts)
    return made


def pieces(made, text):
    return made.pieces(made.encode([text])[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("small") / "tokenizer.json"
    learnt().save(file)
    return wordpiece(file=str(file))


class TestWordPiece(TextConformance):
    component = "text/wordpiece"
    configs: ClassVar = ()
    texts = (
        "a cat",
        "",
        "two cats on a mat [S_1] v0=2 v3=0",
        "Don't. I do not, you're 'it' !",
        "日本 Zürich",
    )

    @pytest.fixture(autouse=True)
    def file(self, small, monkeypatch):
        monkeypatch.setattr(type(self), "configs", ({"vocab_size": 200, **SMALL, "file": small.cfg.file},))


def test_the_vocabulary_of_a_few_words_in_closed_form():
    """xy (5 times) is joined before uv (3 times); qz is rarer than min_frequency. Letters stand in their order."""
    made = learnt(["xy"] * 5 + ["uv"] * 3 + ["qz"], min_frequency=2)
    letters = list("quvxyz")
    assert made.pieces(range(made.vocab_size)) == [
        *SPECIAL, *COORDS, *letters, *(f"##{one}" for one in letters), "xy", "uv",
    ]  # fmt: skip
    assert pieces(made, "XY uvq qq ?") == ["xy", "uv", "##q", "q", "##q", "[UNK]"]


def test_the_vocabulary_ends_at_its_size():
    letters = len(SPECIAL) + len(COORDS) + 2 * 4
    assert learnt(["xy"] * 5 + ["uv"] * 3, vocab_size=letters + 1).vocab_size == letters + 1
    with pytest.raises(
        DataError, match=f"vocab_size={letters - 1} is too small: 18 special tokens and 8 char"
    ):
        learnt(["xy"] * 5 + ["uv"] * 3, vocab_size=letters - 1)


@pytest.mark.parametrize(
    ("settings", "text", "found"),
    [
        ({}, "Zürich", ["zurich"]),
        ({"lowercase": False}, "Zürich", ["Zürich"]),
        ({"strip_accents": False}, "Zürich", ["zürich"]),
        ({}, "北京", ["北", "京"]),
        ({"handle_chinese_chars": False}, "北京", ["北京"]),
        ({}, "cat\u0007\u00a0hat", ["cat", "hat"]),
        ({}, "v0=2 v0=3", ["v0=2", "[UNK]", "[UNK]", "[UNK]"]),
        ({}, "xv0=2", ["[UNK]", "[UNK]", "[UNK]"]),
        ({"classes": ("Big Cat",)}, "a big cat, bigger", ["a", "big cat", ",", "[UNK]"]),
        ({"more": ("<a>",)}, "<a> a", ["<a>", "a"]),
    ],
)
def test_settings(settings, text, found):
    assert pieces(learnt(**settings), text) == found


def test_decoded_texts_are_neat_unless_their_ids_would_be_others(small):
    assert small.decode(small.encode(["A cat, a hat."])) == ["a cat, a hat."]
    odd = learnt(more=(" .x",))
    ids = odd.encode(["cat  .x"])
    assert odd.encode(odd.decode(ids)) == ids
    with pytest.raises(DataError, match="-1 is no id of this vocabulary"):
        small.decode([[-1]])
    with pytest.raises(DataError, match=f"{small.vocab_size} is no id of this vocabulary"):
        small.pieces([0, small.vocab_size])


@examples(max_examples=200)
@given(texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=4))
def test_any_text_has_ids_that_come_back(small, texts):
    ids = small.encode(texts)
    assert small.encode(small.decode(ids)) == ids


def test_all_words_of_a_text_are_learnt_as_the_library_learns_them():
    """With room for every join, each word is one piece, in the library's own training as well."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "straße", "zürich"]
    made = learnt(words, vocab_size=4000)
    theirs = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    theirs.normalizer, theirs.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    theirs.train_from_iterator(
        words, trainers.WordPieceTrainer(vocab_size=4000, special_tokens=["[UNK]"], show_progress=False)
    )
    for word in words:
        assert pieces(made, word) == theirs.encode(word).tokens and len(pieces(made, word)) == 1


def test_trainings_of_other_processes_have_equal_bytes(tmp_path):
    """The library alone gives other vocabularies in each process: it numbers pieces by a hash table."""
    (tmp_path / "train.py").write_text(
        "import random, sys\nfrom pathlib import Path\nfrom vqcore_text.wordpiece import WordPiece\n"
        "draw = random.Random(0)\nwords = [''.join(draw.choices('abcdefgh', k=5)) for _ in range(300)]\n"
        "made = WordPiece(WordPiece.Config(vocab_size=200, sentinels=1, coord_bins=0, classes='none'))\n"
        "made.train([' '.join(words[n : n + 9]) for n in range(0, 300, 3)])\nmade.save(Path(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules\n"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, str(tmp_path / "train.py"), str(tmp_path / name)], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_characters_of_texts():
    assert characters(["abc", "é a", "abd\0"]) == set("abcdé \0")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A vocabulary as 4M's script makes it, with fewer pieces: the steps and settings of the published file."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[SOS]", "[EOS]"]
    special += [AddedToken(f"[S_{i}]", single_word=True, normalized=False) for i in range(200)]
    special += [
        AddedToken(f"v{axis}={i}", single_word=True, normalized=False)
        for axis in range(4)
        for i in range(1000)
    ]
    special += [AddedToken(name, single_word=True, normalized=True) for name in COCO]
    trainer = trainers.WordPieceTrainer(
        vocab_size=4400,
        min_frequency=0,
        show_progress=False,
        continuing_subword_prefix="##",
        special_tokens=special,
    )
    made.train_from_iterator(["a dog on the street, not far from 0 = zero vs one"] * 3, trainer)
    file = tmp_path_factory.mktemp("theirs") / "text_tokenizer_4m_wordpiece_30k.json"
    made.save(str(file))
    return made, file


def test_a_file_of_4m_gives_its_ids(theirs):
    made, file = theirs
    ours = WordPiece(WordPiece.Config(file=str(file)))
    known = {"[PAD]": 0, "[EOS]": 3, "[S_0]": 4, "[S_199]": 203, "v0=0": 204, "v1=999": 2203, "v3=999": 4203}
    known |= {"airplane": 4204, "hot dog": 4242, "person": 4253, "zebra": 4283}
    assert {text: ours.encode([text])[0] for text in known} == {text: [id] for text, id in known.items()}
    texts = [
        "v0=3 v1=4 v2=5 v3=999 hot dog v0=1",
        "A dog, [S_3] on the Street!",
        "v0=1000",
        "zebras",
        "",
        "Ünï",
    ]
    assert ours.encode(texts) == [made.encode(text).ids for text in texts]
    assert len(ours.encode(["v0=1000"])[0]) > 1  # no such bin: it falls into pieces
    facts = ours.facts()
    assert facts["special tokens"] == "4,284" and facts["coordinate v2"] == "v2=0 to v2=999, ids from 2204"


def test_our_special_tokens_are_those_of_4m(theirs):
    ours = WordPiece(load(str(RECIPE), schema=TextConfig).config.text)
    assert ours.vocab_size == 30_000
    ours = WordPiece(WordPiece.Config(vocab_size=4400))
    ours.train(["a dog on the street"])
    added = [
        one._tokenizer.get_added_tokens_decoder()
        for one in (ours, WordPiece(WordPiece.Config(file=str(theirs[1]))))
    ]
    first, second = ({id: token.__getstate__() for id, token in one.items()} for one in added)
    assert first == second and len(first) == 4284


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["text.vocab_size=4284"], "text.vocab_size=4284 must be above 4284, the number of special tokens"),
        (["text.classes=coca"], "text.classes='coca' must be coco, none or a list of names"),
        (["text.more=['[PAD]']"], "the token '[PAD]' is there twice"),
        (["text.more=[' ']"], "text.more"),
        (["text.coord_bins=-1"], "text.coord_bins=-1 must be at least 0"),
    ],
)
def test_settings_that_are_refused(settings, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        load(str(RECIPE), settings, schema=TextConfig)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file"),
        ("{}", "is no tokenizer.json of tokenizers"),
        (Tokenizer(models.BPE()).to_str(), "is a BPE, not a WordPiece"),
    ],
)
def test_files_that_are_refused(tmp_path, content, text):
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=text):
        wordpiece(file=str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="no vocabulary yet"):
        wordpiece().encode(["a"])


def test_verbs_know_whose_config_it_is(capsys):
    assert main(["config", "recipe:text/wordpiece-30k", "out=there"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["out"] == "there"
    for verb in ("check", "train", "fit"):
        assert main([verb, str(RECIPE)]) == 2
        told = capsys.readouterr()
        assert f"is a config of a text tokenizer. Run: vqcore text train {RECIPE}" in told.out + told.err
    quick = RECIPE.parents[1] / "quickstart.yaml"
    assert main(["text", "train", str(quick)]) == 2
    assert f"is a config of a tokenizer. Run: vqcore train {quick}" in capsys.readouterr().err


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("captions").mkdir()
    for number, caption in enumerate(("A mat", "two dogs, v0=1 v1=2")):
        Path(f"captions/{number}.txt").write_text(caption)
    words = ["text", "train", str(RECIPE), "text.vocab_size=4350", "out=made"]
    assert main([*words, "data.path=captions/*.txt"]) == 0
    assert "made: text/wordpiece, 4,3" in capsys.readouterr().out
    assert Tokenizer.from_file("made/tokenizer.json").encode("a mat").tokens == ["a", "mat"]
    assert main(words) == 2 and "made exists already" in capsys.readouterr().err
    assert main(["text", "inspect", "made", "A hot dog"]) == 0
    told = capsys.readouterr().out
    assert "special tokens  4,284" in told and "a  hot dog" in told and "decoded         a hot dog" in told
    assert main(["text", "encode", "made", "captions", "tokens", "--length", "4"]) == 0
    assert "cut       1 text of more than 4 ids" in capsys.readouterr().out
    assert (
        open_store(Path("tokens")).rows.codes(0)[:, 0].tolist()
        != open_store(Path("tokens")).rows.codes(1)[:, 0].tolist()
    )
    assert main(["text", "decode", "made", "tokens"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"key": "0", "text": "a mat"}, {"key": "1", "text": "two dogs, v0=1"}]
    assert main(["text", "decode", "text/wordpiece:made/tokenizer.json", "tokens", "out.jsonl"]) == 0
    assert (
        main(
            [
                "text",
                "encode",
                "made",
                "out.jsonl",
                "again",
                "--length",
                "5",
                "--field",
                "text",
                "--key",
                "key",
            ]
        )
        == 0
    )
    assert Path("again/shard-00000.arrow").read_bytes() != b""
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["inspect", "nothing"], "nothing: is no folder of a text tokenizer"),
        (["inspect", "text/wordpeice:a.json"], "Did you mean 'text/wordpiece'?"),
        (["inspect", "text/wordpiece:a.json"], "a.json: cannot be read"),
        (["encode", "a"], "write vqcore text encode TOKENIZER TEXTS STORE"),
        (["inspect", "a", "--length", "3"], "--length belongs to vqcore text encode"),
        (["decode", "text/wordpiece:{small}", "nothing"], "nothing"),
        (["encode", "text/wordpiece:{small}", "nothing", "out"], "there is no such file"),
        (["decode", "text/wordpiece:{small}", "nothing", "out.txt"], "must end in .jsonl"),
    ],
)
def test_wrong_words(small, tmp_path, monkeypatch, capsys, words, text):
    monkeypatch.chdir(tmp_path)
    assert main(["text", *(word.format(small=small.cfg.file) for word in words)]) == 2
    assert text in capsys.readouterr().err
