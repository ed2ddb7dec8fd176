"""The loop on toy components: what it writes, that it can be killed, what it refuses. Equal means equal to the bit."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from toys import run_config, toy  # noqa: F401

from vqcore import dist
from vqcore.artefacts.folder import load_tensors
from vqcore.artefacts.resolve import best_step, checkpoints, resolve
from vqcore.compose.describe import dump
from vqcore.errors import CheckpointError, ConfigError, DataError, RunError
from vqcore.run.folder import check_folder
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
ADVERSARY = {"objective__name": "toy/adversary"}


class Killed(BaseException):
    """Stands for `kill -9`: nothing of ours catches it before the process would be gone."""


def weights(directory, step=6):
    return (directory / f"checkpoints/step_{step}/model.safetensors").read_bytes()


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def kill_at(monkeypatch, step):
    """The next run dies in the middle of this step."""
    import vqcore.trainer as trainer

    real = trainer.train_step

    def step_or_die(run, batches):
        if run.step == step:
            raise Killed
        return real(run, batches)

    monkeypatch.setattr(trainer, "train_step", step_or_die)


def train_killed(monkeypatch, config, *steps):
    for step in steps:
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                train(config)
    return train(config)


def test_a_run_writes_what_the_design_says(tmp_path):
    train(run_config(tmp_path / "run", run__steps=20, run__save_every=8, eval={"every": 10}))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "checkpoints", "samples"} <= names
    assert {16, 20} <= set(checkpoints(tmp_path / "run"))
    training = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 21))
    assert training[-1]["loss"] < 0.7 * training[0]["loss"]
    evaluated = [line for line in lines(tmp_path / "run") if "eval/metric/psnr" in line]
    assert [line["step"] for line in evaluated] == [10, 20]
    assert {"strip.png", "sheet.png", "step_10.png", "step_20.png"} == {
        path.name for path in (tmp_path / "run" / "samples").iterdir()
    }
    provenance = json.loads((tmp_path / "run/provenance.json").read_text())
    assert provenance["components"]["model.encoder"]["name"] == "toy/encoder"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param(ADVERSARY, id="adversary"),
        pytest.param(
            {"model__encoder": {"name": "toy/encoder", "dropout": 0.3}, "optim__accumulate": 2},
            id="dropout-accumulate",
            marks=pytest.mark.slow,
        ),
        pytest.param({"run__precision": "bf16", "ema": {"decay": None}}, id="bf16", marks=pytest.mark.slow),
        pytest.param(
            {
                "objective__name": "toy/denoising",
                "model__decoder": {"name": "toy/denoiser"},
                "data__workers": 1,
            },
            id="denoising-workers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"data__input_size_min": 4, "data__input_size_max": 8, "data__resolution_step": 4},
            id="multi-resolution",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, monkeypatch, changes):
    train(run_config(tmp_path / "whole", **changes))
    train_killed(monkeypatch, run_config(tmp_path / "killed", **changes), 1, 3, 5)
    whole, killed = (tmp_path / name / "checkpoints/step_6" for name in ("whole", "killed"))
    for name in (
        "model.safetensors",
        "state.safetensors",
        *(["ema.safetensors"] if "ema" not in changes else []),
    ):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_players_have_their_own_optimizers(tmp_path):
    run = train(run_config(tmp_path / "run", **ADVERSARY))
    assert set(run.players) == {"model", "discriminator"}
    steps = {name: int(next(iter(p.optimizer.state.values()))["step"]) for name, p in run.players.items()}
    assert steps == {"model": 6, "discriminator": 4}
    last = [line for line in lines(tmp_path / "run") if "loss" in line][-1]
    assert {
        "loss",
        "loss@discriminator",
        "loss/gan/hinge",
        "loss/gan/fool",
        "grad_norm@discriminator",
    } <= set(last)
    saved = load_tensors(tmp_path / "run/checkpoints/step_6/state.safetensors")
    assert "players/discriminator/module/weight" in saved
    assert not any("discriminator" in key for key in run.tokenizer.state_dict())


def test_only_the_tokenizer_at_play_moves_the_codebook(tmp_path):
    """The discriminator's turn runs the tokenizer in eval mode: one codebook update a step, as without it."""
    codebooks = []
    for name, changes in (("alone", {"objective__start": 100}), ("both", {"objective__start": 0})):
        config = run_config(
            tmp_path / name,
            run__steps=1,
            objective={"name": "toy/adversary", **{"start": changes["objective__start"]}},
        )
        codebooks.append(train(config).tokenizer.quantizer.embed)
    assert torch.equal(*codebooks)


