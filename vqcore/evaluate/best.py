"""The setting `eval.best`: which metric or loss decides which checkpoint of a run counts."""

from collections.abc import Iterable, Mapping
from typing import Literal

from vqcore.errors import ConfigError, did_you_mean, listed
from vqcore.protocols import Metric, better


def direction(name: str, metrics: Mapping[str, Metric]) -> Literal["higher", "lower"] | None:
    """Which values of `eval.best` are better; None for a metric that does not say so. A loss is better when lower."""
    return "lower" if name.startswith("loss/") else better(metrics[name.removeprefix("metric/")])


def check_best(name: str, metrics: Mapping[str, Metric], losses: Iterable[str] | None = None) -> None:
    """Raise `ConfigError` unless `eval.best` names a metric with a direction or one loss.

    `losses` are the names of the losses, None while they are not known.
    """
    good = [f"metric/{label}" for label, metric in metrics.items() if better(metric)]
    if name == "loss":
        raise ConfigError(
            "eval.best=loss: the sum of all losses cannot choose a checkpoint: it rises when an adversary enters. Name "
            f"a metric or one loss: {listed([*good, *(f'loss/{one}' for one in losses or ())])}."
        )
    known = [*good, *(f"loss/{one}" for one in losses or ())]
    if name in known or (name.startswith("loss/") and losses is None):
        return
    label = name.removeprefix("metric/")
    if name.startswith("metric/") and label in metrics:
        raise ConfigError(
            f"eval.best={name}: this metric does not say which values are better. Choose: {listed(known)}."
        )
    raise ConfigError(
        f"eval.best={name}: no metric and no loss has this name.{did_you_mean(name, known)} Choose: {listed(known)}."
    )
