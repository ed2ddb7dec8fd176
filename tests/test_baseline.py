"""The baselines of an evaluation: a constant, and k-means on patches with as many bits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vqcore.evaluate import kmeans
from vqcore.evaluate.kmeans import KMeans, Split, cut, fit, joined, nearest, seeds, split
from vqcore.protocols import Batch
from vqcore.rng import generator


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
