"""Files appear whole or not at all, and nothing is left of a write that failed."""

import pytest

from vqcore.files import aside, write_text


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
