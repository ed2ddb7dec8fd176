"""Synthetic scenes as a data source: colours, depth, normals, classes, edges, instances, a pose and a sound, all exact.

Samples are computed when they are asked for: no files, and no memory that grows with the number of samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from einops import rearrange

from vqcore.config import at_least
from vqcore.errors import SettingError, did_you_mean, listed
from vqcore.protocols import Modality
from vqcore.rng import numpy_generator
from vqcore.schema import DataConfig
from vqcore_synth.melody import melody
from vqcore_synth.render import Hits, cast, colours, edges, is_visible, pixel_rays, project
from vqcore_synth.scene import Scene, draw_scene

What = Literal["rgb", "depth", "normal", "semseg", "edge", "instance", "pose", "visible", "audio"]
WHAT_OF: dict[str, What] = {
    "rgb": "rgb",
    "depth": "depth",
    "normal": "normal",
    "semseg": "semseg",
    "edge": "edge",
    "instance": "instance",
    "pose": "pose",
    "wave": "audio",
    "log-mel": "audio",
}
"""What to draw for a modality, by its name without the plugin: `depth` stands for `vision/depth`."""
SIDE = 128
"""Side of a picture in pixels, if neither the config nor the main modality has a size for pictures."""


class Scenes:
    """Sample i of a split is a function of (seed, split, i): a room with a person, balls and boxes, and a melody.

    The arrays by `what`, for pictures of height h and width w: rgb uint8 (h, w, 3); depth float32 (h, w), metres along
    the camera's axis; normal float32 (3, h, w), unit vectors, x right, y up, z towards the viewer; semseg uint8 (h, w),
    classes as in `scene.CLASSES`; edge uint8 (h, w), 255 on the nearer side of a border of class, instance or depth;
    instance uint16 (h, w), 0 for the room; pose float32 (17, 2), COCO's keypoints as x and y in pixels; visible uint8
    (17,), 1 for joints that the camera sees; audio float32 (n,), -1..1. One ray goes through the centre of each pixel;
    only the colours of pixels with high contrast are the mean of several rays.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of synthetic scenes."""

        what: What | None = None
        """What to draw for the main modality. Null: what the name of the modality says."""
        extra_what: dict[str, What] = field(default_factory=dict)
        """What to draw for extra modalities, by label of data.extra. By default what the name of the modality says."""
        seed: int = 0
        """Different seeds give different scenes."""
        samples: int = 10_000
        """Number of training samples; samples take no memory."""
        eval_samples: int = 500
        """Number of evaluation samples, all different from the training samples; 0 for no evaluation."""
        side: int | tuple[int, int] | None = None
        """Side of the pictures, or height and width, in pixels. Null: the nominal size of the main modality."""
        objects: tuple[int, int] = (3, 8)
        """Smallest and largest number of balls and boxes in a scene; fewer if the room has no space for them."""
        length: int = 16_000
        """Length of a sound in samples."""
        rate: int = 16_000
        """Samples per second of a sound."""

        @property
        def has_eval(self) -> bool:
            """True unless `eval_samples` is 0."""
            return self.eval_samples > 0

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least(self, samples=1, length=1, rate=1, eval_samples=0)
            if any(side < 1 for side in _pair(self.side or SIDE)):
                raise SettingError("side", f"{self.side} has a side below 1")
            if not 0 <= self.objects[0] <= self.objects[1]:
                raise SettingError(
                    "objects", f"{list(self.objects)} must be two numbers, at least 0, in ascending order"
                )
            for label in self.extra_what:
                if label not in self.extra:
                    hint = did_you_mean(label, self.extra) or f" Labels: {listed(self.extra) or 'none'}."
                    raise SettingError(
                        ("extra_what",), f"extra_what.{label}: data.extra has no label {label}.{hint}"
                    )

    def __init__(
        self,
        cfg: Config,
        *,
        split: Literal["train", "eval"],
        modality: Modality,
        extra: Mapping[str, Modality],
    ):
        self._seed = (cfg.seed, "synthetic", split)
        self._length = cfg.samples if split == "train" else cfg.eval_samples
        nominal = modality.spec.size if modality.spec.rank == 2 else SIDE
        self._size = _pair(cfg.side if cfg.side is not None else nominal)  # type: ignore[arg-type]
        self._cfg = cfg
        self._what = {"": _what("what", cfg.what, cfg.modality.name)}
        for label in extra:
            wanted = cfg.extra_what.get(label)
            self._what[label] = _what(f"extra_what.{label}", wanted, cfg.extra[label].name)
        self._last: tuple[int, Scene, Hits | None] | None = None

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """The number of the sample, padded with zeros."""
        return f"{index:0{len(str(self._length - 1))}d}"

    def bytes_of(self, index: int, label: str = "") -> None:
        """Not known before a scene is made."""

    def get(self, index: int, label: str = "") -> np.ndarray:
        """A new array, which the modality of this label reads."""
        what = self._what[label]
        if what == "audio":
            return melody(self._cfg.length, self._cfg.rate, *self._seed, index)
        scene = self._scene(index)
        if what == "pose":
            return project(scene.camera, self._size, scene.figure.joints).astype(np.float32)
        if what == "visible":
            return is_visible(scene, self._size).astype(np.uint8)
        return self._picture(what, scene, self._hits(index))

    def _picture(self, what: str, scene: Scene, hits: Hits) -> np.ndarray:
        if what == "rgb":
            return colours(scene, self._size, hits)
        if what == "edge":
            return np.where(edges(hits, self._size), np.uint8(255), np.uint8(0))
        if what == "normal":
            seen = (scene.camera.turn @ hits.normal).astype(np.float32)
            return rearrange(seen, "c (h w) -> c h w", h=self._size[0])
        flat: dict[str, np.ndarray] = {
            "depth": hits.depth.astype(np.float32),
            "semseg": hits.label.astype(np.uint8),
            "instance": hits.thing.astype(np.uint16),
        }
        return rearrange(flat[what], "(h w) -> h w", h=self._size[0])

    # The extra modalities of a sample ask for the same scene again, so the last scene is kept.

    def _scene(self, index: int) -> Scene:
        if self._last is None or self._last[0] != index:
            rng = numpy_generator(*self._seed, index)
            self._last = index, draw_scene(rng, self._cfg.objects), None
        return self._last[1]

    def _hits(self, index: int) -> Hits:
        scene = self._scene(index)
        hits = self._last[2] if self._last else None
        if hits is None:
            hits = cast(scene, pixel_rays(scene.camera, self._size))
            self._last = index, scene, hits
        return hits

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}


def _what(setting: str, wanted: What | None, modality: str) -> What:
    found = wanted or WHAT_OF.get(modality.rpartition("/")[2])
    if found is None:
        raise ValueError(
            f"{setting} is not set, and the modality '{modality}' does not say what to draw: set {setting} to one of "
            f"{listed(get_args(What))}"
        )
    return found


def _pair(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else side
