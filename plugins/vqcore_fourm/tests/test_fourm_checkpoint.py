"""Checkpoints of 4M: recorded codes and reconstructions, published architectures, every form of file, bad files."""

import argparse
import datetime
import importlib.metadata
import json
import pickle
import shutil
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from vqcore_fourm import arguments, get_image_tokenizer, tables
from vqcore_fourm.base import LEVELS, _scheduler
from vqcore_fourm.checkpoint import Checkpoint
from vqcore_fourm.names import wanted

from vqcore.cli import main
from vqcore.compose.build import component
from vqcore.errors import CheckpointError, VqcoreError
from vqcore.registry import Registry
from vqcore.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "cases.json").read_text())
ARCHITECTURES = json.loads((DATA / "architectures.json").read_text())
FORMAT = "fourm/checkpoint"
MIDDLE = {"name": "unet/uvit", "depth": 1, "mid_width": 32, "mid_heads": 2}
DENOISERS = {
    "unet_mini": {"name": "unet/unet", "width": 32, "mult": (1,), "depth": 1, "attention": ()},
    "uvit_mini": {**MIDDLE, "widths": (32,), "mid_depth": 1},
    "uvit_tiny_f16_longskip": {**MIDDLE, "widths": (32, 32), "mid_depth": 3, "long_skips": True},
}
DIVAE = ("hub_divae", "divae_uvit_xattn", "training_checkpoint_divae")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    for name in ("vit_t_enc", "vit_t_dec"):
        monkeypatch.setitem(tables.VIT, name, {"width": 32, "depth": 2, "num_heads": 4})
    for name, settings in DENOISERS.items():
        monkeypatch.setitem(tables.DENOISERS, name, settings)


