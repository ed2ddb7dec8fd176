"""The contracts between the parts: the records that travel, and what a component of each kind must and may have.

A component inherits from `torch.nn.Module` at most, never from these Protocols. Each kind has one Protocol of required
members (`REQUIRED`). Optional members stand in small Protocols of their own (`OPTIONAL`). vqcore reads an optional
member only through the function below its Protocol, and this function holds the default. To add an optional member,
write a Protocol, list it in `OPTIONAL` and write such a function. `vqcore.testing` checks the laws and warns about
misspelt names.

Axes: b batch, c channels, d latent width, q codebooks, *size an input's axes (1 to 3), *grid a token grid's axes.
One layout everywhere: inputs `b c *size` (class maps `b *size`), latents `b *grid d`, codes `b *grid q`, int64.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from PIL import Image
from torch import Tensor, nn

from vqcore.errors import ConfigError, DataError
from vqcore.schema import RunConfig, TokenizerConfig

Kind = Literal["continuous", "categorical", "angle", "unit-vector", "binary"]
Sizing = Literal["resize", "crop", "window", "pad"]


# Records


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a tokenizer's input is, as tensors.

    `size` is the nominal size, one number per axis; its length is the rank. `range` bounds the values of `x` (None:
    unbounded). A categorical input is a class map `(b, *size)` with values in `[0, labels)`; every other input is float
    `(b, channels, *size)`. `mask` says that batches carry a validity mask. `loss` is the loss that an objective uses
    when the config names none. `names` are those of the channels in the units of the files; () if they have none.
    `levels` is the number of steps over `range` that files hold, 255 for pictures of 8 bits; None for measured numbers.
    """

    channels: int
    size: tuple[int, ...]
    kind: Kind = "continuous"
    range: tuple[float, float] | None = (-1.0, 1.0)
    labels: int | None = None
    mask: bool = False
    loss: str = "mse"
    names: tuple[str, ...] = ()
    levels: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.size) <= 3:
            raise ValueError(f"an input has 1 to 3 axes, not {len(self.size)} (size {list(self.size)})")
        if (self.kind == "categorical") != (self.labels is not None):
            raise ValueError(
                f"labels={self.labels} with kind '{self.kind}': labels belong to categorical inputs"
            )

    @property
    def rank(self) -> int:
        """Number of axes besides batch and channels."""
        return len(self.size)

    @property
    def out_channels(self) -> int:
        """Channels of a decoder's output: one logit per label for class maps, else `channels`."""
        return self.labels or self.channels


