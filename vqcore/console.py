"""Output on the screen: a progress line, messages, and commands to copy. Only rank 0 prints."""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Column

from vqcore import dist
from vqcore.errors import printable
from vqcore.registry import registry
from vqcore.streams import put

PLAIN = 100
"""Letters of a line that does not go to a terminal, and of the metrics of an evaluation."""
_BAR = 20
_FIRST = ("loss", "metric/psnr", "codes/perplexity", "codes/usage", "lr")
"""What is shown first of many metrics; the others follow in their order."""


class ProgressLine:
    """Shows the progress of `total` units of work with the time left, the loss, the rate, and what else has room.

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
        self.metrics: Mapping[str, float] = {}
        self.live = None
        if not self.silent and sys.stderr.isatty():
            column = TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True))
            self.live = Progress(column, console=Console(stderr=True))
            self.task = self.live.add_task(label, line=self.line(self.live.console.width, done))

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
        self.metrics = self.metrics if metrics is None else metrics
        if self.live:
            self.live.update(self.task, line=self.line(self.live.console.width, done))
        elif first or done >= self.total or now - self.spoke >= self.interval_s:
            self.spoke = now
            put(self.line(PLAIN, done, bar=False), error=True)

    def line(self, width: int, done: int, *, bar: bool = True) -> str:
        """The line in at most `width` letters: what is done, a bar, the time left; then metrics and the rate."""
        spent = time.monotonic() - self.started if self.started is not None else 0.0
        rate = (done - self.start) / max(spent, 1e-9)
        # Shorter bars, and then none, where the line is narrow.
        letters = "#-" if self.live and self.live.console.options.ascii_only else "━─"
        drawn = [_bar(done, self.total, min(_BAR, width // 4), letters)] if bar and width >= 40 else []
        times = []
        if done >= self.total and rate:
            times = [_clock(spent)]
        elif rate:
            times = [f"{_clock((self.total - done) / rate)} left"]
        shown = _ordered(self.metrics)
        pace = [f"{rate:.3g} {self.unit}/s"] if rate else []
        return _fitting(
            [f"{self.label} {done}/{self.total}", *drawn, *times, *shown[:1], *pace, *shown[1:]], width
        )


def in_words(metrics: Mapping[str, float], width: int = PLAIN) -> str:
    """The most important metrics of an evaluation in about `width` letters, on one line."""
    left_out = (
        "/low",
        "/high",
        "_possible",
        "codes/bits",
        "codes/tokens",
        "samples",
        "decoded",
        "metric/channels/",
    )
    kept = {name: value for name, value in metrics.items() if not any(part in name for part in left_out)}
    return _fitting(_ordered(kept), width)


def _ordered(metrics: Mapping[str, float]) -> list[str]:
    """Metrics as words; those of `_FIRST` come first."""
    names = sorted(metrics, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return [f"{name.removeprefix('metric/')} {metrics[name]:.4g}" for name in names]


def _fitting(parts: Sequence[str], width: int) -> str:
    """The first parts that fit into `width` letters; the very first one is cut if it is longer."""
    line = printable(parts[0])[:width] if parts else ""
    for part in map(printable, parts[1:]):
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


def _bar(done: int, total: int, width: int, letters: str) -> str:
    full = round(width * min(done, total) / max(1, total))
    return letters[0] * full + letters[1] * (width - full)


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
