"""What is suspicious about the numbers of samples, given what their modality declares.

The field's classic silent error is data in 0..255 where -1..1 is declared: everything trains, nothing learns.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from vqcore.errors import VqcoreError, listed
from vqcore.protocols import Batch, DataSpec
from vqcore.registry import registry
from vqcore.run.state import Run

Suspicion = tuple[Literal["error", "warning", "note"], str, str]
SLACK = 0.01
"""Share of a declared range by which a value may lie outside it."""
SLIVER = 0.1
"""A smaller share of the declared range that is used at all is suspicious."""
LARGE = 20.0
"""Values beyond this are suspicious where no range is declared: networks expect numbers of size 1."""
_USUAL = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.0, 65535.0))


def suspicions(run: Run, batches: Sequence[Batch], source: str) -> Iterator[Suspicion]:
    """Grade, what, remedy; and one note that says what the values are."""
    spec = run.tokenizer.spec
    channels = _by_channel(spec, batches)
    if not channels.numel():
        yield "error", f"{source}: no position is valid", "The mask hides everything; look at the modality."
        return
    broken = (~channels.isfinite()).any(1)
    if bool(broken.any()):
        names = _channels(broken)
        yield "error", f"{source}: {names} holds NaN or infinity", "Mend the files, or mask such positions."
        return
    low, high = channels.amin(1), channels.amax(1)
    if spec.labels is not None:
        yield from _classes(spec, channels, source, batches)
        return
    yield from _range(run, float(low.min()), float(high.max()), source)
    still = low == high
    if bool(still.all()):
        yield "error", f"{source}: every value of a channel is the same", "Is the right file or key read?"
    elif bool(still.any()):
        yield (
            "warning",
            f"{source}: {_channels(still)} never changes",
            "It teaches nothing; is it read rightly?",
        )
    seen = f"{float(low.min()):.4g} to {float(high.max()):.4g}, mean {float(channels.mean()):.3g}"
    spread = f"standard deviation {float(channels.std(correction=0)):.3g}{_share(batches)}"
    yield "note", f"{source}: values {seen}, {spread}", ""


def better_range(run: Run, data: Any, count: int = 8) -> str:
    """What to declare instead of `data.modality.range`, if the files hold something else; else nothing.

    The modality is built once more without its range, and what it reads then is looked at.
    """
    cfg: Any = run.config.data.modality
    if getattr(cfg, "range", None) is None:
        return ""
    try:
        free = registry().build("modality", dataclasses.replace(cfg, range=None), size=run.tokenizer.cfg.size)
        raw = [torch.as_tensor(free.read(data.get(i * len(data) // count))).double() for i in range(count)]
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
        flat = rearrange(x, "b c ... -> c (b ...)")
        columns.append(flat if batch.mask is None else flat[:, rearrange(batch.mask, "... -> (...)").cpu()])
    joined = torch.cat(columns, 1)
    return joined.double()


def _share(batches: Sequence[Batch]) -> str:
    """How much of batches with masks is valid."""
    masks = [batch.mask for batch in batches if batch.mask is not None]
    valid, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return f"; {valid / total:.1%} of the positions are valid" if total else ""


def _range(run: Run, low: float, high: float, source: str) -> Iterator[Suspicion]:
    spec, better = run.tokenizer.spec, _usual(low, high)
    seen = f"{source}: values run from {low:.4g} to {high:.4g}"
    if spec.range is None:
        has_setting = hasattr(run.config.data.modality, "range")
        if spec.kind == "continuous" and max(abs(low), abs(high)) > LARGE:
            remedy = (
                f"Declare them: data.modality.range=[{better[0]:g}, {better[1]:g}]." if has_setting else ""
            )
            yield "warning", f"{seen} and no range is declared; networks learn from values of size 1", remedy
        return
    bottom, top = spec.range
    width, declared = top - bottom, f"{bottom:g} to {top:g}"
    if low < bottom - SLACK * width or high > top + SLACK * width:
        remedy = f"They look like {better[0]:g}..{better[1]:g}: bring them to {declared} when they are read."
        yield "error", f"{seen}, where {declared} is declared", remedy
    elif high - low < SLIVER * width and high > low:
        what = f"{seen}, {(high - low) / width:.1%} of the declared {declared}"
        yield "warning", what, better_range(run, run.data)
    elif bottom < 0 < top and low >= 0 and high > low:
        yield (
            "warning",
            f"{seen}, never below 0, where {declared} is declared",
            "Are they 0..1, not yet centred?",
        )


def _classes(spec: DataSpec, channels: Tensor, source: str, batches: Sequence[Batch]) -> Iterator[Suspicion]:
    assert spec.labels is not None
    seen = channels.unique().long().tolist()
    wrong = [label for label in seen if not 0 <= label < spec.labels]
    if wrong:
        what = f"{source}: class {listed(map(str, wrong), 4)} where {spec.labels} are declared (0 to {spec.labels - 1})"
        yield (
            "error",
            what,
            f"Set data.modality.labels={max(seen) + 1}, or map such classes when they are read.",
        )
    elif len(seen) == 1:
        yield "warning", f"{source}: only class {seen[0]} occurs", "Is the right file or key read?"
    else:
        yield "note", f"{source}: {len(seen)} of {spec.labels} classes occur{_share(batches)}", ""


def _usual(low: float, high: float) -> tuple[float, float]:
    """The narrowest customary range that holds these values, else the values' own."""
    for bottom, top in _USUAL:
        if bottom <= low and high <= top:
            return bottom, top
    return low, high


def _channels(which: Tensor) -> str:
    numbers = [str(i) for i in torch.nonzero(which).flatten().tolist()]
    return f"channel{'s' if len(numbers) > 1 else ''} {listed(numbers, 6)}"
