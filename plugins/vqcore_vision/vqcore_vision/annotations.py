"""Instances from JSON: the annotations of one picture in the layouts of COCO and SA-1B, polygons or run lengths.

A run-length code counts zeros and ones in turn, column by column. In compressed codes the counts are base-32 numbers in
ASCII: a character minus 48 has 5 bits of the number, and its bit 32 says that more characters follow; numbers are in
two's complement. From the fourth count on, a number is the difference to the count two places before.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float

from vqcore.errors import DataError, listed
from vqcore.reading import read_json
from vqcore_vision.pieces import Outline, Piece, outline, tight

FAR = 2**20
"""Largest side and coordinate that is accepted; Pillow draws polygons with integers of 32 bits."""


def read_annotations(source: Any, name: str) -> tuple[tuple[int, int], list[Piece | Outline]]:
    """Height and width of a picture, and its instances, from a `.json` file or from its parsed content.

    The content is `{image: {height, width}, annotations: [{segmentation}, ...]}`, or the same with `images`, a list of
    one picture, or only the annotations if they are run lengths. Crowds (`iscrowd`) are left out. Raises `DataError`.
    """
    found = _loaded(Path(source), name) if isinstance(source, (str, Path)) else source
    given = found.get("annotations") if isinstance(found, Mapping) else found
    if not isinstance(given, Sequence) or not all(isinstance(each, Mapping) for each in given):
        has = f"has {listed(found)}" if isinstance(found, Mapping) else f"is a {type(found).__name__}"
        raise DataError(
            f"{name}: {has}; expected is {{image: {{height, width}}, annotations: [{{segmentation}}, ...]}}"
        )
    if not given:
        raise DataError(f"{name}: has no instance; the list of annotations is empty")
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
            f"{name}: has no instance; all {len(given)} annotations are crowds or empty "
            f"(nothing within {extent[0]} x {extent[1]} pixels)"
        )
    return extent, found


def _loaded(path: Path, name: str) -> Any:
    return read_json(path, DataError, where=name)


def _extent(found: Any, given: Sequence[Mapping[str, Any]], name: str) -> tuple[int, int]:
    """Height and width of the picture, from the place where COCO, SA-1B or a run-length code has them."""
    image: Any = found.get("image") if isinstance(found, Mapping) else None
    images = (found.get("images") if isinstance(found, Mapping) else None) or []
    if not isinstance(images, list):
        raise DataError(f"{name}: images is a {type(images).__name__}; expected is a list of one picture")
    if image is None and len(images) > 1:
        raise DataError(
            f"{name}: has the annotations of {len(images)} pictures; write one file for each picture"
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
            f"{name}: the picture has {size[0]} x {size[1]} pixels; sides are integers from 1 to {FAR}"
        )
    raise DataError(
        f"{name}: the size of the picture is missing; add image: {{height: ..., width: ...}} beside annotations"
    )


def _piece(code: Any, extent: tuple[int, int], where: str) -> Piece | Outline | None:
    if isinstance(code, Mapping):
        return _from_runs(code, extent, where)
    if isinstance(code, Sequence) and not isinstance(code, str) and code:
        return outline([_ring(each, where) for each in code], extent)
    raise DataError(
        f"{where}: is {type(code).__name__}; expected are polygons [[x, y, x, y, ...], ...] or run lengths"
    )


def _ring(numbers: Any, where: str) -> Float[np.ndarray, "_ 2"]:
    """The points of a polygon, from x and y in turn or from pairs [x, y]."""
    try:
        ring = np.asarray(numbers, dtype=np.float64).reshape(-1)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{where}: a polygon is not a list of numbers ({error})") from error
    if len(ring) < 6 or len(ring) % 2:
        raise DataError(
            f"{where}: a polygon has {len(ring)} numbers; a polygon needs x and y of at least 3 points"
        )
    near = np.abs(ring) <= FAR
    if not near.all():
        raise DataError(
            f"{where}: a polygon has the coordinate {ring[~near][0]}; coordinates lie in -{FAR} to {FAR}"
        )
    return rearrange(ring, "(n xy) -> n xy", xy=2)


def _from_runs(code: Mapping[str, Any], extent: tuple[int, int], where: str) -> Piece | None:
    """The instance of a run-length code; only the columns of the instance are decoded."""
    counts = _counts(code.get("counts"), where)
    height, width = extent
    size = code.get("size", extent)
    if not isinstance(size, Iterable) or list(size) != [height, width]:
        raise DataError(f"{where}: has size {size}, but the picture has {height} x {width} pixels")
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise DataError(
            f"{where}: the counts add up to {sum(counts)}, but there are {height} x {width} = {height * width} pixels"
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
        given = given.decode("ascii", errors="replace")  # pycocotools returns bytes
    if isinstance(given, str):
        return _decompressed(given, where)
    if not isinstance(given, Sequence) or not all(isinstance(each, int) for each in given):
        raise DataError(f"{where}: counts is neither a list of integers nor text")
    return list(given)


def _decompressed(text: str, where: str) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        digit = ord(letter) - 48
        if not 0 <= digit < 64:
            raise DataError(f"{where}: counts has '{letter}', which is no digit of a compressed run length")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise DataError(f"{where}: counts ends in the middle of a number")
    return counts
