"""How often the codes of a codebook are used, as a histogram that shows dead codes and very frequent codes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor


def uses_histogram(counts: Int[Tensor, " k"]) -> tuple[np.ndarray, np.ndarray]:
    """The histogram and its edges: codes used 0 times, once, 2 to 3, 4 to 7, 8 to 15 times ...

    `numbers[i]` codes were used at least `edges[i]` and fewer than `edges[i + 1]` times. The numbers add up to the size
    of the codebook.
    """
    most = int(counts.max())
    edges = np.array([0, *(2**power for power in range(most.bit_length() + 1))], dtype=np.float64)
    numbers = np.histogram(counts.cpu().numpy(), bins=edges)[0] if most else np.array([len(counts)])
    return numbers, edges[: len(numbers) + 1]


def codebooks(counts: Sequence[Int[Tensor, " k"]]) -> dict[str, Int[Tensor, " k"]]:
    """The counts of each codebook, by the name of the codebook's histogram."""
    names = ["codes/uses"] if len(counts) == 1 else [f"codes/uses_{book}" for book in range(len(counts))]
    return dict(zip(names, counts))
