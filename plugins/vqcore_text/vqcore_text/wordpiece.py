"""WordPiece on Hugging Face's `tokenizers`, with one vocabulary for captions, boxes and other sequences, as in 4M."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqcore import config
from vqcore.config import at_least
from vqcore.errors import DataError, SettingError, cannot_import, cause, first_line
from vqcore.files import aside, local
from vqcore_text.classes import COCO

try:
    import tokenizers
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
except ImportError as error:
    raise ImportError(cannot_import(error, "tokenizers")) from error

SPECIAL = ("[PAD]", "[UNK]", "[SOS]", "[EOS]")
_PREFIX = "##"
_BATCH = 1024


class WordPiece:
    """A vocabulary of word pieces (arXiv 1609.08144, 4.1), as in 4M (arXiv 2312.06647, arXiv 2406.09406).

    Without `file` there is no vocabulary yet: `train` makes one, `save` writes it as an ordinary `tokenizer.json`.
    Ids, in this order: `[PAD] [UNK] [SOS] [EOS]`; `[S_0]` ... for masked spans; the coordinates `v0=0` ... `v0=999`,
    `v1=0` ...; the classes; `more`; the characters; the pieces, the most frequent first. Equal texts and settings give
    the same file, on any number of threads.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `text/wordpiece`. All but `file` are for training; a file has its own."""

        file: str | None = None
        """A `tokenizer.json` to use, e.g. the one that 4M publishes."""
        vocab_size: int = 30_000
        """Number of ids, special tokens included. Fewer, if the texts have no more pieces."""
        min_frequency: int = 0
        """A pair of pieces that is rarer in the texts is not joined."""
        lowercase: bool = True
        """Make all letters small."""
        strip_accents: bool | None = None
        """Take accents away; null: if `lowercase`."""
        clean_text: bool = True
        """Take control characters away, and make every white space a space."""
        handle_chinese_chars: bool = True
        """Make every Chinese character a word."""
        sentinels: int = 200
        """Number of tokens `[S_0]`, `[S_1]`, ... that stand for masked spans."""
        coords: tuple[str, ...] = ("v0", "v1", "v2", "v3")
        """Names of the coordinates of a box: left, top, right, bottom."""
        coord_bins: int = 1000
        """Number of tokens of each coordinate."""
        classes: str | tuple[str, ...] = "coco"
        """Names of classes that are one token each: `coco` for its 80, `none`, or a list."""
        more: tuple[str, ...] = ()
        """More special tokens."""

        def __post_init__(self) -> None:
            at_least(self, min_frequency=0, sentinels=0, coord_bins=0)
            if isinstance(self.classes, str) and self.classes not in ("coco", "none"):
                raise SettingError("classes", f"'{self.classes}' must be coco, none or a list of names")
            names = [token for token, _ in special_tokens(self)]
            if not all(name.strip() for name in names):
                raise SettingError(("classes", "more"), "a token has no letters")
            if len(set(names)) < len(names):
                twice = sorted(name for name in set(names) if names.count(name) > 1)
                raise SettingError(("coords", "classes", "more"), f"the token '{twice[0]}' is there twice")
            if self.vocab_size <= len(names):
                raise SettingError(
                    "vocab_size",
                    f"{self.vocab_size} must be above {len(names)}, the number of special tokens",
                )

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.vocab_size = cfg.vocab_size
        """Number of ids; before training, the most that there may be."""
        self._made: Tokenizer | None = None
        if cfg.file is not None:
            self._use(_read(local(cfg.file)))

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._made is None:
            raise DataError(
                "this text tokenizer has no vocabulary yet: set its file, or run: vqcore text train CONFIG"
            )
        return self._made

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without `[SOS]` and `[EOS]`."""
        return [made.ids for made in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of ids: as people write it if this has the same ids, else with a space between words.

        Raises `DataError` for an id that is not in the vocabulary.
        """
        given = [list(map(int, one)) for one in ids]
        neat = self._decoded(given, cleanup=True)
        same = [again == one for again, one in zip(self.encode(neat), given)]
        plain = self._decoded([one for one, good in zip(given, same) if not good], cleanup=False)
        rest = iter(plain)
        return [text if good else next(rest) for text, good in zip(neat, same)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of each id. Raises `DataError` for an id that is not in the vocabulary."""
        # A larger number than an id can be is an error of its own in the library.
        found = [self._tokenizer.id_to_token(id) if 0 <= id < self.vocab_size else None for id in ids]
        if None in found:
            raise DataError(
                f"{ids[found.index(None)]} is no id of this vocabulary, which has {self.vocab_size:,}."
            )
        return [piece for piece in found if piece is not None]

    def facts(self) -> Mapping[str, str]:
        """What the vocabulary is, for people."""
        added = self._tokenizer.get_added_tokens_decoder()
        pieces = self._tokenizer.get_vocab(with_added_tokens=True)
        special = [token.content for _, token in sorted(added.items())]
        found = {"special tokens": f"{len(special):,}"}
        if sentinels := [name for name in special if name.startswith("[S_")]:
            found["spans"] = f"{len(sentinels):,}, {sentinels[0]} to {sentinels[-1]}"
        axes: dict[str, list[int]] = {}
        for name in special:
            axis, equals, number = name.partition("=")
            if equals and number.isdecimal():
                axes.setdefault(axis, []).append(int(number))
        for axis, bins in axes.items():
            found[f"coordinate {axis}"] = (
                f"{axis}={min(bins)} to {axis}={max(bins)}, ids from {pieces[f'{axis}={bins[0]}']}"
            )
        found["characters"] = f"{sum(len(piece.removeprefix(_PREFIX)) == 1 for piece in pieces):,}"
        return found

    def train(self, texts: Iterable[str]) -> None:
        """Make the vocabulary. The texts are read twice: for their characters and for their words.

        Memory grows with the number of different words, not with the number of texts.
        """
        normalizer = normalizers.BertNormalizer(
            clean_text=self.cfg.clean_text,
            handle_chinese_chars=self.cfg.handle_chinese_chars,
            strip_accents=self.cfg.strip_accents,
            lowercase=self.cfg.lowercase,
        )
        special = [
            AddedToken(token, single_word=single, normalized=normal, special=True)
            for token, (single, normal) in special_tokens(self.cfg)
        ]
        names = [token.content for token in special]
        first, later = _alphabet(characters(texts), normalizer)
        order = dict.fromkeys([*names, *first, *later])
        if len(order) > self.cfg.vocab_size:
            raise DataError(
                f"text.vocab_size={self.cfg.vocab_size} is too small: {len(names):,} special tokens and "
                f"{len(order) - len(names):,} characters, alone and with ##, are {len(order):,}."
            )
        # The library numbers the pieces ##x in the order of a hash table with a random seed, and these numbers decide
        # which of two equally frequent pairs is joined first. Given as special tokens, they have numbers beforehand.
        trainer = trainers.WordPieceTrainer(
            vocab_size=self.cfg.vocab_size,
            min_frequency=self.cfg.min_frequency,
            show_progress=False,
            continuing_subword_prefix=_PREFIX,
            initial_alphabet=first,
            special_tokens=[*special, *later],
        )
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer, raw.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
        raw.train_from_iterator(_batches(texts), trainer)
        learnt = sorted(raw.get_vocab().items(), key=lambda item: item[1])
        vocab = {piece: id for id, piece in enumerate(order | dict(learnt))}
        made = Tokenizer(
            models.WordPiece(
                vocab, unk_token="[UNK]", continuing_subword_prefix=_PREFIX, max_input_chars_per_word=100
            )
        )
        made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece(prefix=_PREFIX)
        made.add_special_tokens(special)
        self._use(made)

    def save(self, path: Path) -> None:
        """Write the vocabulary as `tokenizer.json`, which `file` and every program that uses `tokenizers` read."""
        with aside(path) as temporary:
            self._tokenizer.save(str(temporary))

    def _use(self, made: Tokenizer) -> None:
        # The library counts its ids anew each time that it is asked, in milliseconds.
        self._made, self.vocab_size = made, made.get_vocab_size()

    def _decoded(self, ids: list[list[int]], *, cleanup: bool) -> list[str]:
        decoder = decoders.WordPiece(prefix=_PREFIX, cleanup=cleanup)
        return [decoder.decode(self.pieces(one)) for one in ids]


def special_tokens(cfg: WordPiece.Config) -> list[tuple[str, tuple[bool, bool]]]:
    """The special tokens in the order of their ids, and for each: a word of its own? compared after normalising?"""
    classes = {"coco": COCO, "none": ()}.get(cfg.classes) if isinstance(cfg.classes, str) else cfg.classes
    return [
        *((token, (False, False)) for token in SPECIAL),
        *((f"[S_{number}]", (True, False)) for number in range(cfg.sentinels)),
        *((f"{axis}={number}", (True, False)) for axis in cfg.coords for number in range(cfg.coord_bins)),
        *((name, (True, True)) for name in classes or ()),
        *((token, (True, False)) for token in cfg.more),
    ]


def characters(texts: Iterable[str]) -> set[str]:
    """The different characters of the texts."""
    found: set[str] = set()
    known = b""
    for text in texts:
        if not text.isascii():
            found.update(text)
        # Deleting known bytes is a hundred times as fast as looking at each character.
        elif new := text.encode().translate(None, known):
            found.update(new.decode())
            known = "".join(filter(str.isascii, found)).encode()
    return found


def _alphabet(found: set[str], normalizer: Any) -> tuple[list[str], list[str]]:
    """The characters as the vocabulary has them: those that begin a word, and with ## those that go on with one."""
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    begin = {letter for one in found for word, _ in split(normalizer.normalize_str(one)) for letter in word}
    inside = [
        letter
        for letter in begin
        if len(split(f"a{letter}a")) == 1 and len(split(normalizer.normalize_str(f"a{letter}a"))) == 1
    ]
    return sorted(begin), sorted(f"{_PREFIX}{letter}" for letter in inside)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while batch := list(itertools.islice(rest, _BATCH)):
        yield batch


def _read(path: Path) -> Tokenizer:
    try:
        made = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {cause(error)}.") from error
    except Exception as error:  # the library raises bare exceptions
        raise DataError(
            f"{path}: is no tokenizer.json of tokenizers {tokenizers.__version__}: {first_line(error)}."
        ) from error
    if not isinstance(made.model, models.WordPiece):
        raise DataError(f"{path}: is a {type(made.model).__name__}, not a WordPiece.")
    made.no_padding()
    made.no_truncation()
    return made
