"""What 4M calls things: presets of networks, names of tensors, classes, published tokenizers.

A new class or preset of 4M is a row of these tables.
"""

import re
from typing import Any

from vqcore.protocols import Published

VIT: dict[str, dict[str, Any]] = {
    f"vit_{size}_{part}": {"size": size} for size in ("s", "b", "l") for part in ("enc", "dec")
}
"""4M's names of transformers, and our settings."""

MLP = re.compile(r"(BottleneckMLP|MLP)/[A-Za-z]*_(\d{1,6})-[A-Za-z]*_(\d{1,6})(?:-[A-Za-z]*_(\d{1,6}))?")
"""4M's names of MLPs: kind, blocks, width, expansion. The letters before the numbers mean nothing."""

DENOISERS: dict[str, dict[str, Any]] = {
    "unet_patched": {"name": "unet/unet"},
    **{f"uvit_{size}_p4_f16": {"name": "unet/uvit", "size": size} for size in ("b", "l", "h")},
    **{
        f"uvit_{size}_p4_f16_longskip": {"name": "unet/uvit", "size": size, "long_skips": True}
        for size in ("b", "l")
    },
    **{
        f"uvit_{size}_p4_f8": {"name": "unet/uvit", "size": size, "downsample_before_mid": False}
        for size in ("b", "l")
    },
    **{
        f"uvit_{size}_p4_f16_extraconv": {
            "name": "unet/uvit",
            "size": size,
            "downsample_before_mid": False,
            "widths": (128, 256, 512),
        }
        for size in ("b", "l")
    },
}
"""4M's names of denoisers, and our settings."""

CONDITIONING = {"concat": "concat", "xattn": "cross-attention"}
"""How a U-ViT sees tokens."""

PREDICTIONS = {
    "sample": "sample",
    "epsilon": "epsilon",
    "v_prediction": "v",
    "v_prediction-epsilon_loss": "v",
}
"""What a denoiser predicts; the last one is v whose error is that of the noise."""

SHIFTED = "shifted_cosine"
"""The schedule that 4M writes with its shift: shifted_cosine:0.5."""

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
"""4M's other schedules of noise, which have the same names here."""

THRESHOLD = 0.995
"""The quantile of 4M's thresholding, whose maximum is 1."""

CONTROLNET = "controlnet/sd"
"""The decoder that drives Stable Diffusion."""

SD_LEVELS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "skip_prk_steps": True,
}
"""The noise levels of Stable Diffusion, where its folder does not say them."""

RENAMED = {
    "cls_emb.": "embed.",
    "quant_proj.": "proj.",
    "post_quant_proj.": "decoder.in_proj.",
    "quantize._codebook.": "quantizer.",
    "quantize.": "quantizer.",
}
"""How names of tensors begin in 4M, and here. The names of all other tensors are the same."""

OLDER = {
    "quant_conv.0.": "quant_proj.",
    "quant_conv.": "quant_proj.",
    "post_quant_conv.0.": "post_quant_proj.",
    "post_quant_conv.": "post_quant_proj.",
}
"""How names of tensors began in older checkpoints, and in later ones."""

CODEBOOK = ("initted", "cluster_size", "embed", "embed_avg")
"""Tensors of `quantize._codebook`; all others of a quantizer lie in `quantize`."""

POINTWISE = ("quant_proj.weight", "post_quant_proj.weight")
"""Convolutions of one position, which are linear layers here."""

OPTIONS = {
    "quantizer_type": "quant_type",
    "encoder_type": "enc_type",
    "decoder_type": "dec_type",
    "input_size_enc": "image_size_enc",
    "input_size_dec": "image_size_dec",
    "input_size_sd": "image_size_sd",
    "quantizer_ema_decay": "ema_decay",
}
"""Options of 4M's training scripts, and the arguments of its classes that they become."""

FEATURES = ("CLIP", "DINO", "ImageBind")
"""Domains with these words hold features: every position is a token, whatever the options say."""

LICENCE = "non-commercial: 4M's Sample Code License for weights (LICENSE_WEIGHTS of apple/ml-4m)"

_HUB = "EPFL-VILAB/4M_tokenizers_"


def _row(name: str, kind: str, size: str, codes: int, domain: str) -> tuple[Published, str]:
    return Published(name, _HUB + name, f"{kind}, {size}, {codes} codes", LICENCE), domain


PUBLISHED = (
    _row("rgb_16k_224-448", "DiVAE", "224-448 pixels", 16384, "rgb"),
    _row("depth_8k_224-448", "DiVAE", "224-448 pixels", 8192, "depth"),
    _row("normal_8k_224-448", "DiVAE", "224-448 pixels", 8192, "normal"),
    _row("edge_8k_224-512", "DiVAE", "224-512 pixels", 8192, "canny_edge"),
    _row("semseg_4k_224-448", "VQVAE", "224-448 pixels, 134 classes", 4096, "semseg_coco"),
    _row("CLIP-B16_8k_224-448", "VQVAE", "features of 224-448 pixels", 8192, "CLIP-B16"),
    _row("DINOv2-B14_8k_224-448", "VQVAE", "features of 224-448 pixels", 8192, "DINOv2-B14"),
    _row("DINOv2-B14-global_8k_16_224", "VQVAE", "a vector, 16 codebooks", 8192, "DINOv2-B14-global"),
    _row("ImageBind-H14_8k_224-448", "VQVAE", "features of 224-448 pixels", 8192, "ImageBind-H14"),
    _row("ImageBind-H14-global_8k_16_224", "VQVAE", "a vector, 16 codebooks", 8192, "ImageBind-H14-global"),
    _row("sam-instance_1k_64", "VQVAE", "masks of 64 pixels", 1024, "sam_mask"),
    _row("human-poses_1k_8", "VQVAE", "a vector, 8 codebooks", 1024, "human_poses"),
)  # fmt: skip
"""The published tokenizers, and the domain of each."""


def ours(name: str) -> str:
    """Our name of a tensor of 4M."""
    return begun(begun(name, OLDER), RENAMED)


def theirs(name: str) -> str:
    """4M's name of a tensor of ours."""
    if name.startswith("quantizer."):
        rest = name.removeprefix("quantizer.")
        return f"quantize._codebook.{rest}" if rest in CODEBOOK else f"quantize.{rest}"
    return begun(name, {ours: theirs for theirs, ours in RENAMED.items()})


def begun(name: str, table: dict[str, str]) -> str:
    """The name with another beginning."""
    begin = next((begin for begin in table if name.startswith(begin)), "")
    return table[begin] + name.removeprefix(begin) if begin else name
