"""Token folders of 4M: what its script leaves is read and continued, and what is written here has its layout."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from toys import run_config, tokenizer_of

from vqcore.artefacts.stored import open_named, open_store, store_named
from vqcore.cli import main
from vqcore.errors import DataError, RunError
from vqcore.protocols import Coded
from vqcore.testing import conformance
from vqcore.tokens import TokenDataset
from vqcore.tokens.layouts import tokenize_layout
from vqcore.tokens.passes import decode_folder, manifest_of
from vqcore.tokens.sharded import tokenize_shards
from vqcore.tokens.work import convert

pytestmark = pytest.mark.usefixtures("toy")
KEYS = ("cat/1", "cat/2", "dog/1", "dog/2")
SIDES = (24, 36)
LAYOUT = "fourm/tokens"
MANIFEST = {
    "format": 1, "fingerprint": "ab12", "grid": [2, 3], "size": [8, 12], "codebook_size": 32768, "num_codebooks": 1,
    "dtype": "uint16",
}  # fmt: skip


def crop_row(key, crop, codes, settings):
    return Coded(f"{key}#crop{crop}", codes, {"record": key, "crop": crop, "crop_settings": settings})


def some_shards():
    rng = np.random.default_rng(0)
    return [
        [
            crop_row(key, crop, rng.integers(32768, size=(2, 3, 1)), [crop, 2, 20, 20, crop % 2])
            for key in keys
            for crop in range(3)
        ]
        for keys in (("cat/1", "cat/2"), ("dog/1",))
    ]


class TestTokens(conformance.StoreConformance):
    component = LAYOUT
    given: ClassVar = ((MANIFEST, some_shards()),)
    waived: ClassVar = {
        "missing": "the files that are there are the store",
        "extras": "it keeps those of crops",
    }


def made(seed=0, codes=4096):
    config = run_config(
        "run",
        data__modality={"name": "rgb", "min_crop_scale": 0.3},
        data__input_size=8,
        model__quantizer={"name": "toy/quantizer", "codebook_size": codes},
        model__encoder={"name": "toy/encoder", "patch": 2},
    )
    tokenizer, rng = tokenizer_of(config).eval(), torch.Generator().manual_seed(seed)
    for values in tokenizer.state_dict().values():  # many codes, and others for each seed
        if values.is_floating_point():
            values.copy_(torch.randn(values.shape, generator=rng))
    return tokenizer


@pytest.fixture
def tokenizer():
    return made()


@pytest.fixture
def split(tmp_path):
    """4M's folder of a split: pictures by class."""
    rng = np.random.default_rng(0)
    for key in KEYS:
        path = tmp_path / "train/rgb" / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*SIDES, 3), dtype=np.uint8)).save(path)
    return tmp_path / "train"


SETTINGS = ((0, 6, 24, 24, 0), (3, 2, 18, 20, 1), (1, 0, 11, 11, 0))
"""The centre square of 24 x 36 pixels, and two crops: top, left, height, width, flip."""


def theirs(split, tokenizer, keys, settings=SETTINGS):
    """What 4M's script leaves: crops by hand, int64 settings, int16 tokens, and no manifest."""
    for key in keys:
        picture = Image.open(split / "rgb" / f"{key}.png")
        crops = []
        for top, left, height, width, flip in settings:
            crop = picture.crop((left, top, left + width, top + height)).resize(
                (8, 8), Image.Resampling.BICUBIC
            )
            crops.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)
        codes = np.stack([tokenizer.encode(tokenizer.read(crop))[0].numpy() for crop in crops])
        for name, array in (
            ("crop_settings", np.array([tuple(each) for each in settings])),
            ("rgb_toy_8", codes.reshape(len(crops), -1).astype(np.int16)),
        ):
            (split / name / key).parent.mkdir(parents=True, exist_ok=True)
            np.save(split / name / f"{key}.npy", array)
    return split / "rgb_toy_8"


def layout(tokenizer, split, name="rgb_toy_8", **how):
    return tokenize_layout(tokenizer, split / "rgb", split / name, store=LAYOUT, size=(8, 8), **how)


def arrays(folder):
    return {str(path.relative_to(folder)): np.load(path) for path in sorted(folder.rglob("*.npy"))}


