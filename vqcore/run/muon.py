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
_GATHERED = 2
"""Iterations gathered on a matrix's small side; rounding errors grow twelve-fold with each."""
_STACKED = 2**22
"""Numbers of equally shaped matrices that are iterated together, unless one alone has more."""


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is replaced by its nearest orthogonal one (Jordan et al., 2024; arXiv 2502.16982).

    Groups with `matrices: True` are treated so, a kernel `(out, in, *k)` as the matrix `(out, in * k)`; the others by
    AdamW. An update is scaled to a root mean square of `rms` (there eq. 4: 0.2), which is about AdamW's, so that one
    learning rate serves both. Decay is decoupled. Differs from torch.optim.Muon: it takes any parameter, and iterates
    in fp32, on CPUs partly on the small side of a matrix (`orthogonal`). Raises `ValueError` for settings out of range.
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
        if not rms > 0:
            raise ValueError(f"rms={rms} must be above 0")
        if not isinstance(ns_steps, int) or ns_steps < 1:
            raise ValueError(f"ns_steps={ns_steps} must be a whole number above 0")
        settings = {"momentum": momentum, "rms": rms, "ns_steps": ns_steps, "matrices": False}
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
        super().__init__(params, {**settings, **adam})
        self._adam = self._for_the_rest()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adam = self._for_the_rest()

    def _for_the_rest(self) -> torch.optim.AdamW | None:
        """AdamW on this optimizer's own groups and state."""
        rest = [group for group in self.param_groups if not group["matrices"]]
        if not rest:
            return None
        adam = torch.optim.AdamW(rest, **{key: rest[0][key] for key in ("lr", "betas", "eps", "fused")})
        adam.state = self.state
        return adam

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient. A closure is not evaluated."""
        if self._adam is not None:
            self._adam.step()
        for group in self.param_groups:
            if group["matrices"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                alike[len(p), p[0].numel()].append(p)
        for (rows, columns), params in alike.items():
            count = max(1, _STACKED // (rows * columns))
            size = group["lr"] * group["rms"] * max(rows, columns) ** 0.5
            for start in range(0, len(params), count):
                part = params[start : start + count]
                updates = torch.stack([self._nesterov(p, group["momentum"]).flatten(1) for p in part])
                for p, change in zip(part, orthogonal(updates, group["ns_steps"]), strict=True):
                    p.add_(change.view_as(p), alpha=-size)

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum of a gradient, as an average."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonal(matrices: Float[Tensor, "b m n"], steps: int = 5) -> Float[Tensor, "b m n"]:
    """Nearly the orthogonal matrix nearest to each, by `steps` Newton-Schulz iterations: singular values 0.7 to 1.2.

    An iteration is `x <- (a + b g + c g^2) x` with `g = x x^T`. The factors of consecutive ones are polynomials of one
    `g`, so that on CPUs two are gathered on the small side before `x` is touched again.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    one = torch.eye(x.shape[1], device=x.device)
    # With tf32 on GPUs only a new g at every iteration takes back what rounding did to the one before.
    gathered = 1 if x.is_cuda else _GATHERED
    for start in range(0, steps, gathered):
        gram = x @ x.mT
        x_factor = factor = a * one + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        for _ in range(1, min(gathered, steps - start)):
            gram = factor @ gram @ factor
            factor = a * one + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x_factor = factor @ x_factor
        x = x_factor @ x
    return (x if wide else x.mT).to(matrices.dtype)
