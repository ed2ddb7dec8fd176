"""Optimizers by name, parameter groups, the schedules of a run, and the running average of weights."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vqcore.errors import ConfigError, did_you_mean, listed
from vqcore.protocols import without_decay
from vqcore.run.muon import Muon
from vqcore.schema import OptimSection

_UNFIT = {"lbfgs": "evaluates a step several times", "sparseadam": "takes sparse gradients only"}


def optimizers() -> dict[str, Any]:
    """The optimizers of torch.optim by lower-case name, without those that do not fit the loop; and our own `muon`."""
    found = {name.lower(): cls for name, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    found["muon"] = Muon
    base = torch.optim.Optimizer
    return {
        name: cls
        for name, cls in sorted(found.items())
        if issubclass(cls, base) and cls is not base and name not in _UNFIT
    }


def optimizer_class(name: str, where: str = "optim") -> Any:
    """The optimizer class of this name. Raises `ConfigError` for an unknown name, or one that does not fit the loop."""
    known = optimizers()
    if name not in known:
        reason = f" ({name} {_UNFIT[name]})" if name in _UNFIT else ""
        raise ConfigError(
            f"{where}.name: no optimizer '{name}'{reason}."
            f"{did_you_mean(name, known)} Optimizers: {listed(known, 20)}."
        )
    return known[name]


def check_optimizers(cfg: OptimSection, layer: Callable[[str], str] | None = None) -> None:
    """Raise `ConfigError` for an unknown optimizer, and for a setting that the chosen optimizer does not have.

    `layer` gives the file that set a key, for the message.
    """
    plain = {f.name: f.default for f in dataclasses.fields(OptimSection)}
    sections: dict[str, Any] = {"optim": cfg} | {f"optim.players.{n}": own for n, own in cfg.players.items()}
    for where, own in sections.items():
        key = f"{where}.name" if own.name is not None else "optim.name"
        name = own.name or cfg.name
        try:
            takes = inspect.signature(optimizer_class(name, key.removesuffix(".name"))).parameters
            for setting in ("betas", "eps", "weight_decay", "weight_decay_end"):
                value = getattr(own, setting, None)
                argument = setting.removesuffix("_end")
                if value not in (None, plain[setting], 0.0) and argument not in takes:
                    key = f"{where}.{setting}"
                    shown = list(value) if isinstance(value, tuple) else value
                    raise ConfigError(f"{key}={shown} does nothing: {name} has no {argument}. Leave it out.")
        except ConfigError as error:
            raise error.at(layer(key)) if layer else error from None


def check_rates(cfg: OptimSection, players: Iterable[str], total_batch: int) -> None:
    """Raise `ConfigError` if a player's `min_lr` is above its peak rate, which may depend on the total batch."""
    for name in players:
        own = cfg.of(name)
        if own.min_lr > peak_rate(own, total_batch):
            where = f"optim.players.{name}" if name in cfg.players else "optim"
            raise ConfigError(
                f"{where}.min_lr={own.min_lr:g} is above the peak, {rate_in_words(own, total_batch)}: the schedule "
                "falls from the peak to min_lr."
            )


