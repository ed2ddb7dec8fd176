"""Standard output and error: they may be closed, full, or in an encoding that lacks a character. Light layer.

All that vqcore says goes through `put`; a test forbids `print`.
"""

import errno
import io
import os
import sys
from typing import Any

from vqcore.errors import printable


def put(text: str, *, error: bool = False) -> None:
    """Print one line, or some, to standard output or error. What a terminal would not show as letters is escaped."""
    print(printable(text, keep="\n\t"), file=sys.stderr if error else sys.stdout, flush=True)


class _Lenient(io.FileIO):
    """A standard stream. The first failure to write is kept in `failure`, and what follows is dropped.

    So work goes on where only its messages are lost. A reader of standard output that has gone (`| head`) still ends
    the command.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes, or drop them after a failure."""
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                if error.errno == errno.EPIPE and self.fileno() == 1:
                    raise
                self.failure = error
        return len(data)


_ours: list[_Lenient] = []


def open_streams() -> None:
    """Make standard output and error of this process safe to print to. For the start of a process only."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a number of a closed stream would be given to the next file that is opened
    os.close(number)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        now = getattr(sys, name)
        raw = _Lenient(descriptor, "w", closefd=False)
        _ours.append(raw)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=getattr(now, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=name == "stderr" or raw.isatty(),
        )
        setattr(sys, name, stream)


def close_streams(status: int) -> int:
    """Write what is left, and return the exit status: 2 with one line if output was lost."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _drop()
            return 141
    lost = next((raw.failure for raw in _ours[:1] if raw.failure), None)
    if lost is not None and status == 0:
        put(f"error: the output cannot be written: {lost.strerror}.", error=True)
        status = 2
    return status


def _drop() -> None:
    """Let nothing be written when Python ends: the reader has gone."""
    for raw in _ours:
        raw.failure = OSError()