@pytest.mark.slow
def test_accumulation_equals_the_larger_batch(tmp_path):
    still = {"name": "toy/quantizer", "rate": 0.0}  # a codebook that moves makes the second half another one
    one = train(run_config(tmp_path / "one", run__steps=1, data__batch_size=8, model__quantizer=still))
    two = train(run_config(tmp_path / "two", run__steps=1, optim__accumulate=2, model__quantizer=still))
    start = train(run_config(tmp_path / "zero", run__steps=1, optim__lr=1e-9)).tokenizer.decoder.linear.weight
    assert (start - one.tokenizer.decoder.linear.weight).abs().min() > 0.005
    a, b = one.tokenizer.decoder.linear.weight, two.tokenizer.decoder.linear.weight
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_hooks_hear_everything_in_order(tmp_path):
    from vqcore.registry import registry

    diary = registry().load("hook", "toy/diary")
    diary.entries.clear()
    train(run_config(tmp_path / "run", run__steps=2, run__save_every=1, hooks={"d": {"name": "toy/diary"}}))
    assert [entry[0] for entry in diary.entries] == [
        "started", "step", "saved", "step", "saved", "evaluated", "ended",
    ]  # fmt: skip
    assert diary.entries[-1] == ("ended", None)
    assert diary.entries[-3][2].endswith("step_2")


BEST = {"run__steps": 12, "run__save_every": 100, "run__keep": 1, "optim__lr": 1.0, "optim__horizon": 12}


def test_the_best_checkpoint_survives_and_is_what_a_run_means(tmp_path):
    config = run_config(tmp_path / "run", eval={"every": 3, "best": "loss/pixel/mse"}, **BEST)
    run = train(config)
    name = "eval/loss/pixel/mse"
    scores = {line["step"]: line[name] for line in lines(tmp_path / "run") if name in line}
    best = min(scores, key=lambda step: (scores[step], -step))
    assert best < 12, "the test is about a best checkpoint before the last"
    assert best_step(tmp_path / "run", "loss/pixel/mse") == best
    assert set(checkpoints(tmp_path / "run")) == {best, 12}
    assert run.progress.evaluation[name] == scores[12]
    assert f"step {best}, the best by loss/pixel/mse" in Tokenizer.load(tmp_path / "run").taken


def test_without_eval_best_the_last_checkpoint_counts(tmp_path):
    train(run_config(tmp_path / "run", eval={"every": 3}, **BEST))
    assert set(checkpoints(tmp_path / "run")) == {12}
    assert "step 12, the last checkpoint" in Tokenizer.load(tmp_path / "run").taken


@pytest.mark.slow
def test_another_best_is_sought_anew_from_the_step_where_it_was_named(tmp_path):
    train(run_config(tmp_path / "run", eval={"every": 3, "best": "loss/pixel/mse"}, **BEST))
    longer = {**BEST, "run__steps": 18}
    train(run_config(tmp_path / "run", eval={"every": 3, "best": "metric/mae"}, **longer))
    assert min(checkpoints(tmp_path / "run")) > 12


@pytest.mark.slow
def test_evaluation_files_that_are_gone_take_no_training_with_them(tmp_path, monkeypatch):
    """The checkpoint of a step is saved before the step is evaluated; the same command evaluates later."""
    from vqcore import trainer

    whole = train(run_config(tmp_path / "whole", eval={"every": 3}))
    real = trainer.evaluate_data

    def gone(*args, **kwargs):
        raise DataError("the files are gone")

    config = run_config(tmp_path / "run", eval={"every": 3})
    monkeypatch.setattr(trainer, "evaluate_data", gone)
    with pytest.raises(DataError, match="the files are gone"):
        train(config)
    assert set(checkpoints(tmp_path / "run")) == {2}
    monkeypatch.setattr(trainer, "evaluate_data", lambda *a, **k: gone() if k["step"] == 6 else real(*a, **k))
    with pytest.raises(DataError, match="the files are gone"):
        train(config)
    assert 6 in checkpoints(tmp_path / "run")
    monkeypatch.setattr(trainer, "evaluate_data", real)
    again = train(config)
    assert again.progress.evaluation == whole.progress.evaluation
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert (tmp_path / "run/checkpoints/step_6/eval.json").is_file()