def build_optimizer(
    cfg: OptimSection,
    module: nn.Module,
    where: str = "optim",
    *,
    beside: nn.Module | None = None,
    trained: Sequence[nn.Parameter] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a config, for a module's trained parameters; `where` is the config's key for errors.

    `beside` is a second module; with `trained`, only these parameters of both modules.

    The learning rate is 0 until the loop sets it at the first step. Raises `ConfigError` for an unknown name or
    argument.
    """
    cls = optimizer_class(cfg.name, where)
    takes = inspect.signature(cls).parameters
    unknown = [name for name in cfg.args if name not in takes]
    if unknown:
        raise ConfigError(
            f"{where}.args: {cfg.name} has no argument '{unknown[0]}'.{did_you_mean(unknown[0], takes)} "
            f"Arguments: {listed((n for n in takes if n not in ('params', 'lr')), 20)}."
        )
    ours = {name: getattr(cfg, name) for name in ("betas", "eps") if name in takes}
    if "eps" in takes and not isinstance(takes["eps"].default, float):
        del ours["eps"]  # adafactor has a pair of numbers here
    groups = parameter_groups(module, cfg.weight_decay, beside=beside, trained=trained)
    try:
        return cls(groups, **({"lr": 0.0} | ours | cfg.args))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{where}.name={cfg.name}: {error}") from error


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    beside: nn.Module | None = None,
    trained: Sequence[nn.Parameter] | None = None,
) -> list[dict]:
    """Up to three groups: matrices and kernels; positions; vectors (biases, norms, scales) and tables, without decay.

    A table is the weight of an `nn.Embedding`, or a parameter that a module names in its optional `without_decay`. Each
    row of a table is a vector. A row that no sample uses has no gradient, so decay alone would change the row.
    Positions, and other parameters with one row `(1, ...)`, have their own group, because `muon` (`vqcore.run.muon`)
    must not treat them as matrices. `beside` and `trained`: see `build_optimizer`.
    """
    tables = {*_tables(module), *(_tables(beside) if beside is not None else ())}
    trained = [p for p in module.parameters() if p.requires_grad] if trained is None else list(trained)
    decays = [p.ndim >= 2 and p not in tables for p in trained]
    decaying = [p for p, does in zip(trained, decays, strict=True) if does]
    groups = [
        {"params": [p for p in decaying if len(p) > 1], "weight_decay": weight_decay, "matrices": True},
        {"params": [p for p in decaying if len(p) <= 1], "weight_decay": weight_decay},
        {"params": [p for p, does in zip(trained, decays, strict=True) if not does], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _tables(module: nn.Module) -> Iterator[nn.Parameter]:
    for inner in module.modules():
        names = ("weight",) if isinstance(inner, nn.Embedding) else without_decay(inner)
        yield from (inner.get_parameter(name) for name in names)


def peak_rate(cfg: OptimSection, total_batch: int) -> float:
    """The learning rate at the end of the warm-up: `lr`, or `base_lr` times the samples of a step / 256."""
    return cfg.lr if cfg.lr is not None else (cfg.base_lr or 0.0) * total_batch / 256


def rate_in_words(cfg: OptimSection, total_batch: int) -> str:
    """The peak rate in numbers: `lr 6.25e-05 = base_lr 0.001 x 16/256`."""
    scaled = "" if cfg.lr is not None else f" = base_lr {cfg.base_lr:g} x {total_batch}/256"
    return f"lr {peak_rate(cfg, total_batch):.4g}{scaled}"


def learning_rate(cfg: OptimSection, step: int, *, horizon: int, total_batch: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then half a cosine to `min_lr` at the horizon."""
    peak, done = peak_rate(cfg, total_batch), step + 1
    if done <= cfg.warmup:
        return peak * done / cfg.warmup
    return _half_cosine(peak, cfg.min_lr, (step - cfg.warmup) / max(1, horizon - cfg.warmup))


def weight_decay(cfg: OptimSection, step: int, *, horizon: int) -> float:
    """The weight decay of matrices at step number `step`: half a cosine from `weight_decay` to `weight_decay_end`."""
    if cfg.weight_decay_end is None:
        return cfg.weight_decay
    return _half_cosine(cfg.weight_decay, cfg.weight_decay_end, step / max(1, horizon))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Ema:
    """Running averages (EMA) of a module's trained parameters, in fp32. Buffers and frozen parameters are not averaged.

    The share that is kept rises as `(1 + n) / (10 + n)` over the first updates until it reaches `decay`, so that short
    runs are not averages of their start.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().float().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the present parameters to the averages."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach().float() for p in self.trained.values()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this block the module has the averages as its parameters."""
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
