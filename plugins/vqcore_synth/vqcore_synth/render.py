"""A ray caster: from a scene to a picture, with one ray through the centre of each pixel.

Directions have length 1 along the camera's axis, so that the ray parameter of a hit is its depth. Vectors are
`(3, n)`. Geometry is computed in double precision.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8

from vqcore_synth.scene import CEILING, FLOOR, WALL, Camera, Part, Scene

JUMP_M = 0.06
"""A larger difference in depth between neighbouring parts of one thing is an edge."""
CONTRAST = 0.18
"""A pixel that differs more from a neighbour, on a scale of 0..1, gets the mean colour of three rays."""
FEW = 1000
"""Up to this number of rays, a limb is tested against all rays without a bounding ball."""

Vectors = Float[np.ndarray, "3 n"]
Numbers = Float[np.ndarray, " n"]
Point = Float[np.ndarray, "3"]


@dataclass(frozen=True)
class Hits:
    """The first hit of each ray. `part` numbers all parts of all things, `thing` starts at 1; the room is -1 and 0."""

    depth: Numbers
    normal: Vectors
    point: Vectors
    part: Int[np.ndarray, " n"]
    thing: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]


def pixel_rays(camera: Camera, size: tuple[int, int]) -> Vectors:
    """Directions (world axes) through the centres of the pixels of a picture, row by row."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return rays(camera, size, np.stack([columns.ravel(), rows.ravel()]))


def rays(camera: Camera, size: tuple[int, int], places: Float[np.ndarray, "2 n"]) -> Vectors:
    """Directions through places in pixels, x then y; (0, 0) is the upper left corner of the picture."""
    unit = 2 * camera.reach / min(size)
    x, y = (places[0] - size[1] / 2) * unit, (size[0] / 2 - places[1]) * unit
    return camera.turn.T @ np.stack([x, y, -np.ones_like(x)])


def project(
    camera: Camera, size: tuple[int, int], points: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, "n 2"]:
    """The places of points of the world in a picture, in pixels, x then y."""
    seen = camera.turn @ (points - camera.place).T
    unit = 2 * camera.reach / min(size)
    return np.stack([size[1] / 2 - seen[0] / seen[2] / unit, size[0] / 2 + seen[1] / seen[2] / unit], 1)


def cast(scene: Scene, direction: Vectors) -> Hits:
    """The first hits of rays from the camera; every ray hits something."""
    origin = scene.camera.place
    depth, axis = _leave_room(scene, origin, direction)
    part = np.full(direction.shape[1], -1)
    _nearest(scene, origin, direction, depth, part)
    point = origin[:, None] + depth * direction
    normal, thing, label = np.empty_like(point), np.zeros_like(part), np.empty_like(part)
    parts = numbered(scene)
    for number, rows in _groups(part):
        if number < 0:
            normal[:, rows], label[rows] = _room_surface(axis[rows], direction[:, rows])
        else:
            _, solid, owner = parts[number]
            normal[:, rows] = _normal(solid, point[:, rows])
            thing[rows], label[rows] = owner + 1, scene.things[owner].label
    return Hits(depth, normal, point, part, thing, label)


def _groups(numbers: Int[np.ndarray, " n"]) -> Iterator[tuple[int, Int[np.ndarray, " m"]]]:
    """Each number that occurs, and its places."""
    order = np.argsort(numbers.astype(np.int16), kind="stable")
    found, first = np.unique(numbers[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, first[1:]))


def numbered(scene: Scene) -> list[tuple[int, Part, int]]:
    """All parts in order: number, part, index of the thing that the part belongs to."""
    pairs = [(part, owner) for owner, thing in enumerate(scene.things) for part in thing.parts]
    return [(number, part, owner) for number, (part, owner) in enumerate(pairs)]


def colours(scene: Scene, size: tuple[int, int], hits: Hits) -> UInt8[np.ndarray, "h w 3"]:
    """The picture: textures, one light with shadows, highlights. Pixels of high contrast are means of three rays."""
    picture = rearrange(_shade(scene, hits), "c (h w) -> h w c", h=size[0])
    row, column = np.nonzero(_contrasts(picture))
    if len(row):
        centre = np.stack([column, row]) + 0.5
        beside = [centre + np.array([[step], [-step]]) for step in (-1 / 3, 1 / 3)]
        finer = _shade(scene, cast(scene, rays(scene.camera, size, np.concatenate(beside, 1))))
        total = picture[row, column] + rearrange(finer, "c (k n) -> k n c", k=2).sum(0)
        picture[row, column] = total / 3
    return np.rint(255 * picture).astype(np.uint8)


