"""Training configs of 4M become ours: the published ones by their facts, every option, flags, and bad input."""

from pathlib import Path

import pytest
import yaml
from vqcore_fourm.config import _flags
from vqcore_fourm.options import OPTIONS, table

from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.errors import ConfigError
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.testing import checks

PAGE = Path(__file__).parents[3] / "docs" / "from-4m.md"
LUCID = {
    "quantizer_type": "lucid", "latent_dim": 32, "norm_codes": True, "codebook_weight": 1.0, "coef_ema_dead_code": 32.0,
    "code_replacement_policy": "batch_random", "commitment_weight": 1.0, "quantizer_ema_decay": 0.99, "kmeans_init": False,  # noqa: E501
}  # fmt: skip
TRAIN = {
    "run_name": "auto", "opt": "adamw", "opt_betas": [0.9, 0.99], "warmup_lr": 1e-6, "min_lr": 0.0, "hflip": 0.5,
    "clip_grad": 1.0, "find_unused_params": True, "save_ckpt_freq": 1, "step_eval": True, "epoch_eval": False,
    "eval_freq": 5000, "eval_metrics_freq": 5000, "eval_image_log_freq": 5000, "num_logged_images": 100,
    "log_wandb": False, "wandb_project": "p", "wandb_entity": None, "wandb_run_name": "auto", "output_dir": "output/auto",  # noqa: E501
    "data_path": "data/train", "eval_data_path": "data/val", "model_ema": True, "model_ema_update_freq": 1,
}  # fmt: skip
VIT = {
    "encoder_type": "vit_b_enc",
    "decoder_type": "vit_b_dec",
    "patch_size": 16,
    "post_mlp": True,
    "dtype": "bf16",
    "model_ema_decay": 0.99,
}
UNET = {
    **VIT, "decoder_type": "unet_patched", "patch_size_dec": 4, "dtype": "fp16", "model_ema_decay": 0.9999,
    "prediction_type": "sample", "beta_schedule": "linear", "cls_free_guidance_dropout": 0.0, "masked_cfg": False,
    "eval_noise_schedule": "DDIMScheduler", "num_eval_timesteps": 50, "input_size_eval": 256, "resolution_step": 32,
}  # fmt: skip
UVIT = {
    **UNET, "decoder_type": "uvit_b_p4_f16", "conditioning": "concat", "prediction_type": "v_prediction", "freeze_enc": True,  # noqa: E501
    "beta_schedule": "shifted_cosine:0.5", "dec_transformer_dropout": 0.2, "resolution_step": 16, "full_ckpt": "enc",
}  # fmt: skip
SD = {
    "encoder_type": "vit_b_enc", "patch_size": 16, "input_size_sd": 512, "pretrained_cn": True, "sd_path": "runwayml/x",
    "freeze_enc": True, "full_ckpt": "enc", "cls_free_guidance_dropout": 0.0, "masked_cfg": False, "use_xformer": True,
    "guidance_scale": 2.5, "cond_scale": 0.8, "include_caption": False, "dtype": "bf16", "model_ema": False,
    "max_input_size": True, "num_eval_timesteps": 50, "input_size_eval": 224, "resolution_step": 16, "blr": 1.6e-4,
}  # fmt: skip
MLP = {
    "encoder_type": "BottleneckMLP/B_6-Wi_1024", "decoder_type": "BottleneckMLP/B_6-Wi_1024", "quantizer_type": "memcodes",  # noqa: E501
    "num_codebooks": 8, "latent_dim": 1024, "dtype": "bf16", "num_logged_images": None,
}  # fmt: skip
P14 = {"patch_size": 14, "resolution_step": 14}
JUDGE = {
    "percept_loss_type": "vit_base_patch16_clip_224.openai", "percept_loss_blocks": "blocks.2-blocks.5",
    "percept_loss_distance": "cosine", "dtype_percept": "fp16", "percept_loss_weight": 1.0,
}  # fmt: skip
SAM = {
    **VIT,
    "post_mlp": True,
    "out_conv": True,
    "mask_size": 64,
    "latent_dim": 1024,
    "loss_fn": "binary_cross_entropy",
    "model_ema": False,
}
ONE, MANY, SLOW = (224, 224), (224, 448), {"warmup_epochs": -1, "warmup_steps": 5000, "full_ckpt": "base"}
# What it is, domain, sizes, codes, loss, options of the family, own options, and what ours must be.
PUBLISHED = [
    ("divae", "rgb", ONE, 16384, "mse", UNET, {"epochs": 50}, "unet/unet 224"),
    ("divae", "rgb", MANY, 16384, "mse", UNET, {"epochs": 5, "full_ckpt": "x"}, "unet/unet 448"),
    ("divae", "depth", ONE, 8192, "smooth_l1", UNET, {}, "unet/unet 224"),
    ("divae", "depth", MANY, 8192, "smooth_l1", UNET, SLOW, "unet/unet 448"),
    ("divae", "normal", ONE, 8192, "mse", UNET, {}, "unet/unet 224"),
    ("divae", "normal", MANY, 8192, "mse", UNET, SLOW, "unet/unet 448"),
    ("divae", "canny_edge", ONE, 8192, "smooth_l1", UNET, {}, "unet/unet 224"),
    ("divae", "canny_edge", MANY, 8192, "smooth_l1", UNET, {"warmup_epochs": -1, "full_ckpt": "x"}, "unet/unet 448"),
    ("divae", "rgb", ONE, 1024, "mse", UVIT, {"input_size_enc": 448}, "unet/uvit 224"),
    ("divae", "rgb", MANY, 1024, "mse", UVIT, {"input_size_enc": 448}, "unet/uvit 448"),
    ("vqcontrolnet", "rgb", ONE, 1024, "mse", SD, {"input_size_enc": 224}, "controlnet/sd 224"),
    ("vqcontrolnet", "rgb", MANY, 1024, "mse", SD, {"input_size_enc": 224}, "controlnet/sd 448"),
    ("vqvae", "rgb", ONE, 1024, "mse", VIT, JUDGE, "vit/decoder 224"),
    ("vqvae", "rgb", MANY, 1024, "mse", VIT, JUDGE | SLOW, "vit/decoder 448"),
    ("vqvae", "semseg_coco", ONE, 4096, "cross_entropy", VIT, {"eval_metrics_freq": 0}, "vit/decoder 224"),
    ("vqvae", "semseg_coco", MANY, 4096, "cross_entropy", VIT, SLOW, "vit/decoder 448"),
    ("vqvae", "CLIP-B16", ONE, 8192, "smooth_l1", VIT, {}, "vit/decoder 14"),
    ("vqvae", "CLIP-B16", MANY, 8192, "smooth_l1", VIT, SLOW, "vit/decoder 28"),
    ("vqvae", "DINOv2-B14", ONE, 8192, "smooth_l1", VIT | P14, {}, "vit/decoder 16"),
    ("vqvae", "DINOv2-B14", MANY, 8192, "smooth_l1", VIT | P14, SLOW | {"input_size_eval": "256"}, "vit/decoder 32"),
    ("vqvae", "ImageBind-H14", ONE, 8192, "smooth_l1", VIT | P14, {}, "vit/decoder 16"),
    ("vqvae", "ImageBind-H14", MANY, 8192, "smooth_l1", VIT | P14, SLOW, "vit/decoder 32"),
    ("vqvae", "DINOv2-B14-global", ONE, 8192, "cosine_1d", MLP | P14, {}, "vit/mlp-decoder None"),
    ("vqvae", "DINOv2-B14-global", MANY, 8192, "cosine_1d", MLP | P14, {"warmup_epochs": 0}, "vit/mlp-decoder None"),
    ("vqvae", "ImageBind-H14-global", ONE, 8192, "cosine_1d", MLP | P14, {}, "vit/mlp-decoder None"),
    ("vqvae", "ImageBind-H14-global", MANY, 8192, "cosine_1d", MLP | P14, {"warmup_epochs": 0}, "vit/mlp-decoder None"),
    ("vqvae", "human_poses", ONE, 1024, "smooth_l1", MLP, {}, "vit/mlp-decoder None"),
    ("vqvae", "sam_mask", ONE, 1024, "binary_cross_entropy", SAM, {"resolution_step": 1}, "vit/decoder 64"),
]  # fmt: skip
NAMES = [f"{one[0]}-{one[1]}-{one[2][1]}-{one[3]}" for one in PUBLISHED]


