"""The adversary and its discriminators: laws, closed forms, balance, whole runs."""

import json
import logging

import pytest
import torch
from test_players import launch, same_end
from test_trainer import lines, train_killed
from toys import run_config
from vqcore_percept.augment import augmented
from vqcore_percept.gan import for_discriminator, for_generator, lecam

from vqcore.artefacts.folder import load_tensors
from vqcore.cli import main
from vqcore.errors import ConfigError
from vqcore.protocols import DataSpec
from vqcore.rng import generator
from vqcore.testing.conformance import AdversaryConformance, DiscriminatorConformance, build
from vqcore.trainer import train


def data(*size, channels=3):
    return DataSpec(channels=channels, size=size, range=(-1.0, 1.0))


PATCH = {"name": "percept/patchgan", "width": 4, "depth": 1}


class TestPatchGANLaws(DiscriminatorConformance):
    component = "percept/patchgan"
    spec = data(16, 16)
    configs = (
        {"width": 4, "depth": 2},
        {"width": 4, "depth": 1, "norm": "batch"},
        {"width": 4, "norm": "none", "depth": 1},
    )


class TestPatchGANOfWavesLaws(DiscriminatorConformance):
    component = "percept/patchgan"
    spec = data(32, channels=2)
    configs = ({"width": 4, "depth": 2},)


class TestPatchGANOfVolumesLaws(DiscriminatorConformance):
    component = "percept/patchgan"
    spec = data(8, 8, 8, channels=1)
    configs = ({"width": 4, "depth": 1},)


class TestGanLaws(AdversaryConformance):
    component = "percept/gan"
    spec = data(16, 16)
    configs = (
        {"discriminator": PATCH},
        {"discriminator": PATCH, "loss": "non-saturating", "lecam": 0.01, "r1": 0.1, "weight": "adaptive"},
        {"discriminator": PATCH, "loss": "vanilla", "augment": ["colour", "translation", "cutout"]},
    )


def gan(spec=None, **settings):
    return build("adversary", "percept/gan", {"discriminator": PATCH, **settings}, spec=spec or data(16, 16))


def two(n=4, *size):
    torch.manual_seed(3)
    x = torch.rand(n, 3, *(size or (16, 16))) * 2 - 1
    return (x + 0.3 * torch.randn_like(x)).clamp(-1, 1), x


def rngs(n=4, step=0):
    return [generator(step, i) for i in range(n)]


def turn(net, which, x_hat, x, step=0, **more):
    return getattr(net, which)(x_hat, x, mask=None, step=step, rng=rngs(len(x), step), **more)


REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])


def log_belief(logits):
    return torch.log(1 / (1 + torch.exp(-logits)))


def test_losses_are_their_closed_forms():
    hinge = ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2
    assert float(for_discriminator("hinge", REAL, FAKE)) == pytest.approx(hinge)
    entropy = -(log_belief(REAL).mean() + torch.log(1 - 1 / (1 + torch.exp(-FAKE))).mean()) / 2
    for name in ("vanilla", "non-saturating"):
        assert float(for_discriminator(name, REAL, FAKE)) == pytest.approx(float(entropy))
    assert float(for_generator("hinge", FAKE)) == pytest.approx(2 / 3)
    assert float(for_generator("vanilla", FAKE)) == pytest.approx(2 / 3)
    assert float(for_generator("non-saturating", FAKE)) == pytest.approx(float(-log_belief(FAKE).mean()))


def test_lecam_is_one_sided():
    found = lecam(REAL, FAKE, torch.tensor(0.5), torch.tensor(-0.5))
    real = (2.5**2 + 1.0**2 + 0) / 3
    fake = (3.5**2 + 0.5**2 + 0) / 3
    assert float(found) == pytest.approx(real + fake)


def test_the_running_means_are_those_of_the_steps_before():
    net, (x_hat, x) = gan(lecam=0.01, lecam_decay=0.5), two()
    net.eval()
    turn(net, "discriminator", x_hat, x)
    assert float(net.real_mean) == 0
    net.judge.eval()
    real = float(net.judge(x).detach().mean())
    net.training = True
    turn(net, "discriminator", x_hat, x)
    assert float(net.real_mean) == pytest.approx(real / 2, rel=1e-5)
    turn(net, "discriminator", x_hat, x, step=1)
    assert float(net.real_mean) == pytest.approx(real * 3 / 4, rel=1e-5)


def test_r1_is_the_gradient_at_data():
    net, (x_hat, x) = gan(r1=5.0).eval(), two()
    moved, eps = x.clone(), 1e-3
    with torch.no_grad():
        slopes = torch.zeros(len(x))
        for at in range(x[0].numel()):
            moved.flatten(1)[:, at] += eps
            up = net.judge(moved).flatten(1).mean(1)
            moved.flatten(1)[:, at] -= 2 * eps
            down = net.judge(moved).flatten(1).mean(1)
            moved.flatten(1)[:, at] += eps
            slopes += ((up - down) / (2 * eps)).square()
    out = turn(net, "discriminator", x_hat, x)
    found = out.terms["gan/r1"]
    assert {name: float(factor) for name, factor in out.factors.items()} == {"gan/r1": 5.0}
    assert float(found.detach()) == pytest.approx(float(slopes.mean()), rel=0.02)
    found.backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in net.parameters())


