"""Stores of shards: which bytes, who made them, and what is left when something goes wrong."""

import errno
import importlib.util
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
import toys
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader
from toys import toy  # noqa: F401

from vqcore import dist, files, pictures
from vqcore.artefacts.codes import packed
from vqcore.artefacts.stored import open_store, store_named
from vqcore.cli import main
from vqcore.errors import ConfigError, DataError, RunError
from vqcore.protocols import Coded
from vqcore.tokenizer import Tokenizer
from vqcore.tokens import TokenDataset, passes
from vqcore.tokens import stats as counting
from vqcore.tokens.passes import decode_folder, tokenize_folder
from vqcore.tokens.sharded import Job, tokenize_all, tokenize_shards
from vqcore.tokens.shards import Shards, sha256
from vqcore.tokens.sheet import decoded
from vqcore.tokens.work import convert

pytestmark = pytest.mark.usefixtures("toy")
BYTES = os.fsdecode(b"caf\xe9")


def samples(folder, *keys):
    rng = np.random.default_rng(0)
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{key}.npy", rng.uniform(-1, 1, (2, 8, 8)).astype(np.float32))
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def trained(folder, seed=0):
    return Tokenizer.load(toys.trained(folder, run__steps=1, run__seed=seed))


@pytest.fixture
def made(tmp_path):
    return trained(tmp_path / "run")


def stored(tokenizer, source, target, **how):
    """A pass with small shards."""
    return tokenize_shards(
        tokenizer, source, target, **{"size": (8, 8), "batch_size": 2, "shard_size": 3, **how}
    )


class TestWhatIsInIt:
    def test_codes_keys_and_manifest(self, made, tmp_path):
        names = ("a", "b/c", "b/d", "e", BYTES, "z/ü")
        pics = samples(tmp_path / "in", *names)
        np.save(tmp_path / "in/many.npy", np.random.default_rng(1).uniform(-1, 1, (4, 2, 8, 8)))
        assert stored(made, pics, tmp_path / "tok", named="my-run").written == 7
        tokenize_folder(made, pics, tmp_path / "plain", size=(8, 8))
        one, other = made.load_tokens(tmp_path / "tok"), made.load_tokens(tmp_path / "plain")
        assert sorted(one) == sorted(other) and set(names) < set(one)
        for key in other:
            assert one[key].dtype == np.int64 and np.array_equal(one[key], other[key]), key
        found = open_store(tmp_path / "tok")
        assert len(found.rows) == 10
        assert found.rows.codes(0).dtype == np.uint8 and not found.rows.codes(0).flags.writeable
        assert found.rows.extras(found.rows.find("many#2")) == {"record": "many", "row": 2}
        manifest = json.loads((tmp_path / "tok/tokens.json").read_text())
        wanted = {
            "fingerprint": made.fingerprint,
            "grid": [2, 2],
            "tokenizer": "my-run",
            "rows": 10,
            "files": 7,
        }
        assert wanted.items() <= manifest.items()
        assert {
            "threads",
            "device",
            "precision",
            "batch_size",
            "versions",
            "layout",
            "modality",
        } < manifest.keys()
        for shard in manifest["shards"]:
            ((name, checksum),) = shard["files"].items()
            assert sha256(tmp_path / "tok" / name) == checksum
        files_there = {"tokens.json", *(f"shard-{n:05d}.arrow" for n in range(3))}
        assert set(contents(tmp_path / "tok")) == files_there

    def test_other_decoders_read_the_same(self, made, tmp_path):
        pics = samples(tmp_path / "in", "a", "b/c", "d")
        stored(made, pics, tmp_path / "tok")
        tokenize_folder(made, pics, tmp_path / "plain", size=(8, 8))
        for name in ("tok", "plain"):
            assert decode_folder(made, tmp_path / name, tmp_path / f"{name}-out").written == 3
        assert contents(tmp_path / "tok-out") == contents(tmp_path / "plain-out")
        again = decode_folder(made, tmp_path / "tok", tmp_path / "tok-out")
        assert (again.written, again.skipped) == (0, 3)
        with pytest.raises(DataError, match=r"were made by another tokenizer"):
            decode_folder(trained(tmp_path / "other", seed=1), tmp_path / "tok", tmp_path / "no")

    def test_codes_take_what_their_type_takes(self, tmp_path):
        manifest = {
            "grid": [14, 14],
            "num_codebooks": 1,
            "dtype": "uint16",
            "codebook_size": 9999,
            "size": [8, 8],
        }
        codes = np.random.default_rng(0).integers(9999, size=(1000, 14, 14, 1))
        store = store_named("arrow", "here")
        store.write(tmp_path, "full", [Coded("", each) for each in codes], manifest)
        store.write(tmp_path, "keys", [Coded(f"{n:08d}", each) for n, each in enumerate(codes)], manifest)
        raw = 2 * codes.size
        assert (tmp_path / "full.arrow").stat().st_size < 1.05 * raw  # all but keys: 4 bytes of offset a row
        assert (tmp_path / "keys.arrow").stat().st_size < 1.05 * raw


