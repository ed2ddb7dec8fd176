"""The model card: README.md of an artefact, as the Hugging Face hub shows it. Its snippet runs as it stands."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vqcore import __version__
from vqcore.config import Config, inline, to_tree

if TYPE_CHECKING:
    from vqcore.tokenizer import Tokenizer

_FRONT = """---
library_name: vqcore
tags:
- tokenizer
- vector-quantization
---
"""


def model_card(
    tokenizer: "Tokenizer",
    fingerprint: str,
    figures: Mapping[str, float],
    made: Mapping[str, Any],
    address: str = ".",
) -> str:
    """What it is, how to use it, what it measures, how it was set, what it was trained on and by what.

    `made` is the provenance; `address` is what the snippet loads: a path or a hub id.
    """
    cfg = tokenizer.cfg
    parts = (
        f"{_FRONT}# {cfg.modality.name} tokenizer\n",
        f"`{cfg.model.encoder.name}` -> `{cfg.model.quantizer.name}` -> `{cfg.model.decoder.name}`, "
        f"made with vqcore {made.get('vqcore', __version__)}.\n",
        _table(("", ""), _facts(tokenizer, fingerprint)),
        f"## Use\n\n```python\n{snippet(tokenizer, address)}```\n",
        "## Figures\n",
        _figures(figures, made),
        "## Settings\n",
        _table(("part", "settings"), _settings(cfg)),
        "## Training data\n",
        _data(made),
        "## Provenance\n",
        _table(("", ""), _origin(made)),
    )
    return "\n".join(parts)


def snippet(tokenizer: "Tokenizer", address: str) -> str:
    """Python that loads the tokenizer and sends an input through it; it needs no file."""
    spec, size = tokenizer.spec, tuple(tokenizer.cfg.size)
    shape = ", ".join(map(str, (1, *size) if spec.labels is not None else (1, spec.channels, *size)))
    if spec.labels is not None:
        noise = f"torch.randint({spec.labels}, ({shape}{',' if not size else ''}))"
    elif spec.range is None:
        noise = f"torch.randn({shape})"
    else:
        low, high = spec.range
        noise = f"{low:g} + {high - low:g} * torch.rand({shape})"
    suffix = next(iter(tokenizer.modality.suffixes), "")
    codes = (1, *tokenizer.grid(), tokenizer.num_codebooks)
    rebuilt = (1, spec.out_channels, *size)
    return f"""import torch

from vqcore.tokenizer import Tokenizer

tokenizer = Tokenizer.load("{address}")
x = {noise}  # noise; of a file of yours: x = tokenizer.read("input{suffix}")
codes = tokenizer.encode(x)  # {codes}, integers from 0 to {tokenizer.codebook_size - 1}
x_hat = tokenizer.decode(codes)  # {rebuilt}
shown = tokenizer.show(x_hat)  # a picture, or an array in the units of the files
"""


def _facts(tokenizer: "Tokenizer", fingerprint: str) -> Iterator[tuple[str, str]]:
    spec, grid = tokenizer.spec, tokenizer.grid()
    declared = "" if spec.range is None else f", values {spec.range[0]:g} to {spec.range[1]:g}"
    declared = f", {spec.labels} classes" if spec.labels is not None else declared
    nominal = " x ".join(map(str, tokenizer.cfg.size))
    yield "input", f"{spec.kind}, {spec.channels} channels, nominal size {nominal}{declared}"
    books = f", {tokenizer.num_codebooks} a position" if tokenizer.num_codebooks > 1 else ""
    yield "codes", f"grid {' x '.join(map(str, grid))}{books}, each one of {tokenizer.codebook_size:,}"
    yield "bits per token", f"{tokenizer.bits_per_token:.4g}"
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    yield "parameters", f"{sum(parts.values()):,} ({', '.join(f'{k} {v:,}' for k, v in parts.items() if v)})"
    yield "fingerprint", f"`{fingerprint}`"


def _figures(figures: Mapping[str, float], made: Mapping[str, Any]) -> str:
    if not figures:
        return "Not evaluated.\n"
    where = made.get("data", {}).get("eval_path")
    said = f"Measured after step {made['step']:,}" if "step" in made else "Measured"
    table = _table(("figure", "value"), ((name, f"{value:.4g}") for name, value in figures.items()))
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
    who = {f"{c['distribution']} {c['version']}".strip() for c in made.get("components", {}).values()}
    if who:
        yield "distributions", ", ".join(sorted(who))


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
