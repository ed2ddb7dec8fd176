"""Pictures for people: contact sheets (original, rebuilt, token map) and the strip that grows while a run trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from vqcore.protocols import Batch, Modality
from vqcore.rng import sample_generators

TILE = 128
"""Side of one picture in a sheet, in pixels."""
_GAP, _MARGIN = 4, 96


def picture(modality: Modality, x: Tensor) -> Image.Image:
    """One sample `(c, *size)`, or a class map, as a picture: the modality's own idea of one if it has any."""
    own = getattr(modality, "picture", None)
    shown = own(x) if own else modality.show(x)
    return shown.convert("RGB") if isinstance(shown, Image.Image) else array_picture(np.asarray(shown), x)


def array_picture(shown: np.ndarray, x: Tensor) -> Image.Image:
    """A picture of any array: curves for one axis, channels as colours for two, the middle slice for three."""
    values = x.detach().cpu().float().numpy() if x.is_floating_point() else np.asarray(shown)[None]
    if values.ndim == 4:
        values = values[:, values.shape[1] // 2]
    if values.ndim == 2:
        return _curves(values)
    if not x.is_floating_point():
        return Image.fromarray(_class_colours(values[0]))
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-12)
    colours = scaled[:3] if len(scaled) >= 3 else np.repeat(scaled[:1], 3, axis=0)
    return Image.fromarray((rearrange(colours, "c h w -> h w c") * 255).round().astype(np.uint8))


def token_maps(latents: Float[Tensor, "b *grid d"]) -> list[Image.Image]:
    """Each sample's codes as colours: the three main directions of the quantized latents become red, green and blue.

    Equal codes have equal colours, and codes that stand for similar things have similar ones.
    """
    flat = rearrange(latents.detach().cpu().double(), "b ... d -> b (...) d")
    centred = flat - flat.mean((0, 1))
    _, _, directions = torch.linalg.svd(rearrange(centred, "b n d -> (b n) d"), full_matrices=False)
    parts = centred @ directions[:3].T
    parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[-1]))
    spread = parts.std((0, 1)).clamp(min=1e-12)
    colours = ((parts / spread / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    grid = latents.shape[1:-1]
    height = grid[0] if len(grid) > 1 else 1
    return [Image.fromarray(rearrange(one, "(h w) c -> h w c", h=height)) for one in colours]


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of pictures with a label in front of each; enlarged without smoothing, so that pixels stay visible."""
    columns = max(len(pictures) for _, pictures in rows)
    width, height = _MARGIN + columns * (TILE + _GAP), len(rows) * (TILE + _GAP)
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for row, (label, pictures) in enumerate(rows):
        top = row * (TILE + _GAP)
        draw.text((8, top + TILE // 2 - 6), label, fill=(0, 0, 0))
        for column, each in enumerate(pictures):
            scale = min(TILE / each.width, TILE / each.height)
            size = (max(1, round(each.width * scale)), max(1, round(each.height * scale)))
            resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
            canvas.paste(each.resize(size, resample), (_MARGIN + column * (TILE + _GAP), top))
    return canvas


@torch.no_grad()
def contact_sheet(tokenizer: Any, batch: Batch) -> Image.Image:
    """Original, rebuilt and token map of each sample of a batch."""
    codes = tokenizer.encode(batch.x, batch.mask)
    return sheet(
        [
            ("original", [picture(tokenizer.modality, one) for one in batch.x.cpu()]),
            ("rebuilt", _rebuilt(tokenizer, batch, codes)),
            ("token map", token_maps(tokenizer.lookup(codes))),
        ]
    )


class Strip:
    """A picture with the originals on top and one row of reconstructions for each step at which it was fed.

    Rows of steps after `step`, from before the run was interrupted, are dropped: they will be made again.
    """

    def __init__(self, folder: Path, batch: Batch, step: int):
        self.folder, self.batch = folder, batch
        for path in folder.glob("step_*.png"):
            if _step_of(path) > step:
                path.unlink()

    @torch.no_grad()
    def add(self, tokenizer: Any, step: int) -> Path:
        """Write `step_N.png` (one row) and the strip of all rows so far; returns the strip's path."""
        self.folder.mkdir(exist_ok=True)
        codes = tokenizer.encode(self.batch.x, self.batch.mask)
        row = sheet([(f"step {step}", _rebuilt(tokenizer, self.batch, codes))])
        save_picture(row, self.folder / f"step_{step}.png")
        originals = [picture(tokenizer.modality, one) for one in self.batch.x.cpu()]
        rows = [sheet([("original", originals)])]
        for path in sorted(self.folder.glob("step_*.png"), key=_step_of):
            with Image.open(path) as saved:
                rows.append(saved.convert("RGB"))
        strip = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), (255, 255, 255))
        for index, one in enumerate(rows):
            strip.paste(one, (0, sum(r.height for r in rows[:index])))
        save_picture(strip, self.folder / "strip.png")
        return self.folder / "strip.png"


def save_picture(shown: Image.Image, path: Path) -> None:
    """Write a PNG aside and rename it, so that nobody meets half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.incomplete")
    shown.save(aside, format="PNG")
    aside.replace(path)


def _rebuilt(tokenizer: Any, batch: Batch, codes: Int[Tensor, "b *grid q"]) -> list[Image.Image]:
    size = tuple(batch.x.shape[-tokenizer.spec.rank :])
    rng = sample_generators(batch.keys, "picture")
    x_hat = tokenizer.decode(codes, size=size, rng=rng, extras=batch.extras).cpu()
    shown = x_hat.argmax(1) if tokenizer.spec.labels is not None else x_hat
    return [picture(tokenizer.modality, one) for one in shown]


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _curves(values: np.ndarray) -> Image.Image:
    canvas = Image.new("RGB", (TILE, TILE), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    low, high = float(values.min()), float(values.max())
    for index, channel in enumerate(values[:8]):
        across = np.linspace(2, TILE - 3, max(2, len(channel)))
        up = TILE - 3 - (np.resize(channel, max(2, len(channel))) - low) / max(high - low, 1e-12) * (TILE - 6)
        draw.line(list(zip(across.tolist(), up.tolist())), fill=tuple(_palette(index).tolist()))
    return canvas


def _class_colours(classes: np.ndarray) -> np.ndarray:
    return _palette(classes)


def _palette(index: Any) -> np.ndarray:
    """A fixed colour for each integer, well spread over neighbouring ones."""
    hashed = (np.asarray(index, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B1)
    return np.stack([(hashed >> np.uint64(shift)) % np.uint64(200) for shift in (3, 11, 19)], -1).astype(
        np.uint8
    )
