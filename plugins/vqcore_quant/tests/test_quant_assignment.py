"""Nearest codes, totals, draws and k-means against NumPy in float64; the bound on memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from vqcore_quant.assignment import _nearest, _totals, nearest, totals
from vqcore_quant.draws import draw_rows
from vqcore_quant.entropy import _entropies, _entropies_backward, entropies
from vqcore_quant.gradients import rotation
from vqcore_quant.kmeans import kmeans


def oracle(rows, codebook, cosine):
    z, c = rows.double().numpy(), codebook.double().numpy()
    if cosine:
        z, c = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, c))
    return np.square(z[:, None] - c[None]).sum(-1).argmin(-1)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates."""

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
        _nearest(rows, codebook, False, 0.25, 0.0)
    assert seen.numel == 2**16  # 64 rows of 1024 scores, instead of 4096
    with LargestTensor() as seen:
        _nearest(rows, codebook, False, 0.25, 0.5)
    assert seen.numel == 2**15
    with LargestTensor() as seen:
        _totals(rows, torch.randint(1024, (4096,)), 1024, None)
    assert seen.numel <= 2 * rows.numel()


def test_large_codebooks_are_searched_tile_by_tile():
    torch.manual_seed(0)
    rows, codebook = torch.randn(40, 8), torch.randn(9000, 8)
    for cosine in (True, False):
        codes = nearest(rows, codebook, cosine=cosine, chunk_mib=0.1)
        assert codes.tolist() == oracle(rows, codebook, cosine).tolist()
        assert codes.max() > 4096
    codebook[5000:] = codebook[:4000]
    assert (
        nearest(codebook[5000:], codebook, cosine=False).max() < 4000
    )  # among equal codes the first wins, across tiles too


@pytest.mark.parametrize("cosine", [True, False])
def test_drawn_codes_have_the_chances_of_a_softmax(cosine):
    torch.manual_seed(0)
    row, codebook = torch.randn(1, 3), torch.randn(5, 3)
    score = F.cosine_similarity(row, codebook) if cosine else -(row - codebook).square().sum(1)
    expected = (score / 0.7).softmax(0)
    drawn = nearest(row.expand(20_000, 3), codebook, cosine=cosine, temperature=0.7)
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    assert (share - expected).abs().max() < 4 * 0.5 / len(drawn) ** 0.5
    cold = nearest(row.expand(50, 3), codebook, cosine=cosine, temperature=1e-4)
    assert (cold == score.argmax()).all()


def test_totals_of_valid_rows():
    rows, codes = torch.randn(30, 2), torch.randint(4, (30,))
    mask = torch.arange(30) % 3 > 0
    rows[~mask] = torch.nan
    ours, expected = totals(rows, codes, 4, mask), totals(rows[mask], codes[mask], 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


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
    with pytest.raises(ValueError, match="means has 3 rows, but k=2"):
        kmeans(torch.randn(4, 2), 2, 1, cosine=False, means=torch.randn(3, 2))


def dense_entropies(queries, keys, bias, mask):
    p = (queries @ keys.T + bias).softmax(1)[mask]
    mean = p.mean(0)
    return -torch.xlogy(p, p).sum(1).mean(), -torch.xlogy(mean, mean).sum()


@pytest.mark.parametrize("chunk_mib", [1e-6, 8.0])
def test_entropies_and_their_gradients_in_chunks_are_those_of_the_whole_matrix(chunk_mib):
    generator = torch.Generator().manual_seed(0)
    shapes = (60, 4), (25, 4), (25,)
    inputs = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    mask = torch.rand(60, generator=generator) < 0.7
    ours = entropies(*inputs, mask, chunk_mib=chunk_mib)
    dense = dense_entropies(*inputs, mask)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b)
        slopes = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (a, b))
        for x, y in zip(*slopes, strict=True):
            torch.testing.assert_close(x, y)


def test_entropies_need_no_matrix_of_latents_and_codes_in_either_direction():
    queries, keys, bias = torch.randn(4096, 4), torch.randn(1024, 4), torch.zeros(1024)
    weight = torch.ones(4096)
    with LargestTensor() as seen:
        *_, share, scale = _entropies(queries, keys, bias, weight, 1.0, False)
        _entropies_backward(queries, keys, bias, weight, share, scale.expand(2), 1.0)
    assert seen.numel == 2**16  # 64 rows of 1024 scores


def test_entropies_without_rows_are_zero_with_a_zero_gradient():
    queries = torch.randn(3, 2, requires_grad=True)
    token, batch = entropies(queries, torch.randn(4, 2), torch.zeros(4), torch.zeros(3, dtype=torch.bool))
    (token + batch).backward()
    assert token == batch == 0
    assert (queries.grad == 0).all()


def test_rotation_gradient_is_that_of_the_explicit_matrix():
    generator = torch.Generator().manual_seed(0)
    z, z_q, upstream = (torch.randn(20, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    out = rotation(z, z_q)
    assert torch.equal(out, z_q)
    out.backward(upstream)
    for e, q, g, found in zip(z.detach().numpy(), z_q.numpy(), upstream.numpy(), z.grad, strict=True):
        u, v = e / np.linalg.norm(e), q / np.linalg.norm(q)
        r = (u + v) / np.linalg.norm(u + v)
        matrix = np.eye(5) - 2 * np.outer(r, r) + 2 * np.outer(v, u)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(5), atol=1e-9)
        np.testing.assert_allclose(matrix @ u, v, atol=1e-9)
        expected = np.linalg.norm(q) / np.linalg.norm(e) * matrix.T @ g
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_rotation_of_a_latent_without_direction_or_in_the_opposite_one_is_finite():
    z = torch.tensor([[0.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    rotation(z, torch.tensor([[1.0, 2.0], [2.0, 0.0]])).sum().backward()
    assert z.grad[0].tolist() == [1.0, 1.0]
    assert z.grad.isfinite().all()
