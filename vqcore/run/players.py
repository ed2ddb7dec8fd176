"""The players of a training run: each has a module to train, an optimizer, and a loss that the optimizer lowers.

The player `model` trains the tokenizer, and with it the objective's parameters that belong to no other player (heads).
"""

import inspect
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from vqcore import dist
from vqcore.balance import loss_scale
from vqcore.borrowed import weights_of
from vqcore.errors import ConfigError, PluginLoadError, did_you_mean, listed
from vqcore.protocols import Batch, Losses, Objective
from vqcore.run.optim import build_optimizer, learning_rate, weight_decay
from vqcore.schema import OptimSection, RunConfig
from vqcore.tokenizer import PRECISIONS, Tokenizer

_NAMES = inspect.signature(DistributedDataParallel).parameters
# The same option under its new and its old name; newer versions of torch warn of the old name.
_NO_BROADCAST: Any = {next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in _NAMES): False}
LOOKS = 1000
"""An objective is asked for its players at so many first steps, and at as many others, to know all of them."""
_FAR = 10**12


class Player:
    """One player: its module, optimizer, schedules and loss scale, and under DDP the sum of its gradients.

    `module` is the tokenizer for the player `model`. For any other player it is the module that the objective has under
    the player's name. `heads` are parameters of the objective by name that learn with `model`. `first` is the step at
    which the player played first, None before: its schedules count from there.
    """

    def __init__(self, name: str, config: RunConfig, tokenizer: Tokenizer, players: tuple[str, ...]):
        self.name = name
        self.module: nn.Module = tokenizer if name == "model" else getattr(tokenizer.objective, name)
        self.heads = heads(tokenizer.objective, players, tokenizer) if name == "model" else {}
        self.cfg: OptimSection = config.optim.of(name)
        self.first: int | None = None
        where = f"optim.players.{name}" if name in config.optim.players else "optim"
        self.trained = [p for p in (*self.module.parameters(), *self.heads.values()) if p.requires_grad]
        if not self.trained:
            raise ConfigError(f"{name} has no parameters to train; is everything frozen?")
        beside: Any = tokenizer.objective if self.heads else None
        self.optimizer = build_optimizer(self.cfg, self.module, where, beside=beside, trained=self.trained)
        self.decaying = [group for group in self.optimizer.param_groups if group["weight_decay"] > 0]
        device = tokenizer.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=config.run.precision == "fp16")
        forward = Forward(self, config, tokenizer)
        self.forward: nn.Module = forward
        if dist.world_size() > 1:
            # No buffers are broadcast: quantizers sum their statistics over all ranks, which keeps codebooks equal.
            self.forward = DistributedDataParallel(forward, **_NO_BROADCAST)

    @property
    def suffix(self) -> str:
        """What follows the names of this player's own metrics: nothing for the model, else `@NAME`."""
        return "" if self.name == "model" else f"@{self.name}"

    def schedule(self, step: int, *, horizon: int, total_batch: int) -> float:
        """Set the learning rate and the weight decay of a step; returns the learning rate."""
        first = self.first or 0
        step, horizon = step - first, max(1, horizon - first)
        rate = learning_rate(self.cfg, step, horizon=horizon, total_batch=total_batch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for group in self.decaying:
            group["weight_decay"] = weight_decay(self.cfg, step, horizon=horizon)
        return rate

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by parameter name. `held` has the module's tensors."""
        names: dict[Tensor, str] = {p: name for name, p in self._named().items()}
        return {
            f"optimizer/{names[p]}/{key}": value
            for p, entry in self.optimizer.state.items()
            for key, value in entry.items()
            if isinstance(value, Tensor)
        }

    def load_state(self, tensors: dict[str, Tensor], scale: dict[str, Any]) -> None:
        """Restore what `state` returned, and the loss scale."""
        self.optimizer.state.clear()
        named = self._named()
        counts_on_device = any(self.optimizer.defaults.get(key) for key in ("fused", "capturable"))
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                name, _, entry = key.removeprefix("optimizer/").rpartition("/")
                p = named[name]
                if entry == "step" and not counts_on_device:
                    value = value.clone()
                elif (
                    value.shape == p.shape
                ):  # in the layout of the parameter: fused kernels do not compare strides
                    value = torch.empty_like(p, dtype=value.dtype).copy_(value)
                else:
                    value = value.to(p.device, copy=True)
                self.optimizer.state[p][entry] = value
        if scale:
            self.scaler.load_state_dict(scale)

    def _named(self) -> dict[str, nn.Parameter]:
        """Every parameter of this player by name; heads under the names that they have in the objective."""
        return dict(self.module.named_parameters()) | {f"objective.{k}": p for k, p in self.heads.items()}


class Forward(nn.Module):
    """What DDP wraps: holds one player's parameters and returns that player's weighted loss."""

    tokenizer: Tokenizer

    def __init__(self, player: Player, config: RunConfig, tokenizer: Tokenizer):
        super().__init__()
        self.player, self.module, self.device = player.name, player.module, tokenizer.device.type
        self.heads = nn.ParameterList(player.heads.values())
        self.objective_cfg = config.objective
        self.dtype = PRECISIONS.get(config.run.precision)
        # Not registered as children: DDP must see the parameters of this player only.
        self.__dict__.update(tokenizer=tokenizer, scaler=player.scaler)

    def forward(
        self, batch: Batch, step: int, rng: list[torch.Generator], shared: MutableMapping[str, Any]
    ) -> tuple[Tensor, Losses]:
        """The sum of the weighted losses, and everything that the objective returned.

        A term is multiplied by its weight at this step and by its factor. A term of weight 0 stays out of the sum, even
        if it is not finite.
        """
        scaler: Any = self.scaler
        scale = scaler.get_scale() if scaler.is_enabled() else 1.0
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None), loss_scale(scale):
            out = self.tokenizer.objective.losses(
                self.tokenizer, batch, player=self.player, step=step, rng=rng, shared=shared
            )
        total = torch.zeros((), device=self.tokenizer.device)
        for name, term in out.terms.items():
            weight = self.objective_cfg.weight(name, step)
            if weight:
                total = total + weight * out.factors.get(name, 1.0) * term
        # A head whose terms have weight 0 gets a gradient of 0: under DDP every parameter must take part.
        for head in self.heads:
            if head.requires_grad:
                total = total + 0.0 * head.sum()
        return total, out


