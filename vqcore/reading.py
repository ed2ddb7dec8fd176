"""Reads text, JSON and YAML that may come from anywhere, within bounds: the size of the file, nesting, aliases, shape.

Whatever is wrong with a file becomes one line, an error of the class `kind` that the caller names. Light layer: PyYAML
is imported when YAML is read.
"""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqcore.errors import VqcoreError, cause, first_line

if TYPE_CHECKING:
    import yaml

MOST_JSON, MOST_YAML = 64 << 20, 1 << 20
"""Most bytes of a file."""
DEEPEST = 64
"""Most levels of nested mappings and lists."""
MOST_NODES = 50_000
"""Most values of a YAML text, each counted as often as aliases repeat it."""
LONGEST_NUMBER = 400
"""Most letters of a number in YAML: Python takes very long for a number of a million digits."""
REAL = (int, float)
"""The shape of a number."""


def size_of(path: Path, kind: type[VqcoreError], where: str = "") -> int:
    """The number of bytes of a regular file. Raises `kind` for anything else: a folder, a pipe, a missing file.

    `where` is what the error's text calls the file; by default its path.
    """
    where = where or str(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        raise kind(f"{where}: there is no such file.") from None
    except (OSError, ValueError) as error:
        raise kind(f"{where}: cannot be read: {cause(error)}.") from error
    if not stat.S_ISREG(found.st_mode):
        raise kind(
            f"{where}: is {'a folder' if stat.S_ISDIR(found.st_mode) else 'a device or a pipe'}, no file."
        )
    return found.st_size


def read_text(path: Path, kind: type[VqcoreError], *, most: int = MOST_JSON, where: str = "") -> str:
    """The text of a file in UTF-8 of at most `most` bytes. Raises `kind`."""
    where = where or str(path)
    size = size_of(path, kind, where)
    if size > most:
        raise kind(f"{where}: has {size:,} bytes; such a file has at most {most:,}.")
    try:
        with path.open("rb") as file:  # a file that grows meanwhile is read up to the limit
            return file.read(most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{where}: this is not a text file in UTF-8.") from error
    except OSError as error:
        raise kind(f"{where}: cannot be read: {cause(error)}.") from error


def read_json(
    path: Path, kind: type[VqcoreError], shape: Any = None, *, most: int = MOST_JSON, where: str = ""
) -> Any:
    """The content of a JSON file of a given shape (`misfit`). Raises `kind`."""
    text, where = read_text(path, kind, most=most, where=where), where or str(path)
    try:
        tree = parsed(text)
    except ValueError as error:
        raise kind(f"{where}: damaged: {first_line(error)}.") from error
    if wrong := misfit(tree, shape):
        raise kind(f"{where}: damaged: {wrong}.")
    return tree


def parsed(text: str) -> Any:
    """The content of a JSON text. Raises `ValueError` for any other text, and for more than `DEEPEST` levels."""
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} levels of nested values") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {first_line(error)}") from error
    level = [tree]
    for _ in range(DEEPEST):
        level = [
            value
            for node in level
            if isinstance(node, (dict, list))
            for value in (node.values() if isinstance(node, dict) else node)
            if isinstance(value, (dict, list))
        ]
        if not level:
            return tree
    raise ValueError(f"more than {DEEPEST} levels of nested values")


# Shapes of plain data


@dataclass(frozen=True)
class Each:
    """The shape of a mapping whose values all have one shape."""

    shape: Any


def misfit(value: Any, shape: Any, place: str = "") -> str:
    """What is wrong with plain data, as text with its place; empty if the data has the shape.

    A shape is None (anything), a type or several (a bool is no number), a list of one shape, `Each`, or a mapping of
    shapes by key. A key that ends with `?` may be missing; keys that the shape lacks are not looked at.
    """
    if isinstance(shape, (Each, Mapping)):
        wrong = _not_a(value, (Mapping,), place)
        shapes = {} if wrong else _by_key(value, shape)
        missing = [key for key in shapes if key not in value]
        wrong = f"{_named(place)} has no '{missing[0]}'" if missing else wrong
        each = [] if wrong else [(f"{place}.{key}", value[key], inner) for key, inner in shapes.items()]
    elif isinstance(shape, list):
        wrong = _not_a(value, (list,), place)
        each = [] if wrong else [(f"{place}[{index}]", one, shape[0]) for index, one in enumerate(value)]
    else:
        return "" if shape is None else _not_a(value, shape if isinstance(shape, tuple) else (shape,), place)
    return wrong or next(filter(None, (misfit(one, inner, at) for at, one, inner in each)), "")


