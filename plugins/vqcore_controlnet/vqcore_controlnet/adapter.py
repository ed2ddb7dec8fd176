"""From tokens to latents of Stable Diffusion: a decoder of its own, whose network `controlnet/sd` can take.

The network has the blocks of a VAE's decoder (arXiv 2112.10752): a middle with attention, two levels, one of which
doubles the grid. It learns through the frozen VAE: its latents are decoded to pictures, and the pictures are compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore import config
from vqcore.borrowed import read
from vqcore.errors import CheckpointError, SettingError
from vqcore.protocols import DataSpec
from vqcore_controlnet.base import FACTOR, check_pictures, load_vae

PREFIX = "decoder.latents."
"""How the names of the network's tensors begin in a tokenizer."""


class Latents(nn.Module):
    """Tokens `(b, d, h, w)` to latents `(b, 4, 2h, 2w)`; with 8 channels, to their mean and deviation, as in 4M."""

    def __init__(self, dim: int, widths: tuple[int, ...] = (512, 256), groups: int = 32, channels: int = 4):
        from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D

        super().__init__()
        first = widths[0]
        self.conv_in = nn.Conv2d(dim, first, 3, padding=1)
        self.mid_block = UNetMidBlock2D(
            in_channels=first,
            temb_channels=None,  # type: ignore[arg-type]  # no time here
            attention_head_dim=first,
            resnet_groups=groups,
            resnet_eps=1e-6,
        )
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(
                num_layers=3, in_channels=a, out_channels=b, add_upsample=place == 0, resnet_groups=groups
            )
            for place, (a, b) in enumerate(zip((first, *widths), widths))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h2 w2"]:
        """The latents, scaled as Stable Diffusion's U-Net sees them."""
        y = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            y = block(y)
        return self.conv_out(F.silu(self.conv_norm_out(y)))


class Adapter(nn.Module):
    """A plain decoder: tokens, latents, and the frozen VAE of Stable Diffusion, which is borrowed."""

    needs_size: Literal[True] = True
    borrowed = ("vae",)

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `controlnet/adapter`."""

        places: ClassVar[tuple[str, ...]] = ("sd_path",)

        sd_path: str | None = None
        """Stable Diffusion 1.x or 2.x: a folder in the layout of diffusers, or hf://user/name[@revision]."""
        widths: tuple[int, ...] = (512, 256)
        """Channels of the two levels of the network."""
        norm_groups: int = 32
        """Groups of every GroupNorm; the number must divide the widths."""

        def __post_init__(self) -> None:
            if len(self.widths) != 2 or any(width < 1 or width % self.norm_groups for width in self.widths):
                raise SettingError(
                    ("widths", "norm_groups"),
                    f"{list(self.widths)} must be two multiples of norm_groups={self.norm_groups}",
                )

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        super().__init__()
        check_pictures(spec)
        self.cfg = cfg
        self.latents = Latents(dim, cfg.widths, cfg.norm_groups)
        self.vae: Any = nn.Module()  # `borrow` puts the VAE here

    def borrow(self, places: Mapping[str, str]) -> dict[str, str]:
        """Load the VAE of Stable Diffusion. Raises `CheckpointError` if it is missing or does not fit."""
        place = places.get("vae", self.cfg.sd_path)
        if place is None:
            raise CheckpointError(
                "no Stable Diffusion is given: set model.decoder.sd_path to its folder or hf:// address"
            )
        self.vae, digest = load_vae(place)
        return {"vae": digest}

    @property
    def last_layer(self) -> Tensor:
        """The last weight that learns."""
        return self.latents.conv_out.weight

    def forward(self, z_q: Float[Tensor, "b h w d"], *, size: tuple[int, ...]) -> Float[Tensor, "b 3 h2 w2"]:
        """Pictures of the size: tokens are enlarged to half the size of the latents (nearest neighbours)."""
        if any(side % (2 * FACTOR) for side in size):
            raise ValueError(f"size {list(size)} is not a multiple of {2 * FACTOR}")
        z = rearrange(z_q, "b h w d -> b d h w")
        y = self.latents(F.interpolate(z, tuple(side // (2 * FACTOR) for side in size), mode="nearest"))
        return self.vae.decode(y / self.vae.config.scaling_factor).sample


def from_run(network: Latents, place: str) -> None:
    """Fill the network from a saved tokenizer with the decoder `controlnet/adapter`. Raises `CheckpointError`."""
    tensors = {
        name.removeprefix(PREFIX): one for name, one in read(place)[0].items() if name.startswith(PREFIX)
    }
    own = network.state_dict()
    if not tensors or any(name not in tensors or tensors[name].shape != own[name].shape for name in own):
        raise CheckpointError(
            f"model.decoder.adapter: {place} is no tokenizer with a controlnet/adapter of these sizes. Train one, then "
            "vqcore export it"
        )
    network.load_state_dict({name: tensors[name] for name in own})