def player_names(objective: Objective, steps: int) -> tuple[str, ...]:
    """All players of a run of so many steps, `model` first; also those that join later, if the run is lengthened."""
    spread = range(0, steps, max(1, steps // LOOKS))
    looks = {*range(min(steps, LOOKS)), *spread, max(0, steps - 1), steps, _FAR}
    return tuple(
        dict.fromkeys(["model", *(name for step in sorted(looks) for name in objective.players(step))])
    )


def check_players(
    config: RunConfig, objective: Objective, names: tuple[str, ...], tokenizer: Tokenizer
) -> None:
    """Raise `ConfigError` for a player of the config that the objective lacks.

    Raises `PluginLoadError` for an objective whose players are no modules, or which keeps the tokenizer.
    """
    for name in config.optim.players:
        if name not in names:
            raise ConfigError(
                f"optim.players.{name}: the objective {config.objective.name} has no such player."
                f"{did_you_mean(name, names)} Players: {listed(names)}."
            )
    for name in names[1:]:
        if not isinstance(getattr(objective, name, None), nn.Module):
            raise PluginLoadError(
                f"objective {config.objective.name}: its player '{name}' is no module of the objective."
            )
    for name in ("model", *names[1:]):
        module: Any = objective if name == "model" else getattr(objective, name)
        if isinstance(module, nn.Module) and any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            raise PluginLoadError(
                f"objective {config.objective.name}: it has lazy parameters after setup; give their sizes there."
            )
    if isinstance(objective, nn.Module) and any(module is tokenizer for module in objective.modules()):
        raise PluginLoadError(
            f"objective {config.objective.name}: its setup keeps the tokenizer as a submodule; use the tokenizer that "
            "losses and decode are given."
        )


def heads(objective: Objective, players: tuple[str, ...], tokenizer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of the objective that belong to no player, by name."""
    if not isinstance(objective, nn.Module):
        return {}
    others = [tokenizer, *(getattr(objective, name) for name in players if name != "model")]
    taken = {p for module in others for p in module.parameters()}
    return {n: p for n, p in objective.named_parameters() if p.requires_grad and p not in taken}


def held(objective: Objective, players: Iterable[str], tokenizer: nn.Module) -> dict[str, Tensor]:
    """What only training has, by name: `players/NAME/module/...`, and `objective/...` for the rest of the objective.

    Without borrowed weights, and without what the objective shares with the tokenizer. A tensor with several names
    stands under its first one.
    """
    seen = {_place(tensor) for tensor in tokenizer.state_dict().values()}
    found: dict[str, Tensor] = {}
    for path, module in _roots(objective, players).items():
        own = {k: v for k, v in weights_of(module).items() if v.numel() == 0 or _place(v) not in seen}
        found |= {f"{path}/{name}": tensor for name, tensor in own.items()}
        seen |= {_place(tensor) for tensor in module.state_dict().values()}
    return found


def check_held(
    config: RunConfig,
    objective: Objective,
    players: Iterable[str],
    tokenizer: nn.Module,
    before: Iterable[str],
) -> None:
    """Raise `PluginLoadError` if `held` has other names than `before`: no checkpoint of these could be resumed."""
    wrong = held(objective, players, tokenizer).keys() ^ set(before)
    if wrong:
        raise PluginLoadError(
            f"objective {config.objective.name}: {listed(sorted(wrong), 4)} came or went after setup, so a checkpoint "
            "could not be resumed. Make every parameter and buffer in setup."
        )


def fill_held(
    objective: Objective, players: Iterable[str], tokenizer: nn.Module, tensors: Mapping[str, Tensor]
) -> list[str]:
    """Restore what `held` returned. If names or shapes differ, nothing changes; returns these names."""
    players = tuple(players)
    own = held(objective, players, tokenizer)
    wrong = own.keys() ^ tensors.keys()
    wrong |= {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape}
    if not wrong:
        for path, module in _roots(objective, players).items():
            start = f"{path}/"
            theirs = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            module.load_state_dict(theirs, strict=False)
    return sorted(wrong)


def _roots(objective: Objective, players: Iterable[str]) -> dict[str, nn.Module]:
    roots = {f"players/{name}/module": getattr(objective, name) for name in players if name != "model"}
    return roots | ({"objective": objective} if isinstance(objective, nn.Module) else {})


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: equal for two names of one tensor."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
