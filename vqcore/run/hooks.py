"""Calls the hooks of a run. A hook that raises an error is reported once and switched off, and the run continues.

pluggy checks the hooks against their specifications and keeps their order. This module makes the calls itself, because
pluggy's own call stops at the first exception and does not say which hook raised it.
"""

import functools
import logging
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pluggy

from vqcore.errors import PluginLoadError, did_you_mean, listed
from vqcore.plugin import RunHooks

log = logging.getLogger(__name__)


class GuardedHooks:
    """The hooks of a run by label, in the order of the config.

    `hooks.vqcore_saved(run=..., ...)` calls the method `vqcore_saved` of every hook that has this method. `off` holds
    the error message of each hook that was switched off. Raises `PluginLoadError` for a hook method with an unknown
    name or with unknown arguments.
    """

    def __init__(self, hooks: Mapping[str, Any]):
        self.off: dict[str, str] = {}
        self._manager = pluggy.PluginManager("vqcore")
        self._manager.add_hookspecs(RunHooks)
        for label, hook in reversed(list(hooks.items())):  # pluggy calls the last registered one first
            try:
                self._manager.register(hook, name=label)
                self._manager.check_pending()
            except pluggy.PluginValidationError as error:
                raise PluginLoadError(f"hooks.{label}: {_problem(hook, error)}") from error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(self._call, getattr(self._manager.hook, name))

    def _call(self, caller: Any, **given: Any) -> None:
        for hook in reversed(caller.get_hookimpls()):
            if hook.plugin_name in self.off:
                continue
            try:
                hook.function(*(given[name] for name in hook.argnames))
            except Exception as error:
                self._switch_off(hook.plugin_name, caller.name, hook.plugin, error)

    def _switch_off(self, label: str, name: str, hook: Any, error: Exception) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        self.off[label] = (
            f"hooks.{label} ({type(hook).__name__}) is switched off and the run continues: {name} raised "
            f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        )
        log.warning("%s", self.off[label])
        log.debug("traceback of hooks.%s", label, exc_info=error)


def _problem(hook: Any, error: pluggy.PluginValidationError) -> str:
    """What pluggy refuses in a hook: a method with an unknown name, else its own words without an object's address."""
    known = [name for name in vars(RunHooks) if name.startswith("vqcore_")]
    for name in dir(hook):
        if hasattr(getattr(hook, name), "vqcore_impl") and name not in known:
            hint = did_you_mean(name, known) or f" Hooks: {listed(known)}."
            return f"{type(hook).__name__} has a method for the unknown hook '{name}'.{hint}"
    reason = " ".join(str(error).replace(repr(hook), type(hook).__name__).split())
    return f"{reason}. docs/hooks.md lists all hooks and their arguments."
