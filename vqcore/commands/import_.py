"""`vqcore import`: make an artefact of another system's tokenizer, or a config file of its training config."""

import argparse
from pathlib import Path
from typing import Any

from vqcore.artefacts.formats import digests, settings
from vqcore.artefacts.resolve import Named, resolve
from vqcore.commands.loading import access, again
from vqcore.compose.build import COMMAND_LINE, from_tree, saved_tree
from vqcore.compose.describe import annotated
from vqcore.config import Config
from vqcore.console import command, say
from vqcore.errors import CheckpointError, ConfigError, RunError, listed
from vqcore.files import aside, local
from vqcore.protocols import config_reader, explained, published
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.streams import put
from vqcore.tokenizer import Tokenizer


def run(args: argparse.Namespace) -> int:
    """Read SOURCE and write the artefact, or the config file if its name ends in .yaml; or list published weights."""
    if args.list:
        return _list(args)
    if args.format is None or len(args.overrides) < 2:
        raise ConfigError(
            f"{COMMAND_LINE}: import needs a format, a source and a new folder: vqcore import FORMAT SOURCE FOLDER. "
            f"Installed formats: {listed(_formats()) or 'none'}."
        )
    source, target, *words = args.overrides
    at = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    words, flags = words[:at], words[at:]
    cfg = settings(args.format, words, file=COMMAND_LINE)
    folder = local(target)
    if folder.suffix.lower() in (".yaml", ".yml"):
        _write_config(resolve(source, format=cfg), cfg, folder, flags)
        return 0
    if flags:
        raise ConfigError(
            f"{COMMAND_LINE}: {flags[0]}: flags after -- belong to a training config, FILE.yaml"
        )
    tokenizer = Tokenizer.load(source, format=cfg, **vars(access(args)))
    tokenizer.save(folder)
    say(f"{folder}: {tokenizer.cfg.modality.name} tokenizer, fingerprint {tokenizer.fingerprint[:16]}")
    say(f"next      {command('eval', folder, 'data.eval_path=FOLDER', *again(args, ours=True))}")
    say(f"          {command('tokenize', folder, 'FOLDER', 'tokens', *again(args, ours=True))}")
    return 0


def _write_config(named: Named, cfg: Config, target: Path, flags: list[str]) -> None:
    """Write a foreign training config as a config file of ours, which is checked before it gets its name."""
    format_ = registry().build("format", cfg, "format")
    if config_reader(format_) is None:
        raise CheckpointError(
            f"{cfg.name} reads tokenizers, not training configs; give a folder, not {target.name}."
        )
    if target.exists():
        raise _exists(target)
    read = explained(format_, named.path, flags)
    tree: dict[str, Any] = dict(read.tree)
    tree["run"] = {"dir": f"runs/{target.stem}", **tree.get("run", {})}
    found = digests(named.path)
    mark = f" (SHA-256 {found})" if isinstance(found, str) else ""
    try:
        with aside(target, new=True) as temporary:
            temporary.write_text(
                f"# From {named.source}{mark}, read by {cfg.name}.\n{annotated(tree, read.notes, read.remarks)}",
                encoding="utf-8",
            )
            from_tree(saved_tree(temporary), schema=RunConfig, file=f"{named.name}, as {cfg.name} reads it")
    except FileExistsError as error:  # another process was faster
        raise _exists(target) from error
    say(f"{target}: a training config, from {named}")
    for remark in read.remarks:
        say(f"note      {remark}")
    say(f"next      {command('check', target)}")


def _exists(target: Path) -> RunError:
    return RunError(
        f"{target} exists already and is not overwritten. Choose another name, or remove this file."
    )


def _list(args: argparse.Namespace) -> int:
    """Print what formats know of published weights: of one format, or of all."""
    if args.overrides:
        raise ConfigError(f"{COMMAND_LINE}: --list takes a format alone: vqcore import FORMAT --list")
    for name in [args.format] if args.format else _formats():
        found = registry().find("format", name)
        put(f"{found.name}  {found.component.summary}")
        for one in published(registry().load("format", name)):
            more = ", ".join(text for text in (one.note, one.licence) if text)
            put(f"  {one.name:24} hf://{one.id}{f'  {more}' if more else ''}")
    return 0


def _formats() -> list[str]:
    return [found.name for found in registry().components("format")]
