"""The rival of the tokenizer in a GAN: its losses, what keeps them in balance, and what tells that they are not."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqcore import config, dist
from vqcore.balance import AdaptiveWeight
from vqcore.config import at_least, refuse_idle, slot
from vqcore.errors import SettingError
from vqcore.protocols import DataSpec, Losses
from vqcore.registry import registry
from vqcore.rng import forked
from vqcore_percept.augment import Augmentation, augmented

log = logging.getLogger(__name__)

LossName = Literal["hinge", "vanilla", "non-saturating"]

WINS, LOST, HEALTHY = 0.98, 0.02, 0.9
"""Above `WINS` on both sides the discriminator knows everything; below `LOST` on one side it says the same of all."""
MEMORY = 0.99
"""Decay of the running accuracies that decide about a warning: about the last hundred steps."""


class Gan(nn.Module):
    """An adversary with one discriminator.

    Terms: `gan/generator` for the tokenizer; `gan/discriminator`, and `gan/lecam`, `gan/r1` where they are on, for the
    discriminator. `objective.weights` weighs them, by step if wanted: a discriminator is trained before it weighs in
    if `gan/generator` has the weight 0 at first. Metrics: `gan/accuracy/real` and `gan/accuracy/rebuilt`, the shares
    that the discriminator sorts right, and with `weight: adaptive` the ratio of the gradients.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `percept/gan`."""

        discriminator: config.Config = slot("discriminator")
        """The network that tells data from reconstructions."""
        loss: LossName = "hinge"
        """`hinge` (arXiv 1705.02894); `vanilla`: cross-entropy, and the tokenizer raises the logit; `non-saturating`:
        cross-entropy, and the tokenizer lowers -log of the discriminator's belief (arXiv 1406.2661, section 3)."""
        start: int = 0
        """First step of the discriminator. Its schedule and its warm-up begin there."""
        weight: Literal["fixed", "adaptive"] = "fixed"
        """`adaptive` multiplies the weight of `gan/generator` by the ratio of the other terms' gradient to its own, at
        the decoder's last layer (arXiv 2012.09841, eq. 7), both as of the step before."""
        clamp: tuple[float, float] = (0.0, 1e4)
        """Bounds of the adaptive factor."""
        lecam: float = 0.0
        """Pull the logits to the running means of the other side (arXiv 2104.03310, eq. 5): the factor of the term
        `gan/lecam`, usually 0.001 to 0.05. 0: off."""
        lecam_decay: float = 0.999
        """Decay of the running means of the logits."""
        r1: float = 0.0
        """Penalise the gradient at data (arXiv 1801.04406, eq. 9): the factor of the term `gan/r1`, there gamma/2;
        usually 0.1 to 10. 0: off."""
        augment: tuple[Augmentation, ...] = ()
        """What is changed alike in what the discriminator sees, in a way that has gradients (arXiv 2006.10738):
        colour, translation, cutout."""

        def __post_init__(self) -> None:
            at_least(self, start=0, lecam=0, r1=0)
            low, high = self.clamp
            if not 0 <= low <= high:
                raise SettingError("clamp", f"[{low:g}, {high:g}]: give two numbers, 0 <= low <= high")
            if not 0 <= self.lecam_decay < 1:
                raise SettingError("lecam_decay", f"{self.lecam_decay} must be at least 0 and below 1")
            if self.weight == "fixed":
                refuse_idle(self, "weight=fixed", "clamp")
            if not self.lecam:
                refuse_idle(self, "lecam=0", "lecam_decay")

    real_mean: Tensor
    fake_mean: Tensor
    right: Tensor
    warned: Tensor

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__()
        self.cfg, self.start = cfg, cfg.start
        self.judge = registry().build("discriminator", cfg.discriminator, "discriminator", spec=spec)
        self.adaptive = (
            AdaptiveWeight(least=cfg.clamp[0], most=cfg.clamp[1]) if cfg.weight == "adaptive" else None
        )
        self.span = spec.range or (-0.5, 0.5)
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))
        self.register_buffer("right", torch.full((2,), 0.5))
        self.register_buffer("warned", torch.zeros((), dtype=torch.bool))

    def generator(
        self,
        x_hat: Float[Tensor, "b c *size"],
        x: Float[Tensor, "b c *size"],
        *,
        mask: Tensor | None,
        step: int,
        rng: Sequence[torch.Generator],
        against: Tensor | None = None,
        last_layer: Tensor | None = None,
    ) -> Losses:
        """What the tokenizer must lower. `mask` is not needed: invalid positions are alike on both sides."""
        logits = self.judge(self._seen(x_hat, rng, "generator")).float()
        term = for_generator(self.cfg.loss, logits)
        factors = {}
        if self.adaptive is not None and against is not None and last_layer is not None:
            factors["gan/generator"] = self.adaptive(term, against, last_layer, step)
        return Losses({"gan/generator": term}, factors=factors)

    def discriminator(
        self,
        x_hat: Float[Tensor, "b c *size"],
        x: Float[Tensor, "b c *size"],
        *,
        mask: Tensor | None,
        step: int,
        rng: Sequence[torch.Generator],
    ) -> Losses:
        """What the discriminator must lower. `gan/lecam` and `gan/r1` have their settings as factors."""
        real = self.judge(self._seen(x, rng, "real")).float()
        fake = self.judge(self._seen(x_hat, rng, "rebuilt")).float()
        terms = {"gan/discriminator": for_discriminator(self.cfg.loss, real, fake)}
        if self.cfg.lecam:
            terms["gan/lecam"] = lecam(real, fake, self.real_mean, self.fake_mean)
        if self.cfg.r1:
            terms["gan/r1"] = self._r1(x)
        factors = {
            f"gan/{n}": torch.tensor(getattr(self.cfg, n)) for n in ("lecam", "r1") if getattr(self.cfg, n)
        }
        right = torch.stack([(real > 0).float().mean(), (fake < 0).float().mean()]).detach()
        if self.training:
            self._remember(real.detach().mean(), fake.detach().mean(), right, step)
        shares = {"gan/accuracy/real": right[0], "gan/accuracy/rebuilt": right[1]}
        return Losses(terms, metrics=shares, factors=factors)

    def _seen(self, x: Tensor, rng: Sequence[torch.Generator], side: str) -> Tensor:
        if not self.cfg.augment:
            return x
        return augmented(x, self.cfg.augment, forked(rng, side), span=self.span)

    def _r1(self, x: Tensor) -> Tensor:
        """The mean over samples of the squared gradient of a sample's mean logit, in fp32: fp16 would lose it."""
        # The fast kernels of attention have no second derivative.
        plain = sdpa_kernel(SDPBackend.MATH)
        with plain, torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            at = x.detach().float().requires_grad_()
            logits = self.judge(at).flatten(1).mean(1)
            (slope,) = torch.autograd.grad(logits.sum(), at, create_graph=True)
        return slope.flatten(1).square().sum(1).mean()

    @torch.no_grad()
    def _remember(self, real: Tensor, fake: Tensor, right: Tensor, step: int) -> None:
        """Keep the running means, the same on all processes; warn where the two sides are out of balance."""
        now = dist.sum_(torch.stack([real, fake, *right])) / dist.world_size()
        if not now.isfinite().all():  # such a step is left out; the means must outlive it
            return
        decay = self.cfg.lecam_decay
        self.real_mean.lerp_(now[0], 1 - decay)
        self.fake_mean.lerp_(now[1], 1 - decay)
        self.right.lerp_(now[2:], 1 - MEMORY)
        if step % 50 == 0:
            self._watch(step)

    def _watch(self, step: int) -> None:
        real, rebuilt = self.right.tolist()
        wins, lost = min(real, rebuilt) > WINS, min(real, rebuilt) < LOST
        if not self.warned and (wins or lost) and dist.is_main():
            log.warning(OVERPOWERING if wins else BLIND, step, 100 * real, 100 * rebuilt)
        if wins or lost:
            self.warned.fill_(True)
        elif 5 * LOST < min(real, rebuilt) < HEALTHY:
            self.warned.fill_(False)


OVERPOWERING = (
    "step %d: the discriminator sorts %.0f %% of the data and %.0f %% of the reconstructions right: it has won, and "
    "the tokenizer learns nothing from it. Lower optim.players.adversary.lr, set "
    "objective.adversary.lecam=0.01, or let it see less (augment=[colour,translation,cutout], a smaller "
    "discriminator)."
)
BLIND = (
    "step %d: the discriminator sorts %.0f %% of the data and %.0f %% of the reconstructions right: it says the same "
    "of everything. Raise optim.players.adversary.lr, lower the weight of gan/generator, or let gan/generator weigh in "
    "later (objective.weights by step)."
)


def for_generator(loss: LossName, fake: Tensor) -> Tensor:
    """The tokenizer's loss for the logits of reconstructions."""
    return F.softplus(-fake).mean() if loss == "non-saturating" else -fake.mean()


def for_discriminator(loss: LossName, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: half of each side, so that a blind discriminator has 1 (hinge) or log 2."""
    if loss == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def lecam(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """How far the logits lie beyond the running means of the other side, squared; one-sided as in the authors' code."""
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()