def expand(size: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A size with one number per axis. Raises `ValueError` for a wrong number of axes."""
    sides = (size,) * rank if isinstance(size, int) else tuple(size)
    if len(sides) != rank:
        raise ValueError(f"size {list(sides)} has {len(sides)} axes, but samples have {rank}")
    return sides


@dataclass(frozen=True)
class Batch:
    """Samples of one size.

    `mask` is True where `x` is valid; `weight`, at least 0, says how much a position counts. `size` is the size of each
    sample before its crop, in the units of the modality's `extent`. `extras` holds the extra modalities by label, and
    `masks` the validity masks of those that have one, each at its own size. `codes` are those of the samples where they
    were made before (`KnowsCodes`): then no encoder is needed. `finished` says that `Tokenizer.prepare` has been at
    work: before, `x` and `extras` are raw (`Finishes`).
    """

    x: Tensor
    keys: tuple[str, ...]
    mask: Bool[Tensor, "b *size"] | None = None
    masks: Mapping[str, Bool[Tensor, "b *own"]] = field(default_factory=dict)
    weight: Float[Tensor, "b *size"] | None = None
    size: Int[Tensor, "b r"] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    codes: Int[Tensor, "b *grid q"] | None = None
    finished: bool = False

    @property
    def valid(self) -> Bool[Tensor, "b *size"] | None:
        """The positions that count at all: those that `mask` shows and whose `weight` is above 0; None if all count."""
        if self.weight is None:
            return self.mask
        return self.weight > 0 if self.mask is None else self.mask & (self.weight > 0)

    @property
    def conditions(self) -> dict[str, Any]:
        """What decoding gets besides codes: the extra modalities; where known, `original_size` and their `masks`."""
        known: dict[str, Any] = {} if self.size is None else {"original_size": self.size}
        return {**self.extras, **known, **({"masks": self.masks} if self.masks else {})}

    def to(self, device: torch.device) -> "Batch":
        """The same batch with all its tensors on another device."""
        return self._each(
            lambda value: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        )

    def part(self, here: slice) -> "Batch":
        """The samples of a slice."""
        return replace(self._each(lambda value: value[here]), keys=self.keys[here])

    def _each(self, change: Callable[[Any], Any]) -> "Batch":
        """The batch with every tensor, and every list of the extras, changed."""

        def inside(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: inside(one) for key, one in value.items()}
            return change(value) if isinstance(value, (Tensor, list, tuple)) else value

        named = ("x", "mask", "masks", "weight", "size", "extras", "codes")
        return replace(self, **{name: inside(getattr(self, name)) for name in named})


@dataclass(frozen=True)
class Quantized:
    """What a quantizer returns. `losses` are scalars that train the quantizer, `metrics` are scalars to log."""

    z_q: Float[Tensor, "b *grid d"]
    codes: Int[Tensor, "b *grid q"]
    losses: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    metrics: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """What an objective returns for one player: unweighted scalars by name, the reconstruction, codes and metrics.

    `factors` are what the objective itself decides for a term, such as an adaptive weight: in training the trainer
    multiplies the weight of the config by the factor, and logs the factor. Evaluation shows terms without any factor.
    """

    terms: Mapping[str, Float[Tensor, ""]]
    x_hat: Tensor | None = None
    codes: Int[Tensor, "b *grid q"] | None = None
    metrics: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    factors: Mapping[str, float | Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """How large a part of a tokenizer is: parameters, trained parameters, values in buffers, and borrowed values.

    What a part borrows (`Borrows`) counts as borrowed only.
    """

    parameters: int
    trained: int
    buffers: int
    borrowed: int = 0


@dataclass(frozen=True)
class Facts:
    """What a tokenizer is, in numbers, for inputs of one size. `parts` is by the names of the tokenizer's children."""

    spec: DataSpec
    size: tuple[int, ...]
    grid: tuple[int, ...]
    codebook_size: int
    num_codebooks: int
    parts: Mapping[str, Part]

    @property
    def tokens(self) -> int:
        """Positions of the grid."""
        return math.prod(self.grid)

    @property
    def bits_per_token(self) -> float:
        """Bits that name the codes at one position of the grid."""
        return self.num_codebooks * math.log2(self.codebook_size)

    @property
    def bits_per_position(self) -> float:
        """Bits of all tokens over the number of input positions (pixels, frames, voxels)."""
        return self.bits_per_token * self.tokens / math.prod(self.size)


@dataclass(frozen=True)
class Foreign:
    """What a format read: the tokenizer's config, and its weights by the names that `Tokenizer.state_dict` has.

    `origin` says where it comes from, as plain JSON data: `source`, `sha256`, `licence` and whatever else is known. The
    provenance and the model card of the tokenizer keep it. vqcore adds `source` and `sha256` if they are not there.
    """

    config: TokenizerConfig
    tensors: Mapping[str, Tensor]
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ForeignConfig:
    """A training config that a format read: nested plain data with the keys of a config file of ours.

    `notes` are comments by dotted key (`optim.base_lr`) for the file; `remarks` say what is lost or changed, one line
    each, for the head of the file and for the screen.
    """

    tree: Mapping[str, Any]
    notes: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """Weights of another system that a format reads: a name for people, `user/name` on the Hugging Face hub, and more.

    `note` says in one line what it is, `licence` under which licence it is published.
    """

    name: str
    id: str
    note: str = ""
    licence: str = ""


@dataclass(frozen=True)
class View:
    """Which part of a sample becomes the tensor. The main modality draws it; the extra modalities use the same one.

    `start` and `stop` are fractions of the sample's extent, one per axis; `flip` mirrors the last axis; `size` is the
    size of the result. `draw` is a random number from which a modality derives its other random choices for a training
    sample, such as colours or which instance to show; 0, as in evaluation, means no random choice. `extent` is the
    extent of the sample for which the view was drawn, if the modality gives it: whoever counts in pixels needs it.
    For a window of a file, fractions and extent are those of the whole file.
    """

    start: tuple[float, ...]
    stop: tuple[float, ...]
    size: tuple[int, ...]
    flip: bool = False
    draw: int = 0
    extent: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Window:
    """A sample that is a part of a file: what `Data.get` may return instead of a source.

    `start` and `stop` (exclusive) have one entry per axis, in the units of the modality's `extent`. The view of the
    sample is drawn inside the window. The file is read once for windows that follow each other.
    """

    source: Any
    start: tuple[int, ...]
    stop: tuple[int, ...]


@dataclass(frozen=True)
class Coded:
    """A row of a store: a key that no other row has, codes, and what else is known of it, as JSON values by name.

    A row that is one of several from one file has the extra `record`, the key of the file; `row`, if the file holds
    several samples; `start`, where its window begins, and `extent`, that of the whole as decoded, if it is a window;
    `crop`, its number (0 is the centre), and `view`, if it is one of several crops: a mapping with `start`, `stop`,
    `flip` and `extent` as in `View`. A row with invalid positions has `valid`: the bits of the grid in hexadecimal
    digits, row by row, 1 where valid (`vqcore.artefacts.codes.unpacked`). Rows of one file stand next to each other.
    """

    key: str
    codes: Integer[np.ndarray, "*grid q"]
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordCodes:
    """The codes of a whole record: one row for each window. `start` is where a window begins, in positions.

    `extent` is the size of the whole, as decoded; `size` is the size of a window. The last windows may reach beyond the
    whole: there they were filled up.
    """

    codes: Integer[np.ndarray, "w *grid q"]
    start: Int[np.ndarray, "w r"]
    extent: tuple[int, ...]
    size: tuple[int, ...]


# Every part of a tokenizer


@runtime_checkable
class Borrows(Protocol):
    """A module that uses weights of somebody else: a frozen base, a teacher, the network of a perceptual loss.

    `borrowed` names its submodules with such weights. `borrow` fills them and returns the SHA-256 of each one.
    vqcore calls `borrow` once after building: in training, resuming, evaluation and loading, but never for a part that
    is left out. Afterwards vqcore keeps the submodules frozen and in eval mode, and never saves, averages or trains
    them. `places` maps some of the names to the files that the user gave; for the others the module takes its own
    setting (listed in `Config.places`) or the cache of its library. `vqcore.borrowed.read` reads a file and gives its
    SHA-256, so that no library has to load a file. Raises `CheckpointError` if weights are missing or do not fit.
    Any module may be one: a part of the tokenizer, a player, a perceptual loss, a teacher, a modality.
    """

    borrowed: tuple[str, ...]

    def borrow(self, places: Mapping[str, str]) -> Mapping[str, str]: ...


def borrowed(module: Any) -> tuple[str, ...]:
    """Names of the submodules with borrowed weights. Default: none."""
    return tuple(module.borrowed) if isinstance(module, Borrows) else ()


@runtime_checkable
class Fetches(Protocol):
    """A part that can begin with published weights: `fetch` loads them.

    Building a part asks no hub. vqcore calls `fetch` once, when no checkpoint fills the part. Raises `CheckpointError`.
    """

    def fetch(self) -> None: ...


def fetch(part: Any) -> None:
    """Let a part load its published weights. Default: the part keeps its random weights."""
    if isinstance(part, Fetches):
        part.fetch()


@runtime_checkable
class SparesDecay(Protocol):
    """A module that names parameters which weight decay must not touch, such as a codebook."""

    without_decay: tuple[str, ...]


def without_decay(module: Any) -> tuple[str, ...]:
    """Names of the module's own parameters without weight decay. Default: none beyond what the optimizer spares."""
    return tuple(getattr(module, "without_decay", ()))


@runtime_checkable
class Interpolates(Protocol):
    """An encoder or decoder with tensors `(1, d, *grid)` that are interpolated when a checkpoint has another grid."""

    interpolated: tuple[str, ...]


def interpolated(part: Any) -> tuple[str, ...]:
    """Names of the tensors that may be interpolated. Default: none."""
    return tuple(getattr(part, "interpolated", ()))


# Encoders


@runtime_checkable
class Encoder(Protocol):
    """From a sample to a grid of latents. Built as `Class(cfg, *, spec: DataSpec)`; always sees float `(b, c, *size)`.

    Laws: a sample's latents do not depend on its batch; calls are deterministic in eval mode; `grid(size)` is the grid
    of the output, and raises `ValueError` with both numbers for a size that the encoder cannot take.
    """

    dim: int

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]: ...

    def __call__(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *grid d"]: ...


# Quantizers


@runtime_checkable
class Quantizer(Protocol):
    """From latents to codes and back. Built as `Class(cfg)`; knows nothing about images.

    `dim` is the latent width it needs, `codebook_size` the number of values of one code, `num_codebooks` the length of
    the last axis of `codes`. `mask` is True at valid positions; invalid positions change no loss and no statistic.
    Laws: in eval mode `decode(codes)` equals `z_q` and no state changes; codes lie in `[0, codebook_size)`; losses and
    metrics have the same names at every call, in training and evaluation; gradients reach `z`; any grid of 1 to 3 axes;
    `decode` raises `ValueError` that names the code and the bound when a code is out of range.
    """

    dim: int
    codebook_size: int
    num_codebooks: int

    def __call__(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized: ...

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]: ...


@runtime_checkable
class ChangesGrid(Protocol):
    """A quantizer whose codes have another grid than its latents, for example one with several scales."""

    def grid_out(self, grid: tuple[int, ...]) -> tuple[int, ...]: ...


def grid_out(quantizer: Any, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of the codes for a grid of latents. Default: the same grid."""
    return quantizer.grid_out(grid) if isinstance(quantizer, ChangesGrid) else grid


@runtime_checkable
class NamesTokenState(Protocol):
    """A quantizer with state that decides no code: `token_state` returns the tensors that decide codes and `decode`."""

    def token_state(self) -> Mapping[str, Tensor]: ...


def token_state(quantizer: Any) -> Mapping[str, Tensor]:
    """The tensors that decide codes and their decoding, by name. Default: the whole state dict."""
    return quantizer.token_state() if isinstance(quantizer, NamesTokenState) else quantizer.state_dict()


@runtime_checkable
class NeedsFp32(Protocol):
    """A quantizer that may want its latents in fp32 whatever precision a loaded tokenizer has: `codes_in_fp32`.

    In eval mode embedding, encoder, projection and quantizer then run without autocast; the decoder does not. For codes
    that must equal those of another system. Law: under autocast, latents in fp32 have the same codes as without.
    """

    codes_in_fp32: bool


def codes_in_fp32(quantizer: Any) -> bool:
    """Whether codes are computed in fp32 in every precision. Default: no."""
    return isinstance(quantizer, NeedsFp32) and quantizer.codes_in_fp32 is True


@runtime_checkable
class Fits(Protocol):
    """A quantizer that `vqcore fit` fits to latents; it is not trained.

    `fit` gets batches `(z, mask)`, as a call does, of any sizes. They may be gone through several times, and are too
    many to keep. `rng`, on the CPU, is the only source of randomness. Equal latents and settings
    give an equal state, and invalid positions change nothing. It returns facts for people by name, and raises
    `DataError` for latents that it cannot be fitted to. `fitted`, a buffer, is one bool; until it is True, calls and
    `decode` raise `ConfigError`.
    """

    fitted: Tensor

    def fit(
        self,
        latents: Iterable[tuple[Tensor, Tensor | None]],
        rng: torch.Generator,
    ) -> Mapping[str, str]: ...


def fitter(quantizer: Any) -> Fits | None:
    """The quantizer, if it is fitted. Default: None, it is trained or fixed."""
    return quantizer if isinstance(quantizer, Fits) else None


# Decoders


@runtime_checkable
class Decoder(Protocol):
    """From quantized latents to a sample. Built as `Class(cfg, *, dim, spec)`; owns the projection from `dim`.

    `last_layer` is the parameter nearest to the output (adaptive loss weights read its gradient). Make it a property:
    an attribute that is a parameter would be a second name for the same tensor in the state dict.
    """

    @property
    def last_layer(self) -> Tensor: ...

    def __call__(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]: ...


@runtime_checkable
class NeedsSize(Protocol):
    """A decoder whose grid does not decide the size of its output: it is called with `size=`, the wanted size."""

    needs_size: Literal[True]

    def __call__(
        self, z_q: Float[Tensor, "b *grid d"], *, size: tuple[int, ...]
    ) -> Float[Tensor, "b c *size"]: ...


def needs_size(decoder: Any) -> TypeGuard[NeedsSize]:
    """Does the decoder want `size=`? Default: no, the grid decides the size of its output."""
    return bool(getattr(decoder, "needs_size", False))


@runtime_checkable
class Denoiser(Protocol):
    """A decoder that predicts from a noised target; `is_denoiser` is True. Built as `Class(cfg, *, dim, spec)`.

    `condition` runs once per sample; `extras` are `Batch.conditions`; `mask` is True where a token is hidden, and a
    fully hidden grid means unconditional. `to_target` maps a sample into the space that is noised; `from_target` maps
    back to a sample of the wanted `size` (identity for pixels). `target_shape(size)` is the shape of one noised sample,
    without the batch axis. `rng` has one generator per sample (`vqcore.rng.randn`). `t` lies in `[0, num_steps]` of the
    objective's scheduler, always as float, one number per sample.
    """

    is_denoiser: Literal[True]

    @property
    def last_layer(self) -> Tensor: ...

    def condition(
        self,
        z_q: Float[Tensor, "b *grid d"],
        *,
        size: tuple[int, ...],
        mask: Bool[Tensor, "b *grid"] | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> Any: ...

    def __call__(self, x_t: Tensor, t: Float[Tensor, " b"], cond: Any) -> Tensor: ...

    def to_target(self, x: Tensor, rng: Sequence[torch.Generator]) -> Tensor: ...

    def from_target(self, y: Tensor, size: tuple[int, ...]) -> Tensor: ...

    def target_shape(self, size: tuple[int, ...]) -> tuple[int, ...]: ...


@runtime_checkable
class ChecksScheduler(Protocol):
    """A denoiser with a base that was trained elsewhere: `check_scheduler` raises `ValueError` for other noise levels.

    The objective asks in `setup`, when the base is there.
    """

    def check_scheduler(self, scheduler: "Scheduler") -> None: ...


def check_scheduler(decoder: Any, scheduler: "Scheduler") -> None:
    """Let the denoiser refuse a scheduler. Default: any scheduler will do."""
    if isinstance(decoder, ChecksScheduler):
        decoder.check_scheduler(scheduler)


def is_denoiser(decoder: Any) -> bool:
    """Is the decoder (or its class) a denoiser? Default: no, a plain decoder."""
    return bool(getattr(decoder, "is_denoiser", False))


# What trains a tokenizer


@runtime_checkable
class Sampler(Protocol):
    """One run down the noise levels. A sampler may remember earlier predictions."""

    timesteps: Sequence[float]

    def step(self, prediction: Tensor, t: float, x_t: Tensor, rng: Sequence[torch.Generator]) -> Tensor: ...


@runtime_checkable
class Scheduler(Protocol):
    """Noise levels. Built as `Class(cfg)`; `add_noise` and `target` are pure.

    `t` has one noise level per sample, in `[0, num_steps]`; 0 is the least noise. Both methods take integers and
    floats; a float without a fraction means the same as the integer. Both are affine: `add_noise` is `a x + b eps`,
    `target` (what a network predicts: eps, x, v, a velocity) is `c x + d eps`, with numbers that depend on `t` alone.
    So `vqcore.diffusion.x_0` finds x from any prediction. `sampler(steps)` begins one walk from noise to a sample.
    """

    num_steps: int

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def target(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def sampler(self, steps: int) -> Sampler: ...


@runtime_checkable
class HasTime(Protocol):
    """A scheduler that says which noise level a number in [0, 1] stands for, such as one with continuous time.

    `time(u)` is monotone and lies in `[0, num_steps]`, as float or integer. Laws of times (uniform, logit-normal) then
    need no knowledge of the scheduler: they draw `u`.
    """

    def time(self, u: Float[Tensor, " b"]) -> Tensor: ...


def time(scheduler: Any, u: Float[Tensor, " b"]) -> Tensor:
    """The noise levels for numbers in [0, 1]. Default: the scheduler's `num_steps` integers get equal shares, int64."""
    if isinstance(scheduler, HasTime):
        return scheduler.time(u)
    return (u * scheduler.num_steps).floor().clamp(max=scheduler.num_steps - 1).long()


@runtime_checkable
class PerceptualLoss(Protocol):
    """Distance of two samples in a feature space. Built as `Class(cfg, *, spec)`; none of its parameters is trained."""

    def __call__(self, x_hat: Tensor, x: Tensor) -> Float[Tensor, " b"]: ...


@runtime_checkable
class Discriminator(Protocol):
    """Tells data from reconstructions. Built as `Class(cfg, *, spec)`; logits of any shape after the batch axis."""

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Adversary(Protocol):
    """The rival of the tokenizer in a GAN. A module, built as `Class(cfg, *, spec)`.

    An objective holds it as `adversary`, which is also the name of the player. The player joins at step `start`; before
    `start` the objective leaves the terms of `generator` out in training. `generator` gives what the model must lower,
    `discriminator` what the adversary must lower; the terms are called `gan/...`. `x_hat` is the reconstruction and `x`
    the data, both `(b, c, *size)`; `mask` is True where valid; `rng` has one generator per sample. `against` is the
    weighted sum of the other terms and `last_layer` the last parameter of the decoder: an adaptive weight compares
    gradients there (`vqcore.balance`). Both are None where no gradient flows.
    """

    start: int

    def generator(
        self,
        x_hat: Tensor,
        x: Tensor,
        *,
        mask: Tensor | None,
        step: int,
        rng: Sequence[torch.Generator],
        against: Tensor | None = None,
        last_layer: Tensor | None = None,
    ) -> Losses: ...

    def discriminator(
        self,
        x_hat: Tensor,
        x: Tensor,
        *,
        mask: Tensor | None,
        step: int,
        rng: Sequence[torch.Generator],
    ) -> Losses: ...


@runtime_checkable
class Teacher(Protocol):
    """A frozen feature network. Built as `Class(cfg, *, spec)`."""

    dim: int

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class TokenizerLike(Protocol):
    """What an objective may use of the tokenizer (`vqcore.tokenizer.Tokenizer`): its parts and the steps of a pass.

    `decoder` is a `Decoder`, or a `Denoiser` for an objective with `needs_denoiser`. `embed` is None unless inputs are
    class maps. `latents(batch.x)` runs `embed`, `encoder` and `proj`; `quantize(z, batch.mask)` runs the quantizer;
    `lookup(codes)` is `quantizer.decode` on the tokenizer's device. Gradients flow through all of these.
    """

    spec: DataSpec
    training: bool
    embed: nn.Embedding | None
    encoder: Encoder
    proj: nn.Linear
    quantizer: Quantizer
    decoder: Any

    @property
    def device(self) -> torch.device: ...

    def grid(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]: ...

    def latents(self, x: Tensor) -> Float[Tensor, "b *grid d"]: ...

    def quantize(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *size"] | None = None
    ) -> Quantized: ...

    def lookup(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]: ...


@runtime_checkable
class Objective(Protocol):
    """The one place that knows how a decoder is trained and sampled. Built as `Class(cfg, *, spec)`; may be a module.

    `setup` builds what only training needs, on the tokenizer's device. `players(step)` names the players that are
    optimised at a step: `"model"` is the tokenizer; any other name is the attribute of the objective that holds the
    player's module. What an objective that is a module holds (heads, running means) is saved and restored with the
    training state, and is no part of the tokenizer. Its parameters that belong to no player are trained with `model`.
    All of it is there after `setup`, with its shapes: a checkpoint with other names or shapes is refused.

    `losses` returns the terms of one player, unweighted, under the same names at every step, and no name of another
    player; in training a term may be left out while its weight is 0. `shared` is one mapping for all players of a
    micro-batch: a player finds there what another has computed, detached, such as `x_hat`; it is empty for the first
    player and where one player is asked alone, so everything in it can be computed again. `rng`, one generator per
    sample, starts alike for all players. It is the only source of randomness besides dropout layers, so that a sample's
    result does not depend on its batch; `vqcore.rng.forked` gives a player other numbers of its own.

    `decode` samples the decoder; its keyword-only parameters beyond these are the sampling options, written `steps:
    Annotated[int, "Steps of the sampler."] = 25` (`vqcore.sampling`); it refuses values out of range with a
    `SettingError` before it computes anything. `extras` are the conditions of the batch. Under DDP every trained
    parameter of a player must take part in the player's losses, and after each turn all ranks get the buffers that
    the objective, its players, the encoder and the decoder have on rank 0.
    """

    def setup(self, tokenizer: TokenizerLike) -> None: ...

    def players(self, step: int) -> tuple[str, ...]: ...

    def losses(
        self,
        tokenizer: TokenizerLike,
        batch: Batch,
        *,
        player: str,
        step: int,
        rng: Sequence[torch.Generator],
        shared: MutableMapping[str, Any],
    ) -> Losses: ...

    def decode(
        self,
        tokenizer: TokenizerLike,
        codes: Int[Tensor, "b *grid q"],
        *,
        size: tuple[int, ...],
        rng: Sequence[torch.Generator],
        extras: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Tensor: ...


@runtime_checkable
class NeedsDenoiser(Protocol):
    """An objective that works with denoisers only."""

    needs_denoiser: Literal[True]


def needs_denoiser(objective: Any) -> bool:
    """Does the objective need a denoiser? Default: no, it works with plain decoders only."""
    return bool(getattr(objective, "needs_denoiser", False))


@runtime_checkable
class SetsModes(Protocol):
    """An objective that sets training or eval mode of its own modules, for example of a discriminator with BatchNorm.

    By default only the modules of the player at work are in training mode. The trainer calls `set_modes` after it has
    set this default, before the turn of each player.
    """

    def set_modes(self, player: str) -> None: ...


def set_modes(objective: Any, player: str) -> None:
    """Let the objective set the modes of its modules for a player's turn. Default: the trainer's choice stays."""
    if isinstance(objective, SetsModes):
        objective.set_modes(player)


# Data


@runtime_checkable
class Modality(Protocol):
    """How one sample is read, cropped, resized, flipped, normalised and shown. Built as `Class(cfg, *, size)`.

    `size` is the nominal size from the config, or None: then the modality must know its size. `suffixes` are the file
    name extensions it reads (lower case, with the dot), `metrics` the names of the metrics that suit it. `read` takes a
    path or an object in memory and raises `DataError` or `OSError` for a damaged one. With `at_least`, a size, `read`
    may return less detail, enough for training views of that size or smaller; `extent` stays that of the whole sample.
    `view` draws a crop; with `rng=None` it returns the view for evaluation. `show` undoes `read` and `tensor` for one
    sample: a PIL image, or an array. `spec`, the nominal size and `View.size` describe the finished sample
    (`Finishes`). What `read` returned may be used for several samples and modalities, so nothing may change it.
    """

    spec: DataSpec
    suffixes: tuple[str, ...]
    metrics: tuple[str, ...]

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> Any: ...

    def extent(self, raw: Any) -> tuple[int, ...]: ...

    def view(
        self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None
    ) -> View: ...

    def tensor(self, raw: Any, view: View) -> Any: ...

    def show(self, x: Tensor) -> Any: ...


@runtime_checkable
class HasMask(Protocol):
    """A modality whose samples have invalid positions; required when `spec.mask` is True. True means valid."""

    def mask(self, raw: Any, view: View) -> Bool[Tensor, "*size"]: ...


def mask(modality: Any, raw: Any, view: View) -> Tensor | None:
    """The validity mask of a view. Default: None where `spec.mask` is False."""
    return modality.mask(raw, view) if modality.spec.mask else None


@runtime_checkable
class HasWeight(Protocol):
    """A modality that says how much each position counts, for example the inverse of its variance; 0: not at all.

    `weight` returns the same size as the view, or None for a sample whose positions all count 1.
    """

    def weight(self, raw: Any, view: View) -> Float[Tensor, "*size"] | None: ...


def weight(modality: Any, raw: Any, view: View) -> Tensor | None:
    """How much each position of a view counts. Default: None, each counts the same."""
    given = getattr(modality, "weight", None)  # asked for every sample, where isinstance would cost
    return None if given is None else given(raw, view)


@runtime_checkable
class Rides(Protocol):
    """A modality that takes part in its own way beside another one: `ride` turns the main view into its own.

    `view` was drawn by the main modality and has the main sample's size; `main` is the spec of the main modality. The
    answer usually has another size, for example that of a feature map beside a picture. Raises `ValueError` for a size
    or a main modality that does not fit; vqcore adds the config's key.
    """

    def ride(self, view: View, main: DataSpec) -> View: ...


def ride(modality: Any, view: View, main: DataSpec) -> View:
    """The view of an extra modality beside a main one. Default: the main view, so both have one size."""
    return modality.ride(view, main) if isinstance(modality, Rides) else view


@runtime_checkable
class SharesReading(Protocol):
    """A modality that says what its `read` depends on: `reading` is equal where `read` gives equal results.

    A file that several labels read alike is then read once. `(type(self).read, self.cfg.background)` is a good value: a
    child class with its own `read` differs.
    """

    reading: Hashable


def reading(modality: Any) -> Hashable:
    """What the result of `read` depends on besides its arguments. Default: the object, so nothing is shared."""
    return getattr(modality, "reading", id(modality))


@runtime_checkable
class ReadsStreams(Protocol):
    """A modality whose `read` also takes files with these suffixes as open binary streams with a `name`.

    Sources with many samples in one file then give such streams. Other modalities get a path: the bytes are written
    aside for them first.
    """

    streams: tuple[str, ...]


def streams(modality: Any) -> tuple[str, ...]:
    """The suffixes of the files that a modality reads from memory. Default: none, it wants a path."""
    return getattr(modality, "streams", ())


@runtime_checkable
class Finishes(Protocol):
    """A modality whose last step wants a batch and a device, for example a frozen network: `finish` takes raw tensors.

    `x` is a batch of what `tensor` returned, on the tokenizer's device; the answer is what the tokenizer sees. Modules
    that the modality holds as attributes are moved there and put into eval mode; there are no gradients, and no
    autocast. A modality whose raw tensor is larger than its sample makes it larger itself, in `tensor`. Laws: the
    result for a sample does not depend on its batch, up to rounding; two calls give the same; `x` does not change.
    """

    def finish(self, x: Tensor) -> Tensor: ...


def finishes(modality: Any) -> bool:
    """Are tensors of samples raw until a batch is on the device? Default: no, the tokenizer sees them as they are."""
    return isinstance(modality, Finishes)


def finish(modality: Any, x: Tensor) -> Tensor:
    """A batch as the tokenizer sees it, from raw tensors on its device. Default: the tensors themselves."""
    if not isinstance(modality, Finishes):
        return x
    parts = [modality] if isinstance(modality, nn.Module) else list(vars(modality).values())
    for part in parts:
        if isinstance(part, nn.Module):
            held = next(iter((*part.parameters(), *part.buffers())), None)  # moved once, all together
            if held is not None and held.device != x.device:
                part.to(x.device)
            if part.training:
                part.eval()
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return modality.finish(x)


@runtime_checkable
class HasPicture(Protocol):
    """A modality with a picture of a sample for people, where `show` returns an array."""

    def picture(self, x: Tensor) -> Image.Image: ...


def picture(modality: Any, x: Tensor) -> Any:
    """One sample for people: a PIL image or an array. Default: `show(x)`."""
    return modality.picture(x) if isinstance(modality, HasPicture) else modality.show(x)


@runtime_checkable
class ShowsChannels(Protocol):
    """A modality whose arrays are shown by some of their channels: one, or three that become red, green and blue.

    `shown_channels` are numbers of channels of the tensor; (): the first ones.
    """

    shown_channels: tuple[int, ...]


def shown_channels(modality: Any) -> tuple[int, ...]:
    """The channels of which pictures of arrays are made. Default: (), the first ones."""
    return tuple(getattr(modality, "shown_channels", ()))


@runtime_checkable
class HasValues(Protocol):
    """A modality that gives a batch in the units of its files (metres; logits stay logits): float `(b, c, *size)`.

    Required where a metric has `in_units`.
    """

    def values(self, x: Tensor) -> Tensor: ...


def values(modality: Any, x: Tensor) -> Tensor:
    """A batch in the units of the files. There is no default: a metric with `in_units` needs a modality with units."""
    return modality.values(x)


@runtime_checkable
class Writes(Protocol):
    """A modality that writes its own files: what `show` returned, to a path that ends in `written`.

    `written` is one of the `suffixes`.
    """

    written: str

    def write(self, shown: Any, path: Path) -> None: ...


def writer(modality: Any) -> Writes | None:
    """The modality, if it writes its own files. Default: None, and vqcore writes PNG for pictures, else `.npy`."""
    return modality if isinstance(modality, Writes) else None


@runtime_checkable
class Mask(Modality, Protocol):
    """A modality of masks: `is_mask` is True. As an extra modality it says which positions of the main one are valid.

    A value above a half means valid. The result goes into `Batch.mask`, not into the extras. `mask_value`, if not None,
    replaces the values of the main modality at invalid positions.
    """

    is_mask: Literal[True]
    mask_value: float | None


def is_mask(modality: Any) -> TypeGuard[Mask]:
    """Is an extra modality a validity mask? Default: no, its samples go into `Batch.extras`."""
    return bool(getattr(modality, "is_mask", False))


@runtime_checkable
class HasHoles(Protocol):
    """A main modality whose last channel says what is valid (1, else -1); its batches carry no mask.

    `hole_value`, if not None, is the value of the other channels at invalid positions.
    """

    hole_value: float | None


def hole_value(modality: Any) -> float | None:
    """The value at invalid positions of a modality with a validity channel. Default: None, there is no such channel."""
    return getattr(modality, "hole_value", None)


@runtime_checkable
class HasOwnBox(Protocol):
    """A main modality that cuts its samples in its own way: the tensor is not simply the part that the view names."""

    has_own_box: Literal[True]


def has_own_box(modality: Any) -> bool:
    """Does the modality cut its samples in its own way? Default: no, the tensor is the part that the view names."""
    return bool(getattr(modality, "has_own_box", False))


@runtime_checkable
class HasSizing(Protocol):
    """A modality that says, for each axis, how a sample of any extent gets the wanted size.

    `resize`: the whole axis, resized. `crop`: the largest centred part in the proportions of the size, resized.
    `window`: a part of the wanted length, as it is; training draws it, evaluation and `vqcore tokenize` go over all of
    the sample. `pad`: the whole axis, as it is. Along `window` and `pad`, `view` and `tensor` are never asked for more
    than there is: vqcore fills up the end. Then batches have a mask, also where `spec.mask` is False.
    """

    sizing: tuple[Sizing, ...]


def sizing(modality: Any) -> tuple[Sizing, ...]:
    """How a sample gets its size, for each axis. Default: the modality crops, in its own way."""
    return getattr(modality, "sizing", ("crop",) * modality.spec.rank)


def fills_up(modality: Any) -> bool:
    """Whether samples may be shorter than the wanted size, so that vqcore fills them up and batches have a mask."""
    return any(each in ("window", "pad") for each in sizing(modality))


@runtime_checkable
class HasFill(Protocol):
    """A modality that says with which value a tensor is filled up, for example silence."""

    fill: float


def fill(modality: Any) -> float | None:
    """The value of what is filled up. Default: None, the last values are repeated."""
    return modality.fill if isinstance(modality, HasFill) else None


@runtime_checkable
class KnowsExtent(Protocol):
    """A modality that knows the extent of a source without reading all of it. Raises what `read` raises."""

    def extent_of(self, source: Any) -> tuple[int, ...]: ...


def extent_of(modality: Any, source: Any) -> tuple[int, ...]:
    """The extent of a source. Default: the source is read."""
    if isinstance(modality, KnowsExtent):
        return modality.extent_of(source)
    return modality.extent(modality.read(source))


@runtime_checkable
class Data(Protocol):
    """A finite set of samples. Built as `Class(cfg, *, split, modality, extra)`, split `train` or `eval`.

    `key(i)` names sample i for people and files: a relative path without suffix. `get(i, label)` is what the modality's
    `read` takes; label is "" for the main modality or a key of `data.extra`. For the main modality, `get` may return a
    `Window` of such a source: several samples of one file. Raises `DataError` for an empty set.
    """

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def get(self, index: int, label: str = "") -> Any: ...


@runtime_checkable
class LeavesOut(Protocol):
    """A data source that leaves something out on purpose: how many entries, by kind (`.txt`, `hidden`)."""

    @property
    def left_out(self) -> Mapping[str, int]: ...


def left_out(data: Any) -> Mapping[str, int]:
    """What a data source leaves out. Default: nothing."""
    return getattr(data, "left_out", {})


@runtime_checkable
class KnowsCodes(Protocol):
    """A data source whose samples were tokenized before: `coded` is the row of a store that became of a sample.

    Such a sample is what the tokenizer saw, in training and in evaluation: the crop or the window that the row's extras
    name, else the view for evaluation. `get` gives the whole of it. Training batches have its codes, int64, so that
    objectives need no encoder (`vqcore.objectives.tokens_of`). `made` is the manifest of the store: `fingerprint`, that
    of the tokenizer, `size`, and of windows `stride`. Both are None where no codes are known. `coded` raises
    `DataError` for codes that cannot be used.
    """

    @property
    def made(self) -> Mapping[str, Any] | None: ...

    def coded(self, index: int) -> Coded | None: ...


def knows_codes(data: Any) -> KnowsCodes | None:
    """The data source, if it has codes of its samples. Default: None, the tokenizer encodes them."""
    return data if isinstance(data, KnowsCodes) and data.made is not None else None


@runtime_checkable
class KnowsBytes(Protocol):
    """A data source that knows how many bytes a sample has without fetching it.

    None for one that is missing, or whose bytes are not known before it is fetched.
    """

    def bytes_of(self, index: int, label: str = "") -> int | None: ...


def known_bytes(data: Any, index: int) -> int | None:
    """How many bytes a sample has, if it is there and its source knows without fetching it."""
    knows = getattr(data, "bytes_of", None)
    try:
        return knows(index) if knows else None
    except (OSError, DataError):
        return None


def bytes_of(data: Any, index: int, label: str = "") -> int | None:
    """How many bytes a sample has. Default: those of the file or array that `get` gives; None for anything else.

    Raises `DataError` or `OSError` as `get` does.
    """
    if knows := getattr(data, "bytes_of", None):  # quicker than isinstance, and asked for every sample
        return knows(index, label)
    given = data.get(index, label)
    source = given.source if isinstance(given, Window) else given
    if isinstance(source, (str, Path)):
        return Path(source).stat().st_size
    return source.nbytes if isinstance(source, np.ndarray) else None


@dataclass(frozen=True)
class Blocks:
    """Runs of samples that are cheap to read together: how many samples each has, in the order of the samples.

    `together` is the number of samples, of any blocks, that the source holds at a time in each process.
    """

    sizes: Sequence[int] | np.ndarray
    together: int


@runtime_checkable
class HasBlocks(Protocol):
    """A data source whose neighbours are cheap together, such as the rows of a group that is unpacked as a whole.

    Training then shuffles blocks, and samples within windows of `Blocks.together` samples (`vqcore.data.order`).
    """

    blocks: Blocks | None


def blocks(data: Any) -> Blocks | None:
    """The blocks of a data source. Default: None, every sample costs the same in any order."""
    return data.blocks if isinstance(data, HasBlocks) else None


@runtime_checkable
class FetchesAhead(Protocol):
    """A data source that can fetch samples before they are needed, such as one that reads over a network.

    `expect` says which samples will be asked for, in this order, and replaces what it has said before. `alone`: few of
    many, so that it does not help to fetch their neighbours with them. It returns at once, may do as much of it as
    memory allows, and raises nothing: whoever asks for a sample hears what is wrong.
    """

    def expect(self, indices: Iterable[int], *, alone: bool = False) -> None: ...


def expect(data: Any, indices: Iterable[int], *, alone: bool = False) -> None:
    """Tell a data source which samples will be asked for. Default: it fetches a sample when it is asked for."""
    if isinstance(data, FetchesAhead):
        data.expect(indices, alone=alone)


@runtime_checkable
class HasShards(Protocol):
    """A data source whose samples lie in shards: the name of each, and how many samples it has, in their order.

    Names differ and fit in a file name. `vqcore tokenize` makes a shard of codes of each, with its name.
    """

    shards: Sequence[tuple[str, int]]


def shards(data: Any) -> Sequence[tuple[str, int]] | None:
    """The shards in which the samples of a data source lie. Default: None, they lie in none."""
    return data.shards if isinstance(data, HasShards) else None


@runtime_checkable
class SampleReader(Protocol):
    """Reads files of one or more suffixes as arrays. Built as `Class(cfg)`.

    `suffixes` are lower case, with the dot. `read` returns one sample as numbers, never objects; a masked array says
    where nothing was measured. It raises `DataError` for a file that is missing or damaged. A file may come from
    anywhere: compare what it declares with bounds before memory is taken, and follow no way out of it.
    """

    suffixes: tuple[str, ...]

    def read(self, path: Path) -> np.ndarray: ...


@runtime_checkable
class NamesParts(Protocol):
    """A reader of files that hold several things, of which its setting `part` names one, or a list of them (`many`).

    `parts` are the names of those that hold numbers. It raises `DataError` as `read` does.
    """

    part: str
    many: bool

    def parts(self, path: Path) -> tuple[str, ...]: ...


def named_parts(reader: Any) -> NamesParts | None:
    """The reader as one that names parts. Default: None, a file is one array."""
    return reader if isinstance(reader, NamesParts) else None


# Metrics


@runtime_checkable
class Metric(Protocol):
    """A metric of a whole set, exact on any number of processes. Built as `Class(cfg, *, spec)`.

    `measure` returns sums over the samples of a batch (float64 tensors by name); the caller adds them up over batches
    and processes; `summary` turns the totals into values by name ("" for the value with the metric's own name). `keys`
    are the keys of the samples. `weight` is float `(b, *size)`, one number for each position: 0 counts as masked, 1 as
    no weight. A metric that cannot use weights raises `ConfigError` when it gets one.
    """

    def measure(
        self,
        x_hat: Tensor,
        x: Tensor,
        mask: Bool[Tensor, "b *size"] | None = None,
        *,
        keys: Sequence[str] = (),
        weight: Float[Tensor, "b *size"] | None = None,
    ) -> Mapping[str, Tensor]: ...

    def summary(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]: ...


@runtime_checkable
class SetsUp(Protocol):
    """A metric with something to build before its first use, such as a network: `setup` does so, on a device.

    vqcore calls `setup` once, and keeps the metric over sizes, weights and evaluations.
    """

    def setup(self, device: torch.device) -> None: ...


def set_up(metric: Any, device: torch.device) -> None:
    """Let a metric prepare for its first use. Default: there is nothing to prepare."""
    if isinstance(metric, SetsUp):
        metric.setup(device)


@runtime_checkable
class HasFacts(Protocol):
    """A metric whose values depend on more than its settings, such as the weights of a network: their hashes by name.

    `convention` is the usual name of a sentence that says how the metric measures. The facts are part of the
    evaluation's protocol. vqcore asks for them after `setup`.
    """

    def facts(self) -> Mapping[str, str]: ...


def facts(metric: Any) -> Mapping[str, str]:
    """What decides a metric's values besides its settings. Default: nothing."""
    return metric.facts() if isinstance(metric, HasFacts) else {}


@runtime_checkable
class GivesRows(Protocol):
    """A metric whose `measure` returns rows `(b, ...)` (float32 or float64, by name), one for each sample, not sums.

    vqcore keeps the rows by key. `summary` gets their sums, and `count`, the number of rows; vqcore adds an interval
    for each value: 95 % of 1000 resampled sets lie inside.
    """

    rows: Literal[True]


def gives_rows(metric: Any) -> TypeGuard[GivesRows]:
    """Does `measure` return rows? Default: no, sums."""
    return bool(getattr(metric, "rows", False))


@runtime_checkable
class Gathers(Protocol):
    """A metric with `rows` that needs them all at once: `summary` gets the matrices `(n, ...)`, in the order of keys.

    Such a metric has no interval.
    """

    gather: Literal[True]


def gathers(metric: Any) -> bool:
    """Does `summary` get whole matrices of rows? Default: no, sums."""
    return bool(getattr(metric, "gather", False))


@runtime_checkable
class InUnits(Protocol):
    """A metric that makes sense only in the units of the files, for example a relative error of depths."""

    in_units: Literal[True]


def in_units(metric: Any) -> bool:
    """Does the metric get `values` of both inputs? Default: no, the tensors as the tokenizer sees them."""
    return bool(getattr(metric, "in_units", False))


@runtime_checkable
class OfConstant(Protocol):
    """A metric for which a constant prediction is a useful baseline: `vqcore eval` shows both, and k-means."""

    of_constant: Literal[True]


def of_constant(metric: Any) -> bool:
    """Are the baselines of an evaluation measured as well? Default: no."""
    return bool(getattr(metric, "of_constant", False))


@runtime_checkable
class HasDirection(Protocol):
    """A metric that says which direction is better, for the value with the metric's own name."""

    better: Literal["higher", "lower"] | None


def better(metric: Any) -> Literal["higher", "lower"] | None:
    """Which direction of the metric's value is better. Default: None, unknown."""
    return getattr(metric, "better", None)


# Around a tokenizer


@runtime_checkable
class Format(Protocol):
    """Files of another system. Built as `Class(cfg)`. A format reads tokenizers or training configs, or both.

    `recognises` looks at names and suffixes only and reads no pickle: error messages use it.
    """

    def recognises(self, path: Path) -> bool: ...


@runtime_checkable
class ReadsTokenizers(Protocol):
    """A format that reads a file or folder as a tokenizer.

    Raises `CheckpointError` for files from which no tokenizer can be made, and reads pickles with
    `vqcore.artefacts.formats.read_pickle` alone.
    """

    def read(self, path: Path, *, allow_pickle: bool) -> Foreign: ...


def tokenizer_reader(format_: Any) -> ReadsTokenizers | None:
    """The format, if it reads tokenizers. Default: None."""
    return format_ if isinstance(format_, ReadsTokenizers) else None


@runtime_checkable
class ReadsConfigs(Protocol):
    """A format that reads a training config as nested plain data with the keys of a config file of ours.

    vqcore checks the result like a config file. Raises `ConfigError` or `CheckpointError` for files without such a
    config.
    """

    def config(self, path: Path) -> Mapping[str, Any]: ...


def config_reader(format_: Any) -> ReadsConfigs | None:
    """The format, if it reads training configs. Default: None."""
    return format_ if isinstance(format_, ReadsConfigs) else None


@runtime_checkable
class ExplainsConfigs(Protocol):
    """A format that reads training configs and says what it made of them; `flags` are words of the other command line.

    `config(path)` is the tree of `explained(path, ())`. Raises what `config` raises, also for unknown flags.
    """

    def explained(self, path: Path, flags: Sequence[str]) -> ForeignConfig: ...


def explained(format_: Any, path: Path, flags: Sequence[str]) -> ForeignConfig:
    """The training config with its comments. Default: none, and flags are a `ConfigError`."""
    if isinstance(format_, ExplainsConfigs):
        return format_.explained(path, flags)
    if flags:
        raise ConfigError(f"command line: {flags[0]}: this format reads a file alone, and no flags")
    return ForeignConfig(format_.config(path))


@runtime_checkable
class WritesTokenizers(Protocol):
    """A format that writes a `vqcore.tokenizer.Tokenizer` as files of the other system, into an empty folder.

    The folder gets its name when all files are complete. Raises `CheckpointError` for a tokenizer that the other system
    cannot hold.
    """

    def write(self, tokenizer: Any, folder: Path) -> None: ...


def tokenizer_writer(format_: Any) -> WritesTokenizers | None:
    """The format, if it writes tokenizers. Default: None."""
    return format_ if isinstance(format_, WritesTokenizers) else None


@runtime_checkable
class Publishes(Protocol):
    """A format that knows published weights: an attribute of the class, listed by `vqcore import FORMAT --list`."""

    published: tuple[Published, ...]


def published(format_: Any) -> tuple[Published, ...]:
    """The published weights that a format, or its class, knows. Default: none."""
    return tuple(getattr(format_, "published", ()))


@runtime_checkable
class KnowsFamilies(Protocol):
    """A format that knows how published tokenizers were trained, for `vqcore new config --like PLUGIN/NAME FOLDER`.

    `families` are names, an attribute of the class. `like` is the training config of one, or of another name that the
    format knows, for files of other people. Its tree says nothing about the place of the data, and vqcore replaces
    `data.modality` where the files are of another kind. Sizes are one number for two axes; without sizes the family is
    one of vectors. `data.resolution_step` is what sizes are multiples of, also where there is one size. Raises
    `ConfigError` for other names.
    """

    families: tuple[str, ...]

    def like(self, name: str) -> ForeignConfig: ...


def knows_families(format_: Any) -> KnowsFamilies | None:
    """The format, if it knows families. Default: None."""
    return format_ if isinstance(format_, KnowsFamilies) else None


@runtime_checkable
class StoredCodes(Protocol):
    """The rows of a store, in the order of the shards in which they were written.

    `codes` and `key` are those of the row at a place (`IndexError` beyond the last), `extras` those of `Coded`.
    `find` is the place of a key (`KeyError` for an unknown one). `many` stacks the codes of rows. `keys` are the keys
    of all rows as an Arrow array, or chunked array, of bytes (UTF-8 with surrogateescape). Codes have the integer type
    that the store keeps, and may be views of a file that must not be changed.
    """

    def __len__(self) -> int: ...

    def codes(self, place: int) -> Integer[np.ndarray, "*grid q"]: ...

    def key(self, place: int) -> str: ...

    def extras(self, place: int) -> Mapping[str, Any]: ...

    def find(self, key: str) -> int: ...

    def many(self, places: Int[np.ndarray, " n"]) -> Integer[np.ndarray, "n *grid q"]: ...

    def keys(self) -> Any: ...


@runtime_checkable
class Store(Protocol):
    """A layout of codes on disk. Built as `Class(cfg)`. It keeps rows (`Coded`) in shards; vqcore keeps the manifest.

    `write` writes one shard below a folder, each file aside and then renamed (`vqcore.files.aside`), so that nobody
    meets half of one; it returns their paths relative to the folder. Shards have names that are in order and fit in
    a file name. A shard may have no rows. Equal rows give equal bytes, and replace what the shard held. `manifest`
    says `grid`, `size`, `num_codebooks`, `codebook_size` and `dtype`, the smallest type that holds every code.
    `open` gives the rows of the shards that `manifest["shards"]` lists, each with its `name`, its number of `rows`
    and its `files`, names relative to the folder. It raises `DataError`, with the path, for a file that is missing,
    cut off or of something else.
    """

    def write(
        self, folder: Path, shard: str, rows: Sequence[Coded], manifest: Mapping[str, Any]
    ) -> Sequence[str]: ...

    def open(self, folder: Path, manifest: Mapping[str, Any]) -> StoredCodes: ...


@runtime_checkable
class Adopts(Protocol):
    """A store in the layout of another system, with a file of codes for each file; so it reads what others wrote.

    Such a folder has no manifest: `open` gets one that says what the tokenizer says, and no shards. `held` are the rows
    of a file; None where there are none, or a killed program left half of them. `views` are the crops that the other
    system has chosen for a file of this extent, the first one the centre; None where it has chosen none. `write`
    without rows, which comes first, raises `DataError` for codes that the layout cannot hold, and `write` and `views`
    do so for keys.
    """

    def held(self, folder: Path, key: str, manifest: Mapping[str, Any]) -> Sequence[Coded] | None: ...

    def views(self, folder: Path, key: str, extent: tuple[int, ...]) -> Sequence[View] | None: ...


def adopts(store: Any) -> Adopts | None:
    """The store, if its layout is that of another system. Default: None."""
    return store if isinstance(store, Adopts) else None


@runtime_checkable
class Text(Protocol):
    """A text tokenizer. Built as `Class(cfg)`. Ids lie in `[0, vocab_size)`; a text's ids do not depend on the others.

    `decode` gives readable texts: `encode` of them gives the same ids, unless the vocabulary lacks something.
    """

    vocab_size: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]: ...


@runtime_checkable
class LearnsText(Protocol):
    """A text tokenizer that makes its vocabulary from texts. Its setting `file` names a vocabulary that was saved.

    `texts` may be iterated over several times, and are too many to keep. Equal texts and settings give equal bytes.
    """

    def train(self, texts: Iterable[str]) -> None: ...

    def save(self, path: Path) -> None: ...


def learner(text: Any) -> LearnsText | None:
    """The text tokenizer, if it learns its vocabulary. Default: None."""
    return text if isinstance(text, LearnsText) else None


@runtime_checkable
class ShowsPieces(Protocol):
    """A text tokenizer that can be looked into: the piece of each id, and facts of the vocabulary for people."""

    def pieces(self, ids: Sequence[int]) -> list[str]: ...

    def facts(self) -> Mapping[str, str]: ...


def shows_pieces(text: Any) -> ShowsPieces | None:
    """The text tokenizer, if it can be looked into. Default: None."""
    return text if isinstance(text, ShowsPieces) else None


@runtime_checkable
class Codec(Protocol):
    """What hooks and pictures use of the tokenizer (`vqcore.tokenizer.Tokenizer`): from samples to codes and back."""

    spec: DataSpec
    modality: Modality

    def read(self, source: Any, size: tuple[int, ...] | None = None) -> Tensor: ...

    def show(self, x_hat: Tensor) -> Any: ...

    def encode(self, x: Tensor, mask: Bool[Tensor, "b *size"] | None = None) -> Int[Tensor, "b *grid q"]: ...

    def lookup(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]: ...

    def decode(
        self,
        codes: Int[Tensor, "b *grid q"],
        *,
        size: tuple[int, ...] | None = None,
        rng: Sequence[torch.Generator] | None = None,
        seed: int = 0,
        extras: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Tensor: ...

    def reconstruct(self, x: Tensor, *, seed: int = 0, **sampling: Any) -> Tensor: ...


@runtime_checkable
class RunLike(Protocol):
    """What a hook may read of a run. `step` optimizer steps are done; the run ends at `steps`; `dir` is its folder.

    `window.counts()` is a list with one tensor per codebook: how often each code occurred in the last training tokens.
    """

    @property
    def config(self) -> RunConfig: ...

    @property
    def dir(self) -> Path: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def step(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def tokenizer(self) -> Codec: ...

    @property
    def data(self) -> Data: ...

    @property
    def eval_data(self) -> Data | None: ...

    @property
    def window(self) -> Any: ...


# By kind


REQUIRED: dict[str, type] = {
    "encoder": Encoder,
    "quantizer": Quantizer,
    "decoder": Decoder,
    "scheduler": Scheduler,
    "percept": PerceptualLoss,
    "adversary": Adversary,
    "discriminator": Discriminator,
    "teacher": Teacher,
    "objective": Objective,
    "modality": Modality,
    "reader": SampleReader,
    "data": Data,
    "store": Store,
    "metric": Metric,
    "text": Text,
    "format": Format,
}
"""The Protocol of each kind. `hook` has other rules (`vqcore.plugin.RunHooks`)."""

OPTIONAL: dict[str, tuple[type, ...]] = {
    "encoder": (Interpolates, Borrows, Fetches, SparesDecay),
    "quantizer": (ChangesGrid, NamesTokenState, NeedsFp32, Fits, Borrows, Fetches, SparesDecay),
    "decoder": (NeedsSize, Denoiser, ChecksScheduler, Interpolates, Borrows, Fetches, SparesDecay),
    "percept": (Borrows,),
    "teacher": (Borrows,),
    "discriminator": (Borrows, SparesDecay),
    "adversary": (Borrows, SparesDecay),
    "scheduler": (HasTime,),
    "objective": (NeedsDenoiser, SetsModes, Borrows),
    "modality": (
        HasMask,
        HasWeight,
        Rides,
        SharesReading,
        ReadsStreams,
        Finishes,
        Borrows,
        HasPicture,
        ShowsChannels,
        HasValues,
        Writes,
        Mask,
        HasHoles,
        HasOwnBox,
        HasSizing,
        HasFill,
        KnowsExtent,
    ),
    "reader": (NamesParts,),
    "data": (LeavesOut, KnowsBytes, HasShards, HasBlocks, FetchesAhead, KnowsCodes),
    "metric": (SetsUp, HasFacts, GivesRows, Gathers, InUnits, OfConstant, HasDirection),
    "store": (Adopts,),
    "text": (LearnsText, ShowsPieces),
    "format": (ReadsTokenizers, ReadsConfigs, ExplainsConfigs, WritesTokenizers, Publishes, KnowsFamilies),
}
"""The optional Protocols of each kind. A component has all members of such a Protocol or none."""


def members(protocol: type) -> tuple[str, ...]:
    """The names that a Protocol itself adds."""
    own = [name for name, value in vars(protocol).items() if callable(value) or isinstance(value, property)]
    own = [name for name in own if not name.startswith("_") or name in ("__call__", "__len__")]
    return (*inspect.get_annotations(protocol), *own)


def required_members(kind: str) -> tuple[str, ...]:
    """The names that an object of this kind must have; empty for kinds without a Protocol."""
    return members(REQUIRED[kind]) if kind in REQUIRED else ()


def optional_members(kind: str) -> tuple[str, ...]:
    """The names that an object of this kind may have, in the order of `OPTIONAL`."""
    names = [name for protocol in OPTIONAL.get(kind, ()) for name in members(protocol)]
    return tuple(name for name in names if name not in required_members(kind))


def missing_members(kind: str, built: Any) -> list[str]:
    """Members that `built` lacks as a component of this kind.

    A denoiser is a decoder with other required members; a format needs one of `read` and `config`.
    """
    denoises = kind == "decoder" and is_denoiser(built)
    lacks = [
        name
        for name in (members(Denoiser) if denoises else required_members(kind))
        if not hasattr(built, name)
    ]
    if kind == "format" and not (tokenizer_reader(built) or config_reader(built)):
        lacks.append("read or config")
    return lacks
