"""The page about a run: a single file, for every kind of data; the page says what is missing and escapes all texts."""

import dataclasses
import html.parser
import json
import re
import shutil

import numpy as np
import pytest
import torch
from toys import run_config, run_tree
from vqcore_track import gallery, page, record
from vqcore_track.report import Report

from vqcore.artefacts.resolve import best_step, checkpoints
from vqcore.assembly import open_data
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.errors import RunError
from vqcore.metrics.pixels import PSNR
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer
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


def written(run):
    """The page of a run as a browser finds it."""
    path = Report.write(run)
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
    step = max(checkpoints(run))
    assert capsys.readouterr().out.splitlines() == [
        f"{run}: step {step}, the last checkpoint",
        f"report         {run / 'report.html'}",
    ]
    found = written(run)
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
    assert "finished, 6 steps" in found.said and "The run recorded no problems." in found.said
    assert "toy/quantizer" in found.said and "codebook_size: 16" in found.said
    samples = [picture["alt"] for picture in found.pictures if " of wave" in picture["alt"]]
    assert len(samples) == 9 * 4 and sum(alt.startswith("error map") for alt in samples) == 9
    assert {
        "Loss, weighted sum",
        "loss/pixel/mse",
        "loss/vq/commit",
        "Learning rate",
        "Codebook usage, %",
    } <= set(found.texts)


def test_two_reports_are_equal(run):
    first = Report.write(run).read_bytes()
    assert Report.write(run).read_bytes() == first


def test_errors_of_channels_are_known_by_their_form():
    """Labels are the user's: two metrics of channels, another metric of that name, and one with parts of that name."""
    each = {f"{kind}/{channel}": 1.0 for kind in ("rmse", "mae", "bias") for channel in ("B02", "low")}
    table = {
        f"metric/{label}/{name}": value for label in ("channels", "mine") for name, value in each.items()
    }
    others = {"metric/pose/rmse/left": 2.0, "metric/psnr": 3.0, "metric/psnr/low": 2.0, "codes/usage": 0.5}
    found = page._channels(["8 x 8"], [table | others])
    assert [head for head, _ in found] == ["8 x 8", "8 x 8 (mine)"]
    assert all(rows["B02"] == {"rmse": 1.0, "mae": 1.0, "bias": 1.0} and len(rows) == 2 for _, rows in found)
    assert page._without_channels(table | others) == list(others)
    assert page._without_channels(["metric/channels", *others]) == ["metric/channels", *others]


def test_it_asks_for_no_network_and_runs_nothing(run):
    text = Report.write(run).read_text(encoding="utf-8")
    assert (
        "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text
    )
    assert not re.search(r"https?://|@import|url\(", text)


@pytest.mark.slow
def test_what_vqcore_eval_measured_is_shown(run):
    assert main(["eval", str(run), "--weights", "both"]) == 0
    found = written(run)
    shown = json.loads((run / "eval.json").read_text())
    assert shown["protocol"]["set"]["sha256"] in found.said and "trained weights" in found.said
    assert f"{shown['results'][0]['metrics']['metric/psnr']:.5g} dB" in found.said
    assert "Errors of each channel in the units of the files" in found.said
    assert f"{shown['results'][0]['metrics']['metric/channels/rmse/1']:.5g}" in found.said
    assert "metric/channels" not in found.said  # a row for each would be long

    shown["checkpoint"] = "step_2"
    (run / "eval.json").write_text(json.dumps(shown))
    found = written(run)
    assert (
        "eval.json describes step_2, but this page shows " in found.said
        and "trained weights" not in found.said
    )


