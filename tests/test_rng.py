"""Random numbers as functions: permutations without lists, and seeds that depend on all of their parts."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqcore.rng import derive, generator, numpy_generator, permute, seeded


@given(st.integers(1, 300), st.integers(0, 2**60))
def test_permute_is_a_permutation(length, key):
    assert sorted(permute(index, length, key) for index in range(length)) == list(range(length))


def test_permutations_of_different_keys_spread_evenly():
    places = [permute(3, 10, derive("spread", key)) for key in range(20_000)]
    counts = np.bincount(places, minlength=10)
    assert np.abs(counts - 2000).max() < 250  # more than 5 standard deviations of a fair draw


def test_seeds_tell_words_from_numbers_and_order_from_order():
    seeds = {derive(0, "a"), derive("0", "a"), derive("a", 0), derive(0, "a", 0), derive(1, "a")}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_repeat():
    assert torch.equal(torch.rand(4, generator=generator(1, "x")), torch.rand(4, generator=generator(1, "x")))
    assert numpy_generator(1, "x").random() == numpy_generator(1, "x").random()
    assert numpy_generator(1, "x").random() != numpy_generator(1, "y").random()


def test_seeded_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(3, "inside"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(3, "inside"):
        assert torch.equal(torch.rand(2), inside)
