"""Do codes say what a sample is, or only where they are? Collision entropies of the codes of an evaluation.

At one position of the grid, two samples share the code with some chance; -log2 of this chance is the collision entropy
there, in bits. It is 0 if the position decides the code. At two random positions the chance is that of codes which
know nothing about their place. Both chances are estimated without bias, from pairs of different samples that have a
valid code there.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from vqcore import dist

POSITIONS = 1024
"""At most so many positions of the grid are looked at, spread evenly over the grid."""
CELLS = 2**22
"""Counters in memory. With more positions times codes than counters, codes share a counter, and the share of the pairs
that this makes equal is taken off."""
NAMES = "codes/bits_at_position", "codes/bits_anywhere"


class Collisions:
    """Counts of each code at each position, over all samples of an evaluation. Memory is bounded by `CELLS`."""

    def __init__(self, codebook_size: int, num_codebooks: int):
        self.size, self.books = codebook_size, num_codebooks
        self.places = torch.zeros(0, dtype=torch.int64)
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.within = torch.zeros(
            num_codebooks, dtype=torch.float64
        )  # pairs of equal codes inside one sample
        self.inside = torch.zeros((), dtype=torch.float64)  # pairs of codes inside one sample

    @property
    def cells(self) -> int:
        """Counters for each position and codebook."""
        return min(self.size, max(2, CELLS // (self.books * max(1, len(self.places)))))

    def add(self, codes: Int[Tensor, "b *grid q"], valid: Bool[Tensor, "b *grid"] | None = None) -> None:
        """Add a batch's codes, those that are `valid`; all batches have the same grid."""
        rows = rearrange(codes.detach(), "b ... q -> q b (...)").cpu().long()
        if not len(self.places):
            positions = rows.shape[2]
            kept = min(positions, POSITIONS)
            self.places = torch.arange(kept) * positions // kept
            self.counts = torch.zeros(self.books, kept, self.cells, dtype=torch.int64)
        rows = rows[:, :, self.places]
        known = torch.ones_like(rows[0], dtype=torch.bool)
        if valid is not None:
            known = valid.flatten(1).cpu()[:, self.places]
        if self.cells < self.size:
            rows = _mixed(rows) % self.cells
        for book, each in enumerate(rows):
            flat = (torch.arange(len(self.places)) * self.cells + each)[known]
            self.counts[book].view(-1).index_add_(0, flat, torch.ones_like(flat))
            keys = (torch.arange(len(each)).unsqueeze(1) * self.cells + each)[known]
            self.within[book] += keys.unique(return_counts=True)[1].double().square().sum()
        self.inside += known.sum(1).double().square().sum()

    def metrics(self) -> dict[str, float]:
        """The two collision entropies in bits, means over codebooks; nothing without two samples or positions.

        All processes call this method together.
        """
        # A process without a sample does not know the grid.
        width = int(dist.max_(torch.tensor([len(self.places)])))
        if width < 2:
            return {}
        if not len(self.places):
            self.places = torch.arange(width)
            self.counts = torch.zeros(self.books, width, self.cells, dtype=torch.int64)
        counts, within = dist.sum_(self.counts.clone()).double(), dist.sum_(self.within.clone())
        known = counts[0].sum(1)
        pairs = float((known * (known - 1)).sum())
        all_pairs = float(known.sum().square() - dist.sum_(self.inside.clone()))
        if not pairs:
            return {}
        everywhere = counts.sum(1)
        here = (counts * (counts - 1)).sum((1, 2)) / pairs
        anywhere = (everywhere.square().sum(1) - within) / all_pairs
        found = (self._bits(here, pairs), self._bits(anywhere, all_pairs))
        return dict(zip(NAMES, found, strict=True))

    def _bits(self, chances: Tensor, pairs: float) -> float:
        """-log2 of the chances, mean over codebooks. So few pairs may have no equal codes: then a bound."""
        if self.cells < self.size:
            chances = (chances - 1 / self.cells) / (1 - 1 / self.cells)
        return math.fsum((-chances.clamp(min=1 / pairs, max=1).log2()).tolist()) / self.books


def _mixed(codes: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Other numbers for codes, spread over all bits that a codebook may have (multiplication and shift; wraps)."""
    mixed = codes * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E01
    return ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5) >> 20 & 0x7FFFFFFF