def source_of(case, folder):
    """The case as a file or folder of 4M."""
    if CASES[case]["kwargs"] is None:
        return training_checkpoint(folder / "checkpoint-19.pth", case)
    if (DATA / case / "config.json").is_file():
        return DATA / case
    if (DATA / case / "model.safetensors").is_file():
        return DATA / case / "model.safetensors"
    shutil.copy(DATA / case / "state.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CASES[case]["kwargs"]))
    return folder


def training_checkpoint(path, case="training_checkpoint_poses", **more):
    """Write a recorded training checkpoint; `more` are other entries, or options as `options`."""
    folder = DATA / case
    options = json.loads((folder / "args.json").read_text()) | more.pop("options", {})
    averages = folder / "ema.safetensors"
    content = {
        "model": load_file(folder / "state.safetensors"),
        **({"model_ema": load_file(averages)} if averages.is_file() else {}),
        "epoch": 19,
        "args": argparse.Namespace(**options),
        "scaler": {},
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(content | more, path)
    return path


def read(path, **settings):
    return Tokenizer.load(path, format={"name": FORMAT, **settings}, allow_pickle=True)


def ours(tokens):
    return tokens.unsqueeze(-1) if tokens.ndim == 3 else tokens.movedim(1, -1)


def assert_close(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


def generators(seed, count):
    """One generator for all samples, as in 4M, where the noise of a sample depends on its batch."""
    return [torch.Generator().manual_seed(seed)] * count


@pytest.mark.parametrize("case", CASES)
def test_recorded_codes_and_reconstructions(tmp_path, case):
    io = load_file(DATA / case / "io.safetensors")
    tokenizer = read(source_of(case, tmp_path))
    inputs = [name for name in io if name.startswith("x") and name != "x_t"]
    assert inputs
    for name in inputs:
        end = name.removeprefix("x").removeprefix("_")
        end = f"_{end}" if end else ""
        # The input of a tokenizer with undo_std is a picture in -1..1, which 4M computes first.
        codes = tokenizer.encode(io["prepared" if case == "vq_undo_std" else name])
        assert torch.equal(codes, ours(io[f"tokens{end}"]))
        if f"dec{end}" in io:
            assert_close(tokenizer.decode(codes), io[f"dec{end}"])


@pytest.mark.slow
@pytest.mark.parametrize("case", DIVAE)
@torch.no_grad()
def test_recorded_predictions_and_samples(tmp_path, case):
    io = load_file(DATA / case / "io.safetensors")
    tokenizer = read(source_of(case, tmp_path))
    size, codes, net = tuple(io["x"].shape[2:]), ours(io["tokens"]), tokenizer.decoder
    z = tokenizer.lookup(codes)
    hidden = torch.ones(z.shape[:-1], dtype=torch.bool)
    for name, mask in (("pred", None), ("pred_masked", io.get("mask")), ("pred_blind", hidden)):
        if name in io:
            cond = net.condition(z, size=size, mask=mask)
            assert_close(net(io["x_t"], io["t"].float(), cond), io[name], 1e-4)
    assert_close(tokenizer.objective.scheduler.add_noise(io["x"], io["noise"], io["t"]), io["x_t"])
    runs = {
        "sample_ddim": (0, 4, "unet/ddim", size),
        "sample_ddpm": (1, 4, None, size),
        "sample": (2, 5, "unet/ddim", size),
        "sample_large": (3, 2, "unet/ddim", tuple(2 * side for side in size)),
    }
    if "sample" in io:
        runs["sample_ddpm"] = (4, 4, None, size)
    for name, (seed, steps, scheduler, sides) in runs.items():
        if name in io:
            rng = generators(seed, len(codes))
            found = tokenizer.decode(codes, rng=rng, steps=steps, scheduler=scheduler, size=sides)
            assert_close(found, io[name], 1e-4)


CONTROLNET = Path(__file__).parents[2] / "vqcore_controlnet/tests/parity"
STABLE_DIFFUSION = CONTROLNET / "stable-diffusion"


def controlnet(folder, **changes):
    """The recorded VQControlNet in the published form."""
    given = {
        "sd_path": "somewhere",
        "image_size_sd": 64,
        "pretrained_cn": True,
        "image_size": 32,
        "patch_size": 8,
    }
    given |= {"enc_type": "vit_t_enc", "post_mlp": True, "codebook_size": 64, "latent_dim": 16} | changes
    (folder / "config.json").write_text(json.dumps(given))
    shutil.copy(CONTROLNET / "state.safetensors", folder / "model.safetensors")
    return folder


@pytest.mark.slow
@torch.no_grad()
def test_a_recorded_controlnet(tmp_path):
    io = load_file(CONTROLNET / "io.safetensors")
    tokenizer = read(controlnet(tmp_path), sd_path=str(STABLE_DIFFUSION))
    codes, net = tokenizer.encode(io["x"]), tokenizer.decoder
    assert torch.equal(codes, ours(io["tokens"]))
    z, size = tokenizer.lookup(codes), (32, 32)
    prompts = {"caption": ["a cat", "red"]}
    for name, given in (
        ("pred", {}),
        ("pred_masked", {"mask": io["mask"]}),
        ("pred_prompt", {"extras": prompts}),
        ("pred_uncond", {"mask": torch.ones_like(io["mask"]), "extras": prompts}),
    ):
        assert_close(net(io["z"], io["t"].float(), net.condition(z, size=size, **given)), io[name], 1e-4)
    found = tokenizer.decode(codes, rng=generators(0, len(codes)), steps=5, size=(64, 64))
    assert_close(found, io["decoded"], 1e-3)
    saved = tmp_path / "saved"
    tokenizer.save(saved)
    again = Tokenizer.load(saved, borrowed={"decoder.base": STABLE_DIFFUSION})
    assert again.fingerprint == tokenizer.fingerprint
    given = {"name": FORMAT, "sd_path": str(STABLE_DIFFUSION)}
    alone = Tokenizer.load(tmp_path, format=given, encoder_only=True)
    assert torch.equal(alone.encode(io["x"]), codes)


def controlnet_checkpoint(path, **changes):
    """The recorded VQControlNet as a training checkpoint, with options by their names in the script."""
    options = {
        "domain": "rgb",
        "sd_path": str(STABLE_DIFFUSION),
        "input_size_sd": 64,
        "input_size_max": 32,
        "pretrained_cn": True,
        "patch_size": 8,
        "encoder_type": "vit_t_enc",
        "post_mlp": True,
        "quantizer_type": "lucid",
        "codebook_size": 64,
        "latent_dim": 16,
        "use_xformer": False,
    }
    state = load_file(CONTROLNET / "state.safetensors")
    torch.save({"model": state, "args": argparse.Namespace(**{**options, **changes}), "epoch": 9}, path)
    return path


@pytest.mark.slow
def test_drop_in_of_a_controlnet(tmp_path):
    io = load_file(CONTROLNET / "io.safetensors")
    controlnet_checkpoint(tmp_path / "cn.pth")
    model, args = get_image_tokenizer("cn", tmp_path, device="cpu", verbose=False)
    assert (args.model_type, args.sd_path, args.image_size_sd) == ("VQControlNet", str(STABLE_DIFFUSION), 64)
    quant, loss, tokens = model.encode(io["x"])
    assert torch.equal(tokens, io["tokens"]) and loss.tolist() == [0.0]
    assert_close(quant, io["quant"])
    with torch.no_grad():
        for name, given in (
            ("pred", {}),
            ("pred_masked", {"cond_mask": io["mask"]}),
            ("pred_prompt", {"prompt": ["a cat", "red"]}),
        ):
            assert_close(model(io["x"], io["z"], io["t"], **given)[0], io[name], 1e-4)
    made = {"generator": torch.Generator().manual_seed(0), "timesteps": 5}
    latents = model.decode_tokens(tokens, **made)
    assert_close(latents, io["latent"], 1e-3)
    assert_close(model.vae_decode(latents), io["decoded"], 1e-3)
    made["generator"].manual_seed(0)
    guided = {"guidance_scale": 2.5, "cond_scale": 0.8, "prompt": ["a cat", "red"]}
    assert_close(model.autoencode(io["x"], **made, **guided), io["latent_guided"], 1e-3)
    assert model.tokenizer.decoder.cfg.cond_scale == 1.0
    made["generator"].manual_seed(0)
    assert_close(model.decode_tokens(tokens, vae_decode=True, guidance_scale=1, **made), io["decoded"], 1e-3)
    assert model.vae_encode(io["x_sd"]).shape == io["z"].shape
    for options, text in (
        ({"image_size": 16}, "image_size is 16: this decoder has latents of 8 x 8"),
        ({"scheduler_timesteps_mode": "trailing"}, "the base has 'leading'"),
        ({"guidance_scale": lambda t: 1.0}, "guidance_schedule='cosine'"),
    ):
        with pytest.raises(CheckpointError, match=text):
            model.decode_tokens(tokens, **options)
    half, _ = get_image_tokenizer("cn", tmp_path, encoder_only=True, device="cpu", verbose=False)
    assert torch.equal(half.tokenize(io["x"]), tokens)


@pytest.mark.slow
def test_a_base_whose_schedule_has_no_betas(tmp_path):
    """diffusers writes them for every schedule."""
    levels = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.00085, "beta_end": 0.012}
    (tmp_path / LEVELS).parent.mkdir()
    (tmp_path / LEVELS).write_text(json.dumps(levels))
    made = component("scheduler", _scheduler(tmp_path), file="base")
    assert made.schedule == "squaredcos_cap_v2"


def test_drop_in_of_a_controlnet_whose_base_is_elsewhere(tmp_path):
    controlnet_checkpoint(tmp_path / "cn.pth", sd_path="/nowhere/stable-diffusion")
    with pytest.raises(CheckpointError, match=r"sd_path=FOLDER"):
        get_image_tokenizer("cn", tmp_path, device="cpu")
    model, _ = get_image_tokenizer("cn", tmp_path, device="cpu", verbose=False, sd_path=STABLE_DIFFUSION)
    assert model.tokenizer.cfg.model.decoder.sd_path == str(STABLE_DIFFUSION)


@pytest.mark.slow
def test_a_controlnet_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    controlnet_checkpoint(Path("checkpoint-9.pth"), sd_path="/nowhere/stable-diffusion")
    source = f"{FORMAT}[sd_path={STABLE_DIFFUSION}]:checkpoint-9.pth"
    Path("photos").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photos/{number}.png")
    assert main(["import", FORMAT, "checkpoint-9.pth", "made", f"sd_path={STABLE_DIFFUSION}"]) == 2
    assert "--allow-pickle" in capsys.readouterr().err and not Path("made").exists()
    words = ["made", f"sd_path={STABLE_DIFFUSION}", "--allow-pickle"]
    assert main(["import", FORMAT, "checkpoint-9.pth", *words]) == 0
    assert main(["tokenize", source, "photos", "tokens", "--allow-pickle"]) == 0
    assert main(["decode", source, "tokens", "rebuilt", "steps=2", "--allow-pickle"]) == 0
    assert (
        main(["decode", "made", "tokens", "again", "steps=2", "--borrow", f"decoder.base={STABLE_DIFFUSION}"])
        == 0
    )
    assert all(
        Path("rebuilt", name).read_bytes() == Path("again", name).read_bytes() for name in ("0.png", "1.png")
    )
    saved = yaml.safe_load(Path("made/config.yaml").read_text())
    config = {
        "data": {"name": "folder", "path": "photos", "eval_path": "photos", "modality": saved["modality"],
                 "input_size": 32, "batch_size": 2, "workers": 0},
        "model": saved["model"] | {"full_ckpt": source, "freeze_enc": True},
        "objective": saved["objective"],
        "run": {"dir": "run", "steps": 1},
        "optim": {"lr": 1e-3},
        "eval": {"sampling": {"steps": 2}},
    }  # fmt: skip
    config["model"]["decoder"]["sd_path"] = str(STABLE_DIFFUSION)
    Path("train.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert main(["train", "train.yaml", "--allow-pickle"]) == 0
    said = "".join(capsys.readouterr())
    assert "encoder, proj, quantizer, decoder from" in said


class Token2VAE(nn.Module):
    """4M's adapter, of blocks of diffusers, as its class puts them together: mean and deviation of latents."""

    def __init__(self, dim):
        super().__init__()
        blocks = importlib.import_module("diffusers.models.unets.unet_2d_blocks")
        shared = {"resnet_eps": 1e-6, "resnet_act_fn": "silu", "resnet_groups": 32, "temb_channels": None}
        self.conv_in = nn.Conv2d(dim, 512, 3, padding=1)
        self.mid_block = blocks.UNetMidBlock2D(in_channels=512, attention_head_dim=512, **shared)
        rows = ((512, 512, True), (512, 256, False))
        self.up_blocks = nn.ModuleList(
            blocks.get_up_block(
                "UpDecoderBlock2D", num_layers=3, in_channels=a, out_channels=b, add_upsample=up,
                prev_output_channel=None, attention_head_dim=b, resnet_time_scale_shift="group", **shared,
            )
            for a, b, up in rows
        )  # fmt: skip
        self.conv_norm_out = nn.GroupNorm(32, 256, eps=1e-6)
        self.conv_out = nn.Conv2d(256, 8, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


@pytest.mark.slow
@torch.no_grad()
def test_a_controlnet_with_an_adapter(tmp_path):
    torch.manual_seed(0)
    adapter, last = Token2VAE(16).eval(), nn.Conv2d(8, 8, 3, padding=1)
    begin = "decoder.controlnet.controlnet_cond_embedding."
    state = {k: v for k, v in load_file(CONTROLNET / "state.safetensors").items() if not k.startswith(begin)}
    state |= {f"{begin}adapter_model.{name}": tensor for name, tensor in adapter.state_dict().items()}
    state |= {f"{begin}conv_out.{name}": tensor for name, tensor in last.state_dict().items()}
    folder = controlnet(tmp_path, adapter="/somewhere/adapter.pth")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    tokenizer = read(folder, sd_path=str(STABLE_DIFFUSION))
    z = tokenizer.lookup(tokenizer.encode(load_file(CONTROLNET / "io.safetensors")["x"]))
    # Latents are 8 x 8, of which the adapter makes half; it doubles them again.
    wanted = last(adapter(F.interpolate(z.movedim(-1, 1), (4, 4), mode="nearest")))
    assert_close(tokenizer.decoder.condition(z, size=(64, 64)).hint, wanted)
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved", borrowed={"decoder.base": STABLE_DIFFUSION})
    assert torch.equal(again.decoder.hint.adapter.conv_in.weight, adapter.conv_in.weight)


def test_an_adapter_alone_is_named(tmp_path):
    state = {"vq_model.quantize._codebook.embed": torch.ones(4, 2), "conv_in.weight": torch.ones(2, 2, 3, 3)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an adapter of 4M \(Token2VAE\) alone"):
        read(tmp_path)


@pytest.mark.slow
def test_controlnets_that_cannot_be_read(tmp_path):
    bad = {
        r"sd_path=here is no Stable Diffusion: it has no unet/config.json": ({"sd_path": "here"}, {}),
        r"image_size_sd is 0, expected": ({}, {"image_size_sd": 0}),
        r"controlnet_cond_embedding.adapter_model.conv_in.weight is missing": (
            {"sd_path": str(STABLE_DIFFUSION)},
            {"adapter": "run"},
        ),
        r"input_size_sd=72 is not a multiple of 16": (
            {"sd_path": str(STABLE_DIFFUSION)},
            {"image_size_sd": 72},
        ),
    }
    for text, (settings, changes) in bad.items():
        with pytest.raises(VqcoreError, match=text):
            read(controlnet(tmp_path, **changes), **settings)
    with pytest.raises(CheckpointError, match=r"is a VQVAE: sd_path=x is for a VQControlNet; leave it out"):
        read(DATA / "hub_vqvae", sd_path="x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vae.decoder.conv_in.bias", "its vae differs in decoder.conv_in.bias"),
        ("decoder.unet.conv_in.bias", "its unet differs in conv_in.bias"),
        (
            "decoder.text_encoder.text_model.final_layer_norm.bias",
            "its text differs in final_layer_norm.bias",
        ),
    ],
)
@pytest.mark.parametrize("change", ["other", "missing"])
def test_a_controlnet_of_another_base(tmp_path, name, text, change):
    folder = controlnet(tmp_path)
    state = load_file(folder / "model.safetensors")
    tensor = state.pop(name)
    if change == "other":
        state[name] = tensor + 1e-3
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"is another Stable Diffusion .*{text}"):
        read(folder, sd_path=str(STABLE_DIFFUSION))


@pytest.mark.slow
def test_a_controlnet_without_its_base(tmp_path):
    with pytest.raises(CheckpointError, match=r"begins with 8 channels.*: sd_path=FOLDER"):
        read(controlnet(tmp_path))


@pytest.mark.slow
def test_a_controlnet_is_not_written(tmp_path):
    tokenizer = read(controlnet(tmp_path), sd_path=str(STABLE_DIFFUSION))
    with pytest.raises(CheckpointError, match=r"model\.decoder\.name=controlnet/sd"):
        Checkpoint(Checkpoint.Config()).write(tokenizer, tmp_path)


def test_what_a_diffusion_tokenizer_was_trained_with(tmp_path):
    path = training_checkpoint(
        tmp_path / "a.pth", DIVAE[2], options={"masked_cfg_low": 3, "masked_cfg_high": 20}
    )
    tokenizer = read(path)
    objective = tokenizer.cfg.objective
    scheduler = objective.scheduler
    assert (scheduler.name, scheduler.as_4m, scheduler.num_steps) == ("unet/ddpm", True, 1000)
    assert (scheduler.schedule, scheduler.prediction) == ("squaredcos_cap_v2", "sample")
    assert (scheduler.threshold, scheduler.threshold_max, scheduler.clip) == (0.995, 1.0, None)
    # 4M's bounds are those of the visible ones of 16 tokens.
    assert objective.cls_free_guidance_dropout == 0.2 and objective.masked_cfg
    assert (objective.masked_cfg_low, objective.masked_cfg_high) == (0, 13)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"schedule": "squaredcos_cap_v2", "prediction": "v", "threshold": 0.995, "threshold_max": 1.0}),
        ({"beta_schedule": "shifted_cosine:2"}, {"schedule": "shifted_cosine", "shift": 2.0}),
        ({"scheduler": "ddim", "beta_schedule": "scaled_linear"}, {"name": "unet/ddim", "schedule": "scaled_linear"}),
        ({"thresholding": False}, {"threshold": None, "clip": None}),
        ({"thresholding": False, "clip_sample": True}, {"threshold": None, "clip": 1.0}),
        ({"clip_sample": True}, {"threshold": 0.995, "clip": None}),
        ({"zero_terminal_snr": False}, {"prediction": "v", "zero_terminal_snr": False}),
        ({"prediction_type": "epsilon"}, {"prediction": "epsilon", "zero_terminal_snr": True}),
        ({"num_train_timesteps": 50}, {"num_steps": 50}),
    ],
)  # fmt: skip
def test_schedulers(given, wanted):
    made = arguments.to_config(arguments.check(given, "", kind="DiVAE"), size=None, where="").objective
    assert {key: getattr(made.scheduler, key) for key in wanted} == wanted and made.scheduler.as_4m


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, None, (0, None)),
        (0, 49, (147, None)),
        (10, None, (0, 186)),
        (10, 20, (176, 186)),
        (0, 500, (0, None)),
        (196, None, None),
    ],
)  # fmt: skip
def test_bounds_of_visible_tokens_become_bounds_of_hidden_ones(low, high, wanted):
    given = {
        "cls_free_guidance_dropout": 0.3,
        "masked_cfg": True,
        "masked_cfg_low": low,
        "masked_cfg_high": high,
    }
    made = arguments.to_config(arguments.check(given, "", kind="DiVAE"), size=None, where="").objective
    found = (made.masked_cfg_low, made.masked_cfg_high) if made.masked_cfg else None
    assert found == wanted and made.cls_free_guidance_dropout == (0.3 if wanted else 0)


