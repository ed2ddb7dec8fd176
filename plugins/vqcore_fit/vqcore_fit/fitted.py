"""What the quantizers of this plugin share: the state `fitted`, a call, and a sample of bounded size of all latents."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqcore.errors import ConfigError, DataError
from vqcore.protocols import Quantized

MOST_VALUES = 2**26
"""Most values that are kept of all latents (256 MiB)."""


class Fitted(nn.Module):
    """A quantizer with fixed codes. A child class has `num_codebooks`, `encoded`, `values` and `learned`.

    `encoded` maps rows of latents to codes, `values` maps codes to rows of latents, `learned` takes over what a sample
    of the latents says. The latents of a call are quantized in fp32 at every precision.
    """

    codes_in_fp32 = True
    num_codebooks: int
    fitted: Tensor

    def __init__(self, cfg: Any):
        super().__init__()
        self.cfg, self.dim, self.codebook_size = cfg, cfg.latent_dim, cfg.codebook_size
        self.register_buffer("fitted", torch.tensor(False))

    def encoded(self, rows: Float[Tensor, "n d"]) -> Int[Tensor, "n q"]:
        """The codes of latents."""
        raise NotImplementedError

    def values(self, codes: Int[Tensor, "n q"]) -> Float[Tensor, "n d"]:
        """The latents of codes that are in range."""
        raise NotImplementedError

    def learned(self, sample: "Sample", rng: torch.Generator) -> dict[str, str]:
        """Take over what a sample of the latents says; returns facts for people."""
        raise NotImplementedError

    def measured(self, rows: Float[Tensor, "n d"], codes: Int[Tensor, "n q"]) -> dict[str, Tensor]:
        """Metrics of valid rows and their codes."""
        return {}

    def fit(self, latents: Iterable[tuple[Tensor, Tensor | None]], rng: torch.Generator) -> dict[str, str]:
        """Fit to latents, in one pass. Raises `DataError` if they cannot be used."""
        sample = Sample(max(1, min(self.cfg.samples, MOST_VALUES // self.dim)), rng)
        for z, mask in latents:
            sample.add((z.flatten(0, -2) if mask is None else z[mask]).float())
        if not sample.count:
            raise DataError(f"{self.cfg.name}: no position of the training samples is valid.")
        facts = self.learned(sample, rng)
        self.fitted.fill_(True)
        kept = len(sample.rows())
        return {
            "positions": f"{sample.count:,}" + (f", of these {kept:,} kept" * (kept < sample.count)),
            **facts,
        }

    def forward(
        self, z: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Quantized:
        """Quantize latents. `mask` (True: valid) affects the metrics only. Raises `ConfigError` before `fit`."""
        self._check_fitted()
        with torch.autocast(z.device.type, enabled=False):
            rows = z.detach().float().flatten(0, -2)
            codes = self.encoded(rows)
            z_q = self.values(codes)
            valid = slice(None) if mask is None else mask.flatten()
            error = (rows[valid] - z_q[valid]).square()
            metrics = {"codes/distance": error.sum() / max(1, error.numel())}
            metrics |= self.measured(rows[valid], codes[valid])
        z_q = z_q.reshape(z.shape).to(z.dtype)
        if self.training:
            z_q = z_q + (z - z.detach())  # straight through
        return Quantized(z_q, codes.reshape(*z.shape[:-1], self.num_codebooks), {}, metrics)

    def decode(self, codes: Int[Tensor, "b *grid q"]) -> Float[Tensor, "b *grid d"]:
        """The latents of codes. Raises `ValueError` for a code that is out of range, `ConfigError` before `fit`."""
        self._check_fitted()
        codes = codes.long()
        outside = codes[(codes < 0) | (codes >= self.codebook_size)]
        if len(outside):
            raise ValueError(
                f"code {int(outside[0])} is out of range: codes lie in [0, {self.codebook_size})"
            )
        if codes.shape[-1] != self.num_codebooks:
            raise ValueError(f"a position has {self.num_codebooks} codes, not {codes.shape[-1]}")
        return self.values(codes.flatten(0, -2)).reshape(*codes.shape[:-1], self.dim)

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise ConfigError(
                f"model.quantizer ({self.cfg.name}): is not fitted yet, and training does not fit it. Run: vqcore fit "
                "CONFIG. To train another decoder on the codes, start from the result: model.full_ckpt=RUN "
                "model.freeze_enc=true"
            )


class Sample:
    """At most `most` rows, drawn from all rows that were added, each with the same chance; and facts of all rows.

    `count` is the number of all rows; `low` and `high` have the least and the largest value of each column. The draws
    follow from `rng` alone.
    """

    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]

    def __init__(self, most: int, rng: torch.Generator):
        self.most, self.rng, self.count = most, rng, 0
        self._rows: list[Tensor] = []
        self._draws: list[Tensor] = []

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Add rows. Raises `DataError` for values that are not finite."""
        if not len(rows):
            return
        rows = rows.detach().cpu()
        wrong = (~rows.isfinite()).sum(0)
        if wrong.any():
            column = int(wrong.argmax())
            raise DataError(
                f"the training samples: {int(wrong[column])} of {len(rows)} values of column {column} are NaN or "
                "infinite. Repair the files, or say which values are missing (data.modality.nodata of arrays)."
            )
        low, high = rows.aminmax(dim=0)
        self.low = low if not self.count else torch.minimum(low, self.low)
        self.high = high if not self.count else torch.maximum(high, self.high)
        self.count += len(rows)
        self._rows.append(rows)
        self._draws.append(torch.rand(len(rows), generator=self.rng, dtype=torch.float64))
        if sum(map(len, self._rows)) > 2 * self.most:
            self._thin()

    def rows(self) -> Float[Tensor, "n d"]:
        """The rows that are kept, on the CPU."""
        self._thin()
        return self._rows[0]

    def _thin(self) -> None:
        rows, draws = torch.cat(self._rows), torch.cat(self._draws)
        if len(rows) > self.most:
            kept = draws.topk(self.most, largest=False).indices.sort().values
            rows, draws = rows[kept], draws[kept]
        self._rows, self._draws = [rows], [draws]


def enough(cfg: Any, sample: Sample) -> None:
    """Raise `DataError` if there are fewer positions than codes."""
    if sample.count < cfg.codebook_size:
        raise DataError(
            f"model.quantizer ({cfg.name}): codebook_size={cfg.codebook_size}, but the training samples have only "
            f"{sample.count:,} positions. Take fewer codes, or more samples (run.epochs, data.path)."
        )
    if sample.most < cfg.codebook_size:
        raise DataError(
            f"model.quantizer ({cfg.name}): codebook_size={cfg.codebook_size}, but only {sample.most:,} positions are "
            "kept. Take fewer codes, or a larger model.quantizer.samples."
        )


def numbers(columns: Iterable[int]) -> str:
    """Columns for people: the first few."""
    found = list(columns)
    shown = ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return f"column {shown}" if len(found) == 1 else f"columns {shown}"
