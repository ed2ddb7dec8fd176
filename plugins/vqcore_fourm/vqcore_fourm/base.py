"""What a VQControlNet of 4M needs to know of the Stable Diffusion that it steers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqcore.errors import CheckpointError
from vqcore.reading import read_json
from vqcore_fourm.tables import PREDICTIONS, SD_LEVELS

HUB = "hf://"
TEXT = "controlnet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
"""The width of the prompts stands in the shape of this tensor of the decoder."""
WIDTH_OF_2 = 1024
"""The width of the prompts of Stable Diffusion 2.x."""
NET, LEVELS = "unet/config.json", "scheduler/scheduler_config.json"
"""Files of a folder in the layout of diffusers."""


@dataclass(frozen=True)
class Base:
    """Settings of the decoder `controlnet/sd`, and of the scheduler that samples as 4M does."""

    decoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]


def base_of(place: str | None, recorded: str, shapes: Mapping[str, tuple[int, ...]], where: str) -> Base:
    """What is known of a base: from its folder `place`, else from the shapes of the checkpoint.

    `recorded` is the place that 4M had: an address on the hub still holds, a folder on somebody's disk does not.
    Raises `CheckpointError` for a folder whose files are damaged.
    """
    if place is None and recorded.count("/") == 1 and not Path(recorded).exists():
        place = HUB + recorded
    folder = None if place is None or place.startswith(HUB) else Path(place)
    if folder is not None and not (folder / NET).is_file():
        raise CheckpointError(f"{where}: sd_path={place} is no Stable Diffusion: it has no {NET}.")
    width = shapes.get(f"decoder.{TEXT}", (0, 0))[-1]
    decoder: dict[str, Any] = {"layout": "2.1" if width == WIDTH_OF_2 else "1.5"}
    if folder is not None:
        decoder = _network(folder / NET)
    return Base({"sd_path": place, **decoder}, _scheduler(folder))


def _network(path: Path) -> dict[str, Any]:
    shape = {"block_out_channels": list, "down_block_types": list, "layers_per_block": int}
    found = read_json(path, CheckpointError, {**shape, "cross_attention_dim": int})
    widths, heads = found["block_out_channels"], found.get("attention_head_dim", 8)
    kinds = found["down_block_types"]
    return {
        "layout": "2.1" if found.get("use_linear_projection") else "1.5",
        "widths": widths,
        "attention_levels": [level for level, kind in enumerate(kinds) if str(kind).startswith("CrossAttn")],
        "depth": found["layers_per_block"],
        "heads": [heads] * len(widths) if isinstance(heads, int) else heads,
        "text_width": found["cross_attention_dim"],
        "norm_groups": found.get("norm_num_groups", 32),
    }


def _scheduler(folder: Path | None) -> dict[str, Any]:
    """4M samples with PNDM and the settings that stand beside the base."""
    given: dict[str, Any] = dict(SD_LEVELS)
    if folder is not None and (folder / LEVELS).is_file():
        given = read_json(folder / LEVELS, CheckpointError, {})
    return {
        "name": "unet/pndm",
        "as_4m": True,
        "num_steps": given.get("num_train_timesteps", 1000),
        "schedule": given.get("beta_schedule", "linear"),
        "beta_start": given.get("beta_start", 1e-4),
        "beta_end": given.get("beta_end", 0.02),
        "prediction": PREDICTIONS.get(given.get("prediction_type", "epsilon"), "epsilon"),
        "zero_terminal_snr": False,
        "spacing": given.get("timestep_spacing", "leading"),
        "steps_offset": given.get("steps_offset", 0),
        "final_alpha_one": given.get("set_alpha_to_one", False),
        "runge_kutta": not given.get("skip_prk_steps", False),
    }
