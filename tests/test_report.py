"""The page about a run: complete in itself, honest about what is missing, for every kind of data; its charts."""

import html.parser
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from toys import run_config, run_tree, toy  # noqa: F401
from vqcore_track import charts, gallery, record, report
from vqcore_vision.depth import Depth

from vqcore import pictures
from vqcore.artefacts.resolve import best_step
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.errors import RunError
from vqcore.protocols import Batch
from vqcore.schema import RunConfig
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
VOID = {"meta", "img"}


class Page(html.parser.HTMLParser):
    """What a browser would find: balanced tags, headings, texts, pictures, and everything that it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.pictures, self.links, self.headings = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "iframe", "base"), tag
        assert not any(name.startswith("on") for name in attrs)
        self.links += [attrs[name] for name in ("src", "href", "srcset", "action") if name in attrs]
        if tag == "img":
            self.pictures.append(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    @property
    def said(self):
        return " ".join(self.texts)


def page(run):
    path = report.write(run)
    assert path == run / "report.html" and path.stat().st_size < 3_000_000
    found = Page(path.read_text(encoding="utf-8"))
    assert all(link.startswith("data:image/") for link in found.links)
    assert all("alt" in picture for picture in found.pictures)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the one run of these tests will be, made by the first test that needs it."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A finished run that a test may spoil."""
    if not trained.exists():
        train(run_config(trained, run__steps=6, eval={"every": 2}))
    return shutil.copytree(trained, tmp_path / "run")


def test_the_page_of_a_finished_run(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.split() == ["report", str(run / "report.html")]
    found = page(run)
    assert found.headings[0] == "run"
    wanted = {
        "Samples",
        "Best",
        "Median",
        "Worst",
        "Curves",
        "Losses",
        "Use of the codes",
        "Evaluation",
        "Provenance",
    }
    assert wanted <= set(found.headings)
    assert "finished, 6 steps" in found.said and "Nothing that the run recorded." in found.said
    assert "toy/quantizer" in found.said and "codebook_size: 16" in found.said
    samples = [picture["alt"] for picture in found.pictures if " of wave" in picture["alt"]]
    assert len(samples) == 9 * 4 and sum(alt.startswith("error map") for alt in samples) == 9
    assert {"Loss, weighted sum", "pixel/mse", "vq/commit", "Learning rate", "Codebook usage, %"} <= set(
        found.texts
    )


def test_two_reports_are_equal(run):
    first = report.write(run).read_bytes()
    assert report.write(run).read_bytes() == first


def test_it_asks_for_no_network_and_runs_nothing(run):
    text = report.write(run).read_text(encoding="utf-8")
    assert (
        "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text
    )
    assert not re.search(r"https?://|@import|url\(", text)


def test_what_vqcore_eval_measured_is_shown(run):
    assert main(["eval", str(run), "--weights", "both"]) == 0
    found = page(run)
    shown = json.loads((run / "eval.json").read_text())
    assert shown["protocol"]["set"]["sha256"] in found.said and "trained weights" in found.said
    assert f"{shown['results'][0]['metrics']['psnr']:.5g} dB" in found.said

    shown["checkpoint"] = "step_2"
    (run / "eval.json").write_text(json.dumps(shown))
    found = page(run)
    assert "eval.json is about step_2, not about " in found.said and "trained weights" not in found.said


def test_with_refined_codes_samples_and_sheet_are_those_of_the_search(run):
    plain = gallery.collect(record.read(run), 512)
    assert main(["eval", str(run), "eval.refine=2"]) == 0
    sheet = (run / "samples/eval.png").read_bytes()
    assert main(["eval", str(run)]) == 0
    assert (run / "samples/eval.png").read_bytes() != sheet
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"refine: 0", "refine: 2", config))
    found = gallery.collect(record.read(run), 512)
    assert sum(one.figure for one in found.shown) != sum(one.figure for one in plain.shown)
    assert found.counts != plain.counts


