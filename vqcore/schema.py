"""The sections of a config file. Config layer: no torch.

`vqcore train` reads a `RunConfig`; an artefact stores a part of these settings as a `TokenizerConfig`. Each slot holds
a component with its own settings; `vqcore show NAME` lists the settings.
"""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

from vqcore.config import Config, above_zero, at_least, refuse_idle, slot, slots
from vqcore.errors import SettingError
from vqcore.files import local

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
"""Keys (and all keys below them) that may change when a run is resumed. A change of any other key is an error."""

MOST_PROCESSES = 1024
"""More workers or threads than any machine has processors are a slip of the pen, and would stop the machine."""

OnTrouble = Literal["stop", "skip", "rollback"]
Precision = Literal["fp32", "bf16", "fp16"]
OptimArg = bool | int | float | str | None
FormatArg = OptimArg | tuple[OptimArg, ...]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Settings of every component of kind `data`. A component adds its own settings.

    `locations` lists the settings that say where the samples lie, and nothing else: a run may go on with other values
    of them, if the samples are the same as at its first start.
    """

    locations: ClassVar[tuple[str, ...]] = ()

    modality: Config = slot("modality")
    """What a sample is, and how a sample is read, cropped, resized, normalised and shown."""
    extra: dict[str, Config] = slots("modality")
    """Extra modalities by label: `batch.extras` holds the same crop of them; a mask says which positions are valid.
    The labels original_size and masks are taken."""
    batch_size: int = 32
    """Samples in one batch of one process. A step takes batch_size x optim.accumulate x processes samples."""
    input_size: int | tuple[int, ...] | None = None
    """Size of a training sample: one number for all axes, or one per axis. Null: the modality's own size, or the range
    input_size_min to input_size_max."""
    input_size_min: int | tuple[int, ...] | None = None
    """With input_size_max: a size between the two is drawn for every step, the same on every process."""
    input_size_max: int | tuple[int, ...] | None = None
    """The largest size of a batch, and the nominal size of the tokenizer."""
    resolution_step: int = 32
    """Difference between two neighbouring sizes."""
    workers: int = 2
    """Processes that read and prepare samples; 0: the training process does both. The results are the same."""
    cache_mib: float = 0.0
    """Memory in MiB of each reading process for samples as read from their files; cached files are decoded once."""
    max_bad_share: float = 0.05
    """The run stops if a larger share of the samples cannot be read. Up to this share, unreadable
    samples are skipped and logged."""

    eval_share: float | None = None
    """Share of the samples that are held out for evaluation, e.g. 0.1. A hash of the key decides, so more files change
    no sample's side. Instead of eval_path."""
    group: str | None = None
    """With eval_share: a regular expression with one group, e.g. ^(patient[0-9]+). Samples whose keys have the same
    text in this group stay on one side."""

    @property
    def has_eval(self) -> bool:
        """Whether the source has held-out samples of its own. By default: whether a setting `eval_path` is set."""
        return getattr(self, "eval_path", None) is not None

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out samples: the source's own, or a share of the samples for training."""
        return self.has_eval or self.eval_share is not None

    def __post_init__(self) -> None:
        at_least(self, batch_size=1, resolution_step=1, cache_mib=0)
        taken = {
            "original_size": "the size of a sample before its crop",
            "masks": "the masks of extra modalities",
        }
        if self.input_size_min is None:
            refuse_idle(self, "input_size_min=null", "resolution_step")
        self._check_split()
        for label, each in self.extra.items():
            if each.name == "target" and label != "target":
                text = f"extra.{label}: objectives know this modality by the label target; rename the label"
                raise SettingError(("extra",), text)
        for label in taken.keys() & self.extra.keys():
            text = f"extra.{label}: this name is taken by {taken[label]}; rename the label"
            raise SettingError(("extra",), text)
        if not 0 <= self.workers <= MOST_PROCESSES:
            raise SettingError("workers", f"{self.workers} must lie in 0..{MOST_PROCESSES}")
        if not 0 <= self.max_bad_share <= 1:
            raise SettingError("max_bad_share", f"{self.max_bad_share} must lie in 0..1")
        if (self.input_size_min is None) != (self.input_size_max is None):
            raise SettingError(
                ("input_size_min", "input_size_max"),
                "give both input_size_min and input_size_max, or neither",
            )
        if self.input_size is not None and self.input_size_max is not None:
            raise SettingError(
                ("input_size", "input_size_min", "input_size_max"),
                "give either input_size, or input_size_min and input_size_max",
            )
        for name in ("input_size", "input_size_min", "input_size_max"):
            size = getattr(self, name)
            sides = () if size is None else (size,) if isinstance(size, int) else size
            if size is not None and (not sides or min(sides) < 1):
                raise SettingError(name, f"{size}: every side must be at least 1")
        low, high = self.input_size_min, self.input_size_max
        if isinstance(low, int) and isinstance(high, int) and low > high:
            raise SettingError(
                ("input_size_min", "input_size_max"),
                f"input_size_min={low} is above input_size_max={high}",
            )

    def _check_split(self) -> None:
        if self.eval_share is None:
            refuse_idle(self, "eval_share=null", "group")
            return
        if not 0 < self.eval_share < 1:
            raise SettingError("eval_share", f"{self.eval_share:g} must lie between 0 and 1, e.g. 0.1")
        if self.has_eval:
            own = "eval_path" if hasattr(self, "eval_path") else "a source with held-out samples of its own"
            raise SettingError(("eval_share",), f"give either eval_share or {own}; null takes a setting back")
        if self.group is not None:
            try:
                groups = re.compile(self.group).groups
            except re.error as error:
                raise SettingError("group", f"{self.group} is no regular expression: {error}") from None
            if groups != 1:
                raise SettingError(
                    "group", f"{self.group} has {groups} groups; write one, e.g. ^(patient[0-9]+)"
                )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Config):
    """Settings of every component of kind `objective`."""

    weights: dict[str, float | dict[int, float]] = field(default_factory=dict)
    """Weights of losses by name, e.g. {vq/commit: 0.25}; a loss that is not listed has weight 1. Instead of a number,
    numbers by step, e.g. {gan/generator: {20000: 0, 25000: 0.1}}: linear between two steps, constant before the first
    and after the last."""

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if isinstance(weight, dict) and (not weight or min(weight) < 0):
                raise SettingError(
                    ("weights",), f"weights.{name}: give numbers by step from 0 on, e.g. {{0: 0, 1000: 0.1}}"
                )
            least = min(weight.values()) if isinstance(weight, dict) else weight
            if least < 0:
                what = f"weights.{name}: {least:g} is below 0: training would raise this loss"
                raise SettingError(("weights",), f"{what}. Write 0 to leave the loss out")

    def weight(self, name: str, step: int) -> float:
        """The weight of a loss at step number `step` (from 0). A loss of weight 0 need not be computed in training."""
        weight = self.weights.get(name, 1.0)
        if not isinstance(weight, dict):
            return weight
        before = max((at for at in weight if at <= step), default=min(weight))
        after = min((at for at in weight if at >= step), default=max(weight))
        if before >= after:
            return weight[before]
        share = (step - before) / (after - before)
        return weight[before] + share * (weight[after] - weight[before])


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The parts of the tokenizer."""

    encoder: Config = slot("encoder")
    """Maps a sample to a grid of latents."""
    quantizer: Config = slot("quantizer")
    """Maps latents to codes and back."""
    decoder: Config = slot("decoder")
    """Maps quantized latents to a sample."""
    embed_dim: int | None = 64
    """Class maps only: channels of the class embedding in front of the encoder. Null: one-hot, a channel a class."""
    full_ckpt: str | dict[str, FormatArg] | None = None
    """Start from a whole tokenizer (as RUN on the command line): copy every part with the same component and shapes.
    For files of another system FORMAT:PATH, or a mapping {name: FORMAT, path: PATH} with settings of the format."""
    encoder_ckpt: str | dict[str, FormatArg] | None = None
    """Start from the encoder (and the class embedding) of another tokenizer only."""
    freeze_enc: bool = False
    """Embedding, encoder, projection and codebook are frozen as loaded from full_ckpt, so tokens stay the same."""

    def __post_init__(self) -> None:
        at_least(self, embed_dim=1)
        for key in ("full_ckpt", "encoder_ckpt"):
            given = getattr(self, key)
            if isinstance(given, dict) and not all(isinstance(given.get(k), str) for k in ("name", "path")):
                raise SettingError(
                    (key,), f"{key} needs a name, the format, and a path: {{name: FORMAT, path: PATH}}"
                )
        if self.full_ckpt is not None and self.encoder_ckpt is not None:
            raise SettingError(
                ("full_ckpt", "encoder_ckpt"),
                "give either full_ckpt or encoder_ckpt; full_ckpt includes the encoder",
            )
        if self.freeze_enc and self.full_ckpt is None:
            raise SettingError(
                "freeze_enc",
                "true keeps the tokens of a trained tokenizer. Give this tokenizer with full_ckpt",
            )

    @property
    def bare(self) -> "ModelConfig":
        """The same settings without full_ckpt, encoder_ckpt and freeze_enc, as stored with a finished tokenizer."""
        return replace(self, full_ckpt=None, encoder_ckpt=None, freeze_enc=False)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """All settings that decide what a tokenizer does with an input; an artefact's config.yaml holds them."""

    modality: Config = slot("modality")
    """How a sample is read and shown."""
    size: tuple[int, ...]
    """Nominal size of an input, one number per axis."""
    model: ModelConfig
    """Encoder, quantizer and decoder."""
    objective: ObjectiveConfig = slot("objective")
    """How codes are decoded."""


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Folder, length, precision, logging and checkpoints of a run."""

    dir: str
    """Folder of the run. By default runs/<name of the config file>."""
    seed: int = 0
    """Seed of every random choice."""
    steps: int | None = None
    """Number of optimizer steps; give either steps or epochs."""
    epochs: float | None = None
    """Number of passes over the training data."""
    precision: Precision = "fp32"
    """bf16 and fp16: autocast in the forward pass (fp16 scales the loss); weights and optimizer stay in fp32."""
    compile: bool = False
    """Compile encoder, quantizer and decoder with torch.compile; the first steps take longer."""
    deterministic: bool = False
    """Use deterministic kernels only, for bit-equal results on CUDA too. Slower; an operation without such a kernel is
    an error."""
    device: str | None = None
    """cpu or cuda. By default cuda if a GPU is available."""
    threads: int | None = None
    """CPU threads of torch. By default torch chooses."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints. The last step is always saved."""
    save_every_seconds: float | None = None
    """Also save if this many seconds have passed since the last checkpoint."""
    keep: int = 3
    """Number of latest checkpoints to keep. With eval.best, the best checkpoint is kept in addition."""
    on_nonfinite: OnTrouble = "stop"
    """For NaN or infinite gradients: stop, skip the step, or roll back to the last checkpoint and use other samples."""
    on_explosion: OnTrouble = "skip"
    """The same choice for a gradient norm above optim.max_norm."""

    @property
    def folder(self) -> Path:
        """`dir` with `~` expanded."""
        return local(self.dir)

    def __post_init__(self) -> None:
        at_least(self, log_every=1, save_every=1, keep=1, steps=1)
        if (self.steps is None) == (self.epochs is None):
            raise SettingError(("steps", "epochs"), "give either steps or epochs")
        above_zero(self, "epochs", "save_every_seconds")
        if self.threads is not None and not 1 <= self.threads <= MOST_PROCESSES:
            raise SettingError("threads", f"{self.threads} must lie in 1..{MOST_PROCESSES}")


