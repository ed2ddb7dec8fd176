"""Parameter groups, the learning-rate schedule, and the running average of weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqcore.schema import OptimSection


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices and convolution kernels decay, vectors (biases, norms, scales) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(cfg: OptimSection, step: int, *, horizon: int, total_batch: int) -> float:
    """The rate of step number `step` (from 0): linear warm-up, then half a cosine to `min_lr` at the horizon."""
    peak = cfg.lr if cfg.lr is not None else (cfg.base_lr or 0.0) * total_batch / 256
    done = step + 1
    if done <= cfg.warmup:
        return peak * done / cfg.warmup
    progress = min(1.0, (step - cfg.warmup) / max(1, horizon - cfg.warmup))
    return cfg.min_lr + (peak - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class Ema:
    """Running averages of a module's trained parameters, in fp32; buffers and frozen parameters are left alone.

    The share that is kept rises as `(1 + n) / (10 + n)` over the first updates until it reaches `decay`, so that short
    runs are not averages of their start.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().float().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach().float() for p in self.trained.values()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module carries the averages inside this block."""
        saved = {name: p.detach().clone() for name, p in self.trained.items()}
        self._fill(self.averages)
        try:
            yield
        finally:
            self._fill(saved)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])
