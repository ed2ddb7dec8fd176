"""The tokenizer: encoder -> quantizer -> decoder, loaded from a folder and used on files, pictures and arrays.

The children of a `Tokenizer` are named `embed` (the class embedding, if there is one), `encoder`, `proj`, `quantizer`
and `decoder` in every state dict. The modality (how a file becomes a tensor) and the objective (how the decoder is
sampled) belong to the tokenizer, but their weights do not.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vqcore.artefacts import hub
from vqcore.artefacts.card import model_card
from vqcore.artefacts.codes import Codes, CodeShape, TokenFiles
from vqcore.artefacts.folder import (
    CARD,
    CONFIG,
    EMA,
    FINGERPRINT_VERSION,
    WEIGHTS,
    check_fingerprint,
    note,
    read_evaluation,
    read_weights,
    save_tensors,
    staged,
    verify,
)
from vqcore.artefacts.formats import read_foreign
from vqcore.artefacts.provenance import ORIGIN, provenance_of, read_config, with_places, without_places
from vqcore.artefacts.resolve import resolve
from vqcore.artefacts.stored import Records, open_store, store_of
from vqcore.borrowed import Lender, borrowed_prefixes, weights_of
from vqcore.compose.describe import dump
from vqcore.config import Config, deciding, portable
from vqcore.data.reader import Prepared, opened
from vqcore.data.windows import Cover, Whole, cover, named
from vqcore.errors import CheckpointError, ConfigError, SettingError, VqcoreError, listed
from vqcore.files import local, write_text
from vqcore.memory import TooLarge, within_memory
from vqcore.network import asked, asking, closed_unless_asked
from vqcore.protocols import (
    Batch,
    DataSpec,
    Encoder,
    Facts,
    Foreign,
    Modality,
    Objective,
    Part,
    Quantized,
    Quantizer,
    RecordCodes,
    View,
    codes_in_fp32,
    expand,
    fetch,
    finish,
    finishes,
    grid_out,
    is_denoiser,
    needs_denoiser,
    sizing,
    token_state,
)
from vqcore.registry import Registry, registry
from vqcore.rng import generator, seeded
from vqcore.sampling import resolved
from vqcore.schema import ObjectiveConfig, Precision, TokenizerConfig

log = logging.getLogger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The types of autocast."""


