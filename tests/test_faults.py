"""What may go wrong while a run trains, and that it ends as if nothing had. Equal means equal to the bit."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
import yaml
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.artefacts.resolve import checkpoints
from vqcore.commands.train import run as train_command
from vqcore.errors import ConfigError, DataError, RunError
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


def weights(directory, step=6):
    return (directory / f"checkpoints/step_{step}/model.safetensors").read_bytes()


def events(directory):
    path = directory / "events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []


def spoil(monkeypatch, *batches, value=float("nan")):
    """The loss of these batches (counted from 0 over the whole process, evaluation left out) becomes `value`."""
    from vqcore import objectives

    real, count = objectives.pixel_loss, iter(range(1000))

    def sometimes(*given, **options):
        loss = real(*given, **options)
        return loss * value if torch.is_grad_enabled() and next(count) in batches else loss

    monkeypatch.setattr(objectives, "pixel_loss", sometimes)


def test_stop_names_step_loss_and_samples(tmp_path, monkeypatch):
    spoil(monkeypatch, 3)
    with pytest.raises(
        RunError, match=r"step 4: loss, loss/pixel/mse is not finite \(samples wave\d+, .*skip"
    ):
        train(run_config(tmp_path / "run"))
    assert sorted(checkpoints(tmp_path / "run")) == [2]
    assert events(tmp_path / "run") == ["stopped"]


def test_after_a_stop_the_same_command_ends_like_an_undisturbed_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RunError):
        spoil(patch, 3)
        train(run_config(tmp_path / "run"))
    train(run_config(tmp_path / "run"))
    train(run_config(tmp_path / "whole"))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_skip_leaves_out_the_step_and_what_the_codebook_learned_in_it(tmp_path, monkeypatch, capsys):
    seen = {}
    from vqcore import trainer

    real = trainer.train_step

    def watched(run, batches):
        before = [t.clone() for t in run.tokenizer.state_dict().values()]
        try:
            return real(run, batches)
        finally:
            after = run.tokenizer.state_dict().values()
            seen[run.step] = all(torch.equal(a, b) for a, b in zip(before, after))

    monkeypatch.setattr(trainer, "train_step", watched)
    spoil(monkeypatch, 3)
    run = train(run_config(tmp_path / "run", run__on_nonfinite="skip"))
    assert seen == {0: False, 1: False, 2: False, 3: True, 4: False, 5: False}
    assert run.progress.skipped == 1 and events(tmp_path / "run") == ["skipped"]
    assert "The step is left out." in capsys.readouterr().out
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-2])
    assert last["skipped_steps"] == 1


@pytest.mark.slow
def test_a_killed_run_with_a_skipped_step_ends_the_same(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, 1)
        train(run_config(tmp_path / "whole", run__on_nonfinite="skip", run__steps=6))
    with monkeypatch.context() as patch:
        spoil(patch, 1)
        train(run_config(tmp_path / "short", run__on_nonfinite="skip", run__steps=4, optim__horizon=6))
    lengthened = run_config(tmp_path / "short", run__on_nonfinite="skip", run__steps=6, optim__horizon=6)
    run = train(lengthened)
    assert run.progress.skipped == 1
    assert weights(tmp_path / "short") == weights(tmp_path / "whole")


def test_rollback_takes_other_samples_from_the_last_checkpoint_on(tmp_path, monkeypatch):
    keys = []
    from vqcore import trainer

    real = trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda run, b: keys.append((run.step, b[0].keys)) or real(run, b)
    )
    spoil(monkeypatch, 4)
    run = train(run_config(tmp_path / "run", run__on_nonfinite="rollback", run__steps=8))
    assert [step for step, _ in keys] == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert keys[4][1] != keys[5][1] and run.progress.offset == 1 and run.step == 8
    assert events(tmp_path / "run") == ["rolled back"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    state = json.loads((tmp_path / "run/checkpoints/step_8/state.json").read_text())
    assert state["offset"] == 1


@pytest.mark.parametrize("policy, spoiled, message", [
    ("rollback", (0,), "No checkpoint exists to roll back to"),
    ("rollback", range(4, 20), "has rolled back to step 4 3 times already"),
    ("skip", range(40), "20 steps before it were left out as well"),
])  # fmt: skip
def test_nothing_goes_on_in_circles(tmp_path, monkeypatch, policy, spoiled, message):
    spoil(monkeypatch, *spoiled)
    with pytest.raises(RunError, match=message):
        train(run_config(tmp_path / "run", run__on_nonfinite=policy, run__steps=60))


def test_a_gradient_above_the_limit_is_an_explosion(tmp_path, monkeypatch):
    spoil(monkeypatch, 3, value=1e6)
    config = {"optim__max_norm": 1e3, "run__on_nonfinite": "stop"}
    run = train(run_config(tmp_path / "run", **config))
    assert run.progress.skipped == 1
    spoil(monkeypatch, 3, value=1e6)
    with pytest.raises(RunError, match=r"the gradient norm of model, .*e\+0\d, is above optim.max_norm=1000"):
        train(run_config(tmp_path / "stops", **config, run__on_explosion="stop"))


def test_a_player_in_trouble_does_not_undo_the_one_before(tmp_path, monkeypatch):
    """The tokenizer's step stands when the discriminator's is left out."""
    from vqcore.registry import registry

    adversary = registry().load("objective", "toy/adversary")
    real = adversary.losses

    def broken(self, tokenizer, batch, *, player, step, rng, shared):
        out = real(self, tokenizer, batch, player=player, step=step, rng=rng, shared=shared)
        if player == "discriminator" and torch.is_grad_enabled():
            out.terms["gan/hinge"] *= float("nan")
        return out

    alone = train(run_config(tmp_path / "a", run__steps=1, objective={"name": "toy/adversary", "start": 9}))
    monkeypatch.setattr(adversary, "losses", broken)
    both = {"objective": {"name": "toy/adversary", "start": 0}, "run__on_nonfinite": "skip", "run__steps": 1}
    hurt = train(run_config(tmp_path / "b", **both))
    assert hurt.progress.skipped == 1
    assert torch.equal(alone.tokenizer.quantizer.embed, hurt.tokenizer.quantizer.embed)
    assert torch.equal(alone.tokenizer.proj.weight, hurt.tokenizer.proj.weight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_leaves(tmp_path, monkeypatch, capsys, number):
    from vqcore import trainer

    real = trainer.train_step

    def signalled(run, batches):
        if run.step == 2:
            os.kill(os.getpid(), number)
        return real(run, batches)

    train(run_config(tmp_path / "whole"))
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where the suite runs behind
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "train_step", signalled)
            run = train(run_config(tmp_path / "run"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    name = signal.Signals(number).name
    assert run.step == 3 and run.progress.stopped_by == name
    assert max(checkpoints(tmp_path / "run")) == 3
    assert f"stopped by {name} after step 3, which is saved" in capsys.readouterr().out
    train(run_config(tmp_path / "run"))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_the_exit_status_of_a_run_that_was_stopped(tmp_path, monkeypatch):
    import argparse

    from vqcore import trainer

    (tmp_path / "run.yaml").write_text(yaml.dump(run_tree(tmp_path / "run")))
    real = trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda r, b: os.kill(os.getpid(), signal.SIGTERM) or real(r, b)
    )
    args = argparse.Namespace(
        config=str(tmp_path / "run.yaml"), overrides=[], borrow=[], download=False, allow_pickle=False
    )
    assert train_command(args) == 128 + signal.SIGTERM


def test_signals_are_left_alone_outside_the_main_thread(tmp_path):
    done = []
    thread = threading.Thread(
        target=lambda: done.append(train(run_config(tmp_path / "run", run__steps=1)).step)
    )
    thread.start()
    thread.join()
    assert done == [1]


def test_saving_by_the_clock(tmp_path, monkeypatch):
    from vqcore import trainer

    real = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda r, b: time.sleep(0.1) or real(r, b))
    train(run_config(tmp_path / "run", run__save_every=1000, run__save_every_seconds=0.25, run__keep=9))
    saved = sorted(checkpoints(tmp_path / "run"))
    assert 2 <= len(saved) <= 6 and saved[-1] == 6 and saved[0] <= 3


def test_a_reading_process_that_dies_is_started_again(tmp_path, monkeypatch, caplog):
    from vqcore import trainer

    train(run_config(tmp_path / "whole"))
    real, killed = trainer.train_step, []

    def killing(run, batches):
        if run.step == 2 and not killed:
            import multiprocessing

            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
                killed.append(child.pid)
                child.join()
        return real(run, batches)

    monkeypatch.setattr(trainer, "train_step", killing)
    train(run_config(tmp_path / "run", data__workers=1, run__steps=6))
    assert len(killed) == 1
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert "a loader worker died" in caplog.text


@pytest.mark.slow
def test_reading_processes_that_always_die_end_the_run(tmp_path, monkeypatch):
    from vqcore.registry import registry

    waves = registry().load("data", "toy/waves")
    monkeypatch.setattr(waves, "get", lambda self, index, label="": os.kill(os.getpid(), signal.SIGKILL))
    config = run_config(tmp_path / "run", data__workers=1, data__evaluate=False)
    from toys import tokenizer_of

    from vqcore.assembly import open_data
    from vqcore.data.feed import Feed

    tokenizer = tokenizer_of(config)
    with (
        Feed(config, open_data(config, tokenizer.modality, {}, "train"), tokenizer.modality, {}) as feed,
        pytest.raises(DataError, match=r"step 1: loader workers died 3 times in a row .*data.workers"),
    ):
        feed.next(0)


def test_nothing_is_read_beyond_the_last_step(tmp_path, monkeypatch):
    from vqcore.data import batches

    asked = []
    read = batches._TrainSet.__getitem__
    monkeypatch.setattr(batches._TrainSet, "__getitem__", lambda self, at: asked.append(at) or read(self, at))
    train(run_config(tmp_path / "run", run__steps=13, run__save_every=13))
    once = [step for step in asked if asked.count(step) == 1]
    assert once == list(range(1, 13))  # the first was tried before the run as well


def test_a_file_that_vanishes_is_skipped_and_named(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for i in range(24):
        (tmp_path / "data").mkdir(exist_ok=True)
        np.save(tmp_path / f"data/{i:02}.npy", rng.uniform(-1, 1, (2, 8, 8)).astype(np.float32))
    config = run_config(
        tmp_path / "run",
        data={
            "name": "folder",
            "path": str(tmp_path / "data"),
            "modality": {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1]},
            "batch_size": 4,
            "workers": 0,
        },
        run__steps=7,
    )
    from vqcore import trainer

    real, patch = trainer.train_step, pytest.MonkeyPatch()
    gone = tmp_path / "data/07.npy"
    with patch.context() as inside:
        inside.setattr(trainer, "train_step", lambda r, b: gone.unlink(missing_ok=True) or real(r, b))
        run = train(config)
    assert run.step == 7
    assert "sample 07 is skipped" in caplog.text


class TestOptimizers:
    @pytest.mark.parametrize("name, args", [
        ("muon", {"fused": True}), *(pytest.param(*one, marks=pytest.mark.slow) for one in (
            ("adamw", {"fused": True}),
            ("sgd", {"momentum": 0.9}), ("adafactor", {}), ("nadam", {}), ("asgd", {}), ("rprop", {}), ("rmsprop", {}),
            ("muon", {}))),
    ])  # fmt: skip
    def test_any_of_them_trains_and_resumes_to_the_bit(self, tmp_path, name, args):
        changes = {"optim__name": name, "optim__args": args, "optim__horizon": 6}
        train(run_config(tmp_path / "whole", **changes))
        train(run_config(tmp_path / "parts", **changes, run__steps=2))
        train(run_config(tmp_path / "parts", **changes))
        assert weights(tmp_path / "parts") == weights(tmp_path / "whole")

    @pytest.mark.parametrize("changes, message", [
        ({"optim__name": "adamwx"}, r"optim.name: no optimizer 'adamwx'. Did you mean 'adamw'\?"),
        ({"optim__name": "lbfgs"}, r"lbfgs evaluates a step several times"),
        ({"optim__args": {"mometum": 0.9}, "optim__name": "sgd"}, r"argument 'mometum'. Did you mean 'momentum'\?"),
        ({"optim__name": "muon", "optim__args": {"rms": 0.0}}, r"optim.name=muon: rms=0.0 must be above 0"),
        ({"optim__name": "adamw", "optim__args": {"eps": "much"}}, r"optim.args.eps would do nothing; set optim.eps"),
        ({"optim__name": "adamw", "optim__args": {"maximize": 3, "foreach": True, "fused": True}}, r"optim.name=adamw"),
    ])  # fmt: skip
    def test_a_wrong_one_is_refused_before_anything_is_written(self, tmp_path, changes, message):
        with pytest.raises(ConfigError, match=message):
            train(run_config(tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

    def test_players_differ_where_the_config_says_so(self, tmp_path):
        own = {"discriminator": {"name": "sgd", "lr": 0.5, "warmup": 4, "clip": 0.001, "weight_decay": 0.0}}
        run = train(
            run_config(tmp_path / "run", objective={"name": "toy/adversary", "start": 0}, optim__players=own)
        )
        assert type(run.players["discriminator"].optimizer).__name__ == "SGD"
        assert type(run.players["model"].optimizer).__name__ == "AdamW"
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert [line["lr@discriminator"] for line in lines[:4]] == pytest.approx([0.125, 0.25, 0.375, 0.5])
        assert lines[0]["lr"] == pytest.approx(0.01)

    def test_settings_of_a_player_that_contradict_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"players.discriminator: give either lr or base_lr"):
            run_config(tmp_path, optim__players={"discriminator": {"lr": 1.0, "base_lr": 1.0}})

    def test_weight_decay_follows_half_a_cosine(self, tmp_path):
        from vqcore.run.optim import weight_decay
        from vqcore.schema import OptimSection

        cfg = OptimSection(lr=1.0, weight_decay=0.1, weight_decay_end=0.5)
        expected = [0.5 + (0.1 - 0.5) * 0.5 * (1 + np.cos(np.pi * t / 10)) for t in range(11)]
        assert [weight_decay(cfg, t, horizon=10) for t in range(11)] == pytest.approx(expected)
        run = train(run_config(tmp_path / "run", optim__weight_decay=0.1, optim__weight_decay_end=0.5))
        decays = [group["weight_decay"] for group in run.players["model"].optimizer.param_groups]
        assert decays == pytest.approx([weight_decay(cfg, 5, horizon=6), 0.0])

    def test_warmup_in_epochs(self, tmp_path):
        train(
            run_config(tmp_path / "run", optim__warmup_epochs=0.5)
        )  # half of 24 samples in batches of 4: 3 steps
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert [line["lr"] for line in lines[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])


class TestPrecision:
    def test_fp16_scales_the_loss_and_resumes_to_the_bit(self, tmp_path):
        changes = {"run__precision": "fp16", "optim__horizon": 6}
        train(run_config(tmp_path / "whole", **changes))
        train(run_config(tmp_path / "parts", **changes, run__steps=2))
        run = train(run_config(tmp_path / "parts", **changes))
        assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
        assert run.players["model"].scaler.is_enabled()
        line = json.loads((tmp_path / "parts/metrics.jsonl").read_text().splitlines()[0])
        assert line["loss_scale"] == 65536

    def test_fp16_that_overflows_halves_the_scale_and_goes_on(self, tmp_path, monkeypatch):
        spoil(monkeypatch, 0, value=1e38)
        run = train(run_config(tmp_path / "run", run__precision="fp16"))
        assert (
            run.step == 6 and run.progress.skipped == 0 and run.players["model"].scaler.get_scale() == 32768
        )

    @pytest.mark.slow
    def test_fp16_ends_near_fp32(self, tmp_path):
        single = train(run_config(tmp_path / "a", run__steps=20)).progress.evaluation["eval/loss"]
        half = train(run_config(tmp_path / "b", run__steps=20, run__precision="fp16")).progress.evaluation[
            "eval/loss"
        ]
        assert half == pytest.approx(single, rel=0.02)


@pytest.mark.slow
def test_samples_are_decoded_once_and_the_run_is_the_same(tmp_path, monkeypatch):
    from vqcore.registry import registry

    waves = registry().load("data", "toy/waves")
    real, reads = waves.get, []
    monkeypatch.setattr(waves, "get", lambda s, i, label="": reads.append((s.offset, i)) or real(s, i, label))
    train(run_config(tmp_path / "plain", run__steps=18))
    often = sum(offset == 0 for offset, _ in reads)
    reads.clear()
    train(run_config(tmp_path / "cached", run__steps=18, data__cache_mib=1))
    trained = [i for offset, i in reads if offset == 0]
    # The check before the first step reads a batch of 4, and k-means after the last one looks at up to 32 samples.
    assert often > 70 and len(trained) <= 24 + 4 + 32
    assert weights(tmp_path / "cached", 18) == weights(tmp_path / "plain", 18)


def test_the_cache_keeps_what_fits():
    from vqcore.data.cache import Cache

    cache, made = Cache(mib=2.0), []

    def make(key):
        made.append(key)
        return np.zeros(2**20, np.uint8)

    for _ in range(2):
        for key in range(3):
            cache.get(key, lambda key=key: make(key))
    assert made == [0, 1, 2, 2]


class TestCodebookHealth:
    def test_ages_and_dead_codes(self):
        from vqcore.evaluate.usage import CodeWindow

        window = CodeWindow(4, 1, window=4)
        for step, codes in enumerate([[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 0, 1]]):
            window.add(torch.tensor(codes).reshape(1, 2, 2, 1), step)
        figures = window.metrics(3)
        assert figures["codes/usage"] == 0.5 and figures["codes/dead_age"] == 2
        shares = np.array([0.75, 0.25])
        assert figures["codes/perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))

    def test_a_collapse_is_said_once_with_a_remedy_until_it_recovers(self):
        from vqcore.evaluate.usage import COLLAPSED, RECOVERED, CodeWindow

        window = CodeWindow(64, 1, window=256)
        for step in range(2):
            window.add(torch.zeros(1, 16, 16, 1, dtype=torch.int64), step)
        event, text = window.change(window.metrics(2))
        assert event == COLLAPSED and "collapsed: 1.6% of 64 codes" in text and "quant/fsq" in text
        assert window.change(window.metrics(2)) is None
        again = CodeWindow(64, 1, window=256)
        again.load_state(window.state())
        assert again.change(again.metrics(2)) is None  # a resumed run has said it already
        for one in (window, again):
            one.add(torch.arange(256).reshape(1, 16, 16, 1) % 64, 3)
            event, text = one.change(one.metrics(4))
            assert event == RECOVERED and "in use again: 100.0% of 64 codes" in text
            assert one.change(one.metrics(4)) is None
        window.add(torch.zeros(1, 16, 16, 1, dtype=torch.int64), 4)
        assert window.change(window.metrics(5))[0] == COLLAPSED

    def test_a_window_that_is_not_full_says_nothing(self):
        from vqcore.evaluate.usage import CodeWindow

        window = CodeWindow(64, 1, window=256)
        window.add(torch.zeros(1, 2, 2, 1, dtype=torch.int64))
        assert window.change(window.metrics(1)) is None

    def test_a_huge_codebook_costs_no_memory(self):
        from vqcore.evaluate.usage import CodeCounts, CodeWindow

        window = CodeWindow(2**31 - 1, 1, window=256)
        window.add(torch.tensor([5, 5, 2**31 - 2, 7]).reshape(1, 4, 1), 0)
        assert window.metrics(1)["codes/perplexity"] == pytest.approx(2 * np.sqrt(2))
        assert [counts.tolist() for counts in window.counts()] == [[2, 1, 1]]
        counts = CodeCounts(2**31 - 1, 2)
        for _ in range(2):
            counts.add(torch.tensor([[[0, 9]], [[2**31 - 2, 9]]]))
        assert counts.times[0].tolist() == [2, 2] and counts.times[1].tolist() == [4]
        assert counts.metrics()["codes/perplexity"] == pytest.approx(1.5)

    def test_metrics_have_them(self, tmp_path):
        train(run_config(tmp_path / "run"))
        line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
        assert {"codes/usage", "codes/perplexity", "codes/dead_age"} <= set(line)
