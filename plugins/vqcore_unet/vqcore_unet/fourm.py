"""From the names of tensors in 4M's denoisers to those of `unet/unet` and `unet/uvit`."""

import re
from collections.abc import Mapping

from torch import Tensor

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


UVIT = {
    r"time_embedding\.": "level.time.",
    r"height_embedding\.": "level.sizes.0.",
    r"width_embedding\.": "level.sizes.1.",
    r"(down|up)_blocks\.(\d+)\.resnets\.": r"u.\1.\2.blocks.",
    r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.": r"u.\1.\2.resample.",
    r"conv_norm_out\.": "norm_out.",
    r"mid_block\.mid_block\.(\d+)\.(self_attn|attn)\.qkv\.": r"mid.blocks.\1.qkv.",
    r"mid_block\.mid_block\.(\d+)\.(self_attn|attn)\.proj\.": r"mid.blocks.\1.attn_proj.",
    r"mid_block\.mid_block\.(\d+)\.cross_attn\.": r"mid.blocks.\1.cross_",
    r"mid_block\.mid_block\.(\d+)\.mlp\.": r"mid.blocks.\1.",
    r"mid_block\.mid_block\.(\d+)\.adaLN_": r"mid.blocks.\1.",
    r"mid_block\.mid_block\.": "mid.blocks.",
    r"mid_block\.mid_": "mid.",
    r"mid_block\.": "mid.",
}


def uvit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `unet/uvit` from 4M's: without its fixed positions and the second name of one convolution."""
    return {_uvit(name): tensor for name, tensor in state.items() if not re.search("pos_emb|Conv2d_0", name)}


def _uvit(name: str) -> str:
    for old, new in UVIT.items():
        if re.match(old, name):
            return re.sub("^" + old, new, name)
    return name
