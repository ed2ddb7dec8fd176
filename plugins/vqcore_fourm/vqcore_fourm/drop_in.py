"""4M's way to load a tokenizer: `get_image_tokenizer`, and a model with the methods and layouts of its classes."""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqcore.artefacts.formats import completed
from vqcore.console import say
from vqcore.errors import CheckpointError
from vqcore.tokenizer import Tokenizer
from vqcore_fourm.checkpoint import assembled, understood
from vqcore_fourm.sources import read_source

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Codes(nn.Module):
    """What all of 4M's tokenizers can do: latents are `(b, d, h, w)`, codes `(b, h, w)`, or `(b, heads, h, w)`.

    `tokenizer` is the vqcore tokenizer, which also trains, is saved and exported.
    """

    def __init__(self, tokenizer: Tokenizer, *, undo_std: bool = False):
        super().__init__()
        self.tokenizer, self.undo_std = tokenizer, undo_std

    def prepare_input(self, x: Tensor) -> Tensor:
        """With `undo_std`, pictures standardised with ImageNet's mean and deviation, in -1..1; else `x`."""
        if not self.undo_std:
            return x
        mean, std = (torch.tensor(each, device=x.device).view(3, 1, 1) for each in (_MEAN, _STD))
        return 2 * (x * std + mean) - 1

    def encode(self, x: Tensor) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, "1"], Tensor]:
        """Quantized latents, the codebook's loss and codes; `x` is `(b, c, h, w)`, or class ids `(b, h, w)`."""
        found = self.tokenizer.quantize(self.tokenizer.latents(self.prepare_input(x)))
        # As in 4M, the loss is 0 in evaluation.
        zero = found.z_q.new_zeros(1)
        loss = sum(found.losses.values(), zero) if self.training else zero
        return rearrange(found.z_q, "b h w d -> b d h w"), loss, _theirs(found.codes)

    def tokenize(self, x: Tensor) -> Tensor:
        """The codes of `x`."""
        return self.encode(x)[2]

    def tokens_to_embedding(self, tokens: Int[Tensor, "b *q h w"]) -> Float[Tensor, "b d h w"]:
        """The quantized latents of codes; unlike in 4M, also of several codebooks."""
        return rearrange(self.tokenizer.lookup(_ours(tokens)), "b h w d -> b d h w")


class ImageTokenizer(Codes):
    """A tokenizer with the methods of 4M's VQ and VQVAE, which take the options of a DiVAE and do nothing with them."""

    def decode_quant(self, quant: Float[Tensor, "b d h w"], **ignored: Any) -> Tensor:
        """The decoder's output for quantized latents."""
        if self.tokenizer.decoder is None:
            raise CheckpointError("this tokenizer cannot decode: it was loaded with encoder_only=True.")
        return self.tokenizer.decoder(rearrange(quant, "b d h w -> b h w d"))

    def decode_tokens(self, tokens: Int[Tensor, "b *q h w"], **ignored: Any) -> Tensor:
        """The decoder's output for codes."""
        return self.decode_quant(self.tokens_to_embedding(tokens))

    def forward(self, x: Tensor, **ignored: Any) -> tuple[Tensor, Float[Tensor, "1"]]:
        """The reconstruction and the codebook's loss; without a decoder quantized latents and the loss."""
        quant, loss, _ = self.encode(x)
        return (quant if self.tokenizer.decoder is None else self.decode_quant(quant)), loss

    def autoencode(self, x: Tensor, **ignored: Any) -> Tensor:
        """The reconstruction."""
        return self.decode_quant(self.encode(x)[0])


