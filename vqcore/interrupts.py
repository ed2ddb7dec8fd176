"""Ctrl-C and SIGTERM, from the first moment of a process on: one line, and the exit status 128 + the signal's number.

Imports what the interpreter holds anyway: while a module is imported, a signal would end with a traceback. A signal
that the process was told to ignore when it was started stays ignored.
"""

import _signal  # type: ignore[import-not-found]  # `signal` makes enums of the numbers, which takes 10 ms
import os

INTERRUPTED = "interrupted; all saved files are complete."
_ENDING = (_signal.SIGINT, _signal.SIGTERM)
_FIRST = {_signal.SIGINT: _signal.default_int_handler, _signal.SIGTERM: _signal.SIG_DFL}
"""What a process has that was told nothing."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that half-written files are removed."""


def leave_on_signals() -> None:
    """Let a signal end the process at once with one line. For the start of a process only.

    Nothing is written yet, and an exception in the middle of an import would look like a broken installation.
    """
    for number in _ENDING:
        if _signal.getsignal(number) is _FIRST[number]:
            _signal.signal(number, _leave)


def interruptible() -> None:
    """From here on Ctrl-C is a `KeyboardInterrupt` and SIGTERM is `Terminated`, if `leave_on_signals` was called."""
    for number, handler in ((_signal.SIGINT, _signal.default_int_handler), (_signal.SIGTERM, _terminate)):
        if _signal.getsignal(number) is _leave:
            _signal.signal(number, handler)


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status of a process that a signal ended."""
    return 128 + (_signal.SIGTERM if isinstance(stop, Terminated) else _signal.SIGINT)


def _leave(number: int, frame: object) -> None:
    try:
        os.write(2, f"{INTERRUPTED}\n".encode())
    finally:  # also where nobody listens
        os._exit(128 + number)


def _terminate(number: int, frame: object) -> None:
    _signal.signal(number, _signal.SIG_DFL)  # the next one ends the process at once
    raise Terminated
