"""`vqcore text`: make the vocabulary of a text tokenizer; turn texts into ids and back; look at a vocabulary."""

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqcore.artefacts.codes import CodeShape, TokenFiles
from vqcore.compose.build import COMMAND_LINE, component, from_tree, saved_tree
from vqcore.compose.describe import dump
from vqcore.compose.layers import load, settings_of
from vqcore.config import Config, slot, to_tree
from vqcore.console import ProgressLine, command, say
from vqcore.data.texts import Texts
from vqcore.errors import ConfigError, DataError, RunError, listed
from vqcore.files import folder_aside, local, write_text
from vqcore.plugin import kind_name
from vqcore.protocols import learner, shows_pieces
from vqcore.registry import registry
from vqcore.schema import TextConfig, TextsConfig
from vqcore.tokens.store import Claims, code_dtype, save_array

VOCABULARY = "tokenizer.json"
CONFIG = "config.yaml"
_BATCH = 1024
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """The config in a folder of a text tokenizer."""

    text: Config = slot("text")


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    return {"train": _train, "encode": _encode, "decode": _decode, "inspect": _inspect}[args.action](args)


def _train(args: argparse.Namespace) -> int:
    cfg = load(args.config, args.overrides, schema=TextConfig).config
    text = registry().build("text", cfg.text, "text")
    trained = learner(text)
    if trained is None:
        raise ConfigError(
            f"{args.config}: text.name={cfg.text.name} has a fixed vocabulary; nothing is to be trained."
        )
    folder = local(cfg.out)
    if folder.exists():
        raise RunError(f"{folder} exists already and is not overwritten. Choose another folder: out=FOLDER.")
    texts = Texts(cfg.data)
    trained.train(_Watched(texts))
    with folder_aside(folder) as aside:
        trained.save(aside / VOCABULARY)
        saved = {**to_tree(cfg.text), "file": VOCABULARY}
        write_text(aside / CONFIG, dump({"text": saved}))
    say(f"{folder}: {cfg.text.name}, {text.vocab_size:,} ids")
    say(f"next      {command('text', 'inspect', folder, 'a text')}")
    say(f"          {command('text', 'encode', folder, 'TEXTS', 'tokens')}")
    return 0


class _Watched:
    """The texts alone, with a line of progress for each time that they are read."""

    def __init__(self, texts: Texts):
        self.texts = texts
        self.rounds = itertools.count(1)

    def __iter__(self) -> Iterator[str]:
        total = max(1, self.texts.total // _MIB)
        with ProgressLine(f"reading {next(self.rounds)}", total, unit="MiB") as line:
            for number, each in enumerate(self.texts):
                if number % _BATCH == 0:
                    line.update(min(each.done // _MIB, total - 1))
                yield each.text
            line.update(total)


def _encode(args: argparse.Namespace) -> int:
    name, text, digest = _opened(args.tokenizer)
    cfg = from_tree(
        {"path": args.input, **settings_of(args.overrides)}, schema=TextsConfig, file=COMMAND_LINE
    )
    texts, root = Texts(cfg), local(args.output)
    size = text.vocab_size
    count = ids = 0
    total = max(1, texts.total // _MIB)
    manifest = {
        "text": name,
        "fingerprint": digest,
        "codebook_size": size,
        "grid": [None],
        "num_codebooks": 1,
    }
    with Claims(manifest) as claims, ProgressLine("encoding", total, unit="MiB") as line:
        rest = iter(texts)
        while batch := list(itertools.islice(rest, _BATCH)):
            for one, found in zip(batch, text.encode([each.text for each in batch])):
                path = _inside(root, one.key, ".npy")
                claims.check(path.parent, path if path.exists() else None)
                claims.write(path.parent)
                save_array(path, np.array(found, dtype=code_dtype(size)).reshape(-1, 1))
                ids += len(found)
            count += len(batch)
            line.update(min(batch[-1].done // _MIB, total - 1))
        line.update(total)
    if not count:
        raise DataError(f"{args.input}: holds no texts.")
    say(f"ids       {root}  ({count:,} texts, {ids:,} ids below {size:,}, {ids / count:.1f} a text)")
    say(f"next      {command('text', 'decode', args.tokenizer, args.output, 'texts')}")
    return 0


def _decode(args: argparse.Namespace) -> int:
    _, text, digest = _opened(args.tokenizer)
    tokens = TokenFiles(local(args.tokens), CodeShape(1, 1, text.vocab_size))
    tokens.check_maker(digest)
    root = local(args.output)
    for batch in _batched(tokens):
        texts = text.decode([np.asarray(tokens[key])[:, 0].tolist() for key in batch])
        for key, one in zip(batch, texts):
            write_text(_inside(root, key, ".txt"), f"{one}\n")
    say(f"texts     {root}  ({len(tokens):,} files)")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    name, text, digest = _opened(args.tokenizer)
    looked = shows_pieces(text)
    facts = {
        "tokenizer": name,
        "fingerprint": digest[:16],
        **(looked.facts() if looked else {"ids": f"{text.vocab_size:,}"}),
    }
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        say(f"{key:{width}}{value}")
    for given, ids in zip(args.texts, text.encode(args.texts)):
        say(f"\n{given}")
        if looked:
            say(f"{'pieces':{width}}{'  '.join(looked.pieces(ids))}")
        say(f"{'ids':{width}}{' '.join(map(str, ids))}")
        say(f"{'decoded':{width}}{text.decode([ids])[0]}")
    return 0


def _opened(given: str) -> tuple[str, Any, str]:
    """The name, the text tokenizer, and the SHA-256 of its vocabulary, of what a user names on the command line."""
    name, colon, file = given.partition(":")
    if colon and "/" in name and not Path(given).exists():
        path = local(file)
        cfg = component("text", {"name": name, "file": str(path)}, file=COMMAND_LINE)
    else:
        folder = local(given)
        if not (folder / CONFIG).is_file():
            raise DataError(
                f"{given}: is no folder of a {kind_name('text')}, which has {CONFIG} and {VOCABULARY}. A file of "
                f"another program is given with the name of what reads it: {_names()}:{given}."
            )
        tree = saved_tree(folder / CONFIG)
        path = folder / VOCABULARY
        if isinstance(tree.get("text"), dict):
            tree["text"]["file"] = str(path)
        cfg = from_tree(tree, schema=_Saved, file=str(folder / CONFIG)).text
    text = registry().build("text", cfg, "text")
    return cfg.name, text, hashlib.sha256(path.read_bytes()).hexdigest()


def _names() -> str:
    return listed(found.name for found in registry().components("text")) or "NAME"


def _inside(root: Path, key: str, suffix: str) -> Path:
    """The file of a key below a folder. Raises `DataError` for a key that leads out of it."""
    path = root / f"{key}{suffix}"
    if Path(key).is_absolute() or ".." in Path(key).parts or "\0" in key:
        raise DataError(f"the key {json.dumps(key)} leads out of {root}.")
    return path


def _batched(tokens: TokenFiles) -> Iterator[list[str]]:
    rest = iter(tokens)
    while batch := list(itertools.islice(rest, _BATCH)):
        yield batch
