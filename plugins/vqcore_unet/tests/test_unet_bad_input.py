"""What a user may get wrong: each message is one line that says what and where."""

import pytest
import torch
from toys import run_config, toy  # noqa: F401
from vqcore_unet.cnn import CNNEncoder
from vqcore_unet.unet import UNet
from vqcore_unet.uvit import UViT

from vqcore.assembly import assemble
from vqcore.errors import ConfigError
from vqcore.protocols import DataSpec
from vqcore.testing.conformance import build, configured

SETTINGS = [
    ("decoder", "unet/unet", {"attention": [3]}, "attention=3 is not the scale of a level: [1, 2, 4, 8]"),
    ("decoder", "unet/unet", {"width": 40}, "40 channels are not divisible by norm_groups=32"),
    ("decoder", "unet/unet", {"heads": 3}, "heads=3 does not divide 512 channels of a level"),
    ("decoder", "unet/unet", {"mult": []}, "mult=[] is empty"),
    (
        "decoder",
        "unet/unet",
        {"missing_resolution": 224},
        "missing_resolution=224 does nothing with resolution_cond",
    ),
    (
        "decoder",
        "unet/uvit",
        {"resolution_cond": True, "missing_resolution": (64, 0)},
        "[64, 0] must be at least 1",
    ),
    ("decoder", "unet/uvit", {}, "mid_width, mid_depth, mid_heads missing: give size (b, l or h)"),
    ("decoder", "unet/uvit", {"size": "b", "mid_depth": 4, "long_skips": True}, "mid_depth=4 must be odd"),
    ("decoder", "unet/uvit", {"size": "b", "mid_heads": 7}, "mid_width=768 is not divisible by mid_heads=7"),
    (
        "decoder",
        "unet/uvit",
        {"size": "b", "as_4m": True},
        "as_4m=True does nothing with conditioning=concat",
    ),
    ("encoder", "unet/cnn-encoder", {"depth": 0}, "depth=0 must be at least 1"),
    (
        "scheduler",
        "unet/ddpm",
        {"prediction": "epsilon"},
        "prediction=epsilon with zero_terminal_snr=true: where",
    ),
    ("scheduler", "unet/ddim", {"prediction": "epsilon", "schedule": "shifted_cosine"}, "noise says nothing"),
    (
        "scheduler",
        "unet/ddpm",
        {"schedule": "shifted_cosine", "zero_terminal_snr": False},
        "zero_terminal_snr=false does nothing with schedule=shifted_cosine",
    ),
    ("scheduler", "unet/ddpm", {"shift": 2.0}, "shift=2.0 does nothing with schedule=squaredcos_cap_v2"),
    ("scheduler", "unet/ddpm", {"clip": 1.0, "threshold": 0.9}, "clip and threshold are both set"),
    ("scheduler", "unet/ddim", {"steps_offset": 1}, "steps_offset=1 does nothing with spacing=trailing"),
    (
        "scheduler",
        "unet/pndm",
        {"zero_terminal_snr": True},
        "unet/pndm divides by the signal, which ends at zero",
    ),
    (
        "scheduler",
        "unet/ddpm",
        {"beta_end": 0.012},
        "beta_end=0.012 does nothing with schedule=squaredcos_cap_v2",
    ),
    ("scheduler", "unet/ddpm", {"num_steps": 10**9}, "num_steps=1000000000 must be in [2, 100000]"),
    (
        "scheduler",
        "unet/ddpm",
        {"shift": 1e4, "schedule": "shifted_cosine"},
        "shift=10000.0 must be in [0.001, 1000]",
    ),
    ("scheduler", "unet/ddim", {"clipped_epsilon": True}, "does nothing with clip=null and threshold=null"),
    ("scheduler", "unet/flow", {"shift": 0.0}, "shift=0.0 must be in [0.001, 1000]"),
    ("scheduler", "unet/flow", {"power": 100}, "power=100.0 must be in [0.1, 10]"),
    (
        "scheduler",
        "unet/flow",
        {"prediction": "velocity", "data_std": 1.0},
        "data_std=1.0 does nothing with prediction=velocity",
    ),
    (
        "scheduler",
        "unet/diffusers",
        {"sampler": "EulerScheduler"},
        "is not a scheduler of diffusers. Did you mean",
    ),
    pytest.param(
        "scheduler",
        "unet/diffusers",
        {"sampler": "FlowMatchEulerDiscreteScheduler"},
        "there is unet/flow",
        marks=pytest.mark.slow,
    ),
    (
        "scheduler",
        "unet/diffusers",
        {"options": {"use_karras_sigma": True}},
        "use_karras_sigma is not an option of DPMSolverMultistepScheduler. Did you mean 'use_karras_sigmas'?",
    ),
    (
        "scheduler",
        "unet/diffusers",
        {"options": {"beta_end": 0.012}},
        "beta_end: noise levels are those of the table",
    ),
    (
        "scheduler",
        "unet/diffusers",
        {"options": {"use_flow_sigmas": True}},
        "for rectified flow take unet/flow",
    ),
    ("scheduler", "unet/diffusers", {"sampler": "DDIMInverseScheduler"}, "goes from samples to noise"),
]


