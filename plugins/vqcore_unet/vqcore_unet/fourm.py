"""From the names of tensors in 4M's denoisers to those of `unet/unet` and `unet/uvit`, and back."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from vqcore_unet.uvit import positions

RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}

FIXED = {
    "time_embed.0.": "level.time.linear_1.",
    "time_embed.2.": "level.time.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "middle_block.0.": "mid_in.",
    "middle_block.1.": "mid_attention.",
    "middle_block.2.": "mid_out.",
    "out.0.": "norm_out.",
    "out.2.": "conv_out.",
}


def unet(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The state of `unet/unet` with `depth` residual blocks a level, from 4M's."""
    return {_unet(name, depth): _linear(name, tensor) for name, tensor in state.items()}


def _linear(name: str, tensor: Tensor) -> Tensor:
    return tensor.squeeze(-1) if re.search(r"\.(qkv|proj_out)\.weight$", name) else tensor


def _unet(name: str, depth: int) -> str:
    name = re.sub("|".join(map(re.escape, RES)), lambda found: RES[found[0]], name)
    for old, new in FIXED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    side, number, part, rest = name.split(".", 3)
    if side == "input_blocks":
        level, index = divmod(int(number) - 1, depth + 1)
        if index == depth:
            return f"u.down.{level}.resample.{rest}"
        return f"u.down.{level}.{'attentions' if part == '1' else 'blocks'}.{index}.{rest}"
    level, index = divmod(int(number), depth + 1)
    if rest.startswith("conv."):
        return f"u.up.{level}.resample.{rest}"
    return f"u.up.{level}.{'attentions' if part == '1' else 'blocks'}.{index}.{rest}"


def from_unet(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The state that 4M's U-Net has, from that of `unet/unet`: the inverse of `unet`."""
    attended = {name.split(".")[2] for name in state if re.match(r"u\.up\.\d+\.attentions\.", name)}
    return {_from_unet(name, depth, attended): _pointwise(name, tensor) for name, tensor in state.items()}


def _pointwise(name: str, tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1) if re.search(r"\.(qkv|proj_out)\.weight$", name) else tensor


def _from_unet(name: str, depth: int, attended: set[str]) -> str:
    for old, new in FIXED.items():
        if name.startswith(new):
            return old + _res(name.removeprefix(new), down=False)
    _, side, level, kind, rest = name.split(".", 4)
    first = int(level) * (depth + 1) + (side == "down")
    block = "input_blocks" if side == "down" else "output_blocks"
    if kind == "resample":
        place = 0 if side == "down" else 1 + (level in attended)
        return f"{block}.{first + depth}.{place}.{_res(rest, down=side == 'down')}"
    index, rest = rest.split(".", 1)
    return f"{block}.{first + int(index)}.{int(kind == 'attentions')}.{_res(rest, down=False)}"


def _res(rest: str, *, down: bool) -> str:
    """The name of a layer of a block; `conv` is called `op` on the way down alone."""
    part, dot, end = rest.partition(".")
    names = {ours: theirs for theirs, ours in RES.items() if down or theirs != "op"}
    return names.get(part, part) + dot + end


UVIT = (
    ("time_embedding.", "level.time."),
    ("height_embedding.", "level.sizes.0."),
    ("width_embedding.", "level.sizes.1."),
    ("down_blocks.#.resnets.", "u.down.#.blocks."),
    ("down_blocks.#.downsamplers.0.", "u.down.#.resample."),
    ("up_blocks.#.resnets.", "u.up.#.blocks."),
    ("up_blocks.#.upsamplers.0.", "u.up.#.resample."),
    ("conv_norm_out.", "norm_out."),
    ("mid_block.mid_block.#.cross_attn.", "mid.blocks.#.cross_"),
    ("mid_block.mid_block.#.mlp.fc", "mid.blocks.#.fc"),
    ("mid_block.mid_block.#.adaLN_modulation.", "mid.blocks.#.modulation."),
    ("mid_block.mid_block.#.adaLN_gate.", "mid.blocks.#.gate."),
    ("mid_block.mid_block.", "mid.blocks."),
    ("mid_block.mask_token", "mid.mask_token"),
    ("mid_block.mid_", "mid."),
)
"""How names of the U-ViT begin in 4M and here; # is a number. A row that stands earlier goes first."""

ATTENTION = tuple(
    (f"mid_block.mid_block.#.{name}.{theirs}.", f"mid.blocks.#.{ours}.")
    for name in ("attn", "self_attn")
    for theirs, ours in (("qkv", "qkv"), ("proj", "attn_proj"))
)
"""Self-attention; 4M calls it `self_attn` where there is cross-attention, too."""

POSITIONS = "mid_block.mid_pos_emb"
"""4M's fixed positions, which `unet/uvit` computes."""

TWICE = ("downsample_mid.conv.", "downsample_mid.Conv2d_0.")
"""Two names that 4M has for one convolution."""


def uvit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `unet/uvit` from 4M's: without its fixed positions and the second name of one convolution."""
    left = {name: tensor for name, tensor in state.items() if name != POSITIONS}
    kept = {name.replace(TWICE[1], TWICE[0]): tensor for name, tensor in left.items()}
    return {_begun(name, (*ATTENTION, *UVIT)): tensor for name, tensor in kept.items()}


def from_uvit(state: Mapping[str, Tensor], grid: int = 32) -> dict[str, Tensor]:
    """The state that 4M's U-ViT has, from that of `unet/uvit`: the inverse of `uvit`.

    `grid` is the side of the grid for which its positions are built.
    """
    crosses = any(".cross_" in name for name in state)
    rows = [(ours, theirs) for theirs, ours in (*(ATTENTION[2:] if crosses else ATTENTION[:2]), *UVIT)]
    made = {_begun(name, rows): tensor for name, tensor in state.items()}
    made[POSITIONS] = positions((grid, grid), len(state["mid.proj_in.bias"]))
    return made | {
        name.replace(*TWICE): tensor.clone() for name, tensor in made.items() if name.startswith(TWICE[0])
    }


def _begun(name: str, rows: Iterable[tuple[str, str]]) -> str:
    """The name with another beginning, by the first row that fits; the number stays."""
    for old, new in rows:
        if found := re.match(re.escape(old).replace(r"\#", r"(\d+)"), name):
            return new.replace("#", "".join(found.groups())) + name[found.end() :]
    return name
