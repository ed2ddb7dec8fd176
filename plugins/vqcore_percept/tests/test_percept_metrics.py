"""Metrics with networks: laws, closed forms, other people's numbers, bad input, whole evaluations."""

import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vqcore_percept.cmmd import gaussian
from vqcore_percept.judges import covered, cubic, frechet, interval, mmd, split, without
from vqcore_percept.nets import hub_file

from vqcore.borrowed import sha256
from vqcore.errors import ConfigError, VqcoreError
from vqcore.network import closed_unless_asked
from vqcore.protocols import DataSpec
from vqcore.testing.conformance import MetricConformance, build
from vqcore.testing.samples import check_metric

RGB = DataSpec(channels=3, size=(64, 64), range=(-1.0, 1.0), levels=255)
LARGE = DataSpec(channels=3, size=(176, 180), range=(0.0, 1.0))
TINY = {"model": "test_vit", "side": 64, "weights": "random"}
RNG = np.random.default_rng(0)


def made(name, settings, spec=RGB):
    return build("metric", f"percept/{name}", settings, spec=spec)


def ready(name, settings, spec=RGB):
    metric = made(name, settings, spec)
    metric.setup(torch.device("cpu"))
    return metric


def two(spec=RGB, n=3):
    torch.manual_seed(1)
    low, high = spec.range
    x = torch.rand(n, spec.channels, *spec.size) * (high - low) + low
    return (x + 0.1 * (high - low) * torch.randn_like(x)).clamp(low, high), x


def sets(n=60, d=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, d, generator=rng, dtype=torch.float64) for _ in range(2))
    return a @ torch.randn(d, d, generator=rng, dtype=torch.float64), b + 0.3


class TestFDDLaws(MetricConformance):
    component, spec = "percept/fdd", RGB
    configs = (TINY,)


class TestLPIPSLaws(MetricConformance):
    component, spec = "percept/lpips", RGB
    configs = ({"net": "squeeze", "weights": "random"},)


@pytest.mark.slow
class TestMSSSIMLaws(MetricConformance):
    component, spec = "percept/ms-ssim", LARGE
    configs = ({},)


@pytest.mark.slow
class TestFIDLaws(MetricConformance):
    component, spec = "percept/fid", RGB
    configs = ({"weights": "random"},)


# Distances of sets


