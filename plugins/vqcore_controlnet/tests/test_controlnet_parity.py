"""`controlnet/sd` against what 4M computed from the same weights (`parity/README.md`)."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from vqcore_controlnet.sd import StableDiffusion
from vqcore_unet.schedulers import PNDM

from vqcore.diffusion import guided
from vqcore.protocols import DataSpec

PARITY = Path(__file__).parent / "parity"
BASE = PARITY / "stable-diffusion"
PROMPTS = ["a cat", "red"]
THEIRS = {"vae.": "vae", "decoder.unet.": "unet", "decoder.text_encoder.": "text"}
"""How names of the base begin in 4M's state, and what the part is called in `base`."""
HINT = "controlnet.controlnet_cond_embedding."
"""How names of the hint begin in 4M's decoder."""


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    cfg = StableDiffusion.Config(sd_path=str(BASE), as_4m=True, **tiny.SETTINGS)
    made = StableDiffusion(cfg, dim=16, spec=DataSpec(channels=3, size=(32, 32), range=(-1.0, 1.0)))
    made.borrow({})
    state = {n.removeprefix("decoder."): t for n, t in load_file(PARITY / "state.safetensors").items()}
    own = {name for name in made.state_dict() if not name.startswith("base.")}
    found = {
        name.replace(f"{HINT}adapter_model.", "hint.adapter.").replace(HINT, "hint."): tensor
        for name, tensor in state.items()
        if name.startswith("controlnet.")
    }
    assert set(found) == own
    made.load_state_dict(found, strict=False)
    return made.eval(), load_file(PARITY / "io.safetensors")


def close(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


def quant(io):
    return io["quant"].movedim(1, -1)


def test_the_base_is_that_of_the_case(case):
    made, _ = case
    state = load_file(PARITY / "state.safetensors")
    for theirs, ours in THEIRS.items():
        part = {n.removeprefix(theirs): t for n, t in state.items() if n.startswith(theirs)}
        own = made.base.get_submodule(ours).state_dict()
        own = {n if n in part else f"text_model.{n}": t for n, t in own.items()}
        for name, tensor in part.items():
            if not name.endswith("position_ids"):
                assert torch.equal(own[name], tensor), name


def test_latents_prompts_and_hint(case):
    made, io = case
    with torch.no_grad():
        mode = made.base.vae.encode(io["x_sd"]).latent_dist.mode() * made.base.vae.config.scaling_factor
        close(mode, io["z"])
        close(made.base.prompts([""]), io["empty"])
        close(made.base.prompts(PROMPTS), io["prompt"])
        close(made.condition(quant(io), size=(32, 32)).hint, io["hint"])


@torch.no_grad()
def test_predictions(case):
    made, io = case
    ask = lambda **given: made(io["z"], io["t"].float(), made.condition(quant(io), size=(32, 32), **given))  # noqa: E731
    close(ask(), io["pred"])
    close(ask(mask=io["mask"]), io["pred_masked"])
    close(ask(extras={"caption": PROMPTS}), io["pred_prompt"])
    hidden = torch.ones(2, 4, 4, dtype=torch.bool)
    close(ask(mask=hidden, extras={"caption": PROMPTS}), io["pred_uncond"])


@torch.no_grad()
def test_a_factor_of_the_residuals(case):
    made, io = case
    cond = made.condition(quant(io), size=(32, 32))
    half = cond._replace(scale=0.5 * cond.scale)
    down_alone = made(io["z"], io["t"].float(), half)
    assert (down_alone - io["pred_half"]).abs().max() > 1e-6  # as_4m: the middle has cond_scale
    object.__setattr__(made.cfg, "cond_scale", 0.5)
    try:
        close(made(io["z"], io["t"].float(), half), io["pred_half"])
    finally:
        object.__setattr__(made.cfg, "cond_scale", 1.0)


@torch.no_grad()
@pytest.mark.parametrize(("weight", "scale", "name"), [(1.0, 1.0, "latent"), (2.5, 0.8, "latent_guided")])
def test_trajectories(case, weight, scale, name):
    made, io = case
    cfg = {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction": "epsilon"}
    scheduler = PNDM(
        PNDM.Config(
            **cfg,
            zero_terminal_snr=False,
            spacing="leading",
            steps_offset=1,
            final_alpha_one=False,
            as_4m=True,
        )
    )
    object.__setattr__(made.cfg, "cond_scale", scale)
    try:
        z_q = quant(io)
        extras = {"caption": PROMPTS} if weight != 1 else None
        held = made.condition(z_q, size=(32, 32), extras=extras)
        free = made.condition(z_q, size=(32, 32), mask=torch.ones(2, 4, 4, dtype=torch.bool), extras=extras)
        y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        sampler = scheduler.sampler(5)
        for t in sampler.timesteps:
            level = torch.full((2,), float(t))
            prediction = made(y, level, held)
            if weight != 1:
                prediction = guided(prediction, made(y, level, free), weight)
            y = sampler.step(prediction, t, y, [])
        close(y, io[name], 1e-3)
        if weight == 1:
            close(made.from_target(io["latent"], (64, 64)), io["decoded"])
    finally:
        object.__setattr__(made.cfg, "cond_scale", 1.0)