def test_best_and_worst_are_the_best_and_worst(run):
    """The oracle: PSNR of each reconstruction alone, one after the other."""
    found = gallery.collect(record.read(run), 512)
    tokenizer, config = Tokenizer.load(run), run_config(run)
    data = open_data(config, tokenizer.modality, {}, "eval")
    metric = PSNR(PSNR.Config(), spec=tokenizer.spec)
    values, codes = {}, []
    for index in range(len(data)):
        x = tokenizer.read(data.get(index))
        codes.append(tokenizer.encode(x).flatten())
        values[data.key(index)] = metric.summary(metric.measure(tokenizer.reconstruct(x), x))[""]
    order = sorted(values, key=values.get, reverse=True)
    by_group = {g: [s.key for s in found.shown if s.group == g] for g in ("best", "median", "worst")}
    assert found.metric == "metric/psnr" and found.samples == 24
    assert by_group["best"] == order[:3] and by_group["worst"] == order[-3:]
    assert by_group["median"] == order[10:13]
    for shown in found.shown:
        assert shown.value == pytest.approx(values[shown.key], rel=1e-5)
    assert found.counts == [torch.bincount(torch.cat(codes), minlength=16).tolist()]


def test_no_more_samples_than_asked_for(run):
    found = gallery.collect(record.read(run), 5)
    assert found.samples == 5 and len(found.shown) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 100])
def test_groups_never_share_a_sample(count):
    values = {f"k{index:03}": float(index % 7) for index in range(count)}
    chosen = gallery._choice(values, "higher")
    groups = {name: [key for key in chosen if chosen[key] == name] for name in ("best", "median", "worst")}
    assert sum(map(len, groups.values())) == len(chosen) <= 9
    assert groups["best"] and max(values.values()) == values[groups["best"][0]]
    if count >= 9:
        assert [len(keys) for keys in groups.values()] == [3, 3, 3]
        assert min(values.values()) == values[groups["worst"][-1]]


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


@pytest.mark.parametrize(
    "kind",
    [
        "one axis",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("volume", "vector", "class maps")),
    ],
)
def test_every_kind_of_data_has_a_page(tmp_path, kind):
    train(from_tree(tree_of(tmp_path, kind), schema=RunConfig))
    found = written(tmp_path / "run")
    assert {"Best", "Worst", "Curves"} <= set(found.headings)
    assert ("Each error map is a curve" in found.said) == (kind in ("one axis", "vector"))
    assert ("a wrong class" in found.said) == (kind == "class maps")


def test_without_evaluation_data_training_samples_are_shown(tmp_path):
    train(run_config(tmp_path / "run", data__evaluate=False))
    found = written(tmp_path / "run")
    assert "of 24 training samples" in found.said and "Not measured yet. Run  vqcore eval" in found.said
    assert "there was no evaluation" in found.said