class TestStartedAgain:
    def test_other_shares_and_starts_give_the_same_bytes(self, made, tmp_path, monkeypatch):
        pics = samples(tmp_path / "in", *(f"{n:02}" for n in range(20)))
        (pics / "07.npy").write_bytes(b"junk")
        stored(made, pics, tmp_path / "one", workers=0)
        whole = contents(tmp_path / "one")
        assert len(whole) == 9 and whole["failed.txt"].startswith(b"07\t")
        for ranks in (2, 3):
            target = tmp_path / f"by{ranks}"
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
            for rank in range(ranks - 1):  # the last one is dead
                monkeypatch.setenv("RANK", str(rank))
                stored(made, pics, target, workers=rank)
            with pytest.raises(DataError, match=r"not complete. Start the same"):
                open_store(target)
            monkeypatch.delenv("WORLD_SIZE")
            before = {
                name: (target / name).stat().st_mtime_ns for name in contents(target) if "arrow" in name
            }
            stored(made, pics, target, workers=3)
            assert contents(target) == whole
            for name, when in before.items():
                assert (target / name).stat().st_mtime_ns == when  # a finished shard is never done twice

    def test_shares_of_torchrun_and_slurm(self, monkeypatch):
        for given, wanted in (
            ({}, (0, 1)),
            ({"WORLD_SIZE": "4", "RANK": "3"}, (3, 4)),
            ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1)),  # one process outside srun
            ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, (5, 8)),
            ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2",
              "SLURM_ARRAY_TASK_COUNT": "4"}, (3, 4)),
            ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "WORLD_SIZE": "4", "RANK": "1"}, (5, 8)),
        ):  # fmt: skip
            with monkeypatch.context() as patch:
                for name in list(os.environ):
                    if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE"):
                        patch.delenv(name)
                for name, value in given.items():
                    patch.setenv(name, value)
                assert dist.share() == wanted

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"batch_size": 3}, "different: batch_size 2 there, 3 here"),
            ({"shard_size": 4}, "different: shard_size 3 there, 4 here"),
            ({"size": (16, 16)}, r"different: grid \[2, 2\] there, \[4, 4\] here"),
        ],
    )
    def test_with_other_settings_it_is_refused(self, made, tmp_path, change, says):
        pics = samples(tmp_path / "in", "a", "b")
        stored(made, pics, tmp_path / "tok")
        before = contents(tmp_path / "tok")
        with pytest.raises(RunError, match=says):
            stored(made, pics, tmp_path / "tok", **change)
        assert contents(tmp_path / "tok") == before

    def test_with_other_threads_tokenizer_or_files_it_is_refused(self, made, tmp_path, monkeypatch):
        pics = samples(tmp_path / "in", "a", "b")
        stored(made, pics, tmp_path / "tok")
        with pytest.raises(RunError, match=r"different: fingerprint\)"):
            stored(trained(tmp_path / "other", seed=1), pics, tmp_path / "tok", overwrite=True)
        with monkeypatch.context() as patch:
            patch.setattr("torch.get_num_threads", lambda: 77)
            with pytest.raises(RunError, match=r"different: threads 1 there, 77 here"):
                stored(made, pics, tmp_path / "tok")
        samples(tmp_path / "in", "c")
        with pytest.raises(RunError, match=r"different: source\)"):
            stored(made, pics, tmp_path / "tok")
        with pytest.raises(RunError, match=r"holds codes as --store arrow, not folder. Add --store arrow"):
            tokenize_folder(made, pics, tmp_path / "tok", size=(8, 8))
        tokenize_folder(made, pics, tmp_path / "plain", size=(8, 8))
        with pytest.raises(RunError, match=r"holds codes as --store folder, not arrow"):
            stored(made, pics, tmp_path / "plain")

    def test_files_of_other_sizes_than_before_are_named(self, made, tmp_path, caplog):
        pics = samples(tmp_path / "in", *(f"{n:02}" for n in range(5)))
        stored(made, pics, tmp_path / "tok")
        assert stored(made, pics, tmp_path / "tok").written == 0 and not caplog.text
        np.save(pics / "04.npy", np.zeros((2, 16, 8), np.float32))
        assert stored(made, pics, tmp_path / "tok").written == 0
        (line,) = caplog.messages
        assert "files of shard-00001 have other sizes" in line and "--only" in line

    def test_only_the_failed_ones(self, made, tmp_path):
        names = [f"{n:02}" for n in range(8)]
        pics = samples(tmp_path / "in", *names)
        stored(made, pics, tmp_path / "whole")
        good = (pics / "04.npy").read_bytes()
        (pics / "04.npy").write_bytes(b"junk")
        done = stored(made, pics, tmp_path / "tok")
        assert done.written == 7 and done.keys == ["04"]
        (pics / "04.npy").write_bytes(good)
        assert stored(made, pics, tmp_path / "tok").written == 0
        shutil.copy(tmp_path / "tok/failed.txt", tmp_path / "todo")
        done = stored(made, pics, tmp_path / "tok", only=tmp_path / "todo")
        assert (done.written, done.skipped) == (3, 5)
        assert contents(tmp_path / "tok") == contents(tmp_path / "whole")
        (tmp_path / "todo").write_text("4\n")
        with pytest.raises(DataError, match=r"no file has the key '4' \(1 of 1\)"):
            stored(made, pics, tmp_path / "tok", only=tmp_path / "todo")
        (tmp_path / "todo").write_bytes(bytes(range(128, 256)) * 99)
        with pytest.raises(
            DataError, match=r"no file has the key '\\udc80\\udc81.{44}\.\.\. \(1 of 1\)"
        ) as raised:
            stored(made, pics, tmp_path / "tok", only=tmp_path / "todo")
        assert str(raised.value).isascii()
        (tmp_path / "todo").write_text("\n")
        with pytest.raises(DataError, match=r"names no key"):
            stored(made, pics, tmp_path / "tok", only=tmp_path / "todo")

    def test_a_copy_follows_a_store_that_was_mended(self, made, tmp_path):
        pics = samples(tmp_path / "in", *(f"{n}" for n in range(5)))
        good = (pics / "1.npy").read_bytes()
        (pics / "1.npy").write_bytes(b"junk")
        stored(made, pics, tmp_path / "tok")
        assert convert(open_store(tmp_path / "tok"), tmp_path / "copy", "parquet") == 4
        (pics / "1.npy").write_bytes(good)
        shutil.copy(tmp_path / "tok/failed.txt", tmp_path / "todo")
        stored(made, pics, tmp_path / "tok", only=tmp_path / "todo")
        assert convert(open_store(tmp_path / "tok"), tmp_path / "copy", "parquet") == 5
        assert open_store(tmp_path / "copy").rows.find("1") == 1
        assert not (tmp_path / "copy/failed.txt").exists()

    def test_verify_counts_the_rows(self, made, tmp_path, capsys):
        stored(made, samples(tmp_path / "in", "a", "b"), tmp_path / "tok")
        path = tmp_path / "tok/tokens.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rows": 10}))
        assert main(["tokens", "verify", str(tmp_path / "tok")]) == 2
        assert "its manifest says 10 rows, and its shards have 2" in capsys.readouterr().err

    def test_a_command_that_is_refused_leaves_no_store(self, made, tmp_path):
        pics = samples(tmp_path / "in", "a", "b")
        with pytest.raises(DataError, match="nothere"):
            stored(made, pics, tmp_path / "tok", only=tmp_path / "nothere")
        stored(made, pics, tmp_path / "old", shard_size=1)
        jobs = [
            Job(tokenizer=made, target=tmp_path / name, size=(8, 8), batch_size=2) for name in ("tok", "old")
        ]
        with pytest.raises(RunError, match="holds other codes"):
            tokenize_all(pics, jobs, shard_size=2)
        assert not (tmp_path / "tok").exists()

    def test_overwrite_does_all_again(self, made, tmp_path):
        pics = samples(tmp_path / "in", "a", "b")
        stored(made, pics, tmp_path / "tok")
        before = contents(tmp_path / "tok")
        (tmp_path / "tok/shard-00000.arrow").write_bytes(b"junk")
        assert stored(made, pics, tmp_path / "tok", overwrite=True).written == 2
        assert contents(tmp_path / "tok") == before

    def test_one_process_alone_may_forget(self, made, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match=r"--overwrite is for one process, and this is one of 2"):
            stored(made, samples(tmp_path / "in", "a"), tmp_path / "tok", overwrite=True)


