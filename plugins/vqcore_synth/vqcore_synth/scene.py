"""The content of a synthetic scene, drawn from one seed: a room, balls, boxes, one person, a light and a camera.

World axes in metres: x right, y up, z towards the camera's side of the room. The floor is y = 0 and the camera stands
at z = 0. A scene has no resolution.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from vqcore_synth.figure import Bone, Figure, draw_figure

CLASSES = ("floor", "wall", "ceiling", "ball", "box", "person")
"""Names of the classes; the position of a name is the class id."""
FLOOR, WALL, CEILING, BALL, BOX, PERSON = range(len(CLASSES))

Pattern = Literal["plain", "checks", "stripes", "dots", "bricks", "marble", "clouds"]
PATTERNS: tuple[Pattern, ...] = ("plain", "checks", "stripes", "dots", "bricks", "marble", "clouds")
Vector = Float[np.ndarray, "3"]
Matrix = Float[np.ndarray, "3 3"]


@dataclass(frozen=True)
class Texture:
    """A solid texture: two colours (linear, 0..1) mixed by a pattern of `frame @ point`; `gloss` scales highlights."""

    pattern: Pattern
    first: Vector
    second: Vector
    frame: Matrix
    gloss: float = 0.0


@dataclass(frozen=True)
class Part:
    """One convex solid: a ball (`start`, `radius`), a limb (a ball drawn from `start` to `stop`) or a box.

    For a box, `start` is the centre, the rows of `turn` are the axes, and `half` has half of each side.
    """

    shape: Literal["ball", "limb", "box"]
    start: Vector
    texture: Texture
    radius: float = 0.0
    stop: Vector | None = None
    turn: Matrix | None = None
    half: Vector | None = None


@dataclass(frozen=True)
class Thing:
    """One instance: parts of one class within a bounding ball."""

    label: int
    parts: tuple[Part, ...]
    centre: Vector
    radius: float


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. The rows of `turn` are its axes (right, up, towards the viewer).

    `reach` is the tangent of half the angle of view along the shorter side of a picture.
    """

    place: Vector
    turn: Matrix
    reach: float


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture. `low` and `high` are corners of the room, `grain` is the noise of textures."""

    low: Vector
    high: Vector
    room: tuple[Texture, Texture, Texture]
    things: tuple[Thing, ...]
    figure: Figure
    light: Vector
    glow: Vector
    ambient: Vector
    camera: Camera
    grain: Float[np.ndarray, "16 16 16"]


def draw_scene(rng: np.random.Generator, objects: tuple[int, int]) -> Scene:
    """A scene with a person, and with balls and boxes: `objects` is their smallest and largest number.

    All joints of the person are inside the central square of the picture.
    """
    low = np.array([-rng.uniform(2.0, 4.0), 0.0, -rng.uniform(5.0, 8.5)])
    high = np.array([rng.uniform(2.0, 4.0), rng.uniform(2.4, 3.4), 1.0])
    place = np.array([rng.uniform(-0.8, 0.8), rng.uniform(0.9, 1.75), 0.0])
    spot = np.array([rng.uniform(-1.1, 1.1), 0.0, -rng.uniform(2.3, min(4.6, -low[2] - 0.8))])
    figure = draw_figure(rng, spot)
    camera = _camera(rng, place, figure)
    things = [_person(rng, figure), *_objects(rng, objects, low, high, camera, spot)]
    warmth = rng.uniform(-0.12, 0.12)
    return Scene(
        low=low,
        high=high,
        room=(_floor(rng), _wall(rng), _plain(rng, bright=(0.6, 0.9))),
        things=tuple(things),
        figure=figure,
        light=np.array(
            [
                rng.uniform(0.8 * low[0], 0.8 * high[0]),
                high[1] - 0.15,
                rng.uniform(min(-1.0, 0.6 * low[2]), 0.6),
            ]
        ),
        glow=rng.uniform(1.0, 1.8) * np.array([1 + warmth, 1.0, 1 - warmth]),
        ambient=rng.uniform(0.12, 0.35) * np.array([1 - warmth, 1.0, 1 + warmth]),
        camera=camera,
        grain=rng.random((16, 16, 16), dtype=np.float32),
    )


def turned(about: int, angle: float) -> Matrix:
    """The rotation about a world axis by an angle in radians, counter-clockwise seen from the axis's positive end."""
    sine, cosine = math.sin(angle), math.cos(angle)
    turn = np.eye(3)
    first, second = (about + 1) % 3, (about + 2) % 3
    turn[first, first] = turn[second, second] = cosine
    turn[second, first], turn[first, second] = sine, -sine
    return turn