def as_4m_reads(split, name):
    """Samples as `MultiModalDatasetFolder` pairs them: all files in the folders of classes, sorted, by position."""
    found = {}
    for modality in (name, "crop_settings"):
        classes = sorted(each.name for each in (split / modality).iterdir() if each.is_dir())
        found[modality] = [path for each in classes for path in sorted((split / modality / each).iterdir())]
    assert [path.parts[-2:] for path in found[name]] == [path.parts[-2:] for path in found["crop_settings"]]
    return [(np.load(one), np.load(other)) for one, other in zip(*found.values())]


class TestWritten:
    def test_it_has_the_layout_of_their_script(self, tokenizer, split):
        done = layout(tokenizer, split, crops=3, seed=1)
        assert (done.written, done.skipped, done.failed) == (4, 0, [])
        wanted = {f"{key}.npy" for key in KEYS}
        tokens, settings = arrays(split / "rgb_toy_8"), arrays(split / "crop_settings")
        assert set(tokens) == set(settings) == wanted
        for name in wanted:
            assert (tokens[name].dtype, tokens[name].shape) == (np.int16, (3, 16))
            assert (settings[name].dtype, settings[name].shape) == (np.int64, (3, 5))
            assert settings[name][0].tolist() == [0, 6, 24, 24, 0]  # 4M's centre square
            top, left, height, width, flip = settings[name].T
            assert (
                (top >= 0).all()
                and (top + height <= 24).all()
                and (left >= 0).all()
                and (left + width <= 36).all()
            )
            assert set(flip) <= {0, 1}
        assert {path.name for path in (split / "rgb_toy_8").iterdir()} == {"cat", "dog", "tokens.json"}
        assert len(as_4m_reads(split, "rgb_toy_8")) == 4

    def test_every_crop_has_the_codes_of_its_settings(self, tokenizer, split):
        layout(tokenizer, split, crops=3, seed=1)
        settings = np.load(split / "crop_settings/cat/2.npy")
        ours = np.load(split / "rgb_toy_8/cat/2.npy")
        again = theirs(split, tokenizer, ("cat/2",), settings.tolist())
        assert np.array_equal(np.load(again / "cat/2.npy"), ours)

    def test_another_modality_has_the_crops_that_are_there(self, tokenizer, split):
        other = made(seed=1)
        layout(tokenizer, split, crops=3, seed=1)
        before = arrays(split / "crop_settings")
        assert layout(other, split, "rgb_other").written == 4  # without --crops: those that are there
        after = arrays(split / "crop_settings")
        assert all(np.array_equal(before[name], after[name]) for name in before)
        both = TokenDataset({"one": split / "rgb_toy_8", "two": split / "rgb_other"})
        assert len(both) == 12 and both.extras(4) == both.extras(4, "two")
        for name in ("rgb_third", "rgb_other"):
            with pytest.raises(RunError, match=r"3 crops of 'cat/1' are chosen already, and --crops says 2"):
                layout(other, split, name, crops=2)
        assert not (split / "rgb_third").exists()

    def test_started_again_it_does_what_is_missing(self, tokenizer, split):
        layout(tokenizer, split, crops=3)
        whole = arrays(split / "rgb_toy_8")
        (split / "rgb_toy_8/dog/1.npy").unlink()
        done = layout(tokenizer, split, crops=3)
        assert (done.written, done.skipped) == (1, 3)
        again = arrays(split / "rgb_toy_8")
        assert all(np.array_equal(whole[name], again[name]) for name in whole)
        with pytest.raises(RunError, match=r"holds other codes \(different: fingerprint\)"):
            layout(made(seed=1), split)

    def test_each_process_does_its_share(self, tokenizer, split, monkeypatch):
        layout(tokenizer, split, "rgb_whole")
        monkeypatch.setenv("WORLD_SIZE", "3")
        for rank, count in ((0, 2), (1, 1), (2, 1)):
            monkeypatch.setenv("RANK", str(rank))
            assert layout(tokenizer, split).written == count
        one, other = arrays(split / "rgb_whole"), arrays(split / "rgb_toy_8")
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


