"""examples/refine.py against exhaustive search and its promises: never worse, no matter the batch, codes like any."""

import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys import run_config, tokenizer_of, toy  # noqa: F401

from vqcore.cli import main
from vqcore.errors import ConfigError
from vqcore.rng import generator
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
SCRIPT = Path(__file__).parents[1] / "examples" / "refine.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("example_refine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Overlapping(nn.Module):
    """Every token reaches into its neighbours' part, so that no token is best chosen alone."""

    def __init__(self, rank: int, channels: int):
        super().__init__()
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        self.conv = kind(3, channels, 8, stride=4, padding=2)
        nn.init.normal_(self.conv.weight, std=0.5, generator=generator(0, "overlap"))

    @property
    def last_layer(self):
        return self.conv.weight

    def forward(self, z_q):
        return self.conv(z_q.movedim(-1, 1)).tanh()


def overlapping(tmp_path, size=(16, 16), **changes) -> Tokenizer:
    tokenizer = tokenizer_of(run_config(tmp_path, data__modality__size=list(size), **changes)).eval()
    tokenizer.decoder = Overlapping(len(size), tokenizer.spec.out_channels)
    return tokenizer


def samples(count: int, *size: int) -> torch.Tensor:
    return torch.rand(count, 2, *size, generator=generator(0, "samples")) * 2 - 1


def errors(tokenizer: Tokenizer, x, codes) -> torch.Tensor:
    return (tokenizer.decode(codes) - x).square().flatten(1).mean(1)


@pytest.mark.parametrize("size", [(32,), (16, 24), (8, 16, 8)])
def test_no_sample_gets_worse_and_most_get_better(script, tmp_path, size):
    tokenizer, x = overlapping(tmp_path, size), samples(6, *size)
    plain = tokenizer.encode(x)
    before = errors(tokenizer, x, plain)
    after = errors(tokenizer, x, script.refine(tokenizer, x, plain, 2))
    assert (after <= before).all() and (after < 0.9 * before).sum() >= 4
    assert torch.equal(script.refine(tokenizer, x, plain, 0), plain)


def test_it_comes_near_the_best_of_all_codes(script, tmp_path):
    tokenizer, x = overlapping(tmp_path, (16,), model__quantizer__codebook_size=6), samples(12, 16)
    every = torch.tensor(list(product(range(6), repeat=4))).unsqueeze(-1)
    decoded = tokenizer.decode(every)
    best = torch.stack([(decoded - one).square().flatten(1).mean(1).min() for one in x])
    plain = tokenizer.encode(x)
    before = errors(tokenizer, x, plain)
    found = errors(tokenizer, x, script.refine(tokenizer, x, plain, 3))
    assert (found >= best - 1e-6).all()
    assert (found - best).mean() < 0.5 * (before - best).mean()


def test_the_step_needs_no_setting(script, tmp_path):
    """The scale of latents and output does not matter: the curvature takes it out."""
    tokenizer, x = overlapping(tmp_path), samples(4, 16, 16)
    start = tokenizer.encode(x)
    codes = script.refine(tokenizer, x, start, 1)
    tokenizer.quantizer.embed.mul_(10)
    with torch.no_grad():
        tokenizer.decoder.conv.weight.div_(10)
    assert (script.refine(tokenizer, x, start, 1) == codes).float().mean() > 0.95


def test_a_sample_does_not_depend_on_its_batch_and_nothing_learns(script, tmp_path):
    tokenizer, x = overlapping(tmp_path), samples(3, 16, 16)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    start = tokenizer.encode(x)
    together = script.refine(tokenizer, x, start, 1)
    for i in range(3):
        assert torch.equal(script.refine(tokenizer, x[i : i + 1], start[i : i + 1], 1), together[i : i + 1])
    with torch.inference_mode():
        assert torch.equal(script.refine(tokenizer, x + 0, start + 0, 1), together)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    assert all(p.grad is None for p in tokenizer.parameters())


@pytest.mark.parametrize("grid", [(7,), (4, 5), (1, 2), (2, 3, 4)])
def test_turns_visit_every_token_once_and_never_neighbours_together(script, grid):
    turns = list(script._turns(torch.Size(grid), len(grid), torch.device("cpu")))
    assert torch.equal(sum(turn.int() for turn in turns), torch.ones(grid, dtype=torch.int32))
    for turn in turns:
        places = turn.nonzero()
        apart = (places[:, None] - places[None]).abs().amax(-1)
        assert ((apart == 0) | (apart >= script.REACH)).all()


