"""What a prediction that looks at nothing scores: something to compare the figures of an evaluation with.

The prediction is one value a channel, its mean over the evaluation set, or for class maps the most frequent class.
"""

from collections.abc import Mapping

import torch
from einops import rearrange, reduce
from torch import Tensor

from vqcore import dist
from vqcore.evaluation import build_metrics, eval_batches, measured, summaries
from vqcore.protocols import Batch, Data, DataSpec, Modality
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer


class Constant:
    """Sums over the valid positions of batches, on the CPU in double precision, and the prediction they make.

    All processes ask for `prediction` together: it is that of all their batches.
    """

    def __init__(self, spec: DataSpec):
        self.spec = spec
        self.sums = torch.zeros(spec.out_channels, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        """Take in a batch."""
        x = batch.x.cpu()
        valid = torch.ones(len(x), *x.shape[-self.spec.rank :], dtype=torch.bool)
        valid = valid if batch.mask is None else batch.mask.cpu()
        self.count += valid.sum()
        if self.spec.labels is not None:
            self.sums += torch.bincount(x[valid].flatten(), minlength=self.spec.labels)
        else:
            kept = x.double().where(rearrange(valid, "b ... -> b 1 ..."), 0.0)
            self.sums += reduce(kept, "b c ... -> c", "sum")

    def prediction(self) -> Tensor:
        """One number for each channel of a decoder's output; for class maps, logits of the most frequent class."""
        total = dist.sum_dicts({"sums": self.sums, "count": self.count})
        if self.spec.labels is not None:
            return torch.nn.functional.one_hot(total["sums"].argmax(), self.spec.labels).float()
        return (total["sums"] / total["count"].clamp(min=1)).float()


@torch.no_grad()
def constant_figures(
    constant: Constant,
    tokenizer: Tokenizer,
    config: RunConfig,
    data: Data,
    extra: Mapping[str, Modality],
    size: tuple[int, ...],
) -> dict[str, float]:
    """Figures of the constant on the set that it was made from, by the metrics that say they mean something of it.

    Reads the samples once more; empty, and nothing is read, where no metric has `of_constant`.
    """
    metrics = {
        label: metric
        for label, metric in build_metrics(config.eval.metrics, tokenizer).items()
        if getattr(metric, "of_constant", False)
    }
    if not metrics:
        return {}
    values, sums = constant.prediction(), dict[str, Tensor]()
    for loaded in eval_batches(
        tokenizer, config, data, extra, size=size, limit=config.eval.samples, shared=True
    ):
        if (batch := loaded.batch) is None:
            continue
        ones = torch.ones(len(batch.x), 1, *batch.x.shape[-tokenizer.spec.rank :])
        x_hat = ones * rearrange(values, "c -> 1 c" + " 1" * tokenizer.spec.rank)
        for label, metric in metrics.items():
            for name, value in measured(metric, tokenizer, x_hat, batch).items():
                key = f"metric:{label}:{name}"
                sums[key] = sums.get(key, torch.zeros(())) + value.double().cpu()
    return summaries(dist.sum_dicts(sums), metrics)