def test_frechet_distance_of_known_sets():
    # One axis, two values each: means 0 and 5, deviations sqrt(2) and 3 sqrt(2).
    a, b = (torch.tensor([[-s], [s]], dtype=torch.float64) + m for s, m in ((1, 0), (3, 5)))
    assert frechet(a, b) == pytest.approx(25 + (math.sqrt(18) - math.sqrt(2)) ** 2)
    a, b = sets()
    assert frechet(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet(a, a + 2) == pytest.approx(4 * 5)
    assert math.isnan(frechet(a[:1], b))


@pytest.mark.parametrize("n", [60, 4])
def test_frechet_distance_is_that_of_scipy(n):
    """With more samples than features, and with fewer: a covariance that cannot be inverted."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (one.numpy()[:n] for one in sets())
    first, second = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(first @ second).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet(*map(torch.from_numpy, (a, b))) == pytest.approx(wanted, rel=1e-5)


def test_distances_are_those_of_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = sets(n=80)
    statistics = [fid.fid_features_to_statistics(one) for one in (a, b)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    kid = kid_features_to_metric(a, b, kid_subset_size=80, kid_subsets=1, verbose=False, rng_seed=0)
    (ours,) = mmd(cubic, a, b, [], unbiased=True)
    assert ours == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-9)
    prc = prc_features_to_metric(a, b, verbose=False)
    assert covered(a, b) == pytest.approx(prc["precision"], abs=1e-7)
    assert covered(b, a) == pytest.approx(prc["recall"], abs=1e-7)
    assert 0 < covered(a, b) < 1


def test_subsets_of_torch_fidelity_tend_to_the_kernel_distance():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = sets(n=80)
    drawn = kid_features_to_metric(a, b, kid_subset_size=40, kid_subsets=4000, verbose=False, rng_seed=0)
    wide = drawn["kernel_inception_distance_std"] / math.sqrt(4000)
    (ours,) = mmd(cubic, a, b, [], unbiased=True)
    assert ours == pytest.approx(drawn["kernel_inception_distance_mean"], abs=4 * wide)


def test_a_gaussian_discrepancy_in_closed_form():
    a, b = torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 1), 20.0, dtype=torch.float64)
    (found,) = mmd(gaussian, a, b, [], unbiased=False)
    assert found == pytest.approx(2 - 2 * math.exp(-2))  # exp(-20^2 / (2 * 10^2))


def test_values_without_a_part_are_those_of_the_rest():
    a, b = sets(n=43)
    parts = split(43)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]] and parts[-1].stop == 43
    for unbiased in (True, False):
        whole, *others = mmd(cubic, a, b, parts, unbiased=unbiased)
        assert [whole] == pytest.approx(mmd(cubic, a, b, [], unbiased=unbiased))
        wanted = [mmd(cubic, *without(part, a, b), [], unbiased=unbiased)[0] for part in parts]
        assert others == pytest.approx(wanted)


def test_the_interval_of_a_mean_is_that_of_its_parts():
    """For means of equal parts the jackknife is the plain standard error of the parts."""
    values = RNG.normal(size=50)
    left = [float(np.delete(values, range(5 * k, 5 * k + 5)).mean()) for k in range(10)]
    found = interval("x", [float(values.mean()), *left])
    error = values.reshape(10, 5).mean(1).std(ddof=1) / math.sqrt(10)
    assert found["x"] - found["x/low"] == pytest.approx(2.262 * error, rel=1e-6)
    assert found["x/high"] - found["x"] == pytest.approx(2.262 * error, rel=1e-6)
    assert interval("", [1.0]) == {"": 1.0}


def test_an_interval_holds_the_distance_of_many_samples():
    """Of 40 draws of 400 samples, the interval has the distance of such draws' mean about 38 times."""
    many = [sets(n=400, d=2, seed=seed) for seed in range(40)]
    b = torch.randn(2, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    pairs = [(one[1], one[1] @ b) for one in many]
    truth = float(np.mean([frechet(*pair) for pair in pairs]))
    held = 0
    for pair in pairs:
        found = interval("", [frechet(*pair), *(frechet(*without(part, *pair)) for part in split(400))])
        held += found["low"] < truth < found["high"]
    assert held >= 34


# What the networks see


def test_fdd_is_the_distance_of_what_its_model_gives(caplog):
    metric = ready("fdd", TINY)
    x_hat, x = two(n=24)
    mask = torch.ones(24, 64, 64, dtype=torch.bool)
    mask[:, :9] = False
    rows = metric.measure(x_hat, x)
    net, own = metric.judge.net, metric.judge.net.pretrained_cfg

    def features(pictures):
        levels = ((pictures.double() + 1) * 127.5).round().float()
        seen = (levels / 255 - torch.tensor(own["mean"]).reshape(3, 1, 1)) / torch.tensor(own["std"]).reshape(
            3, 1, 1
        )
        with torch.no_grad():
            return net.forward_head(net.forward_features(seen), pre_logits=True)

    assert torch.allclose(rows["true"], features(x), atol=1e-5)
    assert torch.allclose(rows["hat"], features(x_hat), atol=1e-5)
    hidden = metric.measure(torch.where(mask.unsqueeze(1), x, x_hat), x, mask)
    assert torch.equal(hidden["hat"], hidden["true"])
    found = metric.summary(rows)
    assert found[""] == pytest.approx(frechet(rows["hat"].double(), rows["true"].double()))
    assert found.keys() == {"", "low", "high", "kdd", "kdd/low", "kdd/high", "precision", "recall"}
    assert "24 samples. Below 2,048 its value depends on their number" in caplog.text
    assert metric.facts() == {"net": sha256(net.state_dict()), "convention": metric.convention}


def test_cmmd_is_the_discrepancy_of_unit_embeddings(tower):
    settings = {"model": tower["model"], "weights": "random", "pretrained": None}
    check_metric(made("cmmd", settings), RGB)
    metric = ready("cmmd", settings)
    x_hat, x = two(n=24)
    rows = metric.measure(x_hat, x)
    a, b = (rows[name].double() for name in ("hat", "true"))
    assert torch.allclose(a.norm(dim=1), torch.ones(24, dtype=torch.float64))
    kernels = [torch.exp((p @ q.T - 1) / 100) for p, q in ((a, a), (b, b), (a, b))]  # |p - q|^2 = 2 - 2 p . q
    wanted = 1000 * float(kernels[0].mean() + kernels[1].mean() - 2 * kernels[2].mean())
    found = metric.summary(rows)
    assert found[""] == pytest.approx(wanted, rel=1e-6) and found["low"] < wanted < found["high"]
    assert "32 x 32 bicubic" in metric.facts()["convention"]


@pytest.mark.slow
def test_fid_is_that_of_torch_fidelity(tmp_path, monkeypatch):
    """Its whole way from pictures to the number, with weights in a file."""
    fidelity = pytest.importorskip("torch_fidelity")
    x_hat, x = two(n=12)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with (
        closed_unless_asked(),
        pytest.raises(VqcoreError, match=r"weights-inception-2015-12-05-6726825d.pth is"),
    ):
        ready("fid", {})
    metric = ready("fid", {"weights": "random"})
    file = tmp_path / "inception.pth"
    state = metric.judge.net.state_dict()
    torch.save({name: value for name, value in state.items() if "batches_tracked" not in name}, file)
    metric = ready("fid", {"weights": str(file)})
    levels = [((one + 1) * 127.5).round().to(torch.uint8) for one in (x_hat, x)]
    theirs = fidelity.calculate_metrics(
        input1=_Pictures(levels[0]),
        input2=_Pictures(levels[1]),
        fid=True, kid=True, kid_subset_size=12, kid_subsets=1, cuda=False, verbose=False, batch_size=12,
        feature_extractor_weights_path=str(file), cache=False, save_cpu_ram=True,
    )  # fmt: skip
    ours = metric.summary(metric.measure(x_hat, x))
    assert ours[""] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, levels):
        self.levels = levels

    def __len__(self):
        return len(self.levels)

    def __getitem__(self, index):
        return self.levels[index]


def test_lpips_is_the_distance_of_the_package_on_8_bits(tmp_path):
    library = pytest.importorskip("lpips")
    x_hat, x = two()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = library.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    names = {name.partition(".")[2]: value for name, value in theirs.net.state_dict().items()}
    save_file(
        {f"features.{name}": value.clone() for name, value in names.items()}, tmp_path / "s.safetensors"
    )
    metric = ready("lpips", {"net": "squeeze", "weights": str(tmp_path / "s.safetensors")})
    a, b = (((one + 1) * 127.5).round() / 127.5 - 1 for one in (x_hat, x))
    with torch.no_grad():
        wanted = theirs(a, b).flatten()
    assert torch.allclose(metric.measure(x_hat, x)["distance"], wanted, rtol=1e-5)
    assert metric.facts()["convention"].startswith("LPIPS 0.1, squeeze, pictures of 8 bits")


def test_ms_ssim_is_a_product_of_scales():
    """Against the paper's formula, on windows inside the picture, at the last scale with mirrored borders."""
    x_hat, x = two(LARGE, n=1)
    a, b = (((one * 255).round()).double() for one in (x_hat, x))
    place = torch.arange(-5, 6, dtype=torch.float64)
    row = torch.exp(-(place**2) / (2 * 1.5**2))
    window = (row[:, None] * row / row.sum() ** 2).expand(3, 1, 11, 11)

    def mean(one):
        return torch.nn.functional.conv2d(one, window, groups=3)

    wanted = 1.0
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    c1, c2 = 2.55**2, 7.65**2
    for scale, weight in enumerate(weights):
        if scale == 4:
            a, b = (torch.nn.functional.pad(one, (5, 5, 5, 5), mode="reflect") for one in (a, b))
        ma, mb = mean(a), mean(b)
        va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        contrast = (2 * cov + c2) / (va + vb + c2)
        light = (2 * ma * mb + c1) / (ma**2 + mb**2 + c1) if scale == 4 else 1
        wanted *= max(0.0, float((contrast * light).mean())) ** weight
        a, b = (torch.nn.functional.avg_pool2d(one, 2) for one in (a, b))
    found = float(made("ms-ssim", {}, LARGE).measure(x_hat, x)["similarity"])
    assert 0.1 < found < 0.99 and found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "spec", "says"),
    [
        ("ms-ssim", {}, RGB, "needs 176 pixels along each axis; the size is 64 x 64"),
        ("ms-ssim", {}, DataSpec(channels=1, size=(256,)), "with 2 axes, the data has 1"),
        ("fdd", {**TINY, "side": 0}, RGB, "side=0 must be at least 1"),
        ("fdd", {"model": "test_vti"}, RGB, "timm has no model 'test_vti'; the nearest name is"),
        ("fdd", {**TINY, "side": 63}, RGB, r"does not take pictures of \[63, 63\]"),
        ("fdd", TINY, DataSpec(channels=1, size=(64, 64)), r"e.g. rgb: \[0, 0, 0\]"),
        ("lpips", {"net": "squeeze"}, DataSpec(channels=3, size=(64, 64), range=None), "declared range"),
        ("fid", {}, DataSpec(channels=4, size=(64, 64)), "the data has 4 channels: say which they are"),
        ("cmmd", {"model": "ViT-L-15"}, RGB, "open_clip has no model 'ViT-L-15'. Did you mean 'ViT-L-1"),
    ],
)
def test_what_does_not_fit_is_one_line(name, settings, spec, says):
    with pytest.raises(ConfigError, match=says):
        made(name, settings, spec)


def test_values_outside_the_declared_range_are_refused():
    metric = ready("lpips", {"net": "squeeze", "weights": "random"})
    x_hat, x = two()
    with pytest.raises(
        VqcoreError, match=r"values from -1 to 1, which the modality declares, but a sample has"
    ):
        metric.measure(x_hat, 2 * x)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with closed_unless_asked():
        with pytest.raises(
            VqcoreError, match=r"s/net-01.pth is missing: put https://a.org/net-01.pth there, give"
        ):
            hub_file("https://a.org/net-01.pth")
        with pytest.raises(VqcoreError, match=r"timm's test_vit \(hf://timm/test_vit.r160_in1k\) are not"):
            ready("fdd", {"model": "test_vit", "side": 64})