def test_tokens_without_a_place_move_alone(script):
    turns = list(script._turns(torch.Size((5,)), 2, torch.device("cpu")))
    assert len(turns) == 5 and all(turn.sum() == 1 for turn in turns)


@pytest.mark.parametrize("scaled", [None, [-1, 1]])
def test_the_script_on_a_trained_run(script, tmp_path, capsys, scaled):
    """A folder of files becomes codes that `vqcore decode` takes; every sample decodes at least as close."""
    modality = {"name": "array", "channels": 2, "size": [8, 8], "range": scaled}
    train(run_config(tmp_path / "run", data__modality=modality))
    files = tmp_path / "files" / "deep"
    files.mkdir(parents=True)
    for index, one in enumerate(samples(5, 16, 16)):
        np.save(files / f"f{index}.npy", one.numpy())
    words = [str(tmp_path / name) for name in ("run", "files", "better")]
    capsys.readouterr()
    script.main([*words, "--size", "16"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"5 written, 0 existed already, 0 unreadable: {tmp_path / 'better'}"
    kind = "mean squared error" if scaled is None else "PSNR"
    assert said[1].startswith(f"{kind} of 5 samples: ") and said[1].endswith("after 2 sweeps")
    before, after = (float(word) for word in said[1].replace(" dB", "").split() if "." in word)
    assert after < before if scaled is None else after > before

    tokenizer = Tokenizer.load(tmp_path / "run")
    assert (
        main(["tokenize", words[0], words[1], str(tmp_path / "plain"), "--size", "16", "--store", "folder"])
        == 0
    )
    manifests = [json.loads((tmp_path / name / "tokens.json").read_text()) for name in ("better", "plain")]
    assert manifests[0] == manifests[1]
    gained = 0
    for path in sorted(files.glob("*.npy")):
        x = tokenizer.read(path, (16, 16))
        found, plain = (np.load(tmp_path / name / "deep" / path.name) for name in ("better", "plain"))
        assert (found.dtype, found.shape) == (plain.dtype, plain.shape)
        better, worse = (
            errors(tokenizer, x, torch.from_numpy(each.astype(np.int64))[None]) for each in (found, plain)
        )
        assert better <= worse
        gained += int(better < worse)
    assert gained
    assert main(["decode", words[0], words[2], str(tmp_path / "rebuilt")]) == 0
    assert len(list((tmp_path / "rebuilt/deep").glob("*.npy"))) == 5
    script.main([*words, "--size", "16"])
    said = capsys.readouterr().out
    assert "0 written, 5 existed already" in said and "of 0 samples" not in said


def refused(script, capsys, *argv) -> str:
    with pytest.raises(SystemExit) as ended:
        script.main([str(word) for word in argv])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"data__modality": {"name": "array", "kind": "categorical", "labels": 3, "size": [8, 8]}},
            "its data are class maps",
        ),
        (
            {"model__decoder": {"name": "toy/denoiser"}, "objective": {"name": "toy/denoising"}},
            "its decoder 'toy/denoiser' is a denoiser",
        ),
    ],
)
def test_what_cannot_be_refined_is_refused_in_one_line(script, tmp_path, capsys, changes, says):
    tokenizer_of(run_config(tmp_path, **changes)).save(tmp_path / "made")
    error = refused(script, capsys, tmp_path / "made", tmp_path, tmp_path / "codes")
    assert error.startswith("error: the codes of this tokenizer cannot be refined: ") and says in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "codes").exists()


def test_an_objective_that_decodes_otherwise_is_refused(script, tmp_path, monkeypatch):
    tokenizer = overlapping(tmp_path)
    x = samples(1, 16, 16)
    codes, decode = tokenizer.encode(x), tokenizer.objective.decode
    monkeypatch.setattr(tokenizer.objective, "decode", lambda *args, **kwargs: 2 * decode(*args, **kwargs))
    with pytest.raises(ConfigError, match="objective 'reconstruction' does more to decode"):
        script.refine(tokenizer, x, codes, 1)


def test_wrong_words_are_named(script, tmp_path, capsys):
    assert "--sweeps 0: it must be at least 1" in refused(script, capsys, "a", "b", "c", "--sweeps", "0")
    assert "no such run or tokenizer" in refused(
        script, capsys, tmp_path / "none", tmp_path, tmp_path / "codes"
    )


@pytest.mark.slow
def test_the_script_explains_itself():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "python examples/refine.py RUN INPUT OUTPUT" in done.stdout
