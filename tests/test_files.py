"""Files appear whole or not at all, and nothing is left of a write that failed."""

import pytest

from vqcore.errors import RunError, cause
from vqcore.files import aside, write_text
from vqcore.tokens import store


def test_a_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with aside(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.suffix == ".txt" and temporary.parent == path.parent
    assert path.read_text() == "whole" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(ZeroDivisionError), aside(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError(13, "Permission denied", "/a/b"), "Permission denied"),
        (
            OSError("encoder error -2 when writing image file\nmore"),
            "encoder error -2 when writing image file",
        ),
        (ValueError("no number."), "no number"),
        (EOFError(), "EOFError"),
    ],
)
def test_the_cause_of_a_failed_read_or_write(error, words):
    assert cause(error) == words


def test_an_error_without_the_systems_words_still_says_why(tmp_path, monkeypatch):
    def fail(path, text):
        raise OSError("broken device")

    monkeypatch.setattr(store, "write_text", fail)
    with pytest.raises(RunError, match=r"codes cannot be written: broken device\.$"):
        store.claim(tmp_path / "codes", {"size": [8]})
