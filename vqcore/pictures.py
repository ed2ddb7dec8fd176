"""Pictures for people: contact sheets (original, reconstruction, token map) and the strip of a run in training."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from vqcore import dist, protocols
from vqcore.console import say
from vqcore.errors import cause, first_line
from vqcore.files import aside
from vqcore.modalities.colours import GREY
from vqcore.protocols import Batch, Codec, Modality
from vqcore.rng import sample_generators

TILE = 128
"""Side of one picture in a sheet, in pixels."""
_GAP, _MARGIN = 4, 96
_ROW = re.compile(r"step_([0-9]+)\.png")
_FINE = 4
"""Curves are drawn this many times larger and then reduced, so that the curves have smooth edges."""
_HEAT = np.array(
    [(8, 6, 14), (50, 12, 92), (124, 29, 109), (196, 60, 76), (241, 114, 29), (250, 190, 56), (252, 253, 191)]
)
_INKS = (
    (31, 95, 165),
    (200, 75, 20),
    (20, 130, 90),
    (130, 80, 180),
    (160, 110, 0),
    (190, 45, 110),
    (90, 100, 110),
)


def picture(
    modality: Modality,
    x: Tensor,
    like: Tensor | None = None,
    mask: Bool[Tensor, "*size"] | None = None,
) -> Image.Image:
    """One sample `(c, *size)`, or a class map, as a picture. A modality may have its own method for this.

    `like` is the original of a reconstruction: both pictures then have the same scale from values to colours. If the
    picture has a pixel for each position, the invalid positions of `mask` are grey.
    """
    shown = protocols.picture(modality, x)
    if isinstance(shown, Image.Image):
        shown = shown.convert("RGB")
    else:
        channels = protocols.shown_channels(modality)
        shown = array_picture(np.asarray(shown), x, x if like is None else like, channels)
    if mask is not None and mask.shape == (shown.height, shown.width):
        shown.paste(GREY, mask=Image.fromarray(~mask.cpu().numpy()))
    return shown


def originals(modality: Modality, batch: Batch) -> list[Image.Image]:
    """The samples of a batch as pictures."""
    return [picture(modality, one, mask=mask) for one, mask in zip(batch.x.cpu(), masks(batch))]


def masks(batch: Batch) -> Sequence[Bool[Tensor, "*size"] | None]:
    """The mask of each sample of a batch."""
    return [None] * len(batch.keys) if batch.mask is None else list(batch.mask)


def array_picture(shown: np.ndarray, x: Tensor, like: Tensor, channels: Sequence[int] = ()) -> Image.Image:
    """A picture of any array: curves for one axis, channels as colours for two axes, the middle slice for three axes.

    Black and white are the smallest and the largest value of `like`. A class map has one colour for each class.
    `channels` are the numbers of the channels to show, by default the first ones.
    """
    if not x.is_floating_point():
        return _class_picture(np.asarray(shown))
    if channels:
        x, like = x[list(channels)], like[list(channels)]
    reference = like.detach().cpu().float()
    low, high = float(reference.min()), float(reference.max())
    unit = _flat((x.detach().cpu().float().numpy() - low) / max(high - low, 1e-12))
    if unit.ndim == 2:
        return _curves(unit)
    unit = unit.clip(0, 1)
    colours = unit[:3] if len(unit) >= 3 else np.repeat(unit[:1], 3, axis=0)
    return Image.fromarray((rearrange(colours, "c h w -> h w c") * 255).round().astype(np.uint8))


def errors(x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> Float[Tensor, "c *size"]:
    """The error of one sample at each position, as one channel: mean absolute difference, or 1 for a wrong class.

    A sample of one axis keeps its channels. The error at invalid positions is 0.
    """
    if x.is_floating_point():
        each = (x_hat - x).abs().float()
        each = each if x.ndim == 2 else each.mean(0, keepdim=True)
    else:
        each = (x_hat.argmax(0) != x).float().unsqueeze(0)
    return each if mask is None else each * mask


def error_picture(each: Float[Tensor, "c *size"], top: float) -> Image.Image:
    """Errors as a picture, from black (0) over red to pale yellow (`top` or more); curves for one axis."""
    unit = _flat(each.detach().cpu().numpy() / max(top, 1e-12))
    return _curves(unit) if unit.ndim == 2 else Image.fromarray(heat(unit[0]))


def heat(unit: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1, from dark to light: the order is visible in print and to colour-blind people."""
    places = np.linspace(0, 1, len(_HEAT))
    parts = [np.interp(unit.clip(0, 1), places, _HEAT[:, part]) for part in range(3)]
    return np.stack(parts, -1).round().astype(np.uint8)


