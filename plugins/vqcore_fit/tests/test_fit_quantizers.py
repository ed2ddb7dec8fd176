"""What the quantizers find, beside closed forms, scikit-learn, SciPy and a byte-pair encoding of ten lines."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.preprocessing import KBinsDiscretizer
from vqcore_fit.fitted import Sample

from vqcore.errors import DataError, VqcoreError
from vqcore.protocols import DataSpec
from vqcore.rng import generator
from vqcore.testing.conformance import build


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(name, rows, **settings):
    """A quantizer of this plugin that is fitted to rows, in three batches."""
    made = build("quantizer", f"fit/{name}", {"latent_dim": rows.shape[1], **settings}).eval()
    facts = made.fit([(part.unsqueeze(1), None) for part in rows.chunk(3)], generator(0, "test"))
    return made, facts


def coded(quantizer, rows):
    """Codes and latents of rows."""
    out = quantizer(rows.unsqueeze(1))
    return out.codes.squeeze(1), out.z_q.squeeze(1)


# Scalars


def test_uniform_intervals_have_one_width_and_an_error_of_half_a_width_at_most():
    rows = noise(1000, 2) * torch.tensor([1.0, 100.0]) + 7
    made, _ = fitted("scalar", rows, codebook_size=32, method="uniform")
    codes, z_q = coded(made, rows)
    step = (rows.amax(0) - rows.amin(0)) / 32
    assert ((rows - z_q).abs() <= step / 2 * (1 + 1e-5)).all()
    theirs = KBinsDiscretizer(32, encode="ordinal", strategy="uniform").fit_transform(rows.double().numpy())
    assert (codes.numpy() == theirs).mean() > 0.999  # of two ways to round an edge
    assert codes.amin() == 0 and codes.amax() == 31


def test_quantiles_have_equal_counts_and_their_means():
    rows = noise(1037, 1).exp()
    made, _ = fitted("scalar", rows, codebook_size=16)
    codes, z_q = coded(made, rows)
    counts = torch.bincount(codes[:, 0], minlength=16)
    assert counts.max() - counts.min() <= 1
    for code in range(16):
        members = rows[codes == code]
        torch.testing.assert_close(z_q[codes == code], members.mean().expand(len(members)))


def test_few_different_values_survive_quantiles_exactly():
    rows = torch.randint(5, (400, 1), generator=torch.Generator().manual_seed(1)).float() ** 3
    made, _ = fitted("scalar", rows, codebook_size=256)
    assert torch.equal(coded(made, rows)[1], rows)


def test_logarithmic_intervals_bound_the_relative_error():
    rows = noise(500, 1).mul(4).exp()
    made, _ = fitted("scalar", rows, codebook_size=64, method="log")
    _, z_q = coded(made, rows)
    ratio = (rows.max() / rows.min()) ** (1 / 64)
    assert ((z_q / rows - 1).abs() <= ratio.sqrt() - 1 + 1e-4).all()


def test_columns_have_methods_of_their_own_and_values_beyond_the_range_are_counted():
    rows = noise(300, 3).exp()
    made, facts = fitted("scalar", rows, codebook_size=8, method=["log", "uniform", "log"])
    alone, _ = fitted("scalar", rows[:, 1:2], codebook_size=8, method="uniform")
    assert facts["columns"] == "2 log, 1 uniform"
    assert torch.equal(coded(made, rows)[0][:, 1:2], coded(alone, rows[:, 1:2])[0])
    beyond = rows.clone()
    beyond[:100, 0], beyond[:50, 2] = 1e6, -1e6
    out = made(beyond.unsqueeze(1))
    assert float(out.metrics["codes/outside"]) == pytest.approx(150 / 900)
    assert out.codes[0, 0, 0] == 7 and out.codes[0, 0, 2] == 0


# K-means


def test_kmeans_finds_clusters_and_is_as_good_as_scikit_learn():
    middles = 10 * noise(8, 4, seed=1)
    rows = (middles + 0.1 * noise(200, 8, 4)).flatten(0, 1)
    made, _ = fitted("kmeans", rows, codebook_size=8)
    codes, z_q = coded(made, rows)
    assert torch.cdist(made.centres[0], middles).amin(1).max() < 0.1
    theirs = SklearnKMeans(8, n_init=10, random_state=0).fit(rows.numpy())
    assert float((rows - z_q).square().sum()) <= 1.001 * theirs.inertia_
    assert torch.equal(codes[:, 0], torch.cdist(rows, made.centres[0]).argmin(1))


def test_parts_of_a_latent_have_their_own_centres():
    rows = noise(300, 6)
    both, _ = fitted("kmeans", rows, codebook_size=4, num_codebooks=2)
    codes, z_q = coded(both, rows)
    for part, own in enumerate(rows.chunk(2, 1)):
        nearest = torch.cdist(own, both.centres[part]).argmin(1)
        assert torch.equal(codes[:, part], nearest)
        assert torch.equal(z_q.chunk(2, 1)[part], both.centres[part][nearest])


# Cosine transform and byte-pair codes


@pytest.mark.parametrize(("size", "patch"), [((24,), (8,)), ((8, 12), (4, 3)), ((4, 4, 4), (2, 4, 2))])
def test_the_transform_is_that_of_scipy_keeps_energy_and_comes_back(size, patch):
    spec = DataSpec(channels=2, size=size)
    encoder = build("encoder", "fit/dct", {"patch_size": list(patch)}, spec=spec)
    decoder = build("decoder", "fit/dct", {"patch_size": list(patch)}, dim=encoder.dim, spec=spec)
    x = noise(3, 2, *size)
    z = encoder(x)
    torch.testing.assert_close(decoder(z), x)
    torch.testing.assert_close(z.square().sum(), x.square().sum())
    first = x[(0, slice(None), *(slice(side) for side in patch))]
    wanted = dctn(first.numpy(), axes=range(1, 1 + len(patch)), norm="ortho").reshape(2, -1)
    found = z[(0, *[0] * len(patch))].view(-1, 2).T
    torch.testing.assert_close(found[:, encoder.order.argsort()], torch.from_numpy(wanted))
    assert encoder.order[0] == 0
    if len(size) == 1:
        assert torch.equal(encoder.order, torch.arange(patch[0]))


def test_patches_are_the_values_and_come_back():
    spec = DataSpec(channels=2, size=(4, 6))
    encoder = build("encoder", "fit/patches", {"patch_size": [2, 3]}, spec=spec)
    decoder = build("decoder", "fit/patches", {"patch_size": [2, 3]}, dim=12, spec=spec)
    x = noise(2, 2, 4, 6)
    z = encoder(x)
    assert torch.equal(z[1, 1, 0], x[1, :, 2:, :3].flatten())
    assert torch.equal(decoder(z), x)


SIGNALS = noise(600, 12) * torch.linspace(3, 0.1, 12)  # coefficients of a smooth signal


def test_byte_pairs_lose_nothing_of_the_rounded_numbers_and_are_shorter():
    made, facts = fitted("fast", SIGNALS, num_codebooks=12, codebook_size=256, scale=2.0)
    more = torch.cat([SIGNALS, noise(50, 12, seed=5)])
    codes, z_q = coded(made, more)
    assert torch.equal(z_q, (more * 2).round() / 2)
    assert (codes > 0).sum(1).float().mean() < 9
    assert torch.equal(made.decode(codes.unsqueeze(1)).squeeze(1), z_q)
    assert facts["numbers"] == f"{int((SIGNALS.min() * 2).round())} to {int((SIGNALS.max() * 2).round())}"


def test_the_pairs_are_those_of_plain_byte_pair_encoding():
    made, _ = fitted("fast", SIGNALS, num_codebooks=12, codebook_size=60, scale=1.0)
    low = int(made.span[0])
    words = [(row - low + 1).tolist() for row in SIGNALS.round().long()]
    for left, right in made.pairs[made.pairs[:, 0] >= 0].tolist():
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        assert counts[left, right] == max(
            counts.values()
        )  # as frequent as any: ties may be broken in any way
        new = max(max(word) for word in words) + 1
        new = max(new, int(made.span[1]) - low + 2)
        words = [joined(word, left, right, new) for word in words]
    codes, _ = coded(made, SIGNALS)
    assert [row[row > 0].tolist() for row in codes] == words


def joined(word, left, right, new):
    out = []
    for symbol in word:
        if out and symbol == right and out[-1] == left:
            out[-1] = new
        else:
            out.append(symbol)
    return out


def test_a_long_sequence_loses_its_end_and_the_code_0_says_nothing():
    made, facts = fitted("fast", SIGNALS, num_codebooks=4, codebook_size=256, scale=2.0)
    codes, z_q = coded(made, SIGNALS)
    whole = (SIGNALS * 2).round() / 2
    cut = (z_q != whole).any(1)
    assert 0 < cut.float().mean() < 1
    for found, wanted in zip(z_q[cut], whole[cut]):
        kept = int((found != wanted).nonzero()[0])
        assert torch.equal(found[:kept], wanted[:kept]) and not found[kept:].any()
    apart = torch.zeros(1, 1, 4, dtype=torch.int64)
    apart[..., 1], apart[..., 3] = codes[0, 0], codes[0, 1]
    together = apart.clone()
    together[..., 0:2], together[..., 2:] = codes[0, :2], 0
    assert torch.equal(made.decode(apart), made.decode(together))
    assert facts["codes"].endswith("of the positions are cut")


def test_any_codes_decode_to_a_latent_of_the_right_width():
    made, _ = fitted("fast", SIGNALS, num_codebooks=12, codebook_size=256, scale=2.0)
    codes = torch.randint(256, (40, 1, 12), generator=torch.Generator().manual_seed(0))
    assert made.decode(codes).shape == (40, 1, 12)


# Samples of bounded size


def test_a_sample_is_fair_and_knows_the_extremes_of_all_rows():
    sample = Sample(1000, generator(0, "test"))
    rows = torch.arange(20_000.0).unsqueeze(1)
    for part in rows.split(700):
        sample.add(part)
        assert sum(map(len, sample._rows)) <= 2 * 1000 + 700
    kept = sample.rows()
    assert len(kept) == 1000 and sample.count == 20_000
    assert (sample.low, sample.high) == (0, 19_999)
    assert kept.mean() == pytest.approx(10_000, rel=0.06)  # five deviations of a fair mean
    assert len(kept.unique()) == 1000


# Bad input

POSITIVE = noise(100, 3).exp()
BAD = {
    "constant": ("scalar", torch.cat([POSITIVE, torch.full((100, 1), 3.5)], 1), {"codebook_size": 8},
                 r"column 3 \(from 0\): all 100 values are the same, 3.5"),
    "log": ("scalar", POSITIVE - 1, {"codebook_size": 8, "method": "log"}, r"column 0 .*for values above 0"),
    "few": ("scalar", POSITIVE, {"codebook_size": 101}, "codebook_size=101, but the training samples have only 100"),
    "nan": ("scalar", POSITIVE.clone().index_fill_(0, torch.tensor([4]), torch.nan), {"codebook_size": 8},
            "1 of 34 values of column 0 are NaN or infinite"),
    "few patches": ("kmeans", POSITIVE, {"codebook_size": 128}, "codebook_size=128, but the training samples"),
    "equal patches": ("kmeans", POSITIVE[:2].repeat(50, 1), {"codebook_size": 8}, "only 2 different latents"),
    "numbers": ("fast", POSITIVE, {"codebook_size": 16, "num_codebooks": 3, "scale": 100.0},
                "more than codebook_size=16 codes can name. Take scale="),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_latents_that_cannot_be_fitted_are_one_line(case):
    name, rows, settings, text = BAD[case]
    with pytest.raises(DataError, match=text) as raised:
        fitted(name, rows, **settings)
    assert "\n" not in str(raised.value)


def test_the_proposed_scale_fits():
    with pytest.raises(DataError) as raised:
        fitted("fast", POSITIVE, codebook_size=16, num_codebooks=3, scale=100.0)
    scale = float(str(raised.value).partition("Take scale=")[2].split(",")[0])
    fitted("fast", POSITIVE, codebook_size=16, num_codebooks=3, scale=scale)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        (
            "scalar",
            {"latent_dim": 3, "method": ["log", "log"]},
            "method has 2 entries for latent_dim=3 columns",
        ),
        ("scalar", {"latent_dim": 3, "codebook_size": 1}, "1 must be at least 2"),
        ("scalar", {"latent_dim": 3, "method": "quantiles"}, "quantile"),
        ("kmeans", {"latent_dim": 5, "num_codebooks": 2}, "latent_dim=5 cannot be cut into num_codebooks=2"),
        ("fast", {"latent_dim": 5, "num_codebooks": 2, "scale": 0}, "must be above 0"),
    ],
)
def test_settings_that_contradict_are_refused(name, settings, text):
    with pytest.raises(VqcoreError, match=text):
        build("quantizer", f"fit/{name}", settings)


def test_codes_of_the_wrong_number_are_refused():
    made, _ = fitted("kmeans", noise(100, 2), codebook_size=4)
    with pytest.raises(ValueError, match="a position has 1 codes, not 2"):
        made.decode(torch.zeros(1, 3, 2, dtype=torch.int64))


def test_a_saved_state_has_the_same_codes():
    for name, settings in {"scalar": {}, "kmeans": {}, "fast": {"num_codebooks": 12, "scale": 2.0}}.items():
        made, _ = fitted(name, SIGNALS, codebook_size=64, **settings)
        other = build("quantizer", f"fit/{name}", {"latent_dim": 12, "codebook_size": 64, **settings}).eval()
        other.load_state_dict(made.state_dict())
        assert np.array_equal(coded(other, SIGNALS)[0], coded(made, SIGNALS)[0])