class TestTheirs:
    def test_a_folder_half_done_is_continued(self, tokenizer, split, caplog):
        folder = theirs(split, tokenizer, KEYS[:2])
        theirs(split, tokenizer, KEYS[2:3])
        half = folder / "dog/1.npy"
        half.write_bytes(half.read_bytes()[:-5])  # killed in the middle of a file
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
        wanted = np.load(split / "crop_settings/dog/1.npy")
        done = layout(tokenizer, split, crops=3)
        assert (done.written, done.skipped, done.failed) == (2, 2, [])
        assert (
            "the codes of 'cat/1' that are there and those of this tokenizer agree at 100.0%" in caplog.text
        )
        for key in KEYS[:2]:
            assert (folder / f"{key}.npy").stat().st_mtime_ns == before[folder / f"{key}.npy"]
        assert np.array_equal(np.load(split / "crop_settings/dog/1.npy"), wanted)
        mended = np.load(half)
        theirs(split, tokenizer, KEYS[2:3])
        assert np.array_equal(np.load(half), mended)
        assert len(as_4m_reads(split, "rgb_toy_8")) == 4 and len(TokenDataset(folder)) == 12

    def test_codes_of_another_tokenizer_are_not_continued(self, tokenizer, split):
        theirs(split, made(seed=1), KEYS[:1])
        with pytest.raises(
            RunError, match=r"of 'cat/1' that are there are not those of this tokenizer: [0-9]% are eq"
        ):
            layout(tokenizer, split)
        assert not (split / "rgb_toy_8/tokens.json").exists()

    def test_it_is_decoded_and_converted_without_a_manifest(self, tokenizer, split, tmp_path, caplog):
        folder = theirs(split, tokenizer, KEYS)
        done = decode_folder(tokenizer, f"{LAYOUT}:{folder}", tmp_path / "out")
        assert done.written == 12 and "no tokens.json beside the codes says which tokenizer" in caplog.text
        names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
        assert names == {f"{key}#crop{crop}.png" for key in KEYS for crop in range(3)}
        found = open_named(f"{LAYOUT}:{folder}", manifest_of(tokenizer, (8, 8), None))
        view = found.row(1).extras["view"]
        assert view == {
            "start": [3 / 24, 2 / 36],
            "stop": [21 / 24, 22 / 36],
            "flip": True,
            "extent": [24, 36],
        }
        for store in ("arrow", "tar", "parquet"):
            convert(found, tmp_path / store, store)
            copied = open_store(tmp_path / store)
            assert [copied.rows.key(place) for place in range(12)] == [
                found.rows.key(place) for place in range(12)
            ]
            for place in range(12):
                one, other = copied.row(place), found.row(place)
                assert np.array_equal(one.codes, other.codes) and one.extras == other.extras
        before = arrays(split / "crop_settings")
        for path in (split / "crop_settings").rglob("*.npy"):
            path.unlink()
        convert(open_store(tmp_path / "tar"), split / "rgb_back", LAYOUT)
        one, other = arrays(folder), arrays(split / "rgb_back")
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
        after = arrays(split / "crop_settings")
        assert all(
            np.array_equal(before[name], after[name]) and after[name].dtype == np.int64 for name in before
        )

    def test_their_crops_are_taken_for_a_store_of_ours(self, split, tmp_path):
        other, codes = made(seed=1), split / "rgb_toy_8"
        theirs(split, made(), KEYS)
        how = {"size": (8, 8), "views": f"{LAYOUT}:{codes}"}
        assert tokenize_shards(other, split / "rgb", tmp_path / "one", **how).written == 4
        wanted = arrays(theirs(split, other, KEYS))
        store = open_store(tmp_path / "one")
        assert [store.rows.key(place) for place in range(2)] == ["cat/1#crop0", "cat/1#crop1"]
        for key in KEYS:
            rows = [store.row(store.rows.find(f"{key}#crop{crop}")).codes for crop in range(3)]
            assert np.array_equal(np.stack(rows).reshape(3, -1), wanted[f"{key}.npy"])
        convert(open_store(tmp_path / "one"), tmp_path / "again/rgb_toy_8", LAYOUT)
        settings = arrays(split / "crop_settings")
        assert all(
            np.array_equal(settings[name], found)
            for name, found in arrays(tmp_path / "again/crop_settings").items()
        )
        np.save(split / "crop_settings/dog/2.npy", np.array([(0, 0, 24, 24, 1)]))
        with pytest.raises(RunError, match=r"one holds other codes \(different: crops\)"):
            tokenize_shards(other, split / "rgb", tmp_path / "one", **how)
        np.save(split / "crop_settings/dog/2.npy", np.array([(0, 0, 99, 24, 1)]))
        done = tokenize_shards(other, split / "rgb", tmp_path / "two", **how)
        assert done.keys == ["dog/2"] and "do not lie inside of 24 x 36" in done.failed[0]
        (split / "crop_settings/cat/1.npy").unlink()
        with pytest.raises(DataError, match=r"rgb_toy_8 lacks 1 of 4 keys \(cat/1\)"):
            tokenize_shards(other, split / "rgb", tmp_path / "three", **how)
        with pytest.raises(DataError, match=rf"--views {codes}: .*: --views {LAYOUT}:{codes}$"):
            tokenize_shards(other, split / "rgb", tmp_path / "three", size=(8, 8), views=codes)

    def test_where_no_pictures_are_the_settings_are_kept(self, tokenizer, split, tmp_path):
        folder = theirs(split, tokenizer, KEYS)
        (split / "rgb").rename(tmp_path / "pictures")
        says = manifest_of(tokenizer, (8, 8), None)
        found = open_named(f"{LAYOUT}:{folder}", says)
        assert found.row(1).extras == {"record": "cat/1", "crop": 1, "crop_settings": list(SETTINGS[1])}
        named = open_named(f"{LAYOUT}[pictures={tmp_path / 'pictures'}]:{folder}", says)
        assert named.row(1).extras["view"]["extent"] == [24, 36]
        convert(found, tmp_path / "arrow", "arrow")
        convert(open_store(tmp_path / "arrow"), tmp_path / "val/rgb_toy", LAYOUT)
        assert np.load(tmp_path / "val/crop_settings/dog/2.npy").tolist() == [list(each) for each in SETTINGS]
        with pytest.raises(DataError, match=r"pictures: .*nowhere: there is no such folder"):
            open_named(f"{LAYOUT}[pictures={tmp_path / 'nowhere'}]:{folder}", says)

    def test_other_codes_are_not_mixed(self, tokenizer, split, tmp_path):
        folder = theirs(split, tokenizer, KEYS)
        convert(
            open_named(f"{LAYOUT}:{folder}", manifest_of(tokenizer, (8, 8), None)), tmp_path / "tok", "arrow"
        )
        path = folder / "dog/1.npy"
        np.save(path, np.load(path)[:, ::-1])
        with pytest.raises(RunError, match=r"rgb_toy_8 holds other codes of 'dog/1'"):
            convert(open_store(tmp_path / "tok"), folder, LAYOUT)
        path.unlink()
        convert(open_store(tmp_path / "tok"), folder, LAYOUT)  # what is there is the same
        assert len(TokenDataset(folder)) == 12


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (
                {"codebook_size": 65536},
                r"16-bit integers, up to 32,767, and this codebook has 65,536 codes. Take --store arr",
            ),
            ({"num_codebooks": 2}, r"hold one codebook, and these codes have 2"),
        ],
    )
    def test_codes_that_do_not_fit(self, tmp_path, change, says):
        with pytest.raises(DataError, match=says):
            store_named(LAYOUT, "").write(tmp_path / "tok", "", [], {**MANIFEST, **change})

    @pytest.mark.parametrize(
        ("key", "says"),
        [("1", "lie at CLASS/ID"), ("a/b/1", "lie at CLASS/ID"), ("a/1.5", "at its first dot")],
    )
    def test_keys_that_4m_would_cut(self, tmp_path, key, says):
        row = crop_row(key, 0, np.zeros((2, 3, 1), int), [0, 0, 4, 4, 0])
        with pytest.raises(DataError, match=says):
            store_named(LAYOUT, "").write(tmp_path / "tok", "", [row], MANIFEST)

    @pytest.mark.parametrize(
        ("extras", "says"),
        [
            ({}, r"'c/1' has no view, and 4M keeps the crop of all tokens. Tokenize with --crops 1 or more"),
            ({"record": "c/1", "crop": 1, "crop_settings": [0, 0, 4, 4, 0]}, r"all crops of a file in their order"),
            ({"record": "c/1", "crop": 0, "view": {"start": [0.1], "stop": [1], "flip": False, "extent": [8]}},
             r"4M's crops are those of pictures, and this one has 1 axes"),
            ({"record": "c/1", "crop": 0, "view": {"start": [0.1, 0], "stop": [1, 1], "flip": False, "extent": [8, 8]}},
             r"does not begin and end at whole pixels"),
        ],
    )  # fmt: skip
    def test_rows_that_have_no_place(self, tmp_path, extras, says):
        row = Coded("c/1", np.zeros((2, 3, 1), int), extras)
        with pytest.raises(DataError, match=says):
            store_named(LAYOUT, "").write(tmp_path / "tok", "", [row], MANIFEST)

    def test_other_crops_than_those_that_are_there(self, tmp_path):
        store, codes = store_named(LAYOUT, ""), np.zeros((2, 3, 1), int)
        store.write(tmp_path / "one", "", [crop_row("c/1", 0, codes, [0, 0, 4, 4, 0])], MANIFEST)
        with pytest.raises(
            DataError, match=r"c/1\.npy has other crops, \[\[0, 0, 4, 4, 0\]\] and not \[\[1, 0, 4, 4"
        ):
            store.write(tmp_path / "two", "", [crop_row("c/1", 0, codes, [1, 0, 4, 4, 0])], MANIFEST)

    def test_files_that_are_no_tokens_of_this_kind(self, tokenizer, split):
        folder = theirs(split, tokenizer, KEYS)
        says, path = manifest_of(tokenizer, (8, 8), None), folder / "cat/1.npy"
        for array, wanted in (
            (
                np.zeros((3, 25), np.int16),
                r"tokens of 4M are integers \(crops, 16\) .* not int16 \[3, 25\]. Pictures of",
            ),
            (
                np.full((3, 16), -5, np.int16),
                r"code -5 is out of range: codes lie in \[0, 4096\) \(4M's script wraps",
            ),
            (np.full((3, 16), 4096, np.int16), r"code 4096 is out of range"),
        ):
            np.save(path, array)
            with pytest.raises(DataError, match=wanted):
                open_named(f"{LAYOUT}:{folder}", says)
            with pytest.raises(DataError, match=wanted):
                layout(tokenizer, split)