def _camera(rng: np.random.Generator, place: Vector, figure: Figure) -> Camera:
    """A camera that looks near the person, with an angle of view that includes all joints of the person."""
    towards = figure.joints[11:13].mean(0) + rng.uniform(-0.5, 0.5, 3) - place
    yaw = math.atan2(-towards[0], -towards[2])
    pitch = math.atan2(towards[1], math.hypot(towards[0], towards[2]))
    turn = (turned(1, yaw) @ turned(0, pitch)).T
    seen = turn @ (figure.joints - place).T
    needed = float(np.abs(seen[:2] / -seen[2]).max())
    return Camera(place, turn, max(rng.uniform(0.4, 0.75), 1.06 * needed))


def _person(rng: np.random.Generator, figure: Figure) -> Thing:
    skin = _mix(rng, np.array([0.75, 0.5, 0.36]), np.array([0.2, 0.1, 0.06]))
    coat = {
        "skin": Texture("plain", skin, skin, 4 * np.eye(3), 0.1),
        "shirt": _cloth(rng),
        "trousers": _cloth(rng),
        "shoe": _plain(rng, bright=(0.05, 0.3)),
        "eye": Texture("plain", np.full(3, 0.02), np.full(3, 0.02), np.eye(3), 0.6),
    }
    parts = tuple(_limb(bone, coat[bone.wear]) for bone in figure.bones)
    ends = np.concatenate([[bone.start, bone.stop] for bone in figure.bones])
    centre = (ends.min(0) + ends.max(0)) / 2
    far = max(
        float(np.linalg.norm(end - centre)) + bone.radius
        for bone in figure.bones
        for end in (bone.start, bone.stop)
    )
    return Thing(PERSON, parts, centre, far)


def _limb(bone: Bone, texture: Texture) -> Part:
    ball = bool(np.array_equal(bone.start, bone.stop))
    return Part("ball" if ball else "limb", bone.start, texture, bone.radius, None if ball else bone.stop)


def _objects(
    rng: np.random.Generator,
    number: tuple[int, int],
    low: Vector,
    high: Vector,
    camera: Camera,
    spot: Vector,
) -> list[Thing]:
    """Balls and boxes in the camera's view: on the floor, on top of a box, or floating in the air."""
    things: list[Thing] = []
    taken = [(spot, 0.55)]
    wanted = int(rng.integers(number[0], number[1] + 1))
    for _ in range(8 * wanted):
        if len(things) == wanted:
            break
        half = rng.uniform(0.1, 0.5, 3) * rng.uniform(0.5, 1.0)
        is_ball = rng.random() < 0.5
        reach = float(half[0]) if is_ball else float(np.hypot(half[0], half[2]))
        distance = rng.uniform(1.6, -low[2] - reach - 0.1)
        across = rng.uniform(-0.95, 0.95) * camera.reach * distance
        ahead = camera.turn.T @ np.array([across, 0.0, -distance])
        place = camera.place + ahead
        inside = low[0] + reach < place[0] < high[0] - reach and low[2] + reach < place[2] < -1.0 - reach
        apart = all(np.hypot(*(place - other)[[0, 2]]) > reach + room for other, room in taken)
        if not (inside and apart):
            continue
        floats, yaw, tilt = rng.random() < 0.15, rng.uniform(0, 2 * math.pi), rng.uniform(-0.6, 0.6)
        height = float(half[0] if is_ball else half[1])
        turn = turned(1, yaw) @ turned(0, tilt) if floats else turned(1, yaw)
        place[1] = rng.uniform(1.0, high[1] - 0.8) if floats else height
        taken.append((place, reach))
        if is_ball:
            things.append(_ball(rng, place, float(half[0])))
            continue
        things.append(_box(rng, place, half, turn.T))
        rest = float(min(half[0], half[2])) * rng.uniform(0.5, 0.95)
        if not floats and len(things) < wanted and rng.random() < 0.4:
            above = np.array([place[0], 2 * half[1] + rest, place[2]])
            things.append(_ball(rng, above, rest))
    return things


