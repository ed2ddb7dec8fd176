"""A signal of one axis: a melody of decaying tones. It is a function of time and can be sampled at any rate."""

import numpy as np
from jaxtyping import Float32

from vqcore.rng import Part, numpy_generator

NOTE_S = 0.25
"""Seconds from one tone to the next."""
TAIL_NOTES = 2
"""Number of earlier tones that are still audible."""
LOUDEST = 0.3
"""Largest amplitude of a tone; the sum of three tones stays within -1..1."""


def melody(length: int, rate: int, *seed: Part) -> Float32[np.ndarray, " n"]:
    """The first `length` samples at `rate` per second, in -1..1."""
    signal = np.zeros(length)
    for note in range(-TAIL_NOTES, int(length / rate / NOTE_S) + 1):
        first = max(0, int(np.ceil(note * NOTE_S * rate)))
        stop = min(length, int(np.ceil((note + TAIL_NOTES + 1) * NOTE_S * rate)))
        if first < stop:
            since = np.arange(first, stop) / rate - note * NOTE_S
            signal[first:stop] += _tone(since, numpy_generator(*seed, "note", note))
    return signal.astype(np.float32)


def _tone(since: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A tone between 110 and 880 Hz with three overtones, from 0 s until it is silent after `TAIL_NOTES` + 1 steps."""
    pitch = 110 * 2 ** (int(rng.integers(0, 37)) / 12)
    loud, decay = rng.uniform(0.4, 1.0) * LOUDEST, rng.uniform(3, 12)
    shares = rng.dirichlet((4, 2, 1, 0.5))
    phases = rng.uniform(0, 2 * np.pi, 4)
    tone = sum(
        share * np.sin(2 * np.pi * pitch * (k + 1) * since + phase)
        for k, (share, phase) in enumerate(zip(shares, phases))
    )
    end = (TAIL_NOTES + 1) * NOTE_S
    fade = np.clip(since / 0.01, 0, 1) * np.clip((end - since) / 0.05, 0, 1)
    return loud * np.exp(-decay * since) * fade * tone