class DiffusionTokenizer(Codes):
    """A tokenizer with the methods of 4M's DiVAE. `image_size` is the side, or the two sides, that 4M decodes to."""

    def __init__(self, tokenizer: Tokenizer, *, image_size: int | tuple[int, ...], undo_std: bool = False):
        super().__init__(tokenizer, undo_std=undo_std)
        self.image_size = image_size

    def decode_quant(
        self,
        quant: Float[Tensor, "b d h w"],
        timesteps: int | None = None,
        scheduler: Any = None,
        generator: torch.Generator | None = None,
        image_size: int | tuple[int, ...] | None = None,
        verbose: bool = False,
        scheduler_timesteps_mode: str = "trailing",
        orig_res: Tensor | tuple[int, int] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """A sample for quantized latents. `timesteps` is the number of steps, by default that of training.

        `scheduler` is null or a name such as unet/ddim, in place of the scheduler that 4M wants; the noise is that of
        4M. `sampling` are other sampling options of the objective `diffusion`, such as `guidance`.
        """
        if not (scheduler is None or isinstance(scheduler, str)):
            raise CheckpointError(
                f"scheduler is a {type(scheduler).__name__}; give the name of a scheduler of vqcore, such as "
                "'unet/ddim'."
            )
        used: Any = self.tokenizer.cfg.objective
        name = scheduler or used.scheduler.name
        if scheduler_timesteps_mode != "trailing" and name == "unet/ddim":
            scheduler = f"{name}[spacing={scheduler_timesteps_mode}]"
        z = rearrange(quant, "b d h w -> b h w d")
        size = self.image_size if image_size is None else image_size
        rng = [torch.default_generator if generator is None else generator] * len(z)
        codes = torch.zeros(*z.shape[:-1], 1, dtype=torch.long)
        known = copy.copy(self.tokenizer)
        known.__dict__["lookup"] = lambda codes: z  # latents are known already
        with torch.no_grad():
            return self.tokenizer.objective.decode(
                known,
                codes,
                size=(size, size) if isinstance(size, int) else tuple(size),
                rng=rng,
                extras=_told(orig_res, len(z)),
                steps=used.scheduler.num_steps if timesteps is None else timesteps,
                scheduler=scheduler,
                **sampling,
            )

    def decode_tokens(self, tokens: Int[Tensor, "b *q h w"], **options: Any) -> Tensor:
        """A sample for codes; `options` are those of `decode_quant`."""
        return self.decode_quant(self.tokens_to_embedding(tokens), **options)

    def autoencode(self, input_clean: Tensor, **options: Any) -> Tensor:
        """A sample of the size of the input; `options` are those of `decode_quant`."""
        size = tuple(input_clean.shape[-2:])
        return self.decode_quant(self.encode(input_clean)[0], **{"image_size": size, **options})

    def forward(
        self,
        input_clean: Tensor,
        input_noised: Tensor,
        timesteps: Tensor | float,
        cond_mask: Tensor | None = None,
        orig_res: Tensor | tuple[int, int] | None = None,
    ) -> tuple[Tensor, Float[Tensor, "1"]]:
        """The denoiser's prediction and the codebook's loss; tokens are hidden where `cond_mask` is True alone."""
        quant, loss, _ = self.encode(input_clean)
        z, net = rearrange(quant, "b d h w -> b h w d"), self.tokenizer.decoder
        size, count = tuple(input_noised.shape[-2:]), len(z)
        cond = net.condition(z, size=size, mask=cond_mask, extras=_told(orig_res, count))
        t = torch.as_tensor(timesteps, device=z.device).float().expand(count)
        return net(input_noised, t, cond), loss


class ControlNetTokenizer(Codes):
    """A tokenizer with the methods of 4M's VQControlNet, whose decoder works in latents of Stable Diffusion."""

    def decode_quant(
        self,
        quant: Float[Tensor, "b d h w"],
        timesteps: int | None = None,
        generator: torch.Generator | None = None,
        image_size: int | tuple[int, int] | None = None,
        verbose: bool = False,
        vae_decode: bool = False,
        scheduler_timesteps_mode: str = "leading",
        prompt: str | Sequence[str] | None = None,
        orig_res: Any = None,
        guidance_scale: Any = 0.0,
        cond_scale: int | float = 1.0,
        **sampling: Any,
    ) -> Tensor:
        """A sample for quantized latents: latents of Stable Diffusion, with `vae_decode` pictures.

        `timesteps` is the number of steps, by default that of training. As in 4M, `guidance_scale` counts above 1
        alone, and `orig_res` does nothing. `sampling` are other sampling options of the objective `diffusion`. Raises
        `CheckpointError` for another size of latents, another mode than that of the base, and a callable scale.
        """
        net: Any = self.tokenizer.decoder
        objective: Any = self.tokenizer.cfg.objective
        used = objective.scheduler
        side = tuple(net.target_shape(net.size)[1:])
        if (
            image_size is not None
            and ((image_size,) * 2 if isinstance(image_size, int) else image_size) != side
        ):
            raise CheckpointError(
                f"image_size is {image_size}: this decoder has latents of {side[0]} x {side[1]}."
            )
        if scheduler_timesteps_mode != used.spacing:
            raise CheckpointError(
                f"scheduler_timesteps_mode is {scheduler_timesteps_mode!r}: the base has {used.spacing!r}, and 4M "
                "takes no other."
            )
        if callable(guidance_scale):
            raise CheckpointError(
                "guidance_scale is a function: give a number, and guidance_schedule='cosine' for 4M's dynamic guidance."
            )
        z = rearrange(quant, "b d h w -> b h w d")
        rng = [torch.default_generator if generator is None else generator] * len(z)
        known = copy.copy(self.tokenizer)
        known.__dict__ |= {"lookup": lambda codes: z, "decoder": _Latents(net, cond_scale)}
        with torch.no_grad():
            y = self.tokenizer.objective.decode(
                known,
                torch.zeros(*z.shape[:-1], 1, dtype=torch.long),
                size=net.size,
                rng=rng,
                extras=_prompted(prompt, len(z)),
                steps=used.num_steps if timesteps is None else timesteps,
                guidance=guidance_scale if guidance_scale > 1 else 1.0,
                **sampling,
            )
        return self.vae_decode(y) if vae_decode else y

    def decode_tokens(self, tokens: Int[Tensor, "b *q h w"], **options: Any) -> Tensor:
        """A sample for codes; `options` are those of `decode_quant`."""
        return self.decode_quant(self.tokens_to_embedding(tokens), **options)

    def autoencode(self, input_clean: Tensor, **options: Any) -> Tensor:
        """A sample for the codes of an input; `options` are those of `decode_quant`; `image_size` does nothing."""
        options.pop("image_size", None)
        return self.decode_quant(self.encode(input_clean)[0], **options)

    @torch.no_grad()
    def vae_encode(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 4 h2 w2"]:
        """Latents of pictures in -1..1, drawn from the VAE's posterior, and scaled."""
        return self.tokenizer.decoder.base.latents(x, [torch.default_generator] * len(x))

    @torch.no_grad()
    def vae_decode(self, x: Float[Tensor, "b 4 h w"], clip: bool = True) -> Float[Tensor, "b 3 h2 w2"]:
        """Pictures of scaled latents; without `clip` they may leave -1..1."""
        vae = self.tokenizer.decoder.base.vae
        y = vae.decode(x.to(vae.dtype) / vae.config.scaling_factor).sample.float()
        return y.clamp(-1, 1) if clip else y

    def forward(
        self,
        input_clean: Tensor,
        input_noised: Tensor,
        timesteps: Tensor | float,
        cond_mask: Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        orig_res: Any = None,
    ) -> tuple[Tensor, Float[Tensor, "1"]]:
        """The prediction for noised latents, and the codebook's loss; tokens are hidden where `cond_mask` is True."""
        quant, loss, _ = self.encode(input_clean)
        z, net = rearrange(quant, "b d h w -> b h w d"), self.tokenizer.decoder
        if (
            cond_mask is not None
        ):  # unlike `condition`, 4M keeps the prompt of a sample whose tokens are all hidden
            z = z.masked_fill(cond_mask.unsqueeze(-1), 0.0)
        cond = net.condition(z, size=net.size, extras=_prompted(prompt, len(z)))
        t = torch.as_tensor(timesteps, device=z.device).float().expand(len(z))
        return net(input_noised, t, cond), loss


class _Latents:
    """A denoiser whose targets are its results, and that adds `scale` times its residuals to the base."""

    def __init__(self, net: Any, scale: int | float):
        # The scale is a setting of the denoiser; a shallow copy with another one shares all modules.
        self._net = copy.copy(net)
        self._net.cfg = replace(net.cfg, cond_scale=scale)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)

    def __call__(self, *args: Any) -> Tensor:
        return self._net(*args)

    def from_target(self, y: Tensor, size: tuple[int, ...]) -> Tensor:
        return y


def get_image_tokenizer(
    tokenizer_id: str,
    tokenizers_root: str | Path = "./tokenizer_ckpts",
    encoder_only: bool = False,
    device: str | torch.device = "cuda",
    verbose: bool = True,
    return_None_on_fail: bool = False,
    *,
    sd_path: str | Path | None = None,
) -> tuple[ImageTokenizer | DiffusionTokenizer | ControlNetTokenizer, argparse.Namespace] | None:
    """Load `TOKENIZERS_ROOT/TOKENIZER_ID.pth`, a training checkpoint of 4M: the model in eval mode, and its options.

    The file is a pickle; only tensors, plain data and the namespace of the options are read. With
    `return_None_on_fail`, None stands for a file that does not exist. `sd_path` is the Stable Diffusion of a
    VQControlNet, a folder or hf://user/name; by default the one that the options name. Raises `CheckpointError` for a
    file that is damaged or does not fit.
    """
    path = Path(tokenizers_root) / f"{tokenizer_id}.pth"
    if not path.exists():
        if return_None_on_fail:
            return None
        raise CheckpointError(f"{path}: no such file.")
    source = read_source(path, ema=False, allow_pickle=True)
    args = understood(source, path, sd_path=None if sd_path is None else str(sd_path))
    foreign = completed(assembled(source, args, path), path, source=path.name)
    tokenizer = Tokenizer.of(foreign, str(path), encoder_only=encoder_only).to(device)
    kind = "VQ" if encoder_only else args.kind
    if verbose:
        say(f"Loaded tokenizer {tokenizer_id}: {kind}, all tensors fit.")
    kept = dict(args.values, model_type=kind, sync_codebook=False)
    options = argparse.Namespace(**{**source.given, **kept})
    if kind == "VQControlNet":
        return ControlNetTokenizer(tokenizer, undo_std=args["undo_std"]).eval(), options
    if kind != "DiVAE":
        return ImageTokenizer(tokenizer, undo_std=args["undo_std"]).eval(), options
    size = args["image_size_dec"] or args["image_size"]
    return DiffusionTokenizer(tokenizer, image_size=size, undo_std=args["undo_std"]).eval(), options


def _told(orig_res: Tensor | tuple[int, int] | None, count: int) -> dict[str, Tensor] | None:
    """The original size of each sample, as denoisers get it."""
    return None if orig_res is None else {"original_size": torch.as_tensor(orig_res).expand(count, 2)}


def _prompted(prompt: str | Sequence[str] | None, count: int) -> dict[str, list[str]] | None:
    """Prompts, one for each sample; one text is that of all."""
    if prompt is None:
        return None
    return {"caption": [prompt] * count if isinstance(prompt, str) else list(prompt)}


def _theirs(codes: Int[Tensor, "b h w q"]) -> Tensor:
    return codes.squeeze(-1) if codes.shape[-1] == 1 else rearrange(codes, "b h w q -> b q h w")


def _ours(tokens: Any) -> Tensor:
    return tokens.unsqueeze(-1) if tokens.ndim == 3 else rearrange(tokens, "b q h w -> b h w q")
