"""Real perceptual losses and an adversary under the objective `diffusion`: what they see, what they move, resuming."""

import pytest
import torch
from test_players import same_end
from test_trainer import train_killed
from toys import run_config, toy  # noqa: F401

from vqcore.data.feed import Feed
from vqcore.diffusion import x_0
from vqcore.run.state import build
from vqcore.run.step import train_step
from vqcore.trainer import train

for plugin in ("vqcore_unet", "vqcore_percept", "timm", "torchvision"):
    pytest.importorskip(plugin)
pytestmark = [
    pytest.mark.usefixtures("toy"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
]
SCHEDULERS = {
    "flow": {"name": "unet/flow"},
    "sample": {"name": "unet/ddpm", "prediction": "sample"},
    "v": {"name": "unet/ddpm"},
}
LPIPS = {"name": "percept/lpips", "net": "squeeze", "weights": "random"}
TIMM = {
    "name": "percept/timm",
    "model": "test_vit",
    "blocks": ["blocks.0"],
    "weights": "random",
    "resize": False,
}


def settings(kind, **objective):
    """A tiny U-Net in channels_last, which both judge, an optimizer that is fused, and code dropout."""
    array = {"name": "array", "channels": 3, "size": [32, 32], "range": [-1, 1]}
    net = {"name": "unet/unet", "patch_size": 2, "width": 8, "mult": [1, 2], "depth": 1, "norm_groups": 4}
    rival = {"name": "percept/patchgan", "width": 4, "depth": 1}
    return {
        "data__modality": array,
        "data__channels": 3,
        "data__shape": (32, 32),
        "data__batch_size": 2,
        "model__decoder": {**net, "attention": []},
        "objective": {
            "name": "diffusion",
            "scheduler": SCHEDULERS[kind],
            "cls_free_guidance_dropout": 0.3,
            "percept": {"lpips": LPIPS},
            "adversary": {"name": "percept/gan", "discriminator": rival, "start": 2, "lecam": 0.01},
            "weights": {"gan/generator": 0.1, "percept/lpips": 0.1},
            **objective,
        },
        "optim__args": {"fused": True},
        "eval": {"sampling": {"steps": 2}},
    }


class Watched:
    """A run, what its parts were asked in one step, and which of its parts that step moved."""

    def __init__(self, config, monkeypatch, step):
        run = build(config, torch.device("cpu"))
        objective, self.scheduler, self.calls = run.objective, run.objective.scheduler, {}
        parts = {
            "decoder": (run.tokenizer.decoder, "forward"),
            **{f"percept/{label}": (one, "forward") for label, one in objective.percept.items()},
            "generator": (objective.adversary, "generator"),
            "discriminator": (objective.adversary, "discriminator"),
        }
        for name, (owner, method) in parts.items():
            monkeypatch.setattr(owner, method, self.kept(name, getattr(owner, method)))
        modules = {"model": run.tokenizer, "adversary": objective.adversary, "percept": objective.percept}
        before = {name: self.numbers(module) for name, module in modules.items()}
        run.progress.step = step
        with Feed(config, run.data, run.tokenizer.modality, run.extra, run.steps) as feed:
            train_step(run, feed.next(step))
        self.moved = {
            name: {key for key, value in self.numbers(module).items() if not value.equal(before[name][key])}
            for name, module in modules.items()
        }

    def kept(self, name, method):
        def called(*args, **kwargs):
            found = method(*args, **kwargs)
            assert name not in self.calls, f"{name} is asked twice"
            self.calls[name] = (*args, found)
            return found

        return called

    @staticmethod
    def numbers(module):
        return {key: value.detach().clone() for key, value in module.named_parameters()}


@pytest.mark.parametrize(
    "kind", ["v", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("flow", "sample"))]
)
def test_judges_see_the_sample_that_one_prediction_stands_for(kind, tmp_path, monkeypatch):
    """One pass of the decoder serves the model's turn and the rival's."""
    seen = Watched(run_config(tmp_path / "run", **settings(kind)), monkeypatch, step=2)
    x_t, t, _, prediction = seen.calls["decoder"]
    wanted = x_0(seen.scheduler, prediction.float(), x_t, t)
    for judge in ("percept/lpips", "generator", "discriminator"):
        torch.testing.assert_close(seen.calls[judge][0], wanted, rtol=1e-5, atol=1e-5)
    assert not seen.moved["percept"]
    assert seen.moved["adversary"] and seen.moved["model"]


@pytest.mark.parametrize(
    ("weights", "step", "judges"),
    [
        ({"diffusion/mse": 0, "gan/generator": 0, "percept/net": 1}, 2, {"percept/net", "discriminator"}),
        ({"diffusion/mse": 0, "percept/net": 0, "vq/commit": 0}, 2, {"generator", "discriminator"}),
        ({"diffusion/mse": 0, "percept/net": 1}, 1, {"percept/net"}),
    ],
    ids=["percept", "adversary", "before-the-adversary"],
)
def test_each_judge_alone_moves_the_decoder(weights, step, judges, tmp_path, monkeypatch):
    """A fresh U-Net predicts zero whatever it sees, so its last layer learns first."""
    config = run_config(
        tmp_path / "run",
        **settings("sample", percept={"net": TIMM}, weights=weights, cls_free_guidance_dropout=0.0),
    )
    seen = Watched(config, monkeypatch, step=step)
    assert seen.calls.keys() - {"decoder"} == judges
    assert "decoder.conv_out.weight" in seen.moved["model"]
    assert bool(seen.moved["adversary"]) == ("discriminator" in judges)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flow", "v"])
def test_killed_in_the_middle_it_ends_with_the_same_bits(kind, tmp_path, monkeypatch):
    """Also with a fused optimizer, whose moments must come back in the layout of the U-Net's weights."""
    train(run_config(tmp_path / "whole", **settings(kind)))
    train_killed(monkeypatch, run_config(tmp_path / "killed", **settings(kind)), 3, 5)
    same_end(tmp_path, "whole", "killed")
