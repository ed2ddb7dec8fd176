"""Configs as text: YAML for files and the command line, and the list of settings that `vqcore show` prints."""

import ast
import dataclasses
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from vqcore.config import Config, to_tree
from vqcore.errors import printable
from vqcore.plugin import a_kind

REQUIRED = "required"
WIDTH = 118
"""Columns of a config file with comments."""


def dump(config: Any) -> str:
    """A config as complete and resolved YAML. Loading this YAML gives an equal object."""
    return _yaml(to_tree(config), default_flow_style=None, width=110)


def inline(value: Any) -> str:
    """A value in one line, as written after `key=` on the command line or after `key: ` in a file."""
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)  # 1e-08, where YAML writes 1.0e-08
    return _yaml(value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")


def annotated(tree: Mapping[str, Any], notes: Mapping[str, str], remarks: Sequence[str] = ()) -> str:
    """A config file with comments: `remarks` at its head, the note of a dotted key above its line.

    A mapping below the top stands in one line if it fits there and none of its keys has a note.
    """
    lines = [line for remark in remarks for line in _comment(remark, "")]

    def write(node: Mapping[str, Any], above: str, indent: str) -> None:
        for key, value in node.items():
            path = f"{above}{key}"
            lines.extend(_comment(notes[path], indent) if path in notes else [])
            line = f"{indent}{inline(str(key))}: {inline(value)}"
            noted = any(name.startswith(f"{path}.") for name in notes)
            if isinstance(value, Mapping) and value and (not indent or noted or len(line) > WIDTH):
                lines.append(f"{indent}{inline(str(key))}:")
                write(value, f"{path}.", f"{indent}  ")
            else:
                lines.append(line)

    write(tree, "", "")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        printable(" ".join(text.split())),
        WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_on_hyphens=False,
    )


@dataclass(frozen=True)
class Setting:
    """One setting of a component, for `vqcore show`. `default` is YAML text or `REQUIRED`."""

    name: str
    type: str
    default: str
    text: str


def settings(cls: type) -> list[Setting]:
    """The settings of a config class: name, type, default, and the string below the field in the source code."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts.update(_field_texts(base))
    hints = typing.get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        if f.name == "name" and issubclass(cls, Config):
            continue
        if "slot" in f.metadata:
            type_name = a_kind(f.metadata["slot"])
        elif "slots" in f.metadata:
            kind = f.metadata["slots"]
            kinds = f"{kind[:-1]}ies" if kind.endswith("y") else kind if kind == "data" else f"{kind}s"
            type_name = f"a mapping from labels to {kinds}"
        else:
            type_name = type_text(hints[f.name])
        default: Any = f.metadata.get("default", f.default)
        factory: Any = f.default_factory
        if default is dataclasses.MISSING and factory is not dataclasses.MISSING:
            default = to_tree(factory())
        if isinstance(default, tuple):
            default = to_tree(default)
        text = REQUIRED if default is dataclasses.MISSING else inline(default)
        found.append(Setting(f.name, type_name, text, texts.get(f.name, "")))
    return found


def type_text(annotation: Any, many: bool = False) -> str:
    """A type in words: `an integer`, or with `many`: `integers`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else type_text(arg, many) for arg in args)
    if origin is tuple:
        same = Ellipsis in args or len(set(args)) == 1
        count = "" if Ellipsis in args else f"{len(args)} "
        inner = (
            f" of {count}{type_text(args[0], many=True)}" if same else f" ({', '.join(map(type_text, args))})"
        )
        return f"lists{inner}" if many else f"a list{inner}"
    if origin is dict:
        inner = f"from {'steps' if args[0] is int else 'names'} to {type_text(args[1], many=True)}"
        return f"mappings {inner}" if many else f"a mapping {inner}"
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return "settings" if many else "a mapping of settings"
    words = {int: ("an integer", "integers"), float: ("a number", "numbers"), str: ("text", "texts")}
    words[bool] = ("true or false", "truth values")
    return (
        words[annotation][many] if annotation in words else getattr(annotation, "__name__", str(annotation))
    )


def value_text(value: Any) -> str:
    """A value in an error message, shortened to 60 characters."""
    text = repr(value) if isinstance(value, str) else "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _field_texts(cls: type) -> dict[str, str]:
    """The string literal below each annotated field, read from the source code of the class."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    texts, previous = {}, None
    for node in getattr(body, "body", []):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and previous and isinstance(node.value.value, str):
            texts[previous] = " ".join(node.value.value.split())
        is_field = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        previous = node.target.id if is_field else None
    return texts


def _yaml(tree: Any, **style: Any) -> str:
    return yaml.dump(_escaped(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)


def _escaped(tree: Any) -> Any:
    """The tree with each `${` in its values escaped, so that OmegaConf reads `${` as text."""
    if isinstance(tree, Mapping):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    if isinstance(tree, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", tree)
    return tree


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes texts that OmegaConf reads as numbers (`1e3`), and texts with line breaks, which PyYAML may change."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A YAML node that is read as the same string."""
        plain = text[:1].isalpha() or text[:1] in ("_", "/")
        style = None if plain else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
