"""How a decoder is trained and sampled. `reconstruction`: the decoder maps quantized latents directly to the input.

`Judged` is for every objective whose reconstructions are judged by networks: perceptual losses and an adversary.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqcore.align import Alignment
from vqcore.balance import Balancer
from vqcore.borrowed import keep_frozen
from vqcore.config import Config as BaseConfig
from vqcore.config import refuse_idle, slot, slots
from vqcore.errors import ConfigError, SettingError
from vqcore.losses import LossName, check_loss, output_of, pixel_loss, target_of
from vqcore.protocols import Batch, DataSpec, Decoder, Losses, TokenizerLike, needs_size
from vqcore.registry import registry
from vqcore.schema import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class JudgedConfig(ObjectiveConfig):
    """Settings of an objective whose reconstructions are judged by networks."""

    training_only: ClassVar[tuple[str, ...]] = (
        "weights",
        "percept",
        "adversary",
        "align",
        "align_margins",
        "align_weight",
        "balance",
        "balance_decay",
    )

    percept: dict[str, BaseConfig] = slots("percept")
    """Perceptual losses by label; the loss of a label is called percept/<label>."""
    adversary: BaseConfig | None = slot("adversary", default=None)
    """The rival of the tokenizer in a GAN, a player of its own. Null: none."""
    align: BaseConfig | None = slot("teacher", default=None)
    """A frozen network whose maps of features the latents learn to resemble (VA-VAE, arXiv 2501.01423), through a
    linear map that is trained with the tokenizer: losses align/cosine and align/distances. Null: none."""
    align_margins: tuple[float, float] = (0.5, 0.25)
    """Differences that cost nothing: of a cosine from 1, and between two cosines."""
    align_weight: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` multiplies the weights of align/... by the ratio of the gradients of the losses at the reconstruction
    and of the alignment, where the latents are made, as of the step before. VA-VAE: adaptive, with weights of 0.1."""
    balance: float | None = None
    """Make the weights of pixel/..., percept/... and gan/generator shares of the gradient at the reconstruction, whose
    norms add up to this number (balancer of EnCodec, arXiv 2210.13438: 1.0). Null: weights multiply losses."""
    balance_decay: float = 0.999
    """Decay of the running means of the gradients' norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= margin <= 2 for margin in self.align_margins):
            raise SettingError("align_margins", f"{list(self.align_margins)} must lie in 0..2")
        if self.balance is None:
            refuse_idle(self, "balance=null", "balance_decay")
        elif not self.balance > 0:
            raise SettingError("balance", f"{self.balance} must be above 0")
        elif self.adversary is not None and vars(self.adversary).get("weight") == "adaptive":
            text = "balance weighs gan/generator already: set adversary.weight=fixed"
            raise SettingError(("balance",), text)
        if not 0 <= self.balance_decay < 1:
            raise SettingError("balance_decay", f"{self.balance_decay} must be at least 0 and below 1")


class Judged(nn.Module):
    """An objective whose reconstructions are judged by perceptual losses and an adversary. Base class for objectives.

    Latents may be aligned to a teacher, and the losses at the reconstruction balanced. `setup` builds all networks.
    `judged` gives what the model must lower, `rival` what the adversary must lower.
    """

    percept: nn.ModuleDict
    adversary: Any
    rebuilt: tuple[str, ...] = ()
    """Names of the other losses that depend on the decoder, for the balancer."""

    def __init__(self, cfg: JudgedConfig, *, spec: DataSpec):
        super().__init__()
        if spec.labels is not None and (cfg.percept or cfg.adversary or cfg.align):
            raise ValueError(
                "percept, adversary and align take values; class maps have none: set none of them"
            )
        self.cfg, self.spec = cfg, spec
        self.percept, self.adversary = nn.ModuleDict(), None
        self.align: Alignment | None = None
        self.balancer: Balancer | None = None

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
        if self.cfg.align is not None:
            teacher = build("teacher", self.cfg.align, "objective.align", spec=self.spec)
            dim, adaptive = tokenizer.proj.out_features, self.cfg.align_weight == "adaptive"
            align = Alignment(teacher, dim=dim, margins=self.cfg.align_margins, adaptive=adaptive)
            self.align = align.to(device)
        if self.cfg.balance is not None:
            judges = [f"percept/{label}" for label in self.percept] + ["gan/generator"]
            names = (*self.rebuilt, *judges)
            self.balancer = Balancer(names, total=self.cfg.balance, decay=self.cfg.balance_decay).to(device)

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
        latents: Float[Tensor, "b *grid d"] | None = None,
        output: Tensor | None = None,
    ) -> Losses:
        """The losses of the judges for the model, the alignment of `latents`, and the factors of all of them.

        `terms` are the other losses that depend on the decoder; `output` is what they depend on, by default `x_hat`.
        In training a loss of weight 0 is left out, and so are the adversary's losses before its first step.
        """
        shown, x = visible(x_hat, batch)
        found = {
            f"percept/{label}": percept(shown, x).mean()
            for label, percept in self.percept.items()
            if not self._is_skipped(f"percept/{label}", tokenizer, step)
        }
        learns = tokenizer.training and torch.is_grad_enabled()
        out, rival = Losses({}), self.adversary
        waits = rival is None or (tokenizer.training and step < rival.start)
        if not (waits or self._is_skipped("gan/generator", tokenizer, step)):
            layer: Tensor | None = tokenizer.decoder.last_layer
            if not (learns and layer is not None and layer.requires_grad):
                layer = None
            against = None if layer is None else self._weighted({**terms, **found}, {}, step)
            out = rival.generator(
                shown, x, mask=batch.valid, step=step, rng=rng, against=against, last_layer=layer
            )
        found, factors = {**found, **out.terms}, dict(out.factors)
        if self.balancer is not None and learns:
            weights = {name: self.cfg.weight(name, step) for name in self.balancer.names}
            at = x_hat if output is None else output
            factors |= self.balancer({**terms, **found}, weights, at, step)
        if self.align is not None:
            close, more = self._aligned(self.align, tokenizer, latents, x, {**terms, **found}, factors, step)
            found, factors = {**found, **close}, {**factors, **more}
        return Losses(found, metrics=out.metrics, factors=factors)

    def _aligned(
        self,
        align: Alignment,
        tokenizer: TokenizerLike,
        latents: Tensor | None,
        x: Tensor,
        terms: Mapping[str, Tensor],
        factors: Mapping[str, float | Tensor],
        step: int,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of the alignment and their factors; `terms` and `factors` are those of the other losses."""
        learns = tokenizer.training and torch.is_grad_enabled()
        if latents is None or (learns and not latents.requires_grad):
            why = (
                "gives no latents" if latents is None else "has a frozen encoder, whose latents do not learn"
            )
            raise ConfigError(f"objective.align: this run {why}; leave align out.")
        close = align(latents, x)
        own, others = self._weighted(close, {}, step), self._weighted(terms, factors, step)
        if align.adaptive is None or not learns or own is None or others is None:
            return close, {}
        return close, dict.fromkeys(close, align.adaptive(own, others, tokenizer.proj.weight, step))

    def _weighted(
        self, terms: Mapping[str, Tensor], factors: Mapping[str, float | Tensor], step: int
    ) -> Tensor | None:
        """The sum of the terms as the trainer weighs them; None if no term has a weight."""
        weights = {name: self.cfg.weight(name, step) for name in terms}
        # 0 times NaN would be NaN.
        found = [
            weights[name] * factors.get(name, 1.0) * term for name, term in terms.items() if weights[name]
        ]
        return torch.stack(found).sum() if found else None

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
    `percept/<label>`, the mean over samples; the adversary's `gan/...`; the alignment's `align/...`.
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
        self.rebuilt = (f"pixel/{self.loss}",)
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
        z = shared["latents"]
        more = self.judged(tokenizer, x_hat, batch, terms, step=step, rng=rng, latents=z, output=y)
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
