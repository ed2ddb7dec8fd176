"""Adaptive weights: what gradients of several losses at one tensor say about their balance.

A factor of a step comes from the gradients of the steps before: it is known before the first micro-batch, so it is the
same for all micro-batches and all processes. Gradients are summed over micro-batches and processes in fp32, and
divided by their number, as the gradient of the step itself is. What is kept between two steps are buffers: a resumed
run goes on with the same bits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqcore import dist

_SCALE: ContextVar[float] = ContextVar("vqcore_loss_scale", default=1.0)


@contextmanager
def loss_scale(scale: float) -> Iterator[None]:
    """Inside the block, `gradient` scales losses by this number, as the trainer does under fp16."""
    token = _SCALE.set(scale)
    try:
        yield
    finally:
        _SCALE.reset(token)


def gradient(term: Tensor, at: Tensor) -> Tensor:
    """The gradient of a scalar at a tensor, in fp32; zeros if the scalar does not depend on the tensor.

    Under fp16 it is taken of the scaled scalar and divided by the loss scale: a small gradient would vanish.
    """
    scale = _SCALE.get()
    (slope,) = torch.autograd.grad(term * scale, at, retain_graph=True, allow_unused=True)
    return torch.zeros_like(at, dtype=torch.float32) if slope is None else slope.float() / scale


class GradientNorms(nn.Module):
    """The norms of the gradients of some terms at one tensor, as of the step before.

    Call the object in training only, once a micro-batch, with all `names`. All processes make the same calls.
    """

    step: Tensor
    known: Tensor
    pending: Tensor

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("step", torch.tensor(-1))
        self.register_buffer("known", torch.full((len(self.names),), math.nan))
        self.register_buffer("pending", torch.full((len(self.names),), math.nan))
        self.sums: list[Tensor] = []
        self.parts = 0

    def forward(self, terms: Mapping[str, Tensor], at: Tensor, step: int) -> dict[str, Tensor]:
        """Add this micro-batch; returns the norms of the step before by name, empty at the first step.

        Norms that are not finite (an overflow of fp16) are not taken over: the ones before stay.
        """
        if int(self.step) != step:
            if self.pending.isfinite().all():
                self.known.copy_(self.pending)
            self.sums, self.parts = [], 0
            self.step.fill_(step)
        slopes = [dist.sum_(gradient(terms[name], at)) for name in self.names]
        self.sums = [a + b for a, b in zip(self.sums, slopes)] if self.sums else slopes
        self.parts += dist.world_size()
        self.pending.copy_(torch.stack([total.norm() / self.parts for total in self.sums]))
        if not self.known.isfinite().all():
            return {}
        return dict(zip(self.names, self.known.clone()))


class AdaptiveWeight(nn.Module):
    """The weight of an adversary's term that gives its gradient the size of the other terms' gradient.

    VQGAN (arXiv 2012.09841, eq. 7): |gradient of `against`| / (|gradient of `term`| + `eps`) at the decoder's last
    layer, at least `least` and at most `most`. Differs from the paper: gradients of the step before, see the module's
    text; the first factor is 1.
    """

    def __init__(self, *, eps: float = 1e-4, least: float = 0.0, most: float = 1e4):
        super().__init__()
        self.eps, self.least, self.most = eps, least, most
        self.norms = GradientNorms(("against", "term"))

    def forward(self, term: Tensor, against: Tensor, at: Tensor, step: int) -> Tensor:
        """The factor of this step, a scalar without gradient."""
        found = self.norms({"against": against, "term": term}, at, step)
        if not found:
            return torch.ones((), device=term.device)
        return (found["against"] / (found["term"] + self.eps)).clamp(self.least, self.most)


class Balancer(nn.Module):
    """Factors with which weights become shares of the gradient at the reconstruction (EnCodec, arXiv 2210.13438,
    section 3.4).

    With the weight w_i of a term and the running mean m_i of its gradient's norm, the factor is R / (W m_i), where W is
    the sum of the weights at work and R is `total`: the weighted gradient of each term has the norm R w_i / W. A norm
    is that of one sample's own gradient, the mean over samples. The running mean has the decay `decay` and is
    corrected for its start. Differs from the paper: it is as of the step before; a term's first step takes the norm of
    the first micro-batch of all processes.

    Call the object in training only, once a micro-batch. All processes make the same calls.
    """

    step: Tensor
    sums: Tensor
    counts: Tensor
    pending: Tensor

    def __init__(self, names: Sequence[str], *, total: float = 1.0, decay: float = 0.999, eps: float = 1e-12):
        super().__init__()
        self.names, self.total, self.decay, self.eps = tuple(names), total, decay, eps
        self.register_buffer("step", torch.tensor(-1))
        self.register_buffer("sums", torch.zeros(len(self.names)))
        self.register_buffer("counts", torch.zeros(len(self.names)))
        self.register_buffer("pending", torch.full((len(self.names),), math.nan))
        self.first: Tensor | None = None
        self.seen: Tensor | None = None
        self.parts = 0

    def forward(
        self,
        terms: Mapping[str, Tensor],
        weights: Mapping[str, float],
        at: Float[Tensor, "b ..."],
        step: int,
    ) -> dict[str, Tensor]:
        """The factors of this step by name, for the terms that have a weight above 0.

        `terms` are scalars, means over the samples of `at`. Norms that are not finite are not taken over.
        """
        if int(self.step) != step:
            known = self.pending.isfinite()
            self.sums.copy_(torch.where(known, self.decay * self.sums + self.pending, self.sums))
            self.counts.copy_(torch.where(known, self.decay * self.counts + 1, self.counts))
            self.first, self.seen, self.parts = None, None, 0
            self.step.fill_(step)
        own = [name for name in self.names if weights.get(name) and name in terms]
        norms = torch.full_like(self.pending, math.nan)
        for name in own:
            slopes = gradient(terms[name], at).flatten(1)
            norms[self.names.index(name)] = slopes.norm(dim=1).sum()  # a mean over b samples has 1/b of each
        norms = dist.sum_(norms)
        self.seen = norms if self.seen is None else self.seen + norms
        self.parts += dist.world_size()
        self.pending.copy_(self.seen / self.parts)
        self.first = self.pending.clone() if self.first is None else self.first
        means = torch.where(self.counts > 0, self.sums / self.counts, self.first)
        whole = sum(weights[name] for name in own)
        return {name: self.total / (whole * (means[self.names.index(name)] + self.eps)) for name in own}
