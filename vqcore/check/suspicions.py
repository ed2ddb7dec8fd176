"""Finds suspicious values in samples, given what their modality declares.

The field's classic silent errors: data in 0..255 where -1..1 is declared, and values that hardly vary beside the
declared scale. Everything trains, nothing learns.
"""

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor

from vqcore.check.findings import Finding
from vqcore.check.values import LARGE, NARROW, UNEQUAL, Declared, better, channel_name
from vqcore.errors import listed
from vqcore.modalities.scale import SLACK
from vqcore.protocols import Batch, DataSpec

SLIVER = 0.1
"""Values that use a smaller share of the declared range are suspicious."""


def value_findings(declared: Declared, batches: Sequence[Batch], source: str) -> Iterator[Finding]:
    """What is suspicious about the values of some prepared batches, and one note that describes them.

    `source` says what the batches are, e.g. `the first batch`.
    """
    spec, where = declared.spec, declared.where
    channels = _by_channel(spec, batches)
    if not channels.numel():
        what = f"{source}: no position is valid"
        yield Finding(
            "error", where, what, "The mask hides everything: check the mask or the modality's settings."
        )
        return
    infinite = (~channels.isfinite()).any(1)
    if bool(infinite.any()):
        what = f"{source}: {_channels(spec, infinite)} holds NaN or infinity"
        yield Finding("error", where, what, "Mend the files, or mask such positions.")
        return
    if spec.labels is not None:
        yield from _classes(declared, channels, source, batches)
        return
    low, high = channels.amin(1), channels.amax(1)
    still = low == high
    found = [*_range(declared, float(low.min()), float(high.max()), source)]
    if not found and declared.has_scale:
        found = [*_spread(declared, channels, ~still, source)]
    yield from found
    if bool(still.all()):
        what = f"{source}: every value of a channel is the same"
        yield Finding("error", where, what, "Check that the right file or key is read.")
    elif bool(still.any()):
        what = f"{source}: {_channels(spec, still)} never changes"
        yield Finding(
            "warning", where, what, "A constant channel teaches nothing. Check that it is read correctly."
        )
    seen = f"{float(low.min()):.4g} to {float(high.max()):.4g}, mean {float(channels.mean()):.3g}"
    spread = f"standard deviation {float(channels.std(correction=0)):.3g}{_share(batches)}"
    yield Finding("note", where, f"{source}: values {seen}, {spread}")


def _by_channel(spec: DataSpec, batches: Sequence[Batch]) -> Tensor:
    """All valid values as (channels, n)."""
    columns = []
    for batch in batches:
        x = batch.x.unsqueeze(1) if spec.labels is not None else batch.x
        flat = rearrange(x.cpu(), "b c ... -> c (b ...)")
        columns.append(flat if batch.mask is None else flat[:, rearrange(batch.mask, "... -> (...)").cpu()])
    return torch.cat(columns, 1).double()


def _share(batches: Sequence[Batch]) -> str:
    """How much of batches with masks is valid."""
    masks = [batch.mask for batch in batches if batch.mask is not None]
    valid, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return f"; {valid / total:.1%} of the positions are valid" if total else ""


def _range(declared: Declared, low: float, high: float, source: str) -> Iterator[Finding]:
    spec, where = declared.spec, declared.where
    seen = f"{source}: values run from {low:.4g} to {high:.4g}"
    if spec.range is None:
        if spec.kind == "continuous" and max(abs(low), abs(high)) > LARGE:
            scaled = (
                "under the scale" if getattr(declared.modality, "scale", None) else "and no scale is declared"
            )
            what = f"{seen} {scaled}; networks learn from values of size 1"
            yield Finding("warning", where, what, better(declared))
        return
    bottom, top = spec.range
    width, asked = top - bottom, f"{bottom:g} to {top:g}"
    if low < bottom - SLACK * width or high > top + SLACK * width:
        remedy = f"Map the values to {asked} when they are read."
        yield Finding("error", where, f"{seen}, but {asked} is declared", remedy)
    elif high - low < SLIVER * width and high > low:
        what = f"{seen}, {(high - low) / width:.1%} of the declared {asked}"
        yield Finding("warning", where, what, better(declared))
    elif bottom < 0 < top and low >= 0 and high > low:
        what = f"{seen}, never below 0, but {asked} is declared"
        remedy = better(declared) or "Check whether the values are 0..1 and not yet centred."
        yield Finding("warning", where, what, remedy)


def _spread(declared: Declared, channels: Tensor, varies: Tensor, source: str) -> Iterator[Finding]:
    """Channels that hardly vary beside the scale, or beside each other."""
    spec, deviation = declared.spec, channels.std(1, correction=0)
    places = torch.nonzero(varies).flatten().tolist()
    if not places:
        return
    least = min(places, key=lambda place: float(deviation[place]))
    most = max(places, key=lambda place: float(deviation[place]))
    small, large = (
        f"channel {channel_name(spec, place)} {float(deviation[place]):.2g}" for place in (least, most)
    )
    narrow = deviation < NARROW * channels.mean(1).abs().clamp(min=1)
    if bool((narrow & varies).any()):
        what = (
            f"{source}: {_channels(spec, narrow & varies)} hardly varies beside the scale (standard deviation of "
            f"{small}, where networks expect about 1): codes would say little but their position"
        )
        yield Finding("warning", declared.where, what, better(declared))
    elif deviation[most] > UNEQUAL * deviation[least]:
        times = float(deviation[most] / deviation[least])
        what = (
            f"{source}: the standard deviations of the channels differ {times:.0f} times ({small}, {large}): the loss "
            "sees little but the largest"
        )
        yield Finding("warning", declared.where, what, better(declared))


def _classes(
    declared: Declared, channels: Tensor, source: str, batches: Sequence[Batch]
) -> Iterator[Finding]:
    labels, where = declared.spec.labels or 0, declared.where
    seen = channels.unique().long().tolist()
    wrong = [label for label in seen if not 0 <= label < labels]
    if wrong:
        shown = listed(map(str, wrong), 4)
        what = f"{source}: class {shown} occurs, but {labels} classes are declared (0 to {labels - 1})"
        remedy = f"Set data.modality.labels={max(seen) + 1}, or map such classes when they are read."
        yield Finding("error", where, what, remedy)
    elif len(seen) == 1:
        what = f"{source}: only class {seen[0]} occurs"
        yield Finding("warning", where, what, "Check that the right file or key is read.")
    else:
        yield Finding("note", where, f"{source}: {len(seen)} of {labels} classes occur{_share(batches)}")


def _channels(spec: DataSpec, which: Tensor) -> str:
    names = [channel_name(spec, place) for place in torch.nonzero(which).flatten().tolist()]
    return f"channel{'s' if len(names) > 1 else ''} {listed(names, 6)}"
