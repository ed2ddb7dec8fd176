"""What a prediction that looks at nothing scores: something to compare the metrics of an evaluation with.

The prediction is one value a channel, its mean over some training samples, or for class maps the most frequent class.
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
"""Samples, from all over a set, that the prediction is made of."""


def constant(
    tokenizer: Tokenizer, config: RunConfig, data: Data, extra: Mapping[str, Modality]
) -> Float[Tensor, " c"] | None:
    """One number for each channel of a decoder's output: the mean over valid positions of `SAMPLES` samples.

    For class maps it is the logits of the most frequent class. Unreadable samples are left out; the answer is None
    where none is left. All processes call it together.
    """
    loaded = eval_batches(tokenizer, config, data, extra, limit=SAMPLES, shared=True)
    return constant_of((one.batch for one in loaded if one.batch is not None), tokenizer.spec)


def constant_of(batches: Iterable[Batch], spec: DataSpec) -> Float[Tensor, " c"] | None:
    """The constant of some batches of this process and of all others; None where there is no valid position."""
    sums = torch.zeros(spec.out_channels, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        valid = torch.ones(len(batch.x), *batch.x.shape[-spec.rank :], dtype=torch.bool)
        valid = valid if batch.mask is None else batch.mask
        count += valid.sum()
        if spec.labels is not None:
            sums += torch.bincount(batch.x[valid].flatten(), minlength=spec.labels)
        else:
            kept = batch.x.double().where(rearrange(valid, "b ... -> b 1 ..."), 0.0)
            sums += reduce(kept, "b c ... -> c", "sum")
    total = dist.sum_dicts({"sums": sums, "count": count})
    if not total["count"]:
        return None
    if spec.labels is not None:
        return torch.nn.functional.one_hot(total["sums"].argmax(), spec.labels).float()
    return (total["sums"] / total["count"]).float()