@pytest.mark.slow
def test_every_denoiser_of_4m_can_be_built():
    for name in set(tables.DENOISERS) - set(DENOISERS):
        for conditioning in tables.CONDITIONING:
            args = arguments.check({"dec_type": name, "conditioning": conditioning}, name, kind="DiVAE")
            assert len(wanted(arguments.to_config(args, size=None, where=name), name)) > 400


def published_tensors(name):
    """Names and shapes of a published tokenizer; `as` names another one that has the same but for these."""
    found = ARCHITECTURES[name]
    tensors = published_tensors(found["as"]) if "as" in found else {}
    for key, shape in found["tensors"].items():
        key, _, times = key.partition("  (x ")
        tensors |= {key.replace("*", str(i), 1): shape for i in range(int(times[:-1]) if times else 1)}
    return tensors


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "as" in ARCHITECTURES[name] else ())
        for name in ARCHITECTURES
    ],
)
def test_published_architectures_have_these_tensors(name):
    given = ARCHITECTURES[name]["kwargs"]
    kind = "DiVAE" if given["dec_type"] in tables.DENOISERS else "VQVAE"
    cfg = arguments.to_config(arguments.check(given, name, kind=kind), size=None, where=name)
    found = {key: list(value.shape) for key, value in wanted(cfg, name).items()}
    assert found == published_tensors(name)