def theirs(row, **more):
    _, domain, (low, high), codes, loss, family, own, _ = row
    sizes = {
        "input_size_min": low,
        "input_size_max": high,
        "domain": domain,
        "codebook_size": codes,
        "loss_fn": loss,
    }
    quantizer = {} if family.get("quantizer_type") == "memcodes" else LUCID
    return {
        **TRAIN,
        "blr": 1e-4,
        "batch_size": 16,
        "epochs": 20,
        **quantizer,
        **family,
        **sizes,
        **own,
        **more,
    }


def test_there_are_28():
    assert len(PUBLISHED) == 28 and len(set(NAMES)) == 28


@pytest.mark.parametrize("row", PUBLISHED, ids=NAMES)
def test_published_configs_import_and_compose(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(yaml.safe_dump(theirs(row)))
    assert main(["import", "fourm/config", "old.yaml", "new.yaml"]) == 0
    said = capsys.readouterr().out
    assert "no option of 4M" not in said and "does not have it" not in said
    assert f"run_training_{row[0]}.py" in said
    made = load("new.yaml", schema=RunConfig).config
    decoder, size = row[-1].split()
    assert made.model.decoder.name == decoder
    assert str(made.data.input_size_max or made.data.input_size) == size
    assert made.model.quantizer.codebook_size == row[3]
    assert made.run.precision == {"bf16": "bf16", "fp16": "fp16"}.get(theirs(row)["dtype"], "fp16")
    assert (made.optim.base_lr, made.optim.betas, made.optim.clip) == (theirs(row)["blr"], (0.9, 0.99), 1.0)
    assert (made.data.batch_size, made.eval.every, made.run.epochs) == (16, 5000, theirs(row)["epochs"])


def converted(tmp_path, options, *flags, **settings):
    path = tmp_path / "old.yaml"
    path.write_text(options if isinstance(options, str) else yaml.safe_dump(options))
    build = registry().load("format", "fourm/config")
    return build(build.Config(name="fourm/config", **settings)).explained(path, flags)


BASE = {"encoder_type": "vit_b_enc", "data_path": "d", "input_size_max": 224}
CASES = [
    ({}, "optim", {"betas": [0.9, 0.95], "warmup_epochs": 5, "clip": None}),  # the script's defaults, not ours
    ({}, "model.quantizer", {"decay": 0.8, "coef_ema_dead_code": 4.0}),
    ({}, "ema", {"decay": 0.9999}),
    ({"model_ema": False}, "ema", {"decay": None}),
    ({"blr": "1e-4"}, "optim", {"base_lr": 1e-4}),  # a text in YAML 1.1, a number in 4M
    ({"warmup_steps": 7}, "optim", {"warmup": 7}),
    ({"opt": "sgd"}, "optim", {"name": "sgd", "args": {"momentum": 0.9, "nesterov": True}}),
    ({"opt": "momentum"}, "optim", {"args": {"momentum": 0.9}}),
    ({"skip_grad": 2.0}, "optim", {"max_norm": 2.0}),
    ({"weight_decay_end": 0.1, "min_lr": 1e-6}, "optim", {"weight_decay_end": 0.1, "min_lr": 1e-6}),
    ({"dtype": "float32", "seed": 3}, "run", {"precision": "fp32", "seed": 3}),
    ({"output_dir": "out/a"}, "run", {"dir": "out/a"}),
    ({"codebook_weight": 0.5}, "objective", {"weights": {"vq/commit": 0.5}}),
    ({"percept_loss_type": "lpips", "percept_loss_weight": 2}, "objective", {"percept": {"judge": {"name": "percept/lpips"}}}),  # noqa: E501
    ({"mask_value": 0.0}, "data.extra", {"mask": {"name": "mask", "mask_value": 0.0, "threshold": 254}}),
    ({"imagenet_default_mean_and_std": True}, "data.modality", {"mean": [0.485, 0.456, 0.406]}),
    ({"input_size_max": 512}, "data", {"input_size_min": 224, "input_size_max": 512, "resolution_step": 32}),
    ({"log_wandb": True, "wandb_tags": "a--b"}, "hooks.wandb", {"name": "track/wandb", "tags": ["a", "b"]}),
    ({"encoder_ckpt": "a.pth"}, "model", {"encoder_ckpt": "fourm/checkpoint:a.pth"}),
    ({"num_codebooks": 2}, "model.quantizer", {"num_codebooks": 2, "code_dim": 32}),
    ({"use_wds": True, "data_path": "s/[rgb]/x-{0..3}.tar"}, "data", {"name": "tar", "path": "s/{rgb}/x-{0..3}.tar"}),
    ({"decoder_type": "uvit_l_p4_f8", "conditioning": "xattn"}, "model.decoder",
     {"name": "unet/uvit", "size": "l", "downsample_before_mid": False, "conditioning": "cross-attention"}),
    ({"decoder_type": "unet_patched"}, "objective", {"cls_free_guidance_dropout": 0.2, "masked_cfg": True}),
    ({"decoder_type": "unet_patched", "masked_cfg_low": 6, "masked_cfg_high": 190}, "objective",
     {"masked_cfg_low": 6, "masked_cfg_high": 190}),  # 196 tokens: 6 to 190 stay, so 6 to 190 are hidden
    ({"decoder_type": "unet_patched", "prediction_type": "v_prediction-epsilon_loss"}, "objective", {"loss_on": "epsilon"}),  # noqa: E501
    ({"decoder_type": "unet_patched", "zero_terminal_snr": False, "thresholding": False}, "objective.scheduler",
     {"name": "unet/ddpm", "schedule": "linear", "prediction": "sample", "zero_terminal_snr": False}),
    ({"sd_path": "a/b", "dynamic_guidance": True}, "eval.sampling", {"guidance": 4.0, "guidance_schedule": "cosine"}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "place", "expected"), CASES)
def test_options_become_settings(options, place, expected, tmp_path):
    found = converted(tmp_path, {**BASE, **options}).tree
    for name in place.split("."):
        found = found[name]
    assert {key: found.get(key) for key in expected} == expected


def test_flags_replace_the_file(tmp_path):
    made = converted(
        tmp_path,
        {**BASE, "epochs": 3},
        "--config",
        "x.yaml",
        "--epochs",
        "9",
        "--no_post_mlp",
        "--opt_betas",
        "0.5",
        "0.6",
    )
    assert made.tree["run"]["epochs"] == 9 and made.tree["optim"]["betas"] == [0.5, 0.6]
    assert made.tree["model"]["encoder"]["post_mlp"] is False
    made = converted(tmp_path, BASE, "--decoder_type=unet_patched", "--beta_schedule", "linear")
    assert made.tree["objective"]["name"] == "diffusion"
    assert converted(tmp_path, BASE, script="vqvae").tree["objective"]["name"] == "reconstruction"


def test_what_is_lost_is_said(tmp_path):
    remarks = converted(
        tmp_path,
        {
            **BASE,
            "hflip": 0.1,
            "warmup_epochs": -1,
            "codebok_size": 4,
            "beta_schedule": "linear",
            "decoder_type": "unet_patched",
            "out_conv": True,
        },
    ).remarks
    said = "\n".join(remarks)
    for text in ("left out: hflip (4M's scripts never read it", "4M stops there", "codebok_size is no option of 4M, and left out. Did you mean 'codebook_size'?",  # noqa: E501
                 "left out: out_conv (run_training_divae.py does not have it)", "eval.every counts steps"):  # fmt: skip
        assert text in said


BAD = [
    ("a: [", "no YAML file that can be read"),
    ("- 1", "expected a line 'option: value'"),
    ("data: {path: x}\nmodel: 1", "none of its options is there"),
    ({"encoder_type": "vit_b_enc"}, "data_path is not given"),
    (
        {**BASE, "encoder_type": "vit_x_enc"},
        "encoder_type is 'vit_x_enc', which 4M does not have. Did you mean",
    ),
    ({**BASE, "decoder_type": "unet_cat"}, "decoder_type is 'unet_cat', which 4M does not have"),
    ({**BASE, "domain": "rbg"}, "Did you mean 'rgb'"),
    ({**BASE, "loss_fn": "cosine"}, "loss_fn is 'cosine', expected one of"),
    ({**BASE, "epochs": "many"}, "epochs is 'many', expected a number"),
    ({**BASE, "epochs": 1.5}, "expected a whole number"),
    ({**BASE, "epochs": 10**400}, "epochs is 1000"),
    ({**BASE, "codebook_size": 10**12}, "expected a whole number up to 2147483647"),
    ({**BASE, "epochs": None}, "epochs is null, expected a whole number"),
    ({**BASE, "domain": None}, "domain is null, expected a text"),
    ({**BASE, "opt_betas": None}, "opt_betas is null, expected a list of numbers"),
    ({**BASE, "patch_size": 0}, "patch_size is 0, expected a whole number from 1 on"),
    (
        {**BASE, "input_size_max": 448, "resolution_step": 0},
        "resolution_step is 0, expected a whole number from 1 on",
    ),
    ({**BASE, "loss_fn": "a" * 5000}, "a..., expected one of"),
    ({**BASE, "post_mlp": "maybe"}, "expected true or false"),
    ({**BASE, "freeze_enc": True}, "there is no full_ckpt"),
    ({**BASE, "dtype": "fp8"}, "dtype is 'fp8', expected one of"),
    ({**BASE, "quantizer_type": "fsq"}, "expected lucid or memcodes"),
    ({**BASE, "domain": "CLIP-B16", "input_size_max": 230}, "no multiple of patch_size, which is 16"),
]


@pytest.mark.parametrize(("options", "text"), BAD)
def test_bad_input_is_one_line(options, text, tmp_path, capsys):
    path = tmp_path / "old.yaml"
    path.write_text(options if isinstance(options, str) else yaml.safe_dump(options))
    assert main(["import", "fourm/config", str(path), str(tmp_path / "new.yaml")]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1
    assert not (tmp_path / "new.yaml").exists()


def test_null_where_4m_has_it(tmp_path):
    """Null is the default of some options, switches off the scheduler of the evaluation, and is read over elsewhere."""
    options = {"clip_grad": None, "mask_value": None, "output_dir": None, "num_logged_images": None}
    assert converted(tmp_path, {**BASE, **options}).tree["optim"]["clip"] is None
    options = {**BASE, "decoder_type": "unet_patched", "eval_noise_schedule": None}
    assert "scheduler" not in converted(tmp_path, options).tree["eval"]["sampling"]


def test_bad_flags(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(yaml.safe_dump(BASE))
    for target, flag, text in (
        ("new.yaml", "--epoks", "--epoks"),
        ("folder", "--epochs", "belong to a training config"),
    ):
        assert main(["import", "fourm/config", "old.yaml", target, "--", flag, "3"]) == 2
        assert text in capsys.readouterr().err


FLAGS = {"vqvae": 118, "divae": 126, "vqcontrolnet": 122}
"""How many flags the command lines of 4M's scripts have, those that switch something off included."""
IN_FILES_ALONE = {"vqvae": {"patch_size_dec", "run_name"}, "divae": {"patch_size_dec", "run_name", "clip_sample"},
                  "vqcontrolnet": {"patch_size_dec", "clip_sample"}}  # fmt: skip
SWITCHED_OFF = {
    "post_mlp", "out_conv", "freeze_enc", "norm_codes", "norm_latents", "kmeans_init", "zero_terminal_snr",
    "masked_cfg", "resolution_cond", "use_wds", "dist_eval", "log_codebook_usage", "auto_resume", "pin_mem",
    "find_unused_params", "log_wandb",
}  # fmt: skip
"""The flags that 4M can switch off on its command line."""


def words(option):
    """One word or two for an option, as somebody types them."""
    if option.kind == "flag":
        return [f"--{option.name}", *(["True"] if option.valued else [])]
    value = {"int": "3", "float": "0.5", "text": "x", "numbers": "0.5"}[option.kind]
    return [f"--{option.name}", value]


@pytest.mark.parametrize("script", FLAGS)
def test_every_flag_of_4m_is_known(script):
    own = {name: each for name, each in OPTIONS.items() if script in each.scripts}
    typed = {name: each for name, each in own.items() if name not in IN_FILES_ALONE[script]}
    off = [f"--{own[name].off or f'no_{name}'}" for name in sorted(SWITCHED_OFF & own.keys())]
    assert len(typed) + len(off) == FLAGS[script]
    found = _flags(script, [word for each in typed.values() for word in words(each)])
    assert found.keys() == typed.keys() - {"epoch_eval"}
    assert not any(_flags(script, off).values())
    for option in own.values():
        assert bool(option.ours) != bool(option.why), option.name  # mapped, or dropped for a reason


def test_104_flags_are_common():
    common = [name for name, each in OPTIONS.items() if len(each.scripts) == 3]
    typed = [name for name in common if name not in ("patch_size_dec", "run_name")]
    assert len(typed) + len(SWITCHED_OFF & set(typed)) == 104


@pytest.mark.parametrize(("text", "value"), [("False", False), ("True", True), ("maybe", None)])
def test_a_flag_with_a_value(text, value):
    """4M's parser takes every text for true; here the text says what it says."""
    if value is None:
        with pytest.raises(ConfigError, match="thresholding is 'maybe', expected true or false"):
            _flags("divae", ["--thresholding", text])
    else:
        assert _flags("divae", ["--thresholding", text]) == {"thresholding": value}


def test_laws(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump({**BASE, "full_ckpt": "a"}))
    build = registry().load("format", "fourm/config")
    checks.check_format(build(build.Config(name="fourm/config")), path)


def test_the_page_has_the_table_of_the_code():
    assert table() in PAGE.read_text(), "docs/from-4m.md: print(vqcore_fourm.options.table())"
    assert {name for one in PUBLISHED for name in theirs(one)} <= OPTIONS.keys()
