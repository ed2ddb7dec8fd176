"""The laws of each kind, as functions that raise `AssertionError` with the law, the input and the result.

These functions draw their own inputs from fixed seeds and do not need pytest.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from vqcore.errors import VqcoreError
from vqcore.registry import Registry
from vqcore.testing.basics import (
    MisspeltMember,
    check_config,
    check_manifest,
    check_members,
    misspellings,
)
from vqcore.testing.files import check_learning, check_reader, check_store, check_text
from vqcore.testing.networks import (
    check_adversary,
    check_borrowed,
    check_decoder,
    check_denoiser,
    check_discriminator,
    check_encoder,
    check_percept,
    check_teacher,
)
from vqcore.testing.quantizers import WAIVABLE, check_quantizer
from vqcore.testing.runs import (
    SCHEDULER_WAIVABLE,
    check_format,
    check_hook,
    check_objective,
    check_observer,
    check_scheduler,
)
from vqcore.testing.samples import check_data, check_metric, check_modality

__all__ = [
    "check_adversary",
    "check_borrowed",
    "check_config",
    "check_data",
    "check_decoder",
    "check_denoiser",
    "check_discriminator",
    "check_encoder",
    "check_format",
    "check_hook",
    "check_learning",
    "check_manifest",
    "check_members",
    "check_metric",
    "check_modality",
    "check_objective",
    "check_observer",
    "check_percept",
    "check_plugin",
    "check_quantizer",
    "check_reader",
    "check_scheduler",
    "check_store",
    "check_teacher",
    "check_text",
    "plugin_warnings",
]

CHEAP: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "quantizer": (check_quantizer, WAIVABLE),
    "scheduler": (check_scheduler, SCHEDULER_WAIVABLE),
}
"""Kinds that are built from their settings alone: the check, and the laws that can be waived."""


def check_plugin(registry: Registry, id: str) -> list[str]:
    """All cheap checks of a plugin. Returns the failures, one line each."""
    failures: list[str] = []
    plugin, origin = registry.plugin(id), registry.origin(id)
    unknown = "only the component's own tests know whether it claims this law"

    def attempt(label: str, check: Any, *args: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MisspeltMember)  # `plugin_warnings` reports such names
                check(*args)
        except (AssertionError, VqcoreError) as error:
            failures.append(f"{label}: {error}")
        except Exception as error:
            failures.append(f"{label}: {type(error).__name__}: {error}")

    if not origin.digest:  # a --plugin file may import what it likes
        attempt(id, check_manifest, origin.module, tuple(c.target for c in plugin.components))
    for component in plugin.components:
        name = component.name if id == "core" else f"{id}/{component.name}"
        try:
            cls: Any = registry.load(component.kind, name)
        except VqcoreError as error:
            failures.append(f"{name}: {error}")
            continue
        attempt(name, check_config, cls)
        if component.kind == "hook":
            attempt(name, check_hook, cls)
        elif component.kind in CHEAP and not _required(cls.Config):
            check, waivable = CHEAP[component.kind]
            waived = dict.fromkeys(waivable, unknown)
            attempt(name, lambda cls=cls, name=name: check(cls(cls.Config(name=name)), waived=waived))  # noqa: B023
    return failures


def plugin_warnings(registry: Registry, id: str) -> list[str]:
    """What is suspicious about a plugin's classes but may be right: public attributes that look misspelt."""
    found: list[str] = []
    for component in registry.plugin(id).components:
        name = component.name if id == "core" else f"{id}/{component.name}"
        with contextlib.suppress(VqcoreError):  # `check_plugin` reports a class that cannot be loaded
            cls = registry.load(component.kind, name)
            found += [f"{name}: {text}" for text in misspellings(component.kind, cls)]
    return found


def _required(config: type) -> list[str]:
    return [
        f.name
        for f in dataclasses.fields(config)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