def test_averaged_weights_by_choice(tmp_path):
    io = load_file(DATA / "training_checkpoint_poses/io.safetensors")
    tokenizer = read(source_of("training_checkpoint_poses", tmp_path), ema=True)
    assert torch.equal(tokenizer.encode(io["x"]), ours(io["tokens_ema"]))
    assert not torch.equal(io["tokens_ema"], io["tokens"])
    assert tokenizer.origin["origin"]["weights"] == "model_ema"
    with pytest.raises(CheckpointError, match="ema=true is for training checkpoints"):
        read(DATA / "hub_vqvae", ema=True)


def test_older_names_of_tensors(tmp_path):
    state = load_file(DATA / "hub_vqvae/model.safetensors")
    save_file(
        {k.replace("quant_proj.", "quant_conv.0."): v for k, v in state.items()},
        tmp_path / "model.safetensors",
    )
    shutil.copy(DATA / "hub_vqvae/config.json", tmp_path)
    assert read(tmp_path).fingerprint == read(DATA / "hub_vqvae").fingerprint


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    training_checkpoint(Path("checkpoint-19.pth"))
    Path("poses").mkdir()
    x = load_file(DATA / "training_checkpoint_poses/io.safetensors")["x"]
    for number, pose in enumerate(x):
        np.save(f"poses/{number}.npy", pose.flatten().numpy())
    assert main(["import", FORMAT, "checkpoint-19.pth", "made"]) == 2
    assert "--allow-pickle" in capsys.readouterr().err and not Path("made").exists()
    assert main(["import", FORMAT, "checkpoint-19.pth", "made", "--allow-pickle"]) == 0
    assert "--allow-pickle" not in capsys.readouterr().out  # what was written is no pickle
    assert main(["tokenize", "made", "poses", "tokens"]) == 0
    assert main(["tokenize", f"{FORMAT}[ema=true]:checkpoint-19.pth", "poses", "ema", "--allow-pickle"]) == 0
    found = Tokenizer.load("made").load_tokens("tokens")
    assert len(found) == len(x)
    capsys.readouterr()
    assert main(["import", FORMAT, "--list"]) == 0
    said = capsys.readouterr().out
    assert "hf://EPFL-VILAB/4M_tokenizers_semseg_4k_224-448" in said and "non-commercial" in said


