"""What a VQControlNet of 4M needs to know of the Stable Diffusion that it steers."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqcore.errors import CheckpointError, listed
from vqcore.reading import read_json
from vqcore_fourm.tables import PREDICTIONS, SD_LEVELS

HUB = "hf://"
TEXT = "controlnet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
"""The width of the prompts stands in the shape of this tensor of the decoder."""
WIDTH_OF_2 = 1024
"""The width of the prompts of Stable Diffusion 2.x."""
FIRST, WIDTH = "decoder.controlnet.conv_in.weight", 320
"""The first tensor of the decoder, and its channels for Stable Diffusion 1.x and 2.x."""
PARTS = {"vae": "vae.", "unet": "decoder.unet.", "text": "decoder.text_encoder."}
"""Parts of the base that `vqcore_controlnet` borrows, and how the names of their tensors begin in 4M's state."""
COMPUTED = "decoder.empty_str_encoding"
"""What the text encoder makes of the empty prompt; it is computed anew."""
NET, LEVELS = "unet/config.json", "scheduler/scheduler_config.json"
"""Files of a folder in the layout of diffusers."""


@dataclass(frozen=True)
class Base:
    """Settings of the decoder `controlnet/sd`, and of the scheduler that samples as 4M does."""

    decoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    folder: Path | None = None
    """The base itself, where it is given as a folder."""


def base_of(place: str | None, recorded: str, shapes: Mapping[str, tuple[int, ...]], where: str) -> Base:
    """What is known of a base: from its folder `place`, else from the shapes of the checkpoint.

    `recorded` is the place that 4M had: an address on the hub still holds, and so does a folder that is there.
    Raises `CheckpointError` for a folder that is missing or damaged, and where the shapes need a folder.
    """
    if place is None and (Path(recorded) / NET).is_file():
        place = recorded
    elif place is None and recorded.count("/") == 1 and not Path(recorded).exists():
        place = HUB + recorded
    folder = None if place is None or place.startswith(HUB) else Path(place)
    if folder is not None and not (folder / NET).is_file():
        raise CheckpointError(f"{where}: sd_path={place} is no Stable Diffusion: it has no {NET}.")
    channels = shapes.get(FIRST, (WIDTH,))[0]
    if folder is None and channels != WIDTH:
        raise CheckpointError(
            f"{where}: its ControlNet begins with {channels} channels, and that of Stable Diffusion 1.x and 2.x with "
            f"{WIDTH}: give the folder of its base: sd_path=FOLDER."
        )
    width = shapes.get(f"decoder.{TEXT}", (0, 0))[-1]
    decoder: dict[str, Any] = {"layout": "2.1" if width == WIDTH_OF_2 else "1.5"}
    if folder is not None:
        decoder = _network(folder / NET)
    return Base({"sd_path": place, **decoder}, _scheduler(folder), folder)


def refuse_another(folder: Path, state: Mapping[str, Tensor], where: str) -> None:
    """Compare the base in a folder with the one that 4M stored in a checkpoint.

    A checkpoint without tensors of a part says nothing of this part. Raises `CheckpointError` for another base.
    """
    base, _ = importlib.import_module("vqcore_controlnet.base").load(str(folder), torch.float32)
    for part, begin in PARTS.items():
        stored = {name: tensor for name, tensor in state.items() if name.startswith(begin)}
        if not stored:
            continue
        right = {_plain(name): tensor for name, tensor in base.get_submodule(part).state_dict().items()}
        found = {_plain(name.removeprefix(begin)): tensor for name, tensor in stored.items()}
        wrong = [name for name in sorted(right.keys() | found.keys()) if not _same(name, right, found)]
        if wrong:
            raise CheckpointError(
                f"{where}: sd_path={folder} is another Stable Diffusion than the one of this checkpoint: its {part} "
                f"differs in {listed(wrong, 3)}."
            )


def _plain(name: str) -> str:
    """The name of a tensor in every version of transformers."""
    return name.removeprefix("text_model.")


def _same(name: str, right: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    if name.endswith("position_ids"):  # numbers from 0 on, which only older versions store
        return True
    return name in right and name in found and torch.equal(right[name], found[name].float())


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
    schedule = given.get("beta_schedule", "linear")
    betas = {"beta_start": given.get("beta_start", 1e-4), "beta_end": given.get("beta_end", 0.02)}
    return {
        "name": "unet/pndm",
        "as_4m": True,
        "num_steps": given.get("num_train_timesteps", 1000),
        "schedule": schedule,
        **(betas if schedule != "squaredcos_cap_v2" else {}),  # it has none, though diffusers writes them
        "prediction": PREDICTIONS.get(given.get("prediction_type", "epsilon"), "epsilon"),
        "zero_terminal_snr": False,
        "spacing": given.get("timestep_spacing", "leading"),
        "steps_offset": given.get("steps_offset", 0),
        "final_alpha_one": given.get("set_alpha_to_one", False),
        "runge_kutta": not given.get("skip_prk_steps", False),
    }
