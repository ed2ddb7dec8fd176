"""Methods of the package `vector-quantize-pytorch` (optional dependency) with the protocol of a vqcore quantizer.

https://github.com/lucidrains/vector-quantize-pytorch lists the paper of each method and option.
Differs from the library: invalid positions count in no statistic and no loss; a step with a latent that is not finite
does not train; the loss is 0 in evaluation. Classes of the library that are not quantizers between an encoder and a
decoder are left out: `RandomProjectionQuantizer` (it has no decoding), `EvoLFQ`, `BinaryMapper`.
"""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import vqcore.config
from vqcore import dist
from vqcore.config import at_least
from vqcore.errors import PluginLoadError, SettingError, cannot_import, did_you_mean
from vqcore.protocols import Quantized
from vqcore_quant.codes import in_range
from vqcore_quant.ranges import check_ranges
from vqcore_quant.usage import step_metrics, validity

Method = Literal[
    "vq",
    "residual-vq",
    "grouped-residual-vq",
    "residual-sim-vq",
    "residual-lfq",
    "residual-fsq",
    "latent",
    "fsp",
]
Option = bool | int | float | str | tuple[int, ...] | None

_CLASSES: dict[str, str] = {
    "vq": "VectorQuantize",
    "residual-vq": "ResidualVQ",
    "grouped-residual-vq": "GroupedResidualVQ",
    "residual-sim-vq": "ResidualSimVQ",
    "residual-lfq": "ResidualLFQ",
    "residual-fsq": "ResidualFSQ",
    "latent": "LatentQuantize",
    "fsp": "FSP",
}
_OF_LEVELS = ("residual-fsq", "latent", "fsp")
_OF_ONE_CODE = ("latent", "fsp")
_OF_CODES = ("_codebook.embed", "code_transform.weight")
"""Endings of the names of the library's parameters that hold codes."""


