"""The contracts between the parts: the records that travel and what each kind of component must offer.

Components inherit from `torch.nn.Module` at most, never from these Protocols; `vqcore.testing` checks their laws.
Axes: b batch, c channels, d latent width, q codebooks, *size an input's axes (1 to 3), *grid a token grid's axes.
One layout everywhere: inputs `b c *size` (class maps `b *size`), latents `b *grid d`, codes `b *grid q`, int64.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqcore.schema import TokenizerConfig

Kind = Literal["continuous", "categorical", "angle", "unit-vector", "binary"]


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a tokenizer's input is, as tensors.

    `size` is the nominal size, one number per axis; its length is the rank. `range` bounds the values of `x` (None:
    unbounded). A categorical input is a class map `(b, *size)` with values in `[0, labels)`; everything else is float
    `(b, channels, *size)`. `mask` says that batches carry a validity mask. `loss` is the loss an objective uses when
    the config names none.
    """

    channels: int
    size: tuple[int, ...]
    kind: Kind = "continuous"
    range: tuple[float, float] | None = (-1.0, 1.0)
    labels: int | None = None
    mask: bool = False
    loss: str = "mse"

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
    """A size with one number per axis. Raises `ValueError` when there are too many or too few."""
    sides = (size,) * rank if isinstance(size, int) else tuple(size)
    if len(sides) != rank:
        raise ValueError(f"size {list(sides)} has {len(sides)} axes where samples have {rank}")
    return sides


@dataclass(frozen=True)
class Batch:
    """Samples of one size. `mask` is True where `x` is valid; `size` is what each sample measured before its crop."""

    x: Tensor
    keys: tuple[str, ...]
    mask: Bool[Tensor, "b *size"] | None = None
    size: Int[Tensor, "b r"] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with all its tensors on another device."""
        return replace(
            self,
            x=self.x.to(device, non_blocking=True),
            mask=None if self.mask is None else self.mask.to(device, non_blocking=True),
            size=None if self.size is None else self.size.to(device, non_blocking=True),
            extras={k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.extras.items()},
        )


@dataclass(frozen=True)
class Quantized:
    """A quantizer's answer. `losses` are scalars that train it, by name; `metrics` are scalars worth watching."""

    z_q: Float[Tensor, "b *grid d"]
    codes: Int[Tensor, "b *grid q"]
    losses: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    metrics: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """An objective's answer for one player: unweighted scalars by name, and what there is to look at."""

    terms: Mapping[str, Float[Tensor, ""]]
    x_hat: Tensor | None = None
    codes: Int[Tensor, "b *grid q"] | None = None
    metrics: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """How large a part of a tokenizer is: numbers it learns, how many of them are trained, numbers in its buffers."""

    parameters: int
    trained: int
    buffers: int


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
    """What a format read: the tokenizer's config, and its weights by the names that `Tokenizer.state_dict` has."""

    config: TokenizerConfig
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class View:
    """Which part of a sample becomes the tensor: drawn once for the main modality and shared by all that ride along.

    `start` and `stop` are fractions of the sample's extent, one per axis; `flip` mirrors the last axis; `size` is the
    size of the result. `draw` is a random number that decides whatever else of a training sample is left to chance,
    such as its colours or which of its instances it is; 0, as in evaluation: nothing is. `extent` is what the sample
    measured that the view was drawn for, where the modality says so: what is counted in its pixels needs it.
    """

    start: tuple[float, ...]
    stop: tuple[float, ...]
    size: tuple[int, ...]
    flip: bool = False
    draw: int = 0
    extent: tuple[int, ...] | None = None


