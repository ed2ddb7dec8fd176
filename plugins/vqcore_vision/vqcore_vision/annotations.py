"""Instances from JSON: the annotations of one picture as COCO and SA-1B write them, polygons or run lengths.

A run-length code counts zeros and ones in turn, column by column. Compressed, the counts are base-32 numbers in ASCII
(5 bits a character from code 48 on, 32 means more follow, two's complement), from the fourth on as differences to the
one before the last.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float

from vqcore.errors import DataError, listed
from vqcore_vision.pieces import Outline, Piece, outline, tight

FAR = 2**20
"""Sides and coordinates beyond this are of no picture; Pillow draws polygons with integers of 32 bits."""


def read_annotations(source: Any, name: str) -> tuple[tuple[int, int], list[Piece | Outline]]:
    """Height and width of the picture, and its instances: from a `.json` file, or what is in one.

    That is `{image: {height, width}, annotations: [{segmentation}, ...]}`, or the same with `images` of one picture;
    or the annotations alone if they are run lengths. Crowds (`iscrowd`) are left out. Raises `DataError`.
    """
    found = _loaded(Path(source), name) if isinstance(source, (str, Path)) else source
    given = found.get("annotations") if isinstance(found, Mapping) else found
    if not isinstance(given, Sequence) or not all(isinstance(each, Mapping) for each in given):
        has = f"has {listed(found)}" if isinstance(found, Mapping) else f"is a {type(found).__name__}"
        raise DataError(
            f"{name}: {has}; wanted is {{image: {{height, width}}, annotations: [{{segmentation}}, ...]}}"
        )
    if not given:
        raise DataError(f"{name}: holds no instance; its annotations are empty")
    extent = _extent(found, given, name)
    pieces = []
    for number, each in enumerate(given):
        if not each.get("iscrowd"):
            pieces.append(
                _piece(each.get("segmentation"), extent, f"{name}: annotations[{number}].segmentation")
            )
    found = [each for each in pieces if each is not None]
    if not found:
        raise DataError(
            f"{name}: holds no instance; all of its {len(given)} annotations are crowds or empty "
            f"(nothing within {extent[0]} x {extent[1]} pixels)"
        )
    return extent, found


def _loaded(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def _extent(found: Any, given: Sequence[Mapping[str, Any]], name: str) -> tuple[int, int]:
    """Height and width of the picture, from where COCO, SA-1B or a run-length code says it."""
    image: Any = found.get("image") if isinstance(found, Mapping) else None
    images = (found.get("images") if isinstance(found, Mapping) else None) or []
    if not isinstance(images, list):
        raise DataError(f"{name}: its images are a {type(images).__name__}; wanted is a list of one picture")
    if image is None and len(images) > 1:
        raise DataError(
            f"{name}: holds the annotations of {len(images)} pictures; one file a picture is wanted"
        )
    image = images[0] if image is None and images else image
    if isinstance(image, Mapping) and "height" in image and "width" in image:
        size: Any = [image["height"], image["width"]]
    else:
        codes = [each["segmentation"] for each in given if isinstance(each.get("segmentation"), Mapping)]
        size = codes[0].get("size") if codes else None
    if isinstance(size, (list, tuple)) and len(size) == 2:
        if all(isinstance(side, int) and 0 < side <= FAR for side in size):
            return size[0], size[1]
        raise DataError(
            f"{name}: a picture of {size[0]} x {size[1]} pixels; sides are integers of 1 to {FAR}"
        )
    raise DataError(
        f"{name}: does not say how large the picture is; add image: {{height: ..., width: ...}} beside annotations"
    )


def _piece(code: Any, extent: tuple[int, int], where: str) -> Piece | Outline | None:
    if isinstance(code, Mapping):
        return _from_runs(code, extent, where)
    if isinstance(code, Sequence) and not isinstance(code, str) and code:
        return outline([_ring(each, where) for each in code], extent)
    raise DataError(
        f"{where}: is {type(code).__name__}; wanted are polygons [[x, y, x, y, ...], ...] or run lengths"
    )


def _ring(numbers: Any, where: str) -> Float[np.ndarray, "_ 2"]:
    """A polygon from x and y in turn, or from pairs of them."""
    try:
        ring = np.asarray(numbers, dtype=np.float64).reshape(-1)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{where}: a polygon is no list of numbers ({error})") from error
    if len(ring) < 6 or len(ring) % 2:
        raise DataError(f"{where}: a polygon has {len(ring)} numbers; it needs x and y of 3 points or more")
    near = np.abs(ring) <= FAR
    if not near.all():
        raise DataError(f"{where}: a polygon holds {ring[~near][0]}; coordinates lie in -{FAR} to {FAR}")
    return rearrange(ring, "(n xy) -> n xy", xy=2)


def _from_runs(code: Mapping[str, Any], extent: tuple[int, int], where: str) -> Piece | None:
    """The instance of a run-length code, drawn in the columns that it covers alone."""
    counts = _counts(code.get("counts"), where)
    height, width = extent
    size = code.get("size", extent)
    if not isinstance(size, Iterable) or list(size) != [height, width]:
        raise DataError(f"{where}: has size {size} in a picture of {height} x {width}")
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise DataError(
            f"{where}: its counts add up to {sum(counts)} where {height} x {width} = {height * width} are pixels"
        )
    ends = np.cumsum(np.array(counts, dtype=np.int64))
    starts, stops = ends[:-1:2], ends[1::2]
    starts, stops = starts[stops > starts], stops[stops > starts]
    if not starts.size:
        return None
    left, right = int(starts[0]) // height, (int(stops[-1]) - 1) // height + 1
    steps = np.zeros((right - left) * height + 1, np.int8)
    steps[starts - left * height] += 1
    steps[stops - left * height] -= 1
    mask = steps[:-1].cumsum(dtype=np.int8).astype(bool)
    return tight(Piece(0, left, rearrange(mask, "(w h) -> h w", h=height)))


def _counts(given: Any, where: str) -> list[int]:
    if isinstance(given, bytes):
        given = given.decode("ascii", errors="replace")  # as pycocotools hands them out
    if isinstance(given, str):
        return _decompressed(given, where)
    if not isinstance(given, Sequence) or not all(isinstance(each, int) for each in given):
        raise DataError(f"{where}: its counts are no list of integers and no text")
    return list(given)


def _decompressed(text: str, where: str) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        digit = ord(letter) - 48
        if not 0 <= digit < 64:
            raise DataError(
                f"{where}: its counts hold '{letter}', which is no digit of a compressed run length"
            )
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise DataError(f"{where}: its counts end in the middle of a number")
    return counts
