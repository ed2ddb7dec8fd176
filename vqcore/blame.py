"""Whose bug an exception is: the component in which it was raised, and its distribution. Light layer."""

import traceback
from types import FrameType

from vqcore.errors import VqcoreError
from vqcore.registry import Registry, registry


def culprit(error: BaseException, catalogue: Registry | None = None) -> str:
    """The component and the distribution that raised an error, or `vqcore or a plugin` where that cannot be told.

    The innermost frame that is vqcore's or a plugin's decides: libraries fail because of what they are given.
    """
    catalogue = catalogue or registry()
    packages = {
        origin.module.partition(".")[0]: id for id, origins in catalogue.ids().items() for origin in origins
    }
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = [(frame, id) for frame in reversed(frames) if (id := packages.get(_package(frame)))]
    if not known or known[0][1] == "core":
        return "vqcore or a plugin"
    id = known[0][1]
    origin = catalogue.origin(id)
    names = (_component(frame, id, catalogue) for frame, owner in known if owner == id)
    name = next(filter(None, names), f"plugin '{id}'")
    return f"{name}, which comes from {origin}"


def _component(frame: FrameType, id: str, catalogue: Registry) -> str:
    """The full name of the component whose method a frame is."""
    try:
        targets = {found.target: found.name for found in catalogue.plugin(id).components}
    except VqcoreError:  # it is the manifest that failed
        return ""
    cls = type(frame.f_locals.get("self"))
    name = targets.get(f"{cls.__module__}:{cls.__name__}") or targets.get(f":{cls.__name__}")
    return f"{id}/{name}" if name else ""


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