@runtime_checkable
class Encoder(Protocol):
    """From a sample to a grid of latents. Built as `Class(cfg, *, spec: DataSpec)`; always sees float `(b, c, *size)`.

    Laws: sample-wise (a sample's latents do not depend on its batch); deterministic in eval mode; `grid(size)` is the
    grid of its output and raises `ValueError`, with both numbers, for a size it cannot take. Optional, for decoders
    too: `interpolated`, names of tensors `(1, d, *grid)` that are interpolated when a checkpoint has another size.
    Optional, for quantizers and decoders too: `fetch()`, which takes over published weights to begin with. Building
    asks no hub for anything; `fetch` is called once, where no checkpoint fills the part. Raises `CheckpointError`.
    """

    dim: int

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]: ...

    def __call__(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *grid d"]: ...


@runtime_checkable
class Quantizer(Protocol):
    """From latents to codes and back. Built as `Class(cfg)`; knows nothing of images.

    `dim` is the latent width it wants, `codebook_size` the number of values of one code, `num_codebooks` the length of
    the last axis of `codes`. `mask` is True at valid positions; the others count in no loss and no statistic.
    Optional: `grid_out(grid)` when it changes the grid; `token_state()`, the tensors that decide codes and their
    decoding (default: its whole state dict); `without_decay`, names of parameters that codes are made of (any module
    may have it: `vqcore.optim` takes them out of the weight decay).
    Laws: in eval mode `decode(codes)` equals `z_q` and no state changes; codes lie in `[0, codebook_size)`; losses and
    metrics have the same names at every call, in training and evaluation; gradients reach `z`; any grid of 1 to 3 axes;
    `decode` raises `ValueError` that names the code and the bound when one is out of range.
    """

    dim: int
    codebook_size: int
    num_codebooks: int

    def __call__(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized: ...

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]: ...


@runtime_checkable
class Decoder(Protocol):
    """From quantized latents to a sample. Built as `Class(cfg, *, dim, spec)`; owns the projection from `dim`.

    `last_layer` is the parameter nearest the output (adaptive loss weights read its gradient): a property, since an
    attribute that is a parameter would be a second name for it in the state dict. Optional: `needs_size`, True for a
    decoder whose grid does not decide the size of its output; it is then called with `size=`, the size wanted.
    """

    @property
    def last_layer(self) -> Tensor: ...

    def __call__(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]: ...


@runtime_checkable
class Denoiser(Protocol):
    """A decoder that predicts from a noised target; `is_denoiser` is True. Built as `Class(cfg, *, dim, spec)`.

    `condition` runs once a sample; `mask` is True where a token is hidden, and all hidden means unconditional.
    `to_target` and `from_target` lead into the space that is noised and back (identity for pixels). `rng` is one
    generator a sample (`vqcore.rng.randn`).
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

    def from_target(self, y: Tensor) -> Tensor: ...

    def target_shape(self, size: tuple[int, ...]) -> tuple[int, ...]: ...


@runtime_checkable
class Sampler(Protocol):
    """One run down the noise levels; may remember earlier predictions."""

    timesteps: Sequence[float]

    def step(self, prediction: Tensor, t: float, x_t: Tensor, rng: Sequence[torch.Generator]) -> Tensor: ...


@runtime_checkable
class Scheduler(Protocol):
    """Noise levels. Built as `Class(cfg)`; `add_noise` and `target` are pure."""

    num_steps: int

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def target(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def sampler(self, steps: int) -> Sampler: ...


@runtime_checkable
class PerceptualLoss(Protocol):
    """Distance of two samples in a feature space. Built as `Class(cfg, *, spec)`; nothing in it is trained."""

    def __call__(self, x_hat: Tensor, x: Tensor) -> Float[Tensor, " b"]: ...


@runtime_checkable
class Discriminator(Protocol):
    """Real or rebuilt? Built as `Class(cfg, *, spec)`; logits of any shape after the batch axis."""

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Teacher(Protocol):
    """A frozen feature network. Built as `Class(cfg, *, spec)`."""

    dim: int

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Objective(Protocol):
    """The one place that knows how a decoder is trained and sampled. Built as `Class(cfg, *, spec)`.

    `setup` builds what only training needs (on the tokenizer's device). `players(step)` names who is optimised at a
    step: `"model"` is the tokenizer, any other name is the attribute of the objective that holds that player's module.
    `losses` reports one player's terms, unweighted and under the same names at every step and in eval mode. `rng`, one
    generator a sample, is the only source of chance besides the layers' own dropout; so what happens to a sample does
    not depend on the batch it is in. `decode` samples the decoder; `extras` is what rides along in the batch, if
    anything does. Optional: `needs_denoiser`, True for an objective that only works with denoisers (default: False,
    and only with plain decoders). Under DDP every rank keeps its own buffers, and a player's every trained parameter must take part in its losses.
    """

    def setup(self, tokenizer: Any) -> None: ...

    def players(self, step: int) -> tuple[str, ...]: ...

    def losses(
        self, tokenizer: Any, batch: Batch, *, player: str, step: int, rng: Sequence[torch.Generator]
    ) -> Losses: ...

    def decode(
        self,
        tokenizer: Any,
        codes: Int[Tensor, "b *grid q"],
        *,
        size: tuple[int, ...],
        rng: Sequence[torch.Generator],
        extras: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Tensor: ...


@runtime_checkable
class Modality(Protocol):
    """How one sample is read, cropped, resized, flipped, normalised and shown. Built as `Class(cfg, *, size)`.

    `size` is the nominal size the config asks for, or None: then the modality must know it. `suffixes` are the file
    names it reads (lower case, with the dot), `metrics` the names of the metrics that mean something for it.
    `read` takes a path or an object already in memory and raises `DataError` or `OSError` for a damaged one. Where
    `at_least` is a size, it may return less detail than there is, enough for training views of that size or smaller;
    `extent` is still the whole sample's. `view` draws a crop, or with `rng=None` the one for evaluation. Optional: `mask(raw, view)`, the validity mask, when
    `spec.mask`; `picture(x)`, a PIL image of one sample for people where `show` is an array; `values(x)`, a batch in
    the units of the files (metres, logits stay logits) as float `(b, c, *size)`, for metrics with `in_units`;
    `write(shown, path)`, which writes what `show` gave to a path that ends in `written`, one of the `suffixes`, where
    PNG for pictures and `.npy` for the rest are not what people want.
    Optional, for masks (`vqcore.data.validity`): `is_mask`, True for one that, where it rides along, says which
    positions of the main sample are valid (above a half): it goes into `Batch.mask`, not into the extras, and its
    attribute `mask_value`, if not None, stands where they are not. `hole_value` of a main modality, if not None: its
    last channel says itself what is valid (1, else -1), its other channels have this value in holes, and its batches
    carry no mask. `has_own_box`, True for a main modality whose tensor is not simply the part that the view names.
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
class Data(Protocol):
    """A finite set of samples. Built as `Class(cfg, *, split, modality, extra)`, split `train` or `eval`.

    `key(i)` names sample i for people and files: a relative path without suffix. `get(i, label)` is what the modality's
    `read` takes; label is "" for the main modality or a key of `data.extra`. Raises `DataError` when there is nothing.
    """

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def get(self, index: int, label: str = "") -> Any: ...


@runtime_checkable
class Metric(Protocol):
    """A figure of a whole set, exact on any number of processes. Built as `Class(cfg, *, spec)`.

    `measure` returns sums over the samples of a batch (float64 tensors by name); the caller adds them up over batches
    and processes; `summary` turns the totals into figures by name ("" for the one that has the metric's own name).
    Optional: `in_units`, True for a metric that means something in the units of the files only (a relative error of
    depths): it gets `modality.values` of both. `of_constant`, True for one that says something of a prediction that is
    the same everywhere: `vqcore eval` shows it beside the figure. `better`, "higher" or "lower", of the figure that
    has the metric's name.
    """

    def measure(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> Mapping[str, Tensor]: ...

    def summary(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]: ...


@runtime_checkable
class Format(Protocol):
    """Files of another system. Built as `Class(cfg)`; its defaults serve `Tokenizer.load(path, format="name")`.

    `recognises` looks at names and suffixes only and reads no pickle: it serves error texts. `read` raises
    `CheckpointError` for what it cannot make a tokenizer of, and reads pickles with
    `vqcore.artefacts.formats.read_pickle` alone.
    """

    def recognises(self, path: Path) -> bool: ...

    def read(self, path: Path, *, allow_pickle: bool) -> Foreign: ...


_PROTOCOLS: dict[str, type] = {
    "encoder": Encoder,
    "quantizer": Quantizer,
    "decoder": Decoder,
    "scheduler": Scheduler,
    "percept": PerceptualLoss,
    "discriminator": Discriminator,
    "teacher": Teacher,
    "objective": Objective,
    "modality": Modality,
    "data": Data,
    "metric": Metric,
    "format": Format,
}


def required_members(kind: str) -> tuple[str, ...]:
    """The names an object of this kind must have; empty for kinds without a Protocol (hooks observe what they like)."""
    return _members(_PROTOCOLS[kind]) if kind in _PROTOCOLS else ()


def missing_members(kind: str, built: Any) -> list[str]:
    """Members that `built` lacks as a component of this kind. A decoder may be a denoiser, which has other ones."""
    is_denoiser = kind == "decoder" and getattr(built, "is_denoiser", False)
    names = _members(Denoiser) if is_denoiser else required_members(kind)
    return [name for name in names if not hasattr(built, name)]


def _members(protocol: type) -> tuple[str, ...]:
    special = ("__call__", "__len__")
    own = [n for n, v in vars(protocol).items() if callable(v) or isinstance(v, property)]
    own = [name for name in own if not name.startswith("_") or name in special]
    return (*getattr(protocol, "__annotations__", {}), *own)
