"""A decoder of a few steps, learned from a diffusion decoder of many steps on the same tokens.

The student learns where the teacher's walk ends: knowledge distillation of a sampler (arXiv 2101.02388), from noised
samples at the levels that the student will be asked at, as in multistep consistency models (arXiv 2403.06807). A mean
of many ends would be a blur, so perceptual losses and an adversary may judge what the student returns, as in
adversarial diffusion distillation (arXiv 2311.17042). Between its steps the student gets new noise (arXiv 2303.01469,
algorithm 1).
Differs from these papers: one student serves all numbers of steps up to `steps`.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqcore.borrowed import sha256, weights_of
from vqcore.compose.describe import inline
from vqcore.config import Config as Base
from vqcore.config import at_least, deciding, slot
from vqcore.diffusion import epsilon, same_levels, x_0
from vqcore.errors import CheckpointError, ConfigError, SettingError
from vqcore.losses import sample_losses
from vqcore.objectives import Judged, JudgedConfig, Rebuilt, noiseless, resized, tokens_of
from vqcore.protocols import Batch, DataSpec, Denoiser, TokenizerLike, is_denoiser, time
from vqcore.registry import registry
from vqcore.rng import forked, rand, randn
from vqcore.tokenizer import Tokenizer


class Distill(Judged):
    """A student of one to a few steps. Losses: `distill/<loss>` between the samples that student and teacher find from
    the same noised sample, the mean over valid positions and channels in the space that is noised; the quantizer's
    losses; `percept/<label>` and the adversary's `gan/...`, on the sample that the student finds.
    """

    needs_denoiser: Literal[True] = True
    borrowed = ("teacher",)

    @dataclass(frozen=True, kw_only=True)
    class Config(JudgedConfig):
        """Settings of the objective `unet/distill`."""

        training_only: ClassVar[tuple[str, ...]] = (*JudgedConfig.training_only, "loss", "teacher_steps")
        places: ClassVar[tuple[str, ...]] = ("of",)

        of: str | None = None
        """The run or tokenizer whose decoder is the teacher. Start from it with model.full_ckpt, and keep its tokens
        with model.freeze_enc."""
        scheduler: Base = slot("scheduler", default={"name": "unet/flow"})
        """The scheduler of the teacher."""
        loss: Literal["mse", "l1"] = "mse"
        """Loss between what the student and the teacher find."""
        steps: int = 4
        """The most steps that the student will be sampled with."""
        teacher_steps: int = 8
        """Steps of the teacher from a noised sample to its end."""

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least(self, steps=1, teacher_steps=1)

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        if spec.labels is not None:
            raise ValueError("class maps have no values to which noise could be added")
        self.own_terms = (f"distill/{cfg.loss}",)
        self.scheduler = registry().build("scheduler", cfg.scheduler, "objective.scheduler")
        self.teacher: Any = nn.Module()
        self._fingerprint: str | None = None

    def setup(self, tokenizer: TokenizerLike) -> None:
        """Build the networks that judge; the teacher is borrowed. Raises `ConfigError` if the tokens may change."""
        parts = (tokenizer.embed, tokenizer.encoder, tokenizer.proj, tokenizer.quantizer)
        learns = any(p.requires_grad for one in parts if isinstance(one, nn.Module) for p in one.parameters())
        if learns and tokenizer.training:
            raise ConfigError(
                "objective: unet/distill learns a decoder for the tokens of its teacher, but these tokens are trained "
                f"here. Set model.freeze_enc=true model.full_ckpt={self.cfg.of or 'RUN'}."
            )
        super().setup(tokenizer)

    def borrow(self, places: Mapping[str, str]) -> dict[str, str]:
        """Take the decoder of the teacher's run; its SHA-256. Raises `CheckpointError` if it cannot be a teacher."""
        place = places.get("teacher", self.cfg.of)
        if place is None:
            raise CheckpointError("no teacher is known: set objective.of to the run of a diffusion decoder")
        run = Tokenizer.load(place)
        if not is_denoiser(run.decoder):
            raise CheckpointError(f"{place}: its decoder is no denoiser, so it has no steps to save")
        if isinstance(run.objective, Distill):
            raise CheckpointError(
                f"{place}: its decoder is a student itself, of {run.objective.cfg.steps} steps: set objective.of to "
                "the run of its teacher"
            )
        theirs = getattr(run.objective, "scheduler", None)
        if theirs is None or not same_levels(self.scheduler, theirs):
            own = vars(run.cfg.objective).get("scheduler")
            theirs = "none" if own is None else inline(deciding(own, "scheduler", lambda kind, name: name))
            raise CheckpointError(
                f"{place}: its decoder was trained with another scheduler than objective.scheduler; set the one of "
                f"that run: {theirs}"
            )
        self.teacher, self._fingerprint = run.decoder, run.fingerprint
        return {"teacher": sha256(weights_of(run.decoder))}

    def rebuilt(
        self,
        tokenizer: TokenizerLike,
        batch: Batch,
        *,
        rng: Sequence[torch.Generator],
        shared: MutableMapping[str, Any],
    ) -> Rebuilt:
        """Noise the sample, let student and teacher find one from it, compare. Noise follows from `rng`'s seeds."""
        self._check_tokens(tokenizer)
        cfg, decoder, rng = self.cfg, tokenizer.decoder, forked(rng, "distill")
        size = tuple(batch.x.shape[-self.spec.rank :])
        quantized = tokens_of(tokenizer, batch, shared)
        y = noiseless(decoder, batch, size, rng)
        eps = randn(rng, *y.shape[1:], device=y.device)
        level = self._levels(rng).to(y.device)
        t = time(self.scheduler, level)
        y_t = self.scheduler.add_noise(y, eps, t)
        cond = decoder.condition(quantized.z_q, size=size, extras=batch.conditions)
        found = self._found(decoder, y_t, t, cond)
        with torch.no_grad():
            wanted = self.walked(y_t, level, quantized.z_q, size=size, extras=batch.conditions)
        valid, weight = (resized(one, y.shape[2:]) for one in (batch.mask, batch.weight))
        each = sample_losses(cfg.loss, found, wanted, valid, weight=weight)
        x_hat = decoder.from_target(found, size) if self.has_judges else None
        return Rebuilt(quantized, {f"distill/{cfg.loss}": each.mean()}, found, x_hat)

    def walked(
        self,
        y_t: Float[Tensor, "b *s"],
        level: Float[Tensor, " b"],
        z_q: Float[Tensor, "b *grid d"],
        *,
        size: tuple[int, ...],
        extras: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "b *s"]:
        """Where the teacher's walk from noised samples ends; each sample begins at its own `level` in [0, 1].

        The steps are those of DDIM (arXiv 2010.02502), which are those of Euler for a flow: what is found of sample and
        noise is mixed again for the next level.
        """
        cond = self.teacher.condition(z_q, size=size, extras=extras)
        count = self.cfg.teacher_steps
        times = [time(self.scheduler, level * (1 - step / count)) for step in range(count)]
        x = y_t
        for step, t in enumerate(times):
            prediction = self.teacher(y_t, t.float(), cond).float()
            x = x_0(self.scheduler, prediction, y_t, t)
            if step + 1 < count:
                eps = epsilon(self.scheduler, prediction, y_t, t)
                y_t = self.scheduler.add_noise(x, eps, times[step + 1])
        return x

    def decode(
        self,
        tokenizer: TokenizerLike,
        codes: Int[Tensor, "b *grid q"],
        *,
        size: tuple[int, ...],
        rng: Sequence[torch.Generator],
        extras: Mapping[str, Any] | None = None,
        steps: Annotated[
            int | None, "Steps of the decoder, 1 to those of training. Null: as in training."
        ] = None,
    ) -> Tensor:
        """Samples that fit the codes, from noise that `rng` draws."""
        steps = self.cfg.steps if steps is None else steps
        if not 1 <= steps <= self.cfg.steps:
            raise SettingError(
                "steps", f"{steps}: this decoder was distilled for 1 to {self.cfg.steps} steps"
            )
        decoder = tokenizer.decoder
        cond = decoder.condition(tokenizer.lookup(codes), size=size, extras=extras)
        shape = decoder.target_shape(size)
        x = torch.zeros(len(codes), *shape, device=tokenizer.device)
        for step in range(steps):
            t = time(self.scheduler, torch.full((len(codes),), 1 - step / steps, device=x.device))
            y_t = self.scheduler.add_noise(x, randn(rng, *shape, device=x.device), t)
            x = self._found(decoder, y_t, t, cond)
        return decoder.from_target(x, size)

    def _found(self, decoder: Denoiser, y_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The samples that one prediction stands for."""
        return x_0(self.scheduler, decoder(y_t, t.float(), cond).float(), y_t, t)

    def _levels(self, rng: Sequence[torch.Generator]) -> Float[Tensor, " b"]:
        """A noise level k / n for each sample, one that a walk of n steps begins a step at; n is 1 to `steps`."""
        count = (rand(rng) * self.cfg.steps).floor() + 1
        return ((rand(rng) * count).floor() + 1) / count

    def _check_tokens(self, tokenizer: Any) -> None:
        """Refuse tokens of another run than the teacher's; once, at the first step, when all weights are loaded."""
        if not tokenizer.training:
            return
        wanted, self._fingerprint = self._fingerprint, None
        if wanted is not None and tokenizer.fingerprint != wanted:
            raise ConfigError(
                f"objective.of={self.cfg.of}: the teacher decodes tokens with the fingerprint {wanted[:16]}, but the "
                f"tokens of this run have {tokenizer.fingerprint[:16]}. Set model.full_ckpt={self.cfg.of}."
            )
