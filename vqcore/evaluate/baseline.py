"""The constant prediction: a baseline for the metrics of an evaluation.

It is the same for every sample and at every position: each channel's mean over some training samples, or for class maps
the most frequent class.
"""

from collections.abc import Iterable, Mapping

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from vqcore import dist
from vqcore.evaluate.measure import eval_batches
from vqcore.protocols import Batch, Data, DataSpec, Modality
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

SAMPLES = 512
"""Number of samples from which the constant is computed, spread evenly over the set. Smaller sets are used whole."""


def constant(
    tokenizer: Tokenizer, config: RunConfig, data: Data, extra: Mapping[str, Modality]
) -> Float[Tensor, " c"] | None:
    """One number for each channel of a decoder's output: the mean over the valid positions of `SAMPLES` samples.

    For class maps the numbers are logits: 1 for the most frequent class, 0 for the others. Unreadable samples are left
    out. The answer is None when no sample is readable. All processes call this function together.
    """
    loaded = eval_batches(tokenizer, config, data, extra, limit=SAMPLES, shared=True)
    batches = (tokenizer.prepare(one.batch, extra) for one in loaded if one.batch is not None)
    return constant_of(batches, tokenizer.spec)


def constant_of(batches: Iterable[Batch], spec: DataSpec) -> Float[Tensor, " c"] | None:
    """The constant of the prepared batches of all processes; None when they have no valid position."""
    sums = torch.zeros(spec.out_channels, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        x = batch.x.cpu()
        valid = torch.ones(len(x), *x.shape[-spec.rank :], dtype=torch.bool)
        valid = valid if batch.mask is None else batch.mask.cpu()
        count += valid.sum()
        if spec.labels is not None:
            sums += torch.bincount(x[valid].flatten(), minlength=spec.labels)
        else:
            kept = x.double().where(rearrange(valid, "b ... -> b 1 ..."), 0.0)
            sums += reduce(kept, "b c ... -> c", "sum")
    total = dist.sum_dicts({"sums": sums, "count": count})
    if not total["count"]:
        return None
    if spec.labels is not None:
        return torch.nn.functional.one_hot(total["sums"].argmax(), spec.labels).float()
    return (total["sums"] / total["count"]).float()
