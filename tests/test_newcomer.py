"""What a new user with new data sees: learning rates in numbers, explanations of sections, commands to copy."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.check.checks import cheap
from vqcore.cli import culprit, main
from vqcore.commands.show import sections
from vqcore.compose.build import from_tree
from vqcore.compose.describe import settings
from vqcore.compose.layers import load
from vqcore.errors import ConfigError, RunError, UnknownPlugin
from vqcore.evaluate.baseline import constant_of
from vqcore.evaluate.usage import WINDOW, CodeWindow, collapse, learns_codes, reachable
from vqcore.metrics.pixels import MAE, PSNR
from vqcore.protocols import Batch, DataSpec
from vqcore.registry import registry
from vqcore.run.optim import rate_in_words
from vqcore.run.state import build
from vqcore.schema import OptimSection, RunConfig, RunSection
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
MINE = """
import vqcore_toy.parts as parts
from vqcore.plugin import Component, Plugin, hookimpl

class Mine(parts.Encoder):
    broken = False

    def forward(self, x):
        if self.broken:
            return x.shape[0] / 0
        return super().forward(x)

@hookimpl
def vqcore_plugin():
    return Plugin(1, "mine", (Component("encoder", "mine", ":Mine", "my own"),))
"""


def written(directory, **changes):
    path = directory / "cfg.yaml"
    path.write_text(yaml.safe_dump(run_tree(directory / "run", **changes)))
    return str(path)


def mine(tmp_path, text=MINE):
    file = tmp_path / "my plugin.py"
    file.write_text(text)
    return file


# ------------------------------------------------------------------------------------------- the learning rate


def test_a_rate_in_numbers():
    assert rate_in_words(OptimSection(base_lr=1e-3), 16) == "lr 6.25e-05 = base_lr 0.001 x 16/256"
    assert rate_in_words(OptimSection(lr=0.02), 16) == "lr 0.02"


def test_check_and_train_say_the_rate(tmp_path, capsys):
    path = written(tmp_path, optim={"base_lr": 0.01})
    assert main(["check", path]) == 0
    assert "note      optim: lr 0.0001563 = base_lr 0.01 x 4/256\n" in capsys.readouterr().out
    assert main(["train", path]) == 0
    assert "run: 6 steps of 4 samples, lr 0.0001563 = base_lr 0.01 x 4/256\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("warmup", "says"),
    [
        (3, None),
        (4, "optim.warmup=4 of run.steps=6: more than half of the run is warm-up"),
        (
            6,
            "optim.warmup=6 of run.steps=6: the learning rate rises to the end of the run, to 0.01, and never falls",
        ),
        (
            12,
            "optim.warmup=12 of run.steps=6: the learning rate rises to the end of the run, to 0.005, and never falls",
        ),
    ],
)
def test_a_warmup_that_leaves_nothing(tmp_path, warmup, says):
    run = build(run_config(tmp_path / "run", optim__warmup=warmup), torch.device("cpu"))
    found = [f.what for f in cheap(run) if f.where == "optim" and f.grade == "warning"]
    assert found == ([says] if says else [])


# ------------------------------------------------------------------------------------------------------- show


@pytest.mark.parametrize("name", ["data", "model", "objective", "run", "optim", "ema", "eval"])
def test_every_section_of_a_config_is_shown(name, capsys):
    assert main(["show", name]) == 0
    shown = capsys.readouterr().out
    own = settings(sections()[name])
    assert own and all(f"  {s.name}: {s.type}, " in shown and s.text.split()[0] in shown for s in own)


def test_a_section_shows_its_name_and_what_nests_in_it(capsys):
    assert main(["show", "optim"]) == 0
    shown = capsys.readouterr().out
    assert (
        "  name: text, default adamw\n" in shown
        and "optim.players.NAME  Optimizer settings of a player" in shown
    )


def test_show_without_a_name_lists_what_there_is(capsys):
    assert main(["show"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("sections of a config: data, model, objective, run, optim, ema, eval\n")
    assert "toy/encoder" in shown and "folder" in shown
    assert main(["show", "emma"]) == 2
    assert capsys.readouterr().err == (
        "error: no component or section 'emma'. Did you mean 'ema'? List all names: vqcore show\n"
    )


# ------------------------------------------------------------------------------------- a plugin that is a file


@pytest.mark.slow
def test_commands_to_paste_carry_the_plugin_file(tmp_path, capsys):
    path, file = written(tmp_path, model__encoder={"name": "local/mine"}), str(mine(tmp_path))
    assert main(["check", path, "run.steps=4", "--plugin", file]) == 0
    assert f"next      vqcore train {path} run.steps=4 --plugin '{file}'\n" in capsys.readouterr().out
    assert main(["train", path, "--plugin", file]) == 0
    said = capsys.readouterr().out
    assert f"vqcore eval {tmp_path / 'run'} --plugin '{file}'\n" in said
    assert f"tokenize {tmp_path / 'run'} FOLDER tokens --plugin '{file}'\n" in said
    np.save(tmp_path / "one.npy", np.zeros((2, 8, 8), np.float32))
    words = [str(tmp_path / "run"), str(tmp_path / "one.npy"), str(tmp_path / "codes")]
    assert main(["tokenize", *words, "--plugin", file]) == 0
    assert f"rebuilt --plugin '{file}'\n" in capsys.readouterr().out


def test_python_reads_a_plugin_file_too(tmp_path):
    file = mine(tmp_path)
    registry().add_file(str(file))
    train(run_config(tmp_path / "run", run__steps=1, model__encoder={"name": "local/mine"}))
    registry.cache_clear()
    with pytest.raises(
        UnknownPlugin, match=r"registry\(\).add_file\('FILE'\).* came from .*my plugin.py \(SHA-256 "
    ):
        Tokenizer.load(tmp_path / "run")
    registry().add_file(str(file))
    registry().add_file(str(file))
    assert type(Tokenizer.load(tmp_path / "run").encoder).__name__ == "Mine"


def test_a_plugin_that_is_missing_is_named_with_its_distribution(tmp_path, monkeypatch, capsys):
    train(run_config(tmp_path / "run", run__steps=1))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("fixtures/toy")])
    registry.cache_clear()
    with pytest.raises(
        UnknownPlugin, match=r"no plugin 'toy'.* 'toy/\w+' came from vqcore-toy 0.0: install it"
    ):
        Tokenizer.load(tmp_path / "run")
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "came from vqcore-toy 0.0: install it" in capsys.readouterr().err


def test_a_bug_has_an_owner(tmp_path, capsys):
    path, file = written(tmp_path, model__encoder={"name": "local/mine"}), mine(tmp_path)
    file.write_text(MINE.replace("broken = False", "broken = True"))
    assert main(["train", path, "--plugin", str(file)]) == 1
    error = capsys.readouterr().err
    assert f"this is a bug of local/mine, which comes from {file}; report it" in error


def test_a_bug_that_libraries_meet_in_a_plugin_is_the_plugins(tmp_path):
    quantizer = build(run_config(tmp_path / "run"), torch.device("cpu")).tokenizer.quantizer
    with pytest.raises(RuntimeError) as raised:
        quantizer(torch.zeros(1, 2, 2, 7))  # torch raises it, in a matrix product
    assert culprit(raised.value) == "toy/quantizer, which comes from vqcore-toy 0.0"
    with pytest.raises(ZeroDivisionError) as ours:
        raise ZeroDivisionError
    assert culprit(ours.value) == "vqcore or a plugin"


# --------------------------------------------------------------------------------------------------- the run


def test_another_run_is_named_by_its_values(tmp_path):
    run = tmp_path / "run"
    train(run_config(run, run__steps=1))
    (tmp_path / "run-2").mkdir()
    with pytest.raises(RunError) as one:
        train(run_config(run, run__steps=1, optim__lr=0.02))
    assert str(one.value) == (
        f"run.dir={run} holds another run: optim.lr 0.01 there, 0.02 here. Choose another run.dir, e.g. "
        f"run.dir={tmp_path / 'run-3'}, or give the same settings as that run to resume it."
    )
    other = {"lr": 1.0, "eps": 1e-3, "warmup": 3, "min_lr": 0.1, "clip": 2.0, "accumulate": 2}
    with pytest.raises(RunError, match=r"optim.min_lr 0.0 there, 0.1 here; 1 more setting differs\. Choose"):
        train(run_config(run, run__steps=1, optim=other))


def test_a_window_says_what_it_holds(tmp_path, capsys):
    assert main(["train", written(tmp_path)]) == 0
    assert "by the last 96 training tokens" in capsys.readouterr().out  # 6 steps of 4 samples of 2 x 2
    window = CodeWindow(4, 1, window=8)
    window.add(torch.zeros(1, 3, 1, dtype=torch.int64))
    assert window.held == 3
    window.add(torch.zeros(1, 30, 1, dtype=torch.int64))
    assert window.held == 8


def filled(window, codes):
    codes = codes.reshape(1, -1, 1)
    for _ in range(5):
        window.add(codes)
    return (window.change(window.metrics(5)) or ("", ""))[1]


def test_implicit_codes_get_advice_of_their_own():
    one = torch.zeros(256, dtype=torch.int64)
    learned, implicit = (filled(CodeWindow(64, 1, window=256, learned=it), one) for it in (True, False))
    assert "dead-code replacement" in learned and "quant/fsq" in learned
    assert (
        "dead-code" not in implicit
        and "quant/fsq" not in implicit
        and "fewer codes (levels, bits)" in implicit
    )


def test_data_that_cannot_fill_a_codebook_are_no_collapse():
    few = torch.arange(256) % 5  # 5 of 64 codes
    assert filled(CodeWindow(64, 1, window=256), few) != ""
    assert filled(CodeWindow(64, 1, window=256, tokens=100), few) == ""
    assert filled(CodeWindow(64, 1, window=256, tokens=256), few) != ""


def test_nothing_is_called_collapsed_before_training_had_some_tokens_a_code():
    window = CodeWindow(64, 1, window=64)
    for step in range(4):
        window.add(torch.zeros(1, 64, 1, dtype=torch.int64), step)
        assert (window.change(window.metrics(step)) is not None) == (step == 3)


def test_a_window_remembers_how_much_it_took(tmp_path):
    window = CodeWindow(64, 1, window=64)
    window.add(torch.zeros(1, 200, 1, dtype=torch.int64))
    again = CodeWindow(64, 1, window=64)
    again.load_state(window.state())
    assert again.taken == 200 and again.held == 64


def test_the_run_knows_what_its_codes_are(tmp_path):
    run = build(run_config(tmp_path / "run"), torch.device("cpu"))
    assert learns_codes(run.tokenizer.quantizer) and run.window.learned
    assert run.window.tokens == 4 * len(run.data) and run.window.window == WINDOW


@pytest.mark.parametrize(
    ("perplexity", "samples", "says"),
    [
        (1.01, 100, "perplexity is 1.01, as of 1.01 evenly used codes; it could be 251"),
        (20.0, 100, ""),
        (1.01, 10, ""),
    ],
)
def test_an_evaluation_whose_codes_say_nothing(perplexity, samples, says):
    """400 tokens, drawn evenly from 512 codes, have a perplexity of 251 on average, and 40 tokens one of 38."""
    possible = reachable(samples * 4, 512)[1]
    figures = {"codes/perplexity": perplexity, "codes/perplexity_possible": possible}
    assert (says in collapse(figures)) if says else collapse(figures) == ""


@pytest.mark.slow
def test_eval_warns_of_collapsed_codes(tmp_path, monkeypatch, caplog):
    train(run_config(tmp_path / "run", run__steps=1, model__quantizer__codebook_size=512))
    monkeypatch.setattr("vqcore.evaluate.usage.EVEN", 1.0)
    with caplog.at_level("WARNING"):
        assert main(["eval", str(tmp_path / "run")]) == 0
    assert "the codes have collapsed" in caplog.text


# ---------------------------------------------------------------------------------------- something to compare


def test_the_constant_is_the_mean_over_valid_positions():
    rng = np.random.default_rng(0)
    parts = [torch.from_numpy(rng.uniform(-1, 1, (n, 2, 4, 4)).astype(np.float32)) for n in (3, 1)]
    masks = [torch.from_numpy(rng.random((n, 4, 4)) > 0.4) for n in (3, 1)]
    batches = [Batch(x.masked_fill(~m[:, None], torch.nan), ("k",) * len(x), m) for x, m in zip(parts, masks)]
    found = constant_of(batches, DataSpec(channels=2, size=(4, 4)))
    x, mask = torch.cat(parts).numpy(), torch.cat(masks).numpy()
    expected = [x[:, c][mask].mean() for c in range(2)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_constant_of_class_maps_is_the_most_frequent_class():
    spec = DataSpec(channels=1, size=(2, 2), kind="categorical", range=None, labels=3)
    mask = torch.tensor([[[True, True], [False, False]]])
    whole = Batch(torch.tensor([[[2, 2], [1, 0]]]), ("a",))
    masked = Batch(torch.tensor([[[1, 2], [1, 1]]]), ("b",), mask)
    assert constant_of([whole, masked], spec).tolist() == [0, 0, 1]
    assert constant_of([], spec) is None


def test_eval_says_what_a_constant_scores(tmp_path, capsys):
    train(run_config(tmp_path / "run"))  # 6 steps of 4 samples: each training sample once
    assert main(["eval", str(tmp_path / "run"), "--weights", "both", "eval.batch_size=3"]) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "run/eval.json").read_text())["results"]
    config = run_config(tmp_path / "run")
    run = build(config, torch.device("cpu"))
    train_x = torch.stack([torch.as_tensor(run.data.get(i)) for i in range(len(run.data))]).float()
    data = run.eval_data
    x = torch.stack([torch.as_tensor(data.get(i)) for i in range(len(data))]).float()
    mean = train_x.mean((0, 2, 3), keepdim=True).expand_as(x)
    spec = DataSpec(channels=2, size=(8, 8))
    for name, metric in {"psnr": PSNR(PSNR.Config(), spec=spec), "mae": MAE(MAE.Config(), spec=spec)}.items():
        expected = metric.summary(metric.measure(mean, x))[""]
        assert [r["baselines"]["constant"][f"metric/{name}"] for r in results] == pytest.approx(
            [expected] * 2, abs=1e-4
        )
    assert results[0]["baselines"]["k-means"]["error"] < results[0]["baselines"]["constant"]["error"]
    assert (
        shown.count("8x8 constant") == 1
        and shown.count("8x8 k-means") == 1
        and "  constant: predicts one value everywhere" in shown
    )


# ------------------------------------------------------------------------------------------------ the command line


def test_an_override_against_the_file_is_the_command_lines(tmp_path):
    path = written(tmp_path, optim={"base_lr": 1e-3})
    with pytest.raises(ConfigError) as raised:
        load(path, ["optim.lr=1e-3"], schema=RunConfig)
    assert str(raised.value) == (
        "command line: optim: give either lr or base_lr. "
        f"optim.base_lr comes from {path}; optim.base_lr=null removes this value."
    )
    assert load(path, ["optim.lr=1e-3", "optim.base_lr=null"], schema=RunConfig).config.optim.lr == 1e-3
    path = written(tmp_path, optim={"base_lr": 1e-3, "lr": 1e-3})
    with pytest.raises(ConfigError) as raised:
        load(path, ["run.steps=3"], schema=RunConfig)
    assert str(raised.value) == f"{path}: optim: give either lr or base_lr."


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    config = from_tree({"dir": "x", "steps": 1e4}, schema=RunSection)
    assert config.steps == 10_000 and type(config.steps) is int
    for bad in (1.5, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"is not an integer or null|must be a number from"):
            from_tree({"dir": "x", "steps": bad}, schema=RunSection)
    path = written(tmp_path)
    assert load(path, ["run.steps=1e4"], schema=RunConfig).config.run.steps == 10_000


def test_config_knows_optimizers(tmp_path, capsys):
    path = written(tmp_path)
    assert main(["config", path, "optim.name=adamx"]) == 2
    assert "error: command line: optim.name: no optimizer 'adamx'" in capsys.readouterr().err
    assert main(["config", path, "optim.players={d: {name: rprob}}"]) == 2
    assert "optim.players.d.name: no optimizer 'rprob'" in capsys.readouterr().err
    assert main(["config", path, "optim.name=radam"]) == 0


def test_a_far_id_is_no_suggestion(tmp_path, capsys):
    assert main(["config", written(tmp_path), "model.encoder.name=yot/encoder"]) == 2
    error = capsys.readouterr().err
    assert "no plugin 'yot'." in error and "Did you mean" not in error


def test_outputs_of_another_size_are_said_without_torchs_warning(tmp_path, capsys, recwarn):
    path = written(tmp_path, model__decoder={"name": "toy/decoder", "patch": 8})
    assert main(["train", path]) == 2
    error = capsys.readouterr().err
    assert "its output is (4, 2, 16, 16), but the data needs (4, 2, 8, 8)" in error
    assert "Using a target size" not in error and not recwarn.list


@pytest.mark.parametrize("store", ["arrow", "folder"])
def test_tokenizing_that_fails_leaves_nothing(tmp_path, capsys, store):
    train(run_config(tmp_path / "run", run__steps=1))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.npy").write_bytes(b"no array")
    words = ["tokenize", "--store", store, str(tmp_path / "run"), str(tmp_path / "in")]
    assert main([*words, str(tmp_path / "codes")]) == 2
    assert not (tmp_path / "codes").exists()
    (tmp_path / "mine").mkdir()
    assert main([*words, str(tmp_path / "mine")]) == 2
    assert list((tmp_path / "mine").iterdir()) == []
    if store == "arrow":
        return
    np.save(tmp_path / "in/b.npy", np.zeros((2, 8, 8), np.float32))
    assert main([*words, str(tmp_path / "codes")]) == 0
    (tmp_path / "in/b.npy").unlink()
    (tmp_path / "codes/b.npy").unlink()
    assert main([*words, str(tmp_path / "codes")]) == 2
    assert [p.name for p in (tmp_path / "codes").iterdir()] == ["tokens.json"]  # that was there before
