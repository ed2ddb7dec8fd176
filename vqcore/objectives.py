"""How a decoder is trained and sampled. `reconstruction`: the decoder maps quantized latents directly to the input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqcore.errors import SettingError
from vqcore.losses import LossName, check_loss, output_of, pixel_loss, target_of
from vqcore.protocols import Batch, DataSpec, Decoder, Losses, TokenizerLike, needs_size
from vqcore.schema import ObjectiveConfig


class Reconstruction:
    """Pixel loss between reconstruction and input, plus the losses of the quantizer (VQ-VAE, arXiv 1711.00937, eq. 3).

    Losses: `pixel/<loss>`, the (weighted) mean over valid positions and channels, and the quantizer's losses.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ObjectiveConfig):
        """Settings of the reconstruction objective."""

        loss: LossName | None = None
        """Pixel loss; null means the loss of the modality. cosine compares channels; bce needs data with a range."""
        width: float = 1.0
        """smooth_l1 and huber only: the error below which the loss is quadratic (beta or delta)."""

        def __post_init__(self) -> None:
            if not self.width > 0:
                raise SettingError("width", f"{self.width} must be above 0")

    def __init__(self, cfg: Config, *, spec: DataSpec):
        self.spec = spec
        self.loss = cfg.loss or spec.loss
        check_loss(self.loss, spec)
        self._options = {"width": cfg.width} if self.loss in ("smooth_l1", "huber") else {}

    def setup(self, tokenizer: TokenizerLike) -> None:
        """Nothing to do: only the tokenizer is trained."""

    def players(self, step: int) -> tuple[str, ...]:
        """The tokenizer, at every step."""
        return ("model",)

    def losses(
        self,
        tokenizer: TokenizerLike,
        batch: Batch,
        *,
        player: str,
        step: int,
        rng: Sequence[torch.Generator],
    ) -> Losses:
        """Encode, quantize, decode, compare."""
        quantized = tokenizer.quantize(tokenizer.latents(batch.x), batch.mask)
        y = decoded(tokenizer.decoder, quantized.z_q, size=tuple(batch.x.shape[-tokenizer.spec.rank :]))
        target = target_of(self.loss, batch.x, self.spec)
        terms = {
            f"pixel/{self.loss}": pixel_loss(
                self.loss, y, target, batch.mask, weight=batch.weight, **self._options
            )
        }
        x_hat = output_of(self.loss, y, self.spec)
        return Losses({**terms, **quantized.losses}, x_hat, quantized.codes, quantized.metrics)

    def decode(
        self,
        tokenizer: TokenizerLike,
        codes: Int[Tensor, "b *grid q"],
        *,
        size: tuple[int, ...],
        rng: Sequence[torch.Generator],
        extras: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """One pass of the decoder, without random numbers: `rng` is not used."""
        y = decoded(tokenizer.decoder, tokenizer.lookup(codes), size=size)
        return output_of(self.loss, y, self.spec)


def decoded(decoder: Decoder, z_q: Float[Tensor, "b *grid d"], *, size: tuple[int, ...]) -> Tensor:
    """A plain decoder's output in fp32; only a decoder with `needs_size` gets `size`."""
    return (decoder(z_q, size=size) if needs_size(decoder) else decoder(z_q)).float()


def doubled(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions of a batch, twice: for guidance, which asks a denoiser with and without the tokens in one call.

    Tensors are concatenated with themselves along the batch axis, lists and tuples are joined to themselves; mappings
    inside are doubled too, and everything else stays.
    """
    return {key: _twice(value) for key, value in conditions.items()}


def _twice(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value, value])
    if isinstance(value, Mapping):
        return doubled(value)
    return type(value)((*value, *value)) if isinstance(value, (list, tuple)) else value
