"""The nearest of centres that k-means has found.

Paper: Lloyd, "Least squares quantization in PCM" (1982); groups: "Product quantization for nearest neighbor search",
Jégou et al. (2011). The same code that makes the baseline of evaluations (`vqcore.evaluate.kmeans`): ten steps, seeds
with the chances of k-means++.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqcore import config
from vqcore.config import at_least
from vqcore.errors import DataError, SettingError
from vqcore.evaluate import kmeans
from vqcore_fit.fitted import Fitted, Sample, enough


class KMeans(Fitted):
    """Replace a latent by the nearest centre; with several codebooks, each equal part of the latent by its own."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `fit/kmeans`."""

        latent_dim: int
        """Values of a latent: channels times positions of a patch."""
        codebook_size: int = 1024
        """Number of centres of a codebook."""
        num_codebooks: int = 1
        """Equal parts of a latent, each with its own centres and its own code."""
        samples: int = 2**17
        """Most positions that are kept; of more positions so many are drawn, and fewer if they are very wide."""

        def __post_init__(self) -> None:
            at_least(self, latent_dim=1, codebook_size=2, num_codebooks=1, samples=1)
            if self.latent_dim % self.num_codebooks:
                raise SettingError(
                    ("num_codebooks", "latent_dim"),
                    f"latent_dim={self.latent_dim} cannot be cut into num_codebooks={self.num_codebooks} equal parts",
                )

    centres: Tensor

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.num_codebooks = cfg.num_codebooks
        self.register_buffer(
            "centres", torch.zeros(cfg.num_codebooks, cfg.codebook_size, self.dim // cfg.num_codebooks)
        )

    def learned(self, sample: Sample, rng: torch.Generator) -> dict[str, str]:
        """Find the centres. Raises `DataError` if there are fewer different patches than centres."""
        enough(self.cfg, sample)
        rows = sample.rows()
        how = kmeans.Split(self.num_codebooks, self.codebook_size)
        centres, steps = kmeans.fit(rows.to(self.centres.device), how, rng)
        least = min(map(len, centres))
        if least < self.codebook_size:
            raise DataError(
                f"model.quantizer ({self.cfg.name}): codebook_size={self.codebook_size}, but only {least} different "
                f"latents are among {len(rows):,}. Take fewer codes, or more samples."
            )
        self.centres.copy_(torch.stack(centres))
        return {"centres": f"{self.num_codebooks} x {self.codebook_size:,}", "steps": str(steps)}

    def encoded(self, rows: Float[Tensor, "n d"]) -> Int[Tensor, "n q"]:
        """The nearest centre of each part."""
        found = []
        for part, own in zip(rows.chunk(self.num_codebooks, 1), self.centres):
            middle = own.mean(0)  # far from 0, distances lose their digits
            found.append(kmeans.nearest(part - middle, own - middle)[0])
        return torch.stack(found, 1)

    def values(self, codes: Int[Tensor, "n q"]) -> Float[Tensor, "n d"]:
        """The centres of codes, side by side."""
        return torch.cat([own[column] for own, column in zip(self.centres, codes.T)], 1)