def test_the_licence_of_published_weights_is_kept(tmp_path):
    folder = tmp_path / "models--EPFL-VILAB--4M_tokenizers_human-poses_1k_8/snapshots/abc"
    shutil.copytree(DATA / "hub_vqvae", folder)
    assert "non-commercial" in read(folder).origin["origin"]["licence"]
    assert "licence" not in read(DATA / "hub_vqvae").origin["origin"]


def test_drop_in(tmp_path, capsys):
    io = load_file(DATA / "training_checkpoint_poses/io.safetensors")
    training_checkpoint(tmp_path / "poses.pth")
    model, args = get_image_tokenizer("poses", tmp_path, device="cpu")
    assert "poses" in capsys.readouterr().out and not model.training
    assert (args.domain, args.n_channels, args.enc_type) == ("human_poses", 207, "BottleneckMLP/B_1-Wi_32")
    _, loss, tokens = model.encode(io["x"])
    assert torch.equal(tokens, io["tokens"]) and loss.tolist() == [0.0]
    options = {"image_size": 224, "timesteps": 25, "verbose": False}  # of a DiVAE; 4M's VQVAE takes them, too
    assert_close(model.decode_tokens(tokens, **options), io["dec"])
    assert_close(model.autoencode(io["x"]), io["dec"])
    half, _ = get_image_tokenizer("poses", tmp_path, encoder_only=True, device="cpu", verbose=False)
    assert torch.equal(half.tokenize(io["x"]), io["tokens"])
    with pytest.raises(CheckpointError, match="cannot decode"):
        half.decode_tokens(tokens)
    assert get_image_tokenizer("none", tmp_path, return_None_on_fail=True) is None
    with pytest.raises(CheckpointError, match="no such file"):
        get_image_tokenizer("none", tmp_path)