def _ball(rng: np.random.Generator, centre: Vector, radius: float) -> Thing:
    texture = _any_texture(rng, radius)
    return Thing(BALL, (Part("ball", centre, texture, radius),), centre, radius)


def _box(rng: np.random.Generator, centre: Vector, half: Vector, turn: Matrix) -> Thing:
    texture = _any_texture(rng, float(half.max()))
    part = Part("box", centre, texture, turn=turn, half=half)
    return Thing(BOX, (part,), centre, float(np.linalg.norm(half)))


def _any_texture(rng: np.random.Generator, size: float) -> Texture:
    pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
    turn = turned(int(rng.integers(3)), rng.uniform(0, math.pi))
    frame = rng.uniform(2.0, 5.0) / size * (np.eye(3) if pattern in ("checks", "bricks") else turn)
    first, second = _colour(rng), _colour(rng)
    return Texture(pattern, first, second, frame, float(rng.choice([0.0, 0.25, 0.7])))


def _cloth(rng: np.random.Generator) -> Texture:
    pattern: Pattern = ("plain", "stripes", "checks", "clouds")[int(rng.integers(4))]
    return Texture(pattern, _colour(rng), _colour(rng), rng.uniform(10, 25) * np.eye(3))


def _floor(rng: np.random.Generator) -> Texture:
    pattern: Pattern = ("checks", "bricks", "marble", "clouds", "stripes")[int(rng.integers(5))]
    # Rows of bricks and stripes lie in the plane of the floor.
    lying = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, 1e-6, 0]])
    first = _colour(rng, bright=(0.15, 0.6), vivid=0.5)
    second = _mix(rng, first, _colour(rng, bright=(0.15, 0.7), vivid=0.5))
    return Texture(
        pattern, first, second, rng.uniform(0.8, 2.5) * lying @ turned(1, rng.uniform(0, 1.5)), 0.1
    )


def _wall(rng: np.random.Generator) -> Texture:
    pattern: Pattern = ("plain", "stripes", "bricks", "dots", "clouds")[int(rng.integers(5))]
    standing = np.array(
        [[1.0, 0, 1.0], [0, 1.0, 0], [0, 0, 0]]
    )  # the same pattern on walls of both directions
    first = _colour(rng, bright=(0.3, 0.8), vivid=0.5)
    return Texture(pattern, first, _mix(rng, first, _colour(rng)), rng.uniform(2.0, 5.0) * standing)


def _plain(rng: np.random.Generator, bright: tuple[float, float]) -> Texture:
    colour = _colour(rng, bright=bright, vivid=0.2)
    return Texture("plain", colour, colour, np.eye(3))


def _colour(
    rng: np.random.Generator, bright: tuple[float, float] = (0.08, 0.85), vivid: float = 0.95
) -> Vector:
    """A colour of any hue: `bright` limits the largest channel, `vivid` the saturation."""
    hue = rng.random()
    wheel = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return rng.uniform(*bright) * (1 - vivid * math.sqrt(rng.random()) * (1 - wheel))


def _mix(rng: np.random.Generator, one: Vector, other: Vector) -> Vector:
    share = rng.random()
    return share * one + (1 - share) * other
