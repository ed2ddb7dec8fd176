"""The page: sections of escaped text, charts and pictures. It loads nothing and runs nothing."""

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqcore import __version__
from vqcore.evaluate.measure import CODE_METRICS
from vqcore.pictures import heat
from vqcore_track.charts import Mark, Series, bar_chart, line_chart, rank_chart, short
from vqcore_track.gallery import Gallery, Shown
from vqcore_track.record import TIMES, Record, eval_curves, evaluated, train_names

UNITS = {"psnr": "dB", "bits_per_token": "bit", "bits_per_pixel": "bit", "codes/dead_age": "steps"}
"""What figures are measured in; the others have no unit."""
NAMES = {
    "loss": "loss, weighted sum",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "codes/usage": "codebook usage",
    "codes/perplexity": "codebook perplexity",
    "codes/dead": "dead codes",
    "codes/dead_age": "median age of dead codes",
    "skipped_steps": "skipped steps",
    "data/bad": "unreadable samples",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "mae": "mean absolute error",
    "tokens_per_sample": "tokens per sample",
    "bits_per_token": "bits per token",
    "bits_per_pixel": "bits per position",
}
SIDE = 256
"""Longest side of a sample's picture, in pixels."""
STRIP_ROWS = 7
_HARMLESS = ("resumed",)
_OPTIM = ("lr", "grad_norm", "loss_scale")
_RAMP = np.tile(np.linspace(0, 1, 180), (12, 1))