@dataclass(frozen=True, kw_only=True)
class PlayerOptim:
    """Optimizer settings of a player other than the tokenizer, e.g. an adversary. Null: as for the tokenizer."""

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

    def __post_init__(self) -> None:
        _check_args("args", self.args or {})


def _check_args(setting: str, args: dict[str, OptimArg]) -> None:
    """Refuse arguments of an optimizer that are settings of their own: one of the two would do nothing."""
    for name in ("lr", "betas", "eps", "weight_decay", "params"):
        if name in args:
            instead = (
                "" if name == "params" else f"; set optim.{name} (or optim.players.PLAYER.{name}) instead"
            )
            raise SettingError((setting,), f"{setting}.{name} would do nothing{instead}")


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """Optimizer and learning-rate schedule: linear warm-up from 0, then half a cosine down to min_lr."""

    name: str = "adamw"
    """Any optimizer of torch.optim in lower case: adamw (arXiv 1711.05101), sgd, adafactor ...; muon (arXiv 2502.16982)
    trains matrices and kernels, and adamw trains the other parameters."""
    lr: float | None = None
    """Peak learning rate; give either lr or base_lr."""
    base_lr: float | None = None
    """Peak learning rate for a total batch of 256. The learning rate is base_lr x total batch / 256."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the two moments, for optimizers with these settings."""
    eps: float = 1e-8
    """Added to the root of the second moment, for optimizers with this setting."""
    args: dict[str, OptimArg] = field(default_factory=dict)
    """Further arguments of the optimizer, e.g. {momentum: 0.9} or {fused: true}."""
    weight_decay: float = 0.05
    """Weight decay of matrices and convolution kernels. No decay for vectors (biases, norms, scales), embeddings and
    codes."""
    weight_decay_end: float | None = None
    """Weight decay at the end of the schedule, reached along half a cosine. By default the weight decay is constant."""
    warmup: int = 0
    """Steps of linear warm-up."""
    warmup_epochs: float | None = None
    """Linear warm-up in passes over the training data; give either warmup or warmup_epochs."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    horizon: int | None = None
    """Step at which the schedule ends. By default the end of the run. Set the horizon if the run may be lengthened."""
    clip: float | None = 1.0
    """Largest norm of a step's gradient. A gradient with a larger norm is scaled down to this norm."""
    max_norm: float | None = None
    """Largest gradient norm before clipping. Above this norm a step is an explosion: see run.on_explosion."""
    accumulate: int = 1
    """Number of batches in one optimizer step."""
    players: dict[str, PlayerOptim] = field(default_factory=dict)
    """Other settings for other players by name, e.g. {adversary: {lr: 2.0e-4, betas: [0.5, 0.9]}}."""

    def __post_init__(self) -> None:
        if (self.lr is None) == (self.base_lr is None):
            raise SettingError(("lr", "base_lr"), "give either lr or base_lr")
        at_least(self, accumulate=1, horizon=1, weight_decay=0, weight_decay_end=0, warmup=0, warmup_epochs=0)
        at_least(self, min_lr=0, eps=0)
        above_zero(self, "lr", "base_lr", "clip", "max_norm")
        if self.warmup and self.warmup_epochs is not None:
            raise SettingError(("warmup", "warmup_epochs"), "give either warmup (steps) or warmup_epochs")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SettingError("betas", f"{list(self.betas)} must lie in [0, 1)")
        if self.lr is not None and self.min_lr > self.lr:
            raise SettingError(
                ("min_lr", "lr"),
                f"min_lr={self.min_lr:g} is above lr={self.lr:g}: the schedule falls from lr to min_lr",
            )
        if self.horizon is not None and self.horizon <= self.warmup:
            raise SettingError(
                ("horizon", "warmup"),
                f"horizon={self.horizon} ends the schedule before warmup={self.warmup} ends; give a later step",
            )
        _check_args("args", self.args)
        for player in self.players:
            self.of(player)

    def of(self, player: str) -> "OptimSection":
        """The settings of one player: this section with the changes under `players`."""
        own = self.players.get(player)
        if own is None:
            return self
        given = {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) is not None}
        rates = {"lr": None, "base_lr": None} if {"lr", "base_lr"} & given.keys() else {}
        warmup = {"warmup_epochs": None} if "warmup" in given else {}
        try:
            return replace(self, **{**rates, **warmup, **given, "players": {}})
        except ValueError as error:
            raise SettingError(("players",), f"players.{player}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class EmaSection:
    """A running average (EMA) of the trained weights, stored with the weights and used for evaluation and export."""

    decay: float | None = 0.999
    """Share of the average that is kept in each step. Null switches the average off."""

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise SettingError("decay", f"{self.decay} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """Evaluation on the held-out samples in data.eval_path."""

    every: int | None = None
    """Steps between two evaluations during training. Null: one evaluation at the end."""
    sizes: tuple[int | tuple[int, ...], ...] | None = None
    """Sizes to evaluate at, each one number for all axes or one per axis. By default the nominal size."""
    metrics: dict[str, Config] = slots("metric")
    """Metrics by label. By default the metrics of the modality."""
    batch_size: int | None = None
    """Samples in one batch. By default data.batch_size."""
    samples: int | None = None
    """Number of samples to measure. By default all samples."""
    sampling: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    """Sampling options of the objective for evaluations and pictures, e.g. {steps: 10}; vqcore show OBJECTIVE lists
    them."""
    decode_samples: int | None = None
    """Number of samples to decode for the metrics; losses are measured on all. By default all samples, or 256 if the
    decoder is a denoiser."""
    precision: Precision = "fp32"
    """bf16 and fp16: autocast while samples are encoded, decoded and their losses measured. Independent of
    run.precision."""
    perturb: float | None = None
    """Share of a sample's codes that are replaced by codes of other positions for a second decoding, whose metrics are
    perturbed/...: how well the decoder bears the errors of a generator, e.g. 0.1."""
    pictures: int = 8
    """Number of samples on the contact sheet and on the strip."""
    best: str | None = None
    """Null: the last checkpoint counts. A metric (metric/psnr) or one loss (loss/pixel/mse): the best checkpoint by it
    counts and is kept, measured at the first of `sizes`."""

    def __post_init__(self) -> None:
        at_least(self, pictures=1, every=1, batch_size=1, samples=1, decode_samples=1)
        if self.perturb is not None and not 0 < self.perturb <= 1:
            raise SettingError("perturb", f"{self.perturb} must lie in (0, 1]")
        if self.samples is not None and (self.decode_samples or 0) > self.samples:
            raise SettingError(
                ("decode_samples", "samples"),
                f"decode_samples={self.decode_samples} is above samples={self.samples}, the samples that are measured",
            )
        for size in self.sizes or ():
            sides = (size,) if isinstance(size, int) else size
            if not sides or min(sides) < 1:
                raise SettingError("sizes", f"{size}: every side must be at least 1")
        if self.sizes == ():
            raise SettingError("sizes", "[] is no size; null means the nominal size")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a training run."""

    requires: tuple[str, ...] = ()
    """Required packages, checked before any plugin is imported, e.g. ["vqcore-vit>=0.1"]."""
    data: DataConfig = slot("data")
    """Where samples come from."""
    model: ModelConfig
    """The tokenizer."""
    objective: ObjectiveConfig = slot("objective", default={"name": "reconstruction"})
    """How the tokenizer is trained."""
    run: RunSection
    """Folder, length, precision, logging and checkpoints."""
    optim: OptimSection
    """Optimizer and learning-rate schedule."""
    ema: EmaSection = field(default_factory=EmaSection)
    """Running average of the weights."""
    eval: EvalSection = field(default_factory=EvalSection)
    """Evaluation."""
    hooks: dict[str, Config] = slots("hook", optional=True)
    """Hooks by label: components that watch the run."""

    def __post_init__(self) -> None:
        if self.run.on_explosion != "skip" and self.optim.max_norm is None:
            text = (
                f"run.on_explosion={self.run.on_explosion} does nothing without a limit; set optim.max_norm"
            )
            raise SettingError(("run.on_explosion",), text)


@dataclass(frozen=True, kw_only=True)
class TextsConfig:
    """Where texts lie."""

    path: str
    """A file, a folder (searched at any depth), or a pattern, e.g. captions/*.txt.gz: .txt, .jsonl, .json, .parquet or
    .tar, also with .gz."""
    field: str | None = None
    """The member of JSON, or the column of Parquet, that is the text; null: the only one that is text."""
    key: str | None = None
    """The member or column that names the text; null: the name of the file, and a number."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text tokenizer and the texts that its vocabulary is made from: what `vqcore text train` reads."""

    data: TextsConfig
    text: Config = slot("text")
    """The text tokenizer."""
    out: str
    """New folder for the vocabulary and the config."""
