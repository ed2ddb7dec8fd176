"""Whether a tokenizer is clearly better than its baselines, and whether its codes say more than where they are."""

import math
from collections.abc import Mapping

from vqcore.evaluate.collisions import NAMES
from vqcore.evaluate.usage import collapse
from vqcore.protocols import fitter
from vqcore.tokenizer import Tokenizer

CLEAR = 0.8
"""A tokenizer is clearly better than a baseline if its error is at most this share of the error of the baseline: 1 dB
of a squared error."""
PLACES = 0.5
"""Codes say mostly where they are if two samples' codes at one position differ by less than this share of the bits by
which codes at two random positions differ."""

_WHAT = {"constant": "a constant", "k-means": "k-means on raw patches, with as many bits"}
_REMEDY = {
    "constant": (
        "Look at the scale of the values first (vqcore check), then at the learning rate and the number of steps."
    ),
    "k-means": "Train longer, try another optim.lr, or a model like that of cfgs/quickstart.yaml.",
}
_REMEDY_FITTED = {
    "constant": (
        "Look at the scale of the values first (vqcore check), then take more codes or smaller patches "
        "(model.quantizer.codebook_size, model.encoder.patch_size)."
    ),
}


def is_fitted(tokenizer: Tokenizer) -> bool:
    """Whether nothing of a tokenizer is trained: its quantizer is fitted, and its decoder has a last layer at most."""
    decoder = tokenizer.decoder
    weights = (parameter for parameter in decoder.parameters() if parameter is not decoder.last_layer)
    return fitter(tokenizer.quantizer) is not None and not any(True for _ in weights)


def verdicts(
    metrics: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]], *, fitted: bool = False
) -> list[str]:
    """Sentences about what is wrong with a tokenizer: collapsed codes, and baselines that it does not clearly beat.

    One that is `fitted` (`is_fitted`) need not beat k-means, which is fitted as well.
    """
    collapsed = collapse(metrics, fitted) if "codes/perplexity" in metrics else ""
    found = [collapsed] if collapsed else []
    remedies = _REMEDY_FITTED if fitted else _REMEDY
    found += [
        f"the tokenizer is not clearly better than {_WHAT[name]}: {compared(metrics, name, scores)}. {remedies[name]}"
        for name, scores in baselines.items()
        if name in remedies and not clearly(metrics, scores)
    ]
    if "constant" in baselines and not clearly(metrics, baselines["constant"]) and says_places(metrics):
        here, anywhere = (metrics[name] for name in NAMES)
        found.append(
            f"the codes say little but where they are: at one position the codes of two samples differ by {here:.1f} "
            f"bits, at two random positions by {anywhere:.1f}. What the samples have in common hides what differs: "
            "standardise each channel."
        )
    return found


def clearly(metrics: Mapping[str, float], scores: Mapping[str, float]) -> bool:
    """Whether a tokenizer is clearly better than a baseline."""
    return metrics["error"] <= CLEAR * scores["error"]


def says_places(metrics: Mapping[str, float]) -> bool:
    """Whether the codes say mostly where they are. One position, or one sample, says nothing about this."""
    if not all(name in metrics for name in NAMES):
        return False
    here, anywhere = (metrics[name] for name in NAMES)
    return here < PLACES * anywhere


def compared(metrics: Mapping[str, float], name: str, scores: Mapping[str, float]) -> str:
    """The errors of a tokenizer and of the baseline `name` in words, with the first metric that both have."""
    share = metrics["error"] / scores["error"] if scores["error"] else math.inf
    words = f"its error is {share:.0%} of that of {name}" if math.isfinite(share) else f"{name} has no error"
    both = [metric for metric in scores if metric.startswith("metric/") and metric in metrics]
    if not both:
        return words
    label = both[0].removeprefix("metric/")
    return f"{words} ({label} {metrics[both[0]]:.4g}, {name} {scores[both[0]]:.4g})"
