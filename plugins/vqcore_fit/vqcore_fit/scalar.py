"""One code for each column: the interval in which its value lies.

Quantile and logarithmic intervals are what AION-1 (arXiv 2510.17960) uses for the scalars of catalogues.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqcore import config
from vqcore.config import at_least
from vqcore.errors import DataError, SettingError
from vqcore_fit.fitted import Fitted, Sample, enough, numbers

Method = Literal["uniform", "quantile", "log"]


class Scalar(Fitted):
    """Cut the values of each column into `codebook_size` intervals; a position has one code for each column.

    uniform: intervals of one width from the least value to the largest; a value lies at most half a width from the
    middle of its interval, for which the code stands. log: the same with the logarithms, for values above 0: the
    relative error is bounded. quantile: intervals with equally many values of the training samples, and the code stands
    for their mean. Values beyond the fitted range get the first or the last code.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `fit/scalar`."""

        latent_dim: int
        """Number of columns: channels times positions of a patch."""
        codebook_size: int = 1024
        """Number of intervals of a column."""
        method: Method | tuple[Method, ...] = "quantile"
        """uniform, quantile or log: one for all columns, or a list with one for each column."""
        samples: int = 2**20
        """Most positions that are kept to find quantiles; of more positions so many are drawn. The least and the
        largest value are those of all."""

        def __post_init__(self) -> None:
            at_least(self, latent_dim=1, codebook_size=2, samples=1)
            if not isinstance(self.method, str) and len(self.method) != self.latent_dim:
                raise SettingError(
                    ("method", "latent_dim"),
                    f"method has {len(self.method)} entries for latent_dim={self.latent_dim} columns: give one, or one "
                    "for each column",
                )

    edges: Tensor
    centres: Tensor

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.num_codebooks = cfg.latent_dim
        self.methods = (cfg.method,) * self.dim if isinstance(cfg.method, str) else cfg.method
        self.register_buffer("edges", torch.zeros(self.dim, self.codebook_size - 1))
        self.register_buffer("centres", torch.zeros(self.dim, self.codebook_size))
        self.register_buffer("bounds", torch.zeros(self.dim, 2))

    bounds: Tensor

    def learned(self, sample: Sample, rng: torch.Generator) -> dict[str, str]:
        """Place the intervals. Raises `DataError` for columns that have one value, or no logarithm."""
        if constant := (sample.low == sample.high).nonzero().flatten().tolist():
            raise DataError(
                f"model.quantizer ({self.cfg.name}): {numbers(constant)} (from 0): all {sample.count:,} values are the "
                f"same, {float(sample.low[constant[0]]):g}. Leave out what never changes."
            )
        for column, method in enumerate(self.methods):
            least = float(sample.low[column])
            if method == "log" and least <= 0:
                raise DataError(
                    f"model.quantizer ({self.cfg.name}): column {column} (from 0) has the value {least:g}, and "
                    "method=log is for values above 0, as the tokenizer sees them (after data.modality.scale). "
                    "method=quantile takes all values."
                )
        if "quantile" in self.methods:
            enough(self.cfg, sample)
        for column, method in enumerate(self.methods):
            low, high = sample.low[column].double(), sample.high[column].double()
            if method == "quantile":
                edges, centres = quantiles(sample.rows()[:, column], self.codebook_size)
            elif method == "log":
                edges, centres = (part.exp() for part in equal(low.log(), high.log(), self.codebook_size))
            else:
                edges, centres = equal(low, high, self.codebook_size)
            self.edges[column], self.centres[column] = edges, centres
        self.bounds.copy_(torch.stack([sample.low, sample.high], 1))
        counts = {method: self.methods.count(method) for method in dict.fromkeys(self.methods)}
        return {"columns": ", ".join(f"{count} {method}" for method, count in counts.items())}

    def encoded(self, rows: Float[Tensor, "n d"]) -> Int[Tensor, "n q"]:
        """The interval of each value."""
        return torch.searchsorted(self.edges, rows.T.contiguous(), right=True).T.contiguous()

    def values(self, codes: Int[Tensor, "n q"]) -> Float[Tensor, "n d"]:
        """The value for which each code stands."""
        return self.centres.gather(1, codes.T).T.contiguous()

    def measured(self, rows: Float[Tensor, "n d"], codes: Int[Tensor, "n q"]) -> dict[str, Tensor]:
        """`codes/outside`: the share of values beyond the fitted range."""
        low, high = self.bounds.unbind(1)
        outside = (rows < low) | (rows > high)
        return {"codes/outside": outside.sum() / max(1, outside.numel())}


def equal(low: Tensor, high: Tensor, count: int) -> tuple[Float[Tensor, " edges"], Float[Tensor, " k"]]:
    """Edges between intervals of one width, and their middles."""
    places = torch.arange(2 * count, dtype=torch.float64) / (2 * count)
    values = low + (high - low) * places
    return values[2::2], values[1::2]


def quantiles(values: Float[Tensor, " n"], count: int) -> tuple[Float[Tensor, " edges"], Float[Tensor, " k"]]:
    """Edges between intervals with equally many values, and the mean of each one.

    An interval begins with a value of the sample. Where one value is so frequent that several edges fall on it, only
    the last of these intervals has values.
    """
    ordered = values.sort().values
    edges = ordered[-(-torch.arange(1, count) * len(ordered) // count)]
    codes = torch.searchsorted(edges, ordered, right=True)
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, codes, ordered.double())
    sizes = torch.bincount(codes, minlength=count)
    means = (sums / sizes.clamp(min=1)).float()
    first = torch.cat([ordered[:1], edges])  # an interval without values has none to give
    return edges, torch.where(sizes > 0, torch.maximum(means, first), first)
