"""Sampling options: what an objective offers, what users may write, and what every way to decode does with it."""

from typing import Annotated, Any, Literal

import pytest
import torch
import yaml
from toys import run_config, run_tree, tokenizer_of, toy  # noqa: F401

from vqcore.cli import main
from vqcore.commands import show
from vqcore.errors import ConfigError
from vqcore.objectives import Reconstruction
from vqcore.sampling import UNSTATED, Option, options, resolved

pytestmark = pytest.mark.usefixtures("toy")
DIFFUSION = {
    "model__decoder": {"name": "toy/denoiser"},
    "objective": {"name": "diffusion", "scheduler": {"name": "toy/ddpm"}},
}


class Offering:
    """Its `decode` has options of every type."""

    def decode(
        self,
        tokenizer: Any,
        codes: Any,
        *,
        size: Any,
        rng: Any,
        extras: Any = None,
        steps: Annotated[int, "Steps of the sampler."] = 25,
        guidance: Annotated[float | None, "How much the tokens count."] = None,
        spacing: Annotated[Literal["even", "late"], "Where the steps lie."] = "even",
        clip: Annotated[bool, "Stay in the range?"] = True,
    ) -> None: ...


class Postponed:
    """As a module with postponed annotations has it."""

    def decode(self, tokenizer, codes, *, size, rng, extras=None, steps: "Annotated[int, 'Steps.']" = 3): ...


class Careless:
    def decode(self, tokenizer, codes, *, size, rng, extras=None, steps, **more): ...


def test_options_are_the_keyword_only_parameters_of_decode():
    assert options(Offering) == [
        Option("steps", int, 25, "Steps of the sampler."),
        Option("guidance", float | None, None, "How much the tokens count."),
        Option("spacing", Literal["even", "late"], "even", "Where the steps lie."),
        Option("clip", bool, True, "Stay in the range?"),
    ]
    assert options(Postponed) == [Option("steps", int, 3, "Steps.")]
    assert options(Careless) == [Option("steps", UNSTATED, UNSTATED, "")]
    assert options(Reconstruction) == []


def test_an_incomplete_objective_can_be_shown(capsys):
    show._sampling(Careless)
    assert "  steps: of no stated type, required\n" in capsys.readouterr().out


def test_options_are_resolved_like_settings():
    assert resolved(Offering, {}, "x") == {"steps": 25, "guidance": None, "spacing": "even", "clip": True}
    chosen = resolved(Offering, {"steps": 1e1, "guidance": 2, "spacing": "late", "clip": "false"}, "x")
    assert chosen == {"steps": 10, "guidance": 2.0, "spacing": "late", "clip": False}
    assert [type(value) for value in chosen.values()] == [int, float, str, bool]


@pytest.mark.parametrize(
    ("cls", "given", "text"),
    [
        (Offering, {"stepps": 5}, "x: stepps is not a sampling option of this objective. Did you mean 'steps'?"),
        (Offering, {"q": 5}, "option of this objective. Options: steps, guidance, spacing, clip."),
        (Offering, {"rng": 5}, "x: rng is not a sampling option"),
        (Offering, {"steps": 2.5}, "x: steps=2.5 is not an integer."),
        (Offering, {"steps": None}, "x: steps=null is not an integer."),
        (Offering, {"guidance": "high"}, "x: guidance='high' is not a number or null."),
        (Offering, {"spacing": "lat"}, "x: spacing='lat' is not one of even, late."),
        (Offering, {"clip": 2}, "x: clip=2 is not true or false."),
        (Reconstruction, {"steps": 5}, "x: steps: this objective has no sampling options."),
        (Careless, {}, "x: steps is required"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(cls, given, text):
    with pytest.raises(ConfigError) as raised:
        resolved(cls, given, "x")
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_the_tokenizer_takes_options_and_gives_every_sample_noise_of_its_own(tmp_path):
    tokenizer = tokenizer_of(run_config(tmp_path, **DIFFUSION)).eval()
    codes = tokenizer.encode(torch.randn(1, 2, 8, 8)).repeat(3, 1, 1, 1)
    first = tokenizer.decode(codes, steps=3)
    assert torch.equal(first, tokenizer.decode(codes, steps=3, seed=0))
    assert not torch.equal(first[0], first[1])  # equal codes, other noise
    torch.testing.assert_close(tokenizer.decode(codes[:2], steps=3), first[:2])
    assert not torch.equal(first, tokenizer.decode(codes, steps=3, seed=1))
    assert not torch.equal(first, tokenizer.decode(codes, steps=4))
    x = torch.randn(2, 2, 8, 8)
    again = tokenizer.decode(tokenizer.encode(x), seed=5, steps=2, guidance=3)
    assert torch.equal(tokenizer.reconstruct(x, seed=5, steps=2, guidance=3.0), again)
    with pytest.raises(ConfigError, match=r"decode: step is not a sampling option .* Did you mean 'steps'"):
        tokenizer.decode(codes, step=3)
    with pytest.raises(ConfigError, match=r"^sampling option steps=0 must be at least 1\.$"):
        tokenizer.decode(codes, steps=0)
    plain = tokenizer_of(run_config(tmp_path))
    with pytest.raises(ConfigError, match="decode: steps: this objective has no sampling options"):
        plain.decode(codes, steps=3)


def test_show_lists_the_options_of_an_objective(capsys):
    assert main(["show", "diffusion"]) == 0
    shown = capsys.readouterr().out
    listed = shown.partition("sampling options, for `vqcore decode RUN TOKENS OUT option=value`")[2]
    assert "  steps: an integer, default 25\n      Steps of the sampler;" in listed
    assert "  guidance: a number, default 1.0\n" in listed
    assert main(["show", "reconstruction"]) == 0
    assert "sampling options" not in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ("{stepps: 5}", "eval.sampling: stepps is not a sampling option of this objective. Did you mean 'steps'?"),
        ("{steps: many}", "eval.sampling: steps='many' is not an integer."),
        ("{steps: 0}", "eval.sampling: sampling option steps=0 must be at least 1."),
        ("{steps: [5]}", "command line: eval.sampling.steps="),
    ],
)  # fmt: skip
def test_a_wrong_eval_sampling_ends_before_the_first_step(tmp_path, capsys, verb, sampling, text):
    file = tmp_path / "cfg.yaml"
    file.write_text(yaml.dump(run_tree(tmp_path / "run", **DIFFUSION)))
    assert main([verb, str(file), f"eval.sampling={sampling}"]) == 2
    said = capsys.readouterr()
    assert text in said.out + said.err
    assert not (tmp_path / "run").exists()


def test_eval_sampling_of_a_plain_decoder_is_an_error(tmp_path, capsys):
    file = tmp_path / "cfg.yaml"
    file.write_text(yaml.dump(run_tree(tmp_path / "run")))
    assert main(["train", str(file), "eval.sampling={steps: 5}"]) == 2
    assert "eval.sampling: steps: this objective has no sampling options." in capsys.readouterr().err
