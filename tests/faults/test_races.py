"""Two processes do the same in the same place at the same time: the outcome is whole, and it is that of one of them."""

import json
from pathlib import Path

import pytest
from verbs import VERBS, contents, copied, disturbed, leftovers

from vqcore.cli import main

pytestmark = pytest.mark.slow
BY_NAME = {verb.name: verb for verb in VERBS}

MEETING = {
    "train": "vqcore.run.folder:_locked",
    "resume": "vqcore.run.folder:_locked",
    "eval": "vqcore.files:_flush",
    "eval-json": "vqcore.files:_flush",
    "report": "vqcore.files:_flush",
    "tokenize": "vqcore.files:_flush",
    "tokenize-folder": "vqcore.tokens.store:Claims.write",
    "decode": "vqcore.files:_flush",
    "decode-png": "vqcore.files:_flush",
    "export": "vqcore.files:_rename_folder",
    "export-format": "vqcore.files:_rename_folder",
    "import": "vqcore.files:_rename_folder",
    "import-config": "vqcore.files:_link",
}
"""Where the two wait for each other: just before what only one of them can do."""
ONE = ("export", "export-format", "import", "import-config")
"""Verbs that never write over what is there: one of the two is refused."""


def race(here, place, *lines):
    """Run commands side by side from a place on; returns what each said, with its status."""
    both = [disturbed("wait", place, argv, here) for argv in lines]
    for each in both:
        while (line := each.stdout.readline()) != "ready\n":
            assert line, each.stderr.read()
    for each in both:
        each.stdin.write("\n")
        each.stdin.flush()
    ended = [each.communicate(timeout=240) for each in both]
    return [(process.returncode, out, err) for process, (out, err) in zip(both, ended, strict=True)]


@pytest.mark.parametrize("name", MEETING)
def test_two_at_once(world, tmp_path, monkeypatch, name):
    verb = BY_NAME[name]
    alone = copied(world, tmp_path / "alone")
    monkeypatch.chdir(alone)
    assert main(verb.argv) == 0
    here = copied(world, tmp_path / "here")
    ended = race(here, MEETING[name], verb.argv, verb.argv)
    statuses = sorted(status for status, _, _ in ended)
    assert statuses in (
        [[0, 2]] if name in ONE else [[0, 0]] if verb.argv[0] != "train" else [[0, 0], [0, 2]]
    ), ended
    for status, _, err in ended:
        assert "Traceback" not in err
        if status == 2:
            said = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(said) == 1 and verb.folder in said[0]
            assert "exists already" in said[0] or "another process" in said[0], said
    assert leftovers(here) == []
    ours, theirs = contents(here), contents(alone)
    assert ours.keys() - {f"{verb.folder}/events.jsonl"} == theirs.keys() - {f"{verb.folder}/events.jsonl"}
    varying = (".json", ".jsonl", ".html", ".md", ".png")
    for path, content in ours.items():
        if not path.endswith(varying):
            assert content == theirs[path], path
        elif path.endswith(".json"):
            json.loads(content)
        elif path.endswith(".html"):
            assert content.rstrip().endswith(b"</html>")


def test_two_tokenizers_do_not_share_a_folder(world, tmp_path):
    """The codes of a folder are all of one tokenizer: the second is refused."""
    here = copied(world, tmp_path)
    small = ("train", "run.yaml", "run.dir=other", "run.seed=1")
    process = disturbed("wait", "vqcore.none:none", small, here)
    process.communicate("\n", timeout=240)
    ended = race(
        here,
        "vqcore.tokens.store:Claims.write",
        ("tokenize", "run", "in", "out", "--store", "folder"),
        ("tokenize", "other", "in", "out", "--store", "folder"),
    )
    assert sorted(status for status, _, _ in ended) == [0, 2], ended
    loser = next(err for status, _, err in ended if status == 2)
    assert "out holds other codes (different: fingerprint)" in loser, loser
    made = json.loads(Path(here, "out/tokens.json").read_text())["fingerprint"]
    winner = ("run", "other")[[status for status, _, _ in ended].index(0)]
    assert (
        json.loads(next((here / winner / "checkpoints").glob("step_4/provenance.json")).read_text())[
            "fingerprint"
        ]
        == made
    )
    assert len(list(Path(here, "out").glob("*.npy"))) == 3 and leftovers(here) == []
