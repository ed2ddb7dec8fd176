"""Denoisers and schedulers against recorded results of 4M (`parity/README.md`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vqcore_unet import fourm
from vqcore_unet.schedulers import DDIM, DDPM, PNDM
from vqcore_unet.table import alphas_cumprod
from vqcore_unet.unet import UNet
from vqcore_unet.uvit import UViT

from vqcore.protocols import DataSpec

PARITY = Path(__file__).parent / "parity"
CALLS = json.loads((PARITY / "schedulers.json").read_text())
MIDDLE = {"mid_width": 32, "mid_heads": 2}
NETS = {
    "divae_unet": (UNet, {"width": 32, "mult": (1, 2), "depth": 1, "attention": (2,)}),
    "divae_uvit_concat": (
        UViT,
        {
            "widths": (32, 64),
            "depth": 1,
            "downsample_before_mid": False,
            "mid_depth": 2,
            "mid_heads": 3,
            "mid_width": 48,
        },
    ),
    "divae_uvit_xattn": (
        UViT,
        {
            **MIDDLE,
            "widths": (32, 32),
            "depth": 1,
            "mid_depth": 3,
            "long_skips": True,
            "conditioning": "cross-attention",
            "as_4m": True,
        },
    ),
    "uvit_resolution": (
        UViT,
        {
            **MIDDLE,
            "widths": (32,),
            "depth": 1,
            "mid_depth": 1,
            "resolution_cond": True,
            "missing_resolution": None,
        },
    ),
}
DIVAE = [case for case in NETS if case.startswith("divae")]
SCHEDULES = {
    "divae_unet": {"prediction": "sample", "schedule": "linear"},
    "divae_uvit_concat": {"prediction": "v", "schedule": "shifted_cosine", "shift": 0.5},
    "divae_uvit_xattn": {
        "prediction": "epsilon",
        "schedule": "squaredcos_cap_v2",
        "zero_terminal_snr": False,
    },
}


def recorded(case):
    return load_file(PARITY / f"{case}.safetensors")


def denoiser(case, io, **more):
    cls, settings = NETS[case]
    state = {name.removeprefix("state/"): t for name, t in io.items() if name.startswith("state/")}
    state = fourm.unet(state, settings["depth"]) if cls is UNet else fourm.uvit(state)
    channels, dim = (2, 8) if case == "uvit_resolution" else (3, 16)
    net = cls(cls.Config(**{**settings, **more}), dim=dim, spec=DataSpec(channels=channels, size=(32, 32)))
    net.load_state_dict(state)
    return net.eval()


def near(found, wanted, tolerance=1e-4):
    off = float((found - wanted).abs().max())
    assert off <= tolerance * max(1, float(wanted.abs().max())), off


def gen(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", DIVAE)
@torch.no_grad()
def test_predictions(case):
    io = recorded(case)
    net, z, t = denoiser(case, io), io["quant"].movedim(1, -1), io["t"].float()
    asked = {
        "pred": (t, None),
        "pred_scalar_t": (torch.full_like(t, 500), None),
        "pred_masked": (t, io["mask"]),
        "pred_blind": (t, torch.ones_like(io["mask"])),
    }
    for name, (times, mask) in asked.items():
        near(net(io["x_t"], times, net.condition(z, size=(32, 32), mask=mask)), io[name], 1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"depth": 0, "attention": (2, 4)}, {"mult": (1, 1), "attention": ()}]
)
def test_names_of_a_unet_and_back(settings):
    spec = DataSpec(channels=1, size=(32, 32))
    with torch.device("meta"):
        ours = UNet(UNet.Config(**{"width": 32, **settings}), dim=5, spec=spec).state_dict()
    depth = settings.get("depth", 3)
    theirs = fourm.from_unet(ours, depth)
    assert fourm.unet(theirs, depth).keys() == ours.keys() and len(theirs) == len(ours)
    if not settings:
        wanted = {
            "input_blocks.4.0.op.weight",
            "output_blocks.3.2.conv.weight",
            "output_blocks.11.1.conv.weight",
        }
        assert wanted | {"input_blocks.9.1.qkv.weight", "out.2.bias", "time_embed.2.bias"} <= theirs.keys()
        assert theirs["middle_block.1.qkv.weight"].ndim == 3


def test_the_recorded_names_of_a_unet_and_back():
    io = recorded("divae_unet")
    state = {name.removeprefix("state/"): t for name, t in io.items() if name.startswith("state/")}
    found = fourm.from_unet(fourm.unet(state, 1), 1)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("case", [case for case in NETS if case != "divae_unet"])
def test_the_recorded_names_of_a_uvit_and_back(case):
    io = recorded(case)
    state = {name.removeprefix("state/"): t for name, t in io.items() if name.startswith("state/")}
    found = fourm.from_uvit(fourm.uvit(state))
    # The recorded file leaves out what follows from the rest: fixed positions, and a second name.
    more = {name for name in found if name == fourm.POSITIONS or fourm.TWICE[1] in name}
    assert found.keys() - more == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@torch.no_grad()
def test_tokens_that_are_all_hidden_are_not_seen_by_cross_attention():
    """4M's see the mean of all tokens; so would guidance."""
    io = recorded("divae_uvit_xattn")
    net, z = denoiser("divae_uvit_xattn", io, as_4m=False), io["quant"].movedim(1, -1)
    theirs = denoiser("divae_uvit_xattn", io)
    hidden = torch.ones_like(io["mask"])

    def blind(one, z):
        return one(io["x_t"], io["t"].float(), one.condition(z, size=(32, 32), mask=hidden))

    near(blind(net, -z), blind(net, z), 1e-6)
    assert (blind(theirs, -z) - blind(theirs, z)).abs().max() > 0.01


