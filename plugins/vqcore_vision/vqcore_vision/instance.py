"""Masks of single instances, each cut to its own bounding box: `(1, h, w)` of zeros and ones, 64 x 64 by default.

As in 4M's SAM instances (arXiv 2406.09406), instances whose box covers too small a share of the picture are dropped,
the others are stretched to a square, and training draws one instance of a picture. Differs from 4M: files are label
maps, stacks of masks or annotations as JSON, not pickled polygons. Evaluation takes the largest instance; `every`
returns all of them and `paste` puts them back into the picture.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Integer
from PIL import Image
from torch import Tensor

from vqcore.data.npy import read_array
from vqcore.errors import DataError, SettingError
from vqcore.modalities.planes import SUFFIXES, name_of, read_picture
from vqcore.modalities.views import CropConfig, crop_view, pixels
from vqcore.protocols import DataSpec, View, expand
from vqcore_vision.annotations import read_annotations
from vqcore_vision.pieces import Box, Outline, Piece, stretched, tight


@dataclass(frozen=True)
class Pieces:
    """The instances of a picture of this extent, from the largest box to the smallest."""

    extent: tuple[int, int]
    found: tuple[Piece | Outline, ...]


class Instance:
    """One instance of a picture: the largest in the view, or in training the one that `View.draw` chooses.

    If no instance is inside the view, the whole picture is used.
    """

    suffixes = (*SUFFIXES, ".npy", ".json")
    metrics = ("iou",)
    has_own_box = True

    @dataclass(frozen=True, kw_only=True)
    class Config(CropConfig):
        """Settings of instances."""

        ignore: tuple[int, ...] = (0,)
        """Labels that are no instance: background, and 255 if it is void. The lowest is the background of `show`."""
        threshold: int | None = None
        """Files are grey pictures of one instance: the pixels above this value. Null: every label is an instance."""
        min_area: float = 0.0005
        """Instances whose box covers a smaller share of the picture (in training, of the crop) are dropped."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.min_area < 1:
                raise SettingError("min_area", f"{self.min_area} must lie in [0, 1)")
            if any(label < 0 for label in self.ignore):
                raise SettingError("ignore", f"{list(self.ignore)}: labels are never negative")

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        self.cfg = cfg
        nominal = expand(64 if size is None else size, 2)
        self.spec = DataSpec(channels=1, size=nominal, kind="binary", range=(0.0, 1.0), loss="bce")

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> Pieces:
        """A label map (picture, `.npy`, array `(h, w)`), a stack of masks (`.npy`, array `(n, h, w)`) or annotations.

        In a colour picture the label is red + 256 green + 65536 blue, as in COCO's panoptic maps. In a stack, values
        other than 0 are inside. Annotations are a `.json` file or its parsed content (`read_annotations`). Raises
        `DataError` when there is no instance, or no instance is large enough.
        """
        name, suffix = name_of(source), Path(source).suffix.lower() if isinstance(source, (str, Path)) else ""
        if suffix == ".json" or isinstance(source, (Mapping, list)):
            name = name if suffix else "annotations in memory"
            extent, found = read_annotations(source, name)
            pieces = Pieces(extent, tuple(_sorted(found)))
        elif suffix == ".npy" or isinstance(source, np.ndarray):
            name = name if suffix else "array in memory"
            pieces = self._pieces(read_array(Path(source), name) if suffix else source, name)
        else:
            pieces = self._pieces(read_picture(source, _labels), name)
        return self._large(pieces, name)

    def _large(self, pieces: Pieces, name: str) -> Pieces:
        """The instances that are large enough."""
        if not pieces.found:
            raise DataError(f"{name}: has no instance; everything is background (data.modality.ignore)")
        large = tuple(each for each in pieces.found if _share(each, pieces.extent) >= self.cfg.min_area)
        if not large:
            share = _share(pieces.found[0], pieces.extent)
            raise DataError(
                f"{name}: the largest of {len(pieces.found)} instances covers {share:.2g} of the picture, less than "
                f"data.modality.min_area={self.cfg.min_area:g}"
            )
        return replace(pieces, found=large)

    def extent(self, raw: Pieces) -> tuple[int, ...]:
        """Height and width of the whole picture."""
        return raw.extent

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """A random resized crop, a flip and a draw, or the whole picture."""
        if rng is None:
            return View(start=(0.0, 0.0), stop=(1.0, 1.0), size=size, extent=tuple(extent))
        return crop_view(self.cfg, extent, size, rng)

    def tensor(self, raw: Pieces, view: View) -> Float[Tensor, "1 h w"]:
        """The instance that the view chooses, its box stretched to the view's size: ones inside, zeros outside."""
        (top, left), (bottom, right) = pixels(view, raw.extent)
        box = (
            round(top),
            round(left),
            max(round(bottom), round(top) + 1),
            max(round(right), round(left) + 1),
        )
        found = self._within(raw, box) or list(raw.found)
        pick = int(np.random.default_rng(view.draw).integers(len(found))) if view.draw else 0
        x = _tensor(found[pick].stretched(view.size))
        return x.flip(-1) if view.flip else x

    def every(self, source: Any) -> tuple[Float[Tensor, "n 1 h w"], Int[Tensor, "n 4"]]:
        """All instances of a picture at the nominal size, and their boxes: top, left, bottom and right (exclusive)."""
        found = self.read(source).found
        masks = torch.stack([_tensor(each.stretched(self.spec.size)) for each in found])
        return masks, torch.tensor([each.box for each in found])

    def show(self, x: Float[Tensor, "*b 1 h w"]) -> Image.Image:
        """One mask as a label map, which `read` takes: where `x` is above 0.5, the highest 8-bit label not in `ignore`.

        By default this is white (255) on black.
        """
        inside = rearrange(x.detach().cpu(), "... h w -> (...) h w")[0] > 0.5
        ignored = [label for label in range(256) if label in self.cfg.ignore]
        label = max(set(range(256)) - set(ignored), default=255)
        return Image.fromarray(np.where(inside.numpy(), label, min(ignored, default=0)).astype(np.uint8))

    def _within(self, raw: Pieces, box: Box) -> list[Piece | Outline]:
        """The parts of the instances inside a box that are large enough there, the largest first."""
        cut = [each.cut(box) for each in raw.found]
        extent = (box[2] - box[0], box[3] - box[1])
        return _sorted(
            [each for each in cut if each is not None and _share(each, extent) >= self.cfg.min_area]
        )

    def _pieces(self, array: np.ndarray, name: str) -> Pieces:
        if array.dtype.kind not in "biu" or array.ndim not in (2, 3) or not array.size:
            raise DataError(
                f"{name}: has shape {array.shape} and type {array.dtype}; a label map is (h, w), a stack of masks is "
                "(n, h, w), both of integers or booleans"
            )
        if array.ndim == 3:
            whole = [Piece(0, 0, mask != 0) for mask in array]
            found = [each for each in map(tight, whole) if each is not None]
        elif self.cfg.threshold is not None:
            one = tight(Piece(0, 0, array > self.cfg.threshold))
            found = [] if one is None else [one]
        else:
            if array.min() < 0:
                raise DataError(f"{name}: has the label {array.min()}; labels are never negative")
            found = _by_label(array, self.cfg.ignore)
        return Pieces((array.shape[-2], array.shape[-1]), tuple(_sorted(found)))


