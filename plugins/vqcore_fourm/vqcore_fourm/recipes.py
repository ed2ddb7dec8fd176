"""4M's 28 published training configs: their options that have a meaning here. Others have the script's defaults.

A name is the file's folder and name up to the size, `rgb_ViTB-UNetP4_16k`. The configs that go on at several sizes end
in `_224-448`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vqcore.errors import ConfigError, did_you_mean, listed
from vqcore.protocols import ForeignConfig
from vqcore_fourm.domains import DOMAINS

ALL: Mapping[str, Any] = {
    **{"opt_betas": [0.9, 0.99], "clip_grad": 1.0, "step_eval": True, "eval_freq": 5000},
    **{"input_size_max": 224, "batch_size": 64, "warmup_epochs": 5},
}
LUCID: Mapping[str, Any] = {
    **ALL, "encoder_type": "vit_b_enc", "resolution_step": 16, "input_size_eval": "224", "coef_ema_dead_code": 32.0,
    "quantizer_ema_decay": 0.99, "codebook_size": 8192, "num_eval_metrics_samples": 50000,
}  # fmt: skip
VIT: Mapping[str, Any] = {**LUCID, "decoder_type": "vit_b_dec", "dtype": "bf16", "model_ema_decay": 0.99}
DENOISER: Mapping[str, Any] = {**LUCID, "cls_free_guidance_dropout": 0.0, "masked_cfg": False}
UNET: Mapping[str, Any] = {**DENOISER, "decoder_type": "unet_patched", "resolution_step": 32}
UVIT: Mapping[str, Any] = {
    **DENOISER, "decoder_type": "uvit_b_p4_f16", "prediction_type": "v_prediction",
    "beta_schedule": "shifted_cosine:0.5", "freeze_enc": True, "input_size_enc": 448, "codebook_size": 1024,
}  # fmt: skip
SD: Mapping[str, Any] = {
    **DENOISER, "freeze_enc": True, "input_size_enc": 224, "codebook_size": 1024, "pretrained_cn": True,
    "dtype": "bf16", "blr": 1.6e-4, "batch_size": 16, "warmup_epochs": 1, "model_ema": False, "eval_freq": 10000,
}  # fmt: skip
MLP: Mapping[str, Any] = {
    **ALL, "encoder_type": "BottleneckMLP/B_6-Wi_1024", "decoder_type": "BottleneckMLP/B_6-Wi_1024",
    "quantizer_type": "memcodes", "num_codebooks": 8, "latent_dim": 1024, "dtype": "bf16", "model_ema_decay": 0.99,
    "epochs": 15, "min_crop_scale": 0.2, "imagenet_default_mean_and_std": True,
}  # fmt: skip
GLOBAL: Mapping[str, Any] = {**MLP, "patch_size": 14, "resolution_step": 14, "loss_fn": "cosine_1d"}
MAPS: Mapping[str, Any] = {
    **VIT, "loss_fn": "smooth_l1", "epochs": 20, "min_crop_scale": 0.2, "imagenet_default_mean_and_std": True,
}  # fmt: skip
JUDGED: Mapping[str, Any] = {
    **VIT, "codebook_size": 1024, "epochs": 50, "percept_loss_type": "vit_base_patch16_clip_224.openai",
    "percept_loss_weight": 1.0, "dtype_percept": "fp16",
}  # fmt: skip
SAM: Mapping[str, Any] = {
    **VIT, "out_conv": True, "resolution_step": 1, "codebook_size": 1024, "latent_dim": 1024, "batch_size_eval": 1,
    "loss_fn": "binary_cross_entropy", "dtype": "fp16", "epochs": 24, "batch_size": 384, "model_ema": False,
    "eval_freq": 2000, "num_eval_metrics_samples": 1900, "input_size_eval": "64",
}  # fmt: skip
PLACE = "/path/to/pretrained_weights"
"""What stands in 4M's files for the tokenizer to start from."""
MANY: Mapping[str, Any] = {
    "input_size_max": 448,
    "input_size_eval": "256",
    "batch_size": 16,
    "full_ckpt": PLACE,
}
"""Sizes from 224 to 448 pixels."""
AGAIN: Mapping[str, Any] = {"input_size_max": 448, "batch_size": 16, "epochs": 1, "warmup_epochs": 0}
SHORT: Mapping[str, Any] = {**MANY, "epochs": 1, "blr": 5e-5, "warmup_epochs": -1, "warmup_steps": 5000}
LONG: Mapping[str, Any] = {**MANY, "epochs": 5, "blr": 5e-5, "warmup_epochs": 1}


