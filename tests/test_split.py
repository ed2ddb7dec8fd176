"""`data.eval_share` and `data.group`: which samples are held out, everywhere; samples that are on both sides."""

import json
import shutil

import numpy as np
import pytest
from toys import run_tree, toy  # noqa: F401

from vqcore.assembly import build_extra, open_data
from vqcore.check.overlap import copies, overlap
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.data.sources import Folder
from vqcore.data.split import Side, side
from vqcore.data.windows import Cover, Windowed
from vqcore.errors import ConfigError, DataError
from vqcore.protocols import Window
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.tokens.inputs import Source
from vqcore.tokens.parts import _ahead

SIZE = (2, 8, 8)


def write(folder, names, seed=0):
    draw = np.random.default_rng(seed)
    for name in names:
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, draw.uniform(-1, 1, SIZE).astype(np.float32))


def keys(config, split):
    modality = registry().build("modality", config.data.modality, size=None)
    data = open_data(config, modality, build_extra(config, (8, 8)), split)
    return [data.key(index) for index in range(len(data))]


def tree_of(folder, **changes):
    return run_tree(folder / "run", **{"data__name": "folder", "data__path": str(folder / "data"), **changes})


def config_of(folder, **changes):
    return from_tree(tree_of(folder, **changes), schema=RunConfig)


def write_config(folder, **changes):
    path = folder / "mine.yaml"
    path.write_text(json.dumps(tree_of(folder, **changes)))
    return str(path)


@pytest.fixture
def many(tmp_path):
    write(tmp_path / "data", [f"p{i // 10}/r{i:03}" for i in range(100)])
    return tmp_path


def test_both_sides_together_are_all_samples(toy, many):
    config = config_of(many, data__eval_share=0.2)
    train, held = keys(config, "train"), keys(config, "eval")
    assert sorted(train + held) == sorted(keys(config_of(many), "train"))
    assert not set(train) & set(held) and 8 < len(held) < 35


def test_more_files_and_other_seeds_change_no_side(toy, many):
    before = set(keys(config_of(many, data__eval_share=0.2), "eval"))
    write(many / "data", [f"a/{i}" for i in range(50)])
    after = set(keys(config_of(many, data__eval_share=0.2, run__seed=7), "eval"))
    assert before == {key for key in after if not key.startswith("a/")}
    assert before <= set(keys(config_of(many, data__eval_share=0.4), "eval"))


def test_a_group_stays_on_one_side(toy, many):
    config = config_of(many, data__eval_share=0.3, data__group="^(p[0-9]+)/")
    train, held = keys(config, "train"), keys(config, "eval")
    assert held and not {key[:3] for key in train} & {key[:3] for key in held}


def test_windows_of_one_record_stay_on_one_side(toy, many):
    config = config_of(many, data__eval_share=0.5)
    modality = registry().build("modality", config.data.modality, size=None)
    files = Folder(config.data, split="train", modality=modality, extra={})
    windows = Windowed(files, np.full((100, 2), 8), Cover((4, 4), (4, 4)))
    sides = [side(windows, config.data, split) for split in ("train", "eval")]
    train, held = ({each.key(i).partition("#")[0] for i in range(len(each))} for each in sides)
    assert train and held and not train & held and len(sides[0]) == 4 * len(train)


def test_files_whose_names_differ_after_a_sign_are_several(toy, tmp_path):
    write(tmp_path / "data", [f"a#{i}" for i in range(40)])
    config = config_of(tmp_path, data__eval_share=0.5)
    assert 10 < len(keys(config, "train")) < 30


def test_a_group_of_the_numbers_of_a_longer_array_file_moves_no_sample(toy, tmp_path):
    found = []
    for count in (500, 5000):
        np.save(tmp_path / "a.npy", np.zeros((count, 1), np.uint8))
        source = {
            "name": "array",
            "path": str(tmp_path / "a.npy"),
            "eval_share": 0.3,
            "group": "^([0-9]+)[0-9]$",
        }
        config = config_of(tmp_path, data={**tree_of(tmp_path)["data"], **source})
        found.append([int(key) for key in keys(config, "eval")])
    assert found[0] and found[0] == [number for number in found[1] if number < 500]


def test_a_longer_array_file_moves_no_sample(toy, tmp_path):
    found = []
    for count in (50, 500):
        np.save(tmp_path / "a.npy", np.zeros((count, *SIZE), np.float32))
        tree = run_tree(
            tmp_path / "run", data__name="array", data__path=str(tmp_path / "a.npy"), data__eval_share=0.3
        )
        found.append([int(key) for key in keys(from_tree(tree, schema=RunConfig), "eval")])
    assert found[0] == [number for number in found[1] if number < 50]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__eval_share": 1.5}, "data.eval_share=1.5 must lie between 0 and 1"),
        ({"data__group": "(a)"}, "data.group=.a. does nothing with eval_share=null"),
        ({"data__eval_share": 0.1, "data__group": "p"}, "data.group=p has 0 groups"),
        ({"data__eval_share": 0.1, "data__group": "(p"}, r"data.group=\(p is no regular expression"),
        ({"data__eval_share": 0.1, "data__eval_path": "x"}, "give either eval_share or eval_path"),
        ({"data__eval_share": 0.1, "data__name": "toy/waves"}, "held-out samples of its own"),
    ],
)
def test_settings_that_contradict_each_other(toy, tmp_path, changes, says):
    tree = tree_of(tmp_path, **changes)
    if changes.get("data__name"):
        del tree["data"]["path"]
    with pytest.raises(ConfigError, match=says):
        from_tree(tree, schema=RunConfig)


