"""The histogram of code usage."""

import numpy as np
import torch
from vqcore_track.usage import codebooks, uses_histogram


def test_uses_of_codes():
    counts = torch.tensor([0, 0, 1, 2, 3, 4, 7, 8, 100])
    numbers, edges = uses_histogram(counts)
    assert edges.tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert numbers.tolist() == [2, 1, 2, 2, 1, 0, 0, 1] and numbers.sum() == len(counts)
    numbers, edges = uses_histogram(torch.zeros(5, dtype=torch.int64))
    assert numbers.tolist() == [5] and edges.tolist() == [0, 1]
    assert list(codebooks([torch.zeros(4, dtype=torch.int64)])) == ["codes/uses"]
    assert list(codebooks([torch.zeros(4, dtype=torch.int64)] * 2)) == ["codes/uses_0", "codes/uses_1"]


def test_a_power_of_two_falls_into_its_own_bin():
    for most in (1, 2, 4, 8, 15, 16):
        numbers, edges = uses_histogram(torch.tensor([most]))
        (place,) = np.flatnonzero(numbers)
        assert edges[place] <= most < edges[place + 1]
