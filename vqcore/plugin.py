"""What a plugin's manifest is made of. Light layer: standard library and pluggy; manifests import this alone.

A distribution declares one entry point in the group `vqcore`; its name is the plugin's id, its value a
manifest module whose one hook, `vqcore_plugin`, returns a `Plugin`. Components are strings until a config
names them.
"""

from dataclasses import dataclass
from typing import Any

import pluggy

API = 1
"""Rises when a hook, a required member or a field is removed or changes meaning, not with additions."""
SUPPORTED_API = frozenset({1})

KINDS = (
    "encoder",
    "decoder",
    "quantizer",
    "percept",
    "discriminator",
    "teacher",
    "scheduler",
    "objective",
    "modality",
    "data",
    "metric",
    "hook",
    "text",
    "format",
)


def kind_name(kind: str) -> str:
    """A kind as one thing of it is called in a text: `encoder`, `data source`."""
    return {"data": "data source", "text": "text tokenizer"}.get(kind, kind)


def a_kind(kind: str) -> str:
    """`kind_name` with its article: `an encoder`, `a data source`."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind_name(kind)}"


hookspec = pluggy.HookspecMarker("vqcore")
hookimpl = pluggy.HookimplMarker("vqcore")


@dataclass(frozen=True)
class Component:
    """One thing a config can name.

    `target` is `"module:Class"`, imported when the component is first used; an empty module part means the
    manifest's own module (for manifests given with `--plugin FILE`). `renamed_from` lists former names, which
    go on working.
    """

    kind: str
    name: str
    target: str
    summary: str
    renamed_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plugin:
    """A manifest's content: the API it was written for, one sentence, and its components."""

    api: int
    summary: str
    components: tuple[Component, ...]
    url: str = ""


class ManifestHooks:
    """The one hook of a manifest module."""

    @hookspec
    def vqcore_plugin(self) -> Plugin:  # type: ignore[empty-body]
        """Return this plugin's record. Called once, without torch being imported."""


class RunHooks:
    """What a component of kind `hook` may implement; any of them, with any of the arguments.

    Hooks come from `hooks:` in the config and nowhere else; they observe. What changes gradients is an
    objective. All processes call them (unless it says otherwise), so a hook that writes asks
    `vqcore.dist.is_main()` first; it must not communicate with the other processes. One that raises is named once
    and switched off.
    """

    @hookspec
    def vqcore_run_started(self, run: Any) -> None:
        """Everything is built (and resumed, if there was something); this process has made no step yet."""

    @hookspec
    def vqcore_step_ended(self, run: Any, step: int, metrics: dict[str, float]) -> None:
        """`step` optimizer steps are done; `metrics` went to metrics.jsonl. Called at logged steps."""

    @hookspec
    def vqcore_step_done(self, run: Any, step: int) -> None:
        """`step` optimizer steps are done. Called after every step, so it must be quick."""

    @hookspec
    def vqcore_evaluated(self, run: Any, step: int, metrics: dict[str, float]) -> None:
        """An evaluation of the tokenizer as it is after `step` steps is done."""

    @hookspec
    def vqcore_pictured(self, run: Any, step: int, name: str, path: str) -> None:
        """A PNG lies in `path`; its name is `samples` (a row of reconstructions) or `sheet`. On rank 0 only."""

    @hookspec
    def vqcore_saved(self, run: Any, step: int, path: str) -> None:
        """The checkpoint in `path` is complete on disk."""

    @hookspec
    def vqcore_run_ended(self, run: Any, error: BaseException | None) -> None:
        """The run is over; `error` says why if it did not reach its end."""