def token_maps(latents: Float[Tensor, "b *grid d"]) -> list[Image.Image]:
    """Each sample's codes as colours: the first three principal components of the latents are red, green and blue.

    Equal codes have equal colours, and similar latents have similar colours. A row of codes becomes a band whose height
    is a quarter of its length.
    """
    flat = rearrange(latents.detach().cpu().double(), "b ... d -> b (...) d")
    centred = flat - flat.mean((0, 1))
    _, _, directions = torch.linalg.svd(rearrange(centred, "b n d -> (b n) d"), full_matrices=False)
    parts = centred @ directions[:3].T
    parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[-1]))
    spread = parts.std((0, 1)).clamp(min=1e-12)
    colours = ((parts / spread / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    grid = latents.shape[1:-1]
    height, times = (grid[0], 1) if len(grid) > 1 else (1, max(1, grid[0] // 4))
    maps = repeat(colours, "b (h w) c -> b (h times) w c", h=height, times=times)
    return [Image.fromarray(one) for one in maps]


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of pictures, each with a label in front; small pictures are enlarged without smoothing."""
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
def contact_sheet(tokenizer: Codec, batch: Batch, sampling: Mapping[str, Any]) -> Image.Image | None:
    """Original, reconstruction and token map of each sample of a batch; None on ranks other than 0.

    `sampling` are the objective's options. All processes call this function together, with the same batch.
    """
    codes = tokenizer.encode(batch.x, batch.mask)
    shown = rebuilt(tokenizer, batch, codes, sampling)
    if shown is None:
        return None
    return sheet(
        [
            ("original", originals(tokenizer.modality, batch)),
            ("reconstruction", shown),
            ("token map", token_maps(tokenizer.lookup(codes))),
        ]
    )


class Strip:
    """A picture with the originals of a prepared batch on top and one row of reconstructions for each call of `add`.

    Rows of steps after `step` are deleted: a resumed run makes these steps, and their rows, again. Every process has a
    strip of the same batch, and rank 0 writes. `sampling` are the objective's options.
    """

    def __init__(self, folder: Path, batch: Batch, step: int, sampling: Mapping[str, Any]):
        self.folder, self.batch, self.sampling = folder, batch, sampling
        for made, path in strip_rows(folder).items() if dist.is_main() else ():
            if made > step:
                with _told(path):
                    path.unlink()

    @torch.no_grad()
    def add(self, tokenizer: Codec, step: int) -> Path | None:
        """Write `step_N.png` (one row) and `strip.png`, all rows so far. All processes call this method together.

        Returns the path of the row; None if the row cannot be written, and on ranks other than 0.
        """
        codes = tokenizer.encode(self.batch.x, self.batch.mask)
        shown = rebuilt(tokenizer, self.batch, codes, self.sampling)
        if shown is None:
            return None
        path = self.folder / f"step_{step}.png"
        written = try_to_save(sheet([(f"step {step}", shown)]), path)
        rows = [sheet([("original", originals(tokenizer.modality, self.batch))])]
        rows += [row for old in strip_rows(self.folder).values() if (row := read_picture(old)) is not None]
        strip = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), (255, 255, 255))
        for index, one in enumerate(rows):
            strip.paste(one, (0, sum(r.height for r in rows[:index])))
        try_to_save(strip, self.folder / "strip.png")
        return path if written else None


def strip_rows(folder: Path) -> dict[int, Path]:
    """The rows of a run's strip by step, ascending."""
    found = {path: _ROW.fullmatch(path.name) for path in folder.glob("step_*.png") if path.is_file()}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def read_picture(path: Path) -> Image.Image | None:
    """A picture that was written for people. A damaged one is named, and None."""
    try:
        with Image.open(path) as saved:
            return saved.convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise anything
        say(f"{path}: this picture is damaged and left out ({first_line(error)}).")
        return None


def save_picture(shown: Image.Image, path: Path) -> None:
    """Write a PNG."""
    with aside(path) as temporary:
        shown.save(temporary, format="PNG")


def try_to_save(shown: Image.Image, path: Path) -> bool:
    """Write a PNG of a run in training, which does not end because of a picture; returns whether it is written."""
    with _told(path):
        save_picture(shown, path)
        return True
    return False


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        say(f"{path}: this picture is not written: {cause(error)}.")


def rebuilt(
    tokenizer: Codec, batch: Batch, codes: Int[Tensor, "b *grid q"], sampling: Mapping[str, Any]
) -> list[Image.Image] | None:
    """The reconstructions from the codes of a batch, as pictures; None on ranks other than 0.

    Each process decodes its share of the samples; the share does not change the result.
    """
    share = slice(dist.rank(), None, dist.world_size())
    size, rows = tuple(batch.x.shape[-tokenizer.spec.rank :]), {}
    if keys := batch.keys[share]:
        rng = sample_generators(keys, "picture")
        extras = batch.part(share).conditions
        x_hat = tokenizer.decode(codes[share], size=size, rng=rng, extras=extras, **sampling)
        rows = {"x_hat": x_hat.cpu(), "place": torch.arange(len(batch.keys))[share]}
    whole = dist.joined(rows)
    if whole is None:
        return None
    x_hat = whole["x_hat"][whole["place"].argsort()]
    shown = x_hat.argmax(1) if tokenizer.spec.labels is not None else x_hat
    each = zip(shown, batch.x, masks(batch))
    return [picture(tokenizer.modality, one, like, mask) for one, like, mask in each]


def _flat(values: np.ndarray) -> np.ndarray:
    """The middle slice of a volume; the channels of a vector as one curve; other arrays unchanged."""
    if values.ndim == 4:
        return values[:, values.shape[1] // 2]
    return values.T if values.ndim == 2 and values.shape[1] == 1 else values


def _curves(unit: np.ndarray) -> Image.Image:
    """The first rows of values as curves; 0 is near the bottom of the picture, 1 is near the top."""
    side = 2 * TILE * _FINE
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    room = side * 0.04
    for row, ink in zip(unit, _INKS):
        row = row if len(row) > 1 else np.repeat(row, 2)
        across = np.linspace(room, side - room, len(row))
        up = side - room - row.clip(-0.03, 1.03) * (side - 2 * room)
        draw.line(list(zip(across.tolist(), up.tolist())), fill=ink, width=3 * _FINE, joint="curve")
    return canvas.resize((2 * TILE, 2 * TILE), Image.Resampling.BOX)


def _class_picture(classes: np.ndarray) -> Image.Image:
    """Class ids as colours: the middle slice of a volume, a band for a row."""
    classes = classes[len(classes) // 2] if classes.ndim == 3 else np.atleast_2d(classes)
    return Image.fromarray(_palette(np.repeat(classes, 8, axis=0) if len(classes) == 1 else classes))


def _palette(index: Any) -> np.ndarray:
    """A fixed colour for each integer; neighbouring integers have clearly different colours."""
    hashed = (np.asarray(index, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B1)
    return np.stack([(hashed >> np.uint64(shift)) % np.uint64(200) for shift in (3, 11, 19)], -1).astype(
        np.uint8
    )
