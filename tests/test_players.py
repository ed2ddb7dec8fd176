"""Adversaries, heads, balancers and ramps on toy components: what is trained, when, and the bits after resuming."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from test_trainer import lines, train_killed
from torch import nn
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.artefacts.folder import load_tensors
from vqcore.balance import AdaptiveWeight, GradientNorms, gradient, loss_scale
from vqcore.data.feed import Feed
from vqcore.errors import CheckpointError, ConfigError, PluginLoadError
from vqcore.rng import forked, generator
from vqcore.run.state import build
from vqcore.run.step import detached, train_step
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
CPU = torch.device("cpu")
GAN = {"name": "reconstruction", "adversary": {"name": "toy/gan", "start": 2}}
BALANCED = {"name": "toy/balanced", "adversary": {"name": "toy/gan", "start": 3}}
TOYS = str(Path(__file__).parent / "fixtures" / "toy")


def same_end(tmp_path, *names, step=6, ranks=1):
    ends = [tmp_path / name / f"checkpoints/step_{step}" for name in names]
    for file in ("model.safetensors", "ema.safetensors", "state.safetensors", "state.json"):
        one, *others = [(end / file).read_bytes() for end in ends if (end / file).exists()]
        assert all(one == other for other in others), file
    logs = [lines(tmp_path / name) for name in names]
    for line in (line for log in logs for line in log):
        if ranks > 1:  # a checkpoint has the window of codes of rank 0 alone
            line.update(dict.fromkeys(key for key in line if key.startswith("codes/")))
    assert all(log == logs[0] for log in logs)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"objective": GAN}, id="gan", marks=pytest.mark.slow),
        pytest.param(
            {"objective": GAN, "optim__accumulate": 2, "run__precision": "bf16"},
            id="gan-bf16-accumulate",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"objective": GAN, "optim__accumulate": 2, "run__precision": "fp16"},
            id="gan-fp16-accumulate",
            marks=pytest.mark.slow,
        ),
        pytest.param({"objective": BALANCED, "optim__accumulate": 2}, id="head-balancer-gan"),
    ],
)
def test_a_rival_a_head_and_a_balancer_resume_with_the_same_bits(tmp_path, monkeypatch, changes):
    train(run_config(tmp_path / "whole", **changes))
    train_killed(monkeypatch, run_config(tmp_path / "killed", **changes), 1, 3, 5)
    same_end(tmp_path, "whole", "killed")


def test_the_adversary_enters_late_and_is_no_part_of_the_tokenizer(tmp_path):
    run = train(run_config(tmp_path / "run", objective=GAN, optim__warmup=2))
    training = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert ["loss@adversary" in line for line in training] == [False, False, True, True, True, True]
    assert ["loss/gan/generator" in line for line in training] == [False, False, True, True, True, True]
    # The schedule counts from the first step of the player, so a late player has its warm-up.
    assert [line["lr@adversary"] for line in training[2:4]] == pytest.approx([0.005, 0.01])
    assert training[2]["factor/gan/generator"] == 1.0 and training[3]["factor/gan/generator"] != 1.0
    kept = load_tensors(tmp_path / "run/checkpoints/step_6/state.safetensors")
    assert {
        "players/adversary/module/judge.0.weight",
        "players/adversary/module/adaptive.norms.known",
    } <= set(kept)
    assert not any(key.startswith("objective/") for key in kept)
    assert not any("judge" in key for key in run.tokenizer.state_dict())
    evaluated = [line for line in lines(tmp_path / "run") if "eval/loss" in line]
    assert evaluated and any("gan/generator" in key for key in evaluated[-1])


def test_the_config_of_a_saved_tokenizer_has_no_parts_for_training(tmp_path, monkeypatch):
    train(run_config(tmp_path / "run", objective=GAN))
    saved = yaml.safe_load((tmp_path / "run/checkpoints/step_6/config.yaml").read_text())
    assert saved["objective"]["adversary"] is None
    whole = Tokenizer.load(tmp_path / "run")
    assert whole.objective.players(100) == ("model",)


def test_only_the_player_at_work_is_in_training_mode_unless_the_objective_says_else(tmp_path):
    config = run_config(tmp_path / "run", objective={**GAN, "adversary": {"name": "toy/gan", "start": 0}})
    run, seen = build(config, CPU), []
    rival = run.objective.adversary
    real = rival.logits
    rival.logits = lambda x: seen.append((run.tokenizer.training, rival.norm.training)) or real(x)
    with Feed(config, run.data, run.tokenizer.modality, run.extra, run.steps) as feed:
        train_step(run, feed.next(0))
        assert seen == [(True, False), (False, True), (False, True)]
        run.objective.set_modes = lambda player: rival.train()
        seen.clear()
        train_step(run, feed.next(1))
        assert seen == [(True, True), (False, True), (False, True)]
        with run.as_evaluated():
            assert not rival.norm.training
        assert rival.norm.training


def test_heads_learn_with_the_model_and_go_with_the_training_state(tmp_path):
    run = train(run_config(tmp_path / "run", objective={"name": "toy/balanced"}))
    assert set(run.players) == {"model"} and set(run.players["model"].heads) == {"head.weight", "head.bias"}
    start = build(
        run_config(tmp_path / "fresh", objective={"name": "toy/balanced"}), CPU
    ).objective.head.weight
    assert (start - run.objective.head.weight).abs().max() > 1e-3
    kept = load_tensors(tmp_path / "run/checkpoints/step_6/state.safetensors")
    moments = "players/model/optimizer/objective.head.weight/exp_avg"
    assert {"objective/head.weight", "objective/norms.known", moments} <= set(kept)
    assert not any(
        "head" in key for key in load_tensors(tmp_path / "run/checkpoints/step_6/model.safetensors")
    )
    assert not any("head" in key for key in run.ema.averages)
    log = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert "factor/toy/edges" not in log[0] and "factor/toy/edges" in log[1]
    # The gradient of the head is in the norm that is clipped.
    assert any(p is run.objective.head.weight for p in run.players["model"].trained)


def test_a_rollback_takes_the_state_of_the_objective_back(tmp_path, monkeypatch):
    from vqcore.run.checkpoints import roll_back

    run = train(run_config(tmp_path / "run", objective={"name": "toy/balanced"}))
    before = {k: v.clone() for k, v in run.objective.state_dict().items()}
    with torch.no_grad():
        for tensor in run.objective.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 7))
    roll_back(run)
    assert all(torch.equal(value, before[key]) for key, value in run.objective.state_dict().items())


def test_a_state_that_does_not_fit_the_objective_is_refused(tmp_path, monkeypatch):
    from vqcore_toy.training import Balanced

    train(run_config(tmp_path / "run", objective={"name": "toy/balanced"}))
    made = Balanced.setup

    def other(self, tokenizer):
        made(self, tokenizer)
        self.norms = GradientNorms(("pixel/mse", "toy/edges", "toy/head"))

    monkeypatch.setattr(Balanced, "setup", other)
    with pytest.raises(
        CheckpointError,
        match=r"training state does not fit this objective and its players: objective/norms\.known",
    ):
        train(run_config(tmp_path / "run", objective={"name": "toy/balanced"}, run__steps=8))


def test_a_term_of_weight_0_is_left_out_in_training_and_shown_in_evaluation(tmp_path):
    objective = {**GAN, "weights": {"gan/generator": {3: 0, 5: 1}, "vq/commit": 0}}
    train(run_config(tmp_path / "run", objective=objective))
    training = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert ["loss/gan/generator" in line for line in training] == [False] * 4 + [True] * 2
    fourth = training[4]
    assert fourth["loss"] == pytest.approx(
        fourth["loss/pixel/mse"] + 0.5 * fourth["factor/gan/generator"] * fourth["loss/gan/generator"],
        rel=1e-5,
    )
    assert any(
        "gan/generator" in key for line in lines(tmp_path / "run") if "eval/loss" in line for key in line
    )


def test_a_loss_of_weight_0_may_be_infinite(tmp_path, monkeypatch):
    from vqcore.objectives import Reconstruction

    real = Reconstruction.losses

    def losses(self, tokenizer, batch, **given):
        out = real(self, tokenizer, batch, **given)
        return (
            replace(out, terms={**out.terms, "toy/nan": torch.tensor(math.nan)})
            if tokenizer.training
            else out
        )

    monkeypatch.setattr(Reconstruction, "losses", losses)
    objective = {"name": "reconstruction", "weights": {"toy/nan": 0}}
    assert train(run_config(tmp_path / "run", objective=objective)).step == 6


def test_a_player_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(
        ConfigError, match=r"optim.players.adversry: .* no such player. Did you mean 'adversary'"
    ):
        build(run_config(tmp_path / "run", objective=GAN, optim__players={"adversry": {"lr": 0.1}}), CPU)
    with pytest.raises(ConfigError, match=r"optim.players.adversary: .* Players: model"):
        build(run_config(tmp_path / "run", optim__players={"adversary": {"lr": 0.1}}), CPU)


def test_an_objective_that_keeps_the_tokenizer_is_refused(tmp_path, monkeypatch):
    from vqcore.objectives import Reconstruction

    monkeypatch.setattr(Reconstruction, "setup", lambda self, tokenizer: setattr(self, "kept", tokenizer))
    with pytest.raises(PluginLoadError, match="keeps the tokenizer as a submodule"):
        build(run_config(tmp_path / "run"), CPU)


@pytest.mark.slow
def test_tied_weights_of_a_player_can_be_saved(tmp_path, monkeypatch):
    from vqcore_toy.training import Gan

    made = Gan.__init__

    def tied(self, cfg, *, spec):
        made(self, cfg, spec=spec)
        self.again = nn.Linear(spec.channels, 4)
        self.again.weight, self.again.bias = self.judge[0].weight, self.judge[0].bias
        self.register_buffer("twice", self.norm.running_mean)

    monkeypatch.setattr(Gan, "__init__", tied)
    train(run_config(tmp_path / "whole", objective=GAN))
    train_killed(monkeypatch, run_config(tmp_path / "killed", objective=GAN), 5)
    same_end(tmp_path, "whole", "killed")


def test_the_adversary_judges_what_the_model_made_or_makes_it_again(tmp_path):
    """With `shared` the encoder runs once a step; alone, the adversary computes the same reconstruction."""
    config = run_config(tmp_path / "run", objective={**GAN, "adversary": {"name": "toy/gan", "start": 0}})
    run, calls = build(config, CPU), []
    run.tokenizer.encoder.register_forward_hook(lambda *args: calls.append(0))
    with Feed(config, run.data, run.tokenizer.modality, run.extra, run.steps) as feed:
        (batch,) = feed.next(0)
        train_step(run, [batch])
        assert len(calls) == 1
        run.tokenizer.eval()
        run.objective.eval()
        rng = lambda: [generator(i) for i in range(len(batch.keys))]  # noqa: E731
        shared: dict = {}
        with torch.no_grad():
            run.objective.losses(run.tokenizer, batch, player="model", step=0, rng=rng(), shared=shared)
            given, alone = (
                run.objective.losses(
                    run.tokenizer, batch, player="adversary", step=0, rng=rng(), shared=s
                ).terms
                for s in (detached(shared), {})
            )
        assert torch.equal(given["gan/discriminator"], alone["gan/discriminator"])


def test_a_head_learns_from_latents_that_are_encoded_once(tmp_path):
    run, calls = build(run_config(tmp_path / "run", objective={"name": "toy/balanced"}), CPU), []
    run.tokenizer.encoder.register_forward_hook(lambda *args: calls.append(0))
    with Feed(run.config, run.data, run.tokenizer.modality, run.extra, run.steps) as feed:
        (batch,) = feed.next(0)
        train_step(run, [batch])
    assert len(calls) == 1
    rng, shared = [generator(i) for i in range(len(batch.keys))], {}
    out = run.objective.losses(run.tokenizer, batch, player="model", step=0, rng=rng, shared=shared)
    (slope,) = torch.autograd.grad(out.terms["toy/head"], run.tokenizer.encoder.linear.weight)
    assert float(slope.abs().max()) > 0


def test_shared_is_detached_at_any_depth():
    x = torch.ones(2, requires_grad=True) * 2
    found = detached({"a": x, "b": [x, (x, {"c": x})], "d": "text"})
    assert not found["a"].requires_grad and not found["b"][1][1]["c"].requires_grad and found["d"] == "text"


def test_forked_generators_follow_from_the_seed_alone():
    one, other = [generator(5)], [generator(5)]
    torch.randn(3, generator=other[0])
    draw = lambda rng, *purpose: torch.randn(3, generator=forked(rng, *purpose)[0])  # noqa: E731
    assert torch.equal(draw(one, "a"), draw(other, "a")) and not torch.equal(draw(one, "a"), draw(one, "b"))


# Gradients and factors


def gradients(scales, steps):
    """The factors of an adaptive weight for terms with known gradients at one tensor."""
    weight, factors = AdaptiveWeight(eps=0.0), []
    at = nn.Parameter(torch.ones(4))
    for step in range(steps):
        for scale in scales[step]:
            factors.append(float(weight((at * scale[0]).sum(), (at * scale[1]).sum(), at, step)))
    return factors, weight


def test_a_factor_comes_from_the_step_before_summed_over_micro_batches():
    factors, _ = gradients([[(1.0, 3.0), (1.0, 5.0)], [(2.0, 2.0), (2.0, 2.0)], [(9.0, 9.0)]], 3)
    assert factors == pytest.approx([1.0, 1.0, 4.0, 4.0, 1.0])


def test_a_factor_survives_saving():
    _, weight = gradients([[(1.0, 3.0)]], 1)
    fresh = AdaptiveWeight(eps=0.0)
    fresh.load_state_dict(weight.state_dict())
    at = nn.Parameter(torch.ones(4))
    assert float(fresh((at * 1).sum(), (at * 1).sum(), at, 1)) == pytest.approx(3.0)


def test_an_overflow_leaves_the_factor_as_it_was():
    factors, _ = gradients([[(1.0, 3.0)], [(float("inf"), 3.0)], [(1.0, 1.0)], [(1.0, 1.0)]], 4)
    assert factors == pytest.approx([1.0, 3.0, 3.0, 1.0])


def test_under_fp16_small_gradients_are_taken_of_the_scaled_term():
    at = nn.Parameter(torch.ones(4, dtype=torch.float16))
    tiny = lambda: (at * 1e-3).sum().float() * 1e-6  # noqa: E731
    assert float(gradient(tiny(), at).abs().max()) == 0.0  # it vanishes in half precision
    with loss_scale(2.0**12):
        assert float(gradient(tiny(), at).abs().max()) == pytest.approx(1e-9, rel=0.02)


def test_norms_of_terms_that_do_not_depend_on_the_tensor_are_0():
    norms, at = GradientNorms(("a",)), nn.Parameter(torch.ones(3))
    norms({"a": torch.ones(3, requires_grad=True).sum()}, at, 0)
    assert float(norms({"a": at.sum()}, at, 1)["a"]) == 0.0


# Several processes


def launch(folder, name, ranks, **changes):
    """Train under torchrun; returns the last checkpoint."""
    tree = run_tree(folder / name, run__threads=1, **changes)
    (folder / f"{name}.yaml").write_text(yaml.dump(tree))
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    done = subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), "-m", "vqcore", "train", f"{name}.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([TOYS, *sys.path])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / name / "checkpoints" / f"step_{tree['run']['steps']}"


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_a_head_and_a_balancer_like_one(tmp_path):
    still = {"name": "toy/quantizer", "rate": 0.0}
    common = {"objective": {"name": "toy/balanced"}, "model__quantizer": still, "data__evaluate": False}
    one = launch(tmp_path, "one", 1, data__batch_size=8, **common)
    two = launch(tmp_path, "two", 2, data__batch_size=4, **common)
    for file in ("model.safetensors", "state.safetensors"):
        ours, theirs = (load_tensors(end / file) for end in (one, two))
        for name, value in ours.items():
            if not name.startswith("window/"):
                torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.dist
def test_a_rival_on_two_processes_resumes_with_the_same_bits(tmp_path):
    common = {
        "objective": BALANCED,
        "model__quantizer": {"name": "toy/quantizer", "rate": 0.0},  # the toy does not sum over processes
        "optim": {"lr": 0.01, "accumulate": 2, "horizon": 6},
        "data__evaluate": False,
        "run__precision": "bf16",
    }
    launch(tmp_path, "whole", 2, **common)
    launch(tmp_path, "parts", 2, run__steps=4, **common)
    launch(tmp_path, "parts", 2, **common)
    same_end(tmp_path, "whole", "parts", ranks=2)
    assert any("factor/gan/generator" in line for line in lines(tmp_path / "whole"))


def test_moments_come_back_in_the_layout_of_their_parameters(tmp_path):
    """Fused kernels pair numbers by their place in memory, and checkpoints keep no layout."""
    config = run_config(tmp_path / "run", optim__args={"fused": True})
    run = build(config, CPU)
    turned = [p for p in run.tokenizer.parameters() if p.ndim == 2 and min(p.shape) > 1]
    for p in turned:
        p.data = p.data.T.contiguous().T
    with Feed(config, run.data, run.tokenizer.modality, run.extra, run.steps) as feed:
        train_step(run, feed.next(0))
    player = run.players["model"]
    player.load_state({name: value.contiguous() for name, value in player.state().items()}, {})
    moments = [player.optimizer.state[p]["exp_avg"] for p in turned if p in player.optimizer.state]
    assert moments and all(moment.stride()[0] == 1 for moment in moments)
