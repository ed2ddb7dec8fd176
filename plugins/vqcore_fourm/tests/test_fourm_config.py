"""Training configs of 4M become ours: the published ones by their facts, every option, flags, and bad input."""

from pathlib import Path

import pytest
import yaml
from vqcore_fourm import config
from vqcore_fourm.config import _flags
from vqcore_fourm.options import OPTIONS, table
from vqcore_fourm.recipes import RECIPES

from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.errors import ConfigError
from vqcore.registry import registry
from vqcore.schema import RunConfig
from vqcore.testing import checks

PAGE = Path(__file__).parents[3] / "docs" / "from-4m.md"
UNREAD = {
    "run_name": "auto", "warmup_lr": 1e-6, "hflip": 0.5, "find_unused_params": True, "save_ckpt_freq": 1,
    "epoch_eval": False, "num_logged_images": 100, "log_wandb": False, "wandb_project": "p", "wandb_entity": None,
    "wandb_run_name": "auto", "output_dir": "output/auto", "data_path": "data/train", "eval_data_path": "data/val",
    "model_ema_update_freq": 1,
}  # fmt: skip
"""What else stands in the published files, and has no meaning here."""
# Learning rate for 256 samples, samples of a process, epochs, warm-up (epochs, or 5000 steps), averaging, codes,
# and what ours must be: decoder and largest size.
FACTS = {
    "rgb_ViTB-UNetP4_16k": (1e-4, 64, 50, 5, 0.9999, 16384, "unet/unet 224"),
    "rgb_ViTB-UNetP4_16k_224-448": (5e-5, 16, 5, 1, 0.9999, 16384, "unet/unet 448"),
    "depth_ViTB-UNetP4_8k": (1e-4, 64, 20, 5, 0.9999, 8192, "unet/unet 224"),
    "depth_ViTB-UNetP4_8k_224-448": (1e-4, 16, 1, 5000, 0.9999, 8192, "unet/unet 448"),
    "normal_ViTB-UNetP4_8k": (1e-4, 64, 20, 5, 0.9999, 8192, "unet/unet 224"),
    "normal_ViTB-UNetP4_8k_224-448": (5e-5, 16, 1, 5000, 0.9999, 8192, "unet/unet 448"),
    "canny_edge_ViTB-UNetP4_8k": (5e-5, 64, 50, 5, 0.9999, 8192, "unet/unet 224"),
    "canny_edge_ViTB-UNetP4_8k_224-448": (5e-5, 64, 1, None, 0.9999, 8192, "unet/unet 448"),
    "rgb_ViTB-UViTB_1k": (1e-4, 64, 50, 5, 0.9999, 1024, "unet/uvit 224"),
    "rgb_ViTB-UViTB_1k_224-448": (5e-5, 8, 5, 1, 0.9999, 1024, "unet/uvit 448"),
    "rgb_ViTB-SD1.5_1k": (1.6e-4, 16, 10, 1, None, 1024, "controlnet/sd 224"),
    "rgb_ViTB-SD1.5_1k_224-448": (1.6e-4, 16, 5, 1, None, 1024, "controlnet/sd 448"),
    "rgb_ViTB-ViTB_1k": (1e-4, 64, 50, 5, 0.99, 1024, "vit/decoder 224"),
    "rgb_ViTB-ViTB_1k_224-448": (5e-5, 16, 1, 5000, 0.99, 1024, "vit/decoder 448"),
    "semseg_coco_ViTB-ViTB_4k": (1e-4, 80, 20, 5, 0.99, 4096, "vit/decoder 224"),
    "semseg_coco_ViTB-ViTB_4k_224-448": (5e-5, 10, 1, 5000, 0.99, 4096, "vit/decoder 448"),
    "CLIP-B16_ViTB-ViTB_8k": (1e-4, 128, 20, 5, 0.99, 8192, "vit/decoder 14"),
    "CLIP-B16_ViTB-ViTB_8k_224-448": (5e-5, 16, 1, 5000, 0.99, 8192, "vit/decoder 28"),
    "DINOv2-B14_ViTB-ViTB_8k": (1e-4, 64, 20, 5, 0.99, 8192, "vit/decoder 16"),
    "DINOv2-B14_ViTB-ViTB_8k_224-448": (5e-5, 16, 1, 5000, 0.99, 8192, "vit/decoder 32"),
    "ImageBind-H14_ViTB-ViTB_8k": (1e-4, 128, 20, 5, 0.99, 8192, "vit/decoder 16"),
    "ImageBind-H14_ViTB-ViTB_8k_224-448": (5e-5, 16, 1, 5000, 0.99, 8192, "vit/decoder 32"),
    "DINOv2-B14-global_BMLP1024-BMLP1024_8k": (1e-4, 64, 15, 5, 0.99, 8192, "vit/mlp-decoder None"),
    "DINOv2-B14-global_BMLP1024-BMLP1024_8k_224-448": (1e-4, 16, 1, None, 0.99, 8192, "vit/mlp-decoder None"),
    "ImageBind-H14-global_BMLP1024-BMLP1024_8k": (1e-4, 64, 15, 5, 0.99, 8192, "vit/mlp-decoder None"),
    "ImageBind-H14-global_BMLP1024-BMLP1024_8k_224-448": (
        1e-4,
        16,
        1,
        None,
        0.99,
        8192,
        "vit/mlp-decoder None",
    ),
    "human_poses_BMLP1024-BMLP1024_1k": (1e-4, 64, 15, 1, 0.99, 1024, "vit/mlp-decoder None"),
    "sam_instance_ViTB-ViTB_1k": (1e-4, 384, 24, 5, None, 1024, "vit/decoder 64"),
}