@torch.no_grad()
def test_the_original_size():
    io = recorded("uvit_resolution")
    net, z = denoiser("uvit_resolution", io), io["z"].movedim(1, -1)
    pair = torch.tensor([[512, 256]]).expand(2, 2)
    for name, extras in (
        ("out", {"original_size": io["size"]}),
        ("out_pair", {"original_size": pair}),
        ("out_none", {}),
    ):
        cond = net.condition(z, size=(32, 32), extras=extras)
        near(net(io["x_t"], io["t"].float(), cond), io[name], 1e-5)


def test_a_training_step():
    io = recorded("divae_unet")
    net = denoiser("divae_unet", io).train()
    out = net(io["x_t"], io["t"].float(), net.condition(io["quant"].movedim(1, -1), size=(32, 32)))
    (out - io["x"]).square().mean().backward()
    for ours, theirs in (
        ("conv_out.weight", "out.2.weight"),
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("mid_attention.qkv.weight", "middle_block.1.qkv.weight"),
    ):
        wanted = io[f"grad/decoder.{theirs}"]
        found = net.get_parameter(ours).grad.view_as(wanted)
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("case", DIVAE)
@torch.no_grad()
def test_four_steps_of_sampling(case):
    """Noise from one generator for the whole batch, as in 4M: there a sample depends on its batch."""
    io = recorded(case)
    net = denoiser(case, io)
    cond = net.condition(io["quant"].movedim(1, -1), size=(32, 32))
    settings = {**SCHEDULES[case], "as_4m": True, "clip": 1.0}
    for cls, seed, name in ((DDIM, 0, "sample_ddim"), (DDPM, 1, "sample_ddpm")):
        rng, sampler = gen(seed), cls(cls.Config(**settings)).sampler(4)
        x = torch.randn(2, 3, 32, 32, generator=rng)
        for t in sampler.timesteps:
            x = sampler.step(net(x, torch.full((2,), t), cond), t, x, [rng, rng])
        near(x, io[name])


# Schedulers


def ours(settings, **more):
    """Our settings from 4M's."""
    left = {"beta_schedule": "linear", "prediction_type": "v_prediction", "clip_sample": True, **settings}
    schedule, _, shift = left.pop("beta_schedule").partition(":")
    made = {"as_4m": True, "schedule": schedule, **({"shift": float(shift)} if shift else {}), **more}
    made["prediction"] = {"v_prediction": "v"}.get(left["prediction_type"], left["prediction_type"])
    clipped, thresholded = left.pop("clip_sample"), left.pop("thresholding", False)
    if thresholded:
        made["threshold"] = left.pop("dynamic_thresholding_ratio", 0.995)
        made["threshold_max"] = left.pop("sample_max_value", 1.0)
    elif clipped:
        made["clip"] = 1.0
    del left["prediction_type"]
    names = {
        "variance_type": "variance",
        "set_alpha_to_one": "final_alpha_one",
        "use_clipped_model_output": "clipped_epsilon",
    }
    return {**made, **{names.get(name, name): value for name, value in left.items()}}


