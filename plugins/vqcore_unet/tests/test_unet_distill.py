"""The objective `unet/distill`: a teacher in closed form, the laws, whole runs by the trainer, bad input."""

import math

import pytest
import torch
import yaml
from torch import nn
from toys import run_config, toy, trained  # noqa: F401
from vqcore_unet.distill import Distill

from vqcore.borrowed import Lender, sha256, weights_of
from vqcore.cli import main
from vqcore.errors import CheckpointError, ConfigError
from vqcore.protocols import Batch, DataSpec, Quantized
from vqcore.rng import sample_generators
from vqcore.testing import checks
from vqcore.testing.basics import noise
from vqcore.testing.conformance import build
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
STD, SPEC, KEYS = 0.5, DataSpec(channels=2, size=(4, 4)), tuple("abcdef")
UNET = {
    "name": "unet/unet",
    "patch_size": 2,
    "width": 8,
    "mult": [1],
    "depth": 0,
    "attention": [],
    "norm_groups": 4,
}
FLOW = {"name": "unet/flow"}
TEACHER = {"model__decoder": UNET, "objective": {"name": "diffusion", "scheduler": FLOW}}


def student(teacher, **changes):
    objective = {
        "name": "unet/distill",
        "of": str(teacher),
        "teacher_steps": 2,
        **changes.pop("objective", {}),
    }
    model = {"model__decoder": UNET, "model__full_ckpt": str(teacher), "model__freeze_enc": True}
    return {**model, "objective": objective, **changes}


@pytest.fixture
def teacher(tmp_path):
    return trained(tmp_path / "teacher", **TEACHER)


# A teacher in closed form


class Linear(nn.Module):
    """The exact denoiser of normal data without a mean, in the words of a scheduler; `end` is where its walk ends."""

    is_denoiser, last_layer = True, None
    to_target = staticmethod(lambda x, rng: x)
    from_target = staticmethod(lambda y, size: y)
    target_shape = staticmethod(lambda size: (2, *size))

    def __init__(self, scheduler, *, ends=False):
        super().__init__()
        self.scheduler, self.ends = scheduler, ends

    def condition(self, z_q, *, size, mask=None, extras=None):
        return None

    def forward(self, x_t, t, cond):
        s = (t / 1000).view(-1, 1, 1, 1)
        total = (1 - s) ** 2 * STD**2 + s**2
        x = STD * total**-0.5 * x_t if self.ends else (1 - s) * STD**2 / total * x_t
        eps = (x_t - (1 - s) * x) / s
        return self.scheduler.target(x, eps, t)


class Spy:
    """A tokenizer with a linear denoiser."""

    device, spec, training = torch.device("cpu"), SPEC, True
    embed = encoder = proj = quantizer = None

    def __init__(self, net):
        self.decoder = net

    def latents(self, x):
        return x.movedim(1, -1)

    def quantize(self, z, mask=None):
        return Quantized(z, torch.zeros(*z.shape[:-1], 1, dtype=torch.long))

    def grid(self, size=None):
        raise NotImplementedError

    def lookup(self, codes):
        return codes.float()


def distill(**settings):
    made = build("objective", "unet/distill", settings, spec=SPEC)
    made.teacher = Linear(made.scheduler)
    return made


@pytest.mark.parametrize("prediction", ["preconditioned", "velocity", "sample"])
def test_the_walk_of_a_linear_teacher_ends_where_its_equation_says(prediction):
    """x moves by a factor alone: it ends at std / r times the start, r the spread of noised samples at the start."""
    start, level = noise(6, 2, 4, 4, seed=1), torch.tensor([1.0, 0.75, 0.5, 1 / 3, 0.25, 1.0])
    ends = STD / ((1 - level) ** 2 * STD**2 + level**2).sqrt()
    errors = []
    for steps in (64, 128):
        made = distill(teacher_steps=steps, scheduler={**FLOW, "prediction": prediction})
        found = made.walked(start, level, torch.zeros(6, 4, 4, 2), size=(4, 4))
        errors.append(float((found - ends.view(-1, 1, 1, 1) * start).abs().max()))
    assert errors[0] < 0.04 and math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)


def losses(made, net, keys=KEYS):
    x = STD * noise(6, 2, 4, 4, seed=2)[: len(keys)]
    rng = sample_generators(keys, 0)
    return made.losses(Spy(net), Batch(x, keys), player="model", step=0, rng=rng, shared={})


def test_a_student_that_knows_the_ends_has_no_loss_and_the_teacher_itself_has():
    made = distill(teacher_steps=200)
    assert float(losses(made, Linear(made.scheduler, ends=True)).terms["distill/mse"]) < 1e-4
    assert float(losses(made, Linear(made.scheduler)).terms["distill/mse"]) > 0.02


def test_a_walk_of_one_step_from_pure_noise_is_the_teachers_prediction():
    made = distill(steps=1, teacher_steps=1)
    assert float(losses(made, Linear(made.scheduler)).terms["distill/mse"]) == 0


def test_levels_are_those_that_the_student_is_asked_at():
    made = distill(steps=3)
    levels = made._levels(sample_generators([str(i) for i in range(6000)], 0))
    shares = {1.0: 1 / 3 * (1 + 1 / 2 + 1 / 3), 0.5: 1 / 6, 1 / 3: 1 / 9, 2 / 3: 1 / 9}
    found = {level: float((levels - level).abs().lt(1e-6).float().mean()) for level in shares}
    assert found == pytest.approx(shares, abs=0.03) and sum(found.values()) == pytest.approx(1)
    torch.testing.assert_close(distill(steps=1)._levels(sample_generators(KEYS, 0)), torch.ones(6))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_of_a_student_that_knows_the_ends_have_the_spread_of_the_data(steps):
    made = distill()
    codes = torch.zeros(64, 4, 4, 1, dtype=torch.long)
    rng = sample_generators([str(i) for i in range(64)], 0)
    found = made.decode(Spy(Linear(made.scheduler, ends=True)), codes, size=(4, 4), rng=rng, steps=steps)
    assert float(found.std()) == pytest.approx(STD, rel=0.05) and found.shape == (64, 2, 4, 4)


