"""One body as a vector: 2-D or 3-D joints, or one rotation per joint (SMPL's body pose), from .npy and .json.

A sample is `(joints * width, 1)`, joint by joint. The width is 2 or 3 for positions, 9 for rotation matrices, 3 for
axis-angle vectors and 1 for angles. 4M's human poses (arXiv 2406.09406) are the 23 rotation matrices of SMPL (Loper et
al. 2015) in the files of 4D-Humans:
`{joints: 23, value: rotation-matrix, key: pred_smpl_params.body_pose, missing: zeros}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from vqcore import config
from vqcore.config import above_zero, at_least
from vqcore.data.npy import read_array
from vqcore.errors import ConfigError, DataError, SettingError, did_you_mean, listed
from vqcore.protocols import DataSpec, View
from vqcore.reading import read_json
from vqcore_vision.metrics import rotation_matrices
from vqcore_vision.vector import barcode

Value = Literal["position", "rotation-matrix", "axis-angle", "angle"]
_WIDTH = {"rotation-matrix": 9, "axis-angle": 3, "angle": 1}
# Mirrored in the plane x = 0, a rotation R becomes M R M with M = diag(-1, 1, 1): the signs are those of M_ii M_jj.
_MIRROR = {"rotation-matrix": (1, -1, -1, -1, 1, 1, -1, 1, 1), "axis-angle": (1, -1, -1), "angle": (-1,)}
_PANEL = 128
_SIDES = ((0, 0, 0), (31, 119, 180), (214, 39, 40))
"""Colours of joints in the middle of the body, and of the first and the second joint of a flip pair."""


class Pose:
    """Joints of one body, or their rotations, as a vector. As an extra modality, 2-D joints follow the crop."""

    suffixes = (".npy", ".json")

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of poses."""

        training_only: ClassVar[tuple[str, ...]] = ("hflip", "flip_pairs", "bones", "y_up")

        joints: int
        """Number of joints of a body."""
        value: Value = "position"
        """Data of a joint: a position, a rotation matrix, a rotation vector (axis times angle) or one angle."""
        dims: Literal[2, 3] = 2
        """Number of coordinates of a position."""
        key: str | None = None
        """Place of the pose in a .json file: names joined by dots, e.g. pred_smpl_params.body_pose."""
        missing: Literal["refuse", "zeros"] = "refuse"
        """A file without a person is refused, or is a pose of zeros, as in 4M."""
        root: int | None = None
        """Positions become relative to this joint, whose absolute position is lost. Null: positions stay absolute."""
        center: tuple[float, ...] | None = None
        """Subtracted from positions, in units of the files, e.g. half of the picture's sides; centre of mirrors."""
        scale: float = 1.0
        """Units of the files that become 1, e.g. half of the picture's height; poses should fill -1..1."""
        frame: Literal["pixels", "shares", "body"] | None = None
        """As an extra modality: pixels, or shares of the picture's sides, follow the crop; body coordinates do not.
        Null: pixels for 2-D positions, else body."""
        hflip: float = 0.0
        """Share of the training samples that are mirrored: x changes its sign, and rotations change accordingly."""
        flip_pairs: tuple[tuple[int, int], ...] = ()
        """Pairs of left and right joints, which a mirror exchanges, e.g. [[1, 2], [4, 5]]."""
        bones: tuple[tuple[int, int], ...] = ()
        """Pairs of joints that pictures connect by a line."""
        y_up: bool = False
        """In pictures, larger y is higher. False, as in pixels: larger y is lower."""

        def __post_init__(self) -> None:
            at_least(self, joints=1)
            for name in ("flip_pairs", "bones"):
                for pair in getattr(self, name):
                    if not (min(pair) >= 0 and max(pair) < self.joints and pair[0] != pair[1]):
                        raise SettingError(
                            (name,),
                            f"{name} has {list(pair)}: a pair is two different joints of 0..{self.joints - 1}",
                        )
            paired = [joint for pair in self.flip_pairs for joint in pair]
            twice = [joint for joint in paired if paired.count(joint) > 1]
            if twice:
                raise SettingError(("flip_pairs",), f"flip_pairs names joint {twice[0]} more than once")
            if self.root is not None and not 0 <= self.root < self.joints:
                raise SettingError(
                    "root", f"{self.root} is not one of the {self.joints} joints (0..{self.joints - 1})"
                )
            if self.center is not None and len(self.center) != self.dims:
                raise SettingError(
                    "center", f"{list(self.center)} has {len(self.center)} numbers for dims={self.dims}"
                )
            if self.frame in ("pixels", "shares") and (self.value, self.dims) != ("position", 2):
                raise SettingError(
                    "frame",
                    f"{self.frame} with value={self.value}, dims={self.dims}: only positions with dims=2 are "
                    "places in a picture",
                )
            above_zero(self, "scale")
            if not 0 <= self.hflip <= 1:
                raise SettingError("hflip", f"{self.hflip} must lie in 0..1")
            if self.value != "position" and (self.root, self.center, self.scale) != (None, None, 1.0):
                raise SettingError(
                    ("value", "root", "center", "scale"),
                    f"root, center and scale are for positions, not for value={self.value}",
                )

    def __init__(self, cfg: Config, *, size: int | tuple[int, ...] | None):
        if isinstance(size, int) and size != 1:
            raise ValueError(f"a pose has size 1, not {size}: remove data.input_size")
        self.cfg = cfg
        self.width = cfg.dims if cfg.value == "position" else _WIDTH[cfg.value]
        self.spec = DataSpec(channels=cfg.joints * self.width, size=(1,), range=None, loss="smooth_l1")
        self.metrics = ("vision/joint-error",) if cfg.value == "position" else ("vision/rotation-error",)
        self.center = np.zeros(self.width, np.float32)
        if cfg.center is not None:
            self.center = np.array(cfg.center, np.float32)
        is_flat = (cfg.value, cfg.dims) == ("position", 2)
        self.frame = cfg.frame or ("pixels" if is_flat else "body")
        self.swapped = np.arange(cfg.joints)
        for left, right in cfg.flip_pairs:
            self.swapped[[left, right]] = right, left

    def read(self, source: Any, at_least: tuple[int, ...] | None = None) -> np.ndarray:
        """A file, an array or lists of numbers as `(joints, width)` float32; the first of several people.

        Takes the shape `(joints, width)`, `(joints, 3, 3)` for matrices, or all numbers in one row, with or without a
        first axis of people. Raises `DataError` for another number of joints and for values that are not finite.
        """
        is_file = isinstance(source, (str, Path))
        name = str(source) if is_file else "pose in memory"
        found = _read_file(Path(source), self.cfg.key, name) if is_file else source
        try:
            array = np.asarray(found, dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise DataError(f"{name}: is not an array of numbers ({error})") from error
        if not array.size:
            if self.cfg.missing == "refuse":
                raise DataError(
                    f"{name}: has no person; data.modality.missing=zeros turns such files into poses of zeros"
                )
            return np.zeros((self.cfg.joints, self.width), np.float32)
        pose = self._first(array, name)
        if not np.isfinite(pose).all():
            joint, axis = np.argwhere(~np.isfinite(pose))[0].tolist()
            raise DataError(f"{name}: number {axis} of joint {joint} is {pose[joint, axis]}")
        return pose

    def extent(self, raw: np.ndarray) -> tuple[int, ...]:
        """One position."""
        return (1,)

    def view(self, extent: tuple[int, ...], size: tuple[int, ...], rng: np.random.Generator | None) -> View:
        """The whole pose, in training sometimes mirrored."""
        flip = rng is not None and bool(rng.random() < self.cfg.hflip)
        return View(start=(0.0,), stop=(1.0,), size=(1,), flip=flip)

    def tensor(self, raw: np.ndarray, view: View) -> Float[Tensor, "c 1"]:
        """The pose, mirrored if the view is mirrored.

        As an extra modality beside a picture, positions in the picture become positions in the crop: pixels at the
        view's size, or shares. Poses with other data follow only the mirror. A pose of zeros (`missing`) stays zero.
        Raises `ConfigError` when positions are pixels of a picture of unknown size.
        """
        follows = len(view.size) == 2 and self.frame != "body"
        is_nobody = self.cfg.missing == "zeros" and not raw.any()
        pose = raw if is_nobody else self._moved(raw, view, follows)
        if self.cfg.value == "position":
            origin = self.center if self.cfg.root is None else pose[self.cfg.root]
            pose = (pose - origin) / np.float32(self.cfg.scale)
        return torch.from_numpy(rearrange(pose, "j w -> (j w) 1").copy())

    def values(self, x: Float[Tensor, "b c 1"]) -> Float[Tensor, "b w j"]:
        """A batch in the units of the files; channels are the numbers of a joint, the axis is the joints."""
        parts = rearrange(x, "b (j w) 1 -> b w j", w=self.width)
        if self.cfg.value != "position":
            return parts
        center = rearrange(torch.from_numpy(self.center), "w -> w 1").to(x.device)
        return parts * self.cfg.scale + (center if self.cfg.root is None else 0)

    def show(self, x: Float[Tensor, "*b c 1"]) -> np.ndarray:
        """One pose in the units of the files: `(joints, width)`, or `(joints, 3, 3)` for matrices.

        Decoded matrices are not exactly rotations; `vqcore_vision.metrics.rotation_matrices` returns the nearest
        rotations.
        """
        pose = self._single(x).numpy()
        return (
            rearrange(pose, "j (row col) -> j row col", row=3)
            if self.cfg.value == "rotation-matrix"
            else pose
        )

    def picture(self, x: Float[Tensor, "*b c 1"]) -> Image.Image:
        """A skeleton from the front, and in three dimensions also from the side; each side of the body has a colour.

        The frame spans -1.1 to 1.1 of the tensor's values, and more if a joint lies outside. The 23 rotations of SMPL
        turn the joints of a stick figure; other rotations are drawn as coloured numbers.
        """
        cfg, pose = self.cfg, self._single(x)
        if cfg.value == "position":
            points = rearrange(x.detach().cpu().float(), "... (j w) 1 -> (... j) w", w=self.width).numpy()
            return _skeleton(points, cfg.bones, cfg.flip_pairs, cfg.y_up)
        if cfg.joints == 23 and cfg.value != "angle":
            turns = rotation_matrices(rearrange(pose, "j w -> 1 w j"))[0].float().numpy()
            return _skeleton(_stick_figure(turns), _SMPL_BONES, _SMPL_PAIRS, y_up=True)
        return barcode(rearrange(pose, "j w -> (j w)"))

    def _single(self, x: Tensor) -> Float[Tensor, "j w"]:
        x = x.detach().cpu().float()
        return rearrange(self.values(x if x.ndim == 3 else rearrange(x, "c 1 -> 1 c 1")), "1 w j -> j w")

    def _moved(self, pose: np.ndarray, view: View, follows: bool) -> np.ndarray:
        if follows:
            return self._in_crop(pose, view)
        return self._mirrored(pose) if view.flip else pose

    def _in_crop(self, pose: np.ndarray, view: View) -> np.ndarray:
        """Positions in the crop of a picture. The left edge is 0, so a mirror turns x into the width minus x."""
        whole, part = (view.extent, view.size) if self.frame == "pixels" else ((1, 1), (1, 1))
        if whole is None:
            raise ConfigError(
                "a pose in pixels cannot follow the crop: the view of data.modality has no extent, so the size of the "
                "picture is unknown. Set data.extra.<label>.frame to shares or body."
            )
        across = np.array(part[::-1])
        start, stop = np.array(view.start[::-1]), np.array(view.stop[::-1])
        moved = (pose / np.array(whole[::-1]) - start) / (stop - start) * across
        if view.flip:
            moved = moved[self.swapped]
            moved[:, 0] = across[0] - moved[:, 0]
        return moved.astype(np.float32)

    def _mirrored(self, pose: np.ndarray) -> np.ndarray:
        pose = pose[self.swapped]
        if self.cfg.value != "position":
            return pose * np.array(_MIRROR[self.cfg.value], np.float32)
        return np.concatenate([2 * self.center[0] - pose[:, :1], pose[:, 1:]], axis=1)

    def _first(self, array: np.ndarray, name: str) -> np.ndarray:
        joints, width = self.cfg.joints, self.width
        shapes: list[tuple[int, ...]] = [(joints, width), (joints * width,)]
        if self.cfg.value == "rotation-matrix":
            shapes.append((joints, 3, 3))
        if width == 1:
            shapes.append((joints,))
        if array.shape in shapes:
            return array.reshape(joints, width)
        if array.shape[1:] in shapes:
            return array[0].reshape(joints, width)
        raise DataError(
            f"{name}: has shape {array.shape}, but {joints} joints of {width} numbers need "
            f"{' or '.join(map(str, dict.fromkeys(shapes)))}, with people as an optional first axis"
        )


def _read_file(path: Path, key: str | None, name: str) -> Any:
    if path.suffix.lower() != ".json":
        return read_array(path, name)
    found = read_json(path, DataError, where=name)
    for part in key.split(".") if key else ():
        if isinstance(found, (list, Mapping)) and not found:
            return []  # 4D-Humans writes an empty list or object when it finds no person
        if not isinstance(found, Mapping) or part not in found:
            names = list(found) if isinstance(found, Mapping) else []
            raise DataError(
                f"{name}: has no '{part}' of data.modality.key={key}.{did_you_mean(part, names)} "
                f"Found: {listed(names) or type(found).__name__}"
            )
        found = found[part]
    if isinstance(found, Mapping):
        if found:
            raise DataError(
                f"{name}: is an object of {listed(found)}; set data.modality.key to the place of the pose"
            )
        return []
    return found


def _skeleton(
    points: np.ndarray,
    bones: tuple[tuple[int, int], ...],
    pairs: tuple[tuple[int, int], ...],
    y_up: bool,
) -> Image.Image:
    """Joints as dots, bones as lines. x points right, y up or down; 3-D joints get a second panel, z points right."""
    views = [points[:, :2]] + ([points[:, [2, 1]]] if points.shape[1] == 3 else [])
    reach = 1.1 * max(1.0, float(np.abs(points).max()))
    canvas = Image.new("RGB", (_PANEL * len(views), _PANEL), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    side = {pair[k]: k + 1 for pair in pairs for k in (0, 1)}
    for panel, flat in enumerate(views):
        unit = flat / reach * (1, -1 if y_up else 1)
        at = (unit + 1) / 2 * (_PANEL - 1) + (panel * _PANEL, 0)
        for a, b in bones:
            colour = _SIDES[max(side.get(a, 0), side.get(b, 0))]
            draw.line([tuple(at[a].tolist()), tuple(at[b].tolist())], fill=colour, width=2)
        for joint, (across, down) in enumerate(at.tolist()):
            draw.ellipse((across - 2, down - 2, across + 2, down + 2), fill=_SIDES[side.get(joint, 0)])
    return canvas


_SMPL_PARENTS = (0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
"""The parent joint of each of SMPL's joints 1 to 23; 0 is the pelvis."""
_SMPL_OFFSETS = (
    (0.10, -0.08, 0), (-0.10, -0.08, 0), (0, 0.12, 0), (0.04, -0.40, 0), (-0.04, -0.40, 0), (0, 0.14, 0),
    (0, -0.42, 0), (0, -0.42, 0), (0, 0.06, 0), (0.02, -0.06, 0.13), (-0.02, -0.06, 0.13), (0, 0.22, 0),
    (0.08, 0.12, 0), (-0.08, 0.12, 0), (0, 0.12, 0), (0.11, 0.02, 0), (-0.11, 0.02, 0), (0.27, 0, 0),
    (-0.27, 0, 0), (0.25, 0, 0), (-0.25, 0, 0), (0.09, 0, 0), (-0.09, 0, 0),
)  # fmt: skip
"""Our own stick figure with SMPL's joints, arms stretched out: metres from the parent joint; left is +x."""
_SMPL_BONES = tuple((parent, joint) for joint, parent in enumerate(_SMPL_PARENTS, start=1))
_SMPL_PAIRS = ((1, 2), (4, 5), (7, 8), (10, 11), (13, 14), (16, 17), (18, 19), (20, 21), (22, 23))


def _stick_figure(turns: np.ndarray) -> np.ndarray:
    """The 24 joints `(24, 3)` of a body whose joints 1 to 23 are rotated by `(23, 3, 3)`; the pelvis is fixed."""
    places, frames = [np.zeros(3)], [np.eye(3)]
    for parent, offset, turn in zip(_SMPL_PARENTS, _SMPL_OFFSETS, turns):
        places.append(places[parent] + frames[parent] @ np.array(offset))
        frames.append(frames[parent] @ turn)
    return np.stack(places)