def test_best_and_worst_are_the_best_and_worst(run):
    """The oracle: the first metric of each reconstruction alone, one after the other."""
    found = gallery.collect(record.read(run), 512)
    figures = {}
    from vqcore.data.batches import EvalBatches
    from vqcore.evaluate.measure import build_metrics
    from vqcore.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(run)
    config = run_config(run)
    from vqcore.assembly import open_data

    data = open_data(config, tokenizer.modality, {}, "eval")
    batches = EvalBatches(
        data, tokenizer.modality, {}, config.data, size=(8, 8), batch_size=1, rank=0, world=1, workers=0
    )
    metric = build_metrics({found.metric: METRICS[found.metric]}, tokenizer)[found.metric]
    for batch, _ in ((loaded.batch, loaded.bad) for loaded in batches):
        x_hat = tokenizer.reconstruct(batch.x)
        figures[batch.keys[0]] = metric.summary(metric.measure(x_hat, batch.x))[""]
    better = getattr(metric, "better", "lower")
    order = sorted(figures, key=figures.get, reverse=better == "higher")
    by_group = {g: [s.key for s in found.shown if s.group == g] for g in ("best", "median", "worst")}
    assert by_group["best"] == order[:3] and by_group["worst"] == order[-3:]
    assert by_group["median"] == order[10:13] and found.samples == 24
    for shown in found.shown:
        assert shown.figure == pytest.approx(figures[shown.key], rel=1e-5)
    codes = torch.cat([tokenizer.encode(tokenizer.read(data.get(i))).flatten() for i in range(24)])
    assert found.counts == [torch.bincount(codes, minlength=16).tolist()]


def _metrics():
    from vqcore.metrics.pixels import MAE, PSNR

    return {"psnr": PSNR.Config(name="psnr"), "mae": MAE.Config(name="mae")}


METRICS = _metrics()


def test_no_more_samples_than_asked_for(run):
    found = gallery.collect(record.read(run), 5)
    assert found.samples == 5 and len(found.shown) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 100])
def test_groups_never_share_a_sample(count):
    figures = {f"k{index:03}": float(index % 7) for index in range(count)}
    chosen = gallery._choice(figures, "higher")
    groups = {name: [key for key in chosen if chosen[key] == name] for name in ("best", "median", "worst")}
    assert sum(map(len, groups.values())) == len(chosen) <= 9
    assert groups["best"] and max(figures.values()) == figures[groups["best"][0]]
    if count >= 9:
        assert [len(keys) for keys in groups.values()] == [3, 3, 3]
        assert min(figures.values()) == figures[groups["worst"][-1]]


def tree_of(tmp_path, kind):
    """Configs of runs on data that are no pictures."""
    rng = np.random.default_rng(0)
    if kind == "one axis":
        shape = {
            "data__modality": {"name": "array", "channels": 2, "size": [16], "rank": 1, "range": [-1, 1]}
        }
        return run_tree(tmp_path / "run", **shape, data__shape=[16], run__steps=2)
    if kind == "volume":
        shape = {"data__modality": {"name": "array", "channels": 1, "size": [8, 8, 8], "range": [-1, 1]}}
        return run_tree(tmp_path / "run", **shape, data__shape=[8, 8, 8], data__channels=1, run__steps=2)
    if kind == "vector":
        np.save(tmp_path / "x.npy", rng.normal(size=(9, 6)).astype(np.float32))
        modality, patch = {"name": "array", "channels": 6, "size": 1}, {"patch": 1}
    else:
        np.save(tmp_path / "x.npy", rng.integers(0, 5, (9, 8, 8)))
        modality, patch = {"name": "array", "kind": "categorical", "labels": 5, "size": [8, 8]}, {}
    path = str(tmp_path / "x.npy")
    data = {
        "name": "array",
        "path": path,
        "eval_path": path,
        "modality": modality,
        "batch_size": 4,
        "workers": 0,
    }
    parts = {f"model__{part}": {"name": f"toy/{part}", **patch} for part in ("encoder", "decoder")}
    return run_tree(tmp_path / "run", data=data, run__steps=2, **parts)


@pytest.mark.parametrize("kind", ["one axis", "volume", "vector", "class maps"])
def test_every_kind_of_data_has_a_page(tmp_path, kind):
    train(from_tree(tree_of(tmp_path, kind), schema=RunConfig))
    found = page(tmp_path / "run")
    assert {"Best", "Worst", "Curves"} <= set(found.headings)
    assert ("curves here" in found.said) == (kind in ("one axis", "vector"))
    assert ("a wrong class" in found.said) == (kind == "class maps")


def test_without_evaluation_data_training_samples_are_shown(tmp_path):
    train(run_config(tmp_path / "run", data__evaluate=False))
    found = page(tmp_path / "run")
    assert "of 24 training samples" in found.said and "Not measured yet." in found.said
    assert "there was no evaluation" in found.said