def test_tokens_must_be_frozen_where_they_are_trained_alone():
    """An evaluation of a run, whose tokenizer is not frozen, trains nothing."""
    made, spy = distill(), Spy(None)
    spy.encoder, spy.training = nn.Linear(1, 1), False
    made.setup(spy)
    spy.training = True
    with pytest.raises(ConfigError, match=r"Set model\.freeze_enc=true model\.full_ckpt="):
        made.setup(spy)


# Whole runs


@pytest.mark.parametrize("settings", [{}, {"loss": "l1", "steps": 1, "adversary": {"name": "toy/gan"}}])
@pytest.mark.slow
def test_laws(teacher, tmp_path, settings):
    run = tmp_path / "run"
    tokenizer = train(run_config(run, **student(teacher, objective=settings), run__steps=1)).tokenizer

    class Lent(Distill):
        def setup(self, tokenizer):
            super().setup(tokenizer)
            Lender().lend({"objective": self})

    lent = Lent(tokenizer.cfg.objective if not settings else tokenizer.objective.cfg, spec=tokenizer.spec)
    checks.check_objective(lent, tokenizer, Batch(noise(3, 2, 8, 8, seed=3).clamp(-1, 1), tuple("abc")))


@pytest.mark.slow
def test_the_laws_of_borrowing(teacher):
    def made():
        return build("objective", "unet/distill", {}, spec=SPEC)

    checks.check_borrowed(made, {"teacher": str(teacher)})


@pytest.mark.slow
def test_a_student_starts_from_the_teacher_and_keeps_its_tokens(teacher, tmp_path):
    config = run_config(tmp_path / "student", **student(teacher))
    run, before = train(config), Tokenizer.load(teacher)
    assert run.loans["objective.teacher"]["sha256"] == sha256(weights_of(before.decoder))
    after = Tokenizer.load(tmp_path / "student")
    assert after.fingerprint == before.fingerprint
    assert not torch.equal(after.decoder.conv_out.weight, before.decoder.conv_out.weight)
    saved = (tmp_path / "student/checkpoints/step_6").glob("*.yaml")
    assert yaml.safe_load(next(saved).read_text())["objective"]["of"] is None
    codes = before.encode(noise(2, 2, 8, 8, seed=3).clamp(-1, 1))
    one, again, four = (after.decode(codes, steps=steps) for steps in (1, 1, 4))
    assert torch.equal(one, again) and not torch.equal(one, four)
    assert torch.equal(after.decode(codes), four)
    with pytest.raises(ConfigError, match=r"steps=5: this decoder was distilled for 1 to 4 steps"):
        after.decode(codes, steps=5)
    assert main(["eval", str(tmp_path / "student")]) == 0


@pytest.mark.slow
def test_a_run_is_taken_up_again_with_the_same_bits(teacher, tmp_path):
    changes = student(teacher, optim__horizon=6, objective={"adversary": {"name": "toy/gan"}})
    train(run_config(tmp_path / "whole", **changes))
    train(run_config(tmp_path / "parts", **changes, run__steps=3))
    train(run_config(tmp_path / "parts", **changes))
    for name in ("model.safetensors", "state.safetensors", "ema.safetensors"):
        whole, parts = (tmp_path / run / "checkpoints/step_6" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name
        assert b"teacher" not in whole.read_bytes()


# Bad input


def refused(tmp_path, error, **changes):
    with pytest.raises(error) as found:
        train(run_config(tmp_path / "new", **changes))
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.slow
def test_what_cannot_be_a_teacher(teacher, tmp_path):
    plain = trained(tmp_path / "plain")
    message = refused(tmp_path, CheckpointError, **student(teacher, objective={"of": str(plain)}))
    assert "its decoder is no denoiser" in message and "objective.teacher" in message
    message = refused(tmp_path, CheckpointError, **student(teacher, objective={"of": None}))
    assert "set objective.of to the run of a diffusion decoder" in message
    other = {**FLOW, "prediction": "preconditioned"}
    message = refused(tmp_path, CheckpointError, **student(teacher, objective={"scheduler": other}))
    assert "another scheduler than objective.scheduler; set the one of that run: {name: unet/flow}" in message
    train(run_config(tmp_path / "student", **student(teacher, run__steps=1)))
    message = refused(
        tmp_path, CheckpointError, **student(teacher, objective={"of": str(tmp_path / "student")})
    )
    assert (
        "its decoder is a student itself, of 4 steps: set objective.of to the run of its teacher" in message
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_tokens_that_are_trained_are_refused(teacher, tmp_path):
    message = refused(tmp_path, ConfigError, **student(teacher, model__freeze_enc=False))
    assert f"Set model.freeze_enc=true model.full_ckpt={teacher}" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_tokens_of_another_run_are_refused_by_their_fingerprint(teacher, tmp_path):
    other = trained(tmp_path / "other", **TEACHER, run__seed=1)
    message = refused(tmp_path, ConfigError, **student(teacher, model__full_ckpt=str(other)))
    wanted, found = (Tokenizer.load(run).fingerprint[:16] for run in (teacher, other))
    assert wanted in message and found in message and f"Set model.full_ckpt={teacher}" in message
