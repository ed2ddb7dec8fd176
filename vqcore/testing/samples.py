"""The laws of modalities, data sources and metrics."""

import functools
import math
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqcore.data.lent import Content
from vqcore.data.reader import opened, sized
from vqcore.data.windows import within
from vqcore.errors import DataError, VqcoreError
from vqcore.evaluate.rows import for_summary
from vqcore.protocols import (
    DataSpec,
    HasFacts,
    HasPicture,
    HasValues,
    KnowsBytes,
    View,
    Window,
    Writes,
    better,
    blocks,
    expect,
    extent_of,
    fill,
    finish,
    finishes,
    gathers,
    gives_rows,
    hole_value,
    knows_codes,
    left_out,
    mask,
    reading,
    ride,
    set_up,
    shards,
    shown_channels,
    sizing,
    streams,
    weight,
    writer,
)
from vqcore.registry import registry
from vqcore.rng import generator
from vqcore.testing.basics import check_members, check_waived, close, finite

MODALITY_WAIVABLE = ("round-trip", "flip", "size")
"""Laws that can be waived: a modality may show less than it reads, or have only one size."""
METRIC_WAIVABLE = ("mask",)
"""Laws that can be waived: a metric may need whole samples."""
REDUCED = 0.05
"""Largest mean difference of a training sample read with `at_least`, as a share of its range."""
KEYS = 1000
"""Number of keys that are compared with each other."""


