"""Export to 4M's published form: the recorded tensors come back bit for bit, and what 4M cannot hold is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fourm_checkpoint import CASES, DATA, FORMAT, read, source_of, stand_ins  # noqa: F401
from vqcore_fourm import arguments, export, tables
from vqcore_fourm.checkpoint import Checkpoint

from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.errors import CheckpointError, VqcoreError
from vqcore.registry import registry
from vqcore.schema import ModelConfig, TokenizerConfig
from vqcore.testing.checks import check_format
from vqcore.tokenizer import Tokenizer

CHECKPOINT = Checkpoint(Checkpoint.Config(name=FORMAT))


def written(tokenizer, folder):
    folder.mkdir(exist_ok=True)
    CHECKPOINT.write(tokenizer, folder)
    return folder


def recorded(case):
    """The recorded state, whole: with both names of what safetensors keeps under one of them."""
    path = next(p for name in ("state", "model") if (p := DATA / case / f"{name}.safetensors").is_file())
    state = load_file(path)
    with safe_open(path, "pt") as opened:
        header = opened.metadata() or {}
    return state | {name: state[other] for name, other in header.items() if other in state}


FAST = ("semseg",)
"""A class map; all other cases are slow tests."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_recorded_tensors_come_back_bit_for_bit(tmp_path, case):
    (tmp_path / "source").mkdir()
    tokenizer = read(source_of(case, tmp_path / "source"))
    folder = written(tokenizer, tmp_path / "made")
    found, state = load_file(folder / "model.safetensors"), recorded(case)
    assert found.keys() == state.keys()
    assert all(found[key].dtype == state[key].dtype and torch.equal(found[key], state[key]) for key in state)
    given = json.loads((folder / "config.json").read_text())
    for key, value in (CASES[case]["kwargs"] or {}).items():
        if key not in ("sync_codebook", "undo_std"):
            assert given[key] == value, key
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {key: str(value) for key, value in given.items()}
    io = load_file(DATA / case / "io.safetensors")
    x = io["prepared" if case == "vq_undo_std" else min(name for name in io if name.startswith("x"))]
    again = read(folder)
    assert again.fingerprint == tokenizer.fingerprint and again.cfg == tokenizer.cfg
    (folder / "vqcore.json").unlink()
    assert torch.equal(read(folder).encode(x), tokenizer.encode(x))
    assert torch.equal(read(folder / "model.safetensors").encode(x), tokenizer.encode(x))


def test_laws_of_formats(tmp_path):
    shutil.copytree(DATA / "hub_vqvae", tmp_path / "vqvae", ignore=shutil.ignore_patterns("io*"))
    check_format(CHECKPOINT, tmp_path / "vqvae")


@pytest.mark.slow
def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", FORMAT, str(DATA / "hub_divae"), "first"]) == 0
    assert main(["export", "first", "theirs", "--format", FORMAT]) == 0
    assert "written as fourm/checkpoint" in capsys.readouterr().out
    assert {path.name for path in Path("theirs").iterdir()} == {
        "config.json",
        "model.safetensors",
        "vqcore.json",
    }
    assert main(["import", FORMAT, "theirs", "second"]) == 0
    first, second = Tokenizer.load("first"), Tokenizer.load("second")
    assert first.fingerprint == second.fingerprint and first.cfg == second.cfg
    assert main(["import", FORMAT, "theirs", "third", "size=64"]) == 2
    assert "its vqcore.json says all of the tokenizer; leave size out" in capsys.readouterr().err


def test_the_licence_goes_along(tmp_path):
    folder = tmp_path / "models--EPFL-VILAB--4M_tokenizers_human-poses_1k_8/snapshots/abc"
    shutil.copytree(DATA / "hub_vqvae", folder)
    made = written(read(folder), tmp_path / "made")
    assert "non-commercial" in read(made).origin["origin"]["licence"]


def test_an_encoder_alone_is_not_exported(tmp_path):
    tokenizer = Tokenizer.load(DATA / "hub_vqvae", format=FORMAT, encoder_only=True)
    with pytest.raises(CheckpointError, match="loaded with encoder_only=True"):
        CHECKPOINT.write(tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match="export: ema, size is for reading; leave it out"):
        Checkpoint(Checkpoint.Config(name=FORMAT, ema=True, size=32)).write(tokenizer, tmp_path)


