"""How a decoder is trained and sampled. `reconstruction`: the decoder maps quantized latents straight to the input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vqcore.protocols import Batch, DataSpec, Losses
from vqcore.schema import ObjectiveConfig


class Reconstruction:
    """Pixel loss between decoding and input, plus what the quantizer asks for (VQ-VAE, arXiv 1711.00937, eq. 3).

    Losses: `pixel/<loss>`, the mean over valid positions and channels, and the quantizer's own.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ObjectiveConfig):
        """Settings of the reconstruction objective."""

        loss: Literal["mse", "l1", "cross_entropy"] | None = None
        """Pixel loss; null takes the modality's own."""

    def __init__(self, cfg: Config, *, spec: DataSpec):
        self.spec = spec
        self.loss = cfg.loss or spec.loss
        if (self.loss == "cross_entropy") != (spec.labels is not None):
            raise ValueError(
                f"loss={self.loss} with {spec.kind} data: cross_entropy and class maps go together"
            )

    def setup(self, tokenizer: Any) -> None:
        """Nothing beside the tokenizer is trained."""

    def players(self, step: int) -> tuple[str, ...]:
        """The tokenizer, at every step."""
        return ("model",)

    def losses(
        self, tokenizer: Any, batch: Batch, *, player: str, step: int, rng: Sequence[torch.Generator]
    ) -> Losses:
        """Encode, quantize, decode, compare."""
        quantized = tokenizer.quantize(tokenizer.latents(batch.x), batch.mask)
        x_hat = decoded(tokenizer.decoder, quantized.z_q, size=tuple(batch.x.shape[-tokenizer.spec.rank :]))
        pixel = pixel_loss(self.loss, x_hat, batch.x, batch.mask)
        return Losses(
            {f"pixel/{self.loss}": pixel, **quantized.losses}, x_hat, quantized.codes, quantized.metrics
        )

    def decode(
        self,
        tokenizer: Any,
        codes: Int[Tensor, "b *grid q"],
        *,
        size: tuple[int, ...],
        rng: Sequence[torch.Generator],
        extras: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """One pass of the decoder; nothing is drawn, so `rng` is not used."""
        return decoded(tokenizer.decoder, tokenizer.lookup(codes), size=size)


def decoded(decoder: Any, z_q: Float[Tensor, "b *grid d"], *, size: tuple[int, ...]) -> Tensor:
    """A plain decoder's output in fp32; `size` reaches only a decoder whose grid does not decide it."""
    return (decoder(z_q, size=size) if getattr(decoder, "needs_size", False) else decoder(z_q)).float()


def pixel_loss(
    name: str, x_hat: Tensor, x: Tensor, mask: Bool[Tensor, "b *size"] | None = None
) -> Float[Tensor, ""]:
    """Mean over samples of their mean `mse`, `l1` or `cross_entropy` (logits against class ids) at valid positions."""
    if name == "cross_entropy":
        each = F.cross_entropy(x_hat, x.long(), reduction="none")
    else:
        difference = x_hat - x
        each = difference.square() if name == "mse" else difference.abs()
        each = rearrange(each, "b c ... -> b ... c").mean(-1)
    if mask is None:
        return each.mean()
    valid = mask.flatten(1)
    return ((each.flatten(1) * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()