def check_modality(
    modality: Any,
    source: Any,
    *,
    tolerance: float = 0.02,
    waived: Mapping[str, str] | None = None,
) -> None:
    """The laws of a modality on one sample that `read` takes.

    `tolerance` is the largest difference of a value after `show` and `read`, as a share of 1 or of the largest value.
    `waived` maps laws of `MODALITY_WAIVABLE` that the modality does not follow to the reason.
    """
    waived = check_waived(waived, MODALITY_WAIVABLE)
    check_members("modality", modality)
    raw = modality.read(source)
    kept = pickle.dumps(raw)
    spec, extent = modality.spec, modality.extent(raw)
    assert len(extent) == spec.rank, (
        f"extent law: {extent} has {len(extent)} axes, the spec has rank {spec.rank}"
    )
    fixed = modality.view(extent, spec.size, None)
    assert fixed == modality.view(extent, spec.size, None), (
        "determinism law: the view for evaluation is not always the same"
    )
    drawn = [modality.view(extent, spec.size, np.random.default_rng(seed)) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1], "determinism law: equal generators draw different views"
    for view in (fixed, *drawn):
        _check_view(view, spec.size)
        _check_tensor(modality, raw, view)
    _check_ride(modality, raw, drawn[0])
    _check_sizing(modality, source, raw)
    if finishes(modality):
        _check_finish(modality, raw, (fixed, *drawn))
    half = tuple(max(1, side // 2) for side in spec.size)
    if "size" not in waived and half != spec.size:
        _check_other_size(modality, raw, half)
    _check_show(modality, raw, fixed, tolerance, waived)
    if writes := writer(modality):
        _check_write(modality, writes, raw, fixed)
    assert pickle.dumps(raw) == kept, "purity law: a method changes what read returned; others may use it too"
    _check_less_detail(modality, source, drawn)
    _check_reading(modality, source, fixed)
    _check_streams(modality, source, fixed)
    for name in modality.metrics:
        try:
            registry().find("metric", name)
        except VqcoreError as error:
            raise AssertionError(f"metrics law: {error}") from error


def _made(modality: Any, raw: Any, view: View) -> Tensor:
    """One sample as the tokenizer sees it."""
    return finish(modality, modality.tensor(raw, view).unsqueeze(0))[0]


def _check_ride(modality: Any, raw: Any, view: View) -> None:
    """Beside a main modality with samples of its own kind, if the modality takes part there: a view and its tensor."""
    try:
        own = ride(modality, view, modality.spec)
    except ValueError:
        return
    assert len(own.size) == modality.spec.rank, f"ride law: the size {own.size} has {len(own.size)} axes"
    _check_view(own, own.size)
    _check_tensor(modality, raw, own)


def _check_sizing(modality: Any, source: Any, raw: Any) -> None:
    """Words for axes, windows of the wanted length, a known extent, a value to fill up with."""
    how, extent, size = sizing(modality), modality.extent(raw), modality.spec.size
    assert len(how) == modality.spec.rank, (
        f"sizing law: {len(how)} words for {modality.spec.rank} axes, not one per axis"
    )
    for rng in (None, np.random.default_rng(0)):
        view = modality.view(extent, within(how, extent, size), rng)
        for axis, (low, high, n) in enumerate(zip(view.start, view.stop, extent)):
            taken = round((high - low) * n, 3)
            if how[axis] in ("window", "pad"):
                assert taken == view.size[axis], (
                    f"sizing law: axis {axis} is '{how[axis]}', but {taken:g} of {n} positions become {view.size[axis]}"
                )
    known = extent_of(modality, source)
    assert known == extent, f"extent law: extent_of says {known}, extent {extent}"
    value, spec = fill(modality), modality.spec
    low, high = spec.range or (-math.inf, math.inf)
    assert value is None or (math.isfinite(value) and low <= value <= high), (
        f"fill law: {value} is no value of the samples"
    )


def _check_finish(modality: Any, raw: Any, views: Sequence[View]) -> None:
    """A finished sample does not depend on its batch, and `finish` changes no input."""
    batch = torch.stack([modality.tensor(raw, view) for view in views])
    given = batch.clone()
    together = finish(modality, batch)
    assert torch.equal(batch, given), "purity law: finish changes its input"
    assert len(together) == len(views), f"finish law: {len(together)} samples come out, {len(views)} went in"
    for one, view in zip(together, views):
        close(
            _made(modality, raw, view).float(), one.float(), "batch law: a finished sample changes in a batch"
        )


def _check_other_size(modality: Any, raw: Any, size: tuple[int, ...]) -> None:
    """A sample at another size than the nominal one, unless the modality refuses the size."""
    try:
        x = _made(modality, raw, modality.view(modality.extent(raw), size, None))
    except DataError:
        return
    found = tuple(x.shape[x.ndim - len(size) :])
    assert found == size, f"size law: a view of {size} gives a tensor of {found}"


def _check_less_detail(modality: Any, source: Any, drawn: Sequence[View]) -> None:
    """`read` with `at_least` keeps the extent and gives nearly the same training samples."""
    raw, reduced = modality.read(source), modality.read(source, at_least=modality.spec.size)
    extents = modality.extent(raw), modality.extent(reduced)
    assert extents[0] == extents[1], f"detail law: the extent is {extents[0]}, with at_least {extents[1]}"
    for view in drawn:
        x, less = _made(modality, raw, view).double(), _made(modality, reduced, view).double()
        assert x.shape == less.shape, f"detail law: tensors are {tuple(x.shape)} and {tuple(less.shape)}"
        off, most = float((x - less).abs().mean()), REDUCED * float((x.max() - x.min()).clamp(min=1e-6))
        assert off <= most, (
            f"detail law: the mean difference of a training sample is {off:.3g}, more than {most:.3g}"
        )


def _check_view(view: View, size: tuple[int, ...]) -> None:
    assert view.size == size, f"view law: the size of the view is {view.size}, not {size}"
    counts = len(view.start), len(view.stop)
    assert counts == (len(size), len(size)), (
        f"view law: start and stop have {counts[0]} and {counts[1]} entries for {len(size)} axes, not one per axis"
    )
    inside = all(0 <= low < high <= 1 + 1e-9 for low, high in zip(view.start, view.stop))
    assert inside and view.start, (
        f"view law: {view.start} to {view.stop} does not lie inside the sample; fractions are 0 to 1"
    )


def _check_tensor(modality: Any, raw: Any, view: View) -> None:
    spec, x = modality.spec, _made(modality, raw, view)
    lead = () if spec.labels is not None else (spec.channels,)
    wanted, found = (*lead, *view.size), tuple(x.shape)
    assert found == wanted, f"shape law: {found}, not {wanted}"
    assert torch.equal(_made(modality, raw, view), x), "determinism law: two tensors of one view differ"
    if spec.labels is not None:
        assert not x.is_floating_point(), f"type law: class ids are {x.dtype}, not integers"
        least, most = int(x.min()), int(x.max())
        assert 0 <= least <= most < spec.labels, (
            f"range law: class ids {least}..{most}, the spec has {spec.labels} labels"
        )
    else:
        assert x.dtype == torch.float32, f"type law: the tensor is {x.dtype}, not float32"
        finite(x, "the tensor")
    if spec.range and x.is_floating_point():
        low, high = float(x.min()), float(x.max())
        slack = 1e-3 * (spec.range[1] - spec.range[0])
        inside = spec.range[0] - slack <= low <= high <= spec.range[1] + slack
        assert inside, f"range law: values {low:.3g}..{high:.3g}, the spec says {spec.range}"
    if (hole := hole_value(modality)) is not None:
        last, channels = x[-1], x[:-1]
        assert bool((last.abs() == 1).all()), (
            "hole law: the last channel has other values than 1 (valid) and -1 (invalid)"
        )
        holes = (last < 0).expand_as(channels)
        filled = bool((channels[holes] == hole).all())
        assert filled, f"hole law: invalid positions have other values than {hole}"
    if (counts := weight(modality, raw, view)) is not None:
        good = counts.dtype == torch.float32 and tuple(counts.shape) == view.size
        assert good, (
            f"weight law: the weight is {counts.dtype} {tuple(counts.shape)}, not float32 {view.size}"
        )
        finite(counts, "the weight")
        assert float(counts.min()) >= 0, f"weight law: a position counts {float(counts.min()):.3g}, below 0"
    if (valid := mask(modality, raw, view)) is not None:
        good = valid.dtype == torch.bool and tuple(valid.shape) == view.size
        assert good, f"mask law: the mask is {valid.dtype} {tuple(valid.shape)}, not bool {view.size}"
        assert bool(valid.any()) or view.start != (0.0,) * len(view.start), "mask law: no position is valid"


def _check_show(modality: Any, raw: Any, view: View, tolerance: float, waived: Mapping[str, str]) -> None:
    x, spec = _made(modality, raw, view), modality.spec
    shown = modality.show(x)
    assert shown is not None, "show law: show returns nothing"
    if isinstance(modality, HasPicture):
        assert isinstance(modality.picture(x), Image.Image), "show law: picture does not return a PIL image"
    beyond = [channel for channel in shown_channels(modality) if not 0 <= channel < len(x)]
    assert not beyond, (
        f"show law: shown_channels has {beyond[0] if beyond else ''}, but the tensor has {len(x)} channels"
    )
    if isinstance(modality, HasValues):
        batch = _scores(x, spec) if spec.labels is not None else x.unsqueeze(0)
        values = modality.values(batch)
        good = values.is_floating_point() and values.ndim == batch.ndim and len(values) == 1
        assert good, (
            f"values law: values returns {values.dtype} {tuple(values.shape)}, not float (b, c, *size)"
        )
        named = not spec.names or len(spec.names) == values.shape[1]
        assert named, (
            f"names law: the spec names {len(spec.names)} channels, and values have {values.shape[1]}"
        )
        valid = mask(modality, raw, view)
        finite(values if valid is None else values[valid.expand_as(values)], "values at valid positions")
    if "round-trip" in waived:
        return
    again = _again(modality, x, view)
    _near(again, x, tolerance, "round-trip law: read(show(x)) is not x")
    if "flip" not in waived:
        mirrored = _made(modality, raw, replace(view, flip=not view.flip))
        back = _again(modality, mirrored, replace(view, flip=not view.flip))
        _near(back, x, tolerance, "flip law: mirroring a sample twice changes it")


def _check_write(modality: Any, writes: Writes, raw: Any, view: View) -> None:
    """`write` makes a file with a suffix of the modality, and `read` takes the file."""
    kind = writes.written
    assert kind in modality.suffixes, (
        f"write law: written is {kind}, the suffixes are {', '.join(modality.suffixes)}"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{kind}"
        writes.write(modality.show(_made(modality, raw, view)), path)
        assert path.is_file(), f"write law: write made no file {path.name}"
        try:
            modality.read(path)
        except (DataError, OSError) as error:
            raise AssertionError(f"write law: read does not take what write writes: {error}") from error


def _again(modality: Any, x: Tensor, view: View) -> Tensor:
    """A shown tensor, read again as a whole; mirrored if the view is mirrored."""
    try:
        raw = modality.read(modality.show(x))
    except (DataError, OSError, TypeError, ValueError) as error:
        raise AssertionError(f"round-trip law: read does not take what show returns: {error}") from error
    whole = modality.view(modality.extent(raw), view.size, None)
    return _made(modality, raw, replace(whole, flip=view.flip))


def _near(found: Tensor, wanted: Tensor, tolerance: float, law: str) -> None:
    off = float((found.double() - wanted.double()).abs().max())
    most = tolerance * max(1.0, float(wanted.double().abs().max())) if wanted.is_floating_point() else 0.0
    assert off <= most, f"{law}: the largest difference is {off:.3g}, more than {most:.3g}"


def _scores(x: Tensor, spec: DataSpec) -> Tensor:
    """Certain scores of a class map: a batch of one."""
    return 10 * torch.nn.functional.one_hot(x.long(), spec.labels or 1).movedim(-1, 0).unsqueeze(0).float()


def _check_reading(modality: Any, source: Any, view: View) -> None:
    """`read` raises a known error for a damaged file; NaN and infinity never reach a tensor."""
    try:
        hash(reading(modality))
    except TypeError as error:
        raise AssertionError(f"reading law: reading cannot be compared: {error}") from error
    assert reading(modality) == reading(modality), "reading law: reading is different when asked again"
    strange = [
        suffix for suffix in modality.suffixes if not suffix.startswith(".") or suffix.lower() != suffix
    ]
    assert not strange, f"suffix law: '{strange[0]}' is not a lower-case suffix with a dot"
    with tempfile.TemporaryDirectory() as folder:
        for suffix in modality.suffixes:
            path = Path(folder) / f"damaged{suffix}"
            path.write_bytes(b"\x00not a sample")
            for given, what in ((path, "a damaged file"), (path.with_stem("absent"), "a missing file")):
                _refuses("read", modality.read, given, f"{what} ({suffix})")
                less = functools.partial(modality.read, at_least=view.size)
                _refuses("read with at_least", less, given, f"{what} ({suffix})")
    for bad in (np.nan, np.inf):
        holed = _with_value(source, bad)
        if holed is None:
            return
        try:
            x = _made(modality, modality.read(holed), view)
        except DataError:
            continue
        finite(x, f"read takes an array with {bad}, and the tensor is not finite")


def _check_streams(modality: Any, source: Any, view: View) -> None:
    """A file in memory is read like the file, also a second time; a damaged one is refused by its name."""
    known = streams(modality)
    strange = [suffix for suffix in known if suffix not in modality.suffixes]
    assert not strange, f"streams law: '{strange[0]}' is not one of the suffixes"
    for suffix in known:
        damaged = Content(b"\x00not a sample", "damaged", f"damaged{suffix}")
        _refuses("read", modality.read, damaged, f"a damaged stream ({suffix})")
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is None or path.suffix.lower() not in known:
        return
    stream = Content(path.read_bytes(), str(path), path.name)
    wanted = modality.tensor(modality.read(path), view)
    for time in ("", " a second time"):
        try:
            found = modality.tensor(modality.read(stream), view)
        except Exception as error:
            raise AssertionError(f"streams law: a stream cannot be read{time}: {error}") from error
        assert _same(found, wanted), f"streams law: a stream read{time} differs from its file"


def _refuses(name: str, read: Callable[[Any], Any], given: Any, what: str) -> None:
    try:
        read(given)
    except (DataError, OSError):
        return
    except Exception as error:
        raise AssertionError(
            f"damage law: {what} raises {type(error).__name__}: {error}; raise DataError, so that a run skips it"
        ) from error
    raise AssertionError(f"damage law: {name} takes {what}")


def _with_value(source: Any, value: float) -> np.ndarray | None:
    """The source with its first value replaced, if it is an array of floats."""
    if not isinstance(source, np.ndarray) or source.dtype.kind != "f":
        return None
    holed = source.copy()
    holed.reshape(-1)[0] = value
    return holed


def check_data(data: Any, modality: Any, extra: Mapping[str, Any] | None = None) -> None:
    """The laws of a data source that was built for a modality and extra modalities (by label)."""
    check_members("data", data)
    count = len(data)
    assert count > 0, "length law: there are no samples; the constructor must raise DataError"
    places = sorted({*range(min(count, KEYS)), count - 1})
    keys = [data.key(index) for index in places]
    for key in keys:
        path = PurePosixPath(key)
        good = isinstance(key, str) and key and not path.is_absolute() and ".." not in path.parts
        assert good and "\\" not in key, (
            f"key law: '{key}' is not a relative path with forward slashes inside the folder"
        )
    twice = len(keys) - len(set(keys))
    assert not twice, f"key law: {twice} of {len(keys)} keys are not unique, e.g. '{_repeated(keys)}'"
    _check_codes(data)
    for kind, number in left_out(data).items():
        good = isinstance(kind, str) and kind and isinstance(number, int) and number > 0
        assert good, f"left-out law: {number!r} x {kind!r} is not how many entries of a kind are left out"
    _check_shards(shards(data), count)
    readers = {"": modality, **(extra or {})}
    chosen = sorted({0, count // 2, count - 1})
    for index in chosen if isinstance(data, KnowsBytes) else ():
        given, known = data.get(index), data.bytes_of(index)
        source = given.source if isinstance(given, Window) else given
        true = Path(source).stat().st_size if isinstance(source, (str, Path)) else known
        assert known in (None, true), f"bytes law: sample {index} has {true} bytes, bytes_of says {known}"
    if (laid := blocks(data)) is not None:
        sizes = [int(size) for size in laid.sizes]
        good = sum(sizes) == count and min(sizes) > 0 and laid.together > 0
        assert good, (
            f"blocks law: blocks of {sizes[:10]} samples, {laid.together} together, for {count} samples"
        )
    first = {
        (index, label): _raw(data, index, label, reader)
        for index in chosen
        for label, reader in readers.items()
    }
    copied = pickle.loads(pickle.dumps(data))
    for again, how in (
        (data, "when asked again in another order"),
        (copied, "in a worker process (pickled)"),
    ):
        assert len(again) == count, f"length law: {len(again)} samples {how}, {count} before"
        assert [again.key(index) for index in places[:10]] == keys[:10], (
            f"key law: the keys are different {how}"
        )
        expect(again, reversed(chosen), alone=again is copied)
        for (index, label), wanted in reversed(first.items()):
            found = _raw(again, index, label, readers[label])
            assert _same(found, wanted), f"determinism law: sample {index} ('{label}') is different {how}"


def _check_shards(own: Sequence[tuple[str, int]] | None, count: int) -> None:
    """The names of shards differ and fit in a file name; all samples lie in one."""
    if own is None:
        return
    names, total = [name for name, _ in own], sum(number for _, number in own)
    assert total == count, f"shards law: the shards have {total} samples, the source has {count}"
    assert len(set(names)) == len(names), f"shards law: two shards are called '{_repeated(names)}'"
    wrong = [name for name in names if not name or "/" in name or name.startswith(".") or len(name) > 200]
    assert not wrong, f"shards law: '{wrong[0]}' does not fit in a file name"


def _repeated(keys: Sequence[str]) -> str:
    return next(key for place, key in enumerate(keys) if key in keys[:place])


def _raw(data: Any, index: int, label: str, reader: Any) -> Tensor:
    """The tensor of a sample, before `finish`, in the view for evaluation."""
    given = data.get(index, label) if label else data.get(index)
    try:
        found = opened(reader, given)
        view = found.within(sized(reader, found, reader.spec.size))
    except (DataError, OSError) as error:
        raise AssertionError(f"reading law: sample {index} ('{label}') cannot be read: {error}") from error
    return reader.tensor(found.raw, view)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def _check_codes(data: Any) -> None:
    """The laws of the codes that a data source knows of its samples; nothing for one that knows none."""
    known = knows_codes(data)
    if known is None:
        return
    made = known.made or {}
    shape, most = (*made["grid"], made["num_codebooks"]), made["codebook_size"]
    for index in sorted({0, len(data) // 2, len(data) - 1}):
        row, key = known.coded(index), data.key(index)
        assert row is not None, f"codes law: made is a manifest, and there are no codes of '{key}'"
        assert row.key == key, f"codes law: the codes of '{key}' are those of '{row.key}'"
        codes = row.codes
        assert codes.dtype == np.int64, f"codes law: the codes of '{key}' are {codes.dtype}, not int64"
        assert codes.shape == shape, f"codes law: the codes of '{key}' have shape {codes.shape}, not {shape}"
        inside = 0 <= codes.min() <= codes.max() < most
        assert inside, f"codes law: {codes.min()} to {codes.max()} of '{key}' do not lie in [0, {most})"


def check_metric(metric: Any, spec: DataSpec, *, waived: Mapping[str, str] | None = None) -> None:
    """The laws of a metric for data of `spec`, on noise.

    `waived` maps laws of `METRIC_WAIVABLE` that the metric does not follow to the reason.
    """
    waived = check_waived(waived, METRIC_WAIVABLE)
    check_members("metric", metric)
    x, perfect, poor = metric_batches(spec)
    keys = tuple(f"sample{number}" for number in range(len(x)))
    set_up(metric, x.device)
    try:
        metric.measure(poor.clone(), x.clone(), None, keys=keys, weight=None)
    except TypeError as error:
        raise AssertionError(
            f"call law: measure(x_hat, x, mask=None, *, keys=(), weight=None) raises TypeError: {error}"
        ) from error
    _check_facts(metric)
    given = poor.clone(), x.clone()
    sums = metric.measure(poor, x, keys=keys)
    if gives_rows(metric):
        _check_rows(metric, sums, len(x))
    for name, value in sums.items():
        if not gives_rows(metric):
            assert value.dtype == torch.float64, f"sums law: '{name}' is {value.dtype}, not float64"
        finite(value, f"the {'rows' if gives_rows(metric) else 'sum'} '{name}'")
    assert torch.equal(given[0], poor) and torch.equal(given[1], x), "purity law: the input is changed"
    for cuts in ((1, 4), (3, 2), (1, 1, 1, 1, 1)):
        parts = [metric.measure(a, b) for a, b in zip(poor.split(cuts), x.split(cuts))]
        _check_additive(metric, sums, parts, f"batches of {cuts}")
    order = [3, 0, 4, 2, 1]
    shuffled = metric.measure(poor[order], x[order])
    if gives_rows(metric):
        shuffled = {name: value[torch.tensor(order).argsort()] for name, value in shuffled.items()}
    _check_additive(metric, sums, [shuffled], "another order")
    if "mask" not in waived:
        _check_mask(metric, x, poor)
    _check_weight(metric, x, poor, is_mask="mask" not in waived)
    found = metric.summary(for_summary(metric, sums))
    best = metric.summary(for_summary(metric, metric.measure(perfect, x)))
    for name, value in (*found.items(), *best.items()):
        assert isinstance(value, float) and math.isfinite(value), (
            f"summary law: '{name}' is {value!r}, not a finite float"
        )
    assert set(found) == set(best), (
        f"summary law: the names are {sorted(found)}, for a perfect reconstruction {sorted(best)}"
    )
    way = better(metric)
    if "" in found:
        assert way in ("higher", "lower"), (
            f"direction law: better is {way!r}; set it to 'higher' or 'lower' for the value with the metric's own name"
        )
        right = best[""] > found[""] if way == "higher" else best[""] < found[""]
        assert right, (
            f"direction law: {way} is better, but a perfect reconstruction has {best['']:.4g} "
            f"and noise {found['']:.4g}"
        )


def _check_facts(metric: Any) -> None:
    if isinstance(metric, HasFacts):
        known = metric.facts()
        texts = all(isinstance(each, str) for pair in known.items() for each in pair)
        assert texts, f"facts law: facts returns {known!r}, not texts by name"
        assert metric.facts() == known, "facts law: facts returns something else when it is called again"


def _check_rows(metric: Any, rows: Mapping[str, Tensor], count: int) -> None:
    """One row for each sample, of a type that vqcore keeps, under names that it does not use itself."""
    for name, value in rows.items():
        assert value.ndim and len(value) == count, (
            f"rows law: '{name}' has the shape {tuple(value.shape)} for {count} samples; the first axis is samples"
        )
        assert value.dtype in (torch.float32, torch.float64), (
            f"rows law: '{name}' is {value.dtype}, not float32 or float64"
        )
    assert gathers(metric) or "count" not in rows, (
        "rows law: 'count' is the number of rows, which vqcore adds; rename yours"
    )


def metric_batches(spec: DataSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Five samples, their perfect reconstruction, and an unrelated reconstruction."""
    rng = generator(0, "check", "metric")
    shape = (5, spec.channels, *spec.size)
    if spec.labels is not None:
        x = torch.randint(spec.labels, (5, *spec.size), generator=rng)
        perfect = torch.cat([_scores(one, spec) for one in x])
        return x, perfect, torch.randn(perfect.shape, generator=rng)
    low, high = spec.range or (-2.0, 2.0)
    x, poor = (torch.rand(shape, generator=rng) * (high - low) + low for _ in range(2))
    if spec.kind == "binary":
        x = torch.where(x > (low + high) / 2, high, low)
    if spec.kind == "unit-vector":
        x, poor = (torch.nn.functional.normalize(each, dim=1) for each in (x, poor))
    return x, x.clone(), poor


def _check_additive(
    metric: Any, sums: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]], how: str
) -> None:
    for part in parts:
        assert set(part) == set(sums), (
            f"sums law: names are {sorted(part)} in {how}, {sorted(sums)} in one batch"
        )
    for name, whole in sums.items():
        pieces = [part[name] for part in parts]
        total = torch.cat(pieces) if gives_rows(metric) else sum(pieces, torch.zeros_like(whole))
        off = _distance(total, whole)
        remedy = (
            "rows must not depend on the batch" if gives_rows(metric) else "sums must add up over samples"
        )
        assert off <= 1e-6, f"sums law: '{name}' over {how} differs by {off:.3g} from one batch; {remedy}"


def _check_mask(metric: Any, x: Tensor, x_hat: Tensor) -> None:
    """A mask of all True changes nothing; invalid positions do not matter."""
    size = x_hat.shape[2:]
    mask = torch.ones((len(x), *size), dtype=torch.bool)
    plain, whole = metric.measure(x_hat, x), metric.measure(x_hat, x, mask)
    _check_additive(metric, plain, [whole], "a mask of all True")
    if mask[0].numel() < 2:
        return
    mask.flatten(1)[:, ::2] = False
    hidden = x_hat.clone()
    hidden.flatten(2)[:, :, ::2] = hidden.flatten(2)[:, :, ::2].flip(0, 1)
    part, other = metric.measure(x_hat, x, mask), metric.measure(hidden, x, mask)
    for name, value in part.items():
        off = _distance(other[name], value)
        assert off <= 1e-6, f"mask law: invalid positions change '{name}' by {off:.3g}"


def _check_weight(metric: Any, x: Tensor, x_hat: Tensor, is_mask: bool) -> None:
    """A weight of 1 changes nothing, a weight of 0 is a mask, and other weights count; or weights are refused."""
    one = torch.ones((len(x), *x_hat.shape[2:]))
    try:
        whole = metric.measure(x_hat, x, weight=one)
    except VqcoreError:
        return
    plain = metric.measure(x_hat, x)
    for name, value in plain.items():
        off = _distance(whole[name], value)
        assert off <= 1e-6, f"weight law: a weight of 1 changes '{name}' by {off:.3g}"
    if one[0].numel() < 2:
        return
    half = one.clone()
    half.flatten(1)[:, ::2] = 0
    masked, weighted = metric.measure(x_hat, x, half > 0), metric.measure(x_hat, x, weight=half)
    for name, value in masked.items() if is_mask else ():
        off = _distance(weighted[name], value)
        assert off <= 1e-6, (
            f"weight law: '{name}' with a weight of 0 differs by {off:.3g} from that with a mask"
        )
    uneven = metric.measure(x_hat, x, weight=half + 1)
    assert any(_distance(uneven[name], value) > 1e-6 for name, value in plain.items()), (
        "weight law: weights change nothing; raise ConfigError for weights (vqcore.metrics.sums.refuse_weight)"
    )


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of 1 or of the largest value."""
    return float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
