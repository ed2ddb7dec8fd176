"""Checks before a run: each mistake a user can make is found, named and given a remedy; nothing is written."""

import dataclasses
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.check.checks import cheap, first_batch, full
from vqcore.check.findings import Finding, settle
from vqcore.check.model import _learning, _still_parts, learns, memory_finding, model_findings, whole_step
from vqcore.check.plan import codebook
from vqcore.check.samples import samples
from vqcore.check.suspicions import value_findings
from vqcore.check.values import Declared
from vqcore.cli import main
from vqcore.errors import ConfigError
from vqcore.modalities.rgb import RGB
from vqcore.objectives import Reconstruction
from vqcore.protocols import Batch, DataSpec
from vqcore.rng import sample_generators
from vqcore.run.optim import peak_rate
from vqcore.run.state import build
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
CPU = torch.device("cpu")
M_MMAP_THRESHOLD = -3


def built(directory, **changes):
    return build(run_config(directory, **changes), CPU)


def graded(findings, grade):
    return [finding for finding in findings if finding.grade == grade]


def written(directory, **changes):
    path = directory / "cfg.yaml"
    path.write_text(yaml.safe_dump(run_tree(directory / "run", **changes)))
    return str(path)


def arrays(folder, *, scale=1.0, count=12, damaged=()):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        np.save(folder / f"s{i:02}.npy", (scale * rng.random((2, 8, 8))).astype(np.float32))
    for i in damaged:
        (folder / f"s{i:02}.npy").write_bytes(b"not an array")
    return {"name": "folder", "path": str(folder), "batch_size": 4, "workers": 0}


# ---------------------------------------------------------------------------------------------- the command


def test_a_good_config_has_no_errors_and_nothing_is_written(tmp_path, capsys):
    path = written(tmp_path)
    assert main(["check", path]) == 0
    said = capsys.readouterr().out
    assert "no errors, no warnings" in said
    assert said.splitlines()[-1] == f"next      vqcore train {path}"
    for fact in (
        "8 x 8 becomes 2 x 2 = 4 tokens of 4 bits (16 codes), 0.25 bits a pixel",
        "takes the loss",
    ):
        assert fact in said, fact
    assert [p.name for p in tmp_path.iterdir()] == ["cfg.yaml"]


def test_json_holds_every_finding(tmp_path, capsys):
    status = main(["check", "--json", written(tmp_path, objective__weights={"pixel/mes": 2.0})])
    report = json.loads(capsys.readouterr().out)
    assert status == 2 and report["error"] == 1
    (wrong,) = [f for f in report["findings"] if f["grade"] == "error"]
    assert wrong["where"] == "objective.weights" and wrong["what"].endswith("Did you mean 'pixel/mse'?")
    assert len(report["findings"]) == report["error"] + report["warning"] + report["note"]


def test_a_config_that_does_not_load_is_one_error(tmp_path, capsys):
    assert main(["check", written(tmp_path, model__encoder={"name": "toy/encodr"})]) == 2
    said = capsys.readouterr().out
    assert "model.encoder.name" in said and "Did you mean 'toy/encoder'?" in said and "1 error" in said


def test_all_that_is_wrong_is_said_at_once(tmp_path, capsys):
    data = {**arrays(tmp_path / "data"), "path": str(tmp_path / "dta"), "eval_path": "nowhere"}
    data["modality"] = {"name": "array", "channels": 2, "size": [8, 6], "range": [-1, 1]}
    assert main(["check", written(tmp_path, data=data)]) == 2
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error")]
    assert len(errors) == 3
    assert any("no multiple of the patch 4" in line for line in errors)
    assert any("Did you mean" in line and "dta" in line for line in errors)
    assert any("data.eval_path" in line for line in errors)


