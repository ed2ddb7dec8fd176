"""Output on the screen: a progress line, messages, and commands to copy. Only rank 0 prints."""

import os
import shlex
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from vqcore import dist
from vqcore.errors import printable
from vqcore.registry import registry
from vqcore.streams import put


class ProgressLine:
    """Shows the progress of `total` units of work with rate, time left and a few metrics.

    On a terminal the progress line is updated in place. Elsewhere a plain line is printed at the first update, at the
    last one, and between them at most every `interval_s` seconds.
    """

    def __init__(
        self, label: str, total: int, *, unit: str = "step", done: int = 0, interval_s: float = 10.0
    ):
        self.label, self.total, self.unit, self.interval_s = label, total, unit, interval_s
        self.start, self.spoke = done, 0.0
        self.started: float | None = None
        self.silent = not dist.is_main()
        self.shown = ""
        self.live = None
        if not self.silent and sys.stderr.isatty():
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[shown]}"),
                console=Console(stderr=True),
            )
            self.task = self.live.add_task(label, total=total, completed=done, rate="", shown="")

    def __enter__(self) -> "ProgressLine":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def update(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that `done` units are done. `metrics` replaces the metrics shown before."""
        if self.silent:
            return
        now = time.monotonic()
        first = self.started is None
        if self.started is None:  # without the time before, in which workers start and memory is allocated
            self.start, self.started = done, now
        if metrics is not None:
            self.shown = printable("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        rate = (done - self.start) / max(now - self.started, 1e-9)
        pace = f"{rate:.1f} {self.unit}/s" if rate else ""
        if self.live:
            self.live.update(self.task, completed=done, rate=pace, shown=self.shown)
        elif first or done >= self.total or now - self.spoke >= self.interval_s:
            self.spoke = now
            left = f"{_clock((self.total - done) / rate)} left" if rate else ""
            parts = (f"{self.label} {done}/{self.total}", pace, left, self.shown)
            put("  ".join(part for part in parts if part), error=True)


def command(*words: object) -> str:
    """A command to paste into a shell: `vqcore`, the words, and the `--plugin` file if this process was given one."""
    given = ("--plugin", registry().file) if registry().file else ()
    return " ".join(_quoted(str(word)) for word in ("vqcore", *words, *given))


def _quoted(word: str) -> str:
    """A word for a shell; one with letters that a terminal does not show in the form $'...', which names its bytes."""
    if printable(word) == word:
        return shlex.quote(word)
    plain = (
        chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\x{byte:02x}" for byte in os.fsencode(word)
    )
    return f"$'{''.join(plain)}'"


def say(text: str) -> None:
    """Print one line, or some; what is not printable in it is escaped. Only rank 0 prints."""
    if dist.is_main():
        put(text)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(min(seconds, 359_999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
