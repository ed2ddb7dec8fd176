"""Random numbers as a function of (seed, purpose, epoch, sample or step), independent of history and of workers."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

Part = int | str


def derive(*parts: Part) -> int:
    """A 63-bit seed computed from integers and words, in their order."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    # The key of a sample may come from a file name that is not UTF-8.
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: Part, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator with the seed `derive(*parts)`."""
    return torch.Generator(device=device).manual_seed(derive(*parts))


def numpy_generator(*parts: Part) -> np.random.Generator:
    """A NumPy generator with the seed `derive(*parts)`."""
    return np.random.default_rng(derive(*parts))


def sample_generators(keys: Sequence[Part], *purpose: Part) -> list[torch.Generator]:
    """One generator per sample, so that the random numbers of a sample do not depend on its batch."""
    return [generator(*purpose, key) for key in keys]


def forked(rng: Sequence[torch.Generator], *purpose: Part) -> list[torch.Generator]:
    """Other generators, one per sample: they follow from the seeds of `rng` and the purpose, not from earlier draws."""
    return [generator(one.initial_seed(), *purpose) for one in rng]


def randn(rng: Sequence[torch.Generator], *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Normal noise `(len(rng), *shape)`: each sample uses its own generator. Drawn on the CPU, then moved."""
    return _stacked([torch.randn(shape, generator=one) for one in rng], shape).to(device)


def rand(rng: Sequence[torch.Generator], *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform numbers in [0, 1) `(len(rng), *shape)`: each sample uses its own generator."""
    return _stacked([torch.rand(shape, generator=one) for one in rng], shape).to(device)


def _stacked(drawn: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)


@contextmanager
def seeded(*parts: Part) -> Iterator[None]:
    """Seed the generator of the CPU, which initial weights come from, inside the block; its state is restored after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(*parts))
        yield


def permute(index: int, length: int, key: int) -> int:
    """The position of `index` in a random permutation of `range(length)`; `key` chooses the permutation.

    Needs constant memory: a Feistel network with eight rounds on the smallest even number of bits that can hold
    `length - 1`, applied again until the value is below `length`.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for key_of_round in _round_keys(key):
            left, right = right, left ^ (_mix(key_of_round + right) & low)
        index = left << half | right
        if index < length:
            return index


@lru_cache(maxsize=16)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_mix(key + turn) for turn in range(8))


def _mix(value: int) -> int:
    """The output function of SplitMix64."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