def test_a_folder_with_another_run_is_an_error(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    assert main(["check", written(tmp_path)]) == 2
    assert "run.dir: holds something else (thesis.txt)" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_run_that_was_begun_goes_on(tmp_path, capsys):
    train(run_config(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main(["check", written(tmp_path)]) == 0
    assert "run.dir: this run has checkpoints: it will resume after step 6" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


# ------------------------------------------------------------------------------------------------ the data


def test_bytes_where_a_unit_range_is_declared(tmp_path, capsys):
    data = {**arrays(tmp_path / "data", scale=255)}
    data["modality"] = {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1]}
    assert main(["check", written(tmp_path, data=data)]) == 2
    said = capsys.readouterr().out
    assert "12 of 12 samples that were tried cannot be read" in said
    assert "-> The files hold 0." in said and "set data.modality.range=[0,255]." in said


def test_where_nothing_can_be_read_it_is_the_config(tmp_path):
    data = arrays(tmp_path / "data")
    data["modality"] = {"name": "array", "channels": 3, "size": [8, 8], "range": [0, 1]}
    (wrong,) = graded(samples(built(tmp_path / "run", data=data)), "error")
    assert "12 of 12 samples that were tried cannot be read" in wrong.what
    assert "data.modality describes the files: vqcore show array" in wrong.remedy
    assert "Mend or remove" not in wrong.remedy


def test_unreadable_files_are_named(tmp_path):
    data = arrays(tmp_path / "data", count=20, damaged=(3,)) | {"max_bad_share": 0.1}
    data["modality"] = {"name": "array", "channels": 2, "size": [8, 8], "range": [0, 1]}
    found = list(samples(built(tmp_path / "run", data=data)))
    (warning,) = graded(found, "warning")
    assert "1 of 20 samples" in warning.what and "s03" in warning.what and not graded(found, "error")
    found = list(samples(built(tmp_path / "run", data={**data, "max_bad_share": 0.01})))
    assert "s03" in graded(found, "error")[0].what


class Nothing:
    """A data set that is not looked into."""

    def __len__(self):
        return 0

    def key(self, index):
        raise AssertionError

    def get(self, index, label=""):
        raise AssertionError


def suspicions(x, mask=None, range_=(-1.0, 1.0), **spec):
    spec = DataSpec(channels=x.shape[1], size=tuple(x.shape[2:]), range=range_, **spec)
    declared = Declared(RGB.Config(name="rgb"), spec, Nothing())
    return list(value_findings(declared, [Batch(x, ("k",) * len(x), mask)], "4 samples"))


def spoiled(index, value):
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("x", "grade", "says"),
    [
        (torch.rand(4, 3, 8, 8) * 255, "error", "but -1 to 1 is declared"),
        (torch.rand(4, 3, 8, 8), "warning", "never below 0"),
        (torch.rand(4, 3, 8, 8) * 0.01, "warning", "of the declared -1 to 1"),
        (spoiled((0, 1, 2, 3), torch.nan), "error", "channel 1 holds NaN or infinity"),
        (spoiled((2, 2, 0, 0), torch.inf), "error", "channel 2 holds NaN or infinity"),
        (spoiled((slice(None), 1), 0.5), "warning", "channel 1 never changes"),
        (torch.full((4, 3, 8, 8), 0.5), "error", "every value of a channel is the same"),
    ],
)
def test_suspicious_values(x, grade, says):
    found = [f.what for f in suspicions(x) if f.grade == grade]
    assert any(says in what for what in found), found


def test_values_that_are_as_declared_are_only_described():
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    (finding,) = suspicions(x)
    low, high = float(x.min()), float(x.max())
    assert finding.grade == "note" and f"values {low:.4g} to {high:.4g}" in finding.what


def test_masked_values_do_not_count():
    x, mask = spoiled((0, 0, 0, 0), torch.nan), torch.ones(4, 8, 8, dtype=torch.bool)
    mask[0, 0, 0] = False
    assert [f.grade for f in suspicions(x, mask)] == ["note"]
    nothing = suspicions(x, torch.zeros_like(mask))[0]
    assert nothing.grade == "error" and nothing.what == "4 samples: no position is valid"


def test_large_values_without_a_range():
    finding, _ = suspicions(torch.rand(4, 3, 8, 8) * 255, range_=None)
    assert finding.grade == "warning" and "no scale is declared" in finding.what
    assert [f.grade for f in suspicions(torch.randn(4, 3, 8, 8), range_=None)] == ["note"]


# ----------------------------------------------------------------------------------------------- the model


def test_a_misspelt_weight_is_refused_by_the_cheap_part(tmp_path):
    run = built(tmp_path / "run", objective__weights={"vq/comit": 2.0})
    with pytest.raises(
        ConfigError, match=r"objective.weights: no loss is called 'vq/comit'. Did you mean 'vq/commit'"
    ):
        settle(cheap(run))


def test_the_cheap_part_changes_nothing(tmp_path):
    run = built(tmp_path / "run")
    before = {key: value.clone() for key, value in run.tokenizer.state_dict().items()}
    chance = torch.get_rng_state()
    assert not graded(cheap(run), "error")
    assert torch.equal(chance, torch.get_rng_state()) and not (tmp_path / "run").exists()
    assert all(torch.equal(value, before[key]) for key, value in run.tokenizer.state_dict().items())


def test_warnings_are_said_and_the_first_error_raised(caplog):
    found = [Finding("warning", "a", "is odd."), Finding("error", "b", "is wrong.", "Mend it.")]
    with pytest.raises(ConfigError, match=r"^b: is wrong. Mend it. \(1 more"):
        settle([*found, found[1]])
    assert caplog.messages == ["warning: a: is odd."]


@pytest.mark.parametrize(
    "what, remedy, said",
    [
        ("is not finite", "Look there.", "a: is not finite. Look there."),
        ("is odd.", "Is it right?", "a: is odd. Is it right?"),
        ("no loss 'x'. Did you mean 'y'?", "There: y.", "a: no loss 'x'. Did you mean 'y'? There: y."),
        ("is a fact", "", "a: is a fact"),
    ],
)
def test_findings_and_remedies_are_sentences_of_their_own(what, remedy, said):
    assert str(Finding("warning", "a", what, remedy)) == said


def test_several_sizes_are_checked_at_the_largest(tmp_path):
    sizes = {"input_size": None, "input_size_min": 4, "input_size_max": 8, "resolution_step": 4}
    found = list(full(built(tmp_path / "run", **{f"data__{key}": value for key, value in sizes.items()})))
    assert not graded(found, "error")
    assert any("x (4, 2, 8, 8) ->" in finding.what for finding in found)


def test_a_decoder_of_another_scale(tmp_path):
    run = built(tmp_path / "run", model__decoder={"name": "toy/decoder", "patch": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about broadcasting
        (wrong,) = graded(cheap(run), "error")
    assert wrong.where == "model.decoder (toy/decoder)"
    assert "(4, 2, 4, 4), but the data needs (4, 2, 8, 8)" in wrong.what
    assert "x (4, 2, 8, 8) -> encoder (4, 2, 2, 6) -> proj (4, 2, 2, 3) -> codes (4, 2, 2, 1)" in wrong.what


def test_a_part_that_fails_is_named(tmp_path, monkeypatch):
    run = built(tmp_path / "run")
    run.tokenizer.proj = nn.Linear(7, 3)
    (wrong,) = graded(cheap(run), "error")
    assert (
        wrong.where == "model (proj)"
        and "RuntimeError" in wrong.what
        and "encoder (4, 2, 2, 6)" in wrong.remedy
    )


@pytest.mark.parametrize(("codes", "grade"), [(16, None), (17, "note"), (96, "note"), (97, "warning")])
def test_more_codes_than_tokens(tmp_path, codes, grade):
    """A step has 4 samples of 4 tokens, the set 24 samples."""
    run = built(tmp_path / "run", model__quantizer={"name": "toy/quantizer", "codebook_size": codes})
    assert [finding.grade for finding in codebook(run)] == ([grade] if grade else [])


def test_a_much_too_large_codebook(tmp_path):
    run = built(
        tmp_path / "run",
        model__quantizer={"name": "toy/quantizer", "codebook_size": 200},
        data__length=1000,
    )
    (finding,) = codebook(run)
    assert (
        finding.grade == "warning"
        and "200 codes and 16 tokens in a step: 13 steps are needed" in finding.what
    )
    implicit = built(tmp_path / "run", model__quantizer={"name": "quant/fsq", "levels": [8, 8, 8]})
    assert not list(codebook(implicit))


def test_one_step_lowers_the_loss(tmp_path):
    run = built(tmp_path / "run")
    (finding,) = learns(run, first_batch(run))
    assert finding.grade == "note" and "takes the loss from" in finding.what


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        (lambda loss, out: 2 * loss.detach() - loss, "objective", "The gradient does not lower the loss"),
        (lambda loss, out: loss.detach(), "objective", "depends on no trained parameter"),
    ],
    ids=["uphill", "detached"],
)
def test_a_loss_that_teaches_nothing(tmp_path, monkeypatch, change, where, says):
    real = Reconstruction.losses

    def losses(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        return replace(out, terms={name: change(term, out) for name, term in out.terms.items()})

    monkeypatch.setattr(Reconstruction, "losses", losses)
    run = built(tmp_path / "run")
    wrong = graded(learns(run, first_batch(run)), "error")[-1]
    assert wrong.where == where and says in str(wrong)


def test_a_part_without_gradient_is_named(tmp_path):
    run = built(tmp_path / "run", model__quantizer={"name": "toy/quantizer"})
    forward = run.tokenizer.encoder.forward
    run.tokenizer.encoder.forward = lambda x: forward(x).detach()
    wrong = graded(learns(run, first_batch(run)), "error")
    assert [finding.where for finding in wrong] == ["model.encoder"]


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_rate_that_is_far_too_high(tmp_path, warmup):
    """A loss that falls at a lower rate has a gradient: nothing is detached."""
    run = built(tmp_path / "run", optim__lr=1000.0, optim__warmup=warmup)
    (finding,) = learns(run, first_batch(run))
    assert finding.grade == "warning" and finding.where == "optim.lr"
    assert "Lower optim.lr, e.g. optim.lr=" in finding.remedy and "detach" not in str(finding)


@pytest.mark.parametrize(
    ("lr", "warmup", "losses", "grade", "says"),
    [
        ({"lr": 0.1}, 0, [0.9], "note", "takes the loss from 1 to 0.9 at a rate of 0.1"),
        (
            {"lr": 0.1},
            0,
            [3.0, 0.9],
            "warning",
            "Lower optim.lr, e.g. optim.lr=0.01, or begin with a warm-up",
        ),
        ({"lr": 0.1}, 3, [3.0, 0.9], "note", "the warm-up of 3 steps begins lower"),
        ({"lr": 0.1}, 3, [3.0, 2.0, 1.5, 0.9], "warning", "Lower optim.lr, e.g. optim.lr=0.0001."),
        (
            {"base_lr": 6.4},
            0,
            [3.0, 2.0, 1.5, 0.9],
            "warning",
            "Lower optim.base_lr, e.g. optim.base_lr=0.0064.",
        ),
        ({"lr": 0.1}, 3, [3.0, 2.0, 1.5, 1.2, 1.1, 1.0], "error", "at any rate: check detach()"),
    ],
)
def test_what_a_step_at_several_rates_says(tmp_path, lr, warmup, losses, grade, says):
    rates = {f"optim__{name}": value for name, value in ({"lr": None, "base_lr": None} | lr).items()}
    run = built(tmp_path / "run", optim__warmup=warmup, **rates)
    finding = _learning(run, peak_rate(run.config.optim, run.total_batch), 1.0, losses)
    assert finding.grade == grade and says in str(finding)


def test_players_and_denoisers_are_checked_too(tmp_path):
    for changes in (
        {"objective__name": "toy/adversary"},
        {"objective__name": "toy/denoising", "model__decoder": {"name": "toy/denoiser"}},
    ):
        found = list(full(built(tmp_path / "run", **changes)))
        assert not graded(found, "error"), graded(found, "error")


def test_a_last_layer_that_starts_at_zero_is_no_error(tmp_path, monkeypatch):
    """Before the first step it lets no gradient through to the parts before it; after the step it does."""
    from vqcore_toy.parts import Decoder

    made = Decoder.__init__

    def zero(self, *args, **wiring):
        made(self, *args, **wiring)
        torch.nn.init.zeros_(self.linear.weight)

    monkeypatch.setattr(Decoder, "__init__", zero)
    run = built(tmp_path / "run", objective__weights={"vq/commit": 0.0})
    batch = first_batch(run)
    total, _ = run.player("model").forward(batch, 0, sample_generators(batch.keys, 0), {})
    total.backward()
    assert "encoder" in _still_parts(run)  # so it is before the first step
    assert not [f for f in graded(learns(run, batch), "error") if "gives this part a gradient" in f.what]


def test_a_metric_in_units_needs_a_modality_with_units(tmp_path):
    changes = {
        "eval__metrics": {"far": {"name": "channels"}},
        "data__modality": {"name": "rgb"},
        "data__input_size": 8,
    }
    with pytest.raises(ConfigError, match=r"eval.metrics.far: this metric needs values in the units"):
        built(tmp_path / "run", **changes)


def test_a_default_that_its_own_type_forbids_is_found_before_anything_is_saved(tmp_path, monkeypatch):
    from vqcore_toy.parts import Encoder

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wrong(Encoder.Config):
        depth: int = "deep"
        """No number."""

    monkeypatch.setattr(Encoder, "Config", Wrong)
    with pytest.raises(ConfigError, match=r"cannot be read back: .*depth='deep' is not an integer"):
        train(run_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_memory_is_extrapolated_from_one_and_two_samples():
    """Held 10, one sample 30, two 50: 4 samples need 90 units."""
    unit = 2**20
    peaks = (30 * unit, 50 * unit)
    fits = memory_finding(4, 10 * unit, peaks, 200 * unit, "cuda:0")
    assert fits.grade == "note" and "needs about 90 MiB, 10 MiB of it" in fits.what and not fits.remedy
    tight = memory_finding(4, 10 * unit, peaks, 95 * unit, "cuda:0")
    assert tight.grade == "warning" and tight.remedy.startswith("Set data.batch_size=3 or less")
    over = memory_finding(4, 10 * unit, peaks, 60 * unit, "cuda:0")
    assert over.grade == "error" and over.remedy.startswith("Set data.batch_size=2 or less")
    assert memory_finding(4, 10 * unit, peaks, 11 * unit, "cuda:0").remedy == "Take a smaller model."


def test_a_player_whose_step_fails_is_named(tmp_path, monkeypatch):
    run = built(tmp_path / "run")
    monkeypatch.setattr("vqcore.check.model.train_step", lambda *given: _raise())
    (finding,) = whole_step(run, first_batch(run))
    assert finding.grade == "error" and "a training step fails: RuntimeError: no kernel" in finding.what


def _raise():
    raise RuntimeError("no kernel")


DIFFUSION = {
    "objective": {"name": "diffusion", "scheduler": {"name": "toy/ddpm"}},
    "model__decoder": {"name": "toy/own-size"},
}


def test_a_sample_that_cannot_be_decoded_is_found_before_the_first_step(tmp_path, monkeypatch):
    """The losses of a denoiser do not need what only decoding does."""
    import vqcore_toy.parts as parts

    run = built(tmp_path / "run", **DIFFUSION)
    batch = first_batch(run)
    assert not graded(model_findings(run, batch), "error")
    with monkeypatch.context() as patch:
        patch.setattr(parts.OwnSize, "from_target", lambda self, y, size: y)
        (finding,) = graded(model_findings(run, batch), "error")
        assert str(finding) == "objective: a decoded sample is (1, 2, 4, 4), but the data needs (1, 2, 8, 8)"
    monkeypatch.setattr(parts.Walk, "step", lambda *args: torch.ones(2) + torch.ones(3))
    (finding,) = graded(model_findings(run, batch), "error")
    assert str(finding).startswith("objective: decoding a sample of size [8, 8] fails: RuntimeError: ")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sampler_takes_all_its_steps_and_the_network_two_of_them(tmp_path, monkeypatch, guidance):
    import vqcore_toy.parts as parts

    run = built(tmp_path / "run", **DIFFUSION, eval__sampling={"steps": 20, "guidance": guidance})
    walks, worked = [], []
    step, forward = parts.Walk.step, parts.Denoiser.forward
    monkeypatch.setattr(parts.Walk, "step", lambda *args: walks.append(args) or step(*args))
    monkeypatch.setattr(parts.Denoiser, "forward", lambda *args: worked.append(args[1]) or forward(*args))
    batch = first_batch(run)
    assert not graded(model_findings(run, batch), "error")
    asked = 1 if guidance == 1 else 2  # with and without tokens, in one batch
    assert [len(x_t) for x_t in worked] == [len(batch.x), asked, asked] and len(walks) == 20
    codes = run.tokenizer.encode(batch.x)
    run.tokenizer.decode(codes, steps=20)
    assert len(worked) == 3 + 20


def test_a_sampling_option_out_of_range_is_found_before_the_first_step(tmp_path):
    run = built(tmp_path / "run", **DIFFUSION, eval__sampling={"steps": -1})
    (finding,) = graded(model_findings(run, first_batch(run)), "error")
    assert str(finding) == "eval.sampling: sampling option steps=-1 must be at least 1."
