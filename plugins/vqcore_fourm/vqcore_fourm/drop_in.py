"""4M's way to load a tokenizer: `get_image_tokenizer`, and a model with the methods and layouts of its classes."""

import argparse
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqcore.console import say
from vqcore.errors import CheckpointError
from vqcore.tokenizer import Tokenizer
from vqcore_fourm.checkpoint import understood
from vqcore_fourm.sources import read_source

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageTokenizer(nn.Module):
    """A tokenizer with 4M's methods: latents are `(b, d, h, w)`, codes `(b, h, w)`, or `(b, heads, h, w)` if several.

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


def get_image_tokenizer(
    tokenizer_id: str,
    tokenizers_root: str | Path = "./tokenizer_ckpts",
    encoder_only: bool = False,
    device: str | torch.device = "cuda",
    verbose: bool = True,
    return_None_on_fail: bool = False,
) -> tuple[ImageTokenizer, argparse.Namespace] | None:
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
    tokenizer = Tokenizer.load(
        path, device, format="fourm/checkpoint", allow_pickle=True, encoder_only=encoder_only
    )
    source = read_source(path, ema=False, allow_pickle=True)
    args, kind = understood(source, path)
    if verbose:
        say(f"Loaded tokenizer {tokenizer_id}: {'VQ' if encoder_only else kind}, all tensors fit.")
    kept = dict(args.values, model_type="VQ" if encoder_only else kind, sync_codebook=False)
    model = ImageTokenizer(tokenizer, undo_std=args["undo_std"])
    return model.eval(), argparse.Namespace(**{**source.given, **kept})


def _theirs(codes: Int[Tensor, "b h w q"]) -> Tensor:
    return codes.squeeze(-1) if codes.shape[-1] == 1 else rearrange(codes, "b h w q -> b q h w")


def _ours(tokens: Any) -> Tensor:
    return tokens.unsqueeze(-1) if tokens.ndim == 3 else rearrange(tokens, "b q h w -> b h w q")
