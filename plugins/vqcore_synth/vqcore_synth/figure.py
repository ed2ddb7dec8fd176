"""A person as bones: 17 joints in the order of COCO's keypoints, and the solids around the joints.

Body axes: right, up, forward. Lengths are fractions of the body's height.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

JOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)
"""Names of the joints by their row in a pose."""


@dataclass(frozen=True)
class Bone:
    """A solid from `start` to `stop` (a ball if both are equal), in metres; `wear` names the texture."""

    start: Float[np.ndarray, "3"]
    stop: Float[np.ndarray, "3"]
    radius: float
    wear: str


@dataclass(frozen=True)
class Figure:
    """Joints (world axes, metres) and the solids around the joints."""

    joints: Float[np.ndarray, "17 3"]
    bones: tuple[Bone, ...]


def draw_figure(rng: np.random.Generator, spot: Float[np.ndarray, "3"]) -> Figure:
    """A person of random height, direction and posture whose lower foot is on the floor at `spot`."""
    height, facing = rng.uniform(1.35, 1.9), rng.normal(0, 0.7)
    joints: dict[str, np.ndarray] = {}
    neck = _down(rng.normal(0, 0.07), rng.normal(0, 0.1)) * -0.29
    for side, sign in (("left", -1.0), ("right", 1.0)):
        joints[f"{side}_hip"] = np.array([0.06 * sign, 0, 0])
        joints[f"{side}_shoulder"] = neck + np.array([0.115 * sign, -0.01, 0])
        _arm(rng, joints, side, sign)
        _leg(rng, joints, side, sign)
    head = neck + np.array([0, 0.1, 0.01])
    _face(rng, joints, head)
    lowest = min(joints["left_ankle"][1], joints["right_ankle"][1]) - 0.035
    sine, cosine = math.sin(facing), math.cos(facing)
    # The body faces the camera, so its right side is on the left of the picture.
    turn = np.array([[-cosine, 0, sine], [0, 1, 0], [sine, 0, cosine]])

    def place(point: np.ndarray) -> np.ndarray:
        return spot + height * (turn @ (point - [0, lowest, 0]))

    bones = tuple(
        Bone(place(bone.start), place(bone.stop), height * bone.radius, bone.wear)
        for bone in _bones(joints, neck, head)
    )
    return Figure(np.stack([place(joints[name]) for name in JOINTS]), bones)


def _down(sideways: float, ahead: float) -> np.ndarray:
    """The downward direction, rotated sideways (to the right) and forward by angles."""
    return np.array(
        [math.sin(sideways), -math.cos(sideways) * math.cos(ahead), math.cos(sideways) * math.sin(ahead)]
    )


def _arm(rng: np.random.Generator, joints: dict[str, np.ndarray], side: str, sign: float) -> None:
    apart, ahead = abs(rng.normal(0, 0.7)) + 0.12, rng.normal(0.1, 0.6)
    upper = _down(sign * min(apart, 2.4), ahead)
    fore = _down(sign * min(apart + rng.uniform(-0.3, 1.2), 2.9), ahead + rng.uniform(0, 1.2))
    joints[f"{side}_elbow"] = joints[f"{side}_shoulder"] + 0.17 * upper
    joints[f"{side}_wrist"] = joints[f"{side}_elbow"] + 0.15 * fore


def _leg(rng: np.random.Generator, joints: dict[str, np.ndarray], side: str, sign: float) -> None:
    apart, ahead = sign * (0.05 + abs(rng.normal(0, 0.12))), rng.normal(0.05, 0.3)
    joints[f"{side}_knee"] = joints[f"{side}_hip"] + 0.245 * _down(apart, ahead)
    bend = abs(rng.normal(0, 0.35))
    joints[f"{side}_ankle"] = joints[f"{side}_knee"] + 0.235 * _down(apart * 0.6, ahead - bend)


def _face(rng: np.random.Generator, joints: dict[str, np.ndarray], head: np.ndarray) -> None:
    """Points on the head, which is a ball of radius 0.068 in a random direction."""
    look = rng.normal(0, 0.35)
    for name, aside, up in (
        ("nose", 0.0, -0.1),
        ("left_eye", -0.42, 0.25),
        ("right_eye", 0.42, 0.25),
        ("left_ear", -1.5, 0.1),
        ("right_ear", 1.5, 0.1),
    ):
        angle = aside + look
        way = np.array([math.sin(angle) * math.cos(up), math.sin(up), math.cos(angle) * math.cos(up)])
        joints[name] = head + 0.068 * way


def _bones(joints: dict[str, np.ndarray], neck: np.ndarray, head: np.ndarray) -> list[Bone]:
    waist = (joints["left_hip"] + joints["right_hip"]) / 2
    bones = [
        Bone(head, head, 0.068, "skin"),
        Bone(joints["nose"], joints["nose"], 0.012, "skin"),
        Bone(joints["left_eye"], joints["left_eye"], 0.012, "eye"),
        Bone(joints["right_eye"], joints["right_eye"], 0.012, "eye"),
        Bone(neck, head, 0.03, "skin"),
        Bone(joints["left_shoulder"], joints["right_shoulder"], 0.042, "shirt"),
        Bone(waist * 0.85 + neck * 0.15, neck * 0.85 + waist * 0.15, 0.078, "shirt"),
        Bone(joints["left_hip"], joints["right_hip"], 0.06, "trousers"),
    ]
    for side in ("left", "right"):
        shoulder, elbow, wrist, hip, knee, ankle = (
            joints[f"{side}_{name}"] for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        )
        toe = ankle + np.array([0, -0.012, 0.075])
        bones += [
            Bone(joints[f"{side}_ear"], joints[f"{side}_ear"], 0.016, "skin"),
            Bone(shoulder, elbow, 0.033, "shirt"),
            Bone(elbow, wrist, 0.025, "skin"),
            Bone(wrist + 0.2 * (wrist - elbow), wrist + 0.2 * (wrist - elbow), 0.034, "skin"),
            Bone(hip, knee, 0.05, "trousers"),
            Bone(knee, ankle, 0.036, "trousers"),
            Bone(ankle, toe, 0.03, "shoe"),
        ]
    return bones
