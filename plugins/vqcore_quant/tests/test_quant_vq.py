"""The learned codebook: training steps against NumPy, masks, dead codes, first codes, broken steps."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vqcore_quant.vq import VQ

geometries = pytest.mark.parametrize("normalize", [True, False])
policies = pytest.mark.parametrize("dead_code", ["batch_random", "linde_buzo_gray"])


def build(codebook_size=12, latent_dim=4, seed=0, **settings):
    torch.manual_seed(seed)
    return VQ(VQ.Config(codebook_size=codebook_size, latent_dim=latent_dim, **settings))


def state(quantizer):
    return {k: v.clone() for k, v in quantizer.state_dict().items()}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def oracle_step(before, rows, *, normalize, decay, eps):
    """Codes, commitment loss and the state after one step, in float64, from the papers' formulas."""
    size, codes_of = before["cluster_size"], before["embed"]
    z, c = (unit(rows), unit(codes_of)) if normalize else (rows, codes_of)
    codes = np.square(z[:, None] - c[None]).sum(-1).argmin(-1)
    counts = np.bincount(codes, minlength=len(c))
    sums = np.stack([z[codes == j].sum(0) for j in range(len(c))])
    loss = np.square(rows - codes_of[codes]).mean()
    after = {"cluster_size": decay * size + (1 - decay) * counts}
    used = counts[:, None] > 0
    if normalize:
        means = np.where(used, unit(np.where(used, sums, 1)), c)
        return codes, loss, after | {"embed": decay * codes_of + (1 - decay) * means}
    after["embed_avg"] = decay * before["embed_avg"] + (1 - decay) * sums
    total = after["cluster_size"].sum()
    smoothed = (after["cluster_size"] + eps) / (total + len(c) * eps) * total
    return codes, loss, after | {"embed": np.where(used, after["embed_avg"] / smoothed[:, None], codes_of)}


@geometries
@pytest.mark.parametrize("masked", [False, True])
def test_training_steps_against_the_formulas(normalize, masked):
    quantizer = build(normalize=normalize, decay=0.8, eps=1e-3, commitment_weight=0.5, dead_code=None)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        z = 0.5 + torch.randn(2, 5, 5, 4, generator=generator)
        mask = torch.rand(2, 5, 5, generator=generator) < 0.6 if masked else None
        rows = (z[mask] if masked else z.flatten(0, 2)).double().numpy()
        before = {k: v.double().numpy() for k, v in state(quantizer).items()}
        codes, loss, after = oracle_step(before, rows, normalize=normalize, decay=0.8, eps=1e-3)
        evaluated = copy.deepcopy(quantizer).eval()(z, mask).losses["vq/commit"]
        out = quantizer(z, mask)
        assert (out.codes[mask] if masked else out.codes).flatten().tolist() == codes.tolist()
        assert out.losses["vq/commit"] == pytest.approx(0.5 * loss, rel=1e-5)
        assert evaluated == out.losses["vq/commit"]
        for name, value in after.items():
            np.testing.assert_allclose(state(quantizer)[name].numpy(), value, rtol=1e-5, atol=1e-6)


@geometries
def test_straight_through_gradient_and_commitment_gradient(normalize):
    quantizer = build(normalize=normalize)
    z = torch.randn(2, 6, 4, requires_grad=True)
    weights = torch.randn(2, 6, 4)
    code_of = quantizer.embed.clone()
    out = quantizer(z)
    ((out.z_q * weights).sum() + out.losses["vq/commit"]).backward()
    distance = z.detach() - code_of[out.codes.squeeze(-1)]
    torch.testing.assert_close(z.grad, weights + 2 * distance / z.numel())


def test_masked_positions_get_codes_and_no_gradient_of_the_loss():
    quantizer = build()
    mask = torch.tensor([[True, False, True]])
    z = torch.randn(1, 3, 4)
    z[0, 1] = torch.nan
    z.requires_grad_()
    quantizer(z, mask).losses["vq/commit"].backward()
    assert (z.grad[0, 1] == 0).all()
    assert (z.grad[0, 0] != 0).all()


@geometries
@pytest.mark.parametrize("kmeans_init", [False, True])
def test_what_lies_behind_the_mask_does_not_matter(normalize, kmeans_init):
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    states = []
    for junk in (0.0, 1e6, torch.nan):
        quantizer = build(normalize=normalize, kmeans_init=kmeans_init)
        for seed in range(3):
            z = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(seed))
            quantizer(torch.where(mask.unsqueeze(-1), z, junk), mask)
        states.append(state(quantizer))
    for other in states[1:]:
        assert all(torch.equal(other[k], states[0][k]) for k in other)