def edges(hits: Hits, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """True at the nearer of two neighbours of different class or instance, or with a jump in depth between parts."""
    height = size[0]
    depth, part, thing, label = (
        rearrange(each, "(h w) -> h w", h=height) for each in (hits.depth, hits.part, hits.thing, hits.label)
    )
    found = np.zeros(size, dtype=bool)
    for one, other in _neighbours():
        jump = (part[one] != part[other]) & (np.abs(depth[one] - depth[other]) > JUMP_M)
        differ = (thing[one] != thing[other]) | (label[one] != label[other]) | jump
        found[one] |= differ & (depth[one] <= depth[other])
        found[other] |= differ & (depth[other] < depth[one])
    return found


def is_visible(scene: Scene, size: tuple[int, int]) -> Bool[np.ndarray, " j"]:
    """Which joints the camera sees: the first hit of the ray to a joint is close to it, on a part around the joint."""
    joints = scene.figure.joints
    hits = cast(scene, rays(scene.camera, size, project(scene.camera, size, joints).T))
    solids = {number: part for number, part, _ in numbered(scene)}
    seen = np.zeros(len(joints), dtype=bool)
    for index, joint in enumerate(joints):
        solid = solids.get(int(hits.part[index]))
        if solid is None or solid.shape == "box":
            continue
        around = float(np.linalg.norm(joint - _axis_point(solid, joint[:, None])[:, 0]))
        far = float(np.linalg.norm(joint - hits.point[:, index]))
        seen[index] = around < 1.001 * solid.radius and far < 1.5 * solid.radius
    return seen


def _neighbours() -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    every, first, second = slice(None), slice(None, -1), slice(1, None)
    return [((first, every), (second, every)), ((every, first), (every, second))]


def _contrasts(picture: Float[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    sharp = np.zeros(picture.shape[:2], dtype=bool)
    for one, other in _neighbours():
        high = np.abs(picture[one] - picture[other]).max(2) > CONTRAST
        sharp[one] |= high
        sharp[other] |= high
    return sharp


# Intersections. All rays of one call start at one place, the camera or the lamp, so most products are matrix products
# or constants. `square` is the squared length of the rays.


def _nearest(
    scene: Scene, origin: Point, direction: Vectors, depth: Numbers, part: Int[np.ndarray, " n"]
) -> None:
    """Write the nearest hits below `depth` into `depth` and `part`."""
    number, square = 0, _dot(direction, direction)
    for thing in scene.things:
        rows = _towards(thing.centre, thing.radius, origin, direction, square)
        way, length = direction[:, rows], square[rows]
        for solid in thing.parts:
            _nearer(solid, number, rows, (origin, way, length), depth, part)
            number += 1


def _nearer(
    solid: Part,
    number: int,
    rows: Int[np.ndarray, " m"],
    beam: tuple[Point, Float[np.ndarray, "3 m"], Float[np.ndarray, " m"]],
    depth: Numbers,
    part: Int[np.ndarray, " n"],
) -> None:
    origin, way, length = beam
    if solid.stop is not None and len(rows) > FEW:
        middle = (solid.start + solid.stop) / 2
        reach = math.dist(solid.stop, middle) + solid.radius
        some = _towards(middle, reach, origin, way, length)
        rows, way, length = rows[some], way[:, some], length[some]
    if len(rows):
        found = _ENTER[solid.shape](solid, origin, way, length)
        closer = found < depth[rows]
        depth[rows[closer]], part[rows[closer]] = found[closer], number


def _towards(
    centre: Point, radius: float, origin: Point, direction: Vectors, square: Numbers
) -> Int[np.ndarray, " m"]:
    """The rays that hit a ball in front of them."""
    offset = origin - centre
    along, gap = offset @ direction, float(offset @ offset) - radius**2
    meets = along * along >= square * gap
    return np.flatnonzero(meets & (along < 0) if gap > 0 else meets)


def _enter_ball(part: Part, origin: Point, direction: Vectors, square: Numbers) -> Numbers:
    return _sphere(part.start, part.radius, origin, direction, square)


def _sphere(centre: Point, radius: float, origin: Point, direction: Vectors, square: Numbers) -> Numbers:
    offset = origin - centre
    along = offset @ direction
    return _first_root(square, along, float(offset @ offset) - radius**2)


def _enter_limb(part: Part, origin: Point, direction: Vectors, square: Numbers) -> Numbers:
    """The nearest hit of two balls and of the side of the cylinder between them."""
    assert part.stop is not None
    axis = part.stop - part.start
    length = math.dist(part.stop, part.start)
    axis, offset = axis / length, origin - part.start
    climb, height = axis @ direction, float(axis @ offset)
    gap = float(offset @ offset) - height**2 - part.radius**2
    side = _first_root(np.maximum(square - climb**2, 1e-12), offset @ direction - height * climb, gap)
    reached = height + np.where(np.isfinite(side), side, 0) * climb
    side = np.where((reached >= 0) & (reached <= length), side, np.inf)
    ends = [_sphere(end, part.radius, origin, direction, square) for end in (part.start, part.stop)]
    return np.minimum(side, np.minimum(*ends))


def _enter_box(part: Part, origin: Point, direction: Vectors, square: Numbers) -> Numbers:
    """The last entry into one of three pairs of planes, if it comes before the first exit from one of them."""
    assert part.turn is not None and part.half is not None
    way = _off_zero(part.turn @ direction)
    middle = -(part.turn @ (origin - part.start))[:, None] / way
    reach = part.half[:, None] / np.abs(way)
    first, last = (middle - reach).max(0), (middle + reach).min(0)
    return _ahead(first, first <= last)


_ENTER: dict[str, Callable[[Part, np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "ball": _enter_ball,
    "limb": _enter_limb,
    "box": _enter_box,
}


def _first_root(square: Numbers, half: Numbers, constant: float) -> Numbers:
    """The smaller root of square t^2 + 2 half t + constant, or infinity if there is no positive root."""
    below = half**2 - square * constant
    return _ahead((-half - np.sqrt(np.maximum(below, 0))) / square, below >= 0)


def _ahead(found: Numbers, is_hit: Bool[np.ndarray, " n"]) -> Numbers:
    return np.where(is_hit & (found > 1e-6), found, np.inf)


def _leave_room(scene: Scene, origin: Point, direction: Vectors) -> tuple[Numbers, Int[np.ndarray, " n"]]:
    """The parameter at which rays leave the room, and the axis of the surface that they cross."""
    way = _off_zero(direction)
    wall = np.where(way > 0, (scene.high - origin)[:, None], (scene.low - origin)[:, None])
    x, y, z = wall / way
    axis = np.where(y < np.minimum(x, z), 1, np.where(x < z, 0, 2))
    return np.minimum(np.minimum(x, y), z), axis


def _off_zero(vectors: Vectors) -> Vectors:
    return np.where(np.abs(vectors) < 1e-12, 1e-12, vectors)


def _room_surface(axis: Int[np.ndarray, " n"], direction: Vectors) -> tuple[Vectors, Int[np.ndarray, " n"]]:
    """Normal and class of the surface at which rays of these directions leave the room."""
    rays_ = np.arange(len(axis))
    inward = -np.sign(direction[axis, rays_])
    normal = np.zeros_like(direction)
    normal[axis, rays_] = inward
    return normal, np.where(axis == 1, np.where(inward > 0, FLOOR, CEILING), WALL)


def _normal(part: Part, point: Vectors) -> Vectors:
    if part.shape != "box":
        return (point - _axis_point(part, point)) / part.radius
    assert part.turn is not None and part.half is not None
    inside = (part.turn @ (point - part.start[:, None])) / part.half[:, None]
    face = np.abs(inside).argmax(0)
    return part.turn.T[:, face] * np.sign(inside[face, np.arange(len(face))])


def _axis_point(part: Part, point: Vectors) -> Vectors:
    """The nearest point on the axis of a ball or limb."""
    if part.stop is None:
        return np.broadcast_to(part.start[:, None], point.shape)
    axis = part.stop - part.start
    share = np.clip(axis @ (point - part.start[:, None]) / float(axis @ axis), 0, 1)
    return part.start[:, None] + axis[:, None] * share


def _dot(one: Vectors, other: Vectors) -> Numbers:
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2]


# Colours


def _shade(scene: Scene, hits: Hits) -> Vectors:
    """Displayed colours, 0..1: ambient light, the lamp where it is not blocked, a highlight; then gamma 2.

    Colours are computed in single precision, unlike geometry.
    """
    to_light = scene.light[:, None] - hits.point
    far = np.sqrt(_dot(to_light, to_light))
    facing = np.maximum(_dot(hits.normal, to_light) / far, 0)
    facing[_in_shadow(scene, hits, to_light, facing)] = 0
    albedo, gloss = _surface(scene, hits)
    lamp = _column(scene.glow) * (facing / (0.35 + 0.09 * far**2)).astype(np.float32)
    sky = _column(scene.ambient) * (0.75 + 0.25 * hits.normal[1]).astype(np.float32)
    light = albedo * (lamp + sky)
    shiny = np.flatnonzero((gloss > 0) & (facing > 0))
    light[:, shiny] += _column(scene.glow) * gloss[shiny] * _highlight(scene, hits, shiny)
    return np.sqrt(1 - np.exp(-1.5 * light))


def _column(vector: Point) -> Vectors:
    return vector[:, None].astype(np.float32)


def _highlight(scene: Scene, hits: Hits, rows: Int[np.ndarray, " m"]) -> Numbers:
    """Blinn's highlight: the 32nd power of the cosine between the normal and the direction halfway from lamp to eye."""
    to_light, to_eye = (
        _unit(place[:, None] - hits.point[:, rows]) for place in (scene.light, scene.camera.place)
    )
    shine = np.maximum(_dot(hits.normal[:, rows], _unit(to_light + to_eye)), 0)
    for _ in range(5):
        shine *= shine
    return shine.astype(np.float32)


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.sqrt(_dot(vectors, vectors))


def _in_shadow(scene: Scene, hits: Hits, to_light: Vectors, facing: Numbers) -> Int[np.ndarray, " m"]:
    """The lit points whose ray from the lamp hits something else first."""
    lit = np.flatnonzero(facing > 0)
    reached = np.full(len(lit), 1 - 1e-4)
    _nearest(scene, scene.light, -to_light[:, lit], reached, np.full(len(lit), -1))
    return lit[reached < 1 - 1e-4]


def _surface(scene: Scene, hits: Hits) -> tuple[Vectors, Numbers]:
    """Colour and gloss of the material at each hit."""
    albedo, where = np.empty((2, *hits.point.shape), dtype=np.float32)
    gloss = np.empty(hits.depth.shape, dtype=np.float32)
    parts = numbered(scene)
    materials = np.where(hits.part < 0, hits.label - len(scene.room), hits.part)
    for material, rows in _groups(materials):
        solid = parts[material][1] if material >= 0 else None
        texture = solid.texture if solid else scene.room[material]
        anchor = solid.start if solid else np.zeros(3)
        place = (texture.frame @ (hits.point[:, rows] - anchor[:, None])).astype(np.float32)
        share = _PATTERNS[texture.pattern](place, scene.grain)
        albedo[:, rows] = _column(texture.first) + _column(texture.second - texture.first) * share
        gloss[rows], where[:, rows] = texture.gloss, place
    return albedo * (0.88 + 0.24 * _noise(4.3 * where, scene.grain)), gloss


def _noise(place: Vectors, grain: np.ndarray) -> Numbers:
    """Value noise, 0..1: random numbers on a lattice, smoothly interpolated."""
    cell = np.floor(place)
    x, y, z = (t * t * (3 - 2 * t) for t in place - cell)
    i, j, k = cell.astype(np.int32) & 15
    i, i1, j, j1, k, k1 = 256 * i, 256 * ((i + 1) & 15), 16 * j, 16 * ((j + 1) & 15), k, (k + 1) & 15
    flat = grain.ravel()
    low, high = (
        _blend(
            _blend(flat.take(i + j + m), flat.take(i1 + j + m), x),
            _blend(flat.take(i + j1 + m), flat.take(i1 + j1 + m), x),
            y,
        )
        for m in (k, k1)
    )
    return _blend(low, high, z)


def _blend(one: Numbers, other: Numbers, share: Numbers) -> Numbers:
    return one + (other - one) * share


def _checks(place: Vectors, grain: np.ndarray) -> Numbers:
    return np.floor(place + 1e-6).sum(0) % 2


def _bricks(place: Vectors, grain: np.ndarray) -> Numbers:
    row = np.floor(place[1] * 2)
    along = place[0] + 0.5 * (row % 2)
    stone = np.floor(along)
    mortar = (place[1] * 2 - row < 0.12) | (along - stone < 0.06)
    tint = 0.45 * grain[row.astype(np.int32) & 15, stone.astype(np.int32) & 15, 0]
    return np.where(mortar, 1.0, tint)


def _dots(place: Vectors, grain: np.ndarray) -> Numbers:
    offset = place - np.rint(place)
    return (_dot(offset, offset) < 0.09).astype(np.float32)


def _marble(place: Vectors, grain: np.ndarray) -> Numbers:
    return 0.5 + 0.5 * np.sin(3.0 * place[0] + 9.0 * _noise(1.1 * place, grain))


_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda place, grain: np.zeros(1),
    "checks": _checks,
    "stripes": lambda place, grain: np.floor(2 * place[0]) % 2,
    "dots": _dots,
    "bricks": _bricks,
    "marble": _marble,
    "clouds": lambda place, grain: _noise(0.9 * place, grain),
}
