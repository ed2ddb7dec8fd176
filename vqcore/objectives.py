"""How a decoder is trained and sampled. `reconstruction`: the decoder maps quantized latents directly to the input.
`diffusion`: the decoder, a denoiser, predicts from noised inputs, and sampling goes from noise to a sample.

`Judged` is for every objective whose reconstructions are judged by networks: perceptual losses and an adversary.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vqcore.align import Alignment
from vqcore.balance import Balancer
from vqcore.borrowed import keep_frozen
from vqcore.compose.build import component
from vqcore.compose.describe import inline
from vqcore.compose.text import bracketed
from vqcore.config import Config as BaseConfig
from vqcore.config import above_zero, at_least, refuse_idle, slot, slots, to_tree
from vqcore.diffusion import (
    SCHEDULES,
    Target,
    Times,
    epsilon,
    guided,
    hidden_tokens,
    min_snr,
    of_velocity,
    same_levels,
    times,
    x_0,
)
from vqcore.errors import ConfigError, SettingError, VqcoreError
from vqcore.losses import LossName, check_loss, output_of, pixel_loss, sample_losses, target_of
from vqcore.protocols import (
    Batch,
    DataSpec,
    Decoder,
    Denoiser,
    Losses,
    Quantized,
    Sampler,
    TokenizerLike,
    check_scheduler,
    needs_size,
)
from vqcore.registry import registry
from vqcore.rng import forked, rand, randn
from vqcore.schema import ObjectiveConfig

log = logging.getLogger(__name__)


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
    """Make the weights of pixel/... (or diffusion/...), percept/... and gan/generator shares of the gradient at what
    the decoder returns, whose norms add up to this number (balancer of EnCodec, arXiv 2210.13438: 1.0). Null: weights
    multiply losses."""
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


@dataclass(frozen=True)
class Rebuilt:
    """What one pass of the tokenizer gives: what the quantizer returned, the losses that depend on the decoder, what
    the decoder returned, and the reconstruction, which may be None where nobody judges it."""

    quantized: Quantized
    terms: Mapping[str, Tensor]
    output: Tensor
    x_hat: Tensor | None


class Judged(nn.Module):
    """An objective whose reconstructions are judged by perceptual losses and an adversary. Base class for objectives.

    A child class says in `rebuilt` how the tokenizer makes a reconstruction. Latents may be aligned to a teacher, and
    the losses at the reconstruction balanced. `setup` builds all networks. `judged` gives what the model must lower,
    `rival` what the adversary must lower; `losses` has both turns.
    """

    cfg: Any
    percept: nn.ModuleDict
    adversary: Any
    own_terms: tuple[str, ...] = ()
    """Names of the losses that `rebuilt` gives, for the balancer."""

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
            last: Tensor | None = tokenizer.decoder.last_layer
            if last is not None and not last.requires_grad:
                raise ConfigError(
                    "objective.adversary: the last layer of this decoder is frozen; leave adversary out."
                )
            made = build("adversary", self.cfg.adversary, "objective.adversary", spec=self.spec)
            self.adversary = made.to(device)
        if self.cfg.align is not None:
            teacher = build("teacher", self.cfg.align, "objective.align", spec=self.spec)
            dim, adaptive = tokenizer.proj.out_features, self.cfg.align_weight == "adaptive"
            align = Alignment(teacher, dim=dim, margins=self.cfg.align_margins, adaptive=adaptive)
            self.align = align.to(device)
        if self.cfg.balance is not None:
            judges = [f"percept/{label}" for label in self.percept] + ["gan/generator"]
            names = (*self.own_terms, *judges)
            self.balancer = Balancer(names, total=self.cfg.balance, decay=self.cfg.balance_decay).to(device)

    def players(self, step: int) -> tuple[str, ...]:
        """The tokenizer, and from its first step on the adversary."""
        joins = self.adversary is not None and step >= self.adversary.start
        return ("model", "adversary") if joins else ("model",)

    @property
    def has_judges(self) -> bool:
        """Does anybody judge the reconstructions? Known after `setup`."""
        return bool(self.percept) or self.adversary is not None

    def rebuilt(
        self,
        tokenizer: TokenizerLike,
        batch: Batch,
        *,
        rng: Sequence[torch.Generator],
        shared: MutableMapping[str, Any],
    ) -> Rebuilt:
        """One pass of the tokenizer over a batch. What it draws must not depend on what `rng` has drawn before."""
        raise NotImplementedError

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
        """The losses of the model, or of the adversary, which judges the reconstruction that the model's turn made.

        `shared` holds `x_hat`, for players and heads of child classes.
        """
        if player == "adversary":
            if "x_hat" not in shared:
                with torch.no_grad():
                    shared["x_hat"] = self.rebuilt(tokenizer, batch, rng=rng, shared=shared).x_hat
            return self.rival(shared["x_hat"], batch, step=step, rng=rng)
        made = self.rebuilt(tokenizer, batch, rng=rng, shared=shared)
        if made.x_hat is not None:
            shared["x_hat"] = made.x_hat
        more = self.judged(tokenizer, made, batch, step=step, rng=rng, latents=shared.get("latents"))
        return Losses(
            {**made.terms, **made.quantized.losses, **more.terms},
            made.x_hat,
            made.quantized.codes,
            {**made.quantized.metrics, **more.metrics},
            more.factors,
        )

    def judged(
        self,
        tokenizer: TokenizerLike,
        made: Rebuilt,
        batch: Batch,
        *,
        step: int,
        rng: Sequence[torch.Generator],
        latents: Float[Tensor, "b *grid d"] | None = None,
    ) -> Losses:
        """The losses of the judges for the model, the alignment of `latents`, and the factors of all of them.

        In training a loss of weight 0 is left out, and so are the adversary's losses before its first step.
        """
        terms, x = made.terms, seen(batch)
        shown = x if made.x_hat is None else visible(made.x_hat, batch)[0]
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
            factors |= self.balancer({**terms, **found}, weights, made.output, step)
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


def tokens_of(tokenizer: TokenizerLike, batch: Batch, shared: MutableMapping[str, Any]) -> Quantized:
    """What the quantizer gives for a batch. `shared` gets the `latents`.

    The codes of a batch that has them are looked up: then there are no latents, and no losses of the quantizer, which
    would train nothing.
    """
    if batch.codes is not None:
        return Quantized(tokenizer.lookup(batch.codes), batch.codes)
    shared["latents"] = tokenizer.latents(batch.x)
    return tokenizer.quantize(shared["latents"], batch.valid)


def visible(x_hat: Float[Tensor, "b c *size"], batch: Batch) -> tuple[Tensor, Tensor]:
    """Reconstruction and data for a network that knows no mask: at invalid positions both have the same values."""
    x = seen(batch)
    return (x_hat, x) if batch.valid is None else (torch.where(batch.valid.unsqueeze(1), x_hat, x), x)


def seen(batch: Batch) -> Tensor:
    """The data for a network that knows no mask: 0 at invalid positions."""
    return batch.x if batch.valid is None else torch.where(batch.valid.unsqueeze(1), batch.x, 0).nan_to_num()


def noiseless(
    decoder: Denoiser, batch: Batch, size: tuple[int, ...], rng: Sequence[torch.Generator]
) -> Float[Tensor, "b *s"]:
    """What a denoiser learns to make: of the extra modality `target`, or of the sample itself; in fp32.

    Raises `ConfigError` for a target at another size than the denoiser works at.
    """
    y = decoder.to_target(batch.extras.get("target", seen(batch)), rng).float()
    if tuple(y.shape[1:]) != tuple(decoder.target_shape(size)):
        raise ConfigError(
            f"data.extra.target: its samples become {list(y.shape[1:])}, but this decoder makes "
            f"{list(decoder.target_shape(size))} of samples of {list(size)}. A target is for decoders with a size of "
            "their own, such as controlnet/sd; leave it out."
        )
    return y


def _check_width(cfg: Any, *default: str | None) -> None:
    """Refuse a `width` that cannot be, or that does nothing with the loss; a loss in `default` may use it."""
    above_zero(cfg, "width")
    if cfg.loss not in ("smooth_l1", "huber", *default):
        refuse_idle(cfg, f"loss={cfg.loss}", "width")


def _options(loss: str, width: float) -> dict[str, float]:
    return {"width": width} if loss in ("smooth_l1", "huber") else {}


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
            _check_width(self, None)

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        self.loss = cfg.loss or spec.loss
        check_loss(self.loss, spec)
        self.own_terms = (f"pixel/{self.loss}",)

    def rebuilt(
        self,
        tokenizer: TokenizerLike,
        batch: Batch,
        *,
        rng: Sequence[torch.Generator],
        shared: MutableMapping[str, Any],
    ) -> Rebuilt:
        """Encode, quantize, decode, compare. `shared` gets the `latents`, for heads of child classes."""
        quantized = tokens_of(tokenizer, batch, shared)
        y = decoded(tokenizer.decoder, quantized.z_q, size=tuple(batch.x.shape[-self.spec.rank :]))
        target, options = target_of(self.loss, batch.x, self.spec), _options(self.loss, self.cfg.width)
        pixel = pixel_loss(self.loss, y, target, batch.mask, weight=batch.weight, **options)
        return Rebuilt(quantized, {f"pixel/{self.loss}": pixel}, y, output_of(self.loss, y, self.spec))

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


class Diffusion(Judged):
    """A denoiser learns to undo noise; sampling goes from noise to a sample that fits the tokens.

    Any denoiser and any scheduler: the scheduler says how much noise there is and what the denoiser predicts (x_0,
    epsilon, v, the velocity of a flow). Losses: `diffusion/<loss>`, the mean over valid positions and channels in the
    space that is noised; the quantizer's losses; `percept/<label>` and the adversary's `gan/...`, on the sample that
    the prediction stands for.
    """

    needs_denoiser: Literal[True] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(JudgedConfig):
        """Settings of the diffusion objective."""

        training_only: ClassVar[tuple[str, ...]] = (
            *JudgedConfig.training_only,
            *("loss", "width", "loss_on", "min_snr", "times", "times_mean", "times_std", "times_uniform"),
        )

        scheduler: BaseConfig = slot("scheduler")
        """Noise levels, what the denoiser predicts, and how samples are drawn."""
        loss: Literal["mse", "l1", "smooth_l1", "huber"] = "mse"
        """Loss between the prediction and what the scheduler says the denoiser predicts."""
        width: float = 1.0
        """smooth_l1 and huber only: the error below which the loss is quadratic (beta or delta)."""
        loss_on: Target = "prediction"
        """What the loss compares: the prediction itself, or the x_0, epsilon or velocity (epsilon - x_0) that the
        prediction stands for. Train a network that predicts x_0 for a flow with velocity (arXiv 2511.13720)."""
        min_snr: float | None = None
        """Weights of noise levels by min-SNR with this gamma, e.g. 5 (arXiv 2303.09556). Null: all count alike."""
        times: Times = "uniform"
        """How noise levels are drawn. logit-normal: mostly in the middle; mixed: logit-normal with a uniform share."""
        times_mean: float = 0.0
        """logit-normal and mixed only: mean of the logit; above 0 draws more noise."""
        times_std: float = 1.0
        """logit-normal and mixed only: standard deviation of the logit."""
        times_uniform: float = 0.1
        """mixed only: share of the samples whose noise level is uniform."""
        cls_free_guidance_dropout: float = 0.0
        """Share of the training samples with hidden tokens: all of them, or a random number (masked_cfg). Guidance
        needs it, usually 0.1 to 0.2."""
        masked_cfg: bool = False
        """With cls_free_guidance_dropout: hide masked_cfg_low to masked_cfg_high tokens, a random number, not all."""
        masked_cfg_low: int = 0
        """masked_cfg only: fewest hidden tokens of such a sample."""
        masked_cfg_high: int | None = None
        """masked_cfg only: most hidden tokens of such a sample. Null: all tokens."""

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_width(self)
            for name, value in (("min_snr", self.min_snr), ("times_std", self.times_std)):
                if value is not None and not 0 < value < math.inf:
                    raise SettingError(name, f"{value} must be a number above 0")
            for name in ("times_uniform", "cls_free_guidance_dropout"):
                if not 0 <= getattr(self, name) <= 1:
                    raise SettingError(name, f"{getattr(self, name)} is a share, from 0 to 1")
            if self.times == "uniform":
                refuse_idle(self, "times=uniform", "times_mean", "times_std", "times_uniform")
            if self.times == "logit-normal":
                refuse_idle(self, "times=logit-normal", "times_uniform")
            if not self.cls_free_guidance_dropout:
                refuse_idle(self, "cls_free_guidance_dropout=0", "masked_cfg")
            if not self.masked_cfg:
                refuse_idle(self, "masked_cfg=false", "masked_cfg_low", "masked_cfg_high")
            at_least(self, masked_cfg_low=0)
            if self.masked_cfg_high is not None and self.masked_cfg_high < max(1, self.masked_cfg_low):
                raise SettingError(
                    "masked_cfg_high",
                    f"{self.masked_cfg_high} is below 1, or below masked_cfg_low={self.masked_cfg_low}",
                )

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        if spec.labels is not None:
            raise ValueError("class maps have no values to which noise could be added; use reconstruction")
        self.own_terms = (f"diffusion/{cfg.loss}",)
        self.scheduler = registry().build("scheduler", cfg.scheduler, "objective.scheduler")
        self._has_warned = False

    def setup(self, tokenizer: TokenizerLike) -> None:
        """Build the networks that judge. Raises `ConfigError` for a denoiser that wants another scheduler."""
        try:
            check_scheduler(tokenizer.decoder, self.scheduler)
        except ValueError as error:
            raise ConfigError(f"objective.scheduler: {error}.") from error
        super().setup(tokenizer)

    def rebuilt(
        self,
        tokenizer: TokenizerLike,
        batch: Batch,
        *,
        rng: Sequence[torch.Generator],
        shared: MutableMapping[str, Any],
    ) -> Rebuilt:
        """Encode, quantize, noise the sample, predict, compare. The noise follows from the seeds of `rng` alone."""
        cfg, decoder, rng = self.cfg, tokenizer.decoder, forked(rng, "diffusion")
        size = tuple(batch.x.shape[-self.spec.rank :])
        quantized = tokens_of(tokenizer, batch, shared)
        y = noiseless(decoder, batch, size, rng)
        eps = randn(rng, *y.shape[1:], device=y.device)
        drawn = {"mean": cfg.times_mean, "std": cfg.times_std, "uniform": cfg.times_uniform}
        t = times(self.scheduler, rng, cfg.times, **drawn, device=y.device)
        y_t = self.scheduler.add_noise(y, eps, t)
        hidden = self._hidden(rng, quantized.z_q) if tokenizer.training else None
        cond = decoder.condition(quantized.z_q, size=size, mask=hidden, extras=batch.conditions)
        prediction = decoder(y_t, t.float(), cond).float()
        found, target = self._compared(prediction, y, eps, y_t, t)
        valid, weight = (resized(one, y.shape[2:]) for one in (batch.mask, batch.weight))
        each = sample_losses(cfg.loss, found, target, valid, weight=weight, **_options(cfg.loss, cfg.width))
        if cfg.min_snr is not None:
            each = each * min_snr(self.scheduler, t, cfg.min_snr, cfg.loss_on)
        x_hat = None
        if self.has_judges:
            x_hat = decoder.from_target(x_0(self.scheduler, prediction, y_t, t), size)
        return Rebuilt(quantized, {f"diffusion/{cfg.loss}": each.mean()}, prediction, x_hat)

    def _compared(
        self, prediction: Tensor, y: Tensor, eps: Tensor, y_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the loss compares: found and wanted."""
        if self.cfg.loss_on == "prediction":
            return prediction, self.scheduler.target(y, eps, t)
        if self.cfg.loss_on == "epsilon":
            return epsilon(self.scheduler, prediction, y_t, t), eps
        found = x_0(self.scheduler, prediction, y_t, t)
        if self.cfg.loss_on == "x_0":
            return found, y
        factor = of_velocity(self.scheduler, t).view(-1, *[1] * (y.ndim - 1))
        return factor * found, factor * y

    def _hidden(self, rng: Sequence[torch.Generator], z_q: Tensor) -> Bool[Tensor, "b *grid"] | None:
        """Which tokens are hidden in training: of most samples none. None if no sample ever has hidden tokens."""
        cfg, grid = self.cfg, z_q.shape[1:-1]
        if not cfg.cls_free_guidance_dropout:
            return None
        counts = torch.full((len(rng),), math.prod(grid))
        if cfg.masked_cfg:
            low, high = (min(end, math.prod(grid)) for end in (cfg.masked_cfg_low, self._most_hidden(grid)))
            counts = low + (rand(rng) * (high - low + 1)).floor().long()
        chosen = rand(rng) < cfg.cls_free_guidance_dropout
        return hidden_tokens(torch.where(chosen, counts, 0), rand(rng, *grid)).to(z_q.device)

    def _most_hidden(self, grid: Sequence[int]) -> int:
        """The largest number of tokens that are hidden in one training sample."""
        if not self.cfg.cls_free_guidance_dropout:
            return 0
        return math.prod(grid) if self.cfg.masked_cfg_high is None else self.cfg.masked_cfg_high

    def decode(
        self,
        tokenizer: TokenizerLike,
        codes: Int[Tensor, "b *grid q"],
        *,
        size: tuple[int, ...],
        rng: Sequence[torch.Generator],
        extras: Mapping[str, Any] | None = None,
        steps: Annotated[int, "Steps of the sampler; more steps take longer."] = 25,
        scheduler: Annotated[
            str | None,
            "Another scheduler for sampling, as NAME or NAME[key=value,...]. Settings that are not given are those of "
            "the scheduler of training, so noise levels are the same. Null: the scheduler of training.",
        ] = None,
        guidance: Annotated[
            float,
            "How much the tokens count: 1 is the prediction as trained, 0 ignores the tokens, above 1 exaggerates what "
            "the tokens say. Other values than 1 need a decoder trained with objective.cls_free_guidance_dropout, and "
            "twice the time.",
        ] = 1.0,
        guidance_schedule: Annotated[
            Literal["constant", "linear", "cosine"],
            "How the distance of the guidance from 1 falls with the noise level u from 1 to 0: not at all, as u, or as "
            "((1 - cos(pi u)) / 2)^2.",
        ] = "constant",
        guidance_from: Annotated[float, "Noise level, as a share, below which there is no guidance."] = 0.0,
        guidance_to: Annotated[float, "Noise level, as a share, above which there is no guidance."] = 1.0,
        guidance_rescale: Annotated[
            float,
            "How far the contrast of a guided prediction is pulled back to that without guidance, 0 to 1 (arXiv "
            "2305.08891).",
        ] = 0.0,
    ) -> Tensor:
        """Samples that fit the codes, from noise that `rng` draws."""
        _check_guidance(guidance, guidance_from, guidance_to, guidance_rescale)
        used, sampler = self._sampler(scheduler, steps)
        z_q = tokenizer.lookup(codes)
        if guidance != 1:
            self._warn(z_q.shape[1:-1])
        ask = _Guided(tokenizer.decoder, z_q, size, extras, guidance_rescale)
        y = randn(rng, *tokenizer.decoder.target_shape(size), device=z_q.device)
        for t in sampler.timesteps:
            level = float(t) / used.num_steps
            inside = guidance_from <= level <= guidance_to
            weight = 1 + (guidance - 1) * SCHEDULES[guidance_schedule](level) if inside else 1.0
            prediction = ask(y, float(t), weight)
            with torch.autocast(y.device.type, enabled=False):
                y = sampler.step(prediction, t, y, rng)
        return tokenizer.decoder.from_target(y, size)

    def _sampler(self, name: str | None, steps: int) -> tuple[Any, Sampler]:
        """The scheduler to sample with, and its sampler."""
        if steps < 1:
            raise SettingError("steps", f"{steps} must be at least 1")
        used = self.scheduler if name is None else self._other_scheduler(name)
        try:
            return used, used.sampler(steps)
        except ValueError as error:
            raise SettingError("steps", f"{steps}: {error}") from error

    def _other_scheduler(self, name: str) -> Any:
        """A scheduler with the noise levels of training: settings that both have are the same unless given."""
        file, ours = "sampling option scheduler", self.cfg.scheduler
        node = bracketed(name, file)
        try:
            theirs: Any = registry().load("scheduler", registry().find("scheduler", node["name"]).name)
        except VqcoreError as error:
            raise error.at(file) from error
        known = {field.name for field in dataclasses.fields(theirs.Config)}
        kept = {key: value for key, value in to_tree(ours).items() if key in known}
        try:
            made = registry().build("scheduler", component("scheduler", {**kept, **node}, file=file), file)
        except VqcoreError as error:
            alone = component("scheduler", node, file=file)
            registry().build("scheduler", alone, file)  # wrong by itself?
            default = to_tree(alone)
            changed = [
                f"{key}={inline(value)}"
                for key, value in kept.items()
                if key not in node and value != default[key]
            ]
            raise ConfigError(
                f"{error} As in training, for it was not given: {', '.join(changed)}."
            ) from error
        if not same_levels(self.scheduler, made):
            raise SettingError(
                "scheduler",
                f"{name} has other noise levels, or is for another prediction, than the decoder was trained with "
                f"({ours.name})",
            )
        return made

    def _warn(self, grid: Sequence[int]) -> None:
        """Warn once of guidance by a prediction without tokens that was never trained."""
        if self._has_warned or self._most_hidden(grid) >= math.prod(grid):
            return
        self._has_warned = True
        log.warning(
            "warning: guidance other than 1 for a decoder that never saw a sample with all tokens hidden: what it "
            "predicts without tokens is arbitrary. Train with objective.cls_free_guidance_dropout=0.1."
        )