def _by_key(value: Mapping[str, Any], shape: Each | Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of the keys that a mapping has or must have."""
    if isinstance(shape, Each):
        return dict.fromkeys(value, shape.shape)
    names = {key.removesuffix("?"): inner for key, inner in shape.items()}
    return {key: inner for key, inner in names.items() if key in value or f"{key}?" not in shape}


_WORDS = {
    Mapping: "a mapping",
    dict: "a mapping",
    list: "a list",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def _not_a(value: Any, types: tuple[type, ...], place: str) -> str:
    if isinstance(value, types) and (not isinstance(value, bool) or bool in types):
        bits = value.bit_length() if isinstance(value, int) else 0
        return f"{_named(place)} is a whole number of {bits} bits" if bits > 63 else ""
    words = dict.fromkeys(
        _WORDS.get(one, "a whole number" if types == (int,) else "a number") for one in types
    )
    found = _WORDS.get(type(value), "a number")
    return f"{_named(place)} is {found}, not {' or '.join(words)}"


def _named(place: str) -> str:
    return place.lstrip(".") or "the content"


# YAML


def yaml_root(text: str) -> "yaml.Node | None":
    """The tree of nodes of a YAML text; nothing of it is constructed. Raises `yaml.YAMLError`, also beyond the bounds.

    A few lines of YAML can stand for a billion values, by aliases of aliases.
    """
    import yaml
    from yaml.composer import ComposerError

    class Bounded(yaml.SafeLoader):
        depth = count = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark = self.peek_event().start_mark
            before, alias = self.count, self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > DEEPEST:
                raise ComposerError(None, None, f"more than {DEEPEST} levels of nested values", mark)
            node: Any = super().compose_node(parent, index)
            self.depth -= 1
            if alias and node not in sizes:
                raise ComposerError(None, None, "YAML recursive aliases are not supported", mark)
            self.count += sizes[node] if alias else 1
            if self.count > MOST_NODES:
                raise ComposerError(None, None, f"more than {MOST_NODES:,} values, aliases repeated", mark)
            kind = str(node.tag).rpartition(":")[2]
            if kind in ("int", "float", "timestamp") and len(node.value) > LONGEST_NUMBER:
                raise ComposerError(None, None, f"a number of {len(node.value):,} letters", mark)
            sizes.setdefault(node, self.count - before)
            return node

    if len(text) > MOST_YAML:
        raise ComposerError(None, None, f"more than {MOST_YAML:,} letters", None)
    sizes: dict[Any, int] = {}
    return yaml.compose(text, Loader=Bounded)


def is_mapping(root: "yaml.Node | None") -> bool:
    """Whether a YAML text is a plain mapping; a set, or a mapping with a tag of its own, is none."""
    return root is not None and root.tag == "tag:yaml.org,2002:map"


def read_yaml(path: Path, kind: type[VqcoreError]) -> Any:
    """The plain content of a YAML file. Raises `kind`."""
    import yaml

    text = read_text(path, kind, most=MOST_YAML)
    try:
        yaml_root(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise kind(f"{path}: damaged: {yaml_reason(error)}.") from error


def yaml_reason(error: Exception) -> str:
    """The text for an error of PyYAML: `line 3, column 1: not valid YAML: mapping values are not allowed here`."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}not valid YAML: {str(getattr(error, 'problem', None) or first_line(error)).rstrip('.')}"


# Memory


def memory() -> int:
    """The bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(need: int, kind: type[VqcoreError], where: str) -> None:
    """Raise `kind` if something needs more bytes of memory than this machine has."""
    if need > (held := memory()):
        raise kind(f"{where}: needs {need:,} bytes of memory; this machine has {held:,}.")
