"""`vqcore new config FOLDER`: what it sees, what it asks, and a config that passes the checks and trains."""

import wave
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from vqcore.check.draft import draft
from vqcore.cli import main
from vqcore.commands import new
from vqcore.compose.layers import load
from vqcore.schema import RunConfig

DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(folder, arrays, name="{}.npy"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        path = folder / name.format(f"r{number:02}")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    return folder


def noise(*shape, count=24, dtype=np.float32, scale=1.0):
    return [(scale * DRAW.normal(size=shape)).astype(dtype) for _ in range(count)]


def drafted(folder, *answers, out="mine.yaml"):
    """The config that is written without a terminal, as plain data and as text."""
    assert main(["new", "config", str(folder), "--out", out, *answers]) == 0
    text = Path(out).read_text()
    return yaml.safe_load(text), text


def modality(folder, *answers):
    return drafted(folder, *answers)[0]["data"]["modality"]


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((3, 512), {"channels": 3, "size": [512]}),
        ((512, 3), {"channels": 3, "size": [512], "channels_last": True}),
        ((5, 64, 64), {"channels": 5, "size": [64, 64]}),
        ((64, 48, 5), {"channels": 5, "size": [64, 48], "channels_last": True}),
        ((200, 300), {"channels": 1, "size": [128, 128]}),
        ((32, 32, 32), {"channels": 1, "size": [32, 32, 32]}),
        ((2, 16, 16, 16), {"channels": 2, "size": [16, 16, 16]}),
        ((4000,), {"channels": 1, "rank": 1, "size": [1024]}),
        ((12,), {"channels": 12, "size": [1]}),
    ],
)
def test_channels_and_size_follow_from_the_shapes(tmp_path, shape, settings):
    found = modality(write(tmp_path / "mine", noise(*shape)))
    found.pop("scale")
    assert found == {"name": "array", **settings}


def test_lengths_that_vary_are_no_channels(tmp_path):
    folder = write(tmp_path / "mine", [DRAW.normal(size=(7, n)) for n in range(40, 91)])
    tree, text = drafted(folder)
    assert tree["data"]["modality"]["channels"] == 7 and tree["data"]["modality"]["size"] == [40]
    assert "shapes 7 x 40..90: the first axis holds the channels" in text and "the files have 40..90" in text


def test_scale_and_values_that_are_missing(tmp_path, capsys):
    arrays = noise(3, 64, 64, scale=50.0)
    arrays[3][:, :9] = -9999
    tree, text = drafted(write(tmp_path / "mine", arrays))
    found = tree["data"]["modality"]
    assert found["nodata"] == [-9999.0] and found["scale"]["kind"] == "standard"
    assert all(45 < one < 55 for one in found["scale"]["std"])
    assert "nodata: [-9999.0]  # please check" in text
    assert "1 line with 'please check'" in capsys.readouterr().out


def test_class_maps_are_asked_for(tmp_path):
    folder = write(tmp_path / "mine", [DRAW.integers(0, 6, (32, 32)).astype(np.uint8) for _ in range(20)])
    tree, text = drafted(folder)
    assert tree["data"]["modality"]["labels"] == 6 and tree["objective"]["loss"] == "cross_entropy"
    assert "please check: whole numbers from 0 to 5 look like class ids" in text
    asked = []

    def ask(question, options, likely):
        asked.append(question)
        return ("continuous" if "class ids" in question else likely), True

    found = draft(folder, {}, ask)
    assert found.modality["channels"] == 1 and "labels" not in found.modality
    assert "Whole numbers from 0 to 5: class ids or quantities?" in asked


def test_answers_beforehand(tmp_path, capsys):
    folder = write(tmp_path / "mine", [DRAW.normal(size=(30, 40)).astype(np.float32) for _ in range(20)])
    tree, _ = drafted(folder, "channels_last=true")
    assert tree["data"]["modality"]["channels"] == 40 and tree["data"]["modality"]["channels_last"]
    assert "line with" not in capsys.readouterr().out  # what was said beforehand is no guess
    assert main(["new", "config", str(folder), "chanels_last=true", "--out", "b.yaml"]) == 2
    assert "Did you mean 'channels_last'?" in capsys.readouterr().err


