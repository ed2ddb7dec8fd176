"""The players of a training run: each has a module to train, an optimizer, and a loss that the optimizer lowers."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqcore import dist
from vqcore.errors import ConfigError
from vqcore.protocols import Batch, Losses
from vqcore.run.optim import build_optimizer, learning_rate, weight_decay
from vqcore.schema import OptimSection, RunConfig
from vqcore.tokenizer import PRECISIONS, Tokenizer

_NAMES = inspect.signature(DistributedDataParallel).parameters
# The same option under its new and its old name; newer versions of torch warn of the old name.
_NO_BROADCAST: Any = {next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in _NAMES): False}


class Player:
    """One player: its module, optimizer, schedules and loss scale, and under DDP the sum of its gradients.

    `module` is the tokenizer for the player `model`. For any other player it is the module that the objective has under
    the player's name.
    """

    def __init__(
        self, name: str, module: nn.Module, config: RunConfig, tokenizer: Tokenizer, device: torch.device
    ):
        self.name, self.module = name, module
        self.cfg: OptimSection = config.optim.of(name)
        where = f"optim.players.{name}" if name in config.optim.players else "optim"
        self.optimizer = build_optimizer(self.cfg, module, where)
        self.decaying = [group for group in self.optimizer.param_groups if group["weight_decay"] > 0]
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not self.trained:
            raise ConfigError(f"{name} has no parameters to train; is everything frozen?")
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.run.precision == "fp16")
        forward = Forward(name, module, config, tokenizer, device)
        self.forward: nn.Module = forward
        if dist.world_size() > 1:
            # No buffers are broadcast: quantizers sum their statistics over all ranks, which keeps codebooks equal.
            self.forward = DistributedDataParallel(forward, **_NO_BROADCAST)

    def schedule(self, step: int, *, horizon: int, total_batch: int) -> float:
        """Set the learning rate and the weight decay of a step; returns the learning rate."""
        rate = learning_rate(self.cfg, step, horizon=horizon, total_batch=total_batch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for group in self.decaying:
            group["weight_decay"] = weight_decay(self.cfg, step, horizon=horizon)
        return rate

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by parameter name, and the module's tensors.

        The tokenizer's tensors are left out, because a checkpoint has them in a file of their own.
        """
        names: dict[Tensor, str] = {p: name for name, p in self.module.named_parameters()}
        tensors = {
            f"optimizer/{names[p]}/{key}": value
            for p, entry in self.optimizer.state.items()
            for key, value in entry.items()
            if isinstance(value, Tensor)
        }
        if self.name != "model":
            tensors |= {f"module/{key}": value for key, value in self.module.state_dict().items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor], scale: dict[str, Any]) -> None:
        """Restore what `state` returned, and the loss scale."""
        own = {k.removeprefix("module/"): v for k, v in tensors.items() if k.startswith("module/")}
        if own:
            self.module.load_state_dict(own)
        self.optimizer.state.clear()
        named = dict(self.module.named_parameters())
        counts_on_device = any(self.optimizer.defaults.get(key) for key in ("fused", "capturable"))
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                name, _, entry = key.removeprefix("optimizer/").rpartition("/")
                p = named[name]
                stays = entry == "step" and not counts_on_device
                self.optimizer.state[p][entry] = value.clone() if stays else value.to(p.device, copy=True)
        if scale:
            self.scaler.load_state_dict(scale)


class Forward(nn.Module):
    """What DDP wraps: holds one player's module and returns that player's weighted loss."""

    tokenizer: Tokenizer

    def __init__(
        self, player: str, module: nn.Module, config: RunConfig, tokenizer: Tokenizer, device: torch.device
    ):
        super().__init__()
        self.player, self.module, self.device = player, module, device.type
        self.weights = config.objective.weights
        self.dtype = PRECISIONS.get(config.run.precision)
        # Not registered as a child: DDP must see the parameters of this player only.
        self.__dict__["tokenizer"] = tokenizer

    def forward(self, batch: Batch, step: int, rng: list[torch.Generator]) -> tuple[Tensor, Losses]:
        """The sum of the weighted losses, and everything that the objective returned."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            out = self.tokenizer.objective.losses(
                self.tokenizer, batch, player=self.player, step=step, rng=rng
            )
        weighted = (self.weights.get(name, 1.0) * term for name, term in out.terms.items())
        return torch.as_tensor(sum(weighted, torch.zeros(()))), out
