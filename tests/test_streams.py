"""The process of a command: closed and full streams, other encodings, narrow terminals, no home, Ctrl-C."""

import os
import signal
import subprocess
import sys

import pytest

from vqcore.run.signals import StopSignals

START = [sys.executable, "-m", "vqcore"]


def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which `$V` is vqcore."""
    around = {**os.environ, "V": " ".join(START), **env}
    return subprocess.run(["bash", "-c", line], env=around, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("$V show optim >/dev/full", 2, "error: the output cannot be written: No space left on device.\n"),
        ("$V show optim 1</dev/null", 2, "error: the output cannot be written: Bad file descriptor.\n"),
        ("$V show optim >&-", 0, ""),
        ("$V show optim <&- >&- 2>&-", 0, ""),
        ("$V show nothing 2>&-", 2, ""),
        ("$V show nothing 2>/dev/full", 2, ""),
        ("$V show vit/encoder | head -1; exit ${PIPESTATUS[0]}", None, ""),
        ("PYTHONIOENCODING=ascii $V show ü 2>&1 >/dev/null | grep -q xfc", 0, ""),
        ("COLUMNS=20 $V --help && COLUMNS=1 $V train --help", 0, ""),
        ("env -u HOME $V show optim", 0, ""),
    ],
)
def test_streams_that_are_not_there(line, status, says):
    done = shell(line)
    assert done.stderr == says and "Traceback" not in done.stdout
    assert done.returncode == status if status is not None else done.returncode in (0, 141)


@pytest.mark.parametrize("after_s", [0.3, 0.8])
def test_an_interrupt_during_imports_ends_with_one_line(after_s):
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += (
        f"import os, threading; threading.Timer({after_s}, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
    )
    script += "import sys, vqcore.streams; sys.argv = ['vqcore', 'check', 'none.yaml']\n"
    script += "vqcore.streams.leave_on_interrupt(); import time\nwhile True: import torch; time.sleep(0.01)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "interrupted; all saved files are complete.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_ignored(number):
    former = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_IGN and not signals.received
    finally:
        signal.signal(number, former)
