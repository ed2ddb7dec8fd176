"""Seeded mutations of a good config: each case is a tree, words of a command line, and what was done to them."""

import copy
import random
from dataclasses import dataclass
from typing import Any

from vqcore.config import leaves

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 10**9, 10**13, -(10**9), 10**400, 0.0, 0.5, -0.5, 1.5, 1e-30, 1e30,
    float("inf"), float("-inf"), float("nan"), "", " ", "x", "null", "010", "1:30", "1_000", "1e-3", "~", "~nobody-x/y",
    "a #b", "a\nb", "a\0b", "\udcff", "é", "日", "../..", "/", "/dev/null", "/proc/self/mem",
    "x" * 300,
    "${run.seed}", "${oc.env:HOME}", "${oc.env:NOT_SET}", "${", "${nothing}", "${run}", "???", "hf://", "hf://a/b/c",
    "a/b", "mse", "cuda", "meta", [], {}, [1], [0, 0], [1, 2, 3], ["a"], [[1]],
    {"name": "rgb"}, {"name": "x/y"},
    {"name": 3}, {"a": 1}, {0: 1}, {"0": -1}, {"name": "quant/fsq", "levels": [8, 8]},
    {"name": "quant/lfq", "codebook_size": 16},
    {"name": "vit/query-encoder", "size": "s"}, {"name": "array", "channels": 3}, {"name": "mask"},
)  # fmt: skip
"""Values of every type, and those that broke something once."""
WORDS = (
    "",
    "[",
    "{",
    "]",
    "'",
    '"',
    "[1",
    "{a",
    "!!python/name:os.system x",
    "&a *a",
    "*a",
    "- 1",
    "a: b",
    "#",
    "%",
    "@",
)
"""Words of a shell beside what YAML writes for the values above."""


@dataclass(frozen=True)
class Case:
    """One mutated config; `what` says how to make it again by hand."""

    tree: dict[str, Any]
    overrides: tuple[str, ...]
    what: str


def case(good: dict[str, Any], settings: dict[str, Any], number: int) -> Case:
    """The mutation of this number of a good tree; `settings` are the values by dotted key when nothing is changed."""
    rng = random.Random(f"configs {number}")
    tree, words, told = copy.deepcopy(good), [], []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        keys = [key for key, _ in leaves(tree)]
        key = rng.choice(keys if rng.random() < 0.5 else list(settings))
        how = rng.choice(("set", "set", "set", "word", "word", "drop", "rename", "above"))
        value = _near(rng, settings.get(key)) if rng.random() < 0.5 else rng.choice(SCALARS)
        if how == "word":
            text = rng.choice(WORDS) if rng.random() < 0.3 else str(value).replace("None", "null")
            words.append(f"{key}={text}")
        elif how == "rename":
            _put(tree, _misspelt(rng, key), value)
        elif how == "drop":
            _drop(tree, key)
        else:
            key = key.rpartition(".")[0] or key if how == "above" else key
            _put(tree, key, copy.deepcopy(value))
        told.append(f"{how} {key} {value!r:.60}")
    return Case(tree, tuple(words), "; ".join(told))


def _near(rng: random.Random, value: Any) -> Any:
    """Another value of the same type: what a user tries first."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((0, 1, value + 1, value * 2, value // 2, value * 8, -value, 10**6, 10**10))
    if isinstance(value, float):
        return rng.choice((0.0, 1.0, value / 2, value * 3, 1 - value, -value, 1e-9, 1e9))
    if isinstance(value, list):
        return rng.choice((value[::-1], value[:-1], value * 2, [_near(rng, one) for one in value]))
    if isinstance(value, str):
        return rng.choice((value.upper(), value[:-1], value + "x", value))
    return rng.choice((1, 2, 0.5, 16, "x"))


def _misspelt(rng: random.Random, key: str) -> str:
    at = rng.randrange(len(key))
    return key[:at] + rng.choice(("", "x", ".", "é", key[at] * 2)) + key[at + 1 :]


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def _drop(tree: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.get(part, {})
        if not isinstance(tree, dict):
            return
    tree.pop(last, None)
