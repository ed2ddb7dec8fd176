"""`vqcore text`: make the vocabulary of a text tokenizer; turn texts into ids and back; look at a vocabulary."""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vqcore.compose.build import COMMAND_LINE, component, from_tree, saved_tree
from vqcore.compose.describe import dump
from vqcore.compose.layers import load
from vqcore.config import Config, slot, to_tree
from vqcore.console import command, say
from vqcore.data.texts import Texts
from vqcore.errors import ConfigError, DataError, RunError, listed, plural
from vqcore.files import aside, folder_aside, local, write_text
from vqcore.plugin import kind_name
from vqcore.protocols import learner, shows_pieces
from vqcore.registry import registry
from vqcore.schema import TextConfig, TextsConfig
from vqcore.tokens.texts import Watched, decode_texts, encode_texts

VOCABULARY = "tokenizer.json"
CONFIG = "config.yaml"
WORDS = {
    "train": (1, None, "CONFIG [key.path=value ...]"),
    "encode": (3, 3, "TOKENIZER TEXTS STORE"),
    "decode": (2, 3, "TOKENIZER STORE [FILE.jsonl]"),
    "inspect": (1, None, "TOKENIZER [TEXT ...]"),
}
"""How many words each action takes at least and at most, and which."""


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """The config in a folder of a text tokenizer."""

    text: Config = slot("text")


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    least, most, wanted = WORDS[args.what]
    if not least <= len(args.overrides) <= (most or len(args.overrides)):
        raise ConfigError(f"{COMMAND_LINE}: write vqcore text {args.what} {wanted}.")
    for flag, given in (
        ("field", args.field),
        ("key", args.key),
        ("store", args.store),
        ("length", args.length),
    ):
        if given and args.what != "encode":
            raise ConfigError(f"--{flag} belongs to vqcore text encode.")
    actions: dict[str, Callable[..., int]] = {
        "train": _train,
        "encode": _encode,
        "decode": _decode,
        "inspect": _inspect,
    }
    return actions[args.what](args, *args.overrides)


def _train(args: argparse.Namespace, path: str, *overrides: str) -> int:
    cfg = load(path, overrides, schema=TextConfig).config
    text = registry().build("text", cfg.text, "text")
    trained = learner(text)
    if trained is None:
        raise ConfigError(
            f"{path}: text.name={cfg.text.name} has a fixed vocabulary; there is nothing to train."
        )
    folder = local(cfg.out)
    if folder.exists():
        raise RunError(f"{folder} exists already and is not overwritten. Choose another folder: out=FOLDER.")
    trained.train(_Plain(Texts(cfg.data)))
    with folder_aside(folder) as beside:
        trained.save(beside / VOCABULARY)
        write_text(beside / CONFIG, dump({"text": {**to_tree(cfg.text), "file": VOCABULARY}}))
    say(f"{folder}: {cfg.text.name}, {text.vocab_size:,} ids")
    say(f"next      {command('text', 'inspect', folder, 'a text')}")
    say(f"          {command('text', 'encode', folder, 'TEXTS', 'tokens')}")
    return 0


class _Plain:
    """Texts without their keys, as often as they are asked for."""

    def __init__(self, texts: Texts):
        self.texts = texts

    def __iter__(self) -> Iterator[str]:
        return (each.text for each in Watched(self.texts, "reading"))


def _encode(args: argparse.Namespace, given: str, source: str, target: str) -> int:
    name, text, fingerprint = _opened(given)
    texts = Texts(TextsConfig(path=source, field=args.field, key=args.key))
    length = args.length or 256
    done = encode_texts(
        text,
        texts,
        local(target),
        name=name,
        fingerprint=fingerprint,
        length=length,
        store=args.store or "arrow",
    )
    if done.encoded:
        say(
            f"texts     {done.texts:,}, of these {done.encoded:,} now, with {done.ids / done.encoded:.1f} ids a text"
        )
    else:
        say(f"texts     {done.texts:,}, all of them done before")
    if done.cut:
        say(f"cut       {plural(done.cut, 'text')} of more than {length} ids; --length makes the rows longer")
    say(f"ids       {target}  ({length} a row, below {text.vocab_size:,})")
    say(f"next      {command('text', 'decode', given, target)}")
    return 0


def _decode(args: argparse.Namespace, given: str, source: str, target: str | None = None) -> int:
    _, text, fingerprint = _opened(given)
    pairs = decode_texts(text, local(source), fingerprint)
    lines = (json.dumps({"key": key, "text": one}, ensure_ascii=False) for key, one in pairs)
    if target is None:
        for line in lines:
            say(line)
        return 0
    path = local(target)
    if path.suffix != ".jsonl":
        raise ConfigError(f"{COMMAND_LINE}: {target} must end in .jsonl: each line is a key and a text.")
    if path.exists():
        raise RunError(f"{target} exists already and is not overwritten. Choose another file.")
    with (
        aside(path, new=True) as beside,
        beside.open("w", encoding="utf-8", errors="surrogateescape") as file,
    ):
        count = sum(1 for line in lines if file.write(f"{line}\n"))
    say(f"texts     {target}  ({plural(count, 'line')})")
    return 0


def _inspect(args: argparse.Namespace, given: str, *texts: str) -> int:
    name, text, fingerprint = _opened(given)
    looked = shows_pieces(text)
    facts = {"tokenizer": name, "fingerprint": fingerprint[:16], "vocabulary": f"{text.vocab_size:,} ids"}
    facts |= looked.facts() if looked else {}
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        say(f"{key:{width}}{value}")
    for one, ids in zip(texts, text.encode(texts)):
        say(f"\n{one}")
        if looked:
            say(f"{'pieces':{width}}{'  '.join(looked.pieces(ids))}")
        say(f"{'ids':{width}}{' '.join(map(str, ids))}")
        say(f"{'decoded':{width}}{text.decode([ids])[0]}")
    return 0


def _opened(given: str) -> tuple[str, Any, str]:
    """The name, the text tokenizer, and the SHA-256 of its vocabulary, of what a user names on the command line."""
    name, colon, file = given.partition(":")
    if colon and not local(given).exists():
        path = local(file)
        cfg = component("text", {"name": name, "file": str(path)}, file=COMMAND_LINE)
    else:
        folder = local(given)
        if not (folder / CONFIG).is_file():
            known = listed(found.name for found in registry().components("text")) or "NAME"
            raise DataError(
                f"{given}: is no folder of a {kind_name('text')}, which has {CONFIG} and {VOCABULARY}. A vocabulary of "
                f"another program is given with the name of what reads it: {known}:FILE."
            )
        tree = saved_tree(folder / CONFIG)
        path = folder / VOCABULARY
        if isinstance(tree.get("text"), dict):
            tree["text"]["file"] = str(path)
        cfg = from_tree(tree, schema=_Saved, file=str(folder / CONFIG)).text
    text = registry().build("text", cfg, "text")
    return cfg.name, text, hashlib.sha256(path.read_bytes()).hexdigest()
