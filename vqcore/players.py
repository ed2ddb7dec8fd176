"""The parties of a training run: whose parameters are optimised, with what, and the loss that each lowers."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqcore import dist
from vqcore.optim import parameter_groups
from vqcore.protocols import Batch, Losses
from vqcore.schema import RunConfig

if TYPE_CHECKING:
    from vqcore.trainer import Run


class Player:
    """One party that is optimised: its module, optimizer and, under DDP, its gradient synchronisation."""

    def __init__(self, name: str, module: nn.Module, cfg: RunConfig, forward: "Forward"):
        self.name, self.module = name, module
        groups = parameter_groups(module, cfg.optim.weight_decay)
        optim = cfg.optim
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps)
        self.trained = [p for group in groups for p in group["params"]]
        self.forward: nn.Module = forward
        if dist.world_size() > 1:
            # The codebook keeps itself equal on all ranks (quantizers sum their statistics), hence no buffer broadcast.
            self.forward = DistributedDataParallel(forward, broadcast_buffers=False)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by parameter name, and the module's own unless it is the tokenizer."""
        names: dict[Tensor, str] = {p: name for name, p in self.module.named_parameters()}
        tensors = {
            f"optimizer/{names[p]}/{key}": value
            for p, entry in self.optimizer.state.items()
            for key, value in entry.items()
        }
        if self.name != "model":
            tensors |= {f"module/{key}": value for key, value in self.module.state_dict().items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        own = {k.removeprefix("module/"): v for k, v in tensors.items() if k.startswith("module/")}
        if own:
            self.module.load_state_dict(own)
        named = dict(self.module.named_parameters())
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                name, _, entry = key.removeprefix("optimizer/").rpartition("/")
                p = named[name]
                value = value.clone() if entry == "step" else value.to(p.device).clone()
                self.optimizer.state[p][entry] = value


class Forward(nn.Module):
    """What DDP wraps: holds one player's module and returns that player's weighted loss."""

    run: "Run"

    def __init__(self, run: "Run", player: str, module: nn.Module):
        super().__init__()
        self.module, self.player = module, player
        self.__dict__["run"] = run

    def forward(self, batch: Batch, step: int, rng: list[torch.Generator]) -> tuple[Tensor, Losses]:
        """The sum of the weighted terms, and all the objective said."""
        run = self.run
        bf16 = run.config.run.precision == "bf16"
        with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
            out = run.objective.losses(run.tokenizer, batch, player=self.player, step=step, rng=rng)
        weights = run.config.objective.weights
        total = sum((weights.get(name, 1.0) * term for name, term in out.terms.items()), torch.zeros(()))
        return torch.as_tensor(total), out