@pytest.mark.slow
def test_the_command_line(split, tmp_path, capsys, monkeypatch):
    """From pictures to their layout, on, back, and to files."""
    monkeypatch.chdir(tmp_path)
    run = "tokenizer"
    made().save(run)
    tokens = "train/rgb_toy_8"
    assert main(["tokenize", run, "train/rgb", tokens, "--store", LAYOUT, "--crops", "2"]) == 0
    assert "4 written" in capsys.readouterr().out
    assert main(["tokenize", run, "train/rgb", tokens, "--store", LAYOUT, "--crops", "2"]) == 0
    assert "0 written, 4 existed already" in capsys.readouterr().out
    assert main(["tokenize", run, "train/rgb", "train/rgb_other_8", "--store", f"{LAYOUT}[]"]) == 0
    assert "crops     8 of 8 x 8, for 4 samples" in capsys.readouterr().out
    assert main(["tokens", "stats", tokens]) == 0 and main(["tokens", "verify", tokens]) == 0
    assert main(["decode", run, tokens, "out"]) == 0 and len(list((tmp_path / "out").rglob("*.png"))) == 8
    (tmp_path / tokens / "tokens.json").unlink()  # as if their script had written it
    assert main(["tokens", "convert", tokens, "arrow"]) == 2
    assert "are named with their layout, LAYOUT:FOLDER" in capsys.readouterr().err
    assert main(["tokens", "convert", f"{LAYOUT}:{tokens}", "arrow"]) == 2
    assert "Name the tokenizer that made the codes: --tokenizer RUN" in capsys.readouterr().err
    assert main(["tokens", "convert", f"{LAYOUT}:{tokens}", "arrow", "--tokenizer", run]) == 0
    assert main(["tokens", "convert", "arrow", "val/rgb_toy_8", "--store", LAYOUT]) == 0
    one, other = arrays(tmp_path / tokens), arrays(tmp_path / "val/rgb_toy_8")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "val/rgb_toy_8/tokens.json").read_text())["store"] == LAYOUT
    assert main(["decode", run, f"{LAYOUT}:{tokens}", "again", "--force"]) == 0
    for path in (tmp_path / "out").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes()
    for words, says in (
        (
            ["tokenize", run, "train/rgb", "x", "--store", LAYOUT, "--only", "f"],
            "--only is for stores of shards",
        ),
        (
            ["tokens", "convert", "arrow", "folder", "--store", "folder"],
            "no room for the view of a crop (cat/1#crop0)",
        ),
        (
            ["tokens", "convert", "arrow", "y", "--size", "8"],
            "--size is for codes of another system, LAYOUT:FOLDER",
        ),
        (["decode", run, "arrow", "z", "--size", "8"], "for codes of another system"),
        (["decode", run, f"{LAYOUT}:{tokens}", "z", "--size", "16"], "Pictures of another size: --size"),
    ):
        assert main(words) == 2, words
        assert says in capsys.readouterr().err
