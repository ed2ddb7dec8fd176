"""YAML text to plain data, with two rules more: one word of the command line is one value, and a number is written in
digits.

YAML ends a value at ` #`, joins lines, takes `&x` for a label and reads `010` as 8 and `1:30` as 90. Where a user meant
a path or a number, each of these is a wrong result without an error.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqcore.errors import ConfigError

_BRACKETED = re.compile(r"([^\[\]]*)(?:\[(.*)\])?", re.DOTALL)
_NEXT_SETTING = re.compile(r",(?=\s*\w+=)")
_FLOW = ("[", "{", '"', "'")
_UNCLEAR = re.compile(
    r"[-+]?(0[\d_]+"  # octal for YAML
    r"|0[xXbBoO][\da-fA-F_]+"
    r"|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?"  # to the base 60
    r"|[\d.]*_[\d._]*([eE][-+]?\d+)?"
    r"|\d{4000,})"
)
"""Numbers that are not in plain digits; they are read as text."""


def document(text: str) -> Any:
    """The data of a YAML text, as OmegaConf reads it: `1e-3` is a number. Numbers not in plain digits are text.

    Raises `yaml.YAMLError` or an error of OmegaConf.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        unclear = [node for node in _scalars(root) if node.style is None and _UNCLEAR.fullmatch(node.value)]
        for node in unclear:
            node.style, node.tag = "'", "tag:yaml.org,2002:str"
        if unclear:
            text = yaml.serialize(root, Dumper=yaml.SafeDumper)
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False) if root else {}
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def word(text: str) -> Any:
    """The value of one word of the command line: a list, a mapping, a quoted text, or the word as it stands.

    A word that is none of these is a number, a truth value or null if it reads so, and otherwise text to its last
    character. An empty word is null. Raises `yaml.YAMLError` or an error of OmegaConf.
    """
    if text.lstrip().startswith(_FLOW):
        _check_whole(text)
    elif not _is_plain(text):
        return text or None
    return document(f"value: {text}")["value"]


def from_text(text: str) -> Any:
    """A value that can only be given as text, such as an environment variable, read like a word; else the text."""
    try:
        return word(text)
    except (yaml.YAMLError, OmegaConfBaseException):
        return text


def pairs(words: Iterable[str], file: str) -> dict[str, Any]:
    """Words `key=value` as a mapping. Raises `ConfigError`, which names `file`, for other words."""
    found = {}
    for one in words:
        key, equals, text = one.strip().partition("=")
        if not key or not equals:
            raise ConfigError(f"{file}: '{one.strip()}' is not a setting; write key=value.")
        found[key] = from_text(text)
    return found


def bracketed(text: str, file: str) -> dict[str, Any]:
    """`NAME` or `NAME[key=value,...]` as a mapping with the name. Raises `ConfigError`, which names `file`."""
    found = _BRACKETED.fullmatch(text.strip())
    if found is None or not found[1]:
        raise ConfigError(f"{file}: '{text}' names no component; write NAME or NAME[key=value,...].")
    return {"name": found[1], **pairs(_NEXT_SETTING.split(found[2]) if found[2] else (), file)}


def plain_number(text: str) -> float | int | None:
    """The number that is meant by one that is not in plain digits, e.g. 10 by `010`; None for other texts."""
    digits = text.replace("_", "")
    if re.fullmatch("[-+]?0[0-9]+", digits) and len(text) < 30:
        return int(digits)
    found = yaml.safe_load(text) if _UNCLEAR.fullmatch(text) and len(text) < 30 else None
    return found if isinstance(found, (int, float)) else None


def _is_plain(text: str) -> bool:
    """Whether YAML reads the word as one scalar without any sign of its own, to the last character."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return False
    if not isinstance(node, yaml.ScalarNode) or node.style is not None or node.value != text:
        return False
    return node.tag.rpartition(":")[2] not in ("value", "merge")  # `=` and `<<`


def _check_whole(text: str) -> None:
    """Raise `yaml.YAMLError` if YAML leaves out or joins anything in a list, a mapping or a quoted text."""
    end = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if text[end : token.start_mark.index].strip():
            raise yaml.YAMLError("a ' #' outside of quotes")
        end = token.end_mark.index
        if isinstance(token, (yaml.AnchorToken, yaml.AliasToken, yaml.TagToken)):
            raise yaml.YAMLError("a '&', '*' or '!' outside of quotes")
        if isinstance(token, yaml.ScalarToken) and token.start_mark.line != token.end_mark.line:
            raise yaml.YAMLError("a line break inside a value")


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Every scalar below a node once, keys too."""
    seen, left = set[int](), [node] if node else []
    while left:
        here = left.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, yaml.ScalarNode):
            yield here
        elif isinstance(here, yaml.MappingNode):
            left += [part for pair in here.value for part in pair]
        else:
            left += here.value