class _Guided:
    """Asks a denoiser, with guidance where it is wanted. What depends on the tokens alone is computed once."""

    def __init__(
        self,
        decoder: Denoiser,
        z_q: Float[Tensor, "b *grid d"],
        size: tuple[int, ...],
        extras: Mapping[str, Any] | None,
        rescale: float,
    ):
        self.decoder, self.z_q, self.size, self.extras, self.rescale = decoder, z_q, size, extras, rescale

    @cached_property
    def held(self) -> Any:
        """The condition for predictions with tokens."""
        return self.decoder.condition(self.z_q, size=self.size, extras=self.extras)

    @cached_property
    def both(self) -> Any:
        """The condition for predictions with and without tokens, in one batch."""
        shown = torch.zeros(self.z_q.shape[:-1], dtype=torch.bool, device=self.z_q.device)
        return self.decoder.condition(
            torch.cat([self.z_q, self.z_q]),
            size=self.size,
            mask=torch.cat([shown, ~shown]),
            extras=None if self.extras is None else doubled(self.extras),
        )

    def __call__(self, y: Tensor, t: float, weight: float) -> Tensor:
        """The prediction for noised samples, in fp32."""
        level = torch.full((len(y),), t, device=y.device)
        if weight == 1:
            return self.decoder(y, level, self.held).float()
        held, free = self.decoder(torch.cat([y, y]), torch.cat([level, level]), self.both).float().chunk(2)
        return guided(held, free, weight, self.rescale)


def _check_guidance(guidance: float, low: float, high: float, rescale: float) -> None:
    """Raise `SettingError` for sampling options of guidance that are out of range."""
    if not 0 <= guidance < math.inf:
        raise SettingError("guidance", f"{guidance:g} must be a number from 0 on")
    for name, share in (("guidance_from", low), ("guidance_to", high), ("guidance_rescale", rescale)):
        if not 0 <= share <= 1:
            raise SettingError(name, f"{share:g} is a share, from 0 to 1")
    if low >= high:
        raise SettingError("guidance_from", f"{low:g} must be below guidance_to={high:g}")


def resized(values: Tensor | None, size: Sequence[int]) -> Tensor | None:
    """A validity mask or weights at the size of what is noised: valid where anything is valid, and mean weights.

    None, so that all positions count, where what is noised has other axes than the data.
    """
    if values is None or values.shape[1:] == tuple(size):
        return values
    if values.ndim - 1 != len(size):
        return None
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    means = pool(values.float().unsqueeze(1), tuple(size)).squeeze(1)
    return means > 0 if values.dtype == torch.bool else means


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