def test_terms_of_the_discriminator_weigh_what_their_settings_say():
    net, (x_hat, x) = gan(lecam=0.01, r1=2.0).eval(), two()
    out = turn(net, "discriminator", x_hat, x)
    factors = {name: float(factor) for name, factor in out.factors.items()}
    assert factors == pytest.approx({"gan/lecam": 0.01, "gan/r1": 2.0})
    assert not turn(gan().eval(), "discriminator", x_hat, x).factors


def test_augmentations_follow_from_each_samples_generator():
    _, x = two()
    span, which = (-1.0, 1.0), ("colour", "translation", "cutout")
    whole = augmented(x, which, rngs(), span=span)
    assert torch.equal(whole[2:3], augmented(x[2:3], which, rngs()[2:3], span=span))
    assert not torch.equal(whole, augmented(x, which, rngs(step=1), span=span))
    assert not torch.allclose(whole, x)


def test_translation_moves_and_fills_with_the_middle():
    x = torch.arange(16.0).expand(40, 2, 16) + 5
    moved = augmented(x, ["translation"], rngs(40), span=(4.0, 6.0))
    shifts = set()
    for sample in moved[:, 0]:
        inside = sample[sample != 5.0]
        assert bool((inside.diff() == 1).all())
        shifts.add(int((sample - x[0, 0]).round().mode().values))
    assert shifts == {-2, -1, 0, 1, 2}


def test_cutout_hides_half_of_each_axis_at_most():
    x = torch.ones(60, 1, 12, 12)
    cut = augmented(x, ["cutout"], rngs(60), span=(-1.0, 1.0))
    hidden = (cut == 0).flatten(1).sum(1)
    assert int(hidden.max()) == 36 and int(hidden.min()) >= 9


def test_colour_has_gradients_and_keeps_the_mean_of_grey():
    _, x = two()
    x.requires_grad_()
    augmented(x, ["colour"], rngs(), span=(-1.0, 1.0)).square().sum().backward()
    assert float(x.grad.abs().min()) >= 0 and float(x.grad.abs().max()) > 0


def test_an_adaptive_weight_stays_between_its_clamps():
    net, (x_hat, x) = gan(weight="adaptive", clamp=[0.5, 2.0]).train(), two()
    last = torch.nn.Parameter(torch.ones(()))
    for step, size in enumerate((1.0, 1e-6, 1e6, 1.0)):
        shown = x_hat * last
        out = turn(net, "generator", shown, x, step, against=(shown * size).square().mean(), last_layer=last)
        factor = float(out.factors["gan/generator"])
        assert factor == {0: 1.0, 2: 0.5, 3: 2.0}.get(step, factor)
        assert 0.5 <= factor <= 2
    assert turn(net, "generator", x_hat, x).factors == {}


def test_one_that_wins_or_is_blind_is_named_once(caplog):
    net, (x_hat, x) = gan().train(), two()
    net.judge.requires_grad_(False)

    def answer(real, fake):
        calls = iter([real, fake])
        net.judge.forward = lambda seen: torch.full((len(seen), 1), next(calls))
        with caplog.at_level(logging.WARNING):
            for step in range(600):
                calls = iter([real, fake])
                turn(net, "discriminator", x_hat, x, step)

    answer(1.0, -1.0)
    assert caplog.text.count("it has won") == 1 and "objective.adversary.lecam=0.01" in caplog.text
    answer(1.0, 1.0)
    assert caplog.text.count("it says the same of everything") == 1


BAD = [
    ({"discriminator": {**PATCH, "depth": 5}}, r"depth=5 halves 16 positions to fewer than 3: take depth=2"),
    ({"discriminator": {**PATCH, "width": 0}}, r"width=0 must be at least 1|width: 0 must be at least 1"),
    ({"clamp": [0.5, 1.0]}, r"does nothing with weight=fixed"),
    ({"weight": "adaptive", "clamp": [2.0, 1.0]}, r"give two numbers, 0 <= low <= high"),
    ({"lecam_decay": 0.9}, r"does nothing with lecam=0"),
    ({"lecam": -1.0}, r"lecam.*-1.0 must be at least 0"),
    ({"r1": True}, r"r1"),
    ({"lecam": 0.1, "lecam_decay": 1.0}, r"must be at least 0 and below 1"),
    ({"start": -1}, r"must be at least 0"),
    ({"loss": "wasserstein"}, r"hinge"),
]


@pytest.mark.parametrize(("settings", "says"), BAD)
def test_what_does_not_fit_is_one_line(settings, says):
    with pytest.raises(ConfigError, match=says):
        gan(**settings)


# Whole runs

ROUGH = {
    "name": "percept/gan",
    "discriminator": PATCH,
    "lecam": 0.01,
    "r1": 0.1,
    "weight": "adaptive",
    "augment": ["translation"],
}


