"""Randomness as a function of what it is for: (seed, purpose, epoch, sample or step), never of history or workers."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

Part = int | str


def derive(*parts: Part) -> int:
    """A 63-bit seed from any mixture of integers and words."""
    digest = hashlib.blake2b(
        "\x1f".join(f"{type(p).__name__}:{p}" for p in parts).encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: Part, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `derive`."""
    return torch.Generator(device=device).manual_seed(derive(*parts))


def numpy_generator(*parts: Part) -> np.random.Generator:
    """A NumPy generator seeded by `derive`."""
    return np.random.default_rng(derive(*parts))


def sample_generators(keys: Sequence[Part], *purpose: Part) -> list[torch.Generator]:
    """One generator a sample, so that what is drawn for it does not depend on the batch it is in."""
    return [generator(*purpose, key) for key in keys]


def randn(rng: Sequence[torch.Generator], *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Normal noise `(len(rng), *shape)`, each sample's from its own generator; drawn on the CPU, then moved."""
    return torch.stack([torch.randn(shape, generator=one) for one in rng]).to(device)


def rand(rng: Sequence[torch.Generator], *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform numbers in [0, 1) `(len(rng), *shape)`, each sample's from its own generator."""
    return torch.stack([torch.rand(shape, generator=one) for one in rng]).to(device)


@contextmanager
def seeded(*parts: Part) -> Iterator[None]:
    """Seed torch's global generator inside the block (weight initialisation uses it) and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(*parts))
        yield


def permute(index: int, length: int, key: int) -> int:
    """Where `index` goes in a random permutation of `range(length)` that is chosen by `key`. Constant memory.

    An eight-round Feistel network on the smallest even number of bits that holds `length`, walked along its cycle until
    the value falls below `length`.
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
    """SplitMix64's output function."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
