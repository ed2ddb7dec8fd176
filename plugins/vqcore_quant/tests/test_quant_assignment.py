"""Nearest codes, totals, draws and k-means against NumPy in float64, and the bound on memory."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vqcore_quant.assignment import nearest, totals
from vqcore_quant.draws import draw_rows
from vqcore_quant.kmeans import kmeans


def oracle(rows, codebook, cosine):
    z, c = rows.double().numpy(), codebook.double().numpy()
    if cosine:
        z, c = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, c))
    return np.square(z[:, None] - c[None]).sum(-1).argmin(-1)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("k", [1, 7, 64, 200])
@pytest.mark.parametrize("chunk_mib", [1e-6, 0.01, 8.0])
def test_nearest_is_the_nearest(cosine, k, chunk_mib):
    torch.manual_seed(k)
    rows, codebook = torch.randn(150, 6), torch.randn(k, 6)
    ours = nearest(rows, codebook, cosine=cosine, chunk_mib=chunk_mib)
    assert ours.tolist() == oracle(rows, codebook, cosine).tolist()


def test_far_from_the_origin_distances_stay_exact():
    torch.manual_seed(0)
    rows, codebook = 3000 + torch.randn(200, 8), 3000 + torch.randn(300, 8)
    assert nearest(rows, codebook, cosine=False).tolist() == oracle(rows, codebook, False).tolist()


@pytest.mark.parametrize("cosine", [True, False])
def test_the_first_of_equal_codes_wins(cosine):
    codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(100, 1)
    rows = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert nearest(rows, codebook, cosine=cosine).tolist() == [1, 0]


def test_no_rows_and_broken_rows():
    codebook = torch.randn(70, 3)
    assert nearest(torch.empty(0, 3), codebook, cosine=True).shape == (0,)
    for value in (torch.nan, torch.inf):
        for cosine in (True, False):
            code = nearest(torch.full((1, 3), value), codebook, cosine=cosine)
            assert 0 <= int(code) < 70


def test_memory_is_bounded_by_the_chunk_and_not_by_rows_times_codes():
    rows, codebook = torch.randn(4096, 4), torch.randn(1024, 4)
    with LargestTensor() as seen:
        nearest(rows, codebook, cosine=False, chunk_mib=0.25)
    assert seen.numel == 2**16  # 64 rows of 1024 scores, instead of 4096
    with LargestTensor() as seen:
        totals(rows, torch.randint(1024, (4096,)), 1024)
    assert seen.numel <= 2 * rows.numel()


def test_totals():
    torch.manual_seed(0)
    rows, codes = torch.randn(500, 3), torch.randint(10, (500,))
    counts, sums = totals(rows, codes, 12)
    one_hot = np.eye(12)[codes.numpy()]
    assert counts.tolist() == one_hot.sum(0).tolist()
    np.testing.assert_allclose(sums.numpy(), one_hot.T @ rows.double().numpy(), rtol=1e-6, atol=1e-6)
    assert torch.equal(totals(rows.flip(0), codes.flip(0), 12)[1], sums)


@pytest.mark.parametrize("count", [5, 20, 47])
def test_draws_take_rows_equally_often(count):
    rows = torch.arange(20.0).unsqueeze(1)
    drawn = draw_rows(rows, count, torch.Generator().manual_seed(1))
    times = torch.bincount(drawn.flatten().long(), minlength=20)
    assert times.max() - times.min() <= 1
    assert times.sum() == count
    assert torch.equal(drawn, draw_rows(rows, count, torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, draw_rows(rows, count, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("cosine", [True, False])
def test_kmeans_finds_the_clusters_and_improves(cosine):
    generator = torch.Generator().manual_seed(3)
    centres = 5 * torch.randn(8, 16, generator=generator)
    rows = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(400, 16, generator=generator)
    means, counts = kmeans(rows, 8, 10, cosine=cosine, means=rows[::50].clone(), chunk_mib=0.01)
    assert counts.tolist() == [50.0] * 8
    target = rows / rows.norm(dim=-1, keepdim=True) if cosine else rows
    expected = target.unflatten(0, (8, 50)).mean(1)
    expected = expected / expected.norm(dim=-1, keepdim=True) if cosine else expected
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-5)

    def error(iters):
        fitted, _ = kmeans(rows, 6, iters, cosine=cosine, generator=torch.Generator().manual_seed(0))
        return torch.cdist(target, fitted).min(1).values.square().mean()

    assert error(10) < error(1)


def test_kmeans_keeps_the_mean_of_an_empty_cluster():
    rows = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    means, counts = kmeans(rows, 2, 2, cosine=True, means=torch.tensor([[0.0, 9.0], [9.0, 0.0]]))
    assert means.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    first = torch.tensor([[0.0, 0.0], [90.0, 90.0]])
    means, counts = kmeans(rows, 2, 3, cosine=False, means=first)
    assert means.tolist() == [[0.0, 2.0], [90.0, 90.0]]
    assert counts.tolist() == [2.0, 0.0]


def test_kmeans_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="iters=0"):
        kmeans(torch.randn(4, 2), 2, 0, cosine=False)
    with pytest.raises(ValueError, match="3 first means for k=2"):
        kmeans(torch.randn(4, 2), 2, 1, cosine=False, means=torch.randn(3, 2))
