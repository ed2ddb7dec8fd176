"""The process of a command: closed and full streams, other encodings, narrow terminals, no home, Ctrl-C."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vqcore.cli import main
from vqcore.run.signals import StopSignals

ROOT = Path(__file__).resolve().parents[2]
START = [sys.executable, "-m", "vqcore"]
DISTURBED = Path(__file__).with_name("disturbed.py")
LINE = "interrupted; all saved files are complete.\n"


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
        pytest.param(
            "$V show vit/encoder | head -1; exit ${PIPESTATUS[0]}", None, "", marks=pytest.mark.slow
        ),
        ("$V show nothing 2> >(true); exit $?", 2, ""),
        ("PYTHONIOENCODING=ascii $V show ü 2>&1 >/dev/null | grep -q xfc", 0, ""),
        ("COLUMNS=20 $V --help && COLUMNS=1 $V train --help", 0, ""),
        ("env -u HOME $V show optim", 0, ""),
    ],
)
def test_streams_that_are_not_there(line, status, says):
    done = shell(line)
    assert done.stderr == says and "Traceback" not in done.stdout
    assert done.returncode == status if status is not None else done.returncode in (0, 141)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["vqcore.streams", "vqcore.cli", "pluggy", "vqcore.commands.check"])
def test_a_signal_during_imports_ends_with_one_line(number, module):
    """From the first import on: before it, the interpreter itself is not yet ready."""
    command = [sys.executable, str(DISTURBED), str(int(number)), f"import:{module}", "check", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", LINE)


def test_an_interrupt_that_is_ignored_from_the_start_stays_ignored():
    script = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    script += "import sys, vqcore.__main__ as it; sys.argv = ['vqcore', 'show', 'nothing']; "
    script += (
        "os.kill(os.getpid(), signal.SIGINT); status = it.start(); os.kill(os.getpid(), signal.SIGINT); "
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{script} raise SystemExit(status)"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: no component"), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_ignored(number):
    former = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_IGN and not signals.received
    finally:
        signal.signal(number, former)


EVIL = "a\x1b[2J\u202eb\nc"


@pytest.mark.parametrize(
    "argv",
    [
        ["show", EVIL],
        ["check", f"{EVIL}.yaml"],
        ["config", f"{EVIL}.yaml"],
        ["train", "none.yaml", f"--{EVIL}"],
        [EVIL],
        ["eval", EVIL],
        ["tokenize", "run", "in", "out", "--batch-size", EVIL],
        ["show", "optim", "--plugin", f"{EVIL}.py"],
    ],
    ids=lambda argv: argv[0].partition("\x1b")[0],
)
def test_nothing_moves_the_cursor(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr()
    both = said.out + said.err
    assert "\x1b" not in both and "\u202e" not in both
    assert any("\\x1b[2J\\u202eb\\nc" in line for line in both.splitlines()), both


def test_a_plugin_s_words_are_escaped(capsys, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from vqcore.plugin import Component, Plugin, hookimpl\n@hookimpl\ndef vqcore_plugin():\n"
        "    return Plugin(api=1, summary='clear \\x1b[2J', components=(\n"
        "        Component('hook', 'diary', ':Diary', 'evil \\x1b[2J'),))\n"
        "from vqcore import config\nclass Diary:\n    'Evil \\x1b[2J'\n    Config = config.Config\n"
    )
    from vqcore.registry import registry

    registry.cache_clear()
    try:
        main(["plugins", "--plugin", str(plugin)])
        main(["show", "local/diary", "--plugin", str(plugin)])
    finally:
        registry.cache_clear()
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and said.out.lower().count("\\x1b[2j") >= 3, said


def test_everything_is_said_through_one_function():
    """Control characters are escaped in `streams.put`, so nothing else may print. `testing` runs under pytest."""
    loose = []
    for path in [*ROOT.glob("vqcore/**/*.py"), *ROOT.glob("plugins/*/vqcore_*/**/*.py")]:
        if "testing" in path.parts or path.name == "streams.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "print":
                loose.append(f"{path.relative_to(ROOT)}:{node.lineno}")
            if isinstance(called, ast.Attribute) and ast.unparse(called).startswith(
                ("sys.stdout.w", "sys.stderr.w")
            ):
                loose.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert loose == []


def test_a_line_of_the_log_has_no_name_of_a_module():
    """In a process of its own, because pytest has a handler of the log already."""
    code = (
        "import logging; from vqcore.cli import main; main(['config', '--list']); "
        "logging.getLogger('vqcore.x').warning('warning: this')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "warning: this"
