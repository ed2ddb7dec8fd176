"""Verdicts on a tokenizer: codes that say only where they are, few tokens, and whether a baseline is as good."""

import itertools
import math

import pytest
import torch

from vqcore.evaluate import collisions
from vqcore.evaluate.collisions import NAMES, Collisions

HERE, ANYWHERE = NAMES


def told(codes: torch.Tensor, size: int) -> dict[str, float]:
    """What the codes of some samples say, added in two batches."""
    counted = Collisions(size, codes.shape[-1])
    for part in codes.split(max(1, len(codes) // 2)):
        counted.add(part)
    return counted.metrics()


class TestCollisions:
    def test_the_chances_are_those_of_pairs_of_different_samples(self):
        codes = torch.randint(5, (7, 2, 3, 1), generator=torch.Generator().manual_seed(0))
        flat = codes.reshape(7, 6)
        pairs = list(itertools.permutations(range(7), 2))
        here = sum(float((flat[a] == flat[b]).float().mean()) for a, b in pairs) / len(pairs)
        anywhere = sum(float((flat[a][:, None] == flat[b]).float().mean()) for a, b in pairs) / len(pairs)
        expected = {HERE: -math.log2(here), ANYWHERE: -math.log2(anywhere)}
        assert told(codes, 5) == pytest.approx(expected, abs=1e-6)

    def test_codes_that_say_only_where_they_are(self):
        codes = torch.arange(256).reshape(1, 256, 1).expand(20, 256, 1)
        assert told(codes, 256) == pytest.approx({HERE: 0.0, ANYWHERE: 8.0}, abs=1e-6)

    def test_codes_that_know_nothing_of_their_place(self):
        codes = torch.randint(64, (200, 16, 1), generator=torch.Generator().manual_seed(1))
        assert told(codes, 64) == pytest.approx({HERE: 6.0, ANYWHERE: 6.0}, abs=0.05)

    def test_the_estimate_has_no_bias_for_few_samples(self):
        rng = torch.Generator().manual_seed(2)
        chances = [2 ** -told(torch.randint(8, (3, 64, 1), generator=rng), 8)[HERE] for _ in range(200)]
        assert sum(chances) / len(chances) == pytest.approx(1 / 8, rel=0.03)

    def test_codebooks_are_averaged(self):
        rng = torch.Generator().manual_seed(3)
        free = torch.randint(16, (300, 16, 1), generator=rng)
        fixed = torch.zeros(300, 16, 1, dtype=torch.int64)
        assert told(torch.cat([free, fixed], -1), 16)[HERE] == pytest.approx(2.0, abs=0.05)

    def test_counters_that_codes_share_change_little(self, monkeypatch):
        codes = torch.randint(40_000, (60, 16, 1), generator=torch.Generator().manual_seed(4)) // 100
        exact = told(codes, 40_000)
        monkeypatch.setattr(collisions, "CELLS", 16 * 2048)
        assert told(codes, 40_000) == pytest.approx(exact, abs=0.3)

    def test_a_long_grid_is_looked_at_in_places(self, monkeypatch):
        codes = torch.randint(4, (50, 300, 1), generator=torch.Generator().manual_seed(5))
        exact = told(codes, 4)
        monkeypatch.setattr(collisions, "POSITIONS", 100)
        assert told(codes, 4) == pytest.approx(exact, abs=0.02)

    @pytest.mark.parametrize("shape", [(1, 16, 1), (9, 1, 1)])
    def test_one_sample_or_one_position_says_nothing(self, shape):
        assert told(torch.zeros(shape, dtype=torch.int64), 4) == {}

    def test_no_equal_pair_is_a_bound(self):
        codes = torch.arange(2 * 8).reshape(2, 8, 1)
        assert told(codes, 16)[HERE] == pytest.approx(math.log2(8 * 2))
