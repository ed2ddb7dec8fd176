"""Own data: scales, named channels, what is missing, weights, errors in units, and what `check` says of values."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toys import run_config, run_tree, toy  # noqa: F401

from vqcore.check.samples import samples
from vqcore.check.values import propose_scale, suits, summarise
from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.data.reader import Reader
from vqcore.errors import ConfigError, DataError, SettingError
from vqcore.metrics.pixels import Channels
from vqcore.modalities.array import Array
from vqcore.modalities.scale import Scale
from vqcore.pictures import picture
from vqcore.protocols import Batch, DataSpec, View, mask, values, weight
from vqcore.run.state import build
from vqcore.schema import RunConfig
from vqcore.testing.checks import check_modality
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


def scale_of(kind, **numbers):
    """A scale as a config file gives it: whole numbers are numbers too."""
    found = {
        k: tuple(map(float, v)) if isinstance(v, (tuple, list)) else float(v) for k, v in numbers.items()
    }
    return Scale(kind=kind, **found)


KINDS = {
    "range": scale_of("range", low=(-1.0, 0.0), high=(1.0, 50.0)),
    "robust": scale_of("robust", low=0.5, high=(1.0, 2.0)),
    "standard": scale_of("standard", mean=(0.25, 20.0), std=(0.5, 3.0)),
    "log": scale_of("log", low=1e-3, high=100.0),
    "arcsinh": scale_of("arcsinh", centre=(0.0, 10.0), width=0.1),
}
BANDS = ("B02", "B03", "B04", "B08")


def array(size=None, **settings):
    return Array(Array.Config(name="array", **settings), size=size)


def whole(size):
    return View((0.0,) * len(size), (1.0,) * len(size), size)


def tensor(modality, source):
    raw = modality.read(source)
    return modality.tensor(raw, whole(modality.spec.size))


def masked(modality, source):
    return mask(modality, modality.read(source), whole(modality.spec.size))


# ---------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize(
    ("scale", "value", "x"),
    [
        (scale_of("range", low=0, high=10), 7.5, 0.5),
        (scale_of("robust", low=0, high=10), 20, 3),
        (scale_of("standard", mean=5, std=2), 9, 2),
        (scale_of("log", low=1, high=100), 10, 0),
        (scale_of("log", low=1, high=100), 1000, 2),
        (scale_of("arcsinh", centre=1, width=2), 3, np.arcsinh(1)),
        (scale_of("arcsinh", centre=1, width=2), -1e6, -np.arcsinh(500000.5)),
    ],
)
def test_each_kind_maps_values_as_it_says(scale, value, x):
    assert scale.encode(np.array([[value]]))[0, 0] == pytest.approx(x, rel=1e-6, abs=1e-7)
    assert scale.decode(np.array([[x]]))[0, 0] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_show_and_values_undo_a_scale(kind):
    scale = KINDS[kind]
    a = np.random.default_rng(0).uniform(0.01, 0.99, (2, 6, 5)) * [[[1.0]], [[40.0]]]
    modality = array(channels=2, size=(6, 5), scale=scale)
    x = tensor(modality, a)
    assert x.dtype == torch.float32 and modality.spec.range == ((-1.0, 1.0) if kind == "range" else None)
    assert np.allclose(modality.show(x), a, rtol=1e-5, atol=1e-6)
    assert np.allclose(values(modality, x.unsqueeze(0))[0], a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_an_untrained_decoder_says_is_finite_in_units(kind):
    shown = KINDS[kind].decode(np.array([[1e4, -1e4], [3e38, -3e38]], np.float32))
    assert np.isfinite(shown).all()


def test_range_is_short_for_a_scale():
    a = np.random.default_rng(0).uniform(-3, 5, (1, 7))
    short, long = (
        array(channels=1, size=(7,), range=(-3.0, 5.0)),
        array(channels=1, size=(7,), scale=scale_of("range", low=-3, high=5)),
    )
    assert torch.equal(tensor(short, a), tensor(long, a)) and short.spec == long.spec


def test_a_range_for_each_channel_refuses_by_channel():
    modality = array(channels=2, size=(3,), scale=scale_of("range", low=(0, 10), high=(1, 20)))
    assert tensor(modality, np.array([[0, 0.5, 1], [10, 15, 20]])).tolist() == [[-1, 0, 1], [-1, 0, 1]]
    with pytest.raises(DataError, match=r"the value 1.5 at \[1, 2\] .* outside the declared range 10 to 20"):
        modality.read(np.array([[0, 0.5, 1], [10, 15, 1.5]]))


def test_a_logarithm_refuses_zero_and_names_the_way_out():
    with pytest.raises(
        DataError, match=r"the value 0.0 at \[0, 1\] .*has no logarithm; scale.kind=arcsinh takes"
    ):
        array(channels=1, size=(2,), scale=KINDS["log"]).read(np.array([1.0, 0.0]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "standard", "mean": 0}, "std=is required by kind 'standard'. vqcore check CONFIG --values"),
        ({"kind": "standard", "mean": 0, "std": 0}, "std=0 must be above 0"),
        ({"kind": "standard", "mean": 0, "std": 1, "low": 3}, "low=does nothing with kind 'standard'"),
        ({"kind": "robust", "low": 3, "high": (4, 2)}, r"high=\[4.0, 2.0\] must be above low=3"),
        ({"kind": "robust", "low": (1, 2, 3), "high": (4, 5)}, "high=has 2 numbers and low has 3"),
        ({"kind": "log", "low": 0, "high": 1}, "low=0 must be above 0: only such values"),
        ({"kind": "arcsinh", "centre": 0, "width": -1}, "width=-1 must be above 0"),
    ],
)
def test_scales_that_cannot_be(settings, says):
    with pytest.raises(SettingError, match=says):
        scale_of(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scale": KINDS["log"], "range": (0.0, 1.0)}, "range and scale are both set"),
        ({"scale": KINDS["standard"], "channels": 3}, "scale has 2 numbers for 3 channels"),
        (
            {"scale": KINDS["standard"], "channels": ("a", "b", "w"), "weight": "w", "kind": "angle"},
            "no meaning",
        ),
        ({"scale": KINDS["log"], "kind": "binary"}, "scale has no meaning for kind 'binary'; range takes"),
        (
            {"scale": KINDS["log"], "kind": "categorical", "labels": 3, "channels": None},
            "no meaning for kind",
        ),
        ({"channels": ("a", "a")}, r"\['a', 'a'\] names a channel twice"),
        ({"channels": ("a", "b c")}, "'b c' is no name"),
        ({"channels": ("B02", "ivar"), "weight": "ivr"}, "ivr is no channel; .*Did you mean 'ivar'"),
        ({"channels": 2, "weight": "ivar"}, "names no channels"),
        ({"channels": 2, "weight": 2}, "2: channels are 0 to 1"),
        ({"channels": 1, "weight": 0}, "must be at least 2 .* and a channel of weights"),
        ({"channels": BANDS, "picture": ("B04", "B03")}, "must be one channel or three"),
        ({"channels": BANDS, "picture": ("B04", "B03", "B99")}, "B99 is no channel"),
        (
            {"channels": BANDS, "picture": ("B02",), "weight": "B02"},
            "the channel of weights, which is no picture",
        ),
    ],
)
def test_arrays_that_cannot_be(settings, says):
    with pytest.raises(SettingError, match=says):
        Array.Config(name="array", **{"channels": 2, **settings})


def test_a_config_names_the_key_of_a_wrong_scale(tmp_path):
    modality = {"name": "array", "channels": 2, "size": [8, 8], "scale": {"kind": "standard", "mean": 0}}
    with pytest.raises(ConfigError, match=r"data.modality.scale.std"):
        run_config(tmp_path, data__modality=modality)
    with pytest.raises(ConfigError, match=r"data.modality.scale.(sdt|.*std)"):
        run_config(tmp_path, data__modality={**modality, "scale": {"kind": "standard", "mean": 0, "sdt": 1}})


@pytest.mark.parametrize("size", [(8,), (8, 6), (4, 4, 6)])
def test_laws_of_arrays_with_scales_holes_and_weights(size):
    rng = np.random.default_rng(0)
    extent = tuple(n + 3 for n in size)
    crops = {"hflip": 0.5, "min_crop_scale": 0.9, "size": size, "sizing": "resize"}
    a = rng.uniform(0.1, 3, (2, *extent))
    for scale in KINDS.values():
        check_modality(array(channels=2, scale=scale, **crops), a / 3)
    holes = a.copy()
    holes[:, 0] = np.nan
    check_modality(array(channels=("u", "v"), scale=KINDS["log"], nodata=(), **crops), holes)
    check_modality(array(channels=("u", "w"), weight="w", **crops), a)
    classes = rng.integers(0, 4, extent)
    classes[0] = 255
    check_modality(array(kind="categorical", labels=4, nodata=(255.0,), **crops), classes)


# ----------------------------------------------------------------------------------------- what is missing


MISSING = [
    ("NaN", np.array([[1, np.nan, 3]]), ()),
    ("infinity", np.array([[1, np.inf, 3]], np.float32), ()),
    ("a number of GDAL", np.array([[1, -3.4028235e38, 3]], np.float32), ()),
    ("a declared value", np.array([[1, -9999, 3]], np.float32), (-9999.0,)),
    ("a declared integer", np.array([[1, 255, 3]], np.uint8), (255.0,)),
    ("a mask of NumPy", np.ma.masked_array([[1, 7, 3]], [[False, True, False]]), ()),
]


@pytest.mark.parametrize(("a", "nodata"), [case[1:] for case in MISSING], ids=[case[0] for case in MISSING])
def test_what_is_missing_becomes_the_mask(a, nodata):
    modality = array(channels=1, size=(3,), nodata=nodata, scale=scale_of("standard", mean=1, std=2))
    assert modality.spec.mask
    assert masked(modality, a).tolist() == [True, False, True]
    assert tensor(modality, a).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("a", "says"),
    [
        (
            np.array([[1, np.nan, 3]]),
            r"the value nan at \[0, 1\] .*data.modality.nodata=\[\] takes NaN and infinity",
        ),
        (
            np.ma.masked_array([[1, 7, 3]], [[0, 1, 0]]),
            r"marks 1 of 3 values as missing; data.modality.nodata=\[\]",
        ),
        (np.array([[1, -np.inf, 3]]), "the value -inf"),
    ],
)
def test_nothing_may_be_missing_by_default(a, says):
    with pytest.raises(DataError, match=says):
        array(channels=1, size=(3,)).read(a)


def test_a_sample_without_any_value_is_refused():
    with pytest.raises(
        DataError, match="no position where every channel has a value; -1, NaN and infinity count"
    ):
        array(channels=2, size=(2,), nodata=(-1.0,)).read(np.array([[np.nan, 1], [0, -1]]))


def test_a_mask_from_a_reader_survives_the_layout_of_channels():
    a = np.ma.masked_array(np.arange(12.0).reshape(2, 3, 2), False)
    a[1, 2, 0] = np.ma.masked
    modality = array(channels=2, size=(2, 3), nodata=(), channels_last=True)
    assert masked(modality, a).tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize("size", [(6,), (5, 4), (3, 4, 5)])
@pytest.mark.parametrize("factor", [0.5, 1, 1.7])
def test_no_missing_value_reaches_a_valid_position(size, factor):
    """Whatever stands at the missing positions of the file, tensor and mask are the same, and finite."""
    rng = np.random.default_rng(0)
    extent = tuple(max(2, round(n * factor)) for n in size)
    a, absent = rng.normal(size=(2, *extent)), rng.random((2, *extent)) < 0.1
    absent.flat[0] = True
    modality = array(channels=2, size=size, nodata=(77.0,))
    found = []
    for filling in (np.nan, 77.0, np.inf):
        raw = modality.read(np.where(absent, filling, a))
        found.append((modality.tensor(raw, whole(size)), modality.mask(raw, whole(size))))
    for x, valid in found:
        assert torch.equal(x, found[0][0]) and torch.equal(valid, found[0][1]) and x.isfinite().all()
        assert not valid.all() and not x[:, ~valid].any()
    # At valid positions the tensor is that of the same array with other numbers in the holes.
    plain = array(channels=2, size=size)
    x, valid = found[0]
    for number in (0.0, 50.0):
        other = tensor(plain, np.where(absent, number, a))
        assert torch.allclose(x[:, valid], other[:, valid], atol=0.1 if number else 1e-5)


def test_classes_without_data_are_masked():
    classes = np.array([[0, 2, 255], [1, 255, 2]], np.uint8)
    modality = array(kind="categorical", labels=3, size=(2, 3), nodata=(255.0,))
    assert tensor(modality, classes).tolist() == [[0, 2, 0], [1, 0, 2]]
    assert masked(modality, classes).tolist() == [[True, True, False], [True, False, True]]
    with pytest.raises(DataError, match="the value 7"):
        modality.read(np.where(classes == 0, 7, classes))


# ----------------------------------------------------------------------------------------------- weights


def test_a_channel_of_weights_is_no_value():
    a = np.stack([np.arange(4.0), np.array([1, 0, 2, np.nan]), np.arange(4.0) * 10])
    modality = array(channels=("u", "ivar", "v"), weight="ivar", size=(4,), nodata=(), picture=("v",))
    assert (
        modality.spec.channels == 2 and modality.spec.names == ("u", "v") and modality.shown_channels == (1,)
    )
    raw = modality.read(a)
    assert weight(modality, raw, whole((4,))).tolist() == [1, 0, 2, 0]
    assert modality.mask(raw, whole((4,))).all()
    assert modality.tensor(raw, whole((4,))).tolist() == [a[0].tolist(), a[2].tolist()]
    assert np.array_equal(modality.show(torch.tensor([[1.0], [2.0]]).expand(2, 4))[1], np.ones(4))
    with pytest.raises(DataError, match=r"the value -2.0 at \[1, 0\] .*is a weight below 0"):
        modality.read(np.where(np.arange(3)[:, None] == 1, -2.0, a))
    assert weight(array(channels=1, size=(4,)), a[:1], whole((4,))) is None


# ---------------------------------------------------------------------------------- errors of each channel


def oracle(x_hat, x, counts):
    off = (x_hat - x) * 1.0
    total = counts.sum()
    squared, absolute, signed = ((each * counts).sum((0, 2)) / total for each in (off**2, abs(off), off))
    return np.sqrt(squared), absolute, signed


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_errors_of_each_channel(hidden, weighted):
    rng = np.random.default_rng(0)
    x, x_hat = rng.normal(size=(2, 5, 3, 7))
    valid, counts = rng.random((5, 1, 7)) < 0.7, rng.random((5, 1, 7))
    names = ("B02", "B03", "B04")
    metric = Channels(Channels.Config(name="channels"), spec=DataSpec(channels=3, size=(7,), names=names))
    sums = [
        metric.measure(
            torch.tensor(x_hat[part]),
            torch.tensor(np.where(valid, x, np.nan)[part] if hidden else x[part]),
            torch.tensor(valid[part, 0]) if hidden else None,
            weight=torch.tensor(counts[part, 0]) if weighted else None,
        )
        for part in (slice(0, 2), slice(2, 5))
    ]
    found = metric.summary({name: sums[0][name] + sums[1][name] for name in sums[0]})
    each = (valid if hidden else 1.0) * (counts if weighted else np.ones_like(counts))
    for part, expected in zip(("rmse", "mae", "bias"), oracle(x_hat, x, each)):
        assert [found[f"{part}/{name}"] for name in names] == pytest.approx(expected.tolist())


def test_a_run_on_own_values_measures_each_channel_in_units(tmp_path):
    """Values around 1000, holes and weights: through training, evaluation and a saved tokenizer."""
    rng = np.random.default_rng(0)
    for split in ("train", "held"):
        (tmp_path / split).mkdir()
        for i in range(8):
            a = np.stack(
                [*rng.normal([[[1000.0]], [[0.5]]], [[[30.0]], [[0.01]]], (2, 8, 8)), rng.random((8, 8))]
            )
            a[0, :2] = -9999 if i % 2 else np.nan
            np.save(tmp_path / split / f"{i}.npy", a)
    scale = {"kind": "standard", "mean": [1000, 0.5], "std": [30, 0.01]}
    modality = {
        "name": "array",
        "channels": ["T", "q", "ivar"],
        "weight": "ivar",
        "nodata": [-9999],
        "size": [8, 8],
    }
    data = {
        "name": "folder",
        "path": str(tmp_path / "train"),
        "eval_path": str(tmp_path / "held"),
        "modality": {**modality, "scale": scale},
        "batch_size": 4,
        "workers": 0,
    }
    config = run_config(tmp_path / "run", data=data, run__steps=2, eval__every=2, eval__pictures=2)
    train(config)
    assert main(["eval", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "eval.json").read_text())["results"][0]["metrics"]
    for part in ("rmse", "mae", "bias"):
        assert all(np.isfinite(metrics[f"metric/channels/{part}/{name}"]) for name in ("T", "q"))
    assert 5 < metrics["metric/channels/rmse/T"] < 500 and metrics["metric/channels/rmse/q"] < 0.2
    assert np.isfinite(metrics["loss"])


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_of_chosen_channels():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.random((4, 6, 5)), dtype=torch.float32)
    chosen = picture(array(channels=BANDS, size=(6, 5), picture=("B08", "B03", "B02")), x)
    plain = picture(array(channels=3, size=(6, 5)), x[[3, 1, 0]])
    assert np.array_equal(chosen, plain)
    assert not np.array_equal(chosen, picture(array(channels=BANDS, size=(6, 5)), x))
    one = np.asarray(picture(array(channels=BANDS, size=(6, 5), picture=(2,)), x))
    assert np.array_equal(one[..., 0], one[..., 1])


# ------------------------------------------------------------------------------------- summaries, proposals


def test_a_summary_is_that_of_all_values():
    rng = np.random.default_rng(0)
    arrays = [rng.normal([[3.0], [1e6]], [[2.0], [5.0]], (2, n)) for n in (5, 400, 30_000)]
    arrays[1][0, :4] = [np.nan, np.inf, -99, -99]
    found = summarise(arrays, channels=2, nodata=(-99.0,))
    joined = np.concatenate(arrays, 1)
    good = [joined[0][np.isfinite(joined[0]) & (joined[0] != -99)], joined[1]]
    for channel, expected in zip(found.channels, good):
        assert channel.mean == pytest.approx(expected.mean()) and channel.deviation == pytest.approx(
            expected.std()
        )
        assert (channel.minimum, channel.maximum) == (expected.min(), expected.max())
        quantiles = np.quantile(expected, [0.01, 0.5, 0.99])
        assert (channel.low, channel.median, channel.high) == pytest.approx(
            quantiles, abs=0.1 * expected.std()
        )
    assert found.channels[0].unknown == pytest.approx(2 / joined.shape[1]) == found.channels[0].nodata
    assert found == summarise(arrays, channels=2, nodata=(-99.0,))


def test_masked_values_are_no_data_in_a_summary():
    a = np.ma.masked_array([[1.0, 5000.0, 2.0]], [[False, True, False]])
    channel = summarise([a], channels=1).channels[0]
    assert channel.maximum == 2 and channel.nodata == pytest.approx(1 / 3)


DRAWN = {
    "normal": (lambda rng: rng.normal([[5], [-100]], [[0.01], [30]], (2, 500)), "standard"),
    "large numbers that differ little": (lambda rng: rng.normal(1e6, 1, (1, 500)), "standard"),
    "one value": (lambda rng: np.full((2, 20), 7.0), "standard"),
    "bits": (lambda rng: rng.integers(0, 2, (1, 500)).astype(float), "standard"),
    "over many orders": (lambda rng: np.exp(rng.normal(0, 4, (2, 500))), "log"),
    "both signs, far out": (lambda rng: rng.standard_cauchy((2, 500)), "arcsinh"),
    "counts with zeros": (lambda rng: np.floor(np.exp(rng.normal(0, 3, (1, 500)))), "arcsinh"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_proposal_suits_what_was_summarised(name):
    draw, kind = DRAWN[name]
    rng = np.random.default_rng(0)
    summary = summarise([draw(rng) for _ in range(20)], channels=len(draw(rng)))
    node = propose_scale(summary)["scale"]
    assert node["kind"] == kind
    assert suits(scale_of(**node), summary)


def test_a_proposal_says_what_is_missing():
    a = np.array([[1.0, np.nan, 2.0]])
    assert propose_scale(summarise([a], channels=1))["nodata"] == []
    assert propose_scale(summarise([a], channels=1, nodata=(2.0,)))["nodata"] == [2.0]
    assert "nodata" not in propose_scale(summarise([a[:, ::2]], channels=1))
    assert propose_scale(summarise([np.full((1, 3), np.nan)], channels=1)) == {}


# --------------------------------------------------------------------------------------- what check says


def saved(tmp_path, draw, modality, count=12):
    """A config for files that `draw(rng)` makes; modality settings are given, and what is general is added."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(count):
        np.save(folder / f"s{i:02}.npy", draw(rng))
    channels = draw(rng).shape[0]
    data = {
        "name": "folder",
        "path": str(folder),
        "modality": {"name": "array", "channels": channels, "size": [8, 8], **modality},
        "batch_size": 4,
        "workers": 0,
    }
    path = tmp_path / "cfg.yaml"
    path.write_text(yaml.safe_dump(run_tree(tmp_path / "run", data=data)))
    return str(path)


