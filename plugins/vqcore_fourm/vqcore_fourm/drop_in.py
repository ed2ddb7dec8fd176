"""4M's way to load a tokenizer: `get_image_tokenizer`, and a model with the methods and layouts of its classes."""

import argparse
import copy
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
    """A tokenizer with the methods of 4M's VQ and VQVAE."""

    def decode_quant(self, quant: Float[Tensor, "b d h w"]) -> Tensor:
        """The decoder's output for quantized latents."""
        if self.tokenizer.decoder is None:
            raise CheckpointError("this tokenizer cannot decode: it was loaded with encoder_only=True.")
        return self.tokenizer.decoder(rearrange(quant, "b d h w -> b h w d"))

    def decode_tokens(self, tokens: Int[Tensor, "b *q h w"]) -> Tensor:
        """The decoder's output for codes."""
        return self.decode_quant(self.tokens_to_embedding(tokens))

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, "1"]]:
        """The reconstruction and the codebook's loss; without a decoder quantized latents and the loss."""
        quant, loss, _ = self.encode(x)
        return (quant if self.tokenizer.decoder is None else self.decode_quant(quant)), loss

    def autoencode(self, x: Tensor) -> Tensor:
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


def get_image_tokenizer(
    tokenizer_id: str,
    tokenizers_root: str | Path = "./tokenizer_ckpts",
    encoder_only: bool = False,
    device: str | torch.device = "cuda",
    verbose: bool = True,
    return_None_on_fail: bool = False,
) -> tuple[ImageTokenizer | DiffusionTokenizer, argparse.Namespace] | None:
    """Load `TOKENIZERS_ROOT/TOKENIZER_ID.pth`, a training checkpoint of 4M: the model in eval mode, and its options.

    The file is a pickle; only tensors, plain data and the namespace of the options are read. With
    `return_None_on_fail`, None stands for a file that does not exist. Raises `CheckpointError` for a file that is
    damaged or does not fit.
    """
    path = Path(tokenizers_root) / f"{tokenizer_id}.pth"
    if not path.exists():
        if return_None_on_fail:
            return None
        raise CheckpointError(f"{path}: no such file.")
    source = read_source(path, ema=False, allow_pickle=True)
    args = understood(source, path)
    if args.kind == "VQControlNet" and not encoder_only:
        raise CheckpointError(
            f"{path} is a VQControlNet, which this function loads with encoder_only=True alone. To decode: "
            'Tokenizer.load(path, format="fourm/checkpoint[sd_path=FOLDER]", allow_pickle=True).'
        )
    foreign = completed(assembled(source, args, path), path, source=path.name)
    tokenizer = Tokenizer.of(foreign, str(path), encoder_only=encoder_only).to(device)
    kind = "VQ" if encoder_only else args.kind
    if verbose:
        say(f"Loaded tokenizer {tokenizer_id}: {kind}, all tensors fit.")
    kept = dict(args.values, model_type=kind, sync_codebook=False)
    options = argparse.Namespace(**{**source.given, **kept})
    if kind != "DiVAE":
        return ImageTokenizer(tokenizer, undo_std=args["undo_std"]).eval(), options
    size = args["image_size_dec"] or args["image_size"]
    return DiffusionTokenizer(tokenizer, image_size=size, undo_std=args["undo_std"]).eval(), options


def _told(orig_res: Tensor | tuple[int, int] | None, count: int) -> dict[str, Tensor] | None:
    """The original size of each sample, as denoisers get it."""
    return None if orig_res is None else {"original_size": torch.as_tensor(orig_res).expand(count, 2)}


def _theirs(codes: Int[Tensor, "b h w q"]) -> Tensor:
    return codes.squeeze(-1) if codes.shape[-1] == 1 else rearrange(codes, "b h w q -> b q h w")


def _ours(tokens: Any) -> Tensor:
    return tokens.unsqueeze(-1) if tokens.ndim == 3 else rearrange(tokens, "b q h w -> b h w q")
