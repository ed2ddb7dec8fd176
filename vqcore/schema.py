"""The sections of a config file. Config layer: no torch.

`RunConfig` is what `vqcore train` reads; `TokenizerConfig` is the part of it that an artefact keeps. What nests here
as a slot is a component and brings its own settings; `vqcore show NAME` lists them.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from vqcore.config import Config, slot, slots

FREE_ON_RESUME = (
    "run.steps",
    "run.epochs",
    "run.save_every",
    "run.save_every_seconds",
    "run.on_nonfinite",
    "run.on_explosion",
    "run.keep",
    "run.log_every",
    "run.dir",
    "eval",
    "hooks",
    "data.workers",
    "data.cache_mib",
    "data.max_bad_share",
    "data.eval_path",
    "data.eval_extra_path",
    "requires",
)
"""Keys (and everything below them) that may differ when a run is taken up again; anything else is refused by name."""


OnTrouble = Literal["stop", "skip", "rollback"]
OptimArg = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What every component of kind `data` has; its own settings come on top."""

    modality: Config = slot("modality")
    """What a sample is and how it is read, cropped, resized, normalised and shown."""
    extra: dict[str, Config] = slots("modality")
    """Further modalities that ride along in `batch.extras` with the same crop; masks say what of the sample counts."""
    batch_size: int = 32
    """Samples in one batch of one process; `optim.accumulate` and the number of processes multiply it."""
    input_size: int | tuple[int, ...] | None = None
    """Size of a training sample: one number for all axes or one per axis. Null: the modality's own, or those below."""
    input_size_min: int | tuple[int, ...] | None = None
    """With input_size_max: every batch draws a size between the two, the same on every process."""
    input_size_max: int | tuple[int, ...] | None = None
    """The largest size of a batch; also the nominal size of the tokenizer."""
    resolution_step: int = 32
    """Distance between the sizes that may be drawn."""
    workers: int = 2
    """Processes that read and prepare samples; 0 does it in the training process. Never changes a result."""
    cache_mib: float = 0.0
    """Memory in which each reading process keeps samples as they were read, so that files are decoded once."""
    max_bad_share: float = 0.05
    """The run stops when more than this share of the samples is unreadable; until then they are skipped and named."""

    @property
    def has_eval(self) -> bool:
        """Are there samples to evaluate on? By default: is there a setting `eval_path`, and is it set."""
        return getattr(self, "eval_path", None) is not None

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "resolution_step")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} is negative")
        if self.cache_mib < 0:
            raise ValueError(f"cache_mib={self.cache_mib} is negative")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} is no share; it lies in 0..1")
        if (self.input_size_min is None) != (self.input_size_max is None):
            raise ValueError("input_size_min and input_size_max go together")
        if self.input_size is not None and self.input_size_max is not None:
            raise ValueError("give input_size, or input_size_min and input_size_max, not all of them")
        for name in ("input_size", "input_size_min", "input_size_max"):
            size = getattr(self, name)
            if size is not None and any(side < 1 for side in ([size] if isinstance(size, int) else size)):
                raise ValueError(f"{name}={size} has a side below 1")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Config):
    """What every component of kind `objective` has."""

    weights: dict[str, float] = field(default_factory=dict)
    """Factors on losses by name, e.g. {vq/commit: 0.25}; a loss that is not listed counts once."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The tokenizer's parts."""

    encoder: Config = slot("encoder")
    """From a sample to a grid of latents."""
    quantizer: Config = slot("quantizer")
    """From latents to codes and back."""
    decoder: Config = slot("decoder")
    """From quantized latents to a sample."""
    embed_dim: int = 64
    """Class maps only: channels that a class is embedded in before the encoder."""
    full_ckpt: str | None = None
    """Start from a whole tokenizer (run, artefact or hub id): every part whose component and shapes agree."""
    encoder_ckpt: str | None = None
    """Start from another tokenizer's encoder (and class embedding) alone."""
    freeze_enc: bool = False
    """Embedding, encoder, projection and codebook stay as full_ckpt has them, so tokens stay the same."""

    def __post_init__(self) -> None:
        _positive(self, "embed_dim")
        if self.full_ckpt is not None and self.encoder_ckpt is not None:
            raise ValueError("give full_ckpt or encoder_ckpt, not both; full_ckpt includes the encoder")
        if self.freeze_enc and self.full_ckpt is None:
            raise ValueError(
                "freeze_enc=true keeps the tokens of a trained tokenizer; say which one with full_ckpt"
            )

    @property
    def bare(self) -> "ModelConfig":
        """Without where its weights came from: what a finished tokenizer is."""
        return replace(self, full_ckpt=None, encoder_ckpt=None, freeze_enc=False)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """All that decides what a tokenizer does with an input: what an artefact's config.yaml holds."""

    modality: Config = slot("modality")
    """How a sample is read and shown."""
    size: tuple[int, ...]
    """Nominal size of an input, one number per axis."""
    model: ModelConfig
    """Encoder, quantizer, decoder."""
    objective: ObjectiveConfig = slot("objective")
    """How the decoder is sampled."""


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where, how long, in which precision."""

    dir: str
    """Folder of the run; by default runs/<name of the config file>."""
    seed: int = 0
    """Every random choice follows from it."""
    steps: int | None = None
    """Optimizer steps; give this or epochs."""
    epochs: float | None = None
    """Passes over the training data."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: autocast in the forward pass (fp16 scales the loss); weights and optimizer stay fp32."""
    compile: bool = False
    """Compile encoder, quantizer and decoder with torch.compile; the first steps take longer."""
    deterministic: bool = False
    """Only deterministic kernels, for equal bits on CUDA too; slower, and an operation without one fails."""
    device: str | None = None
    """cpu or cuda; by default cuda when there is one."""
    threads: int | None = None
    """CPU threads of torch; by default torch's own choice."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    save_every_seconds: float | None = None
    """Also save when this much time has passed since the last checkpoint."""
    keep: int = 3
    """Checkpoints kept: the last ones, and the best one beside them."""
    on_nonfinite: OnTrouble = "stop"
    """NaN or infinite gradients: stop, skip the step, or roll back to the last checkpoint and take other samples."""
    on_explosion: OnTrouble = "skip"
    """The same for a gradient norm above optim.max_norm."""

    @property
    def folder(self) -> Path:
        """`dir`, with `~` expanded."""
        return Path(self.dir).expanduser()

    def __post_init__(self) -> None:
        _positive(self, "log_every", "save_every", "keep")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.steps is not None:
            _positive(self, "steps")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs={self.epochs} must be above 0")
        if self.threads is not None:
            _positive(self, "threads")
        if self.save_every_seconds is not None and not self.save_every_seconds > 0:
            raise ValueError(f"save_every_seconds={self.save_every_seconds} must be above 0")


@dataclass(frozen=True, kw_only=True)
class PlayerOptim:
    """What a player other than the tokenizer does differently, e.g. a discriminator; null: as the tokenizer."""

    name: str | None = None
    """Optimizer."""
    lr: float | None = None
    """Peak learning rate."""
    base_lr: float | None = None
    """Peak learning rate for a total batch of 256."""
    betas: tuple[float, float] | None = None
    """Decay rates of the two moments."""
    args: dict[str, OptimArg] | None = None
    """Further arguments of the optimizer."""
    weight_decay: float | None = None
    """Decay of matrices."""
    warmup: int | None = None
    """Steps of linear warm-up."""
    min_lr: float | None = None
    """Learning rate at the end."""
    clip: float | None = None
    """Largest norm of a step's gradient."""


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """Optimizer and learning-rate schedule: linear warm-up from 0, then half a cosine down to min_lr."""

    name: str = "adamw"
    """Any optimizer of torch.optim in lower case: adamw (arXiv 1711.05101), sgd, adafactor ...; muon (arXiv 2502.16982)
    takes matrices and kernels, and leaves the rest to adamw."""
    lr: float | None = None
    """Peak learning rate as it is; give this or base_lr."""
    base_lr: float | None = None
    """Peak learning rate for a total batch of 256; it is scaled by total batch / 256."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the two moments, for optimizers that have them."""
    eps: float = 1e-8
    """Added to the root of the second moment, for optimizers that have it."""
    args: dict[str, OptimArg] = field(default_factory=dict)
    """Further arguments of the optimizer, e.g. {momentum: 0.9} or {fused: true}."""
    weight_decay: float = 0.05
    """Decay of matrices and convolution kernels; vectors (biases, norms, scales), embeddings and codes have none."""
    weight_decay_end: float | None = None
    """Decay at the end of the schedule, reached along half a cosine; by default it stays the same."""
    warmup: int = 0
    """Steps of linear warm-up."""
    warmup_epochs: float | None = None
    """The same in passes over the training data; give one of the two."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    horizon: int | None = None
    """Step at which the schedule ends; by default the end of the run. Set it when a run may be lengthened."""
    clip: float | None = 1.0
    """Largest norm of a step's gradient; a longer one is scaled down to it."""
    max_norm: float | None = None
    """A step whose gradient norm is above this, before clipping, is an explosion: see run.on_explosion."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    players: dict[str, PlayerOptim] = field(default_factory=dict)
    """Differences for other players by name, e.g. {discriminator: {lr: 2.0e-4, betas: [0.5, 0.9]}}."""

    def __post_init__(self) -> None:
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError("give either lr or base_lr")
        _positive(self, "accumulate")
        if self.horizon is not None:
            _positive(self, "horizon")
        if self.warmup and self.warmup_epochs is not None:
            raise ValueError("give warmup (steps) or warmup_epochs, not both")
        for name in ("lr", "base_lr", "clip", "max_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        for name in ("weight_decay", "weight_decay_end", "warmup", "warmup_epochs", "min_lr"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} is negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        for player in self.players:
            self.of(player)

    def of(self, player: str) -> "OptimSection":
        """The section as one player has it."""
        own = self.players.get(player)
        if own is None:
            return self
        given = {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) is not None}
        rates = {"lr": None, "base_lr": None} if {"lr", "base_lr"} & given.keys() else {}
        warmup = {"warmup_epochs": None} if "warmup" in given else {}
        try:
            return replace(self, **{**rates, **warmup, **given, "players": {}})
        except ValueError as error:
            raise ValueError(f"players.{player}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class EmaSection:
    """A running average of the trained weights, kept beside them and used for evaluation and export."""

    decay: float | None = 0.999
    """Share of the average that a step keeps; null switches it off."""

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"decay={self.decay} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """What is measured on data.eval_path."""

    every: int | None = None
    """Steps between evaluations during training; null evaluates at the end only."""
    sizes: tuple[int | tuple[int, ...], ...] | None = None
    """Sizes to evaluate at, each one number for all axes or one per axis; by default the nominal size."""
    metrics: dict[str, Config] = slots("metric")
    """Metrics by label; by default those that the modality names."""
    batch_size: int | None = None
    """Samples at once; by default data.batch_size."""
    samples: int | None = None
    """How many samples to measure; by default all."""
    pictures: int = 8
    """How many samples the contact sheet and the strip show."""

    def __post_init__(self) -> None:
        _positive(self, "pictures")
        for name in ("every", "batch_size", "samples"):
            if getattr(self, name) is not None:
                _positive(self, name)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run."""

    requires: tuple[str, ...] = ()
    """Requirements checked before anything is imported, e.g. ["vqcore-vit>=0.1"]."""
    data: DataConfig = slot("data")
    """Where samples come from."""
    model: ModelConfig
    """The tokenizer."""
    objective: ObjectiveConfig = slot("objective", default={"name": "reconstruction"})
    """How it is trained."""
    run: RunSection
    """Where, how long, in which precision."""
    optim: OptimSection
    """Optimizer and schedule."""
    ema: EmaSection = field(default_factory=EmaSection)
    """Average of the weights."""
    eval: EvalSection = field(default_factory=EvalSection)
    """Measurements."""
    hooks: dict[str, Config] = slots("hook", optional=True)
    """Observers of the run by label."""


def _positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
