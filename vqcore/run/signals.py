"""Signals that ask a run to end: the run finishes and saves its current step first."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Inside the block the first SIGTERM or Ctrl-C only sets `received` to its name; the second ends the process.

    A signal that this process was told to ignore when it was started stays ignored.
    """

    def __init__(self) -> None:
        self.received = ""
        self.former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for each in SIGNALS:
                if signal.getsignal(each) is signal.SIG_IGN:
                    continue  # as nohup and shells without job control ask for
                self.former[each] = signal.signal(each, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._give_back()

    def _give_back(self) -> None:
        for each, handler in self.former.items():
            signal.signal(each, handler)
        self.former = {}
