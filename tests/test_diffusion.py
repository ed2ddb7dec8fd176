"""Diffusion and flow: x_0 and epsilon from any prediction, times, and runs on toys through the command line."""

import math

import numpy as np
import pytest
import torch
import yaml
from toys import run_tree, toy  # noqa: F401

from vqcore.cli import main
from vqcore.diffusion import epsilon, times, x_0
from vqcore.protocols import HasTime, time
from vqcore.registry import registry
from vqcore.rng import generator, sample_generators
from vqcore.testing import checks
from vqcore.testing.basics import noise
from vqcore.testing.conformance import build
from vqcore.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("toy")
SCHEDULERS = [
    *(("toy/ddpm", {"prediction": prediction}) for prediction in ("epsilon", "x0", "v")),
    *(("toy/ddpm", {"prediction": prediction, "zero_snr": True}) for prediction in ("x0", "v")),
    ("toy/flow", {}),
]
LEVELS = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999])
X, EPS = noise(5, 2, 4, 4, seed=1), noise(5, 2, 4, 4, seed=2)


def scheduler(name, settings=None):
    return build("scheduler", name, settings or {})


# From a prediction to x_0 and epsilon


class Closed:
    """Schedulers in closed form, with continuous time in [0, 1]."""

    num_steps = 1

    def __init__(self, kind, bend=math.pi / 2):
        self.kind, self.bend = kind, bend

    def shares(self, t, like):
        t = t.to(like).view(-1, *[1] * (like.ndim - 1))
        return (1 - t, t) if self.kind == "flow" else ((self.bend * t).cos(), (self.bend * t).sin())

    def add_noise(self, x, eps, t):
        a, b = self.shares(t, x)
        return a * x + b * eps

    def target(self, x, eps, t):
        a, b = self.shares(t, x)
        return {"flow": eps - x, "epsilon": eps, "x0": x, "v": a * eps - b * x}[self.kind]


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v", "flow"])
def test_x_0_and_epsilon_have_the_closed_form(kind):
    made = Closed(kind)
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8])
    x_t = made.add_noise(X, EPS, t)
    prediction = noise(*X.shape, seed=3)  # of a network: it fits neither x nor eps
    wide = t.double().view(-1, 1, 1, 1)
    a, b = (
        (1 - wide, wide) if kind == "flow" else (torch.cos(wide * math.pi / 2), torch.sin(wide * math.pi / 2))
    )
    clean = {
        "epsilon": (x_t - b * prediction) / a,
        "x0": prediction.double(),
        "v": a * x_t - b * prediction,
        "flow": x_t - b * prediction,
    }[kind]
    noised = {
        "epsilon": prediction.double(),
        "x0": (x_t - a * prediction) / b,
        "v": b * x_t + a * prediction,
        "flow": x_t + (1 - b) * prediction,
    }[kind]
    torch.testing.assert_close(x_0(made, prediction, x_t, t).double(), clean, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(epsilon(made, prediction, x_t, t).double(), noised, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_a_perfect_prediction_gives_the_sample_and_the_noise_back(name, settings):
    made = scheduler(name, settings)
    t = time(made, LEVELS)
    x_t, prediction = made.add_noise(X, EPS, t), made.target(X, EPS, t)
    torch.testing.assert_close(x_0(made, prediction, x_t, t), X, atol=3e-6, rtol=3e-6)
    later = slice(1, None)  # where there is no noise, epsilon is unknown to a network that predicts x_0
    found = epsilon(made, prediction[later], x_t[later], t[later])
    torch.testing.assert_close(found, EPS[later], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(
    ("function", "kind", "t", "wanted"),
    [
        (x_0, "epsilon", 0.0, X),  # no noise: x_t is the sample
        (x_0, "x0", 0.0, X),
        (x_0, "v", 1.0, X),  # nothing but noise: the prediction is minus the sample
        (x_0, "x0", 1.0, X),
        (x_0, "flow", 1.0, X),
        (x_0, "flow", 0.0, X),
        (epsilon, "epsilon", 1.0, EPS),
        (epsilon, "x0", 1.0, EPS),  # x_t is the noise
        (epsilon, "epsilon", 0.0, EPS),
        (epsilon, "v", 0.0, EPS),
    ],
)
def test_at_the_ends_the_equation_that_holds_it_decides(function, kind, t, wanted):
    made, t = Closed(kind), torch.full((5,), t)
    found = function(made, made.target(X, EPS, t), made.add_noise(X, EPS, t), t)
    torch.testing.assert_close(found, wanted, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(("function", "kind", "t"), [(x_0, "epsilon", 1.0), (epsilon, "x0", 0.0)])
def test_what_nothing_holds_is_refused(function, kind, t):
    made, levels = Closed(kind), torch.tensor([0.5, t, 0.5, 0.5, 0.5])
    with pytest.raises(
        ValueError, match=f"{function.__name__} cannot be found at t={t:g}: there neither x_t"
    ):
        function(made, made.target(X, EPS, levels), made.add_noise(X, EPS, levels), levels)


def test_predictions_in_half_precision_give_x_0_in_fp32():
    made, t = Closed("v"), torch.full((5,), 0.3)
    prediction, x_t = made.target(X, EPS, t).bfloat16(), made.add_noise(X, EPS, t)
    found = x_0(made, prediction, x_t, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, X, atol=0.02, rtol=0.02)


def test_gradients_reach_the_prediction():
    made, t = Closed("x0"), torch.full((5,), 0.0)
    prediction = X.clone().requires_grad_()
    x_0(made, prediction, X, t).sum().backward()
    assert torch.equal(prediction.grad, torch.ones_like(X))


# Times


def test_times_of_discrete_and_continuous_schedulers():
    u = torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.9999, 1.0])
    assert time(scheduler("toy/ddpm"), u).tolist() == [0, 0, 1, 500, 999, 999]
    assert time(scheduler("toy/ddpm"), u).dtype == torch.int64
    assert isinstance(scheduler("toy/flow"), HasTime) and torch.equal(time(scheduler("toy/flow"), u), u)


def test_times_are_drawn_by_sample():
    keys = tuple(f"k{i}" for i in range(4000))

    def drawn(keys, *how, **more):
        return times(scheduler("toy/flow"), sample_generators(keys, 0), *how, **more)

    u = drawn(keys)
    assert u.shape == (4000,) and torch.equal(drawn(keys[7:9]), u[7:9])
    torch.testing.assert_close(u.sort().values, torch.linspace(0, 1, 4000), atol=0.03, rtol=0)
    logits = drawn(keys, "logit-normal", mean=-0.5, std=2.0).logit()
    assert abs(float(logits.mean()) + 0.5) < 0.1 and abs(float(logits.std()) - 2) < 0.1
    assert times(scheduler("toy/ddpm"), [generator(0)]).dtype == torch.int64


# The laws


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_the_schedulers_follow_the_laws(name, settings):
    checks.check_scheduler(scheduler(name, settings), steps=20, tolerance=0.01)


def test_denoisers_follow_the_laws(tmp_path):
    spec = build("modality", "array", {"channels": 2, "size": [8, 8], "range": [-1, 1]}, size=None).spec
    for name in ("toy/denoiser", "toy/own-size"):
        made, fresh = (build("decoder", name, {}, seed, dim=6, spec=spec) for seed in (0, 1))
        checks.check_denoiser(made, noise(3, 2, 2, 6), (3, 2, 8, 8), fresh=fresh)


# Runs


def config(folder, name="cfg", **changes):
    """A run of a diffusion decoder as a file; returns its path. `changes` as in `run_tree`."""
    changes = {"model__decoder": {"name": "toy/denoiser"}, **changes}
    changes.setdefault("objective", {"name": "diffusion", "scheduler": {"name": "toy/ddpm"}})
    file = folder / f"{name}.yaml"
    file.write_text(yaml.dump(run_tree(folder / name, **changes)))
    return str(file)


def waves(folder, count=3):
    """Samples as files, for `vqcore tokenize`."""
    folder.mkdir()
    source = registry().load("data", "toy/waves")
    data = source(source.Config(name="toy/waves", modality=None), split="eval", modality=None, extra={})
    for index in range(count):
        np.save(folder / f"{data.key(index)}.npy", data.get(index))
    return str(folder)


def decoded(folder):
    return {path.stem: np.load(path) for path in sorted(folder.rglob("*.npy"))}


def weights(run, step=6):
    return (run / f"checkpoints/step_{step}/model.safetensors").read_bytes()


VARIANTS = {
    "v": {"name": "diffusion", "scheduler": {"name": "toy/ddpm"}},
    "epsilon": {"name": "diffusion", "scheduler": {"name": "toy/ddpm", "prediction": "epsilon"}},
    "x0": {"name": "diffusion", "scheduler": {"name": "toy/ddpm", "prediction": "x0", "zero_snr": True}},
    "flow": {"name": "diffusion", "scheduler": {"name": "toy/flow"}, "times": "logit-normal"},
}


@pytest.mark.parametrize(
    "variant", ["x0", *(pytest.param(each, marks=pytest.mark.slow) for each in VARIANTS if each != "x0")]
)
def test_from_config_to_decoded_files(tmp_path, capsys, variant):
    assert main(["train", config(tmp_path, objective=VARIANTS[variant], eval__sampling={"steps": 2})]) == 0
    run, files = str(tmp_path / "cfg"), waves(tmp_path / "files")
    assert main(["eval", run]) == 0
    assert main(["tokenize", run, files, str(tmp_path / "tokens")]) == 0

    def decode(name, *words):
        assert main(["decode", run, str(tmp_path / "tokens"), str(tmp_path / name), *words]) == 0
        return decoded(tmp_path / name)

    first = decode("a", "steps=5", "--seed", "7")
    assert sorted(first) == ["wave000", "wave001", "wave002"]
    again = decode("b", "--seed", "7", "--batch-size", "1", "steps=5")  # words may follow options
    other = decode("c", "steps=5", "--seed", "8")
    more = decode("d", "steps=50", "--seed", "7")
    for key, value in first.items():
        np.testing.assert_allclose(value, again[key], atol=1e-5)
        assert np.isfinite(value).all()
        assert not np.allclose(value, other[key], atol=1e-3)
        assert not np.array_equal(value, more[key])
    capsys.readouterr()


def test_wrong_words_of_decode_write_nothing(tmp_path, capsys):
    assert main(["train", config(tmp_path, run__steps=1)]) == 0
    assert main(["train", config(tmp_path, "plain", **PLAIN, run__steps=1)]) == 0
    files = waves(tmp_path / "files", 1)
    for run in ("cfg", "plain"):
        assert main(["tokenize", str(tmp_path / run), files, str(tmp_path / f"tokens-{run}")]) == 0
    capsys.readouterr()
    words = [str(tmp_path / "plain"), str(tmp_path / "tokens-plain"), str(tmp_path / "out"), "--size", "16"]
    assert main(["decode", *words]) == 2
    assert "error: --size is for diffusion decoders, and for codes of another" in capsys.readouterr().err
    for run, word, text in (
        (
            "cfg",
            "stepps=5",
            "command line: stepps is not a sampling option of this objective. Did you mean 'steps'?",
        ),
        ("cfg", "steps=many", "command line: steps='many' is not an integer."),
        ("cfg", "steps", "command line: 'steps' is not a setting; write key.path=value."),
        ("cfg", "steps=0", "sampling option steps=0 must be at least 1."),
        ("plain", "steps=25", "command line: steps: this objective has no sampling options."),
    ):
        words = [str(tmp_path / run), str(tmp_path / f"tokens-{run}"), str(tmp_path / "out"), word]
        assert main(["decode", *words]) == 2
        assert f"error: {text}" in capsys.readouterr().err
        assert not list((tmp_path / "out").rglob("*.npy"))
    assert (
        main(["decode", str(tmp_path / "plain"), str(tmp_path / "tokens-plain"), str(tmp_path / "out")]) == 0
    )


PLAIN = {"model__decoder": {"name": "toy/decoder"}, "objective": {"name": "reconstruction"}}


@pytest.mark.parametrize(
    ("variant", "more"),
    [
        ("flow", {}),
        pytest.param("v", {"run__precision": "bf16", "optim__accumulate": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_stops_ends_with_the_same_bits(tmp_path, variant, more):
    changes = {"objective": VARIANTS[variant], "optim__horizon": 6, **more}
    assert main(["train", config(tmp_path, "whole", **changes)]) == 0
    file = config(tmp_path, "cut", **changes)
    assert main(["train", file, "run.steps=3"]) == 0
    assert main(["train", file, "run.steps=6"]) == 0
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("variant", [pytest.param("v", marks=pytest.mark.slow), "flow"])
def test_a_decoder_on_a_frozen_encoder_keeps_the_codes(tmp_path, variant):
    assert main(["train", config(tmp_path, "base", **PLAIN)]) == 0
    frozen = {"model__full_ckpt": str(tmp_path / "base"), "model__freeze_enc": True}
    assert main(["train", config(tmp_path, "new", objective=VARIANTS[variant], **frozen)]) == 0
    base, new = (Tokenizer.load(tmp_path / name) for name in ("base", "new"))
    x = torch.randn(4, 2, 8, 8)
    assert new.fingerprint == base.fingerprint and torch.equal(new.encode(x), base.encode(x))
    assert torch.equal(new.decode(base.encode(x), steps=3), new.reconstruct(x, steps=3))


def test_a_denoiser_of_its_own_size_trains_at_several_sizes(tmp_path):
    sizes = {"data__input_size_min": 8, "data__input_size_max": 16, "data__resolution_step": 4}
    own = {"model__decoder": {"name": "toy/own-size"}, "data__shape": [16, 16], "eval__sizes": [8, 16]}
    assert main(["train", config(tmp_path, **sizes, **own)]) == 0
    made = Tokenizer.load(tmp_path / "cfg")
    for size in ((8, 8), (12, 16)):
        assert made.reconstruct(torch.randn(2, 2, *size), steps=2).shape == (2, 2, *size)
    codes = made.encode(torch.randn(2, 2, 16, 16))
    for asked, size in ((12, (12, 12)), (9, (9, 9)), ((16, 8), (16, 8))):  # 9 is no size of the encoder
        assert made.decode(codes, size=asked, steps=1).shape == (2, 2, *size)
        assert made.decode(codes[0], size=asked, steps=1).shape == (1, 2, *size)
    with pytest.raises(ValueError, match=r"size \[0, 0\] must be at least 1"):
        made.decode(codes, size=0)
    run, tokens, out = (str(tmp_path / name) for name in ("cfg", "tokens", "out"))
    assert main(["tokenize", run, waves(tmp_path / "files", 1), tokens, "--size", "8"]) == 0
    assert main(["decode", run, tokens, out, "--size", "16x12", "steps=1"]) == 0
    assert [x.shape for x in decoded(tmp_path / "out").values()] == [(2, 16, 12)]


@pytest.mark.slow
def test_training_learns_to_denoise(tmp_path):
    """The tokens matter: a reconstruction is nearer to its own input than to another one's."""
    assert main(["train", config(tmp_path, run__steps=300, optim__lr=0.03, data__batch_size=16)]) == 0
    made = Tokenizer.load(tmp_path / "cfg")
    files = decoded_input(tmp_path)
    x_hat = made.reconstruct(files, steps=20)
    own = (x_hat - files).square().mean()
    other = (x_hat - files.roll(1, 0)).square().mean()
    assert float(own) < 0.7 * float(other)


def decoded_input(folder):
    waves(folder / "more", 12)
    return torch.from_numpy(np.stack([*decoded(folder / "more").values()]))