def pndm(settings, spacing):
    left = {"beta_schedule": "linear", "prediction_type": "epsilon", "set_alpha_to_one": False, **settings}
    left.pop("timestep_spacing", None)
    runge_kutta = not left.pop("skip_prk_steps", False)
    made = ours({**left, "clip_sample": False}, spacing=spacing)
    return PNDM(PNDM.Config(**made, runge_kutta=runge_kutta))


def scheduler(name, settings, spacing, **more):
    if name == "PNDM":
        return pndm(settings, spacing)
    cls = {"DDIM": DDIM, "DDPM": DDPM}[name]
    return cls(cls.Config(**ours({**settings, **more}, spacing=spacing)))


def walk(sampler, x, noisy=True):
    for t in sampler.timesteps:
        x = sampler.step(0.3 * x + 0.1, t, x, [gen(int(t))] if noisy else [])
    return x


@pytest.mark.parametrize("name", CALLS["tables"])
def test_tables(name):
    settings = ours(CALLS["tables"][name])
    wanted = recorded("schedulers")[f"alphas_cumprod/{name}"]
    near(alphas_cumprod(DDPM.Config(**settings)), wanted, 1e-6)
    if name != "shifted_cosine:0.5/zero_snr=False" and name != "shifted_cosine:2.0/zero_snr=False":
        exact = alphas_cumprod(DDPM.Config(**{**settings, "as_4m": False}))
        assert exact.dtype == torch.float64
        near(exact, wanted, 2e-6)


def test_times():
    io = recorded("schedulers")
    for name, (kind, settings, steps, spacing) in CALLS["spacings"].items():
        found = scheduler(kind, settings, spacing).sampler(steps).timesteps
        assert found == io[f"timesteps/{name}"].tolist(), name


def test_noise_and_velocity():
    io = recorded("schedulers")
    made = scheduler("DDIM", {}, "trailing")
    near(made.add_noise(io["x0"], io["noise"], io["t"]), io["noised"], 1e-5)
    near(made.target(io["x0"], io["noise"], io["t"]), io["velocity"], 1e-5)


def test_trajectories():
    """In fp32, 1 - alpha_bar of the first entries has three digits; one trajectory of 80 divides by it."""
    io = recorded("schedulers")
    for name, (kind, settings, steps, spacing, more) in CALLS["runs"].items():
        start = io["start"] * (3 if "thresholding" in name else 1)
        found = walk(scheduler(kind, settings, spacing, **more).sampler(steps), start)
        loose = name == "ddpm/squaredcos_cap_v2/v_prediction/zero_snr=True/leading"
        near(found, io[f"trajectory/{name}"], 5e-5 if loose else 1e-5)
    for name, settings in CALLS["pndm_runs"].items():
        near(walk(pndm(settings, "leading").sampler(7), io["start"], False), io[f"pndm/{name}"], 1e-5)


def test_guidance():
    """The arithmetic of guidance, around 4M's stub of a network."""
    io = recorded("guidance")
    made = scheduler("DDIM", {"beta_schedule": "linear"}, "trailing")
    z = torch.nn.functional.interpolate(io["z"], (8, 8))

    def sample(scale):
        sampler, x = made.sampler(4), torch.randn(io["plain"].shape, generator=gen(9))
        for t in sampler.timesteps:
            blind = 0.3 * x + 0.0001 * t
            x = sampler.step(blind + scale(t) * 0.5 * z, t, x, [])
        return x

    near(sample(lambda t: 1.0), io["plain"], 1e-5)
    near(sample(lambda t: 3.0), io["three"], 1e-5)
    near(sample(lambda t: 1 + 4 * t / 1000), io["of_time"], 1e-5)
