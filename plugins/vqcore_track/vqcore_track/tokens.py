"""One page about a store of codes for a browser: how its codes are used, at which positions, and who made them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vqcore import __version__
from vqcore.evaluate.usage import reachable
from vqcore.pictures import heat
from vqcore.tokens.stats import Use
from vqcore_track.charts import Series, line_chart, short
from vqcore_track.page import RAMP, TEMPLATES, Picture, encoded, facts, use_of_codes

_MOST_BOOKS = 16
"""Codebooks with a map or a table of their own."""


def render(use: Use, name: str) -> str:
    """The whole page as text."""
    grid = use.manifest["grid"]
    return TEMPLATES.get_template("tokens.html.j2").render(
        version=__version__,
        name=name,
        rows=use.rows,
        size=use.counts.shape[1],
        use=use_of_codes(use.counts.tolist(), grid),
        tiles=_tiles(use),
        places=_places(use, grid),
        ramp=encoded(Image.fromarray(heat(RAMP)), "PNG"),
        books=_books(use),
        facts=_provenance(use),
    )


def _tiles(use: Use) -> list[tuple[str, str, str]]:
    """Label, value and note of the numbers at the top of the page: means over codebooks."""
    books, size = use.counts.shape
    share, possible = reachable(int(use.counts.sum()) // books, size)
    few, failed = share < 0.99, use.manifest.get("failed", 0)
    mean = {name: float(np.mean(getattr(use, name))) for name in ("usage", "perplexity", "bits")}
    return [
        (
            "Codebook usage",
            f"{mean['usage']:.1%}",
            f"of {share:.1%} that so few codes can reach" if few else "",
        ),
        (
            "Codebook perplexity",
            short(mean["perplexity"]),
            f"of {short(possible)} that so few codes can reach" if few else f"of {short(size)}",
        ),
        ("Entropy", f"{mean['bits']:.2f}", f"of {np.log2(size):.2f} bits a code"),
        ("Codes", short(int(use.counts.sum())), "in all"),
        ("Rows", short(use.rows), f"{failed:,} files could not be read" if failed else ""),
    ]


def _places(use: Use, grid: list[int]) -> dict[str, Any]:
    """The perplexity at each position: maps of a grid of two axes, else curves. Empty where it is not known."""
    if use.places is None:
        return {}
    title, labels = "Perplexity by position", _labels(len(use.places))
    if len(grid) != 2:
        series = [
            Series(label, [(float(at), float(value)) for at, value in enumerate(book)])
            for label, book in zip(labels, use.places)
        ]
        return {"charts": [line_chart(title, series, across="position", log=False)], "maps": []}
    maps = []
    for label, book in zip(labels[:_MOST_BOOKS], use.places):
        low, high = float(book.min()), float(book.max())
        unit = (book.reshape(grid) - low) / max(high - low, 1e-12)
        head = f"{title}, {label}" if len(use.places) > 1 else title
        maps.append((head, short(low), short(high), _map(unit)))
    return {"charts": [], "maps": maps}


def _map(unit: np.ndarray) -> Picture:
    """A grid of values from 0 to 1 as a picture of about 300 pixels."""
    image = Image.fromarray(heat(unit))
    scale = max(1, 300 // max(image.size))
    size = (image.width * scale, image.height * scale)
    return encoded(image.resize(size, Image.Resampling.NEAREST), "PNG")


def _books(use: Use) -> list[dict[str, Any]]:
    """The most and the least frequent codes of each codebook."""
    return [
        {"label": label, "codes": int(counts.sum()), "never": never, "pairs": list(zip(most, least))}
        for label, counts, never, most, least in zip(
            _labels(len(use.counts))[:_MOST_BOOKS], use.counts, use.never, use.most(), use.least()
        )
    ]


def _labels(books: int) -> list[str]:
    return [f"codebook {index + 1}" for index in range(books)] if books > 1 else ["codes"]


def _provenance(use: Use) -> dict[str, str]:
    made: Mapping[str, Any] = use.manifest
    return facts(
        {
            "tokenizer": made.get("tokenizer"),
            "fingerprint": made["fingerprint"],
            "modality": made.get("modality"),
            "size of a sample": made["size"],
            "layout on disk": made.get("store", "folder"),
            "order of the codes": made.get("layout"),
            "type": made["dtype"],
            "shards": len(made["shards"]) or None,
            "batch size": made.get("batch_size"),
            "precision": made.get("precision"),
            "device": made.get("device"),
            "threads": made.get("threads"),
            "versions": made.get("versions"),
        }
    )