def test_what_eval_best_cannot_be(tmp_path):
    for best, text in (
        ("loss", "the sum of all losses cannot choose a checkpoint"),
        ("metric/pnsr", "no metric and no loss has this name. Did you mean 'metric/psnr'"),
        ("loss/pixel/mes", "Did you mean 'loss/pixel/mse'"),
    ):
        with pytest.raises(ConfigError, match=text):
            train(run_config(tmp_path / "run", eval={"best": best}))
        assert not (tmp_path / "run").exists()
    with pytest.raises(
        ConfigError, match=r"eval\.best=metric/psnr is set, but there is nothing to evaluate on"
    ):
        train(run_config(tmp_path / "run", eval={"best": "metric/psnr"}, data__evaluate=False))


def test_evaluation_uses_the_running_average_and_load_gives_it(tmp_path):
    run = train(run_config(tmp_path / "run", ema={"decay": 0.9}))
    averaged, raw = Tokenizer.load(tmp_path / "run"), Tokenizer.load(tmp_path / "run", weights="model")
    torch.testing.assert_close(raw.proj.weight, run.tokenizer.proj.weight)
    assert torch.equal(averaged.proj.weight, run.ema.averages["proj.weight"])
    assert not torch.equal(averaged.proj.weight, raw.proj.weight)
    with pytest.raises(CheckpointError, match="has no running averages"):
        train(run_config(tmp_path / "plain", ema={"decay": None}))
        Tokenizer.load(tmp_path / "plain", weights="ema")


@pytest.mark.parametrize(
    "damage", ["flip", *(pytest.param(each, marks=pytest.mark.slow) for each in ("cut", "missing"))]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_end_is_the_same(tmp_path, monkeypatch, capsys, damage):
    train(run_config(tmp_path / "whole"))
    config = run_config(tmp_path / "hurt")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)
        train(config)
    path = tmp_path / "hurt/checkpoints/step_4/state.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "cut" else content[:-9] + b"?" + content[-8:])
    train(config)
    assert weights(tmp_path / "hurt") == weights(tmp_path / "whole")
    assert (tmp_path / "hurt/checkpoints/step_4.damaged1").is_dir()
    assert "Using the checkpoint before it" in capsys.readouterr().out


