"""Muon for matrices and kernels beside AdamW for everything else, as one optimizer: `optim.name: muon`.

torch.optim.Muon takes matrices alone; a network has vectors, tables and kernels as well.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that drives singular values towards 1: most slope at 0, at the price of ending in 0.7 to 1.2."""


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is replaced by its nearest orthogonal one (Jordan et al., 2024; arXiv 2502.16982).

    Groups with `matrices: True` are treated so, a kernel `(out, in, *k)` as the matrix `(out, in * k)`; the others by
    AdamW. An update is scaled to a root mean square of `rms` (there eq. 4: 0.2), which is about AdamW's, so that one
    learning rate serves both. Decay is decoupled. Differs from torch.optim.Muon: it takes any parameter, and iterates
    on the small side of a matrix in fp32 (`orthogonal`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        rms: float = 0.2,
        ns_steps: int = 5,
        fused: bool | None = None,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1)")
        if not rms > 0 or ns_steps < 1:
            raise ValueError(f"rms={rms} must be above 0, and ns_steps={ns_steps} at least 1")
        defaults = {"lr": lr, "weight_decay": weight_decay, "matrices": False, "fused": fused}
        self.momentum, self.rms, self.ns_steps = momentum, rms, ns_steps
        super().__init__(params, defaults)
        rest = [group for group in self.param_groups if not group["matrices"]]
        self._adam = torch.optim.AdamW(rest, lr, betas, eps, weight_decay, fused=fused) if rest else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient. A closure is not evaluated."""
        if self._adam is not None:
            # Loading a state replaces both; the inner optimizer works on what this one says now.
            self._adam.state = self.state
            self._adam.param_groups = [group for group in self.param_groups if not group["matrices"]]
            self._adam.step()
        for group in self.param_groups:
            if group["matrices"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in params:
            update = self._nesterov(p).flatten(1)
            updates[update.shape].append((p, update))
        for shape, found in updates.items():
            changes = orthogonal(torch.stack([update for _, update in found]), self.ns_steps)
            size = self.rms * max(shape) ** 0.5
            for (p, _), change in zip(found, changes, strict=True):
                p.add_(change.view_as(p), alpha=-group["lr"] * size)

    def _nesterov(self, p: Tensor) -> Tensor:
        """Nesterov's momentum of a gradient, as an average."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - self.momentum)
        return p.grad.lerp(average, self.momentum)


def orthogonal(matrices: Float[Tensor, "b m n"], steps: int = 5) -> Float[Tensor, "b m n"]:
    """Nearly the orthogonal matrix nearest to each, by `steps` Newton-Schulz iterations: singular values 0.7 to 1.2.

    An iteration is `x <- (a + b g + c g^2) x` with `g = x x^T`. All its factors are polynomials of the first `g`, so
    that they are gathered on the small side, and `x` is touched twice only.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    one = torch.eye(x.shape[1], device=x.device).expand_as(gram)
    product = one
    for step in range(steps):
        factor = a * one + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = factor @ product if step else factor
        if step < steps - 1:
            gram = factor @ gram @ factor
    x = product @ x
    return (x if wide else x.mT).to(matrices.dtype)
