"""A tiny Stable Diffusion with random weights, built and saved with the classes of diffusers and transformers."""

import json
import shutil
from pathlib import Path

import torch

PARITY = Path(__file__).parent / "parity"
SETTINGS = {
    "input_size_sd": 64,
    "widths": (8, 16),
    "attention_levels": (0,),
    "depth": 1,
    "heads": (4, 4),
    "text_width": 16,
    "norm_groups": 4,
}
"""The settings of `controlnet/sd` for this base."""
LEVELS = {
    "schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction": "epsilon",
    "zero_terminal_snr": False,
}
"""The settings of its scheduler."""


def save(folder: Path, *, seed: int = 0, **unet: object) -> Path:
    """Write the pipeline; words and text encoder are those of the recorded case."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(seed)
    made = {
        "in_channels": 4, "out_channels": 4, "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16, "attention_head_dim": 4, "norm_num_groups": 4, **unet,
    }  # fmt: skip
    UNet2DConditionModel(**made).save_pretrained(folder / "unet")
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    AutoencoderKL(
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    for part in ("tokenizer", "text_encoder", "scheduler"):
        shutil.copytree(PARITY / "stable-diffusion" / part, folder / part)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder
