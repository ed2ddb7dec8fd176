"""docs/reliability.md: the tests that it names exist, and are slow where it says so."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", (ROOT / "docs/reliability.md").read_text())))


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_the_page_names_exists(named):
    path, _, name = named.partition("::")
    body = ast.parse((ROOT / path).read_text()).body
    found = {each.name for each in body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    assert name in found if name else found


def test_every_promise_has_a_test():
    page = (ROOT / "docs/reliability.md").read_text()
    rows = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and "---" not in line and "promise" not in line
    ]
    assert len(rows) > 15 and len(page.splitlines()) <= 120
    assert [row for row in rows if "`tests/" not in row] == []
