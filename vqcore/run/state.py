"""The state of a run: its parts, which stay the same, and its progress, which changes; and how both are built.

The trainer changes the progress, `checkpoints` saves and restores the state, hooks and checks read the state.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqcore import dist
from vqcore.artefacts.resolve import checkpoints
from vqcore.assembly import Assembly, assemble, lend_riders
from vqcore.borrowed import Access, Lender, Loans, own_buffers
from vqcore.data.sizes import sizes
from vqcore.errors import ConfigError, PluginLoadError, SettingError, listed
from vqcore.evaluate.baseline import Constant
from vqcore.evaluate.measure import Metrics
from vqcore.evaluate.usage import CodeWindow, learns_codes
from vqcore.protocols import Data, Modality, Objective
from vqcore.registry import registry
from vqcore.rng import seeded
from vqcore.run.hooks import GuardedHooks
from vqcore.run.optim import Ema, check_optimizers, check_rates
from vqcore.run.players import Player, check_players, held, player_names
from vqcore.run.start import refuse_other_codes, start_from
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer


@dataclass
class Progress:
    """How far a run is.

    `step` counts optimizer steps. `offset` is the number of steps by which the stream of samples is ahead of `step`:
    each rollback leaves samples out. `skipped` counts the steps whose update was left out. `saved` is the step of the
    last checkpoint, -1 without one. `evaluation` has the metrics of the last evaluation by this process. `stopped_by`
    names the signal that ended the run early.
    """

    step: int = 0
    offset: int = 0
    skipped: int = 0
    saved: int = -1
    evaluation: dict[str, float] = field(default_factory=dict)
    stopped_by: str = ""


@dataclass(frozen=True)
class Run:
    """The parts of a run, and its progress.

    `steps` is the step at which the run ends. `window` holds the codes of the last training tokens, `constant` adds up
    the baseline of evaluations from the first training samples. `metrics` are those of evaluations, empty without
    evaluation data. `player_names` are all players, `players` those that were built so far. `held` names what only
    training has (`vqcore.run.players.held`). `loans` has hash and source of all borrowed weights. Hooks read a run as
    `vqcore.protocols.RunLike`.
    """

    config: RunConfig
    steps: int
    device: torch.device
    tokenizer: Tokenizer
    data: Data
    eval_data: Data | None
    extra: dict[str, Modality]
    ema: Ema | None
    window: CodeWindow
    constant: Constant
    hooks: GuardedHooks
    player_names: tuple[str, ...] = ("model",)
    held: tuple[str, ...] = ()
    loans: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    players: dict[str, Player] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    @property
    def dir(self) -> Path:
        """The folder of the run."""
        return self.config.run.folder

    @property
    def step(self) -> int:
        """Number of optimizer steps that are done."""
        return self.progress.step

    @property
    def seed(self) -> int:
        """The seed from which every random choice follows."""
        return self.config.run.seed

    @property
    def objective(self) -> Objective:
        """How the tokenizer is trained."""
        return self.tokenizer.objective

    @property
    def total_batch(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return total_batch(self.config)

    def player(self, name: str) -> Player:
        """A player by name. The first call builds the player; under DDP all processes make this call together.

        Raises `PluginLoadError` for a name that is not in `player_names`.
        """
        if name not in self.players:
            if name not in self.player_names:
                raise PluginLoadError(
                    f"objective {self.config.objective.name}: at step {self.step} it names the player '{name}', but at "
                    f"none of the steps for which it was asked before the run: {listed(self.player_names)}. Let it "
                    "name each player from the player's first step on more often."
                )
            self.players[name] = Player(name, self.config, self.tokenizer, self.player_names)
        return self.players[name]

    @property
    def modules(self) -> list[nn.Module]:
        """The tokenizer, the objective if it is a module, and the modules of all players, each once."""
        own: list[Any] = [
            self.tokenizer,
            self.objective,
            *(player.module for player in self.players.values()),
        ]
        return list(dict.fromkeys(module for module in own if isinstance(module, nn.Module)))

    @functools.cached_property
    def statistics(self) -> list[Tensor]:
        """The buffers in which processes may differ after a turn: all but borrowed ones and those of the quantizer.

        Quantizers sum their statistics over all processes themselves.
        """
        parts = [part for name, part in self.tokenizer.named_children() if name != "quantizer"]
        found = [buffer for module in (*parts, *self.modules[1:]) for buffer in own_buffers(module)]
        return list({id(buffer): buffer for buffer in found}.values())

    @contextlib.contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Inside the block all modules are in eval mode, and the tokenizer is as an evaluation measures it.

        It has the running averages as weights, if there are any, and the precision `eval.precision`.
        """
        modes = [(module, module.training) for owner in self.modules for module in owner.modules()]
        for module in self.modules:
            module.eval()
        self.tokenizer.precision = self.config.eval.precision
        try:
            with self.ema.applied() if self.ema else contextlib.nullcontext():
                yield
        finally:
            self.tokenizer.precision = "fp32"
            for module, was_training in modes:
                module.training = was_training