def test_a_key_without_group_and_an_empty_side(toy, tmp_path):
    write(tmp_path / "data", ["p1/a", "p1/b", "q"])
    with pytest.raises(DataError, match=r"data.group=\^\(p\.\): the key 'q' does not match"):
        keys(config_of(tmp_path, data__eval_share=0.5, data__group="^(p.)"), "train")
    with pytest.raises(DataError, match=r"none of 1 groups \(\) is on the|none of 1 groups"):
        for split in ("train", "eval"):
            keys(config_of(tmp_path, data__eval_share=0.5, data__group="(z?)"), split)


@pytest.mark.slow
def test_train_resume_eval_and_check_with_a_share(toy, many, capsys):
    path = write_config(many, data__eval_share=0.1, run__steps=2)
    assert main(["check", path]) == 0
    assert "data.eval_share: " in capsys.readouterr().out
    assert main(["train", path]) == 0
    assert main(["train", path, "run.steps=3"]) == 0
    assert main(["train", path, "run.steps=4", "data.eval_share=0.2"]) == 2
    assert "data.eval_share" in capsys.readouterr().err
    assert main(["eval", str(many / "run")]) == 0
    held = keys(config_of(many, data__eval_share=0.1), "eval")
    assert json.loads((many / "run" / "eval.json").read_text())["protocol"]["set"]["count"] == len(held)
    write(many / "other", ["x", "y"])
    assert main(["eval", str(many / "run"), f"data.eval_path={many / 'other'}"]) == 0
    assert json.loads((many / "run" / "eval.json").read_text())["protocol"]["set"]["count"] == 2


# Samples on both sides


@pytest.mark.slow
def test_the_same_folder_on_both_sides_is_a_warning(toy, many, capsys, caplog):
    path = write_config(many, data__eval_path=str(many / "data"), run__steps=1)
    assert main(["check", path]) == 0
    said = capsys.readouterr().out
    assert "warning   data.eval_path: the held-out samples are training samples too" in said
    assert "data.eval_share=0.1" in said
    assert main(["train", path]) == 0
    assert "the held-out samples are training samples too" in caplog.text
    events = (many / "run" / "events.jsonl").read_text()
    assert "training samples too" in events


def test_equal_contents_under_other_names_are_a_warning(toy, many, capsys):
    write(many / "held", ["new1", "new2"], seed=9)
    path = write_config(many, data__eval_path=str(many / "held"))
    assert main(["check", path]) == 0
    assert "on both sides" not in capsys.readouterr().out
    shutil.copy(many / "data" / "p3" / "r033.npy", many / "held" / "copy.npy")
    assert main(["check", path]) == 0
    said = capsys.readouterr().out
    assert "1 of 3 held-out samples" in said and "copy has the content of p3/r033" in said


class Cut:
    """Parts of files, as a source of windows gives them."""

    def __init__(self, path, *spans):
        self.path, self.spans = path, spans

    def __len__(self):
        return len(self.spans)

    def key(self, index):
        return f"{self.path.stem}#{self.spans[index][0]}"

    def get(self, index, label=""):
        low, high = self.spans[index]
        return Window(self.path, (low, 0), (high, 8))


def test_parts_of_one_file_are_the_same_where_they_meet(many):
    path, copy = many / "data/p0/r000.npy", many / "copy.npy"
    shutil.copy(path, copy)
    trained = Cut(path, (0, 4), (4, 6))
    for held in (path, copy):
        assert not [*overlap(trained, Cut(held, (6, 8)), "data.eval_path")]
        (found,) = overlap(trained, Cut(held, (6, 8), (5, 7)), "data.eval_path")
        assert "(1 of 2 held-out" in found.what
    assert len([*overlap(Files(copy), Cut(path, (6, 8)), "data.eval_path")]) == 1


class Files(list):
    """Files as a data source."""

    def __init__(self, *paths):
        super().__init__(paths)

    def key(self, index):
        return self[index].stem

    def get(self, index, label=""):
        return self[index]


def test_files_that_differ_in_few_bytes_are_told_apart(tmp_path):
    paths = []
    for name, place in (("a", 70_000), ("b", 80_000), ("c", 90_000), ("d", 80_000)):
        content = bytearray(400_000)
        content[place] = 1
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    a, b, c, d = paths
    assert not [*overlap(Files(a, c), Files(d), "data.eval_path")]
    (found,) = overlap(Files(a, b, c), Files(d), "data.eval_path")
    assert "d has the content of b" in found.what
    assert not [*copies(Files(a, b, c), "data.path")]
    (found,) = copies(Files(a, b, c, d), "data.path")
    assert found.what.startswith("1 of 4 samples that were compared are copies of others: ")


class Costly:
    """Arrays that are made when they are asked for."""

    made = 0

    def __len__(self):
        return 1000

    def key(self, index):
        return str(index)

    def get(self, index, label=""):
        self.made += 1
        return np.full((4, 2), index)


def test_a_part_of_a_source_makes_no_samples_to_know_their_sizes():
    whole, part = Costly(), Costly()
    assert not [*copies(whole, "data.path"), *copies(Side(part, np.arange(1000)), "data.path")]
    assert part.made == whole.made < 300


def test_files_are_read_ahead_without_making_samples_to_know_their_sizes():
    data = Costly()
    assert len([opening() for opening in _ahead(Source("costly", data), range(9), data.get, 1, 4)]) == 9
    assert data.made == 9


def test_copies_within_a_divided_set_are_found(toy, many, capsys):
    config = config_of(many, data__eval_share=0.2)
    held = keys(config, "eval")[0]
    other = keys(config, "train")[0]
    shutil.copy(many / "data" / f"{held}.npy", many / "data" / f"{other}.npy")
    assert main(["check", write_config(many, data__eval_share=0.2)]) == 0
    assert f"{held} has the content of {other}" in capsys.readouterr().out