@geometries
@pytest.mark.parametrize("kmeans_init", [False, True])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, "nothing valid"])
def test_a_broken_step_changes_nothing(normalize, kmeans_init, broken):
    quantizer = build(normalize=normalize, kmeans_init=kmeans_init)
    z = torch.randn(2, 9, 4)
    mask = torch.full((2, 9), broken != "nothing valid")
    if broken != "nothing valid":
        z[1, 4, 2] = broken
    before = state(quantizer)
    out = quantizer(z, mask)
    after = state(quantizer)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert out.codes.min() >= 0
    assert out.codes.max() < 12
    quantizer(torch.randn(2, 9, 4))
    assert quantizer.initted == 1
    assert not torch.equal(quantizer.embed, before["embed"])


@geometries
def test_kmeans_init_takes_the_first_training_batch(normalize):
    generator = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(6, 4, generator=generator)
    z = centres.repeat(40, 1) + 0.01 * torch.randn(240, 4, generator=generator)
    quantizer = build(codebook_size=24, normalize=normalize, kmeans_init=True, dead_code=None)
    assert quantizer.initted.tolist() == [0.0]
    out = quantizer(z.unsqueeze(0))
    assert quantizer.initted.tolist() == [1.0]
    rows = F.normalize(z, dim=-1) if normalize else z
    assert (torch.cdist(rows, quantizer.embed).min(1).values < 0.3).all()
    assert quantizer.cluster_size.sum() == pytest.approx(240, rel=1e-5)
    assert out.metrics["codes/usage"] > 0.5
    if not normalize:
        torch.testing.assert_close(
            quantizer.embed_avg, quantizer.embed * quantizer.cluster_size.unsqueeze(1), rtol=1e-4, atol=1e-4
        )
    embed = quantizer.embed.clone()
    quantizer(z.unsqueeze(0))
    assert (quantizer.embed - embed).abs().max() < 0.1  # the second batch starts nothing anew


def test_unused_euclidean_codes_stay_where_they_are():
    quantizer = build(codebook_size=64, normalize=False, threshold_ema_dead_code=0.0)
    before = quantizer.embed.clone()
    used = torch.zeros(64, dtype=torch.bool)
    for seed in range(30):
        z = 2 + torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(seed))
        used[quantizer(z).codes.flatten()] = True
    assert 0 < used.sum() < 64
    assert torch.equal(quantizer.embed[~used], before[~used])
    assert quantizer.embed.abs().max() <= 2 + 5


@geometries
@policies
def test_a_replaced_code_stays_for_a_while_without_latents(normalize, dead_code):
    quantizer = build(normalize=normalize, dead_code=dead_code, decay=0.9, threshold_ema_dead_code=1.0)
    quantizer.cluster_size.fill_(50)
    if not normalize:
        quantizer.embed_avg.copy_(quantizer.embed * 50)
    quantizer.cluster_size[3] = 1.0
    z = 3 * quantizer.embed[5] + 0.01 * torch.randn(1, 8, 4)  # everything near one code
    out = quantizer(z)
    assert out.metrics["codes/dead"] == pytest.approx(1 / 12)
    assert quantizer.cluster_size[3] == 2.0
    placed = quantizer.embed[3].clone()
    far = -3 * quantizer.embed[3] + 0.01 * torch.randn(1, 8, 4)
    for _ in range(math.floor(math.log(2) / -math.log(0.9))):
        out = quantizer(far)
        assert 3 not in out.codes
        assert out.metrics["codes/dead"] == 0
        assert (quantizer.embed[3] - placed).abs().max() < 1e-5
    assert quantizer(far).metrics["codes/dead"] == pytest.approx(1 / 12)


def test_a_replaced_euclidean_code_is_a_latent_at_full_scale_and_does_not_jump():
    quantizer = build(normalize=False, decay=0.9, threshold_ema_dead_code=1.0)
    quantizer.cluster_size[:6] = 50
    quantizer.embed_avg[:6] = quantizer.embed[:6] * 50
    z = 100 * torch.randn(1, 40, 4)
    quantizer(z)
    placed = quantizer.embed[6:].clone()
    assert all((code == z[0]).all(-1).any() for code in placed)
    codes = quantizer(z).codes.flatten()
    for j in range(6, 12):
        moved = (quantizer.embed[j] - placed[j - 6]).norm()
        reach = (z[0][codes == j] - placed[j - 6]).norm(dim=-1).max() if j in codes else torch.tensor(0.0)
        assert moved <= reach + 1e-2


def test_splitting_takes_living_codes_in_order_of_use_and_in_turn():
    quantizer = build(normalize=False, dead_code="linde_buzo_gray", decay=0.5, threshold_ema_dead_code=1.0)
    quantizer.cluster_size[[7, 2, 9]] = torch.tensor([40.0, 30.0, 20.0])
    quantizer.embed_avg.copy_(quantizer.embed * quantizer.cluster_size.unsqueeze(1))
    quantizer(quantizer.embed[7].expand(1, 4, 4))
    dead = [j for j in range(12) if j not in (7, 2, 9)]
    sources = quantizer.embed[[7, 2, 9]].repeat(3, 1)
    torch.testing.assert_close(quantizer.embed[dead], sources, rtol=0, atol=5e-5)
    assert not (quantizer.embed[dead] == sources).all(-1).any()


