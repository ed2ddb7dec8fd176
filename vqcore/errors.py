"""What can go wrong by the user's hand, and the helpers that word it. Light layer: standard library only.

Every `VqcoreError` is one line for a person: what, where, the nearest right answer, the next step. The command line
prints it and exits with status 2; any other exception is a bug of ours and shows its traceback.
"""

import difflib
from collections.abc import Iterable


class VqcoreError(Exception):
    """Base of all errors that a user can cause and mend."""

    elsewhere = False
    """Did another process of this job find it? Then that one says so, and this one only ends."""

    def at(self, where: str) -> "VqcoreError":
        """The same error with the place it came from in front, e.g. `cfgs/a.yaml: model.encoder.name`."""
        return type(self)(f"{where}: {self}")


class ConfigError(VqcoreError):
    """A setting is unknown, of the wrong type, out of range or contradicts another."""


class UnknownName(VqcoreError):
    """No installed component has this name, or it is of another kind."""


class UnknownPlugin(UnknownName):
    """No installed plugin has this id."""


class PluginConflict(VqcoreError):
    """Two distributions claim one plugin id."""


class PluginLoadError(VqcoreError):
    """A plugin's manifest or target does not import, or is not what it says."""


class PluginApiError(VqcoreError):
    """A plugin was written for a plugin API that this vqcore does not speak."""


class CheckpointError(VqcoreError):
    """A checkpoint or artefact is missing, damaged or does not fit."""


class DataError(VqcoreError):
    """Data is missing, unreadable or not what the config declares."""


class RunError(VqcoreError):
    """A run folder cannot be used: not writable, or it holds something else."""


def did_you_mean(word: str, options: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean 'x'?` with the closest option, or nothing when none is as close as `cutoff` (1: the same)."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names, comma-separated, shortened after `limit` of them."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its last full stop; the error's type where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def reason(error: BaseException) -> str:
    """The type of an error and the first line of its text: `ValueError: no number`."""
    text = first_line(error) if str(error).strip() else ""
    return f"{type(error).__name__}: {text}".rstrip(": ")
