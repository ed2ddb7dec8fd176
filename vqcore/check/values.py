"""Finds suspicious values in samples, given what their modality declares.

The field's classic silent error is data in 0..255 where -1..1 is declared: everything trains, nothing learns.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vqcore.check.findings import Finding
from vqcore.config import Config
from vqcore.data.reader import opened
from vqcore.errors import VqcoreError, listed
from vqcore.protocols import Batch, Data, DataSpec
from vqcore.registry import registry

SLACK = 0.01
"""Share of a declared range by which a value may lie outside it."""
SLIVER = 0.1
"""Values that use a smaller share of the declared range are suspicious."""
LARGE = 20.0
"""Larger values are suspicious where no range is declared: networks expect numbers of size 1."""
_USUAL = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.0, 65535.0))


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a config says of its samples: the modality's settings and spec, and the training data they describe."""

    modality: Config
    spec: DataSpec
    data: Data

    @property
    def where(self) -> str:
        """The config's key and the modality, for findings."""
        return f"data.modality ({self.modality.name})"


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
    broken = (~channels.isfinite()).any(1)
    if bool(broken.any()):
        what = f"{source}: {_channels(broken)} holds NaN or infinity"
        yield Finding("error", where, what, "Mend the files, or mask such positions.")
        return
    if spec.labels is not None:
        yield from _classes(declared, channels, source, batches)
        return
    low, high = channels.amin(1), channels.amax(1)
    yield from _range(declared, float(low.min()), float(high.max()), source)
    still = low == high
    if bool(still.all()):
        what = f"{source}: every value of a channel is the same"
        yield Finding("error", where, what, "Check that the right file or key is read.")
    elif bool(still.any()):
        what = f"{source}: {_channels(still)} never changes"
        yield Finding(
            "warning", where, what, "A constant channel teaches nothing. Check that it is read correctly."
        )
    seen = f"{float(low.min()):.4g} to {float(high.max()):.4g}, mean {float(channels.mean()):.3g}"
    spread = f"standard deviation {float(channels.std(correction=0)):.3g}{_share(batches)}"
    yield Finding("note", where, f"{source}: values {seen}, {spread}")


def better_range(declared: Declared, data: Data, count: int = 8) -> str:
    """What to declare instead of `data.modality.range`, if the files hold other values; else an empty text.

    The modality is built once more without its range to see what the files hold.
    """
    cfg: Any = declared.modality
    if getattr(cfg, "range", None) is None:
        return ""
    try:
        free = registry().build("modality", dataclasses.replace(cfg, range=None), size=declared.spec.size)
        given = [data.get(i * len(data) // count) for i in range(count)]
        raw = [torch.as_tensor(opened(free, one).raw).double() for one in given]
    except (VqcoreError, OSError, TypeError, ValueError):
        return ""
    low, high = min(float(x.min()) for x in raw), max(float(x.max()) for x in raw)
    better = _usual(low, high)
    if better == tuple(cfg.range):
        return ""
    return f"The files hold {low:.4g} to {high:.4g}: set data.modality.range=[{better[0]:g}, {better[1]:g}]."


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
    spec, where, better = declared.spec, declared.where, _usual(low, high)
    seen = f"{source}: values run from {low:.4g} to {high:.4g}"
    if spec.range is None:
        if spec.kind == "continuous" and max(abs(low), abs(high)) > LARGE:
            what = f"{seen} and no range is declared; networks learn from values of size 1"
            remedy = f"Declare the range: data.modality.range=[{better[0]:g}, {better[1]:g}]."
            yield Finding("warning", where, what, remedy if hasattr(declared.modality, "range") else "")
        return
    bottom, top = spec.range
    width, asked = top - bottom, f"{bottom:g} to {top:g}"
    if low < bottom - SLACK * width or high > top + SLACK * width:
        remedy = f"The values look like {better[0]:g}..{better[1]:g}: map them to {asked} when they are read."
        yield Finding("error", where, f"{seen}, but {asked} is declared", remedy)
    elif high - low < SLIVER * width and high > low:
        what = f"{seen}, {(high - low) / width:.1%} of the declared {asked}"
        yield Finding("warning", where, what, better_range(declared, declared.data))
    elif bottom < 0 < top and low >= 0 and high > low:
        what = f"{seen}, never below 0, but {asked} is declared"
        yield Finding("warning", where, what, "Check whether the values are 0..1 and not yet centred.")


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


def _usual(low: float, high: float) -> tuple[float, float]:
    """The narrowest customary range that holds these values, else the values' own."""
    for bottom, top in _USUAL:
        if bottom <= low and high <= top:
            return bottom, top
    return low, high


def _channels(which: Tensor) -> str:
    numbers = [str(i) for i in torch.nonzero(which).flatten().tolist()]
    return f"channel{'s' if len(numbers) > 1 else ''} {listed(numbers, 6)}"