def test_a_codebook_that_waits_for_k_means_has_no_tokens(tmp_path):
    """4M fills it with the first batch that it encodes."""
    tokenizer = read(DATA / "hub_vqvae")
    tokenizer.quantizer.initted.zero_()
    with pytest.raises(CheckpointError, match="this tokenizer: its codebook is not filled yet"):
        written(tokenizer, tmp_path / "made")
    state = load_file(DATA / "hub_vqvae/model.safetensors")
    state["quantize._codebook.initted"].zero_()
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(DATA / "hub_vqvae/config.json", tmp_path)
    with pytest.raises(CheckpointError, match="initted is 0"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"latent_dim": 16}, "says latent_dim=8, and its configuration 16: they are of two tokenizers"),
        ({"enc_type": "BottleneckMLP/B_3-Wi_32"}, "says enc_type="),
    ],
)  # fmt: skip
def test_vqcore_json_of_another_tokenizer(tmp_path, change, text):
    folder = written(read(DATA / "hub_vqvae"), tmp_path / "made")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=text):
        read(folder)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"tokenizer": {}, "origin": {}}', "vqcore.json"),
        ('{"tokenizer": {"modality": {"name": "os/system"}}, "origin": {}}', "no plugin 'os'"),
    ],
)
def test_damaged_vqcore_json(tmp_path, content, text):
    folder = written(read(DATA / "hub_vqvae"), tmp_path / "made")
    (folder / "vqcore.json").write_text(content)
    with pytest.raises(CheckpointError, match=text):
        read(folder)


# ------------------------------------------------------------------------- where each setting of a component goes

VIT = {"size": "s", "patch_size": 8}
BASE = {
    "modality": {"name": "rgb"},
    "size": [64, 64],
    "model": {
        "encoder": {"name": "vit/encoder", **VIT},
        "quantizer": {"name": "quant/vq", "codebook_size": 16},
        "decoder": {"name": "vit/decoder", **VIT},
    },
    "objective": {"name": "reconstruction"},
}
MLP = {"encoder": {"name": "vit/mlp-encoder"}, "decoder": {"name": "vit/mlp-decoder"}}
SCHEDULER = {"name": "unet/ddpm", "zero_terminal_snr": False}
NOISE = {"name": "diffusion", "scheduler": SCHEDULER}
LABELS = {"name": "array", "kind": "categorical", "labels": 5}
UVIT = {"name": "unet/uvit", "size": "b"}
TRUNK = {
    "size": "b",
    "width": 256,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "patch_size": 16,
    "patch_proj": False,
    "post_mlp": True,
    "grid_convs": 1,
}
MLPS = {"kind": "plain", "depth": 3, "width": 64, "expansion": 2, "activation": "none"}
SCHEDULES = {
    "name": None,
    "num_steps": 500,
    "schedule": "linear",
    "shift": {"schedule": "shifted_cosine", "zero_terminal_snr": True, "shift": 3.0},
    "prediction": "sample",
    "zero_terminal_snr": True,
    "clip": 1.0,
    "threshold": {"threshold": 0.995, "threshold_max": 1.0},
    "threshold_max": {"threshold": 0.995, "threshold_max": 2.0},
    "beta_start": {"beta_start": 2e-4, "schedule": "linear"},
    "beta_end": {"beta_end": 0.03, "schedule": "linear"},
}
CHANGES = {
    "vit/encoder": {**TRUNK, "input_size_enc": 32},
    "vit/decoder": {
        **TRUNK,
        "input_size_dec": 32,
        "out_conv": "convnext",
        "out_conv_channels": {"out_conv": "conv", "out_conv_channels": 4},
        "out_conv_scale": {"out_conv": "conv", "out_conv_scale": 2},
        "out_conv_depth": {"out_conv": "conv", "out_conv_depth": 1},
    },
    "vit/mlp-encoder": MLPS,
    "vit/mlp-decoder": MLPS,
    "fourm/none": {},
    "quant/vq": {
        "codebook_size": 32,
        "latent_dim": 16,
        "num_codebooks": {"num_codebooks": 2, "code_dim": 32},
        "norm_latents": True,
        "kmeans_init": True,
        "commitment_weight": 0.5,
        "coef_ema_dead_code": 8.0,
        "normalize": False,
        "decay": 0.9,
        "dead_code": "linde_buzo_gray",
        "threshold_ema_dead_code": {"threshold_ema_dead_code": 0.5, "coef_ema_dead_code": None},
        "code_dim": 8,
        "codebook": {"codebook": "learned", "normalize": False},
        "shared_codebook": {"num_codebooks": 2, "code_dim": 32, "shared_codebook": False},
    },
    "quant/memcodes": {"codebook_size": 32, "latent_dim": 16, "num_codebooks": 2},
    "unet/unet": {
        "patch_size": 2,
        "norm_groups": 16,
        "resolution_cond": True,
        "missing_resolution": {"resolution_cond": True, "missing_resolution": 64},
        "width": 64,
        "mult": [1, 2, 4, 4],
        "depth": 1,
        "attention": [8],
        "heads": 2,
    },
    "unet/uvit": {
        "patch_size": 2,
        "norm_groups": 16,
        "resolution_cond": True,
        "missing_resolution": {"resolution_cond": True, "missing_resolution": 64},
        "size": "l",
        "widths": [64, 128],
        "depth": 1,
        "downsample_before_mid": False,
        "mid_width": 384,
        "mid_depth": 6,
        "mid_heads": 6,
        "mid_grid": 16,
        "mlp_ratio": 2.0,
        "long_skips": True,
        "conditioning": {"conditioning": "cross-attention", "as_4m": True},
        "as_4m": {"conditioning": "cross-attention", "as_4m": False},
        "dropout": 0.1,
    },
    "unet/ddpm": SCHEDULES,
    "unet/ddim": SCHEDULES,
    "reconstruction": {},
    "diffusion": {
        "scheduler": {"scheduler": {"name": "unet/ddim", "zero_terminal_snr": False}},
        "cls_free_guidance_dropout": 0.2,
        "masked_cfg": {"cls_free_guidance_dropout": 0.2, "masked_cfg": True},
        "masked_cfg_low": {"cls_free_guidance_dropout": 0.2, "masked_cfg": True, "masked_cfg_low": 3},
        "masked_cfg_high": {"cls_free_guidance_dropout": 0.2, "masked_cfg": True, "masked_cfg_high": 9},
    },
}
"""For each setting that is not only kept: another value, or a value with the settings that it needs."""
KINDS = {name: role for role, all_of in export.ROLES.items() for name in all_of}
KINDS |= {
    "unet/ddpm": "scheduler",
    "unet/ddim": "scheduler",
    "reconstruction": "objective",
    "diffusion": "objective",
}


