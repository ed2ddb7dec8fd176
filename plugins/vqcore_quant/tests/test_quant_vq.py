"""The learned codebook: training steps against NumPy, masks, dead codes, initialisation, invalid latents."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vqcore_quant.assignment import nearest
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
    assert (quantizer.embed - embed).abs().max() < 0.1  # the second batch does not initialise the codes again


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
    z = 3 * quantizer.embed[5] + 0.01 * torch.randn(1, 8, 4)  # all latents are near one code
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
    quantizer.cluster_size.copy_(torch.tensor([1.9, 2.1] * 5))  # the decay halves the sizes: 0.95 and 1.05
    z = quantizer.embed[0].expand(1, 80, 4)  # all latents go to code 0
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
        ({"codebook_size": 0}, "codebook_size=0 must be at least 1"),
        ({"latent_dim": 0}, "latent_dim=0 must be at least 1"),
        ({"decay": 1.0}, "decay=1.0 is not in"),
        ({"coef_ema_dead_code": 0.0}, "coef_ema_dead_code=0.0 must be above 0"),
        ({"threshold_ema_dead_code": -1.0}, "threshold_ema_dead_code=-1.0 must be at least 0"),
        ({"chunk_mib": 0.0}, "chunk_mib=0.0 must be above 0"),
        ({"codebook_size": 2**31 + 1}, "codebook_size=2147483649 is more than 2147483648"),
        ({"num_codebooks": 0}, "num_codebooks=0 must be at least 1"),
        ({"code_dim": 0}, "code_dim=0 must be at least 1"),
        (
            {"latent_dim": 10, "num_codebooks": 4},
            "latent_dim=10 is not divisible by num_codebooks=4",
        ),
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"orthogonal_weight": -1.0}, "orthogonal_weight=-1.0 must be at least 0"),
        ({"entropy_weight": math.nan}, "entropy_weight=nan must be at least 0"),
        ({"entropy_temperature": 0.0}, "entropy_temperature=0.0 must be above 0"),
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


@geometries
def test_learned_codes_get_the_gradient_of_the_codebook_loss_and_latents_that_of_the_commitment(normalize):
    quantizer = build(normalize=normalize, codebook="learned", commitment_weight=0.25, dead_code=None)
    z = torch.randn(3, 5, 4, requires_grad=True)
    before = quantizer.embed.detach().clone()
    out = quantizer(z)
    assert torch.equal(quantizer.embed, before)  # only the optimizer changes the codes
    commit, codebook = (out.losses[name].item() for name in ("vq/commit", "vq/codebook"))
    assert commit == pytest.approx(0.25 * codebook, rel=1e-6)
    (out.losses["vq/commit"] + out.losses["vq/codebook"]).backward()
    rows, codes, c = z.detach().flatten(0, 1).numpy(), out.codes.flatten().numpy(), before.numpy()
    apart = rows - c[codes]
    expected = np.zeros_like(c)
    np.add.at(expected, codes, -2 * apart / rows.size)
    np.testing.assert_allclose(quantizer.embed.grad.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(z.grad.flatten(0, 1).numpy(), 0.25 * 2 * apart / rows.size, atol=1e-6)
    assert codebook == pytest.approx(np.square(apart).mean(), rel=1e-5)


@geometries
def test_a_learned_codebook_learns_revives_dead_codes_and_can_start_from_kmeans(normalize):
    quantizer = build(
        codebook_size=48,
        latent_dim=8,
        normalize=normalize,
        norm_latents=normalize,
        codebook="learned",
        decay=0.9,
    )
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    first = None
    for step in range(60):
        out = quantizer(clustered(step))
        first = out.metrics["codes/distance"] if first is None else first
        optimizer.zero_grad()
        out.losses["vq/codebook"].backward()
        optimizer.step()
    after = quantizer.eval()(clustered(1000))
    assert after.metrics["codes/distance"] < 0.6 * first
    assert after.metrics["codes/usage"] > 0.8
    started = build(codebook_size=48, latent_dim=8, normalize=normalize, codebook="learned", kmeans_init=True)
    assert started(clustered(0)).metrics["codes/distance"] > 0
    assert started.initted == 1
    assert isinstance(started.embed, torch.nn.Parameter)


def test_what_is_a_parameter():
    assert dict(build().named_parameters()) == {}
    assert set(dict(build(codebook="learned").named_parameters())) == {"embed"}
    assert set(dict(build(orthogonal_weight=0.1).named_parameters())) == {"embed"}
    assert dict(build(codebook="learned", freeze=True).named_parameters()) == {}
    assert set(build(codebook="learned", normalize=False).state_dict()) == {
        "initted",
        "cluster_size",
        "embed",
    }


@pytest.mark.parametrize(
    "settings", [{}, {"normalize": False}, {"codebook": "learned"}, {"kmeans_init": True}]
)
def test_frozen_codes_stay_while_projections_learn(settings):
    quantizer = build(freeze=True, code_dim=3, **settings)
    before = state(quantizer)
    out = quantizer(torch.randn(2, 9, 4))
    (out.z_q.sum() + sum(out.losses.values())).backward()
    assert all(torch.equal(before[k], v) for k, v in state(quantizer).items())
    assert (quantizer.project_in.weight.grad != 0).any()
    assert (quantizer.project_out.weight.grad != 0).any()


@geometries
def test_a_code_space_of_its_own_width(normalize):
    quantizer = build(latent_dim=6, code_dim=2, normalize=normalize)
    z = torch.randn(2, 7, 6)
    low = quantizer.project_in(z)
    expected = nearest(low.flatten(0, 1), quantizer.embed, cosine=normalize)
    out = quantizer.eval()(z)
    assert torch.equal(out.codes.flatten(), expected)
    assert torch.equal(out.z_q, quantizer.project_out(quantizer.embed[out.codes.squeeze(-1)]))
    assert torch.equal(quantizer.decode(out.codes), out.z_q)
    names = {"embed", "project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias"}
    assert quantizer.token_state().keys() == names


@geometries
@pytest.mark.parametrize("kmeans_init", [False, True])
def test_separate_codebooks_are_as_many_quantizers_of_their_channels(normalize, kmeans_init):
    settings = {"normalize": normalize, "kmeans_init": kmeans_init, "decay": 0.9, "dead_code": None}
    both = build(latent_dim=8, num_codebooks=2, shared_codebook=False, **settings)
    alone = [build(latent_dim=4, **settings) for _ in range(2)]
    for i in range(2):
        alone[i].embed.copy_(both.embed[i])
    for seed in range(3):
        z = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(seed))
        mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(seed)) < 0.8
        if kmeans_init and seed == 0:
            torch.manual_seed(3)
        out = both(z, mask)
        if kmeans_init and seed == 0:
            torch.manual_seed(3)
        each = [quantizer(part, mask) for quantizer, part in zip(alone, z.split(4, dim=-1), strict=True)]
        assert torch.equal(out.codes, torch.cat([e.codes for e in each], -1))
        assert torch.equal(out.z_q, torch.cat([e.z_q for e in each], -1))
        for name in out.metrics:
            if name not in ("codes/nonfinite", "latents/rms"):
                assert out.metrics[name] == pytest.approx(
                    float(sum(e.metrics[name] for e in each)) / 2, rel=1e-5
                )
    for name in ("embed", "cluster_size"):
        assert torch.equal(both.state_dict()[name], torch.stack([q.state_dict()[name] for q in alone]))
    assert torch.equal(both.eval().decode(out.codes), both.embed[torch.arange(2), out.codes].flatten(-2))


@geometries
@policies
def test_a_shared_codebook_is_one_quantizer_of_all_parts(normalize, dead_code):
    settings = {"normalize": normalize, "dead_code": dead_code, "decay": 0.9, "coef_ema_dead_code": 2.0}
    both, one = build(latent_dim=8, num_codebooks=2, **settings), build(latent_dim=4, **settings)
    for seed in range(3):
        z = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        out = both(z)
        torch.manual_seed(seed)
        each = one(z.reshape(2, 40, 4))
        assert torch.equal(out.codes, each.codes.reshape(2, 20, 2))
        assert torch.equal(out.z_q, each.z_q.reshape(2, 20, 8))
        assert torch.equal(out.losses["vq/commit"], each.losses["vq/commit"])
    assert all(torch.equal(both.state_dict()[k], v) for k, v in one.state_dict().items())
    assert both.bits_per_token == 2 * one.bits_per_token == 2 * math.log2(12)


def test_drawn_codes_in_training_and_nearest_in_evaluation():
    quantizer = build(codebook_size=12, temperature=1.0, dead_code=None)
    z = torch.randn(1, 400, 4)
    nearest_codes = copy.deepcopy(quantizer).eval()(z).codes
    torch.manual_seed(1)
    drawn = copy.deepcopy(quantizer)(z).codes
    torch.manual_seed(1)
    assert torch.equal(copy.deepcopy(quantizer)(z).codes, drawn)
    assert 0.3 < (drawn != nearest_codes).float().mean() < 0.99
    assert torch.equal(quantizer.eval()(z).codes, nearest_codes)


def test_the_rotation_trick_reaches_the_latents_through_the_quantizer():
    quantizer = build(gradient="rotation", commitment_weight=0.0)
    z = torch.randn(2, 6, 4, requires_grad=True)
    upstream = torch.randn(2, 6, 4)
    code_of = quantizer.embed.clone()
    out = quantizer(z)
    out.z_q.backward(upstream)
    assert torch.equal(out.z_q, code_of[out.codes.squeeze(-1)])
    scale = out.z_q.detach().norm(dim=-1) / z.detach().norm(dim=-1)
    torch.testing.assert_close(z.grad.norm(dim=-1), scale * upstream.norm(dim=-1))
    assert not torch.allclose(z.grad, upstream, atol=0.1)


def test_orthogonal_penalty_against_all_pairs():
    quantizer = build(codebook_size=30, orthogonal_weight=2.0, codebook="learned", dead_code=None)
    loss = quantizer(torch.randn(1, 9, 4)).losses["vq/orthogonal"].detach()
    c = unit(quantizer.embed.detach().double().numpy())
    assert float(loss) == pytest.approx(2 * np.square(c @ c.T - np.eye(30)).mean(), rel=1e-5)


@geometries
def test_entropy_penalty_against_the_whole_matrix(normalize):
    settings = {"entropy_gamma": 0.5, "entropy_temperature": 0.3, "entropy_weight": 2.0}
    quantizer = build(normalize=normalize, codebook="learned", dead_code=None, **settings)
    z, mask = torch.randn(2, 9, 4), torch.rand(2, 9) < 0.7
    out = quantizer(z.requires_grad_(), mask)
    c, rows = quantizer.embed.detach().double().numpy(), z.detach()[mask].double().numpy()
    rows, c = (unit(rows), unit(c)) if normalize else (rows, c)
    score = rows @ c.T if normalize else -np.square(rows[:, None] - c).sum(-1)
    p = np.exp(score / 0.3)
    p /= p.sum(1, keepdims=True)
    token, batch = -(p * np.log(p)).sum(1).mean(), -(p.mean(0) * np.log(p.mean(0))).sum()
    assert out.losses["vq/entropy"].item() == pytest.approx(2 * (token - 0.5 * batch), rel=1e-4)
    assert out.metrics["entropy/token"] == pytest.approx(token / math.log(2), rel=1e-4)
    assert out.metrics["entropy/codebook"] == pytest.approx(batch / math.log(2), rel=1e-4)
    out.losses["vq/entropy"].backward()
    assert (z.grad[mask] != 0).any(-1).all()
    assert (z.grad[~mask] == 0).all()
    assert (quantizer.embed.grad != 0).any()


def test_two_steps_may_come_before_their_backward_passes():
    quantizer = build(orthogonal_weight=0.1, entropy_weight=0.1, coef_ema_dead_code=2.0)
    outs = [quantizer(torch.randn(1, 30, 4, requires_grad=True)) for _ in range(2)]
    sum(sum(out.losses.values()) + out.z_q.sum() for out in outs).backward()
    assert quantizer.embed.grad.isfinite().all()


EVERYTHING = {
    "codebook": "learned",
    "num_codebooks": 2,
    "shared_codebook": False,
    "code_dim": 3,
    "orthogonal_weight": 0.1,
    "entropy_weight": 0.1,
    "gradient": "rotation",
}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"normalize": False}, {"kmeans_init": True}, EVERYTHING])
def test_a_latent_that_is_not_finite_is_named_and_does_not_spread(broken, settings, caplog):
    quantizer = build(**settings)
    quantizer(torch.randn(2, 4, 5, 4))
    before, z = state(quantizer), torch.randn(2, 4, 5, 4)
    z[1, 2, 3, 0] = broken
    z.requires_grad_()
    out = quantizer(z)
    assert all(torch.equal(before[k], v) for k, v in state(quantizer).items())
    assert out.metrics["codes/nonfinite"] == 1
    assert not out.losses["vq/commit"].isfinite()  # the trainer reacts to this loss
    assert (
        "1 of 40 latents are not finite; the first is at [sample, *grid] = [1, 2, 3] on rank 0" in caplog.text
    )
    assert quantizer.eval()(z).metrics["codes/nonfinite"] == 1
    assert 0 <= out.codes.min() <= out.codes.max() < 12
    quantizer.train()(torch.randn(2, 4, 5, 4))
    assert all(v.isfinite().all() for v in state(quantizer).values())
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[1, 2, 3] = False
    hidden = quantizer(z, mask)
    (hidden.z_q.sum() + sum(hidden.losses.values())).backward()
    assert hidden.metrics["codes/nonfinite"] == 0
    assert hidden.z_q.isfinite().all()
    assert all(p.grad.isfinite().all() for p in quantizer.parameters())


@geometries
def test_kmeans_with_fewer_latents_than_codes_starts_and_says_so(normalize, caplog):
    quantizer = build(codebook_size=20, normalize=normalize, kmeans_init=True)
    out = quantizer(torch.randn(1, 6, 4))
    assert "k-means initialises 20 codes from only 6 latents: 14 codes start as copies" in caplog.text
    assert out.metrics["codes/usage"] == pytest.approx(6 / 20)
    assert quantizer.embed.isfinite().all()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([12], r"code 12 is out of range: codes lie in \[0, 12\)"),
        ([3, -1], r"code -1 is out of range: codes lie in \[0, 12\)"),
        ([2**40], "code 1099511627776 is out of range"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"num_codebooks": 2, "shared_codebook": False}])
def test_codes_out_of_range_are_named(codes, message, settings):
    quantizer = build(**settings)
    codes = torch.tensor(codes).reshape(1, -1, 1).expand(1, len(codes), quantizer.num_codebooks)
    with pytest.raises(ValueError, match=message):
        quantizer.decode(codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_half_precision_outside_fp32_inside(dtype, settings):
    quantizer = build(**settings)
    twin = copy.deepcopy(quantizer)
    z = torch.randn(2, 9, 4).to(dtype)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z.requires_grad_())
        (out.z_q.float().sum() + sum(out.losses.values())).backward()
    torch.manual_seed(1)
    wide = twin(z.detach().float())
    assert torch.equal(out.codes, wide.codes)
    assert torch.equal(out.z_q, wide.z_q.to(dtype))
    assert all(torch.equal(out.losses[k], v) and v.dtype == torch.float32 for k, v in wide.losses.items())
    assert out.z_q.dtype == z.grad.dtype == dtype
    assert all(torch.equal(v, state(twin)[k]) for k, v in state(quantizer).items())


@given(
    grid=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    layout=st.sampled_from([(1, True, None), (2, True, None), (2, False, None), (3, True, 2), (3, False, 1)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    flags=st.tuples(*[st.booleans()] * 5),
    dead_code=st.sampled_from([None, "batch_random", "linde_buzo_gray"]),
    seed=st.integers(0, 999),
)
@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape_rank_type_and_setting(grid, batch, layout, dtype, flags, dead_code, seed):
    num_codebooks, shared, code_dim = layout
    normalize, norm_latents, learned, rotate, penalties = flags
    settings = {
        "num_codebooks": num_codebooks,
        "shared_codebook": shared,
        "code_dim": code_dim,
        "normalize": normalize,
        "norm_latents": norm_latents,
        "codebook": "learned" if learned else "ema",
        "gradient": "rotation" if rotate else "straight-through",
        "entropy_weight": float(penalties),
        "orthogonal_weight": float(penalties),
        "dead_code": dead_code,
    }
    quantizer = build(codebook_size=9, seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, *grid, 4, generator=generator).to(dtype).requires_grad_()
    mask = torch.rand(batch, *grid, generator=generator) < 0.7
    trained = quantizer(z, mask)
    (trained.z_q.float().sum() + sum(trained.losses.values())).backward()
    assert z.grad.isfinite().all()
    before, other = state(quantizer), build(codebook_size=9, seed=seed + 1, **settings)
    other.load_state_dict(before)
    out = quantizer.eval()(z.detach(), mask)
    assert out.losses.keys() == trained.losses.keys()
    assert out.metrics.keys() == trained.metrics.keys()
    assert all(v.isfinite() for v in (*out.losses.values(), *out.metrics.values(), *trained.losses.values()))
    assert out.codes.shape == (batch, *grid, num_codebooks)
    assert 0 <= out.codes.min() <= out.codes.max() < 9
    assert torch.equal(quantizer.decode(out.codes).to(dtype), out.z_q)
    assert torch.equal(other.eval()(z.detach()).codes, out.codes)
    assert all(torch.equal(before[k], v) for k, v in state(quantizer).items())
