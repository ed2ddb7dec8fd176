"""How a decoder is trained and sampled. `reconstruction`: the decoder maps quantized latents directly to the input.

`Judged` is for every objective whose reconstructions are judged by networks: perceptual losses and an adversary.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqcore.borrowed import keep_frozen
from vqcore.config import Config as BaseConfig
from vqcore.config import refuse_idle, slot, slots
from vqcore.errors import SettingError
from vqcore.losses import LossName, check_loss, output_of, pixel_loss, target_of
from vqcore.protocols import Batch, DataSpec, Decoder, Losses, TokenizerLike, needs_size
from vqcore.registry import registry
from vqcore.schema import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class JudgedConfig(ObjectiveConfig):
    """Settings of an objective whose reconstructions are judged by networks."""

    training_only: ClassVar[tuple[str, ...]] = ("weights", "percept", "adversary")

    percept: dict[str, BaseConfig] = slots("percept")
    """Perceptual losses by label; the loss of a label is called percept/<label>."""
    adversary: BaseConfig | None = slot("adversary", default=None)
    """The rival of the tokenizer in a GAN, a player of its own. Null: none."""


class Judged(nn.Module):
    """An objective whose reconstructions are judged by perceptual losses and an adversary. Base class for objectives.

    `setup` builds these networks. `judged` gives what the model must lower, `rival` what the adversary must lower.
    """

    percept: nn.ModuleDict
    adversary: Any

    def __init__(self, cfg: JudgedConfig, *, spec: DataSpec):
        super().__init__()
        if spec.labels is not None and (cfg.percept or cfg.adversary):
            raise ValueError("percept and adversary judge values; class maps have none: set neither")
        self.cfg, self.spec = cfg, spec
        self.percept, self.adversary = nn.ModuleDict(), None

    def setup(self, tokenizer: TokenizerLike) -> None:
        """Build the networks that judge, on the tokenizer's device."""
        build, device = registry().build, tokenizer.device
        for label, one in self.cfg.percept.items():
            where = f"objective.percept.{label}"
            self.percept[label] = build("percept", one, where, spec=self.spec).to(device)
            keep_frozen(self.percept[label])
        if self.cfg.adversary is not None:
            made = build("adversary", self.cfg.adversary, "objective.adversary", spec=self.spec)
            self.adversary = made.to(device)

    def players(self, step: int) -> tuple[str, ...]:
        """The tokenizer, and from its first step on the adversary."""
        joins = self.adversary is not None and step >= self.adversary.start
        return ("model", "adversary") if joins else ("model",)

    def judged(
        self,
        tokenizer: TokenizerLike,
        x_hat: Float[Tensor, "b c *size"],
        batch: Batch,
        terms: Mapping[str, Tensor],
        *,
        step: int,
        rng: Sequence[torch.Generator],
    ) -> Losses:
        """The losses of the judges for the model. `terms` are the other losses that depend on the decoder.

        In training a loss of weight 0 is left out, and so are the adversary's losses before its first step.
        """
        shown, x = visible(x_hat, batch)
        found = {
            f"percept/{label}": percept(shown, x).mean()
            for label, percept in self.percept.items()
            if not self._is_skipped(f"percept/{label}", tokenizer, step)
        }
        rival = self.adversary
        waits = rival is None or (tokenizer.training and step < rival.start)
        if waits or self._is_skipped("gan/generator", tokenizer, step):
            return Losses(found)
        layer: Tensor | None = tokenizer.decoder.last_layer
        if not (tokenizer.training and torch.is_grad_enabled() and layer is not None and layer.requires_grad):
            layer = None
        weighted = [(self.cfg.weight(name, step), term) for name, term in {**terms, **found}.items()]
        others = [weight * term for weight, term in weighted if weight]  # 0 times NaN would be NaN
        against = None if layer is None or not others else torch.stack(others).sum()
        out = rival.generator(
            shown, x, mask=batch.valid, step=step, rng=rng, against=against, last_layer=layer
        )
        return Losses({**found, **out.terms}, metrics=out.metrics, factors=out.factors)

    def rival(
        self, x_hat: Float[Tensor, "b c *size"], batch: Batch, *, step: int, rng: Sequence[torch.Generator]
    ) -> Losses:
        """The losses of the adversary; `x_hat` has no gradient."""
        shown, x = visible(x_hat.detach(), batch)
        return self.adversary.discriminator(shown, x, mask=batch.valid, step=step, rng=rng)

    def _is_skipped(self, name: str, tokenizer: TokenizerLike, step: int) -> bool:
        return tokenizer.training and self.cfg.weight(name, step) == 0


