"""Stable Diffusion as the decoder: a ControlNet, trained on dequantized tokens, steers the frozen U-Net.

Papers: ControlNet (arXiv 2302.05543); latent diffusion (arXiv 2112.10752). Tokens as the control: 4M (arXiv
2312.06647), whose recorded results hold with `as_4m`.
Differs from 4M: where all tokens are hidden there is no prompt either, and the prediction does not depend on them.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from vqcore_unet.denoiser import check_groups

from vqcore import config
from vqcore.attention import choose
from vqcore.config import at_least
from vqcore.diffusion import coefficients
from vqcore.errors import CheckpointError, ConfigError, SettingError
from vqcore.protocols import DataSpec, expand
from vqcore_controlnet.adapter import Latents, from_run
from vqcore_controlnet.base import FACTOR, Base, check_pictures, check_vae, load

HINT = (32, 96, 256)
"""Channels of the conditioning embedding after those of the tokens."""
SETTINGS = {
    "block_out_channels": "widths",
    "down_block_types": "attention_levels",
    "layers_per_block": "depth",
    "attention_head_dim": "heads",
    "cross_attention_dim": "text_width",
    "use_linear_projection": "layout",
    "norm_num_groups": "norm_groups",
}
"""Facts of a U-Net, and the settings that decide them here."""
TABLE = 33
"""So many noise levels are compared with those of the base."""


class Condition(NamedTuple):
    """What steers the U-Net: the tokens as the ControlNet gets them, prompts, and the factor of its residuals."""

    hint: Float[Tensor, "b c h w"]
    text: Float[Tensor, "b n d"]
    scale: Float[Tensor, "b 1 1 1"]


class Hint(nn.Module):
    """Convolutions from tokens to the first level of the ControlNet; the last one begins at zero."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        widths = (dim, *HINT)
        self.conv_in = nn.Conv2d(dim, dim, 3, padding=1)
        pairs = [pair for a, b in zip(widths, HINT) for pair in ((a, a), (a, b))]
        self.blocks = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.conv_out = _zeroed(nn.Conv2d(widths[-1], out, 3, padding=1))

    def forward(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
        """The tokens as channels of the first level."""
        y = F.silu(self.conv_in(z))
        for block in self.blocks:
            y = F.silu(block(y))
        return self.conv_out(y)


class Adapted(nn.Module):
    """A trained adapter from tokens to latents, and a convolution that begins at zero.

    With `as_4m`, the adapter gives mean and deviation of latents, as 4M's, and the convolution sees neighbours.
    """

    def __init__(self, dim: int, out: int, *, as_4m: bool = False):
        super().__init__()
        self.adapter = Latents(dim, channels=8) if as_4m else Latents(dim)
        side = 3 if as_4m else 1
        self.conv_out = _zeroed(nn.Conv2d(8 if as_4m else 4, out, side, padding=side // 2))

    def forward(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Twice the size of the grid: the latents as channels of the first level."""
        return self.conv_out(self.adapter(z))


class StableDiffusion(nn.Module):
    """Predict the noise (or v) in latents of Stable Diffusion from tokens and prompts.

    Borrowed, frozen and never saved: VAE, U-Net and text encoder (`base`). Trained and saved: the ControlNet.
    """

    is_denoiser: Literal[True] = True
    borrowed = ("base",)

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `controlnet/sd`."""

        places: ClassVar[tuple[str, ...]] = ("sd_path", "adapter")
        training_only: ClassVar[tuple[str, ...]] = ("pretrained_cn", "checkpointing")

        sd_path: str | None = None
        """Stable Diffusion 1.x or 2.x: a folder in the layout of diffusers, or hf://user/name[@revision]."""
        layout: Literal["1.5", "2.1"] = "1.5"
        """Version of the base: decides heads, width of the text and kind of projections. 2.1 predicts v."""
        input_size_sd: int | tuple[int, ...] = 512
        """Size of the pictures of Stable Diffusion. Other sizes of tokens are decoded at this size and resized."""
        pretrained_cn: bool = True
        """The ControlNet starts as a copy of the U-Net's way down; false: from random numbers."""
        hint: Literal["convolutions", "adapter", "adapter-4m"] = "convolutions"
        """What makes of tokens what the ControlNet sees: convolutions, or the network of controlnet/adapter, which
        makes latents of them; adapter-4m is that of 4M's checkpoints, with mean and deviation."""
        adapter: str | None = None
        """With hint=adapter: a run or tokenizer with the decoder controlnet/adapter, from whose network it starts."""
        cond_scale: float = 1.0
        """Factor of what the ControlNet adds, in sampling only. 4M samples with 0.8."""
        precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        """Type of the base's weights. The ControlNet keeps fp32."""
        attention: Literal["auto", "sdpa", "xformers"] = "auto"
        """Attention of U-Net and ControlNet: auto takes xFormers on CUDA where it is installed."""
        checkpointing: bool = False
        """Recompute the blocks in the backward pass instead of storing their activations: less memory, slower."""
        as_4m: bool = False
        """Guidance as 4M: the branch without tokens keeps what the ControlNet adds to the middle."""
        widths: tuple[int, ...] = (320, 640, 1280, 1280)
        """Channels of the levels of the base's U-Net. For bases of other sizes than 1.x and 2.x."""
        attention_levels: tuple[int, ...] = (0, 1, 2)
        """Levels with attention, from 0."""
        depth: int = 2
        """Residual blocks a level."""
        heads: tuple[int, ...] | None = None
        """Heads of each level. Null: 8 everywhere for 1.5, and 64 channels each for 2.1."""
        text_width: int | None = None
        """Width of the text encoder. Null: 768 for 1.5, 1024 for 2.1."""
        norm_groups: int = 32
        """Groups of every GroupNorm."""

        def __post_init__(self) -> None:
            at_least(self, widths=1, depth=1, norm_groups=1, heads=1, text_width=1, cond_scale=0)
            check_groups(self, "widths", self.widths, self.norm_groups)
            if self.adapter is not None and self.hint != "adapter":
                raise SettingError(
                    "adapter", f"{self.adapter} does nothing with hint={self.hint}: set hint=adapter"
                )
            sides = self.input_size_sd if isinstance(self.input_size_sd, tuple) else (self.input_size_sd,)
            multiple = FACTOR * 2 ** (len(self.widths) - 1)
            if any(side < 1 or side % multiple for side in sides):
                raise SettingError("input_size_sd", f"{self.input_size_sd} is not a multiple of {multiple}")
            if any(level not in range(len(self.widths)) for level in self.attention_levels):
                raise SettingError(
                    "attention_levels",
                    f"{list(self.attention_levels)}: there are levels 0 to {len(self.widths) - 1}",
                )
            if self.heads is not None and len(self.heads) != len(self.widths):
                raise SettingError(
                    "heads", f"{list(self.heads)}: give one number for each of {len(self.widths)} levels"
                )

        @property
        def facts(self) -> dict[str, Any]:
            """The settings of the base's U-Net that the ControlNet shares, by their names in diffusers."""
            heads = (
                (8,) * len(self.widths)
                if self.layout == "1.5"
                else tuple(width // 64 for width in self.widths)
            )
            return {
                "block_out_channels": self.widths,
                "down_block_types": tuple(
                    "CrossAttnDownBlock2D" if level in self.attention_levels else "DownBlock2D"
                    for level in range(len(self.widths))
                ),
                "layers_per_block": self.depth,
                "attention_head_dim": self.heads or heads,
                "cross_attention_dim": self.text_width or (768 if self.layout == "1.5" else 1024),
                "use_linear_projection": self.layout == "2.1",
                "norm_num_groups": self.norm_groups,
            }

    def __init__(self, cfg: Config, *, dim: int, spec: DataSpec):
        from diffusers import ControlNetModel

        super().__init__()
        check_pictures(spec)
        self.cfg, self.size = cfg, expand(cfg.input_size_sd, 2)
        self.target_shape(spec.size)
        self.base: Any = nn.Module()  # `borrow` puts Stable Diffusion here
        controlnet: Any = ControlNetModel(in_channels=4, **cfg.facts)
        controlnet.controlnet_cond_embedding = nn.Identity()  # computed once a sample, by `hint`
        self.controlnet = controlnet
        self.hint: nn.Module = (
            Hint(dim, cfg.widths[0])
            if cfg.hint == "convolutions"
            else Adapted(dim, cfg.widths[0], as_4m=cfg.hint == "adapter-4m")
        )
        self._starts = False
        self._switched = ""

    # The weights of Stable Diffusion

    def fetch(self) -> None:
        """Say that no checkpoint fills the ControlNet: it starts from the base, and the adapter from its run."""
        self._starts = self.cfg.pretrained_cn
        if self.cfg.hint == "adapter" and self.cfg.adapter is None:
            raise CheckpointError(
                "hint=adapter starts from a trained network: set model.decoder.adapter to the run that has it"
            )
        if isinstance(self.hint, Adapted) and self.cfg.adapter is not None:
            from_run(self.hint.adapter, self.cfg.adapter)
        self._start()

    def borrow(self, places: Mapping[str, str]) -> dict[str, str]:
        """Load Stable Diffusion. Raises `CheckpointError` if it is missing, or another one than the settings say."""
        place = places.get("base", self.cfg.sd_path)
        if place is None:
            raise CheckpointError(
                "no Stable Diffusion is given: set model.decoder.sd_path to its folder or hf:// address"
            )
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.cfg.precision]
        base, digest = load(place, dtype)
        self._check(base, place)
        if self.cfg.checkpointing:
            base.unet.enable_gradient_checkpointing()
            self.controlnet.enable_gradient_checkpointing()
        self.base = base
        self._start()
        return {"base": digest}

    def _check(self, base: Base, place: str) -> None:
        """Compare a base with the settings, which decided the ControlNet."""
        has = dict(base.unet.config)
        levels = len(self.cfg.widths)
        for name, wanted in self.cfg.facts.items():
            found = has.get(name)
            if name == "attention_head_dim":
                found = has.get("num_attention_heads") or found
            if isinstance(wanted, tuple) and isinstance(found, int):
                found = (found,) * levels
            if (tuple(found) if isinstance(found, list) else found) != wanted:
                version = next(
                    (v for v, width in (("1.5", 768), ("2.1", 1024)) if has["cross_attention_dim"] == width),
                    None,
                )
                hint = f" This looks like version {version}: set model.decoder.layout" if version else ""
                wanted = self.cfg.layout if SETTINGS[name] == "layout" else wanted
                shown, ours = (list(one) if isinstance(one, tuple) else one for one in (found, wanted))
                raise CheckpointError(
                    f"{place}: its U-Net has {name}={shown}, and model.decoder.{SETTINGS[name]} says {ours}.{hint}"
                )
        if has["in_channels"] != 4:
            raise CheckpointError(
                f"{place}: its U-Net takes {has['in_channels']} channels, not the 4 of latents"
            )
        check_vae(base.vae, place)

    def _start(self) -> None:
        """Copy the U-Net's way down into the ControlNet, once, when both are there and no checkpoint fills it."""
        if not self._starts or not isinstance(self.base, Base):
            return
        self._starts = False
        for name in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            state = {key: value.float() for key, value in getattr(self.base.unet, name).state_dict().items()}
            getattr(self.controlnet, name).load_state_dict(state)

    def check_scheduler(self, scheduler: Any) -> None:
        """Raise `ValueError` for a scheduler with other noise levels or another prediction than the base."""
        from diffusers import DDPMScheduler

        made = DDPMScheduler.from_config({k: v for k, v in self.base.levels.items() if k != "_class_name"})
        levels, table = made.config, made.alphas_cumprod.double()
        times = torch.linspace(0, min(len(table), scheduler.num_steps) - 1, TABLE).long()
        a, _, c, d = coefficients(scheduler, times, 1)
        predicts = levels["prediction_type"]
        wanted = {"epsilon": (0.0, 1.0), "v_prediction": (-(1 - table[times]).sqrt(), table[times].sqrt())}
        if predicts not in wanted:
            raise ValueError(f"the base predicts {predicts}, which is not known here")
        same = len(table) == scheduler.num_steps and torch.allclose(a.square(), table[times], atol=1e-4)
        for ours, theirs in zip((c, d), wanted[predicts]):
            same = same and torch.allclose(
                ours, torch.as_tensor(theirs, dtype=ours.dtype).expand_as(ours), atol=1e-3
            )
        if not same:
            word = "v" if predicts == "v_prediction" else predicts
            betas = () if levels["beta_schedule"] == "squaredcos_cap_v2" else ("beta_start", "beta_end")
            keys = {
                "schedule": levels["beta_schedule"],
                **{name: levels[name] for name in betas},
                "num_steps": len(table),
                "prediction": word,
                "zero_terminal_snr": str(levels["rescale_betas_zero_snr"]).lower(),
            }
            told = ", ".join(f"{key}: {value}" for key, value in keys.items())
            raise ValueError(
                f"the base was trained with other noise levels or another prediction: take objective.scheduler="
                f"{{name: unet/ddpm, {told}}}"
            )

    # A denoiser

    @property
    def last_layer(self) -> Tensor:
        """The last weight, which is the base's and frozen; until the base is there, the last that learns."""
        if not isinstance(self.base, Base):
            return self.controlnet.controlnet_mid_block.weight
        return self.base.unet.conv_out.weight

    def target_shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Channels and size of the latents, always those of `input_size_sd`.

        Raises `ValueError` for a size of other proportions.
        """
        if len(size) != 2 or size[0] * self.size[1] != size[1] * self.size[0]:
            raise ValueError(
                f"size {list(size)} has other proportions than input_size_sd={list(self.size)}, at which the base works"
            )
        return (4, *(side // FACTOR for side in self.size))

    def to_target(
        self, x: Float[Tensor, "b 3 h w"], rng: Sequence[torch.Generator]
    ) -> Float[Tensor, "b 4 h2 w2"]:
        """Latents of pictures, which are first resized to `input_size_sd`; drawn from the VAE's posterior."""
        with torch.no_grad(), self._precise(x.device):
            return self.base.latents(_resized(x, self.size), rng)

    def from_target(self, y: Float[Tensor, "b 4 h2 w2"], size: tuple[int, ...]) -> Float[Tensor, "b 3 h w"]:
        """Pictures of latents, at `input_size_sd` or resized to another size, in [-1, 1]."""
        with self._precise(y.device):
            return _resized(self.base.pictures(y), tuple(size))

    def condition(
        self,
        z_q: Float[Tensor, "b *grid d"],
        *,
        size: tuple[int, ...],
        mask: Bool[Tensor, "b *grid"] | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> Condition:
        """Tokens and prompts, once a sample. Prompts are `extras["caption"]`, or empty."""
        self.target_shape(size)
        free = (
            torch.zeros(len(z_q), dtype=torch.bool, device=z_q.device)
            if mask is None
            else mask.flatten(1).all(1)
        )
        texts = _prompts(extras or {}, len(z_q))
        scale = 1.0 if self.training else self.cfg.cond_scale
        scales = torch.full((len(z_q), 1, 1, 1), scale, device=z_q.device)
        if mask is not None:
            hides = mask
            if self.cfg.as_4m and not self.training:
                hides = mask & ~free.view(-1, *[1] * (mask.ndim - 1))
                scales = torch.where(free.view(-1, 1, 1, 1), 0.0, scales)
            z_q = z_q.masked_fill(hides.unsqueeze(-1), 0.0)
        z = rearrange(z_q, "b h w d -> b d h w").float()
        latent = tuple(side // FACTOR for side in self.size)
        if isinstance(self.hint, Adapted):
            latent = tuple(side // 2 for side in latent)  # the adapter doubles it
        hint = self.hint(F.interpolate(z, latent, mode="nearest"))
        with self._precise(z.device):
            prompts = self.base.prompts(["" if gone else text for gone, text in zip(free.tolist(), texts)])
        return Condition(hint, prompts, scales)

    def forward(
        self, x_t: Float[Tensor, "b 4 h w"], t: Float[Tensor, " b"], cond: Condition
    ) -> Float[Tensor, "b 4 h w"]:
        """What the base predicts at the noise levels `t`, steered."""
        self._switch(x_t)
        text = cond.text.to(cond.hint.dtype)
        down, middle = self.controlnet(x_t, t, text, cond.hint, return_dict=False)
        middle = middle * (cond.scale if not self.cfg.as_4m or self.training else self.cfg.cond_scale)
        with self._precise(x_t.device):
            dtype = self.base.unet.dtype
            return self.base.unet(
                x_t.to(dtype),
                t,
                text.to(dtype),
                down_block_additional_residuals=[(one * cond.scale).to(dtype) for one in down],
                mid_block_additional_residual=middle.to(dtype),
            ).sample

    def _precise(self, device: torch.device) -> Any:
        """The base's own precision, whatever surrounds it; with fp32, the precision that surrounds it."""
        return nullcontext() if self.cfg.precision == "fp32" else torch.autocast(device.type, enabled=False)

    def _switch(self, x: Tensor) -> None:
        """Choose the kernel of attention, when the device is known."""
        if self._switched == str(x.device):
            return
        self._switched = str(x.device)
        q = torch.empty(
            1,
            64,
            1,
            self.cfg.widths[0] // self.cfg.facts["attention_head_dim"][0],
            device=x.device,
            dtype=x.dtype,
        )
        if choose(self.cfg.attention, q, q) == "xformers":
            for network in (self.base.unet, self.controlnet):
                network.enable_xformers_memory_efficient_attention()


def _prompts(extras: Mapping[str, Any], count: int) -> list[str]:
    """A prompt for each sample: `caption`, which may be one text for all.

    Raises `ConfigError` for anything else, and for texts under another label, which would go unseen.
    """
    for label, found in extras.items():
        if label != "caption" and (isinstance(found, str) or _are_texts(found)):
            raise ConfigError(
                f"data.extra.{label}: these are texts, and controlnet/sd takes prompts from data.extra.caption alone."
            )
    texts = extras.get("caption", "")
    if isinstance(texts, str):
        return [texts] * count
    if len(texts) == count and _are_texts(texts):
        return list(texts)
    raise ConfigError("caption: give one text for all samples, or a list with one text for each of them.")


def _are_texts(found: Any) -> bool:
    is_list = isinstance(found, (list, tuple)) and len(found) > 0
    return is_list and all(isinstance(text, str) for text in found)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _resized(x: Float[Tensor, "b c h w"], size: tuple[int, ...]) -> Float[Tensor, "b c h2 w2"]:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
