"""The baselines of an evaluation: a constant, and k-means on patches with as many bits."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import run_config, toy  # noqa: F401

from vqcore.assembly import eval_sizes
from vqcore.cli import main
from vqcore.evaluate import baseline, kmeans
from vqcore.evaluate.baseline import Constant, Source, first_crops, fitted, patch_of
from vqcore.evaluate.kmeans import KMeans, Split, cut, fit, joined, nearest, seeds, split
from vqcore.protocols import Batch, DataSpec
from vqcore.rng import generator
from vqcore.run.state import build
from vqcore.trainer import train

CPU = torch.device("cpu")


def lloyd(rows: np.ndarray, centres: np.ndarray, steps: int) -> np.ndarray:
    """The oracle: Lloyd's algorithm in NumPy, in double precision."""
    for _ in range(steps):
        codes = ((rows[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        centres = np.stack(
            [rows[codes == k].mean(0) if (codes == k).any() else centres[k] for k in range(len(centres))]
        )
    return centres


def error(rows: Tensor, centres: Tensor) -> float:
    return float(nearest(rows, centres)[1].double().mean())


class TestSplit:
    @pytest.mark.parametrize(
        ("bits", "values", "patches", "expected"),
        [
            (12.0, 192, 10**6, Split(1, 4096)),
            (math.log2(1000), 192, 10**6, Split(1, 1000)),  # 8 x 5 x 5 x 5
            (18.0, 192, 10**6, Split(2, 512)),
            (8 * math.log2(1024), 48, 10**6, Split(7, 2756)),  # 80 bits: 7 groups of 11.43
            (12.0, 192, 5000, Split(1, 500)),  # too few patches for 4096
            (40.0, 2, 10**6, Split(2, 4096)),  # no more groups than values, no more than 12 bits each
            (12.0, 192, 19, None),
        ],
    )
    def test_never_more_bits_than_a_token_has(self, bits, values, patches, expected):
        found = split(bits, values, patches)
        assert found == expected
        assert found is None or found.bits <= bits + 1e-9

    @pytest.mark.parametrize(
        ("bits", "values", "patches", "says"),
        [
            (12.0, 192, 10**6, ""),
            (80.0, 48, 10**6, ""),
            (12.0, 192, 5000, "too few patches"),
            (40.0, 2, 10**6, "too few values in a patch"),
            (40.0, 2, 5000, "too few patches"),
        ],
    )
    def test_why_there_are_fewer_bits(self, bits, values, patches, says):
        assert split(bits, values, patches).short == says

    def test_several_codebooks_count_together(self):
        q, size = 3, 16
        assert split(q * math.log2(size), 8, 10**6) == Split(1, 4096) == split(math.log2(size**q), 8, 10**6)


class TestPatches:
    @pytest.mark.parametrize(
        ("size", "patch"), [((12,), (3,)), ((6, 8), (3, 2)), ((4, 6, 4), (2, 3, 1)), ((5,), (5,))]
    )
    def test_any_rank_comes_back(self, size, patch):
        x = torch.randn(2, 3, *size)
        rows = cut(x, patch)
        grid = [n // p for n, p in zip(size, patch)]
        assert rows.shape == (2 * math.prod(grid), 3 * math.prod(patch))
        assert torch.equal(joined(rows, patch, x), x)
        first = x[0][(slice(None), *(slice(p) for p in patch))]
        assert torch.equal(rows[0], first.flatten())


class TestFit:
    def test_it_finds_the_optimum_where_it_is_known(self):
        rng = np.random.default_rng(0)
        places = 10 * np.stack(np.meshgrid(range(4), range(2)), -1).reshape(8, 2)
        rows = torch.from_numpy(np.repeat(places, 50, 0) + rng.normal(0, 0.1, (400, 2))).float()
        (centres,), steps = fit(rows, Split(1, 8), generator(0, "a"))
        assert steps == kmeans.STEPS
        best = torch.stack([rows[50 * k : 50 * k + 50].mean(0) for k in range(8)])
        distances, _ = torch.cdist(best, centres).min(1)
        assert float(distances.max()) < 1e-4

    def test_it_is_lloyd(self):
        rows = torch.randn(600, 5, generator=torch.Generator().manual_seed(1))
        mean = rows.mean(0)
        start = seeds(rows - mean, 16, generator(0, "b"))
        expected = lloyd((rows - mean).double().numpy(), start.double().numpy(), kmeans.STEPS)
        (centres,), _ = fit(rows, Split(1, 16), generator(0, "b"))
        assert np.allclose((centres - mean).numpy(), expected, atol=1e-5)

    def test_a_value_far_from_zero_loses_no_digits(self):
        rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(2))
        near, far = (
            fit(rows + shift, Split(1, 8), generator(0, "c"))[0][0] - shift for shift in (0.0, 512.0)
        )
        assert error(rows, far) == pytest.approx(error(rows, near), rel=1e-2)

    def test_good_seeds_beat_drawn_rows(self):
        rng = torch.Generator().manual_seed(3)
        rows = torch.cat([torch.randn(2000, 4, generator=rng) * 0.01, torch.randn(100, 4, generator=rng) * 5])
        drawn = rows[torch.randperm(len(rows), generator=rng)[:64]]
        assert error(rows, seeds(rows, 64, generator(0, "d"))) < 0.5 * error(rows, drawn)

    def test_groups_are_fitted_alone(self):
        rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(4))
        centres, _ = fit(rows, Split(2, 8), generator(0, "e"))
        assert [tuple(each.shape) for each in centres] == [(8, 3), (8, 3)]
        alone, _ = fit(rows[:, :3], Split(1, 8), generator(0, "e"))
        assert torch.equal(centres[0], alone[0])

    def test_equal_rows_need_fewer_centres(self):
        rows = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(50, 1)
        (centres,), _ = fit(rows, Split(1, 8), generator(0, "f"))
        assert sorted(centres.tolist()) == [[0.0, 1.0], [2.0, 3.0]]

    def test_a_centre_without_rows_moves_to_the_row_that_is_worst_off(self, monkeypatch):
        rows = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
        monkeypatch.setattr(kmeans, "seeds", lambda rows, count, rng: torch.tensor([[-4.0], [-4.0], [3.0]]))
        (centres,), _ = fit(rows, Split(1, 3), generator(0, "g"))
        assert error(rows, centres) == pytest.approx(2 * 0.05**2 / 4)

    def test_no_step_begins_when_the_time_is_over(self):
        rows = torch.randn(100, 2)
        assert fit(rows, Split(1, 4), generator(0, "h"), until=-math.inf)[1] == 0

    def test_memory_is_bounded(self, monkeypatch):
        rows, centres = torch.randn(100, 3), torch.randn(7, 3)
        whole = nearest(rows, centres)
        monkeypatch.setattr(kmeans, "_CHUNK", 20)
        for one, other in zip(whole, nearest(rows, centres)):
            assert torch.equal(one, other) or torch.allclose(one, other)


class TestPrediction:
    def test_each_patch_becomes_its_nearest_centre(self):
        centres = (torch.tensor([[0.0, 0.0], [1.0, 1.0]]),)
        x = torch.tensor([[[0.1, 0.0, 0.9, 1.2]]])
        guess = KMeans((2,), centres, torch.zeros(1))
        assert guess(Batch(x, ("a",))).tolist() == [[[0.0, 0.0, 1.0, 1.0]]]

    def test_a_masked_value_decides_nothing(self):
        centres = (torch.tensor([[0.0, 0.0], [1.0, 1.0]]),)
        mask = torch.tensor([[False, True, True, True]])
        guess = KMeans((2,), centres, torch.tensor([0.4]))
        for hidden in (-50.0, 50.0):
            x = torch.tensor([[[hidden, 0.2, 0.9, 1.2]]])
            assert guess(Batch(x, ("a",), mask)).tolist() == [[[0.0, 0.0, 1.0, 1.0]]]


# ------------------------------------------------------------------------------------------------------- on a run


def made(directory, **changes):
    return build(run_config(directory, **changes), CPU)


def fit_on(run, constant=None, **how):
    sizes = eval_sizes(run.config, run.tokenizer)
    return fitted(run.tokenizer, run.config, Source(run.data, run.extra), sizes, constant, **how)


def report(run) -> dict:
    return json.loads((run / "eval.json").read_text())


@pytest.mark.usefixtures("toy")
class TestRun:
    def test_the_crops_are_those_of_training_and_none_comes_twice(self, tmp_path):
        run = made(tmp_path / "run")
        batches = list(first_crops(run.tokenizer, run.config, Source(run.data, {}), 1000, until=math.inf))
        keys = [key for batch in batches for key in batch.keys]
        assert len(keys) == len(set(keys)) == len(run.data)  # without random crops, an epoch is all there is
        assert list(first_crops(run.tokenizer, run.config, Source(run.data, {}), 9, until=-math.inf)) == []

    def test_random_crops_go_on_over_epochs(self, tmp_path):
        crops = {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1], "min_crop_scale": 0.5}
        run = made(tmp_path / "run", data__modality=crops)
        batches = first_crops(run.tokenizer, run.config, Source(run.data, {}), 60, until=math.inf)
        assert sum(len(batch.x) for batch in batches) == 60 > len(run.data)

    def test_few_patches_make_fewer_bits_and_say_so(self, tmp_path):
        run = made(tmp_path / "run")  # 24 samples of 4 tokens, 16 codes
        found = fit_on(run)
        assert found.facts["patches"] == 96 and found.facts["bits"] == pytest.approx(math.log2(9))
        assert found.facts["of_bits"] == 4.0 and found.facts["source"] == "training"
        few = made(tmp_path / "run", data__length=4)
        assert "fewer than 20 patches" in fit_on(few).note and not fit_on(few).guesses

    def test_a_budget_is_kept_by_not_beginning(self, tmp_path):
        run = made(tmp_path / "run")
        constant = torch.zeros(2)
        assert "left out: about" in fit_on(run, constant, budget=0.0).note
        assert fit_on(run, constant, budget=1e9).guesses

    def test_several_codebooks_count_with_all_their_bits(self, tmp_path):
        levels = {
            "name": "quant/residual",
            "depth": 2,
            "quantizer": {"name": "quant/vq", "codebook_size": 4, "latent_dim": 4},
        }
        pytest.importorskip("vqcore_quant")
        run = made(tmp_path / "run", model__quantizer=levels)
        assert run.tokenizer.num_codebooks == 2
        found = fit_on(run)
        assert found.facts["of_bits"] == 4.0 and found.facts["bits"] == pytest.approx(math.log2(9))

    def test_what_has_no_patches_has_only_the_constant(self, tmp_path):
        run = made(tmp_path / "run")
        spec = run.tokenizer.spec
        assert patch_of(run.tokenizer, (8, 8)) == (4, 4)
        run.tokenizer.spec = replace(spec, kind="unit-vector")
        assert patch_of(run.tokenizer, (8, 8)) is None
        found = fit_on(run)
        assert "not for data of kind unit-vector" in found.note and found.constant is not None

    def test_a_grid_that_does_not_divide_the_size_has_only_the_constant(self, tmp_path, monkeypatch):
        run = made(tmp_path / "run")
        monkeypatch.setattr(type(run.tokenizer), "grid", lambda self, size=None: (3, 3))
        assert "3x3 does not divide samples of 8x8" in fit_on(run, torch.zeros(2)).note

    def test_eval_scores_k_means_and_keeps_it_by_its_samples(self, tmp_path, monkeypatch, capsys):
        train(run_config(tmp_path / "run"))
        run = tmp_path / "run"
        assert main(["eval", str(run)]) == 0
        first = report(run)
        scores = first["results"][0]["baselines"]
        assert list(scores) == ["constant", "k-means"] and set(scores["k-means"]) == set(scores["constant"])
        assert scores["k-means"]["error"] < scores["constant"]["error"]
        assert "8x8 k-means" in capsys.readouterr().out
        fits = []
        real = kmeans.fit
        monkeypatch.setattr(kmeans, "fit", lambda *given, **more: fits.append(1) or real(*given, **more))
        assert main(["eval", str(run)]) == 0
        assert report(run)["results"][0]["baselines"] == scores and not fits
        assert main(["eval", str(run), "eval.samples=5"]) == 0
        assert report(run)["results"][0]["baselines"] != scores and len(fits) == 1
        (run / baseline.FILE).write_text("{damaged")
        assert main(["eval", str(run)]) == 0
        assert report(run)["results"][0]["baselines"] == scores and len(fits) == 2

    def test_a_tokenizer_without_its_run_has_baselines_too(self, tmp_path, capsys):
        train(run_config(tmp_path / "run"))
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
        files = sorted(path.name for path in (tmp_path / "out").iterdir())
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")]) == 0
        assert "8x8 constant" in (said := capsys.readouterr().out) and "8x8 k-means" in said
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files

    def test_training_adds_the_constant_up_and_a_resumed_run_goes_on(self, tmp_path):
        whole = train(run_config(tmp_path / "whole", run__steps=4))
        seen = torch.stack([torch.as_tensor(whole.data.get(i)) for i in range(len(whole.data))]).float()
        assert whole.constant.samples == 16 and whole.constant.value().abs().max() <= seen.abs().max()
        train(run_config(tmp_path / "parts", run__steps=2))
        parts = train(run_config(tmp_path / "parts", run__steps=4))
        assert torch.equal(parts.constant.value(), whole.constant.value())
        last = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()][-1]
        assert last["eval/constant/error"] > 0 and "eval/k-means/error" not in last

    def test_the_end_of_training_has_k_means_if_it_costs_little(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("vqcore.trainer.SHARE", 1e9)
        train(run_config(tmp_path / "run"))
        said = capsys.readouterr().out
        assert "  k-means  psnr" in said and "step 6: evaluation  loss" in said
        held = json.loads((tmp_path / "run/checkpoints/step_6/eval.json").read_text())
        monkeypatch.setattr(kmeans, "fit", None)  # eval finds it in the folder
        assert main(["eval", str(tmp_path / "run"), "--weights", "auto"]) == 0
        theirs = report(tmp_path / "run")["results"][0]["baselines"]["k-means"]
        assert held["results"][0]["baselines"]["k-means"] == theirs

    def test_the_end_of_training_says_that_k_means_is_left_out(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("vqcore.trainer.SHARE", 0.0)
        train(run_config(tmp_path / "run"))
        assert "k-means at equal bits is left out: about" in capsys.readouterr().out


class TestConstant:
    def test_it_stops_after_enough_samples(self, monkeypatch):
        monkeypatch.setattr(baseline, "SAMPLES", 6)
        found = Constant(DataSpec(channels=1, size=(2,)))
        for value in (1.0, 3.0, 50.0):
            found.add(Batch(torch.full((3, 1, 2), value), ("a",) * 3))
        assert found.value().tolist() == [2.0] and found.samples == 6

    def test_a_sample_that_is_not_finite_and_a_weight_of_zero_do_not_count(self):
        found = Constant(DataSpec(channels=1, size=(2,)))
        found.add(Batch(torch.full((1, 1, 2), math.nan), ("a",)))
        found.add(Batch(torch.tensor([[[1.0, 9.0]]]), ("a",), weight=torch.tensor([[1.0, 0.0]])))
        assert found.value().tolist() == [1.0]

    def test_other_channels_are_refused(self):
        with pytest.raises(ValueError, match="1 sums for 2 channels"):
            Constant(DataSpec(channels=2, size=(2,))).load_state(
                Constant(DataSpec(channels=1, size=(2,))).state()
            )


def test_nearest_centres_are_found_far_from_zero():
    """fp32 has seven digits; the distances of values around 10,000 need more of them, unless the middle is removed."""
    from vqcore.evaluate.kmeans import KMeans
    from vqcore.protocols import Batch

    centres = torch.tensor([[-1.0], [0.0], [1.0]]) + 1e4
    x = (torch.tensor([-1.1, 0.1, 0.9]) + 1e4).reshape(1, 1, 3)
    found = KMeans((1,), (centres,), torch.zeros(1))(Batch(x, ("a",)))
    assert (found.flatten() - 1e4).round().tolist() == [-1, 0, 1]