def findings(path, *words):
    """What `check` says of the data, without its notes."""
    run = build(load(path, list(words), schema=RunConfig).config, torch.device("cpu"))
    return [one for one in samples(run) if one.grade != "note"]


def normal(mean, deviation):
    c = np.broadcast(mean, deviation).size
    shape = (-1, 1, 1)
    return lambda rng: rng.normal(np.reshape(mean, shape), np.reshape(deviation, shape), (c, 8, 8))


OUTLIER = lambda rng: np.where(rng.random((2, 8, 8)) < 0.02, 1e4, rng.normal(0, 1, (2, 8, 8)))  # noqa: E731
COMPLAINTS = {
    "an ECG": (
        normal([0.4, -0.6, 1.1], [0.08, 0.05, 0.13]),
        {"range": [-3, 3]},
        "varies in channels 0, 1, 2 beside",
    ),
    "reflectances as integers": (normal([900, 1200, 3000], [90, 300, 800]), {}, "no scale is declared"),
    "one loud channel": (normal([0, 0], [0.2, 5]), {}, "differ 2"),
    "a wrong deviation": (
        normal([0], [1]),
        {"scale": {"kind": "standard", "mean": 0, "std": 100}},
        "little varies",
    ),
    "far outliers": (OUTLIER, {"scale": {"kind": "standard", "mean": 0, "std": 1}}, "under the scale"),
    "a range that cuts off": (normal([0, 0], [1, 1]), {"range": [-1, 1]}, "cannot be read"),
    "bytes in a unit range": (lambda rng: 255 * rng.random((2, 8, 8)), {"range": [0, 1]}, "cannot be read"),
    "a range that is wasted": (
        lambda rng: 0.4 + 0.05 * rng.random((2, 8, 8)),
        {"range": [-3, 3]},
        "of the declared",
    ),
    "the upper half of a range": (lambda rng: 1 + rng.random((2, 8, 8)), {"range": [-3, 3]}, "never below 0"),
    "zero under a logarithm": (
        lambda rng: np.floor(np.exp(rng.normal(0, 3, (1, 8, 8)))),
        {"scale": {"kind": "log", "low": 1, "high": 100}},
        "has no logarithm",
    ),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_who_follows_a_remedy_hears_no_complaint(tmp_path, capsys, name):
    draw, modality, says = COMPLAINTS[name]
    path = saved(tmp_path, draw, modality)
    found = findings(path)
    assert any(says in one.what for one in found), found
    remedy = next(one.remedy for one in found if says in one.what)
    assert remedy.startswith("The files hold "), remedy
    if "--values" in remedy:
        assert main(["check", path, "--values"]) == 0
        pasted = yaml.safe_load(capsys.readouterr().out.partition("scale:\n")[2])
        tree = yaml.safe_load(Path(path).read_text())
        tree["data"]["modality"] = {**tree["data"]["modality"], "range": None, **pasted}
        Path(path).write_text(yaml.safe_dump(tree))
        assert findings(path) == []
    else:
        words = shlex.split(re.search(r": set (.*)\.$", remedy)[1])
        assert findings(path, *words) == []


@pytest.mark.parametrize(
    ("draw", "modality"),
    [
        (normal([0, 0], [1, 0.5]), {}),
        (lambda rng: rng.random((2, 8, 8)), {"range": [0, 1]}),
        (lambda rng: 255 * rng.random((2, 8, 8)), {"range": [0, 255]}),
        (
            normal([0.4, -0.6], [0.08, 0.05]),
            {"scale": {"kind": "standard", "mean": [0.4, -0.6], "std": [0.08, 0.05]}},
        ),
        (
            lambda rng: np.exp(rng.normal(0, 3, (1, 8, 8))),
            {"scale": {"kind": "log", "low": 0.001, "high": 1000}},
        ),
    ],
)
def test_values_that_fit_are_no_complaint(tmp_path, draw, modality):
    assert findings(saved(tmp_path, draw, modality)) == []


def test_a_remedy_counts_the_samples_that_failed(tmp_path):
    """One file in twelve leaves the range; the proposal takes it too."""
    path = saved(tmp_path, lambda rng: rng.random((1, 8, 8)), {"range": [0, 1]})
    np.save(tmp_path / "files" / "s05.npy", np.linspace(0, 5, 64).reshape(1, 8, 8))
    (found,) = findings(path)
    assert "s05" in found.what and "The files hold 0" in found.remedy and " to 5: set " in found.remedy
    assert findings(path, *shlex.split(re.search(r": set (.*)\.$", found.remedy)[1])) == []


def test_nan_is_no_reason_for_another_scale(tmp_path):
    path = saved(tmp_path, normal([0], [1]), {})
    holes = np.zeros((1, 8, 8))
    holes[0, 0, 0] = np.nan
    np.save(tmp_path / "files" / "s05.npy", holes)
    (found,) = findings(path)
    assert "data.modality.nodata=[]" in found.what and "The files hold" not in found.remedy
    assert findings(path, "data.modality.nodata=[]") == []


def test_check_names_channels(tmp_path):
    path = saved(tmp_path, normal([0, 0], [1, 0.01]), {"channels": ["T", "q"]})
    (found,) = findings(path)
    assert "little varies in channel q" in found.what


def test_check_values_prints_each_channel_and_what_to_paste(tmp_path, capsys):
    def draw(rng):
        a = normal([5, 100], [1, 10])(rng)
        a[1, 0, :2] = np.nan, -9999
        return a

    path = saved(tmp_path, draw, {"channels": ["T", "q"], "nodata": [-9999], "range": [0, 1]})
    assert main(["check", path, "--values"]) == 0
    said = capsys.readouterr().out
    assert "12 of 12 training samples" in said
    table = {
        line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(("  T ", "  q "))
    }
    assert table["T"][-2:] == ["0.00%", "0.00%"] and table["q"][-2:] == ["1.56%", "1.56%"]
    assert float(table["q"][5]) == pytest.approx(100, abs=2) and float(table["T"][6]) == pytest.approx(
        1, abs=0.1
    )
    pasted = yaml.safe_load(said.partition("scale:\n")[2])
    assert pasted["nodata"] == [-9999] and pasted["scale"]["kind"] == "standard"
    assert (
        findings(path, "data.modality.range=null", f"data.modality.scale={json.dumps(pasted['scale'])}") == []
    )
    assert main(["check", path, "--values", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["channels"]["T"]["mean"] == pytest.approx(5, abs=0.2) and found["settings"] == pasted


def test_check_values_where_nothing_can_be_read(tmp_path, capsys):
    path = saved(tmp_path, normal([0], [1]), {"channels": 3})
    assert main(["check", path, "--values"]) == 2
    assert "none of the samples can be read" in capsys.readouterr().err


def test_holes_and_weights_do_not_reach_the_loss():
    modality = array(channels=2, weight=1, size=(4,), nodata=())
    raw = modality.read(np.array([[1.0, np.nan, 3.0, 4.0], [1, 1, 0, 2]]))
    view = whole((4,))
    one = Batch(modality.tensor(raw, view)[None], ("a",), modality.mask(raw, view)[None])
    both = Batch(one.x, ("a",), one.mask, weight=modality.weight(raw, view)[None])
    assert both.valid.tolist() == [[True, False, False, True]]


def test_a_nodata_value_is_compared_in_the_type_of_the_file():
    """-9999.9 is no float32; the nearest one stands in the file."""
    cfg = Array.Config(name="array", channels=1, size=(8,), nodata=(-9999.9,))
    values = np.arange(8, dtype=np.float32)
    values[3] = -9999.9
    assert np.isnan(Array(cfg, size=(8,)).read(values)[0, 3])


# ------------------------------------------------------------------------------------------------ large files


def drawn(kind, shape, rng):
    """Legal values of a kind."""
    if kind in ("categorical", "binary"):
        return rng.integers(0, 2, shape).astype(np.uint8)
    values = rng.normal(0, 1, shape)
    return values / np.linalg.norm(values, axis=0) if kind == "unit-vector" else values.astype(">f4")


LARGE_FILES = {
    "windows": ("continuous", (3, 200), {"size": (16,), "nodata": (), "weight": 2}),
    "channels last": ("continuous", (200, 3), {"size": (16,), "channels_last": True}),
    "a scale": (
        "continuous",
        (2, 40, 50),
        {"size": (16, 16), "scale": scale_of("standard", mean=0.5, std=2.0)},
    ),
    "resized": ("unit-vector", (3, 40, 50), {"size": (16, 16), "sizing": "resize"}),
    "angles": ("angle", (2, 40, 50), {"size": (16, 16), "sizing": "window"}),
    "classes": ("categorical", (40, 50), {"size": (16, 16), "labels": 2, "channels": None}),
    "a mask": ("binary", (1, 10, 20, 30), {"size": (8, 8, 8)}),
}


@pytest.mark.parametrize("name", LARGE_FILES)
def test_a_part_of_a_mapped_file_is_that_of_the_whole_file(tmp_path, monkeypatch, name):
    kind, shape, settings = LARGE_FILES[name]
    rng = np.random.default_rng(0)
    values = drawn(kind, shape, rng)
    if "nodata" in settings:
        values[0, 50:60] = np.nan
        values[2] = np.abs(values[2])
    np.save(tmp_path / "a.npy", np.asfortranarray(values) if kind == "angle" else values)
    channels = shape[-1] if settings.get("channels_last") else shape[0]
    modality = array(**{"kind": kind, "channels": channels, **settings})
    files = [tmp_path / "a.npy"]
    samples = []
    for limit in (1 << 20, 0):
        monkeypatch.setattr("vqcore.modalities.array.MAPPED", limit)
        assert isinstance(modality.read(files[0]), np.memmap) == (limit == 0)
        reader = Reader(Sources(files), modality, {}, cache_mib=1.0)
        samples.append(
            [
                reader.read(0, modality.spec.size, draw)
                for draw in (None, *map(np.random.default_rng, range(8)))
            ]
        )
        assert bool(reader.files.cache.kept) == (limit > 0)
    for whole, part in zip(*samples):
        for field in ("x", "mask", "weight"):
            one, other = getattr(whole, field), getattr(part, field)
            assert (one is None and other is None) or torch.equal(one, other), field
        assert whole.extent == part.extent


def test_a_wrong_value_in_a_mapped_file_costs_the_parts_that_have_it(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(0, 1, (2, 100)).astype(np.float32)
    values[1, 70] = np.nan
    np.save(tmp_path / "a.npy", values)
    monkeypatch.setattr("vqcore.modalities.array.MAPPED", 0)
    modality = array(channels=2, size=(10,))
    raw = modality.read(tmp_path / "a.npy")
    parts = {start: View((start / 100,), ((start + 10) / 100,), (10,)) for start in (50, 65)}
    assert torch.equal(modality.tensor(raw, parts[50]), torch.from_numpy(values[:, 50:60]))
    with pytest.raises(
        DataError, match=r"a\.npy, from \[65\] on: the value nan at \[1, 5\] \(channel first\)"
    ):
        modality.tensor(raw, parts[65])
    with pytest.raises(DataError, match=r"has 2 channels .* but 3 are declared"):
        array(channels=3, size=(10,)).read(tmp_path / "a.npy")


class Sources(list):
    """Files as a data source."""

    def key(self, index):
        return str(index)

    def get(self, index, label=""):
        return self[index]