def test_a_run_that_was_killed_has_a_page(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": NaN}\n{"step": 8, "lo')
    shutil.copytree(run / "checkpoints/step_2", run / "checkpoints/step_2.damaged1")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 6", "steps: 100"))
    found = written(run)
    assert "unfinished: step 7 of 100" in found.said
    assert "loss was not finite in 1 of 7 lines" in found.said and "1 damaged line is left out" in found.said
    assert (
        "A damaged checkpoint was renamed to checkpoints/step_2.damaged1." in found.said
        and "Best" in found.headings
    )


def test_a_run_without_a_checkpoint_has_a_page(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "provenance.json").unlink()
    found = written(run)
    assert "has no checkpoint yet" in found.said and "provenance.json: there is no such file" in found.said
    assert "Samples" not in found.headings and "Losses" in found.headings
    (run / "metrics.jsonl").unlink()
    found = written(run)
    assert "Nothing has been measured yet." in found.said and "Config" in found.headings


def test_data_that_are_gone_are_named(tmp_path):
    train(from_tree(tree_of(tmp_path, "class maps"), schema=RunConfig))
    (tmp_path / "x.npy").unlink()
    found = written(tmp_path / "run")
    assert "Samples cannot be shown: data.eval_path" in found.said and "Losses" in found.headings


def test_a_config_of_another_time_is_named(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "gone: 1\n")
    found = written(run)
    assert "Samples cannot be shown:" in found.said and "gone" in found.said and "Losses" in found.headings


def test_what_went_wrong_comes_first_and_is_escaped(run):
    events = [
        {"step": 0, "event": "resumed", "processes": 1},
        {"step": 3, "event": "skipped", "detail": "<script>alert(1)</script> is not finite"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = Report.write(run).read_text(encoding="utf-8")
    assert "<script" not in text and text.count("&lt;script&gt;") >= 2  # in the table and beside the curves
    found = written(run)
    assert found.headings[1] == "What went wrong" and "resumed" not in found.said
    assert "<script>alert(1)</script> is not finite" in found.said

    (run / "events.jsonl").write_text(json.dumps(events[0]) + "\n")
    assert "It was interrupted and resumed once." in written(run).said


@pytest.mark.parametrize("argv", [["{0}/nowhere"], ["{0}/checkpoints/step_2"]])
def test_what_is_no_run_has_no_report(run, capsys, argv):
    assert main(["report", *(word.format(run) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert "is not a run folder" in error and len(error.splitlines()) == 1


def test_no_run_no_file(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        Report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_evaluation_of_the_checkpoint_that_counts_is_shown(tmp_path):
    config = run_config(
        tmp_path / "run", run__steps=12, eval={"every": 3, "best": "metric/psnr"}, optim__lr=1.0
    )
    train(config)
    best = best_step(tmp_path / "run", "metric/psnr")
    assert best is not None and best < 12
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (loss,) = [line["eval/loss"] for line in lines if line["step"] == best and "eval/loss" in line]
    (head,), (metrics,) = record.evaluated(record.read(tmp_path / "run"))
    assert head == f"step {best}" and metrics["loss"] == loss


HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}"


def test_every_text_is_escaped(run, monkeypatch):
    """A name from outside stands on the page as it is: in texts, attributes and tooltips; no template runs it."""
    found = record.read(run)
    shown = gallery.collect(found, 512)
    found.folder = run.parent / HOSTILE.replace("/", "|")
    found.notes.append(f"a note {HOSTILE}")
    found.events.append({"step": 2, "event": HOSTILE, "detail": HOSTILE, HOSTILE: HOSTILE})
    found.config_text += f"# {HOSTILE}"
    found.config["data"] |= {"path": HOSTILE, "modality": {"name": HOSTILE}}
    found.config["model"]["quantizer"] = {"name": HOSTILE, HOSTILE: HOSTILE}
    found.provenance |= {"command": [HOSTILE], "components": {HOSTILE: {"name": HOSTILE}}}
    found.saved["fingerprint"] = HOSTILE
    found.curves[f"loss {HOSTILE}"] = found.curves["loss"]
    found.curves[f"eval@{HOSTILE.replace('/', '|')}/loss"] = found.curves["eval/loss"]
    found.curves[f"eval/{HOSTILE}"] = found.curves["eval/loss"]
    protocol = {
        "set": {"count": 1, "sha256": HOSTILE},
        "modality": {HOSTILE: HOSTILE},
        "metrics": {HOSTILE: {}},
    }
    result = {"size": [8, HOSTILE], "weights": "ema", "metrics": {HOSTILE: 1.0, "samples": 24.0}}
    shown.shown = [dataclasses.replace(one, key=f"{one.key} {HOSTILE}") for one in shown.shown]
    shown.source, shown.unit, shown.parts = HOSTILE, HOSTILE, {HOSTILE: 7}
    shown.metric = HOSTILE
    for evaluation in (
        {},
        {"results": [result], "protocol": protocol, "environment": {"versions": {HOSTILE: 1}}},
    ):
        found.evaluation = evaluation
        text = page.render(found, shown)
        assert "<script" not in text and "<img src=x" not in text
        seen = Page(text)
        assert all(link.startswith("data:image/") for link in seen.links)
        assert seen.headings[0] == HOSTILE.replace("/", "|")
        for start in ("a note ", "# "):
            assert start + HOSTILE in seen.said
        assert any(picture["alt"].endswith(HOSTILE) for picture in seen.pictures)
        assert text.count("&lt;script&gt;") > 30


def test_the_hook_writes_the_page_when_the_run_ends_well(tmp_path, monkeypatch):
    hooks = {"report": {"name": "track/report", "samples": 5}}
    train(run_config(tmp_path / "good", hooks=hooks))
    text = (tmp_path / "good/report.html").read_text(encoding="utf-8")
    assert "worst of 5 evaluation samples" in text and "finished, 6 steps" in text

    def failing(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqcore.trainer.train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tmp_path / "bad", hooks=hooks))
    assert not (tmp_path / "bad/report.html").exists()


def test_a_page_that_fails_is_a_warning_with_the_command(tmp_path, monkeypatch, caplog):
    def failing(record, limit, access):
        raise RuntimeError("no picture today")

    monkeypatch.setattr(gallery, "collect", failing)
    run = train(run_config(tmp_path / "run", hooks={"report": {"name": "track/report"}}))
    (said,) = [message for message in caplog.messages if "report" in message]
    assert said == (
        "warning: the report could not be written: no picture today. "
        f"To try again, run: vqcore report {tmp_path / 'run'}"
    )
    assert run.step == 6 and run.hooks.off == {} and not (tmp_path / "run/report.html").exists()


def test_samples_must_be_a_number():
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        Report.Config(samples=0)


# The verdict


def said(run):
    return " ".join(written(run).said.split())


def test_a_verdict_without_vqcore_eval_has_the_constant(run):
    """The evaluation of training is enough."""
    text = said(run)
    assert "Verdict" in text and "this tokenizer" in text and "constant" in text
    assert "k-means at equal bits is left out" in text.replace("K-means", "k-means")


def test_a_verdict_with_k_means(run, capsys):
    assert main(["eval", str(run)]) == 0
    capsys.readouterr()
    text = said(run)
    facts = json.loads((run / "eval.json").read_text())["kmeans"]
    assert f"fitted to {facts['patches']} patches of {facts['crops']} training crops" in text
    assert "(a token of this tokenizer has 4)" in text


@pytest.mark.parametrize(
    ("sentences", "shown"),
    [
        ([], "Clearly better than each of these baselines."),
        (["codes say <b>little</b>"], "Codes say <b>little"),
    ],
)
def test_the_sentences_of_a_verdict(run, sentences, shown):
    assert main(["eval", str(run)]) == 0
    report = json.loads((run / "eval.json").read_text())
    report["results"][0]["verdict"] = sentences
    (run / "eval.json").write_text(json.dumps(report))
    text = said(run)
    assert shown in text and ("Clearly better" in text) == (not sentences)


def test_few_tokens_are_held_against_what_they_can_show(run):
    assert main(["eval", str(run)]) == 0
    report = json.loads((run / "eval.json").read_text())
    report["results"][0]["metrics"] |= {"codes/usage": 0.2, "codes/usage_possible": 0.231}
    (run / "eval.json").write_text(json.dumps(report))
    tile = re.compile(r"20\.0 % of 23\.1 ?% that so few tokens can reach")
    assert tile.search(said(run))
    report["results"][0]["metrics"] |= {"codes/usage_possible": 0.999, "codes/perplexity_possible": 15.9}
    (run / "eval.json").write_text(json.dumps(report))
    assert not re.search(r"of [0-9.]+ ?%? that so few tokens can reach", said(run))


def test_a_collapse_that_is_over_is_no_problem(run):
    collapse = {"step": 2, "event": "codebook collapse", "detail": "the codebook has collapsed"}
    (run / "events.jsonl").write_text(json.dumps(collapse) + "\n")
    assert "the codebook has collapsed" in said(run)
    over = {"step": 4, "event": "codebook recovered", "detail": "in use again"}
    (run / "events.jsonl").write_text(json.dumps(collapse) + "\n" + json.dumps(over) + "\n")
    text = said(run)
    assert "the codebook has collapsed" not in text and "The run recorded no problems." in text
    assert "interrupted" not in text