def config_with(name, change):
    """A config that has this component, with a change of its settings."""
    tree = json.loads(json.dumps(BASE))
    role = KINDS[name]
    if name.startswith("vit/mlp"):
        tree["model"] |= json.loads(json.dumps(MLP))
    if name == "quant/memcodes":
        tree["model"]["quantizer"]["name"] = name
    if name.startswith("unet/") or name == "diffusion":
        tree["model"]["decoder"] = dict(UVIT) if name == "unet/uvit" else {"name": "unet/unet"}
        tree["objective"] = json.loads(json.dumps(NOISE))
    if role == "scheduler":
        tree["objective"]["scheduler"] |= {"name": name, **change}
    else:
        (tree["objective"] if role == "objective" else tree["model"][role]).update(change)
    return from_tree(tree, schema=TokenizerConfig)


def given_for(cfg):
    spec = registry().build("modality", cfg.modality, "modality", size=cfg.size).spec
    return export.arguments_of(cfg, spec)


@pytest.mark.parametrize("name", export.GOES)
def test_the_table_has_every_setting_of_every_component(name):
    fields = {field.name for field in dataclasses.fields(registry().load(KINDS[name], name).Config)}
    goes = export.GOES[name]
    assert fields - {"name"} == goes.keys() - {"name"}
    assert {key for key, where in goes.items() if where != export.KEPT} == CHANGES[name].keys()