def test_drop_in_of_a_diffusion_tokenizer(tmp_path):
    io = load_file(DATA / DIVAE[2] / "io.safetensors")
    training_checkpoint(tmp_path / "depth.pth", DIVAE[2])
    model, args = get_image_tokenizer("depth", tmp_path, device="cpu", verbose=False)
    assert (args.model_type, args.dec_type, args.beta_schedule) == ("DiVAE", "unet_mini", "squaredcos_cap_v2")
    tokens = model.tokenize(io["x"])
    assert torch.equal(tokens, io["tokens"])
    prediction, loss = model(io["x"], io["x_t"], io["t"])
    assert_close(prediction, io["pred"], 1e-4)
    assert loss.tolist() == [0.0]
    ddim, size = {"timesteps": 5, "scheduler": "unet/ddim"}, tuple(io["x"].shape[2:])
    found = model.decode_tokens(tokens, generator=generators(2, 1)[0], image_size=size, **ddim)
    assert_close(found, io["sample"], 1e-4)
    assert torch.equal(model.autoencode(io["x"], generator=generators(2, 1)[0], **ddim), found)
    found = model.decode_tokens(tokens, generator=generators(4, 1)[0], image_size=size, timesteps=4)
    assert_close(found, io["sample_ddpm"], 1e-4)
    other = model.decode_tokens(
        tokens, timesteps=2, scheduler="unet/ddim", scheduler_timesteps_mode="leading"
    )
    assert tuple(other.shape[2:]) == (32, 32)
    with pytest.raises(CheckpointError, match="give the name of a scheduler of vqcore, such as 'unet/ddim'"):
        model.decode_tokens(tokens, scheduler=object())
    half, _ = get_image_tokenizer("depth", tmp_path, encoder_only=True, device="cpu", verbose=False)
    assert torch.equal(half.tokenize(io["x"]), tokens)


def test_drop_in_reads_its_file_once(tmp_path, monkeypatch):
    from vqcore_fourm import sources

    read_once, calls = sources.read_pickle, []
    monkeypatch.setattr(sources, "read_pickle", lambda *a, **k: calls.append(a) or read_once(*a, **k))
    training_checkpoint(tmp_path / "poses.pth")
    get_image_tokenizer("poses", tmp_path, device="cpu", verbose=False)
    assert len(calls) == 1