def test_a_run_that_was_killed_has_a_page(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": NaN}\n{"step": 8, "lo')
    shutil.copytree(run / "checkpoints/step_2", run / "checkpoints/step_2.damaged1")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 6", "steps: 100"))
    found = page(run)
    assert "unfinished: step 7 of 100" in found.said
    assert "loss was not finite in 1 of 7 lines" in found.said and "1 damaged line left out" in found.said
    assert "step_2.damaged1 was damaged and set aside" in found.said and "Best" in found.headings


def test_a_run_without_a_checkpoint_has_a_page(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "provenance.json").unlink()
    found = page(run)
    assert "has saved no checkpoint yet" in found.said and "provenance.json cannot be read" in found.said
    assert "Samples" not in found.headings and "Losses" in found.headings
    (run / "metrics.jsonl").unlink()
    found = page(run)
    assert "Nothing has been measured yet." in found.said and "Config" in found.headings


def test_data_that_are_gone_are_named(tmp_path):
    train(from_tree(tree_of(tmp_path, "class maps"), schema=RunConfig))
    (tmp_path / "x.npy").unlink()
    found = page(tmp_path / "run")
    assert "Samples cannot be shown: data.eval_path" in found.said and "Losses" in found.headings


def test_a_config_of_another_time_is_named(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "gone: 1\n")
    found = page(run)
    assert "Samples cannot be shown:" in found.said and "gone" in found.said and "Losses" in found.headings


def test_what_went_wrong_comes_first_and_is_escaped(run):
    events = [
        {"step": 0, "event": "resumed", "processes": 1},
        {"step": 3, "event": "skipped", "detail": "<script>alert(1)</script> is not finite"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = report.write(run).read_text(encoding="utf-8")
    assert "<script" not in text and text.count("&lt;script&gt;") >= 2  # in the table and beside the curves
    found = page(run)
    assert found.headings[1] == "What went wrong" and "resumed" not in found.said
    assert "<script>alert(1)</script> is not finite" in found.said

    (run / "events.jsonl").write_text(json.dumps(events[0]) + "\n")
    assert "interrupted once and taken up again" in page(run).said


@pytest.mark.parametrize("argv", [["{0}/nowhere"], ["{0}/checkpoints/step_2"]])
def test_what_is_no_run_has_no_report(run, capsys, argv):
    assert main(["report", *(word.format(run) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert "is no run folder" in error and len(error.splitlines()) == 1


def test_no_run_no_file(tmp_path):
    with pytest.raises(RunError, match="is no run folder"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def svg(chart):
    found = re.search(r"<svg.*</svg>", chart, re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])


def test_a_curve_is_where_its_values_are():
    root = svg(charts.line_chart("t", [charts.Series("a", [(0.0, 1.0), (50.0, 3.0), (100.0, 2.0)])]))
    (line,) = [node for node in root.iter("polyline")]
    x, y = zip(*(map(float, place.split(",")) for place in line.attrib["points"].split()))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1]) and y[1] < y[2] < y[0]  # y runs downwards
    labels = {node.text: float(node.attrib["y"]) for node in root.iter("text") if "dy" in node.attrib}
    assert labels["2"] == pytest.approx(y[2], abs=0.1)
    tips = [node.text for node in root.iter("title")]
    assert tips == ["a, step 0: 1", "a, step 50: 3", "a, step 100: 2"]


def test_wide_ranges_are_logarithmic():
    root = svg(charts.line_chart("t", [charts.Series("a", [(0.0, 1.0), (1.0, 10.0), (2.0, 100.0)])]))
    (line,) = root.iter("polyline")
    y = [float(place.split(",")[1]) for place in line.attrib["points"].split()]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert "logarithmic" in root.attrib["aria-label"]


@pytest.mark.parametrize(
    "points",
    [
        [(5.0, 0.0)],
        [(0.0, 7.0), (9.0, 7.0)],
        [(0.0, -1.0), (1.0, 1e9)],
        [(0.0, float("nan")), (1.0, 2.0)],
        [(0.0, 1e-12), (1.0, 1.0)],
    ],
)
def test_charts_of_odd_values_stay_inside(points):
    chart = charts.line_chart("t", [charts.Series("a", points)])
    for node in svg(chart).iter():
        for name in ("cx", "x", "x1", "x2"):
            assert 0 <= float(node.attrib.get(name, 0)) <= charts.WIDTH
        for name in ("cy", "y", "y1", "y2"):
            assert 0 <= float(node.attrib.get(name, 0)) <= charts.HEIGHT


def test_nothing_to_draw_draws_nothing():
    assert charts.line_chart("t", [charts.Series("a", [(0.0, float("nan"))])]) == ""


def test_long_curves_are_thinned_by_means():
    points = [(float(step), float(step % 2)) for step in range(100_000)] + [(1e5, 0.25)]
    thin = charts.thinned(points)
    assert len(thin) == charts.MOST_POINTS and thin[-1] == (1e5, 0.25)
    assert all(abs(y - 0.5) < 0.01 for _, y in thin[:-1])
    assert charts.thinned(points[:50]) == points[:50]


def test_numbers_in_few_letters():
    assert [charts.short(v) for v in (0, 0.01234567, 12345, 2.5e6, 4e-5, -0.5, 999)] == [
        "0", "0.01235", "12.35k", "2.5M", "4e-5", "-0.5", "999",
    ]  # fmt: skip


def test_ranks_and_octaves_count_every_code():
    from vqcore_track.page import _octaves

    counts = [0, 0, 1, 3, 2, 200, 9000]
    assert _octaves(counts) == [("0", 2), ("1", 1), ("2-3", 2), ("4-7", 0), ("8-15", 0), ("16-31", 0),
                                ("32-63", 0), ("64-127", 0), ("128+", 2)]  # fmt: skip
    root = svg(charts.rank_chart("t", [counts, [0] * 7], labels=["one", "two"]))
    assert "one: 5 of 7, two: 0 of 7" in root.attrib["aria-label"]
    assert next(node.text for node in root.iter("title")) == "one, code number 1: 9000 times"


def test_errors_are_absolute_differences():
    x, x_hat = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    x_hat[0, 1, 2], x_hat[1, 1, 2] = 1.0, -0.5
    each = pictures.errors(x_hat, x)
    assert each.shape == (1, 3, 4) and float(each[0, 1, 2]) == 0.75 and float(each.sum()) == 0.75
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = False
    assert float(pictures.errors(x_hat, x, mask).sum()) == 0
    classes = torch.tensor([[0, 1], [1, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1], [0, 2]]), 3).permute(2, 0, 1).float()
    assert pictures.errors(logits, classes).tolist() == [[[0.0, 0.0], [1.0, 0.0]]]


def test_error_pictures_run_from_dark_to_light():
    image = (
        np.asarray(pictures.error_picture(torch.linspace(0, 2, 9).reshape(1, 1, 9), 1.0)).astype(int).sum(-1)
    )
    assert image.shape == (1, 9) and (np.diff(image[0, :5]) > 0).all() and (image[0, 5:] == image[0, 4]).all()


def test_original_and_rebuilt_have_one_scale():
    x = torch.linspace(0, 10, 16).reshape(1, 4, 4)
    half = pictures.array_picture(np.empty(0), x / 2, x)
    assert (
        np.asarray(half).max() == 128 and np.asarray(pictures.array_picture(np.empty(0), x, x)).max() == 255
    )
    assert isinstance(half, Image.Image) and half.mode == "RGB"


@pytest.mark.parametrize(
    "grid, size", [((16,), (16, 4)), ((3,), (3, 1)), ((4, 6), (6, 4)), ((2, 4, 6), (24, 2))]
)
def test_a_token_map_is_large_enough_to_see(grid, size):
    latents = torch.randn(2, *grid, 5)
    maps = pictures.token_maps(latents)
    assert [each.size for each in maps] == [size, size]
    if len(grid) == 1:
        rows = np.asarray(maps[0])
        assert (rows == rows[:1]).all() and len(np.unique(rows[0], axis=0)) == len(rows[0])


def test_positions_that_do_not_count_are_grey():
    modality = Depth(Depth.Config(scaling="linear", range=(0.0, 10.0)), size=4)
    raw = modality.read(np.array([[0.0, 5.0], [10.0, 5.0]], np.float32))
    view = modality.view((2, 2), (2, 2), None)
    batch = Batch(modality.tensor(raw, view)[None], ("a",), mask=modality.mask(raw, view)[None])
    (shown,) = pictures.originals(modality, batch)
    (bare,) = pictures.originals(modality, Batch(batch.x, ("a",)))
    shown, bare = np.asarray(shown), np.asarray(bare)
    assert shown[0, 0].tolist() == [128, 128, 128] and (bare[0, 0] == bare[0, 1]).all()
    assert np.array_equal(shown[1], bare[1]) and np.array_equal(shown[0, 1], bare[0, 1])
    vector = pictures.picture(modality, batch.x[0], mask=torch.zeros(7, dtype=torch.bool))
    assert np.array_equal(np.asarray(vector), bare)


def test_the_best_checkpoints_evaluation_is_shown(tmp_path):
    train(run_config(tmp_path / "run", run__steps=6, eval={"every": 2}, optim__lr=0.3))
    best = best_step(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (loss,) = [line["eval/loss"] for line in lines if line["step"] == best and "eval/loss" in line]
    (head,), (figures,) = record.evaluated(record.read(tmp_path / "run"))
    assert head == f"step {best}" and figures["loss"] == loss