def render(record: Record, gallery: Gallery) -> str:
    """The whole page as text."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    wrong, troubles = _troubles(record)
    sections = (
        _header(record),
        "<main>",
        _tiles(record),
        troubles if wrong else "",
        _samples(gallery),
        _curves(record),
        _codes(record, gallery),
        _figures(record),
        _progress(record),
        "" if wrong else troubles,
        _about(record, gallery),
        "</main>",
        f"<footer>Made by vqcore {escape(__version__)} from the files of this run alone.</footer>",
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(record.name)} - vqcore</title><style>{style}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _header(record: Record) -> str:
    model = record.section("model")
    parts = [_component(model.get(part)) for part in ("encoder", "quantizer", "decoder")]
    chain = " → ".join(f"<code>{escape(part)}</code>" for part in parts if part)
    modality = _component(record.section("data").get("modality"))
    about = f"<code>{escape(modality)}</code> tokenizer: {chain}" if modality and chain else ""
    pill = f'<span class="pill {_state(record)[0]}">{escape(_state(record)[1])}</span>'
    return f'<header class="top"><h1>{escape(record.name)}</h1><p class="lead">{pill}{about}</p></header>'


def _state(record: Record) -> tuple[str, str]:
    if record.steps is None:
        return "good", f"{record.step:,} steps"
    if record.step >= record.steps:
        return "good", f"finished, {record.step:,} steps"
    return "warn", f"unfinished: step {record.step:,} of {record.steps:,}"


def _component(node: Any) -> str:
    return str(node.get("name", "")) if isinstance(node, Mapping) else ""


def _tiles(record: Record) -> str:
    heads, tables = evaluated(record)
    tiles = []
    if tables:
        figures = tables[0]
        known = [name for name in _metric_names(record, figures) if "/" not in name][:3]
        wanted = [*known, "loss", "codes/usage", "codes/perplexity", "bits_per_pixel"]
        tiles = [_tile(name, figures[name]) for name in wanted if name in figures]
    elif record.curves:
        wanted = ["loss", "codes/usage", "codes/perplexity"]
        found = {name: value for name in wanted if (value := record.last(name)) is not None}
        tiles = [_tile(name, value) for name, value in found.items()]
    if not tiles:
        return '<p class="note">Nothing has been measured yet.</p>'
    source = "Of the last line of training; there was no evaluation."
    if tables:
        source = f"Measured on {int(tables[0].get('samples', 0)):,} samples, {heads[0]}."
    return f'<dl class="tiles">{"".join(tiles)}</dl><p class="note">{escape(source)}</p>'


def _tile(name: str, value: float) -> str:
    label = _title(name).removesuffix(f", {_unit(name)}")
    shown, unit = _value(name, value)
    return f'<div class="tile"><dt>{escape(label)}</dt><dd>{shown} <small>{escape(unit)}</small></dd></div>'


def _value(name: str, value: float) -> tuple[str, str]:
    if name == "codes/usage":
        return f"{100 * value:.1f}", "%"
    return short(value), _unit(name)


def _label(name: str) -> str:
    return NAMES.get(name, name)


def _title(name: str) -> str:
    """A figure's name as a heading, with its unit; names that are nobody's words stay as they are."""
    known = _label(name)
    unit = _unit(name)
    return (known[0].upper() + known[1:] if name in NAMES else known) + (f", {unit}" if unit else "")


def _metric_names(record: Record, figures: Iterable[str]) -> list[str]:
    """Evaluated figures that are neither losses nor about codes: those that training does not log."""
    trained = set(train_names(record.curves))
    return [name for name in figures if name not in trained and name not in CODE_METRICS and name != "loss"]


def _troubles(record: Record) -> tuple[bool, str]:
    """Did anything go wrong, and the section about it."""
    events = [event for event in record.events if event.get("event") not in _HARMLESS]
    resumed = sum(event.get("event") in _HARMLESS for event in record.events)
    counted = [
        f"{int(value):,} {what}"
        for name, what in (("skipped_steps", "steps were skipped"), ("data/bad", "samples could not be read"))
        if (value := record.last(name))
    ]
    for name, points in record.curves.items():
        if strange := sum(not math.isfinite(y) for _, y in points):
            counted.append(f"{name} was not finite in {strange:,} of {len(points):,} lines of metrics.jsonl")
    lines = [f"<p>{escape(text)}.</p>" for text in counted] + [
        f"<p>{escape(note)}</p>" for note in record.notes
    ]
    if not events and not lines:
        again = f" The run was taken up again {resumed} times." if resumed > 1 else ""
        again = " The run was interrupted once and taken up again." if resumed == 1 else again
        return False, f"<h2>What went wrong</h2><p>Nothing that the run recorded.{again}</p>"
    rows = [
        f'<tr><td class="n">{int(event["step"]):,}</td><td>{escape(str(event.get("event", "")))}</td>'
        f"<td>{escape(_detail(event))}</td></tr>"
        for event in events[-50:]
    ]
    more = f"<p>The last 50 of {len(events):,}.</p>" if len(events) > 50 else ""
    table = (
        '<div class="panel scroll"><table><thead><tr><th class="n">step</th><th>what</th><th>detail</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return True, f"<h2>What went wrong</h2>{''.join(lines)}{more}{table if rows else ''}"


def _detail(event: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in event.items() if key not in ("step", "event", "time", "detail")}
    return " ".join(
        [str(event.get("detail", "")), *(f"{key} {value}" for key, value in rest.items())]
    ).strip()


def _samples(gallery: Gallery) -> str:
    if not gallery.shown:
        return ""
    label = _label(gallery.metric)
    parts = [
        f"<h2>Samples</h2><p>The best, the median and the worst of {gallery.samples:,} {escape(gallery.source)} "
        f"samples by {escape(label)} of each alone. In a token map equal codes have equal colours.</p>"
    ]
    columns = []
    for group, name in (("best", "Best"), ("median", "Median"), ("worst", "Worst")):
        members = [shown for shown in gallery.shown if shown.group == group]
        if members:
            cards = "".join(_card(shown, gallery) for shown in members)
            columns.append(f'<div class="column"><h3>{name}</h3>{cards}</div>')
    parts.append(f'<div class="columns">{"".join(columns)}</div>')
    ramp = _image(Image.fromarray(heat(_RAMP)), "", "ramp")
    top = "a wrong class" if not gallery.unit else f"{100 * gallery.top:.3g} % {gallery.unit} and more"
    legend = f"Error map: 0 {ramp} {escape(top)}"
    if gallery.curves:
        legend = f"Error maps are curves here, from 0 at the bottom to {escape(top)} at the top."
    parts.append(f'<p class="scale">{legend}</p>')
    return "".join(parts)


def _card(shown: Shown, gallery: Gallery) -> str:
    value, unit = _value(gallery.metric, shown.figure)
    pictures = (
        ("original", shown.original, ""),
        ("rebuilt", shown.rebuilt, ""),
        ("error map", shown.error, ""),
        ("token map", shown.tokens, "pixels"),
    )
    four = "".join(
        f"<div>{_image(image, f'{what} of {shown.key}', _sharp(image, kind))}{what}</div>"
        for what, image, kind in pictures
    )
    return (
        f'<figure class="sample"><figcaption><span>{escape(shown.key)}</span><b>{value} {escape(unit)}</b></figcaption>'
        f'<div class="four">{four}</div></figure>'
    )


def _sharp(image: Image.Image, kind: str) -> str:
    return kind or ("pixels" if max(image.size) <= 64 else "")


def _image(image: Image.Image, alt: str, kind: str) -> str:
    """A picture in the page: small ones exact (PNG), others as WebP, at most `SIDE` wide and high."""
    image = image.convert("RGB")
    scale = SIDE / max(image.size)
    if scale < 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    small = max(image.size) <= 64
    return _encoded(image, "PNG" if small else "WEBP", alt, kind)


def _encoded(image: Image.Image, kind: str, alt: str, style: str) -> str:
    buffer = io.BytesIO()
    image.save(
        buffer, format=kind, **({"quality": 88, "method": 4} if kind == "WEBP" else {"optimize": True})
    )
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = image.size
    return (
        f'<img class="{style}" src="data:image/{kind.lower()};base64,{data}" alt="{escape(alt)}" '
        f'width="{width}" height="{height}">'
    )


def _curves(record: Record) -> str:
    marks = [
        Mark(float(event["step"]), f"{event.get('event', '')} {_detail(event)}"[:200])
        for event in record.events
        if event.get("event") not in _HARMLESS
    ][-40:]
    names = train_names(record.curves)
    codes = [name for name in names if name.startswith("codes/")]
    optim = [name for name in names if name.partition("/")[0] in _OPTIM]
    other = [name for name in names if name not in codes and name not in optim and name not in ("data/bad",)]
    quality = dict.fromkeys(figure for full in record.curves for figure in [_evaluated_name(full)] if figure)
    quality = {name: None for name in quality if name not in names and name not in CODE_METRICS}
    groups = (
        ("Losses", [_trained(record, name, marks) for name in sorted(other, key=lambda n: n != "loss")]),
        ("Quality on the evaluation data", [_quality(record, name) for name in quality]),
        ("Codebook in training", [_trained(record, name, marks) for name in codes]),
        ("Optimisation", [_trained(record, name, marks) for name in optim]),
    )
    parts = [
        f'<h3>{title}</h3><div class="grid">{"".join(charts)}</div>'
        for title, charts in groups
        if any(charts)
    ]
    return f"<h2>Curves</h2>{''.join(parts)}" if parts else ""


def _evaluated_name(full: str) -> str:
    place, _, figure = full.partition("/")
    return figure if place == "eval" or place.startswith("eval@") else ""


def _scaled(name: str, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, 100 * y) for x, y in points] if name == "codes/usage" else list(points)


def _unit(name: str) -> str:
    return "%" if name == "codes/usage" else UNITS.get(name, "")


def _trained(record: Record, name: str, marks: Sequence[Mark]) -> str:
    series = [Series("training", _scaled(name, record.curves[name]))]
    if not name.startswith("codes/"):  # over a window in training, over the whole set in evaluation
        series += [
            Series(f"evaluation {size}".strip(), _scaled(name, points), marked=True)
            for size, points in eval_curves(record.curves, name)
        ]
    return line_chart(_title(name), series, unit=_unit(name), marks=marks, log=not name.startswith("lr"))


def _quality(record: Record, name: str) -> str:
    curves = eval_curves(record.curves, name)
    if all(len(points) < 2 for _, points in curves):
        return ""
    series = [Series(size or "evaluation", points, marked=True) for size, points in curves]
    return line_chart(_title(name), series, unit=_unit(name))


def _codes(record: Record, gallery: Gallery) -> str:
    if not gallery.counts:
        return ""
    books = (
        [f"codebook {index + 1}" for index in range(len(gallery.counts))]
        if len(gallery.counts) > 1
        else ["codes"]
    )
    every = [count for book in gallery.counts for count in book]
    used, total = sum(count > 0 for count in every), sum(every)
    grid = TIMES.join(map(str, gallery.grid))
    text = (
        f"{total:,} codes of {gallery.samples:,} {gallery.source} samples (grid {grid}) use {used:,} of {len(every):,} "
        f"different ones, {100 * used / len(every):.1f} %."
    )
    if total < 10 * len(every):
        text += " There are too few samples to expect every code."
    charts = rank_chart("Times that each code occurs", gallery.counts, labels=books)
    charts += bar_chart(
        "How many codes occur how often", _octaves(every), across="times it occurs", what="codes"
    )
    return f'<h2>Use of the codes</h2><p>{escape(text)}</p><div class="grid">{charts}</div>'


def _octaves(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Codes by how often they occur: never, once, 2 to 3, 4 to 7 ...; the last bar takes all the rest."""
    found = Counter(min(count.bit_length(), 8) for count in counts)
    names = ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128+"]
    last = max(found)
    return [(names[place], float(found[place])) for place in range(last + 1)]