def theirs(name):
    """The options of a published file."""
    return {**UNREAD, **RECIPES[name].options}


def test_there_are_28():
    assert RECIPES.keys() == FACTS.keys() and len(FACTS) == 28


@pytest.mark.parametrize("name", FACTS)
def test_published_configs_import_and_compose(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(yaml.safe_dump(theirs(name)))
    assert main(["import", "fourm/config", "old.yaml", "new.yaml"]) == 0
    said = capsys.readouterr().out
    assert "no option of 4M" not in said and "does not have it" not in said
    assert f"run_training_{RECIPES[name].script}.py" in said
    made = load("new.yaml", schema=RunConfig).config
    rate, batch, epochs, warmup, decay, codes, expected = FACTS[name]
    assert f"{made.model.decoder.name} {made.data.input_size_max or made.data.input_size}" == expected
    assert (made.optim.base_lr, made.data.batch_size, made.run.epochs) == (rate, batch, epochs)
    assert (made.optim.warmup or made.optim.warmup_epochs, made.ema.decay) == (warmup, decay)
    assert (made.optim.betas, made.optim.clip, made.optim.weight_decay) == ((0.9, 0.99), 1.0, 0.05)
    assert made.model.quantizer.codebook_size == codes
    assert made.run.precision == theirs(name).get("dtype", "fp16")


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
    ({"weight_decay_end": 0}, "optim", {"weight_decay_end": 0.0}),
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
    ({"decoder_type": "unet_patched", "eval_noise_schedule": "UniPCMultistepScheduler"}, "eval.sampling",
     {"scheduler": "unet/diffusers[sampler=UniPCMultistepScheduler]"}),
    ({"sd_path": "a/b", "dynamic_guidance": True}, "eval.sampling", {"guidance": 4.0, "guidance_schedule": "cosine"}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "place", "expected"), CASES)
def test_options_become_settings(options, place, expected, tmp_path):
    found = converted(tmp_path, {**BASE, **options}).tree
    for name in place.split("."):
        found = found[name]
    assert {key: found.get(key) for key in expected} == expected


DIVAE = {"decoder_type": "unet_patched"}
JUDGED = {"percept_loss_type": "vit_tiny", "percept_loss_weight": 2.0}
OTHERS = {
    "patch_size": 8,
    "encoder_type": "vit_l_enc",
    "decoder_type": {"vqvae": "vit_l_dec", "divae": "uvit_b_p4_f16"},
    "input_size_eval": "224",
    "mask_size": (32, {"domain": "sam_mask"}),
    "resolution_step": (16, {"input_size_max": 512}),
    "percept_loss_type": ("lpips", JUDGED),
    "percept_loss_blocks": ("blocks.1", JUDGED),
    "percept_loss_distance": ("l1", JUDGED),
    "percept_loss_weight": (3.0, JUDGED),
    "loss_fn": "l1",
    "quantizer_type": "memcodes",
    "num_codebooks": 2,
    "code_replacement_policy": "linde_buzo_gray",
    "full_ckpt": "a",
    "freeze_enc": (True, {"full_ckpt": "a"}),
    "encoder_ckpt": "a",
    "dec_transformer_dropout": (0.1, {"decoder_type": "uvit_b_p4_f16"}),
    "conditioning": ("xattn", {"decoder_type": "uvit_b_p4_f16"}),
    "prediction_type": "v_prediction",
    "beta_schedule": "scaled_linear",
    "masked_cfg_high": 100,
    "eval_noise_schedule": "PNDMScheduler",
    "opt": "adam",
    "opt_betas": [0.1, 0.2],
    "momentum": (0.5, {"opt": "sgd"}),
    "weight_decay_end": 0.0,
    "dtype": "fp32",
    "warmup_steps": 9,
    "skip_grad": 2.0,
    "domain": "normal",
    "eval_data_path": "v",
    "step_eval": True,
    "eval_freq": (7, {"step_eval": True}),
    "num_eval_metrics_samples": 9,
    "output_dir": "out",
    "wandb_project": ("p", {"log_wandb": True}),
    "wandb_entity": ("e", {"log_wandb": True}),
    "wandb_run_name": ("r", {"log_wandb": True}),
    "wandb_tags": ("a--b", {"log_wandb": True}),
    "data_path": "other",
}
"""Another value of an option, with what it needs to mean something."""


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.ours])
def test_every_option_with_a_meaning_changes_the_config_or_is_remarked_on(name):
    option = OPTIONS[name]
    for script in option.scripts:
        value = OTHERS.get(name)
        value, more = value if isinstance(value, tuple) else (value, {})
        value = value[script] if isinstance(value, dict) else value
        default = option.default_of(script)
        if name not in OTHERS:
            value = not default if option.kind == "flag" else 2 * (default or 1)
        base = {"encoder_type": "vit_b_enc", "data_path": "d", **(DIVAE if script == "divae" else {}), **more}
        made, plain = (config.converted(script, given, "x") for given in ({**base, name: value}, base))
        assert made.tree != plain.tree or set(made.remarks) - set(plain.remarks), script


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
    assert {option for name in RECIPES for option in theirs(name)} <= OPTIONS.keys()
