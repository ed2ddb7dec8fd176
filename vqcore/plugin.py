"""What a plugin's manifest is made of. A manifest imports only this module, which needs only pluggy.

A distribution declares one entry point in the group `vqcore`. The entry's name is the plugin's id; its value is a
manifest module with one hook, `vqcore_plugin`, which returns a `Plugin`. vqcore imports the class of a component when
a config names the component.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from vqcore.protocols import RunLike

API = 1
"""Rises when a hook, a required member or a field is removed or changes its meaning; additions do not count."""
SUPPORTED_API = frozenset({1})

KINDS = (
    "encoder",
    "decoder",
    "quantizer",
    "percept",
    "adversary",
    "discriminator",
    "teacher",
    "scheduler",
    "objective",
    "modality",
    "reader",
    "data",
    "store",
    "metric",
    "hook",
    "text",
    "format",
)


def kind_name(kind: str) -> str:
    """The name of a kind in a text: `encoder`, `data source`."""
    return {"data": "data source", "store": "store of codes", "text": "text tokenizer"}.get(kind, kind)


def a_kind(kind: str) -> str:
    """`kind_name` with its article: `an encoder`, `a data source`."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind_name(kind)}"


hookspec = pluggy.HookspecMarker("vqcore")
hookimpl = pluggy.HookimplMarker("vqcore")


@dataclass(frozen=True)
class Component:
    """One thing a config can name.

    `target` is `"module:Class"`, imported when the component is first used. An empty module part means the
    manifest's own module (for manifests given with `--plugin FILE`). `renamed_from` lists the former names, oldest
    first. Configs may still use them. The first one is the component's identity in fingerprints and evaluations, so a
    name must never be removed from the list.
    """

    kind: str
    name: str
    target: str
    summary: str
    renamed_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plugin:
    """A manifest's content: the plugin API that it was written for, one sentence, and its components."""

    api: int
    summary: str
    components: tuple[Component, ...]
    url: str = ""


class ManifestHooks:
    """The one hook of a manifest module."""

    @hookspec
    def vqcore_plugin(self) -> Plugin:  # type: ignore[empty-body]
        """Return this plugin's record. Called once; must not import torch."""


class RunHooks:
    """The methods of a component of kind `hook`. A hook implements any of them, with any of their arguments.

    A run calls only the hooks under `hooks:` in its config. A hook observes; an objective is the place to change
    gradients. All processes call each hook, unless its text says otherwise: a hook that writes files asks
    `vqcore.dist.is_main()` first, and no hook may communicate with the other processes. A hook that raises is
    reported once and switched off.
    """

    @hookspec
    def vqcore_run_started(self, run: "RunLike") -> None:
        """Everything is built, and resumed from a checkpoint if there was one; this process has made no step yet."""

    @hookspec
    def vqcore_step_ended(self, run: "RunLike", step: int, metrics: dict[str, float]) -> None:
        """`step` optimizer steps are done; `metrics` went to metrics.jsonl. Called at logged steps."""

    @hookspec
    def vqcore_step_done(self, run: "RunLike", step: int) -> None:
        """`step` optimizer steps are done. Called after every step, so it must be quick."""

    @hookspec
    def vqcore_evaluated(self, run: "RunLike", step: int, metrics: dict[str, float]) -> None:
        """The tokenizer was evaluated after `step` optimizer steps; `metrics` are the results."""

    @hookspec
    def vqcore_pictured(self, run: "RunLike", step: int, name: str, path: str) -> None:
        """A PNG was written to `path`; `name` is `samples` (a row of reconstructions) or `sheet`. On rank 0 only."""

    @hookspec
    def vqcore_saved(self, run: "RunLike", step: int, path: str) -> None:
        """The checkpoint in `path` is complete on disk."""

    @hookspec
    def vqcore_run_ended(self, run: "RunLike", error: BaseException | None) -> None:
        """The run is over; `error` is None, or the reason why the run did not reach its end."""
