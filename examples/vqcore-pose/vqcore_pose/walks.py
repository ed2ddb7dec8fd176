"""Synthetic walks: people with nine joints. Every person has another stride, speed and lean."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vqcore.protocols import Modality
from vqcore.schema import DataConfig


class Walks:
    """Sample i is a function of (split, i): 48 frames of head, hip, and a shoulder, two hands, two knees, two feet."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of `pose/walks`."""

        length: int = 256
        """Number of walks."""

        @property
        def has_eval(self) -> bool:
            """Always: the evaluation set has a quarter as many walks, all different."""
            return True

    def __init__(self, cfg: Config, *, split: str, modality: Modality, extra: Mapping[str, Modality]):
        self.first = 0 if split == "train" else 10**6
        self.length = cfg.length if split == "train" else max(1, cfg.length // 4)

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        """The number of the walk."""
        return f"walk{index:05}"

    def get(self, index: int, label: str = "") -> np.ndarray:
        """One walk, (48, 9, 2)."""
        rng = np.random.default_rng(self.first + index)
        stride, lean, speed = rng.uniform(0.2, 0.6), rng.uniform(-0.15, 0.15), rng.uniform(0.15, 0.4)
        phase = speed * np.arange(48) + rng.uniform(0, 2 * np.pi)
        swing, still = stride * np.sin(phase), np.zeros(48)
        lift = 0.15 * np.maximum(0, np.stack([np.cos(phase), -np.cos(phase)]))
        across = [still + lean, still, still + lean / 2, -swing, swing, swing / 2, -swing / 2, swing, -swing]
        up = [still + 0.9, still, still + 0.6, still + 0.1, still + 0.1, lift[0] - 0.4, lift[1] - 0.4]
        up += [lift[0] - 0.85, lift[1] - 0.85]
        return np.stack([np.stack(across, 1), np.stack(up, 1)], 2).astype(np.float32)