class TestBad:
    def test_a_full_disk_is_one_line_and_what_is_finished_stays(self, made, tmp_path, monkeypatch):
        pics = samples(tmp_path / "in", *(f"{n:02}" for n in range(8)))
        stored(made, pics, tmp_path / "whole")
        real = files._flush

        def refuse(path):
            if (tmp_path / "tok/shard-00001.json").exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path)

        with monkeypatch.context() as patch:
            patch.setattr(files, "_flush", refuse)
            with pytest.raises(
                RunError, match=r"shard-00002\.arrow cannot be written: No space.* 2 shards were fin"
            ):
                stored(made, pics, tmp_path / "tok")
        left = {"tokens.json", *(f"shard-0000{n}.{kind}" for n in (0, 1) for kind in ("arrow", "json"))}
        assert set(contents(tmp_path / "tok")) == left
        assert stored(made, pics, tmp_path / "tok").skipped == 6
        assert contents(tmp_path / "tok") == contents(tmp_path / "whole")

    def test_nothing_readable_leaves_nothing(self, made, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a.npy").write_bytes(b"junk")
        with pytest.raises(DataError, match=r"none of the 1 files can be read. The first: .*a.npy"):
            stored(made, tmp_path / "in", tmp_path / "up/tok")
        assert not (tmp_path / "up/tok").exists()

    def test_a_folder_with_something_else_is_refused(self, made, tmp_path):
        pics = samples(tmp_path / "in", "a")
        samples(tmp_path / "tok", "mine")
        with pytest.raises(RunError, match=r"tok is not empty, and no tokens\.json"):
            stored(made, pics, tmp_path / "tok")

    def test_a_damaged_shard_is_named(self, made, tmp_path):
        pics = samples(tmp_path / "in", "a", "b", "c", "d")
        stored(made, pics, tmp_path / "tok")
        victim = tmp_path / "tok/shard-00001.arrow"
        raw = victim.read_bytes()
        for bad in (raw[:-40], b"", b"junk"):
            victim.write_bytes(bad)
            with pytest.raises(DataError, match=r"shard-00001\.arrow: this shard cannot be read"):
                made.load_tokens(tmp_path / "tok")
        shutil.copy(tmp_path / "tok/shard-00000.arrow", victim)
        with pytest.raises(
            DataError, match=r"shard-00001\.arrow: this shard holds 3 rows .* manifest says 1"
        ):
            made.load_tokens(tmp_path / "tok")
        victim.unlink()
        with pytest.raises(DataError, match=r"shard-00001\.arrow"):
            made.load_tokens(tmp_path / "tok")
        os.mkfifo(victim)
        with pytest.raises(DataError, match=r"shard-00001\.arrow: is a device or a pipe, no file"):
            made.load_tokens(tmp_path / "tok")

    def test_a_newer_store_is_refused(self, made, tmp_path):
        pics = samples(tmp_path / "in", "a")
        stored(made, pics, tmp_path / "tok")
        path = tmp_path / "tok/tokens.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
        for ask in (made.load_tokens, lambda tok: stored(made, pics, tok)):
            with pytest.raises(
                DataError, match=r"stored in format 2, and this vqcore reads up to 1. Upgrade vqcore"
            ):
                ask(tmp_path / "tok")


def test_the_command_line(tmp_path, capsys):
    run, pics = str(toys.trained(tmp_path / "run", run__steps=1)), samples(tmp_path / "in", "a", "b/c")
    there = [str(tmp_path / name) for name in ("tok", "out")]
    assert main(["tokenize", run, str(pics), there[0], "--shard-size", "1", "--workers", "2"]) == 0
    assert "2 written, 0 existed already, 0 unreadable" in capsys.readouterr().out
    assert main(["tokenize", run, str(pics), there[0], "--shard-size", "1"]) == 0
    assert "0 written, 2 existed already" in capsys.readouterr().out
    assert main(["decode", run, *there]) == 0
    assert set(contents(Path(there[1]))) == {"a.npy", "b/c.npy"}
    assert main(["decode", run, f"{there[0]}/shard-00000.arrow", f"{there[1]}-2"]) == 2
    assert f"is a part of a store. Give the folder of the store: {there[0]}." in capsys.readouterr().err
    for more, says in (
        (["--store", "arow"], "--store: vqcore 0.1.0 has no store of codes 'arow'. Did you mean 'arrow'"),
        (["--store", "folder[]", "--only", "x"], "--only is for stores of shards"),
    ):
        assert main(["tokenize", run, str(pics), str(tmp_path / "new"), *more]) == 2
        assert says in capsys.readouterr().err
    # Brackets without settings change nothing.
    assert main(["tokenize", run, str(pics), there[0], "--shard-size", "1", "--store", "arrow[]"]) == 0
    assert "0 written, 2 existed already" in capsys.readouterr().out
    assert main(["tokenize", run, str(pics), str(tmp_path / "new"), "--store", " folder[]"]) == 0
    assert main(["tokens", "convert", there[0], str(tmp_path / "copy"), "--store", "folder[]"]) == 0
    assert set(contents(tmp_path / "new")) == {"a.npy", "b/c.npy", "tokens.json", "b/tokens.json"}
    assert contents(tmp_path / "new") == contents(tmp_path / "copy")


class TestDataset:
    def test_rows_batches_and_keys(self, made, tmp_path):
        pics = samples(tmp_path / "in", *"abcdefg")
        stored(made, pics, tmp_path / "tok")
        data = TokenDataset(tmp_path / "tok")
        codes = made.load_tokens(tmp_path / "tok")
        assert len(data) == 7 and [data.key(place) for place in range(7)] == list("abcdefg")
        for place, key in enumerate(codes):
            assert data[place].dtype == torch.int64 and np.array_equal(data[place], codes[key])
            assert data.find(key) == place
        assert torch.equal(data[-1], data[6])
        asked = [6, 0, 0, 4]
        assert torch.equal(data.batch(asked), torch.stack([data[place] for place in asked]))
        assert torch.equal(data[asked], data.batch(torch.tensor(asked)))
        again = pickle.loads(pickle.dumps(data))
        assert torch.equal(again.batch(asked), data.batch(asked))
        loader = DataLoader(data, sampler=BatchSampler(range(7), 3, False), batch_size=None, num_workers=1)
        assert torch.equal(torch.cat(list(loader)), data.batch(range(7)))
        for wrong, kind in ((7, IndexError), (-8, IndexError)):
            with pytest.raises(kind):
                data[wrong]
        with pytest.raises(IndexError):
            data.batch([7])
        with pytest.raises(KeyError, match=r"there are no codes of 'h'"):
            data.find("h")

    def test_several_modalities_by_key(self, made, tmp_path):
        stored(made, samples(tmp_path / "in", *"abcd"), tmp_path / "one")
        stored(trained(tmp_path / "other", seed=1), tmp_path / "in", tmp_path / "two")
        places = {"x": tmp_path / "one", "y": tmp_path / "two"}
        both = TokenDataset(places)
        assert len(both) == 4 and both[1].keys() == {"x", "y"}
        assert torch.equal(both[1]["y"], TokenDataset(tmp_path / "two")[1])
        stored(made, samples(tmp_path / "less", *"bdez"), tmp_path / "three")
        places["y"] = tmp_path / "three"
        says = r"three lacks 2 of 4 keys \(a, c\); .*one lacks 2 of 4 keys \(e, z\)\. common=True takes"
        with pytest.raises(DataError, match=says):
            TokenDataset(places)
        shared = TokenDataset(places, common=True)
        assert len(shared) == 2 and [shared.key(0), shared.key(1)] == ["b", "d"]
        assert torch.equal(shared.batch([1])["y"], TokenDataset(tmp_path / "three").batch([1]))
        assert shared.find("d") == 1
        with pytest.raises(KeyError, match=r"not all stores have codes of 'c'"):
            shared.find("c")
        stored(made, samples(tmp_path / "none", "q"), tmp_path / "four")
        with pytest.raises(DataError, match=r"no key is in all of them"):
            TokenDataset({"x": tmp_path / "one", "y": tmp_path / "four"}, common=True)


class TestWork:
    def test_there_and_back_again(self, made, tmp_path, capsys):
        pics = samples(tmp_path / "in", "a", "b/c", "d", "e")
        np.save(tmp_path / "in/many.npy", np.random.default_rng(1).uniform(-1, 1, (4, 2, 8, 8)))
        stored(made, pics, tmp_path / "tok")
        for first, second, store in (
            ("tok", "pq", "parquet"),
            ("pq", "tar", "tar"),
            ("tar", "plain", "folder"),
            ("plain", "end", "arrow"),
        ):
            assert (
                main(
                    [
                        "tokens",
                        "convert",
                        *(str(tmp_path / each) for each in (first, second)),
                        "--store",
                        store,
                    ]
                )
                == 0
            )
            assert main(["tokens", "verify", str(tmp_path / "tok"), str(tmp_path / second)]) == 0, store
        said = capsys.readouterr().out
        assert said.count("the 2 stores have the same keys") == 4
        tokenize_folder(made, pics, tmp_path / "straight", size=(8, 8))
        assert contents(tmp_path / "plain") == contents(tmp_path / "straight")
        one, other = made.load_tokens(tmp_path / "tok"), made.load_tokens(tmp_path / "end")
        assert list(one) == list(other) and all(np.array_equal(one[key], other[key]) for key in one)
        assert main(["tokens", "convert", str(tmp_path / "tok"), str(tmp_path / "tok")]) == 2
        assert "is the store itself" in capsys.readouterr().err

    def test_parquet_is_read_by_others(self, made, tmp_path):
        stored(made, samples(tmp_path / "in", "a", "b"), tmp_path / "tok", store="parquet")
        table = pyarrow.parquet.read_table(tmp_path / "tok/shard-00000.parquet")
        assert table["key"].to_pylist() == ["a", "b"]
        codes = made.load_tokens(tmp_path / "tok")["b"]
        assert table["codes"][1].as_py() == codes.ravel().tolist()
        whole = pyarrow.dataset.dataset(sorted((tmp_path / "tok").glob("*.parquet")))
        assert whole.to_table(filter=pyarrow.dataset.field("key") == "b")["codes"].to_pylist() == [
            codes.ravel().tolist()
        ]
        assert decode_folder(made, tmp_path / "tok", tmp_path / "out").written == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("reader", ["polars", "duckdb", "datasets"])
    def test_parquet_is_read_by_each_of(self, tmp_path, reader):
        module = pytest.importorskip(reader)
        rows = [Coded(f"a#crop{n}", np.full((2, 3, 1), n), {"record": "a", "crop": n}) for n in range(3)]
        manifest = {"grid": [2, 3], "num_codebooks": 1, "codebook_size": 300, "dtype": "uint16"}
        store_named("parquet", "").write(tmp_path, "shard-00000", rows, manifest)
        files = str(tmp_path / "*.parquet")
        if reader == "polars":
            found = module.read_parquet(files).rows()
        elif reader == "duckdb":
            found = module.sql(f"select * from '{files}'").fetchall()
        else:
            cache = str(tmp_path / "cache")
            found = module.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
            found = [tuple(each.values()) for each in found]
        assert [(each[0], list(each[1]), *each[2:]) for each in found] == [
            (f"a#crop{n}", [n] * 6, "a", n) for n in range(3)
        ]

    def test_windows_survive(self, made, tmp_path):
        rng = np.random.default_rng(0)
        (tmp_path / "in").mkdir()
        np.save(tmp_path / "in/long.npy", rng.uniform(-1, 1, (2, 12, 20)).astype(np.float32))
        stored(made, tmp_path / "in", tmp_path / "tok", tiles=True)
        tokenize_folder(made, tmp_path / "in", tmp_path / "plain", size=(8, 8), tiles=True)
        one, other = made.load_tokens(tmp_path / "tok")["long"], made.load_tokens(tmp_path / "plain")["long"]
        for name in ("codes", "start"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert (one.extent, one.size) == (other.extent, other.size) == ((12, 20), (8, 8))
        assert TokenDataset(tmp_path / "tok").extras(1)["start"] == [0, 8]
        for name in ("tok", "plain"):
            decode_folder(made, tmp_path / name, tmp_path / f"{name}-out")
        assert contents(tmp_path / "tok-out") == contents(tmp_path / "plain-out")

    def test_what_is_wrong_is_said(self, made, tmp_path, capsys):
        stored(made, samples(tmp_path / "in", *"abcd"), tmp_path / "tok")
        stored(made, samples(tmp_path / "less", *"abcx"), tmp_path / "two")
        assert main(["tokens", "verify", str(tmp_path / "tok"), str(tmp_path / "two")]) == 2
        assert "two lacks 1 of 4 keys (d); " in capsys.readouterr().err
        victim = tmp_path / "tok/shard-00000.arrow"
        raw = bytearray(victim.read_bytes())
        raw[len(raw) // 2] ^= 1
        victim.write_bytes(raw)
        assert main(["tokens", "verify", str(tmp_path / "tok")]) == 2
        assert "tok/shard-00000.arrow is damaged: its checksum is not that of" in capsys.readouterr().err
        victim.unlink()
        assert main(["tokens", "verify", str(tmp_path / "tok")]) == 2
        assert "shard-00000.arrow is missing (1 problem)" in capsys.readouterr().err
        assert main(["tokens", "stats", "a", "b"]) == 2
        assert "takes one folder, that of the store; 2 are given" in capsys.readouterr().err
        assert main(["tokens", "verify", str(tmp_path / "in")]) == 2
        assert "there is no tokens.json in this folder" in capsys.readouterr().err

    def test_stats_by_hand(self, tmp_path, capsys):
        manifest = {"format": 1, "fingerprint": "x", "grid": [2], "size": [2], "num_codebooks": 2, "codebook_size": 4,
                    "dtype": "uint8"}  # fmt: skip
        # Position 0 of book 0 has the codes 0, 1, 2, 3; its position 1, and all of book 1, only code 1.
        rows = [Coded(str(n), np.array([[n, 1], [1, 1]])) for n in range(4)]
        shards = Shards(tmp_path / "tok", store_named("arrow", ""), {**manifest, "store": "arrow"}, 1)
        shards.write("shard-00000", rows, {"of": 4, "failed": []})
        shards.finish()
        assert main(["tokens", "stats", str(tmp_path / "tok"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        bits = 5 / 8 * np.log2(8 / 5) + 3 * 1 / 8 * 3
        assert found["usage"] == [1, 0.25]
        assert np.allclose(found["bits"], [bits, 0]) and np.allclose(found["perplexity"], [2**bits, 1])
        assert np.allclose(found["places"], [[4, 1], [1, 1]])
        assert found["most"] == [[[1, 5], [0, 1], [2, 1], [3, 1]], [[1, 8]]]
        assert found["least"] == [[[0, 1], [2, 1], [3, 1], [1, 5]], [[1, 8]]]
        assert found["never"] == [0, 3]
        assert main(["tokens", "stats", str(tmp_path / "tok")]) == 0
        said = capsys.readouterr().out
        assert "codebook 1  usage 25.0%  perplexity 1  entropy 0 bits" in said
        assert "least used  1 (8 times); 3 codes never occur" in said
        # 8 codes drawn evenly from 4 leave 4 * (3/4)^8 of them out.
        assert f"So few codes, drawn evenly, would use {1 - 0.75**8:.1%} of the codebook" in said

    def test_stats_leave_out_what_is_not_valid(self, tmp_path):
        manifest = {"format": 1, "fingerprint": "x", "grid": [2, 2], "size": [4, 4], "num_codebooks": 1,
                    "codebook_size": 4, "dtype": "uint8"}  # fmt: skip
        codes = np.array([[[1], [2]], [[3], [3]]])
        rows = [
            Coded("a", codes, {"valid": packed(np.array([[True, False], [True, False]]))}),
            Coded("b", codes),
        ]
        shards = Shards(tmp_path / "tok", store_named("arrow", ""), {**manifest, "store": "arrow"}, 1)
        shards.write("shard-00000", rows, {"of": 2, "failed": []})
        shards.finish()
        assert counting.stats(tmp_path / "tok").counts.tolist() == [[0, 2, 1, 3]]

    def test_stats_count_in_parts_and_leave_out_what_is_behind_a_text(self, tmp_path, monkeypatch):
        manifest = {"format": 1, "fingerprint": "x", "grid": [3], "size": [3], "num_codebooks": 1, "codebook_size": 9,
                    "dtype": "uint8"}  # fmt: skip
        rows = [Coded(str(n), np.array([[n], [n], [0]]), {"length": 1 + n % 2}) for n in range(1, 8)]
        shards = Shards(tmp_path / "tok", store_named("arrow", ""), {**manifest, "store": "arrow"}, 1)
        shards.write("shard-00000", rows, {"of": 7, "failed": []})
        shards.finish()
        monkeypatch.setattr(counting, "_AT_ONCE", 1)
        for most in (9 * 3, 9):  # counted at each position, and not
            monkeypatch.setattr(counting, "MOST_CODES", most)
            use = counting.stats(tmp_path / "tok")
            assert use.counts.tolist() == [[0, 2, 1, 2, 1, 2, 1, 2, 0]]
            assert (use.places is None) == (most == 9)
        monkeypatch.setattr(counting, "MOST_CODES", 8)
        with pytest.raises(DataError, match=r"the codes of 1 codebooks of 9 are not counted; the most is 8"):
            counting.stats(tmp_path / "tok")

    def test_stats_of_codes_that_cannot_be(self, tmp_path):
        manifest = {"format": 1, "fingerprint": "x", "grid": [1], "size": [3], "num_codebooks": 1, "codebook_size": 4,
                    "dtype": "uint8"}  # fmt: skip
        shards = Shards(tmp_path / "tok", store_named("arrow", ""), {**manifest, "store": "arrow"}, 1)
        shards.write("shard-00000", [Coded("a", np.array([[4]]))], {"of": 1, "failed": []})
        shards.finish()
        with pytest.raises(DataError, match=r"code 4 is not below 4; see vqcore tokens verify"):
            counting.stats(tmp_path / "tok")


def patches(seed, *shape):
    """Noise that is constant in patches of 4, so that codes differ."""
    values = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    return values.repeat(4, -1).repeat(4, -2)


class TestSheet:
    def test_windows_rows_and_files_are_found_again(self, made, tmp_path, capsys):
        pics = samples(tmp_path / "in", "b/c")
        for name, shape in (("a", (2, 2, 2)), ("long", (2, 3, 5)), ("many", (4, 2, 2, 2))):
            np.save(pics / f"{name}.npy", patches(1, *shape))
        stored(made, pics, tmp_path / "tok", tiles=True, named=str(tmp_path / "run"))
        verify = ["tokens", "verify", str(tmp_path / "tok"), "--source", str(pics)]
        assert main(verify) == 0
        said = capsys.readouterr().out
        assert "tok: 100.0% of the codes come out again from the 6 files of the sheet" in said
        assert f"{tmp_path / 'tok.png'}  (from left to right: a#0x0, long#0x0, long#0x16, " in said
        for row in open_store(tmp_path / "tok").places:
            np.save(pics / f"{row}.npy", np.load(pics / f"{row}.npy")[..., ::-1])
        assert main(verify) == 0
        assert "100.0%" not in capsys.readouterr().out
        (pics / "a.npy").unlink()
        assert main(verify) == 2
        assert (
            f"--source {pics}: has no file with the key 'a', which {tmp_path / 'tok'} has"
            in capsys.readouterr().err
        )

    def test_a_saved_view_is_honoured(self, made, tmp_path):
        raw = np.ones((2, 16, 16), np.float32)
        raw[0, :, 12:] = -1
        np.save(tmp_path / "a.npy", raw)
        view = {"start": [0.25, 0.5], "stop": [0.75, 1.0], "flip": True, "extent": [16, 16]}
        crop = torch.from_numpy(raw[:, 4:12, 8:16][..., ::-1].copy())
        base = passes.manifest_of(made, (8, 8), None)
        shards = Shards(tmp_path / "tok", store_named("arrow", ""), {**base, "store": "arrow"}, 1)
        extras = {"record": "a", "crop": 0, "view": view}
        rows = [
            Coded("a#crop0", made.encode(crop[None])[0].numpy(), extras),
            Coded("a#crop1", made.encode(crop[None])[0].numpy(), {**extras, "view": {**view, "flip": False}}),
        ]
        shards.write("shard-00000", rows, {"of": 1, "failed": []})
        shards.finish()
        found = decoded([tmp_path / "tok"], [made], [str(tmp_path / "a.npy")])
        assert found.agreement == {tmp_path / "tok": 0.5}  # nothing of the second row
        assert found.keys == ["a#crop0", "a#crop1"]

    def test_the_same_keys_of_several_stores(self, made, tmp_path, capsys):
        pics, other = samples(tmp_path / "in", *"abcdefghij"), trained(tmp_path / "other", seed=1)
        folders = [tmp_path / "one", tmp_path / "two"]
        for tokenizer, folder in zip((made, other), folders):
            stored(tokenizer, pics, folder)
        found = decoded(folders, [other, made], [])
        assert found.keys == list("acefhj") and not found.agreement
        tile, gap, margin = pictures.TILE, pictures._GAP, pictures._MARGIN
        for line, tokenizer in enumerate((made, other)):
            codes = tokenizer.load_tokens(folders[line])
            for column, key in enumerate(found.keys):
                left, top = margin + column * (tile + gap), line * (tile + gap)
                alone = pictures.picture(made.modality, tokenizer.decode(codes[key])[0])
                wanted = alone.resize((tile, tile), Image.Resampling.NEAREST)
                assert found.image.crop((left, top, left + tile, top + tile)) == wanted
        with pytest.raises(DataError, match=r"two: the tokenizer with the fingerprint .* made these codes"):
            decoded(folders, [made], [])
        with pytest.raises(ConfigError, match=r"--source is given 1 times, for 2 stores"):
            decoded(folders, [made], [str(pics)])
        assert main(["tokens", "verify", *map(str, folders), "--sheet", str(tmp_path / "x.png")]) == 2
        assert "one: its tokens.json does not name a tokenizer. Add --decode RUN" in capsys.readouterr().err
        assert main(["tokens", "stats", str(folders[0]), "--decode", "x"]) == 2
        assert "--decode belongs to vqcore tokens verify" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hundred_thousand_samples_take_no_more_memory_than_some(tmp_path):
    path = Path(__file__).resolve().parents[1] / "benchmarks/flat_memory.py"
    spec = importlib.util.spec_from_file_location("flat_memory", path)
    flat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flat)
    held = flat.measured(tmp_path, flat.trained(tmp_path), "array", 100_000)
    assert max(held) >= 18 and max(held.values()) < held[2] + 16, f"MiB by shards that are done: {held}"


@pytest.mark.slow
def test_killed_ten_times_and_started_again_it_has_the_same_bytes(made, tmp_path):
    pics = samples(tmp_path / "in", *(f"{n:03}" for n in range(150)))
    (pics / "123.npy").write_bytes(b"junk")
    killed_ten_times(tmp_path, lambda target, workers: stored(made, pics, target, workers=workers))


@pytest.mark.slow
def test_so_have_crops_of_tar_shards_for_two_tokenizers(tmp_path):
    modality = {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1], "min_crop_scale": 0.3}
    runs = [
        toys.trained(tmp_path / f"{seed}", run__steps=1, run__seed=seed, data__modality=modality)
        for seed in (0, 1)
    ]
    tokenizers = [Tokenizer.load(run) for run in runs]
    for shard in range(30):
        keys = [f"{shard:02}-{n}" for n in range(3)]
        pics = samples(tmp_path / "in", *keys)
        with tarfile.open(tmp_path / f"part-{shard:02}.tar", "w") as tar:
            for key in keys:
                tar.add(pics / f"{key}.npy", f"{key}.npy")
    broken = tmp_path / "part-17.tar"
    broken.write_bytes(broken.read_bytes().replace(b"NUMPY", b"NUMPI", 1))

    def start(target, workers):
        jobs = [
            Job(tokenizer=each, target=target / name, size=(8, 8), batch_size=size)
            for each, name, size in zip(tokenizers, ("x", "y"), (2, 3))
        ]
        tokenize_all(f"{tmp_path}/part-{{00..29}}.tar", jobs, workers=workers, crops=3)

    killed_ten_times(tmp_path, start)


def killed_ten_times(folder, start):
    """Killed by SIGKILL at random moments; each start has other threads and another share of the shards."""
    start(folder / "whole", 1)
    rng, target = np.random.default_rng(0), folder / "tok"
    forked, killed = multiprocessing.get_context("fork"), 0
    for number in range(60):
        share = {"WORLD_SIZE": "2", "RANK": str(number % 2)} if number % 3 and killed < 10 else {}
        there = len(list(target.rglob("*.arrow")))
        process = forked.Process(target=in_child, args=(start, target, number % 4, share))
        process.start()
        while process.is_alive() and killed < 10:  # after at least one more shard
            if len(list(target.rglob("*.arrow"))) > there:
                time.sleep(rng.uniform(0, 0.05))
                process.kill()
                killed += process.is_alive() or process.exitcode == -9
                break
        process.join()
        if killed == 10 and not share and process.exitcode == 0:
            break
    assert killed == 10
    assert contents(target) == contents(folder / "whole")


def in_child(start, target, workers, share):
    os.environ.update(share)
    start(target, workers)