@pytest.mark.parametrize(("kind", "name", "settings", "message"), SETTINGS)
def test_settings(kind, name, settings, message):
    with pytest.raises(ConfigError) as error:
        configured(kind, name, settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_epsilon_with_zero_terminal_snr_is_kept_for_imports():
    assert build("scheduler", "unet/ddpm", {"prediction": "epsilon", "as_4m": True}).alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    ("name", "settings", "steps", "message"),
    [
        ("unet/ddpm", {}, 0, "steps=0: a sampler takes 1 to 1000 steps"),
        ("unet/ddim", {"num_steps": 10}, 11, "steps=11: a sampler takes 1 to 10 steps"),
        ("unet/pndm", {"runge_kutta": True}, 3, "with runge_kutta, unet/pndm takes at least 4 steps"),
        ("unet/flow", {}, 0, "steps=0: a sampler takes at least 1 steps"),
        (
            "unet/ddim",
            {"spacing": "leading", "steps_offset": 1},
            1000,
            "steps_offset=1 sampling would begin at 1000, beyond the last entry, 999",
        ),
        (
            "unet/pndm",
            {"schedule": "squaredcos_cap_v2"},
            25,
            "at the entry 999 of schedule=squaredcos_cap_v2, where it begins, there is 5e-05: take spacing=leading",
        ),
        ("unet/diffusers", {"sampler": "CogVideoXDDIMScheduler"}, 4, "has other noise levels than the table"),
    ],
)
def test_steps(name, settings, steps, message):
    with pytest.raises(ConfigError, match=message):
        build("scheduler", name, settings).sampler(steps)


def test_a_scheduler_for_sampling_says_what_it_has_from_training():
    noise = {"name": "unet/pndm", "spacing": "leading", "steps_offset": 1}
    spec = DataSpec(channels=1, size=(8, 8))
    made = build("objective", "diffusion", {"scheduler": noise}, spec=spec)
    with pytest.raises(ConfigError) as error:
        made._other_scheduler("unet/ddim[spacing=trailing]")
    assert "steps_offset=1 does nothing with spacing=trailing" in str(error.value)
    assert str(error.value).endswith(
        "As in training, for it was not given: schedule=scaled_linear, zero_terminal_snr=false, steps_offset=1."
    )
    with pytest.raises(ConfigError, match=r"spacing='even' is not one of trailing, leading, linspace\.$"):
        made._other_scheduler("unet/ddim[spacing=even]")
    # What training has by default counts where the other scheduler has another default.
    made = build("objective", "diffusion", {"scheduler": {"name": "unet/ddpm"}}, spec=spec)
    with pytest.raises(
        ConfigError, match=r"not given: schedule=squaredcos_cap_v2, zero_terminal_snr=true\.$"
    ):
        made._other_scheduler("unet/pndm")


def test_sizes_that_a_network_cannot_take():
    unet = {"width": 8, "norm_groups": 4}
    with pytest.raises(
        ValueError, match=r"size \[40, 40\] is not a multiple of 32: patches of 4 are halved 3 times"
    ):
        UNet(UNet.Config(**unet), dim=4, spec=DataSpec(channels=3, size=(40, 40)))
    with torch.device("meta"):
        net = UNet(UNet.Config(**unet), dim=4, spec=DataSpec(channels=3, size=(64, 64)))
        uvit = UViT(UViT.Config(size="b"), dim=4, spec=DataSpec(channels=3, size=(64, 64)))
    for size in ((64, 48), (64,)):
        with pytest.raises(ValueError, match=r"size \[64"):
            net.target_shape(size)
    with pytest.raises(
        ValueError, match=r"size \[64, 56\] is not a multiple of 16: patches of 4 are halved 2 times"
    ):
        uvit.condition(torch.zeros(1, 4, 4, 4), size=(64, 56))
    with pytest.raises(ValueError, match="is not a multiple of 16"):
        CNNEncoder(CNNEncoder.Config(), spec=DataSpec(channels=3, size=(24, 24)))


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ({"eval__sizes": [8, 12]}, 12),
        ({"data__input_size_min": 8, "data__input_size_max": 16, "data__resolution_step": 4}, 12),
        ({"data__input_size": 4, "data__modality": {"name": "array", "channels": 2, "range": [-1, 1]}}, 4),
    ],
)
def test_sizes_of_a_run_are_tried_before_the_first_step(tmp_path, sizes, side):
    decoder = {"name": "unet/unet", "width": 8, "mult": [1, 2], "depth": 0, "attention": [], "norm_groups": 4}
    objective = {"name": "diffusion", "scheduler": {"name": "unet/ddim"}}
    config = run_config(tmp_path, **{"model__decoder": decoder, "objective": objective, **sizes})
    message = rf"model\.decoder \(unet/unet\): size \[{side}, {side}\] is not a multiple of 8"
    with pytest.raises(ConfigError, match=message):
        assemble(config)


def test_labels_are_refused():
    spec = DataSpec(channels=1, size=(32, 32), kind="categorical", labels=7, range=None)
    with pytest.raises(ValueError, match="these samples are labels: take a plain decoder"):
        UNet(UNet.Config(width=8, norm_groups=4), dim=4, spec=spec)