def test_without_an_intact_checkpoint_nothing_is_lost(tmp_path, monkeypatch):
    config = run_config(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        train(config)
    (tmp_path / "run/checkpoints/step_2/model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="No intact checkpoint is left"):
        train(config)
    assert (tmp_path / "run/checkpoints/step_2").is_dir()


def test_killed_while_saving(tmp_path, monkeypatch):
    train(run_config(tmp_path / "whole"))
    config = run_config(tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("vqcore.files._rename_folder", lambda *paths: (_ for _ in ()).throw(Killed))
        train(config)
    half = tmp_path / "killed/checkpoints/.0123abcd.incomplete"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    train(config)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert not half.exists()


def test_a_run_may_be_lengthened_but_not_changed(tmp_path):
    train(run_config(tmp_path / "run", run__steps=4, optim__horizon=8))
    train(
        run_config(
            tmp_path / "run", run__steps=8, optim__horizon=8, run__keep=5, data__workers=1, eval={"every": 4}
        )
    )
    train(run_config(tmp_path / "whole", run__steps=8, optim__horizon=8))
    assert weights(tmp_path / "run", 8) == weights(tmp_path / "whole", 8)
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["run"]["steps"] == 8
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    changed = run_config(tmp_path / "run", run__steps=8, optim__horizon=8, optim__lr=0.02, data__batch_size=5)
    differ = r"holds another run: data.batch_size 4 there, 5 here; optim.lr 0.01 there, 0.02 here\. .*run-2"
    with pytest.raises(RunError, match=differ):
        train(changed)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_finished_run_says_so(tmp_path, capsys):
    config = run_config(tmp_path / "run")
    train(config)
    capsys.readouterr()
    train(config)
    assert "finished already (6 of 6 steps)" in capsys.readouterr().out


def test_epochs_count_samples(tmp_path):
    config = run_config(tmp_path / "run", run__steps=None, run__epochs=1.5)
    assert train(config).step == 9  # 24 samples in batches of 4


def test_a_weight_without_a_loss_is_refused_before_anything_is_written(tmp_path):
    config = run_config(tmp_path / "run", objective={"name": "reconstruction", "weights": {"pixel/mes": 2.0}})
    with pytest.raises(ConfigError, match=r"no loss is called 'pixel/mes'. Did you mean 'pixel/mse'\?"):
        train(config)
    config = run_config(
        tmp_path / "run", objective={"name": "reconstruction", "weights": {"pixel/mse": 0, "vq/commit": 0}}
    )
    with pytest.raises(ConfigError, match=r"at step 0 every loss has weight 0, so nothing is learned"):
        train(config)
    assert not (tmp_path / "run").exists()
    train(run_config(tmp_path / "zero", objective={"name": "reconstruction", "weights": {"gan/fool": 0}}))


def test_weights_multiply(tmp_path):
    config = run_config(
        tmp_path / "run", objective={"name": "reconstruction", "weights": {"vq/commit": 0.25}}
    )
    train(config)
    line = lines(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(line["loss/pixel/mse"] + 0.25 * line["loss/vq/commit"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_there_is(tmp_path, monkeypatch):
    config = run_config(tmp_path / "run")
    from vqcore import objectives

    real, calls = objectives.pixel_loss, []

    def sometimes(*given, **options):
        calls.append(0)
        return real(*given, **options) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(objectives, "pixel_loss", sometimes)
    with pytest.raises(RunError, match=r"step 4: .*pixel/mse.* not finite \(samples wave"):
        train(config)
    assert sorted(checkpoints(tmp_path / "run")) == [2]


def test_evaluation_needs_data(tmp_path):
    waves = run_config(tmp_path / "run").data
    assert waves.name == "toy/waves"
    config = run_config(tmp_path / "run", data__evaluate=False, eval={"every": 2})
    with pytest.raises(DataError, match=r"Set data\.eval_share=0\.1 or data\.eval_path"):
        train(config)
    run = train(run_config(tmp_path / "none", data__evaluate=False))
    assert run.progress.evaluation == {} and resolve(tmp_path / "none").path.name == "step_6"


def test_a_size_the_encoder_cannot_take_is_refused_first(tmp_path):
    with pytest.raises(ConfigError, match=r"model.encoder \(toy/encoder\): size \[10, 10\] is no multiple"):
        train(run_config(tmp_path / "run", data__input_size=10))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"holds something else \(thesis.tex\)"):
        train(run_config(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file, not a folder"):
        train(run_config(tmp_path / "file"))
    with pytest.raises(RunError, match="cannot be written"):
        train(run_config(tmp_path / "file" / "below"))


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    config = run_config(tmp_path / "run")
    (tmp_path / "run").mkdir()
    code = "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); print('held',flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run/.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another process is training"):
            train(config)
    finally:
        other.communicate(b"\n")
    train(config)


def test_a_run_that_died_while_it_made_its_folder_begins_anew(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / ".0123abcd.incomplete.yaml").write_text("run: {st")
    check_folder(run_config(folder))
    assert train(run_config(folder)).step == 6


@pytest.mark.slow
def test_a_setting_with_a_dollar_sign_does_not_look_like_a_change(tmp_path):
    config = run_config(tmp_path / "run", data__note="a\\${b}")
    assert config.data.note == "a${b}"
    train(config)
    assert train(config).step == 6


def test_training_sizes_are_checked_first(tmp_path):
    sizes = {"data__input_size_min": 8, "data__input_size_max": 16, "data__resolution_step": 2}
    with pytest.raises(ConfigError, match=r"size \[10, 10\] is no multiple"):
        train(run_config(tmp_path / "run", **sizes))
    assert not (tmp_path / "run").exists()


def test_metrics_hooks_and_extras_are_built_before_anything_is_written(tmp_path):
    ranged = {"name": "array", "channels": 2, "size": [8, 8]}
    with pytest.raises(ConfigError, match=r"eval.metrics.p \(psnr\): psnr needs data with a declared range"):
        train(run_config(tmp_path / "run", data__modality=ranged, eval={"metrics": {"p": {"name": "psnr"}}}))
    assert not (tmp_path / "run").exists()


def test_averages_are_what_is_evaluated_whoever_played_last(tmp_path):
    """The discriminator plays after the tokenizer; the evaluation must still see the running averages."""
    run = train(
        run_config(tmp_path / "run", objective={"name": "toy/adversary", "start": 0}, ema={"decay": 0.9})
    )
    raw = run.tokenizer.proj.weight.detach().clone()
    with run.as_evaluated():
        assert torch.equal(run.tokenizer.proj.weight, run.ema.averages["proj.weight"])
        assert not torch.equal(run.tokenizer.proj.weight, raw)
    assert torch.equal(run.tokenizer.proj.weight, raw)
    assert all(p.requires_grad for p in run.tokenizer.parameters())


def test_the_recorded_fingerprint_is_that_of_the_tokenizer_one_loads(tmp_path):
    train(run_config(tmp_path / "run", ema={"decay": 0.9}))
    recorded = json.loads((tmp_path / "run/checkpoints/step_6/provenance.json").read_text())["fingerprint"]
    assert recorded == Tokenizer.load(tmp_path / "run").fingerprint
    assert recorded != Tokenizer.load(tmp_path / "run", weights="model").fingerprint


def test_figures_of_a_step_are_means_over_its_batches_and_over_steps_that_have_them(tmp_path):
    config = run_config(
        tmp_path / "run", run__steps=2, run__log_every=2, objective={"name": "toy/adversary", "start": 1}
    )
    train(config)
    line = lines(tmp_path / "run")[0]
    assert line["loss@discriminator"] == pytest.approx(
        line["loss/gan/hinge"], rel=1e-6
    )  # one step of two had it
    still = {"name": "toy/quantizer", "rate": 0.0}
    train(run_config(tmp_path / "one", run__steps=1, data__batch_size=8, model__quantizer=still))
    train(run_config(tmp_path / "two", run__steps=1, optim__accumulate=2, model__quantizer=still))
    assert lines(tmp_path / "one")[0]["loss/pixel/mse"] == pytest.approx(
        lines(tmp_path / "two")[0]["loss/pixel/mse"], rel=1e-5
    )


@pytest.mark.slow
def test_players_weights_follow_from_the_seed_and_nothing_else(tmp_path):
    first = []
    for name, seed, noise in (("a", 1, 5), ("b", 1, 6), ("c", 2, 5)):
        torch.manual_seed(noise)
        config = run_config(
            tmp_path / name, run__steps=1, run__seed=seed, objective={"name": "toy/adversary", "start": 9}
        )
        first.append(train(config).objective.discriminator.weight)
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


@pytest.mark.slow
def test_half_a_picture_does_not_stop_a_run(tmp_path):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    config = run_config(tmp_path / "run", run__steps=10)
    (tmp_path / "run" / "samples" / "step_10.png").write_bytes(b"half")
    (tmp_path / "run" / "config.yaml").write_text(dump(config))
    assert train(config).step == 10


def test_evaluation_without_a_readable_sample_says_so(tmp_path):
    from vqcore.evaluate.measure import evaluate

    run = train(run_config(tmp_path / "run", run__steps=1))
    with pytest.raises(DataError, match="no sample could be read for evaluation"):
        evaluate(run.tokenizer.eval(), [], {}, size=(8, 8), weights=lambda name, step: 1.0, seed=0, step=0)


@pytest.mark.parametrize("error", [KeyError("a bug"), ConfigError("a mistake")])
def test_what_goes_wrong_together_is_raised_as_it_is(monkeypatch, error):
    told = []
    monkeypatch.setattr("vqcore.dist.gathered", lambda own: told.append(own) or [own])
    with pytest.raises(type(error)) as caught, dist.together():
        raise error
    assert caught.value is error
    assert "a bug" in str(told[0]) or told[0] is error  # the others hear of it, and wait for nobody
