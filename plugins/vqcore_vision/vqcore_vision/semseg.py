"""Semantic segmentation: maps of class ids from pictures (modes L, P, I;16) or integer `.npy` files."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from vqcore.errors import DataError, SettingError
from vqcore.modalities.colours import GREY, class_colours, coloured
from vqcore.modalities.planes import cut_planes, name_of, read_planes
from vqcore.modalities.views import CropConfig, crop_view
from vqcore.protocols import DataSpec, View, expand

LAST = 255
"""The id in an 8-bit file that becomes 0 when all ids are shifted by one."""


class Semseg:
    """Class maps `(h, w)` of integers. Positions with `ignore_label` count in no loss and no metric.

    If `ignore_label` is no class, it gets an additional class id after the others, so that the encoder can see it.
    """

    suffixes = (".png", ".npy", ".bmp", ".pgm", ".tif", ".tiff")
    streams = (".png", ".bmp", ".pgm", ".tif", ".tiff")
    metrics = ("iou", "accuracy")

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings of class maps."""

        num_labels: int
        """Number of classes; with `shift`, the number of shifted ids (134 for COCO's 133 classes)."""
        shift: bool = False
        """As in 4M: 1 is added to the ids in the files, and 255 (no class) becomes 0."""
        ignore_label: int | None = None
        """Id in the files that counts in no loss and no metric; a negative id needs .npy files."""
        resample: Literal["nearest", "pillow-nearest"] = "nearest"
        """Filter for resizing. pillow-nearest is 4M's and may round ties between two pixels differently."""
        palette: tuple[tuple[int, int, int], ...] | None = None
        """One colour for each id in the files, 0 to 255, for pictures; by default the colours of PASCAL VOC."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 1 <= self.num_labels <= 2**16:
                raise SettingError("num_labels", f"{self.num_labels} must lie in 1..{2**16}")
            if self.shift and self.num_labels > 256:
                raise SettingError(
                    "num_labels",
                    f"{self.num_labels} with shift: files of 8 bits have at most 256 shifted ids",
                )
            least = 0 if self.shift else -(2**31)
            if self.ignore_label is not None and not least <= self.ignore_label < 2**16:
                raise SettingError(
                    "ignore_label",
                    f"{self.ignore_label} with shift={self.shift} must lie in {least}..{2**16 - 1}",
                )
            for colour in self.palette or ():
                if not all(0 <= value <= 255 for value in colour):
                    raise SettingError(
                        ("palette",), f"palette has the colour {list(colour)}; colours lie in 0..255"
                    )
            if self.palette is not None and len(self.palette) < self.num_labels - self.shift:
                raise SettingError(
                    ("palette",), f"palette has {len(self.palette)} colours for num_labels={self.num_labels}"
                )

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if size is None:
            raise ValueError("class maps need a size: set data.input_size")
        self.cfg = cfg
        is_class = cfg.ignore_label is None or cfg.shift or 0 <= cfg.ignore_label < cfg.num_labels
        self.spec = DataSpec(
            channels=1,
            size=expand(size, 2),
            kind="categorical",
            range=None,
            labels=cfg.num_labels + (not is_class),
            mask=cfg.ignore_label is not None,
            loss="cross_entropy",
        )
        colours = (*cfg.palette, *[GREY] * (256 - len(cfg.palette))) if cfg.palette else class_colours(256)
        self._colours = np.array(colours, np.uint8)

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, picture or array `(h, w)` of class ids as `(1, h, w)`, with the ids of the file.

        Raises `DataError` when the source is damaged, has colours or floats, has an id that is no class, or has no
        valid position.
        """
        raw = read_planes(source, (("Y",),), _ids_of)
        if raw.dtype.kind == "f":
            raise DataError(f"{name_of(source)}: has floats; class ids are integers")
        ids = self._ids(raw)
        wrong = (ids < 0) | (ids >= self.spec.labels)
        if wrong.any():
            place = tuple(int(axis) for axis in np.argwhere(wrong)[0])
            raise DataError(
                f"{name_of(source)}: the id {raw[place]} at {list(place[1:])} is no class; {self._known()}"
            )
        if self.cfg.ignore_label is not None and (raw == self.cfg.ignore_label).all():
            raise DataError(
                f"{name_of(source)}: has no valid value; every id is data.modality.ignore_label={self.cfg.ignore_label}"
            )
        return raw

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """Height and width in pixels."""
        return raw.shape[1:]

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop and a flip, or with `rng=None` the largest centred box."""
        return crop_view(self.cfg, extent, size, rng)

    def tensor(self, raw: np.ndarray, view: View) -> Int[Tensor, "h w"]:
        """The part that the view names, at the view's size, as ids from 0 to labels - 1."""
        return torch.from_numpy(self._ids(self._cut(raw, view)))

    def mask(self, raw: np.ndarray, view: View) -> Bool[Tensor, "h w"]:
        """True where the tensor of this view has another label than `ignore_label`."""
        return torch.from_numpy(self._cut(raw, view) != self.cfg.ignore_label)

    def show(self, x: Tensor) -> Image.Image | Int[np.ndarray, "h w"]:
        """One sample, class ids or scores, as a palette picture of the ids of the files; 16-bit grey for ids above 255.

        A palette picture looks coloured, and `read` takes its ids. With a negative `ignore_label`, which no picture can
        store, the result is an array.
        """
        ids = self._file_ids(x)
        if (self.cfg.ignore_label or 0) < 0:
            return ids.astype(np.int32)
        if ids.max() > LAST:
            return Image.fromarray(ids.astype(np.uint16))
        image = Image.fromarray(ids.astype(np.uint8)).convert("L")
        image.putpalette(self._colours[:256].tobytes())
        return image

    def picture(self, x: Tensor) -> Image.Image:
        """One sample, class ids or scores, in the colours of its classes."""
        return coloured(self._file_ids(x), self._colours)

    def _cut(self, raw: np.ndarray, view: View) -> np.ndarray:
        """Ids as in the file."""
        part = rearrange(cut_planes(raw, view, self.cfg.resample), "1 h w -> h w")
        return np.ascontiguousarray(part[:, ::-1] if view.flip else part)

    def _ids(self, raw: np.ndarray) -> np.ndarray:
        """From the ids of files to the ids of the tensor; an id that is no class ends up outside 0 .. labels - 1."""
        ids = raw.astype(np.int64)
        if self.cfg.shift:
            return np.where(ids == LAST, 0, ids + (ids >= 0))
        if self.spec.labels != self.cfg.num_labels:
            ids = np.where(ids == self.cfg.num_labels, -1, ids)
            return np.where(raw == self.cfg.ignore_label, self.cfg.num_labels, ids)
        return ids

    def _file_ids(self, x: Tensor) -> Int[np.ndarray, "h w"]:
        x = x.detach().cpu()
        if x.is_floating_point():
            x = (x if x.ndim == 3 else rearrange(x, "1 k h w -> k h w")).argmax(0)
        ids = (x if x.ndim == 2 else rearrange(x, "1 h w -> h w")).numpy()
        if self.cfg.shift:
            return np.where(ids == 0, LAST, ids - 1)
        return (
            ids
            if self.cfg.ignore_label is None
            else np.where(ids == self.cfg.num_labels, self.cfg.ignore_label, ids)
        )

    def _known(self) -> str:
        count = self.cfg.num_labels
        if self.cfg.shift:
            return f"with num_labels={count} and shift, ids are 0 to {count - 2}, and 255 for no class"
        return (
            f"there are num_labels={count} (0 to {count - 1}). If this id means no class, set "
            "data.modality.ignore_label, or data.modality.shift=true as in 4M"
        )


def _ids_of(image: Image.Image) -> np.ndarray:
    """Ids of a grey picture, or the indices of a palette picture."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, before Pillow 10.3
        return rearrange(np.asarray(image).astype(np.uint16), "h w -> 1 h w")
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I;16"):
        raise DataError(
            f"has colours or floats (mode {image.mode}), not class ids; save class ids as a grey or palette picture"
        )
    kind = np.uint16 if image.mode.startswith("I;16") else np.uint8
    return rearrange(np.asarray(image).astype(kind), "h w -> 1 h w")
