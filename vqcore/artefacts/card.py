"""The model card: README.md of an artefact, as the Hugging Face hub shows it.

Its snippet runs as it stands, or, for a tokenizer with borrowed weights of unknown source, with the place of these.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vqcore import __version__
from vqcore.compose.describe import inline
from vqcore.config import Config, to_tree
from vqcore.errors import printable
from vqcore.protocols import Facts
from vqcore.schema import TokenizerConfig

_FRONT = """---
library_name: vqcore
tags:
- tokenizer
- vector-quantization
---
"""


def model_card(
    cfg: TokenizerConfig,
    facts: Facts,
    made: Mapping[str, Any],
    *,
    suffix: str = "",
    address: str = ".",
) -> str:
    """What it is, how to use it, what it measures, how it was set, what it was trained on and by what.

    `made` is the provenance, with fingerprint and metrics; `suffix` is that of a file that the modality reads;
    `address` is what the snippet loads: a path or a hub id.
    """
    loans = {
        key: {**loan, "source": loan["source"] or _hub_place(cfg, key)}
        for key, loan in made.get("borrowed", {}).items()
        if key.partition(".")[0] not in ("objective", "extra")
    }
    parts = (
        f"{_FRONT}# {cfg.modality.name} tokenizer\n",
        f"`{cfg.model.encoder.name}` -> `{cfg.model.quantizer.name}` -> `{cfg.model.decoder.name}`, "
        f"made with vqcore {made.get('vqcore', __version__)}.\n",
        _table(("", ""), [*_facts(facts, made["fingerprint"]), *_borrowed(loans)]),
        f"## Use\n\n```python\n{snippet(facts, suffix, address, loans)}```\n",
        "## Metrics\n",
        _metrics(made),
        "## Settings\n",
        _table(("part", "settings"), _settings(cfg)),
        "## Training data\n",
        _data(made),
        "## Provenance\n",
        _table(("", ""), _origin(made)),
    )
    return "\n".join(parts)


def snippet(facts: Facts, suffix: str, address: str, loans: Mapping[str, Mapping[str, Any]]) -> str:
    """Python that loads the tokenizer and sends an input through it. `loans` are the weights that it borrows."""
    missing = {key: "PATH" for key, loan in loans.items() if not loan["source"]}
    given = f", borrowed={missing}" if missing else ""
    given += ", download=True" if len(missing) < len(loans) else ""
    spec, size = facts.spec, facts.size
    shape = ", ".join(map(str, (1, *size) if spec.labels is not None else (1, spec.channels, *size)))
    if spec.labels is not None:
        noise = f"torch.randint({spec.labels}, ({shape}))"
    elif spec.range is None:
        noise = f"torch.randn({shape})"
    else:
        low, high = spec.range
        noise = f"{low:g} + {high - low:g} * torch.rand({shape})"
    codes = (1, *facts.grid, facts.num_codebooks)
    rebuilt = (1, spec.out_channels, *size)
    return f"""import torch

from vqcore.tokenizer import Tokenizer

tokenizer = Tokenizer.load("{address}"{given})
x = {noise}  # noise; of a file of yours: x = tokenizer.read("input{suffix}")
codes = tokenizer.encode(x)  # {codes}, integers from 0 to {facts.codebook_size - 1}
x_hat = tokenizer.decode(codes)  # {rebuilt}
shown = tokenizer.show(x_hat)  # a picture, or an array in the units of the files
"""


def _facts(facts: Facts, fingerprint: str) -> Iterator[tuple[str, str]]:
    spec = facts.spec
    declared = "" if spec.range is None else f", values {spec.range[0]:g} to {spec.range[1]:g}"
    declared = f", {spec.labels} classes" if spec.labels is not None else declared
    nominal = " x ".join(map(str, facts.size))
    yield "input", f"{spec.kind}, {spec.channels} channels, nominal size {nominal}{declared}"
    books = f", {facts.num_codebooks} a position" if facts.num_codebooks > 1 else ""
    yield "codes", f"grid {' x '.join(map(str, facts.grid))}{books}, each one of {facts.codebook_size:,}"
    yield "bits per token", f"{facts.bits_per_token:.4g}"
    counts = {name: part.parameters for name, part in facts.parts.items() if part.parameters}
    yield "parameters", f"{sum(counts.values()):,} ({', '.join(f'{k} {v:,}' for k, v in counts.items())})"
    yield "fingerprint", f"`{fingerprint}`"


def _hub_place(cfg: Any, key: str) -> str | None:
    """The `hf://` address that the settings of a borrowing part name, if they name one."""
    part = {**vars(cfg.model), "modality": cfg.modality}[key.partition(".")[0]]
    places = [str(getattr(part, name)) for name in part.places]
    return next((place for place in places if place.startswith("hf://")), None)


def _borrowed(loans: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for key, loan in loans.items():
        source = f" from `{loan['source']}`" if loan["source"] else ""
        yield f"borrows {key}", f"weights with the SHA-256 `{loan['sha256']}`{source}"


def _metrics(made: Mapping[str, Any]) -> str:
    metrics: Mapping[str, float] = made.get("metrics", {})
    if not metrics:
        return "Not evaluated.\n"
    data = made.get("data", {})
    where = data.get("eval_path") or (data.get("path") if data.get("eval_share") else None)
    said = f"Measured after step {made['step']:,}" if "step" in made else "Measured"
    table = _table(("metric", "value"), ((name, f"{value:.4g}") for name, value in metrics.items()))
    return f"{said}{f', on `{where}`' if where else ''}.\n\n{table}"


def _settings(cfg: Any) -> Iterator[tuple[str, str]]:
    parts = {"modality": cfg.modality, "objective": cfg.objective}
    for name, part in {**vars(cfg.model), **parts}.items():
        if isinstance(part, Config):
            shown = ", ".join(f"{key} {inline(v)}" for key, v in to_tree(part).items() if key != "name")
            yield name, f"`{part.name}`{f': {_cell(shown)}' if shown else ''}"


def _data(made: Mapping[str, Any]) -> str:
    if "data" not in made:
        return "Not recorded.\n"
    kept = (
        (key, f"`{_cell(inline(value))}`") for key, value in made["data"].items() if value not in (None, {})
    )
    return _table(("setting", "value"), kept)


def _origin(made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("vqcore", "torch", "python", "git", "step", "weights"):
        if made.get(key) is not None:
            yield key, f"`{made[key]}`"
    for key, value in made.get("origin", {}).items():
        yield f"origin: {key}", f"`{_cell(inline(value))}`"
    who = {f"{c['distribution']} {c['version']}".strip() for c in made.get("components", {}).values()}
    if who:
        yield "distributions", ", ".join(sorted(who))


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return printable(text.replace("|", "\\|").replace("\n", " "))
