"""Byte-pair codes of rounded coefficients: with `fit/dct` as encoder and decoder, the action tokenizer FAST.

Paper: "FAST: Efficient Action Tokenization for Vision-Language-Action Models", arXiv 2501.09747, section V. A latent
is multiplied by `scale` and rounded; byte-pair encoding (arXiv 1508.07909) then joins pairs of neighbouring numbers
that are frequent. Differs from the paper: a position has a fixed number of codes. A shorter sequence is filled up with
the code 0, and a longer one is cut, which loses its last numbers, the highest frequencies. Values are scaled by the
modality, and not here by the quantiles of the samples. Numbers beyond those of the samples become the nearest of them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, trainers
from torch import Tensor

from vqcore import config
from vqcore.config import above_zero, at_least
from vqcore.errors import DataError
from vqcore_fit.fitted import Fitted, Sample

_FIRST = 0x10000
"""The letter of the least number: from here on, every code point is a letter."""


class FAST(Fitted):
    """Round latents and write them as byte-pair codes, `num_codebooks` codes for each position.

    The code 0 means nothing; `decode` skips it wherever it stands, and takes 0 for numbers that no code gives.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `fit/fast`."""

        latent_dim: int
        """Numbers of a latent: channels times positions of a patch."""
        num_codebooks: int
        """Codes of a position. Shorter sequences are filled up, longer ones are cut; `vqcore fit` says how many are."""
        codebook_size: int = 1024
        """Number of codes, with the code 0, which fills up."""
        scale: float = 10.0
        """Factor of the coefficients before they are rounded: larger is finer, and makes longer sequences."""
        samples: int = 2**14
        """Most positions that are kept to learn the pairs; of more positions so many are drawn."""

        def __post_init__(self) -> None:
            at_least(self, latent_dim=1, codebook_size=3, num_codebooks=1, samples=1)
            above_zero(self, "scale")

    span: Tensor
    pairs: Tensor

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.num_codebooks = cfg.num_codebooks
        # The least and the largest number, and the codes that are joined, in the order in which they were learned.
        self.register_buffer("span", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("pairs", torch.full((cfg.codebook_size, 2), -1))

    def learned(self, sample: Sample, rng: torch.Generator) -> dict[str, str]:
        """Learn the pairs. Raises `DataError` if the coefficients take more values than there are codes."""
        low, high = (int((edge * self.cfg.scale).round()) for edge in (sample.low.min(), sample.high.max()))
        if high - low + 1 > self.codebook_size - 1:
            fits = self.cfg.scale * (self.codebook_size - 2) / (high - low + 1)
            digits = 10.0 ** (math.floor(math.log10(fits)) - 1)
            fits = math.floor(fits / digits) * digits  # two digits, rounded down
            raise DataError(
                f"model.quantizer ({self.cfg.name}): with scale={self.cfg.scale:g} the coefficients are {low} to "
                f"{high}, which is more than codebook_size={self.codebook_size} codes can name. Take scale={fits:.2g}, "
                "more codes, or scale the values (data.modality.scale)."
            )
        self.span.copy_(torch.tensor([low, high]))
        found = learned_pairs(self._texts(sample.rows()), low, high, self.codebook_size - 1)[
            : len(self.pairs)
        ]
        self.pairs.fill_(-1)
        self.pairs[: len(found)] = torch.tensor(found, dtype=torch.int64).view(-1, 2)
        lengths = self._lengths(sample.rows()[:4096])
        cut = (lengths > self.num_codebooks).mean()
        return {
            "numbers": f"{low} to {high}",
            "pairs": f"{len(found):,}",
            "codes": f"{lengths.mean():.1f} a position on average, {lengths.max()} at most, of {self.num_codebooks}; "
            f"{cut:.1%} of the positions are cut",
        }

    def encoded(self, rows: Float[Tensor, "n d"]) -> Int[Tensor, "n q"]:
        """The byte-pair codes of rounded latents, filled up with 0, or cut."""
        codes = np.zeros((len(rows), self.num_codebooks), dtype=np.int64)
        for row, ids in zip(codes, self._sequences(rows)):
            row[: len(ids)] = ids[: self.num_codebooks]
        return torch.from_numpy(codes).to(rows.device)

    def values(self, codes: Int[Tensor, "n q"]) -> Float[Tensor, "n d"]:
        """The numbers that the codes of a position give one after the other, over the scale."""
        symbols, starts = self._machine.table
        flat = codes.cpu().numpy()
        sizes = np.diff(starts)[flat]  # (n, q)
        first = np.cumsum(sizes, 1) - sizes  # where the numbers of a code begin in the row
        times = sizes.ravel()
        inside = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        place = np.repeat(first.ravel(), times) + inside
        row = np.repeat(np.arange(len(flat)), sizes.sum(1))
        found = symbols[np.repeat(starts[flat].ravel(), times) + inside]
        whole = np.zeros((len(flat), self.dim), dtype=np.float32)
        kept = place < self.dim
        whole[row[kept], place[kept]] = found[kept]
        return torch.from_numpy(whole).to(codes.device) / self.cfg.scale

    def measured(self, rows: Float[Tensor, "n d"], codes: Int[Tensor, "n q"]) -> dict[str, Tensor]:
        """`codes/length`: codes of a position without those that fill up. `codes/full`: positions that have no such."""
        used = (codes > 0).sum(1).float()
        count = max(1, len(used))
        return {"codes/length": used.sum() / count, "codes/full": (used == self.num_codebooks).sum() / count}

    @property
    def _machine(self) -> "_Machine":
        low, high = self.span.tolist()
        return machine(low, high, self.codebook_size, self.pairs.cpu().numpy().tobytes())

    def _texts(self, rows: Float[Tensor, "n d"]) -> list[str]:
        """Latents as texts with a letter for each number."""
        low, high = self.span.tolist()
        numbers = (rows.cpu().nan_to_num() * self.cfg.scale).round().clamp(low, high).long() - low
        text = (numbers.numpy() + _FIRST).astype("<u4").tobytes().decode("utf-32-le")
        return [text[start : start + self.dim] for start in range(0, len(text), self.dim)]

    def _sequences(self, rows: Float[Tensor, "n d"]) -> list[list[int]]:
        encodings = self._machine.bpe.encode_batch(self._texts(rows), add_special_tokens=False)
        return [each.ids for each in encodings]

    def _lengths(self, rows: Float[Tensor, "n d"]) -> Int[np.ndarray, " n"]:
        return np.array([len(ids) for ids in self._sequences(rows)])


@dataclass(frozen=True)
class _Machine:
    """A byte-pair encoder, and the numbers of each code: those of code i are `symbols[starts[i] : starts[i + 1]]`."""

    bpe: Tokenizer
    table: tuple[Int[np.ndarray, " m"], Int[np.ndarray, " k"]]


@lru_cache(maxsize=8)
def machine(low: int, high: int, size: int, pairs: bytes) -> _Machine:
    """The encoder for the numbers `low` to `high`, which have the codes from 1 on, and then the pairs."""
    vocabulary = {chr(_FIRST + place): place + 1 for place in range(high - low + 1)}
    texts = ["", *vocabulary]
    merges = []
    for left, right in np.frombuffer(pairs, dtype=np.int64).reshape(-1, 2):
        if left < 0:
            break
        merges.append((texts[left], texts[right]))
        joined = texts[left] + texts[right]
        if joined not in vocabulary:
            vocabulary[joined] = len(texts)
            texts.append(joined)
    letters = [np.array([ord(letter) - _FIRST + low for letter in text], dtype=np.int64) for text in texts]
    letters += [np.zeros(0, dtype=np.int64)] * (size - len(texts))  # codes that no pair has taken
    starts = np.cumsum([0, *map(len, letters)])
    return _Machine(Tokenizer(models.BPE(vocab=vocabulary, merges=merges)), (np.concatenate(letters), starts))


def learned_pairs(texts: Sequence[str], low: int, high: int, codes: int) -> list[tuple[int, int]]:
    """The pairs of codes that byte-pair encoding joins, in its order, until there are so many codes in all."""
    alphabet = [chr(_FIRST + place) for place in range(high - low + 1)]
    bpe = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=codes, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    known = {letter: place + 1 for place, letter in enumerate(alphabet)}
    found = []
    for merge in json.loads(bpe.to_str())["model"]["merges"]:
        left, right = merge
        found.append((known[left], known[right]))
        known.setdefault(left + right, len(known) + 1)
    return found