def paste(
    masks: Float[Tensor, "n 1 h w"],
    boxes: Int[Tensor, "n 4"] | Sequence[Sequence[int]],
    extent: tuple[int, int],
) -> Bool[np.ndarray, "n height width"]:
    """Masks put back into their boxes in a picture of this extent; values above 0.5 are inside."""
    canvas = np.zeros((len(masks), *extent), dtype=bool)
    for page, mask, box in zip(canvas, masks, boxes):
        top, left, bottom, right = (int(edge) for edge in box)
        inside = (mask[0].detach().cpu() > 0.5).numpy()
        page[top:bottom, left:right] = stretched(inside, (bottom - top, right - left))
    return canvas


def _labels(image: Image.Image) -> np.ndarray:
    """The label of every pixel of a picture."""
    if image.mode == "RGB":
        red, green, blue = rearrange(np.asarray(image).astype(np.int32), "h w c -> c h w")
        return red + 256 * green + 65536 * blue
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise DataError(
            f"has mode {image.mode}; a label map is a grey, palette or RGB picture without transparency"
        )
    return np.asarray(image)


def _by_label(
    labels: Integer[np.ndarray, "h w"] | Bool[np.ndarray, "h w"], ignore: tuple[int, ...]
) -> list[Piece]:
    rows, columns = np.nonzero(~np.isin(labels, ignore))
    names, which = np.unique(labels[rows, columns], return_inverse=True)
    edges = np.full((4, len(names)), np.iinfo(np.int64).max)
    for line, values in zip(edges, (rows, columns, -rows, -columns)):
        np.minimum.at(line, which, values)
    top, left, bottom, right = edges[0], edges[1], 1 - edges[2], 1 - edges[3]
    return [
        Piece(int(t), int(le), labels[t:b, le:r] == name)
        for name, t, le, b, r in zip(names, top, left, bottom, right)
    ]


def _sorted(pieces: Iterable[Piece | Outline]) -> list[Piece | Outline]:
    return sorted(pieces, key=lambda each: (-_area(each), each.box))


def _area(piece: Piece | Outline) -> int:
    top, left, bottom, right = piece.box
    return (bottom - top) * (right - left)


def _share(piece: Piece | Outline, extent: tuple[int, int]) -> float:
    return _area(piece) / (extent[0] * extent[1])


def _tensor(mask: Bool[np.ndarray, "h w"]) -> Float[Tensor, "1 h w"]:
    return rearrange(torch.from_numpy(mask.astype(np.float32)), "h w -> 1 h w")
