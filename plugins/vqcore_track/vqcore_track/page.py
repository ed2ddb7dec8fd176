"""The page: its contents as plain values. The files in `templates/` turn the values into HTML and escape them."""

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from vqcore import __version__
from vqcore.console import command
from vqcore.evaluate.usage import COLLAPSED, RECOVERED, reachable
from vqcore.pictures import heat, read_picture, strip_rows
from vqcore_track.charts import Chart, Event, Series, bar_chart, line_chart, rank_chart, short, with_unit
from vqcore_track.gallery import Gallery, Shown
from vqcore_track.record import TIMES, Record, eval_curves, eval_names, evaluated, train_names

NAMES = {
    "loss": "loss, weighted sum",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "codes/usage": "codebook usage",
    "codes/perplexity": "codebook perplexity",
    "codes/entropy": "codebook entropy",
    "codes/dead": "dead codes",
    "codes/dead_age": "median age of dead codes",
    "skipped_steps": "skipped steps",
    "data/bad": "unreadable samples",
    "metric/psnr": "PSNR",
    "metric/ssim": "SSIM",
    "metric/mae": "mean absolute error",
    "codes/tokens_per_sample": "tokens per sample",
    "codes/bits_per_token": "bits per token",
    "codes/bits_per_pixel": "bits per position",
    "decoded": "decoded samples",
    "error": "mean squared error, or share of wrong classes",
    "codes/usage_possible": "codebook usage that so few tokens can reach",
    "codes/perplexity_possible": "codebook perplexity that so few tokens can reach",
    "codes/bits_at_position": "bits between two samples' codes at one position",
    "codes/bits_anywhere": "bits between two samples' codes at random positions",
}
UNITS = {
    "metric/psnr": "dB",
    "codes/entropy": "bit",
    "codes/bits_per_token": "bit",
    "codes/bits_per_pixel": "bit",
    "codes/dead_age": "steps",
    "codes/usage": "%",
    "codes/usage_possible": "%",
    "codes/bits_at_position": "bit",
    "codes/bits_anywhere": "bit",
}
"""Units of metrics; the other metrics have none."""
SIDE = 256
"""Longest side of a sample's picture, in pixels."""
STRIP_ROWS = 7
MOST_EVENTS = 50
_HARMLESS = ("resumed", RECOVERED)
RAMP = np.tile(np.linspace(0, 1, 180), (12, 1))


@dataclass(frozen=True)
class Picture:
    """A picture as a `data:` address. `pixels` enlarges it without smoothing."""

    src: str
    width: int
    height: int
    pixels: bool = False


def render(record: Record, gallery: Gallery) -> str:
    """The whole page as text."""
    heads, tables = evaluated(record)
    model = record.section("model")
    parts = [_component(model.get(part)) for part in ("encoder", "quantizer", "decoder")]
    return TEMPLATES.get_template("report.html.j2").render(
        version=__version__,
        command=command("eval", record.folder),
        record=record,
        gallery=gallery,
        modality=_component(record.section("data").get("modality")),
        parts=[part for part in parts if part],
        events=_events(record),
        problems=_problems(record),
        resumed=sum(event.get("event") == "resumed" for event in record.events),
        MOST_EVENTS=MOST_EVENTS,
        tiles=_tiles(record, tables),
        reach=_reach(tables),
        verdicts=_verdicts(record),
        groups=[
            (group, [_card(shown) for shown in gallery.shown if shown.group == group])
            for group in ("best", "median", "worst")
        ],
        ramp=encoded(Image.fromarray(heat(RAMP)), "PNG"),
        curves=_curves(record),
        use=use_of_codes(gallery.counts, gallery.grid) if gallery.counts else {},
        heads=heads,
        tables=[{name: table[name] for name in _without_channels(table)} for table in tables],
        channels=_channels(heads, tables),
        protocol=_protocol(record),
        progress=_progress(record),
        provenance=_provenance(record, gallery),
        components=_components(record),
        settings=_settings(record),
    )