def visible(x_hat: Float[Tensor, "b c *size"], batch: Batch) -> tuple[Tensor, Tensor]:
    """Reconstruction and data for a network that knows no mask: at invalid positions both have the same values."""
    if batch.valid is None:
        return x_hat, batch.x
    valid = rearrange(batch.valid, "b ... -> b 1 ...")
    x = torch.where(valid, batch.x, 0).nan_to_num()
    return torch.where(valid, x_hat, x), x


class Reconstruction(Judged):
    """Pixel loss between reconstruction and input, plus the losses of the quantizer (VQ-VAE, arXiv 1711.00937, eq. 3).

    Losses: `pixel/<loss>`, the (weighted) mean over valid positions and channels; the quantizer's losses;
    `percept/<label>`, the mean over samples; the adversary's `gan/...`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(JudgedConfig):
        """Settings of the reconstruction objective."""

        loss: LossName | None = None
        """Pixel loss; null means the loss of the modality. cosine compares channels; bce needs data with a range."""
        width: float = 1.0
        """smooth_l1 and huber only: the error below which the loss is quadratic (beta or delta)."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.width > 0:
                raise SettingError("width", f"{self.width} must be above 0")
            if self.loss not in (None, "smooth_l1", "huber"):
                refuse_idle(self, f"loss={self.loss}", "width")

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        self.loss = cfg.loss or spec.loss
        check_loss(self.loss, spec)
        self._options = {"width": cfg.width} if self.loss in ("smooth_l1", "huber") else {}

    def losses(
        self,
        tokenizer: TokenizerLike,
        batch: Batch,
        *,
        player: str,
        step: int,
        rng: Sequence[torch.Generator],
        shared: MutableMapping[str, Any],
    ) -> Losses:
        """Encode, quantize, decode, compare. The adversary judges the reconstruction that the model's turn made.

        `shared` holds `latents` and `x_hat`, for players and heads of child classes.
        """
        if player == "adversary":
            if "x_hat" not in shared:
                with torch.no_grad():
                    self._rebuilt(tokenizer, batch, shared)
            return self.rival(shared["x_hat"], batch, step=step, rng=rng)
        quantized, x_hat, y = self._rebuilt(tokenizer, batch, shared)
        target = target_of(self.loss, batch.x, self.spec)
        pixel = pixel_loss(self.loss, y, target, batch.mask, weight=batch.weight, **self._options)
        terms = {f"pixel/{self.loss}": pixel}
        more = self.judged(tokenizer, x_hat, batch, terms, step=step, rng=rng)
        return Losses(
            {**terms, **quantized.losses, **more.terms},
            x_hat,
            quantized.codes,
            {**quantized.metrics, **more.metrics},
            more.factors,
        )

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

    def _rebuilt(
        self, tokenizer: TokenizerLike, batch: Batch, shared: MutableMapping[str, Any]
    ) -> tuple[Any, Tensor, Tensor]:
        """What the quantizer returned, the reconstruction, and the decoder's output that it is made from."""
        z = tokenizer.latents(batch.x)
        quantized = tokenizer.quantize(z, batch.valid)
        y = decoded(tokenizer.decoder, quantized.z_q, size=tuple(batch.x.shape[-self.spec.rank :]))
        x_hat = output_of(self.loss, y, self.spec)
        shared.update(latents=z, x_hat=x_hat)
        return quantized, x_hat, y


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
