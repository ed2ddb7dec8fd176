"""A signal in every phase of every verb that writes: one line, its exit status, nothing half-written; the same command
then goes on, and its result is that of a command that nobody disturbed, byte for byte."""

import json
import signal
from pathlib import Path

import pytest
from verbs import VERBS, Verb, contents, copied, disturbed, leftovers

from vqcore.cli import main

pytestmark = pytest.mark.slow
BY_NAME = {verb.name: verb for verb in VERBS}
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL

PHASES = {
    "imports": ("import:torch", (INT, TERM)),
    "building": ("vqcore.run.state:build", (INT, TERM, KILL)),
    "beginning": ("vqcore.run.folder:_begin", (INT, KILL)),
    "the first file": ("vqcore.files:_flush", (INT, TERM, KILL)),
    "the first step": ("vqcore.run.step:train_step", (INT, TERM, KILL)),
    "saving": ("vqcore.run.checkpoints:_write_state", (INT, TERM, KILL)),
    "sealing": ("vqcore.artefacts.folder:seal", (KILL,)),
    "evaluation": ("vqcore.evaluate.measure:evaluate_data", (INT, KILL)),
    "after the evaluation": ("vqcore.run.checkpoints:add_evaluation", (KILL,)),
    "removing old ones": ("vqcore.run.checkpoints:_drop_old", (KILL,)),
    "report": ("vqcore_track.page:render", (INT, KILL)),
}
"""Of training: where it is disturbed, and by which signals."""
OTHERS = {
    "resume": ("vqcore.run.folder:cut_metrics", (KILL,)),
    "tokenize": ("vqcore.tokens.shards:Shards.write", (INT, TERM, KILL)),
    "tokenize-folder": ("vqcore.files:_flush", (INT, TERM, KILL)),
    "decode": ("vqcore.files:_flush", (INT, KILL)),
    "export": ("vqcore.artefacts.card:model_card", (INT, TERM, KILL)),
    "export-format": ("vqcore.files:_flush", (KILL,)),
    "import": ("vqcore.files:_flush", (INT, KILL)),
    "eval": ("vqcore.files:_flush", (INT, KILL)),
    "report": ("vqcore.files:_flush", (KILL,)),
}
"""Of the other verbs."""
CASES = [
    pytest.param(BY_NAME["train"], place, number, id=f"train-{phase}-{number.name}")
    for phase, (place, numbers) in PHASES.items()
    for number in numbers
] + [
    pytest.param(BY_NAME[name], place, number, id=f"{name}-{number.name}")
    for name, (place, numbers) in OTHERS.items()
    for number in numbers
]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The results of commands that nobody disturbs, by verb."""
    results = {}

    def result(verb: Verb) -> bytes:
        if verb.name not in results:
            place = copied(world, tmp_path_factory.mktemp("whole"))
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                assert main(verb.argv) == 0
            results[verb.name] = comparable(place / verb.result)
        return results[verb.name]

    return result


def comparable(path: Path) -> object:
    """What must be equal: the bytes of a file; of a page or a measurement, that it is there and whole."""
    if path.suffix == ".json":
        return json.loads(path.read_text())["results"]
    return path.read_text().rstrip()[-7:] if path.suffix == ".html" else path.read_bytes()


@pytest.mark.parametrize(("verb", "place", "number"), CASES)
def test_a_signal(world, tmp_path, monkeypatch, capsys, whole, verb, place, number):
    here = copied(world, tmp_path)
    before = contents(here)
    process = disturbed(int(number), place, verb.argv, here)
    out, err = process.communicate(timeout=240)
    if number == KILL:
        assert process.returncode == -KILL, err
    else:
        assert process.returncode == 128 + number, err
        last = [line for line in (out + err).splitlines() if line.startswith(("interrupted", "stopped by"))]
        assert len(last) == 1 and "Traceback" not in err, err
        assert leftovers(here) == []
    after = contents(here)
    # Lines are added, and cut when the run goes on; the config of a run is that of its last start.
    changing = ("metrics.jsonl", "events.jsonl", *(["config.yaml"] if verb.name == "resume" else []))
    assert {name: after.get(name) for name in before if Path(name).name not in changing} == {
        name: content for name, content in before.items() if Path(name).name not in changing
    }
    monkeypatch.chdir(here)
    assert main(verb.argv) == 0, capsys.readouterr().err
    assert leftovers(here) == []
    assert comparable(here / verb.result) == whole(verb)
    if verb.name == "train":
        steps = [json.loads(line)["step"] for line in Path("new/metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 2, 3, 4, 4]