def _component(node: Any) -> str:
    return str(node.get("name", "")) if isinstance(node, Mapping) else ""


def _heading(name: str) -> str:
    """A metric's name at the beginning of a line; only names that are words get a capital letter."""
    label = NAMES.get(name, name)
    return label[0].upper() + label[1:] if name in NAMES else label


def _in_unit(value: float, name: str) -> float:
    return 100 * value if UNITS.get(name) == "%" else value


def _number(value: float, name: str) -> str:
    """A metric's value in few letters, in the metric's unit."""
    return f"{100 * value:.1f}" if UNITS.get(name) == "%" else short(value)


def _exact(value: float, name: str) -> str:
    return with_unit(f"{_in_unit(value, name):.5g}", UNITS.get(name, ""))


def _tiles(record: Record, tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics at the top of the page: those of the evaluation, else the last ones of training."""
    if not tables:
        last = {name: record.last(name) for name in ("loss", "codes/usage", "codes/perplexity")}
        return {name: value for name, value in last.items() if value is not None}
    metrics = tables[0]
    quality = [name for name in metrics if name.startswith("metric/") and name.count("/") == 1][:3]
    wanted = [*quality, "loss", "codes/usage", "codes/perplexity", "codes/bits_per_pixel"]
    return {name: metrics[name] for name in wanted if name in metrics}


def _reach(tables: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What so few tokens can reach at most, by metric, where this is clearly less than the codebook offers."""
    metrics = tables[0] if tables else {}
    if metrics.get("codes/usage_possible", 1.0) > 0.99:
        return {}
    reach = {name: metrics.get(f"{name}_possible") for name in ("codes/usage", "codes/perplexity")}
    return {
        name: with_unit(_number(most, name), UNITS.get(name, ""))
        for name, most in reach.items()
        if most is not None
    }


def _verdicts(record: Record) -> list[dict[str, Any]]:
    """For each size and kind of weights: scores of tokenizer and baselines, and sentences about what is wrong."""
    facts, found = record.judged.get("kmeans") or {}, []
    for result in record.judged.get("results") or []:
        baselines = result.get("baselines") or {}
        if not baselines:
            continue
        shared = [name for name in result["metrics"] if any(name in scores for scores in baselines.values())]
        found.append(
            {
                "head": f"{TIMES.join(map(str, result['size']))} {result.get('weights', '')}".strip(),
                "names": shared,
                "rows": {"this tokenizer": result["metrics"], **baselines},
                "sentences": result.get("verdict") or [],
                "facts": facts if "k-means" in baselines and "bits" in facts else {},
                "note": facts.get("note", ""),
            }
        )
    return found


def _channels(
    heads: Sequence[str], tables: Sequence[Mapping[str, float]]
) -> list[tuple[str, dict[str, Any]]]:
    """Heading and errors by channel and kind of error, of each table and each metric that has them."""
    found = []
    for head, table in zip(heads, tables):
        for label in _labels_of_channels(table):
            rows: dict[str, dict[str, float]] = {}
            for name, value in table.items():
                if _label(name) == label:
                    part, channel = name.split("/")[2:]
                    rows.setdefault(channel, {})[part] = value
            found.append((head if label == "channels" else f"{head} ({label})", rows))
    return found


def _without_channels(names: Iterable[str]) -> list[str]:
    """The names of metrics, without those that are errors of one channel."""
    names = list(names)
    labels = _labels_of_channels(names)
    return [name for name in names if _label(name) not in labels]


def _labels_of_channels(names: Iterable[str]) -> list[str]:
    """The labels of metrics that have RMSE, mean absolute error and bias of the same channels, and nothing else.

    A user may give any label to the metric `channels`, and this label to another metric.
    """
    parts: dict[str, list[list[str]]] = {}
    for name in names:
        if label := _label(name):
            parts.setdefault(label, []).append(name.split("/")[2:])
    return [
        label
        for label, found in parts.items()
        if all(len(part) == 2 for part in found)
        and len({tuple(sorted(c for k, c in found if k == kind)) for kind in ("rmse", "mae", "bias")}) == 1
        and {kind for kind, _ in found} == {"rmse", "mae", "bias"}
    ]


def _label(name: str) -> str:
    """The label in a metric's name `metric/LABEL/PART`; an empty text for other names."""
    family, label, *_ = [*name.split("/"), ""]
    return label if family == "metric" else ""


def _events(record: Record) -> list[tuple[int, str, str]]:
    """Step, name and detail of each event that is a problem; no collapse from which the codebook has recovered."""
    found: list[tuple[int, str, str]] = []
    for event in record.events:
        if event.get("event") == RECOVERED:
            found = [one for one in found if one[1] != COLLAPSED]
        if event.get("event") not in _HARMLESS:
            rest = [f"{k} {v}" for k, v in event.items() if k not in ("step", "event", "time", "detail")]
            detail = " ".join([str(event.get("detail", "")), *rest]).strip()
            found.append((event["step"], str(event.get("event", "")), detail))
    return found


def _problems(record: Record) -> list[str]:
    """A sentence for each problem that is not an event."""
    counted = (("skipped_steps", "steps were skipped"), ("data/bad", "samples could not be read"))
    found = [f"{int(value):,} {what}." for name, what in counted if (value := record.last(name))]
    for name, points in record.curves.items():
        if strange := sum(not math.isfinite(y) for _, y in points):
            found.append(f"{name} was not finite in {strange:,} of {len(points):,} lines of metrics.jsonl.")
    return found + record.notes


def _card(shown: Shown) -> dict[str, Any]:
    """One sample with its four pictures."""
    pictures = {
        "original": _picture(shown.original),
        "reconstruction": _picture(shown.reconstruction),
        "error map": _picture(shown.error),
        "token map": _picture(shown.tokens, pixels=True),
    }
    return {"key": shown.key, "value": shown.value, "pictures": pictures}


def _picture(image: Image.Image, pixels: bool = False) -> Picture:
    """At most `SIDE` wide and high; small pictures are exact (PNG), others are WebP."""
    image = image.convert("RGB")
    scale = SIDE / max(image.size)
    if scale < 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    small = max(image.size) <= 64
    return encoded(image, "PNG" if small else "WEBP", pixels or small)


def encoded(image: Image.Image, kind: str, pixels: bool = False) -> Picture:
    """A picture as a file of a kind that Pillow writes."""
    buffer = io.BytesIO()
    settings: dict[str, Any] = {"quality": 88, "method": 4} if kind == "WEBP" else {"optimize": True}
    image.save(buffer, format=kind, **settings)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{kind.lower()};base64,{data}", image.width, image.height, pixels)


def _curves(record: Record) -> dict[str, list[Chart]]:
    """The charts of training, by the heading above them."""
    events = [Event(float(step), f"{name} {detail}"[:200]) for step, name, detail in _events(record)[-40:]]
    names = [name for name in train_names(record.curves) if name != "data/bad"]
    losses = [name for name in names if _family(name) == "loss"]
    codes = [name for name in names if _family(name) == "codes"]
    metrics = [name for name in names if _family(name) == "metric"]
    quality = [
        name
        for name in _without_channels(eval_names(record.curves))
        if _family(name) == "metric" and not name.endswith(("/low", "/high"))
    ]
    rest = [name for name in names if name not in (*losses, *codes, *metrics)]
    groups = {
        "Losses": [_trained(record, name, events) for name in losses],
        "Metrics on the evaluation data": [_measured(record, name) for name in quality],
        "Metrics during training": [_trained(record, name, events) for name in metrics],
        "Codebook during training": [
            _trained(record, name, events) for name in sorted(codes, key=lambda n: n not in NAMES)
        ],
        "Optimization": [_trained(record, name, events) for name in rest],
    }
    drawn = {title: [chart for chart in charts if chart] for title, charts in groups.items()}
    return {title: charts for title, charts in drawn.items() if charts}


def _family(name: str) -> str:
    """The first word of a metric's name: `loss` of `loss`, `loss/pixel/mse` and `loss@discriminator`."""
    return name.partition("/")[0].partition("@")[0]


def _trained(record: Record, name: str, events: Sequence[Event]) -> Chart | None:
    series = [_series("training", name, record.curves[name])]
    if _family(name) == "loss":  # training counts codes over a window, evaluation over the whole set
        series += [
            _series(f"evaluation {size}".strip(), name, points, marked=True)
            for size, points in eval_curves(record.curves, name)
        ]
    return _chart(name, series, events=events, log=not name.startswith("lr"))


def _measured(record: Record, name: str) -> Chart | None:
    curves = eval_curves(record.curves, name)
    if all(len(points) < 2 for _, points in curves):
        return None
    return _chart(name, [_series(size or "evaluation", name, points, marked=True) for size, points in curves])


def _series(label: str, name: str, points: Sequence[tuple[float, float]], marked: bool = False) -> Series:
    return Series(label, [(step, _in_unit(value, name)) for step, value in points], marked)


def _chart(name: str, series: Sequence[Series], **settings: Any) -> Chart | None:
    unit = UNITS.get(name, "")
    title = f"{_heading(name)}, {unit}" if unit else _heading(name)
    return line_chart(title, series, unit=unit, **settings)


def use_of_codes(counts: Sequence[Sequence[int]], grid: Sequence[int]) -> dict[str, Any]:
    """How often the codes of each codebook occur, in numbers and charts."""
    books = len(counts)
    labels = [f"codebook {index + 1}" for index in range(books)] if books > 1 else ["codes"]
    every = [count for book in counts for count in book]
    share, _ = reachable(sum(every) // books, len(every) // books)
    return {
        "reach": round(share * len(every)) if share < 0.99 else None,
        "codes": sum(every),
        "used": sum(count > 0 for count in every),
        "size": len(every),
        "grid": TIMES.join(map(str, grid)),
        "charts": [
            rank_chart("How often each code occurs", counts, labels=labels),
            bar_chart("How many codes occur how often", _octaves(every), across="occurrences", what="codes"),
        ],
    }


def _octaves(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Numbers of codes by how often they occur: never, once, 2 to 3, 4 to 7 ...; the last bar takes all the rest.

    Where codes occur so often that the last bar would take more than half of them, a bar takes several powers of 2.
    """
    powers = Counter(count.bit_length() for count in counts)
    width = 1
    while 2 * sum(many for power, many in powers.items() if power > 7 * width) > len(counts):
        width += 1
    found: Counter[int] = Counter()
    for power, many in powers.items():
        found[min(-(-power // width), 8)] += many
    lows = [0, *(2 ** (width * bar) for bar in range(8))]
    names = [_span(low, high - 1) for low, high in pairwise(lows)] + [f"{_count(lows[-1])}+"]
    return [(names[bar], float(found[bar])) for bar in range(max(found) + 1)]


def _span(low: int, high: int) -> str:
    """A range of counts in few letters."""
    if low == high:
        return str(low)
    return f"{low}-{high}" if high < 1000 else f"{_count(low)}+"


def _count(number: int) -> str:
    return (
        str(number) if number < 10_000 else f"{number // 1000}k" if number < 10**6 else f"{number // 10**6}M"
    )


def _protocol(record: Record) -> dict[str, str]:
    """How `vqcore eval` measured."""
    if not record.evaluation:
        return {}
    measured, place = record.evaluation["protocol"], record.evaluation.get("environment", {})
    return facts(
        {
            "checkpoint": record.evaluation.get("checkpoint"),
            "samples": measured["set"].get("count"),
            "SHA-256 of the samples": measured["set"]["sha256"],
            "modality": measured.get("modality"),
            "metrics": ", ".join(measured.get("metrics", {})),
            "decoded samples": measured.get("decode_samples"),
            "sampling": measured.get("sampling"),
            "precision": measured.get("precision"),
            "versions": place.get("versions"),
        }
    )


def _progress(record: Record) -> tuple[Picture, list[str]] | None:
    """The originals, below them rows of reconstructions at steps that are spread evenly; and these steps."""
    folder = record.folder / "samples"
    rows = list(strip_rows(folder).items())
    if len(rows) < 2 or not (folder / "strip.png").is_file():
        return None
    places = [round(place * (len(rows) - 1) / (STRIP_ROWS - 1)) for place in range(STRIP_ROWS)]
    chosen = dict(rows[place] for place in places)
    read = {step: read_picture(path) for step, path in chosen.items()}
    shown = {step: tile for step, tile in read.items() if tile is not None}
    strip = read_picture(folder / "strip.png")
    if not shown or strip is None:
        return None
    tiles = list(shown.values())
    originals = strip.crop((0, 0, strip.width, tiles[0].height))
    sheet = Image.new("RGB", (originals.width, originals.height * (len(tiles) + 1)), (255, 255, 255))
    for index, tile in enumerate((originals, *tiles)):
        sheet.paste(tile, (0, index * originals.height))
    return encoded(sheet, "WEBP"), list(map(str, shown))


def _provenance(record: Record, gallery: Gallery) -> dict[str, str]:
    made = record.provenance
    return facts(
        {
            "command": " ".join(map(str, made.get("command") or [])),
            "git commit": made.get("git"),
            "versions": {name: made.get(name) for name in ("vqcore", "python", "torch")},
            "processes": made.get("world_size"),
            "threads": made.get("threads"),
            "checkpoint": record.taken or None,
            "fingerprint": record.saved.get("fingerprint"),
            "parameters": {part: short(count) for part, count in gallery.parts.items()},
        }
    )


def _components(record: Record) -> dict[str, str]:
    """The distribution that each component came from."""
    made = record.provenance.get("components")
    return {
        str(place): f"{node.get('name')} ({node.get('distribution')} {node.get('version')})"
        for place, node in (made if isinstance(made, Mapping) else {}).items()
        if isinstance(node, Mapping)
    }


def _settings(record: Record) -> dict[str, str]:
    """The settings that people ask for first."""
    data, run, optim = (record.section(name) for name in ("data", "run", "optim"))
    size = data.get("input_size") or data.get("input_size_max")
    return facts(
        {
            "data": data.get("path"),
            "evaluation data": data.get("eval_path"),
            "held-out share": data.get("eval_share"),
            "groups that stay together": data.get("group"),
            "input size": size or record.section("data", "modality").get("size"),
            "batch size": data.get("batch_size"),
            "accumulated batches": optim.get("accumulate"),
            "quantizer": record.section("model", "quantizer"),
            "optimizer": optim.get("name"),
            "learning rate": optim.get("lr") or optim.get("base_lr"),
            "warm-up": optim.get("warmup"),
            "gradient clipping": optim.get("clip"),
            "decay of the running average": record.section("ema").get("decay"),
            "precision": run.get("precision"),
            "seed": run.get("seed"),
        }
    )


def facts(given: Mapping[str, Any]) -> dict[str, str]:
    """Facts as text, without those that are not recorded."""
    texts = {name: _plain(value) for name, value in given.items()}
    return {name: text for name, text in texts.items() if text}


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items() if each is not None)
    return TIMES.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("vqcore_track"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {
    "thousands": "{:,}".format,
    "label": lambda name: NAMES.get(name, name),
    "unit": lambda name: UNITS.get(name, ""),
    "heading": _heading,
    "sentence": lambda text: text[:1].upper() + text[1:],
    "number": _number,
    "exact": _exact,
    "names": lambda tables: dict.fromkeys(name for table in tables for name in table),
}