def _figures(record: Record) -> str:
    heads, tables = evaluated(record)
    if not tables:
        why = "Not measured yet. <code>vqcore eval</code> does it; where there is no evaluation data, name some with "
        return f'<h2>Evaluation</h2><p class="note">{why}<code>data.eval_path=...</code></p>'
    names = dict.fromkeys(name for table in tables for name in table)
    head = "".join(f'<th class="n">{escape(text)}</th>' for text in heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="n">{_cell(name, table.get(name))}</td>' for table in tables)
        + "</tr>"
        for name in names
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>Evaluation</h2><div class="panel scroll">{table}</div>{_protocol(record)}'


def _cell(name: str, value: float | None) -> str:
    unit = UNITS.get(name, "")
    return "" if value is None else f"{value:.5g}{' ' + escape(unit) if unit else ''}"


def _protocol(record: Record) -> str:
    if not record.evaluation:
        return ""
    measured, place = record.evaluation["protocol"], record.evaluation.get("environment", {})
    facts = {
        "checkpoint": record.evaluation.get("checkpoint"),
        "samples": measured["set"].get("count"),
        "SHA-256 of the samples": measured["set"]["sha256"],
        "modality": _plain(measured.get("modality")),
        "metrics": ", ".join(measured.get("metrics", {})),
        "versions": _plain(place.get("versions")),
    }
    return f"<details><summary>How it was measured</summary>{_facts(facts)}</details>"


def _progress(record: Record) -> str:
    """Rows of the strip, evenly over the steps, under the originals."""
    folder = record.folder / "samples"
    rows = sorted(folder.glob("step_*.png"), key=lambda path: int(path.stem.partition("_")[2]))
    if len(rows) < 2 or not (folder / "strip.png").is_file():
        return ""
    chosen = [rows[round(place * (len(rows) - 1) / (STRIP_ROWS - 1))] for place in range(STRIP_ROWS)]
    with Image.open(folder / "strip.png") as strip:
        tiles = [Image.open(path).convert("RGB") for path in dict.fromkeys(chosen)]
        first = strip.convert("RGB").crop((0, 0, strip.width, tiles[0].height))
    sheet = Image.new("RGB", (first.width, first.height * (len(tiles) + 1)), (255, 255, 255))
    for index, tile in enumerate((first, *tiles)):
        sheet.paste(tile, (0, index * first.height))
    steps = ", ".join(path.stem.partition("_")[2] for path in dict.fromkeys(chosen))
    picture = _encoded(sheet, "WEBP", f"originals, and reconstructions after steps {steps}", "strip")
    return f'<h2>How it learned</h2><p>The same samples after some of the steps.</p><div class="panel">{picture}</div>'


def _about(record: Record, gallery: Gallery) -> str:
    made, saved = record.provenance, record.saved
    components = made.get("components") if isinstance(made.get("components"), Mapping) else {}
    facts = {
        "command": " ".join(map(str, made.get("command") or [])),
        "git commit": made.get("git"),
        "versions": ", ".join(
            f"{name} {made[name]}" for name in ("vqcore", "python", "torch") if name in made
        ),
        "processes": made.get("world_size"),
        "threads": made.get("threads"),
        "checkpoint shown": record.checkpoint.name if record.checkpoint else None,
        "its evaluation loss": saved.get("eval_loss"),
        "fingerprint": saved.get("fingerprint"),
        "parameters": ", ".join(f"{part} {short(count)}" for part, count in gallery.parts.items()),
    }
    built = {
        place: f"{node.get('name')} ({node.get('distribution')} {node.get('version')})"
        for place, node in (components or {}).items()
        if isinstance(node, Mapping)
    }
    return (
        f'<h2>Provenance</h2><div class="two"><div class="panel">{_facts(facts)}</div>'
        f'<div class="panel">{_facts(built)}</div></div>'
        f"<h2>Config</h2>{_settings(record)}"
        f"<details><summary>The whole config</summary><pre>{escape(record.config_text)}</pre></details>"
    )


def _settings(record: Record) -> str:
    """The settings that people ask for first."""
    data, run, optim, ema = (record.section(name) for name in ("data", "run", "optim", "ema"))
    size = (
        data.get("input_size") or data.get("input_size_max") or record.section("data", "modality").get("size")
    )
    rate = optim.get("lr") or optim.get("base_lr")
    facts = {
        "data": data.get("path"),
        "evaluation data": data.get("eval_path"),
        "input size": _plain(size),
        "batch": f"{data.get('batch_size')}{TIMES}{optim.get('accumulate', 1)}",
        "quantizer": _plain(record.section("model", "quantizer")),
        "optimizer": f"{optim.get('name')}, lr {rate}, warm-up {optim.get('warmup')}, clip {optim.get('clip')}",
        "average": ema.get("decay"),
        "precision": run.get("precision"),
        "seed": run.get("seed"),
    }
    return f'<div class="panel">{_facts(facts if record.config else {})}</div>'


def _plain(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items() if each is not None)
    return TIMES.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
        for key, value in facts.items()
        if value not in (None, "")
    ]
    return f"<table><tbody>{''.join(rows)}</tbody></table>" if rows else '<p class="note">Not recorded.</p>'
