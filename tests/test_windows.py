"""Whole records in windows and whole pictures in tiles: in evaluation, in files of codes, and back."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from toys import run_config, run_tree, tokenizer_of, toy  # noqa: F401

from vqcore.assembly import open_data
from vqcore.cli import main
from vqcore.data.batches import EvalBatches
from vqcore.data.reader import Reader
from vqcore.data.windows import Cover, Whole, cover, files_of, windowed
from vqcore.errors import ConfigError, DataError, RunError
from vqcore.modalities.array import Array
from vqcore.modalities.mask import Mask
from vqcore.modalities.rgb import RGB
from vqcore.protocols import RecordCodes, Window
from vqcore.tokenizer import Tokenizer
from vqcore.tokens.passes import decode_folder, tokenize_folder
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
LENGTHS = {"a": 100, "b/c": 37, "d": 16, "e": 5}
MODALITY = {"name": "array", "channels": 2, "rank": 1, "range": [-1, 1]}


def record(n, channels=2, seed=0):
    rng = np.random.default_rng(seed + n)
    return np.cumsum(rng.uniform(-0.05, 0.05, (channels, n)), axis=1).astype(np.float32)


@pytest.fixture
def records(tmp_path):
    for key, n in LENGTHS.items():
        (tmp_path / "in" / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "in" / f"{key}.npy", record(n))
    return tmp_path / "in"


def config(folder, records, **changes):
    data = {"name": "folder", "path": str(records), "eval_path": str(records), "modality": MODALITY}
    data |= {"input_size": [16], "batch_size": 4, "workers": 0}
    return run_config(folder, data=data, **changes)


@pytest.fixture
def tokenizer(tmp_path, records):
    return tokenizer_of(config(tmp_path / "run", records))


def pictures(modality="rgb", **settings):
    node = {"name": modality, **settings}
    return tokenizer_of(run_config("unused", data__modality=node, data__input_size=[8, 8]))


def below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestCovering:
    @pytest.mark.parametrize(
        "n, size, stride", [(100, 16, 16), (100, 16, 7), (16, 16, 8), (5, 16, 16), (17, 16, 1)]
    )
    def test_windows_cover_everything_and_none_is_spare(self, n, size, stride):
        covering = Cover((size,), (stride,))
        parts = [covering.part(place, (n,)) for place in range(covering.counts((n,))[0])]
        seen = np.zeros(n, int)
        for (low,), (high,) in parts:
            assert low % stride == 0 and 0 < high - low <= size
            seen[low:high] += 1
        assert seen.all()
        (last,), _ = parts[-1]
        assert len(parts) == 1 or last - stride + size < n
        assert covering.starts((n,)).tolist() == [list(low) for low, _ in parts]

    def test_two_axes_and_one_that_stays_whole(self):
        tiles = Cover((4, 6), (4, 6))
        assert tiles.counts((9, 12)) == (3, 2) and tiles.part(5, (9, 12)) == ((8, 6), (9, 12))
        bands = Cover((8, 16), (None, 8))
        assert bands.counts((64, 20)) == (1, 2) and bands.part(1, (64, 20)) == ((0, 8), (64, 20))
        assert bands.whole((64, 20)) == (8, 20)

    def test_the_whole_is_the_mean_of_its_windows(self):
        x = torch.arange(10.0)[None]
        whole = Whole((10,))
        for start in (0, 4, 8):
            part = torch.full((1, 8), 99.0)
            part[:, : 10 - start] = x[:, start : start + 8] + start
            whole.add(part, (start,))
        added = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 6, 6.0])
        assert torch.equal(whole.mean, x + added)

    @pytest.mark.parametrize(
        "modality, stride, tiles, says",
        [
            (
                Array(Array.Config(channels=1), size=(16,)),
                (17,),
                False,
                "--stride 17 must lie between 1 and 16",
            ),
            (Array(Array.Config(channels=1), size=(16,)), (0,), False, "--stride 0 must lie"),
            (
                Array(Array.Config(channels=1), size=(16,)),
                None,
                True,
                "--tiles is for samples that are cropped",
            ),
            (RGB(RGB.Config(), size=16), (8,), False, r"--stride belongs to windows.*Add --tiles"),
            (
                Array(Array.Config(channels=1, sizing=("resize", "window")), size=(8, 16)),
                (8, 8),
                False,
                "--stride has 2 numbers, but samples are cut along 1 axes",
            ),
        ],
    )
    def test_what_cannot_be_covered_is_refused(self, modality, stride, tiles, says):
        with pytest.raises(ConfigError, match=says):
            cover(modality, modality.spec.size, stride, tiles=tiles)


class TestEvaluation:
    def opened(self, tmp_path, records):
        cfg = config(tmp_path / "run", records)
        modality = Array(cfg.data.modality, size=(16,))
        return cfg, modality, open_data(cfg, modality, {}, "eval")

    def test_it_goes_over_all_of_every_record_once(self, tmp_path, records):
        cfg, modality, data = self.opened(tmp_path, records)
        assert len(data) == 7 + 3 + 1 + 1
        assert [data.key(i) for i in (0, 6, 7, 11)] == ["a#0", "a#96", "b/c#0", "e#0"]
        assert list(files_of(data).values()) == ["a#0"] * 7 + ["b/c#0"] * 3 + ["d#0", "e#0"]
        seen = {key: [] for key in LENGTHS}
        for loaded in EvalBatches(data, modality, {}, cfg.data, size=(16,), batch_size=5, rank=0, world=1):
            for key, x, valid in zip(loaded.batch.keys, loaded.batch.x, loaded.batch.mask):
                seen[key.split("#")[0]].append(x[:, valid])
        for key, n in LENGTHS.items():
            assert np.allclose(np.concatenate(seen[key], axis=1), record(n), atol=1e-6)

    def test_any_number_of_processes_and_workers_sees_the_same(self, tmp_path, records):
        cfg, modality, data = self.opened(tmp_path, records)

        def read(world, workers):
            found = {}
            for rank in range(world):
                batches = EvalBatches(
                    data,
                    modality,
                    {},
                    cfg.data,
                    size=(16,),
                    batch_size=2,
                    rank=rank,
                    world=world,
                    workers=workers,
                )
                for loaded in batches:
                    found |= dict(zip(loaded.batch.keys, zip(loaded.batch.x, loaded.batch.mask)))
            return found

        alone = read(1, 0)
        for world, workers in ((3, 0), (2, 2)):
            other = read(world, workers)
            assert other.keys() == alone.keys()
            assert all(torch.equal(a, b) for key in alone for a, b in zip(alone[key], other[key]))

    def test_lengths_come_from_headers(self, tmp_path, records):
        asked = []

        class Counted(Array):
            def read(self, source, at_least=None):
                asked.append(source)
                return super().read(source)

        cfg, _, _ = self.opened(tmp_path, records)
        open_data(cfg, Counted(cfg.data.modality, size=(16,)), {}, "eval")
        assert asked == []

    def test_a_file_that_cannot_be_read_is_one_bad_sample(self, tmp_path, records):
        (records / "d.npy").write_bytes(b"no array")
        _, modality, data = self.opened(tmp_path, records)
        assert len(data) == 7 + 3 + 1 + 1
        answer = Reader(data, modality, {}).try_read(10, (16,), None)
        assert answer[0] == "d#0" and "this is no .npy file" in answer[1]

    def test_a_rider_has_the_same_fraction_of_its_record(self, tmp_path):
        fast, slow = np.arange(100.0)[None], np.arange(0.0, 100.0, 4)[None]

        class Pairs(list):
            def key(self, index):
                return str(index)

            def get(self, index, label=""):
                return slow if label else fast

        modality = Array(Array.Config(channels=1), size=(16,))
        rider = Array(Array.Config(channels=1), size=(16,))
        reader = Reader(windowed(Pairs([0]), modality, (16,)), modality, {"slow": rider})
        for index in range(6):
            sample = reader.read(index, (16,), None)
            assert float((sample.extras["slow"] - sample.x).abs().max()) < 4

    def test_a_rider_with_a_window_of_its_own_is_cut_with_the_main_sample(self):
        fast, slow = np.arange(64.0)[None], np.arange(0.0, 64.0, 2)[None]

        class Parts(list):
            def key(self, index):
                return str(index)

            def get(self, index, label=""):
                low, high = 32 * index, 32 * index + 32
                return Window(slow, (low // 2,), (high // 2,)) if label else Window(fast, (low,), (high,))

        modality, rider = (Array(Array.Config(channels=1), size=(8,)) for _ in range(2))
        data = windowed(Parts([0, 1]), modality, (8,))
        reader = Reader(data, modality, {"slow": rider})
        assert len(data) == 8
        for index in range(8):
            sample = reader.read(index, (8,), None)
            assert float((sample.extras["slow"] - sample.x).abs().max()) <= 2, index

    def test_training_draws_windows_and_a_run_resumes_bit_by_bit(self, tmp_path, records):
        modality = Array(Array.Config(channels=2), size=(16,))
        starts = set()
        for seed in range(200):
            view = modality.view((20,), (16,), np.random.default_rng(seed))
            assert round((view.stop[0] - view.start[0]) * 20) == 16
            starts.add(round(view.start[0] * 20))
        assert starts == {0, 1, 2, 3, 4}
        train(config(tmp_path / "one", records, run__steps=4, optim__horizon=4))
        train(config(tmp_path / "two", records, run__steps=2, optim__horizon=4))
        train(config(tmp_path / "two", records, run__steps=4, optim__horizon=4))
        last = "checkpoints/step_4/model.safetensors"
        assert (tmp_path / "one" / last).read_bytes() == (tmp_path / "two" / last).read_bytes()
        assert '"eval/samples": 12' in (tmp_path / "one/checkpoints/step_4/eval.json").read_text()


class TestFiles:
    @pytest.mark.parametrize("stride", [None, (8,), (5,)])
    def test_records_come_back_with_their_lengths(self, tokenizer, records, tmp_path, stride):
        done = tokenize_folder(tokenizer, records, tmp_path / "tok", size=(16,), stride=stride, batch_size=3)
        assert below(tmp_path / "tok") == [
            "a.npz",
            "b/c.npz",
            "b/tokens.json",
            "d.npz",
            "e.npz",
            "tokens.json",
        ]
        assert done.written == 4 and done.seen == 4 and done.share_lost == 0
        step = (stride or (16,))[0]
        with np.load(tmp_path / "tok/a.npz") as found:
            assert found["codes"].dtype == np.uint8 and found["extent"].tolist() == [100]
            assert found["codes"].shape == (1 + -(-84 // step), 4, 1)
            assert found["start"].tolist() == [[start] for start in range(0, 84 + step, step)]
        assert json.loads((tmp_path / "tok/tokens.json").read_text())["stride"] == [step]
        assert decode_folder(tokenizer, tmp_path / "tok", tmp_path / "out").written == 4
        for key, n in LENGTHS.items():
            x = np.load(tmp_path / "out" / f"{key}.npy")
            assert x.shape == (2, n) and np.isfinite(x).all()

    def test_codes_and_records_are_those_of_one_window_after_the_other(self, tokenizer, records, tmp_path):
        tokenize_folder(tokenizer, records, tmp_path / "tok", size=(16,))
        decode_folder(tokenizer, tmp_path / "tok", tmp_path / "out")
        codes = np.load(tmp_path / "tok/a.npz")["codes"]
        x = torch.from_numpy(record(100))[None]
        for place in range(6):
            part = x[..., 16 * place : 16 * place + 16]
            assert torch.equal(tokenizer.encode(part)[0], torch.from_numpy(codes[place]).long())
            back = tokenizer.modality.show(tokenizer.reconstruct(part)[0])
            found = np.load(tmp_path / "out/a.npy")[:, 16 * place : 16 * place + 16]
            assert np.allclose(found, back[:, : found.shape[1]], atol=1e-6)

    def test_batches_do_not_matter_and_a_pass_goes_on(self, tokenizer, records, tmp_path):
        for count in (1, 3, 64):
            tokenize_folder(tokenizer, records, tmp_path / str(count), size=(16,), batch_size=count)
        for name in ("a.npz", "b/c.npz", "d.npz", "e.npz"):
            contents = {(tmp_path / str(count) / name).read_bytes() for count in (1, 3, 64)}
            assert len(contents) == 1
        (tmp_path / "3/a.npz").unlink()
        again = tokenize_folder(tokenizer, records, tmp_path / "3", size=(16,))
        assert (again.written, again.skipped) == (1, 3)
        with pytest.raises(RunError, match=r"different: stride"):
            tokenize_folder(tokenizer, records, tmp_path / "3", size=(16,), stride=(8,), overwrite=True)

    def test_a_bad_record_costs_itself_alone(self, tokenizer, records, tmp_path):
        broken = record(100)
        broken[0, 70] = np.nan
        np.save(records / "b/c.npy", broken)
        done = tokenize_folder(tokenizer, records, tmp_path / "tok", size=(16,), batch_size=2)
        assert done.written == 3 and len(done.failed) == 1 and "b/c.npy" in done.failed[0]

    @pytest.mark.parametrize(
        "change",
        [
            {"start": np.array([[0], [16]])},
            {"start": np.arange(7)[:, None] * 16.0},
            {"extent": np.array([1000])},
            {"size": np.array([16, 16])},
        ],
    )
    def test_places_that_do_not_fit_are_damage(self, tokenizer, records, tmp_path, change):
        tokenize_folder(tokenizer, records, tmp_path / "tok", size=(16,))
        with np.load(tmp_path / "tok/a.npz") as found:
            np.savez(tmp_path / "tok/a.npz", **({**found} | change))
        done = decode_folder(tokenizer, tmp_path / "tok", tmp_path / "out")
        assert done.written == 3 and "a.npz: damaged: start, extent and size" in done.failed[0]

    def test_the_rows_of_an_array_are_samples(self, tokenizer, tmp_path):
        rows = np.stack([record(16, seed=seed) for seed in range(9)])
        np.save(tmp_path / "rows.npy", rows)
        tokenize_folder(tokenizer, tmp_path / "rows.npy", tmp_path / "tok", size=(16,), batch_size=4)
        codes = np.load(tmp_path / "tok/rows.npy")
        assert np.array_equal(codes, tokenizer.encode(torch.from_numpy(rows)).numpy())
        decode_folder(tokenizer, tmp_path / "tok", tmp_path / "out", batch_size=4)
        expected = [tokenizer.show(one) for one in tokenizer.reconstruct(torch.from_numpy(rows))]
        assert np.allclose(np.load(tmp_path / "out/rows.npy"), expected, atol=1e-6)

    def test_the_rows_may_be_longer_than_a_window(self, tokenizer, tmp_path):
        np.save(tmp_path / "rows.npy", np.stack([record(40, seed=seed) for seed in range(3)]))
        tokenize_folder(tokenizer, tmp_path / "rows.npy", tmp_path / "tok", size=(16,))
        assert np.load(tmp_path / "tok/rows.npz")["codes"].shape == (3, 3, 4, 1)
        decode_folder(tokenizer, tmp_path / "tok", tmp_path / "out")
        assert np.load(tmp_path / "out/rows.npy").shape == (3, 2, 40)

    def test_a_file_has_codes_of_one_kind(self, tokenizer, tmp_path):
        for n, suffix in ((40, ".npz"), (16, ".npy"), (40, ".npz")):
            np.save(tmp_path / "rows.npy", np.stack([record(n, seed=seed) for seed in range(3)]))
            tokenize_folder(tokenizer, tmp_path / "rows.npy", tmp_path / "tok", size=(16,), overwrite=True)
            assert below(tmp_path / "tok") == [f"rows{suffix}", "tokens.json"]
        assert len(tokenizer.load_tokens(tmp_path / "tok")["rows"]) == 3

    def test_a_bad_row_is_named(self, tokenizer, tmp_path):
        rows = np.stack([record(16, seed=seed) for seed in range(9)])
        rows[5, 1, 3] = np.inf
        np.save(tmp_path / "rows.npy", rows)
        with pytest.raises(DataError, match=r"rows\.npy: sample 5: .*inf"):
            tokenize_folder(tokenizer, tmp_path / "rows.npy", tmp_path / "tok", size=(16,))

    def test_pictures_in_an_array_too(self, tmp_path):
        tokenizer = pictures()
        rows = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
        np.save(tmp_path / "rows.npy", rows)
        tokenize_folder(tokenizer, tmp_path / "rows.npy", tmp_path / "tok", size=(8, 8))
        assert np.load(tmp_path / "tok/rows.npy").shape == (5, 2, 2, 1)
        decode_folder(tokenizer, tmp_path / "tok", tmp_path / "out")
        assert np.load(tmp_path / "out/rows.npy").shape == (5, 8, 8, 3)


class TestTiles:
    def test_they_cover_a_picture_exactly(self, tmp_path):
        tokenizer = pictures()
        rng = np.random.default_rng(0)
        levels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        (tmp_path / "in").mkdir()
        Image.fromarray(levels).save(tmp_path / "in/a.png")
        tokenize_folder(tokenizer, tmp_path / "in", tmp_path / "tok", size=(8, 8), tiles=True)
        with np.load(tmp_path / "tok/a.npz") as found:
            assert found["codes"].shape == (12, 2, 2, 1) and found["extent"].tolist() == [20, 30]
            tile = tokenizer.read(Image.fromarray(levels[8:16, 16:24]))
            at = found["start"].tolist().index([8, 16])
            assert np.array_equal(tokenizer.encode(tile)[0].numpy(), found["codes"][at])
        decode_folder(tokenizer, tmp_path / "tok", tmp_path / "out")
        with Image.open(tmp_path / "out/a.png") as back:
            assert back.size == (30, 20)

    def test_without_them_tokenize_says_what_is_left_out(self, tmp_path, capsys):
        run, pics = tmp_path / "run", tmp_path / "in"
        pics.mkdir()
        for name in "ab":
            Image.fromarray(np.arange(480, dtype=np.uint8).reshape(8, 20, 3)).save(pics / f"{name}.png")
        data = {"name": "folder", "path": str(pics), "modality": {"name": "rgb"}, "input_size": [8, 8]}
        train(run_config(run, data=data | {"batch_size": 2, "workers": 0}, run__steps=1))
        capsys.readouterr()
        assert main(["tokenize", str(run), str(pics), str(tmp_path / "tok")]) == 0
        assert (
            "left out  60% of the area: each is cropped; --tiles takes all of it" in capsys.readouterr().out
        )
        assert main(["tokenize", str(run), str(pics), str(tmp_path / "tiles"), "--tiles"]) == 0
        out = capsys.readouterr().out
        assert "left out" not in out and "tiles     6 of 8 x 8, for 2 samples" in out
        assert main(["tokenize", str(run), str(pics), str(tmp_path / "no"), "--tiles", "--stride", "9"]) == 2
        assert main(["tokenize", str(run), str(pics), str(tmp_path / "no"), "--stride", "4x"]) == 2

    def test_a_mask_of_the_modality_is_cut_as_well(self):
        modality = Mask(Mask.Config(), size=(8, 8))
        assert cover(modality, (8, 8), tiles=True) == Cover((8, 8), (8, 8))


class TestInPython:
    def test_a_record(self, tokenizer):
        codes = tokenizer.encode_record(record(100), stride=8, batch_size=4)
        assert isinstance(codes, RecordCodes) and codes.codes.shape == (12, 4, 1) and codes.extent == (100,)
        x_hat = tokenizer.decode_record(codes, batch_size=5)
        assert x_hat.shape == (1, 2, 100)
        parts = tokenizer.decode(codes.codes)
        assert torch.allclose(x_hat[0, :, 8:16], (parts[0, :, 8:16] + parts[1, :, :8]) / 2)

    def test_files_give_the_same(self, tokenizer, records, tmp_path):
        tokenize_folder(tokenizer, records, tmp_path / "tok", size=(16,))
        found = tokenizer.load_tokens(tmp_path / "tok")
        assert list(found) == ["a", "b/c", "d", "e"]
        codes = tokenizer.encode_record(records / "b/c.npy")
        assert np.array_equal(found["b/c"].codes, codes.codes) and found["b/c"].extent == codes.extent == (
            37,
        )

    def test_a_picture_is_tiles(self):
        tokenizer = pictures()
        picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
        codes = tokenizer.encode_record(picture)
        assert len(codes.codes) == 12 and tokenizer.show(tokenizer.decode_record(codes)).size == (30, 20)

    def test_reading_a_part_of_a_record_is_said_once(self, tokenizer, caplog):
        x = tokenizer.read(record(100))
        tokenizer.read(record(100))
        assert torch.equal(x[0], torch.from_numpy(record(100))[:, 42:58])
        assert caplog.text.count("a record of 100 positions is longer than the window of 16") == 1

    def test_a_saved_tokenizer_does_the_same(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path / "saved")
        again = Tokenizer.load(tmp_path / "saved")
        assert np.array_equal(
            again.encode_record(record(50)).codes, tokenizer.encode_record(record(50)).codes
        )


def test_a_window_without_a_valid_position_is_no_perfect_sample():
    """A long gap in a record must not raise its score."""
    from vqcore.evaluate.measure import _Totals
    from vqcore.metrics.pixels import MAE
    from vqcore.protocols import Batch

    node = {"name": "array", "channels": 1, "size": [4], "nodata": []}
    made = tokenizer_of(run_config("unused", data__modality=node, data__input_size=[4]))
    totals = _Totals(made, {"mae": MAE(MAE.Config(name="mae"), spec=made.spec)}, {}, {})
    mask = torch.tensor([[True] * 4, [False] * 4, [True, False, False, False]])
    totals.decode(Batch(torch.zeros(3, 1, 4), ("a", "b", "c"), mask), {"": torch.ones(3, 1, 4)})
    assert totals.decoded == 2
    assert float(totals.sums["error"] / totals.decoded) == 1.0
    whole = {
        name.partition(":")[2]: value for name, value in totals.sums.items() if name.startswith("metric/mae")
    }
    assert totals.metrics["metric/mae"].summary(whole)[""] == 1.0


@pytest.mark.parametrize("hidden", ["mask", "weight"])
def test_codes_of_cells_without_a_valid_position_do_not_count(hidden, tmp_path, records):
    """Half of each sample is a hole: the codes there are none of the codes in use, in evaluation and in training."""
    from vqcore.evaluate.measure import evaluate
    from vqcore.protocols import Batch
    from vqcore.run.state import build
    from vqcore.run.step import train_step
    from vqcore.tokenizer import cells

    data = {
        "name": "folder",
        "path": str(records),
        "eval_path": str(records),
        "input_size": [16],
        "workers": 0,
    }
    data["modality"] = {"name": "array", "channels": 2, "rank": 1, "nodata": []}
    run = build(run_config(tmp_path / "run", data=data), torch.device("cpu"))
    made = run.tokenizer.eval()
    x = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < 7).expand(6, 16)
    more = {"mask": mask} if hidden == "mask" else {"weight": mask.float()}
    batch = Batch(x, tuple("abcdef"), **more)
    found = evaluate(made, [batch], {}, size=(16,), weights=None, seed=0, step=0).metrics
    codes = made.encode(x, mask)
    grid = cells(mask, codes.shape[1:-1])
    assert 0 < grid.float().mean() < 1
    shown = codes[grid].unique(return_counts=True)[1].double()
    share = shown / shown.sum()
    assert found["codes/usage"] == len(shown) / made.codebook_size
    assert found["codes/perplexity"] == pytest.approx(float((-(share * share.log()).sum()).exp()))
    train_step(run, [batch])
    assert run.window.held == int(grid.sum())


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_evaluate_the_windows_that_one_does(tmp_path):
    """12 windows of 4 records, holes among them, on 2 ranks: the same errors, codes in use and intervals of records."""
    pytest.importorskip("vqcore_vit")
    from test_measuring import MEASURES

    (tmp_path / "in").mkdir()
    for key, n in LENGTHS.items():
        values = record(n)
        values[:, 20:70] = np.nan
        np.save(tmp_path / "in" / f"{key.replace('/', '-')}.npy", values)
    (tmp_path / "measures.py").write_text(MEASURES)
    vit = {"width": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
    data = {
        "name": "folder",
        "path": "in",
        "eval_path": "in",
        "input_size": [16],
        "batch_size": 3,
        "workers": 0,
    }
    tree = {
        **run_tree("run", run__steps=2, run__threads=1),
        "data": {**data, "modality": {**MODALITY, "nodata": []}},
        "model": {
            "encoder": {"name": "vit/encoder", **vit},
            "quantizer": {"name": "quant/vq", "codebook_size": 32, "latent_dim": 8},
            "decoder": {"name": "vit/decoder", **vit},
        },
        "eval": {"metrics": {"mae": {"name": "mae"}, "each": {"name": "local/each"}}},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    many = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    found = []
    for argv, launcher in ((["train", "run.yaml"], []), (["eval", "run"], []), (["eval", "run"], many)):
        line = [sys.executable, *launcher, "-m", "vqcore", *argv, "--plugin", "measures.py"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found += [json.loads((tmp_path / "run/eval.json").read_text())] if argv[0] == "eval" else []
    one, two = (report["results"][0] for report in found)
    assert found[0]["protocol"] == found[1]["protocol"]
    # A quantizer's loss is a mean over the valid tokens of a batch, and batches differ.
    mixed = {name for name in one["metrics"] if name == "loss" or name.startswith("loss/vq/")}
    assert len(mixed) == 2 and one["metrics"].keys() == two["metrics"].keys()
    same = {name: value for name, value in one["metrics"].items() if name not in mixed}
    assert same == pytest.approx({name: two["metrics"][name] for name in same}, rel=1e-6)
    assert one["metrics"]["samples"] == 12 and one["metrics"]["decoded"] < 12
    assert one["metrics"]["metric/each/most/low"] < one["metrics"]["metric/each/most/high"]
    assert {name: one["metrics"][name] for name in one["metrics"] if name.startswith("codes/")} == {
        name: two["metrics"][name] for name in two["metrics"] if name.startswith("codes/")
    }