@dataclass(frozen=True)
class Recipe:
    """One training config: its file below 4M's `cfgs/default/tokenization`, and its options.

    `base` is the recipe whose tokenizer it starts from, here: 4M's files have a placeholder for it.
    """

    name: str
    file: str
    options: dict[str, Any]
    base: str = ""

    @property
    def script(self) -> str:
        """The script that the file is for."""
        return self.file.partition("/")[0]


def _rows(
    domain: str,
    file: str,
    options: Mapping[str, Any],
    many: Mapping[str, Any] | None = None,
    base: str = "",
) -> list[Recipe]:
    """The recipe of a domain, and its continuation at several sizes; `*` in `file` is the size.

    With `base`, both start from the tokenizer of that recipe; else the continuation starts from the first one.
    """
    folder, what = file.split("/")[1:]
    name = f"{folder}_{what.partition('_*')[0]}"
    found = {**options, "domain": domain}
    rows = [Recipe(name, file.replace("*", "224"), found, base)]
    if many is not None:
        rows.append(Recipe(f"{name}_224-448", file.replace("*", "224-448"), {**found, **many}, base or name))
    return rows


_PLAIN = "rgb_ViTB-ViTB_1k"
_P14: Mapping[str, Any] = {"patch_size": 14}
_ROWS = (
    _rows("rgb", "divae/rgb/ViTB-UNetP4_16k_*_predx0", {**UNET, "codebook_size": 16384, "epochs": 50}, LONG),
    _rows("depth", "divae/depth/ViTB-UNetP4_8k_*_predx0", {**UNET, "loss_fn": "smooth_l1", "epochs": 20},
          {**SHORT, "blr": 1e-4}),
    _rows("normal", "divae/normal/ViTB-UNetP4_8k_*_predx0", {**UNET, "epochs": 20}, SHORT),
    _rows("canny_edge", "divae/canny_edge/ViTB-UNetP4_8k_*_predx0",
          {**UNET, "loss_fn": "smooth_l1", "epochs": 50, "blr": 5e-5},
          {**MANY, "epochs": 1, "batch_size": 64, "warmup_epochs": -1}),
    _rows("rgb", "divae/rgb/ViTB-UViTB_1k_*_predv_frozenenc", {**UVIT, "full_ckpt": PLACE, "epochs": 50},
          {**LONG, "batch_size": 8}, _PLAIN),
    _rows("rgb", "vqcontrolnet/rgb/ViTB-SD1.5_1k_*", {**SD, "full_ckpt": PLACE, "epochs": 10},
          {"input_size_max": 448, "epochs": 5}, _PLAIN),
    _rows("rgb", "vqvae/rgb/ViTB-ViTB_1k_*_CLIPB16-5.0", JUDGED, SHORT),
    _rows("semseg_coco", "vqvae/semseg_coco/ViTB-ViTB_4k_*",
          {**VIT, "codebook_size": 4096, "loss_fn": "cross_entropy", "epochs": 20, "batch_size": 80},
          {**SHORT, "batch_size": 10}),
    _rows("CLIP-B16", "vqvae/CLIP-B16/ViTB-ViTB_8k_*", {**MAPS, "batch_size": 128}, SHORT),
    _rows("DINOv2-B14", "vqvae/DINOv2-B14/ViTB-ViTB_8k_*", {**MAPS, **_P14}, {**SHORT, "resolution_step": 14}),
    _rows("ImageBind-H14", "vqvae/ImageBind-H14/ViTB-ViTB_8k_*", {**MAPS, **_P14, "batch_size": 128},
          {**SHORT, "resolution_step": 14}),
    _rows("DINOv2-B14-global", "vqvae/DINOv2-B14-global/BMLP1024-BMLP1024_8k_*", GLOBAL, AGAIN),
    _rows("ImageBind-H14-global", "vqvae/ImageBind-H14-global/BMLP1024-BMLP1024_8k_*", GLOBAL, AGAIN),
    _rows("human_poses", "vqvae/human_poses/BMLP1024-BMLP1024_1k_*",
          {**MLP, "codebook_size": 1024, "loss_fn": "smooth_l1", "warmup_epochs": 1}),
    _rows("sam_mask", "vqvae/sam_instance/ViTB-ViTB_1k_*_64", SAM),
)  # fmt: skip
RECIPES: dict[str, Recipe] = {recipe.name: recipe for rows in _ROWS for recipe in rows}
"""The 28 training configs by name."""

