"""What is said while it runs: the live line fits its terminal, and begins with what matters."""

import os
import re
import subprocess
import sys

import pytest

from vqcore.console import PLAIN, ProgressLine, in_words

METRICS = {
    "lr": 1e-3,
    "grad_norm": 0.5,
    "loss/pixel/mse": 0.2,
    "loss/vq/commit": 0.01,
    "codes/usage": 0.875,
    "codes/perplexity": 43.5,
    "loss": 0.21,
}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test can set."""
    now = [100.0]
    monkeypatch.setattr("vqcore.console.time.monotonic", lambda: now[0])
    return now


def running(clock, *, total=1000, done=250):
    line = ProgressLine("train", total)
    line.update(0)
    clock[0] += 50
    line.update(done, METRICS)
    return line


class TestLine:
    @pytest.mark.parametrize("width", [20, 40, 80, 120, 300])
    def test_it_fits(self, clock, width):
        shown = running(clock).line(width, 250)
        assert len(shown) <= width and shown.startswith("train 250/1000")

    @pytest.mark.parametrize("width", [80, 120])
    def test_step_bar_time_loss_then_what_fits(self, clock, width):
        shown = running(clock).line(width, 250)
        begin = re.escape("train 250/1000  " + "━" * 5 + "─" * 15 + "  2:30 left  loss 0.21  5 step/s")
        assert re.match(begin, shown)
        more = ["codes/perplexity 43.5", "codes/usage 0.875", "lr 0.001", "grad_norm"]
        assert [text in shown for text in more] == [width == 120] * 3 + [False]

    def test_the_whole_line_where_there_is_room(self, clock):
        shown = running(clock).line(300, 250)
        assert shown.endswith(
            "codes/perplexity 43.5  codes/usage 0.875  lr 0.001  grad_norm 0.5  loss/pixel/mse 0.2  loss/vq/commit 0.01"
        )

    def test_a_narrow_line_keeps_the_step(self, clock):
        line = running(clock)
        assert line.line(20, 250) == "train 250/1000"
        assert line.line(30, 250) == "train 250/1000  2:30 left"
        assert line.line(10, 250) == "train 250/"

    def test_the_end_says_how_long_it_took(self, clock):
        line = running(clock, done=1000)
        assert line.line(80, 1000).startswith("train 1000/1000  " + "━" * 20 + "  0:50  loss 0.21")

    def test_nothing_to_do_is_no_division_by_zero(self):
        assert ProgressLine("train", 0).line(80, 0).startswith("train 0/0")

    def test_elsewhere_lines_are_short_and_have_no_bar(self, clock, capsys):
        running(clock)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "train 0/1000" and all(len(line) <= PLAIN for line in lines)
        assert lines[1].startswith("train 250/1000  2:30 left  loss 0.21  5 step/s")
        assert "━" not in lines[1]


def test_an_evaluation_in_words_is_one_line():
    more = {"metric/psnr": 24.5, "metric/psnr/low": 24.0, "codes/usage_possible": 0.9, "samples": 7.0}
    found = in_words({**more, **METRICS})
    assert found.startswith("loss 0.21  psnr 24.5  codes/perplexity 43.5  codes/usage 0.875")
    assert len(found) <= PLAIN and "\n" not in found
    assert not any(word in found for word in ("low", "possible", "samples"))


SCRIPT = """
import os, pty, sys, fcntl, struct, termios
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-c", '''
from vqcore.console import ProgressLine
with ProgressLine("train", 3) as line:
    for step in range(1, 4):
        line.update(step, {"loss": 0.5, "[bold]": 1.0})
'''])
fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
seen = b""
while True:
    try:
        part = os.read(fd, 4096)
    except OSError:
        break
    if not part:
        break
    seen += part
os.waitpid(pid, 0)
sys.stdout.buffer.write(seen)
"""


@pytest.mark.parametrize(
    "width", [pytest.param(20, marks=pytest.mark.slow), 80, pytest.param(120, marks=pytest.mark.slow)]
)
def test_in_a_terminal(width):
    """A real terminal: each state of the line takes one row, and square brackets are letters."""
    script = [sys.executable, "-c", SCRIPT.replace("WIDTH", str(width))]
    # These variables would stand for the terminal's own size.
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    done = subprocess.run(script, capture_output=True, timeout=120, check=True, env=env)
    text = done.stdout.decode()
    rows = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row).strip() for row in re.split(r"[\r\n]+", text)]
    rows = [row for row in rows if row]
    assert rows and all(len(row) <= width and row.startswith("train ") for row in rows), rows
    assert rows[-1].startswith("train 3/3")
    if width > 20:
        assert "loss 0.5" in rows[-1] and "[bold] 1" in rows[-1]