def collapsed(normalize, dead_code, decay):
    quantizer = build(codebook_size=48, latent_dim=8, normalize=normalize, dead_code=dead_code, decay=decay)
    near = torch.ones(48, 8) / math.sqrt(8) + 1e-3 * torch.randn(48, 8)
    quantizer.embed.copy_(F.normalize(near, dim=-1))
    quantizer.cluster_size[0] = 400
    if not normalize:
        quantizer.embed_avg.copy_(quantizer.embed * quantizer.cluster_size.unsqueeze(1))
    return quantizer


def clustered(step):
    centres = 3 * torch.randn(48, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(step)
    which = torch.randint(48, (1, 400), generator=generator)
    return centres[which] + 0.3 * torch.randn(1, 400, 8, generator=generator)


@geometries
@pytest.mark.parametrize(("dead_code", "decay"), [("batch_random", 0.99), ("linde_buzo_gray", 0.9)])
def test_a_collapsed_codebook_recovers(normalize, dead_code, decay):
    quantizer = collapsed(normalize, dead_code, decay)
    for step in range(48):
        quantizer(clustered(step))
    assert quantizer.eval()(clustered(1000)).metrics["codes/usage"] > 0.8
    lost = collapsed(normalize, None, decay)
    for step in range(48):
        lost(clustered(step))
    assert lost.eval()(clustered(1000)).metrics["codes/usage"] < 0.7


@policies
def test_switched_off_nothing_is_replaced(dead_code):
    off = [
        {"threshold_ema_dead_code": 0.0, "dead_code": dead_code},
        {"coef_ema_dead_code": None, "dead_code": dead_code},
        {"dead_code": None},
    ]
    states = []
    for settings in off:
        quantizer = build(codebook_size=40, **settings)
        chance = torch.get_rng_state()
        for step in range(5):
            quantizer(torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(step)))
        assert torch.equal(chance, torch.get_rng_state())
        states.append(state(quantizer))
    assert all(torch.equal(s[k], states[0][k]) for s in states for k in s)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "dead"), [(36, 0.0), (40, 0.4), (44, 0.9)])
def test_the_threshold_follows_the_valid_latents_of_the_step(masked, tokens, dead):
    quantizer = build(codebook_size=10, coef_ema_dead_code=4.0, decay=0.5)
    quantizer.cluster_size.copy_(torch.tensor([1.9, 2.1] * 5))  # half of it stays: 0.95 and 1.05
    z = quantizer.embed[0].expand(1, 80, 4)  # all to code 0
    mask = torch.arange(80).unsqueeze(0) < tokens  # thresholds 0.9, 1.0, 1.1
    out = quantizer(z, mask) if masked else quantizer(z[:, :tokens])
    assert out.metrics["codes/dead"] == pytest.approx(dead)


@geometries
def test_quantizing_again_gives_the_same_codes(normalize):
    quantizer = build(codebook_size=30, normalize=normalize)
    for seed in range(3):
        quantizer(torch.randn(1, 200, 4, generator=torch.Generator().manual_seed(seed)))
    out = quantizer.eval()(torch.randn(1, 50, 4))
    assert torch.equal(quantizer(out.z_q).codes, out.codes)


def test_the_chunk_changes_no_code():
    z = torch.randn(2, 100, 4)
    codes = [build(codebook_size=300, chunk_mib=mib).eval()(z).codes for mib in (1e-6, 0.01, 8.0)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"codebook_size": 0}, "codebook_size=0 is below 1"),
        ({"latent_dim": 0}, "latent_dim=0 is below 1"),
        ({"decay": 1.0}, "decay=1.0 is not in"),
        ({"coef_ema_dead_code": 0.0}, "coef_ema_dead_code=0.0 is not above 0"),
        ({"threshold_ema_dead_code": -1.0}, "threshold_ema_dead_code=-1.0 is below 0"),
        ({"chunk_mib": 0.0}, "chunk_mib=0.0 is not above 0"),
    ],
)
def test_bad_settings_are_refused_with_the_number(wrong, message):
    with pytest.raises(ValueError, match=message):
        VQ.Config(**({"codebook_size": 8} | wrong))


def test_state_names_are_those_of_foreign_checkpoints():
    assert set(build().state_dict()) == {"initted", "cluster_size", "embed"}
    assert set(build(normalize=False).state_dict()) == {"initted", "cluster_size", "embed", "embed_avg"}
    assert build().initted.shape == (1,)
    assert build().token_state().keys() == {"embed"}