def total_batch(config: RunConfig) -> int:
    """Samples of one optimizer step, over all processes."""
    return config.data.batch_size * config.optim.accumulate * dist.world_size()


def build(config: RunConfig, device: torch.device, access: Access | None = None) -> Run:
    """Build a run and its players. Writes nothing: an error of the user leaves no folder behind."""
    with dist.together():
        parts = assemble(config)
        assert parts is not None
        run = build_from(config, parts, device, access)
    for name in run.player_names:
        run.player(name)
    return run


def build_from(
    config: RunConfig,
    parts: Assembly,
    device: torch.device,
    access: Access | None = None,
) -> Run:
    """A run of parts that are assembled already; adds weights to start from, averages, code statistics and hooks."""
    tokenizer, data = parts.tokenizer, parts.data
    check_optimizers(config.optim)
    access = access or Access()
    lender = access.lender()
    tokenizer.borrow(lender)
    if not checkpoints(config.run.folder):
        start_from(tokenizer, config.model, allow_pickle=access.allow_pickle)
        refuse_other_codes(tokenizer, data)
    if config.model.freeze_enc:
        tokenizer.freeze_encoder()
    tokenizer.to(device)
    loans = lend_riders(parts.extra, lender) | set_up(tokenizer, config, lender)
    lender.refuse_unused()
    config = _in_steps(config, len(data))
    steps = config.run.steps or _steps(config, len(data))
    names = player_names(tokenizer.objective, steps)
    check_players(config, tokenizer.objective, names, tokenizer)
    check_rates(config.optim, names, total_batch(config))
    batch_sizes = sizes(config.data, tokenizer.spec)
    run = Run(
        config=config,
        steps=steps,
        device=device,
        tokenizer=tokenizer,
        data=data,
        eval_data=parts.eval_data,
        extra=parts.extra,
        ema=Ema(tokenizer, config.ema.decay) if config.ema.decay else None,
        window=CodeWindow(
            tokenizer.codebook_size,
            tokenizer.num_codebooks,
            learned=learns_codes(tokenizer.quantizer),
            tokens=len(data) * math.prod(tokenizer.grid(batch_sizes[-1])),
        ),
        constant=Constant(tokenizer.spec, shared=True),
        hooks=build_hooks(config),
        player_names=names,
        held=tuple(held(tokenizer.objective, names, tokenizer)),
        loans=tokenizer.loans | loans,
        metrics=Metrics() if parts.eval_data is None else parts.metrics,
    )
    if config.run.compile:
        for part in ("encoder", "quantizer", "decoder"):
            tokenizer.get_submodule(part).compile(dynamic=len(batch_sizes) > 1)
    return run


def set_up(tokenizer: Tokenizer, config: RunConfig, lender: Lender, *, anew: bool = False) -> Loans:
    """Build what only training needs, on the tokenizer's device; returns what the objective borrows.

    With `anew` the objective itself is built again from the run's config: the config of a saved tokenizer lacks parts
    for training. What the objective draws follows from the seed of the run.
    """
    if anew:
        tokenizer.build_objective(config.objective, config.run.seed)
    objective = tokenizer.objective
    with seeded(config.run.seed, "init", "setup"):
        objective.setup(tokenizer)
    loans = lender.lend({"objective": objective})
    if isinstance(objective, nn.Module):
        objective.to(tokenizer.device)
    return loans


def build_hooks(config: RunConfig) -> GuardedHooks:
    """The hooks of a config. Raises `ConfigError` or `PluginLoadError` for one that cannot be built."""
    return GuardedHooks(
        {label: registry().build("hook", cfg, f"hooks.{label}") for label, cfg in config.hooks.items()}
    )


def _steps(config: RunConfig, samples: int) -> int:
    assert config.run.epochs is not None
    return max(1, math.ceil(config.run.epochs * samples / total_batch(config)))


def _in_steps(config: RunConfig, samples: int) -> RunConfig:
    """The config with the warm-up in steps."""
    optim = config.optim
    if optim.warmup_epochs is None:
        return config
    warmup = round(optim.warmup_epochs * samples / total_batch(config))
    try:
        return replace(config, optim=replace(optim, warmup=warmup, warmup_epochs=None))
    except SettingError as error:
        raise ConfigError(f"optim.warmup_epochs={optim.warmup_epochs:g}: {error}.") from error
