"""The names that 4M's denoisers give the tensors of `unet/unet` and `unet/uvit`, in both directions."""

import re
from collections.abc import Mapping

from torch import Tensor

from vqcore_unet.unet import UNet
from vqcore_unet.uvit import UViT, positions

Rows = tuple[tuple[str, str], ...]
"""How names begin in 4M and here; # is a number. A row that stands earlier goes first."""

RES: Rows = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
    ("op", "conv"),
)
"""Layers inside the blocks of the U-Net."""

OUTER: Rows = (
    ("time_embed.0.", "level.time.linear_1."),
    ("time_embed.2.", "level.time.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("middle_block.0.", "mid_in."),
    ("middle_block.1.", "mid_attention."),
    ("middle_block.2.", "mid_out."),
    ("out.0.", "norm_out."),
    ("out.2.", "conv_out."),
)
"""What of the U-Net is not on its way down or up."""

UVIT: Rows = (
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
    ("mid_block.mid_block.#.adaLN_modulation", "mid.blocks.#.modulation"),
    ("mid_block.mid_block.#.adaLN_gate", "mid.blocks.#.gate"),
    ("mid_block.mid_block.", "mid.blocks."),
    ("mid_block.mask_token", "mid.mask_token"),
    ("mid_block.mid_", "mid."),
)

PLAIN: Rows = (
    ("mid_block.mid_block.#.attn.qkv.", "mid.blocks.#.qkv."),
    ("mid_block.mid_block.#.attn.proj.", "mid.blocks.#.attn_proj."),
)
"""Blocks without cross-attention."""

CROSS: Rows = tuple((theirs.replace("attn", "self_attn", 1), ours) for theirs, ours in PLAIN)
"""Blocks with cross-attention."""

TWICE = {"downsample_mid.Conv2d_0.": "downsample_mid.conv."}
"""4M has this convolution under two names."""


def names(net: UNet | UViT) -> dict[str, str]:
    """4M's name of every tensor of a denoiser, by ours."""
    ours = tuple(net.state_dict())
    if isinstance(net, UNet):
        return {name: _unet_theirs(name, net) for name in ours}
    blocks = CROSS if net.mid.cross else PLAIN
    return {name: _renamed(name, _turned((*blocks, *UVIT))) for name in ours}


def like_theirs(name: str, tensor: Tensor) -> Tensor:
    """A tensor of ours in the shape that 4M has for it; `name` is 4M's. Its attention has convolutions of one position."""
    return tensor.unsqueeze(-1) if _POINTWISE.search(name) else tensor


def like_ours(name: str, tensor: Tensor) -> Tensor:
    """A tensor of 4M in the shape that we have for it; `name` is 4M's."""
    return tensor.squeeze(-1) if _POINTWISE.search(name) and tensor.ndim == 3 else tensor


_POINTWISE = re.compile(r"(^|\.)((in|out)put_blocks\.\d+\.1|middle_block\.1)\.(qkv|proj_out)\.weight$")


def fixed(net: UNet | UViT) -> dict[str, Tensor]:
    """Tensors in 4M's states whose values follow from the settings, by 4M's names."""
    if isinstance(net, UNet):
        return {}
    _, width, *grid = net.mid.pos_emb.shape
    return {"mid_block.mid_pos_emb": positions(tuple(grid), width)}


def unet(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The state of `unet/unet` with `depth` residual blocks a level, from 4M's."""
    return {_unet_ours(name, depth): like_ours(name, tensor) for name, tensor in state.items()}


def uvit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `unet/uvit` from 4M's: without its fixed positions and the second name of one convolution."""
    left = {name: tensor for name, tensor in state.items() if not re.search("pos_emb|Conv2d_0", name)}
    return {_renamed(name, (*PLAIN, *CROSS, *UVIT)): tensor for name, tensor in left.items()}


def _unet_ours(name: str, depth: int) -> str:
    for theirs, ours in RES:
        name = re.sub(rf"\.{re.escape(theirs)}\.", f".{ours}.", name)
    if (found := _renamed(name, OUTER)) != name:
        return found
    side, number, part, rest = name.split(".", 3)
    way, first = ("down", 1) if side == "input_blocks" else ("up", 0)
    level, index = divmod(int(number) - first, depth + 1)
    if rest.startswith("conv."):
        return f"u.{way}.{level}.resample.{rest}"
    return f"u.{way}.{level}.{'attentions' if part == '1' else 'blocks'}.{index}.{rest}"


def _unet_theirs(name: str, net: UNet) -> str:
    found = re.fullmatch(r"u\.(down|up)\.(\d+)\.(blocks|attentions|resample)\.(?:(\d+)\.)?(.*)", name)
    if found is None:
        return _inside(_renamed(name, _turned(OUTER)))
    way, level, part, index, rest = found.groups()
    # In 4M a level is a row of `depth` blocks and one more: down, what halves the size; up, another block, which what
    # doubles the size stands behind.
    depth = len(net.u.get_submodule("down.0.blocks"))
    number = int(level) * (depth + 1) + int(index or depth)
    if way == "down":
        return _inside(f"input_blocks.{number + 1}.{int(part == 'attentions')}.{rest}")
    attends = len(net.u.get_submodule(f"up.{level}.attentions")) > 0
    if part == "resample":
        return f"output_blocks.{number}.{1 + attends}.{rest}"
    return _inside(f"output_blocks.{number}.{int(part == 'attentions')}.{rest}")


def _inside(name: str) -> str:
    """The name with 4M's names of the layers in blocks."""
    for theirs, ours in RES:
        name = re.sub(rf"\.{ours}\.", f".{theirs}.", name)
    return name


def _turned(rows: Rows) -> Rows:
    return tuple((ours, theirs) for theirs, ours in rows)


def _renamed(name: str, rows: Rows) -> str:
    """The name with another beginning, by the first row that fits; # is a number, which stays."""
    for old, new in rows:
        if found := re.match(re.escape(old).replace(r"\#", r"(\d+)"), name):
            return new.replace("#", "".join(found.groups())) + name[found.end() :]
    return name