class VQP(nn.Module):
    """A quantizer (see `vqcore.protocols.Quantizer`) that wraps a module of the library, `inner` in the state dict.

    The only loss is `vqp/loss`. Build the quantizer after the process group exists: the library reads the process group
    when its module is built.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(vqcore.config.Config):
        """Settings of `quant/vqp`."""

        method: Method
        """The quantizer of the library."""
        latent_dim: int
        """Width of a latent."""
        codebook_size: int | None = None
        """Number of codes; for all methods except residual-fsq, latent and fsp."""
        levels: tuple[int, ...] | None = None
        """Number of levels of each channel; only for residual-fsq, latent and fsp."""
        num_codebooks: int = 1
        """Number of codes per position: heads of vq, or levels of a residual method (times groups)."""
        options: dict[str, Option] = field(default_factory=dict)
        """Further arguments of the library's class, with the library's names."""

        def __post_init__(self) -> None:
            check_ranges(self, counts=("latent_dim", "num_codebooks"))
            wanted, other = (
                ("levels", "codebook_size") if self.method in _OF_LEVELS else ("codebook_size", "levels")
            )
            if getattr(self, wanted) is None or getattr(self, other) is not None:
                raise SettingError("method", f"{self.method} needs {wanted} and takes no {other}")
            if self.method in _OF_ONE_CODE and self.num_codebooks != 1:
                raise SettingError(
                    "num_codebooks", f"{self.num_codebooks}: method={self.method} allows only 1"
                )
            at_least(self, codebook_size=2)

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.inner = _build(cfg)
        self.without_decay = tuple(name for name, _ in self.named_parameters() if name.endswith(_OF_CODES))
        self.dim, self.num_codebooks = cfg.latent_dim, cfg.num_codebooks
        self.codebook_size: int = cfg.codebook_size or int(torch.tensor(cfg.levels).prod())

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Quantize. `mask` is True at valid positions."""
        valid = validity(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            latents = z.float()
            rows, counted = rearrange(latents, "b ... d -> (b ...) d"), valid.flatten()
            if self.training and self._usable(rows[counted]):
                z_q, codes, loss = self._learn(rows, counted)
            else:
                z_q, codes = self._evaluate(rows)
                loss = (0 * rows[counted]).sum()  # 0, or not finite if a latent is not finite
            z_q, codes = z_q.reshape(z.shape), codes.reshape(*z.shape[:-1], self.num_codebooks)
            metrics = step_metrics(z, latents, z_q, codes, valid, self.codebook_size, training=self.training)
        return Quantized(z_q.to(z.dtype), codes, {"vqp/loss": loss}, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """Look up the codes. Raises ValueError for a code that is out of range."""
        codes = in_range(codes, self.codebook_size)
        with torch.autocast(codes.device.type, enabled=False):
            return self._decode(codes.flatten(0, -2)).reshape(*codes.shape[:-1], self.dim)

    def _usable(self, rows: Float[Tensor, "n d"]) -> bool:
        """True if every process has rows and all rows are finite. The library's collectives need all processes."""
        problems = torch.tensor([float(len(rows) == 0), float(not rows.isfinite().all())], device=rows.device)
        return not bool(dist.sum_(problems).any())

    def _learn(
        self, rows: Float[Tensor, "n d"], counted: Bool[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n q"], Float[Tensor, ""]]:
        """Train on the rows that count; quantize the other rows in evaluation mode."""
        z_q, codes = self._evaluate(rows)
        learned, chosen, loss = self._ask(rows[counted])
        z_q = z_q.index_put((counted,), learned)
        return z_q, codes.index_put((counted,), chosen), loss

    def _evaluate(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n q"]]:
        training = self.inner.training
        self.inner.eval()
        try:
            z_q, codes, _ = self._ask(rows)
        finally:
            self.inner.train(training)
        return z_q, codes

    def _ask(
        self, rows: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n q"], Float[Tensor, ""]]:
        if not len(rows):  # the library takes none
            return rows, rows.new_zeros((0, self.num_codebooks), dtype=torch.long), rows.new_zeros(())
        x = rearrange(rows, "n d -> 1 d n" if self.cfg.method == "latent" else "n d -> 1 n d")
        z_q, codes, *rest = self.inner(x)
        z_q = rearrange(z_q, "1 d n -> n d" if self.cfg.method == "latent" else "1 n d -> n d")
        if self.cfg.method == "grouped-residual-vq":
            codes = rearrange(codes, "g 1 n q -> n (g q)")
        loss = rest[0].sum() if rest else rows.new_zeros(())
        # The library marks a dropped level with the code -1.
        return z_q, codes.reshape(len(rows), self.num_codebooks).long().clamp(min=0).contiguous(), loss

    def _decode(self, codes: Int[Tensor, "n q"]) -> Float[Tensor, "n d"]:
        if not len(codes):  # the library takes none
            return torch.empty(0, self.dim, device=codes.device)
        inner: Any = self.inner
        if self.cfg.method == "latent":
            return rearrange(inner.indices_to_codes(rearrange(codes, "n 1 -> 1 n")), "1 d n -> n d")
        if self.cfg.method == "fsp":
            return inner.indices_to_codes(rearrange(codes, "n 1 -> n"))
        if self.cfg.method == "grouped-residual-vq":
            codes = rearrange(codes, "n (g q) -> g 1 n q", g=inner.groups)
        elif self.cfg.method == "vq" and self.num_codebooks == 1:
            codes = rearrange(codes, "n 1 -> 1 n")
        else:
            codes = rearrange(codes, "n q -> 1 n q")
        return rearrange(inner.get_output_from_indices(codes), "1 n d -> n d")


def _build(cfg: VQP.Config) -> nn.Module:
    try:
        library = importlib.import_module("vector_quantize_pytorch")
    except ImportError as error:
        why = cannot_import(error, "vector_quantize_pytorch", "vector-quantize-pytorch")
        raise PluginLoadError(f"quant/vqp: {why}") from error
    cls, arguments = getattr(library, _CLASSES[cfg.method]), _wiring(cfg)
    known = _arguments(library, cls)
    for name in cfg.options:
        if name in arguments and name != "groups":
            raise ValueError(
                f"options.{name}: the other settings of quant/vqp already give this argument; remove the option"
            )
        if name not in known:
            raise ValueError(
                f"options.{name} is not an argument of {cls.__name__}.{did_you_mean(name, known)}"
            )
    try:
        return cls(**arguments, **{k: v for k, v in cfg.options.items() if k not in arguments})
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{cls.__name__} does not accept options={dict(cfg.options)}: {error}") from error


def _arguments(library: Any, cls: type) -> set[str]:
    """Names of the arguments of a class; a class with **kwargs also takes those of the library's other classes."""
    known = inspect.signature(cls).parameters
    names = {p.name for p in known.values() if p.kind is not p.VAR_KEYWORD}
    if len(names) < len(known):
        for inner in (*_CLASSES.values(), "FSQ", "LFQ", "SimVQ"):
            names |= set(inspect.signature(getattr(library, inner)).parameters)
    return names


def _wiring(cfg: VQP.Config) -> Mapping[str, Any]:
    """Our settings as arguments of the library's class."""
    size = {"levels": list(cfg.levels)} if cfg.levels else {"codebook_size": cfg.codebook_size}
    found: dict[str, Any] = {"dim": cfg.latent_dim, **size}
    if cfg.method == "vq":
        return found | {"heads": cfg.num_codebooks, "separate_codebook_per_head": cfg.num_codebooks > 1}
    if cfg.method == "grouped-residual-vq":
        groups: Any = cfg.options.get("groups", 2)
        if cfg.num_codebooks % groups:
            raise ValueError(f"num_codebooks={cfg.num_codebooks} is not divisible by groups={groups}")
        return found | {"groups": groups, "num_quantizers": cfg.num_codebooks // groups}
    return found if cfg.method in _OF_ONE_CODE else found | {"num_quantizers": cfg.num_codebooks}