def test_pictures_and_sounds(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(20):
        Image.fromarray(DRAW.integers(0, 255, (140, 150, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
    tree, text = drafted(pictures)
    assert tree["data"]["modality"]["name"] == "rgb" and tree["data"]["input_size"] == 128
    assert "modality:  # 20 x *.png" in text
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for number in range(20):
        with wave.open(str(sounds / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(DRAW.integers(-9000, 9000, 40000, dtype=np.int16).tobytes())
    assert main(["new", "config", str(sounds)]) == 0
    assert "name: audio/log-mel" in Path("sounds.yaml").read_text()
    for name in ("mine", "sounds"):
        load(f"{name}.yaml", [], schema=RunConfig)


def test_tables_choose_their_columns(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    for number in range(20):
        rows = "\n".join(f"{DRAW.normal()},monday,{DRAW.normal()}" for _ in range(200))
        (folder / f"{number}.csv").write_text(f"hip,day,knee\n{rows}\n")
    tree, text = drafted(folder)
    found = tree["data"]["modality"]
    assert found["reader"] == {"name": "csv", "columns": ["hip", "knee"]} and found["channels"] == [
        "hip",
        "knee",
    ]
    assert "please check: the columns of numbers" in text


def test_rows_that_are_samples_are_another_source(tmp_path, capsys):
    folder = tmp_path / "rows"
    folder.mkdir()
    pq.write_table(pa.table({"image": [b"1", b"2"], "label": [1, 2]}), folder / "a.parquet")
    assert main(["new", "config", str(folder)]) == 2
    assert "each row is a sample here (columns image)" in (said := capsys.readouterr().err)
    assert "data.name=parquet and data.column=image" in said
    assert main(["new", "config", str(folder), "modality=rgb"]) == 2
    assert "Samples in .parquet: data.name=parquet" in capsys.readouterr().err


def test_a_data_set_of_several_is_asked_for(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(20):
        with h5py.File(folder / f"{number}.h5", "w") as file:
            file["age"], file["signals/ecg"] = DRAW.normal(size=9), DRAW.normal(size=(3, 512))
    found, text = draft(folder, {}, lambda question, options, likely: (options[-1], True)), drafted(folder)[1]
    assert (
        found.modality["reader"] == {"name": "hdf5", "dataset": "signals/ecg"}
        and found.modality["channels"] == 3
    )
    assert "please check: the files hold age, signals/ecg" in text
    tree, _ = drafted(folder, "reader={name: hdf5, dataset: signals/ecg}", out="b.yaml")
    assert tree["data"]["modality"]["channels"] == 3


def test_few_long_records_are_enough(tmp_path):
    tree = drafted(write(tmp_path / "mine", noise(2, 5000, count=3)))[0]
    assert tree["data"]["eval_share"] and tree["data"]["modality"]["size"] == [1024]


def test_a_stray_file_does_not_hide_the_others(tmp_path):
    folder = write(tmp_path / "mine", noise(2, 256))
    (folder / "labels.csv").write_text("name,age\na,3\n")
    tree, text = drafted(folder)
    assert tree["data"]["modality"]["reader"] == {"name": "npy"}
    assert "please check: there are 24 x *.npy, 1 x *.csv" in text


def test_groups_and_folders_of_held_out_samples(tmp_path):
    folder = tmp_path / "mine"
    for patient in range(12):
        write(folder / f"p{patient}", noise(2, 256, count=6))
    tree, text = drafted(folder)
    assert tree["data"]["group"] == "^([^/]+)/" and "please check: 12 folders such as p" in text
    for side in ("train", "val"):
        write(tmp_path / "two" / side, noise(2, 256))
    assert main(["new", "config", str(tmp_path / "two")]) == 0
    tree = yaml.safe_load((tmp_path / "two.yaml").read_text())
    assert tree["data"]["path"].endswith("two/train") and tree["data"]["eval_path"].endswith("two/val")


def test_what_cannot_be_read_says_why(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.edf").write_bytes(b"0")
    assert main(["new", "config", str(folder)]) == 2
    assert "Found: 1 x .edf. Nothing here reads .edf: a plugin can add a reader" in capsys.readouterr().err
    assert main(["new", "config", str(tmp_path / "mien")]) == 2
    assert "there is no such folder. Did you mean" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("mine")
    assert main(["new", "config", str(folder)]) == 2
    assert "mine.yaml exists already. Name another file with --out" in capsys.readouterr().err


def test_questions_at_a_terminal(monkeypatch):
    lines = iter(["nonsense", "", "l"])
    monkeypatch.setattr("builtins.input", lambda text: next(lines))
    assert new._ask("Which?", ["first", "last"], "first") == ("first", True)
    assert new._ask("Which?", ["first", "last"], "first") == ("last", True)

    def ended(text):
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    assert new._ask("Which?", ["first", "last"], "first") == ("first", False)


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_from_files_to_a_report(tmp_path, trains):
    """The door: three commands."""
    time = np.arange(256) / 256
    folder = write(
        tmp_path / "my-data",
        [np.stack([np.sin(2 * np.pi * (f * time + p)), 40 + 9 * np.cos(2 * np.pi * (f * time + p))]).astype(np.float32)
         for f, p in DRAW.uniform(1, 4, (40, 2))],
    )  # fmt: skip
    assert main(["new", "config", str(folder)]) == 0
    assert main(["check", "my-data.yaml"]) == 0
    if not trains:
        return
    assert main(["train", "my-data.yaml", "run.steps=20", "optim.warmup=2"]) == 0
    assert main(["report", "runs/my-data"]) == 0
    assert (tmp_path / "runs" / "my-data" / "report.html").is_file()