def test_the_sections_around_the_components_have_no_other_settings():
    assert {field.name for field in dataclasses.fields(TokenizerConfig)} == BASE.keys()
    kept = {"full_ckpt", "encoder_ckpt", "freeze_enc"}
    assert {field.name for field in dataclasses.fields(ModelConfig)} == {*export.ROLES, "embed_dim"} | kept


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, changes in CHANGES.items() for key in changes if key != "name"]
)
def test_a_setting_changes_an_argument_or_is_refused_by_name(name, key):
    change = CHANGES[name][key]
    change = change if isinstance(change, dict) else {key: change}
    base = {part: value for part, value in change.items() if part != key}
    changed = config_with(name, change)
    try:
        _, given = given_for(changed)
    except CheckpointError as error:
        assert f"{key}=" in str(error), error
        return
    assert export.GOES[name][key] != export.DEFAULT
    try:
        assert given != given_for(config_with(name, base))[1]
    except VqcoreError:
        assert base  # which makes no sense alone


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": {"encoder": {"grid_convs": 1}}}, "model.encoder.grid_convs=1: it has 0"),
        ({"model": {"encoder": {"depth": 6}}}, "model.encoder has width=512, depth=6, num_heads=8: its sizes are"),
        ({"model": {"decoder": {"post_mlp": True}}}, "model.decoder.post_mlp=True: encoder and decoder share it"),
        ({"model": {"decoder": {"out_conv": "conv"}}}, "model.decoder.out_conv=conv: it has convnext"),
        ({"model": {"encoder": {"patch_size": [8, 16]}}}, r"model.encoder.patch_size=\[8, 16\]"),
        ({"model": {"encoder": {"input_size_enc": [32, 64]}}}, r"model.encoder.input_size_enc=\[32, 64\]"),
        ({"model": {"quantizer": {"code_dim": 8}}}, "model.quantizer.code_dim=8: its codes are as wide"),
        ({"model": {"quantizer": {"num_codebooks": 2}}}, "model.quantizer.code_dim=null"),
        ({"model": {"quantizer": {"name": "quant/fsq", "levels": [8, 5]}}}, "model.quantizer.name=quant/fsq: it has"),
        ({"model": {"encoder": {"name": "vit/query-encoder", "size": "s"}}}, "model.encoder.name=vit/query"),
        ({"modality": LABELS, "model": {"embed_dim": None}}, "model.embed_dim=null"),
    ],
)  # fmt: skip
def test_what_4m_cannot_hold_is_refused_by_name(change, text):
    tree = json.loads(json.dumps(BASE))
    for role, settings in change.get("model", {}).items():
        old = tree["model"].get(role)
        is_other = isinstance(settings, dict) and "name" in settings
        tree["model"][role] = (
            {**({} if is_other else old), **settings} if isinstance(settings, dict) else settings
        )
    tree["modality"] = change.get("modality", tree["modality"])
    with pytest.raises(CheckpointError, match=text):
        given_for(from_tree(tree, schema=TokenizerConfig))


@pytest.mark.parametrize("scheduler", [{"name": "unet/flow"}, {**SCHEDULER, "clip": 2.0}])
def test_schedulers_that_4m_does_not_have(scheduler):
    with pytest.raises(CheckpointError, match=r"objective.scheduler.(name=unet/flow|clip=2.0): it has"):
        given_for(config_with("diffusion", {"scheduler": scheduler}))


@pytest.mark.slow
def test_arguments_give_the_same_config_again():
    """Whatever 4M can hold comes back from its arguments, but for what is only kept."""
    for name, changes in CHANGES.items():
        for key, change in changes.items():
            cfg = config_with(name, change if isinstance(change, dict) else {key: change} if change else {})
            try:
                kind, given = given_for(cfg)
            except CheckpointError:
                continue
            args = arguments.check(given, name, kind=kind)
            back = arguments.to_config(args, size=cfg.size, where=name)
            assert given_for(back) == (kind, given), (name, key)


VECTORS = "BottleneckMLP/B_2-Wi_32"


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        *(("vit_s_enc", name) for name in ("vit_b_dec", VECTORS, "unet_patched", "uvit_b_p4_f16")),
        *((VECTORS, name) for name in ("vit_b_dec", VECTORS)),
    ],
)
def test_arguments_of_pairs_of_networks_come_back(encoder, decoder):
    given = {
        "enc_type": encoder,
        "dec_type": decoder,
        "image_size": 64,
        "image_size_dec": 32,
        "codebook_size": 16,
    }
    kind = "DiVAE" if decoder in tables.DENOISERS else "VQVAE"
    cfg = arguments.to_config(arguments.check(given, "", kind=kind), size=None, where="")
    found_kind, found = given_for(cfg)
    assert found_kind == kind
    assert arguments.to_config(arguments.check(found, "", kind=kind), size=None, where="") == cfg