class Tokenizer(nn.Module):
    """Turns an input into a grid of codes and back.

    `seed` fixes the initial weights of each part. With `fetch`, parts that start from published weights load them now,
    and parts that borrow weights borrow them. `encoder_only` leaves the decoder out. `loans` has hash and source of
    everything borrowed, by key; `taken` says which checkpoint of a run was loaded and why, and is empty for everything
    else. Raises `ConfigError` if a part refuses its settings, or if decoder and objective do not fit.
    """

    precision: Precision = "fp32"
    """In eval mode, parts run under autocast of this precision; the weights stay in fp32."""
    modality: Modality
    objective: Objective
    encoder: Encoder
    quantizer: Quantizer
    decoder: Any  # a Decoder or a Denoiser; None with `encoder_only`

    def __init__(
        self,
        cfg: TokenizerConfig,
        *,
        seed: int = 0,
        encoder_only: bool = False,
        fetch: bool = True,
        registry_: Registry | None = None,
    ):
        super().__init__()
        catalogue = registry_ or registry()

        def build(kind: str, path: str, cfg: Config, **wiring: Any) -> Any:
            with seeded(seed, "init", kind), closed_unless_asked():
                return catalogue.build(kind, cfg, path, **wiring)

        self.cfg, self.registry = cfg, catalogue
        self._frozen: tuple[str, ...] = ()
        self._has_warned_of_range = self._has_warned_of_length = self._has_said_precision = False
        self.origin: dict[str, Any] = {}
        self.loans: dict[str, dict[str, Any]] = {}
        self.taken = ""
        # Not registered as a child, like the objective: what a modality holds is no part of a tokenizer.
        self.__dict__["modality"] = build("modality", "data.modality", cfg.modality, size=cfg.size)
        self.spec: DataSpec = self.modality.spec
        self.embed = None
        encoder_spec = self.spec
        if self.spec.labels is not None:
            width = cfg.model.embed_dim
            if width is not None:
                with seeded(seed, "init", "embed"), _fits("model.embed_dim"):
                    self.embed = nn.Embedding(self.spec.labels, width)
            encoder_spec = replace(
                self.spec, channels=width or self.spec.labels, labels=None, kind="continuous", range=None
            )
        self.encoder = build("encoder", "model.encoder", cfg.model.encoder, spec=encoder_spec)
        self.quantizer = build("quantizer", "model.quantizer", cfg.model.quantizer)
        with seeded(seed, "init", "proj"), _fits("model.quantizer"):
            self.proj = nn.Linear(self.encoder.dim, self.quantizer.dim)
        self.decoder = None
        if not encoder_only:
            self.decoder = build(
                "decoder", "model.decoder", cfg.model.decoder, dim=self.quantizer.dim, spec=self.spec
            )
        self.build_objective(cfg.objective, seed)
        if self.decoder is not None:
            _check_pair(self)
        if fetch:
            self.fetch()
            self.borrow(Lender())

    def build_objective(self, cfg: ObjectiveConfig, seed: int) -> None:
        """Build how the decoder is trained and sampled; `seed` fixes initial weights that an objective may have."""
        with seeded(seed, "init", "objective"), closed_unless_asked():
            made = self.registry.build("objective", cfg, "objective", spec=self.spec)
        # Not registered as a child: discriminators and teachers of an objective are no part of a tokenizer.
        self.__dict__["objective"] = made

    def borrow(self, lender: Lender) -> None:
        """Let the modality and the parts borrow their weights. Raises `CheckpointError` if weights are missing."""
        parts = ("encoder", "quantizer", "decoder")
        roots = {name: part for name in parts if (part := getattr(self, name)) is not None}
        self.loans = lender.lend({"modality": self.modality, **roots})

    def fetch(self, parts: Sequence[str] = ("encoder", "quantizer", "decoder")) -> None:
        """Load the published weights of parts that start from them (`fetch` in `vqcore.protocols`).

        What is missing on this machine is downloaded only where the user asked for it (`vqcore.network`).
        """
        for name in parts:
            try:
                with closed_unless_asked():
                    fetch(getattr(self, name))
            except CheckpointError as error:
                raise error.at(f"model.{name}") from error

    @property
    def codebook_size(self) -> int:
        """Values that one code can take."""
        return self.quantizer.codebook_size

    @property
    def num_codebooks(self) -> int:
        """Number of codes at every position of the grid: the length of the last axis of `codes`."""
        return self.quantizer.num_codebooks

    def facts(self, size: tuple[int, ...] | None = None) -> Facts:
        """What this tokenizer is, in numbers, for inputs of this size (default: the nominal size)."""
        size = tuple(size or self.cfg.size)
        parts = {name: _part(module) for name, module in self.named_children()}
        return Facts(self.spec, size, self.grid(size), self.codebook_size, self.num_codebooks, parts)

    def freeze_encoder(self) -> None:
        """Freeze `embed`, `encoder`, `proj` and `quantizer`: they get no gradient and stay in eval mode."""
        self._frozen = ("embed", "encoder", "proj", "quantizer")
        for name in self._frozen:
            if (part := getattr(self, name)) is not None:
                part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Tokenizer":
        """Set training mode, or eval mode, of all parts that are not frozen."""
        super().train(mode)
        for name in self._frozen:
            if (part := getattr(self, name)) is not None:
                part.eval()
        return self

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.proj.weight.device

    def grid(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The grid of codes for an input of this size (default: the nominal size)."""
        return grid_out(self.quantizer, self.encoder.grid(tuple(size or self.cfg.size)))

    @property
    def code_precision(self) -> Precision:
        """The precision of codes in eval mode: `precision`, or fp32 if the quantizer asks for it."""
        return "fp32" if codes_in_fp32(self.quantizer) else self.precision

    def autocast(self, *, encoding: bool = False) -> AbstractContextManager[object]:
        """The context in which parts run: in eval mode autocast of `precision`; else what is around it.

        With `encoding`, in eval mode no autocast if the quantizer asks for codes in fp32.
        """
        if encoding and not self.training and codes_in_fp32(self.quantizer):
            return torch.autocast(self.device.type, enabled=False)
        if self.training or self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def prepare(self, batch: Batch, extra: Mapping[str, Modality] | None = None) -> Batch:
        """A batch as the tokenizer and the losses see it, on the tokenizer's device.

        Here modalities do what wants a batch and a device (`Finishes`): the main modality, and those of `extra`, the
        extra modalities by label. A batch that is prepared already is only moved.
        """
        batch = batch.to(self.device)
        if batch.finished:
            return batch
        extras = dict(batch.extras)
        for label, each in (extra or {}).items():
            if isinstance(extras.get(label), Tensor):
                extras[label] = finish(each, extras[label])
        return replace(batch, x=finish(self.modality, batch.x), extras=extras, finished=True)

    def _apply(self, fn: Any, recurse: bool = True) -> "Tokenizer":
        """Move or cast all parts. A cast such as `.bfloat16()` leaves the quantizer in fp32, where codes are chosen."""

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        for child in self.children() if recurse else ():
            child._apply(moved if child is self.quantizer else fn)
        return super()._apply(fn, recurse=False)

    def latents(self, x: Tensor) -> Float[Tensor, "b *grid d"]:
        """The input of the quantizer. `x` is float `(b, c, *size)`, or a class map `(b, *size)` of integers."""
        with self.autocast(encoding=True):
            return self.proj(self.encoder(self.embedded(x)))

    def embedded(self, x: Tensor) -> Float[Tensor, "b c *size"]:
        """The input of the encoder: class ids `(b, *size)` embedded or one-hot; everything else unchanged."""
        if self.spec.labels is None:
            return x
        ids = x.long()
        wide = F.one_hot(ids, self.spec.labels).float() if self.embed is None else self.embed(ids)
        return rearrange(wide, "b ... c -> b c ...")

    def quantize(self, z: Float[Tensor, "b *grid d"], mask: Tensor | None = None) -> Quantized:
        """Quantize latents. `mask`, bool `(b, *size)`, is True where the input is valid.

        A grid position is valid if any part of it is. Raises `ValueError` for a mask that is not bool or has
        another shape.
        """
        if mask is not None:
            self._check_mask(mask, z)
        return self.quantizer(z, None if mask is None else cells(mask, z.shape[1:-1]))

    @torch.no_grad()
    def encode(self, x: Any, mask: Tensor | None = None) -> Int[Tensor, "b *grid q"]:
        """The codes of a batch of inputs. Raises `ValueError` when `x` does not look like `spec`, or `mask` like `x`.

        `x` is a tensor as `read` returns it; anything else (a path, a picture, an array) is one sample, which is read.
        `mask` is bool `(b, *size)`, True where `x` is valid. The encoder sees all of `x`: values must be
        finite also where `mask` is False.
        """
        if not isinstance(x, Tensor):
            return self.encode_parts([self._one(x)])
        self.check_input(x)
        wanted = (len(x), *x.shape[-self.spec.rank :])
        if mask is not None and (tuple(mask.shape) != wanted or mask.dtype != torch.bool):
            raise ValueError(f"a mask of these inputs is bool {wanted}, not {mask.dtype} {tuple(mask.shape)}")
        self._check_range(x, mask)
        if self.precision != self.code_precision and not self._has_said_precision:
            self._has_said_precision = True
            log.info(f"codes are computed in {self.code_precision}; {self.precision} is for decoding alone.")
        with _evaluating(self), self.autocast(encoding=True):
            valid = None if mask is None else mask.to(self.device)
            return self.quantize(self.latents(x.to(self.device)), valid).codes

    def lookup(self, codes: Tensor | np.ndarray) -> Float[Tensor, "b *grid d"]:
        """The quantized latents of codes `(b, *grid, q)`. Raises `ValueError` for what cannot be such codes."""
        return self.quantizer.decode(self._as_codes(codes)).to(self.proj.weight.dtype)

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor | np.ndarray,
        *,
        size: int | tuple[int, ...] | None = None,
        rng: Sequence[torch.Generator] | None = None,
        seed: int = 0,
        extras: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Reconstructions from codes, float `(b, c, *size)`; logits `(b, labels, *size)` for class maps.

        The codes `(b, *grid, q)` are integers of any type, in a tensor or in an array; those of one sample, as
        `vqcore tokenize` writes them, need no axis for samples. Raises `ValueError` for what cannot be codes of this
        tokenizer.

        `size`, one number for all axes or a number for each, defaults to the size with this grid. Decoders that draw
        noise use `rng`, one generator per sample (by default made from `seed` and the sample's place in the batch);
        decoders with more inputs than the codes use `extras`. `sampling` are the options of the objective, such as
        `steps=25`; `vqcore show` lists them. Raises `ConfigError` for an unknown option or a value that it does not
        take.
        """
        if self.decoder is None:
            raise CheckpointError("this tokenizer cannot decode: it was loaded with encoder_only=True.")
        chosen = resolved(type(self.objective), sampling, "decode")
        if size is not None:
            size = expand(size, self.spec.rank)
            if min(size) < 1:
                raise ValueError(f"size {list(size)} must be at least 1")
        codes = self._as_codes(codes, size)
        rng = rng or [generator(seed, "decode", index) for index in range(len(codes))]
        size = size or self.size_of(tuple(codes.shape[1:-1]))
        with _evaluating(self), self.autocast():
            try:
                return self.objective.decode(self, codes, size=size, rng=rng, extras=extras, **chosen).float()
            except SettingError as error:
                raise ConfigError(f"sampling option {str(error).rstrip('.')}.") from error

    def reconstruct(self, x: Tensor, *, seed: int = 0, **sampling: Any) -> Tensor:
        """`decode(encode(x))` at the size of `x`; the other arguments are those of `decode`."""
        return self.decode(self.encode(x), size=tuple(x.shape[-self.spec.rank :]), seed=seed, **sampling)

    def size_of(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The input size that belongs to a grid, in proportion to the nominal one."""
        nominal = self.grid()
        if len(grid) != len(nominal) or len(nominal) != self.spec.rank:
            return tuple(self.cfg.size)
        return tuple(side * have // base for side, have, base in zip(self.cfg.size, grid, nominal))

    def read(self, source: Any, size: int | tuple[int, ...] | None = None) -> Tensor:
        """A batch of one sample `(1, c, *size)` from a path or an object in memory, prepared as for evaluation.

        Of a record that is longer than the window this is the middle window, with a warning: `encode_record` takes
        all of it. Raises `ValueError` for a size with another number of axes.
        """
        x = self.read_raw(source, size)
        return finish(self.modality, x.to(self.device)).cpu() if finishes(self.modality) else x

    def read_raw(self, source: Any, size: int | tuple[int, ...] | None = None) -> Tensor:
        """A batch of one sample as `prepare` takes it. For most modalities this is what `read` returns."""
        return self._one(source, size)[0].unsqueeze(0)

    def _one(self, source: Any, size: int | tuple[int, ...] | None = None) -> tuple[Tensor, Tensor | None]:
        """The evaluation view of a sample, and where it is valid."""
        found = self.prepared(source, expand(size or self.cfg.size, self.spec.rank))
        if "window" in sizing(self.modality) and found.left_out:
            self._warn_of_length(found)
        return found.part(0)

    def prepared(
        self,
        source: Any,
        size: tuple[int, ...],
        cover: Cover | None = None,
        views: tuple[View, ...] = (),
    ) -> Prepared:
        """A sample, read, with the parts that an encoder takes: as `prepare` takes them. `views` are its crops."""
        source = local(source) if isinstance(source, (str, Path)) else source
        return Prepared(opened(self.modality, source), size, cover, views)

    def encode_record(
        self,
        source: Any,
        *,
        size: int | tuple[int, ...] | None = None,
        stride: int | tuple[int, ...] | None = None,
        batch_size: int = 16,
    ) -> RecordCodes:
        """The codes of a whole record, window by window, or of a whole picture, tile by tile.

        `source` is what `read` takes. `stride` is the number of positions from one window to the next, by default that
        of a window. Raises `ConfigError` for a stride that leaves something out, or for samples that cannot be cut.
        """
        size = expand(size or self.cfg.size, self.spec.rank)
        steps = (stride,) if isinstance(stride, int) else stride
        covering = cover(self.modality, size, steps, tiles="window" not in sizing(self.modality))
        assert covering is not None
        found = self.prepared(source, size, covering)
        extent, rows = found.found.extent, []
        for first in range(0, len(found), batch_size):
            parts = [found.part(place) for place in range(first, min(first + batch_size, len(found)))]
            rows.append(self.encode_parts(parts).cpu().numpy())
        return RecordCodes(np.concatenate(rows), covering.starts(extent), covering.whole(extent), size)

    def encode_parts(self, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Int[Tensor, "b *grid q"]:
        """The codes of parts of one size and where each is valid, as `Prepared.part` gives them."""
        masks = [valid for _, valid in parts]
        known = next((valid for valid in masks if valid is not None), None)
        mask = None
        if known is not None:
            mask = torch.stack([torch.ones_like(known) if each is None else each for each in masks])
        x = torch.stack([x for x, _ in parts])
        batch = self.prepare(Batch(x, tuple(map(str, range(len(x)))), mask))
        return self.encode(batch.x, batch.mask)

    def decode_record(
        self, codes: RecordCodes, *, seed: int = 0, batch_size: int = 16, **sampling: Any
    ) -> Tensor:
        """The record `(1, c, *extent)` of its codes. Where windows overlap it is their mean.

        `seed` and `sampling` are those of `decode`; every window draws its noise from the place where it begins.
        """
        whole = Whole(codes.extent)
        for first in range(0, len(codes.codes), batch_size):
            start = codes.start[first : first + batch_size].tolist()
            rng = [generator(seed, "decode", named(low)) for low in start]
            x_hat = self.decode(codes.codes[first : first + batch_size], size=codes.size, rng=rng, **sampling)
            for part, low in zip(x_hat, start):
                whole.add(part, low)
        return whole.mean.unsqueeze(0)

    def load_tokens(self, folder: str | Path) -> Mapping[str, Codes]:
        """The codes that `vqcore tokenize` wrote into a folder, by the key of the file; read when asked for.

        A value is `(*grid, q)` int64, or `RecordCodes` where records were cut into windows. Raises `DataError` if
        another tokenizer made them.
        """
        place = local(folder)
        found = Records(open_store(place)) if store_of(place) else TokenFiles(place, self.code_shape)
        found.check_maker(self.fingerprint)
        return found

    @property
    def code_shape(self) -> CodeShape:
        """What codes of this tokenizer look like."""
        return CodeShape(len(self.grid()), self.num_codebooks, self.codebook_size)

    def show(self, x_hat: Tensor) -> Any:
        """One sample in the form of the files: a PIL image, or an array in the modality's own units. Undoes `read`."""
        has_channels = self.spec.labels is None or x_hat.is_floating_point()
        if x_hat.ndim > self.spec.rank + has_channels:
            if len(x_hat) != 1:
                raise ValueError(f"one sample is shown at a time, not {len(x_hat)}")
            x_hat = x_hat[0]
        if self.spec.labels is not None and x_hat.ndim > self.spec.rank:
            x_hat = x_hat.argmax(0)
        return self.modality.show(x_hat.detach().cpu())

    def check_input(self, x: Tensor) -> None:
        """Raise `ValueError` if `x` is not an input of this tokenizer; the text names the difference."""
        spec = self.spec
        wants = ("b", *(f"size{i}" for i in range(spec.rank)))
        if spec.labels is None:
            wants = ("b", str(spec.channels), *wants[1:])
        if x.ndim != len(wants) or (spec.labels is None and x.shape[1] != spec.channels):
            single = x.ndim == len(wants) - 1
            hint = "; a batch of one sample is x[None]" if single else ""
            raise ValueError(
                f"an input of this tokenizer is ({', '.join(wants)}), not {tuple(x.shape)}{hint}"
            )
        self.encoder.grid(tuple(x.shape[-spec.rank :]))
        if (spec.labels is None) != x.is_floating_point():
            raise ValueError(
                f"a {spec.kind} input is {'float' if spec.labels is None else 'integer'}, not {x.dtype}"
            )
        if spec.labels is not None and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < spec.labels:
            raise ValueError(f"class ids lie in 0..{spec.labels - 1}, found {int(x.min())}..{int(x.max())}")
        if spec.labels is None and not (finite := x.isfinite()).all():
            place = (~finite).nonzero()[0].tolist()
            raise ValueError(f"an input holds {x[tuple(place)].item()} at {place}; all values must be finite")

    def _check_mask(self, mask: Tensor, z: Float[Tensor, "b *grid d"]) -> None:
        """Raise `ValueError` unless a mask is bool and belongs to inputs that have these latents."""
        axes = self.spec.rank
        if mask.dtype != torch.bool or mask.ndim != axes + 1 or len(mask) != len(z):
            wanted = ", ".join((str(len(z)), *(f"size{i}" for i in range(axes))))
            raise ValueError(f"a mask is bool ({wanted}), not {mask.dtype} {tuple(mask.shape)}")
        grid, found = self.encoder.grid(tuple(mask.shape[1:])), tuple(z.shape[1:-1])
        if grid != found:
            raise ValueError(
                f"a mask of {tuple(mask.shape)} belongs to a grid of {list(grid)}, but the latents have {list(found)}"
            )

    def _as_codes(
        self, codes: Tensor | np.ndarray, size: tuple[int, ...] | None = None
    ) -> Int[Tensor, "b *grid q"]:
        """Codes of any integer type as int64, on the device. Raises `ValueError` if shape or type cannot be codes.

        Codes that have the grid of this size (default: the nominal one) and no axis for samples are one sample.
        """
        if isinstance(codes, np.ndarray):
            integer = codes.dtype.kind in "iu"
        else:
            integer = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
        axes, count = len(self.grid()), self.num_codebooks
        if codes.ndim == axes + 1:
            grids = [self.grid()]
            with contextlib.suppress(ValueError):  # a size that is for the decoder alone
                grids.append(self.grid(size))
            codes = codes[None] if tuple(codes.shape[:-1]) in grids else codes
        # Some quantizers decode fewer codes than they give, e.g. the first levels; they refuse what they cannot.
        if not integer or codes.ndim != axes + 2 or not 1 <= codes.shape[-1] <= count:
            wanted = ", ".join((*(f"grid{i}" for i in range(axes)), str(count)))
            raise ValueError(
                f"codes of this tokenizer are integers (b, {wanted}), not {codes.dtype} {tuple(codes.shape)}"
            )
        if isinstance(codes, np.ndarray):
            codes = torch.from_numpy(codes.astype(np.int64))
        return codes.long().to(self.device)

    def _warn_of_length(self, found: Prepared) -> None:
        """Warn once of a record of which only a part is read."""
        if not self._has_warned_of_length:
            self._has_warned_of_length = True
            extent, size = (" x ".join(map(str, sides)) for sides in (found.found.extent, found.size))
            log.warning(
                f"a record of {extent} positions is longer than the window of {size}: its middle is read. "
                "Tokenizer.encode_record encodes all of it."
            )

    def _check_range(self, x: Tensor, mask: Bool[Tensor, "b *size"] | None) -> None:
        """Warn once of values that exceed the declared range by more than its width, such as 0..255 in -1..1."""
        if self.spec.range is None or self._has_warned_of_range:
            return
        if mask is not None:
            x = x.movedim(1, -1)[mask.to(x.device)]
        if not x.numel():
            return
        (low, high), (least, most) = self.spec.range, map(float, x.aminmax())
        if max(low - least, most - high) > high - low:
            self._has_warned_of_range = True
            log.warning(
                f"the values of an input run from {least:.4g} to {most:.4g}, but this tokenizer was made for {low:.4g} "
                f"to {high:.4g}: the codes are not reliable. Tokenizer.read prepares files, pictures and arrays."
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256, as hex, of everything that decides the codes of an input and the latents of codes.

        It covers the settings of modality, encoder and quantizer (those at their default and those that matter in
        training only are left out; a renamed component keeps its first name), the hashes of the weights that these
        three borrow, and names, shapes and fp32 bytes of `embed`, `encoder`, `proj` and the quantizer's `token_state`.
        """
        named = {"encoder": self.cfg.model.encoder, "quantizer": self.cfg.model.quantizer}
        settings = {
            kind: deciding(cfg, kind, self.registry.identity)
            for kind, cfg in {"modality": self.cfg.modality, **named}.items()
        }
        deciders = ("modality.", "encoder.", "quantizer.")
        loans = {key: loan["sha256"] for key, loan in self.loans.items() if key.startswith(deciders)}
        if loans:
            settings["borrowed"] = loans
        digest = hashlib.sha256(f"vqcore-fingerprint-{FINGERPRINT_VERSION}".encode())
        digest.update(json.dumps(settings, sort_keys=True).encode())
        theirs = tuple(borrowed_prefixes(self))
        state = {f"quantizer.{key}": value for key, value in token_state(self.quantizer).items()}
        for part in ("embed", "encoder", "proj"):
            module = getattr(self, part)
            state |= {f"{part}.{key}": value for key, value in module.state_dict().items()} if module else {}
        state = (
            {key: value for key, value in state.items() if not key.startswith(theirs)} if theirs else state
        )
        for key in sorted(state):
            value = state[key].detach().cpu()
            value = value.float() if value.is_floating_point() else value.long()
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write an artefact (weights, config, provenance, model card) into a new folder.

        The folder appears only when it is complete. A tokenizer that was loaded keeps the data, metrics and versions
        of its provenance.
        """
        self._save(local(folder), provenance, ".")

    def push_to_hub(
        self,
        id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str = "vqcore tokenizer",
    ) -> str:
        """Upload the artefact to `user/name` on the Hugging Face hub and return its address.

        A missing repository is created. Needs huggingface_hub and a login (`hf auth login` or `HF_TOKEN`). `revision`
        is a branch.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "tokenizer"
            self._save(folder, None, f"{hub.PREFIX}{id}@{revision}" if revision else f"{hub.PREFIX}{id}")
            return hub.upload(folder, id, private=private, revision=revision, message=message)

    def _save(self, folder: Path, provenance: Mapping[str, Any] | None, address: str) -> None:
        made = without_places(provenance or provenance_of(self.cfg, **self.origin))
        with staged(folder, made) as staging:
            made = self.write(staging, self.fingerprint)
            suffix = next(iter(self.modality.suffixes), "")
            card = model_card(portable(self.cfg), self.facts(), made, suffix=suffix, address=address)
            write_text(staging / CARD, card)

    def write(self, staging: Path, fingerprint: str) -> dict[str, Any]:
        """Write weights and config into a folder that `staged` made; add to its provenance, and return all of it.

        `fingerprint` is that of the weights that users get: with averages, if there are any.
        """
        save_tensors(staging / WEIGHTS, weights_of(self))
        write_text(staging / CONFIG, dump(portable(self.cfg)))
        return note(
            staging, fingerprint=fingerprint, fingerprint_version=FINGERPRINT_VERSION, borrowed=self.loans
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        *,
        encoder_only: bool = False,
        weights: str = "auto",
        revision: str | None = None,
        format: str | Mapping[str, Any] | Config | None = None,
        allow_pickle: bool = False,
        borrowed: Mapping[str, str | Path] | None = None,
        download: bool = False,
        precision: Precision = "fp32",
        registry_: Registry | None = None,
    ) -> "Tokenizer":
        """A tokenizer, in eval mode, from a run folder (its last checkpoint, or the best by `eval.best`), a checkpoint
        (`RUN@step_N`), an artefact, the hub (`hf://user/name@revision`) or files of another system
        (`FORMAT[key=value]:PATH`, or `format`: a name or settings).

        `weights` is `model`, `ema` (running averages) or `auto` (averages if there are any). `revision` belongs to a
        hub id. Checksums and fingerprint are verified. Pickles are read only with `allow_pickle`. `borrowed` says
        where weights lie that the tokenizer borrows: `{"decoder.base": "weights/base.safetensors"}`; without, those of
        a run lie where the run's config says. With `download`, they are fetched from the hub if its cache lacks them.
        `precision` is that of encoding and decoding: with bf16 and fp16 the parts run under autocast, and codes may
        differ from those of fp32. Raises `CheckpointError` if something is missing, damaged or does not fit.
        """
        named = resolve(path, revision, format=format, allow_pickle=allow_pickle, registry_=registry_)
        if named.format is not None:
            if weights == "ema":
                raise CheckpointError(
                    f"{named}: weights=ema is for checkpoints of ours; use weights=auto. The format decides what it "
                    "reads."
                )
            foreign = read_foreign(
                named.path, named.format, source=named.source, allow_pickle=allow_pickle, registry_=registry_
            )
            tokenizer = cls.of(
                foreign,
                str(named),
                encoder_only=encoder_only,
                borrowed=borrowed,
                download=download,
                registry_=registry_,
            )
            tokenizer.precision = precision
            return tokenizer.to(device or "cpu").eval()
        folder = named.path
        made = verify(folder)
        cfg = read_config(folder, registry_)
        if named.run is not None:
            cfg = with_places(cfg, named.run, registry_)
        with asking(download or asked()):
            tokenizer = cls(cfg, encoder_only=encoder_only, fetch=False, registry_=registry_)
        tokenizer._borrow_all(borrowed, made.get("borrowed", {}), download)
        tokenizer.precision = precision
        tokenizer.load_weights(folder, weights)
        tokenizer.taken = named.why
        tokenizer.origin = {key: made[key] for key in ORIGIN if key in made}
        if (
            weights != "model" or not (folder / EMA).exists()
        ):  # fingerprint and metrics are those of the averages
            check_fingerprint(folder, made, tokenizer.fingerprint)
            tokenizer.origin["metrics"] = read_evaluation(folder).get("metrics", made.get("metrics", {}))
        else:
            tokenizer.origin.pop("metrics", None)
        return tokenizer.to(device or "cpu").eval()

    @classmethod
    def of(
        cls,
        foreign: Foreign,
        name: str,
        *,
        encoder_only: bool = False,
        borrowed: Mapping[str, str | Path] | None = None,
        download: bool = False,
        registry_: Registry | None = None,
    ) -> "Tokenizer":
        """A tokenizer of what a format read, in eval mode; `name` is for errors, all else as in `load`."""
        with asking(download or asked()):
            tokenizer = cls(foreign.config, encoder_only=encoder_only, fetch=False, registry_=registry_)
        tokenizer._borrow_all(borrowed, {}, download)
        tokenizer.fill(foreign.tensors, name)
        tokenizer.origin = {"origin": dict(foreign.origin)}
        return tokenizer.eval()

    def _borrow_all(
        self, places: Mapping[str, str | Path] | None, recorded: Mapping[str, Any], download: bool
    ) -> None:
        lender = Lender(
            {key: str(place) for key, place in (places or {}).items()}, recorded, download=download
        )
        self.borrow(lender)
        # Riders are no part of a tokenizer, but an evaluation of it must know which weights they had.
        self.loans |= {key: loan for key, loan in recorded.items() if key.startswith("extra.")}
        lender.refuse_unused(("objective", "extra", *(() if self.decoder is not None else ("decoder",))))

    def load_weights(self, folder: Path, weights: str = "auto") -> None:
        """Fill this tokenizer with a folder's weights. A missing, unknown or misshapen tensor is an error."""
        self.fill(read_weights(folder, weights), str(folder))

    def fill(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take over weights by name; `source` is for the text of the error. Names and shapes must match exactly."""
        if self.decoder is None:
            state = {key: value for key, value in state.items() if not key.startswith("decoder.")}
        own = weights_of(self)
        wrong = [key for key in own if key not in state or own[key].shape != state[key].shape]
        wrong += [key for key in state if key not in own]
        if wrong:
            raise CheckpointError(
                f"{source}: its weights do not fit its config: {wrong[0]} and {len(wrong) - 1} more."
            )
        self.load_state_dict(state, strict=False)


def _part(module: nn.Module) -> Part:
    theirs = tuple(borrowed_prefixes(module))
    lent = [t for name, t in module.state_dict(keep_vars=True).items() if theirs and name.startswith(theirs)]
    away = set(map(id, lent))
    own = [p for p in module.parameters() if id(p) not in away]
    return Part(
        parameters=sum(p.numel() for p in own),
        trained=sum(p.numel() for p in own if p.requires_grad),
        buffers=sum(b.numel() for b in module.buffers() if id(b) not in away),
        borrowed=sum(t.numel() for t in lent),
    )


@contextlib.contextmanager
def _fits(where: str) -> Iterator[None]:
    """Raise `ConfigError` with this key if what is built inside the block does not fit into memory."""
    try:
        with within_memory():
            yield
    except TooLarge as error:
        raise ConfigError(f"{where}: {error}.") from error


def _check_pair(tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` unless the decoder is of the kind that the objective trains: plain, or a denoiser."""
    catalogue = tokenizer.registry
    wants = needs_denoiser(tokenizer.objective)
    if wants == is_denoiser(tokenizer.decoder):
        return
    cfg = tokenizer.cfg
    fitting = []
    for found in catalogue.components("decoder"):
        with contextlib.suppress(VqcoreError):
            if is_denoiser(catalogue.load("decoder", found.name)) == wants:
                fitting.append(found.name)
    kinds = ("a denoiser", "maps latents to the input") if wants else ("a plain decoder", "is a denoiser")
    raise ConfigError(
        f"objective '{cfg.objective.name}' needs {kinds[0]}; '{cfg.model.decoder.name}' {kinds[1]}. "
        f"Installed decoders that fit: {listed(fitting) or 'none'}."
    )


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        if was_training:
            module.train()


def cells(mask: Bool[Tensor, "b *size"], grid: Sequence[int]) -> Bool[Tensor, "b *grid"]:
    """The positions of a grid of tokens that are valid: those with a valid position of the sample in their cell."""
    if mask.ndim - 1 != len(grid):  # tokens without a place: all valid if anything is
        valid = mask.flatten(1).any(1)
        return valid.reshape(-1, *[1] * len(grid)).expand(-1, *grid)
    pool = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[len(grid) - 1]
    return pool(mask.float().unsqueeze(1), tuple(grid)).squeeze(1) > 0