@pytest.mark.slow
def test_a_diffusion_tokenizer_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    training_checkpoint(Path("checkpoint-19.pth"), DIVAE[2])
    Path("depth").mkdir()
    x = load_file(DATA / DIVAE[2] / "io.safetensors")["x"]
    for number in range(4):
        np.save(f"depth/{number}.npy", x[number % len(x), :, :, :32].numpy())
    source = f"{FORMAT}:checkpoint-19.pth"
    assert main(["tokenize", source, "depth", "tokens", "--allow-pickle"]) == 0
    assert main(["import", FORMAT, "checkpoint-19.pth", "made", "--allow-pickle"]) == 0
    assert main(["decode", "made", "tokens", "rebuilt", "steps=2", "scheduler=unet/ddim"]) == 0
    assert np.load("rebuilt/0.npy").shape[-2:] == (32, 32)
    saved = yaml.safe_load(Path("made/config.yaml").read_text())
    net = saved["model"] | {"full_ckpt": source}
    config = {
        "data": {
            "name": "folder",
            "path": "depth",
            "eval_path": "depth",
            "modality": saved["modality"],
            "input_size": 32,
        },
        "model": net,
        "objective": saved["objective"],
        "run": {"dir": "run", "steps": 1},
        "optim": {"lr": 1e-3},
    }
    config["data"]["batch_size"] = 2
    Path("train.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert main(["train", "train.yaml", "--allow-pickle"]) == 0
    said = capsys.readouterr()
    assert "encoder, proj, quantizer, decoder from" in said.out + said.err


# ------------------------------------------------------------------------------------------------- bad input


class Foreign:
    """A class that no checkpoint may name; making one writes a file."""

    def __reduce__(self):
        return (open, ("ran", "w"))


class Own:
    """A class of somebody, which does nothing."""


@pytest.mark.parametrize(
    "entries",
    [{"args": Foreign()}, {"options": {"data_path": Foreign()}}, {"loss_balancer": Foreign()}],
    ids=["in place of the arguments", "inside them", "in an unused entry"],
)  # fmt: skip
def test_foreign_classes_are_refused_by_name(tmp_path, monkeypatch, entries):
    monkeypatch.chdir(tmp_path)
    training_checkpoint(Path("checkpoint-0.pth"), **entries)
    with pytest.raises(CheckpointError, match=r"holds more than tensors and plain data: \w*io\.open"):
        read("checkpoint-0.pth")
    assert not Path("ran").exists()
    assert main(["import", FORMAT, "checkpoint-0.pth", "made", "--allow-pickle"]) == 2
    assert not Path("made").exists() and not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1})[:5]], ids=["empty", "text", "cut"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged|no training checkpoint"):
        read(tmp_path / name)


def test_cut_checkpoint(tmp_path):
    path = training_checkpoint(tmp_path / "a.pth")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x.to(torch.complex64), "quantize.codes is torch.complex64 and not torch.float32"),
        (lambda x: x.long(), "quantize.codes is torch.int64 and not torch.float32"),
        (lambda x: x.to_sparse(), "quantize.codes is torch.float32"),
        (lambda x: x.to("meta"), "quantize.codes holds no numbers"),
        (lambda x: x.half(), None),
    ],
)  # fmt: skip
def test_numbers_of_another_kind(tmp_path, change, text):
    """Half precision is converted; a cast that would lose a part of the numbers is refused."""
    state = load_file(DATA / "training_checkpoint_poses/state.safetensors")
    path = training_checkpoint(
        tmp_path / "a.pth", model=state | {"quantize.codes": change(state["quantize.codes"])}
    )
    if text is None:
        assert read(path).quantizer.codes.dtype == torch.float32
        return
    with pytest.raises(CheckpointError, match=text):
        read(path)


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (b"\x82\x01.", "Unsupported operand 130"),
        (b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.", "tensors and plain data: torch.storage._load_from_bytes"),
        (b"ctorch.serialization\nload\n(S'x'\ntR.", "tensors and plain data: torch.serialization.load"),
        (b"cargparse\nArgumentParser\n(tR.", "tensors and plain data: argparse.ArgumentParser"),
        (b"cargparse\nNamespace.__init__.__globals__\n.", "argparse.Namespace.__init__.__globals__"),
    ],
)  # fmt: skip
def test_hostile_streams_in_a_checkpoint(tmp_path, stream, text):
    """The pickle of a whole checkpoint is replaced; torch's advice to read it with code is not passed on."""
    whole = training_checkpoint(tmp_path / "whole.pth")
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "a.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, stream if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(CheckpointError) as error:
        read(tmp_path / "a.pth")
    assert (
        text in str(error.value) and "weights_only" not in str(error.value) and "\n" not in str(error.value)
    )


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_file_that_says_nothing_has_no_reason(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth: damaged, or not a PyTorch file\.$"):
        read(tmp_path / "a.pth")


def test_a_file_that_is_no_pytorch_file_is_said_in_one_sentence(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(CheckpointError, match=r"not a PyTorch file \([^()]*\(\"version\"\)[^()]*\)\.$"):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "value",
    [np.float64(1e-4), np.arange(3), Path("x"), datetime.date(2024, 1, 1), types.SimpleNamespace(a=1), Own()],
    ids=lambda value: type(value).__name__,
)
def test_classes_among_the_options_are_named(tmp_path, value):
    with pytest.raises(
        CheckpointError, match=r"more than tensors and plain data: (numpy|pathlib|datetime|types|\w+)\."
    ):
        read(training_checkpoint(tmp_path / "a.pth", options={"blr": value}))


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"encoder_embeddings.rgb.proj.weight": torch.ones(2)}, "generative model, not of a tokenizer"),
        ({"blocks.0.weight": torch.ones(2)}, "it is no tokenizer of 4M"),
        ({"module.quantize.codes": torch.ones(2)}, "all names begin with module., of which 4M would load nothing"),
    ],
)  # fmt: skip
def test_other_models(tmp_path, state, text):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=text):
        read(tmp_path)


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [touch ran]", "!x {}", "[", "{a: 1}"])
def test_objects_in_a_header(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    state = load_file(DATA / "safetensors_with_config/model.safetensors")
    save_file(state, "a.safetensors", {"n_channels": value, "latent_dim": "8"})
    with pytest.raises(CheckpointError, match="n_channels"):
        read("a.safetensors")
    assert not Path("ran").exists()


def test_header_without_configuration(tmp_path):
    save_file({"quantize.codes": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="its header holds no configuration"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("codebook_size", 0, "codebook_size is 0, expected a whole number"),
        ("codebook_size", "50", "codebook_size is '50', expected"),
        ("latent_dim", True, "latent_dim is True"),
        ("latent_dim", 10**12, "latent_dim is 1000000000000"),
        ("ema_decay", 1.0, "ema_decay is 1.0, expected a number from 0 to below 1"),
        ("ema_decay", float("nan"), "ema_decay is nan"),
        ("commitment_weight", 10**400, "commitment_weight is 1000.*, expected a number from 0 on"),
        ("n_channels", 2**31 - 1, "n_channels is 2147483647, but the file has only .* numbers"),
        ("quant_type", "fsq", "quant_type is 'fsq', expected one of lucid, memcodes"),
        ("norm_codes", "yes", "norm_codes is 'yes', expected true or false"),
        ("patch_size", [16, 16, 16], "patch_size is a list"),
        ("enc_type", "vit_x_enc", "enc_type is 'vit_x_enc', which 4M does not have"),
        ("enc_type", "MLP/six", "enc_type is 'MLP/six', which 4M does not have"),
        ("enc_type", "BottleneckMLP/B_999999-Wi_32", "but the file has only"),
        ("enc_type", "BottleneckMLP/B_0-Wi_32", "depth"),
    ],
)  # fmt: skip
def test_arguments_out_of_range(tmp_path, key, value, text):
    shutil.copy(DATA / "hub_vqvae/model.safetensors", tmp_path)
    config = json.loads((DATA / "hub_vqvae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=text):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("dec_type", "uvit_b_p4_f32", r"dec_type is 'uvit_b_p4_f32', a denoiser that 4M does not have. Did you mean"),
        ("dec_type", "unet_big", "dec_type is 'unet_big', a denoiser that 4M does not have"),
        ("prediction_type", "noise", "prediction_type is 'noise', expected one of sample, epsilon"),
        ("beta_schedule", "cosine", "beta_schedule is 'cosine', expected one of linear"),
        ("beta_schedule", "shifted_cosine:0", "beta_schedule is 'shifted_cosine:0', expected"),
        ("beta_schedule", "shifted_cosine", "beta_schedule is 'shifted_cosine', expected"),
        ("beta_schedule", ["linear"], "beta_schedule is a list"),
        ("num_train_timesteps", 1, "num_train_timesteps is 1, expected a whole number from 2 on"),
        ("thresholding", 0.995, "thresholding is 0.995, expected true or false"),
        ("clip_sample", None, "clip_sample is a NoneType"),
        ("conditioning", "cross", "conditioning is 'cross', expected one of concat, xattn"),
        ("cls_free_guidance_dropout", 1.5, "cls_free_guidance_dropout is 1.5, expected a share"),
        ("dec_transformer_dropout", 1, "dec_transformer_dropout is 1, expected"),
        ("masked_cfg_low", -1, "masked_cfg_low is -1, expected a whole number from 0 on"),
    ],
)  # fmt: skip
def test_arguments_of_a_denoiser_out_of_range(tmp_path, key, value, text):
    shutil.copy(DATA / "hub_divae/model.safetensors", tmp_path)
    config = json.loads((DATA / "hub_divae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=text):
        read(tmp_path)


def test_a_size_that_the_denoiser_cannot_take(tmp_path):
    shutil.copy(DATA / "hub_divae/model.safetensors", tmp_path)
    config = json.loads((DATA / "hub_divae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": 36, "patch_size": 4}))
    with pytest.raises(
        CheckpointError, match=r"no such tokenizer can be built: .*\[36, 36\] is not a multiple of 8"
    ):
        read(tmp_path)


def test_bounds_in_the_wrong_order(tmp_path):
    path = training_checkpoint(
        tmp_path / "a.pth", DIVAE[2], options={"masked_cfg_low": 3, "masked_cfg_high": 2}
    )
    with pytest.raises(CheckpointError, match="masked_cfg_low is 3, above masked_cfg_high, which is 2"):
        read(path)


@pytest.mark.parametrize("name", ["args", "options", "masked_cfg"])
def test_a_hostile_diffusion_checkpoint(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    entries = (
        {"args": Foreign()} if name == "args" else {"options": {"beta_schedule": Foreign(), name: Foreign()}}
    )
    path = training_checkpoint(Path("checkpoint-0.pth"), DIVAE[2], **entries)
    with pytest.raises(CheckpointError, match=r"holds more than tensors and plain data: \w*io\.open"):
        read(path)
    assert not Path("ran").exists()


@pytest.mark.slow
def test_tensors_of_a_denoiser_that_do_not_fit(tmp_path):
    shutil.copy(DATA / "hub_divae/config.json", tmp_path)
    state = load_file(DATA / "hub_divae/model.safetensors")
    double, second = "decoder.downsample_mid.Conv2d_0.bias", "decoder.downsample_mid.conv.bias"
    bad = {
        r"decoder.mid_block.mask_token is missing": {"decoder.mid_block.mask_token": None},
        r"Conv2d_0.bias is missing": {double: None},
        r"are one tensor in 4M, but differ here": {second: state[double] + 1},
        r"mid_pos_emb has other values": {"decoder.mid_block.mid_pos_emb": torch.zeros(1, 32, 32, 32)},
        r"mid_pos_emb has the shape \[1, 32, 16, 16\]": {
            "decoder.mid_block.mid_pos_emb": torch.zeros(1, 32, 16, 16)
        },
        r"post_quant_proj.bias is unknown": {"post_quant_proj.bias": torch.ones(1)},
        r"decoder.conv_in.bias has the shape \[3\]": {"decoder.conv_in.bias": torch.ones(3)},
        r"holds infinity or NaN|not finite|nan": {"decoder.conv_in.bias": torch.full((32,), torch.nan)},
    }
    for text, change in bad.items():
        changed = {key: value for key, value in (state | change).items() if value is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=text):
            read(tmp_path)


def test_the_plugin_of_denoisers_is_named_where_it_is_missing(monkeypatch):
    entries = importlib.metadata.entry_points(group="vqcore")
    lacks = Registry(entry for entry in entries if entry.name != "unet")
    for module in ("vqcore.compose.build", "vqcore.tokenizer", "vqcore.objectives"):
        monkeypatch.setattr(f"{module}.registry", lambda: lacks)
    with pytest.raises(
        VqcoreError, match=r"no plugin 'unet' is installed.*pip install ./plugins/vqcore_unet"
    ):
        read(DATA / "hub_divae")


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    state = load_file(DATA / "hub_vqvae/model.safetensors")
    del state["quantize._codebook.embed"]
    state |= {"quant_proj.bias": torch.ones(9), "decoder.more": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(DATA / "hub_vqvae/config.json", tmp_path)
    with pytest.raises(CheckpointError) as error:
        read(tmp_path)
    for text in (
        "quantize._codebook.embed is missing",
        "decoder.more is unknown",
        "quant_proj.bias has the shape [9] instead of [8]",
    ):
        assert text in str(error.value)


def test_folders_and_settings(tmp_path):
    with pytest.raises(CheckpointError, match=r"it lacks config.json, model.safetensors"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    shutil.copy(DATA / "hub_vqvae/model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="damaged or no JSON"):
        read(tmp_path)
    assert read(DATA / "hub_vqvae", size=[3, 4]).cfg.size == (3, 4)
    with pytest.raises(ValueError, match="give one or two numbers"):
        Checkpoint.Config(name=FORMAT, size=0)
