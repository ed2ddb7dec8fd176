"""Errors that a user can cause and fix, and helpers for their messages. Light layer: standard library only.

The message of a `VqcoreError` is one line: what is wrong, where, the nearest right answer, the next step. The command
line prints the message and exits with status 2. Any other exception is a bug and is printed with its traceback.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable


class VqcoreError(Exception):
    """Base class of all errors that a user can cause and fix."""

    elsewhere = False
    """True in the processes that only stop: another process of the job raised this error and prints the message."""

    def at(self, where: str) -> "VqcoreError":
        """The same error with a place in front of its message, e.g. `cfgs/a.yaml: model.encoder.name`."""
        return type(self)(f"{where}: {self}")


class ConfigError(VqcoreError):
    """A setting is unknown, of the wrong type, out of range or contradicts another."""


class SettingError(ValueError):
    """A `Config` raises this in `__post_init__` to refuse a value, so that the message names the right file and key.

    Wrong value of one setting: `names` is its name, and the text begins with the value: `SettingError("lr", "0 must be
    above 0")`. Several settings contradict each other: `names` is a tuple of their names, and the text is a sentence. A
    tuple of one name stands for something inside this setting, and the text begins with the key.
    """

    def __init__(self, names: str | tuple[str, ...], text: str):
        super().__init__(f"{names}={text}" if isinstance(names, str) else text)
        self.names = (names,) if isinstance(names, str) else names


class UnknownName(VqcoreError):
    """No installed component has this name, or the component with this name is of another kind."""


class UnknownPlugin(UnknownName):
    """No installed plugin has this id."""


class PluginConflict(VqcoreError):
    """Two installed distributions use the same plugin id."""


class PluginLoadError(VqcoreError):
    """A plugin's manifest or target cannot be imported, or is not valid."""


class PluginApiError(VqcoreError):
    """A plugin was written for a plugin API that this vqcore does not support."""


class CheckpointError(VqcoreError):
    """A checkpoint or artefact is missing, is damaged or does not fit."""


class DataError(VqcoreError):
    """Data is missing, cannot be read or is not what the config declares."""


class RunError(VqcoreError):
    """A run folder cannot be used: the folder is not writable, or contains something else."""


def did_you_mean(word: str, options: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean 'x'?` with the closest option, or an empty text if no option reaches `cutoff` (1: equal)."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""


def listed(names: Iterable[str], limit: int = 12) -> str:
    """The first `limit` names, separated by commas, and the number of the other names."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def plural(count: int, word: str) -> str:
    """A number of things in words: `1 sample`, `4,096 samples`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def printable(text: str, keep: str = "") -> str:
    """A text for terminals and logs: everything that would change how other letters are shown is escaped.

    That is control characters, such as those that move the cursor or clear the screen, signs that turn the direction of
    writing, and bytes of a name that are no text. `keep` are letters that stay, such as a line break.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or _shows(letter) else _escape(letter) for letter in text)


def _shows(letter: str) -> bool:
    return letter.isprintable() or unicodedata.category(letter) == "Zs"  # a space


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its last full stop; the error's type if there is no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def reason(error: BaseException) -> str:
    """The type of an error and the first line of its text: `ValueError: no number`."""
    text = first_line(error) if str(error).strip() else ""
    return f"{type(error).__name__}: {text}".rstrip(": ")


def cause(error: BaseException) -> str:
    """Why a file cannot be read or written: the system's words without number and path, else the first line of text."""
    return getattr(error, "strerror", None) or first_line(error)


def cannot_import(error: BaseException, package: str, install: str | None = None) -> str:
    """Why a package that is needed cannot be imported, and what to do. `install` is what pip installs.

    A package that is there and broken is not missing: it lacks another package, or does not fit one.
    """
    install = install or package
    if isinstance(error, ModuleNotFoundError) and (error.name or package).partition(".")[0] == package:
        return f"the package '{package}' is not installed; run: pip install {install}"
    return (
        f"the package '{package}' is installed, but cannot be imported ({first_line(error)}); if the words in "
        f"brackets name no remedy, run: pip install --upgrade --force-reinstall {install}"
    )


def in_bytes(number: int) -> str:
    """A number of bytes, also in the largest fitting unit: `4,000,000,000,000 bytes (3.64 TiB)`."""
    for power, unit in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB")):
        if number >= 1024**power:
            return f"{number:,} bytes ({number / 1024**power:.3g} {unit})"
    return f"{number:,} bytes"


_NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Unable to allocate|Storage size calculation overflowed"
    r"|Overflow when unpacking long|numel: integer multiplication overflow|array is too big|Maximum allowed dimension"
)


def no_memory(error: BaseException) -> str | None:
    """What an error says if memory was not enough: how much was asked for. None for every other error."""
    text = str(error)
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(text):
        return None
    if found := re.search(r"tried to allocate (\d+) bytes", text):
        return f"{in_bytes(int(found[1]))} of memory are asked for at once"
    if found := re.search(r"(?:tried to allocate|Unable to allocate) ([\d.]+ [KMGTPEZY]?i?B)", text):
        return f"{found[1]} of memory are asked for at once"
    if found := re.search(r"sizes=\[([\d, ]+)\]", text):
        return f"a tensor of size [{found[1]}] is asked for, which no memory holds"
    return "more memory is asked for than there is"