SETTINGS = {
    "late": {"objective__adversary": {**ROUGH, "start": 2}},
    "bf16-accumulate": {"optim__accumulate": 2, "run__precision": "bf16"},
    "fp16-accumulate": {"optim__accumulate": 2, "run__precision": "fp16"},
    "batch-norm": {
        "objective__adversary": {"name": "percept/gan", "discriminator": {**PATCH, "norm": "batch"}}
    },
}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    "name", [name if name == "late" else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, name):
    changes = {
        "objective": {"name": "reconstruction", "weights": {"gan/generator": {"2": 0, "4": 0.5}}},
        "objective__adversary": ROUGH,
        **SETTINGS[name],
    }
    train(run_config(tmp_path / "whole", **changes))
    train_killed(monkeypatch, run_config(tmp_path / "killed", **changes), 1, 3, 5)
    ends = [tmp_path / run / "checkpoints/step_6" for run in ("whole", "killed")]
    for file in ("model.safetensors", "state.safetensors", "state.json"):
        one, other = [(end / file).read_bytes() for end in ends]
        assert one == other, file
    logs = [lines(tmp_path / run) for run in ("whole", "killed")]
    assert logs[0] == logs[1]
    steps = [line for line in logs[0] if "loss@adversary" in line]
    assert "metric/gan/accuracy/real" in steps[-1]
    assert len(steps) == (4 if name == "late" else 6)


STILL = {"model__quantizer": {"name": "toy/quantizer", "rate": 0.0}, "data__evaluate": False}
"""The toy's codebook does not sum over processes."""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_resume_in_the_middle_with_the_same_bits(tmp_path):
    common = {
        **STILL,
        "objective": {"name": "reconstruction", "adversary": {**ROUGH, "start": 2}},
        "optim": {"lr": 0.01, "accumulate": 2, "horizon": 6},
        "run__precision": "bf16",
    }
    launch(tmp_path, "whole", 2, **common)
    launch(tmp_path, "parts", 2, run__steps=4, **common)
    launch(tmp_path, "parts", 2, **common)
    same_end(tmp_path, "whole", "parts", ranks=2)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_have_the_means_of_one(tmp_path):
    """LeCam's means, the accuracies, the balancer's norms, the weights of the alignment's map."""
    gan = {name: value for name, value in ROUGH.items() if name not in ("augment", "weight")}
    objective = {"name": "reconstruction", "adversary": gan, "align": {"name": "toy/teacher"}, "balance": 1.0}
    common = {**STILL, "objective": objective, "run__steps": 3}
    one = launch(tmp_path, "one", 1, data__batch_size=8, **common)
    two = launch(tmp_path, "two", 2, data__batch_size=4, **common)
    ours, theirs = (load_tensors(end / "state.safetensors") for end in (one, two))
    held = [name for name in ours if "real_mean" in name or "balancer" in name or "align.head" in name]
    assert len(held) >= 6 and float(ours["players/adversary/module/real_mean"]) != 0
    for name, value in ours.items():
        if not name.startswith("window/"):
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_a_discriminator_that_wins_is_named_in_the_report_and_the_last_checkpoint_counts(
    tmp_path, monkeypatch, capsys
):
    """The warning is forced. The sum of losses rises when the adversary enters, and chooses nothing."""
    pytest.importorskip("vqcore_track")
    monkeypatch.setattr("vqcore_percept.gan.WINS", -1.0)
    weights = {"gan/generator": {"2": 0.0, "4": 50.0}}
    objective = {"name": "reconstruction", "adversary": {**ROUGH, "start": 0}, "weights": weights}
    run = tmp_path / "run"
    train(run_config(run, objective=objective, hooks={"report": {"name": "track/report"}}))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["warning"]
    page = (run / "report.html").read_text()
    for text in (
        "it has won",
        "lecam=0.01",
        "gan/accuracy/real",
        "gan/accuracy/rebuilt",
        "factor/gan/generator",
    ):
        assert text in page, text
    assert main(["export", str(run), str(tmp_path / "made")]) == 0
    assert "step 6, the last checkpoint" in capsys.readouterr().out
    ours = load_tensors(run / "checkpoints/step_6/ema.safetensors")
    made = load_tensors(tmp_path / "made/model.safetensors")
    assert ours and all(torch.equal(made[name], value) for name, value in ours.items())
    assert not any("judge" in name for name in made)


def test_one_bad_logit_does_not_spoil_the_means():
    net, (x_hat, x) = gan(lecam=0.01).train(), two()
    turn(net, "discriminator", x_hat, x)
    before = float(net.real_mean)
    turn(net, "discriminator", x_hat, x * float("nan"), step=1)
    assert float(net.real_mean) == before and bool(net.right.isfinite().all())


def test_r1_through_the_attention_of_a_teacher():
    dino = {"name": "percept/dino", "trunk": {"name": "percept/timm", "model": "test_vit"}}
    net = build("adversary", "percept/gan", {"discriminator": dino, "r1": 1.0}, spec=data(64, 64))
    x_hat, x = two(2, 64, 64)
    turn(net, "discriminator", x_hat, x).terms["gan/r1"].backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in net.judge.heads.parameters())