WEIGHTS: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "rgb_16k_224-448": ("rgb_ViTB-UNetP4_16k", {}, ""),
    "depth_8k_224-448": ("depth_ViTB-UNetP4_8k", {}, ""),
    "normal_8k_224-448": ("normal_ViTB-UNetP4_8k", {}, ""),
    "edge_8k_224-512": (
        "canny_edge_ViTB-UNetP4_8k",
        {},
        "sizes up to 512, and 4M's training config has up to 448",
    ),
    "semseg_4k_224-448": ("semseg_coco_ViTB-ViTB_4k", {}, ""),
    "CLIP-B16_8k_224-448": ("CLIP-B16_ViTB-ViTB_8k", {}, ""),
    "DINOv2-B14_8k_224-448": ("DINOv2-B14_ViTB-ViTB_8k", {}, ""),
    "DINOv2-B14-global_8k_16_224": (
        "DINOv2-B14-global_BMLP1024-BMLP1024_8k",
        {"num_codebooks": 16},
        "16 codebooks, as here, and 4M's training config has 8",
    ),
    "ImageBind-H14_8k_224-448": ("ImageBind-H14_ViTB-ViTB_8k", {}, ""),
    "ImageBind-H14-global_8k_16_224": (
        "ImageBind-H14-global_BMLP1024-BMLP1024_8k",
        {"num_codebooks": 16},
        "16 codebooks, as here, and 4M's training config has 8",
    ),
    "sam-instance_1k_64": ("sam_instance_ViTB-ViTB_1k", {}, ""),
    "human-poses_1k_8": ("human_poses_BMLP1024-BMLP1024_1k", {}, ""),
}
"""The published weights: the training config that fits them, what differs, and this in words."""


@dataclass(frozen=True)
class Wanted:
    """What somebody asks for: a training config, with the options in which published weights differ, and remarks."""

    recipe: Recipe
    options: Mapping[str, Any]
    remarks: tuple[str, ...]


def wanted(name: str) -> Wanted:
    """The training config of a name of `RECIPES`, of a file of 4M, or of published weights.

    Raises `ConfigError` for other names.
    """
    files = {f"{row.file.split('/')[1]}_{row.file.split('/')[2]}": row for row in RECIPES.values()}
    plain = {key.lower(): key for key in (*RECIPES, *files, *WEIGHTS)}
    key = plain.get(name.lower())
    if key is None:
        near = did_you_mean(name, plain.values(), 0.4)
        raise ConfigError(f"{name} is no training config of 4M.{near or f' 4M has: {listed(RECIPES, 40)}'}")
    if key not in WEIGHTS:
        recipe = RECIPES[key] if key in RECIPES else files[key]
        return Wanted(recipe, recipe.options | _positions(recipe), ())
    of, changes, differs = WEIGHTS[key]
    more = f" The weights have {differs}." if differs else ""
    text = f"The weights {key} fit this training config. That they were trained with it is not written anywhere.{more}"
    return Wanted(RECIPES[of], {**RECIPES[of].options, **changes}, (text,))


def _positions(recipe: Recipe) -> dict[str, Any]:
    """A run that goes on keeps the positions of the run before, which had 224 pixels: so all weights fit."""
    vector = DOMAINS[recipe.options["domain"]].vector
    keys = ("input_size_enc", "input_size_dec") if recipe.script == "vqvae" else ("input_size_enc",)
    return {} if vector or not recipe.base else dict.fromkeys(keys, 224)


def as_family(found: Wanted, made: ForeignConfig, step: int) -> ForeignConfig:
    """The config that was made of the options, for files of other people. Sizes are multiples of `step`."""
    recipe, domain = found.recipe, DOMAINS[found.options["domain"]]
    tree, notes = dict(made.tree), dict(made.notes)
    data = {key: value for key, value in tree["data"].items() if key not in ("name", "path", "eval_path")}
    tree["data"] = data | ({} if domain.vector else {"resolution_step": step})
    if domain.remark:
        notes["data.modality"] = domain.remark
    remarks = [
        f"Architecture, quantizer, losses and schedule of 4M's training config {recipe.file}.yaml.",
        "batch_size is for one process and base_lr for 256 samples of all processes. How many processes 4M had is not "
        "published.",
        *found.remarks,
    ]
    if recipe.base:
        tree["model"] = {**tree["model"], "full_ckpt": "runs/base"}
        notes["model.full_ckpt"] = f"please check: the run of a config --like fourm/{recipe.base}"
        if not domain.vector:
            notes["model.encoder"] = (
                "Positions are those of the run that it starts from, so that all weights fit."
            )
    elif f"{recipe.name}_224-448" in RECIPES:
        remarks.append(f"4M goes on at several sizes: --like fourm/{recipe.name}_224-448.")
    if "warmup" not in tree["optim"] and "warmup_epochs" not in tree["optim"]:
        remarks.append("There is no warm-up: 4M's file names none that works.")
    return ForeignConfig(tree, notes, tuple(remarks))
